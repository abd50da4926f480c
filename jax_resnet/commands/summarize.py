"""What networks cost: `jax-resnet summarize resnet50`, or --all of them in one table and one picture.

Nothing is compiled or run, and no device is touched: all of it is counted from shapes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_resnet.commands.cli import Parser, check_plot, save_plot, positive_integer
from jax_resnet.errors import UserError, choose
from jax_resnet.models.cost import cost
from jax_resnet.models.spec import ResNetSpec
from jax_resnet.models.zoo import ZOO, create_model, model_spec

Counts = tuple[int, int, int]  # parameters, multiply-adds, activations


@dataclass(frozen=True)
class Part:
    """What the stem, a stage or the head of a network costs for one image."""

    name: str
    shape: tuple[int, ...]  # of what it gives: height, width, channels; the head, classes
    blocks: int
    parameters: int
    multiply_adds: int  # of convolutions and matrix products
    activations: int  # numbers that those give


@dataclass(frozen=True)
class Network:
    """What a network costs for one image, part by part."""

    name: str
    spec: ResNetSpec
    image_shape: tuple[int, int, int]
    parts: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """All parts as one."""
        counts = _sum(*((p.parameters, p.multiply_adds, p.activations) for p in self.parts))
        return Part("total", self.parts[-1].shape, sum(p.blocks for p in self.parts), *counts)


SORTS: dict[str, Callable[[Network], Any]] = {
    "name": lambda n: [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", n.name)],
    "params": lambda n: n.total.parameters,
    "gmacs": lambda n: n.total.multiply_adds,
    "activations": lambda n: n.total.activations,
}

# Colour in the picture, and members; a network is of the first family that has it.
FAMILIES: dict[str, tuple[str, Callable[[ResNetSpec], bool]]] = {
    "for CIFAR": ("gray", lambda s: s.stem == "cifar"),
    "BiT": ("black", lambda s: s.standardise),
    "v2, pre-activation": ("tab:cyan", lambda s: s.preactivation),
    "RS": ("tab:red", lambda s: s.stem_pool == "conv"),
    "anti-aliased": ("tab:olive", lambda s: s.antialias is not None),
    "efficient channel attention": ("tab:pink", lambda s: s.attention == "eca"),
    "squeeze and excitation": ("tab:purple", lambda s: s.attention == "se"),
    "ResNeXt": ("tab:green", lambda s: s.groups > 1),
    "wide": ("tab:brown", lambda s: s.inner_factor > 1),
    "ResNet": ("tab:blue", lambda s: True),
}
# Those with room for their names in the picture.
LEFT = ("test_resnet", "resnet34", "resnet101", "resnet200d", "resnext101_32x32d", "resnetv2_152x4_bit")
RIGHT = ("cifar_resnet20", "cifar_resnet110", "resnet18", "resnetrs50", "resnetrs101", "resnetrs420")


def count(name: str, *, image_size: int | None = None, num_classes: int | None = None, in_channels: int = 3) -> Network:
    """Counts the network called `name` on one image of `image_size` pixels a side.

    What is not given is ImageNet's, 224 pixels and 1000 classes; for a network with a CIFAR stem CIFAR-10's, 32 and 10.
    Raises UserError for an unknown name, or images too small for the network.
    """
    spec = model_spec(name)
    cifar = spec.stem == "cifar"
    size = (32 if cifar else 224) if image_size is None else image_size
    classes = (10 if cifar else 1000) if num_classes is None else num_classes
    if size < spec.total_stride:
        raise UserError(f"model {name!r}: images of {size} px are too small; the least is {spec.total_stride}")
    # From the second on, the blocks of a stage are alike unless pruned. Tracing two in place of all, the positive_integer zoo
    # takes 20 seconds rather than a minute.
    depths = spec.depths if spec.block_widths else tuple(min(depth, 2) for depth in spec.depths)

    def make() -> nnx.Module:
        # Shapes do with one key. nnx.Rngs counts keys in the trace, which takes time quadratic in the depth.
        rngs: Any = SimpleNamespace(params=partial(jax.random.key, 0))
        return create_model(name, num_classes=classes, in_channels=in_channels, depths=depths, rngs=rngs)

    model: Any = nnx.eval_shape(make)
    model.eval()
    counts, x = _count(model.stem, jax.ShapeDtypeStruct((1, size, size, in_channels), jnp.float32))
    parts = [Part("stem", x.shape[1:], 0, *counts)]
    for i, depth in enumerate(spec.depths, 1):
        stage = getattr(model, f"stage{i}")
        counts, x = _count(stage, x)
        if depth > stage.depth:
            counts = _sum(counts, *[_count(stage.block1, x)[0]] * (depth - stage.depth))
        parts.append(Part(f"stage{i}", x.shape[1:], depth, *counts))
    norm = _count(model.norm, x)[0] if spec.preactivation else (0, 0, 0)
    counts, x = _count(model.head, jax.ShapeDtypeStruct((1, x.shape[-1]), jnp.float32))
    parts.append(Part("norm, head" if spec.preactivation else "head", x.shape[1:], 0, *_sum(norm, counts)))
    return Network(name, spec, (size, size, in_channels), tuple(parts))


def _count(module: Any, x: jax.ShapeDtypeStruct) -> tuple[Counts, jax.ShapeDtypeStruct]:
    """What module(x) costs, and what it gives."""
    call = type(module).__call__
    counted, parameters = cost(call, module, x), jax.tree.leaves(nnx.state(module, nnx.Param))
    counts = sum(p.size for p in parameters), counted.multiply_adds, counted.activations
    return counts, jax.eval_shape(call, module, x)


def _sum(*counts: Counts) -> Counts:
    parameters, multiply_adds, activations = map(sum, zip(*counts, strict=True))
    return parameters, multiply_adds, activations


def show(network: Network, console: Console) -> None:
    """Prints what a network costs, and a table of its parts."""
    total = network.total
    console.print(
        f"{network.name}: {total.parameters / 1e6:.2f} M parameters; for an image of {_by(network.image_shape)}, "
        f"{total.multiply_adds / 1e9:.3f} GMACs and {total.activations / 1e6:.2f} M activations",
        soft_wrap=True,
    )
    table = _table("part", "output", "blocks", "parameters", "GMACs", "activations")
    for part in (*network.parts, total):
        if part is total:
            table.add_section()
        table.add_row(
            part.name,
            "" if part is total else _by(part.shape),
            str(part.blocks or ""),
            f"{part.parameters:,}",
            f"{part.multiply_adds / 1e9:.6f}",
            f"{part.activations:,}",
        )
    console.print(table)


def show_all(networks: Sequence[Network], console: Console) -> None:
    """Prints one table of what the networks cost."""
    table = _table("network", "px", "parameters (M)", "GMACs", "activations (M)")
    for network in networks:
        total = network.total
        table.add_row(
            network.name,
            str(network.image_shape[0]),
            f"{total.parameters / 1e6:.2f}",
            f"{total.multiply_adds / 1e9:.3f}",
            f"{total.activations / 1e6:.2f}",
        )
    console.print(table)


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in (first, *numbers):  # a narrow terminal folds what it cannot hold, rather than cutting digits
        table.add_column(name, justify="left" if name is first else "right", overflow="fold")
    return table


def _by(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def draw(networks: Sequence[Network], file: Path) -> None:
    """Parameters against GMACs as a PNG, families told apart. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    _scatter(figure.subplots(), networks)
    save_plot(figure, file)


def _scatter(axes: Any, networks: Sequence[Network]) -> None:
    members: dict[str, list[tuple[float, float]]] = {family: [] for family in FAMILIES}
    for network in networks:
        point = network.total.parameters / 1e6, network.total.multiply_adds / 1e9
        members[next(f for f, (_, has) in FAMILIES.items() if has(network.spec))].append(point)
        if network.name in LEFT + RIGHT:
            sign, side = (-1, "right") if network.name in LEFT else (1, "left")
            axes.annotate(network.name, point, (7 * sign, 0), textcoords="offset points", ha=side, va="center")
    # Many have the same parameters and GMACs, pre-activation or not: the smaller markers lie on the larger.
    for i, (family, points) in enumerate(reversed(members.items())):
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.scatter(x, y, s=80 - 6 * i, color=FAMILIES[family][0], edgecolors="white", lw=0.5, label=family)
    sizes = " or ".join(map(str, sorted({n.image_shape[0] for n in networks})))
    axes.set(xscale="log", yscale="log", xlabel="parameters (M)", ylabel=f"GMACs for an image of {sizes} px")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def main() -> None:
    """Runs the command."""
    parser = Parser(
        prog="jax-resnet summarize",
        description="Prints what a network costs for one image. GMACs: billions of multiply-adds in convolutions and "
        "matrix products; activations: the numbers that these give.",
        allow_abbrev=False,
    )
    parser.add_argument("network", nargs="?", help="for example resnet50")
    parser.add_argument("--all", action="store_true", help="every network of the zoo, in one table")
    parser.add_argument("--sort", help=f"with --all, by which column: {', '.join(SORTS)}; default: name")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --all: parameters against GMACs, as a PNG")
    usual = {"image_size": "224, or 32 with a CIFAR stem", "num_classes": "1000, or 10", "in_channels": "3"}
    for name, default in usual.items():
        flag, other = f"--{name}", f"--{name.replace('_', '-')}"
        parser.add_argument(flag, other, type=partial(positive_integer, flag), metavar="N", help=f"default: {default}")
    args = parser.parse_args()
    if args.all == (args.network is not None):
        raise UserError("give a network, for example resnet50, or --all")
    for name in ("sort", "plot"):
        if getattr(args, name) is not None and not args.all:
            raise UserError(f"--{name}: only with --all")
    given = {name: getattr(args, name) for name in usual if getattr(args, name) is not None}
    console = Console(highlight=False)
    if not args.all:
        show(count(args.network, **given), console)
        return
    sort = "name" if args.sort is None else args.sort
    choose("--sort", sort, SORTS)
    if args.plot:
        check_plot(args.plot)
    progress = Console(stderr=True)
    names = track(list(ZOO), "counting", console=progress, transient=True, disable=not progress.is_terminal)
    networks = sorted((count(name, **given) for name in names), key=SORTS[sort])
    show_all(networks, console)
    if args.plot:
        draw(networks, args.plot)
