"""The examples of video and sound: the loss falls, the picture is drawn, and masks are what the page says of them."""

import pytest
import sound
import torch
import video
from PIL import Image

from maskevolve import FrozenTeacher
from maskevolve.integrations import Evolution


@pytest.fixture
def drawn(monkeypatch):
    """The evolutions that are made, with the masks that each has drawn."""
    made, fixed = [], Evolution.fixed

    def note(evolution, seed):
        made.append(evolution)
        return fixed(evolution, seed)

    monkeypatch.setattr(Evolution, "fixed", note)
    return made


@pytest.mark.parametrize("parts", ["tubes", "space-time"])
def test_video(parts, tmp_path, drawn):
    losses = video.main(["--epochs", "3", "--clips", "48", "--parts", parts, "--out", str(tmp_path)])
    assert losses[-1] < losses[0]
    Image.open(tmp_path / "tubes.png").load()
    mask, labels = (each.view(1, 8, 64) for each in (drawn[-1].last_mask, drawn[-1].last_parts))
    assert mask.sum() == 512 - 128
    if parts == "tubes":
        assert bool((labels == labels[:, :1]).all())
        assert (mask != mask[:, :1]).any(1).sum() <= 1, "one tube at most is cut"


def test_sound(tmp_path, drawn):
    losses = sound.main(["--epochs", "3", "--melodies", "64", "--out", str(tmp_path)])
    assert losses[-1] < losses[0]
    Image.open(tmp_path / "notes.png").load()
    mask, labels = drawn[-1].last_mask, drawn[-1].last_parts
    assert mask.sum(1).tolist() == [48]
    whole = [mask[0][labels[0] == part].unique().numel() == 1 for part in labels[0].unique()]
    assert whole.count(False) <= 1, "one part at most is cut"


def test_a_frozen_teacher_reads_frames_of_the_clips_of_the_page():
    import timm

    from maskevolve import GraphCutPartitioner

    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=1)
    clips = video.draw_clips(2, torch.Generator().manual_seed(0))
    settings = {"total_epochs": 10, "num_parts": (4, 4)}
    one = FrozenTeacher(vit, GraphCutPartitioner(), transform=lambda x: x[:, :, x.shape[2] // 2], **settings)
    parts = one(clips, grid_size=(8, 6, 6)).view(2, 8, 36)
    assert bool((parts == parts[:, :1]).all())
    each = FrozenTeacher(
        vit, GraphCutPartitioner(), transform=lambda x: x[:, :, ::2].transpose(1, 2).flatten(0, 1), **settings
    )
    parts = each(clips, grid_size=(8, 6, 6)).view(2, 8, 36)
    assert not set(parts[:, 0].flatten().tolist()) & set(parts[:, 1].flatten().tolist())
