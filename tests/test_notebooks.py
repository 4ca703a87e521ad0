"""The notebooks of launch/colab run from top to bottom, on small inputs."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from runs import FIXTURES, ROOT, environment

from beats_jax.checkpoint import tree_sha256
from beats_jax.exported import save_exported
from beats_jax.labels import audioset
from beats_jax.pretrained import load_model

NOTEBOOKS = sorted((ROOT / "launch" / "colab").glob("*.ipynb"))
TAG = "parameters"


def parameters(notebook: Any) -> tuple[int, dict[str, Any]]:
    """The place of the cell where users put their own things, and its names and values."""
    (place,) = [i for i, c in enumerate(notebook.cells) if TAG in c.metadata.get("tags", [])]
    names: dict[str, Any] = {}
    exec(notebook.cells[place].source, names)
    return place, {name: value for name, value in names.items() if name.isupper()}


def run(path: Path, folder: Path, **values: Any) -> Any:
    """Runs a notebook in `folder`, with other values for some of its parameters.

    Returns:
        The notebook with its outputs; it is also left in `folder`, to be looked at.
    """
    notebook = nbformat.read(path, as_version=4)
    place, known = parameters(notebook)
    assert set(values) <= set(known), "no such parameter"
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources)
    client.execute(env={**environment(), "OMP_NUM_THREADS": "1"})
    nbformat.write(notebook, folder / path.name)
    return notebook


def pictures(notebook: Any) -> int:
    return sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def text(notebook: Any) -> str:
    """All that the notebook says, in its order."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    data = (o.get("data", {}).get("text/markdown", "") for o in outputs)
    return "\n".join(o.get("text", "") + more for o, more in zip(outputs, data, strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_clean_and_installs_the_package_first(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "find_spec" in code[0].source and "%pip install" in code[0].source
    assert code[1].metadata["tags"] == [TAG]
    _, known = parameters(notebook)
    for name, value in known.items():
        assert "path" not in name.lower() and not str(value).startswith("/"), name
    for cell in code[1:]:  # what is defined in the package is not defined here again
        nodes = ast.walk(ast.parse(cell.source))
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in nodes)


def test_there_is_one_for_each_purpose():
    assert [path.stem for path in NOTEBOOKS] == ["evaluate", "finetune", "loop", "use"]


# --- use and evaluate, with the official code's tiny random models --------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """The fixture's encoder with a head of AudioSet's classes, as an exported folder."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    model = load_model(FIXTURES / "dev_finetuned.pt")
    kernel = np.random.default_rng(0).normal(size=(48, 527)).astype(np.float32)
    params = {**model.params, "head": {"kernel": kernel, "bias": np.zeros(527, np.float32)}}
    source = {**model.source, "params_sha256": tree_sha256(params)}
    changes: dict[str, Any] = dict(params=params, labels=tuple(audioset()), source=source)
    save_exported(model._replace(**changes, official=None), folder)
    return str(folder)


def test_use(tmp_path, classifier):
    tokenizer = str(FIXTURES / "dev_tokenizer.pt")
    path = ROOT / "launch" / "colab" / "use.ipynb"
    done = run(path, tmp_path, MODEL=classifier, TOKENIZER=tokenizer, NUM_CLIPS=28)
    assert pictures(done) == 4
    said = text(done)
    assert "embeddings (28, 48), 0 files skipped" in said and "tokens (12, 8)" in said
    assert "174 columns of features in 27.9 s" in said
    assert not (tmp_path / "beats_toy").exists()  # nothing is trained where a model is given


def test_evaluate(tmp_path, classifier):
    encoder = str(FIXTURES / "dev_encoder.pt")
    path = ROOT / "launch" / "colab" / "evaluate.ipynb"
    done = run(path, tmp_path, MODEL=encoder, FINETUNED=classifier, NUM_CLIPS=70)
    assert pictures(done) == 2
    said = text(done)
    assert "70 of 70 clips" in said and "| layer 3 |" in said and "**knn**" in said
    assert "eval_segments.csv: 19 of 24 segments have a clip" in said
    assert "| model 1 |" in said and "515 of 527 classes have no clip here" in said
    assert not (tmp_path / "beats_toy").exists()


# --- all of them as they come, trained toys included ----------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """One folder, so that the toy is trained once."""
    return tmp_path_factory.mktemp("desk")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["loop", "use", "evaluate", "finetune"])
def test_as_it_comes(name, desk):
    done = run(ROOT / "launch" / "colab" / f"{name}.ipynb", desk)
    assert pictures(done) >= 2
