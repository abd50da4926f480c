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
from test_families import Keys

from jax_resnet.models.torch_names import flatten, import_weights, to_torch
from jax_resnet.models.zoo import create_model

TIMM = json.loads((Path(__file__).parents[1] / "data" / "timm_golden.json").read_text())
GOLDEN, OF_FOUR_BLOCKS = TIMM["models"], TIMM["of_four_blocks"]
SHARED = Path(__file__).parents[3] / "shared"
TRAINED = SHARED / "oracle" / "akamaster_resnet20.th"

# Of the largest logit. Two networks magnify float32's rounding: in timm too, float32 and float64 differ there by 3e-5.
CLOSE = {"resnetv2_50d_frn": 1e-4, "resnetv2_50x1_bit": 1e-4}


def abstract(name, num_classes, **options):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=num_classes, rngs=Keys(), **options))
    model.eval()
    return model


def exported(model, monkeypatch):
    """What `export_weights` would give, of zeros that take no memory."""
    arrays = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in flatten(nnx.state(model)).items()}
    with monkeypatch.context() as patch:
        patch.setattr(np, "ascontiguousarray", lambda array: array)
        return to_torch(arrays, model.spec)


def made_from_its_name(name, shape):
    r = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_mean"):
        return np.float32(0.1 * r.randn(*shape))
    if name.endswith("running_var"):
        return np.float32(r.uniform(0.75, 1.25, shape))
    if len(shape) > 1:
        return np.float32(r.randn(*shape) * math.prod(shape[1:]) ** -0.5)
    return np.float32(r.uniform(0.5, 1.0, shape) if name.endswith("weight") else 0.1 * r.randn(*shape))


@jax.jit
def answers(model, x):
    return model.features(x), model(x)


def check_names(tensors, golden):
    text = "\n".join(f"{name}{array.shape}" for name, array in sorted(tensors.items()))
    assert zlib.crc32(text.encode()) == golden["names_crc32"]
    assert len(tensors) == golden["tensors"]
    assert sum(array.size for name, array in tensors.items() if "running_" not in name) == golden["params"]


def check_answers(model, tensors, golden, close=1e-5):
    import_weights(model, {name: made_from_its_name(name, array.shape) for name, array in tensors.items()})
    x = np.random.RandomState(0).randn(2, 64, 64, 3).astype(np.float32)
    features, logits = (np.asarray(array, np.float64) for array in answers(model, x))
    for ours, theirs in ((logits[0, :8], "first8"), (logits[1, -1], "last"), (np.abs(logits).max(), "absmax")):
        assert_allclose(ours, golden[f"logits_{theirs}"], rtol=0, atol=close * golden["logits_absmax"])
    assert_allclose(np.linalg.norm(logits), golden["logits_l2"], rtol=close)
    assert features.shape == tuple(golden["features_shape"])
    for ours, theirs in ((features.mean(), "mean"), (features.std(), "std")):
        assert_allclose(ours, golden[f"features_{theirs}"], rtol=0, atol=close * golden["features_std"])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.soak if golden["tensors"] > 400 else ()) for name, golden in GOLDEN.items()],
)
def test_names_shapes_and_parameter_counts_of_timm(name, monkeypatch):
    check_names(exported(abstract(name, 1000), monkeypatch), GOLDEN[name])


@pytest.mark.parametrize("name", OF_FOUR_BLOCKS)
def test_answers_of_timm_for_four_blocks(name, monkeypatch):
    model, golden = abstract(name, 1000, depths=(1, 1, 1, 1)), OF_FOUR_BLOCKS[name]
    tensors = exported(model, monkeypatch)
    check_names(tensors, golden)
    check_answers(model, tensors, golden)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name, golden in GOLDEN.items() if "logits_l2" in golden])
def test_answers_of_timm(name, monkeypatch):
    model = abstract(name, 1000)
    check_answers(model, exported(model, monkeypatch), GOLDEN[name], CLOSE.get(name, 1e-5))


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
    assert all(name.startswith("module.") for name in weights)
    report = import_weights(model, weights)
    assert (len(report.loaded), report.left_out, report.new) == (len(flatten(nnx.state(model))), (), ())

    subset = np.load(SHARED / "data" / "cifar10_lossless_subset.npz")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    _, logits = answers(model, np.float32((subset["x_test"] / 255 - mean) / std))
    expected = np.load(TRAINED.with_name("akamaster_resnet20_lossless1000_logits.npy"))
    assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.sum(np.argmax(logits, -1) == subset["y_test"]) == 915
