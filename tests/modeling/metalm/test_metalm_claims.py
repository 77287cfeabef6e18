"""The measuring functions behind MetaLM's claim checks, on untrained models."""

import pytest
import torch

from hf_ext.claims import metalm as claims


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def claim(name):
    [found] = [claim for claim in claims.CLAIMS if claim.name == name]
    return found


@pytest.mark.parametrize("name", ["visibility", "encoded-once"])
def test_exact_claims_hold(name):
    measured = claim(name).check()
    assert claim(name).threshold.holds(measured.value), measured


def test_the_task_asks_whether_a_symbol_comes_again():
    batch = claims.repeats(40, torch.Generator().manual_seed(1))
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        listed, answers = ids[1 : claims.ITEMS + 1], labels[claims.ITEMS + 2 :]
        expected = [claims.YES if s in listed[i + 1 :] else claims.NO for i, s in enumerate(listed)]
        assert answers == ids[claims.ITEMS + 2 :] == expected
        assert set(labels[: claims.ITEMS + 2]) == {-100}


@torch.no_grad()
def test_the_three_kinds_differ_in_who_sees_whom():
    batch = claims.repeats(1, torch.Generator().manual_seed(1))
    other = batch["input_ids"].clone()
    last = claims.ITEMS
    other[0, last] = (other[0, last] + 1) % claims.SYMBOLS
    seen = {}
    for kind in claims.KINDS:
        model = claims.untrained(kind).eval()
        logits = [
            model(**claims.readable(model, {**batch, "input_ids": i})).logits for i in (batch["input_ids"], other)
        ]
        seen[kind] = (logits[0] != logits[1]).any(-1)[0].nonzero()[0].item()
    assert seen == {claims.BOTH_WAYS: 1, claims.LEFT_TO_RIGHT: last, claims.CAUSAL: last}


def test_kinds_of_as_many_layers_have_about_as_many_parameters():
    sizes = {kind: claims.untrained(kind).num_parameters() for kind in claims.KINDS}
    assert sizes[claims.BOTH_WAYS] == sizes[claims.LEFT_TO_RIGHT]
    assert abs(sizes[claims.BOTH_WAYS] / sizes[claims.CAUSAL] - 1) < 0.1, sizes


@torch.no_grad()
def loss(model):
    return float(model(**claims.repeats(64, torch.Generator().manual_seed(5))).loss)


def test_training_lowers_the_loss_and_is_reproducible():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        draw = torch.Generator().manual_seed(0)
        model = claims.untrained(claims.BOTH_WAYS)
        before = loss(model)
        claims.train(model, 12, lambda draw=draw: claims.repeats(16, draw))
        ends.append(loss(model))
    assert ends[0] == ends[1]
    assert ends[0] < before - 0.5, f"12 steps took the loss from {before:.3f} to {ends[0]:.3f}"


@torch.no_grad()
def test_surprise_is_the_cross_entropy():
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(claims.nats(logits, ids), expected)
