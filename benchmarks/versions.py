"""Two checkouts of this package, the same benchmark in each, measured in turn.

    python benchmarks/versions.py OTHER [--rounds 7] -- train_step.py resnet50:64:16 --serve=ours --seconds=4
    python benchmarks/versions.py OTHER [--rounds 7] -- input.py --data FOLDER --serve=ours --seconds=3

OTHER is a checkout with a virtual environment in .venv, as this one has. Prints, for images a second and for each
second of CPU time, this checkout's rate over the other's: the median of the rounds, the least and the greatest. Above 1
this one is faster.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from interleaved import Process

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("benchmark", nargs="+", help="its file and its arguments")
    args = parser.parse_args()
    script, *rest = args.benchmark
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, checkout in enumerate((ROOT, args.other.resolve())):
                command = [str(checkout / ".venv/bin/python"), str(checkout / "benchmarks" / script), *rest]
                processes.append(Process(command, Path(folder) / f"{number}.log"))
                if processes[-1].missing:
                    raise SystemExit(f"{checkout}: {processes[-1].missing}")
            for _ in range(args.rounds):
                for process in processes:
                    process.measure()
        finally:
            for process in processes:
                process.kill()
    for unit in ("s", "cpu_s"):
        here, other = (process.rates(unit) for process in processes)
        ratios = [a / b for a, b in zip(here, other, strict=True)]
        median, least, most = statistics.median(ratios), min(ratios), max(ratios)
        print(f"images/{unit}: {median:.3f} of the other's ({least:.3f} to {most:.3f})")


if __name__ == "__main__":
    main()
