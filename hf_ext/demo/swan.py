"""The demonstration's second half: convert, fine-tune, save, and reload where hf_ext is absent."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_ext.demo.corpus import sources
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.testing.isolated import run_without
from hf_ext.trainer_callbacks import MEAP

#: Runs in the second process: loads the checkpoint by its own code and continues the prompt.
RELOAD = """
import sys, json
import torch
from transformers import AutoModelForCausalLM
folder, ids, new, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
out = model.generate(torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
print("TOKENS" + json.dumps({"tokens": out[0, len(ids):].tolist(), "class": type(model).__module__}))
"""


class Windows(Dataset):
    """Windows of modules trained on (or held out), in an order of their own, as `input_ids` and `labels`."""

    def __init__(self, tokenizer: Any, length: int, limit: int, *, held_out: bool) -> None:
        files = [source for source in sources(held_out=held_out) if "/" not in source.name]
        random.Random(0).shuffle(files)  # the first letters of the alphabet are no fair sample
        ids: list[int] = []
        for source in files:
            ids += [tokenizer.eos_token_id, *tokenizer(source.text, verbose=False)["input_ids"]]
            if len(ids) >= length * limit:
                break
        count = min(limit, len(ids) // length)
        self.rows = torch.tensor(ids[: count * length]).view(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Progress(TrainerCallback):
    """Reports each optimizer step to a function `advance(loss or None)`."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by one step."""
        self.advance()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, data: Windows) -> float:
    """Mean next-token loss in nats over `data`."""
    model.eval()
    losses = [model(input_ids=rows, labels=rows, use_cache=False).loss * len(rows) for rows in data.rows.split(8)]
    return float(torch.stack(losses).sum() / len(data))


def convert(target: PreTrainedModel) -> SwanGPTForCausalLM:
    """Turn the embedded Llama target into SWAN-GPT with windows of a quarter of its context."""
    return SwanGPTForCausalLM.from_llama(target, sliding_window=target.config.max_position_embeddings // 4)


def fine_tune(
    model: PreTrainedModel, tokenizer: Any, data: Windows, folder: Path, *, steps: int, advance: Any, seed: int = 0
) -> list[dict[str, float]]:
    """Train `model` with MEAP through a stock Trainer and return what it logged."""
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-4,
        warmup_steps=max(1, steps // 10), lr_scheduler_type="cosine", logging_steps=max(1, steps // 10),
        save_strategy="no", report_to=[], disable_tqdm=True, seed=seed, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data, processing_class=tokenizer,
        callbacks=[MEAP(mask_ratio=0.15), Progress(advance)],
    )  # fmt: skip
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # prints every log line as a bare dict
            trainer.remove_callback(callback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def reload_elsewhere(folder: Path, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Continue `prompt` in a new process that loads `folder` by its own code and cannot import hf_ext.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed.
    """
    home = folder.parent / "elsewhere"
    home.mkdir()
    argument = json.dumps([str(folder), prompt, new_tokens, torch.get_num_threads()])
    printed = run_without(["hf_ext"], RELOAD, argument, home=home, seconds=600)
    line = next(line for line in printed.splitlines() if line.startswith("TOKENS"))
    return json.loads(line.removeprefix("TOKENS"))
