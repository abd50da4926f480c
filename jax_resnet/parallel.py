"""Devices: the mesh, what is spread over it, and global batches from what one process has read."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_resnet.errors import UserError, first_line


def data_mesh() -> Mesh:
    """All devices of all processes on one axis, `data`. Raises UserError if there are none of the kind asked for."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        asked = {name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ}
        given = " ".join(f"{name}={value}" for name, value in asked.items())
        why = first_line(e).partition(" (set JAX_PLATFORMS=")[0]
        raise UserError(
            f"{given or 'JAX'}: no such devices here ({why}); JAX_PLATFORMS=cpu takes the processor"
        ) from None
    # Auto: shardings are propagated by XLA; jax.make_mesh would make the axis Explicit.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [batch, …]: each device holds consecutive rows."""
    return NamedSharding(mesh, PartitionSpec("data"))


def parts_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [parts, batch, …]: each device holds consecutive rows of every part."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_divides(batch_size: int, mesh: Mesh, what: str, accumulate: int = 1) -> None:
    """Raises UserError unless every device gets the same number of the batch's examples, of each part of it."""
    if batch_size % (share := mesh.size * accumulate):
        nearest = max(1, round(batch_size / share)) * share
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"{what}={batch_size} is not divisible by the {mesh.size} devices{parts}; the nearest is {nearest}"
            + (", or lower config.accumulate" if accumulate > 1 else "")
        )


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending: int64 [local batch]."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


def global_batch(sharding: NamedSharding, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays over the mesh from this process's rows of them."""
    with jax.transfer_guard("allow"):  # with several processes JAX makes this transfer, asked for here, implicitly
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}
