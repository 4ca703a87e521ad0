"""Pictures: the right panels, labels and data on the axes, and pixels that show them."""

import numpy as np
import pytest
from matplotlib.image import imread

from beats_jax import plots

LENGTH, FRAMES = 160, 330  # 20 columns of 8 tokens; 10 frames are left over


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at their axes; the PNGs are written all the same."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def _run(steps=60):
    """Logged lines of a run of which every third step has held-out figures."""
    rng = np.random.default_rng(0)
    lines = [{"step": 0, "code_perplexity": 290.0, "codes_used": 900.0}]
    for step in range(10, 10 * steps + 1, 10):
        fall = np.exp(-step / 200)
        line = {"step": step, "loss": 3 + 3 * fall, "unigram_loss": 4.7, "lr": 1e-5 * step}
        line |= {"masked_accuracy": 0.3 - 0.3 * fall, "unigram_accuracy": 0.08}
        line |= {
            "code_perplexity": 290 + rng.normal(),
            "predicted_code_perplexity": 100 - 90 * fall,
        }
        line |= {
            "codes_used": 900.0,
            "predicted_codes_used": 300.0,
            "feature_std": 0.5 - 0.4 * fall,
        }
        if step % 30 == 0:
            line |= {"val_loss": line["loss"] + 0.1, "val_unigram_loss": 4.75}
        lines.append(line)
    return lines


def _clip():
    rng = np.random.default_rng(1)
    log_mel = rng.normal(0, 0.5, (FRAMES, 128)).astype(np.float32)
    padding = np.arange(LENGTH) >= 120
    mask = (rng.random(LENGTH) < 0.75) & ~padding
    target = rng.integers(0, 1024, LENGTH)
    predicted = np.where(rng.random(LENGTH) < 0.3, target, (target + 1) % 1024)
    return log_mel, mask, target, predicted, padding


def _colours(path):
    image = imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 500
    return len(np.unique((image.reshape(-1, 4) * 255).astype(np.uint8), axis=0))


def test_curves(tmp_path, drawn):
    path = tmp_path / "plots" / "curves.png"
    plots.plot_curves(_run(), path)
    assert _colours(path) > 50
    axes = {axis.get_title(loc="left"): axis for axis in drawn[0].axes}
    assert {title: axis.get_ylabel() for title, axis in axes.items()} == {
        "Loss": "cross-entropy (nats)",
        "Masked accuracy": "share of masked tokens",
        "Code perplexity": "effective codes",
        "Codes used": "different codes",
        "Feature spread": "std over clips",
        "Learning rate": "learning rate",
    }
    assert {axis.get_xlabel() for axis in axes.values()} == {"step"}
    legend = [text.get_text() for text in axes["Loss"].get_legend().get_texts()]
    assert legend == ["model", "per-band unigram"]
    model, held_out, unigram, _ = axes["Loss"].get_lines()
    np.testing.assert_allclose(model.get_ydata(), 3 + 3 * np.exp(-model.get_xdata() / 200))
    np.testing.assert_array_equal(held_out.get_xdata(), np.arange(30, 601, 30))
    np.testing.assert_allclose(unigram.get_ydata(), 4.7)
    assert axes["Code perplexity"].get_lines()[0].get_xdata()[0] == 0  # calibrated before step 1


def test_curves_of_a_long_run_are_smoothed_but_not_the_schedule(tmp_path, drawn):
    lines = _run(500)
    for line in lines[1:]:
        line["loss"] += (-1) ** (line["step"] // 10)
    plots.plot_curves(lines, tmp_path / "curves.png")
    axes = {axis.get_title(loc="left"): axis for axis in drawn[0].axes}
    raw, smooth = axes["Loss"].get_lines()[:2]
    assert np.abs(np.diff(raw.get_ydata())).max() > 1.9
    assert np.abs(smooth.get_ydata() - (3 + 3 * np.exp(-smooth.get_xdata() / 200))).max() < 0.05
    assert len(axes["Learning rate"].get_lines()[0].get_xdata()) == 500


def test_curves_of_what_there_is(tmp_path, drawn):
    lines = [{"step": 1, "loss": 2.0, "val_loss": 2.5}, {"step": 2, "loss": float("nan")}]
    plots.plot_curves(lines, tmp_path / "curves.png")
    assert [axis.get_title(loc="left") for axis in drawn[0].axes] == ["Loss"]
    line, held_out = drawn[0].axes[0].get_lines()
    assert list(line.get_ydata()) == [2.0] and list(held_out.get_ydata()) == [2.5]
    with pytest.raises(ValueError, match="2 lines of metrics hold nothing to draw"):
        plots.plot_curves([{"step": 1}, {"step": 2, "clips_per_s": 3.0}], tmp_path / "none.png")


def test_example(tmp_path, drawn):
    log_mel, mask, target, predicted, padding = _clip()
    plots.plot_example(log_mel, mask, target, predicted, padding, tmp_path / "example.png")
    assert _colours(tmp_path / "example.png") > 1000
    seen, masked, targets, predictions, *_ = drawn[0].axes
    assert predictions.get_xlabel() == "time (s)"
    assert [a.get_ylabel() for a in (seen, masked, targets, predictions)] == (
        ["mel bin", "mel bin", "band", "band"]
    )
    assert predictions.get_xlim() == (0, pytest.approx(3.2))  # 20 columns of 0.16 s

    shown = seen.get_images()[0].get_array()
    np.testing.assert_array_equal(shown[:, :240], log_mel[:240].T)  # mel bin 0 is the lowest row
    assert {image.origin for axis in (seen, masked, targets) for image in axis.get_images()} == {
        "lower"
    }
    assert np.ma.getmaskarray(shown)[:, 240:].all()  # padding stays white
    unmasked = ~np.ma.getmaskarray(masked.get_images()[0].get_array())
    assert unmasked.sum() == 256 * (~mask & ~padding).sum()
    # Token p = 8 t + f: column t, row f.
    grid = targets.get_images()[0].get_array()
    assert grid[3, 7] == target[8 * 7 + 3]
    guesses = predictions.get_images()[-1].get_array()
    assert guesses.count() == mask.sum()
    (dots,) = predictions.get_lines()
    right = mask & (target == predicted)
    found = 8 * np.floor(np.divide(dots.get_xdata(), 0.16)) + np.floor(dots.get_ydata())
    np.testing.assert_array_equal(np.sort(found), np.flatnonzero(right))
    assert f"{right.sum()} of {mask.sum()}" in predictions.get_title(loc="left")


def test_example_at_the_edges(tmp_path):
    """One column, nothing masked; and a wholly padded clip."""
    ids = np.zeros(8, np.int32)
    silence = np.full((16, 128), -2.39, np.float32)
    for masked, padded in ((False, False), (True, True)):
        mask, padding = np.full(8, masked), np.full(8, padded)
        plots.plot_example(silence, mask, ids, ids, padding, tmp_path / "edge.png")
        assert _colours(tmp_path / "edge.png") > 50


def test_example_refuses_arrays_of_different_clips(tmp_path):
    log_mel, mask, target, predicted, padding = _clip()
    with pytest.raises(ValueError, match=r"got log_mel \(330, 128\) and \(160,\), \(152,\)"):
        plots.plot_example(log_mel, mask, target[:-8], predicted, padding, tmp_path / "x.png")
    with pytest.raises(ValueError, match="160 tokens do not lie in 319 frames"):
        plots.plot_example(log_mel[:319], mask, target, predicted, padding, tmp_path / "x.png")


def test_code_usage(tmp_path, drawn):
    counts = {"band 0": np.array([1, 0, 3, 4]), "band 1": np.array([2, 2, 2, 2])}
    plots.plot_code_usage(counts, tmp_path / "usage.png")
    (axis,) = drawn[0].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("code, most used first", "share of tokens")
    np.testing.assert_allclose(axis.get_lines()[0].get_ydata(), [0.5, 0.375, 0.125])
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["band 0 (perplexity 3)", "band 1 (perplexity 4)", "uniform: 1/4"]
    assert _colours(tmp_path / "usage.png") > 20


def _distillation():
    """Logged lines of a tokenizer's run."""
    lines: list[dict[str, float]] = [{"step": 0, "code_perplexity": 700.0, "codes_used": 1024.0}]
    for step in range(10, 610, 10):
        rise = 1 - np.exp(-step / 200)
        line = {"step": step, "loss": 1 - 0.9 * rise, "teacher_cosine": 0.9 * rise, "lr": 1e-4}
        line |= {"constant_cosine": 0.3, "commitment": 1 - 0.6 * rise, "codes_used": 240.0}
        line |= {"code_perplexity": 200 * rise, "dead_codes": step / 3}
        line |= {"val_teacher_cosine": 0.85 * rise} if step % 100 == 0 else {}
        lines.append(line)
    return lines


def test_curves_of_a_tokenizer_over_a_reference(tmp_path, drawn):
    shorter = [line for line in _distillation() if line["step"] <= 300]
    plots.plot_curves(_distillation(), tmp_path / "curves.png", shorter)
    axes = {axis.get_title(loc="left"): axis for axis in drawn[0].axes}
    titles = "Loss|Cosine to the teacher|Commitment|Use of the codebook|Learning rate"
    assert [title for title in axes if title] == titles.split("|")
    lines = {line.get_label(): line for line in axes["Cosine to the teacher"].get_lines()}
    assert lines["reference"].get_xdata().max() == 300 and lines["reference"].get_linestyle() == ":"
    assert lines["estimator"].get_xdata().max() == 600
    labels = [text.get_text() for text in axes["Use of the codebook"].get_legend().get_texts()]
    assert labels == ["reference", "in use in a batch", "perplexity", "dead"]
    assert "reference" not in [line.get_label() for line in axes["Learning rate"].get_lines()]


def test_token_map(tmp_path, drawn):
    log_mel, _, _, _, padding = _clip()
    ids = np.arange(LENGTH) % 4 + 1000
    ids[:30] = 7
    path = tmp_path / "map.png"
    plots.plot_token_map(log_mel, ids, padding, path)
    assert _colours(path) > 50
    tokens = drawn[0].axes[2]
    assert tokens.get_title(loc="left") == "Tokens: 5 different in 120 patches"
    labels = [text.get_text() for text in tokens.get_legend().get_texts()]
    assert labels[0] == "token 1000: 22 times" or "token 7: 30 times" in labels
    tiles = tokens.images[0].get_array()  # [8, T', 3]
    assert tiles.shape == (8, 20, 3)
    np.testing.assert_array_equal(tiles[:, 15:], 1.0)  # padding stays white
    grid = ids.reshape(-1, 8).T
    for a, b in (((0, 0), (1, 0)), ((0, 0), (0, 10)), ((0, 10), (4, 10)), ((0, 10), (1, 10))):
        assert np.array_equal(tiles[a], tiles[b]) == (grid[a] == grid[b])
    with pytest.raises(ValueError, match=r"got log_mel \(10, 128\)|tokens do not lie in 10 frames"):
        plots.plot_token_map(log_mel[:10], ids, padding, path)


def test_token_agreement(tmp_path, drawn):
    rows = {
        "random projection": {"agreement": [0.9, 0.4, 0.1], "chance": 0.02},
        "distilled": {"agreement": [0.95, 0.7, 0.3], "chance": 0.01},
    }
    plots.plot_token_agreement((40, 20, 0), rows, tmp_path / "agreement.png")
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["distilled"].get_ydata().tolist() == [0.95, 0.7, 0.3]
    assert set(lines["distilled, by chance"].get_ydata()) == {0.01}
    assert lines["distilled"].get_marker() != lines["random projection"].get_marker()
    left, right = axis.get_xlim()
    assert left > right  # more noise to the right
