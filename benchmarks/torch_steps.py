"""The training steps of others, for train_step.py: timm's networks under torch, or a CIFAR one where timm has none."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHIM = Path(__file__).resolve().parents[2] / "shared" / "tools" / "torchvision_shim.py"


def torch_step(
    name: str, size: int, batch: int, smoothing: float, mode: str | None
) -> tuple[Callable[[], None], Callable[[], dict[str, Any]]]:
    """A training step, on a batch that is on the device already, and facts about it.

    SGD with momentum in one fused kernel, channels last; on a GPU bfloat16 autocast. `mode` is torch.compile's,
    None for what torch does by itself. Raises ImportError if torch or timm are not here.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    layout: Any = {"memory_format": torch.channels_last}
    model = (cifar_resnet if name.startswith("cifar_") else timm_model)(name).to(device, **layout).train()
    classes = model.num_classes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=device).to(**layout)
    labels = torch.arange(batch, device=device) % classes
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return criterion(model(images), labels)

    forward = torch.compile(forward, mode=mode) if mode else forward

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    def facts() -> dict[str, Any]:
        if device == "cpu":
            return {"device": device}
        torch.cuda.synchronize()
        return {"device": torch.cuda.get_device_name(), "memory": torch.cuda.max_memory_allocated()}

    return step, facts


def synchronise() -> None:
    """Returns when the GPU, if there is one, has done everything."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timm_model(name: str) -> Any:
    """timm's network of that name, with 1,000 classes."""
    import torch

    if not torch.cuda.is_available() and SHIM.exists():  # torchvision's operators are built for another torch
        spec: Any = importlib.util.spec_from_file_location("torchvision_shim", SHIM)
        spec.loader.exec_module(sys.modules.setdefault("torchvision_shim", importlib.util.module_from_spec(spec)))
    try:
        import timm
    except RuntimeError as e:
        raise ImportError(f"timm: {e}") from None
    return timm.create_model(name)


def cifar_resnet(name: str) -> Any:
    """The 6n+2 network of He et al. 2015, section 4.2, for 10 classes; the shortcuts have no weights."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            self.grows = out > channels
            self.conv1 = nn.Conv2d(channels, out, 3, 1 + self.grows, 1, bias=False)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)

        def forward(self, x: Any) -> Any:
            y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
            if self.grows:
                half = x.shape[1] // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
            return functional.relu(y + x)

    blocks = (int(name.removeprefix("cifar_resnet")) - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for channels, out in ((16, 16), (16, 32), (32, 64)):
        layers += [Block(channels, out), *(Block(out, out) for _ in range(blocks - 1))]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model.num_classes = 10
    return model
