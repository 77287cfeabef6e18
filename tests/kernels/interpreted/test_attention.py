"""Attention and its gradients against float64, with odd shapes and unwritten memory full of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.kernels import attention_backward
from hf_ext.kernels.attention import attention, attention_reference
from hf_ext.kernels.attention_backward import attention_backward_reference

NAMES = ("out", "lse", "query", "key", "value", "sinks")


def values_and_gradients(function: Any, tensors: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Results of a function and gradients of all inputs for fixed gradients of both results."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].detach().to(torch.promote_types(tensors[0].dtype, torch.float32))
        leaves.append(options["sinks"].requires_grad_())
    out, lse = function(*leaves[:3], **options)
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    seen = lse.detach().isfinite()
    loss = (out * grad_out.to(out.dtype)).sum() + (lse.where(seen, 0) * grad_lse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    found = dict(zip(NAMES, (out.detach(), lse.detach(), *gradients), strict=False))
    for name, tensor in found.items():
        assert not tensor.isnan().any(), f"{name} has NaN"
    return found


def compare(tensors: list[torch.Tensor], bound: float = 5e-6, **options: Any) -> dict[str, torch.Tensor]:
    """Hold kernel against the float64 reference; the bound is relative to the largest value of each result."""
    found = values_and_gradients(attention, tensors, **options)
    expected = values_and_gradients(attention_reference, [tensor.double() for tensor in tensors], **options)
    assert found["out"].dtype == tensors[0].dtype
    assert found["lse"].dtype == torch.float32
    for name, tensor in found.items():
        wanted = expected[name]
        assert torch.equal(tensor.isinf(), wanted.isinf()), f"{name} is infinite elsewhere"
        error = (tensor.double() - wanted).nan_to_num(0).abs().max()
        largest = wanted.nan_to_num(0, neginf=0).abs().max().clamp_min(1)
        assert error <= bound * largest, f"{name} differs by up to {error:.2e}, of values up to {largest:.2e}"
    return found


@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(1, 1, 32), (1, 33, 80), (7, 65, 64), (33, 33, 128), (65, 65, 32)]
)
def test_causal_attention(inputs: Any, queries: int, keys: int, width: int) -> None:
    compare(inputs(queries=queries, keys=keys, width=width), causal=True)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_groups_of_heads_share_keys(inputs: Any, key_heads: int) -> None:
    compare(inputs(heads=4, key_heads=key_heads, queries=17, keys=40), causal=True)


@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 65, 32), (33, 7, 80)])
def test_attention_to_everything(inputs: Any, queries: int, keys: int, width: int) -> None:
    compare(inputs(queries=queries, keys=keys, width=width))


@pytest.mark.parametrize("window", [1, 7, 40])
def test_windows(inputs: Any, window: int) -> None:
    compare(inputs(queries=50, keys=65), causal=True, window=window)


def test_values_of_another_width(inputs: Any) -> None:
    compare(inputs(queries=20, keys=40, width=48, value_width=96), causal=True)


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_soft_caps_and_their_slope(inputs: Any, softcap: float) -> None:
    query, key, value = inputs(queries=20, keys=37)
    compare([query * 4, key, value], causal=True, softcap=softcap, bound=2e-5)


def test_sinks_take_their_share(inputs: Any) -> None:
    found = compare(inputs(heads=4, key_heads=2, queries=20, keys=37), causal=True, sinks=torch.tensor([0.5, -3, 4, 0]))
    assert (found["sinks"].abs() > 0.1).any()


def test_everything_at_once(inputs: Any) -> None:
    options = {"sinks": torch.tensor([0.5, 2.0]), "softcap": 5.0, "window": 20, "scale": 0.3}
    compare(inputs(queries=37, keys=49), causal=True, bound=2e-5, **options)


def test_structures(inputs: Any, structured: Any) -> None:
    structure, arguments = structured
    rows, queries, keys = structure.shape
    tensors = inputs(batch=rows, queries=queries, keys=keys)
    found = compare(tensors, structure=arguments)
    # In the other direction: the reference of the structure itself, without tables.
    expected, lse = attention_reference(*[tensor.double() for tensor in tensors], structure=structure)
    error = (found["out"].double() - expected).abs().max()
    assert error <= 5e-6, f"differs by up to {error:.2e} from the structure"
    asleep = (~structure.dense().any(-1)).expand(*lse.shape)
    assert torch.equal(lse.isneginf(), asleep)
    assert (found["out"][asleep] == 0).all(), "a row that sees nothing is zero"
    assert (found["query"][asleep] == 0).all(), "and gets no gradient"


def test_structures_with_soft_cap_and_sinks(inputs: Any, mixed: Any) -> None:
    _, queries, keys = mixed.shape
    tensors = inputs(batch=2, queries=queries, keys=keys)
    compare(tensors, structure=mixed, softcap=3.0, sinks=torch.tensor([1.0, -1.0]), bound=2e-5)


@pytest.mark.parametrize("shape", [(1, 2, 20, 35), (2, 1, 20, 35)])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_dense_masks(inputs: Any, shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[:, :, 3] = False  # a row that sees nothing
    if kind == "added":
        least = torch.finfo(torch.float32).min
        mask = torch.randn(shape, generator=generator).masked_fill(~mask, least)
    compare(inputs(batch=2, queries=20, keys=35), mask=mask)


def test_masks_are_added_after_the_soft_cap(inputs: Any) -> None:
    bias = torch.randn(1, 1, 20, 35, generator=torch.Generator().manual_seed(1))
    compare(inputs(queries=20, keys=35), mask=bias, softcap=2.0, bound=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_half_precision(inputs: Any, dtype: torch.dtype, bound: float) -> None:
    compare(inputs(queries=33, keys=40, dtype=dtype), causal=True, bound=bound)


def test_inputs_of_any_strides(inputs: Any) -> None:
    packed = torch.randn(2, 19, 4, 3, 32, generator=torch.Generator().manual_seed(0))
    compare([packed[..., i, :].transpose(1, 2) for i in range(3)], causal=True)
    query, key, value = inputs(queries=19, keys=19)
    plain, _ = attention(query, key, value, causal=True)
    scattered = torch.empty(*query.shape, 2)[..., 0].copy_(query)
    assert torch.equal(attention(scattered, key, value, causal=True)[0], plain)


def test_results_lie_in_memory_as_models_want_them(inputs: Any) -> None:
    out, _ = attention(*inputs(heads=2, queries=5, keys=5), causal=True)
    assert out.transpose(1, 2).is_contiguous()


def test_the_same_twice_is_the_same_bit_for_bit(inputs: Any) -> None:
    tensors = inputs(heads=4, key_heads=2, queries=20, keys=37)
    first = values_and_gradients(attention, tensors, causal=True)
    second = values_and_gradients(attention, tensors, causal=True)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_formulas_of_the_backward_pass_are_the_gradients(inputs: Any) -> None:
    tensors = [tensor.double() for tensor in inputs(batch=2, heads=4, key_heads=2, queries=9, keys=14)]
    seen = torch.ones(9, 14, dtype=torch.bool).tril(5)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out, lse = attention_reference(*leaves, causal=True, softcap=2.0)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    found = attention_backward_reference(grad_out, grad_lse, *leaves, out, lse, seen, 32**-0.5, 2.0)
    for name, a, b in zip(("query", "key", "value"), found, expected, strict=False):
        assert (a - b).abs().max() < 1e-12, f"{name} differs by up to {(a - b).abs().max():.2e}"
    assert torch.equal(found[3], (grad_out * out).sum(-1) - grad_lse)


def test_compiled_models_do_not_break_their_graph(inputs: Any) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(queries=9, keys=20)]
    sinks = torch.zeros(2, requires_grad=True)

    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, lse = attention(query, key, value, causal=True, sinks=sinks)
        return (out.square().sum() + lse.sum()) * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), [*tensors, sinks])
    found = torch.autograd.grad(compiled(*tensors), [*tensors, sinks])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_structures_pass_through_compilation(inputs: Any, mixed: Any) -> None:
    _, queries, keys = mixed.shape
    tensors = inputs(batch=2, queries=queries, keys=keys)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*tensors, structure=mixed), attention(*tensors, structure=mixed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_operators_keep_the_rules_of_operators(inputs: Any, name: str) -> None:
    query, key, value = inputs(queries=5, keys=8)
    rest = (0.2, 3.0, True, 0, False, 0, 128)
    if name == "attention":
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        arguments: tuple[Any, ...] = (*leaves, [], None, torch.zeros(2, requires_grad=True), *rest)
    else:
        out, lse = attention(query, key, value, causal=True, softcap=3.0, scale=0.2)
        grads = (torch.ones_like(out), torch.zeros_like(lse))
        arguments = (*grads, query, key, value, out, lse, [], None, *rest)
    operator = attention_backward.operator if name == "attention_backward" else torch.ops.hf_ext.attention.default
    # What compiling with gradients does to it is the test above.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)


def test_wrong_input_is_refused(inputs: Any) -> None:
    query, key, value = inputs(queries=5, keys=8)
    for message, tensors, options in (
        (
            "one of structure, causal and mask",
            (query, key, value),
            {"causal": True, "mask": torch.ones(1, 1, 5, 8) > 0},
        ),
        ("window goes with causal", (query, key, value), {"window": 3}),
        ("no more queries than keys", (key, query[:, :1], query[:, :1]), {"causal": True}),
        ("mask must have the shape", (query, key, value), {"mask": torch.ones(1, 1, 5, 7) > 0}),
        ("must be bool, or floating", (query, key, value), {"mask": torch.ones(1, 1, 5, 8, dtype=torch.int64)}),
        ("gets no gradient", (query, key, value), {"mask": torch.ones(1, 1, 5, 8, requires_grad=True)}),
        ("same width", (query[..., :16], key, value), {}),
        ("same heads and tokens", (query, key, value[:, :, :3]), {}),
        ("one dtype", (query, key.half(), value), {}),
        ("sinks must be 2 numbers", (query, key, value), {"sinks": torch.zeros(3)}),
        ("scale must be greater", (query, key, value), {"scale": 0.0}),
        ("softcap must be greater", (query, key, value), {"softcap": -1.0}),
        ("kernels take torch.float16", (query.double(), key.double(), value.double()), {}),
        ("width of 256", tuple(torch.zeros(1, 1, 2, 257) for _ in range(3)), {}),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*tensors, **options)


def test_structures_of_other_shapes_are_refused(inputs: Any, mixed: Any) -> None:
    for given in (mixed, mixed.structure()):
        with pytest.raises(ValueError, match="the structure has"):
            attention(*inputs(batch=2, queries=5, keys=8), structure=given)
