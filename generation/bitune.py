"""Bitune: the prompt is read causally and in both directions, by two adapters, and generation goes on from the mix
(arXiv:2405.14862)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.attention import NEVER, AttentionStructure
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting, check_call
from hf_ext.generation.structured.twice import CAUSAL, mix_of, read_twice, reading_with


@dataclass
class Bitune(StructuredPrompting):
    """Read the prompt causally with one adapter and bidirectionally with another, and go on from the mixed cache.

    Works on models that were trained as `hf_ext.generation.BituneModel`, whose own `generate` uses it by
    default. All of the prompt but its last token is read twice; the last token and what is generated are
    read causally, with the causal adapter. A share of 0 for the bidirectional pass is the causal PEFT model.

    Args:
        decode_with: how to go on after the prompt: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: a model without the two adapters and the coefficients, or with adapters that are merged; an
            encoder-decoder or a recurrent model; a prompt with segments; a call with a filled cache.

    Source:
        Kopiczko et al., Bitune: Leveraging Bidirectional Attention to Improve Decoder-Only LLMs (EMNLP 2025). The
        mix is that of their experiments, `(s * causal + |c| * bidirectional) / (s + |c|)` with `s = 0.01`.

    Example:
        >>> from peft import LoraConfig
        >>> from hf_ext.generation.bitune_model import BituneModel
        >>> from hf_ext.testing import tiny_models
        >>> model = BituneModel(tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        >>> ids, mask = tiny_models.prompts()
        >>> out = model.eval().generate(input_ids=ids, attention_mask=mask, custom_generate=Bitune(), max_new_tokens=4)
        >>> out.shape
        torch.Size([3, 16])
    """

    def decode(self, run: DecodingRun) -> None:
        """Decode with the causal adapter."""
        check_call(run, type(self).__name__)
        self._mix = mix_of(run.model, type(self).__name__)
        try:
            with reading_with(run.model, CAUSAL):
                super().decode(run)
        finally:
            del self._mix

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return causal attention, what the steps after the prompt go on with."""
        if bool(prompt.segments.any()):
            raise ValueError(f"{type(self).__name__} reads the prompt as a whole; leave segment_ids out")
        return AttentionStructure.causal(prompt.mask)

    def read(
        self, run: DecodingRun, structure: AttentionStructure, ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> ModelOutput:
        """Read all but the last token of the prompt twice, mix, and read the rest."""
        own = ("attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict")
        given = {name: value for name, value in kwargs.items() if name not in own and value is not None}
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                raise ValueError(f"{type(self).__name__} reads the prompt in parts and takes no {name}; leave it out")
        mask = (structure.keys.order != NEVER).expand(len(ids), -1)
        split = run.input_ids.shape[1] - 1
        causal, outputs = read_twice(run.model, self._mix, ids, mask, split, **given)
        if causal is not None:  # the run counts one pass over all columns
            run.report.target_calls += 2
            run.report.target_positions += len(ids) * split
        for number, layer in enumerate(outputs.past_key_values.layers):
            held = adapter.layer_tensors(layer)
            if held is not None:
                run.cache.update(held[0], held[1], number)  # which keeps what its own layers are for
        outputs.past_key_values = run.cache
        return outputs if causal is None else _whole(causal, outputs)


def _whole(causal: ModelOutput, outputs: ModelOutput) -> ModelOutput:
    """Put the states and attentions of the causal pass before those of the last one."""
    if outputs.get("hidden_states") is not None:
        pairs = zip(causal.hidden_states, outputs.hidden_states, strict=True)
        outputs.hidden_states = tuple(torch.cat(pair, dim=1) for pair in pairs)
    if outputs.get("attentions") is not None:
        made = []
        for first, last in zip(causal.attentions, outputs.attentions, strict=True):
            made.append(torch.cat([functional.pad(first, (0, last.shape[-1] - first.shape[-1])), last], dim=2))
        outputs.attentions = tuple(made)
    return outputs
