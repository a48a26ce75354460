"""Packed documents, found by the arguments that data collators pass to a model."""

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flexmoba.runtime import has_values
from flexmoba.sequence import without_padding

POSITIONS = "flexmoba_position_ids"  # the argument in which `pass_positions` passes position_ids

# The last two inputs, as weak references and versions, with their documents. All layers of a
# forward pass have the same inputs, or two different ones if some layers are local.
_last: list[tuple[list[weakref.ref[Tensor]], list[int], dict[str, Tensor]]] = []


def documents_of(
    mask: Tensor | None,
    batch: int,
    lengths: tuple[int, int],
    *,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
) -> dict[str, Tensor]:
    """Returns the argument of `flex_moba` for packed documents, or an empty dictionary.

    The first argument that is not None determines the documents: ``cu_seq_lens_q``, ``seq_idx``,
    the documents of the mask, or ``position_ids``, where a document begins at each position that is
    not greater than the previous one. With padding, the result describes the real tokens of each
    row without gaps, and the rest of the row belongs to the last document. All but
    ``cu_seq_lens_q`` are read from the device, once for each forward pass. Compiled or captured
    code cannot read them, and raises an error when it runs if a document begins inside a row.

    Args:
        mask: The result of `padding_mask`: real tokens, bool ``(B, L)``, or more columns, of which
            the last ``L`` count; or the document of each token, int32 ``(B, L)``; or None if all
            tokens are real and transformers found no documents.
        batch: Rows ``B``.
        lengths: Queries and keys in a row. ``L`` is either: with a cache, positions belong to the
            new tokens, and a model that computes only the last logits may drop queries.
        position_ids: ``(B, L)`` or ``(1, L)``, an integer dtype.
        cu_seq_lens_q: ``(documents + 1,)``, an integer dtype, boundaries of the documents of the
            only row.
        seq_idx: ``(B, L)``, an integer dtype, the document of each token.

    Returns:
        A dictionary with ``cu_seqlens`` or ``document_ids``, or without an entry.

    Raises:
        ValueError: ``cu_seq_lens_q`` came with padding.
    """
    documents, real = (None, mask) if mask is None or mask.dtype == torch.bool else (mask, None)
    if cu_seq_lens_q is not None:
        if real is not None:
            raise ValueError("cu_seq_lens_q and padding cannot be combined; omit attention_mask")
        return {"cu_seqlens": cu_seq_lens_q}
    source = seq_idx if seq_idx is not None else documents
    is_positions = source is None
    if source is None:
        source = position_ids
    if source is None or source.ndim != 2 or source.shape[1] not in lengths or source.shape[1] == 1:
        return {}
    if not may_read(source):
        if seq_idx is not None:
            return {"document_ids": seq_idx}  # `flex_moba` raises an error while compiling
        torch._assert_async(
            ~_document_starts(source, real, is_positions).any(),
            "position_ids restart, but compiled code cannot count the documents; pass "
            "cu_seq_lens_q",
        )
        return {}
    return _last_or_read(source, real, is_positions, batch)


def pass_positions(model: nn.Module) -> None:
    """Makes a model pass ``position_ids`` to its attention, which some models do not.

    The hook adds them under another name, because models pass unknown arguments to their attention.
    """
    parameters = inspect.signature(model.forward).parameters
    hooks = model._forward_pre_hooks.values()
    if (
        "position_ids" in parameters
        and any(x.kind is x.VAR_KEYWORD for x in parameters.values())
        and not any(getattr(hook, "func", None) is _with_positions for hook in hooks)
    ):
        index = list(parameters).index("position_ids")
        hook = functools.partial(_with_positions, index)
        model.register_forward_pre_hook(hook, with_kwargs=True)


def _with_positions(
    index: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positions = args[index] if len(args) > index else kwargs.get("position_ids")
    return args, kwargs if positions is None else kwargs | {POSITIONS: positions}


def may_read(x: Tensor) -> bool:
    """Returns whether values can be read: not while tracing or capturing a CUDA graph."""
    return has_values(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _last_or_read(
    source: Tensor, real: Tensor | None, is_positions: bool, batch: int
) -> dict[str, Tensor]:
    """Returns the documents of the last call with the same tensors, or reads them."""
    inputs = [x for x in (source, real) if x is not None]
    if any(x.is_inference() for x in inputs):  # without a version, so changes stay unnoticed
        return _read_documents(source, real, is_positions, batch)
    state = [batch, is_positions, *(x._version for x in inputs)]
    for last_inputs, last_state, result in _last:
        if last_state == state and all(
            ref() is x for ref, x in zip(last_inputs, inputs, strict=True)
        ):
            return result
    result = _read_documents(source, real, is_positions, batch)
    _last[:] = [([weakref.ref(x) for x in inputs], state, result), *_last[:1]]
    return result


def _read_documents(
    source: Tensor, real: Tensor | None, is_positions: bool, batch: int
) -> dict[str, Tensor]:
    starts = _document_starts(source, real, is_positions)
    if not bool(starts.any()):
        return {}
    if batch == 1:
        bounds = starts[0].nonzero()[:, 0] + 1
        first, last = bounds.new_tensor([[0], [source.shape[1]]])
        return {"cu_seqlens": torch.cat([first, bounds, last])}
    ids = torch.nn.functional.pad(starts.cumsum(1), (1, 0))
    return {"document_ids": ids.expand(batch, -1)}


def _document_starts(source: Tensor, real: Tensor | None, is_positions: bool) -> Tensor:
    """Returns whether each real token after the first begins a document, ``(B, L - 1)`` bool."""
    token = None
    if real is not None:
        token = without_padding(real[:, -source.shape[1] :], 1).token_of_slot
        assert token is not None
        source = source.expand(token.shape).gather(1, token.clamp(min=0).long())
    step = source.diff(dim=1)
    starts = step <= 0 if is_positions else step != 0
    return starts if token is None else starts & (token[:, 1:] >= 0)
