"""`hf-ext train`: train a model with any objective, from texts, without a script."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_ext import plugins
from hf_ext.cli.output import CliError, one_line, print_json, print_report, print_table, quiet

Schedule = Literal["cosine", "linear", "constant"]


def train(
    data: Annotated[
        list[str], typer.Option("--data", metavar="FILE", help="Text, .jsonl or 'stdlib' (Python's own); repeatable.")
    ],
    model: Annotated[str, typer.Option(help="Folder, Hub id, or target / draft (embedded).")] = "target",
    objective: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A plugin of kind objective; repeatable; none: next-token prediction."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="Of the objective; or NAME.OPTION=VALUE; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoints, model, card and curves go there.")] = Path(
        "trained"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; takes the place of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; 1 if neither is given.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row; 512, or the model's context.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a micro-batch, in each process.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches of an optimizer step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak; 5e-5, with --lora 2e-4.")] = None,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate; all but constant warm up.")] = "cosine",
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters on all linear layers, nothing else.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a third more time.")
    ] = False,
    evaluation: Annotated[float, typer.Option("--eval", help="Share of the data to evaluate on.")] = 0.05,
    packing: Annotated[
        bool, typer.Option("--packing/--no-packing", help="Fill rows with one document after another.")
    ] = True,
    add_token: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="New special token: <MARK>, <MARK_{0..9}>, mask_token=<MASK>; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the data's order and of the objectives.")] = 0,
    save: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; a fifth of the training.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    curves: Annotated[
        bool | None, typer.Option("--curves/--no-curves", help="Draw curves.png; if matplotlib is there.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable summary, and no progress.")] = False,
) -> None:
    """Train a causal model with published objectives and save it as a stock checkpoint.

    A line of a .jsonl file has "text", or "prompt" and "completion", of which the completion alone is trained on.

    With several processes: accelerate launch -m hf_ext.cli train ...
    """
    if steps is not None and epochs is not None:
        raise CliError("--steps and --epochs exclude each other")
    for option, number in (("--epochs", epochs), ("--learning-rate", learning_rate)):
        if number is not None and not 0 < number < math.inf:
            raise CliError(f"{option} {number}: expected a number above 0")
    if not 0 <= evaluation < 1:
        raise CliError(f"--eval {evaluation}: expected a share from 0 up to but not including 1")
    from hf_ext.cli import models, train_data, train_run, train_show

    for name in data:
        train_data.check(name)
    if models.holds_adapters(Path(model).expanduser()):
        raise CliError(f"{model} holds adapters, not a model: load it with peft, merge_and_unload, and save that")
    drawing = train_show.can_draw(curves)
    chosen = choose(objective or [], settings or [])
    quiet()
    from transformers import set_seed

    loaded, tokenizer = models.load(model, "cpu", "float32", trust_remote_code)  # the Trainer moves it
    if loaded.config.is_encoder_decoder:
        raise CliError(f"{model} is an encoder-decoder; hf-ext train trains causal models")
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length is not None and length > context:
        raise CliError(f"--length {length} exceeds the context of {model}, {context}")
    if add_token:
        train_run.add_tokens(loaded, tokenizer, add_token)
    row_length = length or min(512, context or 512)
    documents = [text for name in data for text in train_data.texts(name, seed)]
    rows = train_data.rows(documents, tokenizer, row_length, evaluation, seed, packing)
    given = train_run.Settings(
        model=model,
        data=tuple(data),
        objectives={name: options for name, _, options in chosen},
        steps=steps,
        epochs=epochs,
        length=row_length,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate or (2e-4 if lora else 5e-5),
        schedule=schedule,
        lora=lora_rank if lora else None,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        evaluation=evaluation,
        seed=seed,
        save=save,
        packing=packing,
        added_tokens=tuple(add_token or ()),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        fingerprint=rows.fingerprint,
    )
    objectives = [built for _, built, _ in chosen]
    set_seed(seed)  # of new adapters
    main_process = os.environ.get("RANK", "0") == "0"
    progress = train_show.Silent() if as_json or not main_process else train_show.Progress()
    with train_run.folder(out, given, resume) as checkpoint:
        summary, trainer = train_run.train(loaded, tokenizer, rows, objectives, given, out, checkpoint, progress, cpu)
    if not main_process:
        return
    title = f"{Path(model).name}: {' + '.join(one.name for one in objectives) or 'next-token prediction'}"
    summary["curves"] = str(train_show.draw(trainer.state.log_history, title, out / "curves.png")) if drawing else None
    if as_json:
        print_json(summary)
    else:
        _show(summary, drawing)


def choose(names: Sequence[str], settings: Sequence[str]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Build the objectives that were asked for.

    Args:
        names: of plugins of the kind objective.
        settings: `option=value` for the one objective that has the option, or `name.option=value`.

    Returns:
        Name, objective and given options of each.

    Raises:
        CliError: an objective or option is unknown or twice there, a value is of the wrong type, several objectives
            have the option, or one needs what a command line cannot give it.
    """
    from hf_ext.cli.options import REQUIRED, options_of, parse_settings

    classes = {}
    for name in names:
        try:
            plugin = plugins.get(name)
        except plugins.PluginError as error:
            raise CliError(str(error)) from error
        if plugin.kind != "objective":
            raise CliError(f"{plugin.name} is of the kind {plugin.kind}; --objective takes one of the kind objective")
        if plugin.name in classes:
            raise CliError(f"--objective {plugin.name} is given twice")
        classes[plugin.name] = plugin.load()
    shares = _shared_out(settings, classes)
    chosen = []
    for name, cls in classes.items():
        given = {setting.partition("=")[0] for setting in shares[name]}
        for option in options_of(cls):
            if option.default is REQUIRED and option.name not in given and not _can_be_written(option.annotation):
                raise CliError(
                    f"{name} needs a {option.name}, which is an object of Python: use it in a script, "
                    f"Trainer(..., callbacks=[{cls.__name__}({option.name}=...)])"
                )
        values = parse_settings(shares[name], cls, name)
        try:
            chosen.append((name, cls(**values), values))
        except (TypeError, ValueError) as error:
            raise CliError(f"{name}: {one_line(error)}") from error
    return chosen


def _shared_out(settings: Sequence[str], classes: dict[str, Any]) -> dict[str, list[str]]:
    """Give each setting to the objective that it is for."""
    from hf_ext.cli.options import nearest, options_of

    if settings and not classes:
        raise CliError(f"--set {settings[0]}: there is no --objective that it could be for")
    known = {name: [option.name for option in options_of(cls)] for name, cls in classes.items()}
    shares: dict[str, list[str]] = {name: [] for name in classes}
    for setting in settings:
        option, equals, value = setting.partition("=")
        owner, dot, rest = option.rpartition(".")
        if dot and owner not in classes:
            raise CliError(f"--set {setting}: {owner} is no --objective here; there are {', '.join(classes)}")
        if dot:
            shares[owner].append(f"{rest}{equals}{value}")
            continue
        owners = [name for name, options in known.items() if option in options]
        if len(owners) > 1:
            raise CliError(f"--set {setting}: {' and '.join(owners)} have this option; write {owners[0]}.{setting}")
        if not owners and len(classes) > 1:
            every = [name for options in known.values() for name in options]
            raise CliError(f"--set {setting}: no objective has this option; {nearest(option, every)}".rstrip(" ;"))
        shares[owners[0] if owners else next(iter(classes))].append(setting)
    return shares


def _can_be_written(annotation: Any) -> bool:
    """Tell whether some text on a command line can be a value of a type."""
    from hf_ext.cli.options import value_of

    for text in ("1", "x", "true"):
        try:
            value_of("", text, annotation)
        except CliError:
            continue
        return annotation is not Any
    return False


def _show(summary: dict[str, Any], drawn: bool) -> None:
    names = {"loss": "objective", "clean_loss": "next-token loss, training", "eval_loss": "next-token loss, evaluation"}
    rows = [
        (text, f"{summary[name]['first']:.4f}", f"{summary[name]['last']:.4f}")
        for name, text in names.items()
        if summary[name] is not None
    ]
    print_table(["nats a token", "first", "last"], rows)
    print_report(
        f"{summary['steps']} steps, {summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s; "
        f"model, card{' and curves' if drawn else ''} in {summary['out']}"
    )
    if not drawn and sys.stderr.isatty():
        print_report("no curves: pip install 'hf_ext[plots]' for them")


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("train", train, {})]
