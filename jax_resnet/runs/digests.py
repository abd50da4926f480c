"""Digest the arrays of a checkpoint, and compare them with its record to find damage.

The record holds the config, a digest of every array and a digest of itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_resnet.errors import UserError

FORMAT = 1

# {"format", "config", "arrays": {name: {"shape", "dtype", "sha256"}}, "sha256"}
Record = dict[str, Any]


def make_record(fields: Mapping[str, Any], config: dict[str, Any]) -> Record:
    """Record the config and the digests of the arrays in `fields`."""
    record = {"format": FORMAT, "config": config, "arrays": _digests(fields)}
    return record | {"sha256": _digest_of_record(record)}


def check_record(record: Record) -> None:
    """Compare a record with its own digest. Raises ValueError."""
    if record["format"] != FORMAT or record["sha256"] != _digest_of_record(record):
        raise ValueError("its record does not agree with its own digest")


def check_digests(tree: Any, record: Record) -> None:
    """Compare the arrays of a tree with the digests in a record.

    Raises ValueError naming an array that differs.
    """
    digests = _digests(tree)
    saved = record["arrays"]
    for name in digests.keys() | saved.keys():
        if digests.get(name) != saved.get(name):
            raise ValueError(f"the digest of {name} does not agree")


def check_same_tree(record: Record, wanted: Any, where: str) -> None:
    """Compare the names and shapes in a record with those of the tree `wanted`.

    Raises UserError naming the first array that differs.
    """
    saved = {name: tuple(array["shape"]) for name, array in record["arrays"].items()}
    shapes = {name: tuple(leaf.shape) for name, leaf in _named(wanted).items()}
    different = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
    if different:
        name = different[0]
        saved_shape = saved.get(name, "absent")
        wanted_shape = shapes.get(name, "absent")
        raise UserError(
            f"{where}: of another network: {name} is {saved_shape} there, {wanted_shape} here "
            f"({len(different)} arrays differ); choose another workdir or the config it was made with"
        )


def _named(tree: Any) -> dict[str, Any]:
    """Name the arrays of a tree: params/stage1/block0/conv1/kernel."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")}


def _digest_of_record(record: Record) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digests(tree: Any) -> dict[str, dict[str, Any]]:
    """Take shape, dtype and SHA-256 of each array's bytes in C order."""

    def digest(array: np.ndarray) -> dict[str, Any]:
        sha256 = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256}

    named = _named(tree)
    # Threads suffice, because hashing releases Python's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(named, pool.map(digest, map(np.asarray, named.values())), strict=True))
