"""What moves masks along under a Trainer: transformers' and Lightning's are told the epoch, alpha and the parts."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..teachers.average import unwrap
from .evolution import Evolution, import_host

STATE = "evolution.pt"


def trainer_callback(evolution: Evolution, resume_from_checkpoint: str | None = None) -> Any:
    """What moves an evolution along under transformers' Trainer: ``Trainer(..., callbacks=[trainer_callback(...)])``.

    It sets the epoch before each optimizer step, fractions included, and updates the teacher after each that is not
    skipped. Each checkpoint gets a file `evolution.pt`, from which a resumed run goes on. `alpha` and `num_parts`, the
    mean number of parts of an image, are logged with the loss. After ``evolution.remove()`` it does nothing.

    Args:
        evolution: what any `apply_to_...` returned.
        resume_from_checkpoint: the folder that ``trainer.train(resume_from_checkpoint=...)`` will be given, needed only
            where that does not lie in the output folder of the run.

    Returns:
        A TrainerCallback.

    Raises:
        ImportError: where transformers is not installed.
        FileNotFoundError: when training is resumed from a checkpoint that has no `evolution.pt`.
        ValueError: when the Trainer begins to train another model, such as one that its `model_init` made.
    """
    base: Any = import_host("transformers", "'transformers[torch]'").TrainerCallback

    class EvolutionCallback(base):
        def __reduce__(self) -> Any:
            return trainer_callback, (evolution, resume_from_checkpoint)

        def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _put_first(self)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if evolution.is_removed:
                return
            _put_first(self)
            _check_trained(evolution, model)
            if state.global_step == 0:
                return
            folder = Path(resume_from_checkpoint or _checkpoint(args, state))
            path = folder / STATE
            if not path.exists():
                raise FileNotFoundError(
                    f"there is no {path}, but the run is resumed at step {state.global_step}: pass the folder that "
                    "trainer.train was given, as in trainer_callback(evolution, resume_from_checkpoint=folder)"
                )
            evolution.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            if not (args.fsdp or args.deepspeed):
                _load_missing_weights(unwrap(model), folder)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not evolution.is_removed:
                evolution.set_epoch(state.epoch or 0)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            # Accelerate's optimizer skips steps whose float16 gradients overflow.
            if not evolution.is_removed and not getattr(optimizer, "step_was_skipped", False):
                evolution.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            facts = {} if evolution.is_removed else _facts(evolution)
            for log in (logs, *state.log_history[-1:]):
                log.update(facts)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.should_save and not evolution.is_removed:
                torch.save(evolution.state_dict(), _checkpoint(args, state) / STATE)

    return EvolutionCallback()


def lightning_callback(evolution: Evolution) -> Any:
    """What moves an evolution along under Lightning: ``Trainer(..., callbacks=[lightning_callback(evolution)])``.

    As `trainer_callback`, with the epoch set before each batch, the teacher updated after each step of an optimizer of
    the model (not of a probe beside it), and the evolution within Lightning's checkpoints.

    Args:
        evolution: what any `apply_to_...` returned.

    Returns:
        A Callback, of `lightning.pytorch` and of `pytorch_lightning` alike.

    Raises:
        ImportError: where neither is installed.
        ValueError: when the Trainer begins to train another model.
    """
    # Lightly imports pytorch_lightning. Whoever uses the other one has imported it by now.
    hosts = [sys.modules[name] for name in ("lightning.pytorch", "pytorch_lightning") if sys.modules.get(name)]
    hosts = hosts or [import_host("pytorch_lightning", "pytorch-lightning")]
    base: Any = type("Callback", tuple(host.Callback for host in hosts), {})

    class EvolutionCallback(base):
        state_key = "maskevolve"

        def __init__(self) -> None:
            self.hooks: list[Any] = []

        def __reduce__(self) -> Any:
            return lightning_callback, (evolution,)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.teardown()
            if evolution.is_removed:
                return
            _check_trained(evolution, pl_module)
            weights = set(evolution.student.parameters())
            own = [
                optimizer
                for optimizer in trainer.optimizers
                if any(weights.intersection(group["params"]) for group in optimizer.param_groups)
            ]
            # DeepSpeed's optimizer has other tensors.
            self.hooks = [evolution.follow(optimizer) for optimizer in own or trainer.optimizers]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # An endless loader has infinitely many batches: its epoch stays a whole number.
            if not evolution.is_removed:
                evolution.set_epoch(trainer.current_epoch + batch_idx / trainer.num_training_batches)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            # Not after each batch, for the host waits for the number of parts.
            if evolution.is_removed or (trainer.global_step % trainer.log_every_n_steps and not trainer.is_last_batch):
                return
            for name, value in _facts(evolution).items():
                pl_module.log(name, value, prog_bar=name == "alpha")

        def teardown(self, *_: Any, **__: Any) -> None:
            while self.hooks:
                self.hooks.pop().remove()

        def state_dict(self) -> dict[str, Any]:
            return {} if evolution.is_removed else evolution.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if not evolution.is_removed:
                evolution.load_state_dict(state_dict)

    return EvolutionCallback()


def _facts(evolution: Evolution) -> dict[str, float]:
    facts = {"alpha": evolution.alpha, "num_parts": evolution.num_parts}
    return {name: round(value, 4) for name, value in facts.items() if value is not None}


def _check_trained(evolution: Evolution, trained: nn.Module) -> None:
    """Refuse to train a model without the masks."""
    if all(inner is not evolution.model for inner in trained.modules()):
        raise ValueError(
            f"the Trainer trains a {type(trained).__name__} without the {type(evolution.model).__name__} that "
            "apply_to_... was given, such as a copy, or one that model_init made: give it that very model"
        )


def _put_first(callback: Any) -> None:
    """Let a callback of transformers be called before those that report the logs.

    A callback is not told the Trainer: the CallbackHandler is what called the method that calls this.
    """
    handler: Any = sys._getframe(2).f_locals.get("self")
    if callback in getattr(handler, "callbacks", []):
        # A new list, for the handler goes through its own now.
        handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]


def _load_missing_weights(model: Any, folder: Path) -> None:
    """Load the weights of a checkpoint that the Trainer did not find, as `from_pretrained` does.

    The Trainer of transformers 5 looks for most weights of a ViTMAE under other names than it saved them:
    https://github.com/huggingface/transformers/issues/43701
    """
    saved: set[str] = set()
    for path in folder.glob("model*.safetensors"):  # not those of adapters
        with import_host("safetensors", "safetensors").safe_open(path, "pt") as file:
            saved.update(file.keys())
    missing = [name for name in model.state_dict() if name not in saved] if saved else []
    is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if missing and hasattr(model, "from_pretrained") and not is_sharded:
        loaded = type(model).from_pretrained(folder).state_dict()
        model.load_state_dict({name: loaded[name] for name in missing}, strict=False)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of the Trainer's checkpoint of this step."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
