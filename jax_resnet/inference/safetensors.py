"""Write a run's weights for timm and torchvision: `jax-resnet export --workdir runs/mine`.

The files are DIR/model.safetensors, which `load_state_dict` takes with strict=True, and
DIR/config.json, from which `timm.create_model("local-dir:DIR", pretrained=True)` builds the same
network. Uploaded, DIR is a model of the Hugging Face hub.
"""

import dataclasses
import json
import os
import re
from typing import Any

import safetensors.numpy
from ml_collections import ConfigDict

from jax_resnet.config import from_json, model_overrides
from jax_resnet.errors import UserError
from jax_resnet.models.spec import ResNetSpec
from jax_resnet.models.torch_names import flatten, to_torch, torch_name
from jax_resnet.models.zoo import ZOO, model_spec
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.paths import AnyPath, make_folder, open_path, read, write
from jax_resnet.runs.workdir import has_checkpoints, read_config, write_json

NOT_IN_TIMM = re.compile(r"cifar_|wrn_|.*_v1$|resnetv2_200$")
# Fields without effect on the outputs of trained weights.
WITHOUT_EFFECT = (
    *("dropout", "drop_path", "init", "head_std", "head_prior", "zero_init_last"),
    *("bn_group_size", "bn_momentum"),
)


def export(
    workdir: str | os.PathLike[str], *, checkpoint: str = "best", averaged: bool = True, out: str | None = None
) -> list[AnyPath]:
    """Write the weights of a checkpoint, "best", "latest" or a step; return the files.

    They are the running average where the run kept one, unless `averaged` is False. `out` is the
    folder, by default WORKDIR/export. config.json is written if timm has the network. Raises UserError
    if the checkpoint does not exist, the folder cannot be written, or `out` already holds a model.
    """
    workdir = open_path(workdir)
    if read_config(workdir) is None or not has_checkpoints(workdir):
        raise UserError(f"{workdir}: no checkpoint has been saved here")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.find(checkpoint)
        config = from_json(checkpoints.config(step))
        trees = checkpoints.weights(step, averaged=averaged)
    folder = open_path(out) if out else workdir / "export"
    return write_model(trees, config, workdir, folder, new=bool(out))


def write_model(
    trees: tuple[Any, Any], config: ConfigDict, workdir: AnyPath, folder: AnyPath, *, new: bool
) -> list[AnyPath]:
    """Write a run's `trees`, parameters and batch statistics, to `folder`; return the files.

    Raises UserError if it cannot be written, or must be `new` and already holds a model.
    """
    spec = model_spec(config.model.name, **model_overrides(config))
    tensors = to_torch(flatten(*trees), spec)
    weights, description = folder / "model.safetensors", folder / "config.json"
    for file in (weights, description):
        if new and file.exists():
            raise UserError(f"{file}: is there already; choose another --out")
    try:
        make_folder(folder)
        # safetensors' own save_file ignores the umask.
        write(weights, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        architecture = timm_name(spec)
        if architecture is None:
            description.unlink(missing_ok=True)
            return [weights]
        facts = json.loads(read(workdir / "data.json"))
        classes = len(tensors[torch_name("head/bias", spec)])
        write_json(description, hub_config(architecture, spec, config, classes, facts))
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder}: cannot be written ({e})") from None
    return [weights, description]


def timm_name(spec: ResNetSpec) -> str | None:
    """Find timm's name for a network, None if timm has none of that shape."""

    def shape(spec: ResNetSpec) -> ResNetSpec:
        same: dict[str, Any] = {name: getattr(ResNetSpec, name) for name in (*WITHOUT_EFFECT, "pool")}
        return dataclasses.replace(spec, **same)

    names = (name for name in ZOO if not NOT_IN_TIMM.match(name))
    return next((name for name in names if shape(ZOO[name]) == shape(spec)), None)


def hub_config(
    architecture: str, spec: ResNetSpec, config: ConfigDict, classes: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """Describe the network and its training images in the config.json of timm and the hub.

    `facts`: image_shape [H, W, C] and class_names of the data.
    """
    image = config.data.image
    height, width, channels = facts["image_shape"]
    model_args: dict[str, Any] = {}
    if channels != 3:
        model_args["in_chans"] = channels
    if spec.pool != "avg":
        model_args["global_pool"] = spec.pool
    optional = {"model_args": model_args} if model_args else {}
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": spec.channels[-1],
        "global_pool": spec.pool,
        "label_names": facts["class_names"],
        **optional,
        "pretrained_cfg": {
            "input_size": [channels, height, width],
            "fixed_input_size": False,
            "interpolation": image.interpolation,
            "crop_pct": image.eval_crop if image.crop in ("random_resized", "scaled") else 1.0,
            "crop_mode": "squash" if image.crop == "stretched" else "center",
            "mean": list(image.mean),
            "std": list(image.std),
            "num_classes": classes,
            "first_conv": torch_name("stem/conv1/kernel", spec).removesuffix(".weight"),
            "classifier": torch_name("head/bias", spec).removesuffix(".bias"),
        },
    }
