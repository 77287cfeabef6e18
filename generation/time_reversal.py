"""Scores and texts in the other direction: how likely a query is, given its response (arXiv:2412.02626).

Two readers of the probability of a query given a response: a model trained on reversed tokens
(`Backwards`, the paper's TRLM-Ba, trained by `hf_ext.trainer_callbacks.TRLM`), and any model that is
given the response first (`ResponseFirst`, its TRLM-Fo).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from hf_ext import adapter

Tokens = Sequence[int]


class Reader(Protocol):
    """What turns a query and a response into a text that begins with the response."""

    model: PreTrainedModel

    def split(self, query: Tokens, response: Tokens) -> tuple[list[int], list[int]]:
        """Return the part that is given and the part whose probability counts."""


@torch.no_grad()
def log_probs(model: PreTrainedModel, given: Sequence[Tokens], wanted: Sequence[Tokens]) -> torch.Tensor:
    """Compute the log-probability of texts, each behind another text, in one call of a causal model.

    Args:
        model: any causal model in evaluation mode.
        given: the text before, of each row.
        wanted: the text whose probability is asked for; empty ones get 0.

    Returns:
        `(rows,)` float32, in nats. -inf where nothing is given, not even bos: such a model does not
        say how likely a first token is.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.shared("llama")
        >>> both = log_probs(model, [[5]], [[6, 7]])
        >>> parts = log_probs(model, [[5], [5, 6]], [[6], [7]])
        >>> bool((both - parts.sum()).abs() < 1e-5)
        True
    """
    rows = [[*before, *after] for before, after in zip(given, wanted, strict=True)]
    longest = max(map(len, rows), default=0)
    device = adapter.device_of(model)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([[len(before), len(row)] for before, row in zip(given, rows, strict=True)], device=device)
    if longest < 2:
        found = torch.zeros(len(rows), device=device)
    else:
        place = torch.arange(longest, device=device)
        logits = model(ids, attention_mask=(place < lengths[:, 1:]).long()).logits[:, :-1].float()
        chosen = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        counts = (place[1:] >= lengths[:, :1]) & (place[1:] < lengths[:, 1:])
        found = chosen.masked_fill(~counts, 0).sum(-1)
    nothing = [not len(before) and len(after) > 0 for before, after in zip(given, wanted, strict=True)]
    return found.masked_fill(torch.tensor(nothing, device=device), -torch.inf)


@dataclass
class Backwards:
    """A model that was trained on reversed tokens.

    It reads bos, if the query begins with it, then the response and the query, each from its last
    token to its first, as `TRLM` shows texts to it. The eos token behind a response is no part of it.

    Args:
        model: the reversed model.
        special: ids that stay at the ends; bos, eos and padding of the model's configs are among them anyway.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> Backwards(tiny_models.shared("llama")).split([5, 6], [7, 8, 9])
        ([9, 8, 7], [6, 5])
    """

    model: PreTrainedModel
    special: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        self.special = frozenset(self.special) | special_of(self.model)

    def split(self, query: Tokens, response: Tokens) -> tuple[list[int], list[int]]:
        """Return the reversed response behind leading special tokens, and the reversed query."""
        first = next((at for at, token in enumerate(query) if token not in self.special), len(query))
        return [*query[:first], *reversed(_bare(response, self.special))], list(reversed(query[first:]))


@dataclass
class ResponseFirst:
    """A model of the usual direction that is given the response first and then asked for the query.

    It reads `before`, the response, `between` ("... is the answer to the question"), and the query.

    Args:
        model: any causal model.
        before: token ids in front of the response, bos first where the model knows it.
        between: token ids between response and query.
        special: as for `Backwards`.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> ResponseFirst(tiny_models.shared("llama"), before=[1], between=[4]).split([5, 6], [7, 8])
        ([1, 7, 8, 4], [5, 6])
    """

    model: PreTrainedModel
    before: Tokens = ()
    between: Tokens = ()
    special: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        self.special = frozenset(self.special) | special_of(self.model)

    def split(self, query: Tokens, response: Tokens) -> tuple[list[int], list[int]]:
        """Return the response in its frame, and the query without special tokens at its beginning."""
        first = next((at for at, token in enumerate(query) if token not in self.special), len(query))
        return [*self.before, *_bare(response, self.special), *self.between], list(query[first:])


def query_log_probs(reader: Reader, query: Tokens, responses: Sequence[Tokens]) -> torch.Tensor:
    """Compute how likely a query is, given each of several responses.

    Args:
        reader: the direction and its model.
        query: token ids without padding.
        responses: likewise.

    Returns:
        `(responses,)` log-probabilities of the query in nats.

    Raises:
        ValueError: the text is longer than the model's context.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> query_log_probs(Backwards(tiny_models.shared("llama")), [5, 6], [[7, 8], [9]]).shape
        torch.Size([2])
    """
    pairs = [reader.split(query, response) for response in responses]
    context = getattr(reader.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max((len(given) + len(wanted) for given, wanted in pairs), default=0)
    if context is not None and longest > context and not getattr(reader.model, "_extrapolates_length", False):
        raise ValueError(
            f"query and response have {longest} tokens, but the context of the model that scores them is {context}; "
            "shorten the prompt or lower max_new_tokens"
        )
    return log_probs(reader.model, [given for given, _ in pairs], [wanted for _, wanted in pairs])


@torch.no_grad()
def queries_for(model: PreTrainedModel, responses: Sequence[Tokens], **settings: Any) -> list[list[int]]:
    """Write a query for each response with a model that was trained on reversed tokens.

    Args:
        model: the reversed model.
        responses: token ids, without padding; a leading bos is kept in front.
        **settings: of `generate`, such as `max_new_tokens`, `do_sample` and `num_return_sequences`.

    Returns:
        The queries' tokens in reading order, without special tokens at the ends; several in a row for each response
        under `num_return_sequences`.

    Raises:
        ValueError: a response without tokens, and no bos either.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> [query] = queries_for(tiny_models.shared("llama"), [[7, 8, 9]], max_new_tokens=4, pad_token_id=0)
        >>> len(query) <= 4
        True
    """
    special = special_of(model)
    rows = []
    for number, response in enumerate(responses):
        first = next((at for at, token in enumerate(response) if token not in special), len(response))
        rows.append([*response[:first], *reversed(_bare(response[first:], special))])
        if not rows[-1]:
            raise ValueError(f"response {number} is empty; give at least one token, such as the bos token")
    longest = max(map(len, rows), default=0)
    ids = torch.tensor(
        [[0] * (longest - len(row)) + row for row in rows], dtype=torch.long, device=adapter.device_of(model)
    )
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=adapter.device_of(model))
    written = model.generate(input_ids=ids, attention_mask=mask, **settings)
    new = (written if isinstance(written, torch.Tensor) else written.sequences)[:, longest:].tolist()
    return [list(reversed(_until(row, special))) for row in new]


def special_of(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids of bos, eos and padding in a model's configs."""
    found: set[int] = set()
    for config in (model.config.get_text_config(decoder=True), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    return frozenset(found)


def _bare(tokens: Tokens, special: frozenset[int]) -> list[int]:
    """Leave out special tokens at the end."""
    bare = list(tokens)
    while bare and bare[-1] in special:
        bare.pop()
    return bare


def _until(tokens: Tokens, special: frozenset[int]) -> list[int]:
    """Return what stands before the first special token."""
    end = next((at for at, token in enumerate(tokens) if token in special), len(tokens))
    return list(tokens[:end])
