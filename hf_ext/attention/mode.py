"""Where the Triton kernels run."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

#: Whether there is anything to run the kernels with. A constant, so that torch.compile may read it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
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
        place = device if isinstance(device, torch.device) else torch.device(device)
        return HAS_TRITON and place.type == "cuda" and _has_room(place.index)
    return _mode == "always"


@torch.compiler.assume_constant_result
@functools.cache
def _has_room(index: int | None) -> bool:
    """Tell whether a GPU is one that the kernels have configurations for; say once where it is not."""
    from hf_ext.kernels import configs

    index = torch.cuda.current_device() if index is None else index
    if configs.has_room(index):
        return True
    warnings.warn(
        f"attn_implementation='hf_ext' runs as 'sdpa' on {torch.cuda.get_device_name(index)}: the kernels need "
        f"{min(configs.SHARED.values())} bytes of shared memory",
        stacklevel=3,
    )
    return False
