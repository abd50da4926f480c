"""`jax_resnet.train` in somebody else's program leaves that as it was."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from jax_resnet.errors import Interrupted
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runtime.host import Host
from jax_resnet.training.loop import train

PROGRAM = """
import faulthandler, json, multiprocessing, signal, subprocess, sys, threading
sys.path.insert(0, "tests")
import jax, tiny
import jax_resnet

def config(**changes):
    c = tiny.get_config(sys.argv[1])
    c.train.steps, c.schedule.warmup.steps = 4, 1
    c.update_from_flattened_dict(changes)
    return c

def surroundings():
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "handlers": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)],
        "wakeup": signal.set_wakeup_fd(-1),
        "hooks": list(map(repr, (sys.excepthook, threading.excepthook, sys.unraisablehook))),
        "jax": {name: repr(value) for name, value in jax.config.values.items()},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }
"""
TEN = """
before = surroundings()
for run in range(10):
    jax_resnet.train(config(), f"{sys.argv[2]}/{run}")
failing = config()
failing.optimizer.learning_rate = 1e30
failing.guard.max_skipped = 0
try:
    jax_resnet.train(failing, f"{sys.argv[2]}/failing")
    raise SystemExit("it did not fail")
except jax_resnet.errors.UserError:
    pass
short = config(stop_after_steps=1)  # while the evaluation is still being compiled
jax_resnet.train(short, f"{sys.argv[2]}/short")
after = surroundings()
different = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
print("different:", json.dumps(different))
"""
CHILD = """
def waits():
    import time
    time.sleep(3600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
fork = multiprocessing.get_context("fork").Process(target=waits, daemon=True)
fork.start()
try:
    jax_resnet.train(config(**{"data.workers": 1}), f"{sys.argv[2]}/run")
    print("alive:", json.dumps([child.poll() is None, fork.is_alive()]))
finally:
    child.kill()
    fork.kill()
"""
LOOP = """
print("begun", flush=True)
for run in range(3):
    try:
        jax_resnet.train(config(**{"train.steps": 100_000, "log_every": 1}), f"{sys.argv[2]}/{run}")
    except Exception as e:
        print("caught", repr(e), flush=True)
"""


def start(program: str, *args: object) -> Any:
    return programs.start([sys.executable, "-c", PROGRAM + program, *args], cwd=ROOT)


def said(output: str, what: str) -> object:
    (line,) = (line for line in output.splitlines() if line.startswith(f"{what}: "))
    return json.loads(line.removeprefix(f"{what}: "))


def test_ten_trainings_one_that_fails_and_a_short_one_leave_nothing(tiny_npz: Path, tmp_path: Path) -> None:
    process = start(TEN, tiny_npz, tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said(output, "different") == {}


def test_a_child_of_the_program_survives(tiny_npz: Path, tmp_path: Path) -> None:
    process = start(CHILD, tiny_npz, tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said(output, "alive") == [True, True]


def test_ctrl_c_is_no_exception_that_a_loop_over_runs_goes_on_from(tiny_npz: Path, tmp_path: Path) -> None:
    process = start(LOOP, tiny_npz, tmp_path)
    programs.until(lambda: '"step": 3' in read(tmp_path / "0" / "metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "caught" not in output
    assert not (tmp_path / "1").exists()


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


class Stopping(Host):
    """Asks to stop when the loop begins with `moment`."""

    def __init__(self, moment: str):
        self.moment, self.signum = moment, 0

    def beat(self, doing: str, patience: float = 1.0) -> None:
        if doing == self.moment:
            self.signum = signal.SIGTERM

    def stop_requested(self) -> int:
        return self.signum


def test_a_host_may_ask_to_stop_and_all_is_saved(tiny_config: ConfigDict, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 6 of 20, saved in") as stopped:
        train(tiny_config, tmp_path, host=Stopping("what comes before step 7"))
    assert not isinstance(stopped.value, Exception)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 6


def test_before_its_first_step_nothing_is_said_to_be_saved(tiny_config: ConfigDict, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"^stopped before the first step; the same command begins again$"):
        train(tiny_config, tmp_path, host=Stopping("compiling the step"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
