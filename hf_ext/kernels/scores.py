"""Scores before anything is masked, and what launches say about the tensors that they come from."""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from hf_ext.kernels.language import LOG2_E, jit, tl


def scores_reference(query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Return `(batch, heads, queries, keys)` scores before anything is masked, at least in float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.to(dtype) @ keys.transpose(-1, -2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weigh(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax of each row and the logarithm of its sum; of a row that sees nothing, 0 and minus infinity.

    Example:
        >>> weights, lse = weigh(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))
        >>> weights, lse.exp()
        (tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]]), tensor([[2.],
                [0.]]))
    """
    top = scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1)
    empty = top.isneginf()
    if empty.any():
        weights.masked_fill_(empty, 0)
    # The greatest weight is exp(top - lse): finding it is cheaper than adding up exponentials once more.
    return weights, torch.where(empty, top, top - weights.amax(-1, keepdim=True).log())


@jit
def tanh(x):
    """Return tanh by base-2 exponentials; the error is that of float32 around 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))


@jit
def load_lse(LSE, at, count):
    """Return logarithms of row sums to base 2; infinite where a row saw nothing, so that its weights are 0."""
    lse = tl.load(LSE + at, mask=at < count, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


def units(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return what products are multiplied by inside of the soft cap's tanh (if there is one), and then for base 2."""
    log2_e = 1.4426950408889634
    return (0.0, scale * log2_e) if softcap is None else (scale / softcap, softcap * log2_e)


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Return the strides of `(batch, heads, tokens, width)` tensors as arguments: `q_batch`, `q_head`, `q_row`."""
    return {f"{n}_{axis}": t.stride(i) for n, t in tensors.items() for i, axis in enumerate(("batch", "head", "row"))}


def adjacent(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last axis lies side by side in memory; mostly the one that is given."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
