"""From the command to the first step: how long each part takes, with nothing compiled before and with all of it.

    python benchmarks/start_up.py [--rounds 3] [--json FILE] [-- ARGUMENT OF main …]

Without arguments: the digits of the README, and ResNet-50 on random images of 64 pixels, 16 a step. Each round is a run
in a fresh workdir ("cold"), and another in which only what the first compiled is left ("warm"). Medians of the rounds,
in seconds:

    command     Python, absl, ml_collections and the config file
    imports     of JAX, Flax, Optax, Orbax, Grain and this package
    experiment  data opened, network and optimizer traced for their shapes
    state       weights drawn on the devices, while another thread begins to compile the step
    step 1      what is left of that, first batch, run, reported; the thread goes on with the evaluation's step

"programs" are those that XLA was asked for, that of the evaluation with them, "read" those found compiled.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import machine

ROOT = Path(__file__).parents[1]
PARTS = ("command", "imports", "experiment", "state", "step 1")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def child(file: Path, arguments: list[str]) -> None:
    """Runs the command, and writes when each part was done; ends with the first step."""
    report: dict[str, Any] = {"programs": 0, "read": 0}

    def done(part: str) -> None:
        report[part] = time.time()

    from absl import app

    from jax_resnet import main

    def run(argv: list[str]) -> int:
        done("command")
        import jax

        import jax_resnet.training.loop
        from jax_resnet.runs.log import Telemetry
        from jax_resnet.runtime.host import COMPILER_THREAD

        done("imports")

        def timed(event: str, _: float, **__: Any) -> None:
            report["programs"] += event.endswith("backend_compile_duration")

        def counted(event: str, **_: Any) -> None:
            report["read"] += event.endswith("cache_hits")

        jax.monitoring.register_event_duration_secs_listener(timed)
        jax.monitoring.register_event_listener(counted)

        def then(function: Callable[..., Any], part: str) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                result = function(*args, **options)
                done(part)
                return result

            return call

        def first_step(*_: Any, **__: Any) -> None:
            done("step 1")
            for thread in threading.enumerate():
                if thread.name == COMPILER_THREAD:  # what it is at is kept for the warm start
                    thread.join()
            file.write_text(json.dumps(report))
            os._exit(0)

        loop = jax_resnet.training.loop
        loop.build = then(loop.build, "experiment")
        loop.restore_or_begin = then(loop.restore_or_begin, "state")
        Telemetry.train = first_step  # type: ignore[method-assign]
        return main.main(argv)

    app.run(run, argv=["main", *arguments], flags_parser=main._parse)


def measured(arguments: list[str], workdir: Path) -> dict[str, float]:
    """Seconds of each part, and the counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, __file__, f"--child={file}", "--", *arguments, f"--workdir={workdir}"]
        began = time.time()
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
        report = json.loads(file.read_text())
    times = [began, *(report[part] for part in PARTS)]
    seconds = {part: b - a for part, a, b in zip(PARTS, times, times[1:], strict=False)}
    return seconds | {"all": times[-1] - began} | {name: report[name] for name in ("programs", "read")}


def cold_and_warm(arguments: list[str], workdir: Path) -> list[dict[str, float]]:
    """One round."""
    shutil.rmtree(workdir, ignore_errors=True)
    cold = measured(arguments, workdir)
    for path in workdir.iterdir():
        if path.name != "compiled":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [cold, measured(arguments, workdir)]


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.arguments)
    report = machine(PACKAGES) | {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        images = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
        labels = np.arange(64) % 10
        np.savez(at / "random.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
        small = ["--config.batch_size=16", "--config.model.bn_group_size=16", "--config.data.image.crop=none"]
        small.append("--config.data.image.size=64")
        cases = {
            "digits": ["--config=configs/resnet20_digits.py"],
            "resnet50": ["--config=configs/resnet50_imagenet.py", f"--config.data.name=npz:{at}/random.npz", *small],
        }
        for name, arguments in {"": args.arguments}.items() if args.arguments else cases.items():
            rounds = [cold_and_warm(arguments, at / "run") for _ in range(args.rounds)]
            for kind, readings in zip(("cold", "warm"), zip(*rounds, strict=True), strict=True):
                medians = {key: statistics.median(r[key] for r in readings) for key in readings[0]}
                report["rows"].append({"name": f"{name}, {kind}".strip(", "), **medians, "readings": readings})
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"{report['machine']}, {report['cores']} cores, {report['date']}\n")
    headings = [*PARTS, "all", "programs", "read"]
    print("| | " + " | ".join(headings) + " |")
    print("|---" * (len(headings) + 1) + "|")
    for row in report["rows"]:
        cells = [f"{row[key]:.0f}" if key in ("programs", "read") else f"{row[key]:.1f}" for key in headings]
        print(f"| {row['name']} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
