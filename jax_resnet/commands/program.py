"""Compile a training step, and measure its memory, bytes moved, cycles and collectives.

The TPU compiler in libtpu needs no TPU, only the name of a topology.
"""

import math
import os
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_resnet.commands.overview import prepare
from jax_resnet.data.sampling import Phase
from jax_resnet.errors import UserError, first_line
from jax_resnet.runtime.mesh import data_mesh, mesh_over
from jax_resnet.training.experiment import Experiment

Row = dict[str, Any]  # an object of JSON

# Bytes a second from memory, and bfloat16 operations a second, by JAX's device_kind: half a chip of
# TPU7x, a chip of the others. Google Cloud publishes them on a page of each system.
PUBLISHED_RATES = {
    "TPU v4": (1228e9, 275e12),
    "TPU v5 lite": (819e9, 197e12),
    "TPU v5": (2765e9, 459e12),
    "TPU v6 lite": (1640e9, 918e12),
    "TPU7x": (3690e9, 1153e12),
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
LIBTPU_VARIABLES = {
    # These three replace the answers of the metadata server, which is not queried.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Compiling does not use the device, which another process may hold.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def meshes(names: Sequence[str]) -> dict[str, Mesh]:
    """Return each topology's mesh; without names, the local devices'. Raises UserError."""
    return {name: topology_mesh(name) for name in names} or {"": data_mesh()}


def topology_mesh(name: str) -> Mesh:
    """Make the mesh of a TPU topology, as `data_mesh` does of the local devices.

    `name` is GENERATION:SHAPE, v5e:4x4. Raises UserError for an unknown name, or without libtpu.
    """
    for variable, value in LIBTPU_VARIABLES.items():
        os.environ.setdefault(variable, value)
    if not find_spec("libtpu"):
        raise UserError(f"--topology={name}: the compiler for TPUs is not here: pip install libtpu; it needs no TPU")
    options = {}
    if name.startswith(("v4:", "v5p:")):
        # JAX runs both cores of such a chip as one device.
        options["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as e:
        why = first_line(e).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology={name}: {why}; for example v5e:2x2, v6e:16x16, v5p:2x2x1") from None
    return mesh_over(devices)


def save_to(folder: Path) -> None:
    """Keep all compiled programs in a folder, as JAX_COMPILATION_CACHE_DIR of a training."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def compile_rows(config: ConfigDict, name: str, mesh: Mesh, per_device: int | None, *, search: bool) -> list[Row]:
    """Measure the step of the config.

    With `search`, or if it does not fit, also measure that of the largest batch that fits.
    Raises UserError.
    """
    device = mesh.devices.flat[0]
    if search and device.platform == "cpu":
        raise UserError(f"--largest: how much memory {device.device_kind} has is not known")
    experiment = with_batch(config, mesh, per_device)
    row = compile_row(experiment, name)
    if row["fits"] and not search:
        return [row]
    tried = {row["per_device_batch"]: row}

    def fits(batch: int) -> bool:
        if batch not in tried:
            tried[batch] = compile_row(with_batch(config, mesh, batch), name)
        return tried[batch]["fits"]

    # The parts of a batch and the groups of batch norm divide it, and span as many devices as the
    # config's own do.
    unit = math.gcd(row["per_device_batch"], config.accumulate * (config.model.bn_group_size or 8))
    largest = largest_batch(fits, first=row["per_device_batch"], unit=unit)
    if not largest:
        return [row]
    return [row, tried[largest] | {"largest": True}]


def with_batch(config: ConfigDict, mesh: Mesh, per_device: int | None) -> Experiment:
    """Build the experiment with `per_device` examples a device, the config's if None.

    Raises UserError.
    """
    config = config.copy_and_resolve_references()
    if per_device is not None:
        if any(len(row) > 2 for row in config.progressive or ()):
            raise UserError("config.progressive has batches of its own; leave out --per_device_batch and --largest")
        config.batch_size = per_device * mesh.size
    return prepare(config, mesh)


def heaviest_phase(experiment: Experiment) -> Phase:
    """Return the phase of training whose batch has the most pixels."""
    return max(experiment.plan.phases, key=lambda phase: phase.batch_size * (phase.image_size or 1) ** 2)


def compile_row(experiment: Experiment, name: str) -> Row:
    """Compile and measure the heaviest phase's step for a topology, "" for local devices."""
    config = experiment.config
    phase = heaviest_phase(experiment)
    devices = list(experiment.mesh.devices.flat)
    images = phase.batch_size // len(devices)
    height, width, channels = experiment.data.input_shape
    print(f"compiling for {name or 'the devices here'}, {images} images each …", file=sys.stderr, flush=True)
    row = {
        "topology": name or None,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "model": config.model.name,
        "dtype": config.dtype,
        "image": [phase.image_size or height, phase.image_size or width, channels],
        "per_device_batch": images,
        "largest": False,
        **compile_step(experiment),
    }
    if row["fits"] and row["device_kind"] in PUBLISHED_RATES:
        bandwidth, flops = PUBLISHED_RATES[row["device_kind"]]
        # Memory and arithmetic run at the published rates, and overlap completely.
        row["least_seconds"] = max((row["moved"] or 0) / bandwidth, (row["flops"] or 0) / flops)
        if len(experiment.plan.phases) == 1:
            row["least_device_hours"] = experiment.plan.steps * row["least_seconds"] * len(devices) / 3600
    return row


def compile_step(experiment: Experiment) -> Row:
    """Compile the heaviest phase's step for the experiment's mesh, and tell if it fits."""
    device = experiment.mesh.devices.flat[0]
    lowered = experiment.steps.train.lower(*experiment.shapes(heaviest_phase(experiment)))
    try:
        row = measure(lowered.compile())
    except jax.errors.JaxRuntimeError as e:
        sizes = re.findall(r"\b([\d.]+)([KMGT])\b", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or len(sizes) < 2:
            raise
        needed, available = (round(float(n) * 1024 ** " KMGT".index(unit)) for n, unit in sizes[:2])
        return {"fits": False, "memory": needed, "available": available}
    available = row["memory"]
    if device.platform == "gpu":
        # The GPU compiler accepts programs that are too large.
        available = (device.memory_stats() or {}).get("bytes_limit", available)
    if row["memory"] > available:
        return {"fits": False, "memory": row["memory"], "available": available}
    return {"fits": True} | row


def measure(executable: Any) -> Row:
    """Measure a compiled program, for one device and one step; None where JAX has no number."""
    sizes = executable.memory_analysis()
    totals = executable.cost_analysis() or {}
    text = executable.as_text()
    # The new state overwrites the old one.
    outputs = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    temporaries = sizes.temp_size_in_bytes + outputs
    arguments, code = sizes.argument_size_in_bytes, sizes.generated_code_size_in_bytes
    return {
        "memory": arguments + temporaries + code,
        "arguments": arguments,
        "temporaries": temporaries,
        "code": code,
        "moved": int(totals.get("bytes accessed", 0)) or None,
        "flops": int(totals.get("flops", 0)) or None,
        # The TPU compiler estimates fusions, but not collectives and copies.
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) or None,
        "collectives": collectives(text),
    }


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of each kind in an HLO program, and the bytes of their results."""
    count, size = Counter[str](), Counter[str]()
    for shapes, kind, start in re.findall(rf"= (\S.*?) ({COLLECTIVES})(-start)?\(", text):
        sizes = [_bytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)]
        if start and kind != "all-reduce":
            # The start of an asynchronous collective also returns its operands, except all-reduce.
            sizes = [max(sizes)]
        count[kind] += 1
        size[kind] += sum(sizes)
    return {kind: (count[kind], size[kind]) for kind in sorted(count)}


def _bytes(dtype: str, shape: str) -> int:
    """Count the bytes of an array; pred, a dtype without a number in its name, has one byte."""
    bits = int((re.findall(r"\d+", dtype) or ["8"])[0])
    return max(1, bits // 8) * math.prod(int(n) for n in shape.split(",") if n)


def largest_batch(fits: Callable[[int], bool], *, first: int, unit: int) -> int:
    """Find the largest multiple of `unit` that fits, 0 if none does.

    Doubles from the multiple `first` on, then bisects. All smaller sizes than one that fits must fit.
    """
    low, high = 0, first // unit
    while fits(high * unit):
        low, high = high, 2 * high
    return unit * (low + bisect_left(range(low + 1, high), True, key=lambda units: not fits(units * unit)))
