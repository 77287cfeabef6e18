"""What MetaLM is put together from: encoders without heads, connectors, and the checks of both.

Imports torch and transformers only: this file is part of the Hub repository.
"""

import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel


def encoder_part(part: Any, name: str) -> PreTrainedModel | None:
    """Return an encoder without head and pooler; the weights are those of `part`, which stays as it is."""
    if isinstance(part, str | os.PathLike):
        part = AutoModel.from_pretrained(part, dtype="auto")
    if part is None:
        return None
    if not isinstance(part, PreTrainedModel):
        raise ValueError(f"{name} is {type(part).__name__}; expected an encoder of transformers (AutoModel)")
    bare = part.base_model
    with torch.device("meta"):
        expected = type(AutoModel.from_config(bare.config))
    if type(bare) is not expected:
        raise ValueError(
            f"{name} is {type(part).__name__}; expected {expected.__name__}, with a head or without, which is what a "
            f"saved configuration of the type {bare.config.model_type!r} is loaded as"
        )
    return without_pooler(bare)


def without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder, or one that shares its weights if it has a pooler, which nothing here would train."""
    kind = type(encoder)
    if getattr(encoder, "pooler", None) is None or "add_pooling_layer" not in inspect.signature(kind).parameters:
        return encoder
    bare, weights = kind(encoder.config, add_pooling_layer=False), encoder.state_dict()
    bare.load_state_dict({name: weights[name] for name in bare.state_dict()}, assign=True)
    return bare.train(encoder.training)


def new_connector(encoder: int, decoder: int, layers: int) -> nn.Sequential:
    """Return the projection from an encoder's width to that of the language model's embeddings."""
    parts: list[nn.Module] = [nn.Linear(encoder, decoder)]
    for _ in range(layers - 1):
        parts += [nn.GELU(), nn.Linear(decoder, decoder)]
    return nn.Sequential(*parts)


def require_both_ways(encoder: PreTrainedModel) -> None:
    """Refuse an encoder whose tokens do not see what follows them."""
    for name, module in encoder.named_modules():
        if getattr(module, "is_causal", False) is True:
            raise ValueError(
                f"{type(encoder).__name__} is causal ({name}.is_causal): expected an encoder whose tokens see each "
                "other in both directions, such as BERT or ViT"
            )


def room_of(encoder: PreTrainedModel) -> int | None:
    """Return how long a span may be: the rows of the encoder's position table; None if it has none."""
    rooms = []
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            # RoBERTa and its like count positions from the one after the padding's.
            rooms.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(rooms, default=None)
