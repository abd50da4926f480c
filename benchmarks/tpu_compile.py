"""What trainings take on TPUs, by the TPU compiler, without one: python benchmarks/tpu_compile.py [CASE …]

Compiles the cases named, all if none is, with `jax-resnet compile`, keeps what it finds in
benchmarks/tpu_compile.json, and prints the table of all that is there. It needs libtpu, and 2 to 30 minutes of two
cores for each line.
"""

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "tpu_compile.json"
RESNET50 = ["--config=configs/resnet50_imagenet.py", "--per_device_batch=256", "--config.model.bn_group_size=256"]
CASES = {  # arguments, and topologies
    "stem and a block": ([*RESNET50, "--config.model.depths=(1,)", "--config.model.widths=(64,)"], ["v5e:1x1"]),
    "resnet50": (RESNET50, ["v5e:2x2", "v5e:4x4", "v5e:16x16", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2"]),
    "resnet152": (["--config=configs/resnet50_imagenet.py:152", "--config.model.bn_group_size=64",
                   "--per_device_batch=384", "--largest"], ["v5e:2x2"]),
    "wide_resnet101_2": (["--config=configs/resnet50_imagenet.py:50", "--config.model.name=wide_resnet101_2",
                          "--config.model.bn_group_size=64", "--per_device_batch=320", "--largest"], ["v5e:2x2"]),
    "resnetrs420": (["--config=configs/resnet_rs.py:420", "--config.model.bn_group_size=16", "--per_device_batch=64",
                     "--largest"], ["v5e:2x2"]),
}  # fmt: skip


def compile_case(args: list[str], topology: str) -> list[dict[str, Any]]:
    """The rows of jax_resnet.commands.compile."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "jax_resnet", "compile", *args, f"--topology={topology}", f"--json={file}"]
        subprocess.run(command, cwd=HERE.parent, check=False, stdout=subprocess.DEVNULL)
        rows = json.loads(file.read_text())
    return [{**row, "command": " ".join(["python", *command[1:-1]]), "date": date.today().isoformat()} for row in rows]


def line(case: str, row: dict[str, Any]) -> str:
    """Of the table."""
    each = row["per_device_batch"]
    cells = [case, row["topology"], f"{each:,}" + ("" if row["fits"] else ", too many")]
    cells += [f"{row['memory'] / 2**30:.2f}"]
    if row["fits"]:
        sums = sum(count for count, _ in row["collectives"].values())
        cells += [f"{row['moved'] / each / 1e6:,.0f}", f"{row['cycles'] / 1e6:,.1f}", f"{sums}"]
        cells += [f"{each / row['least_seconds']:,.0f}"]
    else:
        cells += [""] * 4
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Compiles and prints."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in sys.argv[1:] or CASES:
        args, topologies = CASES[case]
        for topology in topologies:
            found[f"{case}, {topology}"] = compile_case(args, topology)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    headings = ["", "topology", "images a chip", "GiB", "MB an image", "M cycles a step", "collectives"]
    print("| " + " | ".join([*headings, "images/s a chip, at most"]) + " |")
    print("|---" * 8 + "|")
    for key, rows in found.items():
        lines = [line(key.rpartition(", ")[0], row) for row in rows]
        print("\n".join(dict.fromkeys(lines)))  # where the batch that is given is the largest, there are two alike


if __name__ == "__main__":
    main()
