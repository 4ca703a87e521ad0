"""The commands as typed: exit codes, one clear line on bad input, closed stdin, quick help."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from beats_jax import cli
from beats_jax.data.sources import INDEX, open_clips

ROOT = Path(__file__).parents[1]
COMMANDS = [command.__name__ for command in cli.COMMANDS]


def run(*args: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "beats_jax.cli", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **kwargs)


def write_sounds(folder: Path, number: int) -> None:
    for i in range(number):
        path = folder / f"{'ab'[i % 2]}/{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(i).normal(0, 0.1, 22050), 22050)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  beats-jax {command} " in text
    assert "usage: beats-jax" in text


def test_help_waits_for_no_library():
    """Of what is installed for this package it imports numpy; the rest takes seconds."""
    code = """
import atexit, sys
atexit.register(lambda: print(*sys.modules))
from beats_jax import cli
cli.main(["--help"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *text, modules = done.stdout.splitlines()
    assert all(command in "\n".join(text) for command in COMMANDS)
    roots = {name.partition(".")[0] for name in modules.split()}
    heavy = {"jax", "flax", "orbax", "tensorflow", "scipy", "sklearn", "librosa", "matplotlib"}
    assert "beats_jax" in roots and not roots & heavy


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["prepare", "{tmp}/nowhere", "{tmp}/out"], "nowhere: no such file or folder"),
        (["prepare", "{tmp}/empty", "{tmp}/out"], "empty: no audio in it"),
        (["prepare", "{tmp}/sounds", "{tmp}/out", "--filter", "x=1"], "columns are: category"),
        (["prepare", "{tmp}/sounds", "{tmp}/out", "--jobs", "0"], "jobs is 0"),
        (["prepare", "{tmp}/sounds", "/proc/nowhere/out"], "/proc/nowhere"),
        (["prepare", "{tmp}/sounds"], "required: OUT"),
        (["stats", "{tmp}/sounds"], "not a prepared data set"),
        (["stats", "{tmp}/nowhere"], "no such folder"),
        (["frobnicate"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, args, line):
    (tmp_path / "empty").mkdir()
    write_sounds(tmp_path / "sounds", 1)
    try:
        code = cli.main([arg.format(tmp=tmp_path) for arg in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("beats-jax") and line in err


def test_prepare_and_stats(tmp_path, capsys):
    write_sounds(tmp_path / "sounds", 4)
    (tmp_path / "sounds/a/bad.ogg").write_bytes(b"no sound")
    words = ["prepare", str(tmp_path / "sounds"), str(tmp_path / "out"), "--jobs", "1"]
    for _ in range(2):  # the second time it is there already
        assert cli.main(words) == 3
        said = capsys.readouterr().out
        assert "4 of 5 clips" in said and "1 unreadable" in said and "report.json" in said
    assert list(json.loads((tmp_path / "out/report.json").read_text())["unreadable"]) == [
        "a/bad.ogg"
    ]
    assert cli.main(["stats", str(tmp_path / "out"), "--filter", "category=a"]) == 0
    said = capsys.readouterr().out
    assert "2 clips, 196 frames" in said and "--config.data.mean=" in said


def test_processes_decode_with_stdin_closed(tmp_path):
    write_sounds(tmp_path / "sounds", 6)
    words = ("prepare", tmp_path / "sounds", tmp_path / "two", "--jobs", 2)
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "beats_jax.cli", *words]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (
        cli.main(["prepare", *(str(tmp_path / n) for n in ("sounds", "one")), "--jobs", "1"]) == 0
    )
    one, two = open_clips(tmp_path / "one"), open_clips(tmp_path / "two")
    assert len(two) == 6 and one.fingerprint == two.fingerprint


def test_interrupt_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, capsys):
    from beats_jax.data import decode

    def interrupted(*_):
        raise KeyboardInterrupt

    write_sounds(tmp_path / "sounds", 2)
    monkeypatch.setattr(decode, "decode", interrupted)
    words = ["prepare", str(tmp_path / "sounds"), str(tmp_path / "out"), "--jobs", "1"]
    assert cli.main(words) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not (tmp_path / "out" / INDEX).exists()
