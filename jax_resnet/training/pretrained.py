"""Weights from elsewhere into a fresh state: safetensors and torch files, our own runs, the Hugging Face hub."""

import io
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from jax_resnet.config import from_json, model_overrides
from jax_resnet.errors import UserError, did_you_mean, first_line
from jax_resnet.models.spec import ResNetSpec
from jax_resnet.models.torch_names import Arrays, Report, flatten, from_torch, to_torch
from jax_resnet.models.zoo import model_spec
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.paths import BACKENDS, AnyPath, is_remote, names, open_path, read
from jax_resnet.training.state import TrainState

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".tar")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """The tensors of a file under PyTorch's names, and what its config.json says of their network."""

    tensors: Mapping[str, Any]
    architecture: str | None = None
    spec: ResNetSpec | None = None
    mean: tuple[float, ...] = ()  # of the pixels in [0, 1] they were trained on; empty: not said
    std: tuple[float, ...] = ()


def fitting(path: str, state: TrainState, spec: ResNetSpec) -> tuple[Arrays, Report, Weights]:
    """Read the parameters and batch statistics in `path` that fit the network of `state`, which may be abstract.

    The head is left out if the number of classes differs, the first kernel summed if that of the channels does.
    `path`: a .safetensors file, a torch file (with the extra `torch`, opened as data only), a folder with one of them,
    a workdir of ours (the most accurate checkpoint) or its checkpoints/STEP, or hf://ORGANISATION/NAME[@REVISION].
    Raises UserError, naming `path`, for what cannot be read or does not fit.
    """
    shapes = {name: x.shape for name, x in flatten(state.params, state.batch_stats).items()}
    weights = None
    try:
        weights = read_weights(path)
        arrays, report = from_torch(weights.tensors, shapes, spec, strict=False)
    except UserError as e:
        known = f" (it is said to be {weights.architecture})" if weights and weights.architecture else ""
        raise UserError(f"config.init_from={path}: {e}{known}") from None
    return arrays, report, weights


def placed(state: TrainState, arrays: Arrays) -> TrainState:
    """Put `arrays`, by name, in the place of the parameters and batch statistics of `state`, sharded as they were.

    A running average begins as a copy of them.
    """
    if not arrays:
        return state
    state = replace(state, params=place(state.params, arrays), batch_stats=place(state.batch_stats, arrays))
    if state.ema:
        state = replace(state, ema=jax.tree.map(jnp.copy, state.weights))
    return state


def place(tree: Any, arrays: Arrays) -> Any:
    """`tree`, of parameters or of statistics, maybe abstract, with those `arrays` that have the names of its leaves."""
    flat = {name: _like(x, arrays[name]) if name in arrays else x for name, x in flatten(tree).items()}
    return nnx.traversals.unflatten_mapping({tuple(name.split("/")): x for name, x in flat.items()})


def _like(x: jax.Array, array: np.ndarray) -> jax.Array:
    with jax.transfer_guard("allow"):  # this way of saying what goes where counts as implicit
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: array[index])


def read_weights(path: str) -> Weights:
    """Read weights from a file, folder or the hub. Raises UserError, to be preceded by the path."""
    if path.startswith("hf://"):
        return _from_hub(path.removeprefix("hf://"))
    if "://" in path and path.partition("://")[0] not in BACKENDS:
        raise UserError("must be a path, gs://… or s3://…, or hf://ORGANISATION/NAME")
    file = open_path(path)
    if file.is_dir():
        if (file / "checkpoints").is_dir() or file.parent.name == "checkpoints":
            return _from_run(file)
        inside = [file / name for name in HUB_FILES if (file / name).is_file()]
        if not inside:
            raise UserError(f"a folder without checkpoints, {' or '.join(HUB_FILES)}")
        file = inside[0]
    if not file.is_file():
        siblings = names(file.parent)
        if not siblings:
            raise UserError("no such file")
        raise UserError(f"no such file; {did_you_mean(file.name, siblings)}")
    return _described(_tensors(file), file.with_name("config.json"))


def _tensors(file: AnyPath) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        try:
            if is_remote(file):
                return safetensors.numpy.load(read(file))
            return safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"not a whole safetensors file ({e})") from None
    if file.suffix not in TORCH_SUFFIXES:
        raise UserError(f"must be .safetensors or torch's {', '.join(TORCH_SUFFIXES)}, a workdir or hf://…")
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(
            "to read a torch file, pip install 'jax-resnet-training[torch]'; a .safetensors file needs nothing"
        ) from None
    try:
        source = io.BytesIO(read(file)) if is_remote(file) else file
        content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = str(e).rpartition("Unsupported")[2].splitlines()[0].strip() or "more than tensors"
        raise UserError(
            f"not opened: it is damaged or holds more than tensors, which could run code ({unsafe})"
        ) from None
    except Exception as e:  # a damaged file fails in as many ways as there are formats
        raise UserError(f"cannot be read as a torch file ({first_line(e)})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}, not tensors by name")
    return content


def _described(tensors: Mapping[str, Any], description: AnyPath) -> Weights:
    """With what a config.json of the hub's form says; without, if there is none."""
    try:
        content = json.loads(description.read_text())
        facts = content.get("pretrained_cfg", content)
        mean, std = (tuple(map(float, facts.get(key, ()))) for key in ("mean", "std"))
        name = content.get("architecture")
        return Weights(tensors, name, _spec(name, content.get("model_args", {})), mean, std)
    except (OSError, ValueError, TypeError, AttributeError):
        return Weights(tensors)


def _spec(name: str | None, model_args: dict[str, Any]) -> ResNetSpec | None:
    """Return the network that timm means, if the zoo has it."""
    try:
        return model_spec(name, pool=model_args.get("global_pool")) if name else None
    except UserError:
        return None


def _from_run(path: AnyPath) -> Weights:
    workdir, step = path, "best"
    if path.parent.name == "checkpoints":
        workdir, step = path.parent.parent, path.name
    with Checkpoints(workdir) as checkpoints:
        chosen = checkpoints.find(step)
        config, trees = from_json(checkpoints.config(chosen)), checkpoints.weights(chosen)
    spec = model_spec(config.model.name, **model_overrides(config))
    mean, std = tuple(config.data.image.mean), tuple(config.data.image.std)
    return Weights(to_torch(flatten(*trees), spec), config.model.name, spec, mean, std)


def _from_hub(name: str) -> Weights:
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # it tells of each of its retries twice
    name, _, revision = name.partition("@")
    if name.count("/") != 1:
        raise UserError("must be hf://ORGANISATION/NAME, or hf://ORGANISATION/NAME@REVISION")

    def fetch(file: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision or None))
        except errors.LocalEntryNotFoundError as e:
            where, why = os.environ.get("HF_ENDPOINT", "the hub"), first_line(e.__cause__ or e)
            raise UserError(f"{where} cannot be reached ({why}), and {file} is not in the cache") from None
        except errors.EntryNotFoundError:
            return None
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
            raise UserError(f"cannot be fetched ({first_line(e)})") from None

    file = next((path for name_ in HUB_FILES if (path := fetch(name_))), None)
    if file is None:
        raise UserError(f"has neither {' nor '.join(HUB_FILES)}")
    description = fetch("config.json")
    if description is None:
        return Weights(_tensors(file))
    return _described(_tensors(file), description)
