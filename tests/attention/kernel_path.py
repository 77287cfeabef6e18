"""Run by test_kernel_path.py in a process with TRITON_INTERPRET=1: models through the kernels beside eager.

Prints one line of JSON: the largest difference of each comparison.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hf_ext.attention import AttentionStructure, collect, kernels, masks_for
from hf_ext.attention import gpu as kernel_calls
from hf_ext.generation import TokenRecycling
from hf_ext.testing import tiny_models

IDS, MASK = tiny_models.prompts((9, 5))
REAL = MASK.bool()


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("shapes", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._build


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def main() -> None:
    build, found = builder(), {}
    calls: list[str] = []
    own_calls = kernel_calls.attend_with_kernels

    def counted(*args: Any) -> Any:
        calls.append("kernels")
        return own_calls(*args)

    kernel_calls.attend_with_kernels = counted

    for kind in ("gemma2", "gpt_oss"):
        model = build(kind)
        model.set_attn_implementation("eager")
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        with torch.no_grad():
            expected = model(**inputs, output_attentions=True)
            step = torch.cat([MASK, torch.ones(2, 1, dtype=torch.long)], 1)
            after = model(IDS[:, -1:], attention_mask=step, past_key_values=expected.past_key_values).logits
        model.set_attn_implementation("hf_ext")
        with kernels("always"), torch.no_grad(), collect(model) as statistics:
            own = model(**inputs)
            found[f"{kind}: logits"] = gap(own.logits[REAL], expected.logits[REAL])
            for layer, matrix in enumerate(expected.attentions):
                sums = (matrix * MASK[:, None, :, None]).sum(2).unflatten(1, (2, -1)).sum(2)
                found[f"{kind}: column sums {layer}"] = gap(statistics[layer].column_sums, sums)
            cached = model(IDS[:, -1:], attention_mask=step, past_key_values=own.past_key_values).logits
            found[f"{kind}: a step with the cache"] = gap(cached, after)

    gradients = []
    labels = IDS.masked_fill(~(REAL & REAL.roll(1, 1)), -100)  # what padding predicts is no matter
    for name in ("eager", "hf_ext"):
        model = build("gpt_oss")
        model.set_attn_implementation(name)
        with kernels("always"):
            model(IDS, attention_mask=MASK, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    found["gpt_oss: gradients"] = gap(*gradients)

    model = build("gemma3")
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 0, 0, 0]])
    structure = AttentionStructure.causal(torch.ones_like(segments)).segments(segments)
    positions = structure.queries.position.long()
    model.set_attn_implementation("hf_ext")
    with torch.no_grad():
        dense = model(IDS[:1], attention_mask=masks_for(model, structure), position_ids=positions).logits
        with kernels("always"):
            packed = model(IDS[:1], attention_mask=masks_for(model, structure), position_ids=positions).logits
            additive = {
                n: torch.where(m, 0.0, torch.finfo(torch.float32).min) for n, m in dense_masks(model, structure)
            }
            added = model(IDS[:1], attention_mask=additive, position_ids=positions).logits
    found["segments"], found["segments, additive mask"] = gap(packed, dense), gap(added, dense)

    model = tiny_models.build("llama", num_hidden_layers=1)
    model.set_attn_implementation("hf_ext")
    given = {"max_new_tokens": 3, "do_sample": False}
    expected_text = model.generate(IDS[:1], **given)
    with kernels("always"):
        text = TokenRecycling(nodes=8, depth=3).generate(model, IDS[:1], **given)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            graph = compiled(IDS, attention_mask=MASK, use_cache=False).logits
    with torch.no_grad():
        plain = model(IDS, attention_mask=MASK).logits
    found["compiled"] = gap(graph[REAL], plain[REAL])
    found["trees"] = float((text != expected_text).sum())
    print(json.dumps({"found": found, "calls": len(calls)}))


def dense_masks(model: Any, structure: AttentionStructure) -> list[tuple[str, torch.Tensor]]:
    with kernels("never"):
        return list(masks_for(model, structure).items())


if __name__ == "__main__":
    sys.exit(main())
