"""Keys of a config by their full names, such as optimizer.learning_rate."""

from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jax_resnet.errors import did_you_mean

# The current names of keys by their names in earlier versions; config/stored.py has the version.
RENAMED = {"data.image_size": "data.image.size"} | {
    f"data.{name}": f"data.image.{name}"
    for name in (
        *("channels", "mean", "std", "crop", "crop_area", "crop_ratio", "crop_resize", "interpolation", "antialias"),
        *("pad", "pad_mode", "flip", "flip_alternate", "randaugment", "randaugment_timm", "trivial_augment"),
        *("augment_interpolation", "color_jitter", "pca_noise", "colout", "erase", "cutmix", "eval_crop", "decoder"),
    )
}


def near_key(mistyped: str, keys: Sequence[str]) -> str:
    """Suggest the full key, also where it was renamed or its group was left out or mistyped."""
    if mistyped in RENAMED:
        return f"it is now {RENAMED[mistyped]}"
    groups = {key[:i] for key in keys for i, char in enumerate(key) if char == "."}
    hint = did_you_mean(mistyped, [*keys, *groups])
    if hint.startswith("did you mean"):
        return hint
    last = mistyped.rpartition(".")[2]
    same = [k for k in keys if k.rpartition(".")[2] == last]
    if len(same) == 1:
        return f"did you mean {same[0]}?"
    return did_you_mean(last, same or keys)


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each full key that is no group, with its value."""
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from leaves(config[key], f"{prefix}{key}.")
        else:
            yield prefix + key, config[key]


def get_key(config: ConfigDict, key: str) -> Any:
    """Return the value, or group, of a full key."""
    for part in key.split("."):
        config = config[part]
    return config


def as_tuples(value: Any) -> Any:
    """Convert lists, and lists inside them, to tuples: JSON has only lists, a config none."""
    if isinstance(value, list | tuple):
        return tuple(map(as_tuples, value))
    return value
