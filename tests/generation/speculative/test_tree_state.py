"""A model driven by `extend`, `settle`, `forget` and `select` gives the logits of plain sequences."""

from __future__ import annotations

import random

import pytest
import torch

from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.speculative.row_cache import Columns, RowLayer
from hf_ext.generation.speculative.tree_state import TreeState
from hf_ext.testing import tiny_models


@torch.no_grad()
def logits_after(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def path(parents, node):
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("kind", [*tiny_models.DECODERS, "qwen2"])
def test_random_steps_give_the_logits_of_plain_sequences(kind, attention):
    model = tiny_models.build(kind)
    if attention == "flex_attention":
        if kind != "llama":
            return  # one is enough: the mask is the same, and it is slow on a CPU
        model = tiny_models.build(kind, hidden_size=64)
    model.set_attn_implementation(attention)
    rng = random.Random(1)
    state = TreeState.fresh(model, lanes=3)
    texts = [[rng.randrange(3, 90) for _ in range(n)] for n in (11, 4, 7)]
    longest = max(map(len, texts))
    state.read(torch.tensor([t + [0] * (longest - len(t)) for t in texts]), list(map(len, texts)))
    worst = 0.0
    for step in range(14 if attention == "sdpa" else 5):
        nodes, tokens = [[] for _ in texts], [[] for _ in texts]
        for width in [rng.randint(1, 3) for _ in range(rng.randint(1, 3))]:  # the tree grows in several calls
            new = [[rng.randrange(3, 90) for _ in range(width)] for _ in texts]
            above = [tuple(rng.choice([-1, *range(len(n) + i)]) for i in range(width)) for n in nodes]
            nodes = [n + list(a) for n, a in zip(nodes, above, strict=True)]
            tokens = [t + a for t, a in zip(tokens, new, strict=True)]
            logits = state.extend(torch.tensor(new), above).logits
            for lane, text in enumerate(texts):
                at = rng.randrange(width)
                node = len(nodes[lane]) - width + at
                line = text + [tokens[lane][i] for i in path(nodes[lane], node)]
                worst = max(worst, (logits[lane, at] - logits_after(model, line)).abs().max().item())
        kept = [rng.choice([[], path(n, rng.randrange(len(n)))]) for n in nodes]
        state.settle(kept)
        texts = [text + [t[i] for i in keep] for text, t, keep in zip(texts, tokens, kept, strict=True)]
        assert state.lengths == list(map(len, texts))
        if step == 3:
            state.forget([n - 1 for n in state.lengths])
            texts = [text[:-1] for text in texts]
        if step == 4:
            state.select([2, 0])
            texts = [texts[2], texts[0]]
    assert worst < 2e-4, f"{kind}, {attention}: the largest difference of logits is {worst:.3g}"


def test_a_window_that_has_dropped_tokens_cannot_bring_them_back():
    state = TreeState.fresh(tiny_models.shared("mistral"), lanes=1)
    with torch.no_grad():
        for _ in range(3):
            state.read(torch.randint(3, 90, (1, 40)), [40])
    state.forget([115])
    with pytest.raises(ValueError, match="dropped tokens"):
        state.forget([20])


def test_a_model_is_asked_once():
    model = tiny_models.build("llama")
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    _, calls = tiny_models.calls_of(model, lambda: tree_problem(model))
    assert calls == [], "hooks on the model see nothing of it"
    first = len(passes)
    assert 0 < first < 10
    tree_problem(model)
    assert len(passes) == first


def test_a_model_that_ignores_masks_is_found_out():
    model = tiny_models.build("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    assert "does not follow" in str(tree_problem(model))


def test_a_model_that_ignores_positions_is_found_out():
    model = tiny_models.build("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert "does not follow" in str(tree_problem(model))


@pytest.mark.parametrize("alike", [True, False])
def test_what_is_kept_of_every_layer_survives_growth_and_lanes_that_leave(alike):
    """Layers of one shape share a block of memory; one of another shape has its own."""
    rng, columns = random.Random(0), Columns(3, None)
    layers = [RowLayer(columns) for _ in range(3)]
    lengths, texts = [0, 0, 0], [[[] for _ in range(3)] for _ in layers]
    for step in range(12):
        count = rng.choice([2, 5, 300])
        columns.aim(lengths, 0, count, torch.device("cpu"))
        paths = [sorted(rng.sample(range(count), rng.randrange(count))) for _ in lengths]
        for number, (layer, held) in enumerate(zip(layers, texts, strict=True)):
            states = torch.randn(len(lengths), 2, count, 4 if alike or number else 6)
            layer.update(states, -states)
            for lane, path in enumerate(paths):
                held[lane] += states[lane, :, path].unbind(1)
        columns.move(lengths, paths)
        lengths = [length + len(path) for length, path in zip(lengths, paths, strict=True)]
        if step in (5, 8):
            stay = [1, 0][: len(lengths) - 1]
            columns.select(stay)
            lengths, texts = [lengths[lane] for lane in stay], [[held[lane] for lane in stay] for held in texts]
    for layer, held in zip(layers, texts, strict=True):
        for lane, length in enumerate(lengths):
            expected = torch.stack(held[lane], 1)
            error = (layer.keys[lane, :, :length] - expected).abs().max()
            assert error == 0, f"keys of lane {lane} are off by {error}"
            assert torch.equal(layer.values[lane, :, :length], -expected)
    assert (columns.block is not None and all(layer.shared for layer in layers)) or not alike
