"""The attention and feed-forward parts of a stock model's layers: name them, weigh them, leave some out.

A part that is left out adds nothing to the residual stream, computes nothing and leaves its part of
the cache alone. That is done on one model instance, inside a `with` block, and undone at its end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.layers import decoder_layers


def sublayers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of the layers that can be left out, `"attention.0"`, `"mlp.0"`, `"attention.1"`, ...

    The attention of a layer is its module that knows the number of its layer (it needs that for the
    cache). Its feed-forward part is the one other module that holds matrices; where there are several
    of those, as in a layer that has its two matrices side by side, they cannot be left out alone.

    Args:
        model: a decoder-only causal LM.

    Raises:
        ValueError: no such part is found.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> list(sublayers(build("llama")))
        ['attention.0', 'mlp.0', 'attention.1', 'mlp.1']
        >>> list(sublayers(build("opt")))
        ['attention.0', 'attention.1']
    """
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        children = list(layer.children())
        attention = [child for child in children if hasattr(child, "layer_idx")]
        others = [c for c in children if c not in attention and any(p.ndim > 1 for p in c.parameters())]
        if len(attention) == 1:
            found[f"attention.{number}"] = attention[0]
        if len(others) == 1:
            found[f"mlp.{number}"] = others[0]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention or feed-forward modules that could be left out")
    return found


def weight_share(model: nn.Module, skip: Collection[str]) -> float:
    """Return the share of the weights read in a pass that remains without some parts, embeddings left out.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> weight_share(build("llama"), ())
        1.0
    """
    parts = sublayers(model)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    total = sum(p.numel() for p in decoder_layers(model).parameters())
    total += 0 if head is None else sum(p.numel() for p in head.parameters())
    gone = sum(p.numel() for name in skip for p in parts[name].parameters())
    return 1 - gone / total


@contextlib.contextmanager
def without(model: nn.Module, skip: Collection[str]) -> Iterator[None]:
    """Leave parts out of all forward passes run inside the block.

    Args:
        model: a decoder-only causal LM.
        skip: names from `sublayers`.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> model, ids = build("llama"), torch.tensor([[5, 6, 7]])
        >>> with without(model, ["attention.0", "mlp.0", "attention.1", "mlp.1"]):
        ...     out = model(ids, output_hidden_states=True)
        >>> bool((out.hidden_states[0] == out.hidden_states[1]).all())
        True
    """
    parts = sublayers(model)
    unknown = [name for name in skip if name not in parts]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no part {unknown[0]!r}; it has {', '.join(parts)}")
    changed = [(parts[name], vars(parts[name]).get("forward"), name) for name in skip]
    for module, _, name in changed:
        vars(module)["forward"] = _no_attention if name.startswith("attention") else _nothing
    try:
        yield
    finally:
        for module, had, _ in changed:
            if had is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = had


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    states = args[0] if args else kwargs["hidden_states"]
    return torch.zeros_like(states)


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _nothing(*args, **kwargs), None
