"""Keys of a config by their whole names, optimizer.learning_rate."""

from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jax_resnet.errors import did_you_mean

# Keys of earlier versions by their names today; config/stored.py has the version.
RENAMED = {"data.image_size": "data.image.size"} | {
    f"data.{name}": f"data.image.{name}"
    for name in (
        *("channels", "mean", "std", "crop", "crop_area", "crop_ratio", "crop_resize", "interpolation", "antialias"),
        *("pad", "pad_mode", "flip", "flip_alternate", "randaugment", "randaugment_timm", "trivial_augment"),
        *("augment_interpolation", "color_jitter", "pca_noise", "colout", "erase", "cutmix", "eval_crop", "decoder"),
    )
}


def near_key(mistyped: str, keys: Sequence[str]) -> str:
    """Return the whole key meant, also when it was renamed, or the group was left out or mistyped."""
    if mistyped in RENAMED:
        return f"it is now {RENAMED[mistyped]}"
    groups = {key[:i] for key in keys for i, c in enumerate(key) if c == "."}
    hint = did_you_mean(mistyped, [*keys, *groups])
    if hint.startswith("did you mean"):
        return hint
    last = mistyped.rpartition(".")[2]
    same = [k for k in keys if k.rpartition(".")[2] == last]
    return f"did you mean {same[0]}?" if len(same) == 1 else did_you_mean(last, same or keys)


def leaves(c: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key with its value, groups left out."""
    for key in c:
        if isinstance(c[key], ConfigDict):
            yield from leaves(c[key], f"{prefix}{key}.")
        else:
            yield prefix + key, c[key]


def get_key(c: ConfigDict, key: str) -> Any:
    """Return the value, or group, of a whole key."""
    for part in key.split("."):
        c = c[part]
    return c


def as_tuples(value: Any) -> Any:
    """Return lists, and those within, as tuples: JSON has none, and a config holds no lists."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value
