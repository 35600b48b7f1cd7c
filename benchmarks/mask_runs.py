"""One run of the study of pretraining: its size, and a training that can be stopped at any moment."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from disturbed import disturbed
from methods import MASK_RATIO, METHODS
from pictures import AREA, ASPECT, HELD_OUT, Data, Pictures, batches
from probes import SETTINGS, classification, fine_tune, half_precision, patches_of_objects, regions
from regions import Crops, read_all
from timm.layers import set_fused_attn
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from maskevolve import EvolvingMask, RandomMask

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mae import MaskedAutoencoder

POINTS = (0.25, 0.5, 1.0)  # of training, where regions are measured, and where asked for the fine-tuned accuracy
INITIAL, TRAINING, DATA, FINE_TUNING = range(4)  # what random numbers are for


def commit() -> str:
    """Of this code; "-dirty" where some of it was changed since."""

    def git(*command: str) -> str:
        home = Path(__file__).parents[1]
        return subprocess.run(["git", *command], cwd=home, capture_output=True, text=True, check=False).stdout.strip()

    changed = git(
        "status", "--porcelain", "--", *(f"{folder}/*.py" for folder in ("benchmarks", "examples", "maskevolve"))
    )
    return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if changed else "")


COMMIT = commit()  # when the process starts: what is committed later is not what runs


@dataclass(frozen=True)
class Size:
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_depth: int
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warm_up: float
    """Share of the steps; then cosine decay to 0."""
    labelled: int
    """Pictures a class that the probes learn from, at most."""
    fine_tune_epochs: int


SIZES = {
    # Seconds; shows that it works and no more.
    "ci": Size(32, 8, 32, 2, 2, 1, 4, 16, 3e-3, 0.05, 0.1, 50, 4),
    # A quarter of an hour a run on one core of an AMD EPYC, on the 10,000 pictures of 20 classes of Tiny-ImageNet.
    "patch4": Size(64, 4, 128, 6, 4, 1, 5, 64, 1.5e-3, 0.05, 0.1, 200, 2),
    # Nine masks and three seeds, side by side, in some 20 minutes of an H200, by the older study's times; not run.
    "gpu": Size(64, 4, 384, 6, 6, 2, 20, 256, 1.5e-3, 0.05, 0.1, 200, 10),
}


class Sets(NamedTuple):
    """All pictures of the study."""

    data: Data
    crops: dict[str, Crops]
    disturbed: dict[str, Pictures]

    @classmethod
    def read(cls, folder: Path, size: Size, segmented: Sequence[Path] = ()) -> Sets:
        data = Data.read(folder, size.image, size.patch, size.labelled)
        crops = read_all(segmented, size.image, size.patch)
        return cls(data, crops, disturbed(data.rest.spread(SETTINGS["disturbed"]), size.patch))


def file_name(mask: str, seed: int) -> str:
    return "-".join((*mask.lower().replace(",", "").replace("'", "").split(), str(seed)))


class Run:
    """All that a run changes, so that one checkpoint holds it.

    Each epoch starts random numbers anew from the seed and its number, so that an epoch that was cut off is the same
    when it is done again. Pictures and crops have a generator of their own: with one seed, all masks have the same
    initial weights and the same batches.
    """

    def __init__(self, mask: str, seed: int, size: Size, sets: Sets, device: str, curve: bool = False) -> None:
        method = METHODS[mask]
        self.mask, self.seed, self.size, self.device = mask, seed, size, device
        self.data, self.sets = sets.data, sets
        self.epochs = num_epochs(mask, size)
        self.points = [max(min(1, self.epochs), round(share * self.epochs)) for share in POINTS]
        self.fine_tuned_at = self.points if curve else self.points[-1:]
        torch.manual_seed(stream(seed, INITIAL))
        set_fused_attn(device != "cpu")  # on a CPU, torch's fused attention is slower in bfloat16
        shape = (size.image, size.patch, size.width, size.depth, size.heads, size.decoder_depth)
        self.model = MaskedAutoencoder(method.masking(self.epochs), *shape).to(device)
        self.teacher = None if method.teacher is None else method.teacher(self.model.encoder, self.epochs).to(device)
        groups = param_groups_weight_decay(self.model, size.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, size.lr, betas=(0.9, 0.95))
        self.epoch, self.seconds, self.processor_seconds = 0, 0.0, 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, Any]] = []
        self.commits: list[str] = []

    @property
    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, beside mask and seed."""
        teacher = self.teacher and {
            "kind": type(self.teacher).__name__,
            "partitioner": str(self.teacher.partitioner),
            "num_parts": self.teacher.part_range,
            "reads": self.teacher.layers or "all layers",
            "stride": self.teacher.stride,
            "decay": self.teacher.decay,
        }
        found = {
            "masking": " ".join(re.sub(r"<function (\w+) at \w+>", r"\1", str(self.model.masking)).split()),
            "teacher": teacher,
            "mask_ratio": MASK_RATIO,
            "epochs": self.epochs,
            "fine_tuned_at": self.fine_tuned_at,
            "size": asdict(self.size),
            "probes": SETTINGS,
            "crops": {"area": AREA, "aspect": ASPECT},
            "held_out": HELD_OUT,
            "pictures": {"train": len(self.data.train.images), "scored": len(self.data.rest.images)},
            "crops_of_regions": {name: len(crops.images) for name, crops in self.sets.crops.items()},
            "fingerprint": self.data.fingerprint,
        }
        return json.loads(json.dumps(found))

    def train_epoch(self) -> None:
        steps, losses = max(1, len(self.data.train.images) // self.size.batch), []
        every = self.epochs * steps
        warm_up = round(self.size.warm_up * every)
        schedule = CosineLRScheduler(self.optimizer, every, warmup_t=warm_up, t_in_epochs=False)
        torch.manual_seed(stream(self.seed, TRAINING, self.epoch))
        generator = torch.Generator().manual_seed(stream(self.seed, DATA, self.epoch))
        began, processor = time.perf_counter(), time.process_time()
        pictures = batches(self.data.train.images, self.size.batch, generator, self.device)
        for step, (_, images) in enumerate(pictures):
            schedule.step_update(self.epoch * steps + step)
            losses.append(self.step(images, self.epoch + step / steps))
        loss = float(torch.stack(losses).mean())  # waits for the device
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.mask}, seed {self.seed}: the loss of epoch {self.epoch} is {loss}")
        self.seconds += time.perf_counter() - began
        self.processor_seconds += time.process_time() - processor
        self.losses.append(loss)
        self.epoch += 1

    def step(self, images: Tensor, epoch: float) -> Tensor:
        masking, parts = self.model.masking, None
        if isinstance(masking, EvolvingMask):
            masking.set_epoch(epoch)
        with half_precision(images.device):
            if self.teacher is not None:
                self.teacher.set_epoch(epoch)
                parts = self.teacher(images) if masking.needs_parts else None
            loss = self.model(images, MASK_RATIO, parts)[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.model.encoder)
        return loss.detach()

    def measure(self) -> None:
        row = {"epoch": self.epoch, "seconds": self.seconds, "processor_seconds": self.processor_seconds}
        row["training_loss"] = self.losses[-1] if self.losses else None
        row |= regions(self.model.encoder, self.sets.crops)
        if self.epoch == self.epochs:
            row |= classification(self.model.encoder, self.data.fit, self.data.rest)
            row["boxes"] = patches_of_objects(self.model.encoder, self.data.fit, self.data.val, SETTINGS["boxes_c"])
        if self.epoch in self.fine_tuned_at:
            tests = {"fine_tuned": self.data.rest} | (self.sets.disturbed if self.epoch == self.epochs else {})
            seed = stream(self.seed, FINE_TUNING)
            row |= fine_tune(self.model.encoder, self.data.fit, tests, self.size.fine_tune_epochs, seed)
        self.curve.append(row)

    @property
    def due(self) -> bool:
        """Whether a point of training was reached and has not been measured."""
        return self.epoch in self.points and not any(row["epoch"] == self.epoch for row in self.curve)

    def go_on(self, checkpoint: Path, after_epoch: Callable[[Run], None] = lambda run: None) -> dict[str, Any]:
        """From the checkpoint, or from the start where there is none, to the end; what is written of it."""
        if checkpoint.exists():
            self.load(checkpoint)
        if COMMIT not in self.commits:
            self.commits.append(COMMIT)
        while self.due or self.epoch < self.epochs:
            if self.due:
                self.measure()
            else:
                self.train_epoch()
                after_epoch(self)
            self.save(checkpoint)
        kept = ("mask", "seed", "commits", "settings", "seconds", "processor_seconds", "losses", "curve")
        return {name: getattr(self, name) for name in kept}

    def save(self, path: Path) -> None:
        """Write the whole checkpoint or nothing: a run that is stopped here still has the one before."""
        names = ("epoch", "seconds", "processor_seconds", "losses", "curve", "commits", "settings")
        state = {name: getattr(self, name) for name in names}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        state["teacher"] = self.teacher and self.teacher.state_dict()
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.check(state["settings"], path)
        for name in ("epoch", "seconds", "processor_seconds", "losses", "curve", "commits"):
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])

    def check(self, settings: dict[str, Any], path: Path) -> None:
        """Refuse a file of other settings."""
        for name, value in self.settings.items():
            if settings[name] != value:
                raise SystemExit(
                    f"{path} was made with {name} {settings[name]}, not {value}: move it away, or name other folders "
                    "with --out and --runs"
                )


def num_epochs(mask: str, size: Size) -> int:
    return round(size.epochs * METHODS[mask].epochs)


def stream(seed: int, *place: int) -> int:
    """A seed for each use of random numbers."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


def read_encoder(checkpoint: Path, size: Size) -> tuple[nn.Module, int]:
    """The encoder of a checkpoint, and how many epochs it was trained for."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    shape = (size.image, size.patch, size.width, size.depth, size.heads, size.decoder_depth)
    model = MaskedAutoencoder(RandomMask(), *shape)
    model.load_state_dict({name: value for name, value in state["model"].items() if not name.startswith("masking.")})
    return model.encoder, state["epoch"]


def write(result: dict[str, Any], path: Path, machine: str, device: str) -> None:
    """A finished run, whole or not at all."""
    result = {"machine": machine, "device": device, "versions": common.versions(), **result}
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
