"""The acceptance rules are exact: all drafts and all coins are gone through, nothing is sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from hf_ext.generation.speculative.acceptance import (
    Rule,
    acceptance_rate,
    deterministic,
    expected_tokens,
    k_seq,
    multi_draft_acceptance,
    single_draft,
    solve_rho,
    with_replacement,
    without_replacement,
)

EXACT = 1e-12
#: Drafts that may be drawn, and with which probability.
Draws = Iterator[tuple[list[int], float]]


def independent(q: list[float], k: int) -> Draws:
    for drafts in itertools.product(range(len(q)), repeat=k):
        if (weight := math.prod(q[x] for x in drafts)) > 0:
            yield list(drafts), weight


def distinct(q: list[float], k: int) -> Draws:
    """One token after the other, from what the ones before have left; fewer where nothing is left."""

    def extend(drawn: list[int], weight: float, left: list[float]) -> Draws:
        mass = math.fsum(left)
        if len(drawn) == k or mass == 0:
            yield drawn, weight
            return
        for x, share in enumerate(left):
            if share > 0:
                rest = [0.0 if y == x else other for y, other in enumerate(left)]
                yield from extend([*drawn, x], weight * share / mass, rest)

    yield from extend([], 1.0, q)


def best_first(q: list[float], k: int) -> Draws:
    yield sorted(range(len(q)), key=lambda x: -q[x])[:k], 1.0


def one(q: list[float], k: int) -> Draws:
    yield from independent(q, 1)


RULES: dict[str, tuple[Rule, Callable[[list[float], int], Draws]]] = {
    "single_draft": (single_draft, one),
    "k_seq": (k_seq, independent),
    "with_replacement": (with_replacement, independent),
    "without_replacement": (without_replacement, distinct),
    "deterministic": (deterministic, best_first),
}
every_rule = pytest.mark.parametrize("name", RULES)
every_rule_that_knows_q = pytest.mark.parametrize("name", [name for name in RULES if name != "deterministic"])


def decide(rule: Rule, p: torch.Tensor, q: torch.Tensor | None, drafts: list[int]) -> tuple[list[float], torch.Tensor]:
    """Probabilities of taking each draft and, scaled by the probability that all are rejected, of each token then."""
    alive, taken = 1.0, []
    decisions = rule(p, q, drafts)
    while True:
        try:
            chance = next(decisions)
        except StopIteration as stop:
            residual = stop.value
            break
        assert isinstance(chance, float)
        assert 0 <= chance <= 1, f"{rule.__name__} yields the probability {chance}"
        taken.append(alive * chance)
        alive *= 1 - chance
    assert len(taken) == len(drafts)
    assert (residual >= 0).all(), f"{rule.__name__} returns a negative probability: {residual}"
    tolerance = 1e-5 if residual.dtype == torch.float32 else EXACT
    assert abs(float(residual.sum()) - 1) < tolerance, f"the residual of {rule.__name__} sums to {residual.sum()}"
    return taken, alive * residual.double()


def law(name: str, p: torch.Tensor, q: torch.Tensor, k: int) -> torch.Tensor:
    """The law of the token that comes out at one node."""
    rule, draws = RULES[name]
    out = torch.zeros(len(p), dtype=torch.float64)
    for drafts, weight in draws(q.tolist(), k):
        taken, rest = decide(rule, p, None if name == "deterministic" else q, drafts)
        for token, share in zip(drafts, taken, strict=True):
            assert share == 0 or p[token] > 0, f"{name} accepts a token of probability 0"
            out[token] += weight * share
        assert not rest[p == 0].any(), f"{name} leaves probability on a token that has none"
        out += weight * rest
    return out


def dirichlet(generator: torch.Generator, vocab: int, sharpness: float = 1.0) -> torch.Tensor:
    return (sharpness * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(0)


def zeroed(x: torch.Tensor, *tokens: int) -> torch.Tensor:
    x = x.clone()
    x[list(tokens)] = 0
    return x / x.sum()


def random_cases() -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    for vocab, k in ((2, 2), (3, 1), (3, 4), (4, 3), (5, 2), (6, 3), (6, 4)):
        for sharpness in (0.5, 2.0, 6.0):
            yield dirichlet(generator, vocab, sharpness), dirichlet(generator, vocab, sharpness), k


def hard_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    p, q = dirichlet(generator, 5), dirichlet(generator, 5)
    certain = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    almost = torch.tensor([1e-15, 1e-9, 1 - 1e-9, 1e-15, 0.0], dtype=torch.float64)
    even = torch.full((5,), 0.2, dtype=torch.float64)
    return {
        "zeros in p": (zeroed(p, 1, 3), q, 3),
        "zeros in q": (p, zeroed(q, 0, 2), 3),
        "zeros in both": (zeroed(p, 1, 3), zeroed(q, 1, 2), 3),
        "equal": (p, p.clone(), 3),
        "equal but for rounding": (p, (p.log() + 0.1).softmax(0), 3),
        "equal with zeros": (zeroed(p, 4), zeroed(p, 4), 3),
        "disjoint": (zeroed(p, 0, 1), zeroed(q, 2, 3, 4), 3),
        "target certain": (certain, q, 3),
        "draft certain": (p, certain, 3),
        "both certain": (certain, certain.clone(), 3),
        "certain of different tokens": (certain, certain.flip(0).roll(1), 3),
        "target almost certain": (almost, q, 3),
        "draft almost certain": (p, almost, 3),
        "both almost certain": (almost, almost.roll(1), 3),
        "even target": (even, q, 4),
        "even draft": (p, even, 4),
    }


@every_rule
def test_law_is_the_target_whatever_the_draft(name: str) -> None:
    errors = [float((law(name, p, q, k) - p).abs().max()) for p, q, k in random_cases()]
    assert max(errors) <= EXACT, f"{name}: largest error {max(errors):.2e} in case {errors.index(max(errors))}"


@every_rule
@pytest.mark.parametrize("case", hard_cases())
def test_law_is_the_target_in_hard_cases(name: str, case: str) -> None:
    p, q, k = hard_cases()[case]
    error = float((law(name, p, q, k) - p).abs().max())
    assert error <= EXACT, f"{name}: largest error {error:.2e}"


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_law_is_the_target_up_to_rounding_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    tolerance = torch.finfo(dtype).eps
    for case, (p, q, k) in hard_cases().items():
        error = float((law(name, p.to(dtype), q.to(dtype), k) - p).abs().max())
        assert error <= tolerance, f"{name}, {case}: largest error {error:.2e}"


@every_rule
def test_without_drafts_the_target_itself_comes_back(name: str) -> None:
    p = dirichlet(torch.Generator().manual_seed(0), 4)
    with pytest.raises(StopIteration) as stop:
        next(RULES[name][0](p, p, []))
    assert stop.value.value is p


@every_rule
def test_given_tensors_are_left_as_they_are(name: str) -> None:
    p, q, _ = next(random_cases())
    before = p.clone(), q.clone()
    decide(RULES[name][0], p, q, [0] if name == "single_draft" else [0, 1])
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@every_rule_that_knows_q
def test_draft_equal_to_target_is_accepted_at_once(name: str) -> None:
    p = dirichlet(torch.Generator().manual_seed(0), 5)
    for token in range(5):
        assert next(RULES[name][0](p, p.clone(), [token])) == 1.0


@every_rule_that_knows_q
def test_draft_that_cannot_have_been_drawn_is_rejected(name: str) -> None:
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    assert next(RULES[name][0](p, q, [0])) == 0.0


@every_rule
def test_nothing_is_computed_for_rejections_before_one_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, _ = next(random_cases())
    decisions = RULES[name][0](p, q, [0])

    def refuse(*_: object) -> None:
        raise AssertionError("a residual was normalised")

    monkeypatch.setattr("hf_ext.generation.speculative.acceptance._normalised", refuse)
    next(decisions)
    with pytest.raises(AssertionError, match="residual"):
        next(decisions)


def test_token_that_was_rejected_is_not_accepted_when_chosen_again() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    taken, rest = decide(deterministic, p, None, [0, 0, 1])
    assert taken[1] == 0
    out = rest + torch.tensor([taken[0], taken[2], 0], dtype=torch.float64)
    assert torch.allclose(out, p, rtol=0, atol=EXACT), f"largest error {(out - p).abs().max():.2e}"


@pytest.mark.parametrize("draws", [independent, distinct])
def test_deterministic_rule_is_exact_for_drawn_drafts_too(draws: Callable[[list[float], int], Draws]) -> None:
    for p, q, k in random_cases():
        out = torch.zeros_like(p)
        for drafts, weight in draws(q.tolist(), k):
            taken, rest = decide(deterministic, p, None, drafts)
            out += weight * rest
            for token, share in zip(drafts, taken, strict=True):
                out[token] += weight * share
        assert (out - p).abs().max() <= EXACT, f"largest error {(out - p).abs().max():.2e}"


def test_distinct_drafts_may_stop_after_any_number_that_the_past_decides() -> None:
    """As in a stochastic beam: whether a second child is kept depends on the first."""
    generator = torch.Generator().manual_seed(2)
    p, q = dirichlet(generator, 4), dirichlet(generator, 4)
    out = torch.zeros_like(p)
    for drafts, weight in distinct(q.tolist(), 3):
        kept = drafts[: 1 + drafts[0] % 3]
        taken, rest = decide(without_replacement, p, q, kept)
        out += weight * rest
        for token, share in zip(kept, taken, strict=True):
            out[token] += weight * share
    assert (out - p).abs().max() <= EXACT, f"largest error {(out - p).abs().max():.2e}"


@every_rule
def test_first_three_tokens_of_a_walk_over_trees_have_the_law_of_the_target(name: str) -> None:
    """Two levels of two drafts each under every root, rounds repeated until three tokens are out."""
    vocab, levels, k = 3, 2, 1 if name == "single_draft" else 2
    generator = torch.Generator().manual_seed(3)
    target = torch.stack([dirichlet(generator, vocab, 1.5) for _ in range(vocab)])
    draft = torch.stack([dirichlet(generator, vocab, 1.5) for _ in range(vocab)])
    target[1] = zeroed(target[1], 0)
    draft[2] = zeroed(draft[2], 1)
    rule, draws = RULES[name]

    def add(law: dict[tuple[int, ...], float], tokens: tuple[int, ...], weight: float) -> None:
        law[tokens] = law.get(tokens, 0.0) + weight

    @cache
    def decision(root: int, drafts: tuple[int, ...]) -> tuple[list[float], list[float]]:
        q = None if name == "deterministic" else draft[root]
        taken, rest = decide(rule, target[root], q, list(drafts))
        return taken, rest.tolist()

    def trees(root: int, depth: int) -> Iterator[tuple[list[tuple[int, list]], float]]:
        """All draft trees under a root: children with their own subtrees, and the probability of drawing them."""
        if depth == 0:
            yield [], 1.0
            return
        for drafts, weight in draws(draft[root].tolist(), k):
            below = [list(trees(token, depth - 1)) for token in drafts]
            for subtrees in itertools.product(*below):
                tree = [(token, subtree) for token, (subtree, _) in zip(drafts, subtrees, strict=True)]
                yield tree, weight * math.prod(share for _, share in subtrees)

    def walk(root: int, tree: list[tuple[int, list]], weight: float, out: tuple[int, ...], law: dict) -> None:
        taken, rest = decision(root, tuple(token for token, _ in tree))
        for (token, subtree), share in zip(tree, taken, strict=True):
            if share:
                walk(token, subtree, weight * share, (*out, token), law)
        for token, share in enumerate(rest):
            if share:
                add(law, (*out, token), weight * share)

    @cache
    def one_round(root: int) -> dict[tuple[int, ...], float]:
        law: dict[tuple[int, ...], float] = {}
        for tree, weight in trees(root, levels):
            walk(root, tree, weight, (), law)
        return law

    def continued(root: int, wanted: int) -> dict[tuple[int, ...], float]:
        law: dict[tuple[int, ...], float] = {}
        for tokens, weight in one_round(root).items():
            if len(tokens) >= wanted:
                add(law, tokens[:wanted], weight)
                continue
            for more, share in continued(tokens[-1], wanted - len(tokens)).items():
                add(law, tokens + more, weight * share)
        return law

    assert {len(tokens) for root in range(vocab) for tokens in one_round(root)} == {1, 2, 3}, "it ends at every level"
    for root in range(vocab):
        found = continued(root, 3)
        errors = {
            (a, b, c): abs(found.get((a, b, c), 0.0) - float(target[root, a] * target[a, b] * target[b, c]))
            for a, b, c in itertools.product(range(vocab), repeat=3)
        }
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= EXACT, f"{name} after {root}: {worst} is off by {errors[worst]:.2e}"


def test_rho_solves_its_equation() -> None:
    for p, q, k in [*random_cases(), *hard_cases().values()]:
        rho = solve_rho(p, q, k)
        beta = float(torch.minimum(q, p / rho).sum())
        assert 1 <= rho <= k
        assert abs(1 - (1 - beta) ** k - rho * beta) <= EXACT, f"rho={rho}, beta={beta}, k={k}"


def test_rho_solves_its_equation_on_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5000, generator=generator)
    p, q = logits.softmax(0), (logits + torch.randn(5000, generator=generator)).softmax(0)
    q[logits < 0] = 0
    for k in (2, 3, 7):
        rho = solve_rho(p, q, k)
        beta = float(torch.minimum(q.double(), p.double() / rho).sum())
        assert abs(1 - (1 - beta) ** k - rho * beta) <= 1e-10, f"rho={rho}, beta={beta}, k={k}"


def test_one_draft_is_accepted_with_the_overlap_of_the_distributions() -> None:
    for p, q, _ in [*random_cases(), *hard_cases().values()]:
        overlap = math.fsum(min(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        found = math.fsum(weight * decide(single_draft, p, q, x)[0][0] for x, weight in one(q.tolist(), 1))
        assert abs(found - overlap) <= EXACT
        assert abs(acceptance_rate(p, q) - overlap) <= EXACT


def test_acceptance_rate_of_rows_is_their_mean() -> None:
    (p, q, _), (r, s, _) = itertools.islice((case for case in random_cases() if len(case[0]) == 6), 2)
    mean = (acceptance_rate(p, q) + acceptance_rate(r, s)) / 2
    assert abs(acceptance_rate(torch.stack([p, r]), torch.stack([q, s])) - mean) <= EXACT


@pytest.mark.parametrize("gamma", [0, 1, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1 - 1e-9, 1.0])
def test_expected_tokens_are_those_of_the_chain(alpha: float, gamma: int) -> None:
    # n drafts are accepted and one token more comes out; the last is the bonus of a chain accepted whole.
    chain = math.fsum((n + 1) * alpha**n * (1 - alpha) for n in range(gamma)) + (gamma + 1) * alpha**gamma
    assert abs(expected_tokens(alpha, gamma) - chain) <= EXACT
    if alpha < 0.9:
        assert abs(expected_tokens(alpha, gamma) - (1 - alpha ** (gamma + 1)) / (1 - alpha)) <= EXACT


def test_multi_draft_acceptance_is_what_the_enumeration_gives() -> None:
    for p, q, k in random_cases():
        for name, replacement in (("k_seq", True), ("with_replacement", True), ("without_replacement", False)):
            rule, draws = RULES[name]
            slow = math.fsum(weight * sum(decide(rule, p, q, x)[0]) for x, weight in draws(q.tolist(), k))
            assert abs(multi_draft_acceptance(rule, p, q, k, replacement) - slow) <= EXACT


def test_k_seq_accepts_with_the_probability_of_its_closed_form() -> None:
    for p, q, k in random_cases():
        beta = float(torch.minimum(q, p / solve_rho(p, q, k)).sum())
        assert abs(multi_draft_acceptance(k_seq, p, q, k, True) - (1 - (1 - beta) ** k)) <= EXACT


def test_more_drafts_are_accepted_more_often_and_distinct_ones_most() -> None:
    for p, q, k in random_cases():
        if k == 1:
            continue
        single = acceptance_rate(p, q)
        repeated = multi_draft_acceptance(with_replacement, p, q, k, True)
        assert multi_draft_acceptance(k_seq, p, q, k, True) > single
        assert repeated > single
        assert multi_draft_acceptance(without_replacement, p, q, k, False) > repeated


def test_enumeration_stops_where_no_token_is_left_to_draw() -> None:
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    two = multi_draft_acceptance(without_replacement, p, q, 2, False)
    assert multi_draft_acceptance(without_replacement, p, q, 3, False) == two
    assert abs(two - 0.5) <= EXACT


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="takes one draft at a node, got 2"):
        next(single_draft(p, p, [0, 1]))
    with pytest.raises(ValueError, match="distinct, got"):
        next(without_replacement(p, p, [1, 1]))
    for rule in (single_draft, k_seq, with_replacement, without_replacement):
        with pytest.raises(ValueError, match="needs q"):
            next(rule(p, None, [0]))
        with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
            next(rule(p, q, [0]))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        solve_rho(p, p, 0)
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        expected_tokens(1.5, 2)
    with pytest.raises(ValueError, match="gamma=-1"):
        expected_tokens(0.5, -1)
