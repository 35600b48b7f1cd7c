"""Label maps that travel with their images: through the transforms, into parts, and to masks of whole regions."""

import numpy as np
import own_parts
import pytest
import torch
from photos import centre
from PIL import Image

TINY = ["--device", "cpu", "--image-size", "32", "--width", "32", "--depth", "1", "--epochs", "2", "--batch-size", "64"]


def save(folder, name, array):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return folder / name


@pytest.fixture
def two_regions(tmp_path):
    """Photographs whose brightness is their label: a disc of 200 on 50."""
    photos, maps = [], []
    for index, (height, width) in enumerate([(60, 90), (128, 128), (700, 500)]):
        rows, columns = np.mgrid[:height, :width]
        disc = np.hypot(rows - height * 0.4, columns - width * 0.6) < 0.3 * min(height, width)
        labels = np.where(disc, 200, 50).astype(np.uint8)
        photos.append(save(tmp_path / "photos", f"{index}.png", np.stack([labels] * 3, -1)))
        maps.append(save(tmp_path / "labels", f"{index}.png", labels))
    return photos, maps


def test_crops_and_flips_act_on_both(two_regions):
    torch.manual_seed(0)
    crops = own_parts.LabelledCrops(*two_regions, 48)
    assert len(crops) >= 256
    both = 0
    for image, labels in (crops[index] for index in range(60)):
        assert (image.shape, image.dtype) == ((3, 48, 48), torch.float32)
        assert (labels.shape, labels.dtype) == ((48, 48), torch.int64)
        assert set(labels.unique().tolist()) <= {50, 200}, "labels are not interpolated"
        assert ((image[0] * 255 - labels).abs() < 75).float().mean() > 0.95, "but for pixels on the outline"
        both += len(labels.unique()) == 2
    assert both > 30, "crops that could tell"


def test_it_trains_and_draws_and_writes_label_maps_once(tmp_path):
    for path in own_parts.find_photos(None)[:3]:
        image = (centre(path, 96).permute(1, 2, 0) * 255).byte().numpy()
        save(tmp_path / "photos" / "below", path.name, image)
    losses = own_parts.main([*TINY, "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    assert losses[1] < losses[0]
    with Image.open(tmp_path / "out" / "own_parts.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    folder = tmp_path / "out" / "labels" / "below"
    assert {path.name for path in folder.iterdir()} == {"astronaut.png", "chelsea.png", "coffee.png"}
    with Image.open(folder / "astronaut.png") as file:
        assert len(np.unique(np.array(file))) > 2
    (folder / "coffee.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    own_parts.find_labels(own_parts.find_photos(tmp_path / "photos"), tmp_path / "photos", folder.parent)
    assert (folder / "coffee.png").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is there is used"


def test_photographs_that_come_with_scikit_image_have_label_maps_too(tmp_path, monkeypatch):
    monkeypatch.setattr(own_parts, "felzenszwalb", lambda image, **_: np.zeros(image.shape[:2], int))
    maps = own_parts.find_labels(own_parts.find_photos(None), None, tmp_path)
    assert {"astronaut.png", "china.png"} < {path.name for path in maps}
    assert all(path.parent == tmp_path and path.exists() for path in maps)


def test_label_maps_that_were_brought_along(two_regions, tmp_path):
    photos, maps = two_regions
    before = [path.read_bytes() for path in maps]
    options = ["--data", str(photos[0].parent), "--labels", str(maps[0].parent), "--ignore", "50"]
    own_parts.main([*TINY, *options, "--out", str(tmp_path / "out")])
    assert [path.read_bytes() for path in maps] == before
    assert not (tmp_path / "out" / "labels").exists()


def test_label_maps_that_do_not_fit(two_regions, tmp_path):
    photos, maps = two_regions
    Image.new("L", (90, 61)).save(maps[0])  # a pixel of rounding
    assert own_parts.LabelledCrops(photos, maps, 32)[0][1].shape == (32, 32)
    own_parts.read_labels.cache_clear()
    for size, mode in (((60, 90), "L"), ((90, 60), "RGB")):
        Image.new(mode, size).save(maps[0])
        with pytest.raises(SystemExit, match=r"0\.png.*60 x 90"):
            own_parts.LabelledCrops(photos, maps, 32)[0]
    save(photos[0].parent, "0.jpg", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"0\.png"):
        own_parts.find_labels(own_parts.find_photos(photos[0].parent), photos[0].parent, tmp_path / "labels")
