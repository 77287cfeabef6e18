"""Where the Triton kernels run."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

#: Whether the Triton kernels are used: where they can, everywhere (under the interpreter), or nowhere.
_mode: Literal["auto", "always", "never"] = "auto"


@contextmanager
def kernels(mode: Literal["auto", "always", "never"]) -> Iterator[None]:
    """Say for a while where the Triton kernels run.

    Args:
        mode: `"auto"` on CUDA devices; `"always"` on the CPU, too, for which `TRITON_INTERPRET=1` must have
            been set before Triton was imported; `"never"` to run what runs without a GPU.

    Example:
        >>> with kernels("never"):
        ...     runs_kernels("cuda")
        False
    """
    global _mode
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"mode must be 'auto', 'always' or 'never', got {mode!r}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def runs_kernels(device: torch.device | str) -> bool:
    """Tell whether attention on a device runs the Triton kernels."""
    if _mode == "auto":
        return torch.device(device).type == "cuda" and _triton()
    return _mode == "always"


@functools.cache
def _triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn("triton is not installed: attn_implementation='hf_ext' runs SDPA instead", stacklevel=3)
    return found
