"""Faults at a step, and jobs of several processes to have them in.

    python tests/faults.py KIND STEP RANK --config … --workdir …

is `python -m jax_resnet.main`, in which process RANK has a fault before update STEP, counted from 0: see KINDS.
What was saved is on disk by then where nothing sees to it after the fault. Before an exception, saving takes long: the
run is to see to it.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import programs

ROOT = Path(__file__).resolve().parents[1]
MARK = "injected at "
SAVING = 4.0  # seconds that it takes at least where it is to take long


def _raise() -> None:
    raise RuntimeError("injected fault")


def _stop() -> None:
    from jax_resnet.commands.failure import end

    end("stopped", 128 + signal.SIGTERM)  # as where a signal comes while XLA compiles


def _signal(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


KINDS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "kill": _signal(signal.SIGKILL),
    "freeze": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM),
    "sigint": _signal(signal.SIGINT),
    "exception": _raise,
    "stop": _stop,
    "stuck": lambda: time.sleep(3600),
}
LOSE_WHAT_IS_BEING_SAVED = ("kill", "freeze", "stop", "stuck")


def fail_at(rank: int, step: int, kind: str) -> None:
    """Has process `rank` meet the fault before update `step` of a training in this process."""
    import jax
    import orbax.checkpoint as ocp

    from jax_resnet.commands import failure
    from jax_resnet.commands.failure import Watchdog
    from jax_resnet.training.loop import Loop, StepsAhead

    if kind not in ("kill", "freeze"):  # all processes are alive: on a busy machine they have all the time they need
        failure.LINGER_SECONDS = failure.SAVING_SECONDS = programs.HANG_SECONDS
    beat = Watchdog.beat

    def impatient(self: Watchdog, doing: str, times: float = 1) -> None:
        """Be patient, except with the step of the fault: the stall is told by the process that is stuck."""
        beat(self, doing, times)
        if kind == "stuck" and jax.process_index() == rank and doing == f"what comes before step {step + 1:,}":
            self._until = time.monotonic() + 2

    Watchdog.beat = impatient  # type: ignore[method-assign]

    at, save, finalize = StepsAhead.at, Loop._save, ocp.StandardCheckpointHandler.finalize

    def save_whole(self: Loop, *args: Any) -> None:
        save(self, *args)
        self.checkpoints.wait()

    def finalize_late(*args: Any) -> None:
        time.sleep(SAVING)
        finalize(*args)

    if kind == "exception":
        ocp.StandardCheckpointHandler.finalize = finalize_late  # type: ignore[method-assign]
    elif kind in LOSE_WHAT_IS_BEING_SAVED:
        Loop._save = save_whole  # type: ignore[method-assign]

    def faulty(self: StepsAhead, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == step and jax.process_index() == rank and kind != "none":
            print(f"{MARK}{time.time()}", file=sys.stderr, flush=True)
            KINDS[kind]()
        return at(self, number, *args, **kwargs)

    StepsAhead.at = faulty  # type: ignore[method-assign]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    args: Sequence[object],
    *,
    processes: int = 1,
    devices: int = 1,
    kind: str = "none",
    step: int = 0,
    rank: int = 0,
    environments: Sequence[dict[str, str]] = (),
) -> list[programs.Program]:
    """Processes of one job, running main with `args`, in which `rank` has the fault.

    They know of each other by `environments`, if given, else by JAX's variables.
    """
    from conftest import main_env

    port = free_port()
    started = []
    for number in range(processes):
        env = main_env(devices)
        if environments:
            env |= environments[number]
        elif processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
            env |= {"JAX_PROCESS_ID": str(number)}
        started.append(programs.start([sys.executable, __file__, kind, step, rank, *args], env=env))
    return started


@dataclass
class Ended:
    """How a process ended; status -9 also if it had to be killed because it still ran."""

    status: int
    stdout: str
    stderr: str
    at: float  # time.time()

    @property
    def last_line(self) -> str:
        return (self.stderr.strip().splitlines() or [""])[-1]


def finish(processes: Sequence[programs.Program], timeout: float = programs.HANG_SECONDS) -> list[Ended]:
    """How each ended; when all but stopped ones have, those are killed, as are all after `timeout` seconds."""
    deadline, ends = time.monotonic() + timeout, dict[int, float]()
    while len(ends) < len(processes) and time.monotonic() < deadline:
        for number, process in enumerate(processes):
            if number not in ends and process.poll() is not None:
                ends[number] = time.time()
        running = [p for number, p in enumerate(processes) if number not in ends]
        if running and len(running) < len(processes) and all(_is_stopped(p.pid) for p in running):
            break
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
    outputs = [process.communicate() for process in processes]
    return [
        Ended(process.returncode, *output, ends.get(number, time.time()))
        for number, (process, output) in enumerate(zip(processes, outputs, strict=True))
    ]


def injected_at(ended: Sequence[Ended]) -> float:
    """When the fault was."""
    (line,) = (line for end in ended for line in end.stderr.splitlines() if line.startswith(MARK))
    return float(line.removeprefix(MARK))


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


if __name__ == "__main__":
    from absl import app

    from jax_resnet import main

    kind, step, rank, *rest = sys.argv[1:]
    fail_at(int(rank), int(step), kind)
    app.run(main.main, argv=[sys.argv[0], *rest], flags_parser=main._parse)
