"""Contrastive search keeps to the contract of strategies and chooses the tokens it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_ext.generation import ContrastiveSearch
from hf_ext.generation.contrastive_search import contrastive_choice
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens

REFERENCE = Path(__file__).parent / "reference" / "contrastive_reference.json"
RUNS: list[dict[str, Any]] = json.loads(REFERENCE.read_text(encoding="utf-8"))["runs"]
ALL_KINDS = (*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS)


class TestConformance(StrategyConformance):
    def strategy(self) -> ContrastiveSearch:
        return ContrastiveSearch(penalty_alpha=0.6, top_k=4)


@pytest.mark.parametrize("kind", sorted({run["kind"] for run in RUNS}))
def test_tokens_are_those_of_transformers_4_55(kind: str) -> None:
    for run in (run for run in RUNS if run["kind"] == kind):
        ids, mask = tiny_models.prompts(tuple(run["lengths"]))
        strategy = ContrastiveSearch(penalty_alpha=run["alpha"], top_k=run["k"])
        ours = tiny_models.shared(kind).generate(ids, attention_mask=mask, custom_generate=strategy, **run["settings"])
        what = {name: value for name, value in run.items() if name != "tokens"}
        same_tokens(ours, torch.tensor(run["tokens"]), f"against transformers 4.55.4, {what}")


@torch.no_grad()
def by_running_everything_again(
    model: Any, ids: torch.Tensor, alpha: float, k: int, new: int
) -> tuple[list[int], float]:
    """Equation 5 for one row, spelled out: no cache, no batch, no padding, one candidate at a time."""
    tokens, penalties, encoder = ids.tolist(), [], {}
    if model.config.is_encoder_decoder:
        encoder, tokens = {"input_ids": ids[None]}, [model.config.decoder_start_token_id]
    start = len(tokens)

    def look(tokens: list[int]) -> Any:
        name = "decoder_input_ids" if encoder else "input_ids"
        out = model(**encoder, **{name: torch.tensor([tokens])}, use_cache=False, output_hidden_states=True)
        states = out.decoder_hidden_states if encoder else out.hidden_states
        return out.logits[0, -1].float().softmax(-1), states[-1][0]

    for _ in range(new):
        probabilities = look(tokens)[0]
        best: tuple[float, int, float] | None = None
        for candidate in probabilities.topk(k).indices.tolist():
            states = look([*tokens, candidate])[1]
            penalty = max(float(torch.cosine_similarity(states[-1], earlier, dim=0)) for earlier in states[:-1])
            score = (1 - alpha) * float(probabilities[candidate]) - alpha * penalty
            if best is None or score > best[0]:
                best = score, candidate, penalty
        assert best is not None
        tokens.append(best[1])
        penalties.append(best[2])
    return tokens[start:], sum(penalties) / new


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_tokens_are_those_of_the_equation_without_cache_batch_or_padding(kind: str) -> None:
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts((9, 6))
    if model.config.is_encoder_decoder:  # with absolute positions, padding goes to the right of an encoder's text
        ids, mask = ids.flip(1), mask.flip(1)
    strategy = ContrastiveSearch(penalty_alpha=0.6, top_k=3)
    ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=10)[:, -10:]
    expected = [
        by_running_everything_again(model, row[on.bool()], 0.6, 3, 10) for row, on in zip(ids, mask, strict=True)
    ]
    same_tokens(ours, torch.tensor([tokens for tokens, _ in expected]), f"{kind} against the equation")
    assert strategy.report is not None
    measured, mean = strategy.report.details["mean_penalty"], sum(penalty for _, penalty in expected) / len(expected)
    assert abs(measured - mean) < 1e-4, f"{kind}: mean_penalty {measured}, by the equation {mean}"


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("options", [{"penalty_alpha": 0.0}, {"top_k": 1}], ids=["alpha=0", "k=1"])
def test_without_penalty_or_choice_it_is_greedy_search(kind: str, options: dict[str, Any]) -> None:
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20}
    greedy = model.generate(ids, do_sample=False, **settings)
    same_tokens(ContrastiveSearch(**options).generate(model, ids, **settings), greedy, f"{kind}, {options}")


@pytest.mark.parametrize("kind", ["llama", "mistral", "bart"])
def test_the_prompt_is_run_once_and_every_candidate_costs_one_position(kind: str) -> None:
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    rows, length = (len(ids), 1) if model.config.is_encoder_decoder else ids.shape
    strategy, steps, k = ContrastiveSearch(top_k=5), 11, 5
    _, calls = tiny_models.calls_of(
        model, lambda: strategy.generate(model, ids, attention_mask=mask, max_new_tokens=steps)
    )
    assert calls == [(rows, length)] + [(rows * k, 1)] * steps, f"forward passes (rows, positions) were {calls}"
    assert strategy.report is not None
    expected = rows * length + steps * rows * k
    assert strategy.report.target_positions == expected, f"{strategy.report.target_positions}, expected {expected}"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_returned_cache_is_what_greedy_search_would_return(kind: str) -> None:
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    # 12 + 20 tokens: the sliding windows of 8 have moved on four times.
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "return_dict_in_generate": True}
    ours = ContrastiveSearch(penalty_alpha=0.0).generate(model, ids, **settings).past_key_values
    greedy = model.generate(ids, do_sample=False, **settings).past_key_values
    lengths = ours.get_seq_length(), greedy.get_seq_length()
    assert lengths[0] == lengths[1], f"{kind}: the cache holds {lengths[0]} tokens, after greedy search {lengths[1]}"
    pairs = [(ours, greedy)]
    if model.config.is_encoder_decoder:
        pairs = [
            (getattr(ours, name), getattr(greedy, name)) for name in ("self_attention_cache", "cross_attention_cache")
        ]
    for mine, theirs in pairs:
        for number, (layer, other) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
            assert type(layer) is type(other)
            close(layer.keys, other.keys, f"{kind}, keys of layer {number}", tolerance=1e-5)
            close(layer.values, other.values, f"{kind}, values of layer {number}", tolerance=1e-5)
            assert not getattr(layer, "record_past", False), f"{kind}: layer {number} still records what it should drop"


def test_a_filled_cache_is_refused_because_its_hidden_states_are_gone() -> None:
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    refusal(
        lambda: ContrastiveSearch().generate(model, ids, attention_mask=mask, past_key_values=cache),
        "hidden states",
        what="a filled cache",
    )


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"cache_implementation": "static"}, "fixed batch size"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"do_sample": True}, "do_sample=False"),
        ({"top_k": 7}, "ContrastiveSearch(top_k=7)"),
        ({"penalty_alpha": 0.3, "top_k": 4}, "ContrastiveSearch(penalty_alpha=0.3)"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_way_out(settings: dict[str, Any], word: str) -> None:
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    call = lambda: model.generate(  # noqa: E731
        ids, attention_mask=mask, max_new_tokens=2, custom_generate=ContrastiveSearch(), **settings
    )
    refusal(call, word, what=str(settings))


def test_the_same_options_may_be_given_to_generate_as_well() -> None:
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    settings: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "custom_generate": ContrastiveSearch(0.5, 3),
    }
    twice = model.generate(ids, penalty_alpha=0.5, top_k=3, **settings)
    same_tokens(twice, model.generate(ids, **settings), "penalty_alpha and top_k given twice")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be a positive int, got 0"),
        ({"top_k": 2.5}, "top_k must be a positive int, got 2.5"),
        ({"penalty_alpha": 1.2}, "penalty_alpha must be a number from 0 to 1, got 1.2"),
        ({"penalty_alpha": "0.6"}, "penalty_alpha must be a number from 0 to 1, got '0.6'"),
        ({"penalty_alpha": float("nan")}, "penalty_alpha must be a number from 0 to 1, got nan"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ContrastiveSearch(**options)


def test_more_candidates_than_the_vocabulary_has_are_all_of_it() -> None:
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    whole, beyond = (
        ContrastiveSearch(top_k=k).generate(model, ids, attention_mask=mask, max_new_tokens=4)
        for k in (tiny_models.VOCABULARY, 1000)
    )
    same_tokens(beyond, whole, "top_k=1000 of 96 tokens")


def test_the_choice_weighs_probability_against_the_nearest_earlier_token() -> None:
    context = torch.eye(4)[None, :3]  # tokens said before: x, y, z
    candidates = torch.stack([torch.eye(4)[0] * 5, torch.eye(4)[3] * 0.1])[None]  # x again, and w; lengths do not count
    probabilities = torch.tensor([[0.7, 0.3]])
    seen = torch.tensor([[True, True, True]])
    for alpha, expected in ((0.0, 0), (0.28, 0), (0.29, 1), (1.0, 1)):  # they are level at 0.4 (1 - a) = a
        choice, penalty = contrastive_choice(probabilities, candidates, context, seen, alpha)
        assert choice.tolist() == [expected], f"alpha={alpha} chose candidate {choice.tolist()}"
        assert penalty.tolist() == pytest.approx([1.0 - expected])
    # Where x is padding, repeating it costs nothing.
    choice, penalty = contrastive_choice(probabilities, candidates, context, torch.tensor([[False, True, True]]), 1.0)
    assert (choice.tolist(), penalty.tolist()) == ([0], [0.0])
