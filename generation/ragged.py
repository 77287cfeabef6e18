"""The caller's side of a batch whose rows grow by different numbers of tokens at a time.

`RaggedRows` keeps every row's true sequence, its scores and the stream; `hf_ext.generation.lanes`
keeps what the model sees.
"""

from __future__ import annotations

import torch
from transformers import PrefixConstrainedLogitsProcessor

from hf_ext import adapter
from hf_ext.generation.lookback import LookBack
from hf_ext.generation.run import DecodingRun


class RaggedRows:
    """Sequences, scores and stream of a batch whose rows differ in length.

    Logits processors and stopping criteria always see a row's true sequence: the prompt as it was
    given (its padding on the left included) and then the row's own tokens without gaps. Those that
    may tell rows apart by their number, the user's among them, see a batch of copies of one lane,
    of which the lane's own row counts.

    Args:
        run: the decoding call.

    Attributes:
        finished: whether a row is done.

    Raises:
        ValueError: no padding token is there for rows that end early, a logits processor keeps a
            state for every row of the batch, or hidden states or attentions are wanted of a prompt
            that is not there as tokens.
    """

    def __init__(self, run: DecodingRun) -> None:
        batch = len(run.input_ids)
        if batch > 1 and run.pad_token_id is None and not all(hasattr(c, "max_length") for c in run.stopping_criteria):
            raise ValueError("rows may end at different lengths; pass pad_token_id to fill up the shorter ones")
        self.run = run
        self._ids = list(run.input_ids.split(1))
        #: tokens of every row that are not among its ids yet: who needs the ids lays them out, most steps need none
        self._waiting: list[list[int]] = [[] for _ in range(batch)]
        self.finished = [False] * batch
        self.scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        for processor in run.logits_processor:
            if adapter.keeps_row_state(processor):
                raise ValueError(
                    f"{type(processor).__name__} keeps a state for every row of the batch, which does not go with "
                    f"{run.report.strategy}, as it continues a row in several ways at once"
                )
        self._look_back = LookBack(run)
        self._streamed = 0

    @property
    def ids(self) -> list[torch.Tensor]:
        """`(1, length so far)` int64 of every row."""
        for row, tokens in enumerate(self._waiting):
            if tokens:
                self._ids[row] = torch.cat([self._ids[row], self._ids[row].new_tensor([tokens])], dim=1)
                self._waiting[row] = []
        return self._ids

    def length(self, row: int) -> int:
        """Return the number of new tokens of a row."""
        return self._ids[row].shape[1] + len(self._waiting[row]) - self.run.prompt_length

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
        alone = len(self._ids) == len(ids) == 1  # one line of one row: there is nothing to tell apart
        for processor in self.run.logits_processor:
            allowed = adapter.prefix_function(processor)
            if adapter.ignores_row_number(processor) or (alone and not allowed):
                scores = processor(ids, scores)
            elif allowed:
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
        tokens: torch.Tensor | list[int],
        finished: bool,
        scores: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Append tokens to a row for good.

        Args:
            row: the row of the batch.
            tokens: `(n,)` int64, or a list.
            finished: whether the row is done with them.
            scores: `(n, vocabulary)` processed scores, where the caller wants them.
            logits: likewise the raw logits.
        """
        self._waiting[row] += tokens if isinstance(tokens, list) else tokens.tolist()
        if finished != self.finished[row]:
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
        sequences = torch.cat([self.run.input_ids[:, : self.run.prompt_length], table], dim=1)
        self.run.adopt(
            sequences,
            [self.length(row) for row in batch],
            self._columns(self.scores, columns) if self.run.keep_scores else [],
            self._columns(self.logits, columns) if self.run.keep_logits else [],
            self._look_back.states(sequences) if self._look_back.wanted else [],
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
