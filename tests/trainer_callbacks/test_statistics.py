"""A loss of per-token statistics is the same with the logits and without, on stock models of several shapes."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_ext.testing.example_objectives import Focal
from hf_ext.testing.objective import ONE_GRADIENT
from hf_ext.testing.objective_processes import with_lora
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    logged,
    train,
    weights,
)
from hf_ext.testing.tiny_models import build
from hf_ext.trainer_callbacks import Objective
from hf_ext.trainer_callbacks.plain_head import PlainHead


@dataclass(eq=False)
class Everything(Objective):
    """Use every statistic there is."""

    statistics_needed: ClassVar[frozenset[str]] = frozenset({"entropy", "expectation", "best"})

    def setup(self, model, processing_class, args):
        torch.manual_seed(5)
        self._table = torch.randn(model.config.get_text_config().vocab_size, 7)

    def table(self):
        return self._table

    def statistics_loss(self, statistics, targets, **extra):
        right = statistics.best == targets
        assert self.rows.shape == targets.shape
        total = statistics.nll + 0.3 * statistics.entropy - 0.1 * statistics.expectation + 0.2 * statistics.best_nll
        return (total * (1 + right + self.rows)).sum(), torch.as_tensor(len(targets))


@dataclass(eq=False)
class ByAutograd(Everything):
    """The same in one piece, whose gradients autograd finds."""

    additive: ClassVar[bool] = False


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0, **sizes)
    model = Gemma2ForCausalLM(config)
    model.model.embed_tokens.weight.data.normal_()  # logits that the capping bends
    return model


def trained(name, *, bf16=False, objective=Everything, **options):
    model = gemma2() if name == "gemma2" else build(name)
    before = weights(model)
    vocabulary = model.config.get_text_config().vocab_size
    rows = [
        {key: [value if value < 0 else value % vocabulary for value in row[key]] for key in ("input_ids", "labels")}
        for row in examples(16)
    ]
    trainer = train(model, objective(**options), collator=lambda _: collate(rows[:8]), bf16=bf16, **ONE_GRADIENT)
    after = weights(model)
    return {key: before[key] - after[key] for key in before}, trainer


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "qwen3", "mistral"])
def test_without_logits_loss_and_gradients_are_those_with_logits(name):
    there, one = trained(name, objective=ByAutograd, without_logits=False)
    for without in (True, False):
        here, other = trained(name, without_logits=without)
        difference = largest_difference(there, here)
        assert difference < 2e-6, f"without_logits={without}: gradients differ by up to {difference:.3g}"
        for what in ("loss", "clean_loss"):
            assert logged(one, what) == pytest.approx(logged(other, what), abs=1e-5)


def test_the_probe_finds_soft_capping_and_scales():
    assert PlainHead(gemma2()).softcap == 3.0
    from transformers import GraniteConfig, GraniteForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(vocab_size=40, num_key_value_heads=2, logits_scaling=8.0, **small))
    head = PlainHead(granite)
    assert head.scale == pytest.approx(1 / 8)
    assert head.softcap is None


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_under_autocast_the_gradient_is_close_to_that_with_logits(name):
    there, one = trained(name, bf16=True, objective=ByAutograd, without_logits=False)
    here, other = trained(name, bf16=True, without_logits=True)
    both = [torch.cat([value.flatten() for value in gradient.values()]) for gradient in (there, here)]
    assert float(torch.cosine_similarity(*both, dim=0)) > 0.99
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), rel=2e-2)


def test_no_logits_are_built():
    model, shapes = build("llama"), []
    objective = Everything(without_logits=True, clean_loss_every=1)
    hook = model.get_output_embeddings().register_forward_hook(lambda *given: shapes.append(tuple(given[-1].shape)))
    train(model, objective, max_steps=2)
    hook.remove()
    assert {shape[1] for shape in shapes[1:]} == {0}, shapes  # the first is the probe, over eight tokens
    assert not model.model._forward_hooks


def test_what_has_no_plain_head_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="focal needs the logits"):
        Focal(without_logits=True)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"plain linear head.*leave the head out of the adapters"):
        PlainHead(adapted)
    assert PlainHead(with_lora(build("llama"))).scale == 1.0
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, **sizes))  # a transform before its linear head
    hooks = len(bert.get_decoder()._forward_hooks)
    with pytest.raises(ValueError, match="reads something else than its decoder's last states"):
        PlainHead(bert)
    assert len(bert.get_decoder()._forward_hooks) == hooks


def shapes_of_the_head(tmp_path, *, cls=Trainer, model=None, hook=False, **options):
    """Train one step and return what the objective said it installed, and how long the head's outputs were."""
    model, shapes, said = model or build("llama"), set(), []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            said.extend(objective.installed())
            if not hook:
                base = model.get_base_model() if hasattr(model, "get_base_model") else model
                base.get_output_embeddings().register_forward_hook(lambda *given: shapes.add(given[-1].shape[1]))

    if hook:
        model.lm_head.register_forward_hook(lambda *given: shapes.add(given[-1].shape[1]))
    objective = Everything(clean_loss_every=0)
    given = {**options, "max_steps": 1}
    trainer = cls(model, arguments(tmp_path, **given), train_dataset=examples(8), data_collator=collate,
                  callbacks=[objective, Look()])  # fmt: skip
    trainer.train()
    return said, shapes


class ReadsLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.certain = outputs.logits.softmax(-1).amax(-1).mean()
        return (loss, outputs) if return_outputs else loss


def test_logits_are_left_out_by_themselves_where_nobody_else_reads_them(tmp_path):
    from peft import LoraConfig, get_peft_model

    said, shapes = shapes_of_the_head(tmp_path)
    assert shapes == {0}, said
    said, shapes = shapes_of_the_head(tmp_path, model=with_lora(build("llama")))
    assert shapes == {0}, said
    saved = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for expected, given in (
        ("ReadsLogits.compute_loss may read them", {"cls": ReadsLogits}),
        ("a ModulesToSaveWrapper as its head", {"model": saved}),
        ("a hook on its head may read them", {"hook": True}),
    ):
        said, shapes = shapes_of_the_head(tmp_path, **given)
        assert any(expected in line for line in said), said
        assert min(shapes) > 0, shapes


@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
def test_losses_beside_another_model_count_past_virtual_tokens(tuning):
    """ATKD and ssToken on a model with virtual tokens, with logits and without; the other model reads none."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    from hf_ext.trainer_callbacks import ATKD, SSToken

    def first_labels(value):
        def collator(rows):
            batch = collate(rows)
            batch["labels"][:, 0] = batch["input_ids"][:, 0] if value is None else value
            return batch

        return collator

    def tuned():
        kind = PromptTuningConfig if tuning == "prompt" else PrefixTuningConfig
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with torch.no_grad():
            for parameter in filter(lambda one: one.requires_grad, model.parameters()):
                parameter.normal_(std=0.1)
        return model

    def gradient(objective, collator):
        model = tuned()
        before = weights(model)
        train(model, objective, collator=collator, **ONE_GRADIENT)
        after = weights(model)
        return {key: before[key] - after[key] for key in before}

    gamma = 0.5 if tuning == "prompt" else 1.0
    for make, alone in (
        (lambda w: ATKD(teacher=build("llama"), without_logits=w), False),
        (lambda w: SSToken(share=0.5, gamma=gamma, decay=0.5, without_logits=w), True),
    ):
        collator = first_labels(None if alone else -100)
        there, here = (gradient(make(w), collator) for w in (False, None))
        difference = largest_difference(there, here)
        assert difference < 2e-6, f"gradients differ by up to {difference:.3g}"
        assert max(float(value.abs().max()) for value in here.values()) > 1e-5, "no gradient at all"
    if tuning == "prompt":
        with pytest.raises(ValueError, match="set the labels of first tokens to -100"):
            train(tuned(), ATKD(teacher=build("llama")), collator=first_labels(None), max_steps=1)
    else:
        with pytest.raises(ValueError, match=r"no keys of a prefix.*gamma=1"):
            train(tuned(), SSToken(), max_steps=1)


def test_few_targets_and_many_give_the_same_statistics(monkeypatch):
    """Where most positions have no target the logits are selected first; the result is no other."""
    from hf_ext.trainer_callbacks.statistics import loss_of_statistics

    seen = []

    @dataclass(eq=False)
    class Looks(Everything):
        def statistics_loss(self, statistics, targets, **extra):
            seen.append((statistics, targets, self.rows))
            return super().statistics_loss(statistics, targets, **extra)

    monkeypatch.setattr(Looks, "additive", False)
    objective = Looks()
    objective.setup(build("llama"), None, None)
    vocabulary = len(objective.table())
    logits = torch.randn(2, 9, vocabulary)
    targets = torch.randint(0, vocabulary, (2, 9))
    few = targets.clone()
    few[:, 2:] = -100
    for given in (targets, few):
        _, count, plain = loss_of_statistics(objective, None, logits, given, {})
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.flatten(), reduction="sum")
        assert int(count) == int((given != -100).sum())
        assert float(plain) == pytest.approx(float(expected), rel=1e-5)
    (whole, _, _), (part, kept, rows) = seen
    assert rows.tolist() == [0, 0, 1, 1]
    assert torch.equal(kept, few[few != -100])
    for name in ("nll", "entropy", "expectation", "best_nll", "best"):
        expected = getattr(whole, name).view(2, 9)[:, :2].flatten()
        assert torch.allclose(getattr(part, name).double(), expected.double(), atol=1e-5), name


@pytest.mark.parametrize("additive", [True, False])
def test_in_parts_or_as_a_whole_the_loss_is_the_same(additive, monkeypatch):
    """With pieces of five targets, gradients are those of the loss on all of them."""
    monkeypatch.setattr(Everything, "additive", additive)
    monkeypatch.setattr("hf_ext.kernels.linear_logits.rows_at_a_time", lambda *_, **__: 5)
    there, one = trained("llama", objective=ByAutograd, without_logits=False)
    here, other = trained("llama", without_logits=True)
    difference = largest_difference(there, here)
    assert difference < 2e-6, f"gradients differ by up to {difference:.3g}"
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), abs=1e-5)


def test_a_batch_without_targets_has_a_loss_of_nothing():
    from hf_ext.trainer_callbacks.statistics import loss_of_statistics

    model, objective = build("llama"), Everything()
    objective.setup(model, None, None)
    head = PlainHead(model)
    head.begin({"input_ids": torch.ones(1, 3, dtype=torch.long)})
    model(torch.ones(1, 3, dtype=torch.long))
    total, count, plain = loss_of_statistics(objective, head, torch.empty(0), torch.full((1, 3), -100), {})
    assert (float(total), int(count), float(plain)) == (0, 0, 0)
