"""Hugging Face's ViTMAE (https://huggingface.co/docs/transformers/model_doc/vit_mae) and its Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..masks.kinds import Masking
from ..teachers.teacher import PartTeacher, unwrap
from .evolution import Evolution, Teacher, import_host

__all__ = ["apply_to_vit_mae", "trainer_callback"]

STATE = "evolution.pt"
"""Where a checkpoint of the Trainer keeps the evolution."""


def apply_to_vit_mae(model: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let a ViTMAE of Hugging Face mask with `masking`, in place of its own `random_masking(sequence, noise)`.

    The mask ratio stays that of the model's config. Where a call is given `noise`, the mask is that of the noise, as
    ever: the patches with the lowest noise stay.

    Args:
        model: a ViTMAEModel or ViTMAEForPreTraining, wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher that was built from the same model or from its
            encoder, ``model.vit``, or any callable from images to integer labels, [B, N] or, of any size, [B, h, w].
            None for a mask that needs none, and where they come with each batch: ``evolution.see(parts=labels)``.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step, or leave both to
        `trainer_callback`.

    Raises:
        TypeError: where the model is no ViTMAE.
        ValueError: where it has evolving masks already, or the teacher was built for another architecture. At the first
            mask that needs parts, where there are none.

    Examples:
        >>> from transformers import ViTMAEConfig, ViTMAEModel
        >>> from maskevolve import GridMask
        >>> config = ViTMAEConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=1, mask_ratio=0.5)
        >>> model = ViTMAEModel(config)
        >>> evolution = apply_to_vit_mae(model, GridMask())
        >>> model(torch.randn(2, 3, 224, 224)).last_hidden_state.shape  # 98 patches and the class token
        torch.Size([2, 99, 48])

    Source: https://arxiv.org/abs/2111.06377
    """
    model = unwrap(model)
    embeddings: Any = next((module for module in model.modules() if hasattr(module, "random_masking")), None)
    if not (hasattr(model, "base_model") and hasattr(embeddings, "patch_embeddings")):
        raise TypeError(
            f"{type(model).__name__} is no ViTMAE of Hugging Face: pass a ViTMAEForPreTraining or ViTMAEModel"
        )
    encoder = cast(nn.Module, model.base_model)
    of_encoder = isinstance(teacher, PartTeacher) and type(teacher.model.module) is type(encoder)
    where = f"{type(embeddings).__name__}.random_masking without noise"
    evolution = Evolution(encoder, masking, teacher, encoder if of_encoder else model, where)

    def random_masking(module: Any, own: Callable[..., Any], sequence: Tensor, noise: Tensor | None = None) -> Any:
        if noise is not None:
            return own(module, sequence, noise)
        return evolution.mask(sequence, module.config.mask_ratio)

    evolution.watch(embeddings.patch_embeddings)
    evolution.replace(embeddings, "random_masking", random_masking)
    return evolution


def trainer_callback(evolution: Evolution, resume_from_checkpoint: str | None = None) -> Any:
    """What moves an evolution along under transformers' Trainer: ``Trainer(..., callbacks=[trainer_callback(...)])``.

    It sets the epoch before each optimizer step, fractions included, and updates the teacher after each that is not
    skipped. Each checkpoint of the Trainer gets a file `evolution.pt`, from which a resumed run goes on. `alpha` and
    `num_parts` are logged with the loss, in the Trainer's `log_history`, by TensorBoard and by Weights & Biases.

    Args:
        evolution: what `apply_to_vit_mae` returned.
        resume_from_checkpoint: the folder that ``trainer.train(resume_from_checkpoint=...)`` will be given, needed only
            where that does not lie in the output folder of the run.

    Returns:
        A TrainerCallback.

    Raises:
        ImportError: where transformers is not installed.
        FileNotFoundError: when training is resumed from a checkpoint that has no `evolution.pt`.
    """
    transformers = import_host("transformers", "'transformers[torch]'")
    base: Any = transformers.TrainerCallback
    _add_to_logs(transformers.Trainer)

    class EvolutionCallback(base):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 0:
                return
            folder = resume_from_checkpoint or _checkpoint(args, state)
            path = os.path.join(folder, STATE)
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"there is no {path}, but the run is resumed at step {state.global_step}: pass the folder that you "
                    "gave to trainer.train, as in trainer_callback(evolution, resume_from_checkpoint=folder)"
                )
            evolution.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            if not (args.fsdp or args.deepspeed):
                _load_weights(unwrap(model), folder)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            evolution.set_epoch(state.epoch or 0)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            # Accelerate's optimizer skips steps whose float16 gradients overflow.
            if not getattr(optimizer, "step_was_skipped", False):
                evolution.update()

        def for_log(self) -> dict[str, float]:
            alpha, num_parts = getattr(evolution.masking, "alpha", None), getattr(evolution.teacher, "num_parts", None)
            facts = {"alpha": None if alpha is None else round(float(alpha), 4), "num_parts": num_parts}
            return {name: value for name, value in facts.items() if value is not None}

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.should_save:
                torch.save(evolution.state_dict(), os.path.join(_checkpoint(args, state), STATE))

    return EvolutionCallback()


@cache  # once
def _add_to_logs(trainer: Any) -> None:
    """Let the Trainer log what our callbacks know.

    A callback can only add it after it was written to the history, and by the callbacks before it.
    """
    own = trainer.log

    @wraps(own)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "for_log"):
                logs.update(callback.for_log())
        own(self, logs, *args, **kwargs)

    trainer.log = log


def _load_weights(model: Any, folder: str) -> None:
    """Load the weights as `from_pretrained` does.

    The Trainer of transformers 5 leaves most weights of a resumed ViTMAE as they were initialised, for it looks for
    them under other names than it saved them: https://github.com/huggingface/transformers/issues/43701
    """
    is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if hasattr(model, "from_pretrained") and not is_sharded:
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())


def _checkpoint(args: Any, state: Any) -> str:
    """The folder of the Trainer's checkpoint of this step."""
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
