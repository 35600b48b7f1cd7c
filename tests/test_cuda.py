"""What only a GPU can show. Skipped where there is none: CI has none, and cannot install one."""

import math
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from planted import planted_attention
from test_masks import MASKS, random_parts
from test_mincut import random_grid
from test_split import gram_of, random_edges, random_features, random_sides
from vits import photographs

from maskevolve import BlockMask, EvolvingMask, GraphCutPartitioner, GridMask, PartMask, TubeMask, TubePartitioner
from maskevolve.masks import functional as F
from maskevolve.parts import kernel_trial
from maskevolve.parts.edges import contrast_edges
from maskevolve.parts.mincut import grid_min_cut
from maskevolve.parts.split import kernel as split
from maskevolve.parts.split import whole_images
from maskevolve.parts.split.plain import HostParts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@contextmanager
def no_host_sync():
    """Any wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (7, 5), (14, 14), (32, 32), (37, 37), (48, 48), (20, 200), (64, 64)]
)
@pytest.mark.parametrize(("largest", "sparse"), [(1, 0), (1000, 0.5), (2**31 - 1, 0.2)])
def test_every_solver_cuts_alike(height, width, largest, sparse):
    grid = random_grid(height, width, largest, sparse, seed=height, batch_size=16)
    expected = grid_min_cut(*grid, solver="pymaxflow")
    for solver in ("auto", "triton", "torch", "scipy"):
        assert torch.equal(grid_min_cut(*(tensor.cuda() for tensor in grid), solver=solver).cpu(), expected)


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
def test_masks_do_not_wait_for_the_gpu_and_repeat_their_gradients(make):
    masking, parts = make().cuda(), random_parts(8, 196).cuda()
    x = torch.randn(8, 196, 32, device="cuda", requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        with no_host_sync():
            visible, mask, _ = masking(x, 0.75, parts=parts)
            visible.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(x.grad, (1 - mask)[..., None].expand_as(x))
    assert (mask.sum(1) == 147).all()


@pytest.mark.parametrize("side", [1, 7, 14, 28, 48, 64])
@pytest.mark.parametrize("weaken", [True, False])
def test_the_tree_of_parts_has_the_bits_of_the_cpu(side, weaken):
    patches = side * side
    gram = gram_of(random_features(patches, 6, seed=0, batch_size=4))
    edges = random_edges(side, side, seed=1, batch_size=4)
    ours = whole_images(gram.cuda(), edges.cuda(), (side, side), weaken)
    expected = HostParts(gram, edges, (side, side), weaken)
    assert isinstance(ours, split.TritonParts)
    for level in range(6):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours.capacities(), expected.capacities(), strict=True))
        sides = random_sides(patches, level, batch_size=4)
        assert torch.equal(ours.split(sides.cuda()).cpu(), expected.split(sides))
        assert torch.equal(ours.labels.cpu(), expected.labels)


@pytest.mark.parametrize("images", [None, photographs(16, 224)], ids=["affinity", "contrast"])
def test_parts_do_not_wait_for_the_gpu_and_are_those_of_the_cpu(images):
    _, affinity = planted_attention(16, 14, 14, 8, strength=0.5, noise=1, heads=4)
    partitioner, on_gpu = GraphCutPartitioner(), affinity.cuda()
    pictures = None if images is None else images.cuda()
    partitioner(on_gpu, images=pictures)  # compiles
    with no_host_sync():
        parts = partitioner(on_gpu, images=pictures)
    different = parts.cpu() != GraphCutPartitioner()(affinity, images=images)
    assert different.float().mean() < 0.01, "rounding of features may move a few patches"


@pytest.mark.parametrize(("side", "stride"), [(14, 2), (14, 3), (37, 2), (64, 2)])
def test_the_affinity_of_every_few_patches_needs_no_wait_and_gives_the_parts_of_the_cpu(side, stride):
    grid, size, images = (side, side), len(range((side - 1) % stride // 2, side, stride)), photographs(4, 8 * side)
    _, affinity = planted_attention(4, size, size, 6, strength=0.5, noise=1, heads=4)
    partitioner, on_gpu, pictures = GraphCutPartitioner(), affinity.cuda(), images.cuda()
    partitioner(on_gpu, 10, grid, pictures, stride)  # compiles
    with no_host_sync():
        parts = partitioner(on_gpu, 10, grid, pictures, stride)
        alone = partitioner(on_gpu[:1], 10, grid, pictures[:1], stride)
    assert (alone != parts[:1]).float().mean() < 0.01
    different = parts.cpu() != GraphCutPartitioner()(affinity, 10, grid, images, stride)
    assert different.float().mean() < 0.01, "rounding of features may move a few patches"


def test_grids_beyond_the_kernels_are_cut_on_the_host():
    grid = random_grid(65, 64, 1000, 0.5, seed=0, batch_size=2)
    expected = grid_min_cut(*grid, solver="pymaxflow")
    for solver in ("auto", "triton"):
        ours = grid_min_cut(*(tensor.cuda() for tensor in grid), solver=solver)
        assert ours.is_cuda
        assert torch.equal(ours.cpu(), expected)
    affinity, images = torch.rand(1, 33 * 33, 33 * 33), photographs(1, 4 * 65)
    parts = GraphCutPartitioner()(affinity.cuda(), 10, 65, images.cuda(), 2)
    assert parts.is_cuda
    assert (parts.cpu() != GraphCutPartitioner()(affinity, 10, 65, images, 2)).float().mean() < 0.01


@pytest.mark.parametrize("side", [1, 7, 14, 28, 56])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_edges_from_contrast_have_the_bits_of_the_cpu(side, dtype):
    images = (photographs(4, 224) * 50 + 100).to(dtype)
    if dtype.is_floating_point:
        images[0, 1, 3:9, 5] = math.nan
    expected = contrast_edges(images, (side, side), 16)
    with no_host_sync():
        ours = contrast_edges(images.cuda(), (side, side), 16, by_kernel=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def test_copies_of_a_partitioner_and_empty_batches():
    partitioner, affinity = GraphCutPartitioner(), torch.rand(2, 49, 49, device="cuda")
    parts, again = partitioner(affinity), pickle.loads(pickle.dumps(partitioner))
    assert torch.equal(again(affinity), parts)
    assert again(affinity[:0]).shape == (0, 49)


def test_a_graph_replays_with_new_draws():
    masking, parts = EvolvingMask(10).set_epoch(4).cuda(), random_parts(8, 196).cuda()
    partitioner, affinity = GraphCutPartitioner(), torch.rand(8, 196, 196, device="cuda")
    images, x = torch.rand(8, 3, 224, 224, device="cuda"), torch.randn(8, 196, 32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            masking(x, parts=parts)
            partitioner(affinity, images=images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cut = partitioner(affinity, images=images)
        mask = masking(x, parts=parts).mask
    graph.replay()
    first = mask.clone()
    graph.replay()
    assert not torch.equal(first, mask)
    assert (mask.sum(1) == 147).all()
    assert torch.equal(cut, partitioner(affinity, images=images))


def test_compiles_whole_on_the_gpu():
    torch._dynamo.reset()
    masking, parts = EvolvingMask(10).set_epoch(4).cuda(), random_parts(4, 49).cuda()
    x = torch.randn(4, 49, 8, device="cuda", requires_grad=True)
    visible, mask, _ = torch.compile(masking, fullgraph=True)(x, 0.75, parts=parts)
    visible.sum().backward()
    assert torch.equal(x.grad, (1 - mask)[..., None].expand_as(x))


def use_every_kernel(device):
    affinity = torch.rand(4, 49, 49, generator=torch.Generator().manual_seed(0)).to(device)
    return GraphCutPartitioner()(affinity, images=photographs(4, 56).to(device))


def test_every_kernel_works_where_it_is_tried_and_the_first_call_may_wait(monkeypatch):
    monkeypatch.setattr(kernel_trial, "_worked", {})
    grid = [tensor.cuda() for tensor in random_grid(7, 7, 9, 0.5, seed=0)]
    with warnings.catch_warnings(), no_host_sync():
        warnings.simplefilter("error", UserWarning)
        grid_min_cut(*grid)
        assert torch.cuda.get_sync_debug_mode() == 2, "as it was before"
    use_every_kernel("cuda")
    assert list(kernel_trial._worked.values()) == [True] * 3, "the cut, the tree and the edges"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors():
    expected = use_every_kernel("cuda:0")
    with torch.cuda.device(0):
        ours = use_every_kernel("cuda:1")
    assert ours.device.index == 1
    assert torch.equal(ours.cpu(), expected.cpu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("value", [None, math.nan, -math.nan])
def test_scores_have_the_order_of_the_cpu_without_a_wait_and_nan_is_removed_first(dtype, value):
    x, scores = torch.randn(4, 196, 3), torch.stack([torch.randperm(196) - 98 for _ in range(4)]).to(dtype)
    if value is not None and dtype.is_floating_point:
        scores[:, 5] = value
    on_gpu = x.cuda(), scores.cuda()
    with no_host_sync():
        ours = F.mask_patches(*on_gpu)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, F.mask_patches(x, scores), strict=True))
    assert (ours.mask.sum(1) == 147).all()
    assert value is None or not dtype.is_floating_point or (ours.mask[:, 5] == 1).all()


CLIP = (8, 14, 14)
OF_CLIPS = [GridMask((1, 2, 2)), BlockMask(), TubeMask(PartMask()), TubeMask(EvolvingMask(4).set_epoch(2))]


@pytest.mark.parametrize("masking", OF_CLIPS, ids=lambda masking: repr(masking).split("(")[0])
def test_masks_of_clips_do_not_wait_for_the_gpu(masking):
    x, parts = torch.randn(4, 1568, 8, device="cuda"), random_parts(4, 1568).cuda()
    masking = masking.cuda()
    with no_host_sync():
        mask = masking(x, keep=156, parts=parts if masking.needs_parts else None, grid_size=CLIP).mask
    assert mask.sum(1).tolist() == [1412] * 4


@pytest.mark.parametrize("partitioner", [GraphCutPartitioner(6), TubePartitioner(GraphCutPartitioner(6))])
def test_parts_of_clips_are_those_of_the_cpu(partitioner):
    affinity, images = planted_attention(2, 12, 12, 6)[1], torch.rand(2, 3, 8, 24, 24)
    grid = (4, 6, 6)
    expected = partitioner(affinity, grid_size=grid, images=images)
    assert torch.equal(partitioner(affinity.cuda(), grid_size=grid, images=images.cuda()).cpu(), expected)
