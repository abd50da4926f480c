"""Which job a process joins, by the environment that each launcher leaves; and that it is trained by any number."""

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jax
import programs
import pytest
from conftest import LIBTPU, ROOT, main_command, main_env, needs_libtpu
from faults import free_port
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from jax_resnet.errors import UserError
from jax_resnet.runtime.distributed import HEARTBEAT, OVERLAP, PATIENCE, _detected, join_job
from jax_resnet.runtime.mesh import compiler_options

TINY = ROOT / "tests" / "tiny.py"

# As srun, mpirun and GKE set them.
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004,007]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,job-0-1.job", "TPU_WORKER_ID": "1"}
SLICES = GKE | {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
HAND = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"}
Join = Callable[[dict[str, str]], dict[str, Any] | None]


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Join:
    """Joins by that environment; what JAX would then set up, None if nothing: its own detection runs, no network."""
    started: list[dict[str, Any]] = []

    def initialize(
        coordinator_address: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        initialization_timeout: int = 300,
        **rest: Any,
    ) -> None:
        coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address, num_processes, process_id, None, None, initialization_timeout
        )
        names = ("address", "processes", "process", "devices")
        started.append(dict(zip(names, found, strict=True)) | rest | {"timeout": initialization_timeout})

    for name in (*SLURM, *OMPI, *SLICES, *HAND, "KUBERNETES_SERVICE_HOST", "XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)

    def joined(env: dict[str, str]) -> dict[str, Any] | None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        join_job()
        return started[0] if started else None

    return joined


def on_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


@pytest.mark.parametrize(
    ("env", "found"),
    [
        (HAND, ("host:1234", 4, 1, None)),
        (HAND | SLURM, ("host:1234", 4, 1, [1])),  # by hand wins; the GPU of the task stays SLURM's
        (SLURM, ("node003:61441", 4, 2, [1])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "login:77"}, ("login:77", 4, 2, [1])),
        (OMPI, ("10.96.0.1:62624", 4, 3, [1])),
    ],
    ids=["hand", "hand in slurm", "slurm", "address by hand in slurm", "ompi"],
)
def test_joins_the_job_that_the_launcher_started(join: Join, env: dict[str, str], found: tuple[Any, ...]) -> None:
    given = join(env)
    assert given
    assert tuple(given[name] for name in ("address", "processes", "process", "devices")) == found
    assert given["heartbeat_timeout_seconds"] == HEARTBEAT
    assert given["shutdown_timeout_seconds"] == PATIENCE


@pytest.mark.parametrize(
    ("env", "found"), [(GKE, ("localhost:8482", 2, 1, None)), (SLICES, ("localhost:8482", 4, 3, None))]
)
def test_joins_slices_on_gke(
    join: Join, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: tuple[Any, ...]
) -> None:
    on_tpu(monkeypatch)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("not found", 404))
    given = join(env)
    assert given
    assert tuple(given[name] for name in ("address", "processes", "process", "devices")) == found


@pytest.mark.parametrize(("workers", "processes"), [("10.0.0.1,10.0.0.2", 2), ("10.0.0.1", None)])
def test_joins_a_slice_of_tpu_vms_but_not_a_single_one(
    join: Join, monkeypatch: pytest.MonkeyPatch, workers: str, processes: int | None
) -> None:
    on_tpu(monkeypatch)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": workers, "tpu-env": ""}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    given = join({})
    assert (given and given["processes"]) == processes
    assert not given or given["address"] == "10.0.0.1:8482"


@pytest.mark.parametrize(
    "env",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 --pty bash, in an allocation for four
        {k: v for k, v in SLURM.items() if k in ("SLURM_JOB_ID", "SLURM_NTASKS")},  # in salloc's shell, or sbatch
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod of no job
    ],
)
def test_alone_it_stays_alone(join: Join, env: dict[str, str]) -> None:
    assert join(env) is None


def test_a_pod_of_no_indexed_job_is_not_taken_for_one(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "get_process_count", lambda: 4)
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert _detected() == ("", 1)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert _detected() == ("k8s", 4)


def test_a_tpu_without_a_metadata_server_is_alone(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    on_tpu(monkeypatch)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")

    def unreachable(key: str) -> None:
        raise ConnectionError(key)

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    assert join({}) is None


@pytest.mark.parametrize("lacking", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_half_a_job_by_hand_is_refused(join: Join, lacking: str) -> None:
    with pytest.raises(UserError, match=r"^JAX_COORDINATOR_ADDRESS=host:1234: needs JAX_NUM_PROCESSES and JAX_PROC"):
        join({name: value for name, value in HAND.items() if name != lacking})


def test_numbers_of_slurm_that_are_none_are_one_line(join: Join) -> None:
    with pytest.raises(UserError, match=r"^slurm: the size of the job cannot be found out \(invalid literal"):
        join(SLURM | {"SLURM_NTASKS": "four"})


@pytest.mark.parametrize(
    ("gpus", "env", "flags"),
    [
        (8, {}, "--xla_gpu_enable_latency_hiding_scheduler=true"),
        (1, {}, ""),
        (1, HAND, "--xla_gpu_enable_latency_hiding_scheduler=true"),
        (0, HAND, ""),
        (8, {"JAX_PLATFORMS": "cpu"}, ""),
        (8, {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"},
         "--xla_gpu_enable_latency_hiding_scheduler=false"),
        (8, {"XLA_FLAGS": "--xla_gpu_autotune_level=4"},
         "--xla_gpu_autotune_level=4 --xla_gpu_enable_latency_hiding_scheduler=true"),
    ],
)  # fmt: skip
def test_several_gpus_overlap_unless_the_user_has_decided(
    join: Join, monkeypatch: pytest.MonkeyPatch, gpus: int, env: dict[str, str], flags: str
) -> None:
    glob = Path.glob
    found = [Path(f"/dev/nvidia{i}") for i in range(gpus)]
    monkeypatch.setattr(Path, "glob", lambda at, what: found if str(at) == "/dev" else glob(at, what))
    monkeypatch.setenv("XLA_FLAGS", "")  # restored after the test
    join(env)
    assert os.environ["XLA_FLAGS"] == flags


def test_the_flag_is_one_that_jax_knows() -> None:
    """An unknown one aborts the process."""
    code = "import jax; print(jax.jit(lambda x: x + 1)(41))"
    env = main_env() | {"XLA_FLAGS": f"{OVERLAP}=true"}
    done = programs.run([sys.executable, "-c", code], env=env)
    assert done.stdout.strip() == "42", done.stderr


@pytest.mark.parametrize(
    ("kind", "flags", "options"),
    [
        ("TPU v5 lite", "", {"xla_tpu_scoped_vmem_limit_kib": "24576"}),
        ("TPU v5 lite", "--xla_tpu_scoped_vmem_limit_kib=16384", None),
        ("TPU v5 lite", "--xla_tpu_enable_async_collective_fusion=true", {"xla_tpu_scoped_vmem_limit_kib": "24576"}),
        ("cpu", "", None),
        ("NVIDIA H100 80GB HBM3", "", None),
    ],
)
def test_a_fusion_may_use_more_of_a_tpus_memory_unless_the_user_has_decided(
    monkeypatch: pytest.MonkeyPatch, kind: str, flags: str, options: dict[str, str] | None
) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    assert compiler_options(types.SimpleNamespace(device_kind=kind)) == options


def test_peers_that_do_not_come_are_one_line(tiny_npz: Path, tmp_path: Path) -> None:
    port = free_port()
    env = main_env() | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_INITIALIZATION_TIMEOUT": "2", "JAX_PROCESS_ID": "0"}
    command = main_command(f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}")
    done = programs.run(command, env=env, cwd=ROOT)
    why = f"error: JAX_COORDINATOR_ADDRESS=localhost:{port}: the job's processes do not meet (not all have come in 2 s)"
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, why)


def launched(kind: str, number: int, port: int) -> dict[str, str]:
    """What `kind` tells process `number` of two on this machine."""
    if kind == "slurm":
        own = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
        return SLURM | own | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    own = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
    return OMPI | own | {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", pytest.param("ompi", marks=pytest.mark.soak)])
def test_two_processes_as_a_launcher_starts_them(tiny_npz: Path, tmp_path: Path, kind: str) -> None:
    port = free_port()
    more = [launched(kind, number, port) | {"JAX_COORDINATOR_PORT": str(port)} for number in range(2)]
    command = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}", "--config.stop_after_steps=2"]
    ended = faults.finish(faults.start(command, processes=2, environments=more))
    assert [end.status for end in ended] == [0, 0], ended
    assert "devices  2 × cpu" in ended[0].stdout
    assert "devices" not in ended[1].stdout


ON_SLICES = """
from jax.experimental import topologies
from jax_resnet.runtime.mesh import mesh_over
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
for device in mesh_over([*devices[::2], *devices[1::2]]).devices:
    print(device.slice_index, *device.coords)
"""


@pytest.mark.slow
@needs_libtpu
def test_each_slice_is_one_stretch_of_the_mesh_and_so_is_each_host() -> None:
    env = main_env() | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(LIBTPU)])
    done = programs.run([sys.executable, "-c", ON_SLICES], env=env)
    assert done.returncode == 0, done.stderr
    places = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len({tuple(place) for place in places}) == 16
    assert [place[0] for place in places] == [0] * 8 + [1] * 8
    trays = [place[1:3] for place in places[:8]]  # of four chips each, which is what a v5e's host has
    assert sorted(trays[:4]) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert [place[1:] for place in places[:8]] == [place[1:] for place in places[8:]]
