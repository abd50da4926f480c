"""The mesh of devices, and how arrays lie over it."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_resnet.errors import UserError, first_line

VMEM = "xla_tpu_scoped_vmem_limit_kib"
VMEM_KIB = {"TPU v5 lite": 24576, "TPU v6 lite": 98304, "TPU v5": 65536}  # by JAX's device_kind; benchmarks/README.md


def compiler_options(device: jax.Device) -> dict[str, str] | None:
    """Return XLA's options for compiling the step: how much of a TPU's fast memory a fusion may use.

    XLA's own limit is for all programs; ResNet-50 takes 5 to 13 % fewer cycles, by its estimate, with a higher one.
    None where nothing is known to help, or the user has decided.
    """
    if device.device_kind not in VMEM_KIB or VMEM in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return None
    return {VMEM: str(VMEM_KIB[device.device_kind])}


def data_mesh() -> Mesh:
    """Lay all devices of all processes on one axis, `data`. Raises UserError if there are none of that kind."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        asked = {name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ}
        given = " ".join(f"{name}={value}" for name, value in asked.items())
        why = first_line(e).partition(" (set JAX_PLATFORMS=")[0]
        raise UserError(
            f"{given or 'JAX'}: no such devices here ({why}); JAX_PLATFORMS=cpu takes the processor"
        ) from None
    return mesh_over(jax.devices())


def mesh_over(devices: Sequence[Any]) -> Mesh:
    """Lay devices on one axis, `data`, in JAX's order for their network; those of a slice together."""
    auto = (AxisType.Auto,)  # shardings are propagated by XLA; by default the axis would be Explicit
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh((len(devices),), ("data",), axis_types=auto, devices=devices)
    laid_out = mesh_utils.create_hybrid_device_mesh((len(devices) // slices,), (slices,), devices)
    return Mesh(laid_out, ("data",), axis_types=auto)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shard arrays [batch, …]: each device holds consecutive rows."""
    return NamedSharding(mesh, PartitionSpec("data"))


def parts_sharding(mesh: Mesh) -> NamedSharding:
    """Shard arrays [parts, batch, …]: each device holds consecutive rows of every part."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicate: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def check_divides(batch_size: int, mesh: Mesh, what: str, accumulate: int = 1) -> None:
    """Raise UserError unless every device gets equally many examples of the batch, and of each part of it."""
    if batch_size % (share := mesh.size * accumulate):
        nearest = max(1, round(batch_size / share)) * share
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"{what}={batch_size} is not divisible by the {mesh.size} devices{parts}; the nearest is {nearest}"
            + (", or lower config.accumulate" if accumulate > 1 else "")
        )


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Return the rows of a global batch that this process's devices hold, ascending: int64 [local batch]."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


def global_batch(sharding: NamedSharding, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Make global arrays over the mesh from this process's rows of them."""
    with jax.transfer_guard("allow"):  # with several processes JAX makes this transfer, asked for here, implicitly
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}
