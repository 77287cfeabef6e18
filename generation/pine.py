"""PINE: segments see each other, and each query sorts them by what matters to it (arXiv:2407.01100).

    one query of segment b        its positions           one query of the suffix
    P P | a a a | b b | c S       P P | c | a a a | b b   P P | b b | c | a a a | S
          0.7           0.1       (own last, then by       (sorted for each token
          importance to b          importance backwards)    and head)

Keys are stored once, each segment where it would stand if it were the last of its set. To see a segment
`d` tokens further away, a query is turned forth by `d` instead of turning all keys back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ext import adapter
from hf_ext.attention import AttentionStructure, Tokens
from hf_ext.attention.by_hand import attended, probabilities, scores
from hf_ext.attention.intercept import Attended, visible
from hf_ext.attention.rotary import Rotary
from hf_ext.generation.structured.attending import AttendingPrompting, SegmentAttention
from hf_ext.generation.structured.prompting import Prompt, require_suffix
from hf_ext.generation.structured.spans import Members, sets_of


@dataclass
class PINE(AttendingPrompting):
    """Read the segments of a set without regard to their order, each knowing all others.

    Within a segment attention is causal, between segments it goes both ways. Where RoPE would tell
    which segment came first, every query has an order of its own: the more a segment matters to it,
    the nearer it stands, and the query's own segment is the last. What matters is found by attention
    without positions: softmax of q k over the set, summed over a segment and divided by its length; for
    queries inside a segment summed over that segment's queries, for those after the set one by one,
    in every layer and head. The prompt is made by `SetPrompt`; one segment, or none, is plain decoding.

    Args:
        canonical: read the segments of every set sorted by their tokens, so that not even rounding
            depends on their order. The ids returned keep the caller's order.
        decode_with: how to go on after the prompt: greedy search or sampling by default; any strategy for a
            single prompt without padding.

    Raises:
        ValueError: the model's positions are no rotations, a prompt ends in a set, segments in several
            pieces, or several prompts with another strategy inside.

    Source:
        Wang et al., Eliminating Position Bias of Language Models: A Mechanistic Approach (ICLR 2025).

    Example:
        >>> from hf_ext.generation.structured.set_prompt import SetPrompt
        >>> from hf_ext.testing import tiny_models
        >>> model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
        >>> prompt = SetPrompt("pick: ", ["red", "blue", "green"], " = ")
        >>> texts = set()
        >>> for order in ([0, 1, 2], [2, 0, 1]):
        ...     inputs = prompt.reordered(order).encode(tokenizer)
        ...     out = PINE().generate(model, **inputs, max_new_tokens=5, do_sample=False)
        ...     texts.add(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
        >>> len(texts)
        1
    """

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return the positions of the keys; who sees whom is up to `SortingAttention`."""
        plain = AttentionStructure.causal(prompt.mask)
        aside = plain.segments(prompt.segments, prompt.groups)
        require_suffix(aside, type(self).__name__)
        position = plain.keys.position.expand(prompt.ids.shape).clone()
        for row, sets in enumerate(sets_of(aside, prompt.ids)):
            for members in sets:
                end = int(position[row, members.last - 1]) + 1
                for start, stop in members.spans:
                    position[row, start:stop] = torch.arange(end - stop + start, end, device=position.device)
        if self._attention is not None:
            assert isinstance(self._attention, SortingAttention)
            self._attention.begin(prompt, aside)
            self._attention.position = position.long()

        def placed(tokens: Tokens) -> Tokens:
            return dataclasses.replace(tokens, order=tokens.order.expand(position.shape), position=position)

        return dataclasses.replace(plain, queries=placed(plain.queries), keys=placed(plain.keys))

    @contextlib.contextmanager
    def attention(self, model: Any) -> Iterator[SegmentAttention]:
        """Return the attention of a call."""
        rotary = Rotary.of(model)
        windows = [adapter.layer_window(layer) for layer in adapter.empty_cache(model).layers]
        with rotary.positions() as positions:
            yield SortingAttention(rotary, windows, positions)

    def _learn(self, inner: Any) -> None:
        assert self.report is not None
        assert self._attention is not None
        self.report.details["segments"] = [[len(s.spans) for s in sets] for sets in self._attention.sets]


class SortingAttention(SegmentAttention):
    """Attention for which every query sorts the segments anew.

    Args:
        rotary: how the model turns queries and keys.
        windows: of the layers, None for those that see everything.
        positions: gives the positions of the running forward pass.

    Attributes:
        position: `(batch, columns)` int64, the positions at which the keys of the prompts are stored.
    """

    def __init__(self, rotary: Rotary, windows: list[int | None], positions: Callable[[], Tensor]) -> None:
        super().__init__()
        self.rotary, self.windows, self.positions = rotary, windows, positions
        self.position: Tensor

    def begin(self, prompt: Prompt, structure: AttentionStructure) -> None:
        """Learn what the prompts are, and which columns see each other both ways."""
        super().begin(prompt, structure)
        group, segment = structure.keys.group, structure.keys.segment
        assert group is not None
        assert segment is not None
        siblings = (group[:, :, None] == group[:, None, :]) & (group > 0)[:, None, :]
        self.between = siblings & (segment[:, :, None] != segment[:, None, :])

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any
    ) -> Attended:
        """Attend; see `hf_ext.attention.intercept`."""
        if not self.several:
            return plain(module, query, key, value, mask, **call)
        each = self.rows_each(query, key)
        places = self.positions().to(query.device).expand(len(query), -1)
        seen = visible(mask, query, key).expand(len(query), -1, -1, -1)  # which refuses masks that do more than hide
        given = None if self.whole else seen
        rows = [
            self._row(module.layer_idx, row // each, query[row], key[row], value[row], places[row],
                      None if given is None else given[row], call)
            for row in range(len(query))
        ]  # fmt: skip
        return torch.stack(rows), None

    def _row(
        self, layer: int, row: int, query: Tensor, key: Tensor, value: Tensor, places: Tensor, given: Tensor | None,
        call: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        found = query.new_empty(*query.shape[:2], key.shape[1])
        seen, window, start = self._seen(row, query.shape[1], key.shape[1], given), self.windows[layer], 0
        if window is not None:  # it goes by distance, and a segment's differs from head to head
            within = seen = seen.expand(found.shape)
            stored = places if self.whole else self.position[row]
            near = places[:, None] - stored < window
            seen = torch.cat([seen[..., : len(stored)] & near, seen[..., len(stored) :]], dim=-1)
        for members in self.sets[row]:
            found[..., start : members.first] = scores(query, key[:, start : members.first], call)
            shifts = self._shifts(layer, row, query, key, places, members, call)
            for (first, stop), shift in zip(members.spans, shifts.unbind(-1), strict=True):
                turned = self.rotary.rotate(layer, query, shift)
                found[..., first:stop] = scores(turned, key[:, first:stop], call)
                if window is not None:
                    away = (places + shift)[..., None] - self.position[row, first:stop]
                    seen[..., first:stop] = within[..., first:stop] & (away < window)
            start = members.last
        found[..., start:] = scores(query, key[:, start:], call)
        return attended(probabilities(found, seen, call), value)

    def _seen(self, row: int, queries: int, keys: int, given: Tensor | None) -> Tensor:
        """Return `(heads or 1, queries, keys)` bool: who sees whom, windows aside."""
        real, columns = self.real[row], self.real.shape[1]
        if given is not None:
            return torch.cat([real.expand(*given.shape[:-1], -1), given[..., columns:]], dim=-1)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=real.device).tril()
        seen[:columns, :columns] |= self.between[row]
        seen[:, :columns] &= real
        return seen[None]

    def _shifts(
        self, layer: int, row: int, query: Tensor, key: Tensor, places: Tensor, members: Members, call: dict[str, Any]
    ) -> Tensor:
        """Return `(heads, queries, segments)` int64: how much further away each segment of a set is seen."""
        count, device = len(members.spans), query.device
        shifts = torch.zeros(*query.shape[:2], count, dtype=torch.long, device=device)
        if count == 1:
            return shifts
        begin = members.first if self.whole else 0  # what stands before the set does not see it
        inside = slice(members.first, members.last)
        lengths = torch.tensor(members.lengths, device=device)
        owner = torch.arange(count, device=device).repeat_interleave(lengths)
        # Attention without positions: all as the model has them at position 0.
        bare = self.rotary.rotate(layer, query[:, begin:].float(), -places[begin:])
        keys = self.rotary.rotate(layer, key[:, inside].float(), -self.position[row, inside])
        raw = scores(bare, keys, call)
        if self.whole:
            raw[:, : members.last - members.first].masked_fill_(owner[:, None] == owner, -torch.inf)
        share = raw.softmax(-1) @ (torch.nn.functional.one_hot(owner, count) / lengths).to(raw.dtype)
        if self.whole:
            for number, (start, stop) in enumerate(members.spans):
                own = slice(start - begin, stop - begin)
                share[:, own] = share[:, own].sum(1, keepdim=True)
                share[:, own, number] = torch.inf
        order = greatest_first(share, torch.tensor(members.ranks, device=device), closeness(query.dtype))
        taken = lengths[order]
        shifts[:, begin:] = torch.zeros_like(taken).scatter(-1, order, taken.cumsum(-1) - taken)
        return shifts


def closeness(dtype: torch.dtype) -> float:
    """Return up to what difference of their logarithms rounding may explain that two sums of probabilities differ."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def greatest_first(values: Tensor, ranks: Tensor, tolerance: float) -> Tensor:
    """Sort segments by how much they matter; those that rounding cannot tell apart by rank.

    Args:
        values: `(..., segments)`, 0 at least.
        ranks: int64, broadcasts to the values: an order of the segments that does not depend on where they stand.
        tolerance: largest difference of logarithms between neighbours that counts as none.

    Returns:
        `(..., segments)` int64, the numbers of the segments.

    Example:
        >>> greatest_first(torch.tensor([0.2, 0.5, 0.2000001]), torch.tensor([2, 1, 0]), 1e-4)
        tensor([1, 2, 0])
    """
    sorted_, index = values.clamp_min(torch.finfo(values.dtype).tiny).log().sort(-1, descending=True)
    apart = sorted_[..., :-1] - sorted_[..., 1:] > tolerance
    level = torch.nn.functional.pad(apart.long().cumsum(-1), (1, 0))
    return (torch.zeros_like(index).scatter(-1, index, level) * values.shape[-1] + ranks).argsort(-1)
