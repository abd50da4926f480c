"""What the compiler makes of a training step: does it fit, what does it move, what do the devices send each other.

The compiler for TPUs works without one, from the name of a topology; libtpu has it.
"""

import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_resnet.commands import overview
from jax_resnet.data.sampling import Phase
from jax_resnet.errors import UserError, first_line
from jax_resnet.runtime.mesh import data_mesh, mesh_over
from jax_resnet.training.experiment import Experiment

GIB = 2**30
Row = dict[str, Any]  # as JSON


@dataclass(frozen=True)
class Hardware:
    """What is published of a device as JAX counts them: half a chip of TPU7x, a whole one of the others."""

    memory: int  # GiB
    bandwidth: float  # bytes a second
    flops: float  # bfloat16 operations a second


HARDWARE = {  # by JAX's device_kind; Google Cloud's pages of each system
    "TPU v4": Hardware(32, 1228e9, 275e12),
    "TPU v5 lite": Hardware(16, 819e9, 197e12),
    "TPU v5": Hardware(95, 2765e9, 459e12),
    "TPU v6 lite": Hardware(32, 1640e9, 918e12),
    "TPU7x": Hardware(96, 3690e9, 1153e12),
}


@dataclass(frozen=True)
class Program:
    """A compiled step of one device, in bytes and counts of one step; what the compiler does not tell is None."""

    arguments: int  # state and batch
    temporaries: int
    code: int
    moved: int | None  # between the device's memory and its processors
    flops: int | None
    cycles: int | None  # of fusions, as the TPU compiler estimates them; not of collectives and copies
    collectives: dict[str, tuple[int, int]]  # how many of each kind, and the bytes of their results

    @property
    def memory(self) -> int:
        """Bytes of the device's memory: the new state takes the place of the old."""
        return self.arguments + self.temporaries + self.code

    def seconds(self, hardware: Hardware) -> float:
        """The least that a step can take where memory and arithmetic are as fast as published, all at once."""
        return max((self.moved or 0) / hardware.bandwidth, (self.flops or 0) / hardware.flops)


@dataclass(frozen=True)
class TooLarge:
    """A step that the devices' memory does not hold, in bytes of one device."""

    memory: int
    available: int


def topology_mesh(name: str) -> Mesh:
    """What `mesh.data_mesh` makes of the devices here, of those of a TPU topology.

    `name` is GENERATION:SHAPE, v5e:4x4. Raises UserError if there is none of that name, or no libtpu.
    """
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server what machine this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # and these two are what it would have answered
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no device that another process has
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)
    if not find_spec("libtpu"):
        raise UserError(f"--topology={name}: the compiler for TPUs is not here: pip install libtpu; it needs no TPU")
    # JAX runs a chip of these as one device.
    options = {"chip_config_name": "megacore"} if name.startswith(("v4:", "v5p:")) else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as e:
        why = first_line(e).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology={name}: {why}; for example v5e:2x2, v6e:16x16, v5p:2x2x1") from None
    return mesh_over(devices)


def heaviest(experiment: Experiment) -> Phase:
    """Of the phases of a training the one whose batch has the most pixels."""
    return max(experiment.plan.phases, key=lambda phase: phase.batch_size * (phase.image_size or 1) ** 2)


def compile_step(experiment: Experiment) -> Program | TooLarge:
    """The step of the heaviest phase, for the devices of the experiment's mesh."""
    lowered = experiment.steps.train.lower(*experiment.shapes(heaviest(experiment)))
    try:
        program = read(lowered.compile())
    except jax.errors.JaxRuntimeError as e:
        sizes = [float(n) * 1024 ** ("KMGT".index(unit) + 1) for n, unit in re.findall(r"\b([\d.]+)([KMGT])\b", str(e))]
        if "RESOURCE_EXHAUSTED" not in str(e) or len(sizes) < 2:
            raise
        return TooLarge(round(sizes[0]), round(sizes[1]))
    limit = bytes_limit(experiment.mesh.devices.flat[0])  # the compiler for GPUs does not refuse
    return TooLarge(program.memory, limit) if limit and program.memory > limit else program


def bytes_limit(device: jax.Device) -> int | None:
    """How much of its memory a GPU that is here gives to JAX."""
    return (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None


def read(executable: Any) -> Program:
    """What JAX tells of a compiled program."""
    sizes, costs, text = executable.memory_analysis(), executable.cost_analysis() or {}, executable.as_text()
    cycles = [int(of) for of in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    fresh = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    return Program(
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes + fresh,
        code=sizes.generated_code_size_in_bytes,
        moved=int(costs["bytes accessed"]) if "bytes accessed" in costs else None,
        flops=int(costs["flops"]) if "flops" in costs else None,
        cycles=sum(cycles) if cycles else None,
        collectives=collectives(text),
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """How many of each kind a program in HLO has, and the bytes of what they give."""
    count, size = Counter[str](), Counter[str]()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind, start in re.findall(rf"= (\S.*?) ({kinds})(-start)?\(", text):
        sizes = [_bytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)]
        count[kind] += 1
        # Those that are begun and awaited give what they take too, all-reduce apart.
        size[kind] += max(sizes) if start and kind != "all-reduce" else sum(sizes)
    return {kind: (count[kind], size[kind]) for kind in sorted(count)}


def _bytes(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+", dtype)
    each = 1 if dtype == "pred" or not bits else max(1, int(bits[0]) // 8)
    return each * math.prod(int(n) for n in shape.split(",") if n)


def largest(try_batch: Callable[[int], tuple[int, int, bool]], first: int, unit: int) -> int:
    """The largest multiple of `unit` that fits, 0 if none does, by few tries of `try_batch`.

    That gives, for a batch, the memory it needs, the memory there is, and whether it fits.
    """
    fits, over, known = 0, math.inf, dict[int, int]()
    guess = max(unit, first // unit * unit)
    while (between := over - fits) > unit:
        needed, available, does = try_batch(guess)
        known[guess] = needed
        fits, over = (guess, over) if does else (fits, guess)
        # What is needed grows almost in a line.
        near = sorted(known, key=lambda batch: abs(known[batch] - available))[:2]
        slope = (known[near[0]] - known[near[1]]) / (near[0] - near[1]) if len(near) > 1 else needed / guess
        wanted = near[0] + (available - known[near[0]]) / slope if slope > 0 else (fits + over) / 2
        # Near the limit XLA for TPUs computes anew what does not fit: then the line may be flat, and says nothing.
        if 2 * needed > available or not math.isfinite(wanted):
            wanted = min(wanted, 2 * guess)
        if math.isfinite(between) and over - fits > between / 2:
            wanted = (fits + over) / 2
        guess = int(min(max(wanted // unit * unit, fits + unit), over - unit))
    return fits


def unit_of(experiment: Experiment) -> int:
    """What a device's batches are multiples of, for a batch's parts and the groups of batch norm to divide them."""
    parts, devices, group = (
        experiment.config.accumulate,
        experiment.mesh.size,
        experiment.config.model.bn_group_size or 0,
    )
    if not group:
        return 8 * parts
    whole = (
        heaviest(experiment).batch_size % (devices * parts * group) == 0
    )  # groups lie on one device each, and stay so
    return parts * (group if whole else group // math.gcd(group, devices))


def cases(config: ConfigDict, topologies: Sequence[str]) -> list["Case"]:
    """The config on each topology; if none is given, on the devices here."""
    meshes = {name: topology_mesh(name) for name in topologies} or {"": data_mesh()}
    return [Case(config, name, mesh) for name, mesh in meshes.items()]


def save_to(folder: Path) -> None:
    """Has all that is compiled kept in a folder, as JAX_COMPILATION_CACHE_DIR of a training takes it."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class Case:
    """A config on the devices of a mesh. All of it raises UserError."""

    def __init__(self, config: ConfigDict, name: str, mesh: Mesh):
        self.config, self.name, self.mesh = config, name, mesh
        self.device = mesh.devices.flat[0]
        self.published = HARDWARE.get(self.device.device_kind)
        self._tried: dict[int, tuple[Program | TooLarge, float]] = {}

    def experiment(self, per_device: int | None) -> Experiment:
        """With that batch on each device, the config's own if None."""
        c = self.config.copy_and_resolve_references()
        if per_device is not None:
            if any(len(row) > 2 for row in c.progressive or ()):
                raise UserError("config.progressive has batches of its own; leave out --per_device_batch and --largest")
            c.batch_size = per_device * self.mesh.size
        return overview.prepare(c, self.mesh)[0]

    def compiled(self, experiment: Experiment) -> Program | TooLarge:
        """The step, compiled once."""
        each = heaviest(experiment).batch_size // self.mesh.size
        if each not in self._tried:
            print(f"compiling for {self.name or 'the devices here'}, {each} images each …", file=sys.stderr, flush=True)
            began = time.monotonic()
            found = compile_step(experiment)
            self._tried[each] = found, time.monotonic() - began
        return self._tried[each][0]

    def rows(self, per_device: int | None, search: bool) -> Iterator[Row]:
        """What there is to say of the config and, in a `search` or if it does not fit, of the largest that does."""
        experiment = self.experiment(per_device)
        yield self.row(experiment)
        if (search or isinstance(self.compiled(experiment), TooLarge)) and (most := self.largest(experiment)):
            yield self.row(self.experiment(most)) | {"largest": True}

    def row(self, experiment: Experiment) -> Row:
        """What there is to say of the experiment."""
        found = self.compiled(experiment)
        phase, plan, (height, width, channels) = (
            heaviest(experiment),
            experiment.plan,
            experiment.data.input_shape,
        )
        each = phase.batch_size // self.mesh.size
        row: Row = {
            "topology": self.name or None,
            "device_kind": self.device.device_kind,
            "devices": self.mesh.size,
            "model": experiment.config.model.name,
            "dtype": experiment.config.dtype,
            "image": [phase.image_size or height, phase.image_size or width, channels],
            "per_device_batch": each,
            "largest": False,  # that fits, found by a search
            "fits": isinstance(found, Program),
            "compile_seconds": round(self._tried[each][1], 1),
        }
        if isinstance(found, TooLarge):
            return row | asdict(found)
        row |= {"memory": found.memory, **asdict(found)}
        if self.published:
            seconds = row["least_seconds"] = found.seconds(self.published)
            if len(plan.phases) == 1:
                row["least_device_hours"] = plan.steps * seconds * self.mesh.size / 3600
        return row

    def largest(self, experiment: Experiment) -> int:
        """The largest batch of a device that fits, 0 if none does, from that of the experiment on."""
        there = self.published.memory * GIB if self.published else bytes_limit(self.device)
        if not there:
            raise UserError(f"--largest: how much memory {self.device.device_kind} has is not known")

        def attempt(each: int) -> tuple[int, int, bool]:
            found = self.compiled(self.experiment(each))
            fits = isinstance(found, Program)
            return found.memory, there if isinstance(found, Program) else found.available, fits

        unit, first = unit_of(experiment), heaviest(experiment).batch_size // self.mesh.size
        return largest(attempt, first, unit) or largest(attempt, unit, 1)
