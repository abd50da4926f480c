"""Compile a training step and print what it takes: `jax-resnet compile --topology v5e:4x4 CONFIG`.

The step is compiled for each topology, without its devices, or else for the devices of this machine;
status 1 says that one does not fit. It is the training step at its largest images, without a teacher;
evaluation takes less.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jax_resnet.commands.cli import check_writable, parse_config, print_rows
from jax_resnet.config import validate
from jax_resnet.runs.paths import write


def main() -> None:
    """Run the command. Raises UserError for a user's mistake."""
    # Python's own handler would wait for the compiler to return. The default leaves no partial file.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Suggestions for a mistyped flag come from the flags of the program's own module.
    own = {"module_name": sys.argv[0]}
    flags.DEFINE_list("topology", [], "TPU topologies, v5e:2x2,v5p:2x2x1; left out, the devices here.", **own)
    flags.DEFINE_integer("per_device_batch", None, "In place of the config's batch_size.", lower_bound=1, **own)
    flags.DEFINE_bool("largest", False, "Also search the largest batch that fits.", **own)
    flags.DEFINE_string("json", None, "The file to write the rows to.", **own)
    flags.DEFINE_string("save", None, "JAX_COMPILATION_CACHE_DIR of the training that the executables are for.", **own)
    config = parse_config()
    arguments = flags.FLAGS
    if arguments.json:
        check_writable("--json", Path(arguments.json))
    if arguments.save and not Path(arguments.save).is_dir():
        check_writable("--save", Path(arguments.save))
    validate(config)
    if arguments.topology:
        # Other processes may be using the devices of this machine.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # This import loads JAX, for which a mistyped flag should not wait.
    from jax_resnet.commands import program

    if arguments.save:
        program.save_to(Path(arguments.save))
    rows = []
    for name, mesh in program.meshes(arguments.topology).items():
        rows += program.compile_rows(config, name, mesh, arguments.per_device_batch, search=arguments.largest)
    for row in rows:
        print_rows(row["topology"] or f"{row['devices']} × {row['device_kind']}", texts(row))
    if arguments.json:
        write(Path(arguments.json), (json.dumps(rows, indent=1) + "\n").encode())
    if not all(row["fits"] for row in rows):
        sys.exit(1)


def texts(row: dict[str, Any]) -> dict[str, str]:
    """Write what a step takes of each device, with units."""
    images = row["per_device_batch"]
    image = "×".join(map(str, row["image"]))
    result = {"network": f"{row['model']}, images {image}, activations {row['dtype']}"}
    result["batch"] = f"{images:,} images on each device"
    if row["largest"]:
        result["batch"] += ", the largest that fits"
    if not row["fits"]:
        too_much = (row["memory"] - row["available"]) / 2**30
        result["batch"] += f", which does not fit: {too_much:.2f} GiB too much"
    memory = ("memory", "available", "arguments", "temporaries", "code")
    result |= {part: f"{row[part] / 2**30:.4g} GiB" for part in memory if part in row}
    for cost, unit, size in (("moved", "MB", 1e6), ("cycles", "thousand", 1e3)):
        if row.get(cost):
            result[cost] = f"{row[cost] / images / size:,.1f} {unit} an image"
    for kind, (count, size) in row.get("collectives", {}).items():
        result[kind] = f"{count}, {size / 1e6:.3g} MB"
    if seconds := row.get("least_seconds"):
        result["least time"] = f"{1e3 * seconds:.4g} ms a step, {images / seconds:,.0f} images/s a device"
    if hours := row.get("least_device_hours"):
        result["training"] = f"{hours:,.1f} device hours or more"
    return result
