"""The config of a run: its defaults, its validation, and the command line that changes it."""

from jax_resnet.config.command_line import find_config, parse_flags
from jax_resnet.config.defaults import default, duration, model_overrides
from jax_resnet.config.durations import UNITS, in_steps, phase_rows, traced_steps
from jax_resnet.config.stored import differences, from_json, to_json
from jax_resnet.config.validate import OPTIMIZERS, PARAMETER_KINDS, SCHEDULES, check_crop_resize, validate

__all__ = [
    "OPTIMIZERS",
    "PARAMETER_KINDS",
    "SCHEDULES",
    "UNITS",
    "check_crop_resize",
    "default",
    "differences",
    "duration",
    "find_config",
    "from_json",
    "in_steps",
    "model_overrides",
    "parse_flags",
    "phase_rows",
    "to_json",
    "traced_steps",
    "validate",
]
