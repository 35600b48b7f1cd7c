"""Teachers: images to parts, by a moving average of the model that trains or by a pretrained one."""

from .attention import attention_affinity, reading, token_affinity
from .teacher import FrozenTeacher, PartTeacher

__all__ = ["FrozenTeacher", "PartTeacher", "attention_affinity", "reading", "token_affinity"]
