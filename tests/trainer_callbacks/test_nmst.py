"""Self-terminating models: the probabilities by hand, the likelihood, and enumerations of what decoding can do."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch.nn import functional

from hf_ext.generation.self_terminating import (
    SelfTerminatingLogitsProcessor,
    longest_text,
    self_terminating,
)
from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_training import BOS, EOS, arguments, collate, examples, tiny_model, train
from hf_ext.trainer_callbacks import SelfTerminating
from hf_ext.trainer_callbacks.statistics import loss_of_statistics


class TestSelfTerminating(ObjectiveInProcess):
    objective = SelfTerminating
    options: ClassVar = {"epsilon": 0.02}
    null_options: ClassVar = {"epsilon": 0.0, "free": "softmax"}
    attached_sft = True


@pytest.mark.parametrize("free", ["sigmoid", "softmax"])
def test_probabilities_are_those_of_the_definition_and_sum_to_one(free):
    logits = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0)).double() * 4
    read = torch.arange(1, 7).expand(5, 6)
    found = self_terminating(logits, read, 3, 0.07, free).exp()
    own = logits[..., 3].sigmoid() if free == "sigmoid" else logits.softmax(-1)[..., 3]
    end = 1 - (1 - 0.07) ** read * (1 - own)
    rest = logits.clone()
    rest[..., 3] = -torch.inf
    expected = (1 - end)[..., None] * rest.softmax(-1)
    expected[..., 3] = end
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(5, 6).double())
    lower = 1 - (1 - 0.07) ** read
    assert (end > lower).all(), "the end fell below its bound"


def test_without_a_bound_and_with_the_softmax_it_is_the_plain_model():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).double()
    found = self_terminating(logits, torch.tensor([1, 5, 500, 50000]), 2, 0.0, "softmax")
    assert torch.allclose(found, logits.log_softmax(-1), atol=1e-12)


@pytest.mark.parametrize("free", ["sigmoid", "softmax"])
@pytest.mark.parametrize("end", [-1e4, -120.0, 0.0, 120.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.3])
def test_extreme_logits_keep_finite_losses_and_gradients(free, end, epsilon):
    """Stock models have logits of -100 and less, whose sigmoid is nothing in float32."""
    for target in (0, 2):
        logits = torch.tensor([0.5, -0.5, end], requires_grad=True)
        loss = -self_terminating(logits, torch.tensor(3), 2, epsilon, free)[target]
        loss.backward()
        assert torch.isfinite(loss), loss
        assert torch.isfinite(logits.grad).all(), logits.grad


@pytest.mark.parametrize("free", ["sigmoid", "softmax"])
@pytest.mark.parametrize("end", [-1e4, -120.0, 0.0, 3.0, 120.0])
def test_the_loss_of_statistics_is_that_of_the_probabilities(free, end):
    """Losses and gradients, also where the end has next to all or nothing of the softmax, as target and not."""
    logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(3)) - 20  # the softmax does not see that
    logits[:, 2] = end
    logits.requires_grad_()
    read, targets = torch.tensor([1, 2, 3, 50, 1, 2, 3, 5000]), torch.tensor([0, 1, 3, 6, 2, 2, 2, 2])
    expected = -self_terminating(logits, read, 2, 0.01, free)[torch.arange(8), targets].sum()
    (slope,) = torch.autograd.grad(expected, logits)
    ours = SelfTerminating(epsilon=0.01, eos_token_id=2, free=free)
    ours.setup(None, None, None)
    ours._inputs = {"input_ids": torch.zeros(8, 1), "position_ids": read[:, None] - 1}
    found, count, _ = loss_of_statistics(ours, None, logits[:, None], targets[:, None], {})
    (given,) = torch.autograd.grad(found, logits)
    assert int(count) == 8
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    difference = float((given - slope).abs().max())
    assert difference < 2e-6, f"gradients differ by up to {difference:.3g}"


def test_with_the_softmax_only_ends_have_another_gradient_than_plain_training():
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    read, targets = torch.tensor([4, 9]), torch.tensor([5, 3])
    found = self_terminating(logits, read, 3, 0.1, "softmax")
    (ours,) = torch.autograd.grad(-found[torch.arange(2), targets].sum(), logits)
    (plain,) = torch.autograd.grad(functional.cross_entropy(logits, targets, reduction="sum"), logits)
    assert torch.allclose(ours[0], plain[0], atol=1e-12)
    assert float(found[0, 5].detach()) == pytest.approx(
        float(logits.log_softmax(-1)[0, 5].detach()) + 4 * math.log(0.9)
    )
    assert ours[1].abs().max() < plain[1].abs().max(), "the bound has part of the end's probability already"


# -- a toy that never ends by itself ----------------------------------------------------------------

TOY_EPSILON = 0.2
WORDS = 3  # and the end, token 0


def toy(previous):
    """Logits of a language whose end is next to impossible: words in a circle, some doubt."""
    logits = torch.full((1 + WORDS,), -30.0, dtype=torch.float64)
    logits[1 + previous % WORDS] = 2.0
    logits[1 + (previous + 1) % WORDS] = 1.0
    return logits


def next_probabilities(text, keep=None, nucleus=None):
    found = self_terminating(toy(text[-1]), torch.tensor(len(text)), 0, TOY_EPSILON, "sigmoid").exp()
    order = found.argsort(descending=True)
    if nucleus is not None:
        keep = int((found[order].cumsum(0) < nucleus).sum()) + 1
    if keep is not None:
        found[order[keep:]] = 0
    return found / found.sum()


@pytest.mark.parametrize("truncation", [{}, {"keep": 1}, {"keep": 2}, {"nucleus": 0.3}, {"nucleus": 0.9}])
def test_by_enumeration_all_probability_ends_however_the_distribution_is_truncated(truncation):
    """Walk through all texts of the toy: what has not ended vanishes, and greedy search ends in time."""
    going = {(1,): 1.0}
    ended = 0.0
    last = longest_text(TOY_EPSILON)
    for length in range(1, 3 * last):
        after: dict[tuple[int, ...], float] = {}
        for text, weight in going.items():
            share = next_probabilities(text, **truncation)
            ended += weight * float(share[0])
            if length >= last:
                assert share[0] > 0.5, f"after {length} tokens the end has {share[0]}"
            for token in range(1, 1 + WORDS):
                if share[token] > 0:
                    # only the last token and the length matter to this toy, so texts that share them go on as one
                    key = (*([0] * (length)), token)
                    after[key] = after.get(key, 0.0) + weight * float(share[token])
        going = after
        assert ended + sum(going.values()) == pytest.approx(1)
        if not truncation:
            exact = math.prod((1 - TOY_EPSILON) ** t for t in range(1, length + 1))
            assert sum(going.values()) == pytest.approx(exact, rel=1e-9), "p is next to nothing in this toy"
        if truncation == {"keep": 1} and length >= last:
            assert not going, "greedy search has not ended"
    assert sum(going.values()) < 2 ** -(2 * last - 1)


def endless():
    """A model that is sure of itself and never ends: the end's logit is the least there is."""
    model = tiny_model().eval()
    model.lm_head.weight.data *= 1e4
    model.lm_head.weight.data[EOS] = 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    model.lm_head.bias.data[EOS] = -1e6
    return model


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 2}, {"do_sample": True, "top_p": 0.2, "top_k": 0}]
)
def test_generation_ends_in_time_where_plain_generation_does_not(options):
    model, epsilon = endless(), 0.05
    last = longest_text(epsilon)
    ids = torch.tensor([[0, 0, BOS, 5, 6], [BOS, 9, 8, 7, 11]])
    mask = (ids != 0).long()
    given = {"attention_mask": mask, "max_length": 3 * last, "pad_token_id": 0, "eos_token_id": EOS}
    torch.manual_seed(0)
    plain = model.generate(ids, **given, **{"do_sample": False, **options})
    assert plain.shape[1] == 3 * last, "the model ends by itself, so this test says nothing"
    assert not (plain == EOS).any()
    end = SelfTerminatingLogitsProcessor(epsilon, EOS, attention_mask=mask)
    out = model.generate(ids, logits_processor=[end], **given, **{"do_sample": False, **options})
    assert (out == EOS).any(-1).all()
    if not options:
        # each row has read as many tokens as its bound allows, its own padding not counted
        read = [
            (row == EOS).nonzero()[0].item() - int((given == 0).sum()) for row, given in zip(out, mask, strict=True)
        ]
        assert read == [last, last]


def test_the_processor_wants_the_mask_of_the_batch_it_decodes():
    end = SelfTerminatingLogitsProcessor(0.1, EOS, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask is of 2 prompts, which does not go with 3 rows"):
        end(torch.ones(3, 4, dtype=torch.long), torch.zeros(3, 64))


# -- the objective ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_the_loss_is_the_likelihood_of_the_texts_and_padding_has_no_position(left):
    rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in examples(4)]  # nothing predicts a first token

    def padded(some):
        batch = collate(some)
        if left:
            lengths = batch["attention_mask"].sum(-1)
            return {
                name: torch.stack([row.roll(int(len(row) - n)) for row, n in zip(value, lengths, strict=True)])
                for name, value in batch.items()
            }
        return batch

    model, total, count = tiny_model().eval(), 0.0, 0
    batch = padded(rows)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(ids).logits[0]
        for place, label in itertools.islice(enumerate(row["labels"]), 1, None):
            if label != -100:
                found = self_terminating(logits[place - 1], torch.tensor(place), EOS, 0.03, "sigmoid")
                total -= float(found[label].detach())
                count += 1

    class Once(SelfTerminating):
        @property
        def batch(self):
            return batch

    ours = Once(epsilon=0.03)
    ours.setup(model, None, arguments("out"))
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits
    found, number, plain = loss_of_statistics(ours, None, logits, targets, {})
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert float(plain) == pytest.approx(float(expected.detach()), rel=1e-5), "what clean_loss is made of"
    assert int(number) == count
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)


def test_training_teaches_how_often_texts_end():
    """The tokens are random, so the best probability of an end is their share of the targets."""
    trainer = train(tiny_model(), SelfTerminating(epsilon=1e-4), max_steps=12)
    seen = [entry["end_probability"] for entry in trainer.state.log_history if "end_probability" in entry]
    labels = [label for row in examples(16) for label in row["labels"][1:] if label != -100]
    assert seen[0] == pytest.approx(0.5, abs=0.02), "the sigmoid of a logit near 0"
    assert abs(seen[-1] - 16 / len(labels)) < 0.06, (seen, 16 / len(labels))


def test_a_model_with_several_ends_or_none_is_refused_with_the_remedy():
    for ends in ([2, 5], None):
        with pytest.raises(ValueError, match=r"name the one that your data use: SelfTerminating\(eos_token_id="):
            train(tiny_model(eos_token_id=ends), SelfTerminating())
    train(tiny_model(eos_token_id=[2, 5]), SelfTerminating(eos_token_id=2), max_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.0}, "epsilon must be a number from 0"),
        ({"epsilon": -0.1}, "epsilon must be a number from 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be one token id"),
        ({"free": "none"}, "free must be one of sigmoid, softmax"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfTerminating(**options)
    with pytest.raises(ValueError, match=message):
        SelfTerminatingLogitsProcessor(**{"epsilon": 0.1, "eos_token_id": 2, **options})


def test_nothing_has_to_end_without_a_bound():
    with pytest.raises(ValueError, match="above 0 and below 1 only"):
        longest_text(0.0)
