"""Logits of tokens, a piece at a time: of a head, which are never all there, or those that are there already.

What goes over the logits once, forward, and makes their gradient while it has them, is written on `Logits`, and so does
with either. `sum_of_pieces` is such a pass.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_ext.kernels import linear_loss_autograd
from hf_ext.kernels.linear_loss_pieces import Head, add_product, rows_at_a_time, slope_of
from hf_ext.kernels.linear_statistics import (
    TokenStatistics,
    check_table,
    check_targets,
    statistics_dtype,
    statistics_of_logits,
)

#: If at least this share of the logits that are there is asked for, statistics are computed of all and then selected: a
#: copy of the selected logits would cost more.
MOSTLY = 0.5

#: From the logits of some tokens, which may be used up, the tokens that they are, and whether a gradient is needed, to
#: the sum of what is asked of them and the gradient of that for the logits, None if there is none.
Work = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, torch.Tensor | None]]


class Logits(ABC):
    """Logits of some tokens, `(tokens, vocabulary)`, of which a piece is made at a time."""

    #: of the vocabulary; tokens at a time
    vocabulary: int
    rows: int

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of tokens."""

    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return what a gradient goes to."""

    @abstractmethod
    def reader(self, rows: int | None = None) -> Callable[[slice], torch.Tensor]:
        """Return what makes pieces, in the dtype of statistics. A piece may be changed, and lasts until the next.

        Args:
            rows: of the largest piece that is going to be asked for; by default `rows`.
        """

    @abstractmethod
    def slope(self, piece: torch.Tensor) -> torch.Tensor | None:
        """Return what the gradient of a piece, as the reader gave it, is to be multiplied by; None for 1."""

    @abstractmethod
    def gradients(self, needed: Sequence[bool]) -> Gradients:
        """Return what takes the gradients of pieces and makes of them those of `tensors()` that are needed."""

    @abstractmethod
    def statistics(
        self, targets: torch.Tensor, *, table: torch.Tensor | None = None, entropy: bool = False, best: bool = False
    ) -> TokenStatistics:
        """Return the statistics of all tokens, with gradients that may be asked for more than once.

        Args:
            targets: (tokens,) int64 in the vocabulary.
            table: see `hf_ext.kernels.linear_loss.linear_statistics`.
            entropy: see there.
            best: see there.
        """

    @property
    def device(self) -> torch.device:
        """Where the logits are made."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the pieces: float32, or float64 for float64 inputs."""
        return statistics_dtype(self._first.dtype)

    @property
    def _first(self) -> torch.Tensor:
        found = self.tensors()[0]
        assert found is not None
        return found

    def places(self) -> list[slice]:
        """Return which tokens are in which piece."""
        return [slice(at, min(at + self.rows, len(self))) for at in range(0, len(self), self.rows)]


class Gradients(ABC):
    """The gradients of what logits are made of, added up from those of the pieces."""

    @abstractmethod
    def add(self, at: slice, gradient: torch.Tensor) -> None:
        """Take the gradient of a piece, which is used up."""

    @abstractmethod
    def taken(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients, in the order and the dtypes of `tensors()`."""


@dataclass(frozen=True)
class HeadLogits(Logits):
    """The logits `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)` of a head on hidden states.

    Under autocast, hidden, weight and bias are cast as in a linear layer.

    Args:
        hidden: (tokens, width).
        weight: (vocabulary, width), of the same dtype.
        bias: (vocabulary,).
        scale: factor of the logits.
        softcap: bound of the logits.
        chunk: tokens at a time; by default what is quick for the vocabulary.

    Raises:
        ValueError: shapes, dtypes or options that do not go together.

    Example:
        >>> found = HeadLogits(torch.eye(2), torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
        >>> len(found), found.vocabulary, found.reader()(slice(1, 2))
        (2, 2, tensor([[0., 3.]]))
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        hidden, weight, bias, chunk = self.hidden, self.weight, self.bias, self.chunk
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                "hidden must be (tokens, width) and weight (vocabulary, width), got "
                f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, or None for none, got {self.softcap}")
        _check_chunk(chunk)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if any(t.dtype != hidden.dtype for t in (weight, bias) if t is not None) or not hidden.is_floating_point():
            dtypes = [str(t.dtype) for t in (hidden, weight, bias) if t is not None]
            raise ValueError(f"hidden, weight and bias must have one floating dtype, got {', '.join(dtypes)}")
        rows = rows_at_a_time(len(weight), kind) if chunk is None else chunk
        for name, value in (
            ("hidden", hidden), ("weight", weight), ("bias", bias), ("rows", rows), ("vocabulary", len(weight)),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def head(self) -> Head:
        """How the logits are made, beside the tensors."""
        return Head(float(self.scale), self.softcap, self.rows)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.hidden)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return hidden states, weight and bias."""
        return self.hidden, self.weight, self.bias

    def reader(self, rows: int | None = None) -> Callable[[slice], torch.Tensor]:
        """Return what makes pieces, all in one place."""
        head = self.head if rows is None else dataclasses.replace(self.head, chunk=rows)
        room = head.room(self.hidden, self.weight)
        return lambda at: head.logits(self.hidden[at], self.weight, self.bias, room)

    def slope(self, piece: torch.Tensor) -> torch.Tensor | None:
        """Return the derivative of the soft cap."""
        return None if self.softcap is None else slope_of(piece, self.softcap)

    def statistics(
        self, targets: torch.Tensor, *, table: torch.Tensor | None = None, queries: torch.Tensor | None = None,
        entropy: bool = False, best: bool = False,
    ) -> TokenStatistics:  # fmt: skip
        """Return the statistics of all tokens; for the gradient, the logits are made again."""
        check_targets(len(self), self.vocabulary, targets)
        check_table(len(self), self.vocabulary, table, queries)
        wanted = (entropy, table is not None, best)
        found = linear_loss_autograd.Statistics.apply(*self.tensors(), targets, table, queries, self.head, wanted)  # type: ignore[no-untyped-call]
        nll, found_entropy, expectation, top, top_nll = found
        return TokenStatistics(nll, found_entropy, expectation, top, top_nll)

    def gradients(self, needed: Sequence[bool]) -> Gradients:
        """Return what adds up gradients of hidden states, weight and bias."""
        return _OfHead(self, needed)


@dataclass(frozen=True)
class GivenLogits(Logits):
    """Logits that are there.

    Args:
        logits: (positions, vocabulary).
        positions: (tokens,) int64, which of them; each once.
        chunk: tokens at a time; by default what is quick for the vocabulary.

    Raises:
        ValueError: shapes or dtypes that do not go together.

    Example:
        >>> found = GivenLogits(torch.eye(3), torch.tensor([2, 0]))
        >>> len(found), found.reader()(slice(0, 1))
        (2, tensor([[0., 0., 1.]]))
    """

    logits: torch.Tensor
    positions: torch.Tensor
    chunk: int | None = None

    def __post_init__(self) -> None:
        logits = self.logits
        if logits.dim() != 2 or not logits.is_floating_point():
            raise ValueError(f"logits must be (positions, vocabulary), got {logits.dtype} of {tuple(logits.shape)}")
        _check_chunk(self.chunk)
        rows = rows_at_a_time(logits.shape[1], logits.device.type, there=True) if self.chunk is None else self.chunk
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "vocabulary", logits.shape[1])

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.positions)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return the logits."""
        return (self.logits,)

    def reader(self, rows: int | None = None) -> Callable[[slice], torch.Tensor]:
        """Return what copies pieces."""
        return lambda at: self.logits[self.positions[at]].to(self.dtype)  # an index copies

    def slope(self, piece: torch.Tensor) -> torch.Tensor | None:
        """Return None: whatever was done to make these logits is none of ours."""
        return None

    def statistics(
        self, targets: torch.Tensor, *, table: torch.Tensor | None = None, entropy: bool = False, best: bool = False
    ) -> TokenStatistics:
        """Return the statistics of all tokens, by `statistics_of_logits`."""
        options: dict[str, Any] = {"table": table, "entropy": entropy, "best": best}
        if len(self) < MOSTLY * len(self.logits):
            return statistics_of_logits(self.logits[self.positions], targets, **options)
        everywhere = targets.new_zeros(len(self.logits)).index_copy_(0, self.positions, targets)
        found = statistics_of_logits(self.logits, everywhere, **options)
        selected = {name: None if value is None else value[self.positions] for name, value in vars(found).items()}
        return TokenStatistics(**selected)  # type: ignore[arg-type]

    def gradients(self, needed: Sequence[bool]) -> Gradients:
        """Return what writes the gradient of the logits."""
        return _OfLogits(self, needed[0])


class _OfHead(Gradients):
    """The weight's and the bias's gradients are added up in the dtype of statistics."""

    def __init__(self, source: HeadLogits, needed: Sequence[bool]) -> None:
        self._source, dtype = source, source.dtype
        hidden, weight, bias = source.hidden, source.weight, source.bias
        self._hidden = torch.zeros_like(hidden) if needed[0] else None
        self._weight = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
        self._bias = None if bias is None or not needed[2] else bias.new_zeros(bias.shape, dtype=dtype)

    def add(self, at: slice, gradient: torch.Tensor) -> None:
        """Make the three products."""
        source = self._source
        if source.scale != 1:
            gradient.mul_(source.scale)
        if self._bias is not None:
            self._bias += gradient.sum(0)
        gradient = gradient.to(source.hidden.dtype)
        if self._hidden is not None:
            torch.mm(gradient, source.weight, out=self._hidden[at])
        if self._weight is not None:
            add_product(self._weight, gradient.t(), source.hidden[at])

    def taken(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias."""
        dtype = self._source.hidden.dtype
        return self._hidden, *(None if g is None else g.to(dtype) for g in (self._weight, self._bias))


class _OfLogits(Gradients):
    """One matrix of the size of the logits, 0 where no token was asked for."""

    def __init__(self, source: GivenLogits, needed: bool) -> None:
        self._positions, logits = source.positions, source.logits
        self._all = torch.zeros_like(logits, memory_format=torch.contiguous_format) if needed else None

    def add(self, at: slice, gradient: torch.Tensor) -> None:
        """Write the piece to its positions."""
        if self._all is not None:
            self._all[self._positions[at]] = gradient.to(self._all.dtype)

    def taken(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the logits."""
        return (self._all,)


def sum_of_pieces(source: Logits, work: Work, name: str) -> torch.Tensor:
    """Return a sum over tokens whose gradients are made in the forward pass, while the logits of a piece are there.

    Where no gradient is needed none is made. The result can be differentiated once.

    Args:
        source: of the logits.
        work: is asked for every piece. It sees no autocast and no gradient mode.
        name: of what computes it, for the error of a second backward pass.

    Returns:
        Scalar, in the dtype of the pieces.

    Example:
        >>> hidden, weight = torch.ones(3, 1, requires_grad=True), torch.tensor([[1.0], [2.0]])
        >>> square = lambda logits, at, needed: (logits.square().sum(), logits.mul_(2))
        >>> total = sum_of_pieces(HeadLogits(hidden, weight, chunk=2), square, "squares")
        >>> total.backward()
        >>> total.item(), hidden.grad.tolist()
        (15.0, [[10.0], [10.0], [10.0]])
    """
    found: torch.Tensor = linear_loss_autograd.SumOfPieces.apply(
        source, work, name, torch.is_grad_enabled(), *source.tensors()
    )  # type: ignore[no-untyped-call]
    return found


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, or None, got {chunk}")
