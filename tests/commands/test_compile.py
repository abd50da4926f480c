"""What compiling in advance tells, of the devices here and of TPUs that are not."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import LIBTPU, ROOT, main_env, needs_libtpu

from jax_resnet.commands.program import collectives, largest_batch


def compile_for(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jax_resnet", "compile", *map(str, args)]
    env = main_env() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{LIBTPU}"} | env
    return programs.run(command, env=env)


def test_collectives_are_counted_by_what_they_give() -> None:
    text = """
  %all-reduce.3 = (bf16[3,3,4,8]{3,2,1,0:T(4,128)(2,1)S(1)}, f32[8]{0}) all-reduce(%a, %b), channel_id=1
  ROOT %reduce.1 = f32[] all-reduce(%c), channel_id=2
  %get-tuple-element.2 = f32[8]{0} get-tuple-element(%all-reduce.3), index=1
  %all-gather-start.1 = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%d), dimensions={0}
  %all-gather-done.1 = f32[4,8]{1,0} all-gather-done(%all-gather-start.1)
  %all-reduce-start = u32[5]{0} all-reduce-start(%e), to_apply=%add
  %all-reduce-done = u32[5]{0} all-reduce-done(%all-reduce-start)
"""
    reduced = 3 * 3 * 4 * 8 * 2 + 8 * 4 + 4 + 5 * 4
    assert collectives(text) == {"all-gather": (1, 4 * 8 * 4), "all-reduce": (3, reduced)}


@pytest.mark.parametrize("unit", [1, 8, 32])
@pytest.mark.parametrize("first", [32, 64, 1024, 4992])
@pytest.mark.parametrize("most", [0, 5, 31, 64, 129, 700, 4096])
def test_the_largest_batch_is_found(most: int, first: int, unit: int) -> None:
    tries = []

    def fits(batch: int) -> bool:
        assert batch > 0
        assert batch % unit == 0
        tries.append(batch)
        return batch <= most

    assert largest_batch(fits, first=first, unit=unit) == most // unit * unit
    assert tries[0] == first
    assert len(tries) == len(set(tries))
    assert max(tries) <= max(2 * most, first)
    doublings, bisections = math.log2(max(2 * most, first) / first), math.log2(max(2 * most, first) / unit)
    assert len(tries) <= 2 + doublings + bisections


def test_for_the_devices_here_and_saved_for_the_training(tiny_npz: Path, tmp_path: Path) -> None:
    config = f"--config={ROOT}/tests/tiny.py:{tiny_npz}"
    rows, saved = tmp_path / "rows.json", tmp_path / "saved"
    done = compile_for(config, f"--json={rows}", f"--save={saved}")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(rows.read_text())
    assert (row["devices"], row["per_device_batch"], row["fits"], row["image"]) == (1, 16, True, [12, 12, 1])
    assert row["memory"] == row["arguments"] + row["temporaries"] + row["code"]
    assert "12×12×1, activations float32" in done.stdout
    env = main_env() | {"JAX_COMPILATION_CACHE_DIR": str(saved), "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    command = [sys.executable, "-m", "jax_resnet.main", config, f"--workdir={tmp_path}/run",
               "--config.stop_after_steps=2"]  # fmt: skip
    run = programs.run(command, env=env)
    assert "compilation cache hit for 'jit_train_step'" in run.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "error: --config is missing: give a config, for example configs/resnet20_digits.py"),
        (["--largset"], "error: --largset: no such flag; did you mean largest?"),
        (["--per_device_batch=0"], "error: --per_device_batch=0: 0 is not a positive integer"),
        (["--json=/nowhere/rows.json"],
         "error: --json=/nowhere/rows.json: cannot be written; is /nowhere a folder that you may write to?"),
        (["--largest"], "error: --largest: how much memory cpu has is not known"),
        (["--per_device_batch=1000"], "is larger than the train split"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(args: list[str], said: str, tiny_npz: Path) -> None:
    done = compile_for(*([f"--config={ROOT}/tests/tiny.py:{tiny_npz}"] if args else []), *args)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("compiling")]
    assert said in line


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x9", "v5e", "v9:2x2"])
def test_a_topology_that_there_is_not(name: str, tiny_npz: Path) -> None:
    done = compile_for(f"--config={ROOT}/tests/tiny.py:{tiny_npz}", f"--topology={name}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: --topology={name}: ")
    assert "for example v5e:2x2" in done.stderr


def test_without_the_compiler_for_tpus(tiny_npz: Path) -> None:
    done = compile_for(f"--config={ROOT}/tests/tiny.py:{tiny_npz}", "--topology=v5e:2x2", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (
        2,
        "error: --topology=v5e:2x2: the compiler for TPUs is not here: pip install libtpu; it needs no TPU\n",
    )


@pytest.fixture(scope="module")
def rows(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The tiny net for four TPU chips: statistics over each device's examples, then over the whole batch."""
    found = []
    for group in (4, 16):
        file = tmp_path_factory.mktemp("rows") / "rows.json"
        done = compile_for(f"--config={ROOT}/tests/tiny.py:{tiny_npz}", "--topology=v5e:2x2", f"--json={file}",
                           f"--config.model.bn_group_size={group}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert [line.startswith("compiling") for line in done.stderr.splitlines()] == [True]
        found += json.loads(file.read_text())
    return found


@pytest.mark.slow
@needs_libtpu
def test_statistics_of_each_device_need_no_collectives(rows: list[dict[str, Any]]) -> None:
    each, whole = rows
    for row in rows:
        assert (row["device_kind"], row["devices"], row["dtype"]) == ("TPU v5 lite", 4, "bfloat16")
        assert row["cycles"] > 0
        assert row["least_seconds"] >= max(row["moved"] / 819e9, row["flops"] / 197e12) > 0
    assert each["collectives"].keys() == {"all-reduce"}
    assert each["collectives"]["all-reduce"][0] <= 3
    assert whole["collectives"]["all-reduce"][0] >= 7  # one for each batch norm


@pytest.mark.soak
@pytest.mark.usefixtures("turn")
@needs_libtpu
def test_a_batch_that_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    stem_and_block = ["--config.model.depths=(1,)", "--config.model.widths=(64,)", "--config.model.bn_group_size=1024"]
    done = compile_for(f"--config={ROOT}/configs/resnet50_imagenet.py", "--topology=v5e:1x1",
                       "--per_device_batch=4096", f"--json={file}", *stem_and_block)  # fmt: skip
    assert done.returncode == 1, done.stderr
    over, most = json.loads(file.read_text())
    assert (over["fits"], most["fits"], most["largest"]) == (False, True, True)
    assert over["available"] == round(15.75 * 2**30) < over["memory"]
    assert most["per_device_batch"] % 1024 == 0
    tried = {int(line.split()[3]) for line in done.stderr.splitlines()}
    assert most["per_device_batch"] + 1024 in tried  # and did not fit, or it would be the largest
    assert 0.5 * over["available"] < most["memory"] <= over["available"]
    too_much = (over["memory"] - over["available"]) / 2**30
    assert f"4,096 images on each device, which does not fit: {too_much:.2f} GiB too much" in done.stdout
    assert f"{most['per_device_batch']:,} images on each device, the largest that fits" in done.stdout
