"""Chooses the exchange: which tensors the ranks send to each other."""

from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from flexmoba.blocks import TILE

ExchangeName = Literal["auto", "gather", "heads", "blocks"]
NestedExchange = tuple[Literal["gather", "blocks"], Literal["heads"]]
EXCHANGES: tuple[ExchangeName, ...] = get_args(ExchangeName)
NESTED: tuple[NestedExchange, ...] = (("gather", "heads"), ("blocks", "heads"))


# Bytes per second on NVIDIA H100 GPUs of one node: received by a rank, and copied into place by
# "gather". docs/distributed.md has the measurements and the model that is fitted to them.
_LINK, _ARRANGE = 3.0e11, 1.8e11


class Shape(NamedTuple):
    """The part of a call that decides which exchanges support it.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of KV heads.
        lengths: Number of tokens of each rank.
        first_keys: For each rank, the position of the first key that its queries may attend to.
        gate: The name of the gate.
    """

    heads: int
    kv_heads: int
    lengths: tuple[int, ...]
    first_keys: tuple[int, ...]
    gate: str


def check_exchange_name(exchange: str | tuple[str, str]) -> None:
    """Raises unless the exchange exists."""
    known = (*EXCHANGES, *NESTED)
    if exchange not in known:
        raise ValueError(f"exchange must be one of {', '.join(map(repr, known))}, got {exchange!r}")


def resolve_exchange(
    exchange: Literal["auto", "gather", "heads"], shape: Shape
) -> Literal["gather", "heads"]:
    """Returns the named exchange, or for ``"auto"`` the one that adds less time.

    Raises:
        NotImplementedError: The named exchange does not support the call, or none does.
    """
    no_gather, no_heads = why_not_gather(shape), why_not_heads(shape)
    if exchange == "auto":
        if no_heads is None:
            return "heads" if no_gather or _heads_adds_less(shape) else "gather"
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
    if shape.gate == "tile" and any(before % TILE for before in _keys_before(shape)):
        return (
            f'with gate="tile" needs shards that begin at multiples of {TILE} of a sequence or '
            f"document, got lengths {list(shape.lengths)}"
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


def _heads_adds_less(shape: Shape) -> bool:
    """Returns whether ``"heads"`` adds less time to the attention of a forward call.

    The cost model of `estimate` hides what ``"gather"`` receives, except the first chunk, and adds
    the copies of all keys of the rank that needs most. A rank does nothing while it receives by
    ``"heads"`` its share of all heads of q, k, v and the output, of the tokens of all others. The
    unit is a token of one KV head.
    """
    ranks = len(shape.lengths)
    others = sum(shape.lengths) * (ranks - 1) / ranks
    received = others * (shape.heads + max(shape.kv_heads, ranks)) / ranks
    gathered = max(
        before + length if before else 0
        for before, length in zip(_keys_before(shape), shape.lengths, strict=True)
    )
    return received / _LINK < gathered * shape.kv_heads / _ARRANGE


def _keys_before(shape: Shape) -> list[int]:
    """Returns the number of keys before its own ones that each rank needs."""
    firsts = accumulate(shape.lengths, initial=0)
    return [first - needed for first, needed in zip(firsts, shape.first_keys, strict=False)]
