"""The command `jax-resnet average --workdir RUN`: the mean of a run's checkpoints."""

from jax_resnet.commands.cli import Parser, print_files
from jax_resnet.errors import UserError
from jax_resnet.training.average import BATCHES, average


def main() -> None:
    """Runs the command."""
    parser = Parser(
        prog="jax-resnet average",
        description="Averages the weights of a run's checkpoints, estimates batch statistics for them, evaluates and "
        "writes them for timm, torchvision and init_from.",
    )
    parser.add_argument("--workdir", required=True, help="the run, as it was given to jax_resnet.main")
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
