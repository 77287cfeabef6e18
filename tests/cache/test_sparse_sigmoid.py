"""The sparse sigmoid against the definition of alpha-entmax, and its gradient against differences."""

from __future__ import annotations

import pytest
import torch

from hf_ext.cache.trained.entmax import sparse_sigmoid

ALPHAS = (1.0, 1.0 + 1e-9, 1.001, 1.2, 1.5, 1.9, 2.0, 2.5, 3.0, 5.0, 8.0)


def by_definition(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the p that maximises `p x` plus the Tsallis entropy of (p, 1 - p), found by bisecting the derivative."""
    low, high = torch.zeros_like(x), torch.ones_like(x)

    def slope(p: torch.Tensor) -> torch.Tensor:
        if alpha < 1.0001:
            return x - torch.log(p / (1 - p))
        return x - (p ** (alpha - 1) - (1 - p) ** (alpha - 1)) / (alpha - 1)

    for _ in range(100):
        middle = (low + high) / 2
        rising = slope(middle) > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return (low + high) / 2


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_are_those_of_the_definition(alpha: float) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    wanted = by_definition(x, alpha)
    for dtype, tolerance in ((torch.float64, 2e-8 if alpha < 1.0001 else 1e-10), (torch.float32, 5e-7)):
        gap = (sparse_sigmoid(x.to(dtype), alpha) - wanted).abs().max().item()
        assert gap < tolerance, f"alpha {alpha}, {dtype}: {gap:.2e}"


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_those_of_differences(alpha: float) -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    if alpha > 1:
        x = x[(x.abs() - 1 / (alpha - 1)).abs() > 1e-2]  # the corners
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: sparse_sigmoid(v, alpha), x, eps=1e-7, atol=2e-5)


def test_both_signs_add_up_to_one_and_far_values_are_exact() -> None:
    x = torch.linspace(0, 5, 101)
    for alpha in ALPHAS:
        gap = (sparse_sigmoid(x, alpha) + sparse_sigmoid(-x, alpha) - 1).abs().max().item()
        assert gap < 1e-6, (alpha, gap)
    far = torch.tensor([-1e4, -0.51, 0.51, 1e4])
    assert sparse_sigmoid(far, 3.0).tolist() == [0, 0, 1, 1]
    assert sparse_sigmoid(torch.tensor([-1e-9, 0.0, 1e-9]), float("inf")).tolist() == [0, 0, 1]


def test_small_probabilities_keep_their_relative_precision() -> None:
    x = torch.tensor([-20.0, -10.0])
    gap = (sparse_sigmoid(x, 1.0001).double().log() - by_definition(x.double(), 1.0001).log()).abs().max().item()
    assert gap < 1e-4, gap


def test_gradients_beyond_the_corners_are_zero() -> None:
    for alpha in (1.5, 2.0, 8.0):
        x = torch.tensor([-5.0, 5.0], requires_grad=True)
        sparse_sigmoid(x, alpha).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 0], alpha


def test_alpha_below_one_is_refused() -> None:
    for alpha in (0.5, float("nan")):
        with pytest.raises(ValueError, match="alpha must be a number from 1"):
            sparse_sigmoid(torch.zeros(1), alpha)
