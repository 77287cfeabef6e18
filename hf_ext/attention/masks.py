"""A structure in the form that a model's attention implementation takes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_ext import adapter
from hf_ext.attention.structure import AttentionStructure


def masks_for(model: PreTrainedModel, structure: AttentionStructure) -> Any:
    """Return the `attention_mask` of a forward pass with a structure.

    The windows of a model's sliding layers count the structure's positions.

    Args:
        model: a decoder-only model.
        structure: who sees whom.

    Returns:
        A mask `(rows, 1, queries, keys)`, or one for each kind of layer by its name.
    """
    import torch

    config = model.config.get_text_config(decoder=True)
    windows = [adapter.layer_window(layer) for layer in adapter.empty_cache(model).layers]

    def build(window: int | None) -> torch.Tensor:
        dense = structure.windowed(window).dense()
        if adapter.attention_implementation(model) != "eager":
            return dense
        return torch.zeros(dense.shape, dtype=model.dtype, device=dense.device).masked_fill_(
            ~dense, torch.finfo(model.dtype).min
        )

    if len(set(windows)) == 1:
        return build(windows[0])
    return {name: build(window) for name, window in dict(zip(config.layer_types, windows, strict=False)).items()}
