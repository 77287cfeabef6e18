"""`attn_implementation="hf_ext"`: Triton kernels on a GPU, elsewhere what `"sdpa"` computes.

    mask      on a GPU a packed structure (`packed.py`), read off transformers' mask function; a dense
              mask where it has no exact counterpart; None where causality says it all. Elsewhere what
              `"sdpa"` gets.
    attention on a GPU the kernels; elsewhere PyTorch's SDPA, or the definition in blocks of queries
              (`exact.py`) for soft-capping and sinks, which SDPA does not know.

Nothing that is asked for is dropped: what the kernels cannot do goes the way it goes elsewhere, and
says so once.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from hf_ext import adapter
from hf_ext.attention.statistics import ATTRIBUTE, CallStatistics, Statistics

#: Whether the Triton kernels are used: where they can, everywhere (under the interpreter), or nowhere.
_mode: Literal["auto", "always", "never"] = "auto"


@contextmanager
def kernels(mode: Literal["auto", "always", "never"]) -> Iterator[None]:
    """Say for a while where the Triton kernels run.

    Args:
        mode: `"auto"` on CUDA devices; `"always"` on the CPU, too, for which `TRITON_INTERPRET=1` must have
            been set before Triton was imported; `"never"` to run what runs without a GPU.

    Example:
        >>> with kernels("never"):
        ...     runs_kernels("cuda")
        False
    """
    global _mode
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"mode must be 'auto', 'always' or 'never', got {mode!r}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def runs_kernels(device: torch.device | str) -> bool:
    """Tell whether attention on a device runs the Triton kernels."""
    if _mode == "auto":
        return torch.device(device).type == "cuda" and _triton()
    return _mode == "always"


@functools.cache
def _triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn("triton is not installed: attn_implementation='hf_ext' runs SDPA instead", stacklevel=3)
    return found


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **given: Any
) -> torch.Tensor | None:
    """Build the mask of a forward pass; the mask function of `"hf_ext"`, with transformers' arguments.

    Args:
        batch_size: rows.
        q_length: number of queries.
        kv_length: number of keys.
        q_offset: index of the first query.
        kv_offset: index of the first key.
        **given: `mask_function`, `attention_mask`, `device` and what else transformers passes.

    Returns:
        None where `is_causal` says it all; else a packed structure or `(batch, 1, queries, keys)` bool.
    """
    sizes = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset,
    }  # fmt: skip
    device = given.get("device", "cpu")
    if not runs_kernels(device):
        return adapter.sdpa_mask(**sizes, **given)
    padding = given.get("attention_mask")
    causal, both = given.get("allow_is_causal_skip", True), given.get("allow_is_bidirectional_skip", False)
    if adapter.mask_is_needless(
        q_length, kv_length, q_offset, kv_offset, padding, given.get("local_size"), causal, both
    ):
        return None
    structure = None
    parts = adapter.describe_mask_function(given["mask_function"]) if "mask_function" in given else [("causal",)]
    if parts is not None:
        from hf_ext.attention.described import structure_of

        structure = structure_of(parts, q_length, kv_length, q_offset, kv_offset, padding, device)
    if structure is None:
        return adapter.sdpa_mask(**sizes, **{**given, "allow_is_causal_skip": False})
    from hf_ext.attention.packed import pack

    return pack(structure)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend; the attention function of `"hf_ext"`, with transformers' arguments.

    Args:
        module: the attention layer.
        query: `(batch, heads, queries, width)`.
        key: `(batch, key heads, keys, width)`.
        value: likewise.
        attention_mask: what `mask` returned, or a caller's own: bool, additive, or a packed structure.
        dropout: of the weights.
        scaling: of the scores.
        is_causal: whether queries without a mask see only what is before them; as the layer says by default.
        softcap: scores are capped softly there.
        s_aux: `(heads,)` scores of the attention sinks.
        **kwargs: what else the model passes, such as `position_bias`.

    Returns:
        `(batch, queries, heads, width)`, and None for the weights.

    Raises:
        ValueError: a mask that no attention takes, or statistics that cannot be had.
    """
    statistics = module.__dict__.get(ATTRIBUTE)
    if runs_kernels(query.device):
        reason = _beyond_kernels(query, value, attention_mask, dropout, kwargs)
        if reason is None:
            from hf_ext.attention.gpu import attend_with_kernels

            causal = _causal(module, query, attention_mask, is_causal)
            return attend_with_kernels(
                module, query, key, value, attention_mask, causal, scaling, softcap, s_aux, statistics
            ), None
        _say_once(reason)
    if softcap is None and s_aux is None:
        if statistics is not None:
            causal = _causal(module, query, attention_mask, is_causal)
            _by_definition(module, query, key, value, attention_mask, causal, 0.0, scaling, None, None, statistics,
                           output=False, extra=kwargs)  # fmt: skip
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            attention_mask = _dense(attention_mask, query, key)
        return adapter.sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = _causal(module, query, attention_mask, is_causal)
    output = _by_definition(
        module, query, key, value, attention_mask, causal, dropout, scaling, softcap, s_aux, statistics, extra=kwargs
    )
    assert output is not None
    return output.transpose(1, 2).contiguous(), None


def _by_definition(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    statistics: Statistics | None,
    output: bool = True,
    extra: dict[str, Any] | None = None,
) -> torch.Tensor | None:
    """Attend by the definition, for the output or only to note statistics."""
    from hf_ext.attention import exact, packed

    for name in ("position_bias", "cache"):
        if (extra or {}).get(name) is not None:
            what = "soft-capping and sinks" if output else "statistics"
            raise ValueError(f"attn_implementation='hf_ext' has no {what} together with {name}; use 'eager'")
    if causal and key.shape[2] > query.shape[2]:  # the rest of a static cache, see `sdpa_attention`
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    found: Any = attention_mask
    if attention_mask is not None and packed.is_packed(attention_mask):
        found = packed.unpack(attention_mask, query.shape[2], key.shape[2])
    with torch.set_grad_enabled(output and torch.is_grad_enabled()):
        attended = exact.attend(
            query, key, value, mask=found, causal=causal, scale=scaling, softcap=softcap, sinks=sinks, dropout=dropout,
            output=output, lse=statistics is not None and statistics.lse,
            column_sums=statistics is not None and statistics.column_sums,
        )  # fmt: skip
    if statistics is not None:
        note(statistics, module, attended.lse, attended.column_sums)
    return attended.output


def note(
    statistics: Statistics, module: torch.nn.Module, lse: torch.Tensor | None, column_sums: torch.Tensor | None
) -> None:
    """Add what a layer did to the statistics; layers that have no number are all -1."""
    layer = getattr(module, "layer_idx", None)
    statistics.calls.append(CallStatistics(-1 if layer is None else int(layer), lse, column_sums))


def _causal(
    module: torch.nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool | None
) -> bool:
    """Tell whether a layer without a mask is causal, as SDPA in transformers decides it."""
    wanted = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    return query.shape[2] > 1 and attention_mask is None and bool(wanted)


def _dense(packed: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a packed structure as SDPA takes it; it is worked out once for all layers that share it."""
    from hf_ext.attention.packed import unpack

    if torch.compiler.is_compiling():
        return unpack(packed, query.shape[2], key.shape[2]).dense()
    dense = getattr(packed, "_hf_ext_dense", None)
    if dense is None:
        dense = unpack(packed, query.shape[2], key.shape[2]).dense()
        packed._hf_ext_dense = dense  # type: ignore[attr-defined]
    return dense


def _beyond_kernels(
    query: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float, extra: dict[str, Any]
) -> str | None:
    """Say what keeps the kernels from doing a call, or None."""
    if dropout > 0:
        return "the kernels drop no weights (attention dropout)"
    if extra.get("position_bias") is not None:
        return "the kernels take no learned position bias"
    if extra.get("cache") is not None:
        return "the kernels read no paged cache"
    if query.shape[-1] > 256 or value.shape[-1] != query.shape[-1]:
        return f"the kernels take heads of up to 256, alike for keys and values, not {query.shape[-1]}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels do not compute in {query.dtype}"
    if attention_mask is not None and attention_mask.requires_grad:
        return "the kernels give a mask no gradient"
    return None


_said: set[str] = set()


def _say_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _said:
        return
    _said.add(reason)
    warnings.warn(f"attn_implementation='hf_ext' runs a slower path: {reason}", stacklevel=3)
