"""Train the embedded tokenizer, target and draft on the standard library's source.

    python -m hf_ext.demo.train tokenizer --out DIR
    python -m hf_ext.demo.train target --tokenizer DIR --out DIR --steps 2001 --decay-start 1601
    python -m hf_ext.demo.train draft  --tokenizer DIR --out DIR --steps 1223 --decay-start 979 --lr 5e-3

Hidden matrices learn with Muon, embeddings and norms with AdamW; the learning rate is
constant and then falls linearly to zero, over the last fifth of the steps by default. `kill -USR1`
starts that fall at once, for a machine that turns out slower than planned; the recipe written
beside the weights records the steps that were really made, and the commands above repeat those.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import signal
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext.demo.corpus import sources

VOCAB_SIZE = 4096
CONTEXT = 512
SPECIAL = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
# A line break takes the indentation that follows it, so that one token opens a Python line.
PATTERN = r"\s*\n[ \t]*| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

SHAPES = {
    "target": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
               "num_key_value_heads": 3},
    "draft": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3,
              "num_key_value_heads": 1},
}  # fmt: skip


def train_tokenizer(out: Path) -> None:
    """Train the byte-level BPE tokenizer on the training files and save it into `out`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((s.text for s in sources(held_out=False)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
    fast.save_pretrained(out)


def encode(tokenizer: PreTrainedTokenizerFast, held_out: bool) -> torch.Tensor:
    """Return the (held-out or training) corpus as one int64 token row, files parted by eos."""
    ids: list[int] = []
    for source in sources(held_out=held_out):
        # Held-out loss is measured on modules, not on their tests.
        if not (held_out and "/" in source.name):
            ids += [tokenizer.eos_token_id, *tokenizer(source.text, verbose=False)["input_ids"]]
    return torch.tensor([*ids, tokenizer.eos_token_id])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats over consecutive windows of `CONTEXT` tokens."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.eval()
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch) for batch in windows.split(8)]
    model.train()
    return float(torch.stack(losses).sum() / len(windows))


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Schedule:
    """Share of the peak learning rate: warm-up, constant, linear fall."""

    def __init__(self, steps: int, decay_start: int | None = None, warmup: int = 100) -> None:
        self.steps, self.warmup = steps, warmup
        self.decay_start = int(steps * 0.8) if decay_start is None else decay_start
        self._requested = False
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "_requested", True))

    def __call__(self, step: int) -> float:
        """Return the share for `step`, moving the fall forward if a signal asked for it."""
        if self._requested and step < self.decay_start:
            length = self.steps - self.decay_start
            self.decay_start, self.steps = step, step + min(length, max(step // 4, 1))
        self._requested = False
        if step < self.warmup:
            return (step + 1) / self.warmup
        return min(1.0, (self.steps - step) / max(self.steps - self.decay_start, 1))


def train(args: argparse.Namespace) -> None:
    """Train one model and write weights, config, tokenizer and `recipe.json` into `args.out`."""
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    data, held_out = encode(tokenizer, False), encode(tokenizer, True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **SHAPES[args.model],
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model) if args.compile else model
    schedule, opts = Schedule(args.steps, args.decay_start), optimizers(model, args.lr)
    generator = torch.Generator().manual_seed(args.seed)
    step, start, log = 0, time.time(), []
    while step < schedule.steps:
        share = schedule(step)
        starts = torch.randint(len(data) - CONTEXT, (args.batch,), generator=generator)
        batch = torch.stack([data[s : s + CONTEXT] for s in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * share
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0 or step == schedule.steps:
            nats = held_out_loss(model, held_out)
            minutes = (time.time() - start) / 60
            log.append({"step": step, "train": round(loss.item(), 4), "held_out": round(nats, 4)})
            print(
                f"step {step}/{schedule.steps} train {loss.item():.3f} held-out {nats:.3f} {minutes:.1f} min",
                flush=True,
            )
            if args.checkpoint:
                save(model, args.out)
    save(model, args.out)
    tokenizer.save_pretrained(args.out)
    recipe = {
        "seed": args.seed, "steps": schedule.steps, "decay_start": schedule.decay_start, "batch": args.batch,
        "context": CONTEXT, "lr": args.lr, "bf16_autocast": args.bf16, "optimizer": "Muon + AdamW",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_in_corpus": len(data), "tokens_seen": schedule.steps * args.batch * CONTEXT,
        **measure(args.out, held_out),
        "minutes": round((time.time() - start) / 60, 1), "hardware": hardware(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "log": log,
    }  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Save the weights as bfloat16, half the size, for a model that loads and computes in float32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def measure(folder: Path, held_out: torch.Tensor) -> dict[str, float]:
    """Return the held-out figures of saved weights, after their rounding."""
    nats = held_out_loss(LlamaForCausalLM.from_pretrained(folder), held_out)
    text_bytes = sum(len(s.text.encode()) for s in sources(held_out=True) if "/" not in s.name)
    return {
        "held_out_loss_nats_per_token": round(nats, 4),
        "held_out_bits_per_byte": round(nats * len(held_out) / math.log(2) / text_bytes, 4),
    }


def hardware() -> str:
    """Name the processor and the number of threads torch uses."""
    names = [ln.split(":", 1)[1].strip() for ln in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in ln]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def write_listing(out: Path) -> None:
    """Write `corpus.json`: every file with its hash and whether it was held out."""
    files = list(sources())
    listing = {
        "python": platform.python_version(),
        "held_out": {s.name: s.sha256 for s in files if s.held_out},
        "trained_on": {s.name: s.sha256[:16] for s in files if not s.held_out},
        "sha256_of_all": hashlib.sha256("".join(s.sha256 for s in files).encode()).hexdigest(),
    }
    (out / "corpus.json").write_text(json.dumps(listing, indent=0) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m hf_ext.demo.train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["tokenizer", *SHAPES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--decay-start", type=int, help="step at which the learning rate begins to fall")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint", action="store_true", help="save at every log line")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model == "tokenizer":
        train_tokenizer(args.out)
        write_listing(args.out)
    else:
        train(args)


if __name__ == "__main__":
    main()
