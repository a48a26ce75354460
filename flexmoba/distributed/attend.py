"""Computes `flex_moba` of this rank's part of the user's tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.backends import ScoreMod
from flexmoba.local import attend_on_one_device


class Attention(NamedTuple):
    """Arguments of `flex_moba` that do not depend on the exchange.

    Attributes:
        block_size: Keys in a block.
        topk: Number of blocks that each query attends to, or None.
        score_mod: A function of every score, or None.
        is_causal: Must be True.
        options: The other keyword arguments.
    """

    block_size: int
    topk: int | None
    score_mod: ScoreMod | None
    is_causal: bool
    options: dict[str, Any]

    @property
    def described(self) -> dict[str, Any]:
        """The arguments by name."""
        return {**self._asdict(), **self.options, "options": None}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        first_head: int = 0,
        first_key: int = 0,
        **documents: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns output and log-sum-exp of the query heads from ``first_head`` on.

        ``first_key`` is the position of the first key.
        """
        score_mod = self.score_mod
        if score_mod is not None:
            score_mod = shifted(score_mod, q.device, first_head=first_head, first_key=first_key)
        none_by_default = {"cu_seqlens": None, "max_seqlen": None}
        out, aux = attend_on_one_device(
            q,
            k,
            v,
            self.block_size,
            self.topk,
            is_causal=self.is_causal,
            score_mod=score_mod,
            return_aux=AuxRequest(lse=True),
            cache=None,
            document_ids=None,
            key_padding_mask=None,
            **self.options,
            **none_by_default | documents,
        )
        assert aux.lse is not None
        return out, aux.lse


def shifted(
    score_mod: ScoreMod,
    device: torch.device,
    *,
    first_row: int = 0,
    first_head: int = 0,
    first_key: int = 0,
) -> ScoreMod:
    """Returns a ``score_mod`` for a call with some of the rows, heads and positions.

    Args:
        score_mod: The function for all rows and heads.
        device: Device of the call.
        first_row: The first row of the call.
        first_head: The first query head of the call.
        first_key: The position of the first key of the call.
    """
    # Tensors, because other numbers would compile again.
    row, head, first = (
        torch.full((), x, dtype=torch.int32, device=device)
        for x in (first_row, first_head, first_key)
    )

    def with_indices(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score_mod(score, b + row, h + head, query + first, key + first)

    return with_indices
