"""What each policy keeps, against its definition computed from eager attention, step by step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from hf_ext.cache import (
    H2O,
    TOVA,
    AdaKV,
    CachePolicy,
    CompressedCache,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    PyramidKV,
    QFilters,
    SnapKV,
    StreamingLLM,
)
from hf_ext.cache.policies.received import received
from hf_ext.cache.policies.rotations import rotations_of, turn
from hf_ext.testing import tiny_models

TOKENS, BUDGET, HEADS, GROUP = 30, 9, 2, 2


@functools.cache
def model() -> Any:
    built = tiny_models.build("llama")
    built.set_attn_implementation("hf_ext")
    return built


@functools.cache
def full() -> tuple[Tensor, list[Tensor], Any]:
    """Return ids, the attention weights of each layer `(heads, queries, keys)`, and a full cache."""
    ids, _ = tiny_models.prompts((TOKENS,))
    eager = tiny_models.build("llama")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(ids, output_attentions=True, use_cache=True)
    return ids, [weights[0] for weights in out.attentions], out.past_key_values


def kept(policy: CachePolicy, layer: int = 1) -> list[list[int]]:
    """Return which columns each head of a layer keeps of the prompt."""
    cache = CompressedCache(model().config, policy)
    with torch.no_grad():
        model()(full()[0], past_key_values=cache)
    return [[column for column in head.tolist() if column >= 0] for head in cache.columns(layer)[0]]


def top(scores: list[float], count: int, certain: list[int]) -> list[int]:
    """Return the columns that are certain and the best others, `count` in all."""
    others = sorted((c for c in range(len(scores)) if c not in certain), key=lambda c: -scores[c])
    return sorted(certain + others[: count - len(certain)])


def group(layer: int, head: int) -> Tensor:
    """Return the weights of the heads that share a key head, `(group, queries, keys)`."""
    return full()[1][layer][GROUP * head : GROUP * (head + 1)]


def test_h2o_keeps_the_largest_sums_and_the_recent_half():
    wanted = []
    for head in range(HEADS):
        sums = [float(group(1, head)[:, :, column].sum()) for column in range(TOKENS)]
        wanted.append(top(sums, BUDGET, list(range(TOKENS - BUDGET // 2, TOKENS))))
    assert kept(H2O(budget=BUDGET)) == wanted


def test_h2o_can_average_over_the_queries_that_see_a_token():
    wanted = []
    for head in range(HEADS):
        means = [float(group(1, head)[:, column:, column].mean()) for column in range(TOKENS)]
        wanted.append(top(means, BUDGET, []))
    assert kept(H2O(budget=BUDGET, recent=0.0, average=True)) == wanted


def test_h2o_goes_on_counting_while_decoding():
    """The sums after a prompt and single tokens are those of all queries at once."""
    ids, weights, _ = full()
    cache = CompressedCache(model().config, H2O(budget=1000))
    with torch.no_grad():
        for part in (ids[:, :20], ids[:, 20:21], ids[:, 21:27], *ids[:, 27:].split(1, dim=1)):
            model()(part, past_key_values=cache)
    for layer in range(2):
        wanted = weights[layer].sum(1).unflatten(0, (HEADS, GROUP)).sum(1)
        gap = (cache.entries(layer).fields["received"][0] - wanted).abs().max().item()
        assert gap < 1e-4, f"layer {layer}: the largest difference of a sum is {gap:.2e}"


@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_keeps_what_the_window_attends_to_smoothed_over_neighbours(kernel: int):
    window, wanted = 4, []
    for head in range(HEADS):
        votes = [float(group(1, head)[:, -window:, column].mean()) for column in range(TOKENS - window)]
        half = kernel // 2
        near = [votes[max(c - half, 0) : c + half + 1] for c in range(len(votes))]
        smooth = [sum(part) / kernel for part in near] + [0.0] * window
        wanted.append(top(smooth, BUDGET, list(range(TOKENS - window, TOKENS))))
    assert kept(SnapKV(budget=BUDGET, window=window, kernel=kernel)) == wanted


def with_sinks() -> Any:
    """Return a tiny model whose attention has learned sinks."""
    config = GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=8, num_local_experts=2,
        num_experts_per_tok=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = tiny_models.fill(GptOssForCausalLM(config))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.mul_(50)  # of the size of the scores
    return model


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt2", "gpt_oss"])
def test_votes_are_the_mean_attention_of_the_window_on_other_models(kind: str):
    """Sliding windows, normed queries and other scales included: every layer, against eager attention."""
    votes: dict[int, Tensor] = {}

    class Noted(SnapKV):
        def scores(self, entries, seen) -> Tensor:
            votes[seen.model_layer] = received(entries, seen)
            return super().scores(entries, seen)

    eager, other = (with_sinks() if kind == "gpt_oss" else tiny_models.build(kind) for _ in range(2))
    eager.set_attn_implementation("eager")
    other.set_attn_implementation("hf_ext")
    cache = CompressedCache(other.config, Noted(budget=6, window=4), sliding="compress")
    with torch.no_grad():
        weights = eager(full()[0], output_attentions=True).attentions
        other(full()[0], past_key_values=cache)
    assert len(votes) == 2
    for layer, found in votes.items():
        wanted = weights[layer][0, :, -4:].unflatten(0, (found.shape[1], -1)).mean((1, 2))
        gap = (found[0] - wanted).abs().max().item()
        assert gap < 1e-5, f"layer {layer}: the largest difference of a vote is {gap:.2e}"


def test_tova_keeps_what_the_last_query_attends_to_in_the_mean_of_all_heads():
    votes = full()[1][1][:, -1].mean(0).tolist()
    assert kept(TOVA(budget=BUDGET)) == [top(votes, BUDGET, [TOKENS - 1])] * HEADS


def test_keydiff_keeps_the_keys_least_like_their_mean_direction():
    wanted = []
    for keys in full()[2].layers[1].keys[0]:
        unit = torch.stack([key / key.norm() for key in keys])
        mean = unit.mean(0)
        likeness = [-float(key @ mean / (key.norm() * mean.norm())) for key in keys]
        wanted.append(top(likeness, BUDGET, []))
    assert kept(KeyDiff(budget=BUDGET)) == wanted


def test_knorm_keeps_the_smallest_keys_and_streaming_llm_both_ends():
    norms = [[-float(key.norm()) for key in keys] for keys in full()[2].layers[1].keys[0]]
    assert kept(Knorm(budget=BUDGET)) == [top(head, BUDGET, []) for head in norms]
    ends = [0, 1, 2, 3, *range(TOKENS - 5, TOKENS)]
    assert kept(StreamingLLM(budget=BUDGET)) == [ends] * HEADS


def test_pyramidkv_gives_lower_layers_more_and_all_together_the_budget():
    policy = PyramidKV(budget=BUDGET, window=2, slope=3)
    cache = CompressedCache(model().config, policy)
    with torch.no_grad():
        model()(full()[0], past_key_values=cache)
    assert cache.held() == [15, 3]
    for layers in (1, 2, 5, 32):
        for budget in (64, 0.1, 0.7, 1.0):
            shares = [PyramidKV(budget=budget).layer_budget(layer, layers) for layer in range(layers)]
            assert shares == sorted(shares, reverse=True)
            assert 0.98 * budget * layers <= sum(shares) <= budget * layers + 1e-6, (layers, budget, shares)
            assert min(shares) > 0
            assert budget == 64 or max(shares) <= 1


def uneven(width: int) -> Tensor:
    """Return filters under which one head's scores are much larger than the other's."""
    directions = torch.randn(2, HEADS, width, generator=torch.Generator().manual_seed(0))
    return directions * torch.tensor([1.0, 10.0])[:, None]


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_adakv_gives_every_head_its_floor_and_the_best_of_all_heads_the_rest(floor: float):
    directions = uneven(8)
    inner = QFilters(filters=directions, budget=BUDGET, window=2)
    recent, certain = [TOKENS - 2, TOKENS - 1], int(floor * BUDGET)
    taken, others = [], []
    for head in range(HEADS):
        sums = [float(key @ directions[1, head]) for key in full()[2].layers[1].keys[0, head]]
        first = top(sums, max(certain, len(recent)), recent)
        taken += [(head, column) for column in first]
        others += [(sums[column], head, column) for column in range(TOKENS) if column not in first]
    best = sorted(others, reverse=True)[: BUDGET * HEADS - len(taken)]
    chosen = sorted(taken + [(head, column) for _, head, column in best])
    wanted = [[column for owner, column in chosen if owner == head] for head in range(HEADS)]
    found = kept(AdaKV(policy=inner, floor=floor))
    assert found == wanted
    assert sum(map(len, found)) == BUDGET * HEADS
    assert (floor == 1) == (len(found[0]) == len(found[1]))


def test_what_a_head_does_not_hold_takes_no_memory():
    """One head may keep nearly everything: the others' share of memory really goes."""
    wide = tiny_models.build("llama", head_dim=64, max_position_embeddings=1024)
    wide.set_attn_implementation("hf_ext")
    ids, _ = tiny_models.prompts((400,))
    cache = CompressedCache(wide.config, AdaKV(policy=QFilters(filters=uneven(64), budget=100), floor=0.1))
    with torch.no_grad():
        wide(ids, past_key_values=cache)
    lengths = [cache.entries(layer).real.sum(-1)[0].tolist() for layer in range(2)]
    assert all(max(heads) >= 1.5 * min(heads) for heads in lengths), f"the heads hold about the same: {lengths}"
    padded = sum(max(heads) * len(heads) for heads in lengths) * 2 * 64 * 4
    assert cache.resident_bytes() < min(1.05 * cache.nominal_bytes(), padded), (lengths, cache.resident_bytes())


def test_adakv_takes_its_needs_and_options_from_the_policy_inside():
    policy = AdaKV(policy=SnapKV(window=7, when="both"), budget=40)
    assert (policy.queries, policy.column_sums, policy.budget, policy.window, policy.when) == (7, False, 40, 7, "both")
    assert policy.policy.budget == 40
    policy = AdaKV(policy=H2O(budget=0.3, interval=5))
    assert (policy.queries, policy.column_sums, policy.budget, policy.interval) == (0, True, 0.3, 5)
    assert policy.field_names() == ("received",)
    pyramid = PyramidKV(budget=100)
    assert AdaKV(policy=pyramid).layer_budget(0, 4) == pyramid.layer_budget(0, 4)


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_is_that_of_queries_turned_to_all_positions_to_come(covariance: bool):
    """The queries before their rotation come from the projection itself, the angles from the model's own module."""
    horizon, sinks, layer = 20, 3, 1
    raw: list[Tensor] = []
    hook = model().model.layers[layer].self_attn.q_proj.register_forward_hook(lambda _, __, out: raw.append(out[0]))
    with torch.no_grad():
        model()(full()[0])
        hook.remove()
        cos, sin = model().model.rotary_emb(raw[0], torch.arange(TOKENS, TOKENS + horizon)[None])
    width = cos.shape[-1]
    swap = torch.zeros(width, width, dtype=torch.float64)
    for i in range(width // 2):  # the other number of the pair, with its sign
        swap[i, i + width // 2], swap[i + width // 2, i] = -1, 1
    turns = [torch.diag(c) + torch.diag(s) @ swap for c, s in zip(cos[0].double(), sin[0].double(), strict=True)]
    mean_turn = torch.stack(turns).mean(0)
    cached, wanted = full()[2].layers[layer], []
    for head in range(HEADS):
        keys, values = cached.keys[0, head].double(), cached.values[0, head].double()
        total = torch.zeros(TOKENS - sinks, dtype=torch.float64)
        for member in range(GROUP):
            start = (GROUP * head + member) * width
            queries = raw[0][sinks:, start : start + width].double()
            mean = mean_turn @ queries.mean(0)
            spread = mean_turn @ torch.cov(queries.T, correction=0) @ mean_turn.T
            logits = keys @ mean / width**0.5
            if covariance:
                logits = logits + torch.einsum("ni,ij,nj->n", keys, spread, keys) / width / 2
            total += logits[sinks:].softmax(0) / GROUP
        scores = [0.0] * sinks + (total * values[sinks:].norm(dim=-1)).tolist()
        wanted.append(top(scores, BUDGET, list(range(sinks))))
    policy = ExpectedAttention.of(model(), budget=BUDGET, horizon=horizon, sinks=sinks, covariance=covariance)
    assert kept(policy, layer) == wanted


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_rotations_are_those_of_the_model(kind: str):
    """Keys of every layer at far positions are the near ones, turned."""
    other = tiny_models.build(kind, max_position_embeddings=8192)
    rotations, ids = rotations_of(other), torch.arange(5, 9)[None]
    with torch.no_grad():
        here, there = (
            other(ids, position_ids=torch.arange(start, start + 4)[None], use_cache=True).past_key_values
            for start in (2, 4002)
        )
    turned = turn(rotations[0], here.layers[0].keys, torch.tensor(4000))  # later layers see what earlier ones saw
    gap = (turned - there.layers[0].keys).abs().max().item()
    assert gap < 5e-4, f"the largest difference of a key is {gap:.2e}"


def test_models_without_rotary_positions_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="rotations=None"):
        ExpectedAttention.of(tiny_models.shared("gpt2"))


def test_q_filters_keep_the_keys_with_the_largest_projections():
    directions = torch.randn(2, HEADS, 8, generator=torch.Generator().manual_seed(0))
    wanted = []
    for head in range(HEADS):
        scores = [float(key @ directions[1, head]) for key in full()[2].layers[1].keys[0, head]]
        wanted.append(top(scores, BUDGET, list(range(TOKENS - 2, TOKENS))))
    assert kept(QFilters(filters=directions, budget=BUDGET, window=2)) == wanted


WRONG: list[tuple[Any, str]] = [
    (lambda: H2O(recent=1.5), "recent must be a share"),
    (lambda: H2O(budget=0), "at least 1"),
    (lambda: SnapKV(window=0), "window of at least 1"),
    (lambda: SnapKV(kernel=4), "odd"),
    (lambda: PyramidKV(slope=0.5), "slope must be"),
    (lambda: TOVA(window=-1), "window must be"),
    (lambda: KeyDiff(when="later"), "when must be"),
    (lambda: AdaKV(policy="snapkv"), "SnapKV"),
    (lambda: AdaKV(policy=AdaKV()), "AdaKV does more"),
    (lambda: AdaKV(floor=2), "floor must be a share"),
    (lambda: AdaKV(budget=1.5), "at most 1.0"),
    (lambda: ExpectedAttention(rotations=torch.zeros(3)), "rotations_of"),
    (lambda: ExpectedAttention(rotations=None, horizon=0), "horizon must be"),
    (lambda: ExpectedAttention(rotations=None, epsilon=-1.0), "epsilon must be"),
    (lambda: QFilters(filters=torch.zeros(3)), "QFilters.fit"),
    (lambda: QFilters(filters="me/model"), "QFilters.fit"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_options_are_refused_by_name(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_rotations_of_another_model_are_refused():
    policy = ExpectedAttention(rotations=torch.zeros(1, 2, 8, dtype=torch.float64), budget=4)
    with pytest.raises(ValueError, match=r"rotations are of a model of 1 layers.*ExpectedAttention\.of"):
        kept(policy)


@pytest.mark.parametrize("made", [H2O, SnapKV, TOVA, PyramidKV, AdaKV])
def test_policies_that_need_attention_say_so_under_other_implementations(made: Any):
    other = tiny_models.build("llama")
    cache = CompressedCache(other.config, made(budget=4))
    with pytest.raises(ValueError, match="attn_implementation='hf_ext'"):
        other(full()[0], past_key_values=cache)
