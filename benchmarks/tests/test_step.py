"""The profile of a step."""

from collections import Counter

import step
import torch


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
