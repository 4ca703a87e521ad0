"""What the README tells people to type exists: commands, flags, config fields, files."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from runs import ROOT, load_config

import beats_jax
from beats_jax import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_command(command, monkeypatch):
    words = shlex.split(command.removeprefix("time ").removeprefix("taskset -c 0 "))
    if words[0] in ("bash", "sbatch", "kubectl"):
        assert (ROOT / next(word for word in words if word.startswith("launch/"))).is_file()
    elif words[0] == "beats-jax":
        monkeypatch.setattr(cli, "_call", lambda args: 0)
        assert cli.main(words[1:]) == 0
    elif words[:3] == ["python", "-m", "beats_jax.main"]:
        flags = dict(word[2:].split("=", 1) for word in words[3:])
        config = load_config(Path(flags.pop("config")).stem)
        assert flags.pop("workdir")
        for name in flags:
            if not name.startswith("config."):
                assert name in ("coordinator", "num_processes", "process_id"), name
                continue
            field = config
            for part in name.removeprefix("config.").split("."):
                assert part in field, name
                field = field[part]
    else:
        assert words[0] in ("git", "cd", "source", "pip", "export")


def test_no_placeholder_is_left():
    assert not re.search(r"\b(RESULTS|SMOKETIME|ABLATIONS|TODO)\b", README)


def test_pictures_and_links_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


USED = ("classify", "embed", "tokenize", "convert", "export", "info")


@pytest.fixture
def desk(tmp_path, monkeypatch, waveforms):
    """A folder that holds what the README's commands name: models of each kind, and sounds."""
    fixtures = ROOT / "tests" / "fixtures"
    models = {
        "BEATs_iter3_plus_AS2M_finetuned.pt": "dev_finetuned.pt",
        "BEATs_iter3.pt": "dev_encoder.pt",
        "Tokenizer_iter3.pt": "dev_tokenizer.pt",
        "W/iter2/pretrain": "dev_encoder.pt",
    }
    for name, fixture in models.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(fixtures / fixture)
    (tmp_path / "recordings").mkdir()
    for name in ("street.wav", "recordings/speech.wav"):
        soundfile.write(tmp_path / name, waveforms["speech"], 16000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_on_models_run(desk, capsys):
    words = [shlex.split(c)[1:] for c in commands() if c.startswith("beats-jax")]
    trained = {
        "W/iter2/tokenizer",
        "labelled",
        "F/esc50/finetune",
        "F/mine/finetune",
    }  # what a run leaves
    done = [w for w in words if w[0] in USED and not trained & {*w} and w[-1] != "W/iter2/pretrain"]
    assert {w[0] for w in done} == {*USED}
    for command in done:
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
    assert len(np.load(desk / "embeddings.npz")["embeddings"]) == 1
    assert json.loads((desk / "tokens.jsonl").read_text())["file"] == "recordings/speech.wav"
    assert (desk / "my_beats.pt").is_file() and (desk / "frames/speech.wav.npz").is_file()


def test_python(desk):
    names: dict = {}
    for code in blocks("python"):
        exec(code, names)
    columns = names["times"].shape[0]
    assert names["probs"].shape == (len(names["model"].labels),)
    assert names["x"].shape == (columns, 8, 48) and names["layers"].shape == (4, 8 * columns, 48)
    assert beats_jax.__version__ in (ROOT / "beats_jax" / "__init__.py").read_text()
