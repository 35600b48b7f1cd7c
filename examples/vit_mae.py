"""Pretrain Hugging Face's ViTMAE under its Trainer, with masks that evolve from a grid to parts.

python examples/vit_mae.py                        # photographs inside scikit-image and scikit-learn
python examples/vit_mae.py --data ~/pictures --epochs 200 --out runs/mine
torchrun --nproc_per_node 2 examples/vit_mae.py   # on two GPUs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from photos import PhotoCrops, find_photos, parse
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_vit_mae, trainer_callback


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of images; photographs from scikit-image and scikit-learn if not given")
    add("--epochs", type=int, default=12, help="default: 12")
    add("--batch-size", type=int, default=16, help="on each device (default: 16)")
    add("--lr", type=float, default=1e-3)
    add("--ema-decay", type=float, default=0.98, help="of the teacher, a step (default: 0.98; long runs: 0.9999)")
    add("--image-size", type=int, default=64, help="pixels")
    add("--patch-size", type=int, default=8, help="pixels")
    add("--out", type=Path, default=Path("runs/vit_mae"), help="where to write (default: runs/vit_mae)")
    add("--resume", action="store_true", help="go on with the run in --out")
    return parse(parser, argv)


def collate(images: list[Tensor]) -> dict[str, Tensor]:
    """Pixels in [0, 1] to what the model takes, about mean 0 and deviation 1."""
    return {"pixel_values": (torch.stack(images) - 0.45) / 0.23}


def main(argv: list[str] | None = None) -> Trainer:
    args = parse_args(argv)
    size = {"image_size": args.image_size, "patch_size": args.patch_size}
    encoder = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    decoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = ViTMAEConfig(**size, **encoder, **{f"decoder_{name}": value for name, value in decoder.items()})
    model = ViTMAEForPreTraining(config)

    teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=args.epochs, decay=args.ema_decay)
    evolution = apply_to_vit_mae(model, EvolvingMask(args.epochs), teacher)

    options = TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        adam_beta2=0.95,
        logging_steps=10,
        save_strategy="epoch",
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    crops = PhotoCrops(find_photos(args.data), args.image_size)
    callbacks = [trainer_callback(evolution)]
    trainer = Trainer(model, options, collate, train_dataset=crops, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer


if __name__ == "__main__":
    main()
