"""Checks of what a strategy does to the rows of a batch: padding, and everything that ends or shapes a row."""

# ruff: noqa: D102  (the name of a check says what it checks)

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import PLAIN, StrategyChecks, cut_rows, refusal, same_tokens
from hf_ext.testing.tiny_models import PAD


class RowChecks(StrategyChecks):
    """Batches, padding, ends, streams and logits processors."""

    def test_a_row_of_a_padded_batch_gets_what_it_gets_alone(self, kind: str) -> None:
        ids, mask = tiny_models.prompts()
        batch = self.free_run(kind)
        for row in range(len(ids)):
            alone = ids[row : row + 1, mask[row].bool()]
            single = self.run(kind, ids=alone, mask=torch.ones_like(alone))[:, alone.shape[1] :]
            same_tokens(batch[row : row + 1], single, f"{kind}, row {row} of a batch against the row alone")

    def test_more_padding_changes_nothing(self, kind: str) -> None:
        ids, mask = tiny_models.pad_left(*tiny_models.prompts(), 5)
        more = self.run(kind, ids=ids, mask=mask)[:, ids.shape[1] :]
        same_tokens(more, self.free_run(kind), f"{kind}, five more columns of padding")

    def test_generate_with_custom_generate_does_the_same(self, example: str) -> None:
        ids, mask = tiny_models.prompts()
        settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": self.new_tokens, "pad_token_id": PAD}
        if self.strategy().samples:
            settings["do_sample"] = True
        model = tiny_models.shared(example)
        torch.manual_seed(3)
        through_generate = model.generate(ids, custom_generate=self.strategy(), **settings)
        torch.manual_seed(3)
        direct = self.strategy().generate(model, ids, **settings)
        same_tokens(through_generate, direct, f"{example}, custom_generate= against Strategy.generate")

    def test_a_generation_config_is_followed_and_left_as_it_was(self) -> None:
        config = GenerationConfig(
            max_new_tokens=5, pad_token_id=PAD, stop_strings=["never to be found"], **self.exact()
        )
        before = config.to_dict()
        ids, mask = tiny_models.prompts()
        model, tokenizer = tiny_models.shared(PLAIN), tiny_models.tokenizer()
        given = self.strategy().generate(model, ids, attention_mask=mask, generation_config=config, tokenizer=tokenizer)
        same_tokens(given[:, ids.shape[1] :], self.free_run()[:, :5], "a run under a generation_config")
        assert config.to_dict() == before, f"generation_config was changed from {before} to {config.to_dict()}"

    # What ends a row

    def test_eos_ends_its_row_and_padding_follows(self, kind: str) -> None:
        free = self.free_run(kind)
        # Two eos ids, so that rows end at different places and one may run on.
        eos = [int(free[0, 3]), int(free[1, 6])]
        last = [next((i for i, t in enumerate(row) if t in eos), len(row) - 1) for row in free.tolist()]
        strategy = self.strategy()
        ended = self.free_run(kind, eos_token_id=eos, strategy=strategy)
        same_tokens(ended, cut_rows(free, last), f"{kind}, a run with eos tokens {eos}")
        assert strategy.report is not None, "the strategy left no report"
        counted, expected = strategy.report.tokens_per_row, [at + 1 for at in last]
        assert counted == expected, f"report.tokens_per_row is {counted}, expected {expected} (eos in, padding out)"

    def test_a_stopping_criterion_ends_single_rows(self) -> None:
        start = tiny_models.prompts()[0].shape[1]
        # Row 0 ends after 2 tokens, row 1 after 5, row 2 after 3.
        criteria = StoppingCriteriaList([EndRows([start + 2, start + 5, start + 3])])
        ended = self.free_run(stopping_criteria=criteria)
        same_tokens(ended, cut_rows(self.free_run(), [1, 4, 2]), "a run whose rows end after 2, 5 and 3 tokens")

    def test_max_time_ends_the_run(self) -> None:
        new = self.free_run(max_time=1e-6).shape[1]
        assert new == 1, f"max_time was over after the first token, but the run went on for {new} tokens"

    def test_lengths_are_kept(self) -> None:
        free = self.free_run()
        same_tokens(self.free_run(max_new_tokens=1), free[:, :1], "a run of max_new_tokens=1")
        prompt = tiny_models.prompts()[0].shape[1]
        same_tokens(self.free_run(max_new_tokens=None, max_length=prompt + 4), free[:, :4], "a run of max_length")
        eos = free[:, 0].tolist()
        ended = self.free_run(eos_token_id=eos, min_new_tokens=4)
        early = [row[:4] for row in ended.tolist() if set(row[:4]) & set(eos)]
        assert not early, f"min_new_tokens=4, but an eos of {eos} is among the first four tokens {early}"

    def test_stop_strings_end_a_row(self) -> None:
        tokenizer = tiny_models.tokenizer()
        ids, _ = tiny_models.prompts()
        free = self.usual()
        texts = [[tokenizer.decode(row[: i + 1]) for i in range(ids.shape[1], len(row))] for row in free]
        stop = texts[0][4][-2:]
        last = [next((i for i, text in enumerate(row) if text.endswith(stop)), len(row) - 1) for row in texts]
        ended = self.free_run(stop_strings=stop, tokenizer=tokenizer)
        expected = cut_rows(free[:, ids.shape[1] :], last)
        same_tokens(ended, expected, f"a run with stop_strings={stop!r}")
        config = GenerationConfig(
            max_new_tokens=self.new_tokens, pad_token_id=PAD, stop_strings=[stop], **self.exact()
        )  # fmt: skip
        model, (ids, mask) = tiny_models.shared(PLAIN), tiny_models.prompts()
        ended = self.strategy().generate(
            model, ids, attention_mask=mask, generation_config=config, tokenizer=tokenizer
        )  # fmt: skip
        same_tokens(ended[:, ids.shape[1] :], expected, "a run with stop_strings in its generation_config")

    def test_stop_strings_without_a_tokenizer_are_refused(self) -> None:
        refusal(lambda: self.run(stop_strings="ab"), "tokenizer", what="stop_strings without a tokenizer")
        ids, mask = tiny_models.prompts()
        refusal(
            lambda: tiny_models.shared(PLAIN).generate(
                ids, attention_mask=mask, custom_generate=self.strategy(), stop_strings="ab", max_new_tokens=3
            ),
            "tokenizer",
            what="stop_strings without a tokenizer, through model.generate",
        )

    # Streams

    def test_a_streamer_gets_the_prompt_then_every_token_once(self) -> None:
        eos = [int(self.free_run()[0, 3])]
        for settings in ({}, {"eos_token_id": eos}):
            streamer = Recorder()
            sequences = self.run(streamer=streamer, **settings)
            same_tokens(streamer.sequences(), sequences, f"what the streamer got under {settings}")
            assert streamer.ends == 1, f"the streamer's end() was called {streamer.ends} times, expected once"
            prompt = tiny_models.prompts()[0]
            assert streamer.puts[0].shape == prompt.shape, f"the first put was {streamer.puts[0].shape}, not the prompt"

    def test_streamed_text_is_the_decoded_result(self) -> None:
        tokenizer = tiny_models.tokenizer()
        ids = tiny_models.prompts((6,))[0]
        streamer = TextIteratorStreamer(tokenizer, timeout=0.1)
        sequences = self.run(ids=ids, mask=torch.ones_like(ids), streamer=streamer)
        pieces = []
        while not streamer.text_queue.empty():
            pieces.append(streamer.text_queue.get_nowait())
        assert pieces, "the streamer got nothing"
        assert pieces[-1] is streamer.stop_signal, "the stream was not ended: an iterator over it would wait for ever"
        streamed, expected = "".join(pieces[:-1]), tokenizer.decode(sequences[0])
        assert streamed == expected, f"streamed {streamed!r}, but the result decodes to {expected!r}"

    # Logits processors

    def test_a_user_processor_decides_what_can_be_said(self, example: str) -> None:
        free = self.free_run(example)
        banned = free[:, :3].flatten().unique()
        new = self.free_run(example, logits_processor=LogitsProcessorList([Ban(banned)]))
        said = sorted(set(new.flatten().tolist()) & set(banned.tolist()))
        assert not said, f"{example}: a logits processor forbids {banned.tolist()}, but the run says {said}"

    def test_settings_that_become_processors_are_kept(self) -> None:
        free, prompt = self.free_run(), tiny_models.prompts()[0].shape[1]
        usual = free[:, :3].flatten().unique().tolist()
        for name, value in (("bad_words_ids", [[token] for token in usual]), ("suppress_tokens", usual)):
            said = sorted(set(self.free_run(**{name: value}).flatten().tolist()) & set(usual))
            assert not said, f"{name} forbids {usual}, but the run says {said}"
        first = self.free_run(begin_suppress_tokens=usual)[:, 0].tolist()
        assert not set(first) & set(usual), f"begin_suppress_tokens={usual}, but the first tokens are {first}"
        final = self.free_run(forced_eos_token_id=5)[:, -1].tolist()
        assert final == [5] * len(free), f"forced_eos_token_id=5, but the last tokens are {final}"
        for row in self.run(no_repeat_ngram_size=1).tolist():
            said = [token for i, token in enumerate(row) if i >= prompt and token in row[:i]]
            assert not said, f"no_repeat_ngram_size=1, but {said} repeat tokens of their row {row}"
        penalised = self.free_run(repetition_penalty=3.0)
        assert not torch.equal(penalised, free), "repetition_penalty=3.0 changed nothing"

    def test_prefix_allowed_tokens_fn_sees_its_own_row(self) -> None:
        def allowed(row: int, tokens: torch.Tensor) -> list[int]:
            return list(range(3 + row, tiny_models.VOCABULARY, 3))

        for row, new in enumerate(self.free_run(prefix_allowed_tokens_fn=allowed).tolist()):
            wrong = [token for token in new if token not in allowed(row, torch.tensor(new))]
            assert not wrong, f"prefix_allowed_tokens_fn forbids {wrong} in row {row}, but the run says them"


class EndRows(StoppingCriteria):
    """End row r when it has `lengths[r]` tokens, prompt included."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths.to(input_ids.device)


class Ban(LogitsProcessor):
    """Forbid some tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, self.tokens.to(scores.device), -torch.inf)


class Recorder(BaseStreamer):
    """Keep all that was streamed. A put is a column `(batch,)`, a block `(batch, n)` or, for one row, `(n,)`."""

    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ends, "the streamer got tokens after end()"
        self.puts.append(value)

    def end(self) -> None:
        self.ends += 1

    def sequences(self) -> torch.Tensor:
        """Return all puts side by side, `(batch, length)`."""
        rows = len(self.puts[0])
        return torch.cat([put.view(rows, -1) for put in self.puts], dim=1)
