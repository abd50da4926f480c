"""The embedded default over several seeds: how many of the 360 test digits are right, and the wall time of each run.

    python benchmarks/digits.py [--seeds 3] [--into FOLDER]

Prints one table; FOLDER keeps the runs (a temporary one by default).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Runs the command once for each seed, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--into", type=Path, default=None)
    args = parser.parse_args()
    into = args.into or Path(tempfile.mkdtemp())
    right = []
    for seed in range(args.seeds):
        workdir = into / f"seed{seed}"
        command = [sys.executable, "-m", "jax_resnet.main", "--config=resnet20_digits"]
        command += [f"--config.seed={seed}", f"--workdir={workdir}"]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        if seed == 0:
            print(next(line for line in run.stdout.splitlines() if line.startswith("devices")))
            print(f"{'seed':>5} {'right of 360':>13} {'seconds':>8}")
        result = json.loads((workdir / "result.json").read_text())
        right.append(result["splits"]["test"]["correct_top1"])
        print(f"{seed:>5} {right[-1]:>13} {result['wall_seconds']:>8}", flush=True)
    print(f"{'mean':>5} {sum(right) / len(right):>13.1f}")


if __name__ == "__main__":
    main()
