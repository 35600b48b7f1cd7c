"""One forward pass of a model, from the method that is given its images to the end of that method."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class Given:
    """What `Evolution.see` was told of a batch."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self.ignore: int | None = None
        self.labelled: Tensor | None = None  # the images that the labels were used for


class ForwardPass:
    """A forward pass of a model or of its copy that is under way, or a method within it that is given images as well.

    Its images are those that the method which a teacher calls, too, is given; none in another method.
    """

    def __init__(self, module: nn.Module, images: list[Tensor], given: Given) -> None:
        self.module, self.images, self.given = module, images, given
        self.embedded: list[tuple[Tensor, Tensor, Any]] = []  # images, what the patch embedding took, what it made
        self.is_masked = False

    def note_embedding(self, taken: Tensor, made: Any) -> None:
        """Note what the patch embedding took and made: of the same images, in order, or of others."""
        made = made[0] if isinstance(made, tuple | list) else made
        place = len(self.embedded)
        same = [image for image in self.images if is_same_memory(image, taken)]
        # They may have been normalised, or got other channels.
        same += [image for image in self.images[place : place + 1] if _size(image) == _size(taken)]
        # Where autograd knows where patches come from, no tensor is kept for it.
        self.embedded.append((same[0] if same else taken, taken, made if made.grad_fn is None else made.grad_fn))

    def images_of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The images whose patches are x, and what was embedded of them; None where there are none."""
        if not self.embedded:
            return (self.images[0], self.images[0]) if self.images else None
        made = [each[2] for each in self.embedded]
        return self.embedded[_source(x, made) if len(made) > 1 else 0][:2]


class _Mask(NamedTuple):
    images: TensorWeakRef
    embedded: TensorWeakRef
    parts: Tensor | None
    """That came with the batch, [B, N]."""
    runs: set[int]
    """The runs of autograd's backward pass that have repeated it."""


class PastMasks:
    """What activation checkpointing may repeat: masks of images that are still alive, which nothing here keeps so."""

    def __init__(self) -> None:
        self._masks: list[_Mask] = []
        self._lock = threading.Lock()

    def add(self, images: Tensor, embedded: Tensor, parts: Tensor | None) -> None:
        """Note a mask; of one buffer that is filled again and again, the last 64."""
        with self._lock:
            alive = [mask for mask in self._masks if mask.images() is not None or mask.embedded() is not None]
            self._masks = [*alive, _Mask(TensorWeakRef(images), TensorWeakRef(embedded), parts, set())][-64:]

    def find(self, images: Tensor, run: int) -> tuple[Tensor, Tensor | None] | None:
        """The images and the parts of the last mask of these images that this run has not repeated yet."""
        with self._lock:
            found = [
                mask
                for mask in reversed(self._masks)
                if any(each is not None and is_same_memory(each, images) for each in (mask.images(), mask.embedded()))
            ]
            mask = next((mask for mask in found if run not in mask.runs), found[0] if found else None)
            if mask is None:
                return None
            mask.runs.add(run)
            before = mask.images()
            return images if before is None else before, mask.parts


def backward_run() -> int | None:
    """The run of autograd's backward pass that this is called in, as where activation checkpointing repeats a mask."""
    run = torch._C._current_graph_task_id()
    return None if run == -1 else run


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of one."""
    same = one.shape == other.shape and one.device == other.device and one.data_ptr() == other.data_ptr() != 0
    return one is other or same


def _size(images: Tensor) -> tuple[int, int, torch.Size]:
    return images.ndim, len(images), images.shape[max(2, images.ndim - 2) :]  # frames and channels may change places


def _source(x: Tensor, made: list[Any]) -> int:
    """Which of several embeddings, tensors or nodes of autograd, the patches x were made of."""
    nodes = [each for each in made if not isinstance(each, Tensor)]
    found = [place for place, node in enumerate(made) if node in nodes and _leads_to(x.grad_fn, node, nodes)]
    if len(found) == 1:
        return found[0]
    # Positions are added to all images alike: what is left of x without its own embedding is the same for all images.
    spread = [_spread(x, each) if isinstance(each, Tensor) else torch.inf for each in made]
    best, second = sorted(range(len(made)), key=spread.__getitem__)[:2]
    if len(x) > 1 and spread[best] < 0.1 * spread[second]:
        return best
    raise RuntimeError(
        f"the model embedded {len(made)} batches of images before it masked one, and patches of shape {list(x.shape)} "
        "cannot be traced to one of them: call evolution.see(images=...) with the images that are masked, before the "
        "model"
    )


def _spread(x: Tensor, made: Tensor) -> float:
    """How much x less an embedding differs between images."""
    ways = (made, made.flatten(1, -2), made.flatten(2).mT) if made.ndim > 2 else ()
    return next(
        (float((x - way).float().var(0, correction=0).mean()) for way in ways if way.shape == x.shape), torch.inf
    )


def _leads_to(start: Any, node: Any, embeddings: Iterable[Any]) -> bool:
    """Whether autograd goes from one node to another, and not by way of another embedding."""
    waiting, seen, ends = [start], {start, None}, {*embeddings}
    while waiting:
        at = waiting.pop()
        if at is node:
            return True
        new = set() if at is None or at in ends else {following for following, _ in at.next_functions} - seen
        seen |= new
        waiting += new
    return False
