"""Whether a Triton kernel may run: each is tried once on each GPU, and something slower stands in where it fails."""

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from threading import Lock

import torch
from torch import Tensor

MOST_PATCHES = 4096  # of an image, that kernels take
OFF = os.environ.get("MASKEVOLVE_KERNELS") == "0"
_worked: dict[str, bool] = {}
_lock = Lock()


def takes_kernels(device: torch.device) -> bool:
    """Whether a device is a GPU, Triton is installed, and MASKEVOLVE_KERNELS=0 does not turn kernels off."""
    return device.type == "cuda" and not OFF and find_spec("triton") is not None


def kernel_works(kernel: str, device: torch.device, trial: Callable[[torch.device, bool], list[Tensor]]) -> bool:
    """Whether `trial(device, by_kernel)` has the bits of plain torch, tried in the first call on a device, which waits.

    Calls before that which cannot wait (in the capture of a CUDA graph, or traced by torch.compile) do without it.
    """
    place = f"{kernel} on {device}"
    if not takes_kernels(device):
        return False
    if place not in _worked and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()):
        return False
    with _lock:
        if place not in _worked:
            _worked[place] = not (failure := _failure(trial, device))
            if failure:
                slower = f"the kernel for {place} is not used, and what stands in for it is slower: {failure}"
                warnings.warn(f"{slower}. MASKEVOLVE_KERNELS=0 turns kernels off, and this warning.", stacklevel=3)
        return _worked[place]


def _failure(trial: Callable[[torch.device, bool], list[Tensor]], device: torch.device) -> str:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # a program may have made every wait for the GPU an error
    try:
        with torch.no_grad():
            pairs = zip(trial(device, True), trial(torch.device("cpu"), False), strict=True)
            return "" if all(torch.equal(a.cpu(), b) for a, b in pairs) else "it does not give the same bits"
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # a compiler, a driver, Triton: whatever keeps the kernel from running
        return f"{type(error).__name__}: {error}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
