"""The recipe for Fashion-MNIST on two CPU cores, one simulated device each: right of 10,000 test images, wall seconds.

    python benchmarks/fashion_mnist.py --data fashion_mnist.npz [--seeds 1] [--into FOLDER]

Prints one table; FOLDER keeps the runs (a temporary one by default). Without --data it is TFDS's, prepared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Runs the command once for each seed, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a .npz of x_train, y_train, x_test, y_test")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--into", type=Path, default=None)
    args = parser.parse_args()
    into = args.into or Path(tempfile.mkdtemp())
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    config = "--config=fashion_mnist" + (f":{args.data}" if args.data else "")
    for seed in range(args.seeds):
        workdir = into / f"seed{seed}"
        command = [sys.executable, "-m", "jax_resnet.main", config, f"--config.seed={seed}", f"--workdir={workdir}"]
        run = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
        if seed == 0:
            print(next(line for line in run.stdout.splitlines() if line.startswith("devices")))
            print(f"{'seed':>5} {'right of 10,000':>16} {'seconds':>8}")
        result = json.loads((workdir / "result.json").read_text())
        right = result["splits"]["test"]["correct_top1"]
        print(f"{seed:>5} {right:>16,} {result['wall_seconds']:>8}", flush=True)


if __name__ == "__main__":
    main()
