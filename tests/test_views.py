"""Pictures of what a model says of sounds: the right numbers at the right places."""

import numpy as np
import pytest

from beats_jax import views
from beats_jax.features import project


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at their axes; the PNGs are written all the same."""
    figures = []
    save = views.save_figure
    monkeypatch.setattr(
        views, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def test_like_features_have_like_colours(tmp_path, drawn):
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, (6, 8))
    features = rng.normal(size=(3, 16))[kind] + 1e-6 * rng.normal(size=(6, 8, 16))
    log_mel = rng.normal(size=(100, 128))  # 6 columns, and 4 frames that are left out
    views.plot_frame_features(log_mel, features, tmp_path / "a/f.png")
    sound, over, alone = drawn[0].axes
    assert sound.images[0].get_array().shape == (128, 96)
    assert over.images[0].get_array().shape == (128, 96, 3)
    colours = np.asarray(alone.images[0].get_array())  # [8, 6, 3]
    same = kind.T[:, :, None, None] == kind.T
    distance = np.abs(colours[:, :, None, None] - colours).max(axis=-1)
    assert distance[same].max() < 1e-2 and distance[~same].min() > 0.3
    assert alone.get_title(loc="left").endswith("100 % of the variance")
    assert (tmp_path / "a/f.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"log_mel \(80, 128\) and features \(6, 8, 16\)"):
        views.plot_frame_features(log_mel[:80], features, tmp_path / "f.png")


def test_one_column_and_narrow_features_can_be_drawn(tmp_path, drawn):
    views.plot_frame_features(np.zeros((16, 128)), np.ones((1, 8, 2)), tmp_path / "f.png")
    assert np.isfinite(drawn[0].axes[2].images[0].get_array()).all()


def test_class_scores_lie_where_their_windows_are(tmp_path, drawn):
    spans = np.array([[0.0, 2.0], [1.0, 3.0], [1.5, 3.5]])
    probs = np.array([[0.1, 0.2, 0.9], [0.1, 0.8, 0.1], [0.0, 0.7, 0.1]])
    views.plot_class_scores(spans, probs, ["dog", "rain", "siren"], tmp_path / "s.png", top=2)
    axis = drawn[0].axes[0]
    mesh = axis.collections[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["siren", "rain"]  # as they come
    np.testing.assert_allclose(np.reshape(mesh.get_array(), (2, 3)), probs[:, [2, 1]].T)
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0, 1.5, 2.25, 3.5])
    with pytest.raises(ValueError, match="1 labels"):
        views.plot_class_scores(spans, probs, ["dog"], tmp_path / "s.png")


def test_a_map_has_every_point_once_and_the_rarest_classes_as_other(tmp_path, drawn):
    labels = np.repeat([f"class {i:02d}" for i in range(23)], range(30, 7, -1))
    points = np.random.default_rng(0).normal(size=(len(labels), 2))
    views.plot_map({"PCA": points, "t-SNE": -points}, list(labels), tmp_path / "m.png", "clips")
    first, second = drawn[0].axes
    assert first.get_title(loc="left") == "clips: PCA"
    names = [text.get_text() for text in second.get_legend().get_texts()]
    assert names == ["other", *(f"class {i:02d}" for i in range(20))]
    for sign, axis in ((1, first), (-1, second)):
        offsets = {c.get_label(): np.asarray(c.get_offsets()) for c in axis.collections}
        np.testing.assert_allclose(offsets["class 03"], sign * points[labels == "class 03"])
        assert len(offsets["other"]) == np.isin(labels, ["class 20", "class 21", "class 22"]).sum()
    with pytest.raises(ValueError, match=r"\(\d+, 2\) for 3 labels"):
        views.plot_map({"PCA": points}, ["a", "b", "c"], tmp_path / "m.png")


def test_a_token_is_drawn_as_the_mean_of_its_patches(tmp_path, drawn):
    rng = np.random.default_rng(0)
    log_mels = [rng.normal(size=(frames, 128)).astype(np.float32) for frames in (50, 33)]
    ids = [rng.integers(0, 5, (3, 8)), np.full((2, 8), -1)]
    ids[1][0, 2] = 7
    views.plot_codebook(log_mels, ids, tmp_path / "c.png", shown=6)
    kinds, counts = np.unique(ids[0], return_counts=True)
    named = [(axis.get_title(loc="left"), axis) for axis in drawn[0].axes]
    titles = {title.split(":")[0]: axis for title, axis in named if title}
    assert list(titles) == [str(k) for k in kinds[np.argsort(-counts, kind="stable")]] + ["7"]
    shown = np.asarray(titles["7"].images[0].get_array())
    np.testing.assert_array_equal(shown, log_mels[1][:16, 32:48].T)
    where = np.argwhere(ids[0] == kinds[0])
    patches = [log_mels[0][16 * t : 16 * t + 16, 16 * f : 16 * f + 16].T for t, f in where]
    image = titles[str(kinds[0])].images[0].get_array()
    np.testing.assert_allclose(image, np.mean(patches, axis=0), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no token"):
        views.plot_codebook(log_mels[1:], [np.full((2, 8), -1)], tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"tokens \(2, 8\)"):
        views.plot_codebook(log_mels[:1], ids[1:], tmp_path / "c.png")


def test_projections_keep_groups_apart():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 10)
    features = 8 * rng.normal(size=(3, 20))[groups] + rng.normal(size=(30, 20))
    maps = project(features)
    assert list(maps) == ["PCA", "t-SNE"]
    for name, points in maps.items():
        assert points.shape == (30, 2) and points.dtype == np.float32, name
        distance = np.linalg.norm(points[:, None] - points, axis=-1)
        np.fill_diagonal(distance, np.inf)
        assert np.mean(groups[distance.argmin(axis=1)] == groups) == 1, name
    np.testing.assert_array_equal(project(features)["t-SNE"], maps["t-SNE"])
    with pytest.raises(ValueError, match=r"\(3, 20\): a map needs 4 rows"):
        project(features[:3])
