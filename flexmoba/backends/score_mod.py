"""The indices that a ``score_mod`` receives: those of the user's tensors, in every backend.

FlexAttention calls ``score_mod(score, b, h, q_idx, kv_idx)`` with the indices of its own call.
These differ from the indices of the user's tensors where rows are sorted by block, where the
queries are a chunk of a longer sequence, and where a layout moves the tokens of documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class ScoreModifier(NamedTuple):
    """A ``score_mod`` and the indices that it receives for each query and key.

    Attributes:
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx) -> score``.
        query_indices: ``(B, Hq, Lq, 3)`` int32, the batch index, the head and the position of each
            query in the user's tensors.
        key_position: ``(B, Hkv, Lk)`` int32, the position of each key in the user's tensors.
        is_remapped: Whether the indices of the call differ from these indices.
    """

    score_mod: ScoreMod
    query_indices: Tensor
    key_position: Tensor
    is_remapped: bool


def score_modifier(
    score_mod: ScoreMod | None, q: Tensor, k: Tensor, token_of_slot: Tensor | None
) -> ScoreModifier | None:
    """Returns the modifier for a call with these queries and keys, or None without a score_mod.

    Query ``i`` has position ``i + Lk - Lq`` among the keys.

    Args:
        score_mod: The user's function, or None.
        q: ``(B, Hq, Lq, D)``, queries.
        k: ``(B, Hkv, Lk, D)``, keys.
        token_of_slot: ``(B, Lk)`` int32, the token of each key if a layout moved the tokens to
            slots; None if they are in place.
    """
    if score_mod is None:
        return None
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    position = torch.arange(kv_len, dtype=torch.int32, device=q.device).expand(batch, -1)
    if token_of_slot is not None:
        position = token_of_slot.clamp(min=0)
    shape = batch, heads, q_len
    batch_index = torch.arange(batch, dtype=torch.int32, device=q.device)
    batch_index = batch_index[:, None, None].expand(shape)
    head = torch.arange(heads, dtype=torch.int32, device=q.device)[:, None].expand(shape)
    query = position[:, None, kv_len - q_len :].expand(shape)
    return ScoreModifier(
        score_mod,
        torch.stack([batch_index, head, query], dim=-1),
        position[:, None].expand(-1, kv_heads, -1),
        is_remapped=token_of_slot is not None or q_len != kv_len,
    )


def remap_indices(
    score_mod: ScoreMod, batch_index: Tensor, head: Tensor, position: Tensor, key_position: Tensor
) -> ScoreMod:
    """Returns a ``score_mod`` that translates a call's indices to those of the user's tensors.

    The tensors must be buffers that are not computed in the graph of the call.

    Args:
        score_mod: The user's function.
        batch_index: ``(B, Hq, Lq)`` int32 of the call's own sizes, the user's batch index.
        head: ``(B, Hq, Lq)`` int32, the user's query head.
        position: ``(B, Hq, Lq)`` int32, the user's query position.
        key_position: ``(B, Hq, Lk)`` int32, the user's key position.
    """

    def remapped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Before torch 2.13, the compiler takes a looked-up index for a scalar. That fails if
        # gradients reach a captured tensor at these indices. The zeros give it the shape.
        query_zero, key_zero = query - query, key - key
        return score_mod(
            score,
            batch_index[b, h, query] + query_zero,
            head[b, h, query] + query_zero,
            position[b, h, query] + query_zero,
            key_position[b, h, key] + key_zero,
        )

    return remapped


def apply_score_mod(score_mod: ScoreMod, scores: Tensor, *indices: Tensor) -> Tensor:
    """Applies a ``score_mod`` to each score separately, as FlexAttention does.

    Args:
        score_mod: The user's function.
        scores: Scaled scores of any shape.
        indices: ``b, h, q_idx, kv_idx``, int tensors that broadcast to the shape of ``scores``.

    Returns:
        The modified scores, in the shape and dtype of ``scores``.
    """
    flat = [x.expand(scores.shape).flatten() for x in (scores, *indices)]
    modified: Tensor = torch.vmap(checked_score_mod(score_mod))(*flat)
    return modified.view(scores.shape)


def checked_score_mod(score_mod: ScoreMod) -> ScoreMod:
    """Returns a ``score_mod`` that checks its result and casts it to the dtype of the score.

    FlexAttention casts the result in the same way.

    Raises:
        TypeError: The result is not a floating point tensor.
        ValueError: The result is not one score.
    """

    def modified(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = score_mod(score, b, h, query, key)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            kind = result.dtype if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(
                f"score_mod must return the modified score, a floating point tensor, got {kind}; "
                "for a mask, return torch.where(mask, score, -torch.inf)"
            )
        if result.shape != score.shape:
            raise ValueError(
                f"score_mod must return one score, a tensor of shape {tuple(score.shape)}, got "
                f"{tuple(result.shape)}; return a tensor of the shape of the score"
            )
        return result.to(score.dtype)

    return modified
