"""Runs whose workdir is `gs://bucket/W`.

Whole runs talk to a server of this machine (`gcs_server.py`) through the real clients, TensorStore
and gcsfs: `pip install gcsfs gcp-storage-emulator` into .venv, then
`bash launch/test.sh tests/test_object_store.py -m ""`. The others' bucket is a dictionary.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any, ClassVar

import fsspec
import pytest
from etils import epath
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem
from runs import (
    ROOT,
    assert_trees_equal,
    environment,
    final_state,
    free_port,
    run,
    tiny_flags,
    without_timing,
)

from beats_jax import paths
from beats_jax.damage import set_aside
from beats_jax.data.dataset import open_folders
from beats_jax.figures import new_figure, save_figure
from beats_jax.pretrained import load_model
from beats_jax.writers import Writer, read_metrics

needs_gcs = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))),
    reason="not installed: pip install gcsfs gcp-storage-emulator",
)


class Bucket(MemoryFileSystem):
    """fsspec's dictionary under the name of gcsfs; like that it cannot append."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode
        return super().open(path, mode, **kwargs)

    def glob(self, path, **kwargs):
        return [str(name).lstrip("/") for name in super().glob(path, **kwargs)]


@pytest.fixture
def bucket(monkeypatch):
    """`gs://bucket`, empty."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    return epath.Path("gs://bucket")


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.absolute("a/../b") == epath.Path(tmp_path / "b")
    assert str(paths.absolute("gs://bucket/W")) == "gs://bucket/W"


def test_the_log_grows_and_is_cut_back(bucket, tmp_path):
    for folder in (bucket / "W", epath.Path(tmp_path)):
        writer = Writer(folder)
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1 / step})
            assert len(read_metrics(folder)) == step
        writer.close()
        writer = Writer(folder, restored_step=2)
        writer.write(3, {"loss": 0.25})
        writer.close()
    assert (bucket / "W/metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text()
    assert len(list((bucket / "W").glob("events*"))) == len(list(tmp_path.glob("events*"))) == 2


def test_what_the_client_says_is_told_with_the_object(bucket, monkeypatch):
    writer = Writer(bucket / "W")

    def refuse(*_, **__):
        raise RuntimeError("403: no permission")

    monkeypatch.setattr(Bucket, "open", refuse)
    with pytest.raises(OSError, match="403") as told:
        writer.write(1, {"loss": 1.0})
    assert told.value.filename == "gs://bucket/W/metrics.jsonl"


def test_pictures_and_damaged_checkpoints(bucket):
    figure, _ = new_figure(1, 1, (1, 1))
    save_figure(figure, bucket / "W/plots/a.png")
    assert (bucket / "W/plots/a.png").read_bytes().startswith(b"\x89PNG")
    save_figure(figure, bucket / "W/plots/a.svg")
    assert "<svg" in (bucket / "W/plots/a.svg").read_text()
    for reason in ("cut", "gone"):
        (bucket / "W/checkpoints/6").mkdir(parents=True, exist_ok=True)
        (bucket / "W/checkpoints/6/meta").write_text("{}")
        place = set_aside(bucket / "W/checkpoints/6", reason)
    assert str(place) == "gs://bucket/W/checkpoints_damaged/6-1" and (place / "meta").exists()
    assert (place.parent / "reasons.txt").read_text() == "6: cut\n6-1: gone\n"


def test_what_has_to_be_on_this_machine(bucket, tmp_path):
    (bucket / "m.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"gs://bucket/m\.pt: .* copy it here"):
        load_model("gs://bucket/m.pt")
    with pytest.raises(FileNotFoundError, match="gs://bucket/nothing is not there"):
        load_model("gs://bucket/nothing")
    with pytest.raises(ValueError, match=r"beats-jax prepare .* --config\.data\.dir=OUT"):
        open_folders(str(tmp_path), bucket / "data")


@pytest.fixture
def server(monkeypatch):
    """A storage server with `bucket` in it, for this process' children; as a file system for it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "tests/gcs_server.py", str(port), "bucket"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    monkeypatch.setenv("EPATH_USE_TF", "0")  # TensorFlow's client knows one address
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another server

    def answers() -> bool:
        try:
            return urllib.request.urlopen(address, timeout=1).status == 200
        except OSError:
            return False

    try:
        while not answers():
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        gcsfs = importlib.import_module("gcsfs")
        yield gcsfs.GCSFileSystem(token="anon", endpoint_url=address, use_listings_cache=False)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_gcs
def test_a_run_in_a_bucket_ends_as_one_on_a_disk(server, tmp_path):
    """Killed, its newest checkpoint damaged, started again: the bits of a run that was not."""
    flags = {"input__backend": "numpy", "pretrain__keep": 3}
    local = run(tiny_flags(tmp_path / "W", **flags))
    assert local.returncode == 0, local.stderr

    command = tiny_flags("gs://bucket/W", **flags)
    killed = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert killed.stderr
    for line in killed.stderr:
        if " 7/8 " in line:
            killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    checkpoints = "bucket/W/iter1/pretrain/checkpoints"
    finished = server.glob(f"{checkpoints}/*/commit_success.txt")
    before, newest = sorted(int(name.split("/")[-2]) for name in finished)[-2:]
    server.rm(f"{checkpoints}/{newest}/params", recursive=True)

    again = run(command)
    assert again.returncode == 0, again.stderr
    assert f"/{newest} is damaged" in again.stderr and f"from step {before}" in again.stderr
    for name, about in server.find("bucket", detail=True).items():
        place = tmp_path / "fetched" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(server.cat_file(name) if about["size"] else b"")
    fetched = tmp_path / "fetched" / "bucket" / "W"
    assert_trees_equal(final_state(tmp_path / "W"), final_state(fetched))
    ours, theirs = (folder / "iter1" / "pretrain" for folder in (fetched, tmp_path / "W"))
    assert without_timing(ours) == without_timing(theirs)
    assert {p.name for p in (ours / "plots").iterdir()} == {
        p.name for p in (theirs / "plots").iterdir()
    }
    reasons = (ours / "checkpoints_damaged" / "reasons.txt").read_text()
    assert reasons.startswith(f"{newest}: params")
