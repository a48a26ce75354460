"""Calls `flex_moba` on some heads of the user's tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.attention import flex_moba
from flexmoba.backends import ScoreMod


class Attention(NamedTuple):
    """Arguments of `flex_moba` that do not depend on the exchange.

    Attributes:
        block_size: Keys in a block.
        topk: Number of blocks that each query attends to, or None.
        score_mod: A function of every score, or None.
        options: The other keyword arguments.
    """

    block_size: int
    topk: int | None
    score_mod: ScoreMod | None
    options: dict[str, Any]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, first_head: int = 0, **documents: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns output and log-sum-exp of the query heads from ``first_head`` on."""
        score_mod = self.score_mod
        if score_mod is not None:
            # A tensor, because another number would compile again.
            first = torch.full((), first_head, dtype=torch.int32, device=q.device)
            score_mod = shift_heads(score_mod, first)
        out, aux = flex_moba(
            q,
            k,
            v,
            self.block_size,
            self.topk,
            score_mod=score_mod,
            return_aux=AuxRequest(lse=True),
            **self.options,
            **documents,
        )
        assert aux.lse is not None
        return out, aux.lse


def shift_heads(score_mod: ScoreMod, first_head: Tensor) -> ScoreMod:
    """Returns a ``score_mod`` for a call with some of the heads, whose first is ``first_head``."""

    def shifted(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score_mod(score, b, h + first_head, query, key)

    return shifted
