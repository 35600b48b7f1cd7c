"""Processes that begin with the large packages imported: a server has imported them once, and forks."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import torch
from torch import multiprocessing
from torch.distributed import TCPStore

PACKAGES = ["timm", "torchvision", "transformers.trainer", "lightly.models", "pytorch_lightning", "scipy.stats"]


def context():
    """Of multiprocessing, with the server."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PACKAGES)
    return forkserver


def start(function, *args, ranks=1):
    """Run function(rank, *args) in one process a rank; the first that fails stops all of them."""
    context()
    multiprocessing.start_processes(_begin, (function, args), ranks, start_method="forkserver")


def _begin(rank, function, args):
    torch.set_num_threads(1)
    function(rank, *args)


def start_script(script, *options, folder, ranks=1, path=()):
    """Run a script as `python` would, or as torchrun would.

    Args:
        script: a file.
        *options: of the script, of any type.
        folder: for the files 0.out, 0.err and so on, with what each rank prints.
        ranks: as many processes.
        path: what PYTHONPATH would add.
    """
    command = [str(each) for each in (script, *options)]
    path = [str(Path(script).parent), *map(str, path)]
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = torchrun_environment(ranks, store.port) if ranks > 1 else {}
    start(_run_script, command, path, common, str(folder), ranks=ranks)


def _run_script(rank, command, path, common, folder):
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with open(f"{folder}/{rank}.{name}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(common | {name: str(rank) for name in RANKS if common})
    sys.argv[:] = command
    sys.path[:0] = path
    runpy.run_path(command[0], run_name="__main__")


def check_log(log):
    """Of a launcher: three epochs, in which the loss falls and masks evolve to 4 parts from 8."""
    losses = [json.loads(line)["loss"] for line in log.splitlines() if line.startswith("{")]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert re.findall(r"masks of epoch (\d): EvolvingMask, alpha (\S+), (\d) parts", log) == [
        ("0", "0.577", "8"),
        ("1", "0.816", "6"),
        ("2", "1.000", "4"),
    ]


RANKS = ("RANK", "LOCAL_RANK", "ROLE_RANK")


def torchrun_environment(ranks, port):
    """What torchrun tells all processes of one machine, besides the rank of each."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(ranks))
    group = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default"}
    restarts = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**sizes, **group, **restarts, **store, "TORCHELASTIC_RUN_ID": "tests"}
