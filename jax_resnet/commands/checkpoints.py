"""List the checkpoints of a run, and verify them: `jax-resnet checkpoints inspect|verify RUN`."""

import json
import sys
import time
from typing import Any

from etils import epath

from jax_resnet.commands.cli import Parser
from jax_resnet.errors import UserError
from jax_resnet.runs.checkpoint import Checkpoints, Damaged
from jax_resnet.runs.console import percent
from jax_resnet.runs.metrics_reader import evaluations
from jax_resnet.runs.paths import AnyPath, open_path


def main() -> None:
    """Run the command; exit with status 1 when something is damaged."""
    parser = Parser(
        prog="jax-resnet checkpoints",
        description="Lists the checkpoints of a run. A step's digest covers its config and the digest of every array.",
    )
    parser.add_argument("what", choices=("inspect", "verify"), help="verify: read the arrays, compare their digests")
    parser.add_argument("workdir", help="the folder of the run")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    args = parser.parse_args()
    workdir = open_path(args.workdir)
    rows = inspect(workdir, verify=args.what == "verify")
    if not rows and not args.json:
        raise UserError(f"{workdir}: no checkpoint has been saved here")
    print(json.dumps(rows, indent=2) if args.json else _table(rows))
    if any(row["sound"] is False for row in rows):
        sys.exit(1)


def inspect(workdir: AnyPath, *, verify: bool) -> list[dict[str, Any]]:
    """Make a row for each saved step: step, bytes, saved (its time), metrics, sha256, sound, fault.

    With `verify` the arrays are read too; else `sound` is None for a record that agrees with itself.
    """
    rows = []
    with Checkpoints(workdir) as checkpoints:
        metrics = evaluations(workdir)
        for step in checkpoints.steps():
            walk = epath.Path(checkpoints.directory / str(step)).walk()
            files = [(folder / name).stat() for folder, _, inside in walk for name in inside]
            row: dict[str, Any] = {"step": step, "bytes": sum(file.length for file in files)}
            row["saved"] = max((file.mtime for file in files), default=None)
            row |= {"metrics": metrics.get(step, {}), "sha256": None, "sound": None, "fault": None}
            try:
                row["sha256"] = checkpoints.record(step)["sha256"]
                if verify:
                    checkpoints.arrays(step)
                    row["sound"] = True
            except Damaged as e:
                row |= {"sound": False, "fault": str(e)}
            rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    sound = {True: "sound", False: "damaged", None: "not read"}
    lines = [f"{'step':>10}  {'MB':>9}  {'saved':19}  {'digest':12}  {'arrays':8}  evaluated"]
    for row in rows:
        saved = ""
        if row["saved"]:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved"]))
        metrics = ", ".join(
            f"{split} {percent(values['accuracy_top1'], 2)}"
            for split, values in row["metrics"].items()
            if "accuracy_top1" in values
        )
        digest = (row["sha256"] or "")[:12]
        columns = f"{row['step']:>10,}  {row['bytes'] / 1e6:>9,.2f}  {saved:19}  {digest:12}"
        lines.append(f"{columns}  {sound[row['sound']]:8}  {metrics}")
    return "\n".join(lines + [row["fault"] for row in rows if row["fault"]])
