"""Runs kvpress over given tokens; started by the interpreter of an environment that has kvpress, never imported.

    /path/to/python cache_kvpress.py job.json result.json

The job names a saved model and lists cells, each a press with its options, token ids of texts, questions and the number
of tokens to answer. The result says for each cell what was answered and what the cache held. Nothing of hf_ext is
imported: kvpress needs an older transformers.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run all cells of a job and return their results."""
    import kvpress
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    logging.disable(logging.WARNING)
    torch.set_num_threads(job["threads"])
    models = {
        name: AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation=name).eval()
        for name in ("sdpa", "eager")
    }
    results = []
    for cell in job["cells"]:
        texts = job["texts"][cell["texts"]]
        try:
            press = build(kvpress, cell["press"], cell["options"], cell["ratio"])
            results.append(answer(models["eager" if cell["eager"] else "sdpa"], press, texts, cell["aware"]))
        except Exception as error:  # the benchmark shows what a press cannot do
            results.append({"problem": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    versions = {"kvpress": version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__}
    return {"results": results, "versions": versions}


def version(package: str) -> str:
    """Return the installed version of a package."""
    from importlib.metadata import version as found

    return found(package)


def build(kvpress: Any, name: str, options: dict[str, Any], ratio: float) -> Any:
    """Return a press; an option that is a pair of a name and options is built likewise."""
    kind = getattr(kvpress, name)
    given = {
        k: build(kvpress, v[0], v[1], ratio) if isinstance(v, list) else v for k, v in copy.deepcopy(options).items()
    }
    press = kind(**given)
    press.compression_ratio = ratio
    return press


def answer(model: Any, press: Any, texts: dict[str, Any], aware: bool) -> dict[str, Any]:
    """Read texts under a press, then answer the questions, each the most likely token, as kvpress's pipeline does."""
    import torch
    from transformers import DynamicCache

    context, question = torch.tensor(texts["context"]), torch.tensor(texts["question"])
    rows = len(context)
    mask = torch.tensor(texts["mask"]) if texts.get("mask") else torch.ones_like(context)
    padded = not bool(mask.all())
    prompt, later = (torch.cat([context, question], dim=1), question[:, :0]) if aware else (context, question)
    seen = torch.cat([mask, mask.new_ones(rows, question.shape[1] + texts["answers"])], dim=1)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    start = 0

    @torch.no_grad()
    def step(ids: Any) -> Any:
        nonlocal start
        end = start + ids.shape[1]
        out = model(
            ids, past_key_values=cache, position_ids=places[:, start:end],
            attention_mask=seen[:, :end] if padded else None, logits_to_keep=1,
        )  # fmt: skip
        start = end
        return out.logits[:, -1].argmax(-1, keepdim=True)

    with torch.no_grad(), press(model):
        token = step(prompt)
    for at in range(later.shape[1]):
        token = step(later[:, at : at + 1])
    found, held = [token], 0
    for number in range(texts["answers"]):
        token = step(token)
        held = held or sum(storages(cache).values())
        if number + 1 < texts["answers"]:
            found.append(token)
    for module in model.modules():  # what per-head presses leave behind
        if hasattr(module, "masked_key_indices"):
            module.masked_key_indices = None
    return {"tokens": torch.cat(found, dim=1).tolist(), "bytes": held}


def storages(cache: Any) -> dict[int, int]:
    """Return the bytes of the storages that a cache holds, by address."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(run(json.loads(source.read_text()))))
