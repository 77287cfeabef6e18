"""Train the embedded drafting heads on the embedded target, through the stock `Trainer`.

    python -m hf_ext.demo.train_heads kangaroo          --out DIR --steps 1200
    python -m hf_ext.demo.train_heads recurrent-drafter --out DIR --steps 350
    python -m hf_ext.demo.train_heads hidden-transfer   --out DIR --steps 450
    python -m hf_ext.demo.train_heads layerskip         --out DIR --steps 300 --lr 1e-3

The first three train a head and leave the target alone (`TrainDraftHead`). `layerskip` trains LoRA
adapters of the target itself (`LayerSkipTraining`), so that its early exits predict well. The
recipe written beside the weights has the held-out figures before and after: `agreement` is the share
of positions where the draft's likeliest token is that of the model it drafts for.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import hf_ext.demo
from hf_ext.demo.train import CONTEXT, encode, hardware, save
from hf_ext.generation.heads import DraftHead, HiddenTransferHead, KangarooHead, RecurrentDrafterHead
from hf_ext.layers import TargetEnds, captured
from hf_ext.trainer_callbacks.draft_head import TrainDraftHead

HEADS: dict[str, tuple[type[DraftHead], dict[str, Any]]] = {
    "kangaroo": (KangarooHead, {"exit_layer": 2}),
    "recurrent-drafter": (RecurrentDrafterHead, {"blocks": 2, "train_steps": 4}),
    "hidden-transfer": (HiddenTransferHead, {"transfer_layers": [3, 3, 3], "anchors": 64}),
}
HELD_OUT_WINDOWS = 48


class Windows(Dataset):
    """Windows of `CONTEXT` tokens of the corpus.

    Args:
        tokens: the corpus as one row.
        starts: where each window begins.
    """

    def __init__(self, tokens: torch.Tensor, starts: torch.Tensor) -> None:
        self.tokens, self.starts = tokens, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[self.starts[index] : self.starts[index] + CONTEXT]
        return {"input_ids": window, "labels": window}


def windows(seed: int, steps: int, batch: int) -> tuple[Windows, Windows]:
    """Return training windows at random places and held-out windows at regular ones."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_ext.demo.path("tokenizer"))
    data, held_out = encode(tokenizer, False), encode(tokenizer, True)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - CONTEXT, (steps * batch,), generator=generator)
    regular = torch.linspace(0, len(held_out) - CONTEXT, HELD_OUT_WINDOWS).long()
    return Windows(data, starts), Windows(held_out, regular)


def embedded_target() -> Any:
    """Load the embedded target in float32."""
    return AutoModelForCausalLM.from_pretrained(hf_ext.demo.path("target"), dtype=torch.float32)


def trainer_for(model: Any, callback: Any, args: argparse.Namespace, train: Any, held_out: Any) -> Trainer:
    """Build the Trainer of a recipe."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="heads-"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=args.bf16,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        prediction_loss_only=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[callback])


def held_out_figures(trainer: Trainer) -> dict[str, float]:
    """Evaluate and keep what the head says of itself."""
    found = trainer.evaluate()
    kept = {name.removeprefix("eval_"): value for name, value in found.items() if "loss" in name or "agree" in name}
    return {name: round(value, 4) for name, value in kept.items()}


def train_head(args: argparse.Namespace) -> None:
    """Train one head and write it with its `recipe.json` into `args.out`."""
    train, held_out = windows(args.seed, args.steps, args.batch)
    target = embedded_target()
    kind, options = HEADS[args.head]
    set_seed(args.seed)
    head = kind.for_target(target, **options)
    trainer = trainer_for(target, TrainDraftHead(head), args, train, held_out)
    before, start = held_out_figures(trainer), time.time()
    trainer.train()
    minutes = (time.time() - start) / 60
    save(head, args.out)
    # measured on the weights as they were saved, after their rounding
    saved = kind.from_pretrained(args.out, dtype=torch.float32)
    after = held_out_figures(trainer_for(target, TrainDraftHead(saved), args, train, held_out))
    write_recipe(args, options, head, before, after, minutes, trainer)


def train_layerskip(args: argparse.Namespace) -> None:
    """Train LoRA adapters of the target and write them with their `recipe.json` into `args.out`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from hf_ext.trainer_callbacks.layerskip import LayerSkipTraining

    options: dict[str, Any] = {"layer_dropout": 0.1, "early_exit_scale": 1.0, "curriculum": "rotational", "period": 2}
    train, held_out = windows(args.seed, args.steps, args.batch)
    target = embedded_target()
    before = exit_figures(target, held_out)
    set_seed(args.seed)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(target, lora)
    trainer = trainer_for(model, LayerSkipTraining(**options, clean_loss_every=0), args, train, held_out)
    start = time.time()
    trainer.train()
    minutes = (time.time() - start) / 60
    for parameter in model.parameters():
        if parameter.requires_grad:  # the adapters alone are rounded
            parameter.data = parameter.data.bfloat16()
    save_adapters(model, args.out)
    saved = PeftModel.from_pretrained(embedded_target(), args.out).float()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recipe_options = {**options, "lora_rank": args.rank}
    write_recipe(args, recipe_options, adapters, before, exit_figures(saved, held_out), minutes, trainer)


def save_adapters(model: Any, out: Path) -> None:
    """Save LoRA adapters without what differs from machine to machine."""
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = json.loads((out / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "hf_ext/demo/target", "target_modules": sorted(config["target_modules"])}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def exit_figures(model: Any, held_out: Windows) -> dict[str, float]:
    """Measure every exit: its next-token loss and how often it agrees with the last layer."""
    model.eval()
    ends = TargetEnds(model)
    totals = torch.zeros(ends.layers + 1, 2)
    count = 0
    for index in range(len(held_out)):
        row = held_out[index]["input_ids"][None]
        with captured(model, range(1, ends.layers + 1)) as states:
            last = model(row).logits[0, :-1]
        count += len(last)
        for layer in range(1, ends.layers + 1):
            logits = ends.logits(states[layer])[0, :-1]
            nats = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
            totals[layer] += torch.stack((nats, (logits.argmax(-1) == last.argmax(-1)).sum()))
    figures: dict[str, float] = {}
    for layer in range(1, ends.layers + 1):
        nats, agreed = (totals[layer] / count).tolist()
        figures |= {f"next_token_loss_{layer}": round(nats, 4), f"agreement_{layer}": round(agreed, 4)}
    return figures


def write_recipe(
    args: argparse.Namespace,
    options: dict[str, Any],
    trained: Any,
    before: dict[str, float],
    after: dict[str, float],
    minutes: float,
    trainer: Trainer,
) -> None:
    """Write `recipe.json`."""
    parameters = trained if isinstance(trained, list) else list(trained.parameters())
    skipped = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    log = [{k: round(v, 5) for k, v in e.items() if k not in skipped} for e in trainer.state.log_history]
    recipe = {
        "head": args.head, "options": options, "seed": args.seed, "steps": args.steps, "batch": args.batch,
        "context": CONTEXT, "lr": args.lr, "schedule": "cosine", "bf16_autocast": args.bf16, "optimizer": "AdamW",
        "parameters": sum(p.numel() for p in parameters), "tokens_seen": args.steps * args.batch * CONTEXT,
        "held_out_windows": HELD_OUT_WINDOWS, "held_out_before": before, "held_out_after": after,
        "minutes": round(minutes, 1), "hardware": hardware(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "log": [entry for entry in log if "learning_rate" in entry],
    }  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(json.dumps({"before": before, "after": after, "minutes": round(minutes, 1)}, indent=1))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m hf_ext.demo.train_heads`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", choices=[*HEADS, "layerskip"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapters of layerskip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.head == "layerskip":
        train_layerskip(args)
    else:
        train_head(args)


if __name__ == "__main__":
    main()
