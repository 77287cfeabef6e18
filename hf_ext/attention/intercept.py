"""Run one's own attention inside a stock model, for a while and on one instance only.

    model --attention layer--> transformers looks the implementation up by name
                                      |
              config says "intercepted", one registered function
                                      |  who is asking? (a weak table: module -> handlers)
                        attend(module, query, key, value, mask, plain, **kwargs)

Registering a name is not a patch: no model uses it unless its config says so, and inside the block
only the config of this model does. A module that nobody intercepts gets what it would have got.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import adapter
from hf_ext.attention.backend import CACHE_LAYER
from hf_ext.attention.packed import is_packed, unpack

#: What an attention function returns: `(batch, queries, heads, width)`, and the probabilities or None.
Attended = tuple[Tensor, Tensor | None]
#: `attend(module, query, key, value, mask, plain, **kwargs)`.
Attend = Callable[..., Attended]

#: Handlers of each attention module, the innermost last.
_HANDLERS: weakref.WeakKeyDictionary[nn.Module, list[Attend]] = weakref.WeakKeyDictionary()
#: Name under which the dispatcher stands in for each implementation.
_NAMES: dict[str, str] = {}


@contextlib.contextmanager
def intercept(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Let every attention layer of one model call `attend`, as long as the block runs.

    Blocks nest: the inner one is called, and its `plain` is the outer one. At the end, and when
    something raises, the model is as before.

    Args:
        model: a model of transformers whose attention goes through `AttentionInterface`.
        attend: is called as `attend(module, query, key, value, mask, plain, **kwargs)` with the layer's
            attention module, `query` `(batch, heads, queries, width)` and `key`, `value` `(batch, key heads,
            keys, width)` as they come from positions and cache, `mask` in the form of the model's own
            implementation (see `visible`), and `kwargs` (`scaling`, `dropout`, ...) as the model passes them.
            It returns what `plain(module, query, key, value, mask, **kwargs)` returns:
            `(batch, queries, heads, width)` and the probabilities or None.

    Raises:
        ValueError: the model's attention cannot be replaced.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> def silent(module, query, key, value, mask, plain, **kwargs):
        ...     output, weights = plain(module, query, key, value, mask, **kwargs)
        ...     return torch.zeros_like(output), weights
        >>> model, ids = tiny_models.shared("llama"), torch.tensor([[5, 6, 7]])
        >>> with intercept(model, silent):
        ...     found = model(ids).logits
        >>> bool((found == model(ids).logits).all())
        False
    """
    configs = adapter.attention_configs(model)
    modules = list(model.modules())
    before = [(config, adapter.attention_of(config)) for config in configs]
    for module in modules:
        _HANDLERS.setdefault(module, []).append(attend)
    try:
        for config, name in before:
            adapter.switch_attention(config, _stand_in(name))
        yield
    finally:
        for config, name in before:
            adapter.switch_attention(config, name)
        for module in modules:
            handlers = _HANDLERS[module]
            handlers.remove(attend)
            if not handlers:
                del _HANDLERS[module]


def visible(mask: Any, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
    """Return a mask of any form as `(rows, 1 or heads, queries, keys)` bool, True where a query sees a key.

    Args:
        mask: what `attend` got.
        query: likewise.
        key: likewise.
        causal: what no mask means where there are several queries: they see the keys before them, as
            `is_causal` of the call or the module says, or all.

    Raises:
        ValueError: a mask of another form (that of flash or flex attention), or one that does more than hide.

    Example:
        >>> q, k = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 3, 4)
        >>> visible(None, q, k)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        return (seen.tril(keys - queries) if causal and queries > 1 else seen)[None, None]
    if isinstance(mask, Tensor) and mask.ndim == 4 and (mask.is_floating_point() or mask.dtype == torch.bool):
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            return mask
        seen = mask > torch.finfo(mask.dtype).min / 2
        if not torch.compiler.is_compiling() and bool((seen & (mask != 0)).any()):
            raise ValueError(
                "the model's attention adds numbers of its own to the scores (biases, soft masks) beside hiding keys; "
                "a method that attends in its place would lose them"
            )
        return seen
    if isinstance(mask, Tensor) and is_packed(mask):
        return unpack(mask, queries, keys).dense()
    raise ValueError(
        f"the model's attention takes a {type(mask).__name__} as mask, not a tensor of queries and keys; load "
        "it with attn_implementation='sdpa' or 'eager'"
    )


def _stand_in(name: str) -> str:
    """Return the name under which the dispatcher stands in for the implementation called `name`."""
    if name in _NAMES.values():  # inside another block
        return name
    if name not in _NAMES:
        # No part of the original's name: transformers looks for "sdpa" and "flash" in names.
        _NAMES[name] = f"hf_ext_intercepted_{len(_NAMES)}"
        adapter.register_attention_like(_NAMES[name], functools.partial(_dispatch, name), name)
    return _NAMES[name]


def _dispatch(
    own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Attended:
    call = adapter.attention_function(own, module)
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        key, value = _written(own, module, query, key, value, kwargs.get("is_causal"))
    for handler in _HANDLERS.get(module, ()):
        call = functools.partial(_through, handler, call)
    return call(module, query, key, value, attention_mask, **kwargs)


def _written(
    own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, is_causal: bool | None
) -> tuple[Tensor, Tensor]:
    """Return what the first pass into a static cache has written: SDPA's causality begins at the first key."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or hasattr(key, CACHE_LAYER) or any(name in own for name in ("eager", "flash")):
        return key, value
    return key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]


def _through(
    handler: Attend, plain: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any
) -> Attended:
    return handler(module, query, key, value, mask, plain, **kw)
