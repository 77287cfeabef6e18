"""Methods that draft with a part of the target: LayerSkip, and Draft & Verify."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from hf_ext.generation.draft_and_verify import DraftAndVerify, every_second_layer
from hf_ext.generation.heads import RecurrentDrafterHead
from hf_ext.generation.layerskip import LayerSkip
from hf_ext.generation.prompt_lookup import PromptLookup
from hf_ext.generation.recurrent_drafter import RecurrentDrafter
from hf_ext.generation.speculative.sublayers import sublayers, weight_share, without
from hf_ext.layers import only_layers
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.heads import random_head
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import refusal, same_tokens

DEEP = {
    kind: tiny_models.build(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 4})
    for kind in ("gpt2", "llama", "qwen3", "mistral", "opt")
}
DEEP["gemma3"] = tiny_models.build(
    "gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
)


class TestLayerSkip(StrategyConformance):
    def strategy(self):
        return LayerSkip(exit_layer=1, draft_tokens=3)


class TestDraftAndVerify(StrategyConformance):
    def strategy(self):
        return DraftAndVerify(skip=("attention.1",), draft_tokens=3)


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(
    "build",
    [
        lambda model: LayerSkip(exit_layer=3, draft_tokens=3),
        lambda model: DraftAndVerify(skip=("attention.1", "attention.2"), draft_tokens=4),
    ],
    ids=["layerskip", "attention-left-out"],
)
def test_greedy_text_is_that_of_generate(build, kind):
    exactness.assert_greedy_identity(build, models={kind: DEEP[kind]})


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
@pytest.mark.parametrize(
    "build",
    [
        lambda model: LayerSkip(exit_layer=2, draft_tokens=5, confidence=0.2),
        lambda model: DraftAndVerify(draft_tokens=4, confidence=0.1, acceptance=None),
    ],
    ids=["layerskip-confident", "every-second-layer"],
)
def test_greedy_text_stays_when_drafts_stop_early(build, kind):
    exactness.assert_greedy_identity(build, models={kind: DEEP[kind]})


SKIP, CONFIDENT, LEAVE_OUT = (
    lambda model: LayerSkip(exit_layer=2, draft_tokens=2),
    lambda model: LayerSkip(exit_layer=2, draft_tokens=2, confidence=0.3),
    lambda model: DraftAndVerify(skip=("mlp.1", "attention.2"), draft_tokens=2),
)
SHAPED = {"temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize(
    ("build", "settings"),
    [(SKIP, {}), (SKIP, SHAPED), (CONFIDENT, {"repetition_penalty": 1.4}), (LEAVE_OUT, {}), (LEAVE_OUT, SHAPED)],
)
def test_sampled_text_follows_the_law_of_generate(build, settings):
    exactness.assert_sampling_law(build, exactness.small_vocabulary(num_hidden_layers=4), **settings)


@torch.no_grad()
def test_early_exits_draft_what_the_first_layers_say():
    """The first draft after a prompt is the argmax of the shallow model on it, and the deep layers never draft."""
    model = DEEP["llama"]
    ids, mask = tiny_models.prompts((9, 5))
    seen = []

    class Watched(LayerSkip):
        def law(self, logits, tree, context):
            seen.append((tree, [list(text) for text in context.texts]))
            return logits

    Watched(exit_layer=2, draft_tokens=3).generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    for tree, texts in seen[1:]:
        for lane, text in enumerate(texts):
            for place in range(tree.nodes):
                line = text + tree.tokens[lane, :place].tolist()
                with only_layers(model, 0, 2):
                    shallow = model(torch.tensor([line]), use_cache=False).logits[0, -1]
                # The shallow layers read the deep model's cache, which is their own: same layers, same states.
                assert int(shallow.argmax()) == int(tree.tokens[lane, place]), f"lane {lane}, place {place}"


def test_verification_runs_the_deep_layers_only():
    model = DEEP["llama"]
    ids, mask = tiny_models.prompts((9, 5))
    counts = [0] * 4
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, at=i: counts.__setitem__(at, counts[at] + 1))
        for i, layer in enumerate(model.model.layers)
    ]
    undrafted = []

    class Watched(LayerSkip):
        def law(self, logits, tree, context):
            undrafted.append(not tree.nodes)
            return logits

    strategy = Watched(exit_layer=2, draft_tokens=3)
    strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=12)  # the model is asked first
    counts[:], undrafted[:] = [0] * 4, []
    strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    for hook in hooks:
        hook.remove()
    report = strategy.report
    assert counts[2:] == [report.target_calls] * 2, "deep layers run once a step and once for the prompt"
    # The last step has nothing left to draft; and `law` is asked about the prompt, too.
    assert counts[:2] == [report.draft_calls + sum(undrafted)] * 2, "shallow layers run once a token"


def test_the_search_leaves_out_what_does_nothing():
    model = tiny_models.build("llama", num_hidden_layers=4)
    with torch.no_grad():
        for name in ("attention.2", "mlp.1"):
            part = sublayers(model)[name]
            (part.o_proj if name.startswith("attention") else part.down_proj).weight.zero_()
    ids, mask = tiny_models.prompts((40, 40, 40, 25))
    calls = []
    found = DraftAndVerify.search(model, ids, mask, progress=lambda done, total: calls.append((done, total)))
    assert {"attention.2", "mlp.1"} <= set(found), f"found {found}"
    assert calls[-1][0] <= calls[-1][1] == 200
    strategy = DraftAndVerify(skip=("attention.2", "mlp.1"), draft_tokens=4, confidence=0.0)
    strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    assert strategy.report.details["mean_accepted"] == 4.0, "parts that add nothing are not missed"


def test_a_feed_forward_part_that_knows_its_layer_is_not_taken_for_attention():
    config = HunYuanDenseV1Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    assert list(sublayers(HunYuanDenseV1ForCausalLM(config))) == ["attention.0", "mlp.0"]


def test_parts_that_are_left_out_come_back():
    model = tiny_models.build("gpt2")
    ids, _ = tiny_models.prompts((9,))
    before = model(ids).logits
    with without(model, ["attention.1"]), without(model, ["mlp.0"]):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert all("forward" not in vars(part) for part in sublayers(model).values())
    assert weight_share(model, []) == 1.0
    assert 0 < weight_share(model, ["mlp.0"]) < weight_share(model, ["attention.1"]) < 1


def test_experts_that_tell_more_than_states_can_be_left_out():
    model, (ids, mask) = tiny_models.build("gpt_oss"), tiny_models.prompts((9, 4))
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": tiny_models.PAD}
    ours = DraftAndVerify(skip=("mlp.0", "attention.1"), draft_tokens=3).generate(model, ids, **settings)
    same_tokens(ours, model.generate(ids, **settings), "drafts without experts")


@pytest.mark.parametrize("adapters", ["of a row", "a prompt"])
def test_adapters_that_a_tree_would_misread_are_refused(adapters):
    config = (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        if adapters == "a prompt"
        else LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    model, (ids, mask) = get_peft_model(tiny_models.build("llama"), config).eval(), tiny_models.prompts()
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    if adapters == "of a row":
        settings["adapter_names"] = ["default", "__base__", "default"]
    words = ("learned prompt",) if adapters == "a prompt" else ("adapter_names", "set_adapter")
    for strategy in (LayerSkip(), PromptLookup()):
        with pytest.raises(ValueError, match="PEFT") as refused:
            strategy.generate(model, **settings)
        assert all(word in str(refused.value) for word in words), refused.value


def test_what_was_read_with_the_prompt_is_not_read_again():
    """A model with as many layers for images as for text: the right ones draft, and the image comes once."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": 96, "eos_token_id": None, "pad_token_id": 0, **sizes}
    image = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16, **sizes}
    config = LlavaConfig(
        vision_config=image, text_config=text, image_token_id=95, vision_feature_layer=-1, tie_word_embeddings=False
    )
    model, (ids, mask) = tiny_models.fill(LlavaForConditionalGeneration(config)), tiny_models.prompts((12, 8))
    ids = ids.masked_fill(ids == 95, 94)
    ids[:, 5:9] = 95
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, pixel_values=pixels, **settings)
    head = random_head(RecurrentDrafterHead, model)
    for strategy in (LayerSkip(exit_layer=1), PromptLookup(), RecurrentDrafter(head), DraftAndVerify()):
        ours = strategy.generate(model, ids, pixel_values=pixels, **settings)
        same_tokens(ours, expected, f"{type(strategy).__name__} on a text with an image")


@pytest.mark.parametrize("method", [DraftAndVerify, RecurrentDrafter])
def test_a_model_with_its_weights_elsewhere_drafts_with_itself(method):
    """`cpu_offload` leaves weights on `meta` until they are used."""
    model, (ids, mask) = tiny_models.build("llama"), tiny_models.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    cpu_offload(model, execution_device=torch.device("cpu"))
    head = getattr(method, "head_class", None)
    strategy = method() if head is None else method(head.for_target(model))
    same_tokens(strategy.generate(model, ids, **settings), expected, f"{method.__name__}, offloaded")


def test_nothing_left_out_drafts_nothing():
    ids, mask = tiny_models.prompts((9,))
    model = tiny_models.shared("llama")
    strategy = DraftAndVerify(skip=())
    ours = strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
    same_tokens(ours, model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8), "skip=()")
    assert strategy.report.draft_calls == 0


def test_wrong_options_are_refused():
    ids, mask = tiny_models.prompts((9,))
    model = tiny_models.shared("llama")
    run = lambda strategy: strategy.generate(model, ids, attention_mask=mask, max_new_tokens=3)  # noqa: E731
    refusal(lambda: run(LayerSkip(exit_layer=2)), "2 layers", what="an exit after the last layer")
    refusal(lambda: run(DraftAndVerify(skip=("mlp.7",))), "mlp.7", what="a part that is not there")
    refusal(lambda: DraftAndVerify(skip="mlp.1"), "names of parts", what="a text as skip")
    refusal(lambda: LayerSkip(exit_layer=0), "exit_layer", what="an exit before the first layer")
    refusal(lambda: DraftAndVerify(confidence=1.5), "confidence", what="a confidence above 1")


def test_every_second_layer_leaves_the_ends_in():
    assert every_second_layer(DEEP["llama"]) == ("attention.1", "mlp.1")
    assert every_second_layer(tiny_models.shared("llama")) == ("attention.1", "mlp.1")
