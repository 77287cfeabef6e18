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

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hf_ext import adapter
from hf_ext.attention import mode
from hf_ext.attention.mode import HAS_TRITON, runs_kernels

if TYPE_CHECKING:  # registered whenever transformers has models: the rest is imported when it is needed
    from hf_ext.attention.exact import Attended
    from hf_ext.attention.statistics import Statistics

#: Where a packed structure keeps its dense form.
DENSE = "hf_ext_dense"
#: Where a mask of bool keeps its additive form, and the version of itself that this belongs to.
ADDED = "hf_ext_added"
#: The attribute of a model's modules that holds the statistics being collected.
STATISTICS = "_hf_ext_statistics"

#: The attribute of a tensor of keys that leads to the layer of a compressed cache it came from.
CACHE_LAYER = "_hf_ext_cache_layer"

#: Configs of models that have been given a packed structure which no layer has come with yet.
_given: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

#: What `"sdpa"` runs; looked up once, as every layer asks for it in every step.
_forward: Callable[..., tuple[torch.Tensor, None]] | None = None


@torch.compiler.assume_constant_result
def _runs_own_attention(config: type) -> bool:
    return adapter.attends_by_code_of_its_own(config)


def prepare() -> None:
    """Look up what `"sdpa"` runs, as soon as transformers has it."""
    global _forward
    _forward = adapter.sdpa_function()


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

    Raises:
        ValueError: the masks of a model that does not look its attention up by name.
    """
    sizes = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset,
    }  # fmt: skip
    config = given.get("config")
    if config is not None and _runs_own_attention(type(config)):
        raise ValueError(
            f"models of {type(config).__name__} run attention of their own, which attn_implementation='hf_ext' would "
            "only give masks it cannot read; load the model with 'eager'"
        )
    device = given.get("device", "cpu")
    if q_length == 1 or not runs_kernels(device):  # what one query sees is no larger than what a structure takes
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

    if config is not None and not torch.compiler.is_compiling():
        _given[id(config)] = config
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
    output_attentions: bool = False,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
        output_attentions: whether to return the weights, which takes the whole matrix.
        sinks: of every query, which are refused.
        **kwargs: what else the model passes, such as `position_bias`.

    Returns:
        `(batch, queries, heads, width)`, and the weights `(batch, heads, queries, keys)` if asked for.

    Raises:
        ValueError: a structure of another size, or a combination that cannot be honoured.
    """
    by_sdpa = softcap is None and s_aux is None and sinks is None
    if (
        by_sdpa
        and not output_attentions
        and not query.is_cuda
        and mode._mode == "auto"
        and STATISTICS not in module.__dict__
        and getattr(key, CACHE_LAYER, None) is None
    ):  # nothing to do for us: every layer comes here in every step, so this calls as little as it can
        if attention_mask is None and _forward is not None:
            return _forward(
                module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
            )
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if sinks is not None:
        raise ValueError(
            f"{type(module).__name__} has sinks of every query; attn_implementation='hf_ext' has them of every head "
            "(s_aux). Use 'eager'"
        )
    statistics = module.__dict__.get(STATISTICS)
    if not torch.compiler.is_compiling() and (layer := getattr(key, CACHE_LAYER, None)) is not None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap, "s_aux": s_aux,
                   "output_attentions": output_attentions, **kwargs}  # fmt: skip
        return _attend_to_cache(layer, module, query, attention_mask, options)
    on_gpu = runs_kernels(query.device)
    if on_gpu and attention_mask is not None and _given:
        _check_untouched(module, attention_mask)
    if query.is_cuda and not HAS_TRITON:
        _say_once("triton, which the kernels need, is not installed (pip install 'hf_ext[kernels]')")
    if by_sdpa and not on_gpu and statistics is None and not output_attentions:
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    causal = _causal(module, query, attention_mask, is_causal)
    reason = _beyond_kernels(query, value, attention_mask, dropout, kwargs) if on_gpu else None
    if reason is not None:
        _say_once(reason)
    output = lse = sums = None
    if on_gpu and reason is None:
        from hf_ext.attention.gpu import attend_with_kernels

        output, lse, sums = attend_with_kernels(
            query, key, value, attention_mask, causal, scaling, softcap, s_aux, statistics
        )
        by_definition = output_attentions
        wanted = {"output": False, "weights": True, "lse": False, "column_sums": False}
    else:
        if by_sdpa:
            output, _ = _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
        by_definition = True
        wanted = {
            "output": not by_sdpa,
            "weights": output_attentions,
            "lse": statistics is not None and statistics.lse,
            "column_sums": statistics is not None and statistics.column_sums,
        }
    weights = None
    if by_definition and any(wanted.values()):
        if kwargs.get("cache") is not None:
            raise ValueError(
                "attn_implementation='hf_ext' has no soft-capping, sinks, statistics or output_attentions with a paged "
                "cache; use another cache, or 'paged|eager'"
            )
        found = _by_definition(
            query, key, value, attention_mask, causal, scaling, softcap, s_aux, dropout, kwargs.get("position_bias"),
            **wanted,
        )  # fmt: skip
        weights = found.weights
        if output is None:
            assert found.output is not None
            output = found.output.transpose(1, 2).contiguous()
        if lse is None and sums is None:
            lse, sums = found.lse, found.column_sums
    if statistics is not None:
        note(statistics, module, lse, sums)
    assert output is not None
    return output, weights


def _check_untouched(module: torch.nn.Module, attention_mask: torch.Tensor) -> None:
    """Refuse a mask that a model has computed from a packed structure, which only looks like numbers to add.

    Raises:
        ValueError: the model was given a structure, and comes with something else.
    """
    if _given.pop(id(getattr(module, "config", None)), None) is not None and attention_mask.is_floating_point():
        raise ValueError(
            f"{type(module).__name__} computes with its mask before it attends, and a structure of "
            "attn_implementation='hf_ext' is no mask of numbers; use 'sdpa'"
        )


def _attend_to_cache(
    layer: Any, module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to what a layer of a compressed cache holds; it hands plain tensors back to `attention`."""
    if options.get("position_bias") is not None:
        raise ValueError("a compressed cache goes with no learned position bias: what it holds has no fixed distance")

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, sums: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not sums:
            return *attention(module, query, key, value, mask, **options), None
        outer = module.__dict__.get(STATISTICS)
        tracked = torch.is_grad_enabled() and query.requires_grad
        elsewhere = outer is not None or options["output_attentions"] or options["dropout"] > 0 or tracked
        if not (elsewhere or runs_kernels(query.device)):
            from hf_ext.attention import columns

            causal = _causal(module, query, mask, options["is_causal"])
            found, column_sums = columns.attend(
                query, key, value, mask=_as_dense(mask, query, key), causal=causal, scale=options["scaling"],
                softcap=options["softcap"], sinks=options["s_aux"],
            )  # fmt: skip
            return found.transpose(1, 2).contiguous(), None, column_sums
        from hf_ext.attention.statistics import Statistics

        inner = Statistics(lse=outer is not None and outer.lse, column_sums=True)
        module.__dict__[STATISTICS] = inner
        try:
            output, weights = attention(module, query, key, value, mask, **options)
        finally:
            if outer is None:
                del module.__dict__[STATISTICS]
            else:
                module.__dict__[STATISTICS] = outer
        call = inner.calls[-1]
        if outer is not None:
            note(outer, module, call.lse, call.column_sums if outer.column_sums else None)
        return output, weights, call.column_sums

    plain = options["output_attentions"] or options["dropout"] > 0 or STATISTICS in module.__dict__
    return layer.attend(module, query, mask, options["scaling"], attend, options["softcap"], options["s_aux"], plain)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Attend as `"sdpa"` does."""
    if attention_mask is not None:
        if attention_mask.dtype == torch.int32:
            attention_mask = _dense(attention_mask, query, key)
        if attention_mask.dtype == torch.bool and query.is_cpu:
            attention_mask = _added(attention_mask, query.dtype, others)
    if _forward is None:
        prepare()
    assert _forward is not None
    return _forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


def _by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
    bias: torch.Tensor | None,
    **wanted: bool,
) -> Attended:
    """Attend by the definition, for the output or only for what is wanted besides."""
    from hf_ext.attention import exact, packed

    length = query.shape[2]
    empty = max(key.shape[2] - length, 0) if causal else 0  # the rest of a static cache holds nothing yet
    if empty:
        key, value = key[:, :, :length], value[:, :, :length]
        bias = None if bias is None else bias[..., :length]
    seen: Any = attention_mask
    if attention_mask is not None and packed.is_packed(attention_mask):
        seen = packed.unpack(attention_mask, length, key.shape[2])
    if bias is not None:
        if seen is not None and not isinstance(seen, torch.Tensor):
            seen = seen.dense()
        if seen is None and causal:
            seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
        if seen is None:
            seen = bias
        elif seen.dtype == torch.bool:
            seen = torch.where(seen, bias, torch.finfo(bias.dtype).min)
        else:
            seen = seen + bias
        causal = False
    if wanted["column_sums"] and not (wanted["output"] or wanted["weights"] or wanted["lse"]):
        from hf_ext.attention.columns import column_sums

        mask = seen if seen is None or isinstance(seen, torch.Tensor) else seen.dense()
        with torch.no_grad():
            sums = column_sums(query, key, mask=mask, causal=causal, scale=scaling, softcap=softcap, sinks=sinks)
        return exact.Attended(column_sums=torch.nn.functional.pad(sums, (0, empty)))
    with torch.set_grad_enabled((wanted["output"] or wanted["weights"]) and torch.is_grad_enabled()):
        found = exact.attend(
            query, key, value, mask=seen, causal=causal, scale=scaling, softcap=softcap, sinks=sinks, dropout=dropout,
            **wanted,
        )  # fmt: skip
    if not empty:
        return found
    per_key = {"weights": found.weights, "column_sums": found.column_sums}
    padded = {n: torch.nn.functional.pad(part, (0, empty)) for n, part in per_key.items() if part is not None}
    return dataclasses.replace(found, **padded)


def note(
    statistics: Statistics, module: torch.nn.Module, lse: torch.Tensor | None, column_sums: torch.Tensor | None
) -> None:
    """Add what a layer did to the statistics; layers that have no number are all -1."""
    from hf_ext.attention.statistics import CallStatistics

    layer = getattr(module, "layer_idx", None)
    statistics.calls.append(CallStatistics(-1 if layer is None else int(layer), lse, column_sums))


def _causal(
    module: torch.nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool | None
) -> bool:
    """Tell whether a layer without a mask is causal, as SDPA in transformers decides it."""
    wanted = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    return query.shape[2] > 1 and attention_mask is None and bool(wanted)


def _as_dense(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return a mask that is no packed structure."""
    return mask if mask is None or mask.dtype != torch.int32 else _dense(mask, query, key)


def _dense(packed: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a packed structure as SDPA takes it; it is worked out once for all layers that share it."""
    from hf_ext.attention.packed import unpack

    if torch.compiler.is_compiling():
        return unpack(packed, query.shape[2], key.shape[2]).dense()
    dense = getattr(packed, DENSE, None)
    if dense is None:
        dense = unpack(packed, query.shape[2], key.shape[2]).dense()
        setattr(packed, DENSE, dense)
    return dense


def _added(mask: torch.Tensor, dtype: torch.dtype, others: dict[str, Any]) -> torch.Tensor:
    """Return a mask of bool as SDPA adds it, which SDPA works out anew in every layer; here all layers share it."""
    if torch.compiler.is_compiling() or mask.is_inference() or others.get("position_bias") is not None:
        return mask
    version, added = getattr(mask, ADDED, (None, None))
    if added is None or version != mask._version or added.dtype != dtype:  # a caller may have changed the mask since
        added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        setattr(mask, ADDED, (mask._version, added))
    return added


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
    width = max(query.shape[-1], value.shape[-1])
    if width > 256:
        return f"the kernels take heads of a width up to 256, not {width}"
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
