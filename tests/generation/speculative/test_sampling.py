"""Tokens are drawn by their law."""

from __future__ import annotations

import torch

from hf_ext.generation.speculative.sampling import draw_tokens


def test_tokens_come_by_their_law_and_impossible_ones_never():
    law = torch.tensor([0.0, 0.35, 0.0, 0.05, 0.6, 0.0])
    torch.manual_seed(0)
    draws = 200_000
    found = draw_tokens(law.expand(draws, -1)).bincount(minlength=6) / draws
    error = (found - law).abs()
    assert bool((found[law == 0] == 0).all())
    allowed = 4.5 * (law * (1 - law) / draws).sqrt()
    assert bool((error <= allowed).all()), f"largest error {error.max():.5f}, of {allowed.max():.5f} allowed"


def test_the_end_of_the_law_is_safe(monkeypatch):
    """The largest number that `rand` can give, times a sum that rounds up, still meets a possible token."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2**-53))
    law = torch.full((1, 1000), 1 / 3)
    law[0, 990:] = 0.0
    assert draw_tokens(law).tolist() == [989]
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    law = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert draw_tokens(law).tolist() == [2]
