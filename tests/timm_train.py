"""A stand-in for timm's own training script: the same calls of timm, in our own words."""

import argparse
import json
import os

import timm.utils as utils
import torch
from timm.models import create_model, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from vits import photographs

STEPS = 4


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", default=".")
    parser.add_argument("--resume", default="")
    args = parser.parse_args()
    rank, distributed = int(os.environ.get("RANK", 0)), "RANK" in os.environ
    if distributed:
        dist.init_process_group("gloo")
    utils.random_seed(42, rank)
    small = {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2, "patch_size": 8, "patch_drop_rate": 0.5}
    model = create_model(args.model, num_classes=9, **(small if args.model.startswith("vit") else {}))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3)
    start = 0
    if args.resume:
        torch.serialization.add_safe_globals([argparse.Namespace])
        start = resume_checkpoint(model, args.resume, optimizer, log_info=False)
    whole = model
    if distributed:
        model = DistributedDataParallel(model, device_ids=[torch.device("cpu")])
    os.makedirs(args.output, exist_ok=True)
    folders = {"checkpoint_dir": args.output, "recovery_dir": args.output}
    saver = utils.CheckpointSaver(whole, optimizer, args=args, decreasing=True, **folders) if rank == 0 else None
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, updates_per_epoch=STEPS, step_on_epochs=True
    )
    if start:
        scheduler.step(start)
    images = photographs(18, 64)
    for epoch in range(start, epochs):
        model.train()
        losses = []
        for step in range(STEPS):
            batch = torch.randperm(18)[:12]
            loss = torch.nn.functional.cross_entropy(model(images[batch]), batch % 9)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            scheduler.step_update(num_updates=epoch * STEPS + step + 1, metric=loss.item())
        mean = sum(losses) / STEPS
        if saver is not None:
            saver.save_checkpoint(epoch, metric=mean)
            print(json.dumps({"epoch": epoch, "loss": mean}), flush=True)
        scheduler.step(epoch + 1, mean)


if __name__ == "__main__":
    main()
