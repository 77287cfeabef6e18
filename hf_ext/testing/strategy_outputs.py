"""Checks of what a strategy hands back: scores, states, caches, sequences, seeds and the report."""

# ruff: noqa: D102  (the name of a check says what it checks)

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import PLAIN, StrategyChecks, close, refusal, result_or_refusal, same_tokens


class OutputChecks(StrategyChecks):
    """Result objects, what they hold, and the figures of the report."""

    def test_scores_and_logits_are_those_of_the_model(self, kind: str) -> None:
        ids, mask = tiny_models.prompts()
        start, banned = ids.shape[1], [[5], [89]]
        processors = LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(1.3), NoBadWordsLogitsProcessor(bad_words_ids=banned)]
        )
        out = self.run(
            kind, return_dict_in_generate=True, output_scores=True, output_logits=True, logits_processor=processors
        )
        assert isinstance(out, GenerateDecoderOnlyOutput), f"got a {type(out).__name__}"
        new = out.sequences.shape[1] - start
        shape = (len(ids), tiny_models.VOCABULARY)
        for name in ("scores", "logits"):
            found = [(tuple(step.shape), step.dtype) for step in getattr(out, name)]
            assert found == [(shape, torch.float32)] * new, f"{name} are {found}, expected {new} of {shape} float32"
        raw = full_run(tiny_models.shared(kind), out.sequences, mask).logits[:, start - 1 : -1]
        close(torch.stack(out.logits, 1), raw, f"{kind}, output_logits against one pass over the whole text")
        for step, scores in enumerate(out.scores):
            expected = processors(out.sequences[:, : start + step], out.logits[step].clone())
            known = scores.isfinite()
            close(scores[known], expected[known], f"{kind}, output_scores of token {step}", tolerance=1e-5)
            chosen = scores.gather(1, out.sequences[:, start + step, None])
            assert chosen.isfinite().all(), f"token {step} was chosen at a score of {chosen.flatten().tolist()}"
            assert not scores[:, [5, 89]].isfinite().any(), "scores do not show that bad_words_ids forbid tokens"

    def test_hidden_states_and_attentions_come_one_entry_a_token(self) -> None:
        model = tiny_models.build(PLAIN, attn_implementation="eager")
        ids, mask = tiny_models.prompts()
        start = ids.shape[1]
        out = self.run(model, return_dict_in_generate=True, output_hidden_states=True, output_attentions=True)
        new = out.sequences.shape[1] - start
        full = full_run(model, out.sequences, mask, output_hidden_states=True).hidden_states
        for name in ("hidden_states", "attentions"):
            entries = getattr(out, name)
            assert entries is not None, f"{name} are None"
            assert len(entries) == new, f"{len(entries)} entries of {name} for {new} tokens"
        for step, (states, attentions) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
            # The first entry covers the prompt, the others one token each.
            begin, end = (0, start) if step == 0 else (start + step - 1, start + step)
            real = mask.bool() if step == 0 else mask.new_ones(len(ids), 1).bool()
            assert len(states) == len(full), f"{len(states)} layers of hidden states, expected {len(full)}"
            for layer, state in enumerate(states):
                expected = full[layer][:, begin:end]
                close(state[real], expected[real], f"hidden states of token {step}, layer {layer}")
            shapes = {tuple(a.shape) for a in attentions}
            expected_shape = (len(ids), model.config.num_attention_heads, end - begin, end)
            assert shapes == {expected_shape}, f"attentions of token {step} are {shapes}, expected {expected_shape}"

    def test_a_result_object_holds_the_same_sequences(self) -> None:
        out = self.run(return_dict_in_generate=True)
        same_tokens(out.sequences, self.usual(), "sequences under return_dict_in_generate")
        extra = [name for name in ("scores", "logits", "attentions", "hidden_states") if out.get(name) is not None]
        assert not extra, f"the result holds {extra}, which nobody asked for"

    # Caches

    def test_the_returned_cache_serves_the_next_turn(self, kind: str) -> None:
        out = self.run(kind, return_dict_in_generate=True)
        if out.past_key_values is None:
            assert not self.strategy().needs_cache, "the run used a cache but did not return it"
            return
        self._check_next_turn(kind, out.sequences, out.past_key_values)

    def test_an_empty_cache_of_the_user_is_filled_for_the_next_turn(self, kind: str) -> None:
        cache = DynamicCache(config=tiny_models.shared(kind).config)
        what = f"{kind}, an empty past_key_values"
        sequences = result_or_refusal(lambda: self.run(kind, past_key_values=cache), "past_key_values", what=what)
        if sequences is not None:
            same_tokens(sequences, self.usual(kind), what)
            self._check_next_turn(kind, sequences, cache)

    def _check_next_turn(self, kind: str, sequences: torch.Tensor, cache: Any) -> None:
        assert 0 < cache.get_seq_length() <= sequences.shape[1], f"the cache holds {cache.get_seq_length()} tokens"
        model = tiny_models.shared(kind)
        following = torch.cat([sequences, sequences.new_tensor([[20, 21]]).expand(len(sequences), -1)], dim=1)
        mask = torch.ones_like(following)
        mask[:, : tiny_models.prompts()[1].shape[1]] = tiny_models.prompts()[1]
        settings: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
        anew = model.generate(following, **settings)
        continued = model.generate(following, past_key_values=cache, **settings)
        same_tokens(continued, anew, f"{kind}, greedy search from the strategy's cache against one from nothing")

    def test_a_filled_cache_is_continued_or_refused(self) -> None:
        model, (ids, mask) = tiny_models.shared(PLAIN), tiny_models.prompts()
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=1)
        strategy = self.strategy()
        following = torch.cat([ids, torch.full((len(ids), 3), 20)], dim=1)
        longer = torch.cat([mask, torch.ones(len(ids), 3, dtype=torch.long)], dim=1)
        call = lambda: self.run(ids=following, mask=longer, past_key_values=cache, strategy=strategy)  # noqa: E731
        continued = result_or_refusal(call, "past_key_values", "cache", what="a filled past_key_values")
        if continued is not None:
            same_tokens(continued, self.run(ids=following, mask=longer), "a run from a filled cache")

    def test_a_static_cache_works_or_is_refused(self) -> None:
        sequences = result_or_refusal(
            lambda: self.run(cache_implementation="static"), "cache", what="cache_implementation='static'"
        )
        if sequences is not None:
            same_tokens(sequences, self.usual(), "a run on a static cache")

    # Chance

    def test_chance_follows_the_seed(self) -> None:
        if not self.strategy().samples:
            refusal(lambda: self.run(do_sample=True), "do_sample", what="do_sample=True on a deterministic strategy")
            torch.manual_seed(0)
            before = torch.get_rng_state()
            self.run()
            assert torch.equal(before, torch.get_rng_state()), "a deterministic strategy drew random numbers"
            return
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(self.free_run(do_sample=True, top_k=0))
        same_tokens(runs[1], runs[0], "two runs from the same seed")
        assert not torch.equal(runs[2], runs[0]), f"seeds 0 and 1 gave the same tokens {runs[0].tolist()}"

    def test_num_return_sequences_gives_independent_answers(self) -> None:
        ids, _ = tiny_models.prompts()
        if not self.strategy().samples:
            refusal(
                lambda: self.run(num_return_sequences=2), "num_return_sequences", what="two answers without sampling"
            )
            return
        strategy = self.strategy()
        torch.manual_seed(0)
        out = self.run(num_return_sequences=2, do_sample=True, top_k=0, strategy=strategy)
        same_tokens(out[:, : ids.shape[1]], ids.repeat_interleave(2, 0), "the prompts under num_return_sequences=2")
        assert not torch.equal(out[0::2], out[1::2]), "both answers to every prompt are the same"
        assert strategy.report is not None, "the strategy left no report"
        assert strategy.report.rows == 2 * len(ids), f"report.rows is {strategy.report.rows}, expected {2 * len(ids)}"

    # Other inputs

    def test_embeddings_can_replace_ids_or_are_refused(self) -> None:
        ids, mask = tiny_models.prompts()
        model, strategy = tiny_models.shared(PLAIN), self.strategy()
        settings = {**self.exact(), "max_new_tokens": self.new_tokens, "pad_token_id": tiny_models.PAD}
        embeds = model.get_input_embeddings()(ids).detach()
        (new, calls) = tiny_models.calls_of(
            model,
            lambda: result_or_refusal(
                lambda: strategy.generate(model, inputs_embeds=embeds, attention_mask=mask, **settings),
                "inputs_embeds",
                what="inputs_embeds",
            ),
        )
        if new is not None:
            same_tokens(new, self.free_run(), "a run from inputs_embeds")
            self._check_calls(strategy, calls)

    def test_encoder_decoders_work_or_are_refused(self, pair: str) -> None:
        ids, mask = (t.flip(1) for t in tiny_models.prompts())  # an encoder takes padding on the right
        strategy = self.strategy()
        call = lambda: self.run(  # noqa: E731
            pair, ids=ids, mask=mask, strategy=strategy, return_dict_in_generate=True, output_scores=True
        )
        if not strategy.encoder_decoder:
            refusal(call, "encoder-decoder", what=pair)
            return
        out, calls = tiny_models.calls_of(tiny_models.shared(pair), call)
        assert isinstance(out, GenerateEncoderDecoderOutput), f"got a {type(out).__name__}"
        assert len(out.scores) == out.sequences.shape[1] - 1, f"{len(out.scores)} scores for {out.sequences.shape}"
        self._check_calls(strategy, calls)
        for row in range(len(ids)):
            alone = ids[row : row + 1, mask[row].bool()]
            single = self.run(pair, ids=alone, mask=torch.ones_like(alone))
            same_tokens(out.sequences[row : row + 1], single, f"{pair}, row {row} of a batch against the row alone")

    # The report

    def test_the_report_counts_what_happened(self, example: str) -> None:
        strategy = self.strategy()
        eos = [int(self.free_run(example)[0, 3])]
        for settings in ({}, {"eos_token_id": eos}):
            out, calls = tiny_models.calls_of(
                tiny_models.shared(example), lambda settings=settings: self.run(example, strategy=strategy, **settings)
            )
            self._check_calls(strategy, calls)
            report = strategy.report
            new = out[:, tiny_models.prompts()[0].shape[1] :].tolist()
            stops = settings.get("eos_token_id", [])
            expected = [next((i + 1 for i, t in enumerate(row) if t in stops), len(row)) for row in new]
            assert report.tokens_per_row == expected, f"tokens_per_row {report.tokens_per_row}, expected {expected}"
            assert report.tokens == sum(expected), f"report.tokens is {report.tokens}, expected {sum(expected)}"
            assert report.seconds > 0, f"report.seconds is {report.seconds}"
            assert str(report.tokens) in str(report), f"the printed report lacks its tokens: {report}"
            json.dumps(report.as_dict())

    def _check_calls(self, strategy: Any, calls: list[tuple[int, int]]) -> None:
        report = strategy.report
        assert report is not None, "the strategy left no report"
        assert report.strategy == type(strategy).__name__, f"the report is of {report.strategy!r}"
        found, found_positions = report.target_calls, report.target_positions
        if getattr(strategy, "drafts_with_target", False):  # a part of the target drafts, which hooks see as well
            found, found_positions = found + report.draft_calls, found_positions + report.details["draft_positions"]
        assert found == len(calls) > 0, f"target_calls {found}, counted {len(calls)}"
        positions = sum(rows * width for rows, width in calls)
        assert found_positions == positions, f"target_positions {found_positions}, counted {positions}"


def full_run(model: Any, sequences: torch.Tensor, mask: torch.Tensor, **settings: Any) -> Any:
    """Run the model once over whole sequences that continue the prompts of `mask`."""
    whole = torch.ones_like(sequences)
    whole[:, : mask.shape[1]] = mask
    if "position_ids" in inspect.signature(model.forward).parameters:
        settings["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=sequences, attention_mask=whole, use_cache=False, **settings)
