"""Checks that a speculative strategy changes nothing but the time: greedy identity and sampling laws."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from hf_ext.generation.strategy import DecodingStrategy
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import same_tokens

#: Makes a strategy for a model.
Build = Callable[[Any], DecodingStrategy]

#: Prompts of the batch; the single row is the first.
LENGTHS = (12, 7, 3, 1, 9)


def settings_that_shape_text(free: torch.Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the settings under which greedy texts are compared.

    Args:
        free: `(rows, n)` new tokens of a run without any; at least 18 for five rows.
    """
    yield "plainly", {}
    # Tokens that the rows really say, so that rows end in the middle of a draft, each somewhere else.
    said = [int(row[5 + 3 * i]) for i, row in enumerate(free)]
    yield f"with eos tokens {said}", {"eos_token_id": said}
    yield "with eos tokens and min_new_tokens=9", {"eos_token_id": said, "min_new_tokens": 9}
    yield "with repetition_penalty=1.3", {"repetition_penalty": 1.3}
    if len(free) > 1:
        suppressed = free[:, 2].unique().tolist()
        yield "with n-grams and tokens forbidden", {"no_repeat_ngram_size": 2, "suppress_tokens": suppressed}


@functools.lru_cache(maxsize=64)
def greedy_texts(model: Any, rows: int, new_tokens: int) -> list[tuple[str, dict[str, Any], torch.Tensor]]:
    """Return what greedy `generate` says on the first prompts, however often it is asked.

    Args:
        model: the model; one that has changed since the first call would be compared with what it was.
        rows: prompts of `LENGTHS`.
        new_tokens: tokens a row.

    Returns:
        For every way of shaping text its name, its settings, and the `(rows, n)` sequences of `generate`.
    """
    ids, mask = (part[:rows] for part in tiny_models.prompts(LENGTHS))

    def said(**settings: Any) -> torch.Tensor:
        common = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": tiny_models.PAD}
        return model.generate(ids, attention_mask=mask, **common, **settings)

    free = said()
    ways = settings_that_shape_text(free[:, ids.shape[1] :])
    return [(how, settings, said(**settings) if settings else free) for how, settings in ways]


def assert_greedy_identity(
    build: Build,
    kinds: tuple[str, ...] = tiny_models.DECODERS,
    new_tokens: int = 18,
    models: Mapping[str, Any] | None = None,
) -> None:
    """Fail unless a strategy gives the tokens of greedy `generate` on every kind of model.

    Runs a batch of five left-padded prompts and its first row alone, in float32, plainly, with eos
    tokens that rows say in the middle, `min_new_tokens`, a repetition penalty and further processors.

    Args:
        build: makes the strategy for a model.
        kinds: entries of `tiny_models.DECODERS`.
        new_tokens: tokens a row.
        models: models to use instead, by the name to call them.

    Example:
        >>> from hf_ext.generation import SpeculativeDecoding
        >>> draft = tiny_models.shared("llama")
        >>> assert_greedy_identity(lambda model: SpeculativeDecoding(draft, 3), kinds=("llama",))
    """
    for kind, model in (models or {kind: tiny_models.shared(kind) for kind in kinds}).items():
        for rows in (len(LENGTHS), 1):
            ids, mask = (part[:rows] for part in tiny_models.prompts(LENGTHS))
            common: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": tiny_models.PAD}
            for how, settings, expected in greedy_texts(model, rows, new_tokens):
                strategy = build(model)
                ours = strategy.generate(model, ids, attention_mask=mask, **common, **settings)
                name = type(strategy).__name__
                same_tokens(ours, expected, f"{name} on {kind}, {rows} rows, {how}, against greedy generate")


def continuation_law(
    model: Any, prompt: torch.Tensor, length: int = 3, **settings: Any
) -> dict[tuple[int, ...], float]:
    """Compute the law of all continuations under `generate`'s settings, by enumeration.

    Args:
        model: a model with a small vocabulary and no eos token.
        prompt: `(1, n)` int64.
        length: tokens of a continuation.
        **settings: what `generate` makes logits processors of (`temperature`, `top_p`, ...).
    """
    vocabulary = model.config.vocab_size
    every = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    ids = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    with torch.no_grad():
        logits = model(ids).logits.float()
    processors = processors_of(model, prompt, length, **settings)
    law = torch.ones(len(every), dtype=torch.float64)
    for place in range(length):
        scores = logits[:, prompt.shape[1] + place - 1]
        scores = processors(ids[:, : prompt.shape[1] + place], scores)
        law *= scores.double().softmax(-1).gather(1, every[:, place, None])[:, 0]
    return dict(zip(map(tuple, every.tolist()), law.tolist(), strict=True))


def processors_of(model: Any, prompt: torch.Tensor, length: int, **settings: Any) -> Any:
    """Return the logits processors that `generate` makes of these settings."""
    found: list[Any] = []

    def spy(model: Any, input_ids: torch.Tensor, logits_processor: Any, **kwargs: Any) -> torch.Tensor:
        found.append(logits_processor)
        return input_ids

    model.generate(prompt, custom_generate=spy, do_sample=True, max_new_tokens=length, **settings)
    return found[0]


def assert_sampling_law(
    build: Build,
    model: Any,
    *,
    draws: int = 5_000,
    length: int = 3,
    beyond: int = 0,
    prompt: torch.Tensor | None = None,
    seed: int = 0,
    law: Mapping[tuple[int, ...], float] | None = None,
    **settings: Any,
) -> float:
    """Fail unless a strategy's continuations follow the law of sampling with `generate`.

    All continuations of `length` tokens are enumerated; the strategy draws many, in one batch. The
    distance in total variation must stay within 0.01 plus what chance alone gives: the mean distance
    of an exact sample of this size and four of its standard deviations, found by drawing from the law.

    Args:
        build: makes the strategy for the model.
        model: a model with a vocabulary of at most 16 and no eos token.
        draws: continuations to draw. What chance alone gives grows with the square root of their law's size over
            the draws: 125 continuations need a quarter of the draws of 512.
        length: tokens of a continuation.
        beyond: tokens to generate after these. Without any, drafts are one token deep: the first token
            of a row is not drafted, nor is the last.
        prompt: `(1, n)` int64, the default for a vocabulary of at least 5.
        seed: of the random numbers.
        law: the law to follow, if it is not that of `generate`.
        **settings: of `generate`.

    Returns:
        The distance found.
    """
    assert model.config.vocab_size <= 16, "a law is enumerated over a vocabulary of at most 16"
    prompt = torch.tensor([[3, 4, 2, 1]]) if prompt is None else prompt
    law = continuation_law(model, prompt, length, **settings) if law is None else law
    exact = torch.tensor(list(law.values()), dtype=torch.float64)
    assert abs(exact.sum().item() - 1) < 1e-6, f"the enumerated law sums to {exact.sum().item()}"
    torch.manual_seed(seed)
    counts = torch.zeros(len(law), dtype=torch.float64)
    number = {continuation: at for at, continuation in enumerate(law)}
    strategy = build(model)
    for start in range(0, draws, 4000):
        rows = min(4000, draws - start)
        new = strategy.generate(
            model, prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
            max_new_tokens=length + beyond, num_return_sequences=rows, pad_token_id=0, **settings,
        )[:, prompt.shape[1] : prompt.shape[1] + length]  # fmt: skip
        counts += torch.bincount(torch.tensor([number[tuple(row)] for row in new.tolist()]), minlength=len(law))
    distance = 0.5 * (counts / draws - exact).abs().sum().item()
    by_chance = []
    for _ in range(30):
        sample = torch.multinomial(exact, draws, replacement=True).bincount(minlength=len(law)).double() / draws
        by_chance.append(0.5 * (sample - exact).abs().sum())
    chance = torch.stack(by_chance)
    allowed = 0.01 + chance.mean().item() + 4 * chance.std().item()
    name = type(strategy).__name__
    assert distance <= allowed, (
        f"{name}: {draws} continuations are {distance:.4f} away from the law of generate in total variation, allowed "
        f"{allowed:.4f} (chance alone: {chance.mean().item():.4f})"
    )
    return distance


def small_vocabulary(kind: str = "llama", vocabulary: int = 5, seed: int | None = None, **changes: Any) -> Any:
    """Return a tiny model whose continuations can be enumerated; another `seed` is another model.

    Example:
        >>> small_vocabulary().config.vocab_size
        5
    """
    model = tiny_models.build(kind, vocab_size=vocabulary, **changes)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@functools.lru_cache(maxsize=64)
def perturbed(model: Any, strength: float = 0.1, seed: int = 0) -> Any:
    """Return a copy of a model that agrees with it sometimes: a draft model for tests, the same object every time.

    Args:
        model: the model.
        strength: noise on every weight matrix, as a share of its spread.
        seed: of the noise.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter += strength * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def trees_of(strategy: Any, model: Any, ids: torch.Tensor, **settings: Any) -> list[Any]:
    """Run a speculative strategy and return the trees that it drafted, one of all lanes for every step.

    Args:
        strategy: the strategy.
        model: the model.
        ids: `(rows, n)` prompts.
        **settings: of `generate`.
    """
    found: list[Any] = []
    make = strategy.drafter

    def spied(run: Any) -> Any:
        drafter = make(run)
        propose = drafter.propose

        def noting(context: Any) -> Any:
            found.append(propose(context))
            return found[-1]

        drafter.propose = noting
        return drafter

    strategy.drafter = spied
    try:
        strategy.generate(model, ids, pad_token_id=tiny_models.PAD, **settings)
    finally:
        del strategy.drafter
    return found
