"""Record which tokens kvpress 0.5.5 keeps, for the policies that it and hf_ext have in common.

kvpress runs on transformers before 5.3 only, so this runs in an environment of its own, without hf_ext:

    python -m venv kvpress-env
    kvpress-env/bin/pip install torch==2.13.0 kvpress==0.5.5 transformers==5.2.0
    kvpress-env/bin/python benchmarks/kvpress_indices.py

writes `tests/cache/data/kvpress_indices.json`, against which `tests/cache/test_kvpress_parity.py` holds the policies.
The models are those of `hf_ext/testing/tiny_models.py`, read as a file: their weights follow from the names of the
parameters and are not stored. What is kept is read off the cache after the prompt, key by key; of presses that only
mask what they drop, off the mask.
"""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tests" / "cache" / "data" / "kvpress_indices.json"
VERSIONS = {"kvpress": "0.5.5", "transformers": "5.2.0"}

TOKENS = 96
BUDGETS = (12, 24, 48, 80)
WINDOW, KERNEL, SINKS, HORIZON = 8, 5, 4, 64
#: Kind and settings of each model: heads share keys in groups, not at all, all of them; keys are normed.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {}),
    "each": ("llama", {"num_key_value_heads": 4}),
    "one": ("llama", {"num_key_value_heads": 1}),
    "normed": ("qwen3", {}),
}


def tiny_models() -> types.ModuleType:
    """Import `hf_ext/testing/tiny_models.py` by its path."""
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "hf_ext" / "testing" / "tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filters(layers: int, heads: int, width: int) -> torch.Tensor:
    """Return filters for Q-Filters that look like chance, `(layers, key heads, width)`."""
    return torch.sin(torch.arange(layers * heads * width, dtype=torch.float64) ** 2).float().view(layers, heads, width)


def presses(kvpress: Any, model: Any, ratio: float, budget: int) -> dict[str, Any]:
    """Return the presses to compare, by the names the fixture has for them."""
    config = model.config
    query_filters = kvpress.QFilterPress(ratio)
    query_filters.post_init_from_model = lambda model: None  # it would fetch filters from the Hub
    query_filters.q_filters = -filters(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    found = {
        "knorm": kvpress.KnormPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "streaming-llm": kvpress.StreamingLLMPress(ratio, n_sink=SINKS),
        "tova": kvpress.TOVAPress(ratio),
        "h2o": kvpress.ObservedAttentionPress(ratio),
        "snapkv": kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=KERNEL),
        "expected-attention": kvpress.ExpectedAttentionPress(ratio, n_future_positions=HORIZON, n_sink=SINKS),
        "expected-attention-of-means": kvpress.ExpectedAttentionPress(
            ratio, n_future_positions=HORIZON, n_sink=SINKS, use_covariance=False, use_vnorm=False
        ),
        "q-filters": query_filters,
        "adakv-of-snapkv": kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=KERNEL)),
        "adakv-of-expected-attention": kvpress.AdaKVPress(
            kvpress.ExpectedAttentionPress(ratio, n_future_positions=HORIZON, n_sink=SINKS), alpha_safeguard=0.5
        ),
    }
    if budget == TOKENS // 2:  # elsewhere its pyramid is cut off, or it falls back on SnapKV
        exact = 1 - budget / TOKENS
        found["pyramidkv"] = kvpress.PyramidKVPress(exact, window_size=WINDOW, kernel_size=KERNEL, beta=4)
    return found


@torch.no_grad()
def kept(model: Any, press: Any, ids: torch.Tensor) -> list[list[list[int]]]:
    """Return which columns each head of each layer keeps."""
    import transformers

    full, pressed = (transformers.DynamicCache(config=model.config) for _ in range(2))
    model.model(ids, past_key_values=full)
    with press(model):
        model.model(ids, past_key_values=pressed)
    found = []
    for layer, whole, rest in zip(model.model.layers, full.layers, pressed.layers, strict=True):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            stays = torch.ones(whole.keys.shape[1:3], dtype=torch.bool)
            stays[masked[1], masked[2]] = False
            layer.self_attn.masked_key_indices = None
            found.append([head.nonzero().flatten().tolist() for head in stays])
            continue
        # (heads, kept, all): a key that was kept is the very one it was.
        same = (rest.keys[0][:, :, None] == whole.keys[0][:, None]).all(-1)
        assert bool((same.sum(-1) == 1).all()), "keys cannot be told apart"
        found.append([sorted(head.int().argmax(-1).tolist()) for head in same])
    return found


def main() -> None:
    """Run all presses on all models and write what they keep."""
    import kvpress
    import transformers

    assert transformers.__version__ == VERSIONS["transformers"], transformers.__version__
    models = tiny_models()
    ids, _ = models.prompts((TOKENS,))
    cases = []
    for shape, (kind, changes) in MODELS.items():
        for budget in BUDGETS:
            model = models.build(kind, **changes)
            # It keeps int(n * (1 - ratio)) in floating point: aim at the middle of what is rounded down.
            for name, press in presses(kvpress, model, 1 - (budget + 0.5) / TOKENS, budget).items():
                model.set_attn_implementation("eager" if name == "h2o" else "sdpa")
                columns = kept(model, press, ids)
                cases.append({"model": shape, "policy": name, "budget": budget, "columns": columns})
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    RESULT.write_text(f'{{"versions":{json.dumps(VERSIONS)},"tokens":{TOKENS},"cases":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
