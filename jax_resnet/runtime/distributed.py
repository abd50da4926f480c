"""Joining a job of several processes, and what its processes tell each other."""

import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize detects, of which it does not tell
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_resnet.errors import TransientError, UserError, first_line
from jax_resnet.runtime.host import MEETING_THREAD
from jax_resnet.runtime.mesh import batch_sharding, global_batch, replicated

OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler"
HEARTBEAT = 20  # seconds without a sign of life after which a process is taken for dead
PATIENCE = 30  # seconds for which a process that is done waits for the others


def join_job() -> None:
    """Join the job that the environment describes, if it does. Call it before JAX is used for anything.

    By hand with JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; else as JAX
    detects it: Open MPI, SLURM, slices of Cloud TPU on Compute Engine and GKE, indexed Kubernetes jobs with jax[k8s].
    A process that is alone there stays so. Raises UserError if the variables are incomplete, and TransientError if the
    others do not come within JAX_INITIALIZATION_TIMEOUT seconds, 300.
    """
    if jax.distributed.is_initialized():
        return
    address, where, given = os.environ.get("JAX_COORDINATOR_ADDRESS"), "", dict[str, Any]()
    numbers = [os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    if address and any(numbers):
        if not all(number.isdigit() for number in numbers) or not 0 <= int(numbers[1]) < int(numbers[0]):
            raise _incomplete(address, numbers)
        given = {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}
        where, count = f"JAX_COORDINATOR_ADDRESS={address}", int(numbers[0])
    else:
        where, count = _detected()
        if address and not where:
            raise _incomplete(address, numbers)
    if flags := overlap_flags(count):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    if given or count > 1:
        _meet(where, given)


def _incomplete(address: str, numbers: Sequence[str]) -> UserError:
    return UserError(
        f"JAX_COORDINATOR_ADDRESS={address}: needs JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0) beside it; "
        f"found {numbers[0] or 'none'!r} and {numbers[1] or 'none'!r}"
    )


def _detected() -> tuple[str, int]:
    """Return the kind of cluster that JAX detects, and its number of processes; "", 1 if there is none.

    JAX itself would join, too, what has one process, and fail in a shell that somebody opened in an allocation.
    """
    for kind in ClusterEnv._cluster_types:
        name = kind.name or kind.__name__.removesuffix("Cluster").lower()
        in_kubernetes = name == "k8s"  # which asks a server that a pod of no indexed job may not ask
        if kind.opt_in_only_method or (in_kubernetes and "JOB_COMPLETION_INDEX" not in os.environ):
            continue
        try:
            if kind.is_env_present():
                alone = name == "slurm" and os.environ.get("SLURM_STEP_NUM_TASKS") == "1"
                return name, 1 if alone else kind.get_process_count()
        except Exception as e:
            if name == "gcetpu":  # a TPU elsewhere: there is no metadata server to be asked
                continue
            raise UserError(f"{name}: the size of the job cannot be found out ({first_line(e)})") from None
    return "", 1


def _meet(where: str, given: dict[str, Any]) -> None:
    """Wait for the other processes of the job, on a thread: JAX aborts the process if they do not come."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    patience, errors = int(os.environ.get("JAX_INITIALIZATION_TIMEOUT", "300")), list[Exception]()

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **given,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=PATIENCE,
                initialization_timeout=patience + PATIENCE,
            )
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=initialize, name=MEETING_THREAD, daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive() or errors:
        why = first_line(errors[0]) if errors else f"not all have come in {patience} s"
        alone = "; for one process alone: env -u SLURM_JOB_ID python …" if where == "slurm" else ""
        raise TransientError(f"{where}: the job's processes do not meet ({why}){alone}")


def overlap_flags(processes: int) -> str:
    """Return what to add to XLA_FLAGS, before JAX starts, so that several GPUs compute while they communicate.

    XLA leaves that off. Nothing where there is one GPU, none that JAX is to use, or the user has decided.
    """
    used = os.environ.get("JAX_PLATFORMS", "cuda").split(",")
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not gpus or gpus * processes == 1 or not {"cuda", "gpu"} & set(used):
        return ""
    if OVERLAP in os.environ.get("XLA_FLAGS", ""):
        return ""
    return f"{OVERLAP}=true"


def all_agree(holds: bool) -> bool:
    """Tell whether it holds in every process. All wait for each other."""
    if jax.process_count() == 1:
        return holds
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.process_allgather(np.array(holds)).all())


def of_first_process(numbers: Sequence[int]) -> list[int]:
    """Return the numbers of process 0. All wait for it."""
    if jax.process_count() == 1:
        return list(numbers)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(numbers))))
    if not length:
        return []
    mine = np.resize(np.array(list(numbers) or [0]), length)
    return multihost_utils.broadcast_one_to_all(mine).tolist()


class Agreement:
    """Asks whether any process wants something, in step with the devices, so that no process waits for the others."""

    def __init__(self, mesh: Mesh, lag: int):
        self._lag, self._asked = lag, deque[jax.Array]()
        if jax.process_count() > 1:
            local = (np.full(jax.local_device_count(), vote, np.int32) for vote in (0, 1))
            self._votes = [global_batch(batch_sharding(mesh), {"vote": votes})["vote"] for votes in local]
            self._any = jax.jit(lambda votes: votes.max(), out_shardings=replicated(mesh))

    def ask(self, wanted: bool) -> bool:
        """Say whether this process wants it; return whether any did, `lag` calls ago: the same answer in each.

        Every process must call it equally often. A process alone is answered at once.
        """
        if jax.process_count() == 1:
            return wanted
        self._asked.append(self._any(self._votes[wanted]))
        return len(self._asked) > self._lag and bool(jax.device_get(self._asked.popleft()))
