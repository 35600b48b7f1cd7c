"""A training step of an MAE with our masks and teacher, and in the published way, against random masks.

python benchmarks/step.py --device cpu          # a small ViT
python benchmarks/step.py --device cuda         # ViT-B/16, 224 pixels, bf16
python benchmarks/step.py --profile             # where the time of the default goes, operator by operator
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from maskevolve import EMPartitioner, EvolvingMask, GraphCutPartitioner, PartTeacher, RandomMask
from maskevolve.masks import Masking
from maskevolve.teachers import attention_affinity, token_affinity
from maskevolve.teachers.trial import attention_modules

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mae import MaskedAutoencoder

RANDOM = "random masks"
MODELS = {  # image size, patch size, width, depth, heads, depth of the decoder
    "small": (96, 8, 128, 6, 4, 2),
    "base": (224, 16, 768, 12, 12, 8),
}
READ = {  # layers, and the stride of the patches, that the teacher reads
    "evolving": ("middle", 2),  # the default
    "evolving, tokens before the first block": ("tokens", 1),
    "evolving, attention of the middle, all patches": ("middle", 1),
    "evolving, attention of all layers": (None, 1),
}
PUBLISHED = "published: all layers unfused, EM"
PROFILED = 3  # steps, after as many to warm up
LEAST = 0.01  # milliseconds of an operator in either step, to be listed


class Published(nn.Module):
    """The published way: an EMA forward with explicit attention in all layers, then EM."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.teacher = PartTeacher(vit, EMPartitioner(), total_epochs=100, layers=None)
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

    def taught(read: tuple[Any, int], swap_precision: bool = False) -> Step:
        step = evolving()
        step.teacher_in_bfloat16 ^= swap_precision
        options = {"total_epochs": 100, "layers": read[0], "stride": read[1]}
        return step.teach(PartTeacher(step.model.encoder, GraphCutPartitioner(), **options).set_epoch(50))

    published = evolving()
    return {
        RANDOM: Step(size, RandomMask(), images),
        **{name: taught(read) for name, read in READ.items()},
        f"evolving, teacher in {'float32' if images.is_cuda else 'bfloat16'}": taught(READ["evolving"], True),
        PUBLISHED: published.teach(Published(published.model.encoder)),
    }


def arithmetic(size: tuple[int, ...]) -> dict[str, float]:
    """Work in the matrix products of a step against that with random masks: what no kernel saves."""

    def count(function: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    model = MaskedAutoencoder(RandomMask(), *size)
    images = torch.randn(1, 3, size[0], size[0])
    step = count(lambda: model(images, 0.75, None)[0].backward())

    def read(layers: Any, stride: int) -> Tensor:
        if layers == "tokens":
            return token_affinity(encoder, images, stride)
        return attention_affinity(encoder, images, layers, stride)

    encoder = model.encoder
    attention_modules(encoder)  # which tries the model, once
    ratios = {name: 1 + count(lambda way=way: read(*way)) / step for name, way in READ.items()}
    return {RANDOM: 1.0, **ratios, PUBLISHED: ratios["evolving, attention of all layers"]}


def differences(ways: dict[str, Callable[[], None]], device: str) -> list[common.Row]:
    """A row for all operators and one for each: milliseconds of a step with random masks, and of one by default."""
    random, evolving = (spent(ways[name], device) for name in (RANDOM, "evolving"))
    sums = [("all", sum(random.values()), sum(evolving.values()))]
    each = [(name, random[name], evolving[name]) for name in random | evolving]
    each = sorted((row for row in each if max(row[1:]) >= LEAST), key=lambda row: row[1] - row[2])
    return [
        {"name": name, "random_ms": before, "evolving_ms": after, "difference_ms": after - before}
        for name, before, after in sums + each
    ]


def spent(step: Callable[[], None], device: str) -> Counter[str]:
    """Milliseconds of a step in each operator alone: of the processor, or of the kernels that it starts on a GPU.

    Kernels that no operator starts, as those of Triton, go by their own names.
    """
    for _ in range(PROFILED):
        step()
    with profile() as record:
        for _ in range(PROFILED):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    microseconds = Counter[str]()
    for event in record.events():
        if device == "cpu":
            microseconds[event.name] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                microseconds[event.name] += kernel.duration
                microseconds[kernel.name] -= kernel.duration  # which comes again, as an event of the GPU
        elif not event.is_user_annotation:
            microseconds[event.name] += event.time_range.elapsed_us()
    return Counter({name: time / 1e3 / PROFILED for name, time in microseconds.items()})


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, help="small on a CPU, base on a GPU if not given")
    parser.add_argument("--batch-size", type=int, help="16 on a CPU, 256 on a GPU if not given")
    parser.add_argument("--profile", action="store_true", help="write step_profile.json instead")
    args = parser.parse_args()
    model = args.model or ("base" if args.device == "cuda" else "small")
    batch_size = args.batch_size or (256 if args.device == "cuda" else 16)
    size = MODELS[model]
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, size[0], size[0], device=args.device)
    if args.profile:
        rows = differences(steps(size, images), args.device)
        common.save("step_profile", args.device, rows, None, model=model, batch=batch_size)
        return
    with tqdm(total=1, desc="a step, in every way") as bar:
        rows = common.compare(steps(size, images), RANDOM, args.device)
        bar.update()
    products = arithmetic(MODELS["base"])
    rows = [{**row, "products_of_vit_b_16": products.get(row["name"])} for row in rows]
    shown = {f"{model}, {batch_size} images": [{**row, "ours": "evolving" in row["name"]} for row in rows]}
    figure = common.bars(shown, f"time against {RANDOM}")
    common.save("step", args.device, rows, figure, baseline=RANDOM, model=model, batch=batch_size)


if __name__ == "__main__":
    main()
