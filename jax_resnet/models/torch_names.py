"""Weights under the names and in the layouts that timm and torchvision give them.

The name of a parameter here says its name there, given the network's `ResNetSpec`: post-activation networks go by
timm's resnet.py (and torchvision, which agrees), pre-activation ones by its resnetv2.py. Kernels are OIHW there, HWIO
here.
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
# What training scripts wrap a state dict in; the averaged weights are the ones to have.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model")
PREFIXES = re.compile(r"^((module|_orig_mod|model|ema)\.)+")
TRUNK = re.compile(r"(conv1|bn1|maxpool|layer\d+|stem|stages|norm)\.")  # names of any network but for its head
NOT_WEIGHTS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")
OTHER_NAMES = ((re.compile(r"^linear\."), "fc."), (re.compile(r"\.shortcut\."), ".downsample."))  # usual CIFAR code


@dataclass(frozen=True)
class Report:
    """What an import did, by names: ours for what is in the network, theirs for what was in the file."""

    loaded: tuple[str, ...]
    left_out: tuple[str, ...]
    new: tuple[str, ...]  # kept the values the network had
    summed: tuple[str, ...] = ()  # loaded, their input channels summed and spread over as many as there are

    def lines(self) -> dict[str, str]:
        """A line for each heading: loaded, left out, new."""
        summed = f", {self.summed[0]} summed over the input channels" if self.summed else ""
        return {
            "loaded": f"{len(self.loaded)} of {len(self.loaded) + len(self.new)} arrays{summed}",
            "left out": _listed(self.left_out),
            "new": _listed(self.new),
        }


def export_weights(model: ResNet) -> Arrays:
    """The parameters and batch statistics of `model` as float32 arrays under PyTorch's names and layouts.

    timm (and torchvision, for the networks it has) loads it with strict=True. What PyTorch counts besides,
    `num_batches_tracked`, has no meaning here and is not in it.
    """
    return to_torch(flatten(nnx.state(model, (nnx.Param, nnx.BatchStat))), model.spec)


def import_weights(model: ResNet, state_dict: Mapping[str, Any], *, strict: bool = True) -> Report:
    """Sets the parameters and batch statistics of `model` to those of a PyTorch state dict; the inverse of export.

    `state_dict` holds numpy arrays or torch tensors; what scripts wrap around it (`state_dict`, `model_ema`, `module.`)
    is taken off. With `strict` every name and shape must agree. Without, a head for another number of classes, or none,
    leaves the model's own; a first kernel for another number of channels is summed; and what is not of the network is
    left out. Raises UserError naming a parameter that is missing, left over or of another shape; the model is then as
    it was.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    shapes = {name: leaf.shape for name, leaf in flatten(state).items()}
    arrays, report = from_torch(state_dict, shapes, model.spec, strict=strict)
    flat = {tuple(name.split("/")): jax.numpy.asarray(array) for name, array in arrays.items()}
    nnx.update(model, nnx.traversals.unflatten_mapping(flat))
    return report


def to_torch(arrays: Mapping[str, Any], spec: ResNetSpec) -> Arrays:
    """{our name: array} → {PyTorch's name: float32 array in PyTorch's layout}."""
    return {
        torch_name(name, spec): np.ascontiguousarray(_to_layout(name, np.asarray(array, np.float32), spec))
        for name, array in arrays.items()
    }


def from_torch(
    state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], spec: ResNetSpec, *, strict: bool
) -> tuple[Arrays, Report]:
    """The arrays for our `shapes` that a PyTorch state dict has, under our names, and what became of all.

    Raises UserError as `import_weights` says. Without `strict`, what is left out must not be named as if it were of the
    network's stem or stages: then the file holds another network.
    """
    tensors = unwrap(state_dict)
    theirs = {name: torch_name(name, spec) for name in shapes}
    left_over = tuple(sorted(tensors.keys() - theirs.values()))
    heads = [name for name in shapes if name.startswith("head/")]
    new: tuple[str, ...] = ()
    if not strict and any(
        theirs[name] not in tensors or _squeezed(tensors[theirs[name]].shape) != _squeezed(_layout(name, shapes, spec))
        for name in heads
    ):
        new = tuple(heads)
        left_over += tuple(theirs[name] for name in heads if theirs[name] in tensors)
    wanted = [name for name in shapes if name not in new]

    missing = [name for name in wanted if theirs[name] not in tensors]
    foreign = [name for name in left_over if strict or TRUNK.match(name)]
    if missing or foreign:
        raise UserError(
            "holds another network: "
            + "; ".join(
                [f"{theirs[n]} ({n}) is missing, one of {len(missing)}" for n in missing[:1]]
                + [f"{n} is not of this network, one of {len(foreign)}" for n in foreign[:1]]
            )
        )

    arrays, summed = {}, []
    for name in wanted:
        array, shape = _float32(tensors[theirs[name]]), _layout(name, shapes, spec)
        if not strict and name == "stem/conv1/kernel" and array.ndim == 4 and array.shape[1] != shape[1]:
            array = np.repeat(array.sum(1, keepdims=True) / shape[1], shape[1], axis=1)
            summed.append(name)
        if _squeezed(array.shape) != _squeezed(shape):
            raise UserError(f"{theirs[name]} ({name}) is {array.shape} there, {shape} in this network")
        arrays[name] = _from_layout(array.reshape(shape), shapes[name])
    return arrays, Report(tuple(wanted), left_over, new, tuple(summed))


def unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a training script's checkpoint by their plain names; averaged weights rather than raw ones.

    Raises UserError if there are none.
    """
    for key in WRAPPERS:
        if content.get(key) and isinstance(content[key], Mapping):
            return unwrap(content[key])
    averaged = [name for name in content if str(name).startswith("ema.")]
    tensors: dict[str, Any] = {}
    for original in averaged or content:
        name, tensor = PREFIXES.sub("", str(original)), content[original]
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
    """{"stage1/block0/conv1/kernel": leaf} of nnx States or nested dicts that have no name in common."""
    pure = (nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree for tree in trees)
    return {"/".join(map(str, path)): x for tree in pure for path, x in nnx.traversals.flatten_mapping(tree).items()}


def torch_name(name: str, spec: ResNetSpec) -> str:
    """timm's name for our parameter or statistic: stage1/block0/norm1/scale → layer1.0.bn1.weight."""
    module, _, leaf = name.rpartition("/")
    for pattern, theirs in _renames(spec):
        module = re.sub(pattern, theirs, module)
    return f"{module.replace('/', '.')}.{LEAVES.get(leaf, leaf)}"


def _renames(spec: ResNetSpec) -> Iterable[tuple[str, str]]:
    deep = spec.stem in ("deep", "tiered")
    if spec.preactivation:
        yield r"^stem/(conv|norm)1$", r"stem/\g<1>1" if deep else r"stem/\1"
        for i in range(len(spec.depths)):
            yield rf"^stage{i + 1}/block", f"stages/{i}/blocks/"
        yield r"/shortcut/", r"/downsample/"
        yield r"^head$", "head/fc"
        return
    if deep:  # a Sequential of conv, norm, ReLU, conv, norm, ReLU, conv
        for i in range(3):
            yield rf"^stem/conv{i + 1}$", f"conv1/{3 * i}"
            yield rf"^stem/norm{i + 1}$", f"conv1/{3 * i + 1}" if i < 2 else "bn1"
    yield r"^stem/conv1$", "conv1"
    yield r"^stem/norm1$", "bn1"
    yield r"^stem/pool/conv$", "maxpool/0"
    yield r"^stem/pool/norm$", "maxpool/2" if spec.antialias in ANTIALIAS else "maxpool/1"
    yield r"^stage(\d+)/block(\d+)", r"layer\1/\2"
    yield r"/norm(\d)$", r"/bn\1"
    yield r"/attention/", "/se/"
    average = int(spec.shortcut == "D")  # the pool is the first of the Sequential
    yield r"/shortcut/conv$", f"/downsample/{average}"
    yield r"/shortcut/norm$", f"/downsample/{average + 1}"
    yield r"^head$", "fc"


def _to_layout(name: str, array: np.ndarray, spec: ResNetSpec) -> np.ndarray:
    array = array.transpose({4: (3, 2, 0, 1), 3: (2, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
    # 1×1 convolutions there, though they see one pixel.
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
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _float32(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):  # torch's, which numpy takes only from the CPU and in its own types
        tensor = tensor.detach().cpu().float()
    return np.asarray(tensor).astype(np.float32)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "nothing"
