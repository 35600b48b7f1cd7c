"""Pretrain a small masked autoencoder on clips of moving shapes with tubes that evolve from a grid to parts.

python examples/video.py                      # about a minute on two cores; tubes.png at the end
python examples/video.py --parts space-time   # parts that move with the shapes, in place of tubes
"""

from __future__ import annotations

import torch
from patch_mae import PatchMAE, draw, make_parser, train
from torch import Tensor

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher, TubeMask, TubePartitioner
from maskevolve.integrations import apply_to_mae

FRAMES, SIDE, PATCH = 16, 48, (2, 6, 6)
GRID = (8, 8, 8)
SHAPES = 3


def draw_clips(number: int, generator: torch.Generator) -> Tensor:
    """Discs and squares that move over a dark background, [number, 3, frames, side, side] in [0, 1]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *shape, generator=generator)

    time = torch.linspace(-0.5, 0.5, FRAMES).view(1, 1, FRAMES, 1, 1)
    axis = torch.linspace(0, 1, SIDE)
    clips = uniform(0, 0.25, 3, 1, 1, 1).expand(-1, -1, FRAMES, SIDE, SIDE).clone()
    for _ in range(SHAPES):
        row, column = (
            axis_ - uniform(0.15, 0.85, 1, 1, 1, 1) - uniform(-0.4, 0.4, 1, 1, 1, 1) * time
            for axis_ in (axis.view(1, 1, 1, SIDE, 1), axis.view(1, 1, 1, 1, SIDE))
        )
        is_disc, radius = uniform(0, 1, 1, 1, 1, 1) < 0.5, uniform(0.12, 0.25, 1, 1, 1, 1)
        inside = torch.where(is_disc, row**2 + column**2 < radius**2, torch.maximum(row.abs(), column.abs()) < radius)
        clips = torch.where(inside, uniform(0.3, 1, 3, 1, 1, 1), clips)
    return clips


def main(argv: list[str] | None = None) -> list[float]:
    """Train, draw tubes.png, and return the loss of each epoch."""
    parser = make_parser(__doc__, "video")
    parser.add_argument("--parts", choices=("tubes", "space-time"), default="tubes")
    parser.add_argument("--clips", type=int, default=96, help="clips an epoch (default: 96)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator, other = (torch.Generator().manual_seed(args.seed + step) for step in range(2))

    model = PatchMAE(3, (FRAMES, SIDE, SIDE), PATCH)
    mask, partitioner = EvolvingMask(args.epochs), GraphCutPartitioner()
    if args.parts == "tubes":
        mask, partitioner = TubeMask(mask), TubePartitioner(partitioner)
    teacher = PartTeacher(model, partitioner, total_epochs=args.epochs, num_parts=(12, 5), decay=0.98)
    evolution = apply_to_mae(model, mask, teacher)

    shown = draw_clips(1, other)
    losses, points = train(model, evolution, lambda: draw_clips(args.clips, generator).split(16), shown, args, 3)
    draw(shown, points, GRID, losses, args.out / "tubes.png")
    return losses


if __name__ == "__main__":
    main()
