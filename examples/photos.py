"""Photographs to train on: those inside the wheels of scikit-image and scikit-learn, or any folder of images."""

from __future__ import annotations

import argparse
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

BUNDLED = {
    "skimage": [
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/hubble_deep_field.jpg",
        "data/retina.jpg",
        "data/rocket.jpg",
    ],
    "sklearn": ["datasets/images/flower.jpg", "datasets/images/china.jpg"],
}
LONGEST_SIDE = 640  # pixels; larger photographs are shrunk when they are read
CROPS_PER_EPOCH = 256  # at least: a few photographs are cropped many times

ImageFile.LOAD_TRUNCATED_IMAGES = True  # half a photograph is no reason to end a run


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options; an --image-size that is no multiple of --patch-size is refused."""
    args = parser.parse_args(argv)
    size, patch = args.image_size, args.patch_size
    if size % patch:
        near = sorted({max(1, size // patch) * patch, (size // patch + 1) * patch})
        parser.error(f"--image-size {size} is no multiple of --patch-size {patch}: take {' or '.join(map(str, near))}")
    return args


def find_photos(folder: Path | None) -> list[Path]:
    """The readable images below `folder`, or those in the wheels where it is None."""
    if folder is None:
        roots = {package: Path(find_spec(package).submodule_search_locations[0]) for package in BUNDLED}
        return [roots[package] / name for package, names in BUNDLED.items() for name in names]
    endings = Image.registered_extensions()
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings and _readable(path)]
    if not paths:
        raise SystemExit(f"--data {folder} holds no image that Pillow can read")
    return paths


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        warnings.warn(f"left out {path}: {error}", stacklevel=2)
        return False
    return True


@lru_cache(maxsize=64)
def read_photo(path: Path) -> Tensor:
    """[3, height, width] uint8."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        return v2.functional.pil_to_tensor(image)


def centre(path: Path, size: int) -> Tensor:
    """The middle square of a photograph, [3, size, size] floats in [0, 1]."""
    photo = read_photo(path)
    photo = v2.functional.center_crop(photo, [min(photo.shape[1:])])
    return v2.functional.resize(photo, [size, size], antialias=True).float() / 255


class PhotoCrops(Dataset[Tensor]):
    """Random resized crops and flips, [3, size, size] floats in [0, 1]."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths * -(-CROPS_PER_EPOCH // len(paths))
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop((size, size), scale=(0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        crop: Tensor = self.augment(read_photo(self.paths[index]))
        return crop
