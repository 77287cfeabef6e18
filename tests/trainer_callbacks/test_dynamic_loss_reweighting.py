"""Dynamic loss reweighting: the weights by hand, that they are over the global batch, and when a look ahead is paid."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from transformers import Trainer

from hf_ext.testing.objective import ONE_GRADIENT, ObjectiveInProcess
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    logged,
    tiny_model,
    train,
    weights,
)
from hf_ext.trainer_callbacks.dynamic_loss_reweighting import STRATEGIES, DynamicLossReweighting, factors


class TestLinUpper(ObjectiveInProcess):
    objective = DynamicLossReweighting
    options: ClassVar = {"temperature": 0.2}
    null_options: ClassVar = {"temperature": math.inf}
    attached = True


def by_hand(losses, function, temperature):
    low, high = min(losses), max(losses)
    powers = [math.exp(function((2 * loss - high - low) / (high - low)) / temperature) for loss in losses]
    return [len(losses) * power / sum(powers) for power in powers]


FORMULAS = {
    "linupper": lambda h: min(h + 1, 1),
    "quadratic": lambda h: 1 - h * h,
    "extremes": abs,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_weights_are_those_of_the_formula_over_all_micro_batches(strategy, temperature):
    losses = [0.5, 3.0, 1.25, 2.75, 2.0, 0.5]
    found = factors([torch.tensor(losses[:2]), torch.tensor(losses[2:])], strategy, temperature)
    assert [len(part) for part in found] == [2, 4]
    expected = torch.tensor(by_hand(losses, FORMULAS[strategy], temperature))
    difference = float((torch.cat(found) - expected).abs().max())
    assert difference < 1e-5, f"differs by up to {difference:.3g}"
    assert float(torch.cat(found).sum()) == pytest.approx(len(losses))


def test_what_each_strategy_prefers():
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    order = {name: factors([losses], name, 0.5)[0].tolist() for name in STRATEGIES}
    low, below, middle, above, high = order["linupper"]
    assert low < below < middle == above == high
    assert order["quadratic"].index(max(order["quadratic"])) == 2
    assert order["extremes"].index(min(order["extremes"])) == 2
    assert order["extremes"][0] == order["extremes"][4]


def test_equal_losses_weigh_the_same_and_rows_without_targets_nothing():
    assert factors([torch.full((3,), 2.5)], "linupper", 0.1)[0].tolist() == [1, 1, 1]
    weighed = factors([torch.tensor([1.0, math.nan, 3.0])], "linupper", 0.5)[0]
    without = factors([torch.tensor([1.0, 3.0])], "linupper", 0.5)[0]
    assert float(weighed[1]) == 0
    assert torch.equal(weighed[[0, 2]], without)


def test_a_high_temperature_goes_to_equal_weights():
    found = factors([torch.tensor([1.0, 2.0, 5.0])], "extremes", 1e6)[0]
    assert float((found - 1).abs().max()) < 1e-5


def test_processes_join_scalars_only_and_find_the_weights_of_the_whole():
    parts = [torch.tensor([0.5, 3.0]), torch.tensor([1.25, 2.75, 2.0])]
    whole = torch.cat(factors(parts, "linupper", 0.3))
    together, barrier = threading.local(), threading.Barrier(2)
    given: list[dict[int, torch.Tensor]] = [{} for _ in range(8)]

    def reduce(value, how):
        assert value.dim() == 0
        call, together.call = together.call, together.call + 1
        given[call][together.rank] = value
        barrier.wait(timeout=20)
        values = torch.stack([given[call][rank] for rank in (0, 1)])
        return {"min": values.min, "max": values.max, "sum": values.sum}[how]()

    def process(rank):
        together.rank, together.call = rank, 0
        return factors([parts[rank]], "linupper", 0.3, reduce)[0]

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(process, (0, 1))))
    difference = float((found - whole).abs().max())
    assert difference < 1e-6, f"differs by up to {difference:.3g}"


def weighted_gradient(rows, temperature):
    """Compute the gradient of the paper's loss on rows of equal length, row by row."""
    model = tiny_model()
    ids = torch.tensor([row["input_ids"] for row in rows])
    losses = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])
    weights_ = torch.tensor(by_hand(losses.tolist(), FORMULAS["linupper"], temperature)) / len(rows)
    (weights_ * losses).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("parts", "attached"), [(1, False), (1, True), (4, True)])
def test_the_gradient_is_that_of_the_weighted_mean_of_row_losses(parts, attached, tmp_path):
    rows = [row["input_ids"][:8] for row in examples(16) if len(row["input_ids"]) >= 8][:8]
    rows = [{"input_ids": row, "labels": row} for row in rows]
    model = tiny_model()
    before = weights(model)
    split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    objective = DynamicLossReweighting(temperature=0.2)
    args = arguments(tmp_path, **{**ONE_GRADIENT, **split})
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[] if attached else [objective])
    if attached:
        from hf_ext.trainer_callbacks import attach

        attach(trainer, objective)
    trainer.train()
    found = {name: before[name] - value for name, value in weights(model).items()}
    difference = largest_difference(found, weighted_gradient(rows, 0.2))
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"


def test_without_logits_the_look_ahead_finds_the_same_weights():
    found = []
    for without in (False, True):
        model = tiny_model()
        before = weights(model)
        objective = DynamicLossReweighting(temperature=0.2, without_logits=without)
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        train(model, objective, attached=True, **{**ONE_GRADIENT, **split})
        found.append({name: before[name] - value for name, value in weights(model).items()})
    difference = largest_difference(*found)
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"


def passes(**changes):
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    options = {"max_steps": 1, **changes}
    given = {"clean_loss_every": 0, "without_logits": False}  # no probe, no pass of the clean loss
    objective = DynamicLossReweighting(temperature=0.2, warmup_steps=options.pop("warmup", 0), **given)
    train(model, objective, attached=True, **options)
    return seen


def test_a_look_ahead_is_paid_only_where_it_is_needed():
    assert passes() == [True]
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert passes(**split) == [False, False, True, True]
    assert passes(**split, warmup=1) == [True, True]


def test_weights_begin_after_the_warm_up():
    plain, warm = tiny_model(), tiny_model()
    train(plain, None, max_steps=2)
    trainer = train(warm, DynamicLossReweighting(temperature=0.1, warmup_steps=2), attached=True, max_steps=2)
    assert largest_difference(weights(plain), weights(warm)) == 0
    assert logged(trainer, "reweighting_effective_share") == []
    trainer = train(tiny_model(), DynamicLossReweighting(temperature=0.1, warmup_steps=1), attached=True, max_steps=2)
    [share] = logged(trainer, "reweighting_effective_share")
    assert 0.1 < share < 0.99


def test_accumulation_without_attach_and_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"attach\(trainer, DynamicLossReweighting"):
        train(tiny_model(), DynamicLossReweighting(), gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        DynamicLossReweighting(temperature=0)
    with pytest.raises(ValueError, match="warmup_steps must be a number of steps"):
        DynamicLossReweighting(warmup_steps=-1)


@pytest.mark.parametrize("parts", [1, 2])
def test_texts_of_a_packed_row_are_weighed_as_rows_are(parts):
    def packed(rows):
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([[label for row in rows for label in (-100, *row["labels"][1:])]]),
            "position_ids": torch.tensor([[at for row in rows for at in range(len(row["input_ids"]))]]),
        }

    found = []
    split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, **ONE_GRADIENT}
    for collator in (collate, packed):
        model = tiny_model(max_position_embeddings=256)
        trainer = train(model, DynamicLossReweighting(temperature=0.2), attached=True, collator=collator, **split)
        assert logged(trainer, "reweighting_effective_share")[0] < 0.99
        found.append((weights(model), logged(trainer, "reweighting_effective_share")[0]))
    difference = largest_difference(found[0][0], found[1][0])
    assert difference < 1e-5, f"weights after one step differ by up to {difference:.3g}"
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)
