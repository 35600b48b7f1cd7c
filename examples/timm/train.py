"""Run timm's own train.py with evolving patch dropout. Nothing of it is edited.

python examples/timm/train.py --script ~/pytorch-image-models/train.py -- ~/imagenet --model vit_base_patch16_224 \
    --model-kwargs patch_drop_rate=0.75
torchrun --nproc_per_node 8 examples/timm/train.py --script ... -- ...

Every flag after the lone -- is the script's own, --resume among them. The patches to drop follow the epoch, the teacher
follows the optimizer, and both are saved in the script's checkpoints. Every epoch draws from a seed of its own, so that
a resumed run draws the same masks and batches.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskevolve.integrations import apply_to_timm

sys.path.append(str(Path(__file__).parents[1]))
import launch


def evolve(options: argparse.Namespace) -> None:
    """Patch the functions of timm that its script makes the optimizer, the scheduler and the checkpoints with."""
    # Imported here, after the folder of the script is on the path: it may hold a timm of its own.
    import timm.models
    import timm.optim
    import timm.scheduler
    import timm.utils

    with suppress(ImportError):  # not in older versions
        import timm.task

    model: nn.Module
    resumed: str | None = None
    create_optimizer, create_scheduler = timm.optim.create_optimizer_v2, timm.scheduler.create_scheduler_v2
    save = timm.utils.CheckpointSaver._save

    def optimizer_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal model
        # The first ViT in the module: with distillation, the student is inside another module.
        vits = [part for part in module.modules() if hasattr(part, "patch_drop")]
        if not vits:
            raise SystemExit(f"{type(module).__name__} has no patch dropout: choose a --model that is a ViT")
        model = vits[0]
        return create_optimizer(module, *args, **kwargs)

    def resume_with(resume: Any) -> Any:
        def resume_and_remember(target: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal resumed
            resumed = path
            return resume(target, path, *args, **kwargs)

        return resume_and_remember

    def scheduler_of(optimizer: Any, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        """The script makes the scheduler last: by then the weights are loaded, and are the same on all ranks."""
        scheduler, epochs = create_scheduler(optimizer, *args, **kwargs)
        if scheduler is None:
            raise SystemExit("with --sched none, timm tells nobody the epoch: take --sched constant")
        evolution = launch.evolve(apply_to_timm, model, optimizer, epochs, options)
        if resumed and (extra := launch.saved_extra(resumed)):
            evolution.load_state_dict(extra["evolution"])
        steps, step, step_update = kwargs["updates_per_epoch"], scheduler.step, scheduler.step_update
        seed = torch.initial_seed() % (1 << 31)

        def begin(epoch: int) -> None:
            evolution.set_epoch(epoch)
            timm.utils.random_seed((seed + 1_000_003 * epoch) % (1 << 31))

        def epoch_ends(epoch: int, *args: Any, **kwargs: Any) -> None:
            step(epoch, *args, **kwargs)
            begin(epoch)
            if epoch < epochs:
                launch.report(evolution, epoch)

        def update_ends(num_updates: int, *args: Any, **kwargs: Any) -> None:
            step_update(num_updates, *args, **kwargs)
            evolution.set_epoch(num_updates / steps)
            if num_updates % steps == 0:  # a resumed run with a schedule by updates calls this first, not `step`
                begin(num_updates // steps)

        def save_with_masks(self: Any, *args: Any, **kwargs: Any) -> None:
            with launch.saving_with({"evolution": evolution.state_dict()}):
                save(self, *args, **kwargs)

        timm.utils.CheckpointSaver._save = save_with_masks
        scheduler.step, scheduler.step_update = epoch_ends, update_ends
        begin(0)
        launch.report(evolution, 0)
        return scheduler, epochs

    timm.optim.create_optimizer_v2, timm.scheduler.create_scheduler_v2 = optimizer_of, scheduler_of
    timm.models.resume_checkpoint = resume_with(timm.models.resume_checkpoint)
    if hasattr(timm, "task"):
        timm.task.resume_task_checkpoint = resume_with(timm.task.resume_task_checkpoint)


def main(argv: list[str] | None = None) -> None:
    ours, theirs = launch.split(sys.argv[1:] if argv is None else argv)
    parser = launch.make_parser(__doc__)
    parser.add_argument("--script", type=Path, required=True, help="train.py of a checkout of pytorch-image-models")
    options = parser.parse_args(ours)
    script = options.script.expanduser().resolve()
    if not script.is_file():
        parser.error(f"--script {options.script} is no file: take train.py from a checkout of pytorch-image-models")
    sys.path.insert(0, str(script.parent))
    if options.mask != "own":
        evolve(options)
    launch.run(script, theirs)


if __name__ == "__main__":
    main()
