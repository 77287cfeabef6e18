"""Checks of what a strategy refuses, and of what it leaves behind: nothing."""

# ruff: noqa: D102  (the name of a check says what it checks)

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_ext import adapter
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import PLAIN, StrategyChecks, refusal, result_or_refusal, same_tokens
from hf_ext.testing.strategy_rows import Recorder


class RefusalChecks(StrategyChecks):
    """Bad input, settings that cannot be honoured, odd models, and traces left on the model."""

    def _both_ways(self, what: str, *words: str, ids: torch.Tensor, mask: Any, **settings: Any) -> None:
        """Fail unless the call is refused through `Strategy.generate` and through `custom_generate=`."""
        model = settings.pop("model", tiny_models.shared(PLAIN))
        settings = {**self.exact(), "max_new_tokens": 3, "pad_token_id": tiny_models.PAD, **settings}
        ways: dict[str, Callable[[], Any]] = {
            "Strategy.generate": lambda: self.strategy().generate(model, ids, attention_mask=mask, **settings),
        }
        if ids.shape[1]:  # without a column, transformers fails before it calls the strategy
            ways["custom_generate="] = lambda: model.generate(
                ids, attention_mask=mask, custom_generate=self.strategy(), **settings
            )
        for way, call in ways.items():
            refusal(call, *words, what=f"{what}, through {way}")

    def test_bad_prompts_are_refused(self) -> None:
        ids, mask = tiny_models.prompts()
        self._both_ways("an empty prompt", "empty", ids=ids[:, :0], mask=mask[:, :0])
        self._both_ways("an empty prompt without a mask", "empty", ids=ids[:, :0], mask=None)
        self._both_ways("a mask too short", "attention_mask", ids=ids, mask=mask[:, 1:])
        self._both_ways("a mask of ones too short", "attention_mask", ids=ids, mask=torch.ones_like(ids)[:, 1:])
        self._both_ways("a mask of too few rows", "attention_mask", ids=ids, mask=mask[1:])
        self._both_ways("a row of padding", "row 1", ids=ids, mask=mask * torch.tensor([[1], [0], [1]]))
        self._both_ways("padding on the right", "right", "padding_side", ids=ids.flip(1), mask=mask.flip(1))

    def test_a_prompt_longer_than_the_context_is_refused(self) -> None:
        ids, mask = tiny_models.prompts((tiny_models.CONTEXT + 1, 4))
        self._both_ways("a prompt too long", str(tiny_models.CONTEXT), ids=ids, mask=mask)
        if self.strategy().encoder_decoder and "bart" in self.encoder_decoders:
            words = str(tiny_models.CONTEXT)
            refusal(lambda: self.run("bart", ids=ids, mask=mask), words, what="an encoder's prompt too long")
        # Padding does not count: this prompt has as many columns, but few real tokens.
        ids, mask = tiny_models.pad_left(*tiny_models.prompts((6, 4)), tiny_models.CONTEXT)
        self.run(ids=ids, mask=mask, max_new_tokens=2)

    def test_settings_of_other_methods_are_refused(self) -> None:
        ids, mask = tiny_models.prompts()
        own = self.strategy().options()
        others: dict[str, Any] = {"num_beams": 2, "prompt_lookup_num_tokens": 3, "penalty_alpha": 0.6}
        others["num_assistant_tokens"] = 7
        for name, value in others.items():
            if name not in own:
                self._both_ways(f"{name}={value}", name, ids=ids, mask=mask, **{name: value})

    def test_an_option_given_to_generate_with_another_value_is_refused(self) -> None:
        for name, value in self.strategy().options().items():
            from_config = hasattr(tiny_models.shared(PLAIN).generation_config, name)
            if from_config and isinstance(value, (int, float)) and not isinstance(value, bool):
                ids, mask = tiny_models.prompts()
                self._both_ways(f"{name} given twice", name, ids=ids, mask=mask, **{name: value + 1})

    def test_an_assistant_and_a_second_strategy_are_refused(self) -> None:
        assistant = tiny_models.shared("llama")
        refusal(lambda: self.run(assistant_model=assistant), "assistant_model", what="assistant_model")
        refusal(lambda: self.run(custom_generate="x/y"), "custom_generate", what="custom_generate")

    def test_no_cache_works_or_is_refused(self) -> None:
        sequences = result_or_refusal(lambda: self.run(use_cache=False), "cache", what="use_cache=False")
        assert (sequences is None) >= self.strategy().needs_cache, "it says needs_cache, but runs without one"
        if sequences is not None:
            same_tokens(sequences, self.usual(), "a run without a cache")

    def test_models_with_another_state_work_or_are_refused(self) -> None:
        ids = tiny_models.prompts((9, 9))[0]
        for kind, why in (("mamba", "a recurrent state"), ("openai-gpt", "no cache at all")):
            model = tiny_models.shared(kind)
            batch = result_or_refusal(
                lambda model=model: self.run(model, ids=ids, mask=torch.ones_like(ids)),
                "cache",
                "state",
                what=f"{kind}, a model with {why}",
            )
            if batch is not None:
                single = self.run(model, ids=ids[1:], mask=torch.ones_like(ids[1:]))
                same_tokens(batch[1:], single, f"{kind}, a row of a batch against the row alone")

    # What stays behind

    def test_the_model_is_left_as_it_was(self) -> None:
        model = tiny_models.build(PLAIN)
        untouched = self.run(model)
        for training in (False, True):
            for error in (None, RuntimeError("stop here")):
                model.train(training)
                before = traces(model)
                strategy = self.strategy()
                raised = None
                try:
                    self.run(model, strategy=strategy, logits_processor=LogitsProcessorList([Fails(error)]))
                except RuntimeError as caught:
                    raised = caught
                assert raised is error, f"expected the processor's own error {error!r}, got {raised!r}"
                after = traces(model)
                changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
                assert not changed, f"the run ({training=}, {error=}) changed {changed}"
                same_tokens(self.run(model, strategy=strategy), untouched, "a run with the same strategy afterwards")

    def test_bfloat16_runs(self, example: str) -> None:
        model = tiny_models.build(example).to(torch.bfloat16)
        out = self.run(model, return_dict_in_generate=True, output_scores=True)
        new = out.sequences.shape[1] - tiny_models.prompts()[0].shape[1]
        assert new == self.new_tokens, f"{new} new tokens in bfloat16, expected {self.new_tokens}"
        assert out.scores[0].dtype == torch.float32, f"scores are {out.scores[0].dtype}, expected float32"
        assert not torch.stack(out.scores).isnan().any(), "scores hold NaN"

    def test_steps_for_other_processes_add_nothing(self, example: str) -> None:
        # Under FSDP or ZeRO-3 a process that is done must call forward until all are.
        eos = [int(self.free_run(example)[0, 3])]
        model, steps, streamer = tiny_models.shared(example), iter(range(3)), Recorder()
        expected, usual = tiny_models.calls_of(model, lambda: self.run(example, eos_token_id=eos))

        def wait(_: Any, finished: bool, *__: Any, **___: Any) -> bool:
            return not finished or next(steps, None) is not None

        settings = {"eos_token_id": eos, "streamer": streamer, "return_dict_in_generate": True}
        with mock.patch.object(adapter, "any_row_unfinished", wait):
            out, calls = tiny_models.calls_of(model, lambda: self.run(example, **settings))
        same_tokens(out.sequences, expected, f"{example}, a run that waits three steps for others")
        same_tokens(streamer.sequences(), expected, f"{example}, what was streamed by a run that waits for others")
        assert len(calls) > len(usual), f"{len(calls)} forward passes while others wait, {len(usual)} without"

    def test_the_code_does_not_bind_itself_to_a_device(self) -> None:
        module = sys.modules[type(self.strategy()).__module__]
        found = device_bound(inspect.getsource(module))
        assert not found, f"{module.__name__} binds itself to a device: {'; '.join(found)}"


class Fails(LogitsProcessor):
    """Raise an error at the third call, if there is one to raise."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.calls = error, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.error is not None and self.calls == 3:
            raise self.error
        return scores


def traces(model: Any) -> dict[str, Any]:
    """Return what a decoding call could change on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "training mode": [module.training for module in model.modules()],
        "hooks": sum(len(getattr(module, name)) for module in model.modules() for name in hooks),
        "attributes": sorted(vars(model)),
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "weights": [(name, weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()],
        "weight sums": [float(weight.detach().double().sum()) for weight in model.parameters()],
    }


def device_bound(source: str) -> list[str]:
    """Find calls that put tensors on a device other than that of their input.

    Example:
        >>> device_bound("x = torch.zeros(3)")
        ['line 1: torch.zeros without device=']
        >>> device_bound("x = torch.zeros(3, device=y.device)")
        []
    """
    found = []
    factories = {"arange", "zeros", "ones", "full", "empty", "tensor", "rand", "randn", "eye", "linspace"}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, base = node.func.attr, node.func.value
        if name in ("cuda", "cpu"):
            found.append(f"line {node.lineno}: .{name}()")
        on_torch = isinstance(base, ast.Name) and base.id == "torch" and name in factories
        if on_torch and not any(keyword.arg == "device" for keyword in node.keywords):
            found.append(f"line {node.lineno}: torch.{name} without device=")
    return found
