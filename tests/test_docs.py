"""What the README tells people to type exists: commands, flags, config fields, files."""

import re
import shlex
from pathlib import Path

import pytest
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
    words = shlex.split(command)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "beats-jax":
        monkeypatch.setattr(cli, "_call", lambda args: 0)
        assert cli.main(words[1:]) == 0
    elif words[:3] == ["python", "-m", "beats_jax.main"]:
        flags = dict(word[2:].split("=", 1) for word in words[3:])
        config = load_config(Path(flags.pop("config")).stem)
        assert flags.pop("workdir")
        for name in flags:
            field = config
            for part in name.removeprefix("config.").split("."):
                assert part in field, name
                field = field[part]
    else:
        assert words[0] in ("git", "cd", "source", "pip", "export")


def test_pictures_and_links_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_python(waveforms):
    (code,) = blocks("python")
    names = {"waveform": waveforms["speech"]}
    exec(code, names)
    assert names["log_mel"].shape == (198, 128)
    assert beats_jax.__version__ in (ROOT / "beats_jax" / "__init__.py").read_text()
