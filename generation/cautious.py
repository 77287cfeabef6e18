"""Cautious decoding (Cautious Next Token Prediction, arXiv:2507.03038)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_ext import adapter
from hf_ext.generation.endings import PUNCTUATION, tokenizer_beside, tokens_ending_in
from hf_ext.generation.lanes import Lanes
from hf_ext.generation.ragged import RaggedRows
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.strategy import DecodingStrategy, positive
from hf_ext.generation.trials import Segment, entropy, trials_for


@dataclass
class CautiousDecoding(DecodingStrategy):
    """Sample; where the model is unsure, try several phrases and keep the one of lowest perplexity.

    The entropy of the next token decides the number of trials,
    `min_trials + floor((max_trials - min_trials) * clip((H - low) / (high - low), 0, 1))`. A single
    trial is one token of ordinary sampling. Several are drawn independently up to the next
    punctuation (or the end of the row) and the one of lowest perplexity is appended. Entropy, draws
    and perplexity all are those of the processed distribution, after temperature, top-p and so on,
    as in the authors' code. The trials of all rows run in one batch; trials that have lost leave it,
    and rows need not wait for each other.

    Draws come from torch's global generator: `torch.manual_seed` before a call makes it
    reproducible. The strategy always samples; `do_sample=True` decides whether temperature, top-k
    (50 by default in transformers) and top-p apply. With `max_trials=1` tokens are those of
    `generate(do_sample=True)` with the same seed. `num_return_sequences=n` gives n independent
    answers, for `majority` to vote on.

    Args:
        max_trials: trials where the model is clueless. The paper takes 40 for text and 10 for
            vision-language models.
        min_trials: trials where it is sure.
        low_entropy: nats up to which it is sure.
        high_entropy: nats from which it is clueless.
        stop_tokens: what ends a trial: token ids, and texts that stand for every token that ends in
            them. By default punctuation and line breaks.
        max_trial_tokens: a trial ends after that many tokens; by default only with the row.
        tokenizer: tells which tokens end in punctuation. By default the one passed to
            `CautiousDecoding(...).generate(..., tokenizer=...)` or else the one saved beside the model.

    Raises:
        ValueError: options out of range, no tokenizer where one is needed, an encoder-decoder,
            beams, or with several trials a cache that is not a plain dynamic one, or classifier-free
            guidance.

    Source:
        "Cautious Next Token Prediction" (arXiv:2507.03038).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, pad_token_id=0, eos_token_id=None)
        >>> model = LlamaForCausalLM(config).eval()
        >>> strategy = CautiousDecoding(max_trials=4, stop_tokens=[5, 6, 7])
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model.generate(ids, custom_generate=strategy, do_sample=True, max_new_tokens=8).shape
        torch.Size([1, 11])
        >>> strategy.report.details["mean_trials"]
        4.0
    """

    max_trials: int = 10
    min_trials: int = 1
    low_entropy: float = 0.01
    high_entropy: float = 1.5
    stop_tokens: Sequence[int | str] | None = None
    max_trial_tokens: int | None = None
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)

    samples: ClassVar[bool] = True
    encoder_decoder: ClassVar[bool] = False

    def check_options(self) -> None:
        """Check the ranges and that `stop_tokens` holds ids and texts."""
        positive("max_trials", self.max_trials)
        positive("min_trials", self.min_trials)
        if self.min_trials > self.max_trials:
            raise ValueError(f"min_trials ({self.min_trials}) must not exceed max_trials ({self.max_trials})")
        if self.max_trial_tokens is not None:
            positive("max_trial_tokens", self.max_trial_tokens)
        if not 0 <= self.low_entropy < self.high_entropy:
            raise ValueError(
                f"0 <= low_entropy < high_entropy must hold, got {self.low_entropy!r} and {self.high_entropy!r}"
            )
        if self.stop_tokens is None:
            return
        if isinstance(self.stop_tokens, str):
            raise ValueError(f"stop_tokens must be a list, such as [{self.stop_tokens!r}], not a string")
        for stop in self.stop_tokens:
            if isinstance(stop, bool) or not isinstance(stop, (int, str)) or stop == "" or stop == -1:
                raise ValueError(f"stop_tokens holds token ids and non-empty texts, got {stop!r}")
        if not self.stop_tokens:
            raise ValueError("stop_tokens is empty; leave it out for punctuation, or set max_trials=1 for none")

    def decode(self, run: DecodingRun) -> None:
        """Sample token by token, or trial by trial where more than one may be needed."""
        self._check_sampling(run)
        if self.max_trials == 1:
            self._sample(run)
        else:
            self._try(run)

    def draw(self, probabilities: torch.Tensor, places: list[tuple[int, int, int]]) -> torch.Tensor:
        """Draw a token from each distribution; a subclass may take its randomness from elsewhere.

        Args:
            probabilities: `(trials, vocabulary)`.
            places: for each the row of the batch, its new tokens so far, and the number of the trial.

        Returns:
            `(trials,)` int64.
        """
        return torch.multinomial(probabilities, num_samples=1)[:, 0]

    def _sample(self, run: DecodingRun) -> None:
        """Ordinary sampling, with everything that the base supports."""
        outputs, step, tokens = run.prefill(), 0, 0
        while True:
            logits = outputs.logits[:, -1]
            scores = run.process(logits)
            chosen = self.draw(scores.softmax(-1), [(row, step, 0) for row in range(len(scores))])
            step, tokens = step + 1, tokens + int(run.unfinished.sum())
            run.commit(chosen, scores=scores, logits=logits, outputs=outputs)
            if not run.running:
                break
            outputs = run.forward(run.input_ids)
        run.report.details.update(trials=tokens, segments=tokens, mean_trials=1.0, discarded_tokens=0)

    def _try(self, run: DecodingRun) -> None:
        """Keep a segment of trials under way in every row until all rows are done."""
        stop_ids = self._stop_ids(run)
        rows, lanes = RaggedRows(run), Lanes(run)
        logits = lanes.prefill()
        device = run.input_ids.device
        stops = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
        stops[[index for index in stop_ids if index < len(stops)]] = True
        segments = [Segment(row, row, device) for row in range(len(logits))]
        run.report.details.update(trials=0, segments=0, mean_trials=0.0, discarded_tokens=0)

        plan = self._advance(rows, lanes, segments, logits, stops)
        while run.running:
            if not plan.lanes:
                lanes.wait()
                continue
            lanes.rearrange(plan.lanes, plan.drops)
            live = torch.tensor(plan.live, device=device)
            logits = lanes.forward(torch.cat(plan.tokens)[:, None], live)[:, -1]
            plan = self._advance(rows, lanes, plan.segments, logits, stops)

        rows.finish()
        if run.cache_outlives_call:
            lanes.restore()
        details = run.report.details
        details["mean_trials"] = details["trials"] / details["segments"]

    def _advance(
        self, rows: RaggedRows, lanes: Lanes, segments: list[Segment], logits: torch.Tensor, stops: torch.Tensor
    ) -> _Plan:
        """Draw a token for every trial, keep the winners of segments that are over, and plan the next pass."""
        details = rows.run.report.details
        self._step(rows, segments, logits, stops)
        plan = _Plan()
        for segment in segments:
            best = segment.best
            if segment.lanes:
                segment.lanes = plan.add(segment.lanes, segment.tokens[:, -1])
                if best is not None:  # it waits for the others, which may be better still
                    [best.lane] = plan.add([best.lane], best.tokens[-1:], live=False)
                    best.idle += 1
                plan.segments.append(segment)
                continue
            assert best is not None, "a segment whose trials have all ended has a best one"
            rows.accept(segment.row, best.tokens, best.finished, best.scores, best.logits)
            details["segments"] += 1
            details["trials"] += segment.planned
            details["discarded_tokens"] += segment.drawn - len(best.tokens)
            if not best.finished:
                [lane] = plan.add([best.lane], best.tokens[-1:], drop=best.idle)
                plan.segments.append(Segment(segment.row, lane, stops.device))
            elif rows.run.cache_outlives_call:
                lanes.save(best.lane, best.idle, rows.length(segment.row) - 1)
        return plan

    def _step(self, rows: RaggedRows, segments: list[Segment], logits: torch.Tensor, stops: torch.Tensor) -> None:
        """Draw a token for every trial under way and end those that have to."""
        raws, scores = [], []
        for segment in segments:
            raw = logits[segment.lanes]
            processed = rows.process(segment.row, segment.tokens, raw)
            if not segment.planned:
                nats = float(entropy(processed[0]))
                trials = trials_for(nats, self.low_entropy, self.high_entropy, self.min_trials, self.max_trials)
                segment.split(trials)
                raw, processed = raw.expand(trials, -1), processed.expand(trials, -1)
            raws.append(raw)
            scores.append(processed)
        places = [
            (segment.row, rows.length(segment.row) + segment.tokens.shape[1], number)
            for segment in segments
            for number in segment.numbers
        ]
        tokens = self.draw(torch.cat(scores).softmax(-1), places)
        for segment, drawn, raw, processed in zip(
            segments, tokens.split([len(s) for s in scores]), raws, scores, strict=True
        ):
            segment.append(drawn, processed, raw, rows.run.keep_scores, rows.run.keep_logits)
            finished = rows.done(segment.row, segment.tokens, segment.scores)
            ended = finished | stops[drawn]
            if segment.planned == 1 or segment.tokens.shape[1] == self.max_trial_tokens:
                ended = torch.ones_like(ended)
            segment.end(ended, finished)

    def _stop_ids(self, run: DecodingRun) -> set[int]:
        """Find the tokens that end a trial."""
        stops = PUNCTUATION if self.stop_tokens is None else self.stop_tokens
        ids = {stop for stop in stops if isinstance(stop, int)}
        texts = [stop for stop in stops if isinstance(stop, str)]
        if not texts:
            return ids
        tokenizer = self.tokenizer or run.tokenizer or tokenizer_beside(run.model)
        if tokenizer is None:
            raise ValueError(
                "CautiousDecoding needs to know which tokens end a trial, and no tokenizer was found beside the model: "
                "pass the tokenizer (CautiousDecoding(tokenizer=tokenizer), or tokenizer=tokenizer to "
                "CautiousDecoding(...).generate), or the token ids (CautiousDecoding(stop_tokens=[...]))"
            )
        found = tokens_ending_in(tokenizer, texts)
        if not found:
            raise ValueError(f"no token of {type(tokenizer).__name__} ends in any of {texts}; pass other stop_tokens")
        return ids | found

    def _check_sampling(self, run: DecodingRun) -> None:
        """Refuse do_sample=False where it was asked for, and settings of sampling that it disables."""
        if run.config.do_sample:
            return
        defaults = run.model.generation_config
        if defaults.do_sample:
            raise ValueError("CautiousDecoding draws tokens at random; call generate with do_sample=True")
        fallback = adapter.default_generation_values()
        for name in ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            given = getattr(run.config, name, None)
            if given not in (None, getattr(defaults, name, None), fallback.get(name)):
                raise ValueError(f"{name}={given!r} takes effect with do_sample=True only; pass that as well")


class _Plan:
    """The segments under way and the lanes of the next forward pass."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.lanes: list[int] = []
        self.drops: list[int] = []
        self.live: list[bool] = []
        self.tokens: list[torch.Tensor] = []

    def add(self, lanes: list[int], tokens: torch.Tensor, drop: int = 0, live: bool = True) -> list[int]:
        """Copy lanes, forget `drop` columns, feed them `tokens`; return their new numbers."""
        first = len(self.lanes)
        self.lanes += lanes
        self.drops += [drop] * len(lanes)
        self.live += [live] * len(lanes)
        self.tokens.append(tokens)
        return list(range(first, len(self.lanes)))
