"""What the official MAE code of 2021 expects of torch, numpy and timm, given to it from outside.

Each bridge does nothing where its river is dry: where a fork has been brought up to date, or a GPU is there.
"""

from __future__ import annotations

import collections.abc
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import timm.models.vision_transformer as vision_transformer
import torch
from timm.optim import param_groups_weight_decay
from torch import distributed as dist


class Block(vision_transformer.Block):
    """timm's, with an argument that it no longer has and that MAE sets to None."""

    def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
        if qk_scale is not None:
            raise SystemExit(
                f"Block(qk_scale={qk_scale}): current timm scales by head_dim ** -0.5 and has no other scale"
            )
        super().__init__(*args, **kwargs)


def build() -> None:
    """Build all bridges. Call it before anything of MAE is imported."""
    # torch._six was a help for Python 2.
    six: Any = ModuleType("torch._six")
    six.inf, six.string_classes, six.container_abcs = float("inf"), (str, bytes), collections.abc
    sys.modules.setdefault("torch._six", six)

    # numpy 1.24 removed its other names of Python's own types.
    vars(np).setdefault("float", float)
    vars(np).setdefault("int", int)

    # The names that timm has changed; the version that MAE asserts is not asked for, see launch.run.
    vision_transformer.Block = Block
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that importing it is deprecated
        import timm.optim.optim_factory as optim_factory
    if not hasattr(optim_factory, "add_weight_decay"):
        optim_factory.add_weight_decay = param_groups_weight_decay

    # TensorBoard is a package of its own now.
    if find_spec("tensorboard") is None:
        tensorboard: Any = ModuleType("torch.utils.tensorboard")
        tensorboard.SummaryWriter = lambda log_dir=None, **_: MagicMock(log_dir=log_dir)
        sys.modules["torch.utils.tensorboard"] = tensorboard

    # It is torch.amp now, and says so at every step.
    warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.", category=FutureWarning)

    if not torch.cuda.is_available():
        _build_without_gpu()


def _build_without_gpu() -> None:
    """MAE has --device cpu, but speaks to the GPU all the same, and with NCCL to other ranks."""
    torch.cuda.synchronize = torch.cuda.set_device = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self

    tensor = torch.tensor

    def tensor_here(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return tensor(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    init_process_group = dist.init_process_group

    def init_gloo(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init_process_group("gloo", *args, **kwargs)

    torch.tensor, dist.init_process_group = tensor_here, init_gloo
