"""Residual networks in JAX, trained from one config file on one CPU or a TPU slice.

`create_model` builds any network of the family as a Flax NNX module, `export_weights` and `import_weights` exchange its
weights with PyTorch's state dicts; `train` runs a whole training.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_resnet.models.torch_names import export_weights, import_weights
    from jax_resnet.models.zoo import create_model
    from jax_resnet.training.loop import train

__all__ = ["create_model", "export_weights", "import_weights", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # imported at first use: the command line answers a typing error without loading JAX
    if name == "create_model":
        from jax_resnet.models.zoo import create_model

        return create_model
    if name in ("export_weights", "import_weights"):
        from jax_resnet.models import torch_names

        return getattr(torch_names, name)
    if name == "train":
        from jax_resnet.training.loop import train

        return train
    raise AttributeError(f"module 'jax_resnet' has no attribute {name!r}")
