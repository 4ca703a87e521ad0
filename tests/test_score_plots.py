"""Pictures of scores: the right numbers at the right places, and pixels that show them."""

import numpy as np
import pytest

from beats_jax import score_plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at their axes; the PNGs are written all the same."""
    figures = []
    save = score_plots.save_figure
    monkeypatch.setattr(
        score_plots,
        "save_figure",
        lambda figure, path: (figures.append(figure), save(figure, path)),
    )
    return figures


def test_confusion(tmp_path, drawn):
    matrix = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    score_plots.plot_confusion(matrix, ["dog", "rain", "siren"], tmp_path / "a/c.png", "ensemble")
    axis = drawn[0].axes[0]
    np.testing.assert_allclose(axis.images[0].get_array()[:2], [[0.8, 0.2, 0], [0, 1, 0]])
    texts = {t.get_position(): t.get_text() for t in axis.texts}
    assert texts == {(0, 0): "8", (1, 0): "2", (1, 1): "5"}  # x is the predicted class
    assert [t.get_text() for t in axis.get_yticklabels()] == ["dog", "rain", "siren"]
    assert axis.get_title(loc="left") == "ensemble: 13 of 15 right"
    assert (tmp_path / "a/c.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"the matrix is \(3, 3\) for 2 classes"):
        score_plots.plot_confusion(matrix, ["dog", "rain"], tmp_path / "c.png")
    score_plots.plot_confusion(
        np.eye(50, dtype=int), [str(i) for i in range(50)], tmp_path / "c.png"
    )
    assert not drawn[1].axes[0].texts  # no room for numbers


@pytest.mark.parametrize("number", [3, 60, 200])
def test_class_ap(tmp_path, drawn, number):
    values = np.random.default_rng(0).random(number)
    values[1] = np.nan
    names = [f"class {i}" for i in range(number)]
    score_plots.plot_class_ap(values, np.arange(number), names, tmp_path / "ap.png", "best")
    (axis,) = drawn[0].axes
    shown = [t.get_text() for t in axis.get_yticklabels()]
    order = [f"class {i} ({i})" for i in np.argsort(values)[: number - 1]]
    assert shown == (order if number <= 61 else order[:30] + order[-30:])
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == sorted(widths) and widths[-1] == np.nanmax(values)
    assert axis.get_title(loc="left") == (
        f"best: mAP {np.nanmean(values):.3f} (classes without a clip: 1)"
    )
    with pytest.raises(ValueError, match="none of 2 classes has"):
        score_plots.plot_class_ap([np.nan] * 2, [0, 0], ["a", "b"], tmp_path / "ap.png")


def test_layers(tmp_path, drawn):
    means = {"linear": [0.2, 0.5, 0.4], "knn": [0.1, 0.3, 0.2]}
    stds = {name: [0.01, 0.02, 0.03] for name in means}
    path = tmp_path / "layers.png"
    score_plots.plot_layers(means, stds, {"linear": 0.45, "knn": 0.25}, path)
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    np.testing.assert_allclose(lines["knn, log-mel"], 25)
    curves = [bars.lines[0].get_ydata() for bars in axis.containers]
    np.testing.assert_allclose(curves, [[20, 50, 40], [10, 30, 20]])
    assert axis.get_xticks().tolist() == [0, 1, 2] and path.stat().st_size > 5000
