"""The two products of attention over packed codes: by a C kernel where one can be compiled, else in plain torch.

No operation of PyTorch multiplies codes as they are packed; `packed_native.c` does, without writing one unpacked number
to memory. It is compiled when it is first asked for (`native.py`), has to give the results of `packed_torch` on a small
example before it is used, and takes float32 queries on a CPU that has vectors of eight numbers at least. All else is
the torch path's: other dtypes and devices, heads wider than 1,024, many queries, and whatever is traced.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from pathlib import Path

import torch

from hf_ext.kernels import packed_torch
from hf_ext.kernels.native import Failed, NotHere, build
from hf_ext.kernels.packing import quantise_keys, quantise_values

SOURCE = Path(__file__).with_name("packed_native.c")
#: For more lines the products of plain torch are as quick: those of matrices, for which codes are unpacked once.
MOST_SCORES, MOST_SUMS = 16, 64
#: With shorter vectors than those of AVX2 or NEON plain torch is the quicker one.
LEAST_LANES = 8
_ANY, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
#: Types of the arguments, as they stand in the C file.
ARGUMENTS = {
    "packed_scores": (_ANY, _ANY, _LONG, _ANY, _LONG, _ANY, _LONG, _ANY, *[_LONG] * 7, _INT, _INT),
    "packed_sums": (_ANY, _LONG, _LONG, _ANY, _LONG, _ANY, _LONG, _ANY, _LONG, _ANY, *[_LONG] * 5, _INT, _INT),
}
_lock = threading.Lock()


def packed_scores(
    query: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, out: torch.Tensor
) -> None:
    """Write the products of queries and packed keys; see `packed_torch.packed_scores`.

    Example:
        >>> keys = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None]
        >>> out = torch.empty(1, 1, 1, 2)
        >>> packed_scores(torch.tensor([[1.0, 10.0]])[None, None], *quantise_keys(keys, 8, 2), 8, out)
        >>> out.flatten()
        tensor([10., 42.])
    """
    library = _library_for(query, codes, out, MOST_SCORES)
    if library is None or not _scores(library, query, codes, scale, zero, bits, out):
        packed_torch.packed_scores(query, codes, scale, zero, bits, out)


def packed_sums(
    weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the sums of packed values by their weights; see `packed_torch.packed_sums`.

    Example:
        >>> values = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None]
        >>> packed_sums(torch.tensor([[0.25, 0.5]])[None, None], *quantise_values(values, 8, 2), 8).flatten()
        tensor([1.0000, 2.2500])
    """
    library = _library_for(weights, codes, weights, MOST_SUMS)
    found = None if library is None else _sums(library, weights, codes, scale, zero, bits)
    return packed_torch.packed_sums(weights, codes, scale, zero, bits) if found is None else found


def in_use() -> str:
    """Return which way float32 queries on a CPU go, and why: `"native"`, or `"torch: "` and the reason."""
    library, reason = _loaded()
    return "native" if library is not None else f"torch: {reason}"


def _library_for(first: torch.Tensor, codes: torch.Tensor, out: torch.Tensor, most: int) -> ctypes.CDLL | None:
    """Return the library if it is there and takes these tensors."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not (type(first) is type(codes) is type(out) is torch.Tensor)
    ):
        return None  # what is traced has no memory
    plain = first.dtype == out.dtype == torch.float32 and first.is_cpu and codes.is_cpu and out.is_cpu
    if not plain or not codes.numel() or first.shape[2] > most:
        return None
    if first.requires_grad and torch.is_grad_enabled():
        return None
    return _loaded()[0]


def _loaded() -> tuple[ctypes.CDLL | None, str]:
    with _lock:
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason; warn where there should be one."""
    try:
        library = build(SOURCE)
        for name, types in ARGUMENTS.items():
            getattr(library, name).argtypes = types
        if library.packed_lanes() < LEAST_LANES:
            raise NotHere("the vectors of this processor are too short for it to be quicker")
        _check(library)
    except NotHere as error:
        return None, str(error)
    except (Failed, AttributeError) as error:
        warnings.warn(
            f"packed caches are read by plain torch, as the native kernel cannot be used: {error}. HF_EXT_NATIVE=0 "
            "switches it off",
            stacklevel=5,
        )
        return None, str(error)
    return library, ""


def _check(library: ctypes.CDLL) -> None:
    """Raise `Failed` unless the library has the results of plain torch on a small example."""
    draw = torch.Generator().manual_seed(0)
    for bits, width, lines in ((2, 96, 7), (4, 80, 3), (8, 40, 2)):
        query, keys = torch.randn(2, 2, lines, width, generator=draw), torch.randn(2, 2, 24, width, generator=draw)
        packed, values = quantise_keys(keys, bits, 12), quantise_values(keys, bits, width // 2)
        wanted, out = torch.empty(2, 2, lines, 24), torch.zeros(2, 2, lines, 24)
        packed_torch.packed_scores(query, *packed, bits, wanted)
        sums = packed_torch.packed_sums(wanted, *values, bits)
        found = _sums(library, wanted, *values, bits)
        if not _scores(library, query, *packed, bits, out) or found is None:
            raise Failed("it refuses what it should take")
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in ((out, wanted), (found, sums)))
        if not worst < 1e-4:
            raise Failed(f"its results are wrong: with {bits} bits they differ by {worst:.1e} of the largest number")


def _scores(
    library: ctypes.CDLL, query: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """Run the kernel; False if it does not take this."""
    if out.stride(3) != 1:
        return False
    lines, groups = query.shape[2], scale.shape[2]
    query, codes, scale, zero = query.contiguous(), _heads(codes), _heads(scale.float()), _heads(zero.float())
    flat = out.view(-1, lines, out.shape[3])
    refused: int = library.packed_scores(
        query.data_ptr(), codes.data_ptr(), codes.stride(0), scale.data_ptr(), scale.stride(0), zero.data_ptr(),
        zero.stride(0), flat.data_ptr(), flat.stride(0), flat.stride(1), len(flat), lines, groups,
        codes.shape[1] // groups, codes.shape[2], bits, torch.get_num_threads(),
    )  # fmt: skip
    return not refused


def _sums(
    library: ctypes.CDLL, weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor | None:
    """Run the kernel; None if it does not take this."""
    rows, key_heads, lines, tokens = weights.shape
    flat = _heads(weights, least=2)
    codes, scale, zero = _heads(codes), _heads(scale.float()), _heads(zero.float())
    out = weights.new_empty(rows, key_heads, lines, codes.shape[2] * 8 // bits)
    refused: int = library.packed_sums(
        flat.data_ptr(), flat.stride(0), flat.stride(1), codes.data_ptr(), codes.stride(0), scale.data_ptr(),
        scale.stride(0), zero.data_ptr(), zero.stride(0), out.data_ptr(), len(flat), lines, tokens, scale.shape[2],
        codes.shape[2], bits, torch.get_num_threads(),
    )  # fmt: skip
    return None if refused else out


def _heads(tensor: torch.Tensor, least: int = 1) -> torch.Tensor:
    """Return `(rows * heads, ...)`, where the numbers of a head lie side by side, or (2) those of each of its lines."""
    flat = tensor.flatten(0, 1)
    beside = flat.stride(2) == 1 and (least == 2 or flat.stride(1) == flat.shape[2] or flat.shape[1] == 1)
    return flat if beside else flat.contiguous()
