"""Parallel context encoding with sinks and selection, and the entropy they are for (arXiv:2412.16545).

    P P | a a a | b b | S          pieces are read side by side, each after the shared prefix P (the sink);
                                   S sees P and, of the pieces, the top-scoring ones only

A model has never seen a query look at many beginnings at once: its attention spreads out. How much is
told by the entropy of its probabilities, which the report has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ext.attention import AttentionStructure
from hf_ext.attention.by_hand import attended, probabilities, scores
from hf_ext.attention.intercept import Attended, visible
from hf_ext.generation.pine import closeness, greatest_first
from hf_ext.generation.strategy import positive
from hf_ext.generation.structured.attending import AttendingPrompting, SegmentAttention
from hf_ext.generation.structured.prompting import Prompt, require_suffix


@dataclass
class ParallelContextEncoding(AttendingPrompting):
    """Read the pieces of a context independently; let what follows look at the best of them only.

    A prompt is made by `SetPrompt(prefix, [pieces], question)`. All pieces begin at the position after
    the prefix and see it, which gives them one common place to put attention that nobody needs. Each
    query after the pieces, in every layer and head, sees the `top_pieces` to which its attention would
    give the most. Costs grow with the length of a piece, not with its square over all of them, and the
    order of the pieces changes nothing. One piece is full attention, and plain decoding.

    Args:
        canonical: read the pieces of every set sorted by their tokens, so that not even rounding
            depends on their order. The ids returned keep the caller's order.
        top_pieces: how many pieces of a set a query sees; None for all.
        shared_sinks: False reads the prefix as one more piece that the others do not see: parallel
            encoding as it is without this remedy.
        decode_with: how to go on after the prompt: greedy search or sampling by default; any strategy for a
            single prompt without padding.

    Raises:
        ValueError: a prompt ends in a set, pieces in several parts, more positions than the model has, or
            several prompts with another strategy inside.

    Source:
        Zhang et al., Attention Entropy is a Key Factor: An Analysis of Parallel Context Encoding with
        Full-attention-based Pre-trained Language Models (ACL 2025).

    Example:
        >>> from hf_ext.generation.structured.set_prompt import SetPrompt
        >>> from hf_ext.testing import tiny_models
        >>> model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
        >>> inputs = SetPrompt("notes: ", ["red is 1", "blue is 2", "green is 3"], " blue? ").encode(tokenizer)
        >>> strategy = ParallelContextEncoding(top_pieces=1)
        >>> out = strategy.generate(model, **inputs, max_new_tokens=5, do_sample=False)
        >>> sorted(strategy.report.details)
        ['entropy', 'entropy_per_layer', 'pieces']
    """

    top_pieces: int | None = None
    shared_sinks: bool = True

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        if self.top_pieces is not None:
            positive("top_pieces", self.top_pieces)

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return pieces side by side."""
        plain = AttentionStructure.causal(prompt.mask)
        structure = plain.segments(prompt.segments, prompt.groups)
        require_suffix(structure, type(self).__name__)
        if not self.shared_sinks:
            group = structure.keys.group
            assert group is not None  # made by `segments`
            number = torch.where(group > 0, group, group.amax() + 1).amin(-1, keepdim=True)
            before = prompt.mask & ((group > 0).int().cumsum(-1) == 0) & (number <= group.amax())
            structure = plain.segments(
                torch.where(before, prompt.segments.amax() + 1, prompt.segments), torch.where(before, number, group)
            )
        if self._attention is not None:
            self._attention.begin(prompt, structure)
        return structure

    @contextlib.contextmanager
    def attention(self, model: Any) -> Iterator[SegmentAttention]:
        """Return the attention of a call."""
        yield SelectiveAttention(self.top_pieces)

    def _learn(self, inner: Any) -> None:
        assert self.report is not None
        assert isinstance(self._attention, SelectiveAttention)
        entropies = self._attention.entropies
        self.report.details |= {
            "entropy": sum(entropies.values()) / max(len(entropies), 1),
            "entropy_per_layer": [entropies[layer] for layer in sorted(entropies)],
            "pieces": [[len(s.spans) for s in sets] for sets in self._attention.sets],
        }


class SelectiveAttention(SegmentAttention):
    """Attention to the top-scoring segments, and its entropy.

    Args:
        top: how many segments of a set a query sees; None for all.

    Attributes:
        entropies: by layer, the mean entropy in nats of what the tokens after the sets attend to (of the last
            token where nothing follows), when the prompts were read.
    """

    def __init__(self, top: int | None) -> None:
        super().__init__()
        self.top = top
        self.entropies: dict[int, float] = {}

    def begin(self, prompt: Prompt, structure: AttentionStructure) -> None:
        """Learn what the prompts are: the piece of every column, the rank and the set of every piece."""
        super().begin(prompt, structure)
        count = max((sum(len(s.spans) for s in sets) for sets in self.sets), default=0)
        device, rows = prompt.ids.device, len(prompt.ids)
        self.piece = torch.full(prompt.ids.shape, count, dtype=torch.long, device=device)  # `count`: of no set
        self.ranks = torch.zeros(rows, count, dtype=torch.long, device=device)
        self.set = torch.full((rows, count), -1, dtype=torch.long, device=device)
        self.asking = torch.zeros_like(self.real)
        for row, sets in enumerate(self.sets):
            number = 0
            for which, members in enumerate(sets):
                for (start, stop), rank in zip(members.spans, members.ranks, strict=True):
                    self.piece[row, start:stop], self.ranks[row, number], self.set[row, number] = number, rank, which
                    number += 1
            self.asking[row, min(max((s.last for s in sets), default=0), self.real.shape[1] - 1) if sets else -1 :] = 1
        most = max((len(s.spans) for sets in self.sets for s in sets), default=0)
        #: Whether there is something to select.
        self.selects = self.top is not None and self.top < most

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any
    ) -> Attended:
        """Attend; see `hf_ext.attention.intercept`."""
        if not self.sets:
            return plain(module, query, key, value, mask, **call)
        each = self.rows_each(query, key) if self.selects or self.whole else 1
        weights: Tensor | None = None
        if self.selects:
            seen = visible(mask, query, key, causal=True).expand(len(query), -1, -1, -1)
            found = scores(query, key, call)
            seen = seen & self._chosen(probabilities(found, seen, call), each, closeness(query.dtype))
            weights = probabilities(found, seen, call)
            output: Attended = attended(weights, value), None
        else:
            output = plain(module, query, key, value, mask, **call)
        if self.whole:
            first = int(self.asking.int().argmax(-1).min())
            if weights is None:
                seen = visible(mask, query, key, causal=True)[:, :, first:]
                weights = probabilities(scores(query[:, :, first:], key, call), seen, call)
            else:
                weights = weights[:, :, first:]
            asking = self.asking[:, first:].repeat_interleave(each, dim=0)
            per_query = torch.special.entr(weights).sum(-1).mean(1)[:, : asking.shape[1]]
            self.entropies[module.layer_idx] = float(per_query[asking].mean())
        return output

    def _chosen(self, weights: Tensor, each: int, tolerance: float) -> Tensor:
        """Return `(rows, heads, queries, keys)` bool: the columns of pieces that a query keeps, and all others."""
        assert self.top is not None
        count, columns = self.ranks.shape[1], self.piece.shape[1]
        piece = self.piece.repeat_interleave(each, dim=0)[:, None, None]
        ranks, owner = (value.repeat_interleave(each, dim=0)[:, None, None] for value in (self.ranks, self.set))
        member = torch.nn.functional.one_hot(piece[:, :, 0], count + 1)[..., :count]
        mass = weights[..., :columns] @ member.to(weights.dtype)
        kept = torch.zeros_like(mass, dtype=torch.bool)
        for which in range(int(self.set.max()) + 1):
            # What is of another set comes last.
            order = greatest_first(torch.where(owner == which, mass.clamp_min(1e-30), 0.0), ranks, tolerance)
            best = torch.zeros_like(kept).scatter(-1, order[..., : self.top], True)
            kept |= best & (owner == which)
        kept = torch.nn.functional.pad(kept, (0, 1), value=True)  # what is of no set
        kept = kept.gather(-1, piece.expand(*kept.shape[:-1], -1))
        more = kept.new_ones(*kept.shape[:-1], weights.shape[-1] - columns)
        return torch.cat([kept, more], dim=-1)
