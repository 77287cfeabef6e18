"""cDPO: scores and loss by hand, the suite of objectives on pairs, and what it does to TRL's own DPOTrainer."""

from typing import ClassVar

import pytest
import torch
from torch.nn import functional
from transformers import Trainer

from hf_ext.testing.objective import installed_parts
from hf_ext.testing.objective_preferences import BETA, PreferencesInProcess, dpo_trainer
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    logged,
    tiny_model,
    weights,
)
from hf_ext.trainer_callbacks import CDPO, attach
from hf_ext.trainer_callbacks.cdpo import contrastive_scores, critical_scores, weighted_dpo_loss

MODELS = {"positive": tiny_model(seed=8), "negative": tiny_model(seed=9)}


class TestCDPO(PreferencesInProcess):
    objective = CDPO
    options: ClassVar = MODELS
    null_options: ClassVar = {**MODELS, "strength": 0.0}


def trainer(model, objective, folder, **changes):
    args = TestCDPO().arguments(folder, **{"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, **changes})
    return attach(dpo_trainer(model, args), objective)


def test_scores_are_the_normalised_ratio_of_powers():
    draw = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(5, 7, generator=draw).double() for _ in range(2))
    targets = torch.randint(0, 7, (5,), generator=draw)
    for beta in (0.0, 0.5, 1.0):
        ratio = positive.softmax(-1) ** (1 + beta) / negative.softmax(-1) ** beta
        expected = (ratio / ratio.sum(-1, keepdim=True)).gather(-1, targets[:, None])[:, 0]
        found = contrastive_scores(positive, negative, targets, beta)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    same = contrastive_scores(positive, positive, targets, 1.0)
    assert torch.allclose(same, positive.softmax(-1).gather(-1, targets[:, None])[:, 0].float(), atol=1e-6)


def test_a_token_that_only_the_negative_model_says_is_critical():
    positive, negative = torch.zeros(1, 4), torch.tensor([[5.0, 0.0, 0.0, 0.0]])
    critical, shared = (float(contrastive_scores(positive, negative, torch.tensor([t]))[0]) for t in (0, 1))
    assert critical < 0.01 < 0.3 < shared


def test_weights_of_one_are_dpo_and_the_gradient_is_spread_by_the_weights():
    draw = torch.Generator().manual_seed(1)
    chosen, rejected = (torch.randn(3, 5, generator=draw).double() for _ in range(2))
    plain = -functional.logsigmoid(0.1 * (chosen.sum(-1) - rejected.sum(-1)))
    assert torch.equal(weighted_dpo_loss(chosen, rejected, torch.ones(3, 5), 0.1), plain)
    share = torch.rand(3, 5, generator=draw).double()
    leaf = rejected.clone().requires_grad_()
    (slope,) = torch.autograd.grad(weighted_dpo_loss(chosen, leaf, share, 0.1).sum(), leaf)
    ratio = slope / share
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio)), "a token's gradient is not in proportion to its weight"
    assert (slope > 0).all(), "rejected tokens are not pushed down"


def test_the_sum_comes_before_the_logistic_loss():
    """The two forms agree for answers of one token and differ for longer ones."""
    one, two = torch.tensor([[0.4]]), torch.tensor([[0.4, -1.0]])
    for values, equal in ((one, True), (two, False)):
        ones = torch.ones_like(values)
        before = -functional.logsigmoid(0.1 * (values - 2 * values)).sum(-1)  # pair by pair, as the released code
        after = weighted_dpo_loss(values, 2 * values, ones, 0.1)
        assert bool(torch.allclose(before, after)) is equal


def test_with_uniform_weights_the_trainer_is_dpo():
    """Models that give every token no chance: the weights go through the hooks and are all 1."""

    class Uniform(CDPO):
        def _scores(self, model, batch):
            return torch.zeros(len(batch["input_ids"]), batch["input_ids"].shape[1] - 1)

    suite, models = TestCDPO(), [tiny_model(attention_dropout=0.2) for _ in range(2)]
    first, second = (suite.run(model, one) for model, one in zip(models, (Uniform(**MODELS), None), strict=True))
    assert largest_difference(*map(weights, models)) == 0
    assert logged(first, "rewards/margins") == logged(second, "rewards/margins")
    assert logged(first, "rejected_weight") == [1, 1]
    assert logged(first, "dpo_loss") == pytest.approx(logged(second, "loss"), abs=1e-6)


@pytest.mark.parametrize("both", [False, True])
def test_the_trainers_loss_is_the_pure_function_of_token_log_ratios(tmp_path, both):
    """One step later, when policy and reference differ: recompute the logged loss by hand."""
    policy = tiny_model()
    built = trainer(policy, CDPO(**MODELS, weigh_chosen=both), tmp_path, max_steps=2, per_device_train_batch_size=8)
    seen = []
    compute = type(built).__mro__[2]._compute_loss

    def spy(self, model, inputs, return_outputs):
        seen.append((weights(model), inputs))
        return compute(self, model, inputs, return_outputs)

    built._compute_loss = spy.__get__(built)
    built.train()
    (_, _), (state, inputs) = seen
    policy.load_state_dict(state)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    targets, counted = ids[:, 1:], inputs["completion_mask"][:, 1:]
    ratios = torch.zeros(targets.shape)
    with torch.no_grad():
        for sign, model in ((1, policy), (-1, tiny_model(seed=5))):
            found = model.eval()(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            ratios += sign * found.gather(-1, targets[..., None])[..., 0] * counted
    scores = critical_scores(MODELS["positive"], MODELS["negative"], {"input_ids": ids, "attention_mask": mask})
    chosen = ratios[:8] * scores[:8] if both else ratios[:8]
    expected = float(weighted_dpo_loss(chosen, ratios[8:], 1 - scores[8:], BETA).mean())
    assert logged(built, "loss")[1] == pytest.approx(expected, abs=1e-5)
    share = float(((1 - scores[8:]) * counted[8:]).sum() / counted[8:].sum())
    assert logged(built, "rejected_weight")[1] == pytest.approx(share, abs=1e-5)


def with_adapters():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("right", config)
    model.add_adapter("wrong", config)
    return model


def test_adapters_of_the_trained_model_serve_as_both_models_and_do_not_train(tmp_path):
    model = with_adapters()
    before = weights(model)
    objective = CDPO(positive="right", negative="wrong")
    batch = {name: value for name, value in collate(examples(2)).items() if name != "labels"}
    found = objective._scores(model, batch)
    expected = []
    for name in ("right", "wrong"):
        model.set_adapter(name)
        with torch.no_grad():
            expected.append(model.eval()(**batch).logits[:, :-1])
    model.set_adapter("default")
    assert torch.allclose(found, contrastive_scores(*expected, batch["input_ids"][:, 1:]), atol=1e-6)
    assert not torch.allclose(*expected)

    built = trainer(model, objective, tmp_path, gradient_checkpointing=True)
    built.train()
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".default." in name for name in moved), moved


def test_nothing_is_left_on_the_models(tmp_path):
    model = tiny_model()
    built = trainer(model, CDPO(**MODELS), tmp_path, max_steps=1)
    before = [installed_parts(part) for part in (model, built.ref_model)]
    built.train()
    for part, kept in zip((model, built.ref_model), before, strict=True):
        left = {name: parts - kept[name] for name, parts in installed_parts(part).items()}
        assert not [hook for parts in left.values() for hook in parts if "hook" in hook], left


def test_other_trainers_are_refused_with_the_remedy(tmp_path):
    built = Trainer(tiny_model(), arguments(tmp_path), train_dataset=examples(8), data_collator=collate)
    with pytest.raises(ValueError, match=r"this Trainer has batches of .*use attach\(DPOTrainer"):
        attach(built, CDPO(**MODELS)).train()
    built = Trainer(tiny_model(), arguments(tmp_path), train_dataset=examples(8), callbacks=[CDPO(**MODELS)])
    with pytest.raises(ValueError, match=r"replaces the whole training step.*attach\(trainer, CDPO"):
        built.train()


def test_what_cannot_be_weighed_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.precompute_ref_log_probs = True
    with pytest.raises(ValueError, match="drop precompute_ref_log_probs=True"):
        CDPO(**MODELS).setup(tiny_model(), None, args)
    args.precompute_ref_log_probs, args.use_weighting = False, True
    with pytest.raises(ValueError, match="drop use_weighting=True"):
        CDPO(**MODELS).setup(tiny_model(), None, args)
    with pytest.raises(ValueError, match="is no adapter of the model that trains, which has no adapters"):
        CDPO(positive="right", negative="wrong").setup(tiny_model(), None, arguments(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength must be a number from 0 to 1"),
        ({"beta": -1.0}, "beta must be a number from 0"),
        ({"positive": None}, "positive must be a model or the name of an adapter, got NoneType"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CDPO(**{**MODELS, **options})


def test_the_claims_task_has_one_error_a_wrong_answer_and_none_in_a_right_one():
    from hf_ext.claims.cdpo import DIGITS, sums

    right, nowhere = sums(64, 3, 0.0)
    wrong, place = sums(64, 3, 1.0)
    assert torch.equal(right[:, : DIGITS + 1], wrong[:, : DIGITS + 1]), "the pairs have different prompts"
    assert (nowhere == -1).all()
    for row, error in zip(wrong.tolist(), place.tolist(), strict=True):
        digits, answer = row[:DIGITS], row[DIGITS + 1 : -1]
        follows = [(answer[i] - digits[i] - (answer[i - 1] if i else 0)) % 10 == 0 for i in range(DIGITS)]
        assert [i for i, right_so_far in enumerate(follows) if not right_so_far] == [error]
