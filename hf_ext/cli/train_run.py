"""Train a model for `hf-ext train`: a stock Trainer, with objectives, checkpoints, a card and a summary."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ext.cli.models import EMBEDDED
from hf_ext.cli.output import CliError, print_report

#: What a run was started with; `--resume` compares it.
FILE = "hf_ext_train.json"
#: Options that may differ when a run is resumed.
MAY_DIFFER = ("steps", "epochs", "save")
#: Checkpoints in a training whose `--save` is not given, and the logs in it at least.
CHECKPOINTS, LOGS = 5, 50


@dataclass(frozen=True)
class Settings:
    """What stood on the command line, but for what is only shown."""

    model: str
    data: tuple[str, ...]
    objectives: Mapping[str, Mapping[str, Any]]
    steps: int | None
    epochs: float | None
    length: int
    batch: int
    accumulate: int
    learning_rate: float
    schedule: str
    lora: int | None
    bf16: bool
    gradient_checkpointing: bool
    evaluation: float
    seed: int
    save: int | None
    packing: bool
    added_tokens: tuple[str, ...]
    processes: int
    fingerprint: str  # of the rows


def with_lora(model: Any, rank: int) -> Any:
    """Freeze a model and add LoRA adapters to all its linear layers but the head."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add special tokens to the tokenizer, and room for them to the model.

    Args:
        model: whose embeddings grow.
        tokenizer: gets the tokens.
        tokens: `text`, `role=text` (`mask_token=<mask>`), or `<mark_{0..9}>` for ten of them.

    Raises:
        CliError: a role is unknown to tokenizers, or there is no text.
    """
    roles, plain = {}, []
    for token in tokens:
        role, equals, text = token.partition("=")
        if not (equals and role.endswith("_token")):
            role, text = "", token
        found = expanded(text)
        if not all(found) or not found:
            raise CliError(f"--add-token {token!r}: expected a text, as <MARK>, <MARK_{{0..9}}> or mask_token=<MASK>")
        if not role:
            plain += found
        elif role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
            roles[role] = text
        else:
            known = ", ".join(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
            raise CliError(f"--add-token {token}: tokenizers have no {role}; there are {known}")
    tokenizer.add_special_tokens(roles)
    tokenizer.add_tokens(plain, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def expanded(text: str) -> list[str]:
    """Write out a text with a range in it.

    Example:
        >>> expanded("<mark_{0..2}>"), expanded("<mark>")
        (['<mark_0>', '<mark_1>', '<mark_2>'], ['<mark>'])
    """
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", text)
    if found is None:
        return [text]
    before, first, last, after = found.groups()
    return [f"{before}{number}{after}" for number in range(int(first), int(last) + 1)]


@contextlib.contextmanager
def folder(out: Path, settings: Settings, resume: bool) -> Iterator[str | None]:
    """Make the folder of a run, or find the checkpoint to resume from; a run that saves nothing leaves no folder.

    Args:
        out: the folder.
        settings: the run's, written into the folder or compared with what is there.
        resume: go on with the run that is there.

    Yields:
        The last checkpoint that was written to its end; None if the training begins.

    Raises:
        CliError: the folder holds something else, or a run that was started with other options.
    """
    record = json.loads(json.dumps(asdict(settings), default=str))
    if resume:
        _compare(out, record)
        checkpoint = last_checkpoint(out)
        if checkpoint is None and (out / "trainer_state.json").exists():
            raise CliError(f"--resume: the run in {out} has ended, and its checkpoints are gone")
        if checkpoint is None:
            print_report(f"the run in {out} was stopped before its first checkpoint: it begins anew")
        yield checkpoint
        return
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    made = not out.exists()
    if not made and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"--out {out} exists and is not empty: choose another folder, or go on with --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CliError(f"--out {out}: {error.strerror}") from error
    try:
        yield None
    except BaseException:
        if last_checkpoint(out) is None:  # refused, or stopped too early: the next try finds the place free
            shutil.rmtree(out)
            if not made:
                out.mkdir()
        raise


def _compare(out: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was started with other options or on other data."""
    if not (out / FILE).is_file():
        raise CliError(f"--resume: {out} holds no run of hf-ext train")
    before = json.loads((out / FILE).read_text(encoding="utf-8"))
    other = [name for name in record if name not in MAY_DIFFER and before.get(name) != record[name]]
    if other == ["fingerprint"]:
        raise CliError(f"--resume: the data have changed since the run in {out} began")
    if other:
        name = other[0]
        raise CliError(f"--resume: the run in {out} has {name} {before.get(name)!r}, this one {record[name]!r}")


def last_checkpoint(out: Path) -> str | None:
    """Return the last checkpoint of a run that was written to its end: the Trainer writes its state last.

    Args:
        out: folder of the run.
    """
    from transformers.trainer_callback import TrainerState

    for path in sorted(out.glob("checkpoint-*"), key=lambda path: _step_of(str(path)), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError):  # the process was killed while it wrote
            continue
        return str(path)
    return None


def train(
    model: Any,
    tokenizer: Any,
    rows: Any,
    objectives: Sequence[Any],
    settings: Settings,
    out: Path,
    checkpoint: str | None,
    progress: Any,
    cpu: bool,
) -> tuple[dict[str, Any], Any]:
    """Train, save, write the card, and return a summary and the trainer.

    Args:
        model: to train, in place.
        tokenizer: saved beside it.
        rows: `hf_ext.cli.train_data.Rows`.
        objectives: none for plain next-token prediction.
        settings: the run's.
        out: folder of checkpoints and result.
        checkpoint: to resume from.
        progress: a callback that shows what goes on.
        cpu: use no GPU.
    """
    from transformers import PrinterCallback, Trainer

    from hf_ext.cli.train_data import Collator
    from hf_ext.cli.train_show import Diverged
    from hf_ext.trainer_callbacks import attach

    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    if settings.lora:
        model = with_lora(model, settings.lora)
    args = arguments(settings, rows, out, cpu)
    first = next((one for one in objectives if one.needs_attach), next(iter(objectives), None))
    trainer = Trainer(
        model,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation or None,
        processing_class=tokenizer,
        data_collator=Collator(pad),
        callbacks=[*(one for one in objectives if one is not first), progress, Diverged()],
    )
    trainer.remove_callback(PrinterCallback)
    if first is not None:
        attach(trainer, first)
    started, done = time.perf_counter(), _step_of(checkpoint)
    if done >= steps_in_all(settings, rows):  # the Trainer would take one more
        raise CliError(f"--resume: the run in {out} has taken all its {done} steps; --steps or --epochs ask for more")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        if "add_special_tokens" in str(error):  # what the method lacks, and how a script gives it
            raise CliError(f"{error} (on this command line: --add-token TEXT)") from error
        raise
    finally:
        progress.close()
    seconds = time.perf_counter() - started
    if rows.evaluation and _last_evaluation(trainer) != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model(str(out))
    trainer.save_state()
    trainer.create_model_card(
        model_name=out.name,
        finetuned_from=None if settings.model in EMBEDDED or Path(settings.model).exists() else settings.model,
        tags=["hf_ext", *(one.name for one in objectives)],
        dataset=[Path(name).name for name in settings.data],
    )
    steps = trainer.state.global_step - done
    tokens = steps * settings.batch * settings.accumulate * args.world_size * (rows.tokens / len(rows.train))
    history = trainer.state.log_history
    summary = {
        "model": settings.model,
        "data": {"names": list(settings.data), "rows": len(rows.train), "tokens": rows.tokens,
                 "evaluation_rows": len(rows.evaluation)},
        "objectives": [one.describe() for one in objectives],
        "steps": trainer.state.global_step,
        "resumed_from": done or None,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **{name: _ends(history, name) for name in ("loss", "clean_loss", "eval_loss")},
        "out": str(out),
    }  # fmt: skip
    return summary, trainer


def arguments(settings: Settings, rows: Any, out: Path, cpu: bool) -> Any:
    """Return the training arguments of a run."""
    from transformers import TrainingArguments

    total = steps_in_all(settings, rows)
    every = settings.save or max(1, total // CHECKPOINTS)
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs or 1.0}
    return TrainingArguments(
        output_dir=str(out),
        **length,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        warmup_steps=min(20, total // 10),
        lr_scheduler_type=settings.schedule,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        logging_steps=max(1, total // LOGS),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is no number is to be seen
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if rows.evaluation else "no",
        eval_steps=every,
        eval_on_start=bool(rows.evaluation),
        report_to=[],
        disable_tqdm=True,
        use_cpu=cpu,
        dataloader_pin_memory=False,
    )


def steps_in_all(settings: Settings, rows: Any) -> int:
    """Return how many optimizer steps a run takes."""
    each = max(1, math.ceil(len(rows.train) / (settings.batch * settings.accumulate * settings.processes)))
    return settings.steps or max(1, math.ceil((settings.epochs or 1.0) * each))


def _last_evaluation(trainer: Any) -> int:
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return steps[-1] if steps else -1


def _ends(history: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    values = [entry[name] for entry in history if name in entry]
    return {"first": values[0], "last": values[-1]} if values else None


def _step_of(checkpoint: str | None) -> int:
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0
