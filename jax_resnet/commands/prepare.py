"""Write images once, for fast random access: `jax-resnet prepare SOURCE DESTINATION`."""

import hashlib
import os
from pathlib import Path

from rich.console import Console

from jax_resnet.commands.cli import Parser, positive_integer
from jax_resnet.data.prepare import UNFINISHED, claim, prepare
from jax_resnet.data.raw import extract, list_folder, list_tfds
from jax_resnet.errors import UserError


def main() -> None:
    """Run the command."""
    parser = Parser(
        prog="jax-resnet prepare",
        description="Writes images once, to be read fast at random: ArrayRecord files, for config.data.name=prepared:… "
        "Stopped or killed, it goes on when it is run again.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a folder or .tar of class folders, alone or in train/ and val/; or tfds:NAME")
    parser.add_argument("destination", type=Path, help="a folder")
    parser.add_argument("--resize", metavar="N", help="shrink to N pixels on the short side; default: bytes stay as is")
    parser.add_argument("--quality", metavar="N", default="90", help="of the JPEGs that --resize makes; default: 90")
    parser.add_argument("--workers", metavar="N", help="threads; default: as many as there are processors")
    parser.add_argument("--data_dir", "--data-dir", metavar="FOLDER", help="with tfds:NAME, where TFDS keeps it")
    args = parser.parse_args()
    kind, _, name = args.source.partition(":")
    path = Path(args.source).expanduser()
    destination = args.destination.expanduser()
    plan = {"source": args.source, "resize": None}
    if args.resize:
        plan["resize"] = positive_integer("--resize", args.resize)
    plan["quality"] = positive_integer("--quality", args.quality, most=100)
    workers = os.cpu_count() or 1
    if args.workers:
        workers = positive_integer("--workers", args.workers, most=1024)
    if kind != "tfds" and not path.exists():
        raise UserError(f"{path}: no such folder or .tar; a TFDS dataset is given as tfds:NAME")
    if destination.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{destination}: lies in {path}, from which is read; give a folder elsewhere")
    try:
        with claim(destination):
            if kind == "tfds":
                source = list_tfds(name, args.data_dir)
            elif path.is_dir():
                source = list_folder(path)
            else:
                source = list_folder(extract(path, destination / UNFINISHED / "extracted"))
            plan["contents"] = hashlib.sha256(repr((source.classes, source.contents)).encode()).hexdigest()[:16]
            prepare(source, plan, destination, workers, Console(highlight=False, markup=False, soft_wrap=True))
    except OSError as e:
        raise UserError(f"{e.filename or destination}: {e.strerror or e}") from None
