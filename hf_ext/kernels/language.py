"""Triton where it is installed, and the few words that all kernels use.

A kernel's file can be imported without Triton, for its reference; launching then says what is missing. With
`TRITON_INTERPRET=1` in the environment before the first import of a kernel, kernels run on the CPU, slowly and
exactly as they are written: this is how they are tested.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_ext.kernels.configs import Config

try:
    import triton
    import triton.language as tl
except ImportError:  # the references work without
    triton = None
    tl = None


class _Missing:
    """Stands where a kernel would, and says so when it is launched."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(
            f"the kernel {self.__name__} needs Triton, which is not installed: pip install 'hf_ext[kernels]', or use "
            "the function's reference"
        )


def jit(kernel: Callable[..., Any] | None = None, *, lengths: Sequence[str] = ()) -> Any:
    """Compile a kernel with Triton on its first launch.

    Args:
        kernel: the kernel.
        lengths: names of the arguments that change with the length of the input. Triton would otherwise compile a
            kernel again for lengths that are 1 or multiples of 16.
    """
    if kernel is None:
        return lambda found: jit(found, lengths=lengths)
    if triton is None:
        return _Missing(kernel)
    return triton.jit(kernel, do_not_specialize=list(lengths))


def _constant(value: Any) -> Any:
    return value if tl is None else tl.constexpr(value)


#: Whether kernels run in Triton's interpreter, on the CPU.
INTERPRETED = _constant(triton is not None and bool(triton.knobs.runtime.interpret))
LOG2_E = _constant(1.4426950408889634)
LN_2 = _constant(0.6931471805599453)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is launched with, so that it can be compiled without a device, too.

    Args:
        kernel: what `jit` returned.
        grid: programs along up to three axes.
        arguments: by name, constants of the compilation among them.
        config: the warps and stages that it is compiled for.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config

    def __call__(self) -> None:
        """Run the kernel on the device of its tensors."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        check_device(device)
        if 0 in self.grid:
            return
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with, beside the arguments."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}


def check_device(device: torch.device) -> None:
    """Raise unless kernels can be launched on a device.

    Raises:
        RuntimeError: Triton is missing, or the device is no GPU and the interpreter is not on.
    """
    if triton is None:
        raise RuntimeError(
            "this kernel needs Triton, which is not installed: pip install 'hf_ext[kernels]', or use the function's "
            "reference"
        )
    if device.type != "cuda" and not (triton.knobs.runtime.interpret and device.type == "cpu"):
        raise RuntimeError(
            f"Triton kernels run on a GPU, and the input is on {device.type}: move it, use the function's reference, "
            "or set TRITON_INTERPRET=1 before anything is imported, to run them slowly on the CPU"
        )


def cdiv(length: int, size: int) -> int:
    """Return how many pieces of `size` a length has, the last one perhaps shorter."""
    return -(-length // size)


def power_of_two(count: int) -> int:
    """Return the least power of two that is no less, at least 16, which is the least that matrix units take."""
    return max(16, 1 << (count - 1).bit_length())


@jit
def product(a, b, c):
    """Return `a @ b + c` with the sum in float32; float32 factors are not rounded."""
    if INTERPRETED:  # the interpreter keeps bfloat16 as integers, and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@jit
def load_rows(START, stride, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ALL: tl.constexpr):
    """Return `(ROWS, PADDED)` values from `START` on, zero behind `count` rows and behind `WIDTH` columns.

    ALL says that no row is behind `count`. Columns are adjacent; rows are `stride` apart.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    at = START + row * stride + column
    if ALL:
        if WIDTH == PADDED:
            return tl.load(at)
        else:
            return tl.load(at, mask=column < WIDTH, other=0.0)
    else:
        if WIDTH == PADDED:
            return tl.load(at, mask=row < count, other=0.0)
        else:
            return tl.load(at, mask=(row < count) & (column < WIDTH), other=0.0)


@jit
def store_rows(START, values, stride, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store `(ROWS, PADDED)` values, but for the rows from `count` and the columns from `WIDTH` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = (row < count) & (column < WIDTH)
    tl.store(START + row * stride + column, values.to(START.dtype.element_ty), mask=inside)
