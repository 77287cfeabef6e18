"""Reading spans: the encoders' outputs in the place of embeddings.

This file is part of the Hub repository.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .parts_metalm import room_of
from .spans_metalm import ABSENT, Span, bounds_of, check, find, places


class SpanReading:
    """The part of a MetaLM that makes the language model's input; it has the modules, see `MetaLMForCausalLM`."""

    encoder: Any
    connector: Any
    vision_encoder: Any
    vision_connector: Any
    get_input_embeddings: Any

    def embed(
        self,
        input_ids: torch.Tensor,
        *,
        spans: torch.Tensor | None = None,
        image_spans: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: Any = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return the language model's input with what the encoders say in the place of the spans.

        Args:
            input_ids: `[batch, length]`.
            spans: as in `forward`, and so are the next four.
            image_spans: where the images stand.
            pixel_values: the images.
            attention_mask: to find padding; without it there is none.
            labels: to find labels inside spans.

        Returns:
            `[batch, length, width]`, or None where no row has a span and the ids do as well.

        Raises:
            ValueError: as in `forward`.
        """
        shape = (input_ids.shape[0], input_ids.shape[1])
        texts = [] if spans is None else find(bounds_of(spans), shape)
        images = [] if image_spans is None else find(bounds_of(image_spans, "image_spans"), shape, "image_spans")
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
        check([*texts, *images], None if mask is None else mask[:, -shape[1] :], labels)
        for name, found in (("encoder", texts), ("vision_encoder", images)):
            if found and not hasattr(self, name):
                raise ValueError(
                    f"{found[0]} needs {name}, which this model lacks; build it with from_parts({name}=...)"
                )
        if (pixel_values is not None) != (image_spans is not None):
            raise ValueError("image_spans and pixel_values go together: one says where the other stand")
        if not texts and not images:
            return None
        embeds = self.get_input_embeddings()(input_ids)
        if texts:
            embeds = embeds.index_put(places(texts, embeds.device), self._read_texts(texts, input_ids).to(embeds))
        if images and pixel_values is not None:
            embeds = embeds.index_put(places(images, embeds.device), self._read_images(images, pixel_values).to(embeds))
        return embeds

    def _read_texts(self, spans: Sequence[Span], input_ids: torch.Tensor) -> torch.Tensor:
        """Return the connector's `[tokens, width]` for all tokens of all spans, in their order."""
        lengths = torch.tensor([span.end - span.start for span in spans])
        room = room_of(self.encoder)
        if room is not None and int(lengths.max()) > room:
            span = spans[int(lengths.argmax())]
            raise ValueError(
                f"{span} has {int(lengths.max())} tokens, but {type(self.encoder).__name__} has positions for {room}; "
                "give shorter spans, or set max_length of the collator"
            )
        real = (torch.arange(int(lengths.max())) < lengths[:, None]).to(input_ids.device)
        ids = torch.full(real.shape, self.encoder.config.pad_token_id or 0).to(input_ids)
        ids[real] = input_ids[places(spans, input_ids.device)]
        states = self.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return self._connect(self.connector, states)[real]

    def _read_images(self, spans: Sequence[Span], pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the connector's `[patches, width]` for all images of the batch, in the order of their spans."""
        if pixel_values.ndim == 4:
            pixel_values = pixel_values[:, None]
        entries = max(span.entry for span in spans) + 1
        if pixel_values.ndim != 5 or entries > pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}, expected (batch, images, channels, height, "
                f"width) with at least {entries} images a row, as image_spans has"
            )
        chosen = torch.stack([pixel_values[span.row, span.entry] for span in spans])
        states = self.vision_encoder(pixel_values=chosen).last_hidden_state
        for span in spans:
            if span.end - span.start != states.shape[1]:
                raise ValueError(
                    f"{span} has {span.end - span.start} columns for an image, but the vision encoder gives "
                    f"{states.shape[1]} outputs for each; reserve so many columns"
                )
        return self._connect(self.vision_connector, states).flatten(0, 1)

    @staticmethod
    def _connect(connector: nn.Sequential, states: torch.Tensor) -> torch.Tensor:
        first: Any = connector[0]
        if states.shape[-1] != first.in_features:
            raise ValueError(
                f"the encoder's outputs are {states.shape[-1]} wide, but its configuration has "
                f"hidden_size={first.in_features}, which the connector was built for"
            )
        return connector(states.to(first.weight))


def from_column(spans: torch.Tensor | None, cached: int) -> torch.Tensor | None:
    """Return the spans behind the first `cached` columns, counted from there; None if there are none."""
    if spans is None or not cached:
        return spans
    bounds = bounds_of(spans)
    starts, ends = bounds[..., 0], bounds[..., 1]
    if bool(((starts < cached) & (ends > cached)).any()):
        raise ValueError(
            f"the cache ends after {cached} tokens, inside a span; let it end before the span or behind it"
        )
    left = ends > cached
    return torch.where(left[..., None], bounds - cached, ABSENT) if bool(left.any()) else None
