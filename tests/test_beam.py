"""`prepare --beam` with Apache Beam itself; skipped where it is not installed.

`pip install apache-beam` takes a minute, so that launch/test.sh does without: into .venv, and
`bash launch/test.sh tests/test_beam.py -m ""` runs these.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from test_shards import Run, assert_equal, noise, source, stamps

from beats_jax import cli
from beats_jax.data.prepare import prepare
from beats_jax.data.sources import INDEX

__all__ = ["source"]  # a fixture
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="Apache Beam is not installed: pip install -e '.[beam]'",
)
ROOT = Path(__file__).parents[1]


def test_without_beam(source, tmp_path, monkeypatch, capsys):
    words = ["prepare", str(source), str(tmp_path / "out")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main([*words, "--beam"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'beats_jax[beam]'\n")
    assert cli.main([*words, "--beam-options=--runner=DirectRunner"]) == 2
    assert "without --beam" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_reach_beam(source, tmp_path, monkeypatch, capsys):
    run, seen = Run(monkeypatch), []
    monkeypatch.setattr("beats_jax.data.beam.runner", lambda *given: seen.append(given) or run)
    options = "--runner=FlinkRunner --job_name='two words'"
    words = ["prepare", str(source), str(tmp_path / "out"), "--jobs=3", "--beam"]
    assert cli.main([*words, f"--beam-options={options}"]) == 3  # files were skipped
    assert seen == [(["--runner=FlinkRunner", "--job_name=two words"], 3)]
    assert len(run.made) == 3 and "3 unreadable" in capsys.readouterr().out


@needs_beam
@pytest.mark.parametrize("options", [(), ["--runner=DirectRunner"]])
def test_same_folder_as_without_beam(options, source, tmp_path, capfd):
    plain = prepare(source, tmp_path / "plain", jobs=1)
    capfd.readouterr()
    assert prepare(source, tmp_path / "out", jobs=1, beam=options) == plain
    assert_equal(tmp_path / "plain", tmp_path / "out")
    assert not capfd.readouterr().err.strip("\r")


@needs_beam
@pytest.mark.parametrize(
    "option, message",
    [
        ("--direct_num_worker=3", "no option --direct_num_worker"),
        ("--runner=NoRunner", "NoRunner. Valid values are"),
    ],
)
def test_wrong_options_are_one_line(option, message, source, tmp_path, capsys):
    words = ["prepare", str(source), str(tmp_path / "out"), "--beam", f"--beam-options={option}"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


# --- processes ------------------------------------------------------------------------------------


def sounds(root: Path, files: int, rows: int) -> Path:
    """Few files, each listed again and again."""
    root.mkdir()
    for i in range(files):
        soundfile.write(root / f"{i}.wav", noise(i, 4000), 16000)
    lines = [f"{i % files}.wav,{i}" for i in range(rows)]
    (root / "metadata.csv").write_text("\n".join(["filename,number", *lines]))
    return root


def start(root: Path, out: Path, *flags: str, before: str = "") -> subprocess.Popen[str]:
    command = f"exec {sys.executable} -B -m beats_jax.cli prepare {root} {out} --beam"
    return subprocess.Popen(
        ["bash", "-c", f"{before} {command} {' '.join(flags)}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers() -> list[int]:
    """Process ids of those that Beam has started."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(row.split()[0]) for row in listed.splitlines() if "-m beats_jax.data.beam" in row]


def until_done(out: Path, shards: int, child: subprocess.Popen[str]) -> None:
    while len(list(out.glob("work/done-*.json"))) < shards:
        assert child.poll() is None, child.stderr and child.stderr.read()
        time.sleep(0.01)


@needs_beam
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "victim, number, code, message",
    [
        ("parent", signal.SIGKILL, -9, ""),
        ("all", signal.SIGINT, 130, "interrupted"),  # as Ctrl-C in a terminal
        ("worker", signal.SIGKILL, 2, "one of its processes died"),
    ],
)
def test_killed_it_goes_on(victim, number, code, message, tmp_path):
    root, out = sounds(tmp_path / "sounds", files=100, rows=1600), tmp_path / "out"
    child = start(root, out, "--jobs=2")
    until_done(out, 3, child)
    with pytest.raises(BlockingIOError, match="another prepare"):
        prepare(root, out)
    if victim == "all":
        os.killpg(child.pid, number)
    else:
        os.kill(child.pid if victim == "parent" else workers()[0], number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code and message in said and said.count("\n") <= 1, said
    deadline = time.monotonic() + 60
    while workers():
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    before = stamps(out)
    assert 3 <= len(list(out.glob("work/done-*.json"))) <= len(before) < 25
    assert not (out / INDEX).exists()
    child = start(root, out, "--jobs=2")
    _, said = child.communicate(timeout=120)
    assert child.returncode == 0 and not said, said
    kept = [name for name, stamp in stamps(out).items() if before.get(name) == stamp]
    assert len(kept) >= 3
    prepare(root, tmp_path / "plain", jobs=1)
    assert_equal(tmp_path / "plain", out)


@needs_beam
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("jobs", [1, 2])
def test_full_disk(jobs, source, tmp_path):
    child = start(source, tmp_path / "out", f"--jobs={jobs}", before="ulimit -f 64;")
    _, said = child.communicate(timeout=120)
    assert child.returncode == 2
    (line,) = said.splitlines()
    assert "cannot write the shards" in line and "File too large" in line
    assert not list((tmp_path / "out").rglob("*.tmp"))
