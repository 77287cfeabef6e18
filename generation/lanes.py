"""The model's side of a ragged batch: lanes over a cache that is padded on the left.

    lane 0   . . A B C D          every lane ends in the same column, so that models that look at
    lane 1   a b c d e f          distances between columns (windows, ALiBi) see true distances;
    lane 2   a b c d e g          `attention_mask` is 0 at the dots, positions are explicit

A lane is the continuation of some row of the batch; a row may have several, or none when it is
done. A lane that has nothing to say while others go on is fed a token whose column is masked (`-`):

    lane 0   . . A B C D - -      `rearrange` drops these two columns and moves the lane
    lane 0   . . . . A B C D      to the right
"""

from __future__ import annotations

from typing import Any

import torch

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun


class Lanes:
    """Sequences that share a forward pass and can be copied, dropped and rewound.

    Args:
        run: the decoding call, before its prompt has been run.

    Attributes:
        rows: for every lane the row of the batch that it continues.
        mask: `(lanes, columns)` int64, 1 where the cache holds a token of the lane.

    Raises:
        ValueError: the columns of the cache cannot be moved (static, quantized, recurrent, ...).
    """

    def __init__(self, run: DecodingRun) -> None:
        self.run = run
        self.rows = list(range(len(run.input_ids)))
        self.mask = run.input_ids.new_zeros(len(self.rows), 0)
        self._next_position: torch.Tensor | None = None
        self._others: dict[str, Any] = {}
        self._prompt_columns = 0
        self._starts: list[int] = []  # of every row the first column that is not padding
        self._saved: dict[int, Any] = {}

    def prefill(self) -> torch.Tensor:
        """Run the prompts, one lane each, and return `(batch, vocabulary)` logits of their next tokens."""
        run = self.run
        if not run.cache_was_given:
            adapter.use_full_layers(run.cache)
        if run.cache is not None:
            self._check_cache(adapter.column_editing_problem(run.cache))
        outputs = run.prefill()
        problem = adapter.column_editing_problem(run.cache)
        if problem is None and run.cache.get_seq_length() == 0:
            problem = "the model filled no cache"
        self._check_cache(problem)
        kwargs = dict(run.model_kwargs)
        batch, columns = len(self.rows), run.cache.get_seq_length()
        mask = kwargs.pop("attention_mask", None)
        self.mask = self.mask.new_ones(batch, columns) if mask is None else mask[:, :columns].long()
        self._prompt_columns, self._starts = columns, self.mask.argmax(1).tolist()
        positions = kwargs.pop("position_ids", None)  # (batch, columns + 1), or (axes, batch, columns + 1)
        if positions is not None:
            self._next_position = positions[..., -1:].expand(*positions.shape[:-2], batch, 1)
        kwargs.pop("inputs_embeds", None)
        kwargs.pop("past_key_values", None)
        self._others = kwargs
        return outputs.logits[:, -1]

    def forward(self, tokens: torch.Tensor, live: torch.Tensor | None = None) -> torch.Tensor:
        """Evaluate the next tokens of every lane.

        Args:
            tokens: `(lanes, n)` int64.
            live: `(lanes,)` bool; the columns that other lanes get are masked and have to be dropped
                by `rearrange` before the lane goes on. All lanes by default.

        Returns:
            `(lanes, n, vocabulary)` logits.
        """
        run, (lanes, n) = self.run, tokens.shape
        live = torch.ones(lanes, dtype=torch.bool, device=tokens.device) if live is None else live
        self.mask = torch.cat([self.mask, live[:, None].to(self.mask.dtype).expand(lanes, n)], dim=1)
        kwargs = {name: self._of_lanes(name, value, n) for name, value in self._others.items()}
        if self._next_position is not None:
            steps = torch.arange(n, device=tokens.device)
            # A lane that waits stays where it is, lest it run out of a table of positions.
            kwargs["position_ids"] = self._next_position + torch.where(live[:, None], steps, -1)
            self._next_position = self._next_position + live[:, None] * n
        inputs = adapter.next_inputs(
            run.model, tokens, {**kwargs, "attention_mask": self.mask, "past_key_values": run.cache}, new_tokens=n
        )
        outputs = run.model(**inputs, return_dict=True)
        run.report.target_calls += 1
        run.report.target_positions += tokens.numel()
        return outputs.logits[:, -n:]

    def wait(self) -> None:
        """Call forward for nothing but the sake of other processes that still have to."""
        self.run.model(torch.zeros(1, 1, dtype=torch.long, device=adapter.device_of(self.run.model)), use_cache=False)
        self.run.report.target_calls += 1
        self.run.report.target_positions += 1

    def rearrange(self, lanes: list[int], drop: list[int] | None = None) -> None:
        """Choose the lanes that go on, in order, and forget the last columns of each.

        Args:
            lanes: the lane that each new lane is a copy of; lanes not named are gone.
            drop: columns to forget at the end of each new lane; none by default.
        """
        device, same = self.mask.device, lanes == list(range(len(self.rows)))
        index = torch.tensor(lanes, dtype=torch.long, device=device)
        shift = torch.tensor(drop or [0] * len(lanes), dtype=torch.long, device=device)
        mask = self.mask[index]
        columns = torch.arange(mask.shape[1], device=device)
        kept = mask * (columns < mask.shape[1] - shift[:, None])
        if self._next_position is not None:
            self._next_position = self._next_position[..., index, :] - (mask - kept).sum(1, keepdim=True)
        self.mask = kept.gather(1, (columns - shift[:, None]) % mask.shape[1])
        used = self.mask.any(0).nonzero()
        trim = int(used[0]) if len(used) else 0  # padding that all lanes share
        self.mask = self.mask[:, trim:]
        self.rows = [self.rows[lane] for lane in lanes]
        if not same or bool(shift.any()) or trim:
            adapter.rearrange_cache(self.run.cache, index, shift, trim)

    def save(self, lane: int, drop: int, new_tokens: int) -> None:
        """Copy the cache of a lane whose row is done, for `restore`.

        Args:
            lane: the lane.
            drop: columns at its end to leave out.
            new_tokens: how many of the row's new tokens it holds.
        """
        row = self.rows[lane]
        stop = self.mask.shape[1] - drop
        start = stop - new_tokens - (self._prompt_columns - self._starts[row])
        self._saved[row] = adapter.copy_columns(self.run.cache, lane, start, stop)

    def restore(self) -> None:
        """Lay the cache out as the sequences are: column by column the returned ids without the last.

        Zeros stand where a prompt is padded and where a row has ended.
        """
        adapter.refill_cache(self.run.cache, [self._saved[row] for row in range(len(self._starts))], self._starts)

    def _check_cache(self, problem: str | None) -> None:
        if problem is not None:
            raise ValueError(
                f"{self.run.report.strategy} lets the rows of a batch grow at different paces and has to move the "
                f"columns of the cache, but {problem}; leave past_key_values and cache_implementation out, or pass "
                "a DynamicCache() made without a config"
            )

    def _of_lanes(self, name: str, value: Any, n: int) -> Any:
        """Give every lane the forward argument of its row."""
        if name == "logits_to_keep":
            return n
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != len(self.run.input_ids):
            return value
        value = value[torch.tensor(self.rows, device=value.device)]
        # A new token is of the type of the last one; transformers has appended that already.
        return value[:, -1:].expand(-1, n) if name.endswith("token_type_ids") else value
