"""Pretrain a small masked autoencoder with masks that evolve from a grid to parts, and draw what happened.

python examples/pretrain.py                       # photographs inside scikit-image and scikit-learn
python examples/pretrain.py --data ~/pictures --epochs 200 --device cuda --out runs/mine
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mae import MaskedAutoencoder, patchify, unpatchify
from matplotlib.figure import Figure
from named_masks import MASKS
from photos import PhotoCrops, centre, find_photos, parse
from sklearn.metrics import adjusted_rand_score
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.viz import evolution_figure, mask_picture, part_picture

MEAN, STD = [[[0.485]], [[0.456]], [[0.406]]], [[[0.229]], [[0.224]], [[0.225]]]  # of ImageNet, as in MAE
SNAPSHOTS = 4  # epochs in evolution.png and method.png, at most
SHOWN = (2, 0, 1, 3)  # photographs in the pictures, by their place in the folder
EVOLVING = 2  # how many of them are in evolution.png and method.png
COMPARED = 10  # parts, of the shown photographs, that are compared between epochs
SHARP = 192  # pixels of a photograph there, at least: the model sees it at --image-size
FREE_TO_CHANGE = {"resume", "out", "device", "workers", "data"}  # between a run and its resumption


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of images; photographs from scikit-image and scikit-learn if not given")
    add("--mask", choices=MASKS, default="evolving")
    add("--mask-ratio", type=float, default=0.75, help="share of the patches to remove (default: 0.75)")
    add("--epochs", type=int, default=30, help="default: 30")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    add("--out", type=Path, default=Path("runs/pretrain"), help="where to write (default: runs/pretrain)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=2e-3)
    add("--ema-decay", type=float, default=0.98, help="of the teacher, a step (default: 0.98; long runs: 0.9999)")
    add("--image-size", type=int, default=96, help="pixels")
    add("--patch-size", type=int, default=8, help="pixels")
    add("--width", type=int, default=128, help="of the encoder")
    add("--depth", type=int, default=6, help="blocks of the encoder")
    add("--heads", type=int, default=4)
    add("--workers", type=int, default=0, help="processes that read images")
    return parse(parser, argv)


class Run:
    """The state of a run, all of which is in its checkpoint."""

    def __init__(self, args: argparse.Namespace, shown: Tensor) -> None:
        seed_everything(args.seed, 0)
        self.args, self.epoch, self.shown = args, 0, shown  # epochs are counted from 0
        masking = MASKS[args.mask](args.epochs)
        model = MaskedAutoencoder(masking, args.image_size, args.patch_size, args.width, args.depth, args.heads)
        self.model = model.to(args.device)
        self.teacher = PartTeacher(
            self.model.encoder, GraphCutPartitioner(), total_epochs=args.epochs, decay=args.ema_decay
        )
        groups = param_groups_weight_decay(self.model, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
        self.metrics: list[dict[str, Any]] = []
        self.snapshots: list[dict[str, Any]] = []
        self.first_parts: Tensor | None = None  # of the shown photographs, after the first epoch

    def set_epoch(self, epoch: float) -> None:
        self.teacher.set_epoch(epoch)
        if isinstance(self.model.masking, EvolvingMask):
            self.model.masking.set_epoch(epoch)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Loss, prediction, mask, and the parts that the mask was drawn from."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            parts = self.teacher(images) if self.model.masking.needs_parts else None
            return *self.model(images, self.args.mask_ratio, parts), parts

    def train_epoch(self, loader: DataLoader[Tensor], bar: tqdm[Any]) -> None:
        steps, losses = len(loader), []
        schedule = CosineLRScheduler(
            self.optimizer, self.args.epochs * steps, warmup_t=self.args.epochs * steps // 10, t_in_epochs=False
        )
        seed_everything(self.args.seed, 1 + self.epoch)  # a seed for each epoch, so that a resumed run draws the same
        for step, images in enumerate(loader):
            self.set_epoch(self.epoch + step / steps)
            schedule.step_update(self.epoch * steps + step)
            loss = self.forward(normalize(images.to(self.args.device)))[0]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.teacher.update(self.model.encoder)
            losses.append(loss.detach())
            bar.update()
        row = {"epoch": self.epoch, "loss": float(torch.stack(losses).mean()), "num_parts": self.teacher.num_parts}
        row |= {"alpha": self.alpha, "lr": self.optimizer.param_groups[0]["lr"], **self.compare_parts()}
        self.metrics.append(row)
        if self.epoch in {round(point * (self.args.epochs - 1) / (SNAPSHOTS - 1)) for point in range(SNAPSHOTS)}:
            self.take_snapshot()
        self.epoch += 1
        bar.set_postfix(loss=f"{row['loss']:.3f}", alpha=row["alpha"])

    @property
    def alpha(self) -> float | None:
        masking = self.model.masking
        return round(float(masking.alpha), 4) if isinstance(masking, EvolvingMask) else None

    def compare_parts(self) -> dict[str, float]:
        """How far ten parts of the shown photographs have come: their index with those of the first epoch, and how
        many of like size would be as even (exp of the entropy of their sizes).
        """
        images = normalize(self.shown.to(self.args.device))
        parts = self.teacher.hierarchy(images).cut(min(COMPARED, self.teacher.num_parts)).cpu()
        self.first_parts = parts if self.first_parts is None else self.first_parts
        indices = [adjusted_rand_score(*pair) for pair in zip(self.first_parts, parts, strict=True)]
        shares = [one.bincount()[one.unique()] / len(one) for one in parts]
        effective = [float((-(share * share.log()).sum()).exp()) for share in shares]
        return {"index_with_first": float(np.mean(indices)), "effective_parts": float(np.mean(effective))}

    @torch.no_grad()
    def take_snapshot(self) -> None:
        """Parts of the shown photographs, and the first masks that the seed draws, by the model after this epoch."""
        seed_everything(self.args.seed, 0)
        self.set_epoch(self.epoch)
        _, prediction, mask, parts = self.forward(normalize(self.shown.to(self.args.device)))
        title = f"epoch {self.epoch}" + ("" if self.alpha is None else f"\nalpha {self.alpha:.2f}")
        found = self.metrics[-1]
        note = (
            f"{found['effective_parts']:.1f} effective of {COMPARED}\nindex {found['index_with_first']:.2f} with first"
        )
        snapshot = {"epoch": self.epoch, "title": title, "note": note, "mask": mask, "parts": parts}
        snapshot["prediction"] = prediction.float()
        self.snapshots.append(
            {name: value.cpu() if torch.is_tensor(value) else value for name, value in snapshot.items()}
        )

    def save(self, path: Path) -> None:
        """Write the whole checkpoint or nothing: a run that is stopped here still has the one before."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "teacher", "optimizer")}
        state |= {name: getattr(self, name) for name in ("epoch", "metrics", "snapshots", "first_parts")}
        state["args"] = {name: value for name, value in vars(self.args).items() if name not in FREE_TO_CHANGE}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        for name, value in state["args"].items():
            if getattr(self.args, name) != value:
                raise SystemExit(
                    f"{path} was made with --{name.replace('_', '-')} {value}, not {getattr(self.args, name)}: "
                    "resume with the same, or begin anew with another --out"
                )
        for name in ("model", "teacher", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("epoch", "metrics", "snapshots", "first_parts"):
            setattr(self, name, state[name])


def seed_everything(seed: int, stream: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1)[0]))


def normalize(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to about mean 0 and standard deviation 1."""
    return (images - images.new_tensor(MEAN)) / images.new_tensor(STD)


def photographs(paths: list[Path], size: int) -> Tensor:
    """The photographs in the pictures, [4, 3, size, size] floats in [0, 1]."""
    return torch.stack([centre(paths[place % len(paths)], size) for place in SHOWN])


def draw_loss(metrics: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    ax = figure.subplots()
    ax.plot([row["epoch"] for row in metrics], [row["loss"] for row in metrics])
    ax.set(xlabel="epoch", ylabel="squared error on removed patches", ylim=(0, None))
    if metrics[0]["alpha"] is not None:
        right = ax.twinx()
        right.plot([row["epoch"] for row in metrics], [row["alpha"] for row in metrics], color="tab:orange")
        right.set_ylabel("alpha", color="tab:orange")
        right.set_ylim(0, 1.02)
    return figure


def draw_reconstruction(shown: Tensor, snapshot: dict[str, Any], patch_size: int) -> Figure:
    """Each photograph, its visible patches, and the reconstruction."""
    removed = snapshot["mask"][..., None]
    patches = patchify(normalize(shown), patch_size) * (1 - removed) + snapshot["prediction"] * removed
    painted = unpatchify(patches, patch_size) * torch.tensor(STD) + torch.tensor(MEAN)
    figure = Figure(figsize=(2 * len(shown), 6.3), layout="constrained")
    axes = figure.subplots(3, len(shown), squeeze=False)
    for column, image in enumerate(shown):
        seen = mask_picture(image, snapshot["mask"][column])
        pictures = (image.permute(1, 2, 0), seen, painted[column].permute(1, 2, 0))
        for ax, picture in zip(axes[:, column], pictures, strict=True):
            ax.imshow(np.asarray(picture.clip(0, 1)))
            ax.set_axis_off()
    for ax, title in zip(axes[:, 0], ("photograph", "visible patches", "reconstruction"), strict=True):
        ax.set_title(title, fontsize=9, loc="left")
    return figure


def draw_method(photos: Tensor, snapshots: list[dict[str, Any]]) -> Figure:
    """A row for each photograph: its parts in the last epoch, and its visible patches in each of the epochs shown."""
    figure = Figure(figsize=(1.6 * (2 + len(snapshots)), 0.5 + 1.6 * len(photos)), layout="constrained")
    axes = figure.subplots(len(photos), 2 + len(snapshots), squeeze=False)
    for row, photo in enumerate(photos):
        pictures = [photo.permute(1, 2, 0).numpy(), part_picture(photo, snapshots[-1]["parts"][row], colours=True)]
        pictures += [mask_picture(photo, snapshot["mask"][row]) for snapshot in snapshots]
        for ax, picture in zip(axes[row], pictures, strict=True):
            ax.imshow(picture)
            ax.set_axis_off()
    for ax, title in zip(
        axes[0], ("photograph\n", "its parts\n", *(snapshot["title"] for snapshot in snapshots)), strict=True
    ):
        ax.set_title(title, fontsize=13)
    return figure


def write_results(run: Run, paths: list[Path], out: Path) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.metrics))
    if run.epoch < run.args.epochs:
        return
    sharp = photographs(paths, max(SHARP, run.args.image_size))[:EVOLVING]
    masks, parts = ([snapshot[key] for snapshot in run.snapshots] for key in ("mask", "parts"))
    titles = [f"{snapshot['title']}\n{snapshot['note']}" for snapshot in run.snapshots]
    figures = {
        "evolution": evolution_figure(sharp, masks, parts, titles),
        "loss": draw_loss(run.metrics),
        "reconstruction": draw_reconstruction(run.shown, run.snapshots[-1], run.args.patch_size),
    }
    if run.args.mask == "evolving":
        figures["method"] = draw_method(sharp, run.snapshots)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise SystemExit(f"{args.out} already holds a run: add --resume to go on with it, or choose another --out")
    paths = find_photos(args.data)
    crops = PhotoCrops(paths, args.image_size)
    loader = DataLoader(crops, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    run = Run(args, photographs(paths, args.image_size))
    if args.resume and checkpoint.exists():
        run.load(checkpoint)
    with tqdm(total=args.epochs * len(loader), initial=run.epoch * len(loader), unit="step") as bar:
        while run.epoch < args.epochs:
            run.train_epoch(loader, bar)
            run.save(checkpoint)
            write_results(run, paths, args.out)
    print(f"wrote metrics.jsonl, checkpoint.pt and the pictures to {args.out}")


if __name__ == "__main__":
    main()
