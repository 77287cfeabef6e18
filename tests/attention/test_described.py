"""Mask functions of transformers become structures that say exactly the same, or dense masks."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache, masking_utils

from hf_ext.attention import backend, kernels, unpack
from hf_ext.attention.packed import is_packed
from hf_ext.testing import tiny_models

ROWS, TOKENS = 3, 14
PADDING = {
    "none": None,
    "full": torch.ones(ROWS, TOKENS, dtype=torch.long),
    "left": (torch.arange(TOKENS) >= torch.tensor([[0], [3], [9]])).long(),
    "right": (torch.arange(TOKENS) < torch.tensor([[14], [10], [2]])).long(),
}
assert "hf_ext" in AttentionInterface()  # registered as soon as transformers has models
BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, 2, 2, 2, -1, -1, -1], [0] * 6 + [-1] * 8, [-1] * 14])


class Config(types.SimpleNamespace):
    """Like a model's, it can be referred to weakly."""


def config(name: str, **changes: Any) -> Any:
    settings = {"sliding_window": 5, "attention_chunk_size": 4, "is_causal": True, **changes}
    found = Config(_attn_implementation=name, **settings)
    found.get_text_config = lambda **_: found
    return found


def both(make: str, steps: list[int], cache: Any = None, settings: dict[str, Any] | None = None, **given: Any) -> Any:
    """Yield, step by step, the mask of sdpa and what the kernels would get."""
    embeds = torch.zeros(ROWS, TOKENS, 8)
    caches = [cache() if cache else None for _ in range(2)]
    start = 0
    for step in steps:
        found = []
        for name, own in zip(("sdpa", "hf_ext"), caches, strict=True):
            padding = given.get("attention_mask")
            arguments = {**given, "inputs_embeds": embeds[:, start : start + step], "past_key_values": own}
            arguments["attention_mask"] = None if padding is None else padding[:, : start + step]
            with kernels("always"):
                found.append(getattr(masking_utils, make)(config(name, **(settings or {})), **arguments))
            if own is not None:
                for layer in range(len(own.layers) or 1):
                    own.update(torch.zeros(ROWS, 1, step, 2), torch.zeros(ROWS, 1, step, 2), layer)
        yield found
        start += step


def check(expected: Any, found: Any, compact: bool | None = True) -> None:
    """Hold a mask against sdpa's; `compact` says whether it must be a structure."""
    if expected is None or found is None:
        assert found is None
        assert expected is None
        return
    assert compact is None or is_packed(found) == compact, f"{found.dtype} of shape {tuple(found.shape)}"
    queries = expected.shape[2]
    dense = unpack(found, queries, expected.shape[3]).dense() if is_packed(found) else found
    differing = int((dense.expand_as(expected) != expected).sum())
    # Queries on padding on the right see what is before them; nobody asks.
    assert differing == 0, f"{differing} of {expected.numel()} pairs differ"


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    "make",
    ["create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask",
     "create_bidirectional_mask", "create_bidirectional_sliding_window_mask"],
)  # fmt: skip
def test_masks_without_a_cache(make: str, padding: str) -> None:
    for expected, found in both(make, [TOKENS], attention_mask=PADDING[padding]):
        check(expected, found)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("static", [False, True])
def test_masks_of_steps_with_a_cache(kind: str, static: bool, padding: str) -> None:
    model = tiny_models.shared(kind)
    window = {"sliding_window": tiny_models.WINDOW}

    def cache() -> Any:
        return StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)

    for make in ("create_causal_mask",) + (("create_sliding_window_causal_mask",) if kind != "llama" else ()):
        for expected, found in both(make, [9, 1, 3, 1], cache, window, attention_mask=PADDING[padding]):
            check(expected, found, compact=expected is not None and expected.shape[2] > 1)


def test_a_window_of_nothing_hides_everything() -> None:
    """Qwen2-MoE asks for it when it has no window, and no layer looks at it."""
    for padding in (PADDING["none"], PADDING["left"]):
        for expected, found in both(
            "create_sliding_window_causal_mask", [5, 3], DynamicCache, {"sliding_window": 0}, attention_mask=padding
        ):
            check(expected, found)


@pytest.mark.parametrize("make", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_packed_sequences(make: str) -> None:
    lengths = [[5, 9], [14], [1, 6, 7]]
    positions = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
    for expected, found in both(make, [TOKENS], attention_mask=None, position_ids=positions):
        check(expected, found)
        assert found is not None


def test_blocks_that_see_themselves() -> None:
    for expected, found in both("create_causal_mask", [TOKENS], attention_mask=None, block_sequence_ids=BLOCKS):
        check(expected, found)
    in_pieces = BLOCKS.clone()
    in_pieces[0, 12] = 1
    for ids, make in ((in_pieces, "create_causal_mask"), (BLOCKS, "create_sliding_window_causal_mask")):
        for expected, found in both(make, [TOKENS], attention_mask=None, block_sequence_ids=ids):
            check(expected, found, compact=False)


def test_what_is_not_known_becomes_a_dense_mask() -> None:
    def odd(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key % 2 == 0) | (key == query)

    for name in ("or_mask_function", "and_mask_function"):
        for expected, found in both("create_causal_mask", [TOKENS], attention_mask=PADDING["left"], **{name: odd}):
            check(expected, found, compact=False)


def test_a_bidirectional_decoder() -> None:
    for make in ("create_causal_mask", "create_sliding_window_causal_mask"):
        for padding in PADDING.values():
            for expected, found in both(make, [TOKENS], settings={"is_causal": False}, attention_mask=padding):
                check(expected, found)


@pytest.mark.parametrize("make", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_masks_are_built_inside_a_compiled_graph(make: str) -> None:
    cpu = config("hf_ext")

    def build(embeds: torch.Tensor, padding: torch.Tensor) -> Any:
        return getattr(masking_utils, make)(cpu, embeds, padding, None)

    embeds = torch.zeros(ROWS, TOKENS, 8)
    with kernels("always"):
        compiled = torch.compile(build, fullgraph=True, backend="eager")
        found = compiled(embeds, PADDING["left"])
    cpu._attn_implementation = "sdpa"
    check(build(embeds, PADDING["left"]), found, compact=None)


def test_without_kernels_the_mask_is_that_of_sdpa() -> None:
    given = {"batch_size": 2, "q_length": 4, "kv_length": 4, "mask_function": masking_utils.causal_mask_function}
    assert backend.mask(**given) is None
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    expected = masking_utils.sdpa_mask(**given, attention_mask=padding)
    assert torch.equal(backend.mask(**given, attention_mask=padding), expected)
