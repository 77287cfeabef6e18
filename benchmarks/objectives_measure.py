"""Training steps with objectives, timed in turns and weighed in processes of their own.

    python -m hf_ext.benchmarks.objectives_measure '{"name": "meap", "sizes": {...}, "without_logits": false}'

prints what one objective's training holds at most and what its step reads, in a process of its own.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_ext import plugins
from hf_ext.benchmarks.objectives_work import Work
from hf_ext.benchmarks.speculative_measure import peak_memory, weights_memory

PLAIN = "plain"
#: Most that a step may take longer than a plain one, by what the objective does.
BARS = {"corruption": 0.05, "single-forward loss": 0.10}
#: Tokens of the embedded tokenizer, whose ids the text has. What is above them serves as marks of the objectives.
TEXT = 4096
#: Least vocabulary of a model here.
SMALLEST = TEXT + 128


@dataclass(frozen=True)
class Sizes:
    """Of the model and its batches.

    Args:
        vocabulary: of the model; the text itself has the `TEXT` tokens of the embedded tokenizer.
        hidden: width.
        layers: of the model.
        rows: of a batch.
        length: tokens of a row.
        prompt: tokens at its beginning that are not trained on.
    """

    vocabulary: int = 8192
    hidden: int = 192
    layers: int = 6
    rows: int = 8
    length: int = 192
    prompt: int = 48


#: Options without which an objective cannot begin on the data here; a function of the sizes makes what holds a model.
OPTIONS: dict[str, dict[str, Any] | Callable[[Sizes], dict[str, Any]]] = {
    "fim": {name: TEXT + at for at, name in enumerate(("prefix_token", "suffix_token", "middle_token", "end_token"))},
    "codegen2": {"mask_tokens": range(TEXT, TEXT + 8), "separator_token": TEXT + 8, "end_token": TEXT + 9},
    "cm3": {"mask_tokens": range(TEXT, TEXT + 8), "end_token": TEXT + 8},
    "ul2": {
        "sentinels": range(TEXT, TEXT + 100),
        "mode_tokens": {mode: TEXT + 100 + at for at, mode in enumerate("RXS")},
    },
    "gfn-lm": {"samples": 4, "max_length": 4},  # every step of it draws and scores as many completions of each prompt
    "atkd": lambda sizes: {"teacher": build_model(sizes, seed=1)},
    "caft": lambda sizes: {"heads": _heads(sizes)},
}
#: What those that are made by a function say of it.
MADE = {"atkd": "a teacher of the same size", "caft": "untrained heads"}

#: Objectives that do not train on the data here, and why.
LEFT_OUT = {"cdpo": "trains on pairs of answers, by TRL's DPOTrainer"}


@dataclass(frozen=True)
class Method:
    """An objective as it takes part: its name and what kind of work it does.

    Args:
        name: of the plugin, or `PLAIN`.
        kind: one of `BARS`, `"gradients"` or `"several passes"`; empty for plain training.
        statistics: whether it can train without logits.
        problem: why it does not take part.
    """

    name: str
    kind: str = ""
    statistics: bool = False
    problem: str = ""


def methods(only: Sequence[str] = ()) -> list[Method]:
    """Return plain training and every objective that is installed.

    Args:
        only: names to restrict it to.
    """
    from hf_ext.trainer_callbacks import Objective

    found = [Method(PLAIN)]
    for plugin in plugins.all("objective"):
        if only and plugin.name not in only:
            continue
        if plugin.name in LEFT_OUT:
            found.append(Method(plugin.name, problem=LEFT_OUT[plugin.name]))
            continue
        try:
            objective = make(plugin.name, Sizes(SMALLEST, hidden=32, layers=1))
        except (TypeError, ValueError) as error:
            found.append(Method(plugin.name, problem=str(error)))
            continue
        if not isinstance(objective, Objective):
            found.append(Method(plugin.name, problem="is no change of the training step"))
            continue
        if objective.needs_attach:
            kind = "several passes"
        elif objective.loss_hook:
            kind = "single-forward loss"
        else:
            kind = "corruption" if objective.corrupts else "gradients"
        found.append(Method(plugin.name, kind, objective.can_leave_out_logits))
    return found


def make(name: str, sizes: Sizes, **options: Any) -> Any:
    """Build an objective; the clean loss is not measured, as at most steps of a real training.

    The rows are cut out of longer texts, and what rewrites them is told their length.
    """
    from hf_ext.trainer_callbacks import Rewriting

    given, cls = OPTIONS.get(name, {}), plugins.get(name).load()
    fixed = given(sizes) if callable(given) else given
    length = {"max_length": sizes.length} if isinstance(cls, type) and issubclass(cls, Rewriting) else {}
    return cls(**{"clean_loss_every": 0, **length, **fixed, **options})


def options_of(name: str) -> str:
    """Say with which options other than its own a method trains.

    Example:
        >>> options_of("gfn-lm"), options_of("atkd"), options_of("meap")
        ('samples=4, max_length=4', 'a teacher of the same size', '')
    """
    given = OPTIONS.get(name, {})
    if callable(given):
        return MADE[name]
    return ", ".join(f"{option}={value!r}" for option, value in given.items() if not _is_mark(option))


def _heads(sizes: Sizes) -> Any:
    from hf_ext.generation.heads import MultiTokenHead

    return MultiTokenHead.for_target(build_model(sizes))


def _is_mark(option: str) -> bool:
    return "token" in option or option == "sentinels"


def build_model(sizes: Sizes, seed: int = 0) -> LlamaForCausalLM:
    """Build a Llama of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=8 * sizes.hidden // 3,
        num_hidden_layers=sizes.layers, num_attention_heads=max(sizes.hidden // 32, 1),
        num_key_value_heads=max(sizes.hidden // 64, 1), max_position_embeddings=4 * sizes.length,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    """Return the embedded tokenizer."""
    from transformers import AutoTokenizer

    from hf_ext import demo

    return AutoTokenizer.from_pretrained(demo.path("tokenizer"))


def data(sizes: Sizes, count: int) -> list[dict[str, list[int]]]:
    """Cut modules of the standard library into rows, each begun by a prompt."""
    from hf_ext.demo.corpus import sources

    reader, ids = tokenizer(), []
    for source in sources(held_out=True):
        ids += reader(source.text, verbose=False)["input_ids"]
        if len(ids) >= count * sizes.length:
            break
    rows = [ids[start : start + sizes.length] for start in range(0, count * sizes.length, sizes.length)]
    return [{"input_ids": row, "labels": [-100] * sizes.prompt + row[sizes.prompt :]} for row in rows]


class Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, data and collator included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the run before."""
        self.seconds, self._last = [], None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step; the first one of a run also starts things up and does not count."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def trainer_of(
    name: str, sizes: Sizes, rows: Sequence[Any], steps: int, folder: str, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    """Build the trainer of a method, which trains for `steps` whenever it is asked to."""
    from hf_ext.cli.train_data import Collator
    from hf_ext.trainer_callbacks import attach

    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=sizes.rows, learning_rate=1e-4,
        lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    objective = None if name == PLAIN else make(name, sizes, **options)
    attached = objective is not None and bool(objective.needs_attach)
    trainer = Trainer(
        build_model(sizes), args, train_dataset=rows, data_collator=Collator(pad=1), processing_class=tokenizer(),
        callbacks=[*([] if objective is None or attached else [objective]), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return attach(trainer, objective) if objective is not None and attached else trainer


def timed(
    runs: Sequence[tuple[str, str, dict[str, Any]]],
    sizes: Sizes,
    rounds: int,
    steps: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time methods in turns, each between two runs of plain training.

    Args:
        runs: key, name of the method, and options of each.
        sizes: of model and batches.
        rounds: in each of which every method has its turn, in another order.
        steps: timed steps of a turn; one more goes before them.
        tell: called with a line a round.

    Returns:
        For each key, and for `PLAIN`, `seconds` (of a step, a median a round) and `ratios` to plain training (the mean
        of the runs before and after); or `problem`, where a method broke.
    """
    rows = data(sizes, sizes.rows * 8)
    found: dict[str, Any] = {key: {"seconds": [], "ratios": []} for key, _, _ in runs}
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        clocks = {key: Clock() for key in [PLAIN, *found]}
        trainers = {PLAIN: trainer_of(PLAIN, sizes, rows, steps + 1, folder, clocks[PLAIN])}

        def turn(key: str) -> float:
            trainers[key].train()
            return statistics.median(clocks[key].seconds)

        for key, name, options in runs:
            try:
                trainers[key] = trainer_of(name, sizes, rows, steps + 1, folder, clocks[key], **options)
                turn(key)  # a warm-up
            except Exception as error:  # one broken method is a row of the table, not the end of it
                found[key] = {"problem": f"{type(error).__name__}: {error}"}
        order = [key for key in found if "problem" not in found[key]]
        turn(PLAIN)
        for number in range(rounds):
            random.Random(number).shuffle(order)
            before = turn(PLAIN)
            plain.append(before)
            for key in order:
                seconds = turn(key)
                after = turn(PLAIN)
                found[key]["seconds"].append(seconds)
                found[key]["ratios"].append(seconds / ((before + after) / 2))
                plain.append(after)
                before = after
            tell(f"round {number + 1} of {rounds}: a plain step takes {1e3 * statistics.median(plain):.0f} ms")
    return {PLAIN: {"seconds": plain, "ratios": [1.0]}, **found}


def weigh(name: str, sizes: Sizes, steps: int, threads: int, options: dict[str, Any]) -> dict[str, float | None]:
    """Measure one method's training in this process.

    Args:
        name: of the method.
        sizes: of model and batches.
        steps: whose peak is taken.
        threads: of torch.
        options: of the objective.

    Returns:
        `peak_mib`, by which the resident memory grew at most over that before training, None where the system does not
        tell; `weights_mib`, held before; `read`, tokens read in all passes of a step over those of its data; `flops`,
        of a step.
    """
    torch.set_num_threads(threads)
    rows = data(sizes, sizes.rows * 4)
    small = Sizes(**{**asdict(sizes), "vocabulary": SMALLEST, "hidden": 32, "layers": 2, "rows": 2})
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(name, small, rows[:8], 1, folder, **options).train()  # what is allocated once
        trainer = trainer_of(name, sizes, rows, steps, folder, **options)
        model: Any = trainer.model
        peak = peak_memory(trainer.train)
        counted = trainer_of(name, sizes, rows, steps, folder, **options)
        with Work() as work:
            counted.train()
    read, flops = work.tokens / (steps * sizes.rows * sizes.length), work.flops / steps
    return {"peak_mib": peak, "weights_mib": weights_memory(model), "read": read, "flops": flops}


def weighed(
    runs: Sequence[tuple[str, str, dict[str, Any]]],
    sizes: Sizes,
    steps: int,
    threads: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Weigh each run in a process of its own, one after another; see `weigh`."""
    found: dict[str, Any] = {}
    for key, name, options in runs:
        given = {"name": name, "sizes": asdict(sizes), "steps": steps, "threads": threads, "options": options}
        run = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(given)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            found[key] = {"problem": (run.stderr.strip().splitlines() or ["it failed"])[-1]}
        else:
            found[key] = json.loads(run.stdout.splitlines()[-1])
        tell(f"weighed {key}")
    return found


def main(argument: str) -> None:
    """Weigh one method and print what was found."""
    given = json.loads(argument)
    sizes = Sizes(**given["sizes"])
    print(json.dumps(weigh(given["name"], sizes, given["steps"], given["threads"], given["options"])))


if __name__ == "__main__":
    main(sys.argv[1])
