"""Says once where masks are hooked into a model but not used, and where a teacher is never updated."""

import warnings
from typing import Any

from torch import nn


class Usage:
    """What became of the masks that `where` asks for, and whether a teacher that follows the student awaits updates."""

    def __init__(self, student: nn.Module, where: str) -> None:
        self.student, self.where = student, where
        # Compiled code only ever writes these: what it read would be a guard, and a change of it a new compilation.
        self.is_embedded = self.is_masked = False
        self._passes = self._updates = 0

    def expect_updates(self, teacher: Any) -> None:
        """From now on, a teacher that moves is to be updated."""
        self.awaits_update = hasattr(teacher, "update") and getattr(teacher, "decay", 0) != 1
        self._steps = 0
        self._version: int | None = None

    def end_pass(self) -> None:
        """After the second forward pass in training that embedded images but masked none, `check_masks`."""
        self._passes += 1
        if self._passes > 1:
            self.check_masks()

    def check_masks(self) -> None:
        """Warn where images were embedded in training, but none was ever masked."""
        if self.is_embedded and not self.is_masked:
            self.is_masked = True
            _warn(
                f"images were embedded in training, but not masked: {self.where}, which draws the evolving masks, "
                "was not called, or had nothing to remove. Does the model mask by another method, or not at all?"
            )

    def note_update(self) -> None:
        """Warn at the second update of the teacher, where the model was never called in training."""
        self.awaits_update = False
        self._updates += 1
        if self._updates == 2 and not (self.is_embedded or self.is_masked):
            _warn(
                f"the teacher was updated twice, but this {type(self.student).__name__} was not called in training: is "
                "another model trained, such as a copy, or one that the trainer made? Train the one that apply_to_... "
                "was given."
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
            _warn(
                "the model is trained, but its teacher never updated: call evolution.follow(optimizer) once, or "
                "evolution.update() after each optimizer step. A teacher that is to stay as it is, is a FrozenTeacher."
            )


def _warn(message: str) -> None:
    warnings.warn(f"{message} This warning is given once.", stacklevel=5)
