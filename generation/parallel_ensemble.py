"""The parallel ensemble: every window answers by itself, and their distributions are mixed (arXiv:2305.15262)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_ext import adapter
from hf_ext.attention import AttentionStructure
from hf_ext.generation.parallel_context_windows import windows_of
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.strategy import positive
from hf_ext.generation.structured.prompting import (
    Prompt,
    StructuredPrompting,
    check_call,
    check_positions,
    new_tokens,
    prompt_of,
    refuse_moved_columns,
)


@dataclass
class ParallelEnsemble(StructuredPrompting):
    """Read every window with what stands around the windows, and mix the laws of the next token.

    Each window is a prompt of its own: what comes before the windows, one window, what comes after them.
    The next token is chosen from the weighted sum of their next-token distributions, and all go on with
    it. One window is the plain model; equal weights make the order of the windows irrelevant.

    Args:
        window: as `ParallelContextWindows`; None takes the prompt's segments.
        query: likewise.
        shared: likewise.
        weights: of the windows, in their order in the prompt; equal by default. They are divided by their sum.

    Raises:
        ValueError: weights that do not fit the windows, `decode_with`, or a prompt that does not fit the context.

    Source:
        Yang et al., Revisiting Parallel Context Windows (arXiv:2305.15262).

    Example:
        >>> import torch
        >>> from hf_ext.testing import tiny_models
        >>> model, ids = tiny_models.shared("gpt2"), torch.arange(300)[None] % 90 + 3
        >>> strategy = ParallelEnsemble(window=60, query=20, shared=1)
        >>> strategy.generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 304])
        >>> strategy.report.details["windows"]
        [5]
    """

    window: int | None = None
    query: int = 1
    shared: int = 0
    weights: Sequence[float] | None = None

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        if self.decode_with is not None:
            raise ValueError("ParallelEnsemble mixes laws at every step itself; leave decode_with out")
        if self.window is not None:
            positive("window", self.window)
        positive("query", self.query)
        if self.weights is not None and (min(self.weights, default=-1) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"weights must be numbers from 0, not all 0, got {self.weights!r}")

    def decode(self, run: DecodingRun) -> None:
        """Decode token by token from the mixture."""
        name = type(self).__name__
        check_call(run, name)
        if run.config.output_attentions or run.config.output_hidden_states:
            raise ValueError(f"{name} has several states for a token; leave output_hidden_states and _attentions out")
        if run.cache_was_given:
            raise ValueError(f"{name} keeps a cache for every window; leave past_key_values out")
        prompt = prompt_of(run, name)
        refuse_moved_columns(run, name)
        lanes, owners, weights = self._lanes(prompt, name)
        ids, mask = _padded(lanes, int(run.pad_token_id or 0), prompt.ids.device)
        run.report.details["windows"] = [owners.count(row) for row in range(len(prompt.ids))]
        logits, kwargs = self._read_windows(run, ids, mask)
        owner = torch.tensor(owners, device=ids.device)
        mix = torch.zeros(len(prompt.ids), len(owners), dtype=torch.float32, device=ids.device)
        mix[owner, torch.arange(len(owners), device=ids.device)] = torch.tensor(weights, device=ids.device)
        while True:
            raw = (mix @ logits.float().softmax(-1)).log()
            scores = run.process(raw)
            if run.config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            run.commit(tokens, scores=scores, logits=raw)
            if not run.running:
                break
            ids = torch.cat([ids, run.input_ids[owner, -1:]], dim=1)
            logits = run.forward(ids, kwargs).logits[:, -1]
        run.model_kwargs["past_key_values"] = None  # no cache of one text is left to return

    def _lanes(self, prompt: Prompt, name: str) -> tuple[list[list[int]], list[int], list[float]]:
        """Return the windows' prompts, the row of each and its weight."""
        segments, groups = windows_of(prompt, self.window, self.query, self.shared, name)
        AttentionStructure.causal(prompt.mask).segments(segments, groups)  # refuses windows in several pieces
        lanes: list[list[int]] = []
        owners: list[int] = []
        weights: list[float] = []
        for row, (ids, real, own) in enumerate(
            zip(prompt.ids.tolist(), prompt.mask.tolist(), segments.tolist(), strict=True)
        ):
            windows = list(dict.fromkeys(number for number, here in zip(own, real, strict=True) if here and number))
            if windows and own[-1]:
                raise ValueError(f"{name}: prompt {row} ends in a window; put at least one token behind the windows")
            shares = [1.0] * max(len(windows), 1) if self.weights is None else list(self.weights)
            if len(shares) != max(len(windows), 1):
                raise ValueError(f"{name} has {len(shares)} weights, but prompt {row} has {len(windows)} windows")
            for number, share in zip(windows or [0], shares, strict=True):
                columns = zip(ids, own, real, strict=True)
                lanes.append([token for token, owner, here in columns if here and owner in (0, number)])
                owners.append(row)
                weights.append(share / sum(shares))
        return lanes, owners, weights

    def _read_windows(
        self, run: DecodingRun, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Read all windows in one call; return their logits and the forward arguments that follow."""
        check_positions(run, AttentionStructure.causal(mask), new_tokens(run))
        others = {n: v for n, v in run.model_kwargs.items() if not isinstance(v, torch.Tensor)}
        own = {
            "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
            "past_key_values": adapter.empty_cache(run.model),
        }  # fmt: skip
        saved = run.input_ids, run.model_kwargs
        run.input_ids, run.model_kwargs = ids, {**others, **own}
        try:
            outputs = run.prefill()
            kwargs = run.model_kwargs
        finally:
            run.input_ids, run.model_kwargs = saved
        return outputs.logits[:, -1], kwargs


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
