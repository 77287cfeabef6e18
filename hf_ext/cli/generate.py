"""`hf-ext generate`: continue a prompt with any strategy, streaming, and say what it cost."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
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
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For drawing.")] = 0,
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
    if prompt == "-":
        prompt = sys.stdin.read() if sys.stdin is not None else ""  # there is none where it was closed
    if not prompt:
        raise CliError("the prompt is empty; there is nothing to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that the terminal's encoding does not know arrive as surrogates
        raise CliError("the prompt is not valid text in the terminal's encoding; give it in UTF-8") from None
    if temperature is not None and not 0 < temperature < math.inf:
        raise CliError(f"--temperature {temperature}: expected a number above 0")
    sampling = sample or temperature is not None or strategy == "sample"
    decode = _decoder(strategy, settings or [], sampling)  # before the slow part, so that wrong options fail at once
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
    if sampling or strategy == "greedy":
        arguments["do_sample"] = sampling
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


def _decoder(name: str, settings: list[str], sampling: bool) -> Any:
    """Return a function of model, arguments and tokenizer that gives the sequences and the report."""
    from hf_ext.cli.options import literal, parse_settings, split_settings

    if name in STOCK:
        options = {option: literal(text) for option, text in split_settings(settings).items()}
        name = "sample" if sampling else name
        _check_stock_options(name, options)
        return lambda model, arguments, tokenizer: _stock(name, model, {**arguments, **options})
    try:
        plugin = plugins.get(name)
    except plugins.PluginError as error:
        raise CliError(f"{error}; transformers' own: {', '.join(STOCK)}") from error
    if plugin.kind != "strategy":
        raise CliError(f"{plugin.name} is of the kind {plugin.kind}; --strategy takes one of the kind strategy")
    cls = plugin.load()
    strategy = cls(**_embedded(parse_settings(settings, cls, plugin.name)))

    def decode(model: Any, arguments: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
        return strategy.generate(model, **arguments, tokenizer=tokenizer), strategy.report

    return decode


def _embedded(options: dict[str, Any]) -> dict[str, Any]:
    """Replace the name of an embedded model or head, where an option takes one, by its folder."""
    from hf_ext import demo
    from hf_ext.cli import models

    found = dict(options)
    if isinstance(name := options.get("draft_model"), str):
        found["draft_model"] = models.find(name, "draft_model")
    if isinstance(name := options.get("head"), str):
        embedded = name in demo.HEADS and not Path(name).is_dir()
        found["head"] = demo.path(name) if embedded else models.find(name, "head")
    return found


def _check_stock_options(name: str, options: dict[str, Any]) -> None:
    from hf_ext.cli.options import nearest

    if not options:
        return
    from transformers import GenerationConfig

    quiet()
    known = [key for key in vars(GenerationConfig()) if not key.startswith("_") and key != "return_dict_in_generate"]
    for option in options:
        if option not in known:
            raise CliError(
                f"{name} has no option {option!r}; {nearest(option, known)}it takes those of GenerationConfig"
            )
    try:
        GenerationConfig(**{"do_sample": name == "sample", **options}).validate(strict=True)
    except ValueError as error:  # generate itself warns, at most, of what it will not look at
        raise CliError(f"{name}: {error}") from error


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
