"""What a ``score_mod`` sees: the batch row, head and positions of a score, wherever it is computed.

FlexAttention calls ``score_mod(score, b, h, q_idx, kv_idx)`` with the places in its own call. Rows
that were sorted by block, chunks of a longer sequence and documents laid out anew stand elsewhere
there than in the user's tensors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class ScoreModifier(NamedTuple):
    """A ``score_mod`` and the positions that it sees.

    Attributes:
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx) -> score``.
        place: ``(B, Hq, Lq, 3)`` int32, the batch row, head and position of each query.
        key_position: ``(B, Hkv, Lk)`` int32.
        moved: Whether a call with these tensors has its queries or keys at other places.
    """

    score_mod: ScoreMod
    place: Tensor
    key_position: Tensor
    moved: bool


def score_modifier(
    score_mod: ScoreMod | None, q: Tensor, k: Tensor, token_of_slot: Tensor | None
) -> ScoreModifier | None:
    """The modifier for a call with q and k; their tokens, ``(B, L)``, if they were laid out anew.

    Query ``i`` stands at position ``i + Lk - Lq`` among the keys.
    """
    if score_mod is None:
        return None
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    position = torch.arange(kv_len, dtype=torch.int32, device=q.device).expand(batch, -1)
    if token_of_slot is not None:
        position = token_of_slot.clamp(min=0)
    shape = batch, heads, q_len
    row = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None, None].expand(shape)
    head = torch.arange(heads, dtype=torch.int32, device=q.device)[:, None].expand(shape)
    query = position[:, None, kv_len - q_len :].expand(shape)
    return ScoreModifier(
        score_mod,
        torch.stack([row, head, query], dim=-1),
        position[:, None].expand(-1, kv_heads, -1),
        moved=token_of_slot is not None or q_len != kv_len,
    )


def at_positions(
    score_mod: ScoreMod, row: Tensor, head: Tensor, position: Tensor, key_position: Tensor
) -> ScoreMod:
    """A ``score_mod`` for a call of queries and keys that stand elsewhere in the user's tensors.

    The tensors tell where, for the call's own batch, query heads and positions. They must be
    buffers, not computed in the graph of the call.
    """

    def moved(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Before torch 2.13 the compiler takes what is looked up for a scalar, which fails where
        # gradients reach what is captured at such places: these zeros tell it the shape.
        of_query, of_key = query - query, key - key
        return score_mod(
            score,
            row[b, h, query] + of_query,
            head[b, h, query] + of_query,
            position[b, h, query] + of_query,
            key_position[b, h, key] + of_key,
        )

    return moved


def modify(score_mod: ScoreMod, scores: Tensor, *places: Tensor) -> Tensor:
    """A ``score_mod`` of many scores, whose places ``b, h, q_idx, kv_idx`` expand to them.

    Each is shown alone, as FlexAttention does.
    """
    flat = [x.expand(scores.shape).flatten() for x in (scores, *places)]
    modified: Tensor = torch.vmap(of_one_score(score_mod))(*flat)
    return modified.view(scores.shape)


def of_one_score(score_mod: ScoreMod) -> ScoreMod:
    """A ``score_mod`` whose result has the dtype of the score, as FlexAttention makes it.

    Raises:
        TypeError: It returns no floating point tensor.
        ValueError: It returns other than one score.
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
                f"{tuple(result.shape)}; it is called for each score alone"
            )
        return result.to(score.dtype)

    return modified
