"""GMT: which gradients are kept, that the optimizer sees the accumulated ones, and what freezing adds."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from hf_ext.testing.objective import ONE_GRADIENT, ObjectiveInProcess
from hf_ext.testing.objective_training import largest_difference, logged, tiny_model, train, weights
from hf_ext.trainer_callbacks.gmt import GMT, smallest_kept


class TestGMT(ObjectiveInProcess):
    objective = GMT
    options: ClassVar = {"mask_ratio": 0.3, "freeze": True}
    null_options: ClassVar = {"mask_ratio": 0.0, "freeze": True}


def by_sorting(gradient, ratio):
    """Mask a gradient by sorting its entries, one tensor at a time, as slowly and plainly as can be."""
    flat = gradient.flatten()
    keep = len(flat) - min(round(ratio * len(flat)), len(flat) - 1)
    chosen = sorted(range(len(flat)), key=lambda index: -abs(float(flat[index])))[:keep]
    result = torch.zeros_like(flat)
    result[chosen] = flat[chosen]
    return result.view_as(gradient)


def with_gradients(*gradients):
    model = nn.Module()
    for index, gradient in enumerate(gradients):
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        model.register_parameter(f"p{index}", parameter)
    return model


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 0.99])
def test_each_tensor_keeps_its_own_largest_gradients(ratio):
    torch.manual_seed(0)
    gradients = [torch.randn(10, 10), 100 * torch.randn(7), torch.randn(3, 4, 5).to(torch.bfloat16)]
    model = with_gradients(*gradients)
    GMT(mask_ratio=ratio).on_gradients(model, None)
    for parameter, gradient in zip(model.parameters(), gradients[:2], strict=False):
        difference = float((parameter.grad - by_sorting(gradient, ratio)).abs().max())
        assert difference == 0, f"gradients differ by up to {difference}"
    kept = int((model.p2.grad != 0).sum())  # bf16 values tie, and ties are kept
    assert kept >= 60 - round(ratio * 60)
    assert float(model.p2.grad.abs().max()) == float(gradients[2].abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_threshold_by_counting_is_that_of_sorting(dtype):
    gradient = (torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 1e-4).to(dtype)
    gradient[:3] = 0
    gradient[3, :2] = torch.tensor([3e4, torch.inf])
    ordered = gradient.abs().flatten().sort().values
    for ratio in (0.0, 0.05, 0.075, 0.4, 0.5, 0.999, 0.9999):
        expected = ordered[min(round(ratio * 2000), 1999)]
        assert smallest_kept(gradient, ratio) == expected, ratio


def test_ties_are_kept_and_a_single_entry_always_is():
    assert float(smallest_kept(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5)) == 1
    assert float(smallest_kept(torch.tensor([[-2.0]]), 0.99)) == 2
    model = with_gradients(torch.ones(4), torch.tensor(3.0))
    GMT(mask_ratio=0.75).on_gradients(model, None)
    assert model.p0.grad.tolist() == [1, 1, 1, 1]
    assert float(model.p1.grad) == 3


def test_the_threshold_is_the_same_under_deterministic_algorithms():
    gradient = torch.randn(101, generator=torch.Generator().manual_seed(0))
    expected = smallest_kept(gradient, 0.3)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(smallest_kept(gradient, 0.3), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_overflowed_gradient_stays_visible_to_the_loss_scaler():
    model = with_gradients(torch.tensor([1.0, float("nan"), 0.1, 0.2]))
    GMT(mask_ratio=0.5).on_gradients(model, None)
    assert model.p0.grad.isnan().tolist() == [False, True, False, False]


def test_the_mask_is_that_of_the_accumulated_gradient():
    plain, masked = tiny_model(), tiny_model()
    before = weights(plain)
    train(plain, None, **ONE_GRADIENT)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = train(masked, GMT(mask_ratio=0.5), **{**ONE_GRADIENT, **split})
    gradient = {name: before[name] - value for name, value in weights(plain).items()}
    found = {name: before[name] - value for name, value in weights(masked).items()}
    for name, value in gradient.items():
        threshold = smallest_kept(value, 0.5)
        expected = torch.where(value.abs() < threshold, 0, value)
        near = (value.abs() - threshold).abs() < 1e-6  # rounding decides these
        difference = float((found[name] - expected)[~near].abs().max())
        assert difference <= 1e-6, f"{name}: differs by up to {difference:.3g}"
    [share] = logged(trainer, "gmt_masked_share")
    assert share == pytest.approx(0.5, abs=0.03)  # embeddings of tokens not seen are zero and tie


def moved(objective, **changes):
    """Tell which entries one AdamW step with weight decay moves, after a step to fill its memory."""
    model = tiny_model()
    seen = []

    class Watch(type(objective)):
        def on_gradients(self, model, optimizer):
            super().on_gradients(model, optimizer)
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            seen.append((weights(model), gradients))

    objective.__class__ = Watch
    train(model, objective, max_steps=2, weight_decay=0.1, **changes)
    (_, _), (before, gradients) = seen
    return before, weights(model), gradients


def test_adamw_moves_masked_entries_unless_they_are_frozen():
    before, after, gradients = moved(GMT(mask_ratio=0.5))
    masked = gradients["model.layers.0.mlp.up_proj.weight"] == 0
    change = (after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"])[masked]
    assert int((change != 0).sum()) > 0.9 * int(masked.sum()), "momentum should have moved them"

    before, after, gradients = moved(GMT(mask_ratio=0.5, freeze=True))
    for name, gradient in gradients.items():
        difference = float((after[name] - before[name])[gradient == 0].abs().sum())
        assert difference == 0, f"{name}: frozen entries moved by {difference}"
    assert largest_difference(before, after) > 0


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, 30, True])
def test_shares_out_of_range_are_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio must be a share from 0"):
        GMT(mask_ratio=ratio)


def test_gradients_that_cannot_be_masked_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="sees no gradients"):
        GMT().on_gradients(model, None)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        GMT().on_gradients(embedding, None)
