"""Checkpoints: nothing damaged is used, what stays, what is told of them."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
import pytest
from conftest import ROOT, main_env
from ml_collections import ConfigDict
from workdirs import final_state

from jax_resnet.commands.checkpoints import inspect
from jax_resnet.config import duration
from jax_resnet.errors import UserError
from jax_resnet.runs.checkpoint import Checkpoints, Damaged
from jax_resnet.runs.retention import Keep
from jax_resnet.training.experiment import build
from jax_resnet.training.loop import train
from jax_resnet.training.state import to_fields


@pytest.fixture(scope="module")
def begun(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, Path]:
    """A run of which steps 8 and 16 are saved."""
    import tiny

    config, workdir = tiny.get_config(str(tiny_npz)), tmp_path_factory.mktemp("begun")
    config.stop_after_steps = 16
    train(config, workdir)
    return config, workdir


def files_of(workdir: Path, step: int) -> list[Path]:
    files = (workdir / "checkpoints" / str(step)).rglob("*")
    return sorted(file for file in files if file.is_file() and file.stat().st_size)


def arrays_of(state: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(files: list[Path]) -> Iterator[tuple[str, Path, Callable[[bytes], bytes]]]:
    """50 flipped bits, half of them wherever bytes are, half in one file after another, and 20 files cut short."""
    rng, sizes = random.Random(0), [file.stat().st_size for file in files]
    for file in [*rng.choices(files, sizes, k=25), *itertools.islice(itertools.cycle(files), 25)]:
        bit = rng.randrange(8 * file.stat().st_size)
        yield f"bit {bit} of {file.name}", file, lambda content, bit=bit: flipped(content, bit)
    for number, file in enumerate(itertools.islice(itertools.cycle(files), 20)):
        size = 0 if number == 0 else rng.randrange(file.stat().st_size)
        yield f"{file.name} cut to {size} bytes", file, lambda content, size=size: content[:size]


@pytest.mark.slow
def test_flipped_bits_and_cut_files_are_found_or_harmless(begun: tuple[ConfigDict, Path]) -> None:
    """A step is Damaged, or what is restored of it is bit for bit what was saved."""
    config, workdir = begun
    like = to_fields(build(config).network.abstract_state)
    found = {"damaged": 0, "harmless": 0}
    with Checkpoints(workdir) as checkpoints:
        sound = arrays_of(checkpoints.restore(16, like))
        sound_config = checkpoints.config(16)
        for what, file, damage in damages(files_of(workdir, 16)):
            content = file.read_bytes()
            file.write_bytes(damage(content))
            try:
                assert arrays_of(checkpoints.restore(16, like)) == sound, what
                assert checkpoints.config(16) == sound_config, what
                found["harmless"] += 1
            except Damaged as e:
                found["damaged" if "\n" not in str(e) else what] = found["damaged"] + 1
            finally:
                file.write_bytes(content)
    print(found)
    assert sum(found.values()) == 70
    assert found["damaged"] >= 20  # the rest is in what Orbax does not need: copies, metadata for people


def test_a_damaged_step_is_set_aside_and_the_run_ends_as_it_would_have(
    begun: tuple[ConfigDict, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = begun
    for name in ("whole", "damaged"):
        shutil.copytree(workdir, tmp_path / name)
    largest = max(files_of(tmp_path / "damaged", 16), key=lambda file: file.stat().st_size)
    largest.write_bytes(flipped(largest.read_bytes(), 4 * largest.stat().st_size))
    config = config.copy_and_resolve_references()
    config.stop_after_steps = None
    train(config, tmp_path / "whole")
    capsys.readouterr()
    train(config, tmp_path / "damaged")
    out = capsys.readouterr().out
    assert "checkpoints/16: this checkpoint is damaged" in out
    assert "going on from step 8, the newest that is sound" in out
    (aside,) = (tmp_path / "damaged" / "damaged").iterdir()
    assert aside.name.startswith("16-")
    assert (aside / "state").is_dir()
    assert final_state(tmp_path / "whole").keys() == final_state(tmp_path / "damaged").keys()
    for name, array in final_state(tmp_path / "whole").items():
        assert array.tobytes() == final_state(tmp_path / "damaged")[name].tobytes(), name


def test_nothing_is_moved_when_nothing_is_sound(begun: tuple[ConfigDict, Path], tmp_path: Path) -> None:
    config, workdir = begun
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    for step in (8, 16):
        (run / "checkpoints" / str(step) / "record" / "metadata").write_text("{}")
    with pytest.raises(UserError, match="none of the 2 saved is sound: choose another workdir"):
        train(config, run)
    assert {d.name for d in (run / "checkpoints").iterdir() if d.is_dir()} >= {"8", "16"}


def test_another_network_is_no_damage(begun: tuple[ConfigDict, Path]) -> None:
    config, workdir = begun
    other = config.copy_and_resolve_references()
    other.model.widths = (16, 32)
    with Checkpoints(workdir) as checkpoints, pytest.raises(UserError, match="of another network") as e:
        checkpoints.restore_newest(to_fields(build(other).network.abstract_state), print)
    assert not isinstance(e.value, Damaged)


def test_what_stays() -> None:
    keep = Keep(latest=2, best=2, metric="loss", always=lambda step: step % 30 == 0)
    steps = list(range(10, 110, 10))
    assert keep.of(steps, {20: -0.5, 50: -0.1, 70: -0.9}) == {90, 100, 50, 20, 30, 60}
    assert Keep(latest=1, best=0).of(steps, {20: 1.0}) == {100}
    assert Keep(latest=1, best=1).of(steps, {20: 0.5, 40: 0.5}) == {40, 100}  # of equals the later
    assert Keep().of([], {}) == set()


def test_every_so_many_stay_also_after_restarts(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.checkpoint.keep, tiny_config.checkpoint.keep_best = 1, 0
    tiny_config.checkpoint.every = tiny_config.eval.every = duration(steps=4)
    tiny_config.checkpoint.keep_every = duration(steps=6)
    for stop in (7, 13, 1000):
        tiny_config.stop_after_steps = stop
        train(tiny_config, tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [6, 12, 18, 20]


def test_the_best_by_loss(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.checkpoint.best_by = "loss"
    tiny_config.eval.every.steps = 2
    train(tiny_config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    with Checkpoints(tmp_path) as checkpoints:  # which reads in the record by what
        assert checkpoints.best_step() == min(checkpoints.steps(), key=lambda step: losses.get(step, np.inf))
        assert losses[checkpoints.best_step()] == min(losses.values())


def command(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jax_resnet", "checkpoints", *args]
    return programs.run(command, env=main_env(), cwd=ROOT)


def test_inspect_and_verify(begun: tuple[ConfigDict, Path], tmp_path: Path) -> None:
    _, workdir = begun
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    rows = inspect(run, verify=True)
    assert [(row["step"], row["sound"]) for row in rows] == [(8, True), (16, True)]
    assert rows[0]["bytes"] == sum(file.stat().st_size for file in files_of(run, 8))
    assert rows[0]["sha256"] != rows[1]["sha256"]
    assert set(rows[1]["metrics"]) == {"test"}
    for file in files_of(run, 8):
        if file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)
    assert [row["sound"] for row in inspect(run, verify=False)] == [None, None]
    done = command("verify", str(run))
    assert done.returncode == 1, done.stderr
    assert "checkpoints/8: this checkpoint is damaged" in done.stdout.splitlines()[-1]
    assert " sound " in done.stdout
    as_json = command("verify", "--json", str(run))
    assert [row["sound"] for row in json.loads(as_json.stdout)] == [False, True]
    nothing = command("inspect", str(tmp_path / "nothing"))
    assert nothing.returncode == 2
    assert nothing.stderr.strip().endswith("no checkpoint has been saved here")
    assert len(nothing.stderr.strip().splitlines()) == 1
