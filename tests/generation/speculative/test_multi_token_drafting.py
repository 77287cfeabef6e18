"""Heads that predict several tokens: what they are taught, what they draft, and that the text stays the target's."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.heads import MultiTokenHead
from hf_ext.generation.multi_token_drafting import MultiTokenDrafting
from hf_ext.layers import TargetEnds, captured
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.heads import random_head, with_random_head
from hf_ext.testing.strategy import StrategyConformance


class TestConformance(StrategyConformance):
    def strategy(self):
        return with_random_head(MultiTokenDrafting, width=3, nodes=6)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(
        lambda model: with_random_head(MultiTokenDrafting, width=4, nodes=10), kinds=(kind,)
    )


def test_sampled_text_follows_the_law_of_generate():
    exactness.assert_sampling_law(
        lambda model: with_random_head(MultiTokenDrafting, width=3, nodes=9),
        exactness.small_vocabulary(vocabulary=6), draws=4000, beyond=3, prompt=torch.tensor([[3, 5, 2]]),
        temperature=0.7,
    )  # fmt: skip


@torch.no_grad()
def test_the_likeliest_tokens_of_every_head_are_drafted_from_the_state_before_the_root():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    head = random_head(MultiTokenHead, model)
    strategy = MultiTokenDrafting(head, width=2, nodes=40)
    found, make = [], strategy.drafter

    def spied(run):
        drafter = make(run)
        propose = drafter.propose

        def noting(context):
            found.append(([list(text) for text in context.texts], propose(context)))
            return found[-1][1]

        drafter.propose = noting
        return drafter

    strategy.drafter = spied
    strategy.generate(model, ids, attention_mask=mask, pad_token_id=0, do_sample=False, max_new_tokens=12)
    ends, checked = TargetEnds(model), 0
    for texts, tree in found:
        for lane, text in enumerate(texts):
            if not tree.nodes:
                continue
            with captured(model, [ends.layers]) as states:
                model(torch.tensor([text]))
            hidden = states[ends.layers][0, -2]
            for node, depth in enumerate(tree.depths(lane)):
                best = ends.logits(head(hidden, depth)).topk(3).indices.tolist()
                assert int(tree.tokens[lane, node]) in best, f"node {node} at depth {depth}"
                checked += 1
            assert max(tree.depths(lane)) <= head.config.heads
    assert checked > 50


@torch.no_grad()
def test_every_head_is_taught_the_targets_own_words_at_its_place():
    target = tiny_models.shared("llama")
    head = random_head(MultiTokenHead, target)
    ends, ids = TargetEnds(target), torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    targets[1, :2] = -100  # a prompt
    with captured(target, [2]) as states:
        outputs = target(ids)
    terms = head.training_terms(ends, {"input_ids": ids}, targets, states, outputs, None)
    total, places = 0.0, dict.fromkeys(range(1, head.config.heads + 1), 0)
    for row in range(2):
        for place in range(6):
            for number in places:
                if place + number > 5 or (targets[row, place : place + number + 1] == -100).any():
                    continue
                drafted = ends.logits(head(states[2][row, place], number)).log_softmax(-1)
                teacher = outputs.logits[row, place + number].softmax(-1)
                total -= float((teacher * drafted).sum()) / head.config.heads
                places[number] += 1
    assert float(terms["loss"][0]) == pytest.approx(total, rel=1e-5)
    assert int(terms["loss"][1]) == 8
    assert [int(terms[f"agreement_{number}"][1]) for number in places] == list(places.values())
    assert places[1] == 6


def test_an_untrained_head_repeats_the_next_token_and_learns_from_there():
    target = tiny_models.shared("llama")
    head = MultiTokenHead.for_target(target)
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for number in range(1, head.config.heads + 1):
        assert torch.equal(head(states, number), states)
    head(states, 2).square().sum().backward()
    assert head.down[1].weight.grad.abs().max() > 0


def test_saved_heads_come_back_and_refuse_another_target(tmp_path):
    target = tiny_models.shared("llama")
    head = random_head(MultiTokenHead, target)
    head.save_pretrained(tmp_path)
    again = MultiTokenHead.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(head.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match="model_type is gpt2, was llama"):
        again.check_target(tiny_models.shared("gpt2"))
    with pytest.raises(ValueError, match="heads must be 1 at least"):
        MultiTokenHead.for_target(target, heads=0)


@pytest.mark.parametrize("options", [{"width": 0}, {"nodes": 0}, {"head": 3}])
def test_wrong_options_are_refused(options):
    given = {"head": MultiTokenHead.for_target(tiny_models.shared("llama"))} | options
    with pytest.raises(ValueError, match=next(iter(options))):
        MultiTokenDrafting(**given).generate(tiny_models.shared("llama"), torch.tensor([[5, 6]]), max_new_tokens=4)
