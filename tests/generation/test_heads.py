"""Draft heads and the hooks they stand on, on every architecture: steps, caches, trees and saved weights."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, DynamicCache, FalconConfig, FalconForCausalLM

from hf_ext import demo
from hf_ext.demo.corpus import sources
from hf_ext.demo.train_heads import HEADS as RECIPES
from hf_ext.demo.train_heads import embedded_target
from hf_ext.generation.heads import HiddenTransferHead, KangarooHead, RecurrentDrafterHead
from hf_ext.generation.heads.base import visible
from hf_ext.generation.heads.hidden_transfer import as_attention_mask
from hf_ext.layers import TargetEnds, captured, decoder_layers, edited, only_layers
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import refusal

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
KINDS = [(kind, {}) for kind in tiny_models.DECODERS]
KINDS += [("gemma3", {"final_logit_softcapping": 5.0}), ("opt", {"word_embed_proj_dim": 16})]
each_model = pytest.mark.parametrize(("kind", "changes"), KINDS)


def scrambled(head):
    """Give a fresh head weights that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return head.eval()


def close(got, expected, most=1e-5):
    difference = float((got - expected).abs().max())
    assert difference <= most, f"differs by up to {difference:.3g}"


# States


@each_model
@torch.no_grad()
def test_states_run_through_the_rest_of_the_model_give_its_logits(kind, changes):
    model = tiny_models.build(kind, **changes)
    with captured(model, [0, 1, 2]) as states:
        whole = model(IDS).logits
    with only_layers(model, 1, states=states[1]):
        close(model(IDS).logits, whole, 0)
    close(TargetEnds(model).logits(states[2]), whole, 0)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model))
    close(model(IDS).logits, whole, 0)


@each_model
def test_gradients_flow_through_the_ends_into_the_state(kind, changes):
    model = tiny_models.build(kind, **changes)
    ends, state = TargetEnds(model), torch.randn(2, 3, 32, requires_grad=True)
    ends.logits(state).square().sum().backward()
    assert float(state.grad.abs().max()) > 0


def test_soft_capped_and_projected_models_take_the_slow_way_and_others_the_short_one():
    taken = {
        (kind, *changes): TargetEnds(tiny_models.build(kind, **changes)).shortcut is None for kind, changes in KINDS
    }
    assert {name for name, slow in taken.items() if slow} == {
        ("gemma3", "final_logit_softcapping"),
        ("opt", "word_embed_proj_dim"),
    }


@torch.no_grad()
def test_layers_below_an_exit_fill_only_their_part_of_the_cache():
    model, cache = tiny_models.build("llama"), DynamicCache()
    with only_layers(model, 0, 1):
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length(0) == 6
    assert len(cache.layers) == 1 or cache.get_seq_length(1) == 0


@torch.no_grad()
def test_a_failing_pass_leaves_no_hook_and_no_forward_behind():
    model = tiny_models.build("llama")
    with pytest.raises(IndexError), edited(model, {1: torch.zeros_like}), only_layers(model, 1), captured(model, [2]):
        model(torch.tensor([[999]]))
    for layer in decoder_layers(model):
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        assert "forward" not in vars(layer)


def test_a_model_whose_layers_return_tuples_is_refused_with_its_reason():
    falcon = FalconForCausalLM(FalconConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    refusal(lambda: TargetEnds(falcon), "FalconForCausalLM", "without its layers", what="layers that return tuples")


def test_states_that_do_not_exist_are_refused():
    model = tiny_models.shared("llama")
    with pytest.raises(ValueError, match="from 0 to 2"), captured(model, [3]):
        pass
    with pytest.raises(ValueError, match="layers 2 to 1"), only_layers(model, 2, 1):
        pass
    with pytest.raises(ValueError, match="encoder-decoder"):
        decoder_layers(tiny_models.shared("t5"))


# Kangaroo


@torch.no_grad()
def test_kangaroo_step_by_step_over_a_cache_equals_one_pass():
    target = tiny_models.shared("llama")
    head, ends = scrambled(KangarooHead.for_target(target, exit_layer=1)), TargetEnds(target)
    with captured(target, [1]) as states:
        target(IDS)
    positions = torch.arange(6).expand(2, 6)
    whole, cache = head.logits(states[1], positions, ends), DynamicCache()
    parts = [head.logits(states[1][:, a:b], positions[:, a:b], ends, cache=cache) for a, b in ((0, 3), (3, 4), (4, 6))]
    close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 6


@torch.no_grad()
def test_kangaroo_tree_mask_gives_each_branch_what_it_has_alone():
    """Two children of one root under a boolean mask, in a left-padded row, see what they would see as chains."""
    target = tiny_models.shared("llama")
    head = scrambled(KangarooHead.for_target(target, exit_layer=1))
    states = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    tree, positions = states[:, [0, 1, 2, 3, 4, 5]], torch.tensor([[0, 0, 1, 2, 3, 3]])
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 0, 0] = True  # padding
    for query, seen in {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [1, 2, 3, 5]}.items():
        mask[0, 0, query, seen] = True
    together = head(tree, positions, mask)
    for leaf in (4, 5):
        alone = head(states[:, [1, 2, 3, leaf]], torch.arange(4)[None])
        close(together[:, [1, 2, 3, leaf]], alone)


@torch.no_grad()
def test_kangaroo_positions_matter_only_relatively():
    head = scrambled(KangarooHead.for_target(tiny_models.shared("llama"), exit_layer=1))
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    close(head(states, torch.arange(5)[None]), head(states, torch.arange(7, 12)[None]), 1e-4)
    assert float((head(states, torch.arange(5)[None]) - head(states, torch.arange(5)[None] * 3)).abs().max()) > 1e-3


# Recurrent drafter


@each_model
@torch.no_grad()
def test_recurrent_steps_are_the_formula(kind, changes):
    target = tiny_models.build(kind, **changes)
    head, ends = scrambled(RecurrentDrafterHead.for_target(target, blocks=1)), TargetEnds(target)
    hidden, tokens = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 6, 7])
    state, expected = head.first_state(hidden), torch.zeros(3, 32)
    for _ in range(3):
        logits, state = head.step(tokens, state, hidden, ends)
        mixed = expected @ head.from_state.weight.T + ends.embed(tokens) @ head.from_token.weight.T
        expected = torch.nn.functional.silu(mixed + head.from_token.bias)
        close(state, expected)
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * head.norm.weight
        z = torch.cat((expected, normed), -1)
        z = z + torch.nn.functional.silu(z @ head.blocks[0].weight.T + head.blocks[0].bias)
        close(logits, ends.logits(z @ head.out.weight.T), 1e-4)
        tokens = logits.argmax(-1)


@torch.no_grad()
def test_recurrent_training_predicts_what_its_steps_predict():
    """The training loss on one row is that of drafting from every position with `step`."""
    target = tiny_models.shared("llama")
    head, ends = scrambled(RecurrentDrafterHead.for_target(target, train_steps=3)), TargetEnds(target)
    row = IDS[:1]
    with captured(target, [2]) as states:
        outputs = target(row)
    targets = torch.cat((row[:, 1:], torch.tensor([[-100]])), 1)
    terms = head.training_terms(ends, {"input_ids": row}, targets, states, outputs, None)
    total = 0.0
    for start in range(6):
        hidden = states[2][0, start : start + 1]
        state = head.first_state(hidden)
        for step in range(1, 4):
            if start + step + 1 < 6:  # there is a token after it to be taught
                logits, state = head.step(row[0, start + step : start + step + 1], state, hidden, ends)
                wanted = outputs.logits[0, start + step].softmax(-1)
                total -= float((wanted * logits[0].log_softmax(-1)).sum()) / 3
    assert float(terms["loss"][0]) == pytest.approx(total, rel=1e-5)
    assert int(terms["loss"][1]) == 5


# Hidden transfer


@each_model
@torch.no_grad()
def test_pseudo_tokens_in_one_pass_are_those_of_the_training_pass_and_do_not_disturb(kind, changes):
    """Extra columns of the target's own forward give the logits that training computes over its cache."""
    if "sliding_window" in vars(tiny_models.shared(kind).config) and kind in ("mistral", "gemma3"):
        changes = {**changes, "sliding_window": 64}
    target = tiny_models.build(kind, **changes)
    head, ends = scrambled(HiddenTransferHead.for_target(target, transfer_layers=(1, 1))), TargetEnds(target)
    anchors = torch.tensor([[1, 3], [4, 0]])
    with captured(target, [1]) as states:
        plain = target(IDS, past_key_values=DynamicCache(), use_cache=True)
    expected = head._pseudo_logits(ends, {"input_ids": IDS}, anchors, states, plain.past_key_values)

    columns = torch.cat((IDS, torch.zeros(2, 4, dtype=torch.long)), 1)
    step = torch.tensor([0] * 6 + [1, 2, 1, 2]).expand(2, -1)
    owners = torch.cat((torch.zeros(2, 6, dtype=torch.long), anchors.repeat_interleave(2, 1)), 1)
    positions = torch.where(step > 0, owners + step, torch.arange(10))
    mask = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    mask[:, 0, :6, :6] = torch.ones(6, 6, dtype=torch.bool).tril()
    for row in range(2):
        for column in range(6, 10):
            mask[row, 0, column, : owners[row, column] + 1] = True
            mask[row, 0, column, column] = True
            if step[row, column] == 2:
                mask[row, 0, column, column - 1] = True
    with edited(target, head.edits(step, owners)):
        out = target(columns, attention_mask=as_attention_mask(target, mask), position_ids=positions).logits
    close(out[:, :6], plain.logits, 1e-4)
    close(out[:, 6:].view(2, 2, 2, -1), expected, 1e-4)
    assert float((out[0, 6] - plain.logits[0, 1]).abs().max()) > 1e-3, "the pseudo token is its source"


def test_anchors_have_their_future_in_the_row():
    head = HiddenTransferHead.for_target(tiny_models.shared("llama"), transfer_layers=(1, 1), anchors=4)
    targeted = torch.tensor([[True] * 5 + [False], [True] * 2 + [False] * 4, [False, True, True, True, False, False]])
    anchors, valid = head.draw_anchors(targeted, torch.rand(3, 6, generator=torch.Generator().manual_seed(0)))
    chosen = [sorted(a[v].tolist()) for a, v in zip(anchors, valid, strict=True)]
    assert chosen == [[0, 1, 2], [], [1]]


def test_a_window_too_narrow_for_training_is_refused():
    target = tiny_models.build("mistral")
    head, ids = HiddenTransferHead.for_target(target), torch.arange(5, 25)[None]
    with captured(target, [1]) as states:
        out = target(ids, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="window of 8"):
        head._pseudo_logits(TargetEnds(target), {"input_ids": ids}, torch.tensor([[3]]), states, out.past_key_values)


def test_transfer_layers_must_not_fall():
    with pytest.raises(ValueError, match="do not fall"):
        HiddenTransferHead.for_target(tiny_models.shared("llama"), transfer_layers=(2, 1))


# All heads


def test_packed_documents_do_not_see_each_other():
    batch = {"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert visible(batch)[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("kind", [KangarooHead, RecurrentDrafterHead, HiddenTransferHead])
def test_saved_heads_come_back_and_refuse_another_target(kind, tmp_path):
    target = tiny_models.shared("llama")
    head = scrambled(kind.for_target(target))
    head.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(head.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    again.check_target(target)
    with pytest.raises(ValueError, match="model_type is gpt2, was llama"):
        again.check_target(tiny_models.shared("gpt2"))


@torch.no_grad()
def test_hidden_transfer_is_taught_the_targets_words_at_the_true_future_tokens():
    """The training loss on one row is that of its anchors' pseudo tokens, each worth its share of the targets."""
    target = tiny_models.shared("llama")
    head = scrambled(HiddenTransferHead.for_target(target, transfer_layers=(1, 1), anchors=2))
    ends, row = TargetEnds(target), IDS[:1]
    with captured(target, [1]) as states:
        outputs = target(row, past_key_values=DynamicCache(), use_cache=True)
    targets = torch.cat((row[:, 1:], torch.tensor([[-100]])), 1)
    numbers = torch.tensor([[0.3, 0.1, 0.8, 0.2, 0.9, 0.7]])  # the best with two tokens to come: 2, then 0
    terms = head.training_terms(ends, {"input_ids": row}, targets, states, outputs, lambda batch, per_document: numbers)
    with captured(target, [1]) as states:
        outputs = target(row, past_key_values=DynamicCache(), use_cache=True)
    drafted = head._pseudo_logits(
        ends, {"input_ids": row}, torch.tensor([[2, 0]]), states, outputs.past_key_values
    ).log_softmax(-1)
    total = 0.0
    for index, anchor in enumerate((2, 0)):
        for step in (1, 2):
            wanted = outputs.logits[0, anchor + step].softmax(-1)
            total -= float((wanted * drafted[0, index, step - 1]).sum()) * 5 / 2 / 2  # targets, anchors, steps
    assert float(terms["loss"][0]) == pytest.approx(total, rel=1e-5)
    assert int(terms["loss"][1]) == 5


# The embedded heads


@pytest.fixture(scope="module")
def held_out():
    target = embedded_target().eval()
    tokens = [source.text for source in sources(held_out=True) if source.name in ("heapq.py", "textwrap.py")]
    tokenizer = AutoTokenizer.from_pretrained(demo.path("tokenizer"))
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:512] for text in tokens])
    return target, {"input_ids": ids}, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("name", sorted(RECIPES))
@torch.no_grad()
def test_embedded_heads_agree_with_the_target_as_often_as_their_recipe_says(name, held_out):
    target, batch, targets = held_out
    kind, _ = RECIPES[name]
    head = kind.from_pretrained(demo.path(name), dtype=torch.float32).eval()
    head.check_target(target)
    recipe = json.loads((Path(demo.path(name)) / "recipe.json").read_text())
    with captured(target, head.trained_on) as states:
        outputs = target(**batch, past_key_values=DynamicCache(), use_cache=True)
    numbers = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    terms = head.training_terms(
        TargetEnds(target), batch, targets, dict(states), outputs, lambda batch, per_document: numbers
    )
    first = "agreement" if "agreement" in terms else "agreement_1"
    found, recorded = float(terms[first][0]) / int(terms[first][1]), recipe["held_out_after"][first]
    assert recorded > recipe["held_out_before"][first] + 0.1
    assert abs(found - recorded) < 0.15, f"{found:.3f} on two files, {recorded} on all held-out windows"


@torch.no_grad()
def test_the_embedded_adapters_make_the_third_layer_agree_more_often(held_out):
    target, batch, _ = held_out
    recipe = json.loads((Path(demo.path("layerskip")) / "recipe.json").read_text())

    def agreement(model):
        ends = TargetEnds(model)
        with captured(model, [3]) as states:
            last = model(**batch).logits.argmax(-1)
        return float((ends.logits(states[3]).argmax(-1) == last).float().mean())

    before = agreement(target)
    after = agreement(PeftModel.from_pretrained(embedded_target(), demo.path("layerskip")).eval())
    assert after > before + 0.03, f"agreement {before:.3f} before, {after:.3f} after"
    assert abs(after - recipe["held_out_after"]["agreement_3"]) < 0.15


def test_the_embedded_heads_are_small():
    size = sum(file.stat().st_size for name in demo.HEADS for file in Path(demo.path(name)).glob("*.safetensors"))
    assert 0 < size < 4e6, f"{size / 1e6:.1f} MB"
