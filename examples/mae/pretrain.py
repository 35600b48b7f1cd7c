"""Run the official MAE's own main_pretrain.py, or a fork's, with evolving masks. Nothing of it is edited.

python examples/mae/pretrain.py --mae ~/mae -- --data_path ~/imagenet --epochs 400 --batch_size 64
torchrun --nproc_per_node 8 examples/mae/pretrain.py --mae ~/mae -- --data_path ~/imagenet --resume checkpoint-20.pth

Every flag after the lone -- is the fork's own. Masks follow the learning rate's schedule, the teacher follows the
optimizer, and both are saved in the fork's checkpoints. With --mask own, the fork's own masks run on current libraries.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import bridges

from maskevolve.integrations import Evolution, apply_to_mae

sys.path.append(str(Path(__file__).parents[1]))
import launch


def evolve(options: argparse.Namespace) -> None:
    """Put masks into the three functions of MAE that know of model, epoch and checkpoint, whatever calls them."""
    misc, lr_sched = import_module("util.misc"), import_module("util.lr_sched")
    load_model, save_model, adjust_learning_rate = misc.load_model, misc.save_model, lr_sched.adjust_learning_rate
    evolution: Evolution  # made in load, the last thing that MAE does before it trains
    shown = None

    def load(*args: Any, **kwargs: Any) -> None:
        nonlocal evolution
        given = inspect.signature(load_model).bind(*args, **kwargs).arguments
        flags, model, optimizer = (given[name] for name in ("args", "model_without_ddp", "optimizer"))
        evolution = launch.evolve(apply_to_mae, model, optimizer, flags.epochs, options)
        load_model(*args, **kwargs)
        if flags.resume and not flags.resume.startswith("https") and (extra := launch.saved_extra(flags.resume)):
            evolution.load_state_dict(extra["evolution"])
            launch.set_random_states(extra["random"])

    def save(*args: Any, **kwargs: Any) -> None:
        extra = {"evolution": evolution.state_dict(), "random": launch.random_states()}
        with launch.saving_with(extra):
            save_model(*args, **kwargs)

    def adjust(optimizer: Any, epoch: float, *args: Any, **kwargs: Any) -> Any:
        nonlocal shown
        evolution.set_epoch(epoch)
        if shown != int(epoch):
            shown = int(epoch)
            launch.report(evolution, epoch)
        return adjust_learning_rate(optimizer, epoch, *args, **kwargs)

    misc.load_model, misc.save_model, lr_sched.adjust_learning_rate = load, save, adjust


def main(argv: list[str] | None = None) -> None:
    ours, theirs = launch.split(sys.argv[1:] if argv is None else argv)
    parser = launch.make_parser(__doc__)
    parser.add_argument("--mae", type=Path, required=True, help="folder of the official MAE or of a fork")
    parser.add_argument("--script", default="main_pretrain.py", help="in that folder (default: main_pretrain.py)")
    options = parser.parse_args(ours)
    folder = options.mae.expanduser().resolve()
    if not (folder / options.script).is_file():
        parser.error(
            f"--mae {options.mae} holds no {options.script}: git clone https://github.com/facebookresearch/mae"
        )
    sys.path.insert(0, str(folder))
    bridges.build()
    if options.mask != "own":
        evolve(options)
    launch.run(folder / options.script, theirs)


if __name__ == "__main__":
    main()
