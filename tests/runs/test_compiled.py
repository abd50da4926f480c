"""What is compiled is kept in the workdir: a run that goes on starts without compiling, to the same numbers."""

import os
from pathlib import Path

import faults
import jax
import pytest
from conftest import ROOT, run_main
from ml_collections import ConfigDict

from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.training.loop import train

TINY = ROOT / "tests" / "tiny.py"


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the cache that the tests share; and what takes no time to compile is kept too."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def kept(workdir: Path) -> set[str]:
    return {file.name for file in (workdir / "compiled").iterdir()}


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir) if row["kind"] == "train"]


def test_a_run_that_goes_on_compiles_nothing(tiny_npz: Path, tmp_path: Path) -> None:
    args = [f"--config={TINY}:{tiny_npz}", "--config.log_every=1", "--config.checkpoint.every.steps=4"]

    def run(workdir: Path, steps: int) -> None:
        done = run_main(*args, f"--workdir={workdir}", f"--config.stop_after_steps={steps}", devices=2)
        assert (done.returncode, done.stderr) == (0, "")

    run(tmp_path / "run", 9)
    before = kept(tmp_path / "run")
    assert {"jit_train_step", "jit_eval_step"} <= {name.rpartition("-")[0].rpartition("-")[0] for name in before}
    run(tmp_path / "run", 17)  # evaluates and saves, too
    assert kept(tmp_path / "run") == before  # what had to be compiled would have been added
    run(tmp_path / "whole", 17)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.soak
def test_a_file_cut_short_is_compiled_anew(tiny_npz: Path, tmp_path: Path) -> None:
    """As by a process that was killed while it wrote."""
    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}", "--config.log_every=1"]
    assert run_main(*args, "--config.stop_after_steps=4").returncode == 0
    for file in (tmp_path / "compiled").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    done = run_main(*args, "--config.stop_after_steps=8")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 8


def test_the_users_own_place_is_left(tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path / 'run'}", "--config.stop_after_steps=1"]
    assert run_main(*args).returncode == 0
    assert any((tmp_path / "own").iterdir())
    assert not (tmp_path / "run" / "compiled").exists()


def test_each_run_of_a_process_keeps_its_own(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    try:
        for seed in (0, 1):
            tiny_config.seed, tiny_config.stop_after_steps = seed, 1
            train(tiny_config, tmp_path / str(seed))
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", place)
    assert all(any(name.startswith("jit_train_step") for name in kept(tmp_path / str(seed))) for seed in (0, 1))


@pytest.mark.soak
def test_processes_of_a_job_find_what_the_first_has_kept(tiny_npz: Path, tmp_path: Path) -> None:
    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}", "--config.log_every=1"]
    kept_after = []
    for steps in (9, 17):
        ended = faults.finish(faults.start([*args, f"--config.stop_after_steps={steps}"], processes=2))
        assert [end.status for end in ended] == [0, 0], ended
        kept_after.append({name for name in kept(tmp_path) if name.startswith(("jit_train_step", "jit_eval_step"))})
    assert len(kept_after[0]) == 2
    assert kept_after[0] == kept_after[1]
