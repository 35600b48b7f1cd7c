"""Pretrain a small masked autoencoder on melodies with masks that evolve from every fourth step to whole notes.

A melody is the spectrogram of tones, [frequencies, steps], whose patches are steps in time: a grid of one axis.

python examples/sound.py   # half a minute on two cores; notes.png at the end
"""

from __future__ import annotations

import torch
from patch_mae import PatchMAE, draw, make_parser, train
from torch import Tensor

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_mae

RATE, STEPS, HOP = 4000, 64, 128  # samples a second; patches; samples a patch
FREQUENCIES = 64
PITCHES = 220 * 2 ** (torch.arange(24) / 12)  # hertz, two octaves


def draw_waves(number: int, generator: torch.Generator) -> Tensor:
    """Melodies of about eight notes, each with overtones that fade, [number, samples] in [-1, 1]."""
    time, waves = torch.arange(STEPS * HOP) / RATE, []
    for _ in range(number):
        starts = torch.randint(1, STEPS, (7,), generator=generator).mul(HOP).unique()
        starts = torch.cat([torch.zeros(1, dtype=torch.long), starts])
        note = torch.searchsorted(starts, torch.arange(STEPS * HOP), right=True) - 1
        pitch = PITCHES[torch.randint(len(PITCHES), starts.shape, generator=generator)][note]
        loudness = (0.3 + 0.7 * torch.rand(starts.shape, generator=generator))[note]
        fade = torch.exp(-2 * (time - starts[note] / RATE))
        waves.append(loudness * fade * sum(torch.sin(2 * torch.pi * k * pitch * time) / k for k in (1, 2, 3)) / 2)
    return torch.stack(waves).clamp(-1, 1)


def spectrograms(waves: Tensor) -> Tensor:
    """Logarithm of the power of each frequency in each step, [B, frequencies, steps], about -1 to 1."""
    frames = waves.unfold(1, HOP, HOP) * torch.hann_window(HOP)
    power = torch.fft.rfft(frames, dim=2).abs().square().mT[:, 1 : FREQUENCIES + 1]
    return (power + 1e-3).log() / 7


def main(argv: list[str] | None = None) -> list[float]:
    """Train, draw notes.png, and return the loss of each epoch."""
    parser = make_parser(__doc__, "sound")
    parser.add_argument("--melodies", type=int, default=256, help="melodies an epoch (default: 256)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator, other = (torch.Generator().manual_seed(args.seed + step) for step in range(2))

    model = PatchMAE(FREQUENCIES, (STEPS,), (1,))
    teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=args.epochs, num_parts=(16, 8), decay=0.98)
    evolution = apply_to_mae(model, EvolvingMask(args.epochs), teacher)

    def draw_batches() -> tuple[Tensor, ...]:
        return spectrograms(draw_waves(args.melodies, generator)).split(32)

    shown = draw_waves(1, other)
    losses, points = train(model, evolution, draw_batches, spectrograms(shown), args, 4)
    draw(shown[:, None], points, (STEPS,), losses, args.out / "notes.png")
    return losses


if __name__ == "__main__":
    main()
