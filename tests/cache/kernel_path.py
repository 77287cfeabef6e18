"""Run by test_kernel_path.py in a process with TRITON_INTERPRET=1: caches through the kernels beside a full cache.

Prints one line of JSON: the largest difference of logits for each policy, and how often each kernel was called.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch

from hf_ext.attention import gpu, kernels
from hf_ext.cache import H2O, KIVI, AdaKV, CompressedCache, Knorm, KVMerger, SnapKV
from hf_ext.kernels import compaction, merge_entries, packed_attention, ragged_attention
from hf_ext.testing import tiny_models
from hf_ext.testing.cache_base import Script, passes, positions

TURNS = (7, 1, 4, 1)
#: The interpreter takes half a second for every call of a layer: one layer, but where layers differ.
ONE_LAYER: dict[str, dict[str, int]] = {"gpt2": {"n_layer": 1}, "gemma3": {}}


def main() -> None:
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return own(*args, **kwargs)

        setattr(owner, name, call)

    counted(gpu, "attend_with_kernels")
    for module, name in (
        (compaction, "compact"),
        (ragged_attention, "ragged_attention"),
        (packed_attention, "packed_attention"),
        (merge_entries, "merge_entries"),
    ):
        counted(module, name)
    found = {}
    ids, mask = tiny_models.prompts((sum(TURNS), sum(TURNS) - 3))
    for kind, policy in (
        ("llama", Knorm(budget=6)),
        ("gpt2", SnapKV(budget=6, window=2)),
        ("gemma3", H2O(budget=6)),
        ("mistral", Knorm(budget=4)),
        ("llama", AdaKV(policy=Knorm(), budget=6)),
    ):
        script = Script(tiny_models.build(kind, **ONE_LAYER.get(kind, {"num_hidden_layers": 1})), policy, mask)
        with kernels("always"):
            for part in passes(ids.shape[1], TURNS):
                script.step(ids[:, part], mask[:, : part.stop])
        found[f"{type(policy).__name__} on {kind}"] = script.worst

    for policy in (KIVI(bits=8, group=4, residual=4), KVMerger(budget=0.5)):
        logits = []
        for mode in ("always", "never"):
            model = tiny_models.build("llama", head_dim=16, num_hidden_layers=1)
            model.set_attn_implementation("hf_ext")
            cache = CompressedCache(model.config, policy)
            with kernels(mode), torch.no_grad():
                for part in passes(ids.shape[1], TURNS):
                    seen = mask[:, : part.stop]
                    where = positions(seen, part.stop - part.start)
                    out = model(ids[:, part], attention_mask=seen, position_ids=where, past_key_values=cache).logits
            logits.append(out)
        found[type(policy).__name__] = float((logits[0] - logits[1]).abs().max())
    print(json.dumps({"found": found, "calls": calls}))


main()
