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


class Modifier(NamedTuple):
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


def modifier_of(
    score_mod: ScoreMod | None, q: Tensor, k: Tensor, token_of_slot: Tensor | None
) -> Modifier | None:
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
    return Modifier(
        score_mod,
        torch.stack([row, head, query], dim=-1),
        position[:, None].expand(-1, kv_heads, -1),
        moved=token_of_slot is not None or q_len != kv_len,
    )


def at_places(score_mod: ScoreMod, place: Tensor, key_position: Tensor) -> ScoreMod:
    """A ``score_mod`` for a call of queries that stand at ``place`` and keys at ``key_position``.

    Both must be buffers, not computed in the graph of the call; they have the call's own batch
    and heads, those of queries.
    """

    def moved(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score_mod(
            score,
            place[b, h, query, query * 0],
            place[b, h, query, query * 0 + 1],
            place[b, h, query, query * 0 + 2],
            key_position[b, h, key],
        )

    return moved


def modify(score_mod: ScoreMod, scores: Tensor, *places: Tensor) -> Tensor:
    """A ``score_mod`` of many scores, whose places ``b, h, q_idx, kv_idx`` expand to them.

    Each is shown alone, as FlexAttention does.
    """
    flat = [x.expand(scores.shape).flatten() for x in (scores, *places)]
    modified: Tensor = torch.vmap(score_mod)(*flat)
    return modified.view(scores.shape)
