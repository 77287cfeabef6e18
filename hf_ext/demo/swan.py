"""The demonstration's second half: convert, fine-tune, save, and reload where hf_ext is absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_ext.demo.corpus import sources
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.trainer_callbacks import MEAP

#: Runs in the second process: refuses hf_ext, loads the checkpoint by its own code and continues the prompt.
RELOAD = """
import sys, json
class NoHfExt:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_ext":
            raise ModuleNotFoundError(f"{name} is blocked in this process")
sys.meta_path.insert(0, NoHfExt())
import torch
from transformers import AutoModelForCausalLM
folder, ids, new, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
out = model.generate(torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
assert not any(name.partition(".")[0] == "hf_ext" for name in sys.modules), "hf_ext was imported"
print("TOKENS" + json.dumps({"tokens": out[0, len(ids):].tolist(), "class": type(model).__module__}))
"""


class Windows(Dataset):
    """Consecutive windows of the training (or held-out) corpus as `input_ids` and `labels`."""

    def __init__(self, tokenizer: Any, length: int, limit: int, *, held_out: bool) -> None:
        ids: list[int] = []
        for source in sources(held_out=held_out):
            if "/" not in source.name:
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
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3,
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
    argument = json.dumps([str(folder), prompt, new_tokens, torch.get_num_threads()])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, argument], capture_output=True, text=True, env=environment, cwd=folder.parent
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    if done.returncode or not lines:
        raise RuntimeError(f"the second process failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("TOKENS"))
