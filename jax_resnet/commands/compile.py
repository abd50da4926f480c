"""The command `jax-resnet compile --config CONFIG --topology v5e:4x4`: what a training takes elsewhere.

The step is compiled for each topology, without its devices, or else for the devices at hand. --json writes what is
printed; status 1 says that one does not fit. What is counted is the training step at its largest images, without a
teacher; evaluation takes less.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from jax_resnet.commands.cli import check_writable, whole
from jax_resnet.config import parse_flags, validate
from jax_resnet.errors import UserError
from jax_resnet.runs.paths import write


def main() -> None:
    """Runs the command. Raises UserError for a user's mistake."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for the compiler; nothing is half-written
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
    json_file, save_folder = (Path(text) if text is not None else None for text in (app_flags.json, app_flags.save))
    if json_file:
        check_writable("--json", json_file)
    if save_folder and not save_folder.is_dir():
        check_writable("--save", save_folder)
    validate(c)
    if app_flags.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices here, if any, are not wanted
    from jax_resnet.commands import program  # loads JAX, for which a mistyped flag should not wait

    if save_folder:
        program.save_to(save_folder)
    rows = [row for case in program.cases(c, app_flags.topology) for row in case.rows(per_device, app_flags.largest)]
    show(rows)
    if json_file:
        write(json_file, (json.dumps(rows, indent=1) + "\n").encode())
    if not all(row["fits"] for row in rows):
        sys.exit(1)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints them as a table, and below it what their memory holds, or by how much it does not, and the costs."""
    gib, console, first = 2**30, Console(highlight=False), rows[0]
    console.width = max(100, console.width)  # a narrow terminal breaks lines better than the table its headings
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("", "images each", "GiB", "MB/image", "kcycles/image", "collectives", "images/s each ≤"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        each = row["per_device_batch"]
        cells = [row["topology"] or f"{row['devices']} × {row['device_kind']}", f"{each:,}"]
        cells.append(f"{row['memory'] / gib:.2f}")
        if row["fits"]:
            cells += [
                f"{row['moved'] / each / 1e6:.1f}" if row["moved"] else "",
                f"{row['cycles'] / each / 1e3:,.1f}" if row["cycles"] else "",
                f"{sum(count for count, _ in row['collectives'].values())}",
                f"{each / row['least_seconds']:,.0f}" if "least_seconds" in row else "",
            ]
        table.add_row(*cells)
    height, width, channels = first["image"]
    console.print(f"{first['model']}, images {height}×{width}×{channels}, activations {first['dtype']}")
    console.print(table)
    for row in rows:
        name = row["topology"] or row["device_kind"]
        if row["fits"]:
            parts = {"state and batch": "arguments", "temporaries": "temporaries", "program": "code"}
            told = [", ".join(f"{of} {row[key] / gib:.2f}" for of, key in parts.items()) + " GiB"]
            told += [f"{count} {kind}, {size / 1e6:.1f} MB" for kind, (count, size) in row["collectives"].items()]
        else:
            there = row["available"] / gib
            told = [f"does not fit: {row['memory'] / gib:.2f} GiB of {there:.2f}, "
                    f"{row['memory'] / gib - there:.2f} too much"]  # fmt: skip
        if "least_device_hours" in row:
            told.append(f"the whole training {row['least_device_hours']:,.1f} device hours or more")
        most = "the largest that fits, " if row["largest"] else ""
        console.print(f"{name}, {most}{row['per_device_batch']:,} images each: {'; '.join(told)}", soft_wrap=True)
