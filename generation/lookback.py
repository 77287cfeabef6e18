"""Hidden states and attentions of a finished batch, from one more pass over its sequences."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun


class LookBack:
    """Computes, after a call, what `output_hidden_states` and `output_attentions` ask for.

    A strategy that tries several continuations would have to keep the states of all; one pass over
    the result gives the same.

    Args:
        run: the decoding call, before its prompt has been run.

    Attributes:
        wanted: whether the caller asks for any of it.

    Raises:
        ValueError: it is wanted for a prompt of embeddings or after a filled cache, whose tokens
            are not at hand.
    """

    def __init__(self, run: DecodingRun) -> None:
        config = run.config
        states = bool(config.output_hidden_states or config.output_attentions)
        self.run, self.wanted = run, bool(config.return_dict_in_generate and states)
        self._kwargs = {name: value for name, value in run.model_kwargs.items() if name != "past_key_values"}
        filled = run.cache is not None and run.cache.get_seq_length() > 0
        if self.wanted and (filled or run.model_kwargs.get("inputs_embeds") is not None):
            raise ValueError(
                f"{run.report.strategy} finds hidden states and attentions by a pass over all tokens, which "
                "inputs_embeds and a filled past_key_values do not give; pass input_ids with an empty cache, or leave "
                "output_hidden_states and output_attentions out"
            )

    def states(self, sequences: torch.Tensor) -> list[ModelOutput]:
        """Return hidden states and attentions for every new token: the prompt's for the first.

        Args:
            sequences: `(batch, length)` int64, prompts included.
        """
        run, prompt = self.run, self.run.prompt_length
        new = sequences.shape[1] - prompt
        kwargs: dict[str, Any] = {**self._kwargs, "use_cache": False}
        if new > 1:
            kwargs = adapter.extend_kwargs(run.model, ModelOutput(), kwargs, new_tokens=new - 1)
        outputs = adapter.prefill(run.model, sequences[:, :-1], run.config, kwargs)
        run.report.target_calls += 1
        run.report.target_positions += sequences[:, :-1].numel()
        states, attentions = outputs.get("hidden_states") or (), outputs.get("attentions") or ()
        columns = [(0, prompt), *((prompt + i, prompt + i + 1) for i in range(new - 1))]
        return [
            ModelOutput(
                hidden_states=tuple(layer[:, a:b] for layer in states),
                attentions=tuple(layer[:, :, a:b, :b] for layer in attentions if layer is not None),
            )
            for a, b in columns
        ]
