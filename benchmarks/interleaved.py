"""Processes measured in turn: each stands still, with all that it started, while another is measured."""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
NO_ACCELERATOR = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What a report has to say of where and when it was made, and of these packages' versions."""
    found = {d for d in importlib.metadata.distributions() if d.name in packages}
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": next(iter(re.findall(r"model name\s*: (.*)", cpuinfo)), platform.machine()),
        "cores": CORES,
        "versions": {d.name: d.version for d in sorted(found, key=lambda d: packages.index(d.name))},
    }


def serve(
    start: Callable[[], Iterator[Any]],
    batch: int,
    seconds: float,
    together: int,
    facts: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Prints {} when batches flow, or what is missing; then a reading whenever it is let go on.

    A reading counts batches, of `batch` images, for that long, after some that were ready before, and has `facts()`.
    """
    try:
        batches = start()
        take(batches, seconds, together)
    except ImportError as e:
        return print(json.dumps({"missing": str(e)}))
    reading: dict[str, Any] = {}
    while True:
        print(json.dumps(reading), flush=True)
        os.killpg(0, signal.SIGSTOP)
        take(batches, seconds / 3, together)
        begun, cpu = time.perf_counter(), group_cpu_seconds()
        images = batch * take(batches, seconds, together)
        reading = {"images": images, "s": time.perf_counter() - begun, "cpu_s": group_cpu_seconds() - cpu} | facts()


def take(batches: Iterator[Any], seconds: float, together: int) -> int:
    """Takes batches for that long, and says how many: a multiple of `together`, as threads are done together."""
    end = time.perf_counter() + seconds
    for count in itertools.count(1):
        next(batches)
        if time.perf_counter() >= end and count % together == 0:
            return count
    raise AssertionError


def group_cpu_seconds() -> float:
    """What the processes of this group have used."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[2]) == os.getpgrp():
                ticks += sum(map(int, fields[11:15]))  # user and system, then those of children that have ended
    return ticks / os.sysconf("SC_CLK_TCK")


class Process:
    """A command that calls `serve`, stopped unless it is measured. `missing` says what it lacks."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] = NO_ACCELERATOR) -> None:
        self.log, self.readings = log, list[dict[str, Any]]()
        env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | env
        with log.open("w") as errors:  # a group of its own, but not a session: the kernel ends it if we are killed
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, process_group=0)
        self.missing = self.answer().get("missing")

    def answer(self) -> Any:
        """What it prints, once it has stopped or ended after that."""
        assert self.popen.stdout
        line = self.popen.stdout.readline()
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED | os.WEXITED)
        if not line:
            raise SystemExit(f"{self.log.stem}: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def measure(self) -> None:
        """One reading more."""
        os.killpg(self.popen.pid, signal.SIGCONT)
        self.readings.append(self.answer())

    def rates(self, unit: str) -> list[float]:
        """Images for each "s" or "cpu_s", of each reading."""
        return [r["images"] / r[unit] for r in self.readings]

    def kill(self) -> None:
        """Ends it, with all that it started."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


def in_turn(
    names: Sequence[str], command: list[str], rounds: int, folder: Path, env: dict[str, str] = NO_ACCELERATOR
) -> tuple[dict[str, Process], dict[str, str]]:
    """The processes of `command --serve=NAME`, with `rounds` readings each, one after another in each round.

    And of those that lack something, what. All have ended; their logs are in `folder`.
    """
    rows: dict[str, Process] = {}
    try:
        for name in names:
            rows[name] = Process([*command, f"--serve={name}"], folder / f"{name}.log", env)
        measured = {name: of for name, of in rows.items() if not of.missing}
        for _ in range(rounds):
            for of in measured.values():
                of.measure()
    finally:
        for of in rows.values():
            of.kill()
    return measured, {name: of.missing for name, of in rows.items() if of.missing}
