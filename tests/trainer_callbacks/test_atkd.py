"""ATKD: the divergence divided against the plain one, what is easy and what is hard, and the teacher's part."""

import math
from typing import ClassVar

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from hf_ext.kernels.linear_logits import GivenLogits, HeadLogits
from hf_ext.testing.objective import ONE_GRADIENT, ObjectiveInProcess
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    tiny_model,
    train,
    weights,
)
from hf_ext.trainer_callbacks import ATKD
from hf_ext.trainer_callbacks import distillation as one_pass
from hf_ext.trainer_callbacks.atkd import divided_divergence
from hf_ext.trainer_callbacks.distillation import distillation, odds_of
from hf_ext.trainer_callbacks.statistics import loss_of_distributions


class TestATKD(ObjectiveInProcess):
    objective = ATKD
    options: ClassVar = {"teacher": tiny_model(seed=5), "weight": 0.7}
    null_options: ClassVar = {"teacher": tiny_model(seed=5), "weight": 0.0}
    attached_sft = True


def sample(seed=0):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(12, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, 9, (12,), generator=draw)


def whole(student, teacher):
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def test_with_their_natural_weights_the_parts_sum_to_plain_distillation():
    student, teacher, targets = sample()
    target, rest, uncertainty = divided_divergence(student, teacher, targets)
    difference = float((target + uncertainty * rest - whole(student, teacher)).abs().max())
    assert difference < 1e-12, f"the parts miss the divergence by {difference:.3g}"
    assert (target >= 0).all()
    assert (rest >= 0).all()


def test_each_part_is_what_it_says():
    student, teacher, targets = sample(1)
    target, rest, uncertainty = divided_divergence(student, teacher, targets)
    for i, y in enumerate(targets.tolist()):
        p, q = teacher[i].softmax(-1), student[i].softmax(-1)
        two = float(p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log())
        others = [v for v in range(9) if v != y]
        p, q = (x[others] / x[others].sum() for x in (p, q))
        assert float(target[i]) == pytest.approx(two)
        assert float(rest[i]) == pytest.approx(float((p * (p / q).log()).sum()))
        assert float(uncertainty[i]) == pytest.approx(1 - float(teacher[i].softmax(-1)[y]))


def test_gradients_of_the_natural_sum_are_those_of_plain_distillation():
    student, teacher, targets = sample(2)
    gradients = []
    for loss in (
        lambda s: (lambda t, r, u: (t + u * r).sum())(*divided_divergence(s, teacher, targets)),
        lambda s: whole(s, teacher).sum(),
    ):
        leaf = student.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf), leaf)[0])
    difference = float((gradients[0] - gradients[1]).abs().max())
    assert difference < 1e-12, difference


def test_a_sure_teacher_and_excluded_tokens_give_finite_losses_and_gradients():
    teacher = torch.tensor([[80.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 60.0, -torch.inf], [-90.0, 0.0, 90.0]], requires_grad=True)
    target, rest, _ = divided_divergence(student, teacher, torch.tensor([0, 0]))
    (target + rest).sum().backward()
    for value in (target, rest, student.grad):
        assert torch.isfinite(value).all(), value
    assert float(target[0]) == pytest.approx(60.0)


def test_one_pass_over_the_logits_gives_the_weighed_parts_and_their_gradient(monkeypatch):
    monkeypatch.setattr(one_pass, "PIECE", 5 * 9)  # pieces of 5, 5 and 2 tokens
    student, teacher, targets = sample(3)
    student[4, (targets[4] + 1) % 9] = teacher[4, (targets[4] + 1) % 9] = -torch.inf  # excluded by both
    draw = torch.Generator().manual_seed(4)
    on_target, on_rest = torch.rand(2, 12, generator=draw, dtype=torch.float64)
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    everywhere = torch.arange(12)
    given = GivenLogits(teacher, everywhere)
    total, *parts = distillation(GivenLogits(ours, everywhere), given, targets, on_target, on_rest, 0.3)
    target, rest, uncertainty = divided_divergence(theirs, teacher, targets)
    expected = (on_target * target + on_rest * rest).sum()
    expected = expected + 0.3 * functional.cross_entropy(theirs, targets, reduction="sum")
    (2 * total).backward()
    (2 * expected).backward()
    for name, found, wanted in (
        ("sum", total, expected), ("target part", parts[0], target), ("rest part", parts[1], rest),
        ("gradient", ours.grad, theirs.grad), ("uncertainty", parts[2], uncertainty),
        ("first pass", (-odds_of(given, targets)).sigmoid(), uncertainty),
    ):  # fmt: skip
        difference = float((found - wanted).detach().abs().max())
        assert difference < 1e-12, f"{name} is off by {difference:.3g}"
    with torch.no_grad():
        assert distillation(GivenLogits(ours, everywhere), given, targets, on_target, on_rest)[0].grad_fn is None
    assert odds_of(GivenLogits(teacher, everywhere[:0]), targets[:0]).shape == (0,)


@pytest.mark.parametrize("adaptive", [True, False])
def test_of_two_heads_it_is_that_of_their_logits(adaptive):
    """Hidden states, weight and bias of a soft-capped, scaled student get the gradients of the brute-force formula."""
    draw = torch.Generator().manual_seed(7)
    options = {"scale": 0.7, "softcap": 3.0, "chunk": 5}
    inputs = [torch.randn(size, generator=draw) for size in ((12, 6), (29, 6), (29,))]
    others = [torch.randn(size, generator=draw) for size in ((12, 4), (29, 4))]
    targets, (on_target, on_rest) = torch.randint(0, 29, (12,), generator=draw), torch.rand(2, 12, generator=draw)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    teacher = functional.linear(*others)
    student = 3 * torch.tanh(0.7 * functional.linear(*theirs) / 3)
    target, rest, uncertainty = divided_divergence(student, teacher, targets)
    if not adaptive:
        on_target, on_rest = torch.full((12,), 0.6), None
    expected = (
        on_target * (target + uncertainty * rest) if on_rest is None else on_target * target + on_rest * rest
    ).sum()
    expected = expected + 0.3 * functional.cross_entropy(student, targets, reduction="sum")
    found = distillation(
        HeadLogits(*ours, **options), HeadLogits(*others, chunk=4), targets, on_target, on_rest, 0.3
    )  # fmt: skip
    (2 * found.total).backward()
    (2 * expected).backward()
    for name, one, other in (
        ("sum", found.total, expected), ("target part", found.target, target), ("rest part", found.rest, rest),
        *((f"gradient {at}", a.grad, b.grad) for at, (a, b) in enumerate(zip(ours, theirs, strict=True))),
        ("first pass", (-odds_of(HeadLogits(*others, chunk=5), targets)).sigmoid(), uncertainty),
    ):  # fmt: skip
        difference = float((one - other).detach().abs().max())
        assert difference < 1e-5, f"{name} is off by {difference:.3g}"


@pytest.mark.parametrize("adaptive", [True, False])
def test_no_logits_are_built_of_either_model_and_the_gradient_is_the_same(adaptive):
    gradients, shapes = [], []
    for without in (False, None):
        model, teacher = tiny_model(), tiny_model(seed=5)
        before = weights(model)
        objective = ATKD(teacher=teacher, weight=0.7, adaptive=adaptive, without_logits=without)
        said = []
        if without is None:

            class Look(TrainerCallback):
                def on_step_begin(self, *args, **kwargs):
                    said.extend(objective.installed())  # noqa: B023
                    for one in (model, teacher):  # noqa: B023
                        one.lm_head.register_forward_hook(lambda *given: shapes.append(given[-1].shape[1]))

        train(model, objective, company=[Look()] if without is None else [], **ONE_GRADIENT)
        gradients.append({name: before[name] - value for name, value in weights(model).items()})
    difference = largest_difference(*gradients)
    assert difference < 1e-6, f"gradients differ by up to {difference:.3g}"
    assert any(line.startswith("teacher: forward hook") for line in said), said
    assert set(shapes) == {0}, shapes
    assert not teacher.model._forward_hooks


def test_one_pass_stays_finite_where_the_teacher_is_sure():
    teacher = torch.tensor([[80.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 60.0, -torch.inf], [-90.0, 0.0, 90.0]], requires_grad=True)
    given = (GivenLogits(logits, torch.arange(2)) for logits in (student, teacher))
    total, *parts = distillation(*given, torch.tensor([0, 0]), torch.ones(2), torch.ones(2))
    total.backward()
    for value in (total, *parts, student.grad):
        assert torch.isfinite(value).all(), value


class Frozen(ATKD):
    """Give the loss a batch by hand instead of a training pass."""

    @property
    def batch(self):
        return self.given


def on_batch(objective, model, rows):
    batch = collate(rows)
    objective.given = {name: value for name, value in batch.items() if name != "labels"}
    objective.setup(model, None, arguments("out"))
    logits = model.eval()(**objective.given).logits
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    total, *_ = loss_of_distributions(objective, None, logits, targets, {})
    return float(total.detach()), logits, targets


@pytest.mark.parametrize("hard", [0.5, 0.3])
def test_the_loss_is_the_papers_mean_over_easy_and_hard_tokens(hard):
    """In a text whose share of hard tokens comes out even, the weights are exactly the two means."""
    row = next(row for row in examples(30) if sum(label != -100 for label in row["labels"][1:]) % 10 == 0)
    teacher, model = tiny_model(seed=5), tiny_model()
    found, logits, targets = on_batch(Frozen(teacher=teacher, hard_share=hard, easy_weight=0.2), model, [row])
    chosen = targets[0] != -100
    theirs = teacher.eval()(torch.tensor([row["input_ids"]])).logits[0]
    target, rest, uncertainty = divided_divergence(logits[0][chosen], theirs[chosen], targets[0][chosen])
    count = int(chosen.sum())
    order = uncertainty.argsort(descending=True)
    hard_ones, easy_ones = order[: round(hard * count)], order[round(hard * count) :]
    expected = 0.2 * rest[easy_ones].mean() + 0.8 * (target + rest)[hard_ones].mean()
    assert found == pytest.approx(count * float(expected.detach()), rel=1e-5)


def test_without_adaptation_it_is_plain_distillation_mixed_with_the_data():
    rows, teacher, model = examples(4), tiny_model(seed=5), tiny_model()
    found, logits, targets = on_batch(Frozen(teacher=teacher, adaptive=False, weight=0.4), model, rows)
    batch = collate(rows)
    theirs = teacher.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = targets != -100
    divergence = whole(logits[chosen].double(), theirs[chosen].double()).sum()
    data = functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
    assert found == pytest.approx(float((0.4 * divergence + 0.6 * data).detach()), rel=1e-5)


def test_which_tokens_are_hard_is_said_by_the_teacher_alone():
    """A student that equals its teacher loses nothing, whatever it finds hard."""
    found, *_ = on_batch(Frozen(teacher=tiny_model()), tiny_model(), examples(4))
    assert found == pytest.approx(0, abs=1e-4)


def test_training_brings_the_student_to_the_teacher_and_leaves_the_teacher_alone():
    teacher = tiny_model(seed=5)
    before = weights(teacher)
    trainer = train(tiny_model(), ATKD(teacher=teacher), max_steps=12)
    seen = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    assert seen[-1] < seen[0], seen
    assert largest_difference(before, weights(teacher)) == 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    uncertain = [entry["uncertainty"] for entry in trainer.state.log_history if "uncertainty" in entry]
    assert all(0.9 < value < 1 for value in uncertain), "an untrained teacher is sure of nothing"


def test_packed_texts_have_their_own_hard_tokens():
    def packed(rows):
        labels = [label for row in rows for label in (-100, *row["labels"][1:])]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([[p for row in rows for p in range(len(row["input_ids"]))]]),
        }

    losses = []
    for collator in (collate, packed):
        objective = ATKD(teacher=tiny_model(seed=5), hard_share=0.3)
        trainer = train(tiny_model(), objective, collator=collator, max_steps=1, max_grad_norm=0.0)
        losses.append([trainer.state.log_history[0][name] for name in ("loss", "divergence", "uncertainty")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="teacher has a vocabulary of 80 and the student one of 64"):
        train(tiny_model(), ATKD(teacher=tiny_model(vocab_size=80)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_share": 0}, "must leave some tokens easy and some hard"),
        ({"hard_share": 1.2}, "hard_share must be a number from 0 to 1"),
        ({"easy_weight": -1}, "easy_weight must be a number from 0 to 1"),
        ({"weight": math.nan}, "weight must be a number from 0 to 1"),
        ({"teacher": None}, "teacher must be a model, got NoneType"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ATKD(**{"teacher": tiny_model(), **options})
