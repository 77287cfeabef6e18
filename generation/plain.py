"""Greedy search and sampling, token by token: what other ways to read a prompt go on with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.strategy import DecodingStrategy


@dataclass
class PlainDecoding(DecodingStrategy):
    """Take the likeliest token, or draw one from the processed scores, as `generate` does with one beam.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> ours = PlainDecoding().generate(model, ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)).all())
        True
    """

    def decode(self, run: DecodingRun) -> None:
        """Decode one token a step."""
        outputs = run.prefill()
        while True:
            logits = outputs.logits[:, -1]
            scores = run.process(logits)
            if run.config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            run.commit(tokens, scores=scores, logits=logits, outputs=outputs)
            if not run.running:
                break
            outputs = run.forward(run.input_ids)
