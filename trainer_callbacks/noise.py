"""Random numbers that depend on what is trained on, not on how the batch is split.

A generator that is advanced once a forward pass gives other numbers when eight rows arrive in one
micro-batch than when they arrive in eight, and has to be checkpointed. Here each position's number
is a hash of (seed, optimizer step, stream, position in its document) and, if asked, of the
document's own tokens. Nothing is advanced, so gradient accumulation, padding, padding-free
packing, the number of processes and a resume from a checkpoint all see the same numbers, and CPU
and GPU agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LOW_53_BITS = (1 << 53) - 1


def uniform(inputs: Mapping[str, Any], *, seed: int, step: int, stream: int = 0, per_document: bool = False) -> Tensor:
    """Draw a number in [0, 1) for each position of a batch.

    Args:
        inputs: a batch with `input_ids` (batch, length), and `attention_mask` or `position_ids` where it has them.
        seed: base seed.
        step: optimizer step, the same for all micro-batches that one update accumulates.
        stream: tells independent draws of one step apart.
        per_document: draw anew for each document. Two documents with the same tokens get the same
            numbers. Otherwise position p of every document gets the same number.

    Returns:
        A float64 tensor of the shape of `input_ids` (float32 on devices without float64).

    Example:
        >>> one = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> padded = {"input_ids": torch.tensor([[0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
        >>> bool((uniform(one, seed=0, step=3) == uniform(padded, seed=0, step=3)[:, 1:]).all())
        True
    """
    tokens = inputs["input_ids"]
    positions = document_positions(inputs)
    key = int(_mix(_mix(_mix(torch.tensor(seed)) + step) + stream))  # on the CPU: no transfer, no synchronisation
    keys = _mix(_document_keys(inputs, positions) + key) if per_document else key
    bits = _mix(positions.long() + keys) & _LOW_53_BITS
    return bits.to(torch.float32 if tokens.device.type == "mps" else torch.float64) / (1 << 53)


def document_uniform(inputs: Mapping[str, Any], *, seed: int, step: int, stream: int = 0) -> Tensor:
    """Draw a number in [0, 1) for each document, and give it to all positions of the document.

    Args:
        inputs: as for `uniform`. Two documents with the same tokens get the same number.
        seed: base seed.
        step: optimizer step.
        stream: tells independent draws of one step apart.

    Returns:
        A tensor as `uniform` returns it.

    Example:
        >>> numbers = document_uniform({"input_ids": torch.tensor([[5, 6, 7], [8, 9, 7]])}, seed=0, step=3)
        >>> [len(set(row)) for row in numbers.tolist()], bool(numbers[0, 0] == numbers[1, 0])
        ([1, 1], False)
    """
    tokens = inputs["input_ids"]
    key = int(_mix(_mix(_mix(torch.tensor(seed)) + step) + stream))
    bits = _mix(_mix(_document_keys(inputs, document_positions(inputs)) + key)) & _LOW_53_BITS
    return bits.to(torch.float32 if tokens.device.type == "mps" else torch.float64) / (1 << 53)


def document_positions(inputs: Mapping[str, Any]) -> Tensor:
    """Number the tokens of each document from its start, whatever pads or precedes it.

    Takes `position_ids` if the batch has them (packed rows restart them), else counts the
    attention mask, else the columns.

    Args:
        inputs: a batch with `input_ids` (batch, length).

    Returns:
        Integer positions of the shape of `input_ids`; -1 on left padding.

    Example:
        >>> document_positions({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[0, 1, 1, 1]])})
        tensor([[-1,  0,  1,  2]])
    """
    tokens = inputs["input_ids"]
    given, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if given is not None and given.dim() <= 2:
        return given.expand(tokens.shape)
    if mask is not None and mask.dim() == 2:
        return mask.long().cumsum(-1) - 1
    return torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)


def _document_keys(inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Hash the tokens of each document and give the hash to all its positions: (batch, length)."""
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    starts = torch.ones_like(tokens, dtype=torch.bool)
    # a document goes on where the position counts up by one; padding repeats or restarts a number
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    documents = starts.flatten().long().cumsum(0) - 1
    parts = _mix(_mix(tokens.long()) + positions.long())
    if mask is not None and mask.dim() == 2:
        parts = parts * mask.long()
    # integer addition wraps and does not depend on the order, so this is deterministic on every device
    sums = torch.zeros_like(documents).index_add_(0, documents, parts.flatten())
    return sums[documents].view(tokens.shape)


def _mix(value: Tensor) -> Tensor:
    """Finalise as splitmix64 does: every output bit depends on every input bit. int64 products wrap."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift keeps the sign; the hash needs zeros


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
