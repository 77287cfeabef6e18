"""Distinct drafts have the law of drawing one after the other; every estimate is judged by its own error bar."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_ext.generation.speculative.acceptance import without_replacement
from hf_ext.generation.speculative.without_replacement import BeamStep, gumbel_top_k, stochastic_beam_step

#: Largest deviation in standard errors. The seeds are fixed; about a hundred figures are judged.
SIGMAS = 4.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequential(masses: list[float], k: int) -> dict[tuple[int, ...], float]:
    """The law of k items drawn one after the other from what is left."""
    law = {}
    for drawn in itertools.permutations([i for i, mass in enumerate(masses) if mass > 0], k):
        left = [math.fsum(mass for i, mass in enumerate(masses) if i not in drawn[:n]) for n in range(k)]
        law[drawn] = math.prod(masses[i] / mass for i, mass in zip(drawn, left, strict=True))
    return law


def assert_law(draws: torch.Tensor, law: dict[tuple[int, ...], float]) -> None:
    """Compare `(n, k)` draws with the probabilities they should have; rare ones are taken together."""
    found, counts = draws.unique(dim=0, return_counts=True)
    seen = {tuple(row): count for row, count in zip(found.tolist(), counts.tolist(), strict=True)}
    assert set(seen) <= set(law), f"drawn, but impossible: {set(seen) - set(law)}"
    assert math.isclose(math.fsum(law.values()), 1)
    n = len(draws)
    rare = {x for x, mass in law.items() if n * mass < 25}
    pairs = {x: (seen.get(x, 0) / n, mass) for x, mass in law.items() if x not in rare}
    pairs["rare"] = sum(seen.get(x, 0) for x in rare) / n, math.fsum(law[x] for x in rare)
    deviations = {
        x: (share - mass) / math.sqrt(max(mass * (1 - mass), 1 / n) / n) for x, (share, mass) in pairs.items()
    }
    worst = max(deviations, key=lambda x: abs(deviations[x]))
    assert abs(deviations[worst]) < SIGMAS, (
        f"{worst}: found {pairs[worst][0]:.6f}, expected {pairs[worst][1]:.6f}, off by {deviations[worst]:.1f} sigma"
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_tokens_have_the_law_of_drawing_one_after_the_other(k: int) -> None:
    masses = [0.55, 0.0, 0.2, 0.15, 0.1]
    scores = torch.tensor(masses).log() + 3.0  # logits need no normalising
    assert_law(gumbel_top_k(scores.expand(200_000, -1), k, seeded(k)), sequential(masses, k))


def test_what_is_left_of_a_sharp_distribution_is_drawn_by_its_own_law() -> None:
    masses = [1.0, 3e-9, 1e-9, 0.0]
    scores = torch.tensor(masses, dtype=torch.float64).log().float()
    assert_law(gumbel_top_k(scores.expand(100_000, -1), 2, seeded()), sequential(masses, 2))


def test_rows_are_drawn_from_their_own_distribution() -> None:
    a, b = [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]
    scores = torch.tensor([a, b]).log().expand(50_000, 2, 3)
    tokens = gumbel_top_k(scores, 2, seeded())
    assert_law(tokens[:, 0], sequential(a, 2))
    assert_law(tokens[:, 1], sequential(b, 2))


def test_token_without_probability_is_never_drawn_and_the_row_ends_in_minus_one() -> None:
    scores = torch.tensor([[-200.0, 0.0, -torch.inf, 50.0], [-torch.inf] * 4, [0.0] * 4])
    tokens = gumbel_top_k(scores.repeat(2000, 1), 6, seeded()).view(2000, 3, 6)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 0].sort().values, torch.tensor([-1, -1, -1, 0, 1, 3]).expand(2000, -1))
    assert (tokens[:, 0, 3:] == -1).all()
    assert (tokens[:, 1] == -1).all()
    assert torch.equal(tokens[:, 2].sort().values, torch.tensor([-1, -1, 0, 1, 2, 3]).expand(2000, -1))


def test_draws_repeat_with_the_generator_and_leave_the_scores_alone() -> None:
    scores = torch.randn(3, 50, generator=seeded())
    before = scores.clone()
    assert torch.equal(gumbel_top_k(scores, 4, seeded(7)), gumbel_top_k(scores, 4, seeded(7)))
    assert not torch.equal(gumbel_top_k(scores, 4, seeded(7)), gumbel_top_k(scores, 4, seeded(8)))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("draw", [gumbel_top_k, lambda s, k: stochastic_beam_step(s, s[:, 0], s[:, 0], k)])
def test_drawing_nothing_is_refused(draw) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw(torch.zeros(1, 3), 0)


ROOT = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
BELOW = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 1.0], [0.25, 0.0, 0.75]], dtype=torch.float64)


def two_levels(n: int, k: int, widths: tuple[int, int] | None = None, seed: int = 0) -> tuple[BeamStep, BeamStep]:
    """n independent beams of two levels over the two tables."""
    generator = seeded(seed)
    first_k, second_k = widths or (k, k)
    zero = torch.zeros(n, 1, dtype=torch.float64)
    first = stochastic_beam_step(ROOT.expand(n, 1, 3), zero, zero, first_k, generator)
    table = BELOW[first.tokens]
    return first, stochastic_beam_step(table, first.log_probs, first.perturbed, second_k, generator)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sequences_have_the_law_of_drawing_whole_sequences_one_after_the_other(k: int) -> None:
    first, second = two_levels(200_000, k, seed=k)
    sequences = first.tokens.gather(-1, second.parents) * 3 + second.tokens
    masses = (ROOT[0][:, None] * BELOW).flatten().tolist()
    assert_law(sequences, sequential(masses, k))


def test_siblings_have_the_law_of_drawing_one_after_the_other() -> None:
    zero = torch.zeros(200_000, 1)
    step = stochastic_beam_step(ROOT.expand(200_000, 1, 3), zero, zero, 3, seeded())
    assert_law(step.tokens, sequential(ROOT[0].tolist(), 3))


def test_best_child_has_the_value_of_its_parent_and_values_fall() -> None:
    first, second = two_levels(2000, 3, widths=(3, 9))
    assert (second.perturbed[:, :-1] >= second.perturbed[:, 1:]).all()
    assert torch.equal(first.perturbed[:, 0], torch.zeros(2000, dtype=torch.float64))
    for parent in range(3):
        best = second.perturbed.masked_fill(second.parents != parent, -torch.inf).max(-1).values
        assert torch.equal(best, first.perturbed[:, parent]), f"{(best - first.perturbed[:, parent]).abs().max()}"


def test_log_probabilities_are_those_of_the_sequences() -> None:
    first, second = two_levels(500, 2, widths=(3, 6))
    there = second.perturbed > -torch.inf
    parents = first.tokens.gather(-1, second.parents.clamp(min=0))
    expected = (ROOT[0][parents] * BELOW[parents, second.tokens.clamp(min=0)]).log()
    error = (second.log_probs - expected)[there].abs().max()
    assert error < 1e-12, f"largest error {error:.2e}"


def test_nodes_that_are_not_there_are_marked_and_have_no_children() -> None:
    """Six of nine sequences have a probability; the other places stay empty, on the next level, too."""
    first, second = two_levels(500, 3, widths=(5, 9))
    assert (first.parents[:, 3:] == -1).all()
    assert (first.tokens[:, 3:] == -1).all()
    assert first.perturbed[:, 3:].isneginf().all()
    assert first.log_probs[:, 3:].isneginf().all()
    absent = second.perturbed.isneginf()
    assert (absent.sum(-1) == 3).all()
    assert absent[:, 6:].all()
    for part in (second.parents, second.tokens):
        assert (part[absent] == -1).all()
        assert (part[~absent] >= 0).all()
    assert second.log_probs[absent].isneginf().all()
    assert not any(part.isnan().any() for part in (second.perturbed, second.log_probs))
    third = stochastic_beam_step(BELOW[second.tokens], second.log_probs, second.perturbed, 40, seeded())
    assert not third.perturbed.isnan().any()
    assert (third.parents < 6).all()


def test_parent_is_absent_by_its_value_alone() -> None:
    perturbed = torch.tensor([-torch.inf, 0.0])
    step = stochastic_beam_step(BELOW[:1].expand(2, 3), torch.zeros(2), perturbed, 6, seeded())
    assert step.parents.tolist() == [1, 1, 1, -1, -1, -1]
    assert step.perturbed[3:].isneginf().all()


def test_parent_without_any_possible_child_has_none() -> None:
    law = torch.stack([torch.zeros(3, dtype=torch.float64), BELOW[0]])
    step = stochastic_beam_step(law, torch.zeros(2), torch.zeros(2), 6, seeded())
    assert step.parents.tolist() == [1, 1, 1, -1, -1, -1]
    assert step.perturbed[3:].isneginf().all()


def test_values_are_conditioned_without_loss_far_from_zero() -> None:
    """Parents of log-probability about -1000, as at the end of a long text: differences are as near 0."""
    zero = torch.zeros(200, 1, dtype=torch.float64)
    law = torch.randn(200, 1, 50, generator=seeded(), dtype=torch.float64).softmax(-1)
    near = stochastic_beam_step(law, zero, zero, 50, seeded(1))
    far = stochastic_beam_step(law, zero - 1000, zero - 1000, 50, seeded(1))
    assert torch.equal(near.tokens, far.tokens)
    assert near.perturbed.isfinite().all()
    error = (near.perturbed - far.perturbed - 1000).abs().max()
    assert error < 1e-9, f"largest error {error:.2e}"


def test_beam_as_a_draft_tree_keeps_the_law_of_the_target() -> None:
    """Trees are drawn, coins gone through: the first two tokens after the root have the target's law."""
    root = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    below = torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0.7, 0.2, 0.1]], dtype=torch.float64)
    n = 4000
    first, second = two_levels(n, 2, widths=(2, 3))
    decisions: dict[tuple[int, tuple[int, ...]], tuple[list[float], torch.Tensor]] = {}

    def decide(parent: int, drafts: tuple[int, ...]) -> tuple[list[float], torch.Tensor]:
        """Probabilities of each draft and, scaled by the probability of rejecting all, of each token then."""
        if (parent, drafts) not in decisions:
            p, q = (root, ROOT[0]) if parent < 0 else (below[parent], BELOW[parent])
            taken, alive, rule = [], 1.0, without_replacement(p, q, list(drafts))
            while True:
                try:
                    chance = next(rule)
                except StopIteration as stop:
                    decisions[parent, drafts] = taken, alive * stop.value
                    break
                taken.append(alive * chance)
                alive *= 1 - chance
        return decisions[parent, drafts]

    laws = torch.zeros(n, 3, 3, dtype=torch.float64)
    for law, tops, parents, tokens in zip(
        laws, first.tokens.tolist(), second.parents.tolist(), second.tokens.tolist(), strict=True
    ):
        taken, rest = decide(-1, tuple(tops))
        law += rest[:, None] * below  # rejected at the root: the second token is the next round's
        for node, (top, share) in enumerate(zip(tops, taken, strict=True)):
            children = tuple(token for parent, token in zip(parents, tokens, strict=True) if parent == node)
            below_taken, below_rest = decide(top, children)
            law[top] += share * below_rest
            for child, child_share in zip(children, below_taken, strict=True):
                law[top, child] += share * child_share
    kept = {sum(parent == node for parent in parents) for parents in second.parents.tolist() for node in (0, 1)}
    assert kept == {0, 1, 2, 3}, "nodes keep different numbers of children"
    errors = laws.mean(0) - root[:, None] * below
    sigmas = errors.abs() / (laws.std(0) / math.sqrt(n))
    assert sigmas.max() < SIGMAS, f"largest deviation {errors.abs().max():.2e}, {sigmas.max():.1f} sigma"
