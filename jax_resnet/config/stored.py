"""A config as JSON in a workdir, and the keys that may change when its run resumes."""

import json
from typing import Any

from ml_collections import ConfigDict

from jax_resnet.config.defaults import default
from jax_resnet.config.keys import RENAMED, as_tuples, leaves
from jax_resnet.errors import UserError

# The version of a config's keys. A config stored without a version has version 1.
VERSION = 2
# Keys that were dropped, by their names in version 2, and their former defaults.
DROPPED: dict[str, Any] = {
    "data.mix_until": 1.0,
    "gradient_sums": "auto",
    "guard.loss_spike": 0.0,
    "loss.bce_threshold": 0.0,
    "model.drop_block": 0.0,
    "optimizer.clip_adaptive": 0.0,
    "spread_optimizer": False,
}

# These keys may change when a run resumes. With intact files they do not change what is computed,
# except that `accumulate` changes the draws of dropout and drop_path.
MAY_CHANGE = (
    "stop_after_steps", "log_every", "stuck_after", "profile", "accumulate", "eval.every", "eval.batch_size",
    "checkpoint", "guard.max_skipped", "data.data_dir", "data.image.decoder", "data.threads", "data.workers",
    "data.max_broken",
)  # fmt: skip


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Describe each difference that is not in MAY_CHANGE: `batch_size: 128 there, 256 here`."""
    olds = dict(leaves(old))
    news = dict(leaves(new))
    return [
        f"{key}: {olds.get(key, 'absent')} there, {news.get(key, 'absent')} here"
        for key in sorted(olds.keys() | news.keys())
        if as_tuples(olds.get(key)) != as_tuples(news.get(key))
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Return the config as nested plain dicts, lists, numbers and strings, with its version."""
    return {"version": VERSION} | json.loads(json.dumps(config.to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Return the config that `to_json` wrote, now or in an earlier version.

    Keys unknown to all versions are kept, and reported by `validate`. Raises UserError for the
    config of a newer version, and for values of dropped keys that were not their defaults.
    """
    version = values.get("version", 1)
    if version > VERSION:
        raise UserError(
            f"the workdir was written by a newer version of jax_resnet: its config has version {version}, this one "
            f"reads up to {VERSION}; upgrade jax_resnet"
        )
    stored = {key: as_tuples(value) for key, value in leaves(ConfigDict(values)) if key != "version"}
    if version < VERSION:
        stored = {RENAMED.get(key, key): value for key, value in stored.items()}
    dropped = {key: stored.pop(key) for key in DROPPED if key in stored}
    if changed := [f"config.{key}={value}" for key, value in dropped.items() if value != DROPPED[key]]:
        raise UserError(
            f"{', '.join(changed)}: this version of jax_resnet no longer has these keys; go on with the older version "
            "that wrote the workdir"
        )
    config = default()
    for key, value in stored.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        group[name] = value
    return config
