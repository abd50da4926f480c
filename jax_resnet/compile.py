"""The command `python -m jax_resnet.compile --config CONFIG --topology v5e:4x4`: what a training takes elsewhere.

The step is compiled for each topology, without its devices, or else for the devices at hand. --json writes what is
printed; status 1 says that one does not fit. What is counted is the training step at its largest images, without a
teacher; evaluation takes less.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from jax_resnet.command import run, whole
from jax_resnet.config import parse_flags, validate
from jax_resnet.errors import UserError

Row = dict[str, Any]


def main() -> None:
    """Runs the command. Raises UserError for a user's mistake."""
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # the compiler does not return for Python's own; nothing is half-written
    of = sys.argv[0]  # whose flags a mistyped one is compared with
    config_flags.DEFINE_config_file("config", None, "The config file, with `:argument` where it takes one.")
    flags.DEFINE_list("topology", [], "TPU topologies, v5e:2x2,v5p:2x2x1; left out, the devices here.", module_name=of)
    flags.DEFINE_string("per_device_batch", None, "Instead of the config's batch_size, on each device.", module_name=of)
    flags.DEFINE_bool("largest", False, "Also search the largest batch that fits.", module_name=of)
    flags.DEFINE_string("json", None, "The file to write the rows to.", module_name=of)
    save = "The folder for the executables: JAX_COMPILATION_CACHE_DIR of the training that is to start with them."
    flags.DEFINE_string("save", None, save, module_name=of)
    app_flags = flags.FLAGS
    parse_flags(list(sys.argv))
    c, batch = app_flags.config, app_flags.per_device_batch
    if c is None:
        raise UserError("--config is missing: give a file, for example --config configs/resnet50_imagenet.py")
    per_device = None if batch is None else whole("--per_device_batch", batch)
    for flag in ("json", "save"):
        file = getattr(app_flags, flag)
        if file is not None and not (file and os.access(Path(file).absolute().parent, os.W_OK)):
            raise UserError(
                f"--{flag}={file}: cannot be written; is {Path(file).parent} a folder that you may write to?"
            )
    validate(c)
    if app_flags.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices here, if any, are not wanted
    rows = list(rows_of(c, app_flags.topology, per_device, app_flags.largest, app_flags.save))
    show(rows)
    if app_flags.json:
        file = Path(app_flags.json)
        file.with_name(file.name + ".part").write_text(json.dumps(rows, indent=1) + "\n")
        file.with_name(file.name + ".part").replace(file)
    if not all(row["fits"] for row in rows):
        sys.exit(1)


def rows_of(
    c: ConfigDict, topologies: list[str], per_device: int | None, search: bool, save: str | None
) -> Iterator[Row]:
    """What there is to say of each topology, of the devices at hand if none is given. Raises UserError."""
    import jax  # which takes a second that a mistyped flag should not wait

    from jax_resnet import parallel, program

    if save:
        jax.config.update("jax_compilation_cache_dir", str(Path(save).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    meshes = [(name, program.topology_mesh(name)) for name in topologies] or [("", parallel.data_mesh())]
    for name, mesh in meshes:
        yield row_of(c, name, mesh, per_device, search)


def row_of(c: ConfigDict, name: str, mesh: Any, per_device: int | None, search: bool) -> Row:
    """What there is to say of the devices of a mesh. Raises UserError."""
    from jax_resnet import overview, program

    tried: dict[int, program.Program | program.TooLarge] = {}

    def job_of(each: int | None) -> Any:
        changed = c.copy_and_resolve_references()
        if each is not None:
            if any(len(row) > 2 for row in c.progressive or ()):
                raise UserError("config.progressive has batches of its own; leave out --per_device_batch and --largest")
            changed.batch_size = each * mesh.size
        return overview.prepare(changed, mesh)[0]

    def attempt(job: Any) -> program.Program | program.TooLarge:
        each = program.heaviest(job).batch_size // mesh.size
        if each not in tried:
            print(f"compiling for {name or 'the devices here'}, {each} images each …", file=sys.stderr, flush=True)
            try:
                tried[each] = program.compiled(job)
            except program.TooLarge as e:
                tried[each] = e
        return tried[each]

    def try_batch(each: int) -> tuple[int, int, bool]:
        found = attempt(job_of(each))
        if isinstance(found, program.TooLarge):
            return found.needed, found.available, False
        return found.memory, available, True

    job, began = job_of(per_device), time.monotonic()
    phase, device = program.heaviest(job), mesh.devices.flat[0]
    found, each = attempt(job), phase.batch_size // mesh.size
    height, width, channels = job.data.train.image_shape
    row: Row = {
        "topology": name or None,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "model": job.config.model.name,
        "dtype": job.config.dtype,
        "image": [phase.image_size or height, phase.image_size or width, channels],
        "per_device_batch": each,
        "fits": isinstance(found, program.Program),
        "compile_seconds": round(time.monotonic() - began, 1),
        "compiler": device.client.platform_version.splitlines()[0],
    }
    published = program.HARDWARE.get(device.device_kind)
    if isinstance(found, program.Program):
        row |= {
            "memory_bytes": found.memory,
            "arguments_bytes": found.arguments,
            "temporaries_bytes": found.temporaries,
            "code_bytes": found.code,
            "moved_bytes": found.moved,
            "flops": found.flops,
            "cycles": found.cycles,
            "collectives": found.collectives,
        }
        if published:
            seconds = found.seconds(published)
            steps = job.plan.position(job.plan.steps) * job.plan.batch_size / phase.batch_size
            row |= {"least_seconds": seconds, "least_device_hours": steps * seconds * mesh.size / 3600}
    else:
        row |= {"memory_bytes": found.needed, "available_bytes": found.available}
    if search or not row["fits"]:
        available = published.memory * program.GIB if published else program.bytes_limit(device) or 0
        if not available:
            raise UserError(f"--largest: how much memory {device.device_kind} has is not known")
        unit = program.unit_of(job)
        row["largest_per_device_batch"] = program.largest(try_batch, each, unit) or program.largest(try_batch, unit, 1)
    return row


def show(rows: list[Row]) -> None:
    """Prints them as a table, and below it what their memory holds, or by how much it does not, and the costs."""
    gib, console, first = 2**30, Console(highlight=False), rows[0]
    console.width = max(100, console.width)  # a narrow terminal breaks lines better than the table its headings
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("", "images each", "GiB", "MB/image", "kcycles/image", "collectives", "images/s each ≤"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        each = row["per_device_batch"]
        cells = [row["topology"] or f"{row['devices']} × {row['device_kind']}", f"{each:,}"]
        cells.append(f"{row['memory_bytes'] / gib:.2f}")
        if row["fits"]:
            cells += [
                f"{row['moved_bytes'] / each / 1e6:.1f}" if row["moved_bytes"] else "",
                f"{row['cycles'] / each / 1e3:,.1f}" if row["cycles"] else "",
                f"{sum(count for count, _ in row['collectives'].values())}",
                f"{each / row['least_seconds']:,.0f}" if "least_seconds" in row else "",
            ]
        table.add_row(*cells)
    height, width, channels = first["image"]
    console.print(f"{first['model']}, images {height}×{width}×{channels}, activations {first['dtype']}")
    console.print(table)
    for row in rows:
        if row["fits"]:
            parts = {"state and batch": "arguments", "temporaries": "temporaries", "program": "code"}
            told = [", ".join(f"{of} {row[f'{key}_bytes'] / gib:.2f}" for of, key in parts.items()) + " GiB"]
            told += [f"{count} {kind}, {size / 1e6:.1f} MB" for kind, (count, size) in row["collectives"].items()]
        else:
            there = row["available_bytes"] / gib
            told = [f"does not fit: {row['memory_bytes'] / gib:.2f} GiB of {there:.2f}, "
                    f"{row['memory_bytes'] / gib - there:.2f} too much"]  # fmt: skip
        if "largest_per_device_batch" in row:
            told.append(f"at most {row['largest_per_device_batch']:,} images each")
        if "least_device_hours" in row:
            told.append(f"the whole training {row['least_device_hours']:,.1f} device hours or more")
        console.print(f"{row['topology'] or row['device_kind']}: {'; '.join(told)}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
