"""Distillation: the teacher, a network whose weights are read once and never change."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from jax_resnet.errors import UserError
from jax_resnet.models.resnet import ResNet
from jax_resnet.models.torch_names import flatten, from_torch
from jax_resnet.models.zoo import model_spec
from jax_resnet.training.pretrained import Weights, place, read_weights
from jax_resnet.training.state import make_state


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode, with its weights on the devices."""

    graph: nnx.GraphDef
    weights: dict[str, Any]  # params and batch_stats, on the devices
    scale: tuple[float, ...]  # from images normalised for the student to those that the teacher knows
    shift: tuple[float, ...]

    @classmethod
    def of(cls, c: ConfigDict, image: ConfigDict, num_classes: int, dtype: DTypeLike, sharding: Sharding) -> "Teacher":
        """Read the network that `config.distill` names. `image` is config.data.image, the student's.

        Raises UserError, naming the key, for weights that cannot be read, of an unknown network, or for other classes.
        """
        try:
            spec = model_spec(c.model) if c.model else None
        except UserError as e:
            raise UserError(f"config.distill.model: {e}") from None
        try:
            found = read_weights(c.teacher)
            spec = spec or found.spec
            if spec is None:
                raise UserError("the weights do not say of which network they are; give config.distill.model")
            graph, abstract, _ = make_state(
                lambda rngs: ResNet(spec, num_classes=num_classes, in_channels=image.channels, dtype=dtype, rngs=rngs),
                optax.identity(),
                0,
                sharding,
            )
            shapes = {name: x.shape for name, x in flatten(abstract.params, abstract.batch_stats).items()}
            arrays, _ = from_torch(found.tensors, shapes, spec, strict=True)
        except UserError as e:
            raise UserError(f"config.distill.teacher={c.teacher}: {e}") from None
        mean, std = _pixels(found, image)
        return cls(
            graph,
            {"params": place(abstract.params, arrays), "batch_stats": place(abstract.batch_stats, arrays)},
            tuple(ours / theirs for ours, theirs in zip(image.std, std, strict=True)),
            tuple((ours - theirs) / s for ours, theirs, s in zip(image.mean, mean, std, strict=True)),
        )

    def logits(self, weights: dict[str, Any], images: jax.Array) -> jax.Array:
        """float32 [N, classes] for the images, [N, H, W, C], that the student sees."""
        model: Any = nnx.merge(self.graph, weights["params"], weights["batch_stats"])
        model.eval()
        return jax.lax.stop_gradient(model(images * jnp.array(self.scale) + jnp.array(self.shift)))


def _pixels(found: Weights, image: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation that the teacher's images were normalised with, by default the student's."""
    said = len(found.mean) == len(found.std) == image.channels
    if said:
        return found.mean, found.std
    return tuple(image.mean), tuple(image.std)
