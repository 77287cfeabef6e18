"""Record what the contrastive search inside transformers 4.55.4, the last to run it offline, generates.

    pip install torch "transformers==4.55.4"
    python tests/generation/reference/make_contrastive_reference.py

writes `contrastive_reference.json` beside this file. The models are those of
`hf_ext/testing/tiny_models.py`, read as a file: hf_ext itself does not run on that release.
"""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULT = HERE / "contrastive_reference.json"
RELEASE = "4.55.4"

#: Three rows of different lengths; the window of the sliding models is 8 tokens.
BATCH = (12, 7, 3)
PAIRS = ((0.6, 4), (0.3, 6), (0.8, 3))
#: Stands for eos tokens that the model's first run says: one after 4 tokens, one after 10.
SOME = "said before"


def cases() -> list[dict[str, Any]]:
    """Return every run to record: model, prompt lengths, alpha, k and further settings of `generate`."""
    found: list[dict[str, Any]] = []

    def add(kind: str, lengths: tuple[int, ...], alpha: float, k: int, **settings: Any) -> None:
        settings = {"max_new_tokens": 24, **settings}
        found.append({"kind": kind, "lengths": list(lengths), "alpha": alpha, "k": k, "settings": settings})

    # 24 new tokens after 12: more than four windows.
    for kind in ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma3", "opt", "t5", "bart"):
        for alpha, k in PAIRS:
            add(kind, BATCH, alpha, k)
    for kind in ("gpt2", "llama", "mistral", "t5"):
        add(kind, (9,), 0.6, 4)
        add(kind, (3, 17, 9, 1, 30), 0.6, 5)
    for kind in ("llama", "mistral", "bart"):
        add(kind, BATCH, 0.6, 4, eos_token_id=SOME)
        add(kind, BATCH, 0.6, 4, eos_token_id=SOME, min_new_tokens=10)
        # One row, as 4.55.4 lets a penalty apply to padding tokens, which later releases leave alone.
        add(kind, (12,), 0.6, 4, repetition_penalty=1.5)
        add(kind, BATCH, 0.6, 4, no_repeat_ngram_size=2, bad_words_ids=[[89], [6]])
    return found


def tiny_models() -> types.ModuleType:
    """Import `hf_ext/testing/tiny_models.py` by its path."""
    path = HERE.parents[2] / "hf_ext" / "testing" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run every case and write the tokens."""
    import transformers

    if transformers.__version__ != RELEASE:
        raise SystemExit(f"this is transformers {transformers.__version__}, the reference is {RELEASE}")
    torch.set_num_threads(1)
    tiny = tiny_models()
    for case in (runs := cases()):
        ids, mask = tiny.prompts(tuple(case["lengths"]))
        if case["settings"].get("eos_token_id") == SOME:
            said = next(run["tokens"] for run in runs if run["kind"] == case["kind"])
            case["settings"]["eos_token_id"] = [said[0][-21], said[1][-15]]
        out = tiny.shared(case["kind"]).generate(
            ids, attention_mask=mask, penalty_alpha=case["alpha"], top_k=case["k"], do_sample=False, **case["settings"]
        )
        case["tokens"] = out.tolist()
    rows = ",\n".join(json.dumps(case) for case in runs)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    RESULT.write_text(f'{{"versions": {json.dumps(versions)}, "runs": [\n{rows}\n]}}\n', encoding="utf-8")
    print(f"{len(runs)} runs written to {RESULT.name}")


if __name__ == "__main__":
    main()
