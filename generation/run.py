"""One decoding call: what `generate` prepared, what was produced, and what it cost.

A strategy drives a `DecodingRun` and decides only which tokens come next:

    prompt --prefill--> logits --process--> scores --(strategy)--> tokens --commit--> ...
                          ^                                                   |
                          +------------------- forward -----------------------+

The run owns the growing ids, masks and positions, the finished rows, the streamer, the
collected outputs and the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.generation.report import DecodeReport


class DecodingRun:
    """State of one decoding call over a batch.

    Args:
        model: the model that generates.
        input_ids: `(batch, length)` int64, left-padded prompts (decoder ids of an encoder-decoder).
        logits_processor: what `generate` prepared and the user added.
        stopping_criteria: likewise; the maximum length is one of them.
        config: the resolved generation config.
        streamer: receives each new column of tokens.
        synced_gpus: keep calling forward until every process is done.
        model_kwargs: forward arguments, the cache among them.
        report: the ledger to fill.
        tokenizer: the tokenizer given to `Strategy.generate`, if any.
        draft_tokenizer: likewise that of the strategy's draft model.

    Attributes:
        input_ids: `(batch, length so far)` int64.
        unfinished: `(batch,)` bool, rows that still produce tokens.
        keep_scores: whether the caller wants the processed scores of every token.
        keep_logits: likewise the raw logits.
        model_kwargs: forward arguments for the next call.
        reader: what runs the prompt through the model, given its ids and forward arguments (which it may
            change for the calls after it); `generate`'s own way by default.
        step_masks: gives the attention mask of a step after which the text has so many columns, where it is
            not the one that `model_kwargs` say.
        columns_before: columns that the model has read more than the ids have, where a reader repeats or adds some.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        synced_gpus: bool,
        model_kwargs: dict[str, Any],
        report: DecodeReport,
        tokenizer: Any = None,
        draft_tokenizer: Any = None,
    ) -> None:
        self.model, self.input_ids, self.config = model, input_ids, config
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.streamer, self.synced_gpus, self.model_kwargs, self.report = streamer, synced_gpus, model_kwargs, report
        self.tokenizer, self.draft_tokenizer = tokenizer, draft_tokenizer
        self.prompt_length = input_ids.shape[1]
        embeds = model_kwargs.get("inputs_embeds")
        self._embedded = 0 if embeds is None or input_ids.shape[1] else embeds.shape[1]
        self.reader: Callable[[torch.Tensor, dict[str, Any]], ModelOutput] | None = None
        self.step_masks: Callable[[int], Any] | None = None
        self.columns_before = 0
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.encoder_decoder: bool = model.config.is_encoder_decoder
        pad = adapter.special_token(config, "pad")
        self.pad_token_id = None if pad is None else int(pad)
        self._new_tokens = torch.zeros_like(self.unfinished, dtype=torch.long)
        # generate creates an empty cache itself where none was passed in, before it calls the strategy.
        self.cache_was_given = adapter.is_user_cache(model_kwargs.get("past_key_values"))
        self._started = time.perf_counter()
        wanted = config.return_dict_in_generate
        self.keep_scores = bool(wanted and config.output_scores)
        self.keep_logits = bool(wanted and config.output_logits)
        self._scores: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._forwards: list[ModelOutput] = []  # only what the caller asked to see of them

    # What the strategy asks

    @property
    def cache(self) -> Any:
        """The model's cache, or None."""
        return self.model_kwargs.get("past_key_values")

    @property
    def cache_outlives_call(self) -> bool:
        """Whether the caller can go on from the cache: it is returned, or was passed in."""
        return bool(self.config.return_dict_in_generate) or self.cache_was_given

    @property
    def attention_mask(self) -> torch.Tensor:
        """`(batch, length)` int64 mask over the decoder's tokens so far, 0 on padding.

        After a reader that reads more columns than the ids have, over all that was read.
        """
        name = "decoder_attention_mask" if self.encoder_decoder else "attention_mask"
        mask = self.model_kwargs.get(name)
        # A prompt given as embeddings has columns in the mask and none in the ids.
        length = self.input_ids.shape[1] + self._embedded + self.columns_before
        return self.input_ids.new_ones(len(self.input_ids), length) if mask is None else mask[:, :length]

    @property
    def running(self) -> bool:
        """Whether any row, in any synchronised process, still produces tokens."""
        return adapter.any_row_unfinished(self.model, not self.any_unfinished, self.synced_gpus, self.input_ids.device)

    @property
    def any_unfinished(self) -> bool:
        """Whether a row of this process still produces tokens."""
        return bool(self.unfinished.any())

    # Forward passes

    def prefill(self, ahead: torch.Tensor | None = None, **forward_kwargs: Any) -> ModelOutput:
        """Run the prompt, fill the cache and make the masks ready for the first new token.

        Args:
            ahead: `(batch, n)` int64 guesses of the next tokens, evaluated behind the prompt in the same
                forward pass. They enter the cache and the masks, not the ids.
            **forward_kwargs: further arguments of the model's forward (`output_hidden_states=True`).

        Returns:
            The model's output; `logits[:, -1]` are those of the first new token, or of the one after the
            last guess, and the `n` before it those of the tokens that were guessed.
        """
        ids, kwargs = self.input_ids, self.model_kwargs
        if ahead is not None:
            ids, kwargs = torch.cat([ids, ahead], dim=1), adapter.lengthen_kwargs(self.model, kwargs, ahead.shape[1])
            if "logits_to_keep" in kwargs:
                kwargs["logits_to_keep"] = ahead.shape[1] + 1
        cached = adapter.cached_tokens(self.cache)
        if self.reader is None:
            outputs = adapter.prefill(self.model, ids, self.config, {**kwargs, **forward_kwargs})
        else:
            given = {**kwargs, **forward_kwargs}
            outputs = self.reader(ids, given)
            kwargs = {**kwargs, "position_ids": given.get("position_ids")}  # a model may know none
        # The prompt may hold what is in the cache already or not; how much the cache has grown tells.
        grown = adapter.cached_tokens(self.cache) - cached
        self._count(len(self.input_ids), grown or ids.shape[1] + self._embedded + self.columns_before)
        self.model_kwargs = adapter.extend_kwargs(self.model, outputs, kwargs)
        return outputs

    def forward(
        self, tokens: torch.Tensor, model_kwargs: dict[str, Any] | None = None, **forward_kwargs: Any
    ) -> ModelOutput:
        """Evaluate the last column of `tokens` after what the cache holds.

        Masks and positions are lengthened for the column that follows.

        Args:
            tokens: `(rows, any length)` int64; only the last column enters the model when a cache is used.
            model_kwargs: forward arguments to use and update instead of the run's own.
            **forward_kwargs: further arguments of the model's forward.
        """
        own = model_kwargs is None
        kwargs = self.model_kwargs if model_kwargs is None else model_kwargs
        width = 1 if kwargs.get("use_cache", True) else tokens.shape[1]
        inputs = adapter.next_inputs(self.model, tokens, kwargs, width)
        if self.step_masks is not None:
            inputs["attention_mask"] = self.step_masks(tokens.shape[1])
        outputs = self.model(**{**inputs, **forward_kwargs}, return_dict=True)
        self._count(len(tokens), width)
        updated = adapter.extend_kwargs(self.model, outputs, kwargs)
        if own:
            self.model_kwargs = updated
        else:
            kwargs.update(updated)
        return outputs

    def last_hidden_state(self, outputs: ModelOutput) -> torch.Tensor:
        """`(rows, positions, width)` states of the decoder's last layer."""
        states = outputs.decoder_hidden_states if self.encoder_decoder else outputs.hidden_states
        if states is None:
            raise ValueError(
                f"{type(self.model).__name__} returned no hidden states although output_hidden_states=True was "
                "passed; this strategy needs a model that returns them"
            )
        return states[-1]

    # From logits to tokens

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors to `(batch, vocabulary)` logits, in float32, on the ids so far."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        return self.logits_processor(self.input_ids, logits)

    def commit(
        self,
        tokens: torch.Tensor,
        *,
        scores: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        outputs: ModelOutput | None = None,
    ) -> None:
        """Append one token to every row, stream it, and find out which rows are done.

        Does nothing once all rows are done: a process that waits for others only calls forward.

        Args:
            tokens: `(batch,)` int64; rows that are done get padding instead.
            scores: `(batch, vocabulary)` processed scores the tokens were chosen from.
            logits: `(batch, vocabulary)` raw logits likewise.
            outputs: the forward pass that gave them, for `output_hidden_states` and `output_attentions`.
        """
        if not self.any_unfinished:
            return
        if self.pad_token_id is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad_token_id)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        if self.keep_scores and scores is not None:
            self._scores.append(scores)
        if self.keep_logits and logits is not None:
            self._logits.append(logits.float())
        if outputs is not None and (self.config.output_attentions or self.config.output_hidden_states):
            self._forwards.append(outputs)
        self._new_tokens += self.unfinished
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self.unfinished &= ~self.stopping_criteria(self.input_ids, tuple(self._scores) if self.keep_scores else None)

    def adopt(
        self,
        sequences: torch.Tensor,
        new_tokens: list[int],
        scores: list[torch.Tensor],
        logits: list[torch.Tensor],
        forwards: list[ModelOutput],
    ) -> None:
        """Take over what a strategy produced itself because its rows grew by different numbers of tokens.

        Args:
            sequences: `(batch, length)` int64, prompts included, padded on the right.
            new_tokens: new tokens of each row.
            scores: `(batch, vocabulary)` processed scores of each new column, if they are wanted.
            logits: likewise the raw logits.
            forwards: likewise hidden states and attentions, the prompt's first.
        """
        self.input_ids = sequences
        self.unfinished = torch.zeros_like(self.unfinished)
        self._new_tokens = torch.tensor(new_tokens)
        self._scores, self._logits, self._forwards = scores, logits, forwards

    def result(self) -> torch.Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
        """End the stream, close the report and return what `generate` would."""
        if self.streamer is not None:
            self.streamer.end()
        self.report.rows = len(self.input_ids)
        self.report.tokens_per_row = self._new_tokens.tolist()
        self.report.seconds = time.perf_counter() - self._started
        if not self.config.return_dict_in_generate:
            return self.input_ids
        found = {
            "sequences": self.input_ids,
            "scores": tuple(self._scores) if self.keep_scores else None,
            "logits": tuple(self._logits) if self.keep_logits else None,
            "past_key_values": self.cache,
        }
        attentions, states = self.config.output_attentions, self.config.output_hidden_states
        if not self.encoder_decoder:
            return GenerateDecoderOnlyOutput(
                **found,
                attentions=tuple(o.attentions for o in self._forwards) if attentions else None,
                hidden_states=tuple(o.hidden_states for o in self._forwards) if states else None,
            )
        encoder = self.model_kwargs["encoder_outputs"]
        return GenerateEncoderDecoderOutput(
            **found,
            encoder_attentions=encoder.get("attentions") if attentions else None,
            encoder_hidden_states=encoder.get("hidden_states") if states else None,
            decoder_attentions=tuple(o.decoder_attentions for o in self._forwards) if attentions else None,
            cross_attentions=tuple(o.cross_attentions for o in self._forwards) if attentions else None,
            decoder_hidden_states=tuple(o.decoder_hidden_states for o in self._forwards) if states else None,
        )

    def _count(self, rows: int, positions: int) -> None:
        self.report.target_calls += 1
        self.report.target_positions += rows * positions
