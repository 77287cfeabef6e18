"""One model in speculative decoding: its cache, its positions, and the trees that hang behind each lane.

    lane 0   A B C D | r x y z        `extend` evaluates nodes behind what a lane holds; they may
    lane 1   a b | r x y z            hang under nodes of an earlier `extend`. `settle` keeps a path
             held  `---tree           of them for good and forgets the rest.

The target and every draft model are driven through the same three calls. Nothing here knows which
tokens are right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.reading import read_prompts
from hf_ext.generation.speculative.row_cache import RowCache, windows_of, write_back
from hf_ext.generation.speculative.tree_attention import TreeStructure, mask_for, structure_of


class TreeState:
    """A model, what its cache holds of each lane, and the tree it has evaluated behind that.

    Args:
        model: a decoder-only model.
        cache: its row-addressed cache.
        lengths: tokens of each lane that the cache holds.
        offset: `(..., lanes, 1)` int64, position of a lane's token 0 (0 as a rule).
        others: forward arguments of every lane that are neither ids, mask, positions nor cache.

    Attributes:
        device: where the model reads its ids.
        context: positions that there are; what lies further must be drafts that cannot become text. None if there
            is no end: the model computes positions rather than looking them up in a table.
        calls: forward passes.
        positions: token positions they evaluated, over all lanes.
        tree: for every lane the parents of the nodes evaluated since the last `settle`.
        call: what evaluates the model; the model itself.
        columns: columns of the cache that the prompts took, padding included, and guesses behind them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RowCache,
        lengths: list[int],
        offset: torch.Tensor | None = None,
        others: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.cache, self.lengths = model, cache, lengths
        self.call: Callable[..., ModelOutput] = model
        self.offset, self.others = offset, others or {}
        # Models look these two up among their weights each time they are asked.
        self.device, self._dtype = adapter.device_of(model), model.dtype
        text = model.config.get_text_config(decoder=True)
        self.context = adapter.position_table(model)
        self.tree: list[tuple[int, ...]] = [()] * len(lengths)
        self.calls = self.positions = self.columns = 0
        self._kinds = _kinds(text, cache)
        self._implementation = adapter.attention_implementation(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._special = type(model).prepare_inputs_for_generation is not _generic_preparation()

    @classmethod
    def fresh(cls, model: PreTrainedModel, lanes: int, limit: int | None = None) -> TreeState:
        """Return the state of a model that has read nothing yet.

        Raises:
            ValueError: the model's cache cannot be addressed by row.
        """
        cache = adapter.empty_cache(model)
        problem = adapter.row_addressing_problem(cache)
        if problem is not None:
            raise ValueError(f"{type(model).__name__} cannot forget tokens that were rejected: {problem}")
        return cls(model, RowCache(cache, windows_of(model, cache), lanes, limit=limit), [0] * lanes)

    @classmethod
    def from_prompt(cls, run: DecodingRun, ahead: torch.Tensor | None = None) -> tuple[TreeState, ModelOutput]:
        """Run the prompts of a call through its model as `generate` does, and take over the cache.

        Args:
            run: the decoding call, before its prompt has been run.
            ahead: `(batch, n)` int64 guesses of the next tokens, evaluated with the prompt; see `takes_ahead`.
                They are held like text: `forget` those that turn out wrong.

        Returns:
            The state and the model's output, whose last `n + 1` logits are those of the token after the
            prompt and of those after each guess.

        Raises:
            ValueError: the cache cannot be addressed by row.
        """
        cache, lengths, columns, outputs = read_prompts(run, ahead)
        kwargs, batch = dict(run.model_kwargs), len(run.input_ids)
        positions = kwargs.pop("position_ids", None)  # of the next token: (batch, ...) or (axes, batch, ...)
        kwargs.pop("attention_mask", None)
        kwargs.pop("inputs_embeds", None)
        kwargs.pop("past_key_values", None)
        for name in adapter.read_with_prompt(kwargs):
            del kwargs[name]
        offset = None
        if positions is not None:
            ahead = positions[..., -1:].expand(*positions.shape[:-2], batch, 1)
            offset = ahead - torch.tensor(lengths, device=positions.device)[:, None]
            if not bool(offset.any()):
                offset = None
        state = cls(run.model, cache, lengths, offset, _of_batch(kwargs, batch))
        state.columns = columns
        switch = adapter.rotation_switch(run.model)
        if switch is not None and max(lengths) <= switch[1]:
            state.context = switch[1]  # the text ends before, and a draft beyond it would turn the text another way
        return state, outputs

    @staticmethod
    def takes_ahead(run: DecodingRun, columns: int) -> bool:
        """Tell whether `columns` guesses can be evaluated with the prompts of a call, and be forgotten again.

        Not where the prompt is not given as ids from the beginning on, where it is read in pieces or beside images
        (a guess may be the token that stands for one), or where a layer of the cache drops or cannot hold what
        comes with the guesses.
        """
        kwargs, prompt = run.model_kwargs, run.input_ids.shape[1]
        if run.cache is None or int(run.cache.get_seq_length()) or run.config.prefill_chunk_size is not None:
            return False
        if prompt == 0 or any(name.endswith("token_type_ids") or name == "inputs_embeds" for name in kwargs):
            return False
        if adapter.read_with_prompt(kwargs):
            return False
        if adapter.row_addressing_problem(run.cache) is not None or not all(map(adapter.layer_grows, run.cache.layers)):
            return False
        total = prompt + columns
        places = getattr(run.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        windows = [window for window in windows_of(run.model, run.cache) if window is not None]
        return total < min(windows, default=total + 1) and (places is None or total <= places)

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return len(self.lengths)

    def room(self) -> int | None:
        """Nodes that still fit into a cache of fixed size, or None if it can grow."""
        free = self.cache.free_columns
        return None if free is None else free - max(self.lengths) - len(self.tree[0])

    def extend(
        self, tokens: torch.Tensor, parents: list[tuple[int, ...]] | None = None, counted: bool = True, **forward: Any
    ) -> ModelOutput:
        """Evaluate more nodes of each lane's tree.

        Args:
            tokens: `(lanes, n)` int64.
            parents: for every lane the parent of each new node, as numbers of nodes since the last
                `settle` (these `n` included), -1 for what the lane holds; a chain under the last
                node by default.
            counted: whether this is a call of the whole model.
            **forward: further arguments of the forward pass.

        Returns:
            The model's output; `logits[r, i]` follows node `i` of this call.
        """
        lanes, count = tokens.shape
        earlier = len(self.tree[0])
        if parents is None:
            chain = tuple(range(earlier - 1, earlier + count - 1))
            parents = [chain] * lanes
        self.tree = [old + new for old, new in zip(self.tree, parents, strict=True)]
        device = tokens.device
        masks, structure = {}, None
        for window, columns in self.cache.groups.items():
            columns.aim(self.lengths, earlier, count, device)
            structure = self._structure(count, window)
            masks[window] = mask_for(self._implementation, structure, self._dtype, device)
        assert structure is not None  # a cache has layers
        inputs = {
            **self.others,
            "past_key_values": self.cache,
            "attention_mask": self._named(masks),
            "position_ids": self._positions(structure, count, device),
            "use_cache": True,
        }
        for name, value in self.others.items():
            if name.endswith("token_type_ids"):
                inputs[name] = value[:, -1:].expand(-1, count)
        if self._special:
            inputs = adapter.next_inputs(self.model, tokens, inputs, new_tokens=count)
        else:
            inputs["input_ids"] = tokens
        # A model's own preparation may name arguments of the forward pass as well.
        outputs = self.call(**{**inputs, **forward, "return_dict": True})
        self.calls += counted
        self.positions += counted * tokens.numel()
        return outputs

    def rewind(self) -> None:
        """Forget the tree; what is evaluated next is written over it."""
        self.tree = [()] * self.lanes

    def settle(self, paths: list[list[int]]) -> None:
        """Keep a path of each lane's tree for good and forget the rest.

        Args:
            paths: for every lane the numbers of the nodes to keep, a path from the top; empty for none.
        """
        if any(paths):
            for columns in self.cache.groups.values():
                columns.move(self.lengths, paths)
            self.lengths = [n + len(path) for n, path in zip(self.lengths, paths, strict=True)]
            for columns in self.cache.groups.values():
                columns.trim(self.lengths)
        self.tree = [()] * self.lanes

    def read(self, tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Evaluate further text of each lane and keep it.

        Args:
            tokens: `(lanes, n)` int64, padded on the right.
            counts: tokens of each lane, at least one.

        Returns:
            `(lanes, vocabulary)` logits after each lane's last token.
        """
        last = sorted({count - 1 for count in counts})
        at = [last.index(count - 1) for count in counts]
        if self._keeps_logits and len(last) < tokens.shape[1]:  # the LM head is most of a small model's work
            kept = torch.tensor(last, device=tokens.device)
            logits = self.extend(tokens, logits_to_keep=kept).logits
        else:
            logits = self.extend(tokens).logits[:, last]
        self.settle([list(range(count)) for count in counts])
        return logits[:, 0] if len(last) == 1 else logits[torch.arange(len(at)), at]

    def forget(self, lengths: list[int]) -> None:
        """Shorten what is held of each lane to so many tokens.

        Raises:
            ValueError: a sliding-window layer has dropped tokens that would be needed.
        """
        for columns in self.cache.groups.values():
            if columns.window is None:
                continue
            for dropped, length in zip(columns.dropped, lengths, strict=True):
                if dropped and length - dropped < columns.window - 1:
                    raise ValueError("a sliding-window layer has dropped tokens that would be needed again")
        self.lengths = list(lengths)
        self.tree = [()] * self.lanes

    def select(self, lanes: list[int]) -> None:
        """Go on with these lanes only, in this order."""
        index = torch.tensor(lanes)
        for columns in self.cache.groups.values():
            columns.select(lanes)
        self.lengths = [self.lengths[lane] for lane in lanes]
        self.tree = [self.tree[lane] for lane in lanes]
        if self.offset is not None:
            self.offset = self.offset[..., index.to(self.offset.device), :]
        self.others = {
            name: value[index.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in self.others.items()
        }

    def copy_lane(self, lane: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copy what is held of a lane, for `write_back`."""
        return self.cache.lane(lane, self.lengths[lane])

    def _structure(self, count: int, window: int | None) -> TreeStructure:
        columns = self.cache.groups[window]
        held = tuple(n - dropped for n, dropped in zip(self.lengths, columns.dropped, strict=True))
        return structure_of(
            tuple(self.lengths), held, self.tree, queries=count, keys=columns.stop, window=window
        )  # fmt: skip

    def _named(self, masks: dict[int | None, Any]) -> Any:
        if self._kinds is None:
            return next(iter(masks.values()))
        return {name: masks.get(window) for name, window in self._kinds.items()}

    def _positions(self, structure: TreeStructure, count: int, device: torch.device) -> torch.Tensor:
        rows = [
            [length + depth for depth in depths[-count:]]
            for length, depths in zip(self.lengths, structure.depths, strict=True)
        ]
        if self.context is not None and max(map(max, rows)) >= self.context:
            # Only nodes that cannot become text lie that far; their place must merely exist.
            rows = [[min(position, self.context - 1) for position in row] for row in rows]
        positions = torch.tensor(rows, device=device)
        return positions if self.offset is None else positions + self.offset.to(device)


def _kinds(config: Any, cache: RowCache) -> dict[str, int | None] | None:
    """Return the window of each kind of layer for a model that takes a mask for each, None for one mask."""
    if len(cache.groups) == 1:
        return None
    kinds: dict[str, int | None] = {}
    for name, layer in zip(config.layer_types, cache.layers, strict=False):
        kinds.setdefault(name, layer.columns.window)  # later ones may use the keys of an earlier one, and keep none
    return kinds


def _generic_preparation() -> Any:
    from transformers import GenerationMixin

    return GenerationMixin.prepare_inputs_for_generation


def _of_batch(kwargs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Keep the forward arguments that a step needs again."""
    kept = {}
    for name, value in kwargs.items():
        if name in ("use_cache", "logits_to_keep", "cache_position"):
            continue
        if isinstance(value, torch.Tensor) and value.ndim and len(value) != batch:
            value = value.expand(batch, *value.shape[1:]) if len(value) == 1 else value
        kept[name] = value
    return kept


__all__ = ["TreeState", "write_back"]
