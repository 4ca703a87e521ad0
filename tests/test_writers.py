"""The log: valid JSON, identical after a kill and a resume, and no ghosts in TensorBoard."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from beats_jax.writers import Writer, read_metrics


def _metrics(step):
    return {"loss": 5 / step, "lr": np.float32(1e-3 * step), "codes_used": jnp.int32(step)}


def _run(folder, steps, restored_step=None):
    writer = Writer(folder, restored_step)
    for step in steps:
        writer.write(step, _metrics(step))
    writer.close()


def _events(folder):
    """(step, tag, value) of every scalar in every event file; checks length and both CRCs."""
    found = []
    for path in sorted(Path(folder).glob("events*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack("<Q", content[start : start + 8])
            header, data = content[start : start + 8], content[start + 12 : start + 12 + length]
            checks = content[start + 8 : start + 12] + content[start + 12 + length :][:4]
            assert checks == struct.pack("<II", masked_crc32c(header), masked_crc32c(data))
            event = Event.FromString(data)
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            start += 16 + length
    return found


def test_lines_are_plain_json_and_read_back_exactly(tmp_path):
    writer = Writer(tmp_path / "deep" / "stage")
    writer.write(1, {"loss": np.float32(0.1), "codes_used": jnp.int32(7), "x": 1 / 3})
    writer.write(2, {"loss": math.nan, "grad_norm": jnp.inf})
    lines = writer.path.read_text().splitlines()  # before close: every line is flushed
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed[0] == {"step": 1, "loss": float(np.float32(0.1)), "codes_used": 7.0, "x": 1 / 3}
    assert next(iter(parsed[0])) == "step"
    assert parsed[1] == {"step": 2, "loss": None, "grad_norm": None}
    read = read_metrics(tmp_path / "deep" / "stage")
    assert read[0] == parsed[0]
    assert math.isnan(read[1]["loss"]) and read[1]["step"] == 2


def test_events_hold_the_same_scalars(tmp_path):
    _run(tmp_path, [1, 2])
    wanted = [(s, k, pytest.approx(float(v))) for s in (1, 2) for k, v in _metrics(s).items()]
    assert _events(tmp_path) == wanted


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\0\0\0", b'{"step": 5, "loss": 1}'])
def test_resumed_log_is_the_undisturbed_one(tmp_path, torn):
    """Killed after step 8, the last line torn, resumed from the checkpoint of step 5."""
    _run(tmp_path / "undisturbed", range(1, 13))
    _run(tmp_path / "killed", range(1, 9))
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    for path in (tmp_path / "killed").glob("events*"):
        path.write_bytes(path.read_bytes()[:-7])  # torn as well
    if torn:
        assert read_metrics(tmp_path / "killed")[-1]["step"] == 8
    _run(tmp_path / "killed", range(6, 13), restored_step=5)
    undisturbed, killed = (tmp_path / f / "metrics.jsonl" for f in ("undisturbed", "killed"))
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert _events(tmp_path / "killed") == _events(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").glob("draft*"))


def test_several_resumes_within_one_second(tmp_path):
    _run(tmp_path, range(1, 5))
    _run(tmp_path, range(4, 7), restored_step=3)
    _run(tmp_path, range(6, 9), restored_step=5)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    assert [step for step, tag, _ in _events(tmp_path) if tag == "loss"] == list(range(1, 9))


def test_nothing_restored_starts_anew(tmp_path):
    _run(tmp_path, range(1, 5))
    _run(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert {step for step, _, _ in _events(tmp_path)} == {1}


def test_kill_loses_no_written_line(tmp_path):
    code = (
        "import os, signal, sys; from beats_jax.writers import Writer\n"
        "writer = Writer(sys.argv[1])\n"
        "for step in range(1, 6): writer.write(step, {'loss': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=_environment())
    assert done.returncode == -signal.SIGKILL
    assert [line["loss"] for line in read_metrics(tmp_path)] == [s / 3 for s in range(1, 6)]
    assert [step for step, _, _ in _events(tmp_path)] == [1, 2, 3, 4, 5]


def test_full_disk_is_one_clear_error_and_the_run_can_go_on(tmp_path):
    code = (
        "import resource, sys; from beats_jax.writers import Writer\n"
        "writer = Writer(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    for step in range(1, 10_000): writer.write(step, {'loss': step / 3})\n"
        "except OSError as error: print(step, error); writer.close()"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    step, message = done.stdout.split(" ", 1)
    assert "File too large" in message and "metrics.jsonl" in message and "resumes" in message
    assert int(step) > 20
    _run(tmp_path, [int(step)], restored_step=int(step) - 1)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, int(step) + 1))


def test_bad_values_and_bad_files_are_refused(tmp_path):
    writer = Writer(tmp_path)
    with pytest.raises(TypeError, match=r"'loss' is .* of shape \(2,\), wanted a single number"):
        writer.write(1, {"loss": np.ones(2)})
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a JSON object"):
        read_metrics(tmp_path)


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
