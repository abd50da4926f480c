"""Weights under the names and in the layouts that timm and torchvision give them.

PyTorch's name of a parameter follows from ours and the network's `ResNetSpec`: post-activation
networks have the names of timm's resnet.py (and of torchvision, which agrees), pre-activation ones
those of its resnetv2.py. PyTorch's kernels are OIHW, ours HWIO.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_resnet.errors import UserError
from jax_resnet.models.resnet import ANTIALIAS, ResNet
from jax_resnet.models.spec import ResNetSpec

Arrays = dict[str, np.ndarray]

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Training scripts wrap a state dict in these keys; averaged weights come first, to be preferred.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model")
PREFIXES = re.compile(r"^((module|_orig_mod|model|ema)\.)+")
TRUNK = re.compile(r"(conv1|bn1|maxpool|layer\d+|stem|stages|norm)\.")  # all but the head
NOT_WEIGHTS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")
# The usual CIFAR code has names of its own.
OTHER_NAMES = (
    (re.compile(r"^linear\."), "fc."),
    (re.compile(r"\.shortcut\."), ".downsample."),
)


@dataclass(frozen=True)
class Report:
    """The result of an import: our names of the network's arrays, PyTorch's of those left out."""

    loaded: tuple[str, ...]
    left_out: tuple[str, ...]
    new: tuple[str, ...]  # kept the values the network had
    # These are loaded too, their input channels summed and spread over the network's.
    summed: tuple[str, ...] = ()

    def lines(self) -> dict[str, str]:
        """Write a line for each heading: loaded, left out, new."""
        loaded = f"{len(self.loaded)} of {len(self.loaded) + len(self.new)} arrays"
        if self.summed:
            loaded += f", {self.summed[0]} summed over the input channels"
        return {
            "loaded": loaded,
            "left out": _listed(self.left_out),
            "new": _listed(self.new),
        }


def export_weights(model: ResNet) -> Arrays:
    """Return parameters and batch statistics as float32 arrays under PyTorch's names and layouts.

    timm (and torchvision, for the networks it has) loads them with strict=True. PyTorch's counters,
    `num_batches_tracked`, have no counterpart in this library and are left out.
    """
    return to_torch(flatten(nnx.state(model, (nnx.Param, nnx.BatchStat))), model.spec)


def import_weights(model: ResNet, state_dict: Mapping[str, Any], *, strict: bool = True) -> Report:
    """Set the parameters and batch statistics of `model` to those of a PyTorch state dict.

    This is the inverse of `export_weights`. `state_dict` holds numpy arrays or torch tensors; the
    wrappers of training scripts (`state_dict`, `model_ema`, `module.`) are removed. With `strict`
    every name and shape must agree. Without, the model keeps its own head if the file has none or
    one for another number of classes, a first kernel for another number of channels is summed, and
    names that the network lacks are left out.

    Raises UserError naming a parameter that is missing, left over or of another shape; the model is
    then unchanged.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    shapes = {name: leaf.shape for name, leaf in flatten(state).items()}
    arrays, report = from_torch(state_dict, shapes, model.spec, strict=strict)
    flat = {tuple(name.split("/")): jax.numpy.asarray(array) for name, array in arrays.items()}
    nnx.update(model, nnx.traversals.unflatten_mapping(flat))
    return report


def to_torch(arrays: Mapping[str, Any], spec: ResNetSpec) -> Arrays:
    """Convert {our name: array} to {PyTorch's name: float32 array in PyTorch's layout}."""
    return {
        torch_name(name, spec): np.ascontiguousarray(_to_layout(name, np.asarray(array, np.float32), spec))
        for name, array in arrays.items()
    }


def from_torch(
    state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], spec: ResNetSpec, *, strict: bool
) -> tuple[Arrays, Report]:
    """Convert a PyTorch state dict to arrays of our names and `shapes`, and report on each name.

    Raises UserError as `import_weights` does. Without `strict`, a name left out must not look like
    one of the network's stem or stages: then the file holds another network.
    """
    tensors = unwrap(state_dict)
    theirs = {name: torch_name(name, spec) for name in shapes}
    left_over = tuple(sorted(tensors.keys() - theirs.values()))
    head = tuple(name for name in shapes if name.startswith("head/"))

    def fits(name: str) -> bool:
        if theirs[name] not in tensors:
            return False
        return _squeezed(tensors[theirs[name]].shape) == _squeezed(_layout(name, shapes, spec))

    new: tuple[str, ...] = ()
    if not strict and not all(map(fits, head)):
        new = head
        left_over += tuple(theirs[name] for name in head if theirs[name] in tensors)
    wanted = [name for name in shapes if name not in new]

    missing = [name for name in wanted if theirs[name] not in tensors]
    foreign = [name for name in left_over if strict or TRUNK.match(name)]
    if missing or foreign:
        faults = [f"{theirs[n]} ({n}) is missing, one of {len(missing)}" for n in missing[:1]]
        faults += [f"{n} is not of this network, one of {len(foreign)}" for n in foreign[:1]]
        raise UserError("holds another network: " + "; ".join(faults))

    arrays = {}
    summed = []
    for name in wanted:
        array = _float32(tensors[theirs[name]])
        shape = _layout(name, shapes, spec)
        if not strict and name == "stem/conv1/kernel" and array.ndim == 4 and array.shape[1] != shape[1]:
            array = np.repeat(array.sum(1, keepdims=True) / shape[1], shape[1], axis=1)
            summed.append(name)
        if _squeezed(array.shape) != _squeezed(shape):
            raise UserError(f"{theirs[name]} ({name}) is {array.shape} there, {shape} in this network")
        arrays[name] = _from_layout(array.reshape(shape), shapes[name])
    return arrays, Report(tuple(wanted), left_over, new, tuple(summed))


def unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a training script's checkpoint by plain names, averaged if it has such.

    Raises UserError if it holds no tensors.
    """
    for key in WRAPPERS:
        if content.get(key) and isinstance(content[key], Mapping):
            return unwrap(content[key])
    averaged = [name for name in content if str(name).startswith("ema.")]
    tensors: dict[str, Any] = {}
    for original in averaged or content:
        name = PREFIXES.sub("", str(original))
        tensor = content[original]
        if hasattr(tensor, "shape") and not NOT_WEIGHTS.search(name):
            for pattern, usual in OTHER_NAMES:
                name = pattern.sub(usual, name)
            if name in tensors:
                raise UserError(f"holds {name} twice, under different prefixes")
            tensors[name] = tensor
    if not tensors:
        raise UserError("holds no tensors by name")
    return tensors


def flatten(*trees: Any) -> dict[str, Any]:
    """Flatten nnx States or nested dicts to {"stage1/block0/conv1/kernel": leaf}.

    The trees must have no name in common.
    """
    flat = {}
    for tree in trees:
        pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
        for path, leaf in nnx.traversals.flatten_mapping(pure).items():
            flat["/".join(map(str, path))] = leaf
    return flat


def torch_name(name: str, spec: ResNetSpec) -> str:
    """Return timm's name of an array: stage1/block0/norm1/scale → layer1.0.bn1.weight."""
    module, _, leaf = name.rpartition("/")
    for pattern, theirs in _renames(spec):
        module = re.sub(pattern, theirs, module)
    return f"{module.replace('/', '.')}.{LEAVES.get(leaf, leaf)}"


def _renames(spec: ResNetSpec) -> Iterable[tuple[str, str]]:
    deep = spec.stem in ("deep", "tiered")
    if spec.preactivation:
        if not deep:
            yield r"^stem/(conv|norm)1$", r"stem/\1"
        for i in range(len(spec.depths)):
            yield rf"^stage{i + 1}/block", f"stages/{i}/blocks/"
        yield r"/shortcut/", r"/downsample/"
        yield r"^head$", "head/fc"
        return
    if deep:
        # The stem is a Sequential of conv, norm, ReLU, conv, norm, ReLU, conv; then comes bn1.
        yield r"^stem/norm3$", "bn1"
        for i in range(3):
            yield rf"^stem/conv{i + 1}$", f"conv1/{3 * i}"
            yield rf"^stem/norm{i + 1}$", f"conv1/{3 * i + 1}"
    yield r"^stem/conv1$", "conv1"
    yield r"^stem/norm1$", "bn1"
    yield r"^stem/pool/conv$", "maxpool/0"
    yield r"^stem/pool/norm$", "maxpool/2" if spec.antialias in ANTIALIAS else "maxpool/1"
    yield r"^stage(\d+)/block(\d+)", r"layer\1/\2"
    yield r"/norm(\d)$", r"/bn\1"
    yield r"/attention/", "/se/"
    # The average pool is the first layer of the Sequential.
    average = int(spec.shortcut == "D")
    yield r"/shortcut/conv$", f"/downsample/{average}"
    yield r"/shortcut/norm$", f"/downsample/{average + 1}"
    yield r"^head$", "fc"


def _to_layout(name: str, array: np.ndarray, spec: ResNetSpec) -> np.ndarray:
    array = array.transpose({4: (3, 2, 0, 1), 3: (2, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
    # PyTorch has 1×1 convolutions where we have linear layers.
    if array.ndim == 2 and ("/attention/" in name or (name.startswith("head/") and spec.preactivation)):
        array = array[:, :, None, None]
    return array


def _layout(name: str, shapes: Mapping[str, tuple[int, ...]], spec: ResNetSpec) -> tuple[int, ...]:
    return _to_layout(name, np.broadcast_to(np.float32(0), shapes[name]), spec).shape


def _from_layout(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 2:
        array = array.reshape(array.shape[:2])
    return np.ascontiguousarray(array.transpose({4: (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]))


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def _float32(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        # numpy takes a torch tensor only from the CPU, without gradient, and not as bfloat16.
        tensor = tensor.detach().cpu().float()
    return np.asarray(tensor).astype(np.float32)


def _listed(names: tuple[str, ...]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
