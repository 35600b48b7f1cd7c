"""Pretrain a small masked autoencoder on melodies with masks that evolve from every fourth step to whole notes.

A melody is the spectrogram of tones, [frequencies, steps], whose patches are steps in time: a grid of one axis.

python examples/sound.py   # half a minute on two cores; notes.png at the end
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from patch_mae import PatchMAE
from torch import Tensor
from tqdm import tqdm

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_mae
from maskevolve.viz import evolution_figure

RATE, STEPS, HOP = 4000, 64, 128  # samples a second; patches; samples a patch
FREQUENCIES = 64
PITCHES = 220 * 2 ** (torch.arange(24) / 12)  # hertz, two octaves
SNAPSHOTS = 4


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="default: 12")
    parser.add_argument("--melodies", type=int, default=256, help="melodies an epoch (default: 256)")
    parser.add_argument("--mask-ratio", type=float, default=0.75, help="share of the steps to remove (default: 0.75)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sound"), help="where to write (default: runs/sound)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    model = PatchMAE(FREQUENCIES, (STEPS,), (1,))
    teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=args.epochs, num_parts=(16, 8), decay=0.98)
    evolution = apply_to_mae(model, EvolvingMask(args.epochs), teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    evolution.follow(optimizer)

    shown, losses, snapshots = draw_waves(1, torch.Generator().manual_seed(args.seed + 1)), [], []
    last = max(args.epochs - 1, 1)
    wanted = {round(last * step / (SNAPSHOTS - 1)) for step in range(SNAPSHOTS)}
    for epoch in tqdm(range(args.epochs)):
        evolution.set_epoch(epoch)
        total = 0.0
        batches = spectrograms(draw_waves(args.melodies, generator)).split(32)
        for batch in batches:
            loss = model(batch, args.mask_ratio)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach()) / len(batches)
        losses.append(total)
        if epoch in wanted:
            with torch.no_grad(), evolution.fixed(args.seed):
                model.eval()(spectrograms(shown), args.mask_ratio)
            model.train()
            title = f"epoch {epoch + 1}, alpha {evolution.alpha:.2f}"
            snapshots.append((evolution.last_mask, evolution.last_parts, title))
    args.out.mkdir(parents=True, exist_ok=True)
    figure = evolution_figure(shown[:, None], *map(list, zip(*snapshots, strict=True)), (STEPS,))
    figure.savefig(args.out / "notes.png", dpi=110)
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}; see {args.out / 'notes.png'}")
    return losses


if __name__ == "__main__":
    main()
