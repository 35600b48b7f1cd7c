"""The profile of a step."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import step
import torch
from torch.autograd import DeviceType


def test_operators_are_sorted_by_what_they_cost_more(monkeypatch):
    times = {"random": Counter(mm=3.0, sort=1.0, view=0.001), "evolving": Counter(mm=3.5, cut=2.0, sort=0.5)}
    monkeypatch.setattr(step, "spent", lambda name, device: times[name])
    rows = step.differences({step.RANDOM: "random", "evolving": "evolving"}, "cpu")
    assert [tuple(row.values()) for row in rows] == [
        ("all", 4.001, 6.0, 6.0 - 4.001),
        ("cut", 0, 2.0, 2.0),
        ("mm", 3.0, 3.5, 0.5),
        ("sort", 1.0, 0.5, -0.5),
    ]


def test_a_profile_finds_what_takes_the_time():
    square = torch.ones(300, 300)
    times = step.spent(lambda: square @ square + 1, "cpu")
    assert max(times, key=times.get) == "aten::mm"
    assert times["aten::add"] > 0


def test_kernels_count_once_for_the_operator_that_starts_them_or_by_their_own_names(monkeypatch):
    def event(name, time, kind=DeviceType.CUDA, note=False, kernels=()):
        span = SimpleNamespace(elapsed_us=lambda: time)
        return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=note, kernels=kernels)

    gemm, span = SimpleNamespace(name="gemm", duration=9000.0), SimpleNamespace(name="AdamW", duration=500.0)
    events = [
        event("aten::mm", 70, DeviceType.CPU, kernels=[gemm]),
        event("gemm", 9000.0),
        event("a kernel of Triton", 6000.0),
        event("AdamW", 80, DeviceType.CPU, note=True, kernels=[span]),
        event("AdamW", 500.0, note=True),
    ]
    monkeypatch.setattr(step, "profile", lambda: nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = {name: time for name, time in step.spent(lambda: None, "cuda").items() if time}
    assert times == {"aten::mm": pytest.approx(3), "a kernel of Triton": pytest.approx(2)}, "of three steps"
