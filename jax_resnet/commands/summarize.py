"""Count what networks cost for one image: `jax-resnet summarize resnet50`, or --all of them in one table and plot.

Nothing is compiled or run, and no device is touched: all of it is counted from shapes.
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
    """What a network, or its stem, a stage or its head, costs for one image."""

    name: str
    shape: tuple[int, ...]  # height, width, channels of the output; of the head, classes; of the network, of the image
    blocks: int
    parameters: int
    multiply_adds: int  # of convolutions and matrix products
    activations: int  # numbers that those give


SORTS: dict[str, Callable[[Part], Any]] = {
    "name": lambda network: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", network.name)],
    "params": lambda network: network.parameters,
    "gmacs": lambda network: network.multiply_adds,
    "activations": lambda network: network.activations,
}
# Those whose names the plot has room for.
NAMED = ("test_resnet", "cifar_resnet20", "resnet18", "resnet50", "resnet152", "resnext101_32x32d")


def count(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, in_channels: int = 3
) -> list[Part]:
    """Count what the network of that name costs for one image of `image_size` pixels a side: it, and its parts.

    What is not given is ImageNet's, 224 pixels and 1000 classes; for a network with a CIFAR stem CIFAR-10's, 32 and 10.
    Raises UserError for an unknown name, or images too small for the network.
    """
    spec = model_spec(name)
    usual_size, usual_classes = {"cifar": (32, 10)}.get(spec.stem, (224, 1000))
    size, classes = image_size or usual_size, num_classes or usual_classes
    if size < spec.total_stride:
        raise UserError(f"model {name!r}: images of {size} px are too small; the least is {spec.total_stride}")
    # From the second on, the blocks of a stage are alike unless pruned. Tracing two in place of all of them takes a
    # fifth of the time.
    depths = tuple(min(depth, 2 + len(spec.block_widths or ()) * depth) for depth in spec.depths)
    # Shapes do with one key. nnx.Rngs counts keys in the trace, which takes time quadratic in the depth.
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
    """Count what a module costs for one input of that shape, a stage as if it had as many blocks as `depth` says."""
    call, x = type(module).__call__, jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    products, output = cost(call, module, x), jax.eval_shape(call, module, x).shape[1:]
    parameters = sum(parameter.size for parameter in jax.tree.leaves(nnx.state(module, nnx.Param)))
    counts = np.array([parameters, products.multiply_adds, products.activations])
    if depth and depth > module.depth:
        block = _count("block1", module.block1, output)
        counts += (depth - module.depth) * np.array(astuple(block)[3:])
    return Part(name, output, depth, *counts.tolist())


def print_table(parts: Sequence[Part]) -> None:
    """Print a table with a row for each of them."""
    rows = [("", "shape", "blocks", "parameters", "GMACs", "activations")]
    for part in parts:
        shape, gmacs = "×".join(map(str, part.shape)), f"{part.multiply_adds / 1e9:.6f}"
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
        spellings, number = (f"--{name}", f"--{name}".replace("_", "-")), partial(positive_integer, f"--{name}")
        parser.add_argument(*spellings, type=number, metavar="N", help=f"default: {default}")
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
