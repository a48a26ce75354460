"""Converted layers whose sequences are spread over ranks, by `flexmoba.distributed`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexmoba.integrations.entry import CHILD
from flexmoba.integrations.transformers.packing import POSITIONS, documents_of, may_read
from flexmoba.integrations.transformers.settings import name_of

if TYPE_CHECKING:
    from flexmoba.distributed import SequenceShards

_SUPPORTED = {"full_attention", "attention"}  # in config.layer_types


def shards_of(module: nn.Module) -> "SequenceShards | None":
    """Returns the shards that ``ContextParallel`` set, or None."""
    own = module._modules.get(CHILD)
    return getattr(own, "sequence_shards", None)


def documents_over_ranks(
    module: nn.Module,
    shards: "SequenceShards",
    lengths: tuple[int, int],
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the documents of sequences that are spread over ranks, from ``cu_seq_lens_q``.

    Args:
        module: The attention module.
        shards: The shards of the sequences.
        lengths: Queries and keys in a row, of this rank.
        attention_mask: The mask of the layer.
        kwargs: Other arguments of the model.

    Raises:
        NotImplementedError: The model, or an argument, needs tokens of other ranks for more than
            the attention.
        ValueError: Positions begin anew on this rank.
    """
    name = name_of(module)
    kinds = {*(getattr(getattr(module, "config", None), "layer_types", None) or ())} - _SUPPORTED
    if kinds:
        raise NotImplementedError(
            f"{name} is in a model with layers of type {', '.join(sorted(kinds))}, which "
            "ContextParallel does not support; use a model with full attention only"
        )
    if lengths[0] != lengths[1]:
        raise NotImplementedError(
            f"{name} has {lengths[0]} queries and {lengths[1]} keys on this rank, but with "
            "ContextParallel both are the tokens of the shard; omit the cache and logits_to_keep"
        )
    boundaries: Tensor | None = kwargs.get("cu_seq_lens_q")
    positions: Tensor | None = kwargs.get("position_ids", kwargs.get(POSITIONS))
    found: dict[str, Any] = {} if boundaries is None else {"cu_seqlens": boundaries}
    if boundaries is None:
        others = {"cu_seq_lens_q": None, "seq_idx": kwargs.get("seq_idx")}
        found = documents_of(attention_mask, 1, lengths, position_ids=positions, **others)
    is_padded = attention_mask is not None and attention_mask.dtype == torch.bool
    if is_padded or (found and boundaries is None):
        raise NotImplementedError(
            f"{name} was given padding or packed documents, which ContextParallel supports by "
            "cu_seq_lens_q of the complete sequence alone; pass it, and omit attention_mask"
        )
    is_later = boundaries is None and shards.mesh.get_local_rank() > 0
    if is_later and positions is not None and may_read(positions) and int(positions[0, 0]) == 0:
        raise ValueError(
            f"{name} got positions from 0 on, on rank {shards.mesh.get_local_rank()} of "
            "ContextParallel; pass position_ids of the complete sequence"
        )
    return found
