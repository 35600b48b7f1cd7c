"""What a teacher should read from a ViT: how well its parts agree with people's, at each stage of training.

python benchmarks/teachers.py --data ../shared/data          # trains for an hour and a half on 2 cores, once

FOLDER holds `tinyimagenet20/train` (torchvision's ImageFolder layout) to train a small MAE on with random masks, and
pictures with people's label maps in `bsds/val`, in the layout of `segmented.py`. Encoders are kept in --models, so that
a run that was stopped goes on with the stages that are there.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from matplotlib.figure import Figure
from segmented import Labels, read_folder
from sklearn.metrics import adjusted_rand_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, normalize
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm, trange

from maskevolve import EMPartitioner, GraphCutPartitioner, PartTeacher, RandomMask
from maskevolve.teachers import attention_affinity, token_affinity

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mae import MaskedAutoencoder

DEFAULT = "tokens before the first block: the default"
SIZE, PATCH, WIDTH, DEPTH, HEADS = 64, 8, 128, 6, 4
SEEN, GRID, NUM_PARTS, BATCH = 128, 16, 10, 16  # pictures are cut at 128 pixels
DRAWN = 256  # pixels of the people's label maps
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet

Source = Callable[[Tensor], Tensor]


def train(data: Path, stages: list[int], models: Path) -> None:
    """Write the encoder of a small MAE at each stage, in epochs; random masks, random crops and flips."""
    models.mkdir(parents=True, exist_ok=True)
    if all((models / f"epoch{stage}.pt").exists() for stage in stages):
        return
    torch.manual_seed(0)
    images = torch.stack([v2.functional.pil_to_tensor(image.convert("RGB")) for image, _ in ImageFolder(data)])
    crop = v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0), antialias=True)  # one for a batch: it costs less
    model = MaskedAutoencoder(RandomMask(), SIZE, PATCH, WIDTH, DEPTH, HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 500))
    for epoch in trange(max(stages) + 1, desc="epochs of training"):
        if epoch in stages:
            torch.save(model.encoder.state_dict(), models / f"epoch{epoch}.pt")
        for index in torch.randperm(len(images)).split(64)[:-1]:
            batch = crop(images[index]).float() / 255
            flipped = torch.rand(len(batch)) < 0.5
            batch[flipped] = batch[flipped].flip(-1)
            loss = model(v2.functional.normalize(batch, MEAN, STD), 0.75, None)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()


def read_encoder(path: Path, device: str) -> nn.Module:
    vit = VisionTransformer(SIZE, PATCH, num_classes=0, global_pool="", embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    vit.load_state_dict(torch.load(path, weights_only=True))
    vit.set_input_size(img_size=SEEN)
    return vit.to(device).eval()


def sources(vit: nn.Module) -> dict[str, Source]:
    """Images to an affinity, by what is read."""
    return {
        DEFAULT: partial(token_affinity, vit),
        **{f"tokens after block {n}": partial(deep_tokens, vit, n) for n in (1, 2, 3, 5)},
        **{f"keys of block {n}": partial(keys, vit, n - 1) for n in (1, 4)},
        **{f"attention of layer {n}": partial(attention_affinity, vit, layers=[n - 1]) for n in (1, 2, 3, 6)},
        "attention of all layers: published": partial(attention_affinity, vit),
        "attention of all layers and tokens": lambda images: blend(attention_affinity(vit, images), images, vit),
        "no model: mean colours": colours,
    }


@torch.no_grad()
def deep_tokens(vit: nn.Module, block: int, images: Tensor) -> Tensor:
    """As `token_affinity`, after more blocks."""
    x = vit._pos_embed(vit.patch_embed(images))
    return cosine(vit.blocks[block].norm1(vit.blocks[:block](x))[:, 1:])


@torch.no_grad()
def keys(vit: nn.Module, block: int, images: Tensor) -> Tensor:
    x = vit.blocks[:block](vit._pos_embed(vit.patch_embed(images)))
    block = vit.blocks[block]
    return cosine(block.attn.qkv(block.norm1(x)).chunk(3, -1)[1][:, 1:])


def cosine(x: Tensor) -> Tensor:
    x = normalize(x - x.mean(1, keepdim=True), dim=2)
    return x @ x.mT


def blend(attention: Tensor, images: Tensor, vit: nn.Module) -> Tensor:
    attention, tokens = attention + attention.mT, token_affinity(vit, images).clamp(min=0)
    return attention / attention.mean((1, 2), keepdim=True) + tokens / tokens.mean((1, 2), keepdim=True)


def colours(images: Tensor) -> Tensor:
    return cosine(avg_pool2d(images, PATCH).flatten(2).mT)


def teachers(vit: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Images to parts."""
    cut, options = GraphCutPartitioner(NUM_PARTS), {"total_epochs": 1, "num_parts": (NUM_PARTS, NUM_PARTS)}
    default = PartTeacher(vit, cut, **options)

    def in_bfloat16(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return default(images)

    return {
        **{name: lambda x, read=read: cut(read(x), images=x) for name, read in sources(vit).items()},
        "the default, in bfloat16": in_bfloat16,
        "the default, edges from the affinity": lambda images: cut(token_affinity(vit, images)),
        "published, EM": PartTeacher(vit, EMPartitioner(), layers=None, **options),
        DEFAULT: default,
    }


def score(teacher: Callable[[Tensor], Tensor], images: Tensor, people: list[list[Labels]]) -> list[float]:
    """Adjusted Rand index of each picture, over its pixels; the mean over people."""
    parts = teacher(images).view(-1, GRID, GRID).cpu().numpy()
    pixels = parts.repeat(DRAWN // GRID, 1).repeat(DRAWN // GRID, 2)
    return [
        float(np.mean([adjusted_rand_score(person.ravel(), one.ravel()) for person in of_one]))
        for one, of_one in zip(pixels, people, strict=True)
    ]


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 3, 10, 30, 100], help="epochs of training")
    parser.add_argument("--models", type=Path, default=Path("runs/teachers"), help="default: runs/teachers")
    args = parser.parse_args()
    train(args.data / "tinyimagenet20/train", args.stages, args.models)
    pictures = read_folder(args.data / "bsds/val", DRAWN)
    images = interpolate(torch.stack([picture.image for picture in pictures]), (SEEN, SEEN), mode="area")
    images = v2.functional.normalize(images, MEAN, STD).to(args.device)
    people, found = [picture.people for picture in pictures], defaultdict(dict)
    for stage in tqdm(args.stages, desc="stages"):
        by_name = teachers(read_encoder(args.models / f"epoch{stage}.pt", args.device))
        for name, teacher in tqdm(by_name.items(), leave=False):
            torch.manual_seed(0)  # EM starts from random means
            found[name][stage] = score(teacher, images, people)
    rows = common.compare({name: partial(f, images[:BATCH]) for name, f in by_name.items()}, DEFAULT, args.device)
    for row in rows:
        for stage, scores in found[row["name"]].items():
            row[f"index_{stage}"] = float(np.mean(scores))
            row[f"error_{stage}"] = float(np.std(scores) / len(scores) ** 0.5)
    settings = {"pictures": "BSDS500 val", "batch": BATCH, "images": len(images), "num_parts": NUM_PARTS}
    common.save("teachers", args.device, rows, draw(rows, args.stages), baseline=DEFAULT, **settings)


def draw(rows: list[common.Row], stages: list[int]) -> Figure:
    """Agreement against training, a line for each source; the default in orange."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ax = figure.subplots()
    for index, row in enumerate(rows):
        ours = row["name"] == DEFAULT
        style = {"color": "tab:orange", "linewidth": 3} if ours else {"marker": "os^"[index % 3], "linewidth": 0.8}
        ax.plot(range(len(stages)), [row[f"index_{stage}"] for stage in stages], label=row["name"], **style)
    ax.set_xticks(range(len(stages)), stages)
    ax.set(xlabel="epochs of training", ylabel="adjusted Rand index")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main()
