"""The embedded default over several seeds, and a support vector machine: right of the 360 test digits, wall seconds.

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
    print(f"{'SVM':>5} {support_vector_machine():>13}")


def support_vector_machine() -> int:
    """Right of the same 360: scikit-learn's SVC with C = 10 on the 64 pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    x, y = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    return int((SVC(C=10).fit(train, train_labels).predict(test) == test_labels).sum())


if __name__ == "__main__":
    main()
