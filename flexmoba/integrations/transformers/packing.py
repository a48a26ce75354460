"""Packed documents in a row, from what data collators pass to a model."""

import weakref

import torch
from torch import Tensor

# The tensors asked about last, their versions, and what they said: all layers of a forward pass ask
# the same.
_last: tuple[list[weakref.ref[Tensor]], list[int], dict[str, Tensor]] | None = None


def documents_of(
    real: Tensor | None,
    batch: int,
    lengths: tuple[int, int],
    *,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
) -> dict[str, Tensor]:
    """`flex_moba`'s argument for packed documents, if there are any, as a dictionary.

    A document begins where ``cu_seq_lens_q`` or ``seq_idx`` says so, or else where a token's
    position does not follow the one before; where there is padding, each stretch of it is a
    document, too. Whether positions do is read from the device, once a forward pass. Compiled or
    captured code cannot, and raises when it runs where they do not.

    Args:
        real: Which tokens are no padding, bool, ``(B, L)``, or more columns of which the last ones
            count; None for all of them.
        batch: Rows ``B``.
        lengths: Queries and keys in a row; ``L`` is either. With a cache positions are those of
            the new tokens, and a model that keeps the last logits only may drop the other queries.
        position_ids: ``(B, L)`` or ``(1, L)`` ints.
        cu_seq_lens_q: ``(n + 1,)`` ints, bounds of the documents of the only row.
        seq_idx: ``(B, L)`` ints, the document of each token.

    Raises:
        ValueError: ``cu_seq_lens_q`` came with padding.
    """
    if cu_seq_lens_q is not None:
        if real is not None:
            raise ValueError(
                "cu_seq_lens_q and padding do not go together; leave attention_mask out"
            )
        return {"cu_seqlens": cu_seq_lens_q}
    source, step = (position_ids, 1) if seq_idx is None else (seq_idx, 0)
    if source is None or source.ndim != 2 or source.shape[1] not in lengths or source.shape[1] == 1:
        return {}
    if not may_read(source):
        if seq_idx is not None:
            return {"document_ids": seq_idx}  # which does not compile, and says so
        torch._assert_async(
            ~_restarts(source, real, step).any(),
            "position_ids restart, but compiled code cannot tell how many documents there are; "
            "pass cu_seq_lens_q",
        )
        return {}
    return _remembered(source, real, step, batch)


def may_read(x: Tensor) -> bool:
    """Whether values can be read: not while tracing, nor while capturing a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _remembered(source: Tensor, real: Tensor | None, step: int, batch: int) -> dict[str, Tensor]:
    global _last
    given = [x for x in (source, real) if x is not None]
    if any(x.is_inference() for x in given):
        return _read(source, real, step, batch)  # such a tensor may change without a trace
    state = [batch, *(x._version for x in given)]
    if _last is not None:
        known, known_state, result = _last
        if known_state == state and all(ref() is x for ref, x in zip(known, given, strict=True)):
            return result
    result = _read(source, real, step, batch)
    _last = [weakref.ref(x) for x in given], state, result
    return result


def _read(source: Tensor, real: Tensor | None, step: int, batch: int) -> dict[str, Tensor]:
    starts = _restarts(source, real, step)
    if not bool(starts.any()):
        return {}
    if real is not None:
        real = real[:, -source.shape[1] :]
        starts = starts | (real[:, 1:] != real[:, :-1])
    if batch == 1:
        bounds = starts[0].nonzero()[:, 0] + 1
        first, last = bounds.new_tensor([[0], [source.shape[1]]])
        return {"cu_seqlens": torch.cat([first, bounds, last])}
    ids = torch.nn.functional.pad(starts.cumsum(1), (1, 0))
    return {"document_ids": ids.expand(batch, -1)}


def _restarts(source: Tensor, real: Tensor | None, step: int) -> Tensor:
    """Where a document begins, ``(B, L - 1)``, of the tokens after the first; none in padding."""
    restarts = source.diff(dim=1) != step
    if real is None:
        return restarts
    real = real[:, -source.shape[1] :]
    return restarts & real[:, 1:] & real[:, :-1]
