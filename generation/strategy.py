"""The base of all decoding strategies.

A strategy is a dataclass of options with one method, `decode(run)`. It runs in two ways:

- `model.generate(**inputs, custom_generate=Strategy(...))`. transformers prepares everything,
  but on this path drops `streamer`, `tokenizer`, `stop_strings`, `assistant_model` and
  `synced_gpus` before the strategy can see them.
- `Strategy(...).generate(model, **inputs, ...)` takes all that `generate` takes and loses nothing.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from hf_ext import adapter
from hf_ext.generation.checks import check_config, check_context, check_inputs
from hf_ext.generation.report import DecodeReport
from hf_ext.generation.run import DecodingRun


@dataclasses.dataclass
class DecodingStrategy(abc.ABC):
    """What every decoding strategy shares: both ways to call it, the checks and the report.

    Subclasses are dataclasses whose fields are the options; they define `decode` and, where
    options can be wrong, `check_options`.

    Attributes:
        report: what the last call did, a `DecodeReport`; None before the first.

    Example:
        >>> @dataclasses.dataclass
        ... class Greedy(DecodingStrategy):
        ...     def decode(self, run):
        ...         logits = run.prefill().logits[:, -1]
        ...         run.commit(run.process(logits).argmax(-1))
        ...         while run.running:
        ...             logits = run.forward(run.input_ids).logits[:, -1]
        ...             run.commit(run.process(logits).argmax(-1))
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> ours = model.generate(ids, custom_generate=Greedy(), max_new_tokens=5, pad_token_id=0)
        >>> bool((ours == model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)).all())
        True
    """

    report: DecodeReport | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    #: Whether the strategy draws tokens at random; a deterministic one refuses `do_sample=True`.
    samples: ClassVar[bool] = True
    #: Whether it needs the model's cache.
    needs_cache: ClassVar[bool] = True
    #: Whether it works on encoder-decoder models.
    encoder_decoder: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `dataclass` writes a `__repr__` that prints whole models, unless it finds one in the class itself.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        self.check_options()

    def __repr__(self) -> str:
        shown = (f"{f.name}={_shown(getattr(self, f.name, None))}" for f in dataclasses.fields(self) if f.repr)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    @abc.abstractmethod
    def decode(self, run: DecodingRun) -> None:
        """Produce tokens through `run` until `run.running` is false."""

    def check_options(self) -> None:  # noqa: B027  (options that cannot be wrong need no check)
        """Raise ValueError for options that make no sense; called at construction."""

    def check_length(self, model: PreTrainedModel, longest: int) -> None:
        """Raise ValueError for a prompt beyond the model's context; a strategy with positions of its own counts those.

        Args:
            model: the model whose `generate` was called.
            longest: tokens of the longest prompt.
        """
        check_context(model, longest)

    def options(self) -> dict[str, Any]:
        """Return the strategy's options by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `generate` has prepared; transformers calls this.

        Args:
            model: the model whose `generate` was called.
            input_ids: `(batch, length)` int64.
            logits_processor: all processors that apply.
            stopping_criteria: all criteria that apply.
            generation_config: the resolved settings.
            synced_gpus: keep in step with other processes; found out by default.
            streamer: receives the new tokens.
            tokenizer: that of the prompts, for strategies that read text; `generate` of this class passes it.
            assistant_tokenizer: that of a strategy's draft model, likewise.
            **model_kwargs: forward arguments (mask, positions, cache, encoder outputs).

        Returns:
            `(batch, length + new)` ids, or the output class `return_dict_in_generate` asks for.

        Raises:
            ValueError: something was asked for that this strategy cannot do.
        """
        name = type(self).__name__
        model_kwargs.pop("labels", None)  # Seq2SeqTrainer hands them on, and generate itself drops them, too
        if synced_gpus is None:
            synced_gpus = adapter.needs_synced_gpus(model)
        check_config(name, self.options(), generation_config, model.generation_config)
        if not self.samples and generation_config.do_sample:
            raise ValueError(f"{name} is deterministic; call generate with do_sample=False")
        if model.config.is_encoder_decoder and not self.encoder_decoder:
            raise ValueError(f"{name} works on decoder-only models; {type(model).__name__} is an encoder-decoder")
        if self.needs_cache and not model_kwargs.get("use_cache", True):
            raise ValueError(f"{name} needs the model's cache; call generate with use_cache=True")
        if model_kwargs.get("inputs_embeds") is None:
            cache = model_kwargs.get("past_key_values")
            cached = adapter.cached_tokens(cache)
            mask = None if model.config.is_encoder_decoder else model_kwargs.get("attention_mask")
            check_inputs(input_ids, mask, cached)
            length, dropped = input_ids.shape[1], adapter.mask_length(generation_config)
            if mask is None and dropped not in (None, length, length + cached):
                raise ValueError(
                    f"attention_mask has {dropped} columns, but input_ids have {length}; pass the mask that the "
                    "tokenizer returned with these ids"
                )
            self.check_length(model, input_ids.shape[1] if mask is None else int(mask.sum(dim=1).max()))
        self.report = DecodeReport(name)
        run = DecodingRun(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, synced_gpus,
            model_kwargs, self.report, tokenizer, assistant_tokenizer,
        )  # fmt: skip
        self.decode(run)
        return run.result()

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        inputs: torch.Tensor | None = None,
        *,
        streamer: BaseStreamer | None = None,
        synced_gpus: bool | None = None,
        tokenizer: Any = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with this strategy; takes all that `model.generate` takes and loses none of it.

        Args:
            model: the model that generates.
            inputs: `(batch, length)` prompt; `input_ids=` works as well.
            streamer: receives the prompt and then the new tokens.
            synced_gpus: as in `generate`.
            tokenizer: needed for `stop_strings`, and by strategies that read text.
            assistant_model: refused; strategies with a draft take it as an option.
            assistant_tokenizer: that of the option `draft_model`, for strategies that have one: the tokens of both
                are compared.
            stop_strings: text at which a row ends.
            stopping_criteria: further criteria.
            **kwargs: everything else of `generate` (mask, config, lengths, processors, ...).

        Returns:
            As `model.generate`.

        Raises:
            ValueError: as the class says, or `stop_strings` without a tokenizer.
        """
        name = type(self).__name__
        if assistant_model is not None:
            raise ValueError(f"{name} takes no assistant_model; a strategy that drafts takes draft_model as an option")
        if assistant_tokenizer is not None and self.options().get("draft_model") is None:
            raise ValueError(f"assistant_tokenizer is that of the option draft_model, which {name} does not have here")
        if assistant_tokenizer is not None and tokenizer is None:
            raise ValueError("assistant_tokenizer is compared with the target's tokenizer; pass tokenizer=... as well")
        if "custom_generate" in kwargs:
            raise ValueError(f"custom_generate would replace {name}; leave it out")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and kwargs.get("inputs_embeds") is None and ids.dtype == torch.long:
            cache = kwargs.get("past_key_values")
            cached = adapter.cached_tokens(cache)
            mask, encoder = kwargs.get("attention_mask"), model.config.is_encoder_decoder
            check_inputs(ids, mask, cached, encoder=encoder)
            if encoder:  # it would run before the strategy is called
                check_context(model, ids.shape[1] if mask is None else int(mask.sum(dim=1).max()), encoder=True)
        given: GenerationConfig | None = kwargs.get("generation_config")
        if stop_strings is None:
            stop_strings = (given.stop_strings if given is not None else None) or model.generation_config.stop_strings
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer that made the prompt: pass tokenizer=...")
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
        if not self.samples and given is None:
            kwargs.setdefault("do_sample", False)
        call = _Call(self, streamer, synced_gpus, tokenizer, assistant_tokenizer)
        # transformers would build the same criterion again, and fail for want of the tokenizer it dropped.
        with _without_stop_strings(model.generation_config), _without_stop_strings(given):
            # generate feeds the prompt to the streamer, the run feeds it the rest.
            return model.generate(inputs, stopping_criteria=criteria, streamer=streamer, custom_generate=call, **kwargs)


def _shown(value: Any) -> str:
    """Show an option, of a model only its class and size."""
    if isinstance(value, torch.nn.Module):
        millions = sum(parameter.numel() for parameter in value.parameters()) / 1e6
        return f"<{type(value).__name__}, {millions:{'.2g' if millions < 10 else ',.0f'}} M parameters>"
    if type(value) in (list, tuple):
        inside = ", ".join(map(_shown, value))
        if type(value) is list:
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A strategy together with the arguments that transformers does not pass on."""

    strategy: DecodingStrategy
    streamer: BaseStreamer | None
    synced_gpus: bool | None
    tokenizer: Any
    assistant_tokenizer: Any

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the strategy: generate reads from it which further inputs there are."""
        return inspect.signature(self.strategy)

    def __call__(self, model: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Any:
        names = ("streamer", "synced_gpus", "tokenizer", "assistant_tokenizer")
        kept = {name: getattr(self, name) for name in names}
        return self.strategy(model, input_ids, **{**prepared, **kept})


class _without_stop_strings:
    """Take `stop_strings` out of a generation config for the duration of a call."""

    def __init__(self, config: GenerationConfig | None) -> None:
        self.config, self.saved = config, getattr(config, "stop_strings", None)

    def __enter__(self) -> None:
        if self.config is not None and self.saved is not None:
            self.config.stop_strings = None

    def __exit__(self, *_: object) -> None:
        if self.config is not None and self.saved is not None:
            self.config.stop_strings = self.saved


def positive(name: str, value: Any, kind: type[int] | type[float] = int) -> None:
    """Raise ValueError unless option `name` is a `kind` above zero.

    Example:
        >>> positive("top_k", 0)
        Traceback (most recent call last):
        ValueError: top_k must be a positive int, got 0
    """
    if isinstance(value, bool) or not isinstance(value, (kind, int)) or value <= 0:
        raise ValueError(f"{name} must be a positive {kind.__name__}, got {value!r}")


def share(name: str, value: Any) -> None:
    """Raise ValueError unless option `name` is a number from 0 to 1.

    Example:
        >>> share("penalty_alpha", 1.5)
        Traceback (most recent call last):
        ValueError: penalty_alpha must be a number from 0 to 1, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
