"""The measuring functions behind SWAN-GPT's claim checks, on untrained models."""

import pytest
import torch

from hf_ext.claims import swan_gpt as claims
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_losses_with_short_and_long_context_are_those_of_the_same_bytes():
    # Four local layers of window 4 see 13 bytes back, fewer than every byte has even with the short context.
    config = SwanGPTConfig(**claims.SHAPE, sliding_window=4, global_every=None, initializer_range=0.3)
    near_sighted = claims.losses(SwanGPTForCausalLM(config).eval(), rows=4)
    assert abs(near_sighted.excess) < 1e-4, f"excess of a model that cannot tell: {near_sighted.excess:.3g}"
    config = SwanGPTConfig(**claims.SHAPE, sliding_window=4, global_every=1, initializer_range=0.3)
    far_sighted = claims.losses(SwanGPTForCausalLM(config).eval(), rows=4)
    assert abs(far_sighted.excess) > 1e-3, f"excess of a model that can tell: {far_sighted.excess:.3g}"


def test_training_lowers_the_loss_and_is_reproducible():
    untrained = claims.swan().eval()
    start = {name: weight.clone() for name, weight in untrained.state_dict().items()}
    before = claims.losses(untrained, rows=2).short
    trained = claims.train(untrained, seed=0, steps=6)
    after = claims.losses(trained, rows=2).short
    assert after < before - 0.3, f"6 steps took the loss from {before:.3f} to {after:.3f}"
    again = claims.swan()
    again.load_state_dict(start)
    claims.train(again, seed=0, steps=6)
    difference = max((a - b).abs().max().item() for a, b in zip(again.parameters(), trained.parameters(), strict=True))
    assert difference == 0, f"the same seed led to weights that differ by up to {difference:.3g}"


def test_twins_have_equally_many_parameters():
    assert claims.swan().num_parameters() == claims.twin().num_parameters()


def test_memory_of_a_cache_is_that_of_whole_storages():
    full, swan = claims.twin().eval(), claims.swan().eval()
    per_token = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16 floats
    assert claims.cache_bytes(full, 40) == [40 * per_token] * 4
    assert claims.cache_bytes(swan, 40) == [40 * per_token, *[claims.WINDOW * per_token] * 3]


def test_cache_claim_holds():
    (claim,) = (c for c in claims.CLAIMS if c.name == "cache-bounded-by-window")
    measured = claim.check()
    assert claim.threshold.holds(measured.value), measured
