"""Convolutions on a CPU as XLA computes them, beside models/convolution.py: how many times as long they take.

Command:  JAX_PLATFORMS=cpu python benchmarks/convolutions.py

Forward, and the gradients for image and kernel, each compiled alone; the least of seven readings, in turn. Then the
whole training step of ResNet-50 at 64 pixels and a batch of 16, with and without.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from interleaved import machine
from train_step import config

from jax_resnet import job, overview
from jax_resnet.models.convolution import as_product

# batch, pixels a side, channels in and out, kernel, stride: of ResNet-50 at 64 pixels, of a CIFAR network, and between.
SHAPES = (
    (16, 16, 64, 256, 1, 1),
    (16, 4, 1024, 512, 1, 1),
    (16, 4, 1024, 2048, 1, 2),
    (16, 2, 512, 2048, 1, 1),
    (16, 2, 512, 512, 3, 1),
    (16, 4, 512, 512, 3, 2),
    (16, 3, 256, 256, 3, 1),
    (16, 4, 256, 256, 3, 1),
    (128, 32, 16, 16, 3, 1),
)
READINGS = 7


def patches(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """As a product whatever its size."""
    side, stride, pad = kernel.shape[0], strides[0], padding[0]
    x = jax.numpy.pad(x, ((0, 0), pad, pad, (0, 0)))
    last = (x.shape[1] - side) // stride * stride + 1
    seen = [x[:, i : i + last : stride, j : j + last : stride] for i in range(side) for j in range(side)]
    return jax.numpy.concatenate(seen, -1) @ kernel.reshape(-1, kernel.shape[-1])


def seconds(functions: list[Callable[[], Any]]) -> list[float]:
    """The least that each takes."""
    least = [float("inf")] * len(functions)
    for number in range(READINGS + 1):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            jax.block_until_ready(function())
            if number:  # the first compiles
                least[i] = min(least[i], time.perf_counter() - began)
    return least


def times(shape: tuple[int, ...]) -> str:
    """A row of the table."""
    n, side, channels, out, size, stride = shape
    x, kernel = np.ones((n, side, side, channels), np.float32), np.ones((size, size, channels, out), np.float32)
    ratios = []
    strides, padding = (stride, stride), ((size // 2,) * 2,) * 2

    def by(convolution: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        where = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return lambda x, kernel: convolution(x, kernel, strides, padding, **where)

    of = [by(jax.lax.conv_general_dilated), by(patches)]
    gradient = of[0](x, kernel)
    ways: tuple[Callable[[Any], Callable[..., Any]], ...] = (
        lambda f: lambda x, k, _: f(x, k),
        lambda f: lambda x, k, grad: jax.vjp(lambda x: f(x, k), x)[1](grad),
        lambda f: lambda x, k, grad: jax.vjp(lambda k: f(x, k), k)[1](grad),
    )
    for way in ways:
        theirs, product = seconds([partial(jax.jit(way(f)), x, kernel, gradient) for f in of])
        ratios.append(theirs / product)
    same = "conv_general_dilated" in str(jax.make_jaxpr(by(as_product))(x, kernel))
    cells = [f"{side}²×{channels} → {out}, {size}×{size}" + (f" / {stride}" if stride > 1 else ""), str(n)]
    return " | ".join([*cells, *(f"{ratio:.1f}" for ratio in ratios), "convolution" if same else "product"])


def steps() -> float:
    """How many times as long the step takes with XLA's convolutions."""
    c, runs = config("resnet50", 64, 16), []
    for computed in (lambda model: model, job.for_cpu):
        job.for_cpu = computed
        ready = overview.prepare(c)[0]
        step = ready.train_step.lower(*ready.shapes(ready.plan.phases[0])).compile()
        batch = {"image": np.zeros((16, 64, 64, 3), np.uint8), "label": np.zeros(16, np.int32)}
        state, batch = [ready.fresh_state()], jax.device_put(batch, ready.sharding)

        def run(step: Any = step, state: list[Any] = state, batch: Any = batch) -> Any:
            state[0], sums = step(state[0], batch)
            return sums

        runs.append(run)
    plain, ours = seconds(runs)
    return plain / ours


def main() -> None:
    """Prints the table."""
    about = machine(("jax", "jaxlib"))
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    print(f"{about['machine']}, {about['cores']} cores, {about['date']}; XLA's time as a multiple of the product's\n")
    print("| | batch | forward | for the image | for the kernel | taken |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        print(f"| {times(shape)} |", flush=True)
    print(f"\nthe step of ResNet-50, 64 pixels, batch 16: {steps():.2f}")


if __name__ == "__main__":
    main()
