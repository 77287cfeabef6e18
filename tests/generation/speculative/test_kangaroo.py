"""Kangaroo: shallow layers and an adapter draft until they are unsure, with a cache of the adapter's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from hf_ext import demo
from hf_ext.generation.heads import KangarooHead, RecurrentDrafterHead
from hf_ext.generation.kangaroo import Kangaroo
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.layers import TargetEnds, captured
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.heads import late_token, random_head, with_random_head
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import same_tokens


class TestConformance(StrategyConformance):
    def strategy(self):
        return with_random_head(Kangaroo, draft_tokens=3, confidence=0.05)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(
        lambda model: with_random_head(Kangaroo, draft_tokens=4, confidence=0.04), kinds=(kind,)
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_sampled_text_follows_the_law_of_generate(settings):
    # Confidence in the middle of what the drafts have, so that rows stop at different places.
    exactness.assert_sampling_law(
        lambda model: with_random_head(Kangaroo, draft_tokens=4, confidence=0.3),
        exactness.small_vocabulary(vocabulary=6), draws=4000, beyond=3,
        prompt=torch.tensor([[3, 5, 2]]), **settings,
    )  # fmt: skip


@dataclass
class Step:
    """A draft: the texts it continued, the tokens that each shallow pass read, its logits, and the tree."""

    texts: list[list[int]]
    tokens: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    tree: DraftTree | None = None


def recorded(strategy, model, ids, lengths=None, **settings):
    """Run a strategy and return its drafts; `lengths` are those of the drafts, if not the strategy's own."""
    steps, make = [], strategy.drafter

    def spied(run):
        drafter = make(run)
        evaluate, propose = drafter.evaluate, drafter.propose

        def noting_all(context):
            if lengths is not None:
                drafter.length = lengths[len(steps) % len(lengths)]
            steps.append(Step([list(text) for text in context.texts]))
            steps[-1].tree = propose(context)
            return steps[-1].tree

        def noting(context, tokens):
            steps[-1].tokens.append(tokens.tolist())
            steps[-1].logits.append(evaluate(context, tokens))
            return steps[-1].logits[-1]

        drafter.evaluate, drafter.propose = noting, noting_all
        return drafter

    strategy.drafter = spied
    strategy.generate(model, ids, pad_token_id=tiny_models.PAD, **settings)
    return steps


@torch.no_grad()
def by_definition(head, model, text):
    """Run the adapter over a whole text at once; return the logits after it."""
    ids, exit_layer = torch.tensor([text]), head.config.exit_layer
    with captured(model, [exit_layer]) as found:
        model(ids)
    return head.logits(found[exit_layer], torch.arange(len(text))[None], TargetEnds(model))[0, -1]


def assert_drafts_are_the_definitions(head, model, steps):
    worst = 0.0
    for step in steps:
        for lane, text in enumerate(step.texts):
            for at, logits in enumerate(step.logits):
                read = text[:-1] + [tokens[lane] for tokens in step.tokens[: at + 1]]
                worst = max(worst, float((by_definition(head, model, read) - logits[lane]).abs().max()))
    assert worst < 1e-4, f"draft logits differ by up to {worst:.3g} from those of the whole text"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("confidence", [0.0, 0.05])
def test_drafts_are_those_of_the_adapter_over_the_whole_text_in_every_row(kind, confidence):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    head = random_head(KangarooHead, model)
    free = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)
    eos = [late_token(free[:, ids.shape[1] :])]  # a row that ends before the others
    found = recorded(
        Kangaroo(head, draft_tokens=3, confidence=confidence), model, ids, attention_mask=mask, do_sample=False,
        max_new_tokens=20, eos_token_id=eos,
    )  # fmt: skip
    assert len(found) > 4
    assert len({len(step.texts) for step in found}) > 1, "a row was meant to end early"
    assert_drafts_are_the_definitions(head, model, found)


def test_a_prompt_may_be_read_in_chunks():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    head = random_head(KangarooHead, model)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
    found = recorded(Kangaroo(head, confidence=0.0), model, ids, prefill_chunk_size=5, **settings)
    assert_drafts_are_the_definitions(head, model, found)


def test_steps_without_drafts_leave_no_hole_in_what_the_adapter_has_read():
    model, ids = tiny_models.shared("llama"), tiny_models.prompts((9,))[0]
    head = random_head(KangarooHead, model)
    found = recorded(Kangaroo(head, confidence=0.0), model, ids, [3, 0, 0], do_sample=False, max_new_tokens=24)
    assert {step.tree.nodes for step in found[:4]} == {0, 3}
    assert_drafts_are_the_definitions(head, model, found)


def test_drafting_stops_before_a_token_of_which_the_adapter_is_unsure():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    head, settings = random_head(KangarooHead, model), {"attention_mask": mask, "do_sample": False}
    free = recorded(Kangaroo(head, draft_tokens=5, confidence=0.0), model, ids, max_new_tokens=30, **settings)
    # A threshold that half of the drafted tokens do not reach.
    threshold = torch.cat([logits.softmax(-1).amax(-1) for step in free for logits in step.logits]).median().item()
    strategy = Kangaroo(head, draft_tokens=5, confidence=threshold)
    found = recorded(strategy, model, ids, max_new_tokens=30, **settings)
    sizes, expected = [], []
    for step in found[:6]:  # towards the end drafts are short for want of room
        chances = [logits.softmax(-1).amax(-1) for logits in step.logits]
        for lane in range(step.tree.lanes):
            sizes.append(step.tree.sizes[lane])
            unsure = [place for place, chance in enumerate(chances[:5]) if place and chance[lane] < threshold]
            expected.append(min(unsure, default=5))
    assert sizes == expected, f"drafted {sizes} tokens, by the threshold {expected}"
    assert len(set(sizes)) > 2, f"the threshold was meant to matter, but all drafts have {set(sizes)} tokens"


@pytest.mark.parametrize("confidence", [0.0, 0.05])
def test_the_first_layers_run_once_for_every_token(confidence):
    """Verification starts from the exit states: no position of the first layers is evaluated twice in a step."""
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts((9,))
    counts = [0, 0]

    def counting(number):
        def hook(layer, args, kwargs):
            if "forward" not in vars(layer):  # a layer that is left out has another forward for the time
                states = args[0] if args else kwargs["hidden_states"]
                counts[number] += states.shape[1]

        return hook

    hooks = [
        layer.register_forward_pre_hook(counting(number), with_kwargs=True)
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        strategy = Kangaroo(random_head(KangarooHead, model), draft_tokens=4, confidence=confidence)
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts[0] == counts[1], f"the first layer evaluated {counts[0]} positions, the last {counts[1]}"


def test_a_head_whose_drafts_are_the_target_is_always_right():
    # An adapter that passes the exit state on, behind a layer that adds nothing: its drafts are the target's.
    model = tiny_models.build("llama")
    head = KangarooHead.for_target(model, exit_layer=1)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        head.out.weight.zero_()
    ids, mask = tiny_models.prompts()
    for settings in ({"do_sample": False}, {"do_sample": True}):
        strategy = Kangaroo(head, draft_tokens=4, confidence=0.0)
        strategy.generate(model, ids, attention_mask=mask, max_new_tokens=21, pad_token_id=0, **settings)
        # The second norm of the head changes the scale only, which the target's final norm takes out again.
        assert strategy.report.details["mean_accepted"] > 3.9, strategy.report.details["mean_accepted"]


def test_no_drafted_tokens_is_plain_decoding():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = with_random_head(Kangaroo, draft_tokens=0)
    strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=9, pad_token_id=0)
    assert (strategy.report.target_calls, strategy.report.draft_calls) == (9, 0)


def test_a_model_that_a_trainer_has_put_under_autocast_drafts_and_reads_in_one_dtype():
    """After training with `bf16=True` the forward pass stays under autocast; what is outside of it is not."""
    model, (ids, mask) = tiny_models.build("llama"), tiny_models.prompts()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    strategy = Kangaroo(random_head(KangarooHead, model), draft_tokens=3, confidence=0.0)
    same_tokens(strategy.generate(model, ids, **settings), model.generate(ids, **settings), "under autocast")
    assert strategy.report.draft_calls


def test_a_head_of_another_target_or_kind_is_refused_before_any_work(tmp_path):
    model, (ids, mask) = tiny_models.shared("gpt2"), tiny_models.prompts()
    model.generate(ids, attention_mask=mask, custom_generate=with_random_head(Kangaroo), max_new_tokens=2)
    strategy = Kangaroo(random_head(KangarooHead, tiny_models.shared("llama")))

    def run():
        with pytest.raises(ValueError, match="model_type is gpt2, was llama"):
            strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=5)

    assert tiny_models.calls_of(model, run)[1] == []
    with pytest.raises(ValueError, match=r"head must be a KangarooHead.* of type RecurrentDrafterHead"):
        Kangaroo(random_head(RecurrentDrafterHead, model))
    for folder, words in ((tmp_path, "no saved head.*save_pretrained"), (tmp_path / "gone" / "x", "cannot load a")):
        with pytest.raises(ValueError, match=words):
            Kangaroo(folder).generate(model, ids, attention_mask=mask)


def test_a_head_that_is_trained_further_drafts_as_it_is_now():
    target = tiny_models.build("llama").to(torch.bfloat16)  # for which the strategy has a copy of the head
    head = random_head(KangarooHead, target)
    strategy = Kangaroo(head)
    assert strategy.head_for(target) is strategy.head_for(target)
    with torch.no_grad():
        head.out.weight.mul_(2)
    assert torch.equal(strategy.head_for(target).out.weight, head.out.weight.to(torch.bfloat16))
    assert strategy.head_for(tiny_models.shared("llama")) is head


@pytest.mark.parametrize("options", [{"confidence": 1.5}, {"draft_tokens": -1}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        with_random_head(Kangaroo, **options)


def test_the_embedded_head_drafts_for_the_embedded_target():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    exactness.assert_greedy_identity(
        lambda model: Kangaroo(demo.path("kangaroo")), models={"the embedded target": model}, new_tokens=24
    )
