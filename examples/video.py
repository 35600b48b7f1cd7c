"""Pretrain a small masked autoencoder on clips of moving shapes with tubes that evolve from a grid to parts.

python examples/video.py                      # about a minute on two cores; tubes.png at the end
python examples/video.py --parts space-time   # parts that move with the shapes, in place of tubes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from patch_mae import PatchMAE
from torch import Tensor
from tqdm import tqdm

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher, TubeMask, TubePartitioner
from maskevolve.integrations import apply_to_mae
from maskevolve.viz import evolution_figure

FRAMES, SIDE, PATCH = 16, 48, (2, 6, 6)
GRID = (8, 8, 8)
SHAPES = 3
SNAPSHOTS = 3


def draw_clips(number: int, generator: torch.Generator) -> Tensor:
    """Discs and squares that move over a dark background, [number, 3, frames, side, side] in [0, 1]."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *shape, generator=generator)

    time = torch.linspace(-0.5, 0.5, FRAMES).view(1, 1, FRAMES, 1, 1)
    axis = torch.linspace(0, 1, SIDE)
    clips = draw(0, 0.25, 3, 1, 1, 1).expand(-1, -1, FRAMES, SIDE, SIDE).clone()
    for _ in range(SHAPES):
        row, column = (
            axis_ - draw(0.15, 0.85, 1, 1, 1, 1) - draw(-0.4, 0.4, 1, 1, 1, 1) * time
            for axis_ in (axis.view(1, 1, 1, SIDE, 1), axis.view(1, 1, 1, 1, SIDE))
        )
        is_disc, radius = draw(0, 1, 1, 1, 1, 1) < 0.5, draw(0.12, 0.25, 1, 1, 1, 1)
        inside = torch.where(is_disc, row**2 + column**2 < radius**2, torch.maximum(row.abs(), column.abs()) < radius)
        clips = torch.where(inside, draw(0.3, 1, 3, 1, 1, 1), clips)
    return clips


def main(argv: list[str] | None = None) -> list[float]:
    """Train, draw tubes.png, and return the loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=("tubes", "space-time"), default="tubes")
    parser.add_argument("--epochs", type=int, default=12, help="default: 12")
    parser.add_argument("--clips", type=int, default=96, help="clips an epoch (default: 96)")
    parser.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches to remove (default: 0.75)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/video"), help="where to write (default: runs/video)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    model = PatchMAE(3, (FRAMES, SIDE, SIDE), PATCH)
    mask, partitioner = EvolvingMask(args.epochs), GraphCutPartitioner()
    if args.parts == "tubes":
        mask, partitioner = TubeMask(mask), TubePartitioner(partitioner)
    teacher = PartTeacher(model, partitioner, total_epochs=args.epochs, num_parts=(12, 5), decay=0.98)
    evolution = apply_to_mae(model, mask, teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    evolution.follow(optimizer)

    shown, losses, snapshots = draw_clips(1, torch.Generator().manual_seed(args.seed + 1)), [], []
    last = max(args.epochs - 1, 1)
    wanted = {round(last * step / (SNAPSHOTS - 1)) for step in range(SNAPSHOTS)}
    for epoch in tqdm(range(args.epochs)):
        evolution.set_epoch(epoch)
        total = 0.0
        batches = draw_clips(args.clips, generator).split(16)
        for clips in batches:
            loss = model(clips, args.mask_ratio)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach()) / len(batches)
        losses.append(total)
        if epoch in wanted:
            with torch.no_grad(), evolution.fixed(args.seed):
                model.eval()(shown, args.mask_ratio)
            model.train()
            title = f"epoch {epoch + 1}, alpha {evolution.alpha:.2f}"
            snapshots.append((evolution.last_mask, evolution.last_parts, title))
    args.out.mkdir(parents=True, exist_ok=True)
    evolution_figure(shown, *map(list, zip(*snapshots, strict=True)), GRID).savefig(args.out / "tubes.png", dpi=110)
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}; see {args.out / 'tubes.png'}")
    return losses


if __name__ == "__main__":
    main()
