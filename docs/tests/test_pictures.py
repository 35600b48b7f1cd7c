"""What the pages on masks and parts say of their code: masks and parts of one's own do what their names promise."""

import importlib.util
import math
import re
from pathlib import Path

import charts
import numpy as np
import pytest
import scipy.stats
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import centre, find_photos
from PIL import Image
from skimage.segmentation import slic

from maskevolve import EvolvingMask, RandomMask, parts_from_segmentation
from maskevolve.integrations import apply_to_timm
from maskevolve.masks import fixed_masks

DOCS = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)
names = pictures.names

COLOURS = ("red", "green", "blue", "purple")
WEIGHTS = [0.1, 0.2, 0.3, 0.4]


def own_mask(name, grid):
    if name == "saliency":
        masking = names("own_mask.md", "class SaliencyMask")["SaliencyMask"]()
        masking.saliency = torch.rand(3, math.prod(grid)).where(torch.rand(3, 1) > 0.2, 0)
        return masking
    if name == "cells":
        return names("own_mask.md", "class CellMask")["CellMask"]()
    return names("own_mask.md", "class NoiseMask")["NoiseMask"](name)


@pytest.mark.parametrize("name", ["cells", "saliency", *COLOURS])
@settings(max_examples=20, deadline=None)
@given(grid=st.tuples(st.integers(2, 17), st.integers(2, 17)), ratio=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_masks_of_ones_own_remove_the_exact_number(name, grid, ratio, seed):
    torch.manual_seed(seed)
    count = math.prod(grid)
    ratio = min(ratio, 1 - 1.5 / count)
    masking = own_mask(name, grid)
    removed = masking.sample(3, grid, ratio, generator=torch.Generator().manual_seed(seed))
    assert (removed.sum(1) == count - int(count * (1 - ratio))).all()
    assert torch.equal(removed, masking.sample(3, grid, ratio, generator=torch.Generator().manual_seed(seed)))
    blend = EvolvingMask(4, start=masking, end=RandomMask()).set_epoch(1)
    assert (blend.sample(3, grid, ratio).sum(1) == removed.sum(1)).all()


@pytest.mark.parametrize("grid", [(14, 14), (7, 10)])
def test_at_most_one_cell_is_removed_in_part(grid):
    removed = own_mask("cells", grid).sample(50, grid, 0.6).view(50, *grid)
    row, column = (torch.arange(size) // 2 for size in grid)
    cells = (row[:, None] * 100 + column).flatten()
    for image in removed.flatten(1):
        shares = [image[cells == cell].float().mean() for cell in cells.unique()]
        assert sum(0 < share < 1 for share in shares) <= 1


@pytest.mark.parametrize("size", [14, 20])
def test_noise_has_the_spectrum_of_its_name(size):
    torch.manual_seed(0)
    power = {}
    for colour in COLOURS:
        removed = own_mask(colour, (size, size)).sample(600, size, 0.75).view(-1, size, size).double()
        power[colour] = np.abs(np.fft.fft2(removed - removed.mean((1, 2), keepdim=True))) ** 2
    waves = np.fft.fftfreq(size)
    frequency = np.hypot(waves[:, None], waves)
    low, middle, high = frequency < 0.1, (frequency > 0.18) & (frequency < 0.26), frequency > 0.45
    low[0, 0] = False  # the mean, which is exact
    bands = {colour: [each.mean(0)[band].mean() for band in (low, middle, high)] for colour, each in power.items()}
    assert bands["red"][0] > 5 * bands["red"][1] > 5 * bands["red"][2]
    assert bands["blue"][0] < bands["blue"][1] < 0.8 * bands["blue"][2]
    assert bands["green"][1] > 1.3 * max(bands["green"][0], bands["green"][2])
    assert bands["purple"][1] < 0.6 * min(bands["purple"][0], bands["purple"][2])


@pytest.mark.parametrize("colour", COLOURS)
def test_noise_removes_every_patch_equally_often(colour):
    torch.manual_seed(0)
    removed = own_mask(colour, (6, 9)).sample(4000, (6, 9), 0.75).float().mean(0)
    share, kept = 41 / 54, int(54 * 0.25)
    assert kept == 13
    deviation = (share * (1 - share) / 4000) ** 0.5
    assert (removed - share).abs().max() < 5 * deviation


def test_patches_go_in_proportion_to_their_saliency():
    torch.manual_seed(0)
    masking = own_mask("saliency", (2, 2))
    masking.saliency = torch.tensor([WEIGHTS]).expand(10_000, -1)
    first = masking.sample(10_000, 2, 0.25).sum(0)
    assert scipy.stats.chisquare(first, [10_000 * weight for weight in WEIGHTS]).pvalue > 0.001
    both = masking.sample(10_000, 2, 0.5).sum(0)
    # The chance to be drawn first, or second after another one.
    expected = [w + sum(o * w / (1 - o) for o in WEIGHTS if o != w) for w in WEIGHTS]
    assert np.allclose(both / 10_000, expected, atol=0.02)


def test_masks_of_ones_own_under_fixed_masks():
    patches = torch.zeros(3, 196, 1)
    masking = own_mask("green", (14, 14))
    removed = []
    for batch in (1, 3):
        with fixed_masks(masking, seed=1):
            removed.append(torch.cat([masking(part, 0.75).mask for part in patches.split(batch)]))
    assert torch.equal(*removed)
    own = own_mask("saliency", (14, 14))
    for masking in (own, EvolvingMask(10, start=own, end=RandomMask()).set_epoch(2)):
        refused = pytest.raises(ValueError, match=r"scores has shape \[3, 196\].*fixed masks call draw for one image")
        with fixed_masks(masking), refused:
            masking(patches, 0.75)


def test_a_mask_says_that_it_needs_parts_by_an_attribute():
    class OfParts(names("own_mask.md", "class CellMask")["Masking"]):
        needs_parts = True

        def draw(self, batch_size, grid_size, parts, **source):
            return parts

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, patch_drop_rate=0.5)
    labels = torch.arange(16).expand(2, -1)
    evolution = apply_to_timm(vit, OfParts(), lambda images: labels)
    vit(torch.randn(2, 3, 64, 64))
    assert torch.equal(evolution.last_mask, (labels > 7).float())


def test_superpixels_are_those_of_scikit_image_and_become_parts():
    page = names("own_parts.md", "slic(")
    photos = torch.stack([centre(path, 224) for path in find_photos(None)[:2]])
    mean, std = page["MEAN"].view(3, 1, 1), page["STD"].view(3, 1, 1)
    labels = page["slic_parts"]((photos - mean) / std)
    for photo, ours in zip(photos, labels, strict=True):
        assert (ours.numpy() == slic(photo.permute(1, 2, 0).double().numpy(), n_segments=20)).mean() > 0.98
    page["vit"]((photos - mean) / std)
    assert torch.equal(page["evolution"].last_parts, parts_from_segmentation(labels, 14))
    assert all(5 < len(parts.unique()) <= 25 for parts in page["evolution"].last_parts)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_a_pixel_has_the_smallest_mask_that_holds_it(seed, count):
    rng = np.random.default_rng(seed)
    masks = rng.random((count, 5, 4)) < rng.random((count, 1, 1))
    labels = names("own_parts.md", "def label_map")["label_map"](torch.as_tensor(masks))
    sizes = masks.sum((1, 2))
    for row, column in np.ndindex(5, 4):
        holding = masks[:, row, column]
        label = int(labels[row, column])
        assert (label > 0) == holding.any()
        if label:
            same = [mask for mask in masks if mask[row, column] and mask.sum() == sizes[holding].min()]
            assert any(not (mask & (labels.numpy() < label)).any() for mask in same), "none smaller lies below it"


def thumbnail(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L").resize((20, 20), Image.Resampling.BOX), float)


def test_pictures_of_the_pages_are_drawn_anew(tmp_path, monkeypatch):
    """By one command, small, and as they are in docs/pictures, but for the versions of other libraries."""
    monkeypatch.setattr(pictures, "DPI", 75)  # half of theirs takes less time
    pictures.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert set(re.findall(r"pictures/(\w+\.png)", pages)) - set(charts.STUDY) == drawn
    for name in drawn:
        committed = DOCS / "pictures" / name
        assert committed.stat().st_size < 200_000
        assert np.abs(thumbnail(tmp_path / name) - thumbnail(committed)).mean() < 5, "run python docs/pictures.py"
