"""The conformance suite passes a strategy that is right and catches those that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation import MaxLengthCriteria
from transformers.utils import ModelOutput

from hf_ext.generation import DecodingStrategy
from hf_ext.generation.run import DecodingRun
from hf_ext.testing.strategy import StrategyConformance, failures


@dataclass
class Sampling(DecodingStrategy):
    """What `generate` does itself: sampling, or greedy search under `do_sample=False`."""

    needs_cache: ClassVar[bool] = False

    def decode(self, run: DecodingRun) -> None:
        self.choose(run, run.prefill())
        while run.running:
            self.choose(run, run.forward(run.input_ids))

    def choose(self, run: DecodingRun, outputs: ModelOutput) -> None:
        logits = outputs.logits[:, -1]
        scores = run.process(logits)
        run.commit(self.pick(run, scores), scores=scores, logits=logits, outputs=outputs)

    def pick(self, run: DecodingRun, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1).multinomial(1)[:, 0] if run.config.do_sample else scores.argmax(-1)


class TestSampling(StrategyConformance):
    models = ("gpt2", "llama", "mistral")
    encoder_decoders = ("bart",)
    new_tokens = 9

    def strategy(self) -> Sampling:
        return Sampling()


class Greedy(Sampling):
    samples: ClassVar[bool] = False


def broken(check: str, kind: str = "llama") -> Callable[[type[DecodingStrategy]], type[DecodingStrategy]]:
    """Say which check has to catch the strategy, and on which model."""

    def mark(strategy: type[DecodingStrategy]) -> type[DecodingStrategy]:
        BROKEN.append((strategy, check, kind))
        return strategy

    return mark


BROKEN: list[tuple[type[DecodingStrategy], str, str]] = []


@broken("test_a_row_of_a_padded_batch_gets_what_it_gets_alone")
@broken("test_more_padding_changes_nothing")
class IgnoresPadding(Greedy):
    def decode(self, run: DecodingRun) -> None:
        for name in ("attention_mask", "position_ids"):
            run.model_kwargs[name] = None
        super().decode(run)


@broken("test_a_row_of_a_padded_batch_gets_what_it_gets_alone", kind="gpt2")
class CountsPositionsFromThePadding(Greedy):
    def decode(self, run: DecodingRun) -> None:
        columns = run.model_kwargs["position_ids"].shape[1]
        run.model_kwargs["position_ids"] = torch.arange(columns, device=run.input_ids.device)[None]
        super().decode(run)


@broken("test_a_row_of_a_padded_batch_gets_what_it_gets_alone")
class LetsRowsMix(Greedy):
    def pick(self, run: DecodingRun, scores: torch.Tensor) -> torch.Tensor:
        return (scores + 0.5 * scores.mean(0)).argmax(-1)


@broken("test_eos_ends_its_row_and_padding_follows")
@broken("test_a_stopping_criterion_ends_single_rows")
@broken("test_max_time_ends_the_run")
@broken("test_stop_strings_end_a_row")
class KnowsOnlyTheLength(Greedy):
    def decode(self, run: DecodingRun) -> None:
        lengths = [criterion for criterion in run.stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
        run.stopping_criteria = StoppingCriteriaList(lengths)
        super().decode(run)


@broken("test_eos_ends_its_row_and_padding_follows")
class ForgetsToPad(Greedy):
    def decode(self, run: DecodingRun) -> None:
        run.pad_token_id = None
        super().decode(run)


@broken("test_a_streamer_gets_the_prompt_then_every_token_once")
@broken("test_streamed_text_is_the_decoded_result")
class DropsTheStreamer(Greedy):
    def decode(self, run: DecodingRun) -> None:
        run.streamer = None
        super().decode(run)


@broken("test_streamed_text_is_the_decoded_result")
class StreamsTwice(Greedy):
    def pick(self, run: DecodingRun, scores: torch.Tensor) -> torch.Tensor:
        picked = super().pick(run, scores)
        if run.streamer is not None:
            run.streamer.put(picked)
        return picked


@broken("test_a_user_processor_decides_what_can_be_said")
@broken("test_settings_that_become_processors_are_kept")
@broken("test_prefix_allowed_tokens_fn_sees_its_own_row")
@broken("test_scores_and_logits_are_those_of_the_model")
@broken("test_lengths_are_kept")
class IgnoresProcessors(Greedy):
    def decode(self, run: DecodingRun) -> None:
        run.logits_processor = type(run.logits_processor)()
        super().decode(run)


@broken("test_prefix_allowed_tokens_fn_sees_its_own_row")
class ProcessesRowsInAnotherOrder(Greedy):
    def decode(self, run: DecodingRun) -> None:
        process = run.process
        run.process = lambda logits: process(logits.flip(0)).flip(0)
        super().decode(run)


@broken("test_scores_and_logits_are_those_of_the_model")
@broken("test_hidden_states_and_attentions_come_one_entry_a_token")
class KeepsNoOutputs(Greedy):
    def decode(self, run: DecodingRun) -> None:
        commit = run.commit
        run.commit = lambda tokens, **_: commit(tokens)
        super().decode(run)


@broken("test_the_report_counts_what_happened")
class CountsWrong(Greedy):
    def decode(self, run: DecodingRun) -> None:
        super().decode(run)
        run.report.target_calls -= 1


@broken("test_the_report_counts_what_happened")
@broken("test_eos_ends_its_row_and_padding_follows")
class CountsPaddingAsTokens(Greedy):
    def __call__(self, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(model, input_ids, *args, **kwargs)
        if isinstance(result, torch.Tensor) and self.report is not None:
            self.report.tokens_per_row = [result.shape[1] - input_ids.shape[1]] * len(result)
        return result


@broken("test_the_returned_cache_serves_the_next_turn")
@broken("test_an_empty_cache_of_the_user_is_filled_for_the_next_turn")
class SpoilsTheCache(Greedy):
    def decode(self, run: DecodingRun) -> None:
        super().decode(run)
        run.cache.reorder_cache(torch.arange(len(run.input_ids), device=run.input_ids.device).flip(0))


@broken("test_the_model_is_left_as_it_was")
class LeavesAHook(Greedy):
    def decode(self, run: DecodingRun) -> None:
        hook = run.model.register_forward_hook(lambda *_: None)
        super().decode(run)
        hook.remove()  # not reached when a processor raises


@broken("test_the_model_is_left_as_it_was")
class SwitchesToEval(Greedy):
    def decode(self, run: DecodingRun) -> None:
        run.model.eval()
        super().decode(run)


@broken("test_the_model_is_left_as_it_was")
class RemembersTheLastRun(Greedy):
    def decode(self, run: DecodingRun) -> None:
        self.runs = getattr(self, "runs", 0) + 1
        super().decode(run)

    def pick(self, run: DecodingRun, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(self.runs).indices[:, -1]


@broken("test_settings_of_other_methods_are_refused")
class IgnoresBeams(Greedy):
    def __call__(self, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        generation_config.num_beams = 1
        return super().__call__(*args, generation_config=generation_config, **kwargs)


@broken("test_chance_follows_the_seed")
class SaysItDoesNotSample(Sampling):
    samples: ClassVar[bool] = False

    def pick(self, run: DecodingRun, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1).multinomial(1)[:, 0]


@broken("test_chance_follows_the_seed")
@broken("test_num_return_sequences_gives_independent_answers")
class SaysItSamples(Sampling):
    def pick(self, run: DecodingRun, scores: torch.Tensor) -> torch.Tensor:
        return scores.argmax(-1)


@broken("test_steps_for_other_processes_add_nothing")
class DoesNotWait(Greedy):
    def decode(self, run: DecodingRun) -> None:
        self.choose(run, run.prefill())
        while run.any_unfinished:
            self.choose(run, run.forward(run.input_ids))


@pytest.mark.parametrize(("strategy", "check", "kind"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_strategy_is_caught(strategy: type[DecodingStrategy], check: str, kind: str) -> None:
    class Suite(StrategyConformance):
        models = (kind,)
        new_tokens = 9

        def strategy(self) -> DecodingStrategy:
            return strategy()

    found = failures(Suite, only=check)
    assert found, f"{strategy.__name__} passed {check}"
    for name, message in found.items():
        assert message.startswith("AssertionError: "), f"{name} broke down instead of saying what differs: {message}"
