"""Masks that data sets draw: exact counts, in the processes of a loader, in place of the hosts' own generators."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from maskevolve import EvolvingMask, GridMask, MaskGenerator, PartMask, RandomMask, TubeMask

PARTS = torch.arange(36) // 9  # four bands


class Samples(torch.utils.data.Dataset):
    """A mask for each sample, and the parts that came with it, of which each sample has more in a frame."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 16

    def __getitem__(self, index):
        parts = PARTS.roll(index % 3)
        mask = self.generator(parts=parts if index % 2 else parts.numpy())
        return torch.from_numpy(mask), parts, torch.utils.data.get_worker_info().id


def make_loader(generator, context, seed=3):
    options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": context}
    return DataLoader(Samples(generator), 4, generator=torch.Generator().manual_seed(seed), **options)


def load(loader):
    return [torch.cat(column) for column in zip(*loader, strict=True)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_that_are_alive_see_the_epoch_and_draw_masks_of_their_own(context):
    generator = MaskGenerator(TubeMask(EvolvingMask(99, start=RandomMask(), end=PartMask())), (2, 6, 6), 0.5)
    loader = make_loader(generator, context)
    generator.set_epoch(0)
    masks, parts, workers = load(loader)
    assert masks.shape == (16, 72)
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [36] * 16
    assert workers.unique().tolist() == [0, 1]
    assert len(masks.unique(dim=0)) == 16, "no two samples, of whichever worker, have the same"
    assert torch.equal(masks[:, :36], masks[:, 36:])
    assert not any(is_whole(*each) for each in zip(masks, parts, strict=True)), "random at the start"
    assert generator.set_epoch(98) is generator
    later, parts, _ = load(loader)
    assert all(is_whole(*each) for each in zip(later, parts, strict=True)), "whole parts of the sample at the end"
    generator.set_epoch(0)
    assert not any(is_whole(*each) for each in zip(*load(loader)[:2], strict=True)), "and back"
    if context == "fork":
        assert torch.equal(load(make_loader(generator, context))[0], masks), "of the same seed"
        assert not torch.equal(load(make_loader(generator, context, 4))[0], masks)


def is_whole(mask, parts):
    return all(len(mask[:36][parts == part].unique()) == 1 for part in parts.unique())


def test_tubes_of_exact_count_in_place_of_video_maes_generator():
    generator = MaskGenerator(TubeMask(RandomMask()), (8, 14, 14), 0.9)
    masks = np.stack([generator() for _ in range(20)])
    assert masks.dtype == bool
    assert masks.shape == (20, 1568)
    frames = masks.reshape(20, 8, 196)
    assert (frames == frames[:, :1]).all()
    assert ((~frames).sum(2) == 19).all(), "as MAE rounds: VideoMAE's own leaves 196 - int(0.9 * 196) = 20"
    assert len(np.unique(masks, axis=0)) == 20
    torch.manual_seed(1)
    first = generator()
    torch.manual_seed(1)
    assert np.array_equal(generator(), first)


def test_masks_are_drawn_on_the_cpu_whatever_torchs_default_device_is():
    masking = EvolvingMask(4)
    with torch.device("meta"):
        mask = MaskGenerator(masking, 6, 0.5).set_epoch(3)(parts=PARTS)
    assert is_whole(torch.from_numpy(mask), PARTS)


def test_called_with_a_number_as_the_collate_function_of_dinov3_does():
    generator = MaskGenerator(GridMask(), (6, 8), 0.75)
    for removed in (0, 1, int(48 * 0.31), np.int64(27), 47):
        mask = torch.BoolTensor(generator(removed))  # of numpy's bool, as there
        assert mask.shape == (6, 8)
        assert mask.sum() == removed
    flat = generator()
    assert flat.sum() == 36, "without a number, at the ratio"
    assert np.array_equal(flat, np.tile(flat.reshape(6, 8)[:2, :2], (3, 4)).flatten())


def test_wrong_use_repeats_the_values():
    generator = MaskGenerator(EvolvingMask(4), (2, 3, 4), 0.5)
    for wrong in (-1, 24, 2.5, "3", True):
        with pytest.raises(ValueError, match=rf"num_removed={wrong!r} .*\[0, 23\].*2 x 3 x 4 patches"):
            generator(wrong)
    for grid, ratio, said in (((0, 4), 0.5, "(0, 4)"), (4, 1.5, "mask_ratio=1.5"), (4, "a", "'a'"), (2, 0.9, "0.9")):
        with pytest.raises(ValueError, match=re.escape(said)):
            MaskGenerator(RandomMask(), grid, ratio)
    with pytest.raises(TypeError, match="RandomMask"):
        MaskGenerator(RandomMask, 4)
    with pytest.raises(ValueError, match=r"RandomMask does not evolve.*epoch=3"):
        MaskGenerator(RandomMask(), 4).set_epoch(3)
    with pytest.raises(ValueError, match="epoch='x'"):
        generator.set_epoch("x")
    generator.set_epoch(3)
    for parts, said in ((None, "needs parts"), (PARTS, r"\[1, 36\]"), (torch.rand(24), "float")):
        with pytest.raises(ValueError, match=said):
            generator(parts=parts)
