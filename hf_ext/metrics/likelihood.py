"""What a live model makes of texts: coherence of continuations, bits per byte.

Rows are padded on the right, where a causal model cannot see the padding, so a row's figures do
not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def coherence(
    model: Any,
    prompts: Sequence[str | Sequence[int]],
    continuations: Sequence[str | Sequence[int]],
    tokenizer: Any = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measure how likely a live model finds continuations, given their prompts (Su & Xu, 2022).

    Args:
        model: a causal language model; it may be another one than wrote the continuations.
        prompts: strings or token ids, none empty.
        continuations: as many, none empty. A string is tokenized apart from its prompt, since a
            generated continuation begins at a token boundary.
        tokenizer: needed for strings; the prompt gets the special tokens it adds by default.
        batch_size: rows per forward pass; does not change the result.

    Returns:
        `coherence`: the mean over texts of the mean log-likelihood per token, in nats (closer to
        zero is more likely); `perplexity`: `exp` of its negation; `per_text`: each text's own.

    Raises:
        ValueError: no texts, numbers of prompts and continuations differ, an empty text, strings
            without a tokenizer, or a text longer than the model's context.
    """
    nats = continuation_nats(model, prompts, continuations, tokenizer, batch_size)
    per_text = [-row.mean().item() for row in nats]
    mean = sum(per_text) / len(per_text)
    return {"coherence": mean, "perplexity": math.exp(-mean), "per_text": per_text}


def continuation_nats(
    model: Any,
    prompts: Sequence[str | Sequence[int]],
    continuations: Sequence[str | Sequence[int]],
    tokenizer: Any = None,
    batch_size: int = 8,
) -> list[Tensor]:
    """Return, for each text, the surprise in nats of every token of its continuation.

    Takes the arguments of `coherence` and raises what it raises.

    Returns:
        One float32 tensor per text, on the CPU, of the continuation's length in tokens.
    """
    if not len(prompts) or len(prompts) != len(continuations):
        raise ValueError(
            f"need as many prompts as continuations and at least one, got {len(prompts)} and {len(continuations)}"
        )
    rows, starts = [], []
    for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        before = _ids(prompt, tokenizer, special=True)
        after = _ids(continuation, tokenizer, special=False)
        if not before or not after:
            raise ValueError(f"the {'continuation' if before else 'prompt'} at {index} is empty; leave that text out")
        rows.append(before + after)
        starts.append(len(before))
    limit = _context(model)
    if limit is not None and (longest := max(map(len, rows))) > limit:
        raise ValueError(
            f"a prompt with its continuation has {longest} tokens, the model's context is {limit}; shorten it"
        )
    nats: list[Tensor] = []
    with _evaluating(model):
        for first in range(0, len(rows), batch_size):
            scored = _row_nats(model, rows[first : first + batch_size])
            nats += [row[start - 1 :] for row, start in zip(scored, starts[first : first + batch_size], strict=True)]
    return nats


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    context: int | None = None,
    stride: int | None = None,
    start_token_id: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measure a live model's compression of texts, which is comparable between tokenizers.

    The surprise of all tokens is added up in bits and divided by the number of UTF-8 bytes, so it
    does not matter into how many tokens a text is cut. Each text starts after `start_token_id`,
    which lets its first token be scored too. A text longer than the context is read in windows
    of which each moves on by `stride` tokens and scores only what is new.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; it must be able to encode the texts without unknown tokens.
        texts: none empty.
        context: tokens per window, the start token included; by default what the model's config says.
        stride: tokens scored per window after the first; half of `context` by default.
        start_token_id: what stands before each text; the tokenizer's bos or eos token by default.
        batch_size: windows per forward pass; does not change the result.

    Returns:
        `bits_per_byte`, over all texts together; `nats_per_token`, `perplexity`; the totals `bits`,
        `bytes`, `tokens`; `per_text`, the bits per byte of each text.

    Raises:
        ValueError: no text, an empty text, an unknown token, no start token, or a window that makes no sense.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError("texts must be a non-empty sequence of strings")
    start = _start_token(tokenizer, start_token_id)
    size = context if context is not None else _context(model)
    if size is None:
        raise ValueError("the model's config names no context length; pass context=")
    limit = _context(model)
    if size < 2 or (limit is not None and size > limit):
        raise ValueError(f"context must lie between 2 and the model's {limit}, got {size}")
    step = stride if stride is not None else max(size // 2, 1)
    if not 1 <= step < size:
        raise ValueError(f"stride must lie between 1 and context - 1 = {size - 1}, got {step}")

    jobs: list[tuple[int, list[int], int]] = []  # text, window, how many of its last tokens are new
    lengths = []
    for index, text in enumerate(texts):
        ids = _ids(text, tokenizer, special=False)
        if not ids:
            raise ValueError(f"the text at {index} is empty; leave it out")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the text at {index} has unknown tokens: their bytes would cost nothing; use another tokenizer"
            )
        lengths.append(len(ids))
        jobs += [(index, window, new) for window, new in windows([start, *ids], size, step)]
    nats = [0.0] * len(texts)
    with _evaluating(model):
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            for (index, _, new), row in zip(batch, _row_nats(model, [job[1] for job in batch]), strict=True):
                nats[index] += row[-new:].double().sum().item()
    sizes = [len(text.encode("utf-8")) for text in texts]
    total = sum(nats)
    return {
        "bits_per_byte": total / math.log(2) / sum(sizes),
        "nats_per_token": total / sum(lengths),
        "perplexity": math.exp(total / sum(lengths)),
        "bits": total / math.log(2),
        "bytes": sum(sizes),
        "tokens": sum(lengths),
        "per_text": [value / math.log(2) / size for value, size in zip(nats, sizes, strict=True)],
    }


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Cut `ids` into overlapping windows such that every token but the first is new in exactly one.

    Yields:
        A window of at most `context` tokens, and how many tokens at its end are new.

    Example:
        >>> list(windows([0, 1, 2, 3, 4, 5], context=4, stride=2))
        [([0, 1, 2, 3], 3), ([2, 3, 4, 5], 2)]
    """
    scored = 1  # nothing stands before the first token
    end = min(context, len(ids))
    while scored < len(ids):
        yield list(ids[max(end - context, 0) : end]), end - scored
        scored, end = end, min(end + stride, len(ids))


def _row_nats(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return for each row the surprise of its second and later tokens, in float32 on the CPU."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
    return [nats[index, : len(row) - 1] for index, row in enumerate(rows)]


def _ids(text: str | Sequence[int], tokenizer: Any, special: bool) -> list[int]:
    if not isinstance(text, str):
        return [int(token) for token in text]
    if tokenizer is None:
        raise ValueError("texts are strings, so tokenizer= is needed")
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _start_token(tokenizer: Any, given: int | None) -> int:
    for token in (given, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a bos nor an eos token to start texts with; pass start_token_id=")


def _context(model: Any) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradients off, and put the model back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
