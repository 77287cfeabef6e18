"""Just read twice: the prompt is repeated before the model answers, for models that forget (arXiv:2407.05483)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.strategy import positive
from hf_ext.generation.structured.plainly import read_plainly
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting, continuation, prompt_of


@dataclass
class JustReadTwice(StructuredPrompting):
    """Read the prompt, or the marked part of it, several times in a row before generating.

    A model with a state of fixed size has to choose, while it reads, what to remember; it can only choose well once
    it knows the question. In the second reading it does, wherever the question stands. What is returned is the
    caller's prompt and the text behind it: the repetition is seen by the model only, not by streamers, stopping
    criteria and logits processors.

    Works on recurrent models (Mamba, RWKV and their kin, and hybrids), which read the repeated prompt in their own
    way, and on models with attention.

    With `segment_ids` everything from the first to the last marked token is repeated in its place: mark context and
    question to read instructions, or the frame of a chat template, once. Otherwise all but a leading bos token is.

    Args:
        times: how often it is read; 1 is plain decoding.
        decode_with: how to go on after the prompt: greedy search or sampling by default; any strategy where the model
            has a cache of single tokens.

    Raises:
        ValueError: a repeated prompt beyond the context; a model that keeps nothing of its prompt; prompts of different
            lengths on a model that reads padding into its state; a cache that was passed in, `output_hidden_states`.

    Source:
        Arora et al., Just Read Twice: Closing the Recall Gap for Recurrent Language Models (2024), JRT-Prompt.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, ids = tiny_models.shared("mamba"), torch.tensor([[5, 6, 7, 8]])
        >>> ours = JustReadTwice().generate(model, ids, max_new_tokens=3, do_sample=False)
        >>> twice = model.generate(ids.repeat(1, 2), max_new_tokens=3, do_sample=False)
        >>> ours[0, :4].tolist(), bool((ours[0, 4:] == twice[0, 8:]).all())
        ([5, 6, 7, 8], True)
    """

    times: int = 2

    _bos: int | None = field(default=None, init=False, repr=False, compare=False)  # that of the call, while it runs

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        positive("times", self.times)

    def reads(self, prompt: Prompt) -> Prompt:
        """Return the prompts with their repetitions, padded on the left."""
        if self.times == 1:
            return prompt
        rows = [self._columns(*row) for row in zip(prompt.ids, prompt.mask, prompt.segments > 0, strict=True)]
        longest = max(map(len, rows))
        ids = prompt.ids.new_zeros(len(rows), longest)
        mask = prompt.mask.new_zeros(len(rows), longest)
        for row, columns in enumerate(rows):
            ids[row, longest - len(columns) :] = prompt.ids[row, columns]
            mask[row, longest - len(columns) :] = True
        return Prompt(ids, mask, torch.zeros_like(ids))

    def _columns(self, ids: torch.Tensor, mask: torch.Tensor, marked: torch.Tensor) -> list[int]:
        """Return the columns of one row in the order in which they are read."""
        real = mask.nonzero().flatten().tolist()
        inside = (marked & mask).nonzero().flatten().tolist()
        if inside:
            first, last = real.index(inside[0]), real.index(inside[-1]) + 1
        else:
            first, last = int(len(real) > 1 and int(ids[real[0]]) == self._bos), len(real)
        return real[:first] + real[first:last] * self.times + real[last:]

    def decode(self, run: DecodingRun) -> None:
        """Read the prompt as often as asked and go on; a model that takes no masks reads it in its own way."""
        name = type(self).__name__
        if run.cache_was_given:
            raise ValueError(f"{name} fills a cache with more than the text that it returns; leave past_key_values out")
        bos = adapter.special_token(run.config, "bos")
        self._bos = None if bos is None else int(bos)
        try:
            if tree_problem(run.model) is None:
                super().decode(run)
            else:
                inner, given = continuation(self, run), prompt_of(run, name)
                read_plainly(run, given, self.reads(given), name)
                inner.decode(run)
        finally:
            self._bos = None
        run.model_kwargs["past_key_values"] = None  # it does not hold the text that is returned
