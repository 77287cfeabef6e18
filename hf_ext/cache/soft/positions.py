"""Columns without a position in models that learn a table of positions.

AutoCompressors give no position to summary vectors where positions are learned (OPT), so that the tokens of every
segment count from 0. A column says so by the position -1: inside of `positions_optional` its embedding is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hf_ext.cache.soft.layout import NOWHERE


def position_table(model: Any) -> nn.Embedding | None:
    """Return the table of learned positions of a causal LM, or None where there is none (rotary ones, ...).

    Raises:
        ValueError: several embeddings might be the one.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> position_table(tiny_models.build("gpt2")).num_embeddings, position_table(tiny_models.build("llama"))
        (128, None)
    """
    tokens = model.get_input_embeddings().weight
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    found = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.Embedding) and module.weight is not tokens and most is not None
        and most <= module.num_embeddings <= most + 8  # some begin with a few entries for padding
    ]  # fmt: skip
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} embeddings that may be those of positions")
    return found[0] if found else None


@contextlib.contextmanager
def positions_optional(model: Any) -> Iterator[None]:
    """Let the position -1 mean no position at all; models without a table of positions are left alone.

    Example:
        >>> import torch
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("gpt2")
        >>> with positions_optional(model):
        ...     print(position_table(model)(torch.tensor([-1, 3])).abs().sum(-1) > 0)
        tensor([False,  True])
    """
    table = position_table(model)
    if table is None:
        yield
        return
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[0]
        seen[:] = [given != NOWHERE]
        clamped = given.clamp_min(0)
        return (args, {**kwargs, "position_ids": clamped}) if "position_ids" in kwargs else ((clamped,), kwargs)

    def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * seen[0][..., None].to(output.dtype)

    with contextlib.ExitStack() as stack:
        stack.callback(table.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(table.register_forward_hook(after).remove)
        yield


def check_length(model: Any, longest: int, what: str) -> None:
    """Refuse rows that a table of positions has no entries for.

    Args:
        model: a causal LM.
        longest: the number of positions that the longest row needs.
        what: such rows, for the message.

    Raises:
        ValueError: the table ends before.
    """
    if position_table(model) is None:
        return
    most = model.config.get_text_config(decoder=True).max_position_embeddings
    if longest > most:
        raise ValueError(
            f"{what} need {longest} positions, and {type(model).__name__} has learned {most}: compress shorter pieces "
            "and put their slots side by side with Slots.join"
        )
