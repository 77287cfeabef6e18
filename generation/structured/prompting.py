"""The engine of structured prompts: read the prompt with another structure, then decode as usual.

    ids, segment_ids --structure--> AttentionStructure --masks, positions--> one forward pass
                                                                                |
    decode_with (greedy, sampling, contrastive, speculative, ...)  <---- cache, next position

A method says which structure its prompt has (`structure`), or reads it in a way of its own (`read`).
Everything after the prompt is plain: new tokens see all of it, and go on from the position after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.attention import NEVER, AttentionStructure, masks_for
from hf_ext.generation.plain import PlainDecoding
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.strategy import DecodingStrategy


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompts of a call.

    Args:
        ids: `(batch, length)` int64, left-padded.
        mask: `(batch, length)` bool, False on padding.
        segments: `(batch, length)` int64, a number from 1 on for the tokens of each segment, 0 for what all see.
        groups: `(batch, length)` int64, a number from 1 on for each set of segments; None to find them.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    segments: torch.Tensor
    groups: torch.Tensor | None = None


@dataclasses.dataclass
class StructuredPrompting(DecodingStrategy):
    """Base of the methods that read a prompt with another structure than plain causal attention.

    `generate` takes `segment_ids` and `group_ids` beside `input_ids`, as `SetPrompt` makes them.

    Args:
        decode_with: how to go on after the prompt: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: a prompt that is not given as ids from the beginning on, or segments of another shape.
    """

    encoder_decoder = False

    decode_with: DecodingStrategy | None = dataclasses.field(default=None, kw_only=True)

    def reads(self, prompt: Prompt) -> Prompt:
        """Return what the model reads in place of the prompt: its tokens in another order, or more before them."""
        return prompt

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return who sees whom in what is read; plain causal attention by default."""
        return AttentionStructure.causal(prompt.mask)

    def read(
        self, run: DecodingRun, structure: AttentionStructure, ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> ModelOutput:
        """Run the prompt through the model.

        Args:
            run: the call.
            structure: of the prompt and of what is evaluated behind it.
            ids: `(batch, length)` int64 likewise.
            kwargs: forward arguments: `position_ids` and `attention_mask` are those of the structure.

        Returns:
            The model's output, the cache filled.
        """
        return run.model(ids, **kwargs, return_dict=True)

    def __call__(  # type: ignore[override]
        self,
        model: Any,
        input_ids: torch.Tensor,
        segment_ids: torch.Tensor | None = None,
        group_ids: torch.Tensor | None = None,
        **prepared: Any,
    ) -> Any:
        """Decode what `generate` has prepared; see `DecodingStrategy.__call__`.

        Args:
            model: the model whose `generate` was called.
            input_ids: `(batch, length)` int64.
            segment_ids: `(batch, length)` int, see `Prompt`; none by default.
            group_ids: likewise.
            **prepared: all else, by name.
        """
        given = {"segment_ids": segment_ids, "group_ids": group_ids}
        prepared |= {name: value for name, value in given.items() if value is not None}
        return super().__call__(model, input_ids, **prepared)

    def check_length(self, model: Any, longest: int) -> None:
        """Leave it to `decode`, which knows the positions: siblings share them."""

    def decode(self, run: DecodingRun) -> None:
        """Read the prompt by its structure and go on with `decode_with`."""
        name, inner = type(self).__name__, continuation(self, run)
        check_call(run, name)
        given = prompt_of(run, name)
        prompt = self.reads(given)
        if prompt is not given:
            read_instead(run, given, prompt, name)
        structure = self.structure(prompt)
        before, new = prompt.ids.shape[1] - given.ids.shape[1], new_tokens(run)
        check_positions(run, structure, new)
        plain = AttentionStructure.causal(prompt.mask).keys.position
        if bool(((structure.keys.position != plain) & prompt.mask).any()):
            self._count_positions_in_windows(run, structure, before, prompt.ids.shape[1] + new, inner)
        run.reader = lambda ids, kwargs: self._read(
            run, structure, torch.cat([prompt.ids, ids[:, given.ids.shape[1] :]], dim=1), kwargs
        )
        inner.decode(run)
        self._learn(inner)

    def _count_positions_in_windows(
        self, run: DecodingRun, structure: AttentionStructure, before: int, columns: int, inner: DecodingStrategy
    ) -> None:
        """Let sliding windows go by position: a layer of a cache would drop columns by their number."""
        windows = [adapter.layer_window(layer) for layer in adapter.empty_cache(run.model).layers]
        shortest = min((window for window in windows if window is not None), default=columns)
        if shortest >= columns:
            return
        if not isinstance(inner, PlainDecoding):
            raise ValueError(
                f"{type(run.model).__name__} has sliding windows of {shortest} tokens, less than prompt and text take; "
                f"with decode_with={type(inner).__name__} {type(self).__name__} needs a text that stays within them"
            )
        adapter.use_full_layers(run.cache)
        run.step_masks = lambda length: masks_for(
            run.model,
            structure.extended(length + before - len(structure.keys)).part(length + before - 1, length + before),
        )

    def _read(
        self, run: DecodingRun, structure: AttentionStructure, ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> ModelOutput:
        # Guesses of the next tokens may be read with the prompt.
        structure = structure.extended(ids.shape[1] - len(structure.keys))
        positions = structure.queries.position.long().expand(len(ids), -1)
        given = {**kwargs, "attention_mask": masks_for(run.model, structure), "position_ids": positions}
        outputs = self.read(run, structure, ids, given)
        # Decoding goes on after the last column; the position there is the one that the next is counted from.
        following = positions.clone()
        following[:, -1] = torch.where(structure.keys.order != NEVER, positions, 0).amax(-1)
        kwargs["position_ids"] = following
        return outputs

    def _learn(self, inner: DecodingStrategy) -> None:
        """Hook for methods that report more after the call."""


def continuation(strategy: StructuredPrompting, run: DecodingRun) -> DecodingStrategy:
    """Return what goes on after the prompt.

    Args:
        strategy: the method.
        run: the call.

    Raises:
        ValueError: `decode_with` is no strategy, or a deterministic one is to sample.
    """
    inner = strategy.decode_with or PlainDecoding()
    if not isinstance(inner, DecodingStrategy):
        raise ValueError(
            f"{type(strategy).__name__}: decode_with must be a strategy, such as ContrastiveSearch(), got {inner!r}"
        )
    if run.config.do_sample and not inner.samples:
        raise ValueError(f"{type(inner).__name__} is deterministic; call generate with do_sample=False")
    return inner


def read_instead(run: DecodingRun, given: Prompt, prompt: Prompt, name: str) -> None:
    """Make the masks of a call those of other tokens than its prompt.

    Args:
        run: the call.
        given: its prompts.
        prompt: what is read in their place, as many columns or more.
        name: of the method, for messages.

    Raises:
        ValueError: states or attentions of the prompt are asked for, or something else has a number for each token.
    """
    refuse_moved_columns(run, name)
    run.model_kwargs["attention_mask"] = prompt.mask.long()
    run.columns_before = prompt.ids.shape[1] - given.ids.shape[1]


def refuse_moved_columns(run: DecodingRun, name: str) -> None:
    """Refuse what goes by the tokens of a prompt that a method moves or repeats.

    Args:
        run: the call.
        name: of the method, for the message.

    Raises:
        ValueError: states or attentions of the prompt are asked for, or there is a forward argument that may belong
            to its tokens, by shape (`token_type_ids`) or by what is in it (spans of columns, images in their order).
    """
    if run.config.output_attentions or run.config.output_hidden_states:
        raise ValueError(
            f"{name} reads other columns than the prompt's; leave output_hidden_states and output_attentions out"
        )
    for field, value in run.model_kwargs.items():
        own = field in ("attention_mask", "position_ids")
        if isinstance(value, torch.Tensor) and value.ndim > 1 and not own:
            raise ValueError(f"{name} reads other columns than the prompt's, which have no {field}; leave them out")


def require_suffix(structure: AttentionStructure, name: str) -> None:
    """Refuse prompts that end in a set of several segments: what is generated would follow the last one only.

    Args:
        structure: of the prompts.
        name: of the method, for the message.

    Raises:
        ValueError: a prompt ends in such a set.
    """
    group, segment = structure.keys.group, structure.keys.segment
    if group is None or segment is None:
        return
    siblings = (group == group[:, -1:]) & (group > 0) & (segment != segment[:, -1:])
    if bool(siblings.any()):
        row = int(siblings.any(-1).nonzero()[0])
        raise ValueError(
            f"{name}: prompt {row} ends in a set, and what is generated would follow its last member only; put at "
            "least one token behind the set"
        )


def check_call(run: DecodingRun, name: str) -> None:
    """Refuse models and settings that leave no say in how a prompt is read.

    Args:
        run: the call.
        name: of the method, for messages.

    Raises:
        ValueError: a model without positions or masks of its own, a filled or fixed cache, embeddings, chunks,
            positions of the caller's.
    """
    problem = tree_problem(run.model)
    if problem is not None:
        raise ValueError(f"{name} gives tokens positions and masks of their own: {problem}")
    if run.cache is None or int(run.cache.get_seq_length()) or run.model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            f"{name} reads whole prompts given as input_ids into an empty cache; leave past_key_values and "
            "inputs_embeds out"
        )
    if not all(map(adapter.layer_grows, run.cache.layers)):
        raise ValueError(f"{name} needs a cache that grows; leave cache_implementation out or pass a DynamicCache")
    if run.config.prefill_chunk_size is not None:
        raise ValueError(f"{name} reads the prompt in one piece; leave prefill_chunk_size out")
    positions, mask = run.model_kwargs.get("position_ids"), run.attention_mask
    if positions is not None and positions.shape == mask.shape:  # where the caller does not, transformers counts them
        moved = (positions != mask.cumsum(-1) - 1) & mask.bool()
        if bool(moved.any()):
            raise ValueError(f"{name} gives tokens positions of its own; leave position_ids out")


def check_positions(run: DecodingRun, structure: AttentionStructure, new: int) -> None:
    """Refuse what runs out of the model's positions; tokens side by side share theirs.

    Args:
        run: the call.
        structure: of what is read.
        new: tokens that may follow it.

    Raises:
        ValueError: the prompt takes more positions than the model has, or prompt and text more than its table.
    """
    if getattr(run.model, "_extrapolates_length", False):
        return
    context = getattr(run.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return
    real = structure.keys.order != NEVER
    needed = int(torch.where(real, structure.keys.position, -1).max()) + 1
    columns, model = int(real.sum(-1).max()), type(run.model).__name__
    if needed > context:
        raise ValueError(
            f"the prompt takes {needed} positions for its {columns} tokens, but the context of {model} is {context}; "
            "shorten the prompt or use a model with a longer context"
        )
    tokens = run.model.get_input_embeddings()
    tables = (m for m in run.model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens)
    learned = any(context <= table.num_embeddings <= context + 8 for table in tables)  # some keep a few rows spare
    if learned and needed + new - 1 > context:
        raise ValueError(
            f"{model} has a table of {context} positions; the prompt takes {needed}, so at most {context - needed + 1} "
            f"new tokens fit, and {new} were asked for; set max_new_tokens"
        )


def prompt_of(run: DecodingRun, name: str) -> Prompt:
    """Take the prompts of a call, with their segments, out of its forward arguments.

    Args:
        run: the call, whose arguments lose `segment_ids` and `group_ids`.
        name: of the method, for messages.

    Raises:
        ValueError: segments or groups of another shape than the ids, or that are no numbers from 0 on; groups of what
            is in no segment, or segments in no group.
    """
    ids, mask = run.input_ids, run.attention_mask.bool()
    found: list[torch.Tensor | None] = []
    for field in ("segment_ids", "group_ids"):
        value = run.model_kwargs.pop(field, None)
        if value is not None:
            value = torch.as_tensor(value, device=ids.device)
            if bool(((value < 0) | (value != value.long())).any()):
                raise ValueError(f"{name}: {field} must be whole numbers from 0 on, got {value.tolist()}")
            value = value.long()
            if value.ndim == 2 and len(value) and len(ids) % len(value) == 0:
                value = value.repeat_interleave(len(ids) // len(value), dim=0)  # num_return_sequences
            if value.shape != ids.shape:
                raise ValueError(
                    f"{name}: {field} have the shape {tuple(value.shape)}, expected {tuple(ids.shape)} as input_ids"
                )
        found.append(value)
    segments, groups = found
    segments = torch.zeros_like(ids) if segments is None else segments
    if groups is not None and bool((((groups > 0) != (segments > 0)) & mask).any()):
        raise ValueError(f"{name}: group_ids and segment_ids must be above 0 at the same tokens")
    return Prompt(ids, mask, segments, groups)


def new_tokens(run: DecodingRun) -> int:
    """Return how many tokens a call may generate."""
    return max(int(run.config.max_length or 0) - run.input_ids.shape[1], 0)
