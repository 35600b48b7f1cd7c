"""Notices where masks are hooked into a model but not used, or a teacher is never updated, and says so once."""

from __future__ import annotations

import threading
import warnings

import torch
from torch import nn

__all__ = ["Watch"]


class Watch:
    """What became of the masks of one model.

    Args:
        student: what the teacher follows.
        where: what draws masks in the model, for the warning.
        awaits_update: whether there is a teacher that must be updated.
    """

    def __init__(self, student: nn.Module, where: str, awaits_update: bool) -> None:
        self.student, self.where, self.awaits_update = student, where, awaits_update
        # Compiled code only ever writes these: what it read would be a guard, and a change of it a new compilation.
        self.is_embedded = self.is_masked = False
        self._thread = threading.local()
        self._version: int | None = None
        self._steps = 0

    def note_embedding(self) -> None:
        """Note that images are embedded in training, and warn where this thread has not masked those before."""
        if not torch.compiler.is_compiling():
            if getattr(self._thread, "is_embedded", False):
                self.check_masks()
            self._thread.is_embedded = True
        self.is_embedded = True

    def check_masks(self) -> None:
        """Warn where images were embedded in training, but none was ever masked."""
        if self.is_embedded and not self.is_masked:
            self.is_masked = True  # once
            warnings.warn(
                f"images were embedded in training, but not masked: {self.where}, which draws the evolving masks, was "
                "not called, or had nothing to remove. Does the model mask by another method, or not at all? This "
                "warning is given once.",
                stacklevel=4,
            )

    def check_updates(self) -> None:
        """Warn where the student's weights have changed twice between masks, but the teacher was never updated."""
        if not self.awaits_update:
            return
        version = sum(parameter._version for parameter in self.student.parameters())
        self._steps += self._version is not None and version != self._version
        self._version = version
        if self._steps == 2:
            self.awaits_update = False
            warnings.warn(
                "the model is trained, but its teacher never updated: call evolution.follow(optimizer) once, or "
                "evolution.update() after each optimizer step. A teacher that is to stay as it is, is a FrozenTeacher. "
                "This warning is given once.",
                stacklevel=4,
            )
