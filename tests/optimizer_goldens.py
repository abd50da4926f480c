"""Parameters after 20 updates by torch's and timm's optimizers, in float64, with which ours are compared.

`python tests/optimizer_goldens.py` writes them to tests/data/optimizers.npz. It needs torch 2.9 or later and timm.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from conftest import SHARED

GOLDENS = Path(__file__).parent / "data" / "optimizers.npz"
UPDATES = 20

SHAPES = {  # one parameter or more of each kind, under the names the networks use
    "stem": {"conv1": {"kernel": (3, 3, 2, 4)}, "norm1": {"scale": (4,), "bias": (4,)}},
    "stage1": {"block0": {"conv1": {"kernel": (3, 3, 4, 3)}, "conv2": {"kernel": (1, 1, 3, 6)}}},
    "norm": {"scale": (6,), "bias": (6,)},
    "head": {"kernel": (6, 3), "bias": (3,)},
}
WIDE = {  # large enough to be factored by adafactor, whose other parameters are vectors here: torch factors all others
    "stage1": {"block0": {"conv1": {"kernel": (1, 2, 128, 130)}, "norm1": {"scale": (130,), "bias": (130,)}}},
    "head": {"kernel": (130, 128), "bias": (128,)},
}
HIDDEN = ("stage1/block0/conv1/kernel", "stage1/block0/conv2/kernel")


def rate_at(step: Any) -> Any:
    """The rate of each update: another each time, so that it shows where it is multiplied in."""
    return 0.05 / (1 + step)


def random_trees(shapes: Any, count: int) -> list[Any]:
    """Values between 0.5 and 1.5 of either sign: far from 0, where the place of epsilon would show."""
    rng = np.random.default_rng(count)

    def values(shape):
        return rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)

    return [jax.tree.map(values, shapes, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(count)]


def named(tree: Any) -> dict[str, Any]:
    """{"stem/conv1/kernel": value, …} of a nested dict."""
    return {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def sample(tree: Any) -> np.ndarray:
    """Up to 300 numbers from all over the parameters, float64."""
    flat = np.concatenate([np.ravel(x) for x in named(tree).values()]).astype(np.float64)
    return flat[:: -(-flat.size // 300)]


def groups(params: dict[str, Any], no_decay: tuple[str, ...], decay: float) -> list[dict[str, Any]]:
    """torch's parameter groups: those that decay and those that don't."""

    def kind(name: str) -> str:
        return "kernel" if name.endswith("kernel") else "norm" if "norm" in name else "bias"

    by_decay: dict[float, list[Any]] = {}
    for name, parameter in params.items():
        by_decay.setdefault(0.0 if kind(name) in no_decay else decay, []).append(parameter)
    return [{"params": members, "weight_decay": decay} for decay, members in by_decay.items()]


def torch_optim(name: str, **arguments: Any) -> Callable[..., list[Any]]:
    """What makes torch.optim's or timm.optim's optimizer of that name from the parameters and the config."""

    def make(params: dict[str, Any], c: dict[str, Any]) -> list[Any]:
        library, _, optimizer = name.partition(".")
        module = importlib.import_module(f"{library}.optim")
        return [getattr(module, optimizer)(groups(params, c["no_decay"], c["weight_decay"]), lr=1.0, **arguments)]

    return make


def torch_muon(rest: Callable[..., list[Any]], **arguments: Any) -> Callable[..., list[Any]]:
    """torch.optim.Muon for the hidden convolutions, as [out, H·W·in], and what makes the rest's."""

    def make(params: dict[str, Any], c: dict[str, Any]) -> list[Any]:
        import torch

        hidden = [params[name] for name in HIDDEN]
        muon = torch.optim.Muon(hidden, lr=1.0, weight_decay=c["weight_decay"], eps=1e-12, **arguments)
        others = rest({name: p for name, p in params.items() if name not in HIDDEN}, c)
        for group in others[0].param_groups:
            group["of_rate"] = c["rest"]["learning_rate"] / c["learning_rate"]
        return [muon, *others]

    return make


# What config.optimizer says, and what makes the torch optimizers that do the same.
CASES: dict[str, tuple[dict[str, Any], Callable[..., list[Any]]]] = {
    "sgd": ({"name": "sgd", "momentum": 0.0}, torch_optim("torch.SGD")),
    "sgd_momentum": ({"name": "sgd", "nesterov": False, "no_decay": ()}, torch_optim("torch.SGD", momentum=0.9)),
    "sgd_nesterov": ({"name": "sgd", "no_decay": ("kernel",)}, torch_optim("torch.SGD", momentum=0.9, nesterov=True)),
    "sgd_decoupled": ({"name": "sgd", "decoupled": True}, torch_optim("timm.SGDW", momentum=0.9, nesterov=True)),
    "rmsprop": ({"name": "rmsprop", "momentum": 0.0}, torch_optim("torch.RMSprop", alpha=0.95, eps=1e-8)),
    "rmsprop_momentum": (
        {"name": "rmsprop", "momentum": 0.9},  # nesterov, true by default, is not for it
        torch_optim("torch.RMSprop", alpha=0.95, eps=1e-8, momentum=0.9),
    ),
    "rmsprop_tf": (
        {"name": "rmsprop_tf", "epsilon": 1e-3},
        torch_optim("timm.RMSpropTF", alpha=0.95, eps=1e-3, momentum=0.9),
    ),
    "rmsprop_tf_decoupled": (
        {"name": "rmsprop_tf", "decoupled": True},
        torch_optim("timm.RMSpropTF", alpha=0.95, eps=1e-8, momentum=0.9, decoupled_decay=True),
    ),
    "adagrad": ({"name": "adagrad"}, torch_optim("torch.Adagrad", eps=1e-8)),
    "adam": ({"name": "adam"}, torch_optim("torch.Adam", betas=(0.8, 0.95))),
    "adamw": ({"name": "adamw", "no_decay": ()}, torch_optim("torch.AdamW", betas=(0.8, 0.95))),
    "adamw_coupled": ({"name": "adamw", "decoupled": False}, torch_optim("torch.Adam", betas=(0.8, 0.95))),
    "lamb": (
        {"name": "lamb", "epsilon": 1e-6},
        torch_optim("timm.Lamb", betas=(0.8, 0.95), eps=1e-6, max_grad_norm=None),
    ),
    "lamb_clipped": (
        {"name": "lamb", "epsilon": 1e-3, "clip_norm": 1.0, "no_decay": ()},
        torch_optim("timm.Lamb", betas=(0.8, 0.95), eps=1e-3, max_grad_norm=1.0),
    ),
    "lars": (
        {"name": "lars", "epsilon": 0.0, "trust_coefficient": 0.1},
        torch_optim("timm.Lars", momentum=0.9, nesterov=True, trust_coeff=0.1, eps=0.0),
    ),
    "lars_undecayed": (
        {"name": "lars", "epsilon": 0.5, "trust_coefficient": 0.1, "nesterov": False, "no_decay": ("kernel",)},
        torch_optim("timm.Lars", momentum=0.9, trust_coeff=0.1, eps=0.5),
    ),
    "lion": ({"name": "lion"}, torch_optim("timm.Lion", betas=(0.8, 0.95))),
    "adafactor": ({"name": "adafactor", "no_decay": ("bias",)}, torch_optim("torch.Adafactor")),
    "muon": (
        {"name": "muon", "momentum": 0.6, "newton_schulz_steps": 3, "rest": {"learning_rate": 0.03}},
        torch_muon(torch_optim("torch.AdamW", betas=(0.8, 0.95)), momentum=0.6, ns_steps=3),
    ),
    "muon_sgd": (
        {
            "name": "muon",
            "nesterov": False,
            "no_decay": (),
            "rest": {"name": "sgd", "learning_rate": 0.2, "momentum": 0.85},
        },
        torch_muon(torch_optim("timm.SGDW", momentum=0.85, nesterov=True), momentum=0.9, nesterov=False),
    ),
}


def config_of(case: str) -> dict[str, Any]:
    """What config.optimizer says in that case."""
    common = {"learning_rate": 0.1, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "no_decay": ("norm", "bias")}
    return common | CASES[case][0]


def start_and_gradients(case: str) -> list[Any]:
    """The parameters before the updates, and then the gradient of each update."""
    return random_trees(WIDE if case == "adafactor" else SHAPES, 1 + UPDATES)


def reference(case: str) -> np.ndarray:
    """A sample of the parameters after the updates."""
    import torch

    start, *gradients = (named(tree) for tree in start_and_gradients(case))

    def as_torch(name: str, x: np.ndarray) -> Any:
        hidden = case.startswith("muon") and name in HIDDEN
        return torch.tensor(x.reshape(-1, x.shape[-1]).T.copy() if hidden else x, dtype=torch.float64)

    params = {name: as_torch(name, x).requires_grad_() for name, x in start.items()}
    optimizers = CASES[case][1](params, config_of(case))
    for step, gradient in enumerate(gradients):
        for name, parameter in params.items():
            parameter.grad = as_torch(name, gradient[name])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step) * group.get("of_rate", 1.0)
            with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x.clone()):  # Muon, which casts, in float64 too
                optimizer.step()
    found = {name: p.detach().numpy() for name, p in params.items()}
    return sample({name: (x.T if x.shape != start[name].shape else x).ravel() for name, x in found.items()})


def import_timm() -> None:
    """timm imports torchvision, whose compiled part may be for another build of torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        sys.path.append(str(SHARED / "tools"))
        import torchvision_shim  # noqa: F401
    import timm.optim  # noqa: F401


if __name__ == "__main__":
    import_timm()
    np.savez(GOLDENS, **{case: reference(case) for case in CASES})
