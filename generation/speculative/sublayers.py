"""The attention and feed-forward parts of a stock model's layers: name them, weigh them, leave some out.

A part that is left out adds nothing to the residual stream, computes nothing and leaves its part of
the cache alone. That is done on one model instance, inside a `with` block, and undone at its end.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import adapter
from hf_ext.layers import decoder_layers


def sublayers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of the layers that can be left out, `"attention.0"`, `"mlp.0"`, `"attention.1"`, ...

    The attention of a layer is its module that knows the number of its layer (it needs that for the
    cache) and takes a mask. Its feed-forward part is the one other module that holds matrices; where there are several
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
        attention = [child for child in children if hasattr(child, "layer_idx") and _takes_mask(child)]
        others = [c for c in children if c not in attention and any(p.ndim > 1 for p in c.parameters())]
        if len(attention) == 1:
            found[f"attention.{number}"] = attention[0]
        if len(others) == 1:
            found[f"mlp.{number}"] = others[0]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention or feed-forward modules that could be left out")
    return found


def _takes_mask(part: nn.Module) -> bool:
    return any("mask" in name for name in inspect.signature(part.forward).parameters)


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
    changed = [(parts[name], vars(parts[name]).get("forward")) for name in skip]
    replaced = {name: _no_attention if name.startswith("attention") else _left_out(parts[name], model) for name in skip}
    for name, forward in replaced.items():
        vars(parts[name])["forward"] = forward
    try:
        yield
    finally:
        for module, had in changed:
            if had is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = had


#: Of every feed-forward part that was ever left out, how many results it returns beside the states.
_MORE: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def _left_out(part: nn.Module, model: Any) -> Callable[..., Any]:
    """Return what stands for a feed-forward part: nothing, in the form that its layer expects (experts say more)."""
    if part not in _MORE:
        device = next(part.parameters()).device
        if device.type == "meta":  # its weights come when it is called
            device = adapter.device_of(model)
        width = model.config.get_text_config(decoder=True).hidden_size
        state = torch.zeros(1, 1, width, dtype=model.dtype, device=device)
        with torch.no_grad():
            try:
                out = part.forward(state)
            except TypeError:  # it takes more than the states, as those that add the residual themselves
                out = state
        _MORE[part] = len(out) - 1 if isinstance(out, tuple) else None
    more = _MORE[part]
    return _nothing if more is None else lambda *args, **kwargs: (_nothing(*args, **kwargs), *[None] * more)


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    states = args[0] if args else kwargs["hidden_states"]
    return torch.zeros_like(states)


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _nothing(*args, **kwargs), None
