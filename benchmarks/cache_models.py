"""Small models for the quality of caches, trained on the spot and kept in a folder."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.benchmarks import cache_tasks
from hf_ext.benchmarks.cache_tasks import PAD, VOCABULARY, training_batch
from hf_ext.demo.train import optimizers


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained.

    Args:
        layers: of the model.
        hidden: width.
        width: of a head; there are 8 query heads and 2 key heads.
        steps: of training at most.
        settle: last steps, in which the learning rate falls; they begin when texts have reached their length.
        tokens: in a step: as many texts as they are enough for.
        length: tokens of a text at the end of training.
        shortest: tokens of a text at first; whenever the mean loss has fallen below `learnt`, texts grow by an eighth.
        learnt: see above.
        lr: learning rate before that.
    """

    layers: int = 3
    hidden: int = 128
    width: int = 32
    steps: int = 1200
    settle: int = 80
    tokens: int = 3072
    length: int = 128
    shortest: int = 24
    learnt: float = 0.5
    lr: float = 4e-3

    def config(self) -> LlamaConfig:
        """Return the model's configuration."""
        return LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.hidden, intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=8, num_key_value_heads=2, head_dim=self.width,
            max_position_embeddings=4 * self.length, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
            pad_token_id=PAD,
        )  # fmt: skip

    def key(self, seed: int) -> str:
        """Return what tells a trained model from those of other recipes, texts and seeds."""
        text = json.dumps({**asdict(self), "seed": seed}, sort_keys=True)
        # Another way to make texts or to train gives another model.
        code = [inspect.getsource(part) for part in (cache_tasks, Recipe, train)]
        return hashlib.sha256("\0".join([text, *code]).encode()).hexdigest()[:12]


def folder() -> Path:
    """Return where trained models are kept: `hf_ext/benchmarks` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_ext" / "benchmarks"


def train(recipe: Recipe, seed: int, tell: Callable[[str], None] = lambda _: None) -> LlamaForCausalLM:
    """Train a model; the same seed gives the same one on the same machine.

    Args:
        recipe: see there.
        seed: of weights and data.
        tell: called with a line from time to time.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(recipe.config())
    rng, start = random.Random(seed), time.perf_counter()
    chosen = optimizers(model, recipe.lr)
    length, mean = recipe.shortest, 5.0
    last = recipe.steps  # how soon the tasks are learnt depends on the seed
    for step in range(recipe.steps):
        if step == last:
            break
        asked = max(length // 3, 12)
        # Four tasks take turns in a batch.
        rows = max(recipe.tokens // (length + asked) // 4 * 4, 4)
        ids, labels = training_batch(rng, rows, length, asked)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, (step + 1) / 20, (last - step) / recipe.settle)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = 0.9 * mean + 0.1 * loss.item()
        if mean < recipe.learnt and length < recipe.length:
            length, mean = min(length + max(length // 8, 1), recipe.length), mean + 0.1
            if length == recipe.length:
                last = min(step + 1 + recipe.settle, recipe.steps)
        if step % 50 == 49 or step + 1 == last:
            spent = time.perf_counter() - start
            tell(f"step {step + 1}: texts of {length} tokens, loss {mean:.3f}, {spent:.0f} s")
    return model.eval()


def trained(
    recipe: Recipe, seed: int, where: Path | None = None, tell: Callable[[str], None] = lambda _: None
) -> tuple[LlamaForCausalLM, Path]:
    """Return a trained model and the folder it is saved in; train it if it is not there yet.

    Args:
        recipe: see there.
        seed: of weights and data.
        where: folder of all models, `folder()` by default.
        tell: called with a line from time to time.
    """
    path = (folder() if where is None else where) / f"{recipe.key(seed)}-seed-{seed}"
    if not (path / "config.json").is_file():
        model = train(recipe, seed, tell)
        model.save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), path
