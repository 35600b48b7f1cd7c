"""The mask in one Triton kernel (draws, scores, ties, sort, inverse), and the copy of the visible patches.

To the bit what `torch.py` does.
"""

# No annotations of __future__: the interpreter of Triton 3.0, which torch 2.4 brings, looks for constexpr itself.
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Blend, GroupDraws, Scores, plain, sorts, takes

GAMMA = tl.constexpr(0x9E3779B1)
FIRST = tl.constexpr(-0x40A7B892E31B1A47)
SECOND = tl.constexpr(-0x6B2FB644ECCEEE15)
LAST = tl.constexpr((1 << 63) - 1)
INFINITY = tl.constexpr(0x7F800000)  # as bits
ROWS = 8  # that one program copies


@triton.jit
def _hash(key, counter):
    """64 random bits: SplitMix64."""
    bits = key + counter * GAMMA
    bits = (bits ^ (bits >> 30)) * FIRST
    bits = (bits ^ (bits >> 27)) * SECOND
    return bits ^ (bits >> 31)


@triton.jit
def _scores(values, key, image, stride, patch, inside, KEYED: tl.constexpr):
    """Scores of an image: given, or one draw for each group."""
    value = tl.load(values + image * stride + patch, mask=inside, other=0)
    if KEYED:
        bits = _hash(tl.load(key + image), value.to(tl.int64)) >> 32 & 0xFFFFFF
        value = bits.to(tl.float32) * (1 / 16777216)
    return value


@triton.jit
def _shuffle_kernel(
    start, start_key, end, end_key, alpha, tie_key, ids_keep, ids_restore, mask,
    start_stride, end_stride, num_patches, keep,
    START_KEYED: tl.constexpr, END_KEYED: tl.constexpr, BLEND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    inside = patch < num_patches
    p = _scores(start, start_key, image, start_stride, patch, inside, START_KEYED)
    if BLEND:
        weight = tl.load(alpha)
        p = (1 - weight) * p + weight * _scores(end, end_key, image, end_stride, patch, inside, END_KEYED)
    bits = p.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    order = tl.where((bits < 0) & (size <= INFINITY), -size, size).to(tl.int64)
    wide = tl.max(tl.where(inside, size >> 30, 0))
    ties = _hash(tl.load(tie_key + image), patch.to(tl.int64)) >> (31 + BITS) & ((1 << (33 - BITS)) - 1)
    keys = order << (33 - wide) | ties >> wide << BITS | patch
    ids = tl.sort(tl.where(inside, keys, LAST)) & ((1 << BITS) - 1)
    place = patch
    tl.store(ids_keep + image * keep + place, ids, mask=place < keep)
    tl.store(ids_restore + image * num_patches + ids, place.to(tl.int64), mask=inside)
    tl.store(mask + image * num_patches + ids, (place >= keep).to(tl.float32), mask=inside)


@triton.jit
def _take_kernel(
    x, ids, out, image_stride, row_stride, num_rows, num_taken, total, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b, i] = x[b, ids[b, i]], 0 where ids is past the end of x; ROWS rows of BLOCK columns."""
    taken = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + taken, mask=taken < total, other=num_rows)
    source = taken // num_taken * image_stride + row * row_stride
    there = (column < width)[None, :]
    values = tl.load(x + source[:, None] + column[None, :], mask=there & (row < num_rows)[:, None], other=0)
    tl.store(out + taken[:, None] * width + column[None, :], values, mask=there & (taken < total)[:, None])


def _shuffle(
    start: Tensor, start_key: Tensor | None, end: Tensor | None, end_key: Tensor | None, alpha: Tensor | None,
    tie_key: Tensor, num_patches: int, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    start, end = start.contiguous(), start if end is None else end.contiguous()
    ids_keep, ids_restore, mask = _outputs(tie_key, num_patches, keep)
    block = max(triton.next_power_of_2(num_patches), 16)
    with torch.cuda.device_of(tie_key):  # Triton launches on the current device
        _shuffle_kernel[(len(tie_key),)](
            start, start_key, end, end_key, alpha, tie_key, ids_keep, ids_restore, mask,
            0 if len(start) == 1 else num_patches, 0 if len(end) == 1 else num_patches, num_patches, keep,
            START_KEYED=start_key is not None, END_KEYED=end_key is not None, BLEND=alpha is not None,
            BITS=max(num_patches - 1, 1).bit_length(), BLOCK=block,
            num_warps=max(1, min(block // 128, 8)), enable_fp_fusion=False,  # unfused, it rounds as plain torch does
        )  # fmt: skip
    return ids_keep, ids_restore, mask


def _outputs(tie_key: Tensor, num_patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_keep = tie_key.new_empty(len(tie_key), keep)
    ids_restore = tie_key.new_empty(len(tie_key), num_patches)
    return ids_keep, ids_restore, torch.empty_like(ids_restore, dtype=torch.float32)


def _take(x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    x, ids = x if x.stride(2) == 1 else x.contiguous(), ids.contiguous()
    out = x.new_empty(*ids.shape, x.shape[2])
    block = min(triton.next_power_of_2(x.shape[2]), 1024)
    grid = (triton.cdiv(ids.numel(), ROWS), triton.cdiv(x.shape[2], block))
    with torch.cuda.device_of(x):
        _take_kernel[grid](
            x, ids, out, x.stride(0), x.stride(1), x.shape[1], ids.shape[1], ids.numel(), x.shape[2],
            ROWS=ROWS, BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _shuffle_or_plain(
    start: Tensor, start_key: Tensor | None, end: Tensor | None, end_key: Tensor | None, alpha: Tensor | None,
    tie_key: Tensor, num_patches: int, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if sorts(tie_key.device):
        return _shuffle(start, start_key, end, end_key, alpha, tie_key, num_patches, keep)
    scores: Scores = _part(start, start_key)
    if end is not None and alpha is not None:
        scores = Blend(_part(start, start_key), _part(end, end_key), alpha)
    ids_keep, ids_restore, mask = plain.shuffle(scores, tie_key, num_patches, keep)
    return ids_keep.clone(), ids_restore, mask  # operators return no views


def _part(values: Tensor, key: Tensor | None) -> Tensor | GroupDraws:
    return values if key is None else GroupDraws(key, values)


def _take_or_plain(x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    return _take(x, ids, inverse) if takes(x.device) else plain.take(x, ids, inverse)


# torch.compile sees one opaque operator each; elsewhere they are called without its overhead.
_shuffle_op = torch.library.custom_op(
    "maskevolve::shuffle", _shuffle_or_plain, mutates_args=(),
    schema="(Tensor start, Tensor? start_key, Tensor? end, Tensor? end_key, Tensor? alpha, Tensor tie_key, "
    "int num_patches, int keep) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
_take_op = torch.library.custom_op(
    "maskevolve::take", _take_or_plain, mutates_args=(), schema="(Tensor x, Tensor ids, Tensor inverse) -> Tensor"
)


@_shuffle_op.register_fake
def _(start, start_key, end, end_key, alpha, tie_key, num_patches, keep):
    return _outputs(tie_key, num_patches, keep)


@_take_op.register_fake
def _(x, ids, inverse):
    return x.new_empty(*ids.shape, x.shape[2])


def shuffle(scores: Scores, tie_key: Tensor, num_patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `shuffle.shuffle`."""
    run = _shuffle_op if torch.compiler.is_compiling() else _shuffle
    return run(*_operands(scores), tie_key, num_patches, keep)


def take(x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    """See `torch.take`; x may be of any dtype."""
    run = _take_op if torch.compiler.is_compiling() else _take
    return run(x, ids, inverse)


def _operands(scores: Scores) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A recipe as the kernel takes it: start, its key, end, its key, alpha."""
    if not isinstance(scores, Blend):
        return *_values_and_key(scores), None, None, None
    return *_values_and_key(scores.start), *_values_and_key(scores.end), scores.alpha


def _values_and_key(scores: Tensor | GroupDraws) -> tuple[Tensor, Tensor | None]:
    return (scores.groups, scores.key) if isinstance(scores, GroupDraws) else (scores, None)
