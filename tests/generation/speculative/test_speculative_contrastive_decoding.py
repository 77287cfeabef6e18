"""Speculative contrastive decoding follows the law of contrastive decoding."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_ext.generation.speculative_contrastive_decoding import SpeculativeContrastiveDecoding, contrastive_logits
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, same_tokens


def amateur(kind: str = "llama"):
    return exactness.perturbed(tiny_models.shared(kind), 0.2)


class TestConformance(StrategyConformance):
    def strategy(self):
        return SpeculativeContrastiveDecoding(amateur(), draft_tokens=3, beta=0.3, alpha=0.05)

    def test_scores_and_logits_are_those_of_the_model(self, kind):
        """The scores are the contrast, the logits those of the expert alone."""
        out = self.run(kind, return_dict_in_generate=True, output_scores=True, output_logits=True, top_k=0)
        expert, weak = tiny_models.shared(kind), amateur()
        ids, mask = tiny_models.prompts()
        for row in range(len(ids)):
            alone = torch.cat([ids[row][mask[row].bool()], out.sequences[row, ids.shape[1] :]])[None]
            with torch.no_grad():
                logits = [m(alone).logits[0, -1 - self.new_tokens : -1] for m in (expert, weak)]
            contrast = contrastive_logits(*logits, beta=0.3, alpha=0.05)
            close(torch.stack([step[row] for step in out.logits]), logits[0], f"{kind}, logits of row {row}")
            close(torch.stack([step[row] for step in out.scores]), contrast, f"{kind}, scores of row {row}", 0.02)


def test_without_contrast_it_is_greedy_search():
    exactness.assert_greedy_identity(
        lambda model: SpeculativeContrastiveDecoding(amateur(), 3, beta=0.0, alpha=0.0), kinds=("llama", "gemma3")
    )


@torch.no_grad()
def one_by_one(expert, weak, ids, new, beta, alpha):
    """Contrastive decoding as it is defined: both models read everything for every token."""
    for _ in range(new):
        logits = [model(ids, use_cache=False).logits[:, -1].double().log_softmax(-1) for model in (expert, weak)]
        score = (1 + beta) * logits[0] - beta * logits[1]
        plausible = logits[0].exp() >= alpha * logits[0].exp().max()
        ids = torch.cat([ids, score.where(plausible, -torch.inf).argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize(
    ("kind", "beta", "alpha"),
    [*((kind, 0.5, 0.1) for kind in tiny_models.DECODERS), ("gpt2", 1.5, 0.3), ("gemma3", 0.7, 0.0)],
)
def test_greedy_text_is_that_of_contrastive_decoding_token_by_token(kind, beta, alpha):
    expert, weak = tiny_models.shared(kind), amateur(kind)
    ids, mask = tiny_models.prompts((9, 4, 6))
    strategy = SpeculativeContrastiveDecoding(weak, 3, beta=beta, alpha=alpha)
    ours = strategy.generate(expert, ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    for row in range(len(ids)):
        alone = ids[row][mask[row].bool()][None]
        expected = one_by_one(expert, weak, alone, 16, beta, alpha)[:, alone.shape[1] :]
        same_tokens(ours[row : row + 1, ids.shape[1] :], expected, f"{kind}, row {row}, beta {beta}, alpha {alpha}")


@torch.no_grad()
def test_sampled_text_follows_the_contrastive_law():
    expert, weak = exactness.small_vocabulary(), exactness.small_vocabulary(seed=1)
    prompt, beta, alpha = torch.tensor([[3, 4, 2, 1]]), 0.5, 0.1
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    ids = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    scores = contrastive_logits(expert(ids).logits.double(), weak(ids).logits.double(), beta, alpha)[:, 3:6] / 0.8
    each = scores.double().softmax(-1).gather(2, every[:, :, None])[..., 0]
    law = dict(zip(map(tuple, every.tolist()), each.prod(1).tolist(), strict=True))
    exactness.assert_sampling_law(
        lambda model: SpeculativeContrastiveDecoding(weak, 3, beta=beta, alpha=alpha),
        expert, prompt=prompt, law=law, temperature=0.8,
    )  # fmt: skip


def test_implausible_tokens_are_never_said():
    logits = contrastive_logits(torch.tensor([0.0, -1.0, -3.0]), torch.tensor([5.0, 0.0, -9.0]), beta=1.0, alpha=0.1)
    assert (logits / 100).softmax(-1)[2] == 0, "even at a temperature of 100"
    assert (logits / 100).softmax(-1)[:2].min() > 0


@pytest.mark.parametrize("options", [{"beta": -0.1}, {"alpha": 1.5}, {"draft_tokens": -1}, {"beta": float("nan")}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SpeculativeContrastiveDecoding(amateur(), **options)
