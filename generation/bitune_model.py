"""A PEFT model that is trained to read its prompts twice (arXiv:2405.14862)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from hf_ext.generation.bitune import Bitune
from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.structured.twice import BIDIRECTIONAL, CAUSAL, NAME, CacheMix, adapter_layers, mix_of, read_twice
from hf_ext.layers import in_evaluation

#: The file of the coefficients, beside the bidirectional adapter.
FILE = "bitune.safetensors"


class BituneModel(PeftModelForCausalLM):
    """A frozen model with two adapters, a causal and a bidirectional one, and coefficients that mix what they read.

    Train it with the stock Trainer on rows whose prompts have the label -100:
    `Trainer(BituneModel(model, LoraConfig(...)), args, train_dataset=rows)`. A call with labels takes what
    stands before a row's first label as its prompt and reads it as `Bitune` does; evaluation, too. Loss and
    gradients do not depend on padding (on either side) nor on how a batch is split by accumulation.

    `save_pretrained` and every checkpoint hold two stock PEFT adapters, the bidirectional one in a folder of
    its own with `bitune.safetensors` beside it; `BituneModel.from_pretrained(model, folder)` loads them.
    The causal adapter alone loads with `PeftModel.from_pretrained`.

    Args:
        model: a causal language model; it is changed in place, as by `get_peft_model`.
        peft_config: of both adapters: any method that changes layers (LoRA, DoRA, IA3, ...).
        share: of the bidirectional pass in keys and values of every layer, to begin with.
        scale: of the coefficients; the smaller, the faster they learn.

    Raises:
        ValueError: an encoder-decoder, a model without masks and positions of its own (recurrent ones), prompt
            tuning, or `modules_to_save`.

    Example:
        >>> from peft import LoraConfig
        >>> from hf_ext.testing import tiny_models
        >>> model = BituneModel(tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        >>> ids, mask = tiny_models.prompts()
        >>> labels = ids.clone()
        >>> labels[:, :-2] = -100
        >>> model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        >>> sorted({name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None})
        ['bidirectional', 'bitune', 'default']
    """

    def __init__(
        self, model: PreTrainedModel, peft_config: PeftConfig, *, share: float = 0.5, scale: float = 0.01
    ) -> None:
        kind = type(peft_config).__name__
        if peft_config.is_prompt_learning:
            raise ValueError(f"BituneModel switches between adapters of layers, and a {kind} makes virtual tokens")
        if getattr(peft_config, "modules_to_save", None) or getattr(peft_config, "bias", "none") != "none":
            raise ValueError(
                f"BituneModel switches between adapters of layers only; leave modules_to_save and bias out of {kind}"
            )
        with in_evaluation(model):
            problem = tree_problem(model)
        if problem is not None:
            raise ValueError(f"BituneModel reads prompts with masks of its own: {problem}")
        self._trains = not peft_config.inference_mode
        super().__init__(model, peft_config, CAUSAL)
        super().add_adapter(BIDIRECTIONAL, copy.deepcopy(peft_config))
        mix = CacheMix(model.config.get_text_config(decoder=True).num_hidden_layers, scale)
        mix.fill(share, share)
        model.add_module(NAME, mix.to(model.device))
        self._set_trainable()

    @property
    def mix(self) -> CacheMix:
        """The coefficients; `model.mix.shares()` says what has been learnt."""
        return getattr(self.get_base_model(), NAME)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Set the adapter that plain calls use; both stay trainable."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_trainable()

    def _set_trainable(self) -> None:
        self.requires_grad_(False)
        if self._trains:
            getattr(self.get_base_model(), NAME).requires_grad_(True)
            for layer in adapter_layers(self):
                for part in layer.adapter_layer_names:
                    for name in (CAUSAL, BIDIRECTIONAL):
                        if name in getattr(layer, part):
                            getattr(layer, part)[name].requires_grad_(True)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read prompts twice and what follows them once; without labels and lengths, the causal adapter alone.

        Args:
            input_ids: `(batch, length)` int64, padded on either side.
            attention_mask: `(batch, length)`, 0 on padding; none by default.
            labels: `(batch, length)`, -100 where there is none; a row's prompt ends before its first one.
            prompt_lengths: `(batch,)` int, tokens of each prompt, where the labels do not tell.
            num_items_in_batch: what the summed loss is divided by, as the Trainer passes it.
            **kwargs: forward arguments; with prompts only those that do not depend on columns.

        Returns:
            Loss and logits, column by column; those of prompt tokens, which nothing is trained on, are of the
            causal pass.

        Raises:
            ValueError: no `input_ids`, packed rows, or gradient checkpointing.
        """
        if labels is None and prompt_lengths is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        model: Any = self.get_base_model()
        mask = self._check(input_ids, attention_mask, kwargs)
        assert input_ids is not None
        order = mask.long().cumsum(-1) - 1
        if prompt_lengths is None:
            assert labels is not None
            prompt_lengths = (mask & (((labels != -100) & mask).long().cumsum(-1) == 0)).sum(-1)
        twice = torch.minimum(prompt_lengths.to(order), mask.sum(-1)).sub(1).clamp_min(0)
        split = int(twice.max())
        # The tokens of a row side by side, and the borders of all rows in one column.
        place = (order + (split - twice)[:, None]).clamp_min(0)
        columns = int(place.max()) + 1
        rows, old = mask.nonzero(as_tuple=True)
        laid = [values.new_zeros(len(values), columns) for values in (input_ids, mask)]
        for new, values in zip(laid, (input_ids, mask), strict=True):
            new[rows, place[rows, old]] = values[rows, old]
        causal, last = read_twice(model, mix_of(model, "BituneModel"), laid[0], laid[1], split)
        logits = last.logits if causal is None else torch.cat([causal.logits.detach(), last.logits], dim=1)
        logits = logits[torch.arange(len(place), device=place.device)[:, None], place]
        loss = None
        if labels is not None:
            labels = labels.masked_fill(mask & (order == 0), -100)  # with padding before it, a shift does not drop it
            vocabulary = model.config.get_text_config(decoder=True).vocab_size
            loss = model.loss_function(
                logits=logits, labels=labels, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _check(self, ids: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """Refuse what cannot be honoured, and return the mask of real tokens."""
        if ids is None:
            raise ValueError("BituneModel reads prompts given as input_ids")
        given = [n for n, v in kwargs.items() if v is not None and v is not False and n not in ("return_dict",)]
        if given and given != ["use_cache"]:
            raise ValueError(
                f"BituneModel lays rows out anew to read their prompts twice and takes no {', '.join(given)}; with "
                "packed rows, switch packing and padding_free off"
            )
        real = torch.ones_like(ids) if mask is None else mask
        if real.shape != ids.shape:
            raise ValueError(f"attention_mask has the shape {tuple(real.shape)}, expected {tuple(ids.shape)}")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError("BituneModel trains through the cache, which gradient checkpointing drops; switch it off")
        return real.bool()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate from prompts that are read twice, unless `custom_generate` says otherwise."""
        kwargs.setdefault("custom_generate", Bitune())
        return super().generate(*args, **kwargs)

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save both adapters, and the coefficients beside the bidirectional one; see `PeftModel.save_pretrained`."""
        super().save_pretrained(str(save_directory), *args, is_main_process=is_main_process, **kwargs)
        folder = Path(save_directory) / BIDIRECTIONAL
        if is_main_process and folder.is_dir():
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.mix.named_parameters()}
            save_file(tensors, folder / FILE, metadata={"scale": repr(self.mix.scale)})

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter; the bidirectional one with its coefficients. See `PeftModel.load_adapter`.

        Both belong together: loading either one from a local folder brings the other one along, since a Trainer
        that resumes or that loads the best checkpoint asks for one of them only.
        """
        trained, result, folder = self.training, None, Path(model_id)
        wanted = {adapter_name: model_id}
        if adapter_name == CAUSAL and (folder / BIDIRECTIONAL).is_dir():
            wanted[BIDIRECTIONAL] = folder / BIDIRECTIONAL
        if adapter_name == BIDIRECTIONAL and (folder.parent / "adapter_config.json").is_file():
            wanted[CAUSAL] = folder.parent
        for name, place in reversed(wanted.items()):
            result = super().load_adapter(str(place), name, *args, **kwargs)
            if name == BIDIRECTIONAL:
                hub = {n: kwargs[n] for n in ("subfolder", "revision", "token", "cache_dir") if n in kwargs}
                self._load_mix(cached_file(str(place), FILE, **hub))
        self.train(trained)  # PEFT leaves the model in evaluation mode, whatever it was in
        self._set_trainable()
        return result

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: see the error.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "one set of weights cannot hold the causal and the bidirectional adapter, which read in turn: keep "
            "the BituneModel, or merge the causal adapter alone with PeftModel.from_pretrained(model, folder)"
        )

    merge_and_unload = merge_adapter

    @torch.no_grad()
    def _load_mix(self, file: str) -> None:
        with safe_open(file, "pt") as saved:
            self.mix.scale = float(saved.metadata()["scale"])
            for name, parameter in self.mix.named_parameters():
                parameter.copy_(saved.get_tensor(name))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: PreTrainedModel, model_id: str | Path, is_trainable: bool = False, **kwargs: Any
    ) -> BituneModel:
        """Put saved adapters and coefficients on a model.

        Args:
            model: the model they were trained on, without adapters; changed in place.
            model_id: a folder or a Hub repository that `save_pretrained` or a checkpoint made.
            is_trainable: go on training; otherwise all is frozen and in evaluation mode.
            **kwargs: where to look on the Hub (`revision`, `token`, `cache_dir`).
        """
        config = PeftConfig.from_pretrained(str(model_id), **kwargs)
        config.inference_mode = not is_trainable
        made = cls(model, config)
        made.load_adapter(str(model_id), CAUSAL, is_trainable=is_trainable, **kwargs)
        if not Path(model_id).is_dir():
            made.load_adapter(
                str(model_id), BIDIRECTIONAL, is_trainable=is_trainable, subfolder=BIDIRECTIONAL, **kwargs
            )
        return made if is_trainable else made.eval()
