"""Batches whose rows grow by different numbers of tokens at a time.

Two halves. `RaggedRows` keeps what the caller sees: every row's true sequence, its scores, the
stream. `Lanes` keeps what the model sees: a batch of lanes, each the continuation of some row (a
row may have several, or none when it is done), over a cache that stays padded on the left.

    lane 0   . . A B C D          every lane ends in the same column, so that models that look at
    lane 1   a b c d e f          distances between columns (windows, ALiBi) see true distances;
    lane 2   a b c d e g          `attention_mask` is 0 at the dots, positions are explicit

A lane that has nothing to say while others go on is fed a token whose column is masked (`-`):

    lane 0   . . A B C D - -      `rearrange` drops these two columns and moves the lane
    lane 0   . . . . A B C D      to the right
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PrefixConstrainedLogitsProcessor

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun


class Lanes:
    """The model's side: sequences that share a forward pass and can be copied, dropped and rewound.

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
            self._check_cache()
        outputs = run.prefill()
        self._check_cache()
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
        self.run.model(torch.zeros(1, 1, dtype=torch.long, device=self.run.model.device), use_cache=False)
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

    def _check_cache(self) -> None:
        if problem := adapter.column_editing_problem(self.run.cache):
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


class RaggedRows:
    """The caller's side: sequences, scores and stream of a batch whose rows differ in length.

    Logits processors and stopping criteria always see a row's true sequence: the prompt as it was
    given (its padding on the left included) and then the row's own tokens without gaps. Those that
    may tell rows apart by their number, the user's among them, see a batch of copies of one lane,
    of which the lane's own row counts.

    Args:
        run: the decoding call.

    Attributes:
        ids: `(1, length so far)` int64 of every row.
        finished: whether a row is done.

    Raises:
        ValueError: attentions or hidden states are wanted, no padding token is there for rows that
            end early, or a logits processor keeps a state for every row of the batch.
    """

    def __init__(self, run: DecodingRun) -> None:
        batch = len(run.input_ids)
        config, name = run.config, run.report.strategy
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            raise ValueError(
                f"{name} has no attentions or hidden states a column, as the rows of the batch grow at different "
                "paces; leave output_attentions and output_hidden_states out and run the model on the result"
            )
        if batch > 1 and run.pad_token_id is None and not all(hasattr(c, "max_length") for c in run.stopping_criteria):
            raise ValueError("rows may end at different lengths; pass pad_token_id to fill up the shorter ones")
        self.run = run
        self.ids = list(run.input_ids.split(1))
        self.finished = [False] * batch
        self.scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        for processor in run.logits_processor:
            if adapter.keeps_row_state(processor):
                raise ValueError(
                    f"{type(processor).__name__} keeps a state for every row of the batch; {name} cannot work with it, "
                    "as a row may be continued in several ways at once"
                )
        self._streamed = 0

    def length(self, row: int) -> int:
        """Return the number of new tokens of a row."""
        return self.ids[row].shape[1] - self.run.prompt_length

    def with_tokens(self, row: int, tokens: torch.Tensor) -> torch.Tensor:
        """Return `(lanes, length)` ids of a row followed by `(lanes, n)` tokens."""
        return torch.cat([self.ids[row].expand(len(tokens), -1), tokens], dim=1)

    def process(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors, in float32.

        Args:
            row: the row of the batch.
            tokens: `(lanes, n)` int64, what each lane adds to the row so far.
            logits: `(lanes, vocabulary)`.
        """
        ids = self.with_tokens(row, tokens)
        scores = logits.to(copy=True, dtype=torch.float32, device=tokens.device)
        for processor in self.run.logits_processor:
            if adapter.ignores_row_number(processor):
                scores = processor(ids, scores)
            elif allowed := adapter.prefix_function(processor):
                of_row = PrefixConstrainedLogitsProcessor(lambda _, i, f=allowed: f(row, i), num_beams=1)
                scores = of_row(ids, scores)
            else:
                scores = torch.cat([
                    processor(*self._in_its_row(ids[lane], scores[lane]))[row][None] for lane in range(len(ids))
                ])  # fmt: skip
        return scores

    def done(self, row: int, tokens: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
        """Tell of every lane whether the row would be done with these tokens.

        Args:
            row: the row of the batch.
            tokens: `(lanes, n)` int64, what each lane adds to the row so far.
            scores: `(lanes, n, vocabulary)` scores they were drawn from, where the caller wants scores.

        Returns:
            `(lanes,)` bool.
        """
        ids, batch = self.with_tokens(row, tokens), len(self.ids)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self.run.stopping_criteria:
            if adapter.ignores_row_number(criterion):
                done |= criterion(ids, None).to(ids.device)
                continue
            for lane in range(len(ids)):
                history = None
                if self.run.keep_scores and scores is not None:
                    history = tuple(s.expand(batch, -1) for s in (*self.scores[row], *scores[lane].split(1)))
                says = torch.as_tensor(criterion(self._in_its_row(ids[lane])[0], history), device=ids.device)
                done[lane] |= says.expand(batch)[row].bool()
        return done

    def accept(
        self,
        row: int,
        tokens: torch.Tensor,
        finished: bool,
        scores: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Append tokens to a row for good.

        Args:
            row: the row of the batch.
            tokens: `(n,)` int64.
            finished: whether the row is done with them.
            scores: `(n, vocabulary)` processed scores, where the caller wants them.
            logits: likewise the raw logits.
        """
        self.ids[row] = self.with_tokens(row, tokens[None])
        self.finished[row] = finished
        self.run.unfinished[row] = not finished
        if self.run.keep_scores and scores is not None:
            self.scores[row] += scores.split(1)
        if self.run.keep_logits and logits is not None:
            self.logits[row] += logits.float().split(1)
        self._stream()

    def finish(self) -> None:
        """Hand the sequences to the run: prompts, new tokens, padding on the right.

        Where a row has ended, its scores and logits are 0 for the padding token and -inf for others.
        """
        batch = range(len(self.ids))
        columns = max(self.length(row) for row in batch)
        table = torch.cat([self._padded(row, columns) for row in batch])
        self.run.adopt(
            torch.cat([self.run.input_ids[:, : self.run.prompt_length], table], dim=1),
            [self.length(row) for row in batch],
            self._columns(self.scores, columns) if self.run.keep_scores else [],
            self._columns(self.logits, columns) if self.run.keep_logits else [],
        )

    def _in_its_row(self, *of_lane: torch.Tensor) -> list[torch.Tensor]:
        """Repeat what belongs to a lane over a whole batch, so that it stands in the lane's row as well."""
        return [part[None].repeat(len(self.ids), 1) for part in of_lane]

    def _padded(self, row: int, columns: int) -> torch.Tensor:
        new = self.ids[row][:, self.run.prompt_length :][:, :columns]
        return torch.nn.functional.pad(new, (0, columns - new.shape[1]), value=self.run.pad_token_id or 0)

    def _columns(self, kept: list[list[torch.Tensor]], columns: int) -> list[torch.Tensor]:
        certain = torch.full_like(kept[0][0], -torch.inf)
        certain[:, self.run.pad_token_id or 0] = 0.0
        return [torch.cat([row[i] if i < len(row) else certain for row in kept]) for i in range(columns)]

    def _stream(self) -> None:
        """Stream what is final: whole blocks of a single row, columns of a batch once all rows have them."""
        if self.run.streamer is None:
            return
        batch = range(len(self.ids))
        going = [self.length(row) for row in batch if not self.finished[row]]
        columns = min(going) if going else max(self.length(row) for row in batch)
        if columns <= self._streamed:
            return
        table = torch.cat([self._padded(row, columns) for row in batch])[:, self._streamed :].cpu()
        if len(table) == 1:
            self.run.streamer.put(table[0])
        else:
            for column in table.unbind(1):
                self.run.streamer.put(column)
        self._streamed = columns
