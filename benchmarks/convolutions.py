"""Convolutions on a CPU as XLA computes them, beside products of matrices: how many times as long they take.

Command:  JAX_PLATFORMS=cpu python benchmarks/convolutions.py

Forward, and the gradients for image and kernel, each compiled alone; the least of seven readings, in turn. The products
are those that models/cpu.py has, where it takes them and where it does not. Then the gradient of a maximum, and
the whole training steps of two networks, with and without.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from interleaved import machine
from train_step import config

from jax_resnet.commands import overview
from jax_resnet.models import cpu as convolution
from jax_resnet.models import layers
from jax_resnet.training import network

# batch, pixels a side, channels in and out, kernel, stride: of ResNet-50 at 64 pixels, of CIFAR networks, of
# ResNet-50 at 224, and between.
SHAPES = (
    (16, 16, 64, 256, 1, 1),
    (16, 4, 1024, 512, 1, 1),
    (16, 4, 1024, 2048, 1, 2),
    (16, 2, 512, 2048, 1, 1),
    (16, 2, 512, 512, 3, 1),
    (16, 4, 512, 512, 3, 2),
    (16, 3, 256, 256, 3, 1),
    (16, 4, 256, 256, 3, 1),
    (16, 16, 64, 64, 3, 1),
    (128, 32, 3, 16, 3, 1),
    (128, 32, 16, 16, 3, 1),
    (128, 32, 16, 32, 3, 2),
    (128, 16, 32, 32, 3, 1),
    (128, 8, 64, 64, 3, 1),
    (16, 56, 64, 64, 3, 1),
    (16, 224, 3, 64, 7, 2),
)
STEPS = (("resnet50", 64, 16), ("cifar_resnet20", 32, 128))
MAXIMA = ((16, 32, 64), (16, 112, 64))  # batch, pixels a side, channels: of the stem at 64 and at 224 pixels
POOLS = (layers.max_pool, convolution.max_pool_by_comparing)
READINGS = 7


def patches(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """As a product whatever its size."""
    return convolution.patches(x, kernel.shape[:2], strides, padding) @ kernel.reshape(-1, kernel.shape[-1])


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

    xla, as_patches, ours = (by(of) for of in (jax.lax.conv_general_dilated, patches, convolution.as_product))
    gradient = xla(x, kernel)
    ways: tuple[Callable[[Any], Callable[..., Any]], ...] = (
        lambda f: lambda x, k, _: f(x, k),
        lambda f: lambda x, k, grad: jax.vjp(lambda x: f(x, k), x)[1](grad),
        lambda f: lambda x, k, grad: jax.vjp(lambda k: f(x, k), k)[1](grad),
    )
    for way, product in zip(ways, (as_patches, as_patches, ours), strict=True):
        theirs, its = seconds([partial(jax.jit(way(f)), x, kernel, gradient) for f in (xla, product)])
        ratios.append(theirs / its)
    kernels_alone = "conv_general_dilated" in str(jax.make_jaxpr(ours)(x, kernel))
    cells = [f"{side}²×{channels} → {out}, {size}×{size}" + (f" / {stride}" if stride > 1 else ""), str(n)]
    return " | ".join([*cells, *(f"{ratio:.1f}" for ratio in ratios), "the last" if kernels_alone else "all"])


def maximum(n: int, side: int, channels: int) -> float:
    """How many times as long XLA's gradient of the 3×3 maximum takes."""
    x = np.random.default_rng(0).normal(size=(n, side, side, channels)).astype(np.float32)
    grad = layers.max_pool(x)
    ways = (jax.jit(lambda x, grad, f=f: jax.vjp(f, x)[1](grad)) for f in POOLS)
    plain, ours = seconds([partial(way, x, grad) for way in ways])
    return plain / ours


def steps(name: str, size: int, batch: int) -> float:
    """How many times as long the step takes with XLA's convolutions and maxima."""
    c, runs = config(name, size, batch), []
    for computed in (lambda model, mesh: model, convolution.for_cpu):
        network.for_cpu = computed
        ready = overview.prepare(c)
        step = ready.steps.train.lower(*ready.shapes(ready.plan.phases[0])).compile()
        host = {"image": np.zeros((batch, size, size, 3), np.uint8), "label": np.zeros(batch, np.int32)}
        state, data = [ready.network.fresh_state()], jax.device_put(host, ready.sharding)

        def run(step: Any = step, state: list[Any] = state, data: Any = data) -> Any:
            state[0], sums = step(state[0], data)
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
    for n, side, channels in MAXIMA:
        print(f"\nthe gradient of a 3×3 maximum, {side}²×{channels}, batch {n}: {maximum(n, side, channels):.1f}")
    for of in STEPS:
        print(f"\nthe step of {of[0]}, {of[1]} pixels, batch {of[2]}: {steps(*of):.2f}", flush=True)


if __name__ == "__main__":
    main()
