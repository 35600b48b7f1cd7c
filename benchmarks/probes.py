"""What a pretrained encoder has learned: the measures of the study of pretraining, the same for all masks.

python benchmarks/probes.py --data ../shared/data/tinyimagenet20 --checkpoints runs/pretraining/patch4/random-0/state.pt

chooses their settings: it fits every probe with each value that could be taken on the training pictures that it may
learn from, scores it on those that are held out, and writes `results/<machine>/probes.json`. Best values are then set
in `SETTINGS`, by hand. No picture of `val` is looked at.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import common
import torch
from pictures import Data, Pictures, batches, normalised
from regions import COMPONENTS, DISTANCES, Crops, pairs_told_apart, whitened
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SETTINGS: dict[str, Any] = {
    "linear_c": 1.0,  # inverse of the weight of the squared weights, features scaled to deviation 1
    "neighbours": 100,
    "boxes_c": 0.01,
    "fine_tune_lr": 3e-3,
    "fine_tune_weight_decay": 0.05,
    "fine_tune_warm_up": 0.1,  # share of the steps
    "fine_tune_batch": 64,
    "label_smoothing": 0.1,
    "segmented": 500,  # pictures, of those to learn from and of those to score, whose patches are labelled
    "disturbed": 2000,  # pictures
    "regions": {"components": COMPONENTS, "distances": list(DISTANCES)},
}
CANDIDATES = {
    "linear_c": (0.001, 0.01, 0.1, 1.0, 10.0),
    "neighbours": (5, 10, 20, 50, 100),
    "boxes_c": (0.0001, 0.01, 1.0),
    "fine_tune_lr": (1e-3, 3e-3),
}
BATCH = 50  # pictures, without gradients
MOST_STEPS = 1000  # of the solver


def regions(encoder: nn.Module, crops: dict[str, Crops]) -> dict[str, float]:
    """How well patches of people's regions are told apart, for each collection of pictures."""
    found = {name: whitened(tokens(encoder, each.images)) for name, each in crops.items()}
    return {f"regions_{name}": pairs_told_apart(found[name], each.regions) for name, each in crops.items()}


def classification(encoder: nn.Module, fit: Pictures, test: Pictures) -> dict[str, float | None]:
    """Accuracy without training the encoder further."""
    pairs = [(pooled(encoder, pictures.images), pictures.classes) for pictures in (fit, test)]
    return {
        "linear": score(linear_probe(SETTINGS["linear_c"]), *pairs),
        "knn": score(nearest(SETTINGS["neighbours"], fit), *pairs),
    }


def half_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16, on all devices."""
    return torch.autocast(device.type, torch.bfloat16)


def linear_probe(c: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MOST_STEPS))


def nearest(neighbours: int, fit: Pictures) -> KNeighborsClassifier:
    """No more neighbours than a class has pictures."""
    a_class = len(fit.images) // len(fit.classes.unique())
    return KNeighborsClassifier(min(neighbours, a_class), metric="cosine")


def score(probe: Any, fit: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    return float(probe.fit(*(tensor.numpy() for tensor in fit)).score(*(tensor.numpy() for tensor in test)))


def patches_of_objects(encoder: nn.Module, fit: Pictures, test: Pictures, c: float) -> float | None:
    """Mean IoU of a linear probe on the tokens of patches; the encoder sees whole pictures."""
    if fit.objects is None or test.objects is None:
        return None
    fit, test = (pictures.spread(SETTINGS["segmented"]) for pictures in (fit, test))
    features = [tokens(encoder, pictures.images).flatten(0, 1).numpy() for pictures in (fit, test)]
    probe = linear_probe(c).fit(features[0], fit.objects.flatten().numpy())
    return float(jaccard_score(test.objects.flatten().numpy(), probe.predict(features[1]), average="macro"))


@torch.no_grad()
def tokens(encoder: nn.Module, images: Tensor, pool: bool = False) -> Tensor:
    """[n, N, D] float32 on the CPU, of the patches after the last norm; [n, D], their mean, where pooled."""
    encoder.eval()
    device, found = next(encoder.parameters()).device, []
    for batch in images.split(BATCH):
        with half_precision(device):
            x = encoder.forward_features(normalised(batch.to(device)))[:, 1:].float()
        found.append((x.mean(1) if pool else x).cpu())
    encoder.train()
    return torch.cat(found)


def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    return tokens(encoder, images, pool=True)


def fine_tune(
    encoder: nn.Module, fit: Pictures, tests: dict[str, Pictures], epochs: int, seed: int, lr: float | None = None
) -> dict[str, float]:
    """Accuracy, on each of tests, of a copy of the encoder, trained with a linear layer on the mean of its patches.

    Args:
        encoder: stays as it is.
        fit: pictures to learn from, cropped and flipped at random.
        tests: pictures to score.
        epochs: passes over `fit`.
        seed: of the new layer, of the order and of the crops.
        lr: learning rate; that of SETTINGS where None.
    """
    device = next(encoder.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(encoder.num_features, int(fit.classes.max()) + 1)
    model = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head}).to(device)
    groups = param_groups_weight_decay(model, SETTINGS["fine_tune_weight_decay"])
    optimizer = torch.optim.AdamW(groups, SETTINGS["fine_tune_lr"] if lr is None else lr)
    steps = epochs * max(1, len(fit.images) // SETTINGS["fine_tune_batch"])
    warm_up = round(SETTINGS["fine_tune_warm_up"] * steps)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=warm_up, t_in_epochs=False)
    generator, step = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        for index, images in batches(fit.images, SETTINGS["fine_tune_batch"], generator, str(device)):
            schedule.step_update(step)
            step += 1
            with half_precision(device):
                logits = model["head"](model["encoder"].forward_features(images)[:, 1:].mean(1))
            classes = fit.classes[index].to(device)
            loss = cross_entropy(logits.float(), classes, label_smoothing=SETTINGS["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: accuracy(model, test) for name, test in tests.items()}


@torch.no_grad()
def accuracy(model: nn.ModuleDict, test: Pictures) -> float:
    head = model["head"]
    logits = head(pooled(model["encoder"], test.images).to(head.weight.device))
    return float((logits.argmax(1).cpu() == test.classes).float().mean())


def choose(encoder: nn.Module, fit: Pictures, held_out: Pictures, epochs: int) -> list[common.Row]:
    """The score of each candidate on the pictures that are held out."""
    pairs = [(pooled(encoder, pictures.images), pictures.classes) for pictures in (fit, held_out)]
    scores = {
        "linear_c": lambda c: score(linear_probe(c), *pairs),
        "neighbours": lambda k: score(nearest(k, fit), *pairs),
        "boxes_c": lambda c: patches_of_objects(encoder, fit, held_out, c),
        "fine_tune_lr": lambda lr: fine_tune(encoder, fit, {"held_out": held_out}, epochs, 0, lr)["held_out"],
    }
    found = []
    for name, values in CANDIDATES.items():
        for value in values:
            found.append({"setting": name, "value": value, "score": scores[name](value)})
            print(found[-1], flush=True)
    return found


def main() -> None:
    from mask_runs import SIZES, read_encoder

    parser = common.make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--size", choices=SIZES, default="patch4")
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="of runs of pretraining.py")
    args = parser.parse_args()
    path, size = common.folder(args.device) / "probes.json", SIZES[args.size]
    data = Data.read(args.data, size.image, size.patch, size.labelled)
    rows = []
    for checkpoint in args.checkpoints:
        encoder, epoch = read_encoder(checkpoint, size)
        found = choose(encoder.to(args.device), data.fit, data.held_out, size.fine_tune_epochs)
        rows += [{"encoder": checkpoint.parent.name, "epoch": epoch, **row} for row in found]
    settings = {"size": args.size, "pictures": data.fingerprint, "versions": common.versions()}
    path.write_text(json.dumps({"machine": common.machine(args.device), **settings, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
