"""Normalisation layers, which include the activation and compute in float32 for every dtype."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class _Norm(nnx.Module):
    """The float32 scale and bias of each channel, and the activation if the norm includes it.

    A norm computes in float32 for every input dtype and casts the result to that dtype once.
    """

    def __init__(self, features: int, *, activation: bool = False, zero_scale: bool = False, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.zeros(features) if zero_scale else jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.activation = activation
        self.epsilon = epsilon

    def _activate(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x) if self.activation else x


class BatchNorm(_Norm):
    """Batch normalisation over stated groups of examples, then ReLU if `activation`.

    Ioffe and Szegedy 2015. The batch is cut into groups of `group_size` consecutive examples, each
    normalised by its own statistics; None means one group, the batch over all devices. The result
    therefore does not depend on the number of devices; when no group is divided between devices,
    they exchange no statistics. Running statistics follow the mean over groups, with the unbiased
    variance, as in torch.
    """

    def __init__(self, features: int, *, group_size: int | None = None, momentum: float = 0.9, **options: Any):
        super().__init__(features, **options)
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.group_size = group_size
        self.momentum = momentum
        self.use_running_average = False  # model.eval() sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [N, H, W, C] to the same shape and dtype.

        Raises ValueError in training if N is not a multiple of the group size.
        """
        if self.use_running_average:
            y = self._normalise(x.astype(jnp.float32), self.mean[...], self.var[...])
            return self._activate(y.astype(x.dtype))
        n, h, w, c = x.shape
        size = n if self.group_size is None else self.group_size
        if n % size:
            raise ValueError(f"a batch of {n} examples cannot be cut into batch-norm groups of {size}")
        grouped = x.reshape(n // size, size, h, w, c).astype(jnp.float32)
        # The variance comes from one pass: XLA computes both sums where it produces the
        # convolution's output. A second pass, over centred values, costs 40 % of the step on a TPU.
        mean = grouped.mean((1, 2, 3))
        var = jnp.maximum(jnp.square(grouped).mean((1, 2, 3)) - jnp.square(mean), 0.0)
        count = size * h * w
        keep = self.momentum
        # `self.mean[...] = …` would be slow: Flax then compares shardings, for which it walks over
        # everything traced so far.
        self.mean.set_value(keep * self.mean[...] + (1 - keep) * mean.mean(0))
        self.var.set_value(keep * self.var[...] + (1 - keep) * var.mean(0) * (count / max(count - 1, 1)))
        spread = (slice(None), None, None, None)
        y = self._normalise(grouped, mean[spread], var[spread]).astype(x.dtype).reshape(x.shape)
        return self._activate(y)

    def _normalise(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        return (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * self.scale[...]) + self.bias[...]


def _grouped(x: jax.Array) -> jax.Array:
    """Cut [N, H, W, C] into float32 [N, H, W, groups, C / groups], with gcd(32, C) groups."""
    *shape, channels = x.shape
    groups = math.gcd(32, channels)
    return x.astype(jnp.float32).reshape(*shape, groups, channels // groups)


class GroupNorm(_Norm):
    """Normalisation of each example over space and each of 32 groups of channels, then ReLU.

    Wu and He 2018. The ReLU is left out without `activation`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [N, H, W, C] to the same shape and dtype."""
        y = _grouped(x)
        mean = y.mean((1, 2, 4), keepdims=True)
        var = jnp.maximum(jnp.square(y).mean((1, 2, 4), keepdims=True) - jnp.square(mean), 0.0)
        y = ((y - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return self._activate((y * self.scale[...] + self.bias[...]).astype(x.dtype))


class EvoNorm(_Norm):
    """EvoNorm-S0 (Liu et al. 2020, table 2): x · sigmoid(v · x) / std of the channel's group.

    It is norm and activation in one. Without `activation` it only scales and shifts, as in timm.
    """

    def __init__(self, features: int, **options: Any):
        super().__init__(features, **options)
        if self.activation:
            self.v = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [N, H, W, C] to the same shape and dtype."""
        y = x.astype(jnp.float32)
        if self.activation:
            grouped = _grouped(x)
            std = jnp.sqrt(grouped.var((1, 2, 4), keepdims=True) + self.epsilon)
            y = ((y * jax.nn.sigmoid(y * self.v[...])).reshape(grouped.shape) / std).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class FilterResponseNorm(_Norm):
    """Each channel divided by its root mean square, then max(·, τ) with a learnt τ.

    Singh and Krishnan 2019. The maximum is left out without `activation`.
    """

    def __init__(self, features: int, **options: Any):
        super().__init__(features, **options)
        if self.activation:
            self.tau = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [N, H, W, C] to the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 2), keepdims=True) + self.epsilon)
        y = y * self.scale[...] + self.bias[...]
        if self.activation:
            y = jnp.maximum(y, self.tau[...])
        return y.astype(x.dtype)
