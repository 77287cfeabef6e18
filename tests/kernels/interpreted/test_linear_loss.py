"""Statistics of next-token distributions by the kernels, and gradients of every input, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from hf_ext.kernels import linear_loss_autograd, linear_loss_kernels
from hf_ext.kernels.linear_loss import TokenStatistics, linear_statistics, statistics_of_logits
from hf_ext.kernels.linear_loss_pieces import Head

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy": True},
    "best, bias": {"best": True, "bias": True},
    "table, soft cap": {"table": True, "softcap": 3.0},
    "all": {"entropy": True, "best": True, "bias": True, "queries": True, "softcap": 3.0, "scale": 0.4},
}


def problem(
    tokens: int, vocabulary: int, width: int, table_width: int = 20, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return all inputs; hidden states lie apart from each other, with NaN between them."""
    draw = torch.Generator().manual_seed(tokens + vocabulary + width)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    hidden = torch.cat([made(tokens, width), torch.full((tokens, 3), torch.nan, dtype=dtype)], 1)[:, :width]
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    found = {"hidden": hidden, "weight": made(vocabulary, width), "targets": targets, "bias": made(vocabulary)}
    return found | {"table": made(vocabulary, table_width), "queries": made(tokens, table_width)}


def total(found: TokenStatistics) -> torch.Tensor:
    """Return a sum to which each statistic of each token adds with another weight."""
    weights = torch.linspace(0.5, 2.0, len(found.nll), dtype=torch.float64)
    parts = (found.nll, found.entropy, found.expectation, found.best_nll)
    return sum((part.double() * weights * (1 + number)).sum() for number, part in enumerate(parts) if part is not None)  # type: ignore[return-value]


def compare(given: dict[str, torch.Tensor], options: dict[str, Any], bound: float) -> None:
    """Hold statistics and gradients against float64."""
    options = dict(options)
    names = ["hidden", "weight", *(["bias"] if options.pop("bias", False) else [])]
    tables = {"table": given["table"]} if "table" in options or "queries" in options else {}
    tables |= {"queries": given["queries"]} if "queries" in options else {}
    options = {name: value for name, value in options.items() if name not in ("table", "queries")}
    head = {name: options.pop(name) for name in ("scale", "softcap") if name in options}
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    found = linear_statistics(**leaves, **tables, targets=given["targets"], chunk=16, **head, **options)
    gradients = torch.autograd.grad(total(found), list(leaves.values()))

    doubles = {name: given[name].double().requires_grad_() for name in names}
    logits = functional.linear(doubles["hidden"], doubles["weight"], doubles.get("bias")) * head.get("scale", 1.0)
    if "softcap" in head:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    wide = {name: table.double() for name, table in tables.items()}
    expected = statistics_of_logits(logits, given["targets"], **wide, **options)
    expected_gradients = torch.autograd.grad(total(expected), list(doubles.values()))
    for name, value in vars(expected).items():
        got = getattr(found, name)
        assert (got is None) == (value is None), name
        if value is None:
            continue
        if name == "best":
            assert torch.equal(got, value), name
        else:
            check(name, got, value, bound)
    for name, got, value in zip(names, gradients, expected_gradients, strict=True):
        assert got.dtype == given[name].dtype
        check(f"gradient of {name}", got, value, bound)


def check(name: str, found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert found.shape == expected.shape, name
    assert not found.isnan().any(), f"{name} has NaN"
    if found.numel():
        error = float((found.detach().double() - expected.detach()).abs().max())
        largest = max(float(expected.abs().max()), 1.0)
        assert error <= bound * largest, f"{name} differs by up to {error:.2e}, of values up to {largest:.2e}"


@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 83, 20), (32, 48, 32)], ids=str)
def test_statistics_and_gradients(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    given = problem(*shape)
    assert linear_loss_autograd.takes_kernel(given["hidden"])
    compare(given, options, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_float32_statistics(dtype: torch.dtype) -> None:
    given = problem(37, 50, 20, dtype=dtype)
    given["hidden"] *= 0.3
    compare(given, {"entropy": True, "bias": True, "table": True}, {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
    found = linear_statistics(given["hidden"], given["weight"], given["targets"], entropy=True)
    logits = given["hidden"].double() @ given["weight"].double().T
    expected = statistics_of_logits(logits, given["targets"], entropy=True)
    check("nll", found.nll, expected.nll, 1e-6)
    assert found.entropy is not None
    assert expected.entropy is not None
    check("entropy", found.entropy, expected.entropy, 1e-6)


def test_a_table_of_another_dtype_keeps_it() -> None:
    given = problem(20, 40, 16, dtype=torch.bfloat16)
    given |= {"table": given["table"].float() * 1.001, "queries": given["queries"].float() * 1.001}
    options = {"targets": given["targets"], "table": given["table"], "queries": given["queries"]}
    found = linear_statistics(given["hidden"], given["weight"], **options)
    logits = given["hidden"].double() @ given["weight"].double().T
    options |= {"table": given["table"].double(), "queries": given["queries"].double()}
    assert found.expectation is not None
    check("expectation", found.expectation, statistics_of_logits(logits, **options).expectation, 3e-6)  # type: ignore[arg-type]


def test_tokens_that_cannot_be_drawn_have_no_share_and_get_no_gradient() -> None:
    given = problem(9, 40, 8)
    given["bias"][[0, 17, 39]] = -torch.inf
    given["bias"][16:32] = -torch.inf  # a whole tile
    given["targets"] = torch.full((9,), 5)
    leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")]
    found = linear_statistics(leaves[0], leaves[1], given["targets"], bias=leaves[2], entropy=True, best=True)
    assert all(value.isfinite().all() for value in vars(found).values() if value is not None)
    for gradient in torch.autograd.grad(total(found), leaves):
        assert gradient.isfinite().all()
    assert (
        torch.autograd.grad(
            linear_statistics(leaves[0], leaves[1], given["targets"], bias=leaves[2]).nll.sum(), leaves[2]
        )[0][[0, 17, 20, 39]].tolist()
        == [0.0] * 4
    )


def test_large_logits_do_not_overflow() -> None:
    given = problem(5, 70, 8)
    given["weight"] *= 3000
    compare(given, {"entropy": True, "best": True}, 3e-6)


def test_the_first_of_several_likeliest_tokens_is_the_best() -> None:
    weight = torch.zeros(50, 4)
    weight[[20, 3, 47]] = 1.0
    found = linear_statistics(torch.ones(2, 4), weight, torch.tensor([0, 3]), best=True)
    assert found.best is not None
    assert found.best.tolist() == [3, 3]
    tied = linear_statistics(torch.ones(2, 4), torch.zeros(50, 4), torch.tensor([0, 3]), best=True).best
    assert tied is not None
    assert tied.tolist() == [0, 0]


def test_no_tokens() -> None:
    given = problem(0, 40, 8)
    leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight")]
    found = linear_statistics(*leaves, given["targets"], entropy=True, best=True)
    assert found.nll.shape == (0,)
    for leaf, gradient in zip(leaves, torch.autograd.grad(total(found), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_parts_of_the_vocabulary_change_nothing_and_twice_is_the_same() -> None:
    given = problem(20, 100, 20)
    found = []
    for chunk in (8, 8, 20):
        leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight")]
        statistics = linear_statistics(*leaves, given["targets"], entropy=True, chunk=chunk)
        found.append([statistics.nll, *torch.autograd.grad(total(statistics), leaves)])
    for number, (one, again, whole) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, again), number
        check(str(number), one, whole.double(), 2e-6)


def test_shares_of_the_vocabulary_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(10, 130, 8)
    arguments = (given["hidden"], given["weight"], None, given["targets"], given["table"], given["queries"])
    shares = []
    found = []
    launch = linear_loss_kernels.launch_statistics
    for count in (9, 2, 1):

        def split(tokens: int, vocabulary: int, config: Any, count: int = count) -> tuple[int, int]:
            tiles = -(-vocabulary // config.keys)
            each = -(-tiles // count)
            return -(-tiles // each), each

        def counted(*args: Any) -> Any:
            shares.append(args[6].top.shape[0])
            return launch(*args)

        monkeypatch.setattr(linear_loss_kernels, "shares", split)
        monkeypatch.setattr(linear_loss_kernels, "launch_statistics", counted)
        lse, statistics = linear_loss_kernels.statistics(Head(1.0, None, 16), *arguments, (True, True, True))
        found.append([lse, *(value for value in vars(statistics).values() if value is not None)])
    assert shares == [9, 2, 1]
    for number, values in enumerate(zip(*found, strict=True)):
        for value in values[1:]:
            check(str(number), value, values[0].double(), 2e-6)
