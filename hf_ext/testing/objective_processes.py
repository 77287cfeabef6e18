"""What the conformance suite of objectives runs with other libraries and in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from hf_ext.testing.objective_training import BOS, EOS, PAD, VOCABULARY, collate, examples, logged, train, weights

#: Plain gradient descent, because Adam divides rounding errors of tiny gradients by the gradients.
DESCENT: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5}

WITHOUT_HF_EXT = """
import sys
sys.modules["hf_ext"] = None  # importing it raises from here on
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(4, 20)[None]).logits, sys.argv[2])
"""


def with_lora(model: PreTrainedModel) -> Any:
    """Wrap a model with rank-4 LoRA adapters on its attention, B not at zero so that A learns too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return wrapped


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer of the tiny vocabulary: `w0`, `w1`, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w4"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    # All special tokens of the tiny model: TRL makes the model's config follow the tokenizer.
    known = {"pad_token": f"w{PAD}", "bos_token": f"w{BOS}", "eos_token": f"w{EOS}"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**known, **special})


def train_sft(model: PreTrainedModel, objective: Any, parts: int, *, attached: bool) -> Trainer:
    """Take one SGD step of rate 1 over 8 rows in `parts` micro-batches with TRL's SFTTrainer."""
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from hf_ext.trainer_callbacks import attach

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=7,
            dataloader_pin_memory=False,
            max_length=None,
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(examples(16)),
            processing_class=tiny_tokenizer(),
            data_collator=collate,
            callbacks=[] if attached else [objective],
        )
        if attached:
            attach(trainer, objective)
        trainer.train()
    return trainer


def train_in_two_processes(
    objective: type, options: Mapping[str, Any], attached: bool, folder: Path
) -> list[dict[str, Any]]:
    """Run this module's `main` under `accelerate launch --cpu` and return what each process saved.

    On CPUs accelerate starts one process and leaves the others to MPI, which sets a rank for each.
    Here every rank gets a launcher of its own with the same variables, so that no MPI is needed.
    """
    job = {
        "objective": f"{objective.__module__}:{objective.__qualname__}",
        "options": dict(options),
        "attached": attached,
        "folder": str(folder),
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={_free_port()}"]
    launch += ["-m", __name__, json.dumps(job)]
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in (0, 1)
    ]
    running = [_start(launch, rank) for rank in ranks]
    for process in running:
        _finish(process)
    return [torch.load(folder / f"process-{rank}.pt", weights_only=True) for rank in (0, 1)]


def logits_without_hf_ext(model: nn.Module, folder: Path) -> float:
    """Save the model, load it in a process without `hf_ext`, and return how far the logits are."""
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    _finish(_start([sys.executable, "-c", WITHOUT_HF_EXT, str(folder / "model"), str(folder / "logits.pt")], {}))
    with torch.no_grad():
        expected = model.eval()(torch.arange(4, 20)[None]).logits
    return float((torch.load(folder / "logits.pt", weights_only=True) - expected).abs().max())


def _start(command: list[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()  # does nothing to a process that has ended
    assert process.returncode == 0, f"{process.args!r} ended with {process.returncode}:\n{output[-4000:]}"


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(argument: str) -> None:
    """Train in one of two processes, 4 rows each, and save weights and logs."""
    from hf_ext.plugins import resolve
    from hf_ext.testing.objective_training import tiny_model

    job = json.loads(argument)
    objective = resolve(job["objective"], "objective under test")(**job["options"])
    model = tiny_model()
    trainer = train(model, objective, attached=job["attached"], per_device_train_batch_size=4, **DESCENT)
    if trainer.args.world_size != 2:
        raise RuntimeError(f"expected two processes, got {trainer.args.world_size}")
    saved = {"weights": weights(model), "loss": logged(trainer, "loss"), "clean_loss": logged(trainer, "clean_loss")}
    torch.save(saved, Path(job["folder"]) / f"process-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
