"""Which keys each rank needs from the ranks before, with or without packed documents."""

from bisect import bisect_right
from typing import NamedTuple

from torch import Tensor

from flexmoba.distributed.ranks import Ranks


class Part(NamedTuple):
    """Consecutive queries of this rank that attend in one call.

    Attributes:
        queries: The queries, as a slice of this rank's tokens.
        first_key: The position of the first key in the complete sequence. The last key is that of
            the last query.
        cu_seqlens: Boundaries of the documents in the keys; None for one document.
    """

    queries: slice
    first_key: int
    cu_seqlens: Tensor | None


class Plan(NamedTuple):
    """The keys that each rank needs from the ranks before, and the calls of this rank.

    Attributes:
        ranks: The ranks.
        first_keys: For each rank, the position of the first key that it needs.
        parts: The calls of this rank. Their keys are disjoint and in order.
    """

    ranks: Ranks
    first_keys: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def sends_nothing(self) -> bool:
        """Whether no rank needs keys of another one."""
        return self.first_keys == self.ranks.firsts

    def received(self, rank: int) -> list[int]:
        """Returns the number of keys that a rank receives from each rank, always its last ones."""
        ranks = self.ranks
        return [
            max(0, first + length - max(self.first_keys[rank], first)) if sender < rank else 0
            for sender, (first, length) in enumerate(zip(ranks.firsts, ranks.lengths, strict=True))
        ]

    def sent(self) -> list[int]:
        """Returns the number of keys that this rank sends to each rank, always its last ones."""
        return [self.received(rank)[self.ranks.rank] for rank in range(self.ranks.size)]


def first_keys(ranks: Ranks, boundaries: list[int] | None) -> tuple[int, ...]:
    """Returns the position of the first key that each rank needs.

    Args:
        ranks: The ranks.
        boundaries: The boundaries of packed documents; None for one sequence.
    """
    found = []
    for first, length in zip(ranks.firsts, ranks.lengths, strict=True):
        if length == 0:
            found.append(first)
        elif boundaries is None:
            found.append(0)
        else:
            found.append(boundaries[bisect_right(boundaries, first) - 1])
    return tuple(found)


def plan_of(
    ranks: Ranks, needed: tuple[int, ...], boundaries: list[int] | None, cu_seqlens: Tensor | None
) -> Plan:
    """Returns the plan of a call.

    Args:
        ranks: The ranks.
        needed: The result of `first_keys`.
        boundaries: The boundaries of packed documents; None for one sequence.
        cu_seqlens: The same as a tensor.
    """
    first, length, start = ranks.first, ranks.length, needed[ranks.rank]
    if boundaries is None or cu_seqlens is None:
        return Plan(ranks, needed, (Part(slice(0, length), start, None),))
    # The queries of a document that begins before this rank attend like a chunk of one sequence.
    spanning = 0
    if start < first:
        spanning = min(length, boundaries[bisect_right(boundaries, first)] - first)
    parts = []
    if spanning > 0:
        parts.append(Part(slice(0, spanning), start, None))
    if spanning < length or length == 0:
        after = first + spanning
        rest = cu_seqlens.clamp(after, first + length) - after
        parts.append(Part(slice(spanning, length), after, rest))
    return Plan(ranks, needed, tuple(parts))
