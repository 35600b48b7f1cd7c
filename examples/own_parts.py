"""Pretrain a small masked autoencoder whose masks hide whole regions of your own segmentation.

Label maps go through torchvision's transforms together with their images, so that crops and flips act on both.

python examples/own_parts.py                                          # photographs inside scikit-image and scikit-learn
python examples/own_parts.py --data ~/pictures --labels ~/label_maps  # 1.jpg and 1.png, with a number for each region

Images without a label map get one, once, by Felzenszwalb's segmentation of scikit-image.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from mae import MaskedAutoencoder, patchify, unpatchify
from matplotlib.figure import Figure
from photos import find_photos, parse, read_photo
from PIL import Image
from pretrain import MEAN, STD, normalize
from skimage.segmentation import felzenszwalb
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from maskevolve import PartMask, parts_from_segmentation
from maskevolve.viz import mask_picture, part_picture

CROPS_PER_EPOCH = 256  # at least
SHOWN = 6  # crops in the picture


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of images; photographs from scikit-image and scikit-learn if not given")
    add("--labels", type=Path, help="folder of label maps, read and written as PNG (default: labels in --out)")
    add("--ignore", type=int, help="label of pixels that nobody labelled, such as 255 (default: there is none)")
    add("--mask-ratio", type=float, default=0.75, help="share of the patches to remove (default: 0.75)")
    add("--epochs", type=int, default=20, help="default: 20")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=2e-3)
    add("--image-size", type=int, default=96, help="pixels")
    add("--patch-size", type=int, default=8, help="pixels")
    add("--width", type=int, default=128, help="of the encoder")
    add("--depth", type=int, default=6, help="blocks of the encoder")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/own_parts"), help="where to write (default: runs/own_parts)")
    return parse(parser, argv)


def find_labels(photos: list[Path], data: Path | None, folder: Path) -> list[Path]:
    """The label map of each photograph: the same name, as PNG, in `folder`. Those that are missing are written."""
    names = [path.relative_to(data) if data else Path(path.name) for path in photos]
    maps = [folder / name.with_suffix(".png") for name in names]
    if twice := {str(path) for path in maps if maps.count(path) > 1}:
        raise SystemExit(f"several images have the same label map: {', '.join(sorted(twice))}")
    for photo, path in zip(photos, maps, strict=True):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            regions = felzenszwalb(read_photo(photo).permute(1, 2, 0).numpy(), scale=600, sigma=0.8, min_size=400)
            Image.fromarray(regions.astype(np.uint16)).save(path)
    return maps


class LabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Random resized crops and flips of images [3, size, size], floats in [0, 1], and label maps [size, size] int64."""

    def __init__(self, photos: list[Path], maps: list[Path], size: int) -> None:
        self.pairs = list(zip(photos, maps, strict=True)) * -(-CROPS_PER_EPOCH // len(photos))
        self.augment = v2.Compose(
            [v2.RandomResizedCrop((size, size), scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        photo, path = self.pairs[index]
        image = read_photo(photo)
        image, labels = self.augment(tv_tensors.Image(image), read_labels(path, image.shape[1:]))
        return image.float() / 255, labels.long()


@lru_cache(maxsize=64)
def read_labels(path: Path, size: tuple[int, int]) -> tv_tensors.Mask:
    """[height, width] int64; a label map of another resolution is brought to that of its photograph."""
    with Image.open(path) as file:
        labels = np.array(file)
    (height, width), of_photo = labels.shape[:2], f"a photograph of {size[0]} x {size[1]}"
    if labels.ndim != 2 or abs(height * size[1] - width * size[0]) > height + width:  # a pixel more or less is rounding
        raise SystemExit(f"{path} has shape {labels.shape}, which is no label map, [height, width], of {of_photo}")
    return v2.functional.resize(tv_tensors.Mask(labels.astype(np.int64)), list(size))


def draw_crops(images: Tensor, parts: Tensor, mask: Tensor, prediction: Tensor, patch_size: int) -> Figure:
    """A column for each crop: the crop, its parts, its visible patches, and the reconstruction."""
    patches = torch.where(mask[..., None] > 0, prediction, patchify(normalize(images), patch_size))
    painted = (unpatchify(patches, patch_size) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1)
    figure = Figure(figsize=(1.6 * len(images), 6.8), layout="constrained")
    axes = figure.subplots(4, len(images), squeeze=False)
    for column, image in enumerate(images):
        pictures = [image.permute(1, 2, 0).numpy(), part_picture(image, parts[column], colours=True)]
        pictures += [mask_picture(image, mask[column]), painted[column].permute(1, 2, 0).numpy()]
        for ax, picture in zip(axes[:, column], pictures, strict=True):
            ax.imshow(picture)
            ax.set_axis_off()
    for ax, title in zip(axes[:, 0], ("crop", "parts", "visible patches", "reconstruction"), strict=True):
        ax.set_title(title, fontsize=9, loc="left")
    return figure


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    folder = args.labels or args.out / "labels"
    photos = [path for path in find_photos(args.data) if folder not in path.parents]
    maps = find_labels(photos, args.data, folder)
    crops = LabelledCrops(photos, maps, args.image_size)
    loader = DataLoader(crops, args.batch_size, shuffle=True, drop_last=True)
    # EvolvingMask(args.epochs) would begin with a grid: then masking.set_epoch(epoch) goes into the loop.
    model = MaskedAutoencoder(PartMask(), args.image_size, args.patch_size, args.width, args.depth, heads=4)
    model = model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for epoch in range(args.epochs):
        total = 0.0
        for images, labels in loader:
            parts = parts_from_segmentation(labels.to(args.device), model.encoder.patch_embed.grid_size, args.ignore)
            loss, prediction, mask = model(normalize(images.to(args.device)), args.mask_ratio, parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total / len(loader))
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    last = (tensor[:SHOWN].detach().float().cpu() for tensor in (images, parts, mask, prediction))
    draw_crops(*last, args.patch_size).savefig(args.out / "own_parts.png", dpi=120)
    print(f"wrote own_parts.png to {args.out}")
    return losses


if __name__ == "__main__":
    main()
