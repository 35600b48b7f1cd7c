"""Two processes (gloo): each draws masks of its own, all have one teacher, and runs can be repeated and resumed."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import ranks
import torch
from test_pretrain import equal
from vits import MAE

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5 and older
    fully_shard = None


@pytest.fixture(scope="module", params=[ranks.make_mae, ranks.make_mim], ids=["MAE", "MIM"])
def results(request, tmp_path_factory):
    job = functools.partial(ranks.data_parallel, host=request.param)
    return ranks.on_ranks(job, tmp_path_factory.mktemp("ranks"))


def test_ranks_draw_different_masks(results):
    """Even of the same images and with the same seed."""
    for first, second in zip(results[0]["masks"], results[1]["masks"], strict=True):
        assert not torch.equal(first, second)


def test_ranks_have_one_teacher(results):
    first, second = results
    assert equal(first["whole"][0], second["whole"][0]), "as they have one student"
    assert equal(first["first teacher"], second["first teacher"]), "before the first step"
    assert equal(first["teacher"], second["teacher"])
    assert not equal(first["teacher"], first["first teacher"])


def test_a_seed_makes_a_run(results):
    for result in results:
        assert equal(result["whole"], result["again"])
        assert equal(result["masks"], result["masks again"])


def test_a_resumed_run_continues_bit_for_bit(results):
    for result in results:
        assert equal(result["whole"], result["resumed"])


@pytest.mark.skipif(fully_shard is None, reason="needs torch 2.6")
def test_fully_sharded(tmp_path):
    first, second = ranks.on_ranks(ranks.sharded, tmp_path)
    for order, result in first.items():
        assert result["kinds"] == {"DTensor"}
        assert equal(result["teachers"], second[order]["teachers"])
        assert equal(result["teachers"][:2], result["students"][:2]), "of weights as they are, then of the first step"
        pairs = zip(result["teachers"][1], result["students"][2], strict=True)
        torch.testing.assert_close(result["teachers"][2], [0.5 * old + 0.5 * new for old, new in pairs])
        assert not equal(result["masks"], second[order]["masks"])
        assert result["losses"][-1] < result["losses"][0]
        assert "build the teacher before fully_shard(model)" in result["refused"]


def test_fully_sharded_in_the_first_way(tmp_path):
    """FSDP1: no teacher can follow it, which is said; parts from elsewhere do."""
    first, second = ranks.on_ranks(ranks.sharded_before, tmp_path)
    for case, result in first.items():
        assert len(result["answers"]) == 1, case
        assert "sharded by FullyShardedDataParallel (FSDP1)" in result["answers"][0]
        assert not torch.equal(result["mask"], second[case]["mask"])
        assert result["losses"][-1] < result["losses"][0]


def test_fully_sharded_by_fsdp1(tmp_path):
    """Of weights w that are doubled and then made six times w, with a decay of a half: 2 w, then 4 w."""
    for results in ranks.on_ranks(ranks.sharded_by_fsdp1, tmp_path):
        for result in results.values():
            assert all(
                "before fully_shard(model) or FullyShardedDataParallel(model)" in error for error in result["built"]
            )
            assert "FullyShardedDataParallel (FSDP1): call update(model) with the outermost" in result["updated"]
            for factor, weights in zip((2, 4), result["teachers"], strict=True):
                torch.testing.assert_close(weights, [factor * weight.detach() for weight in MAE(seed=0).parameters()])


@pytest.mark.parametrize("trainer", ["hugging_face", "lightly"])
def test_trainers_under_torchrun(tmp_path, trainer):
    processes.start_script(Path(__file__).with_name("trainers.py"), trainer, tmp_path, folder=tmp_path, ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["masks"]) == len(second["masks"]) == 4
    assert not any(map(torch.equal, first["masks"], second["masks"]))
    assert equal(first["model"], second["model"])
    assert equal(first["evolution"]["teacher"], second["evolution"]["teacher"])
    assert first["evolution"]["teacher"]["model.n_averaged"] == 4


def test_processes_are_told_what_torchrun_tells(tmp_path):
    """For torchrun itself has to import torch anew: the other tests do without it."""
    script = tmp_path / "environment.py"
    script.write_text(
        "import json, os, sys; json.dump(dict(os.environ), open(f\"{sys.argv[1]}/{os.environ['RANK']}\", 'w'))"
    )
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    processes.start_script(script, ours, folder=ours, ranks=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, script, theirs], check=True)
    for rank in ("0", "1"):
        told, expected = (json.loads((folder / rank).read_text()) for folder in (ours, theirs))
        names = {*processes.RANKS, *processes.torchrun_environment(2, 0)} - {"MASTER_PORT", "TORCHELASTIC_RUN_ID"}
        if torch.__version__ < (2, 5):
            names.remove("TORCHELASTIC_USE_AGENT_STORE")  # torchrun had it off
        assert {name: told[name] for name in names} == {name: expected[name] for name in names}
        assert told["MASTER_PORT"].isdigit()
