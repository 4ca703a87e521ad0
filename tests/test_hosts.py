"""Flags of a run on many hosts: half of them is one clear line; clusters are found by JAX."""

import jax
import pytest

from beats_jax import hosts

CLUSTERS = (
    "KUBERNETES_SERVICE_HOST",
    "SLURM_JOB_ID",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((None, 2, None), "--num_processes without --coordinator; give --coordinator=HOST:PORT"),
        ((None, None, 0), "--process_id without --coordinator"),
        (("", 2, 0), "--num_processes and --process_id without --coordinator"),
        (("auto", 2, None), "--coordinator=auto takes --num_processes from the cluster"),
        (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1 is no HOST:PORT"),
        (("10.0.0.1:http", 2, 0), "is no HOST:PORT"),
        (("10.0.0.1:80", 2, None), "alone is half of it; give"),
        (("10.0.0.1:80", None, 1), "alone is half of it; give"),
        (("10.0.0.1:80", 2, 2), "--process_id=2 of --num_processes=2: the numbers are 0 to N-1"),
        (("10.0.0.1:80", 2, -1), "--process_id=-1"),
        (("10.0.0.1:80", 0, 0), "--num_processes=0"),
    ],
)
def test_flags_that_do_not_belong_together(monkeypatch, flags, wanted):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("was called"))
    with pytest.raises(ValueError, match=wanted.replace("(", r"\(")):
        hosts.connect(*flags)


def test_what_jax_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: asked.append(args))
    hosts.connect(None, None, None)
    assert asked == []
    hosts.connect("auto", None, None)
    hosts.connect("node7:8476", 4, 3)
    assert asked == [(), ("node7:8476", 4, 3)]


def test_auto_where_there_is_no_cluster(monkeypatch):
    from jax._src import distributed, xla_bridge  # a test of ours has made the backend already

    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"auto found no cluster .* give --coordinator=HOST:PORT"):
        hosts.connect("auto", None, None)
    assert distributed.global_state.client is None


def test_slurm_is_found_by_its_variables(monkeypatch):
    """What `srun` sets is what JAX makes its three arguments of."""
    from jax._src.clusters import ClusterEnv

    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    variables = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[07-10]", "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    assert found == (f"node07:{61440 + 4711 % 4096}", 4, 2, [0])


class Lost(jax.errors.JaxRuntimeError):
    pass


def test_which_errors_mean_that_a_process_is_lost(monkeypatch):
    gloo = Lost("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    wrapped = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    wrapped.__cause__ = Lost("UNAVAILABLE: the coordination service is gone")
    assert not hosts.lost_peer(gloo)  # a single process has nobody to lose
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.lost_peer(gloo) and hosts.lost_peer(wrapped)
    assert hosts.lost_peer(ValueError(str(gloo)))  # as Orbax tells of it
    assert hosts.lost_peer(hosts.NotMet("they did not meet"))
    for own in (Lost("RESOURCE_EXHAUSTED: Out of memory"), OSError("no space left"), None):
        assert not hosts.lost_peer(own)
