"""Logits of our networks against timm's for the same weights, one line for each network.

Command:  python benchmarks/timm_parity.py [NAME …]      (default: all 101)
Needs:    pip install 'jax-resnet-training[torch]' timm torchvision
The weights are random by name, the images 64 pixels a side, all of it float32. The error is the largest difference over
the largest logit; the last line counts those above 1e-5.
"""

import argparse
import contextlib
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_resnet import import_weights
from jax_resnet.models.zoo import ZOO, create_model

IMAGES = np.random.RandomState(0).randn(2, 64, 64, 3).astype(np.float32)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values that keep the activations of every layer in range, always the same for a name."""
    r = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return r.uniform(0.75, 1.25, shape).astype(np.float32)
    if len(shape) > 1:
        return (r.randn(*shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)
    return (r.uniform(0.5, 1, shape) if name.endswith("weight") else 0.1 * r.randn(*shape)).astype(np.float32)


@jax.jit
def ours(model: Any, images: jax.Array) -> jax.Array:
    """Our logits."""
    return model(images)


def error(timm: Any, torch: Any, name: str) -> float:
    """The largest difference of the logits over the largest logit."""
    theirs = timm.create_model(name, pretrained=False).eval()
    weights = {n: tensor(n, tuple(t.shape)) for n, t in theirs.state_dict().items() if "num_batches" not in n}
    theirs.load_state_dict({n: torch.from_numpy(array) for n, array in weights.items()}, strict=True)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()
    model = nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    model.eval()
    import_weights(model, weights)
    return float(np.abs(np.asarray(ours(model, IMAGES)) - expected).max() / np.abs(expected).max())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[2] / "shared" / "tools"))
    with contextlib.suppress(ImportError):
        import torchvision_shim  # noqa: F401  where torchvision's operators were built for another torch
    import timm

    names = names or [name for name in ZOO if name in timm.list_models(module=["resnet", "resnetv2"])]
    errors = {}
    for name in names:
        errors[name] = error(timm, torch, name)
        print(f"{name:<28}{errors[name]:.1e}", flush=True)
    above = [name for name, e in errors.items() if e > 1e-5]
    print(
        f"{len(names)} networks, the largest error {max(errors.values()):.1e}; above 1e-5: {', '.join(above) or 'none'}"
    )


if __name__ == "__main__":
    main()
