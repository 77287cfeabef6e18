"""Extended mind: attention also reaches for the best keys of an external memory (arXiv:2406.02332).

texts --model, once--> keys without positions, values  (every layer; saved as safetensors)
                                 |
query of a head --cosine--> top k of them, similar enough --+--> one softmax over memories and context
                                                            |
                                        report: which spans were attended to, and how much
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_ext import adapter
from hf_ext.attention.by_hand import attended, probabilities, scores
from hf_ext.attention.intercept import Attended, intercept, visible
from hf_ext.attention.memory import Memories
from hf_ext.attention.rotary import Rotary
from hf_ext.generation.plain import PlainDecoding
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.strategy import DecodingStrategy

#: Where memories stand: all at the beginning of the text, at no distance from any query, or before the text as
#: they stand in their own.
Positions = Literal["start", "here", "before"]
#: Scores of memories that are computed at once, at most.
AT_ONCE = 1 << 24


@dataclass
class ExtendedMind(DecodingStrategy):
    """Decode with memories: keys and values of other texts, of which every query takes the best few.

    In every chosen layer, each query of each head attends to the `top_memories` memories whose keys are most
    similar to it, together with what it sees anyway. The model is not trained for it and nothing of
    its cache changes. Without memories it is the model itself.

    Args:
        memories: made by `Memories.of(model, texts)` or `Memories.load(path)`.
        top_memories: memories a query of a head attends to, in each layer.
        min_similarity: cosine from which on a memory counts; -1 for all.
        layers: numbers of the layers that have a memory; all by default.
        positions: `"start"` puts all memories at position 0, as published; `"here"` at no distance from any
            query; `"before"` where they stand in their texts, the prompt following right after.
        citations: spans to report for each row.
        decode_with: how to choose tokens: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: the model's positions are no rotations, or memories are those of another model.

    Source:
        Klett and Ahle, Extended Mind Transformers (2024).

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
        >>> memories = Memories.of(model, tokenizer(["red is 1. blue is 2.", "green is 3."]).input_ids)
        >>> strategy = ExtendedMind(memories, top_memories=3)
        >>> inputs = tokenizer("blue is", return_tensors="pt")
        >>> out = strategy.generate(model, input_ids=inputs.input_ids, max_new_tokens=5, do_sample=False)
        >>> len(strategy.report.details["citations"][0])
        3
    """

    memories: Memories | None = None
    top_memories: int = 10
    min_similarity: float = 0.25
    layers: Sequence[int] | None = None
    positions: Positions = "start"
    citations: int = 3
    decode_with: DecodingStrategy | None = None

    encoder_decoder = False

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        for name in ("top_memories", "citations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
        if not -1 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity must be a cosine, from -1 to 1, got {self.min_similarity!r}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {self.positions!r}")
        if self.memories is not None and not isinstance(self.memories, Memories):
            raise ValueError(f"memories must be made by Memories.of or Memories.load, got {type(self.memories)}")

    def decode(self, run: DecodingRun) -> None:
        """Decode as `decode_with` does, with memories in every chosen layer."""
        inner = self.decode_with or PlainDecoding()
        if run.config.do_sample and not inner.samples:
            raise ValueError(f"{type(inner).__name__} is deterministic; call generate with do_sample=False")
        with self.attached(run.model) as attention:
            attention.run = run
            inner.decode(run)
        found = attention.cited(len(run.input_ids), self.citations)
        run.report.details |= {"memories": len(self.memories or ()), "citations": found}

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[RememberingAttention]:
        """Give a model its memories for the forward passes inside the block.

        Args:
            model: the model they were made with.

        Yields:
            The attention that runs in its layers; `cited` says what was retrieved.
        """
        attention = RememberingAttention(self, model)
        with contextlib.ExitStack() as stack:
            if attention.rotary is not None:
                attention.places = stack.enter_context(attention.rotary.positions())
                stack.enter_context(intercept(model.get_decoder(), attention))  # encoders remember nothing
            yield attention


class RememberingAttention:
    """The attention of a call.

    Args:
        options: of the method.
        model: the model.
    """

    def __init__(self, options: ExtendedMind, model: Any) -> None:
        self.options, self.memories = options, options.memories
        self.rotary: Rotary | None = None
        self.places: Any = None
        self.run: DecodingRun | None = None
        self.mass: dict[int, Tensor] = {}  # of every row, what the generating queries gave each memory
        if self.memories is None or not len(self.memories) or not options.top_memories:
            self.keys: dict[int, Tensor] = {}
            return
        self.memories.check(model)
        count = self.memories.keys.shape[0]
        chosen = range(count) if options.layers is None else options.layers
        wrong = [layer for layer in chosen if not 0 <= layer < count]
        if wrong:
            raise ValueError(f"layers must be from 0 to {count - 1}, got {wrong[0]}")
        self.rotary = Rotary.of(model)
        device = adapter.device_of(model)
        offset = (self.memories.places - self.memories.lengths).to(device)
        self.keys = {}
        for layer in sorted(set(chosen)):
            keys = self.memories.keys[layer].to(device, model.dtype)
            self.keys[layer] = self.rotary.rotate(layer, keys, offset) if options.positions == "before" else keys
        self.values = {layer: self.memories.values[layer].to(device, model.dtype) for layer in self.keys}

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any
    ) -> Attended:
        """Attend; see `hf_ext.attention.intercept`."""
        layer = getattr(module, "layer_idx", None)
        if layer not in self.keys:
            return plain(module, query, key, value, mask, **call)
        assert self.rotary is not None
        asking = query
        if self.options.positions == "here":
            places = self.places().to(query.device)
            asking = self.rotary.rotate(layer, query, -places.expand(len(query), -1)[:, None])
        seen = visible(mask, query, key).expand(len(query), -1, -1, -1)
        local = scores(query, key, call)
        # Layers of one model may lie on several devices; what is there already is not copied.
        keys = self.keys[layer] = self.keys[layer].to(query.device)
        values = self.values[layer] = self.values[layer].to(query.device)
        step = max(1, AT_ONCE // max(1, len(query) * query.shape[1] * keys.shape[1]))
        outputs = []
        for start in range(0, query.shape[2], step):
            part = slice(start, start + step)
            outputs.append(self._part(asking[:, :, part], local[:, :, part], seen[:, :, part], keys, value, values,
                                      call, last=query.shape[2] - start))  # fmt: skip
        return torch.cat(outputs, dim=1), None

    def _part(
        self, asking: Tensor, local: Tensor, seen: Tensor, keys: Tensor, value: Tensor, values: Tensor,
        call: dict[str, Any], last: int,
    ) -> Tensor:  # fmt: skip
        count = min(self.options.top_memories, keys.shape[1])
        remembered = scores(asking, keys, call)
        lengths = keys.float().norm(dim=-1).repeat_interleave(asking.shape[1] // len(keys), dim=0)[:, None]
        raw = scores(asking.float(), keys.float(), {"scaling": 1.0})
        similarity = raw / (asking.float().norm(dim=-1, keepdim=True) * lengths).clamp_min(1e-20)
        # The same token in two texts may be exactly as similar: the earlier one is taken, whatever rounding says.
        numbers = torch.arange(keys.shape[1], device=keys.device) / (2 * keys.shape[1])
        index = ((similarity.double() * 2**20).round() - numbers).topk(count, dim=-1).indices
        best = similarity.gather(-1, index)
        both = torch.cat([remembered.gather(-1, index), local], dim=-1)
        known = best >= self.options.min_similarity
        weights = probabilities(both, torch.cat([known, seen.expand(*known.shape[:-1], -1)], dim=-1), call)
        weights = weights.masked_fill(~(known.any(-1, keepdim=True) | seen.any(-1, keepdim=True)), 0)
        mine, own = weights[..., :count], weights[..., count:]
        given = torch.zeros_like(remembered, dtype=mine.dtype).scatter_(-1, index, mine)
        self._note(given, last)
        return attended(given, values) + attended(own, value)

    def _note(self, given: Tensor, last: int) -> None:
        """Add up what the last query of every row gives to each memory; `last` is how many are left to see."""
        if given.shape[2] < last:
            return
        total = given[:, :, -1].sum(1).double()
        rows = len(total)
        if self.run is not None and rows == len(self.run.unfinished):
            total *= self.run.unfinished.to(total.device)[:, None]  # padding cites nothing
        self.mass[rows] = self.mass[rows] + total if rows in self.mass else total

    def cited(self, rows: int, most: int) -> list[list[dict[str, Any]]]:
        """Return for every row the spans of memory that were attended to most.

        Neighbouring tokens make a span where each has at least half of what the best of them has.
        """
        if self.memories is None or not self.keys or not self.mass:
            return [[] for _ in range(rows)]
        # Strategies that leave rows out of a pass, or repeat them, are cited together.
        if set(self.mass) == {rows}:
            mass = self.mass[rows]
        else:
            mass = sum(found.sum(0) for found in self.mass.values()).expand(rows, -1)  # type: ignore[union-attr]
        return [self.memories.spans(row, most) for row in mass]
