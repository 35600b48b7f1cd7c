"""Kernels in Triton's interpreter, on the CPU. Call `interpret` before anything imports Triton."""

from __future__ import annotations

import os
from typing import Any


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    # The interpreter patches the language again whenever a kernel calls a function, which takes a third of its time.
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()

    def patch_once(fn: Any) -> Any:
        language = tl if fn.__globals__.get("tl") is tl else tl.core  # as our modules see it, and as Triton's own do
        return patch(fn) if tl.core.is_builtin(language.load) else nothing

    interpreter._patch_lang = patch_once
