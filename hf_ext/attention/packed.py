"""A structure as one small tensor that models of transformers carry to their attention like a mask.

transformers hands a tensor of four dimensions to every layer as it is, whatever is in it: through
gradient checkpointing, `torch.compile` and from device to device. So a structure travels as

    (rows, 1, fields, queries + keys) int32

which no dense mask is, being bool or floating point. What a kernel must know before it starts stands in
the shape, which is read without waiting for the device: 1 field is an order; 2 are order and
position; 3 are order, group and segment; 4 are all of them; `5 + 2 * words` have a draft tree as well.

A window needs no number of its own: it is folded into the positions of the queries, so that every
packed structure has the window `WINDOW`.
"""

from __future__ import annotations

import torch

from hf_ext.attention.structure import AttentionStructure, Tokens

#: The window of all packed structures that have one; more than any position.
WINDOW = 2**30

_KEPT = "hf_ext_structure"


def pack(structure: AttentionStructure) -> torch.Tensor:
    """Return a structure as a tensor that can be given to a model as `attention_mask`.

    Args:
        structure: who sees whom; positions are less than 2**30.

    Returns:
        `(rows, 1, fields, queries + keys)` int32, for models with `attn_implementation="hf_ext"`.

    Example:
        >>> packed = pack(AttentionStructure.causal(torch.ones(1, 3)).windowed(2))
        >>> packed.shape, packed.dtype
        (torch.Size([1, 1, 2, 6]), torch.int32)
        >>> unpack(packed, 3).dense()[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    rows = structure.shape[0]
    q, k = structure.queries, structure.keys
    tree = structure.nodes is not None
    fields = [_beside(q.order, k.order, rows)]
    if structure.window is not None:
        fields.append(_beside(q.position + (WINDOW - structure.window), k.position, rows))
    elif tree:
        fields.append(_beside(torch.zeros_like(q.position), k.position, rows))
    if q.group is not None and k.group is not None and q.segment is not None and k.segment is not None:
        fields += [_beside(q.group, k.group, rows), _beside(q.segment, k.segment, rows)]
    elif tree:
        fields += [torch.zeros_like(fields[0])] * 2
    if structure.nodes is not None and structure.ancestors is not None:
        fields.append(_beside(torch.full_like(q.order, -1), structure.nodes, rows))
        halves = structure.ancestors.contiguous().view(torch.int32)  # (rows, queries, 2 * words)
        none = torch.zeros_like(k.order)
        fields += [_beside(halves[..., half], none, rows) for half in range(halves.shape[-1])]
    packed = torch.stack(fields, dim=1)[:, None]
    if not torch.compiler.is_compiling():
        # As long as it is this very tensor, nothing has to be unpacked, and what is worked out is kept.
        setattr(packed, _KEPT, structure)
    return packed


def is_packed(mask: torch.Tensor | None) -> bool:
    """Tell whether an attention mask is a packed structure."""
    return mask is not None and mask.dtype == torch.int32 and mask.ndim == 4


def unpack(packed: torch.Tensor, queries: int, keys: int | None = None) -> AttentionStructure:
    """Return the structure that `pack` has packed.

    Args:
        packed: what `pack` returned.
        queries: number of queries.
        keys: number of keys, to be checked.

    Raises:
        ValueError: the tensor is none that `pack` has made, or it has been cut.
    """
    if not torch.compiler.is_compiling():
        kept = getattr(packed, _KEPT, None)
        if kept is not None and (keys is None or kept.shape[1:] == (queries, keys)):
            return kept
    if not is_packed(packed) or packed.shape[1] != 1:
        raise ValueError(f"expected a packed structure (rows, 1, fields, columns) int32, got {packed.dtype} of shape "
                         f"{tuple(packed.shape)}; a dense mask is bool or floating point")  # fmt: skip
    if keys is not None and packed.shape[3] != queries + keys:
        raise ValueError(
            f"the structure has {packed.shape[3]} queries and keys together, the layer has {queries} + {keys}; make it "
            "for what the cache holds after the step (a mask that is no structure is bool or floating point, not int32)"
        )
    count = packed.shape[2]
    if count > 4 and count % 2 == 0:
        raise ValueError(f"no packed structure has {count} fields")
    fields = packed[:, 0]

    def tokens(part: slice) -> Tokens:
        order = fields[:, 0, part]
        position = fields[:, 1, part] if count in (2, 4) or count > 4 else torch.zeros_like(order)
        if count < 3:
            return Tokens(order, position)
        first = 1 if count == 3 else 2
        return Tokens(order, position, fields[:, first, part], fields[:, first + 1, part])

    window = None if count in (1, 3) else WINDOW
    nodes = ancestors = None
    if count > 4:
        nodes = fields[:, 4, queries:]
        ancestors = fields[:, 5:, :queries].transpose(1, 2).contiguous().view(torch.int64)
    return AttentionStructure(
        tokens(slice(queries)), tokens(slice(queries, None)), window=window, nodes=nodes, ancestors=ancestors
    )


def _beside(queries: torch.Tensor, keys: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a field of queries and keys as `(rows, queries + keys)` int32."""
    return torch.cat([queries.expand(rows, -1), keys.expand(rows, -1)], dim=1).int()
