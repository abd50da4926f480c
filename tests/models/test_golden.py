"""Answers of other programs for the same weights: of timm 1.0.31, and of a CIFAR-10 network trained by someone else."""

import json
import math
import pickle
import zlib
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from jax_resnet.models.zoo import create_model

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "timm_golden.json").read_text())["models"]
SHARED = Path(__file__).parents[3] / "shared"
TRAINED = SHARED / "oracle" / "akamaster_resnet20.th"

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
POST_ACTIVATION = {
    "stem/conv": "conv",
    "stage": "layer",
    "/block": "/",
    "shortcut/conv": "downsample/0",
    "shortcut/norm": "downsample/1",
    "stem/norm1": "bn1",
    "/norm": "/bn",
    "head/": "fc/",
}
PRE_ACTIVATION = {
    "stem/conv1": "stem/conv",
    **{f"stage{i + 1}/block": f"stages/{i}/blocks/" for i in range(4)},
    "shortcut": "downsample",
    "head/": "head/fc/",
}


def torch_name(path, renamed):
    name = "/".join((*path[:-1], LEAVES.get(path[-1], path[-1])))
    for ours, theirs in renamed.items():
        name = name.replace(ours, theirs)
    return name.replace("/", ".")


def abstract(name, num_classes):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=num_classes, rngs=nnx.Rngs(0)))
    model.eval()
    return model


def load(model, tensor, renamed):
    """Fills the model with `tensor(name, shape)`, where torch's name and shape are meant; returns these."""
    state, tensors = {}, []
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(leaf.shape)]
        name, shape = torch_name(path, renamed), tuple(leaf.shape[axis] for axis in axes)
        if name == "head.fc.weight":  # in timm a 1×1 convolution
            shape += (1, 1)
        state[path] = tensor(name, shape).reshape(shape[: len(axes)]).transpose(np.argsort(axes))
        tensors.append((name, shape))
    nnx.update(model, nnx.traversals.unflatten_mapping(state))
    return tensors


@jax.jit
def run(model, x):
    return model(x)


def made_from_its_name(name, shape):
    r = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_mean"):
        return np.float32(0.1 * r.randn(*shape))
    if name.endswith("running_var"):
        return np.float32(r.uniform(0.75, 1.25, shape))
    if len(shape) > 1:
        return np.float32(r.randn(*shape) * math.prod(shape[1:]) ** -0.5)
    return np.float32(r.uniform(0.5, 1.0, shape) if name.endswith("weight") else 0.1 * r.randn(*shape))


@pytest.mark.parametrize("name", GOLDEN)
def test_timm_logits(name):
    golden, model = GOLDEN[name], abstract(name, 1000)
    tensors = load(model, made_from_its_name, PRE_ACTIVATION if "v2" in name else POST_ACTIVATION)
    assert zlib.crc32("\n".join(f"{n}{shape}" for n, shape in sorted(tensors)).encode()) == golden["names_crc32"]
    assert sum(math.prod(shape) for n, shape in tensors if "running" not in n) == golden["params"]

    logits = np.asarray(run(model, np.random.RandomState(0).randn(2, 64, 64, 3).astype(np.float32)), np.float64)
    close = {"rtol": 1e-4, "atol": 1e-5 * golden["logits_absmax"]}
    assert_allclose(logits[0, :8], golden["logits_first8"], **close)
    assert_allclose(logits[1, -1], golden["logits_last"], **close)
    assert_allclose(np.abs(logits).max(), golden["logits_absmax"], rtol=1e-4)
    assert_allclose(np.linalg.norm(logits), golden["logits_l2"], rtol=1e-4)


class Unpickler(pickle.Unpickler):
    """Of torch's pickles it takes what a state dict of arrays is made of: a tensor becomes (storage, where in it)."""

    def find_class(self, module, name):
        return {
            "collections.OrderedDict": OrderedDict,
            "torch.FloatStorage": "<f4",
            "torch.LongStorage": "<i8",
            "torch._utils._rebuild_tensor": lambda storage, *where: (storage, where),
            "torch._utils._rebuild_tensor_v2": lambda storage, *where: (storage, where[:3]),
        }[f"{module}.{name}"]

    def persistent_load(self, storage):
        _, dtype, key, *_ = storage
        return key, dtype


def read_torch(path):
    """The state dict in a file of torch before 1.6: five pickles, then each storage's length and values."""
    with path.open("rb") as file:
        *_, content, keys = (Unpickler(file).load() for _ in range(5))
        tensors = content["state_dict"]
        dtypes = dict(storage for storage, _ in tensors.values())
        storages = {}
        for key in keys:
            (count,) = np.fromfile(file, "<i8", 1)
            storages[key] = np.fromfile(file, dtypes[key], count)
    arrays = {}
    for name, ((key, dtype), (offset, shape, stride)) in tensors.items():
        strides = [step * np.dtype(dtype).itemsize for step in stride]
        arrays[name] = np.lib.stride_tricks.as_strided(storages[key][offset:], shape, strides)
    return arrays


@pytest.mark.skipif(not TRAINED.exists(), reason=f"needs {TRAINED}")
def test_trained_cifar_resnet20():
    weights, model = read_torch(TRAINED), abstract("cifar_resnet20", 10)
    tensors = load(model, lambda name, _: weights[f"module.{name}"], POST_ACTIVATION | {"head/": "linear/"})
    assert sorted(tensors) == sorted((name.removeprefix("module."), w.shape) for name, w in weights.items())

    subset = np.load(SHARED / "data" / "cifar10_lossless_subset.npz")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    logits = run(model, np.float32((subset["x_test"] / 255 - mean) / std))
    expected = np.load(TRAINED.with_name("akamaster_resnet20_lossless1000_logits.npy"))
    assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.sum(np.argmax(logits, -1) == subset["y_test"]) == 915
