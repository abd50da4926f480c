"""The supervisor of launch/: what it begins anew, when it gives up, and that no command outlives it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from programs import HANG_SECONDS, until

SUPERVISE = ROOT / "launch" / "supervise"


def command(folder: Path, body: str) -> list[str]:
    """A command that notes each of its runs in folder/runs, then does `body`, with `run` counted from 1."""
    script = folder / "command.py"
    script.write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        f"folder = Path({str(folder)!r})\n"
        "with (folder / 'runs').open('a') as file:\n    file.write(f'{os.getpid()} {time.time()}\\n')\n"
        "run = len((folder / 'runs').read_text().splitlines())\n"
        "def save(step): (folder / 'checkpoints' / str(step)).mkdir(parents=True)\n"
        f"{body}\n"
    )
    return [sys.executable, str(script)]


def supervise(folder: Path, body: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SUPERVISE, *flags, "--", *command(folder, body), f"--workdir={folder}"],
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip


def runs(folder: Path) -> list[tuple[int, float]]:
    """(process id, time) of each run."""
    file = folder / "runs"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines]


def started(folder: Path, body: str, count: int = 1) -> subprocess.Popen[str]:
    """A supervisor whose command has begun `count` times."""
    process = subprocess.Popen(
        [SUPERVISE, "--", *command(folder, body), f"--workdir={folder}"], stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(runs(folder)) == count)
    return process


def alive(pid: int) -> bool:
    try:  # a killed orphan may stay as a zombie where nothing reaps it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("status", [0, 2, 130])
def test_what_is_not_begun_anew(tmp_path: Path, status: int) -> None:
    done = supervise(tmp_path, f"sys.exit({status})")
    assert (done.returncode, len(runs(tmp_path)), done.stderr) == (status, 1, "")


def test_ctrl_c_that_kills(tmp_path: Path) -> None:
    done = supervise(tmp_path, "signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)")
    assert (done.returncode, len(runs(tmp_path))) == (130, 1)


@pytest.mark.parametrize("end", ["sys.exit(1)", "sys.exit(143)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_what_is_begun_anew(tmp_path: Path, end: str) -> None:
    done = supervise(tmp_path, f"if run == 1:\n    {end}")
    assert (done.returncode, len(runs(tmp_path))) == (0, 2)
    assert "saved up to step 0; again in 1 s" in done.stderr


def test_gives_up_at_the_same_step_after_longer_and_longer_waits(tmp_path: Path) -> None:
    done = supervise(tmp_path, "if run == 1: save(40)\nos.kill(os.getpid(), 9)")
    assert done.returncode == 137
    assert done.stderr.splitlines()[-1] == "supervise: error: 3 runs in a row ended at step 40, the last with 137"
    assert [line.split("; ")[1] for line in done.stderr.splitlines()[:-1]] == [f"again in {n} s" for n in (1, 1, 2)]
    assert runs(tmp_path)[-1][1] - runs(tmp_path)[0][1] >= 4


def test_goes_on_as_long_as_there_are_newer_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(parents=True)  # half saved
    done = supervise(tmp_path, "if run == 4: sys.exit(0)\nsave(run)\nsys.exit(1)", "--attempts=1")
    assert (done.returncode, len(runs(tmp_path))) == (0, 4)
    assert [line.split("; ")[1] for line in done.stderr.splitlines()] == ["again in 1 s"] * 3


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_passes_a_signal_on_once_and_ends(tmp_path: Path, signum: int) -> None:
    body = (
        f"got = []\nsignal.signal({int(signum)}, lambda n, _: got.append(n))\n(folder / 'ready').touch()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3)\nsys.exit(100 + len(got))"
    )
    process = started(tmp_path, body)
    until((tmp_path / "ready").exists)
    process.send_signal(signum)
    assert process.wait(timeout=HANG_SECONDS) == 101
    assert len(runs(tmp_path)) == 1


def test_a_signal_while_it_waits_ends_it(tmp_path: Path) -> None:
    process = started(tmp_path, "sys.exit(7)")
    assert process.stderr is not None
    assert "again in" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANG_SECONDS) == 7
    assert len(runs(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_no_command_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    process = started(tmp_path, "time.sleep(600)")
    ((pid, _),) = runs(tmp_path)
    process.kill()
    until(lambda: not alive(pid))


def test_nothing_of_the_last_run_is_left_when_the_next_begins(tmp_path: Path) -> None:
    body = "if run == 1:\n    child = os.fork()\n    if not child: time.sleep(600)\n"
    supervise(tmp_path, body + "    (folder / 'left').write_text(str(child))\n    os.kill(os.getpid(), 9)")
    assert len(runs(tmp_path)) == 2
    assert not alive(int((tmp_path / "left").read_text()))


@pytest.mark.parametrize("flag", [["--workdir={}"], ["--workdir", "{}"], ["-workdir={}"]])
def test_takes_the_workdir_from_the_command(tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)
    args = ["--attempts", "1", "--", "false", *(part.format(tmp_path) for part in flag)]
    done = subprocess.run([SUPERVISE, *args], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stderr.strip()) == (
        1,
        "supervise: error: 1 runs in a row ended at step 30, the last with 1",
    )


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--", "true"], "give -- COMMAND --workdir=FOLDER"),
        (["--", "true", "--workdir"], "give -- COMMAND --workdir=FOLDER"),
        (["--workdir=x"], "give -- COMMAND --workdir=FOLDER"),
        (["--workdir=x", "--", "/no/such/command"], "/no/such/command: cannot be run (No such file or directory)"),
    ],
)
def test_mistakes(args: list[str], line: str) -> None:
    done = subprocess.run([SUPERVISE, *args], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
