"""Whether a kernel may run. Each is tried once in a process, on each GPU, and plain torch stands in where it fails."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

__all__ = ["OFF", "on_gpu", "works"]

OFF = os.environ.get("MASKEVOLVE_KERNELS") == "0"
HAS_TRITON = find_spec("triton") is not None

_worked: dict[str, bool] = {}


def on_gpu(on: torch.device) -> bool:
    """Whether a device takes kernels: a GPU, with Triton, unless MASKEVOLVE_KERNELS=0 turns them off."""
    return on.type == "cuda" and HAS_TRITON and not OFF


def works(kernel: str, on: torch.device, agrees: Callable[[torch.device], bool]) -> bool:
    """Whether a kernel may run on a device: it gave the bits of plain torch where it was tried.

    It is tried in its first call, which waits for the GPU. Calls before that which must not wait (in the capture of a
    CUDA graph, or traced by torch.compile) go without the kernel.

    Args:
        kernel: what it does, for the warning.
        on: the device that it is to run on.
        agrees: runs the kernel on a small case and compares it with plain torch on the CPU.

    Returns:
        False, too, where there is no such device. The first time that a kernel fails, it is said in a warning.
    """
    if not on_gpu(on):
        return False
    place = f"{kernel} on {on}"
    if place not in _worked:
        if torch.compiler.is_compiling() or _capturing(on):
            return False
        _worked[place] = _try(place, on, agrees)
    return _worked[place]


def _capturing(on: torch.device) -> bool:
    return on.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _try(place: str, on: torch.device, agrees: Callable[[torch.device], bool]) -> bool:
    try:
        with _waiting_allowed(on), torch.no_grad():
            if agrees(on):
                return True
        reason = "it does not give the same bits"
    except Exception as error:  # a compiler, a driver, Triton: whatever keeps the kernel from running
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"the kernel for {place} is not used, plain torch is, which is slower: {reason}. "
        "MASKEVOLVE_KERNELS=0 turns kernels off, and this warning.",
        stacklevel=4,
    )
    return False


@contextmanager
def _waiting_allowed(on: torch.device) -> Iterator[None]:
    """Where a program has made every wait for the GPU an error, the trial may wait."""
    if on.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
