"""The package: light imports, what a wheel holds, and the scripts that install it."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import beats_jax

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module", ["beats_jax", "beats_jax.cli", "beats_jax.fbank", "beats_jax.data.order"]
)
def test_light_modules_import_no_framework(module):
    code = f"import sys, {module}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(out.stdout.split())
    assert module in loaded
    heavy = {"jax", "flax", "orbax", "tensorflow", "tensorflow_datasets", "torch", "matplotlib"}
    assert not heavy & loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources (setuptools would leave its traces in the clone)."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("beats_jax", "configs", "tests", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    command = [sys.executable, "-m", *build, str(source / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_the_package_and_the_configs_only(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "beats_jax").rglob("*.py")}
    configs = {
        f"beats_jax/configs/{path.name}"
        for path in (ROOT / "configs").iterdir()
        if path.suffix in (".py", ".json")
    }
    assert "beats_jax/configs/smoke.py" in configs
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"beats_jax-{beats_jax.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    data = {"beats_jax/data/audioset_labels.csv"}
    assert {name for name in names if not name.startswith(info)} == modules | configs | data
    assert any(name.endswith("LICENSE") for name in names)
    assert "beats-jax = beats_jax.cli:main" in scripts
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist", [])
    core = {line.split(";")[0].strip() for line in required if "extra ==" not in line}
    for package in ("jax", "flax", "array_record", "importlib_resources", "tensorflow-cpu"):
        assert any(line.startswith(package) for line in core), package
    assert sum(line.startswith("tensorflow") and "platform" in line for line in required) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")
    }

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    run(python, "-m", "pip", "check")
    where = run(python, "-c", "import beats_jax; print(beats_jax.__file__)").strip()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert "prepare" in run(python.with_name("beats-jax"), "--help")
    steps = [f"--config.{name}.steps=4" for name in ("pretrain", "tokenizer", "finetune")]
    sizes = ["--config.data.num_clips=24", "--config.data.clip_seconds=1.0"]
    smoke = ["--config=configs/smoke.py", f"--workdir={tmp_path / 'work'}"]
    run(python, "-m", "beats_jax.main", *smoke, *steps, *sizes)
    assert (tmp_path / "work/iter2/pretrain/metrics.jsonl").exists()
    assert (tmp_path / "work/iter2/finetune/results.json").exists()


def test_configs_are_found_from_another_folder(tmp_path):
    """In an editable installation too, where they lie beside the package and not in it."""
    code = "from beats_jax.configs import smoke; print(smoke.get_config().iteration)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "No module named 'beats_jax'" in done.stderr:
        pytest.skip("beats_jax is not installed, only imported from the clone")
    assert done.stdout == "iter1\n", done.stderr


class Clone:
    """A clone with the real launch scripts and a Python that only writes down what it is told."""

    def __init__(self, path: Path):
        self.path, self.calls = path, path / "calls"
        shutil.copytree(ROOT / "launch", path / "launch")
        (path / "configs").mkdir()
        (path / "configs" / "smoke.py").touch()
        (path / "setup.py").write_text("# first\n")
        self.python = path / ".venv" / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        self.write_python("exit 0")

    def write_python(self, ending: str) -> None:
        self.python.write_text(f'#!/usr/bin/env bash\necho "$@" >>"{self.calls}"\n{ending}\n')
        self.python.chmod(0o755)

    def run(self, script: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
        command = ["bash", str(self.path / "launch" / script), *args]
        return subprocess.run(command, capture_output=True, text=True, **kwargs)

    def take_calls(self) -> list[str]:
        """What the Python was called with since the last time, but for `pip --version`."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [call for call in calls if call != "-m pip --version"]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


def test_local_installs_once_and_again_when_setup_changes(clone, tmp_path):
    assert clone.run("local.sh").returncode == 0
    install, run = clone.take_calls()
    assert install.startswith("-m pip install") and install.endswith(f"-e {clone.path}")
    assert run.startswith("-m beats_jax.main --config=")
    clone.run("local.sh")
    assert len(clone.take_calls()) == 1
    (clone.path / "setup.py").write_text("# second\n")
    clone.run("local.sh")
    assert len(clone.take_calls()) == 2
    moved = tmp_path / "moved"
    clone.path.rename(moved)
    clone.path, clone.calls = moved, tmp_path / "clone" / "calls"
    (tmp_path / "clone").mkdir()
    clone.run("local.sh")
    assert len(clone.take_calls()) == 2


def test_an_installation_that_fails_is_taken_up_again(clone):
    clone.write_python('[[ "$3" != install ]]')
    for _ in range(2):
        assert clone.run("local.sh").returncode != 0
        assert len(clone.take_calls()) == 1  # and nothing is run
    clone.write_python("exit 0")
    assert clone.run("local.sh").returncode == 0
    assert len(clone.take_calls()) == 2


def test_local_forwards_flags_from_any_folder(clone, tmp_path):
    clone.run("local.sh", cwd=tmp_path)
    smoke = f"{clone.path}/configs/smoke.py"
    call = f"-m beats_jax.main --config={smoke} --workdir={clone.path}/runs/smoke"
    assert clone.take_calls()[-1] == call
    clone.run("local.sh", "--config.pretrain.steps=3", cwd=tmp_path)
    assert clone.take_calls()[-1] == f"{call} --config.pretrain.steps=3"
    (tmp_path / "mine.py").touch()
    clone.run("local.sh", "mine.py", "--workdir", "w", "--config.seed=1", cwd=tmp_path)
    wanted = "-m beats_jax.main --config=mine.py --workdir w --config.seed=1"
    assert clone.take_calls()[-1] == wanted


def test_loop_runs_the_iterations_in_order_and_stops_where_one_fails(clone):
    for name in ("iter1", "iter2", "iter3"):
        (clone.path / "configs" / f"{name}.py").touch()
    assert clone.run("loop.sh").returncode == 2
    done = clone.run("loop.sh", "W", "--config.seed=1", cwd=clone.path)
    assert done.returncode == 0, done.stderr
    call = "-m beats_jax.main --config=configs/{}.py --workdir=W --config.seed=1"
    wanted = [call.format(name) for name in ("iter1", "iter2", "iter3")]
    assert clone.take_calls()[-3:] == wanted
    clone.write_python('[[ "$*" != *iter2* ]]')
    assert clone.run("loop.sh", "W", cwd=clone.path).returncode == 1
    assert ["iter1" in call for call in clone.take_calls()] == [True, False]


def test_tests_run_without_torch_where_it_cannot_be_installed(clone):
    clone.write_python('[[ "$*" != *"[torch]" ]]')
    done = clone.run("test.sh", "tests/test_fbank.py", "-k", "parity")
    assert done.returncode == 0 and "tests marked torch are skipped" in done.stderr
    calls = clone.take_calls()
    assert [call.rpartition("[")[2] for call in calls[:2]] == ["test]", "torch]"]
    parallel = "-n auto --dist loadfile --no-loadscope-reorder"
    assert calls[2:] == [f"-m pytest {parallel} -m not slow tests/test_fbank.py -k parity"]


def test_without_a_python_that_will_do_the_error_says_what_to_install(clone, tmp_path):
    shutil.rmtree(clone.path / ".venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "cksum", "cat", "head"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    old = tools / "python3"  # as a shim of pyenv for a version that is switched off
    old.write_text('#!/usr/bin/env bash\n[[ "$1" == --version ]] && echo "Python 3.9.2"\nexit 1\n')
    old.chmod(0o755)
    done = clone.run("local.sh", env={"PATH": str(tools)})
    assert done.returncode != 0
    assert "No Python >= 3.11" in done.stderr and "Python 3.9.2" in done.stderr
    assert not (clone.path / ".venv").exists()
