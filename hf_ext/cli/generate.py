"""`hf-ext generate`: continue a prompt with any strategy, streaming, and say what it cost."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from hf_ext import plugins
from hf_ext.cli.output import CliError, print_json, print_report, quiet

#: What `generate` of transformers does by itself.
STOCK = ("greedy", "sample")


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from the standard input.")],
    model: Annotated[str, typer.Option(help="Folder, Hub id, or target / draft (embedded).")] = "target",
    strategy: Annotated[str, typer.Option(help="A plugin of kind strategy, or greedy / sample.")] = "greedy",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Option of the strategy; repeatable.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="At most so many tokens; 64, or what fits the context.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="For drawing; implies --sample.")] = None,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    beyond_context: Annotated[
        bool, typer.Option("--beyond-context", help="Let the text grow longer than the model's context.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output; does not stream.")] = False,
) -> None:
    """Continue PROMPT; the text goes to the standard output, the strategy's report to the standard error."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise CliError("the prompt is empty; there is nothing to continue")
    if temperature is not None and not temperature > 0:
        raise CliError(f"--temperature {temperature}: expected a number above 0")
    decode = _decoder(strategy, settings or [])  # before the slow part, so that wrong options fail at once
    quiet()
    import transformers

    from hf_ext.cli import models

    loaded, tokenizer = models.load(model, device, dtype, trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise CliError("the prompt is empty after tokenization; there is nothing to continue")
    arguments: dict[str, Any] = dict(inputs)
    arguments["max_new_tokens"] = _new_tokens(loaded, model, length, max_new_tokens, beyond_context)
    if sample or temperature is not None or strategy == "sample":
        arguments["do_sample"] = True
    elif strategy == "greedy":
        arguments["do_sample"] = False
    if temperature is not None:
        arguments["temperature"] = temperature
    if not as_json:
        arguments["streamer"] = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    transformers.set_seed(seed)
    sequences, report = decode(loaded, arguments, tokenizer)
    if not as_json:
        print_report(str(report))
        return
    new = sequences[0] if loaded.config.is_encoder_decoder else sequences[0, length:]
    print_json(
        {
            "model": model,
            "strategy": strategy,
            "prompt": prompt,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": new.tolist(),
            "report": report.as_dict(),
        }
    )


def _decoder(name: str, settings: list[str]) -> Any:
    """Return a function of model, arguments and tokenizer that gives the sequences and the report."""
    from hf_ext.cli.options import literal, parse_settings, split_settings

    if name in STOCK:
        options = {option: literal(text) for option, text in split_settings(settings).items()}
        _check_stock_options(name, options)
        return lambda model, arguments, tokenizer: _stock(name, model, {**arguments, **options})
    try:
        plugin = plugins.get(name)
    except plugins.PluginError as error:
        raise CliError(f"{error}; transformers' own: {', '.join(STOCK)}") from error
    if plugin.kind != "strategy":
        raise CliError(f"{plugin.name} is of the kind {plugin.kind}; --strategy takes one of the kind strategy")
    cls = plugin.load()
    strategy = cls(**parse_settings(settings, cls, plugin.name))

    def decode(model: Any, arguments: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
        return strategy.generate(model, **arguments, tokenizer=tokenizer), strategy.report

    return decode


def _check_stock_options(name: str, options: dict[str, Any]) -> None:
    from hf_ext.cli.options import nearest

    if not options:
        return
    from transformers import GenerationConfig

    known = [key for key in vars(GenerationConfig()) if not key.startswith("_")]
    for option in options:
        if option not in known:
            raise CliError(
                f"{name} has no option {option!r}; {nearest(option, known)}it takes those of GenerationConfig"
            )


def _stock(name: str, model: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Run transformers' own decoding and count what the strategies' reports count."""
    from hf_ext.generation import DecodeReport

    report = DecodeReport(name, rows=1)

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        report.target_calls += 1
        report.target_positions += kwargs["input_ids"].numel() if kwargs.get("input_ids") is not None else 0

    hook = model.register_forward_hook(count, with_kwargs=True)
    started = time.perf_counter()
    try:
        sequences = model.generate(**arguments)
    finally:
        hook.remove()
    report.seconds = time.perf_counter() - started
    prompt = 1 if model.config.is_encoder_decoder else arguments["input_ids"].shape[1]
    report.tokens_per_row = [sequences.shape[1] - prompt]
    return sequences, report


def _new_tokens(model: Any, name: str, prompt: int, wanted: int | None, beyond: bool) -> int:
    """Return how many tokens may be generated.

    Raises:
        CliError: the prompt, or the prompt and what is wanted, is longer than the model's context.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if beyond or context is None or model.config.is_encoder_decoder:
        return wanted or 64
    room = context - prompt
    if room < 1:
        raise CliError(
            f"the prompt has {prompt} tokens and the context of {name} is {context}: shorten it by at least "
            f"{1 - room}, or pass --beyond-context"
        )
    if wanted is not None and wanted > room:
        raise CliError(
            f"a prompt of {prompt} tokens and --max-new-tokens {wanted} exceed the context of {name}, {context}: "
            f"ask for at most {room}, or pass --beyond-context"
        )
    return wanted or min(64, room)


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("generate", generate, {})]
