"""A structure in the form that an attention implementation takes.

    eager            (rows, 1, queries, keys) of the model's dtype, added to the scores
    sdpa             (rows, 1, queries, keys) bool
    flex_attention   a BlockMask
    hf_ext           a packed structure where the kernels run (`packed.py`), else as sdpa

An implementation that shares its mask function with one of these takes the same form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hf_ext import adapter
from hf_ext.attention.mode import runs_kernels
from hf_ext.attention.structure import AttentionStructure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Makes, of a structure, what an implementation takes as `attention_mask` of a model of that dtype on that device.
Conversion = Callable[[AttentionStructure, torch.dtype, torch.device], Any]


def boolean(structure: AttentionStructure, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `(rows, 1, queries, keys)`, True where a query sees a key."""
    return structure.to(device).dense()


def additive(structure: AttentionStructure, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `(rows, 1, queries, keys)`, 0 where a query sees a key and the least number elsewhere."""
    dense = structure.to(device).dense()
    return torch.zeros(dense.shape, dtype=dtype, device=device).masked_fill_(~dense, torch.finfo(dtype).min)


def block_mask(structure: AttentionStructure, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a `BlockMask` of flex attention; on a GPU it is made without anything of size queries times keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    structure = structure.to(device)
    rows, queries, keys = structure.shape
    return create_block_mask(
        structure.mask_function(), B=rows, H=None, Q_LEN=queries, KV_LEN=keys, device=str(device),
        _compile=device.type == "cuda",
    )  # fmt: skip


def compact(structure: AttentionStructure, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what `"hf_ext"` takes: a packed structure where the kernels run, elsewhere `boolean`.

    One query takes a row of bool, too: that is no larger, and there are no blocks to be skipped.
    """
    if len(structure.queries) == 1 or not runs_kernels(device):
        return boolean(structure, dtype, device)
    from hf_ext.attention.packed import pack

    return pack(structure.to(device))


_CONVERSIONS: dict[str, Conversion] = {
    "eager": additive,
    "sdpa": boolean,
    "flex_attention": block_mask,
    "hf_ext": compact,
}


def register_conversion(implementation: str, convert: Conversion) -> None:
    """Let an attention implementation take structures in a form of its own.

    Args:
        implementation: the name given as `attn_implementation`.
        convert: makes, of a structure, the model's dtype and its device, what the implementation takes as
            `attention_mask`. transformers hands tensors of four dimensions and `BlockMask`s on to the layers.
    """
    _CONVERSIONS[implementation] = convert


def mask_for(implementation: str, structure: AttentionStructure, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a structure in the form that an attention implementation takes.

    Args:
        implementation: as given as `attn_implementation`.
        structure: who sees whom.
        dtype: of the model.
        device: of the model.

    Raises:
        ValueError: the implementation takes no structure.

    Example:
        >>> structure = AttentionStructure.causal(torch.ones(1, 2))
        >>> mask_for("sdpa", structure, torch.float32, torch.device("cpu"))[0, 0]
        tensor([[ True, False],
                [ True,  True]])
    """
    convert = _CONVERSIONS.get(implementation)
    if convert is None:
        twin = adapter.masks_like(implementation, _CONVERSIONS)
        if twin is None:
            raise ValueError(
                f"attn_implementation={implementation!r} takes no mask for a structure; load the model with one of "
                f"{', '.join(sorted(_CONVERSIONS))}, or register one with hf_ext.attention.register_conversion"
            )
        convert = _CONVERSIONS[twin]
    return convert(structure, dtype, torch.device(device))


def masks_for(model: PreTrainedModel, structure: AttentionStructure) -> Any:
    """Return the `attention_mask` of a forward pass with a structure.

    The windows of a model's sliding layers count the structure's positions, so that the order of segments
    changes nothing. Where the structure has a window, too, the smaller one holds.

    Args:
        model: a decoder-only model.
        structure: who sees whom, from the queries of the pass to all keys the cache holds after it. Give the model
            `position_ids=structure.queries.position` with it.

    Returns:
        A mask for all layers, or one for each kind of layer by its name.

    Raises:
        ValueError: an attention implementation that takes no structures, or layers that are neither full
            nor sliding.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> structure = AttentionStructure.causal(torch.ones(1, 9))
        >>> {kind: int(mask.sum()) for kind, mask in masks_for(tiny_models.shared("gemma3"), structure).items()}
        {'sliding_attention': 44, 'full_attention': 45}
    """
    windows = windows_of(model)
    name = adapter.attention_implementation(model)
    made: dict[int | None, Any] = {}
    for window in windows.values():
        if window not in made:
            made[window] = mask_for(name, narrowed(structure, window), model.dtype, adapter.device_of(model))
    if len(made) == 1:
        return next(iter(made.values()))
    return {kind: made[window] for kind, window in windows.items()}


def windows_of(model: PreTrainedModel) -> dict[str, int | None]:
    """Return the sliding window of each kind of layer, None for those that see everything.

    Raises:
        ValueError: layers of another kind (chunked, recurrent).
    """
    config = model.config.get_text_config(decoder=True)
    windows = [adapter.layer_window(layer) for layer in adapter.empty_cache(model).layers]
    kinds = getattr(config, "layer_types", None) or ["full_attention" if w is None else "sliding_attention"
                                                     for w in windows]  # fmt: skip
    other = set(kinds) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(
            f"{type(model).__name__} has layers of the kind {', '.join(sorted(other))}; a structure says what full and "
            "sliding layers see"
        )
    return dict(zip(kinds, windows, strict=False))


def narrowed(structure: AttentionStructure, window: int | None) -> AttentionStructure:
    """Return the structure with the smaller of its own window and another one."""
    windows = [w for w in (structure.window, window) if w is not None]
    smallest = min(windows, default=None)
    return structure if smallest == structure.window else dataclasses.replace(structure, window=smallest)
