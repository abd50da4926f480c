"""Faults at a step, and jobs of several processes to have them in.

    python tests/faults.py KIND STEP RANK --config … --workdir …

is `python -m jax_resnet.main`, in which process RANK has a fault before update STEP, counted from 0: see KINDS.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _raise() -> None:
    raise RuntimeError("injected fault")


def _signal(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


KINDS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "kill": _signal(signal.SIGKILL),
    "freeze": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM),
    "sigint": _signal(signal.SIGINT),
    "exception": _raise,
    "stuck": lambda: time.sleep(3600),
}


def fail_at(rank: int, step: int, kind: str) -> None:
    """Has process `rank` meet the fault before update `step` of a training in this process."""
    import jax

    from jax_resnet.train import StepsAhead

    at = StepsAhead.at

    def faulty(self: StepsAhead, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == step and jax.process_index() == rank:
            KINDS[kind]()
        return at(self, number, *args, **kwargs)

    StepsAhead.at = faulty  # type: ignore[method-assign]


def start(
    args: Sequence[object], *, processes: int = 1, devices: int = 1, kind: str = "none", step: int = 0, rank: int = 0
) -> list[subprocess.Popen[str]]:
    """Processes of one job, running main with `args`, in which `rank` has the fault."""
    from conftest import main_env

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        env = main_env(devices)
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
            env |= {"JAX_PROCESS_ID": str(number)}
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, kind, str(step), str(rank), *map(str, args)],
                env=env,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each; those still running after `timeout` seconds are killed."""
    deadline = time.monotonic() + timeout
    found = []
    for process in processes:
        try:
            stdout, stderr = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        found.append((process.returncode, stdout, stderr))
    return found


if __name__ == "__main__":
    from absl import app

    from jax_resnet import main

    kind, step, rank, *rest = sys.argv[1:]
    fail_at(int(rank), int(step), kind)
    app.run(main.main, argv=[sys.argv[0], *rest], flags_parser=main._parse)
