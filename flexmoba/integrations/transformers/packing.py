"""Packed documents in a row, from what data collators pass to a model."""

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flexmoba.runtime import has_values
from flexmoba.sequence import without_padding

POSITIONS = "flexmoba_position_ids"  # how `pass_positions` names what models keep from attention

# The tensors asked about last, their versions, and what they said: all layers of a forward pass ask
# the same; where some keep a window, these and the others, so there are two.
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
    """`flex_moba`'s argument for packed documents, if there are any, as a dictionary.

    A document begins where ``cu_seq_lens_q`` or ``seq_idx`` says so, or else where the documents of
    the mask change, or else where a token's position is no greater than that of the token before.
    Where there is padding, the result is of the real tokens of each row, one after the other, with
    what is left of the row in the last document. The last three are read from the device, once a
    forward pass. Compiled or captured code cannot read them, and raises when it runs where a
    document begins.

    Args:
        mask: What `padding_mask` made: which tokens are no padding, bool, ``(B, L)``, or more
            columns of which the last ones count; or the document of each token, int32, ``(B, L)``;
            None if all tokens are real and transformers found no documents.
        batch: Rows ``B``.
        lengths: Queries and keys in a row; ``L`` is either. With a cache positions are those of
            the new tokens, and a model that keeps the last logits only may drop the other queries.
        position_ids: ``(B, L)`` or ``(1, L)`` ints.
        cu_seq_lens_q: ``(n + 1,)`` ints, bounds of the documents of the only row.
        seq_idx: ``(B, L)`` ints, the document of each token.

    Raises:
        ValueError: ``cu_seq_lens_q`` came with padding.
    """
    documents, real = (None, mask) if mask is None or mask.dtype == torch.bool else (mask, None)
    if cu_seq_lens_q is not None:
        if real is not None:
            raise ValueError(
                "cu_seq_lens_q and padding do not go together; leave attention_mask out"
            )
        return {"cu_seqlens": cu_seq_lens_q}
    source = seq_idx if seq_idx is not None else documents
    positions = source is None
    if source is None:
        source = position_ids
    if source is None or source.ndim != 2 or source.shape[1] not in lengths or source.shape[1] == 1:
        return {}
    if not may_read(source):
        if seq_idx is not None:
            return {"document_ids": seq_idx}  # which does not compile, and says so
        torch._assert_async(
            ~_starts(source, real, positions).any(),
            "position_ids restart, but compiled code cannot tell how many documents there are; "
            "pass cu_seq_lens_q",
        )
        return {}
    return _remembered(source, real, positions, batch)


def pass_positions(model: nn.Module) -> None:
    """Makes a model pass ``position_ids`` to its attention, which some models keep to themselves.

    Models hand what they do not know, under whatever name, on to their attention.
    """
    parameters = inspect.signature(model.forward).parameters
    hooks = model._forward_pre_hooks.values()
    if (
        "position_ids" in parameters
        and any(x.kind is x.VAR_KEYWORD for x in parameters.values())
        and not any(getattr(hook, "func", None) is _with_positions for hook in hooks)
    ):
        place = list(parameters).index("position_ids")
        hook = functools.partial(_with_positions, place)
        model.register_forward_pre_hook(hook, with_kwargs=True)


def _with_positions(
    place: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positions = args[place] if len(args) > place else kwargs.get("position_ids")
    return args, kwargs if positions is None else kwargs | {POSITIONS: positions}


def may_read(x: Tensor) -> bool:
    """Whether values can be read: not while tracing, nor while capturing a CUDA graph."""
    return has_values(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _remembered(
    source: Tensor, real: Tensor | None, positions: bool, batch: int
) -> dict[str, Tensor]:
    given = [x for x in (source, real) if x is not None]
    if any(x.is_inference() for x in given):
        return _read(source, real, positions, batch)  # such a tensor may change without a trace
    state = [batch, positions, *(x._version for x in given)]
    for known, known_state, result in _last:
        if known_state == state and all(ref() is x for ref, x in zip(known, given, strict=True)):
            return result
    result = _read(source, real, positions, batch)
    _last[:] = [([weakref.ref(x) for x in given], state, result), *_last[:1]]
    return result


def _read(source: Tensor, real: Tensor | None, positions: bool, batch: int) -> dict[str, Tensor]:
    starts = _starts(source, real, positions)
    if not bool(starts.any()):
        return {}
    if batch == 1:
        bounds = starts[0].nonzero()[:, 0] + 1
        first, last = bounds.new_tensor([[0], [source.shape[1]]])
        return {"cu_seqlens": torch.cat([first, bounds, last])}
    ids = torch.nn.functional.pad(starts.cumsum(1), (1, 0))
    return {"document_ids": ids.expand(batch, -1)}


def _starts(source: Tensor, real: Tensor | None, positions: bool) -> Tensor:
    """Where a document begins, ``(B, L - 1)``, of the real tokens of each row after the first."""
    token = None
    if real is not None:
        token = without_padding(real[:, -source.shape[1] :], 1).token_of_slot
        assert token is not None
        source = source.expand(token.shape).gather(1, token.clamp(min=0).long())
    step = source.diff(dim=1)
    starts = step <= 0 if positions else step != 0
    return starts if token is None else starts & (token[:, 1:] >= 0)
