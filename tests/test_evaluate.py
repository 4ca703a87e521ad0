"""Evaluation: scores that are right and kept, ensembles, labels that do not fit, comparisons."""

import json
import re
from typing import Any

import numpy as np
import pytest
from runs import FIXTURES
from sklearn import metrics as sklearn_metrics

import beats_jax
from beats_jax import cli, evaluate, results, windows
from beats_jax.checkpoint import tree_sha256
from beats_jax.data import sources
from beats_jax.data.synthetic import synthetic_clips
from beats_jax.evaluate import align, kept_scores, read_truth, score, summarise
from beats_jax.exported import save_exported
from beats_jax.labels import audioset
from beats_jax.pretrained import load_model

CLASSES = ("rain", "dog", "siren")


def small_model(folder, seed: int, classes=CLASSES, task="single-label") -> str:
    """The fixture's encoder with a head of a few classes, as an exported folder."""
    model = load_model(FIXTURES / "dev_finetuned.pt")
    kernel = np.random.default_rng(seed).normal(size=(48, len(classes))).astype(np.float32)
    head = {"kernel": kernel, "bias": np.zeros(len(classes), np.float32)}
    params = {**model.params, "head": head}
    source = {**model.source, "params_sha256": tree_sha256(params)}
    changes: dict[str, Any] = dict(params=params, labels=classes, task=task, source=source)
    model = model._replace(**changes, official=None)
    save_exported(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [small_model(root / f"seed{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def clips() -> sources.Clips:
    """12 synthetic clips of a second, one longer than a window; two of a class no model has."""
    made = synthetic_clips(12, seconds=1.0, seed=0)
    lengths = made.num_samples.copy()
    lengths[3] = 200_000

    def read(record: int) -> np.ndarray:
        return np.resize(made.read(record), lengths[record])

    category = ["rain", "dog", "siren", "dog"] * 2 + ["rain", "dog", "whale", "whale"]
    columns = {"category": category, "labels": [f"{c};rain" for c in category], "fold": ["1"] * 12}
    return sources.Clips(made.ids, lengths, columns, made.digests, read, made.records)


@pytest.fixture
def data(clips, monkeypatch) -> str:
    """What stands for a prepared folder on the command line."""
    monkeypatch.setattr(evaluate, "open_folders", lambda name, cache: clips)
    return "DATA"


def test_a_score_is_what_classify_gives_the_clip_alone(models, clips):
    model = beats_jax.load(models[0])
    logits = score(model, clips, batch_size=4)
    for row in (0, 5, 11):
        (pcm,) = clips.fetch(np.array([row]))
        alone, _ = model.classify(pcm)
        np.testing.assert_allclose(logits[row], alone, rtol=0, atol=1e-4)
    assert np.abs(np.diff(logits, axis=0)).max() > 1e-2  # clips differ, so rows are not mixed up
    (long,) = clips.fetch(np.array([3]))
    windows_of = windows.classify(model, long / np.float32(32768))
    np.testing.assert_allclose(logits[3], windows_of.logits, rtol=0, atol=1e-4)


def test_scores_are_kept_and_belong_to_one_model_and_data_set(models, clips, tmp_path, monkeypatch):
    model, other = (beats_jax.load(path) for path in models[:2])
    cells = clips.columns["category"]
    first = kept_scores(model, clips, cells, tmp_path, 4, "float32")
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as saved:
        assert saved["ids"].tolist() == clips.ids and saved["classes"].tolist() == list(CLASSES)
        assert saved["labels"].tolist() == cells
        np.testing.assert_array_equal(saved["logits"], first)
        assert json.loads(str(saved["key"]))["data"] == clips.fingerprint
    asked = []
    monkeypatch.setattr(evaluate, "score", lambda *a: asked.append(a[1]) or first[: len(a[1])])
    np.testing.assert_array_equal(kept_scores(model, clips, cells, tmp_path, 4, "float32"), first)
    assert not asked
    kept_scores(other, clips, cells, tmp_path, 4, "float32")
    fewer = clips.select(keep=np.arange(12) < 6)
    kept_scores(model, fewer, cells[:6], tmp_path, 4, "float32")
    kept_scores(model, clips, cells, tmp_path, 4, "bfloat16")
    assert [len(a) for a in asked] == [12, 6, 12] and len(list(tmp_path.glob("*.npz"))) == 4


def test_ensemble_of_models_whose_classes_stand_in_other_orders():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    probs = [rng.dirichlet(np.ones(3), 200) + 0.4 * np.eye(3)[labels] for _ in range(3)]
    orders = [[0, 1, 2], [2, 0, 1], [1, 0, 2]]
    shuffled = [p[:, order] for p, order in zip(probs, orders, strict=True)]
    names = [[CLASSES[i] for i in order] for order in orders]
    aligned = [p[:, a] for p, a in zip(shuffled, align(names), strict=True)]
    np.testing.assert_array_equal(aligned, probs)
    figures = summarise(aligned, labels, "single-label")
    single = [sklearn_metrics.accuracy_score(labels, p.argmax(1)) for p in probs]
    assert [m["metrics"]["accuracy"] for m in figures["members"]] == pytest.approx(single)
    assert figures["mean"]["accuracy"] == pytest.approx(np.mean(single))
    assert figures["std"]["accuracy"] == pytest.approx(np.std(single, ddof=1))
    assert figures["best"] == int(np.argmax(single))
    together = sklearn_metrics.accuracy_score(labels, np.mean(probs, axis=0).argmax(1))
    assert figures["ensemble"]["accuracy"] == together > max(single)
    with pytest.raises(ValueError, match=r"model 2 2, which.*such as siren"):
        align([list(CLASSES), list(CLASSES[:2])])


def test_truth_of_one_label():
    truth = read_truth(["dog", "whale", " rain", "", "dog"], CLASSES, "single-label")
    assert truth.labels.tolist() == [1, 0, 1] and truth.counts.tolist() == [1, 2, 0]
    assert truth.scored.tolist() == [True, False, True, False, True]
    assert truth.notes == (
        "1 labels are no class of the models: whale (1)",
        "2 of 5 clips have no class of the models: left out",
        "1 of 3 classes have no clip here: siren",
    )
    with pytest.raises(ValueError, match=r"none of 2 clips has a class.*here: 3, 4.*--label"):
        read_truth(["3", "4"], CLASSES, "single-label")


def test_truth_of_several_labels():
    names = tuple(audioset().values())
    cells = ["/m/05zppz;/m/09x0r", "/m/0bt9lr;/m/nonsense", "/m/nonsense"]
    truth = read_truth(cells, names, "multi-label")
    found = [[names[i] for i in np.flatnonzero(row)] for row in truth.labels]
    assert found == [["Speech", "Male speech, man speaking"], ["Dog"], []] and truth.scored.all()
    assert truth.notes[0].startswith("2 labels are no class of the models: /m/nonsense (2)")
    assert truth.counts.sum() == 3
    alone = read_truth(["Male speech, man speaking", "Dog"], names, "multi-label")
    assert alone.counts.sum() == 2  # a comma inside a class's name separates nothing


def test_evaluate_writes_what_it_found(models, clips, data, tmp_path, capsys):
    out = tmp_path / "E"
    words = ["evaluate", "--ckpt", *models, data, "--out", str(out), "--precision", "float32"]
    assert cli.main(words) == 0
    said, warned = capsys.readouterr()
    assert "note: 2 of 12 clips have no class of the models: left out" in warned
    saved = json.loads((out / "results.json").read_text())
    assert saved["task"] == "single-label" and len(saved["members"]) == 3
    assert saved["data"]["clips"] == 10 and saved["data"]["left_out"] == 2
    assert saved["data"]["coverage"] == {"rain": 3, "dog": 5, "siren": 2}
    assert saved["data"]["fingerprint"] == clips.fingerprint
    assert saved["versions"]["beats_jax"] == beats_jax.__version__
    assert saved["members"][1]["params_sha256"] == beats_jax.load(models[1]).source["params_sha256"]
    # The ensemble again, by hand.
    probs, rows = [], np.arange(10)
    for path in models:
        model = beats_jax.load(path)
        probs.append(model.probabilities(score(model, clips.select(keep=np.arange(12) < 10))))
    truth = [CLASSES.index(c) for c in clips.columns["category"][:10]]
    right = np.mean(probs, axis=0).argmax(1) == np.array(truth)
    assert saved["ensemble"]["accuracy"] == pytest.approx(right.mean()) and len(rows) == 10
    assert saved["per_class"]["dog"]["recall"] == pytest.approx(right[np.array(truth) == 1].mean())
    block = (out / "RESULTS.md").read_text()
    for text in (clips.fingerprint, saved["date"], "best (model", "ensemble of 3", *models):
        assert text in block
    assert re.search(r"\| ensemble of 3 \| 0\.\d{4} \| 0\.\d{4} \|", said)
    assert (out / "plots/confusion.png").stat().st_size > 10_000


def test_one_multi_label_model(clips, data, tmp_path):
    path = small_model(tmp_path / "model", 5, task="multi-label")
    found = evaluate.evaluate([path], data, tmp_path / "E", filter="fold=1")
    assert found["settings"]["label"] == "labels" and found["ensemble"] is None
    assert found["std"] == {} and set(found["mean"]) == {"mAP", "mAUC", "d_prime"}
    truth = np.array([[k in (c, "rain") for k in CLASSES] for c in clips.columns["category"]])
    logits = score(beats_jax.load(path), clips)
    ap = sklearn_metrics.average_precision_score(truth, logits, average="macro")
    assert found["members"][0]["metrics"]["mAP"] == pytest.approx(ap, abs=1e-6)
    assert found["per_class"]["rain"] == {"clips": 12, "average_precision": 1.0}
    assert (tmp_path / "E/plots/average_precision.png").exists()


def test_compare_and_its_refusals(models, clips, data, tmp_path, capsys, monkeypatch):
    a, b, c = (tmp_path / name for name in "abc")
    evaluate.evaluate(models[:1], data, a)
    evaluate.evaluate(models, data, b)
    assert cli.main(["evaluate", "--compare", str(a), str(b / "results.json")]) == 0
    table = capsys.readouterr().out
    first, second = (json.loads((x / "results.json").read_text()) for x in (a, b))
    change = second["ensemble"]["accuracy"] - first["members"][0]["metrics"]["accuracy"]
    assert f"{change:+.4f} |" in table
    evaluate.evaluate(models[:1], data, c, label="category", filter="category!=rain")
    assert cli.main(["evaluate", "--compare", str(a), str(c)]) == 2
    message = capsys.readouterr().err
    assert "unlike sets: data" in message and "(10 clips)" in message and "(7 clips)" in message
    (c / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not the results\.json of"):
        results.compare(str(a), str(c))
    with pytest.raises(FileNotFoundError, match="no results there"):
        results.compare(str(a), str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt", "only"], "and the data? give --ckpt MODEL"),
        (["--ckpt", str(FIXTURES / "dev_encoder.pt"), "DATA"], "of kind encoder: no class scores"),
        (["--ckpt", "nowhere.pt", "DATA"], "nowhere.pt is not there"),
        ([], "one of the arguments --ckpt --compare is required"),
    ],
)
def test_bad_input_is_one_line(words, message, data, capsys):
    try:
        code = cli.main(["evaluate", *words])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and message in err


def test_models_and_columns_that_do_not_fit(models, data, tmp_path):
    other = small_model(tmp_path / "other", 1, task="multi-label")
    with pytest.raises(ValueError, match=r"other is multi-label, but .* is single-label"):
        evaluate.evaluate([models[0], other], data, tmp_path / "E")
    with pytest.raises(ValueError, match=r"no column 'species'; the columns are: category, labels"):
        evaluate.evaluate(models[:1], data, tmp_path / "E", label="species")


def test_mistakes_of_an_ensemble_the_surest_first(models, clips, data, tmp_path):
    found = evaluate.evaluate(models, data, tmp_path / "E")
    wrong = results.mistakes(tmp_path / "E")
    scored = [i for i, name in enumerate(clips.columns["category"]) if name in CLASSES]
    assert len(scored) - len(wrong) == round(found["ensemble"]["accuracy"] * len(scored)) < 10
    (pcm,) = clips.fetch(np.array([clips.ids.index(wrong[0].id)]))
    loaded = [beats_jax.load(path) for path in models]
    probs = np.mean([windows.classify(m, pcm / np.float32(32768)).probs for m in loaded], axis=0)
    assert wrong[0].predicted == CLASSES[probs.argmax()] != wrong[0].truth
    assert wrong[0].prob == pytest.approx(probs.max(), abs=1e-4)
    assert [m.prob for m in wrong] == sorted((m.prob for m in wrong), reverse=True)
    for mistake in wrong:
        assert clips.columns["category"][clips.ids.index(mistake.id)] == mistake.truth
    multi = small_model(tmp_path / "multi", 0, task="multi-label")
    evaluate.evaluate([multi], data, tmp_path / "M")
    with pytest.raises(ValueError, match="multi-label task"):
        results.mistakes(tmp_path / "M")
