"""On a GPU everything gives what it gives on the CPU. Run by `make gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.generation import (
    CautiousDecoding,
    ContrastiveSearch,
    LayerSkip,
    OptTree,
    SpeculativeDecoding,
    TokenRecycling,
)
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.trainer_callbacks import MEAP

pytestmark = pytest.mark.gpu
PROMPTS = ["def read_lines(path):\n", "import os\n\n\ndef main(argv=None):\n    "]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Keep matrix products in full float32, so that devices can be compared; needs a GPU."""
    assert torch.cuda.is_available(), "these tests need a GPU; `make gpu` runs them"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def target(device: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path("target"), **options).to(device).eval()


def batch(device: str) -> Any:
    return AutoTokenizer.from_pretrained(demo.path("target"))(PROMPTS, return_tensors="pt", padding=True).to(device)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (ContrastiveSearch(penalty_alpha=0.6, top_k=4), {}),
        # The likeliest token is the only one: as many trials as entropy asks for, all the same.
        (CautiousDecoding(max_trials=4), {"do_sample": True, "top_k": 1}),
        (SpeculativeDecoding(draft_model=demo.path("draft"), draft_tokens=4), {"do_sample": False}),
        (OptTree(draft_model=demo.path("draft"), nodes=16), {"do_sample": False}),
        (TokenRecycling(nodes=24), {"do_sample": False}),
        (LayerSkip(exit_layer=3, draft_tokens=3), {"do_sample": False}),
    ],
    ids=["search", "cautious", "speculative", "tree", "recycling", "layerskip"],
)
def test_strategies_choose_the_tokens_that_they_choose_on_the_cpu(strategy: Any, options: dict[str, Any]) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        tokenizer = AutoTokenizer.from_pretrained(demo.path("target"))
        found[device] = strategy.generate(
            target(device), **batch(device), max_new_tokens=32, tokenizer=tokenizer, **options
        ).tolist()
        assert strategy.report.tokens > 0
    assert found["cuda"] == found["cpu"]


@pytest.mark.parametrize("strategy", [ContrastiveSearch(), CautiousDecoding(max_trials=4)], ids=["search", "cautious"])
def test_strategies_run_in_bfloat16(strategy: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.path("target"))
    inputs = batch("cuda")
    out = strategy.generate(
        target("cuda", dtype=torch.bfloat16), **inputs, max_new_tokens=16, min_new_tokens=16, tokenizer=tokenizer
    )
    assert out.device.type == "cuda"
    assert out.shape == (2, inputs["input_ids"].shape[1] + 16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_swan_gpt_gives_the_logits_that_it_gives_on_the_cpu(attention: str) -> None:
    swan = SwanGPTForCausalLM.from_llama(target("cpu"), sliding_window=8).eval()
    swan.set_attn_implementation(attention)
    inputs = batch("cpu")
    with torch.no_grad():
        expected = swan(**inputs).logits
        found = swan.cuda()(**inputs.to("cuda")).logits.cpu()
    seen = inputs["attention_mask"].bool().cpu()
    torch.testing.assert_close(found[seen], expected[seen], atol=2e-3, rtol=1e-3)


def test_meap_makes_the_steps_that_it_makes_on_the_cpu(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.path("target"))
    rows = [tokenizer(text * 12)["input_ids"][:32] for text in ("import os\n", "x = [1, 2]\n", "def f(x):\n", "try:\n")]
    assert {len(row) for row in rows} == {32}
    data = [{"input_ids": row, "labels": row} for row in rows]
    losses = {}
    for use_cpu in (True, False):
        arguments = TrainingArguments(
            str(tmp_path / str(use_cpu)), max_steps=3, per_device_train_batch_size=2, logging_steps=1, use_cpu=use_cpu,
            report_to=[], save_strategy="no", disable_tqdm=True, seed=0, optim="sgd",
        )  # fmt: skip
        model = target("cpu")
        trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[MEAP()])
        trainer.train()
        assert next(model.parameters()).device.type == ("cpu" if use_cpu else "cuda")
        losses[use_cpu] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[False] == pytest.approx(losses[True], abs=2e-3)


def test_command_line_takes_the_gpu_by_itself() -> None:
    from hf_ext.cli import models

    model, _ = models.load("target", device=None, dtype="bfloat16", trust_remote_code=False)
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
