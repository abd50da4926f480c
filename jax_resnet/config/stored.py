"""A config as JSON in a workdir, and what may differ when its run goes on."""

import json
from typing import Any

from ml_collections import ConfigDict

from jax_resnet.config.defaults import default
from jax_resnet.config.keys import as_tuples, leaves

# What may differ when a run goes on in its workdir: nothing here changes what is computed from whole files.
MAY_CHANGE = (
    "stop_after_steps", "log_every", "stuck_after", "profile", "accumulate", "spread_optimizer", "eval.every",
    "eval.batch_size", "checkpoint", "guard.max_skipped", "data.data_dir", "data.image.decoder", "data.threads",
    "data.workers", "data.max_broken",
)  # fmt: skip


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """One text for each key that differs in a way that changes what is computed: `batch_size: 128 there, 256 here`."""
    a, b = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key}: {a.get(key, 'absent')} there, {b.get(key, 'absent')} here"
        for key in sorted(a.keys() | b.keys())
        if as_tuples(a.get(key)) != as_tuples(b.get(key))
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def to_json(c: ConfigDict) -> dict[str, Any]:
    """The config as nested plain dicts, lists, numbers and strings."""
    return json.loads(json.dumps(c.to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_json`: keys unknown to this version are kept, and reported by `validate`."""

    def fill(c: ConfigDict, values: dict[str, Any]) -> ConfigDict:
        with c.unlocked():
            for key, value in values.items():
                if isinstance(value, dict):
                    c[key] = fill(c.get(key, ConfigDict()), value)
                else:
                    c[key] = as_tuples(value)
        return c

    return fill(default(), values)
