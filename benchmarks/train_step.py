"""Our training step beside timm's networks under torch, on images that are on the device already.

    python benchmarks/train_step.py [MODEL:SIZE:BATCH …] [--peers NAME …] [--rounds 5] [--seconds 4] [--json FILE]

Needs:    pip install torch timm   (without them ours is measured alone)
The device is the one that JAX finds, and torch has to find the same kind. On a GPU both compute in bfloat16 with
float32 weights, on a CPU in float32. Ours is the whole step of the config: uint8 images normalised and flipped, the
guard against losses that are no numbers, metrics; theirs is given normalised images.

Each peer is a process that stands still while another is measured, round after round, so that what else the machine
does hits all alike. "of peak" is the arithmetic of the convolutions, three times that of a forward pass, as a share of
what one large matrix product reaches here, "of copy" the bytes that XLA counts as a share of what a large copy moves.
The peer "per_core" is ours with JAX_NUM_CPU_DEVICES the number of cores: a device for each, which share the batch.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from interleaved import Process, in_turn, machine, serve

PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "triton", "jax-cuda12-plugin", "jax-cuda13-plugin")
MODES = {"torch": None, "compiled": "default", "graphs": "reduce-overhead", "tuned": "max-autotune-no-cudagraphs"}
OURS = ("ours", "per_core")
PEERS = (*OURS, *MODES)
CASES = {
    "gpu": [
        *(f"resnet50:224:{batch}" for batch in (64, 128, 256, 512)),
        *(f"{name}:224:256" for name in ("resnet18", "resnet101", "resnet152", "wide_resnet50_2", "resnetrs50")),
        "cifar_resnet20:32:128",
        "cifar_resnet56:32:1024",
    ],
    "cpu": ["resnet50:64:16", "resnet18:64:16", "cifar_resnet20:32:128"],
}
USUAL = {"gpu": ["ours", "compiled", "graphs"], "cpu": ["ours", "per_core", "torch", "compiled"]}
TOGETHER = {"gpu": 20, "cpu": 1}  # steps between waits for the device


def ours(name: str, size: int, batch: int, report: dict[str, Any]) -> Iterator[int]:
    """The step of a training, on one batch again and again; `report` is told facts about it."""
    import jax
    import numpy as np

    from jax_resnet.commands.overview import prepare
    from jax_resnet.data.sampling import Phase
    from jax_resnet.runtime.mesh import data_mesh

    began = time.perf_counter()
    c, mesh = config(name, size, batch), data_mesh()
    experiment = prepare(c, mesh)
    phase: Phase = experiment.plan.phases[0]
    compiled = experiment.steps.train.lower(*experiment.shapes(phase)).compile()
    report["compile_s"] = time.perf_counter() - began
    device = jax.devices()[0]
    check_kind(device.platform)
    report |= {"device": device.device_kind, "peak": matmul_rate(experiment.config.dtype), "copy": copy_rate()}
    report["flops"] = 3 * batch * experiment.network.flops(size, size, 3)
    report["moved"] = (compiled.cost_analysis() or {}).get("bytes accessed", 0) or None
    random = np.random.default_rng(0)
    host = {
        "image": random.integers(0, 256, (batch, size, size, 3), np.uint8),
        "label": np.arange(batch, dtype=np.int32) % experiment.data.num_classes,
    }
    data, state = jax.device_put(host, experiment.sharding), experiment.network.fresh_state()
    while True:
        began = time.perf_counter()
        for _ in range(TOGETHER[device.platform]):
            state, sums = compiled(state, data)
        report["host_ms"] = (time.perf_counter() - began) / TOGETHER[device.platform] * 1e3
        jax.block_until_ready(sums)
        report["memory"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
        yield batch


def config(name: str, size: int, batch: int) -> Any:
    """ResNet-50's config, or that of the CIFAR networks, with that model."""
    from jax_resnet.config.recipes import cifar, nvidia

    c = cifar(name, batch_size=batch) if name.startswith("cifar_") else nvidia(name, batch_size=batch, epochs=90)
    c.data.image.size = size
    c.model.bn_group_size = None  # all of the batch, as torch has it
    return c


def matmul_rate(dtype: str) -> float:
    """Operations a second of a large product of matrices, the best of five."""
    import jax
    import jax.numpy as jnp

    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), dtype)
    return 2 * side**3 / least_seconds(jax.jit(lambda a: a @ a), a)


def copy_rate() -> float:
    """Bytes a second that are read and written where a large array is negated, the best of five."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    return 2 * a.nbytes / least_seconds(jax.jit(lambda a: -a), a)


def least_seconds(function: Callable[[Any], Any], array: Any) -> float:
    """Of a call, from five readings of four each."""
    import jax

    def reading() -> float:
        began = time.perf_counter()
        for _ in range(4):
            out = function(array)
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / 4

    reading()
    return min(reading() for _ in range(5))


def theirs(name: str, size: int, batch: int, mode: str | None, report: dict[str, Any]) -> Iterator[int]:
    """The same for torch."""
    import torch
    from torch_steps import synchronise, torch_step

    began = time.perf_counter()
    step, facts = torch_step(name, size, batch, 0.1, mode)
    together = TOGETHER["gpu" if torch.cuda.is_available() else "cpu"]
    check_kind("gpu" if torch.cuda.is_available() else "cpu")
    for number in itertools.count():
        begun = time.perf_counter()
        for _ in range(together if number else 1):
            step()
        report["host_ms"] = (time.perf_counter() - begun) / together * 1e3
        synchronise()
        if not number:
            report["compile_s"] = time.perf_counter() - began
        report |= facts()
        yield batch


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """The peers on one case, in turn."""
    command = [sys.executable, __file__, case, f"--seconds={args.seconds}"]
    with tempfile.TemporaryDirectory() as folder:
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        measured, left_out = in_turn(args.peers, command, args.rounds, Path(folder), env)
    return {"case": case, "rows": [row(p, of, measured) for p, of in measured.items()], "left_out": left_out}


def row(peer: str, of: Process, measured: dict[str, Process]) -> dict[str, Any]:
    """Medians of the readings, and how its time compares with each other's in the same round."""
    last, images_per_second = of.readings[-1], statistics.median(of.rates("s"))
    found = {"peer": peer, "images_per_second": images_per_second, "readings": of.readings}
    for unit in ("s", "cpu_s"):
        found[f"times_{unit}"] = {
            other: statistics.median(y / x for x, y in zip(of.rates(unit), than.rates(unit), strict=True))
            for other, than in measured.items()
            if other != peer
        }
    found["host_ms"] = statistics.median(reading["host_ms"] for reading in of.readings)
    return found | {name: last.get(name) for name in ("device", "memory", "compile_s")}


def show(report: dict[str, Any]) -> None:
    """Prints what --json writes. A CPU's times depend on what else a machine does: there it has ratios only."""
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"{report['device']}, {report['machine']}, {report['cores']} cores, {report['date']}\n")
    peers = {r["peer"] for case in report["cases"] for r in case["rows"]}
    headings = ["model:pixels:batch", "", "images/s", "of peak", "of copy", "GiB", "host ms a step"]
    headings += [f"{peer} takes" for peer in OURS if peer in peers]
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    absolute = report["device"] != "cpu"
    for case in report["cases"]:
        mine = {r["peer"]: r for r in case["rows"] if r["peer"] in OURS}
        batch = int(case["case"].rpartition(":")[2])
        facts = next(iter(mine.values()))["readings"][-1] if mine else {}
        for r in case["rows"]:
            steps = r["images_per_second"] / batch
            moved = facts.get("moved") if r["peer"] == "ours" else None
            cells = [case["case"], r["peer"], f"{r['images_per_second']:,.0f}" if absolute else ""]
            cells += [f"{facts['flops'] * steps / facts['peak']:.0%}" if facts else ""]
            cells += [f"{moved * steps / facts['copy']:.0%}" if moved else ""]
            cells += [f"{r['memory'] / 2**30:.2f}" if r["memory"] else ""]
            of_host = absolute or r["peer"] == "ours"  # torch computes on the CPU as it is called
            cells += [f"{r['host_ms']:.1f}" if of_host else ""]
            takes = (mine[peer]["times_s"].get(r["peer"]) if peer in mine else None for peer in OURS if peer in peers)
            cells += [f"{times:.2f} of its time" if times else "" for times in takes]
            print("| " + " | ".join(cells) + " |")
        for peer, why in case["left_out"].items():
            print(f"{case['case']} {peer} left out: {why}")


def main() -> None:
    """Measures, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="MODEL:SIZE:BATCH")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        help="default: " + "; ".join(f"on a {kind.upper()} {', '.join(peers)}" for kind, peers in USUAL.items()),
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of a reading")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        name, *sizes = args.cases[0].split(":")
        size, batch = map(int, sizes)
        facts: dict[str, Any] = {}

        def start() -> Iterator[int]:
            if args.serve == "per_core":
                os.environ["JAX_NUM_CPU_DEVICES"] = str(os.cpu_count())
            if args.serve in OURS:
                return ours(name, size, batch, facts)
            return theirs(name, size, batch, MODES[args.serve], facts)

        together = TOGETHER[platform()]
        return serve(start, batch * together, args.seconds, 1, lambda: facts)
    kind = platform()
    args.peers = args.peers or (
        ["ours", "compiled", "graphs"] if kind == "gpu" else ["ours", "per_core", "torch", "compiled"]
    )
    report = machine(PACKAGES) | {"seconds": args.seconds, "cases": []}
    for case in args.cases or CASES[kind]:
        report["cases"].append(measure(case, args))
        report["device"] = report["cases"][0]["rows"][0]["device"]
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    show(report)


def platform() -> str:
    """gpu or cpu, without taking hold of the device."""
    found = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
    return "gpu" if found else "cpu"


def check_kind(found: str) -> None:
    """Rates would be wrong if the library found another kind of device than the machine has."""
    if found != platform():
        raise SystemExit(f"this machine has a {platform()}, but a {found} is what was found to compute on")


if __name__ == "__main__":
    main()
