"""Whether a model's keys survive few bits: measured before they are relied on.

Most models' do. Some have keys of which a few channels are so large that steps between codes swamp what the others
say: the keys of Qwen2.5, whose projections have biases, are known for it. How far attention then goes astray
is told by the *attention moved*: half the sum of the differences of two softmaxes, from 0.0 (nothing has
changed) to 1.0 (all of it goes to other tokens).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_ext.attention.intercept import intercept, visible
from hf_ext.kernels.packing import dequantise_keys, quantise_keys

if TYPE_CHECKING:
    from hf_ext.cache.layer import CompressedLayer

#: A layer is said not to survive when more attention than this is moved. Ordinary layers lose up to 0.06 to 4 bits and
#: 0.26 to 2 (those of the embedded model, and of tiny random ones of several architectures); with biases of 200 in
#: the channels of their keys that positions turn fastest, they lose 0.5 to 4 bits.
THRESHOLD = 0.35
#: The guard looks at so many last queries of the first row, and at so many last keys.
QUERIES, KEYS = 8, 1024


def moved(query: Tensor, keys: Tensor, others: Tensor, scale: float, hidden: Tensor | None = None) -> Tensor:
    """Return the attention that moves when keys become others.

    Args:
        query: `(rows, heads, q, width)`.
        keys: `(rows, key heads, n, width)`.
        others: likewise.
        scale: of the scores.
        hidden: `(rows, 1 or heads, q, n)` bool, True where a query does not see a key.

    Returns:
        `(rows, heads, q)` from 0.0 to 1.0.

    Example:
        >>> keys = torch.tensor([[100.0], [0.0]])[None, None]
        >>> moved(torch.ones(1, 1, 1, 1), keys, keys.flip(2), 1.0)
        tensor([[[1.]]])
    """
    shares = []
    for side in (keys, others):
        scores = query.float() @ side.float().repeat_interleave(query.shape[1] // side.shape[1], dim=1).mT * scale
        shares.append((scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1))
    # A query that sees nothing has no attention to move.
    return (shares[0] - shares[1]).abs().sum(-1).nan_to_num() / 2


def through(keys: Tensor, bits: int, group: int) -> Tensor:
    """Return keys as they come back when whole groups of them, from the first on, have been quantised."""
    whole = keys.shape[2] // group * group
    back = dequantise_keys(*quantise_keys(keys[:, :, :whole], bits, group), bits=bits)
    return torch.cat([back, keys[:, :, whole:]], dim=2)


@torch.no_grad()
def guard(layer: CompressedLayer, query: Tensor, keys: Tensor, real: Tensor | None, scale: float) -> bool:
    """Look at the first long pass of a layer, and warn (once a cache) if its keys do not survive.

    Args:
        layer: of a cache that quantises.
        query: `(rows, heads, q, width)` of the pass.
        keys: `(rows, key heads, q, width)` of its tokens.
        real: `(rows, q)` bool, False for padding; None if there is none.
        scale: of the scores.

    Returns:
        Whether the pass was long enough to tell.
    """
    quantisation = layer.cache.quantise
    assert quantisation is not None
    row = 0 if real is None else int(real.sum(1).argmax())
    count = keys.shape[2] if real is None else int(real[row].sum())
    length = min(count, KEYS) // quantisation.group * quantisation.group
    if not length:
        return False
    if layer.cache.warned:
        return True
    own = keys[row : row + 1, :, -length:]
    asked = query[row : row + 1, :, -QUERIES:]
    # Of these keys the last queries see all but each other, which are left out.
    hidden = torch.ones(1, 1, asked.shape[2], length, dtype=torch.bool, device=keys.device).triu(
        length - asked.shape[2] + 1
    )
    share = float(moved(asked, own, through(own, quantisation.bits, quantisation.group), scale, hidden).mean())
    if share > THRESHOLD:
        layer.cache.warned = True
        warnings.warn(
            f"the keys of layer {layer.model_layer} do not survive {quantisation.bits} bits: {share:.0%} of the "
            f"attention of the last tokens goes elsewhere (more than {THRESHOLD:.0%}). Use more bits, or leave first "
            "layers out with skip_layers=; hf_ext.cache.sensitivity.probe(model, ids) tells what each layer loses",
            stacklevel=2,
        )
    return True


@dataclass(frozen=True)
class LayerSensitivity:
    """What becomes of a model when the keys of one layer are quantised.

    Args:
        layer: number of the layer.
        moved: share of the layer's attention that goes elsewhere, the mean over heads and tokens.
        output_error: of the layer's attention output, the norm of the error over the norm.
        divergence: of the model's next-token laws, the mean Kullback-Leibler divergence in nats.
    """

    layer: int
    moved: float
    output_error: float
    divergence: float

    @property
    def survives(self) -> bool:
        """Whether no more attention is moved than `THRESHOLD`."""
        return self.moved <= THRESHOLD


@dataclass(frozen=True)
class Sensitivity:
    """What `probe` has found.

    Args:
        bits: of the codes.
        group: tokens of a group.
        layers: one after the other.
    """

    bits: int
    group: int
    layers: tuple[LayerSensitivity, ...]

    @property
    def failing(self) -> tuple[int, ...]:
        """The layers whose keys do not survive."""
        return tuple(found.layer for found in self.layers if not found.survives)

    def __str__(self) -> str:
        head = f"keys in {self.bits} bits, groups of {self.group} tokens\nlayer  moved  output error  divergence"
        rows = [
            f"{x.layer:5d}  {x.moved:5.3f}  {x.output_error:12.4f}  {x.divergence:10.4f}{'' if x.survives else '  !'}"
            for x in self.layers
        ]
        return "\n".join([head, *rows])


@torch.no_grad()
def probe(
    model: nn.Module,
    inputs: Tensor | Sequence[str],
    *,
    bits: int = 4,
    group: int = 32,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> Sensitivity:
    """Quantise the keys of one layer after the other and see what becomes of the model.

    Args:
        model: any causal model of transformers whose attention goes through its `AttentionInterface`.
        inputs: `(rows, tokens)` ids, at least a group of them a row; or texts, with `tokenizer`.
        bits: of the codes: 2, 4 or 8.
        group: tokens of a group.
        attention_mask: `(rows, tokens)`, 0 for padding.
        tokenizer: for texts, one after the other.

    Returns:
        What was found, layer by layer; `print` shows a table.

    Raises:
        ValueError: texts without a tokenizer, or inputs shorter than a group.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> found = probe(tiny_models.shared("llama"), tiny_models.prompts((64,))[0], bits=8, group=16)
        >>> found.failing, len(found.layers)
        ((), 2)
    """
    if not isinstance(inputs, Tensor):
        if tokenizer is None:
            raise ValueError("texts need a tokenizer: probe(model, texts, tokenizer=tokenizer)")
        device = next(model.parameters()).device
        batches: list[tuple[Tensor, Tensor | None]] = [
            (tokenizer(text, return_tensors="pt")["input_ids"].to(device), None) for text in inputs
        ]
    else:
        batches = [(inputs, attention_mask)]
    found: dict[int, list[tuple[float, float, float]]] = {}
    for ids, mask in batches:
        if ids.shape[1] < group:
            raise ValueError(f"inputs of {ids.shape[1]} tokens do not fill a group of {group}")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        call = {"attention_mask": mask, "use_cache": False}
        layers: list[int] = []
        with intercept(model, _noting(layers)):
            wanted = model(ids, **call).logits[real].float().log_softmax(-1)
        for layer in dict.fromkeys(layers):
            errors: list[tuple[float, float]] = []
            with intercept(model, _quantising(layer, bits, group, real, errors)):
                law = model(ids, **call).logits[real].float().log_softmax(-1)
            divergence = float((wanted.exp() * (wanted - law)).sum(-1).mean())
            found.setdefault(layer, []).append((*errors[0], divergence))

    def mean(values: list[tuple[float, float, float]], which: int) -> float:
        return sum(value[which] for value in values) / len(values)

    return Sensitivity(
        bits,
        group,
        tuple(LayerSensitivity(layer, *(mean(values, i) for i in range(3))) for layer, values in sorted(found.items())),
    )


def _noting(layers: list[int]) -> Callable[..., Any]:
    """Return an attention that notes which layers it was called for."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Callable, **call: Any) -> Any:
        layers.append(module.layer_idx)
        return plain(module, query, key, value, mask, **call)

    return attend


def _quantising(
    layer: int, bits: int, group: int, real: Tensor, errors: list[tuple[float, float]]
) -> Callable[..., Any]:
    """Return an attention that quantises the keys of one layer, and notes what is moved and the error."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Callable, **call: Any) -> Any:
        output, weights = plain(module, query, key, value, mask, **call)
        if module.layer_idx != layer:
            return output, weights
        back = through(key, bits, group)
        scale = call.get("scaling") or query.shape[-1] ** -0.5
        hidden = ~visible(mask, query, key)
        queries = real.to(query.device)
        share = moved(query, key, back, scale, hidden).transpose(1, 2)[queries].mean()
        other, weights = plain(module, query, back, value, mask, **call)
        error = (other - output)[queries].norm() / output[queries].norm().clamp(min=torch.finfo(torch.float32).tiny)
        errors.append((float(share), float(error)))
        return other, weights

    return attend
