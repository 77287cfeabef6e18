"""ReDrafter: a recurrent head, its beam search, and the tree that the beams are merged to."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_ext import demo
from hf_ext.generation.heads import KangarooHead, RecurrentDrafterHead
from hf_ext.generation.recurrent_drafter import RecurrentDrafter, merge_beams
from hf_ext.layers import TargetEnds, captured
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.heads import late_token, random_head, with_random_head
from hf_ext.testing.strategy import StrategyConformance


class TestConformance(StrategyConformance):
    def strategy(self):
        return with_random_head(RecurrentDrafter, beam_width=3, draft_tokens=3)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(
        lambda model: with_random_head(RecurrentDrafter, beam_width=4, draft_tokens=3), kinds=(kind,)
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_sampled_text_follows_the_law_of_generate(settings):
    exactness.assert_sampling_law(
        lambda model: with_random_head(RecurrentDrafter, beam_width=9, draft_tokens=3),
        exactness.small_vocabulary(vocabulary=6), draws=4000, beyond=3,
        prompt=torch.tensor([[3, 5, 2]]), **settings,
    )  # fmt: skip


def paths(tree, lane):
    """Return the tokens from the root to every leaf."""
    inner = set(tree.parents[lane][: tree.size(lane)])
    found = []
    for node in range(tree.size(lane)):
        if node not in inner:
            path = []
            while node >= 0:
                path.append(int(tree.tokens[lane, node]))
                node = tree.parents[lane][node]
            found.append(tuple(path[::-1]))
    return found


@torch.no_grad()
def by_definition(head, model, text, width, depth):
    """Search beams one sequence at a time: from the target's state before the text's last token."""
    ends = TargetEnds(model)
    with captured(model, [ends.layers]) as found:
        model(torch.tensor([text]))
    hidden = found[ends.layers][:, -2]
    beams = [((), 0.0, torch.zeros_like(hidden))]
    for _ in range(depth):
        grown = []
        for path, total, state in beams:
            read = path[-1] if path else text[-1]
            logits, after = head.step(torch.tensor([read]), state, hidden, ends)
            law = logits[0].log_softmax(-1).tolist()
            grown += [((*path, token), total + chance, after) for token, chance in enumerate(law)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return {path for path, _, _ in beams}


def recorded(strategy, model, ids, **settings):
    """Run a strategy and return its drafts: the texts and the trees."""
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
    strategy.generate(model, ids, pad_token_id=tiny_models.PAD, **settings)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_tree_holds_the_beams_of_the_definition_in_every_row(kind):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    head = random_head(RecurrentDrafterHead, model)
    free = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0)
    eos = [late_token(free[:, ids.shape[1] :])]  # a row that ends before the others
    found = recorded(
        RecurrentDrafter(head, beam_width=80, draft_tokens=2), model, ids, attention_mask=mask, do_sample=False,
        max_new_tokens=16, eos_token_id=eos,
    )  # fmt: skip
    assert len({len(texts) for texts, _ in found}) > 1, "a row was meant to end early"
    grown = [len(text) - len(before) for (first, _), (second, _) in itertools.pairwise(found)
             if len(first) == len(second) for before, text in zip(first, second, strict=True)]  # fmt: skip
    assert max(grown) > 1, "nothing was accepted"
    for texts, tree in found:
        for lane, text in enumerate(texts):
            if tree.nodes:
                expected = by_definition(head, model, text, 80, max(tree.depths(lane)))
                missing = expected - set(paths(tree, lane))
                # The last of 80 beams may be another one where two are equally likely up to rounding.
                assert len(missing) <= 1, f"row {lane}, {len(text)} tokens: not drafted {sorted(missing)}"


@torch.no_grad()
def test_the_merged_tree_gives_the_logits_of_separate_beams_from_fewer_positions():
    model = tiny_models.shared("llama")
    ids = tiny_models.prompts((9,))[0]
    seen = []

    class Spied(RecurrentDrafter):
        def drafter(self, run):
            drafter = super().drafter(run)
            observe = drafter.observe

            def noting(context, verified):
                new = verified.outcomes[0].tokens
                seen.append((list(context.texts[0])[: -len(new)] if context.texts else None, verified))
                observe(context, verified)

            drafter.observe = noting
            return drafter

    strategy = Spied(random_head(RecurrentDrafterHead, model), beam_width=6, draft_tokens=4)
    strategy.generate(model, ids, do_sample=False, max_new_tokens=20)
    seen = [(text, verified) for text, verified in seen if text is not None]
    assert len(seen) > 3
    worst, merged, separate = 0.0, 0, 0
    for text, verified in seen:
        tree = verified.tree
        merged += tree.size(0)
        number = {path: node for node, path in enumerate(all_paths(tree))}
        assert len(number) == tree.size(0), "a prefix stands in the tree twice"
        for path in paths(tree, 0):
            separate += len(path)
            plain = model(torch.tensor([text + list(path)])).logits[0, len(text) :]
            nodes = [number[path[: n + 1]] + 1 for n in range(len(path))]
            worst = max(worst, float((plain - verified.logits[0, nodes]).abs().max()))
    assert worst < 1e-4, f"logits differ by up to {worst:.3g}"
    assert merged < separate, f"{merged} nodes against {separate} tokens of separate beams"


def all_paths(tree):
    found = []
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0], strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def test_merging_keeps_every_sequence_and_drops_what_no_sequence_went_on_from():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        depth, width = 4, 5
        parents = torch.randint(width, (depth, width), generator=generator).tolist()
        parents[0] = [0] * width
        # Sequences that continue the same one have different tokens, as in a beam.
        tokens = [torch.randperm(20, generator=generator)[:width].tolist() for _ in range(depth)]
        expected = set()
        for slot in (0, 2, 3):
            path = []
            for level in range(depth - 1, -1, -1):
                path.append(tokens[level][slot])
                slot = parents[level][slot]
            expected.add(tuple(path[::-1]))
        nodes, above = merge_beams(parents, tokens, [0, 2, 3])
        whole = []
        for token, parent in zip(nodes, above, strict=True):
            whole.append((*(whole[parent] if parent >= 0 else ()), token))
        prefixes = {path[:n] for path in expected for n in range(1, depth + 1)}
        assert set(whole) == prefixes
        assert len(whole) == len(prefixes), "a prefix stands there twice"


def test_beams_without_probability_are_left_out():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    head = random_head(RecurrentDrafterHead, model)
    trees = exactness.trees_of(
        RecurrentDrafter(head, beam_width=5, draft_tokens=3), model, ids, attention_mask=mask, do_sample=True, top_k=1,
        max_new_tokens=10,
    )  # fmt: skip
    assert all(len(paths(tree, lane)) == 1 for tree in trees if tree.nodes for lane in range(tree.lanes))


def test_a_beam_wider_than_the_vocabulary_holds_every_sequence():
    model = exactness.small_vocabulary(vocabulary=4)
    head = random_head(RecurrentDrafterHead, model)
    trees = exactness.trees_of(
        RecurrentDrafter(head, beam_width=30, draft_tokens=2), model, torch.tensor([[1, 2, 3]]), do_sample=False,
        max_new_tokens=12,
    )  # fmt: skip
    assert set(paths(trees[0], 0)) == set(itertools.product(range(4), repeat=2))


def test_no_drafted_tokens_is_plain_decoding():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = with_random_head(RecurrentDrafter, draft_tokens=0)
    strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=9, pad_token_id=0)
    assert (strategy.report.target_calls, strategy.report.draft_calls) == (9, 0)


def test_a_head_of_another_target_or_kind_is_refused_before_any_work(tmp_path):
    model, (ids, mask) = tiny_models.shared("gpt2"), tiny_models.prompts()
    head = random_head(RecurrentDrafterHead, tiny_models.shared("llama"))

    def calls(strategy, message):
        def run():
            with pytest.raises(ValueError, match=message):
                strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=5)

        return tiny_models.calls_of(model, run)[1]

    model.generate(ids, attention_mask=mask, custom_generate=with_random_head(RecurrentDrafter), max_new_tokens=2)
    assert calls(RecurrentDrafter(head), "model_type is gpt2, was llama") == []
    random_head(KangarooHead, model).save_pretrained(tmp_path)
    assert calls(RecurrentDrafter(tmp_path), "holds a 'kangaroo-head'") == []
    with pytest.raises(ValueError, match="head must be a RecurrentDrafterHead"):
        RecurrentDrafter(model)


def test_a_saved_head_drafts_as_the_one_that_was_saved(tmp_path):
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    head = random_head(RecurrentDrafterHead, model)
    head.save_pretrained(tmp_path)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
    ours, theirs = (exactness.trees_of(RecurrentDrafter(which), model, ids, **settings) for which in (head, tmp_path))
    assert [tree.tokens.tolist() for tree in ours] == [tree.tokens.tolist() for tree in theirs]


@pytest.mark.parametrize("options", [{"beam_width": 0}, {"draft_tokens": -1}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        with_random_head(RecurrentDrafter, **options)


def test_processes_that_share_a_model_are_refused():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    with pytest.raises(ValueError, match="sharded"):
        with_random_head(RecurrentDrafter).generate(model, ids, attention_mask=mask, synced_gpus=True, max_new_tokens=3)


def test_the_embedded_head_drafts_for_the_embedded_target():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    exactness.assert_greedy_identity(
        lambda model: RecurrentDrafter(demo.path("recurrent-drafter")), models={"the embedded target": model}
    )
