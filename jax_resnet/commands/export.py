"""Export a run's weights for timm and torchvision: `jax-resnet export --workdir RUN`."""

from jax_resnet.commands.cli import Parser, print_files
from jax_resnet.inference.safetensors import export


def main() -> None:
    """Run the command."""
    parser = Parser(prog="jax-resnet export", description="Writes a run's weights for timm and torchvision.")
    parser.add_argument("--workdir", required=True, help="the folder of the run")
    parser.add_argument("--to", default="safetensors", choices=["safetensors"], help="the form of the file")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--weights", default="ema", choices=["ema", "raw"], help="ema: their running average, if any")
    parser.add_argument("--out", help="the folder to write; default: WORKDIR/export")
    args = parser.parse_args()
    print_files(export(args.workdir, checkpoint=args.checkpoint, averaged=args.weights == "ema", out=args.out))
