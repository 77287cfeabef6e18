"""Attention implementations for transformers: both halves of one are registered, or neither.

An implementation whose mask function is missing is not refused by transformers: its masks are silently
None, and padding and causality are lost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_ext import adapter

#: What transformers reads in a name: a Hub repository, a wrapper, and the implementations it has checks for.
_MEANINGS = {
    "/": "a kernel on the Hub",
    "|": "a wrapper such as `paged|eager`",
    "sdpa": "PyTorch's scaled dot product attention",
    "flex_attention": "flex attention",
    "flash": "flash attention",
}


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any], overwrite: bool = False) -> None:
    """Make an attention implementation known to all models of transformers.

    Args:
        name: what users give as `attn_implementation`.
        attention: `attention(module, query, key, value, attention_mask, dropout=, scaling=, is_causal=, **kwargs)`,
            which returns the output `(batch, queries, heads, width)` and the weights or None.
        mask: `mask(batch_size, q_length, kv_length, q_offset=, kv_offset=, mask_function=, attention_mask=, **kwargs)`,
            which returns what `attention` takes as `attention_mask`. Models call it with keywords.
        overwrite: whether to replace another implementation of this name.

    Raises:
        TypeError: an argument that is no function, or one that takes no `**kwargs`, as models pass more
            arguments from release to release.
        ValueError: a name that means something else to transformers, or one that is taken.

    Example:
        >>> from hf_ext import adapter
        >>> def attention(module, query, key, value, attention_mask, **kwargs):
        ...     return adapter.sdpa_attention(module, query, key, value, attention_mask, **kwargs)
        >>> def mask(**kwargs):
        ...     return adapter.sdpa_mask(**kwargs)
        >>> register("my_attention", attention, mask)
        >>> register("my_flash", attention, mask)
        Traceback (most recent call last):
        ...
        ValueError: 'my_flash' contains 'flash', by which transformers means flash attention; choose another name
    """
    _check_name(name)
    for part, function in (("attention", attention), ("mask", mask)):
        if not callable(function):
            raise TypeError(f"{part} must be a function, got {type(function).__name__}")
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            raise TypeError(f"the {part} function of {name!r} must take **kwargs: models pass arguments of their own")
    mappings = adapter.attention_mappings()
    before = [mapping.get(name) for mapping in mappings]
    if not overwrite and any(
        old is not None and old is not new for old, new in zip(before, (attention, mask), strict=True)
    ):
        raise ValueError(f"{name!r} is another implementation already; pass overwrite=True to replace it")
    from transformers import AttentionInterface, AttentionMaskInterface

    try:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    except BaseException:
        for mapping, old in zip(mappings, before, strict=True):
            if old is None:
                mapping.pop(name, None)
            else:
                mapping[name] = old
        raise


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of an implementation must be a string, got {name!r}")
    if name == "eager":
        raise ValueError("'eager' is each model's own attention; choose another name")
    for part, meaning in _MEANINGS.items():
        if part in name:
            raise ValueError(f"{name!r} contains {part!r}, by which transformers means {meaning}; choose another name")
