"""Pretrain an MAE made of Lightly's modules under Lightning, with masks that evolve from a grid to parts.

The module is written as Lightly's own example of MAE is; what evolves its masks is in `main`.
Source: https://docs.lightly.ai/self-supervised-learning/examples/mae.html

python examples/lightly_mae.py                        # photographs inside scikit-image and scikit-learn
python examples/lightly_mae.py --data ~/pictures --epochs 200 --out runs/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from photos import PhotoCrops, find_photos, parse
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_lightly, lightning_callback


class MAE(pl.LightningModule):
    def __init__(self, vit: VisionTransformer, lr: float, decoder_width: int = 64) -> None:
        super().__init__()
        self.lr, self.mask_ratio = lr, 0.75
        self.patch_size = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder_embed = nn.Linear(vit.embed_dim, decoder_width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, embed_dim=decoder_width, depth=2, num_heads=4
        )
        self.head = nn.Linear(decoder_width, 3 * self.patch_size**2)

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        length = self.backbone.sequence_length
        # The line that draws the mask: it need not change.
        idx_keep, idx_mask = utils.random_token_mask((len(images), length), self.mask_ratio, device=images.device)
        visible = self.decoder_embed(self.backbone.encode(images, idx_keep=idx_keep))
        tokens = utils.set_at_index(visible.new_zeros(len(images), length, visible.shape[-1]), idx_keep, visible)
        prediction = self.head(utils.get_at_index(self.decoder(tokens, idx_mask=idx_mask), idx_mask))
        # The class token has index 0, but is no patch.
        target = utils.get_at_index(utils.patchify(images, self.patch_size), idx_mask - 1)
        loss = nn.functional.mse_loss(prediction, target)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.95))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of images; photographs from scikit-image and scikit-learn if not given")
    add("--epochs", type=int, default=12, help="default: 12")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=1e-3)
    add("--ema-decay", type=float, default=0.98, help="of the teacher, a step (default: 0.98; long runs: 0.9999)")
    add("--image-size", type=int, default=64, help="pixels")
    add("--patch-size", type=int, default=8, help="pixels")
    add("--out", type=Path, default=Path("runs/lightly_mae"), help="where to write (default: runs/lightly_mae)")
    add("--resume", type=Path, help="checkpoint to go on from, as in runs/lightly_mae/last.ckpt")
    return parse(parser, argv)


def collate(images: list[Tensor]) -> Tensor:
    """Pixels in [0, 1] to about mean 0 and deviation 1."""
    return (torch.stack(images) - 0.45) / 0.23


def main(argv: list[str] | None = None) -> pl.Trainer:
    args = parse_args(argv)
    mae = MAE(VisionTransformer(args.image_size, args.patch_size, embed_dim=128, depth=4, num_heads=4), args.lr)

    teacher = PartTeacher(mae.backbone, GraphCutPartitioner(), total_epochs=args.epochs, decay=args.ema_decay)
    evolution = apply_to_lightly(mae, EvolvingMask(args.epochs), teacher)

    crops = PhotoCrops(find_photos(args.data), args.image_size)
    loader = DataLoader(crops, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    checkpoints = pl.callbacks.ModelCheckpoint(args.out, save_last=True)
    callbacks = [lightning_callback(evolution), checkpoints]
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=callbacks, default_root_dir=args.out, log_every_n_steps=1)
    trainer.fit(mae, loader, ckpt_path=args.resume)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
