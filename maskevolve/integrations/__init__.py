"""Evolving masks in code that people train with, one file a code base. Nothing of a host is edited or forked."""

from .callbacks import lightning_callback, trainer_callback
from .evolution import Evolution, evolution_of
from .hugging_face import apply_to_mim, apply_to_vit_mae
from .lightly import apply_to_lightly
from .mae import apply_to_mae
from .stable_pretraining import apply_to_stable_pretraining
from .timm import apply_to_timm

__all__ = [
    "Evolution",
    "apply_to_lightly",
    "apply_to_mae",
    "apply_to_mim",
    "apply_to_stable_pretraining",
    "apply_to_timm",
    "apply_to_vit_mae",
    "evolution_of",
    "lightning_callback",
    "trainer_callback",
]
