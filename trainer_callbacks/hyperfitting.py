"""Hyperfitting (arXiv:2412.04318): train on a few sequences until the training loss is near zero.

A recipe rather than a loss: next-token prediction at a small constant learning rate, stopped by the
training loss and never by validation. Greedy text of the resulting model repeats itself less.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TrainerControl, TrainerState, TrainingArguments

from hf_ext.layers import in_evaluation
from hf_ext.metrics.repetition import rep_n
from hf_ext.trainer_callbacks.objective import Objective

logger = logging.getLogger(__name__)
#: Learning-rate schedules that are constant, after a warm-up at most.
CONSTANT = ("constant", "constant_with_warmup")
#: Tokens at the end of a text whose types are counted, as in the released code.
WINDOW = 96


@torch.no_grad()
def greedy_text(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """Continue prompts greedily and measure the continuations.

    Args:
        model: a causal LM; it is in evaluation mode meanwhile.
        prompts: token ids.
        new_tokens: length of a continuation, unless the model ends it.

    Returns:
        `type_token_ratio` of the last 96 tokens, `repetition` (rep-4: the share of 4-grams that an earlier
        one repeats) and `entropy` in nats of the distributions along the text, each a mean over prompts;
        `tokens`, the mean length. Continuations too short for a figure do not count in it.
    """
    model_: Any = model
    device = model_.get_input_embeddings().weight.device
    ends = model_.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(iter(sorted(ends)), 0),
        return_dict_in_generate=True,
        output_logits=True,
    )
    found: dict[str, list[float]] = {"type_token_ratio": [], "repetition": [], "entropy": [], "tokens": []}
    with in_evaluation(model):
        for prompt in prompts:  # one at a time: a text must not depend on its neighbours' padding
            ids = torch.tensor([list(prompt)], device=device)
            made = model_.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            text = [token for token in made.sequences[0, ids.shape[1] :].tolist() if token not in ends]
            scores = torch.cat(made.logits).float().log_softmax(-1)
            found["entropy"].append(float(-(scores.exp() * scores).nan_to_num(0).sum(-1).mean()))
            found["tokens"].append(float(len(text)))
            if text:
                found["type_token_ratio"].append(len(set(text[-WINDOW:])) / len(text[-WINDOW:]))
            if len(text) >= 4:
                found["repetition"].append(rep_n(text, 4))
    return {name: statistics.fmean(values) for name, values in found.items() if values}


@dataclass(eq=False)
class Hyperfitting(Objective):
    """Train to near-zero loss on a few sequences, and measure greedy text before and after.

    The paper's recipe: about 2,000 sequences of 256 tokens, 20 epochs, batches of 8, Adam at a constant
    1e-6. The loss is next-token prediction, bit for bit. Training ends after the first epoch whose
    mean loss over its training passes is at most `threshold`, or when the Trainer's own limit comes;
    set `num_train_epochs` high. Resumed within an epoch, the mean is over the rest of it.

    `report` holds, under "before" and "after", what `greedy_text` measured on the continuations of
    `prompts`; the log of the end of training holds it, too.

    Args:
        threshold: mean training loss of an epoch, in nats, at which training ends; 0 for never.
        prompts: texts or token ids to continue greedily before and after; none are measured if empty.
        new_tokens: length of a continuation.
        largest_rate: refuse learning rates above it; None for no limit (small models need more).
        seed: not used.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`.

    Raises:
        ValueError: an option is out of range; at the beginning of training: the learning rate is not
            constant or too large, the best checkpoint on validation data is to be loaded at the end,
            or prompts are texts and there is no tokenizer.

    Example:
        >>> Hyperfitting(threshold=0.05).describe()["options"]["threshold"]
        0.05
        >>> Hyperfitting(threshold=-1)
        Traceback (most recent call last):
        ...
        ValueError: threshold must be a loss of 0 or more, got -1
    """

    slug: ClassVar[str] = "hyperfitting"
    paper: ClassVar[str] = (
        "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation (arXiv:2412.04318)"
    )

    threshold: float = 0.05
    prompts: Sequence[str | Sequence[int]] = ()
    new_tokens: int = WINDOW
    largest_rate: float | None = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.threshold, bool) or not self.threshold >= 0:
            raise ValueError(f"threshold must be a loss of 0 or more, got {self.threshold!r}")
        if isinstance(self.prompts, str):
            raise ValueError("prompts must be a list of texts or of token ids, got one text; write [text]")
        if isinstance(self.new_tokens, bool) or not isinstance(self.new_tokens, int) or self.new_tokens < 4:
            raise ValueError(f"new_tokens must be 4 or more, got {self.new_tokens!r}")
        #: what `greedy_text` measured, under "before" and "after"
        self.report: dict[str, dict[str, float]] = {}

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Check the recipe and measure greedy text before training."""
        if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) not in CONSTANT:
            raise ValueError(
                f"hyperfitting trains at a constant rate until the loss is near zero, but lr_scheduler_type is "
                f"{args.lr_scheduler_type}: set it to 'constant'"
            )
        if self.largest_rate is not None and args.learning_rate > self.largest_rate:
            raise ValueError(
                f"hyperfitting needs a small learning rate (the paper's is 1e-6), got {args.learning_rate}: lower it, "
                "or say Hyperfitting(largest_rate=None)"
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "hyperfitting ends by the training loss, while validation loss rises: load_best_model_at_end=True "
                "would bring an early checkpoint back; set it to False"
            )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if any(isinstance(prompt, str) for prompt in self.prompts) and not callable(tokenizer):
            raise ValueError("prompts are texts, but the Trainer has no tokenizer: pass it as processing_class")
        self._ids = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in self.prompts]
        self._epoch: tuple[Tensor, int] | None = None
        self.report = {"before": greedy_text(model, self._ids, self.new_tokens)} if self._ids else {}

    def is_plain(self) -> bool:
        """Tell that the loss is the next-token loss."""
        return True

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the plain loss, and add it to the epoch's."""
        total, count = statistics.nll.sum(), targets.numel()
        before, number = self._epoch or (torch.zeros((), dtype=torch.float32, device=total.device), 0)
        self._epoch = before + total.detach().float(), number + count
        return total, torch.as_tensor(count)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop if the epoch's mean loss is low enough."""
        if self._epoch is not None:
            total, count = self._epoch
            self._epoch = None
            self.record("epoch_loss", total, count)
            pair = torch.stack((total, total.new_tensor(float(count))))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(pair)
            mean = float(pair[0] / pair[1])
            if mean <= self.threshold:
                logger.info("training loss %.4g after %.4g epochs: hyperfitted", mean, state.epoch or 0)
                control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure greedy text after training."""
        super().on_train_end(args, state, control, **kwargs)
        if self._ids:
            self.report["after"] = greedy_text(kwargs["model"], self._ids, self.new_tokens)
            figures = {f"{name}_{when}": v for when, found in self.report.items() for name, v in found.items()}
            state.log_history.append({**figures, "step": state.global_step})
