"""Chooses the exchange: which tensors the ranks send to each other."""

from typing import Literal, NamedTuple, get_args

from flexmoba.blocks import TILE

ExchangeName = Literal["auto", "gather", "heads"]
EXCHANGES: tuple[ExchangeName, ...] = get_args(ExchangeName)


class Shape(NamedTuple):
    """The part of a call that decides which exchanges support it.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of KV heads.
        lengths: Number of tokens of each rank.
        gate: The name of the gate.
        has_documents: Whether the call has ``cu_seqlens``.
    """

    heads: int
    kv_heads: int
    lengths: tuple[int, ...]
    gate: str
    has_documents: bool


def check_exchange_name(exchange: str) -> None:
    """Raises unless the exchange exists."""
    if exchange not in EXCHANGES:
        raise ValueError(
            f"exchange must be one of {', '.join(map(repr, EXCHANGES))}, got {exchange!r}"
        )


def resolve_exchange(exchange: ExchangeName, shape: Shape) -> Literal["gather", "heads"]:
    """Returns the named exchange, or for ``"auto"`` the one that moves fewer bytes.

    Raises:
        NotImplementedError: The named exchange does not support the call, or none does.
    """
    no_gather, no_heads = why_not_gather(shape), why_not_heads(shape)
    if exchange == "auto":
        if no_heads is None:
            return "heads" if no_gather or _heads_moves_less(shape) else "gather"
        if no_gather is None:
            return "gather"
        raise NotImplementedError(
            f'exchange="gather" {no_gather}, and exchange="heads" {no_heads}; change the number '
            "of ranks or one of these values"
        )
    reason = no_gather if exchange == "gather" else no_heads
    if reason is not None:
        other = "heads" if exchange == "gather" else "gather"
        raise NotImplementedError(f'exchange="{exchange}" {reason}; use exchange="{other}"')
    return exchange


def why_not_gather(shape: Shape) -> str | None:
    """Returns the reason why ``"gather"`` does not support a call, or None if it does."""
    if shape.has_documents:
        return "does not support cu_seqlens"
    starts = (sum(shape.lengths[:rank]) for rank, n in enumerate(shape.lengths) if n > 0)
    if shape.gate == "tile" and any(start % TILE for start in starts):
        return (
            f'with gate="tile" needs shards that begin at multiples of {TILE}, got lengths '
            f"{list(shape.lengths)}"
        )
    return None


def why_not_heads(shape: Shape) -> str | None:
    """Returns the reason why ``"heads"`` does not support a call, or None if it does."""
    heads, kv_heads, ranks = shape.heads, shape.kv_heads, len(shape.lengths)
    if kv_heads % ranks == 0:
        return None
    if ranks % kv_heads != 0 or heads % ranks != 0:
        return (
            f"needs a number of ranks that divides the KV heads, or that divides the query heads "
            f"and is a multiple of the KV heads, got {ranks} ranks, Hq={heads} and Hkv={kv_heads}"
        )
    if shape.gate == "group":
        return (
            f'with gate="group" needs a number of ranks that divides the KV heads, got {ranks} '
            f"ranks and Hkv={kv_heads}"
        )
    return None


def _heads_moves_less(shape: Shape) -> bool:
    """Returns whether a rank receives fewer bytes in the forward call by ``"heads"``.

    Relative to the bytes of one KV head of one shard, a rank receives keys and values of all other
    shards, or its share of all heads of q, k, v and the output.
    """
    ranks = len(shape.lengths)
    return (shape.heads + max(shape.kv_heads, ranks)) / ranks < shape.kv_heads
