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
from transformers import DynamicCache
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.generation.plain import PlainDecoding
from hf_ext.generation.run import DecodingRun
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

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return who sees whom in the prompt; plain causal attention by default."""
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
        *args: Any,
        segment_ids: torch.Tensor | None = None,
        group_ids: torch.Tensor | None = None,
        **prepared: Any,
    ) -> Any:
        """Decode what `generate` has prepared; see `DecodingStrategy.__call__`.

        Args:
            model: the model whose `generate` was called.
            input_ids: `(batch, length)` int64.
            *args: as `generate` passes them.
            segment_ids: `(batch, length)` int, see `Prompt`; none by default.
            group_ids: likewise.
            **prepared: likewise.
        """
        given = {"segment_ids": segment_ids, "group_ids": group_ids}
        return super().__call__(
            model, input_ids, *args, **prepared, **{n: v for n, v in given.items() if v is not None}
        )

    def decode(self, run: DecodingRun) -> None:
        """Read the prompt by its structure and go on with `decode_with`."""
        name, inner = type(self).__name__, self.decode_with or PlainDecoding()
        if run.cache is None or int(run.cache.get_seq_length()) or run.model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"{name} reads whole prompts given as input_ids into an empty cache; leave past_key_values and "
                "inputs_embeds out"
            )
        if run.config.prefill_chunk_size is not None:
            raise ValueError(f"{name} reads the prompt in one piece; leave prefill_chunk_size out")
        if run.config.output_attentions or run.config.output_hidden_states:
            raise ValueError(f"{name} returns no output_attentions and output_hidden_states; call the model for them")
        if run.config.do_sample and not inner.samples:
            raise ValueError(f"{type(inner).__name__} is deterministic; call generate with do_sample=False")
        prompt = _prompt(run, name)
        structure = self.structure(prompt)
        columns = run.input_ids.shape[1] + _new_tokens(run)
        windows = [window for window in map(adapter.layer_window, run.cache.layers) if window is not None]
        if any(window < columns for window in windows):
            # A sliding layer drops columns by their number, where a structure counts positions.
            if not isinstance(inner, PlainDecoding):
                raise ValueError(
                    f"{type(run.model).__name__} has sliding windows of {min(windows)} tokens, less than prompt and "
                    f"text take; with decode_with={type(inner).__name__} {name} needs a text that stays within the window"
                )
            run.model_kwargs["past_key_values"] = DynamicCache()
            run.step_masks = lambda length: masks_for(
                run.model, structure.extended(length - len(structure.keys)).part(length - 1, length)
            )
        run.reader = lambda ids, kwargs: self._read(run, structure, ids, kwargs)
        inner.decode(run)
        self._learn(inner)

    def _read(
        self, run: DecodingRun, structure: AttentionStructure, ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> ModelOutput:
        structure = structure.extended(ids.shape[1] - len(structure.keys))
        positions = structure.queries.position.long().expand(len(ids), -1)
        given = {**kwargs, "attention_mask": masks_for(run.model, structure), "position_ids": positions}
        outputs = self.read(run, structure, ids, given)
        # Decoding goes on after the last column; the position there is the one that the next is counted from.
        following = positions.clone()
        following[:, -1] = torch.where(structure.keys.order < 2**31 - 1, positions, 0).amax(-1)
        kwargs["position_ids"] = following
        return outputs

    def _learn(self, inner: DecodingStrategy) -> None:
        """Hook for methods that report more after the call."""


def _prompt(run: DecodingRun, name: str) -> Prompt:
    ids, mask = run.input_ids, run.attention_mask.bool()
    found: list[torch.Tensor | None] = []
    for field in ("segment_ids", "group_ids"):
        value = run.model_kwargs.pop(field, None)
        if value is not None:
            value = torch.as_tensor(value, device=ids.device).long()
            if value.ndim == 2 and len(value) and len(ids) % len(value) == 0:
                value = value.repeat_interleave(len(ids) // len(value), dim=0)  # num_return_sequences
            if value.shape != ids.shape:
                raise ValueError(
                    f"{name}: {field} have the shape {tuple(value.shape)}, expected {tuple(ids.shape)} as input_ids"
                )
        found.append(value)
    segments, groups = found
    return Prompt(ids, mask, torch.zeros_like(ids) if segments is None else segments, groups)


def _new_tokens(run: DecodingRun) -> int:
    return max(int(run.config.max_length or 0) - run.input_ids.shape[1], 0)
