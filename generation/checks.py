"""Refuse, before any work is done, what a decoding call cannot honour."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_ext import adapter

#: Settings of `generate` that choose another way to decode.
OTHER_METHODS = (
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_early_exit",
    "dola_layers", "penalty_alpha", "use_mtp",
)  # fmt: skip


def check_inputs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cached: int = 0, encoder: bool = False
) -> None:
    """Check the prompts of a decoding call.

    Args:
        input_ids: `(batch, length)` ids.
        attention_mask: `(batch, cached + length)` or `(batch, length)`, 0 on padding; None for no padding.
        cached: tokens that the cache already holds.
        encoder: whether these are the inputs of an encoder, where padding may stand on either side.

    Raises:
        ValueError: an empty prompt, a mask of another shape, a row that is all padding, padding on the right.

    Example:
        >>> check_inputs(torch.ones(1, 0, dtype=torch.long), None)
        Traceback (most recent call last):
        ValueError: the prompt is empty (input_ids of shape (1, 0)); give at least one token, such as the bos token
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have the shape (batch, length), got {tuple(input_ids.shape)}")
    if 0 in input_ids.shape:
        raise ValueError(
            f"the prompt is empty (input_ids of shape {tuple(input_ids.shape)}); give at least one token, such as "
            "the bos token"
        )
    if attention_mask is None:
        return
    lengths = {input_ids.shape[1], input_ids.shape[1] + cached}
    if attention_mask.ndim != 2 or len(attention_mask) != len(input_ids) or attention_mask.shape[1] not in lengths:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)} as "
            "input_ids; pass the mask that the tokenizer returned with these ids"
        )
    empty = (attention_mask.sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the prompt of row {empty[0]} is empty: its attention_mask has no 1")
    right = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
    if right and not encoder:
        raise ValueError(
            f"row {right[0]} is padded on the right, so new tokens would follow padding; "
            "tokenize with padding_side='left'"
        )


def check_context(model: PreTrainedModel, prompt_length: int, encoder: bool = False) -> None:
    """Refuse a prompt that is longer than the model's context.

    A model whose class sets `_extrapolates_length = True` takes prompts of any length.

    Args:
        model: the model that generates.
        prompt_length: longest prompt of the batch in real tokens.
        encoder: whether it is the prompt of an encoder.

    Raises:
        ValueError: the prompt does not fit.
    """
    config = model.config.get_text_config(decoder=not encoder, encoder=encoder)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and prompt_length > context and not getattr(model, "_extrapolates_length", False):
        raise ValueError(
            f"the prompt has {prompt_length} tokens, but the context of {type(model).__name__} is {context}; "
            "shorten the prompt (tokenizer(..., truncation=True)) or use a model with a longer context"
        )


def check_config(strategy: str, options: dict[str, Any], config: GenerationConfig, defaults: GenerationConfig) -> None:
    """Refuse generation settings that the strategy would otherwise ignore.

    Settings that merely come with the checkpoint (`model.generation_config`) are left alone.

    Args:
        strategy: the strategy's class name, for the message.
        options: the strategy's options by name.
        config: the resolved generation config of the call.
        defaults: the model's own generation config.

    Raises:
        ValueError: beams were asked for, or an option was given to `generate` as well, with another value.
    """
    if (config.num_beams or 1) > 1:
        raise ValueError(f"{strategy} does not use beams; call generate with num_beams=1 (got {config.num_beams})")
    fallback = adapter.default_generation_values()
    for name in OTHER_METHODS:
        value = getattr(config, name, None)
        if name not in options and value not in (None, getattr(defaults, name, None), fallback.get(name)):
            raise ValueError(
                f"{name}={value!r} asks for another method than {strategy}, which would ignore it; leave it out"
            )
    if config.token_healing and not defaults.token_healing:
        raise ValueError(f"{strategy} does not heal tokens; call model.heal_tokens on the prompt first")
    for name, value in options.items():
        given = getattr(config, name, None)
        if given is not None and given not in (value, getattr(defaults, name, None), fallback.get(name)):
            raise ValueError(
                f"{name}={given!r} was passed to generate, but {strategy} has {name}={value!r}; "
                f"pass it to the strategy: {strategy}({name}={given!r})"
            )
