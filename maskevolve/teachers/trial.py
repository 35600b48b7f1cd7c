"""The one trial of a model: a pass of a few small pictures, before it is relied on, and what that tells."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..grid import Grid, every, times
from .attention_mode import AttentionMode
from .average import refuse_sharded, without_weights
from .encoder import all_patches, encode, encoder_of, entry_of, image_size, is_fatal, read_lock, untouched
from .patch_grid import PatchGridError, channels_first, patch_embedding, patch_grid, patch_layout

# An attention module is one that has its number of heads under one of these names.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
T = TypeVar("T")
Shape = tuple[int, ...]


class Done(Exception):
    """Ends a forward pass after what was to be read."""


class Trial(NamedTuple):
    """What was learned of a model. Modules are named, so that it holds for copies of the model."""

    size: int  # how many modules the model has, by which a change shows; 0 where nobody changes it
    pictures: Shape  # shape of the pictures
    shapes: dict[str, Shape | None]  # of the softmax of the encoder's attention modules, as they ran; None: not seen
    tokens: int | None  # how many tokens, [B, tokens, width], the first one that ran was given; None where none
    prefixes: set[int]  # how many tokens come before the patches; negative where windows of an image attend
    problem: str  # why patches are not where the patch grid has them, if they are not


trials: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


def trial_of(model: nn.Module, images: Tensor | None = None) -> Trial:
    """What pictures tell of a model: tried when first asked for and where it changes, in the shape of images first."""
    with read_lock:
        trial = trials.get(model)
        if trial is None or (trial.size and trial.size != len([*model.modules()])):
            trials.pop(model, None)
            trial = _try(model, images)
            if not trial.problem:  # for the user may mend it
                trials[model] = trial
        return trial


def _try(model: nn.Module, images: Tensor | None) -> Trial:
    refuse_sharded(model)
    found = _all_attention(model)
    has_decoder = entry_of(model)[1] == "forward" and not hasattr(model, "base_model")

    def run(pictures: Tensor) -> tuple[dict[nn.Module, Shape | None], list[Tensor], list[Tensor]]:
        shapes: dict[nn.Module, Shape | None] = {}
        given: list[Tensor] = []

        def enter(module: nn.Module, tokens: list[Tensor]) -> None:
            given.extend(() if shapes else tokens)
            shapes.setdefault(module, None)

        def take(module: nn.Module, attention: Tensor) -> None:
            shapes[module] = tuple(attention.shape)

        # Without half of the patches, a decoder has more tokens than the encoder.
        with AttentionMode(found, enter, take), all_patches(model, 0.5 if has_decoder else 1.0) as masked:
            encode(model, pictures)
        return shapes, given, masked[:1]

    pictures, (shapes, given, masked) = _try_pictures(model, run, images)
    # A class token or a pooling head attends to patches, but they do not to one another.
    ran = [module for module, shape in shapes.items() if shape is None or shape[-2] == shape[-1]] or list(found)
    hidden = 0
    if has_decoder and masked:
        hidden = masked[0].shape[1] - max(1, masked[0].shape[1] // 2)
        ran = [module for module in ran if shapes.get(module) == shapes.get(ran[0])]
    elif has_decoder:  # the encoder is the list of blocks that images come to first
        ran = [module for module in ran if _list_of(model, found[module]) == _list_of(model, found[ran[0]])]
    seen = ((found[module], shapes.get(module)) for module in ran)
    whole = {name: shape and (*shape[:-2], shape[-2] + hidden, shape[-1] + hidden) for name, shape in seen}
    tokens = given[0].shape[1] + hidden if given else None
    try:
        grid = patch_grid(model, pictures)
        problem = _problem(model, pictures, grid, masked, masked if hidden else masked + given)
    except PatchGridError as error:
        grid, problem = (1,), str(error)
    counts = [shape[-1] for shape in whole.values() if shape] + ([] if tokens is None else [tokens])
    prefixes = {count - math.prod(grid) for count in counts}
    return Trial(len([*model.modules()]), tuple(pictures.shape), whole, tokens, prefixes, problem)


def _problem(model: nn.Module, pictures: Tensor, grid: Grid, masked: list[Tensor], tokens: list[Tensor]) -> str:
    """Why the patches that a model masks, or its tokens, are not those of the grid, row by row, if they are not."""
    count = math.prod(grid)
    cut = f"should cut images of shape {list(pictures.shape)} into {times(grid)} patches"
    should = f"{type(model).__name__} {cut}, by its {type(patch_embedding(model)).__name__}, but"
    if masked and masked[0].shape[1] != count:
        other = "say grid_size=... where masks are applied, or use a mask that needs no grid, such as RandomMask()"
        return f"{should} masks {masked[0].shape[1]} tokens: {other}"
    for seen in tokens:
        if len(seen) != len(pictures) or seen.shape[1] < count:
            continue  # windows of images, or fewer tokens: no teacher reads them
        change = (seen[1:, -count:].double() - seen[:1, -count:].double()).norm(dim=2).unflatten(1, grid)
        for each in (change[place].movedim(-1 - place, 0) for place in range(len(grid))):
            third = (len(each) + 1) // 3  # without the middle, to which convolutions carry what changed
            # Twice, for norms of whole images carry it everywhere: a seventh of it at most in models of timm.
            if third and bool(each[:third].mean() < 2 * each[-third:].mean()):
                return (
                    f"{should} where half of a picture changed, its {seen.shape[1]} tokens changed elsewhere, too: set "
                    "model.patch_embed.patch_size (in pixels) or, if it reorders tokens, as Hiera does, take a model "
                    "that does not, or a function from images to labels"
                )
    return ""


def _try_pictures(model: nn.Module, run: Callable[[Tensor], T], images: Tensor | None = None) -> tuple[Tensor, T]:
    """The first pictures with which `run` goes through the model, and what it returned."""
    tried: dict[str, Exception] = {}
    with read_lock, untouched(model):
        for pictures in _pictures(model, images):
            try:
                return pictures, run(pictures)
            except Exception as error:  # noqa: PERF203
                if is_fatal(error):
                    raise
                tried[str(list(pictures.shape))] = error
    patch_layout(model)  # raises an error that says more, where patches cannot be told
    shape, cause = next(iter(tried.items()))
    of_size = image_size(model) is None and len({str(error) for error in tried.values()}) > 1
    advice = ". Where it takes images of one size, set model.img_size = (height, width), in pixels" if of_size else ""
    advice += ". For clips, set model.num_frames, too" * (len(patch_layout(model).kernel) == 3)
    raise ValueError(
        f"{type(model).__name__} could not be tried on a picture. Tried: {', '.join(tried)}. Its error at {shape}: "
        f"{type(cause).__name__}: {cause}. It must take images [B, C, height, width] alone: pass the encoder that does "
        f"(a model of images and text has one){advice}"
    ) from cause


def _pictures(model: nn.Module, images: Tensor | None) -> Iterator[Tensor]:
    """Pictures to try: noise, then with other halves; in the shape of `images`, the model's own, or a likely one."""
    embed = patch_embedding(model)
    modules = [*([] if embed is None else embed.modules()), model]
    owners = (*modules, getattr(model, "config", None))
    numbers = (getattr(owner, name, None) for owner in owners for name in ("in_channels", "in_chans", "num_channels"))
    known = next(([number] for number in numbers if isinstance(number, int)), [3, 1])
    with suppress(PatchGridError):  # a linear layer that embeds patches is as wide as their pixels
        width = next((each.in_features for each in modules if isinstance(each, nn.Linear)), 0)
        known += [max(1, width // math.prod(patch_layout(model).kernel))] * (len(known) > 1)
    shapes = [] if images is None else [tuple(images.shape[1:])]
    shapes += [shape for channels in known for shape in _likely_shapes(model, channels, owners)]
    weights = (weight for owner in modules for weight in owner.parameters() if weight.is_floating_point())
    weight = next(weights, torch.empty(()))
    for shape in dict.fromkeys(shapes):
        axes = 2
        with suppress(ValueError):
            axes = channels_first(model, torch.empty(0, *shape)).ndim - 2
        pictures = torch.rand(1 + axes, *shape, device=weight.device).to(weight.dtype)
        with suppress(ValueError):
            _halve(channels_first(model, pictures))
        yield pictures


def _halve(pictures: Tensor) -> None:
    """Give each picture the second half of the first one, along one axis after the other, the last axis first."""
    for place in range(1, len(pictures)):
        half, first = pictures.shape[-place] // 2, pictures[0].movedim(-place, 0)
        pictures[place].movedim(-place, 0)[half:] = first[half:]


def _likely_shapes(model: nn.Module, channels: int, owners: Sequence[Any]) -> list[Shape]:
    """Of the pictures, clips, volumes or series that a model may be made for, without the batch."""
    size, kernel = image_size(model), Grid((16, 16))
    with suppress(PatchGridError):
        kernel = patch_layout(model).kernel
    sizes = [size] if size else _likely_sizes(model)
    if len(kernel) < 3:
        frames = [(1,), ()] if any(isinstance(owner, nn.Conv3d) for owner in owners) else [()]
        return [(channels, *frame, *each[: len(kernel)]) for each in sizes for frame in frames]
    if size and len(size) == 3:
        return [(channels, *size), (size[0], channels, *size[1:])]
    counts = (getattr(owner, name, None) for owner in owners for name in ("num_frames", "frames"))
    own = [count for count in counts if isinstance(count, int)][:1]
    places = [*_tables(model), *(each for owner in owners if isinstance(each := getattr(owner, "num_patches", 0), int))]
    for height, width in sizes if size and not own else ():  # as many as position embeddings have a place for
        frame = (height // kernel[1]) * (width // kernel[2]) or 1
        own += [tokens // frame * kernel[0] for tokens in places if tokens >= frame and tokens % frame < 3]
    single = [(channels, *frame, *each) for each in sizes for frame in ((1,), ()) if kernel[0] == 1]
    known, likely = ([(channels, count, *each) for each in sizes for count in some] for some in (own, [4 * kernel[0]]))
    cubes = [(channels, *each, each[-1]) for each in sizes]
    first_frames = [(count, number, *each) for number, count, *each in known + likely]
    return [*known, *first_frames[: len(known)], *single, *likely, *cubes, *first_frames[len(known) :]]


def _tables(model: nn.Module) -> list[int]:
    """The numbers of tokens that have position embeddings, [1, tokens, width]."""
    return [each.shape[1] for each in (*model.parameters(), *model.buffers()) if each.ndim == 3 and len(each) == 1]


def _likely_sizes(model: nn.Module) -> list[Shape]:
    """What a model may be made for, as its position embeddings, [1, tokens, width], tell; and others."""
    kernel = stride = Grid((16, 16))
    with suppress(PatchGridError):
        kernel, stride, *_ = patch_layout(model)
    tables = _tables(model)
    if len(kernel) == 1:  # of a series, they have a place for each patch, and for tokens before these
        tables = [(count - prefix) ** 2 for count in tables for prefix in (0, 1)]
    sides = sorted({math.isqrt(count) for count in tables if count > 3}, reverse=True)
    last = [*zip(stride, kernel, strict=True)][-2:]
    return [*(tuple((side - 1) * step + reach for step, reach in last) for side in [*sides, 4]), (224, 224)]


def prefix_length(model: nn.Module, images: Tensor, tokens: int, stride: int = 1) -> int:
    """How many of the tokens of images (class, register, ...) come before the patches, where that can be told."""
    grid, trial = [len(every(side, stride)) for side in patch_grid(model, images)], trial_of(model, images)
    prefix, attends = tokens - math.prod(grid), f"{type(model).__name__} attends over {tokens} tokens"
    patches = f"{times(grid)} patches of images of shape {list(images.shape)}"
    if trial.problem:
        raise ValueError(trial.problem)
    if prefix < 0:
        raise ValueError(f"{attends}, fewer than the {patches}: does it drop patches (masking, patch_drop_rate)?")
    if prefix not in trial.prefixes:
        should = f"{attends}, but should over {' or '.join(map(str, sorted(trial.prefixes)))} and the {patches}"
        raise ValueError(f"{should}: set model.patch_embed.patch_size (in pixels), or choose another image size")
    return prefix


def check_shape(shape: Shape, before: Shape | None) -> None:
    """Refuse attention that is not [B, heads, tokens, tokens], or not between the tokens of the layers before."""
    if len(shape) != 4 or (before is not None and (shape[0], *shape[2:]) != (before[0], *before[-2:])):
        after = "" if before is None else f" after {list(before)} in the layer before"
        raise ValueError(
            f"attention has shape {list(shape)}{after}, but must be [B, heads, tokens, tokens], between all tokens of "
            "an image: unflatten the heads before the softmax, or choose layers without windows with layers=[...]"
        )


def check_affinity(model: nn.Module, layers: Sequence[int] | str | None) -> None:
    """Refuse a model of which `layers`, "middle" or "tokens", could not be read in training, by what its trial told."""
    attention, trial = attention_modules(model, None if layers == "tokens" else layers), trial_of(model)
    if trial.problem:
        raise ValueError(trial.problem)
    tokens, before = trial.tokens, None
    for name, _ in () if layers == "tokens" else attention:
        shape = trial.shapes[name]
        if shape is None:
            raise RuntimeError(not_found(model, f"took no softmax attention in {name}"))
        check_shape(shape, before)
        before, tokens = shape, shape[-1]
    if tokens is None:
        raise RuntimeError(not_found(model, f"gave no tokens, [B, tokens, width], to {attention[0][0]}"))
    prefix_length(model, torch.empty(trial.pictures, device="meta"), tokens)


def check_patches(model: nn.Module) -> None:
    """Refuse a model whose patch grid is not to be found, or not that of the patches that it makes and masks."""
    patch_layout(model)
    if without_weights(model):
        return  # for these cannot be run a part at a time
    try:
        problem = trial_of(model).problem
    except ValueError as error:
        if len(patch_layout(model).kernel) != 2:
            how = "the order of its patches cannot be seen: say it with grid_size=..., where masks are applied"
            raise ValueError(f"{error}. So {how}") from error
        # Of an encoder that takes more than images, the patch embedding is tried alone.
        problem, _ = "", _try_pictures(model, patch_embedding(model))
    if problem:
        raise ValueError(problem)


def attention_modules(
    model: nn.Module, layers: Sequence[int] | str | None = None, images: Tensor | None = None
) -> list[tuple[str, nn.Module]]:
    """The encoder's attention modules by name, without those of a decoder or pooling head; or `layers` of them.

    "middle" are those of neither the first nor the last third of the layers.
    """
    names = list(trial_of(model, images).shapes)
    if not names:
        raise RuntimeError(not_found(model, f"has no attention module, which is one with `{'` or `'.join(HEADS)}`"))
    if isinstance(layers, int) or (layers is not None and not len(layers)):
        raise ValueError(f"layers={layers} must be a list of at least one layer, such as [0, 1]")
    count = len(names)
    layers = range(count // 3, count - count // 3) if isinstance(layers, str) else layers
    if bad := [layer for layer in layers or () if not -count <= layer < count]:
        raise ValueError(f"layer {bad[0]} does not exist: the model has {count} attention layers, 0..{count - 1}")
    return [(name, model.get_submodule(name)) for name in (names if layers is None else [names[i] for i in layers])]


def _all_attention(model: nn.Module) -> dict[nn.Module, str]:
    """All modules that attend, and their names, those of a decoder too."""
    inside = set(encoder_of(model).modules())
    named = {module: name for name, module in model.named_modules() if module in inside}
    found = {module for module in named if any(hasattr(module, heads) for heads in HEADS)}
    # Where a block or the whole model has such a name too, the attention is what lies innermost.
    return {module: name for module, name in named.items() if found & set(module.modules()) == {module}}


def _list_of(model: nn.Module, name: str) -> str | None:
    """The name of the outermost list that a module is in."""
    parts = name.split(".")
    owners = (".".join(parts[:end]) for end in range(len(parts)))
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return next((owner for owner in owners if isinstance(model.get_submodule(owner), lists)), None)


def blocks_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks, which are members of a list, that modules of these names are in; an error where they are in none."""
    found = list[nn.Module]()
    for name in names:
        if (owner := _list_of(model, name)) is None:
            raise ValueError(f"{type(model).__name__} has no list of blocks, where patches could be left out")
        place = owner.count(".") + 1 if owner else 0
        found.append(model.get_submodule(".".join(name.split(".")[: place + 1])))
    return list(dict.fromkeys(found))


def not_found(model: nn.Module, what: str) -> str:
    """The message where no attention is found: what happened, and the modules that were looked at."""
    looked_at = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if name]
    shown = ", ".join(looked_at[:40] + [f"{len(looked_at) - 40} more"] * (len(looked_at) > 40))
    return (
        f"{type(model).__name__} {what}. Attention is read where a module has `num_heads` and takes a softmax or "
        "scaled_dot_product_attention: set self.num_heads in yours, name the layers that do with layers=[...], or give "
        f"an affinity [B, N, N] of your own to a partitioner. Modules looked at: {shown or 'none'}."
    )
