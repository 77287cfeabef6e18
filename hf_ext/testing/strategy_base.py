"""What the checks of the strategy conformance suite share: models, runs and comparisons that say what differs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from hf_ext.generation.strategy import DecodingStrategy
from hf_ext.testing import tiny_models
from hf_ext.testing.tiny_models import PAD

#: What every check that does not depend on the architecture runs on.
PLAIN = "llama"

#: Kinds that differ most, the first ones first: learned positions, windows between full layers, windows alone.
EXAMPLES = ("gpt2", "gemma3", "mistral")

#: The sequences of `StrategyChecks.usual`, by suite and kind of model.
_USUAL: weakref.WeakKeyDictionary[type, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()


class StrategyChecks:
    """Base of the groups of checks; `StrategyConformance` documents what a subclass can set."""

    models: ClassVar[tuple[str, ...]] = tiny_models.DECODERS
    encoder_decoders: ClassVar[tuple[str, ...]] = tiny_models.ENCODER_DECODERS
    new_tokens: ClassVar[int] = 12

    def strategy(self) -> DecodingStrategy:
        """Return a new strategy, the one under test."""
        raise NotImplementedError("define strategy() to return the strategy under test")

    def exact(self) -> dict[str, Any]:
        """Settings of `generate` that leave the strategy no chance: the likeliest token each time."""
        return {"do_sample": True, "top_k": 1} if self.strategy().samples else {}

    @classmethod
    def arguments(cls) -> dict[str, tuple[str, ...]]:
        """Return what a check runs on by the argument it takes: `kind` for every decoder-only model, `example` for
        two that differ most, `pair` for every encoder-decoder.
        """
        by_difference = sorted(cls.models, key=lambda kind: (*EXAMPLES, kind).index(kind))
        return {"kind": cls.models, "example": tuple(by_difference[:2]), "pair": cls.encoder_decoders}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run a check on all that its argument stands for."""
        for name, kinds in self.arguments().items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, kinds)

    def cases(self, check: str) -> Iterator[dict[str, str]]:
        """Yield the arguments of the check of this name, as pytest would give them."""
        code = getattr(type(self), check).__code__
        arguments = self.arguments()
        name = next((name for name in arguments if name in code.co_varnames[: code.co_argcount]), None)
        yield from ({name: kind} for kind in arguments[name]) if name else ({},)

    def run(
        self,
        kind: str | Any = PLAIN,
        *,
        ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        strategy: DecodingStrategy | None = None,
        **settings: Any,
    ) -> Any:
        """Run the strategy on a model, by default on three prompts of different lengths and without chance."""
        model = tiny_models.shared(kind) if isinstance(kind, str) else kind
        if ids is None:
            ids, mask = tiny_models.prompts()
        settings = {**self.exact(), "max_new_tokens": self.new_tokens, "pad_token_id": PAD, **settings}
        return (strategy or self.strategy()).generate(model, ids, attention_mask=mask, **settings)

    def usual(self, kind: str = PLAIN) -> torch.Tensor:
        """Return the sequences of `run(kind)`; it runs once a suite, most checks compare with it."""
        runs = _USUAL.setdefault(type(self), {})
        if kind not in runs:
            runs[kind] = self.run(kind)
        return runs[kind].clone()

    def free_run(self, kind: str = PLAIN, **settings: Any) -> torch.Tensor:
        """Return only the new tokens of `run`, `(3, new_tokens)`."""
        sequences = self.run(kind, **settings) if settings else self.usual(kind)
        return sequences[:, tiny_models.prompts()[0].shape[1] :]


def same_tokens(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fail unless two batches of ids are equal, with the first place where they differ.

    Example:
        >>> same_tokens(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), "a run")
        Traceback (most recent call last):
        AssertionError: a run: row 0 differs from token 1 on: got [2], expected [3]
    """
    if ours.shape == expected.shape and bool((ours == expected).all()):
        return
    if len(ours) != len(expected):
        raise AssertionError(f"{what}: got {len(ours)} rows, expected {len(expected)}")
    for row, (a, b) in enumerate(zip(ours.tolist(), expected.tolist(), strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            got, wanted = a[at : at + 12], b[at : at + 12]
            raise AssertionError(f"{what}: row {row} differs from token {at} on: got {got}, expected {wanted}")


def close(ours: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 2e-4) -> None:
    """Fail unless two tensors agree to `tolerance`, with the largest difference."""
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    difference = (ours.float() - expected.float()).abs().nan_to_num(nan=torch.inf).max().item()
    assert difference <= tolerance, f"{what}: the largest difference is {difference:.3g}, allowed {tolerance:.3g}"


def refusal(call: Callable[[], Any], *words: str, what: str) -> str:
    """Fail unless a call raises a ValueError of one line whose message has one of `words`.

    Returns:
        The message.

    Example:
        >>> refusal(lambda: int("x"), "literal", what="int of a letter")
        "invalid literal for int() with base 10: 'x'"
    """
    try:
        result = call()
    except ValueError as error:
        message = str(error)
        found = any(word.lower() in message.lower() for word in words) if words else len(message) > 20
        assert found, f"{what}: the ValueError does not mention {' or '.join(map(repr, words))}: {message!r}"
        return message
    except Exception as error:
        raise AssertionError(f"{what}: expected a ValueError, got {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: expected a ValueError, but the call returned a {type(result).__name__}")


def result_or_refusal(call: Callable[[], Any], *words: str, what: str) -> Any:
    """Return what a call returns, or None if it was refused as `refusal` asks."""
    outcome: list[Any] = []
    try:
        outcome.append(call())
    except Exception as error:
        refused: Exception = error
    if outcome:
        return outcome[0]

    def again() -> None:
        raise refused

    refusal(again, *words, what=what)
    return None


def cut_rows(new: torch.Tensor, last: list[int]) -> torch.Tensor:
    """Return `new` as it is when row r ends with token `last[r]`: padding after it, no longer than needed."""
    ended = new.clone()
    for row, at in enumerate(last):
        ended[row, at + 1 :] = PAD
    return ended[:, : max(last) + 1]
