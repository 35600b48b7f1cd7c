"""Evolving masks in code that people train with, one file a code base. Nothing of a host is edited or forked."""

from .evolution import Evolution
from .lightly import apply_to_lightly, lightning_callback
from .mae import apply_to_mae
from .mim import apply_to_mim
from .stable_pretraining import apply_to_stable_pretraining
from .timm import apply_to_timm
from .vit_mae import apply_to_vit_mae, trainer_callback

__all__ = [
    "Evolution",
    "apply_to_lightly",
    "apply_to_mae",
    "apply_to_mim",
    "apply_to_stable_pretraining",
    "apply_to_timm",
    "apply_to_vit_mae",
    "lightning_callback",
    "trainer_callback",
]
