"""Count the cost of networks for one image: `jax-resnet summarize resnet50`, or --all in one plot.

Nothing is compiled or run, and no device is used: everything is counted from shapes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_resnet.commands.cli import Parser, check_plot, positive_integer, save_plot
from jax_resnet.errors import UserError, choose
from jax_resnet.models.cost import cost
from jax_resnet.models.zoo import ZOO, create_model, model_spec


@dataclass(frozen=True)
class Part:
    """The cost of a network, or of its stem, a stage or its head, for one image."""

    name: str
    # Height, width and channels of the output; the head's classes; the image's for a network.
    shape: tuple[int, ...]
    blocks: int
    parameters: int
    multiply_adds: int  # of convolutions and matrix products
    activations: int  # numbers that those compute


SORTS: dict[str, Callable[[Part], Any]] = {
    "name": lambda network: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", network.name)],
    "params": lambda network: network.parameters,
    "gmacs": lambda network: network.multiply_adds,
    "activations": lambda network: network.activations,
}
# The plot has room for these names.
NAMED = ("test_resnet", "cifar_resnet20", "resnet18", "resnet50", "resnet152", "resnext101_32x32d")


def count(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, in_channels: int = 3
) -> list[Part]:
    """Count the cost of a network and its parts for one image of `image_size` pixels a side.

    The defaults are ImageNet's 224 pixels and 1000 classes; for a CIFAR stem CIFAR-10's 32 and 10.
    Raises UserError for an unknown name, or images too small for the network.
    """
    spec = model_spec(name)
    usual_size, usual_classes = {"cifar": (32, 10)}.get(spec.stem, (224, 1000))
    size = image_size or usual_size
    classes = num_classes or usual_classes
    if size < spec.total_stride:
        raise UserError(f"model {name!r}: images of {size} px are too small; the least is {spec.total_stride}")
    # The blocks of a stage are alike from the second on, unless pruned. Tracing two of them takes a
    # fifth of the time of tracing all.
    depths = tuple(min(depth, 2 + len(spec.block_widths or ()) * depth) for depth in spec.depths)
    # One key suffices for shapes. nnx.Rngs counts keys in the trace, quadratic in the depth.
    rngs: Any = SimpleNamespace(params=partial(jax.random.key, 0))
    make = partial(create_model, name, num_classes=classes, in_channels=in_channels, depths=depths, rngs=rngs)
    model: Any = nnx.eval_shape(make)
    model.eval()
    parts = [_count("stem", model.stem, (size, size, in_channels))]
    for i, depth in enumerate(spec.depths, 1):
        parts.append(_count(f"stage{i}", getattr(model, f"stage{i}"), parts[-1].shape, depth))
    if spec.preactivation:
        parts.append(_count("norm", model.norm, parts[-1].shape))
    parts.append(_count("head", model.head, parts[-1].shape[-1:]))
    total = zip(*(astuple(part)[2:] for part in parts), strict=True)
    return [Part(name, (size, size, in_channels), *map(sum, total)), *parts]


def _count(name: str, module: Any, shape: tuple[int, ...], depth: int = 0) -> Part:
    """Count a module's cost for one input of that shape, a stage's as if it had `depth` blocks."""
    call = type(module).__call__
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    products = cost(call, module, x)
    output = jax.eval_shape(call, module, x).shape[1:]
    parameters = sum(parameter.size for parameter in jax.tree.leaves(nnx.state(module, nnx.Param)))
    counts = np.array([parameters, products.multiply_adds, products.activations])
    if depth and depth > module.depth:
        block = _count("block1", module.block1, output)
        counts += (depth - module.depth) * np.array(astuple(block)[3:])
    return Part(name, output, depth, *counts.tolist())


def print_table(parts: Sequence[Part]) -> None:
    """Print a table with a row for each part."""
    rows = [("", "shape", "blocks", "parameters", "GMACs", "activations")]
    for part in parts:
        shape = "×".join(map(str, part.shape))
        gmacs = f"{part.multiply_adds / 1e9:.6f}"
        rows.append((part.name, shape, str(part.blocks), f"{part.parameters:,}", gmacs, f"{part.activations:,}"))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        print(name.ljust(name_width), *map(str.rjust, cells, widths), sep="  ")


def draw(networks: Sequence[Part], file: Path) -> None:
    """Plot parameters against GMACs as a PNG. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    points = {n.name: (n.parameters / 1e6, n.multiply_adds / 1e9) for n in networks}
    parameters, gmacs = zip(*points.values(), strict=True)
    axes.scatter(parameters, gmacs, s=15)
    for name in points.keys() & set(NAMED):
        axes.annotate(name, points[name], (5, 5), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="parameters (M)", ylabel="GMACs for an image")
    save_plot(figure, file)


def main() -> None:
    """Run the command. Raises UserError for a user's mistake."""
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
        flag = f"--{name}"
        number = partial(positive_integer, flag)
        parser.add_argument(flag, flag.replace("_", "-"), type=number, metavar="N", help=f"default: {default}")
    arguments = vars(parser.parse_args())
    if arguments["all"] == (arguments["network"] is not None):
        raise UserError("give a network, for example resnet50, or --all")
    if arguments["network"] and (arguments["sort"] or arguments["plot"]):
        raise UserError("--sort and --plot: only with --all")
    sort = arguments["sort"] or "name"
    choose("--sort", sort, SORTS)
    if arguments["plot"]:
        check_plot(arguments["plot"])
    sizes = {name: arguments[name] for name in usual if arguments[name] is not None}
    if arguments["network"]:
        print_table(count(arguments["network"], **sizes))
        return
    networks = sorted((count(name, **sizes)[0] for name in ZOO), key=SORTS[sort])
    print_table(networks)
    if arguments["plot"]:
        draw(networks, arguments["plot"])
