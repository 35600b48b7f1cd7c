"""What the launchers share: options, masks with their teacher, random states, and how the script of another is run."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from named_masks import MASKS
from torch import distributed as dist
from torch import nn
from torch.nn import parallel

from maskevolve import GraphCutPartitioner, PartTeacher
from maskevolve.integrations import Evolution


class CPUDataParallel(parallel.DistributedDataParallel):
    """DistributedDataParallel on a CPU: the GPU that scripts pass as `device_ids` is ignored."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)


if not torch.cuda.is_available():
    parallel.DistributedDataParallel = CPUDataParallel

# Checkpoints hold the script's arguments.
torch.serialization.add_safe_globals([argparse.Namespace])


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every launcher; those of the script itself come after a lone ``--``."""
    usage = "%(prog)s [options] -- [every option of the script itself]"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--mask", choices=[*MASKS, "own"], default="evolving", help="own: what the script does without us")
    add("--num-parts", type=int, nargs=2, default=(40, 10), help="in the first and the last epoch (default: 40 10)")
    add("--ema-decay", type=float, default=0.9999, help="of the teacher, a step (short runs want less than 0.9999)")
    read = "attention layers that the teacher reads (default: the middle third, every second patch)"
    add("--layers", type=int, nargs="+", help=read)
    return parser


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's options and the script's."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def evolve(
    apply: Callable[..., Evolution],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: float,
    options: argparse.Namespace,
) -> Evolution:
    """Give a model the masks that the options ask for; their teacher follows the optimizer."""
    masking = MASKS[options.mask](epochs)
    teacher = None
    if options.mask in ("part", "evolving"):
        settings = {"num_parts": tuple(options.num_parts), "decay": options.ema_decay}
        settings["layers"] = options.layers or "middle"
        teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=epochs, **settings)
    evolution = apply(model, masking, teacher)
    evolution.follow(optimizer)
    return evolution


def report(evolution: Evolution, epoch: float) -> None:
    """Print one line about the masks of an epoch, on the first rank."""
    if dist.is_initialized() and dist.get_rank():
        return
    alpha, teacher = getattr(evolution.masking, "alpha", None), evolution.teacher
    facts = [type(evolution.masking).__name__]
    facts += [] if alpha is None else [f"alpha {float(alpha):.3f}"]
    facts += [] if teacher is None else [f"{teacher.num_parts} parts"]
    print(f"masks of epoch {epoch:g}: {', '.join(facts)}", flush=True)


def random_states() -> list[dict[str, Any]]:
    """The random states of torch, numpy and Python on every rank, so that a resumed run draws the same."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that scripts draw from
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }
    if not dist.is_initialized():
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def set_random_states(states: list[dict[str, Any]]) -> None:
    """Restore the random states of this rank, unless the run is resumed with another number of ranks."""
    if len(states) != (dist.get_world_size() if dist.is_initialized() else 1):
        return
    state = states[dist.get_rank() if dist.is_initialized() else 0]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def saving_with(extra: dict[str, Any]) -> Iterator[None]:
    """Within the context, every checkpoint that is saved also holds `extra`, under the key "maskevolve"."""
    save = torch.save
    with patch("torch.save", lambda state, *args, **kwargs: save({**state, "maskevolve": extra}, *args, **kwargs)):
        yield


def saved_extra(path: str) -> dict[str, Any] | None:
    """What `saving_with` added to a checkpoint."""
    torch.serialization.add_safe_globals([argparse.Namespace])  # again: timm removes it after each load
    extra: dict[str, Any] | None = torch.load(path, map_location="cpu", weights_only=True).get("maskevolve")
    if extra is None:
        print(f"{path} was saved without evolving masks: the teacher starts as a copy of the model in it")
    return extra


def run(script: Path, argv: list[str]) -> None:
    """Run a script as Python would, without its asserts: MAE's script asserts a version of timm of 2020."""
    module = ModuleType("__main__")
    module.__file__ = str(script)
    code = compile(script.read_text(), str(script), "exec", optimize=1)
    with patch.dict(sys.modules, {"__main__": module}), patch.object(sys, "argv", [str(script), *argv]):
        exec(code, module.__dict__)
