"""A training step of an MAE with our masks and teacher, and in the published way, against random masks.

python benchmarks/step.py --device cpu          # a small ViT
python benchmarks/step.py --device cuda         # ViT-B/16, 224 pixels, bf16
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from tqdm import tqdm

from maskevolve import EMPartitioner, EvolvingMask, GraphCutPartitioner, PartTeacher, RandomMask
from maskevolve.attention import attention_modules
from maskevolve.masks import Masking

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mae import MaskedAutoencoder

RANDOM = "random masks"
MODELS = {  # image size, patch size, width, depth, heads
    "small": (96, 8, 128, 6, 4),
    "base": (224, 16, 768, 12, 12),
}


class Published(nn.Module):
    """The published way: an EMA forward with explicit attention in all layers, then EM."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.teacher = PartTeacher(vit, EMPartitioner(), total_epochs=100)
        for _, module in attention_modules(self.teacher.model.module):
            module.fused_attn = False

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(images)

    def update(self, vit: nn.Module) -> None:
        self.teacher.update(vit)


class Step:
    """One step of training: parts, masks, forward, backward, optimizer, teacher; in bfloat16 on a GPU."""

    def __init__(self, size: tuple[int, ...], masking: Masking, images: Tensor) -> None:
        self.bfloat16 = self.teacher_in_bfloat16 = images.is_cuda
        self.model = MaskedAutoencoder(masking, *size).to(images.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.images = images
        self.teacher: PartTeacher | Published | None = None

    def teach(self, teacher: PartTeacher | Published) -> Step:
        self.teacher = teacher.to(self.images.device)
        return self

    def __call__(self) -> None:
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.teacher_in_bfloat16):
            parts = None if self.teacher is None else self.teacher(self.images)
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.model(self.images, 0.75, parts)[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.model.encoder)


def steps(size: tuple[int, ...], images: Tensor) -> dict[str, Callable[[], None]]:
    def evolving() -> Step:
        return Step(size, EvolvingMask(100).set_epoch(50), images)

    def taught(share: float, swap_precision: bool = False) -> Step:
        step, layers = evolving(), range(max(1, round(share * size[3])))
        step.teacher_in_bfloat16 ^= swap_precision
        teacher = PartTeacher(step.model.encoder, GraphCutPartitioner(), total_epochs=100, layers=layers)
        return step.teach(teacher.set_epoch(50))

    published = evolving()
    return {
        RANDOM: Step(size, RandomMask(), images),
        "evolving, all layers": taught(1),
        f"evolving, all layers, teacher in {'float32' if images.is_cuda else 'bfloat16'}": taught(1, True),
        "evolving, first half of the layers": taught(0.5),
        "evolving, first layer": taught(0),
        "published: all layers unfused, EM": published.teach(Published(published.model.encoder)),
    }


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, help="small on a CPU, base on a GPU if not given")
    parser.add_argument("--batch-size", type=int, help="16 on a CPU, 256 on a GPU if not given")
    args = parser.parse_args()
    model = args.model or ("base" if args.device == "cuda" else "small")
    batch_size = args.batch_size or (256 if args.device == "cuda" else 16)
    size = MODELS[model]
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, size[0], size[0], device=args.device)
    with tqdm(total=1, desc="a step, in every way") as bar:
        rows = common.compare(steps(size, images), RANDOM, args.device)
        bar.update()
    shown = {f"{model}, {batch_size} images": [{**row, "ours": "evolving" in row["name"]} for row in rows]}
    figure = common.bars(shown, f"time against {RANDOM}")
    common.save("step", args.device, rows, figure, baseline=RANDOM, model=model, batch=batch_size)


if __name__ == "__main__":
    main()
