"""Average the checkpoints of a run: `jax-resnet average --workdir RUN`."""

import os
from collections.abc import Sequence
from typing import Any

from jax_resnet.commands.cli import Parser, print_files
from jax_resnet.errors import UserError
from jax_resnet.inference.safetensors import write_model
from jax_resnet.runs.paths import AnyPath, open_path
from jax_resnet.training.average import BATCHES, average_checkpoints


def average(
    workdir: str | os.PathLike[str],
    *,
    checkpoints: Sequence[str] = (),
    batches: int = BATCHES,
    out: str | None = None,
) -> tuple[dict[str, Any], list[AnyPath]]:
    """Average checkpoints as `average_checkpoints` does, and write the mean as `export` does.

    The files go to `out`, by default WORKDIR/average. Returns the metrics over the evaluation split, and the files.
    Raises UserError for a workdir without those checkpoints, or a folder that cannot be written.
    """
    workdir = open_path(workdir)
    mean = average_checkpoints(workdir, checkpoints=checkpoints, batches=batches)
    steps = ", ".join(f"{step:,}" for step in mean.steps)
    print(f"mean of steps {steps}: {mean.text}, loss {mean.metrics['loss']:.4f}")
    folder = open_path(out) if out else workdir / "average"
    weights = (mean.params, mean.batch_stats)
    return mean.metrics, write_model(weights, mean.config, workdir, folder, new=bool(out))


def main() -> None:
    """Run the command."""
    parser = Parser(
        prog="jax-resnet average",
        description="Averages the weights of a run's checkpoints, estimates batch statistics for them, evaluates and "
        "writes them for timm, torchvision and init_from.",
    )
    parser.add_argument("--workdir", required=True, help="the folder of the run")
    parser.add_argument(
        "--checkpoints", default="", help="best, latest or steps, by commas; default: all that are saved"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=BATCHES,
        help="for the statistics; 0: the mean of the saved ones",
    )
    parser.add_argument("--out", help="the folder to write; default: WORKDIR/average")
    args = parser.parse_args()
    if args.batches < 0:
        raise UserError(f"--batches={args.batches}: must not be negative")
    which = [name for name in args.checkpoints.split(",") if name]
    print_files(average(args.workdir, checkpoints=which, batches=args.batches, out=args.out)[1])
