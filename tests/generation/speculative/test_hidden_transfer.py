"""Hidden transfer: pseudo tokens ride on the verification pass, and their logits are the next draft."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_ext import demo
from hf_ext.generation.heads import HiddenTransferHead, KangarooHead
from hf_ext.generation.hidden_transfer import HiddenTransfer, likeliest_paths, possible_paths
from hf_ext.layers import edited
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.heads import late_token, random_head, with_random_head
from hf_ext.testing.strategy import StrategyConformance


class TestConformance(StrategyConformance):
    def strategy(self):
        return with_random_head(HiddenTransfer, width=3, nodes=5)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: with_random_head(HiddenTransfer, width=3, nodes=7), kinds=(kind,))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_sampled_text_follows_the_law_of_generate(settings):
    # A call drafts from its second step on: two tokens are there by then.
    exactness.assert_sampling_law(
        lambda model: with_random_head(HiddenTransfer, width=4, nodes=7),
        exactness.small_vocabulary(vocabulary=5), draws=3000, length=4, beyond=3,
        prompt=torch.tensor([[3, 4, 2]]), **settings,
    )  # fmt: skip


def recorded(strategy, model, ids, **settings):
    """Run a strategy; return for every draft the texts, the pseudo tokens' logits it came from, and the tree."""
    found, make = [], strategy.drafter

    def spied(run):
        drafter = make(run)
        propose = drafter.propose

        def noting(context):
            texts, pseudo = [list(text) for text in context.texts], drafter._pseudo
            found.append((texts, pseudo, propose(context)))
            return found[-1][2]

        drafter.propose = noting
        return drafter

    strategy.drafter = spied
    strategy.generate(model, ids, pad_token_id=tiny_models.PAD, **settings)
    return found


@torch.no_grad()
def by_definition(head, model, text):
    """Let pseudo tokens follow a plain text in a plain pass; return their `(steps, vocabulary)` logits."""
    steps, length = head.steps, len(text)
    step = torch.tensor([[0] * length + list(range(1, steps + 1))])
    source = torch.full_like(step, length - 1)
    with edited(model, head.edits(step, source)):
        return model(torch.tensor([text + [0] * steps])).logits[0, length:]


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_drafts_come_from_the_pseudo_tokens_behind_the_last_accepted_one_in_every_row(kind):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    head = random_head(HiddenTransferHead, model)
    free = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)
    eos = [late_token(free[:, ids.shape[1] :])]  # a row that ends before the others
    # With all tokens as candidates some are accepted, even of an untrained head.
    found = recorded(
        HiddenTransfer(head, width=96, nodes=150), model, ids, attention_mask=mask, do_sample=False, max_new_tokens=20,
        eos_token_id=eos,
    )  # fmt: skip
    assert found[0][1] is None, "nothing is known of the first draft"
    assert len({len(texts) for texts, _, _ in found}) > 1, "a row was meant to end early"
    grown = [len(text) - len(before) for (first, _, _), (second, _, _) in itertools.pairwise(found)
             if len(first) == len(second) for before, text in zip(first, second, strict=True)]  # fmt: skip
    assert max(grown) > 1, "nothing was accepted"
    worst = 0.0
    for texts, pseudo, tree in found[1:]:
        for lane, text in enumerate(texts):
            expected = by_definition(head, model, text[:-1])
            worst = max(worst, float((expected - pseudo[lane]).abs().max()))
            if tree.nodes:
                assert int(tree.tokens[lane, 0]) == int(expected[0].argmax()), "candidates of another row"
    assert worst < 1e-4, f"the logits of pseudo tokens differ by up to {worst:.3g} from those of a plain pass"


@pytest.mark.parametrize("nodes", [1, 9, 40])
def test_a_tree_is_made_of_the_likeliest_of_all_paths(nodes):
    generator = torch.Generator().manual_seed(0)
    laws = torch.randn(5, 3, 4, generator=generator).log_softmax(-1).sort(-1, descending=True).values
    everything = [path for length in (1, 2, 3) for path in itertools.product(range(4), repeat=length)]
    numbers, parents = likeliest_paths(laws, nodes)
    paths, _ = possible_paths(4, 3, nodes)
    for lane in range(5):
        chance = {path: float(sum(laws[lane, level, rank] for level, rank in enumerate(path))) for path in everything}
        expected = set(sorted(chance, key=chance.get, reverse=True)[:nodes])
        found = [paths[number] for number in numbers[lane]]
        assert set(found) == expected
        above = [found[parent] if parent >= 0 else () for parent in parents[lane]]
        assert above == [path[:-1] for path in found]


def test_paths_without_probability_and_certain_ones_still_are_trees():
    certain = torch.tensor([[[0.0, float("-inf")]] * 3, [[float("-inf")] * 2] * 3])
    for nodes in range(1, 15):
        numbers, parents = likeliest_paths(certain, nodes)
        paths, _ = possible_paths(2, 3, nodes)
        for lane in range(2):
            found = [paths[number] for number in numbers[lane]]
            assert all(path[:-1] in [(), *found] for path in found)
            assert len(parents[lane]) == min(nodes, 14)


def test_more_nodes_accept_more_and_nothing_is_called_for_a_draft():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts((12, 7, 3, 9))
    calls, accepted = [], []
    for nodes in (1, 6, 30, 120):
        strategy = HiddenTransfer(random_head(HiddenTransferHead, model), width=80, nodes=nodes)
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0)
        calls.append(strategy.report.draft_calls)
        accepted.append(strategy.report.details["mean_accepted"])
    assert calls == [0] * 4
    assert accepted[0] < accepted[1] < accepted[-1], accepted


def test_pseudo_tokens_ride_under_the_root_and_every_node():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    head = random_head(HiddenTransferHead, model)
    trees = exactness.trees_of(
        HiddenTransfer(head, width=3, nodes=4), model, ids, attention_mask=mask, do_sample=False, max_new_tokens=12
    )
    assert trees[0].candidates == [0, 0, 0]
    assert trees[0].parents == [[-1, 0, 1]] * 3
    tree = trees[1]
    assert tree.candidates == [4, 4, 4]
    assert tree.nodes == 4 + 5 * head.steps
    for parents in tree.parents:
        chains = [parents[4 + at * 3 : 7 + at * 3] for at in range(5)]
        assert chains == [[at - 1, 4 + at * 3, 5 + at * 3] for at in range(5)]


def test_a_static_cache_that_is_nearly_full_gets_smaller_trees():
    model = tiny_models.shared("llama")
    ids = tiny_models.prompts((9,))[0]
    expected = model.generate(ids, do_sample=False, max_new_tokens=14)
    for nodes in (1, 5, 20):
        strategy = with_random_head(HiddenTransfer, nodes=nodes)
        ours = strategy.generate(model, ids, do_sample=False, max_new_tokens=14, cache_implementation="static")
        assert ours.tolist() == expected.tolist()


def test_a_head_of_another_target_or_kind_is_refused_before_any_work():
    model, (ids, mask) = tiny_models.shared("gpt2"), tiny_models.prompts()
    model.generate(ids, attention_mask=mask, custom_generate=with_random_head(HiddenTransfer), max_new_tokens=2)
    strategy = HiddenTransfer(random_head(HiddenTransferHead, tiny_models.shared("llama")))

    def run():
        with pytest.raises(ValueError, match="model_type is gpt2, was llama"):
            strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=5)

    assert tiny_models.calls_of(model, run)[1] == []
    with pytest.raises(ValueError, match="head must be a HiddenTransferHead"):
        HiddenTransfer(random_head(KangarooHead, model))


@pytest.mark.parametrize("options", [{"width": 0}, {"nodes": -1}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        with_random_head(HiddenTransfer, **options)


def test_the_embedded_head_drafts_for_the_embedded_target():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    exactness.assert_greedy_identity(
        lambda model: HiddenTransfer(demo.path("hidden-transfer")), models={"the embedded target": model}
    )
