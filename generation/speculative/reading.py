"""How the prompts of a call get into a cache by row: read into it at once, or moved there from that of `generate`."""

from __future__ import annotations

import torch
from transformers.generation import MaxLengthCriteria
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.row_cache import RowCache, windows_of


def read_prompts(run: DecodingRun, ahead: torch.Tensor | None = None) -> tuple[RowCache, list[int], int, ModelOutput]:
    """Run the prompts of a call through its model as `generate` does.

    Args:
        run: the decoding call, before its prompt has been run.
        ahead: `(batch, n)` int64 guesses of the next tokens, evaluated with the prompt.

    Returns:
        The cache, the tokens it holds of each row, the columns that they take with padding, the model's output.

    Raises:
        ValueError: the model's cache cannot be addressed by row.
    """
    advice = "; leave past_key_values and cache_implementation out, or pass a DynamicCache or a StaticCache"
    if run.cache is not None:
        _check(run, adapter.row_addressing_problem(run.cache), advice)
    room = [int(c.max_length) for c in run.stopping_criteria if isinstance(c, MaxLengthCriteria)]
    new = min(room) - run.prompt_length if room else None
    guesses = 0 if ahead is None else ahead.shape[1]
    cache = _to_read_into(run, guesses, new)
    if cache is not None:
        given, columns = run.cache, run.input_ids.shape[1] + guesses
        starts = run.attention_mask.argmax(1).tolist()
        run.model_kwargs = {**run.model_kwargs, "past_key_values": cache}
        outputs = run.prefill(ahead)
        # It stays empty until the end, when it gets what the caller may go on from.
        run.model_kwargs = {**run.model_kwargs, "past_key_values": given}
        if not any(layer.is_initialized for layer in cache.layers):
            _check(run, "the model filled no cache", advice)
        if any(starts):
            for layer in cache.layers:
                layer.shift(starts)
        return cache, [columns - start for start in starts], columns, outputs
    outputs = run.prefill(ahead)
    problem = adapter.row_addressing_problem(run.cache)
    if problem is None and int(run.cache.get_seq_length()) == 0:
        problem = "the model filled no cache"
    _check(run, problem, advice)
    columns, batch = int(run.cache.get_seq_length()), len(run.input_ids)
    mask = run.model_kwargs.get("attention_mask")
    kept = torch.ones(batch, columns, dtype=torch.bool) if mask is None else mask[:, :columns].bool().cpu()
    lengths = kept.sum(1).tolist()
    limit = None if new is None else max(lengths) + new
    # What nobody passed in is not looked at again, until the tokens are written back at the end.
    cache = RowCache(run.cache, windows_of(run.model, run.cache), batch, kept, limit, release=not run.cache_was_given)
    return cache, lengths, columns, outputs


def _to_read_into(run: DecodingRun, guesses: int, new: int | None) -> RowCache | None:
    """Return an empty cache by row that the prompts can be read into, or None where they must go another way.

    It has to be like the cache it stands for: one that grows, of layers that keep all that is read. Prompts
    come as ids, in one piece, padded on the left if at all.
    """
    cache, columns = run.cache, run.input_ids.shape[1] + guesses
    if run.cache_was_given or cache is None or not cache.layers or int(cache.get_seq_length()):
        return None
    if run.reader is not None or run.config.prefill_chunk_size is not None or not run.input_ids.shape[1]:
        return None
    if run.model_kwargs.get("inputs_embeds") is not None or not all(map(adapter.layer_grows, cache.layers)):
        return None
    windows, mask = windows_of(run.model, cache), run.attention_mask
    if any(window is not None and window <= columns for window in windows):
        return None
    if not bool((mask[:, 1:] >= mask[:, :-1]).all() & mask[:, -1].all()):
        return None
    lanes = len(run.input_ids)
    found = RowCache(cache, windows, lanes, limit=None if new is None else int(mask.sum(1).max()) + new)
    for group in found.groups.values():
        group.aim([0] * lanes, 0, columns, run.input_ids.device)
    return found


def _check(run: DecodingRun, problem: str | None, advice: str) -> None:
    if problem is not None:
        raise ValueError(f"{run.report.strategy} has to forget tokens that were rejected, but {problem}{advice}")
