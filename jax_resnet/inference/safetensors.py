"""A run's weights for timm and torchvision, as `jax-resnet export --workdir runs/mine` writes them.

They are DIR/model.safetensors, which `load_state_dict` takes with strict=True, and DIR/config.json, from which
`timm.create_model("local-dir:DIR", pretrained=True)` builds the same network; uploaded, it is a model of the hub.
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
WITHOUT_EFFECT = (  # on trained weights
    *("dropout", "drop_path", "init", "head_std", "head_prior", "zero_init_last"),
    *("bn_group_size", "bn_momentum"),
)


def export(
    workdir: str | os.PathLike[str], *, checkpoint: str = "best", averaged: bool = True, out: str | None = None
) -> list[AnyPath]:
    """Writes the weights of a checkpoint ("best", "latest" or a step) of `workdir`; returns the files.

    They are the running average where the run kept one, unless `averaged` is False. `out` is the folder, by default
    WORKDIR/export. config.json is written if timm has the network.
    Raises UserError for a workdir without that checkpoint, a folder that cannot be written, or one given as `out` in
    which there is a model already.
    """
    workdir = open_path(workdir)
    if read_config(workdir) is None or not has_checkpoints(workdir):
        raise UserError(f"{workdir}: no checkpoint has been saved here")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.find(checkpoint)
        config, trees = from_json(checkpoints.config(step)), checkpoints.weights(step, averaged=averaged)
    return write_model(trees, config, workdir, open_path(out) if out else workdir / "export", new=bool(out))


def write_model(
    trees: tuple[Any, Any], config: ConfigDict, workdir: AnyPath, folder: AnyPath, *, new: bool
) -> list[AnyPath]:
    """Writes `trees`, parameters and batch statistics of a run in `workdir`, to `folder`; returns the files.

    Raises UserError if it cannot be written, or is to be `new` and has a model in it already.
    """
    spec = model_spec(config.model.name, **model_overrides(config))
    tensors = to_torch(flatten(*trees), spec)
    weights, description = folder / "model.safetensors", folder / "config.json"
    for file in (weights, description):
        if new and file.exists():
            raise UserError(f"{file}: is there already; choose another --out")
    try:
        make_folder(folder)
        write(weights, safetensors.numpy.save(tensors, metadata={"format": "pt"}))  # save_file ignores the umask
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
    """timm's name for the network, None if it has none of that shape."""

    def shape(spec: ResNetSpec) -> ResNetSpec:
        same: dict[str, Any] = {name: getattr(ResNetSpec, name) for name in (*WITHOUT_EFFECT, "pool")}
        return dataclasses.replace(spec, **same)

    names = [name for name, known in ZOO.items() if not NOT_IN_TIMM.match(name) and shape(known) == shape(spec)]
    return names[0] if names else None


def hub_config(
    architecture: str, spec: ResNetSpec, config: ConfigDict, classes: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """The config.json from which timm, and the hub, know the network and the images that it was trained on.

    `facts`: image_shape [H, W, C] and class_names of the data.
    """
    image = config.data.image
    height, width, channels = facts["image_shape"]
    model_args = {"in_chans": channels} if channels != 3 else {}
    model_args |= {"global_pool": spec.pool} if spec.pool != "avg" else {}
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": spec.channels[-1],
        "global_pool": spec.pool,
        "label_names": facts["class_names"],
        **({"model_args": model_args} if model_args else {}),
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
