"""What only a GPU can show. Skipped where there is none: CI has none, and cannot install one."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from planted import planted_attention
from test_masks import MASKS, random_parts
from test_mincut import random_grid
from test_twomeans import random_sides
from vits import photographs

from maskevolve import EvolvingMask, GraphCutPartitioner
from maskevolve.masks import functional as F
from maskevolve.masks.shuffle import kernel as shuffle_kernels
from maskevolve.masks.shuffle import random_key, shuffle
from maskevolve.parts import kernels as fused
from maskevolve.parts.edges import contrast_edges, patch_sums
from maskevolve.parts.mincut import grid_min_cut
from maskevolve.parts.mincut import kernel as mincut_kernels
from maskevolve.parts.split import kernel as twomeans_kernels
from maskevolve.parts.split import whole_images
from maskevolve.parts.split.kernel import TritonParts
from maskevolve.parts.split.plain import TorchParts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@contextmanager
def no_host_sync():
    """Any wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (14, 14), (32, 32), (48, 48)])
@pytest.mark.parametrize(("largest", "sparse"), [(1, 0), (1000, 0.5), (2**31 - 1, 0.2)])
def test_every_solver_cuts_alike(height, width, largest, sparse):
    grid = random_grid(height, width, largest, sparse, seed=height, batch_size=16)
    expected = grid_min_cut(*grid, solver="pymaxflow")
    for solver in ("auto", "triton", "torch"):
        assert torch.equal(grid_min_cut(*(tensor.cuda() for tensor in grid), solver=solver).cpu(), expected)


@pytest.mark.parametrize("num_patches", [1, 49, 196, 784, 2304, 4900])
def test_the_shuffle_has_the_bits_of_the_cpu(num_patches):
    draws = torch.Generator().manual_seed(0)
    groups = torch.randint(10, (8, num_patches), generator=draws)
    start, end = (F.GroupDraws(random_key(8, None, draws), each) for each in (groups, groups.flip(1)))
    tie_key, keep = random_key(8, None, draws), (num_patches + 3) // 4
    expected = shuffle(F.Blend(start, end, torch.tensor(0.3)), tie_key, num_patches, keep)
    start, end = (F.GroupDraws(each.key.cuda(), each.groups.cuda()) for each in (start, end))
    ours = shuffle(F.Blend(start, end, torch.tensor(0.3).cuda()), tie_key.cuda(), num_patches, keep)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


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


@pytest.mark.parametrize("patches", [1, 60, 196, 784, 2304])
def test_the_tree_of_parts_has_the_bits_of_the_cpu(patches):
    features = torch.randint(-9, 10, (4, patches, 6), generator=torch.Generator().manual_seed(0))
    gram = (features @ features.mT).float()
    ours, expected = whole_images(gram.cuda()), TorchParts(gram)
    assert isinstance(ours, TritonParts)
    for level in range(6):
        terminals = zip(ours.terminals(), expected.terminals(), strict=True)
        assert all(torch.equal(a.cpu(), b) for a, b in terminals)
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
    different = int((parts.cpu() != GraphCutPartitioner()(affinity, images=images)).sum())
    assert different < 0.01 * parts.numel(), "rounding of features may move a few patches"


def test_edges_from_contrast_have_the_bits_of_the_cpu():
    images = photographs(16, 224)
    expected = contrast_edges(patch_sums(images, (14, 14))[0], (14, 14), 16)
    ours = contrast_edges(patch_sums(images.cuda(), (14, 14))[0], (14, 14), 16)
    assert torch.equal(ours.cpu(), expected)


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
    masking, parts = EvolvingMask(10).set_epoch(4).to(device), random_parts(4, 49).to(device)
    affinity = torch.rand(4, 49, 49, generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(4, 49, 32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    return *masking(x, parts=parts, generator=generator)[1:], GraphCutPartitioner()(affinity)


def test_every_kernel_works_where_it_is_tried_and_the_first_call_may_wait(monkeypatch):
    monkeypatch.setattr(fused, "_worked", {})
    masking, parts = EvolvingMask(10).set_epoch(4).cuda(), random_parts(4, 49).cuda()
    with warnings.catch_warnings(), no_host_sync():
        warnings.simplefilter("error", UserWarning)
        masking(torch.randn(4, 49, 32, device="cuda"), parts=parts)
        assert torch.cuda.get_sync_debug_mode() == 2, "as it was before"
    use_every_kernel("cuda")
    places = {place.split(" on ")[0] for place, worked in fused._worked.items() if worked}
    assert places == {"masks", "visible patches", "min cuts", "two means"}


def test_kernels_that_do_not_compile_give_way_to_plain_torch(monkeypatch):
    expected = use_every_kernel("cuda")
    monkeypatch.setattr(fused, "_worked", {})
    for module in (mincut_kernels, shuffle_kernels, twomeans_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, None)
    with pytest.warns(UserWarning, match="plain torch is") as warned:
        ours = use_every_kernel("cuda")
    assert len([each for each in warned if "plain torch is" in str(each.message)]) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors():
    expected = use_every_kernel("cuda:0")
    with torch.cuda.device(0):
        ours = use_every_kernel("cuda:1")
    assert all(each.device.index == 1 for each in ours)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_scores_that_are_nan_are_removed_first_and_the_count_is_kept(value):
    scores = torch.rand(4, 49, device="cuda")
    scores[:, 5] = value
    with no_host_sync():
        mask = F.mask_patches(torch.zeros(4, 49, 3, device="cuda"), scores).mask
    assert (mask.sum(1) == 37).all()
    assert (mask[:, 5] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_scores_of_any_type_have_the_order_of_the_cpu_without_a_wait(dtype):
    scores, key = (torch.randn(4, 196) * 99).to(dtype), random_key(4, None, None)
    expected = shuffle(scores, key, 196, 49)
    on_gpu = scores.cuda(), key.cuda()
    with no_host_sync():
        ours = shuffle(*on_gpu, 196, 49)
        F.compute_scores(on_gpu[0])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))
