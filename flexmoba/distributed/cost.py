"""The cost model: seconds of computation and of communication of a call on a machine.

It counts operations and bytes, and divides them by rates of the machine, which are measured or
assumed by the user. `examples/scaling.py` measures them.
"""

import math
from typing import Literal, NamedTuple

from flexmoba.blocks import ceil_div
from flexmoba.checks import check_gate_block_size
from flexmoba.distributed import gather
from flexmoba.distributed.choice import NestedExchange


class Machine(NamedTuple):
    """Rates of a machine with several devices.

    Attributes:
        forward_flops: Floating point operations per second of the attention, forward.
        backward_flops: The same of the backward pass.
        link: Bytes per second that a rank receives from ranks of its node.
        network: Bytes per second that a rank receives from ranks of other nodes.
        ranks_per_node: Number of ranks of a node.
        latency: Seconds of a collective that sends nothing.
        arrange: Bytes per second at which a rank copies gathered keys and values into place.
        chunk_overhead: Share by which the backward pass takes longer in the chunks of
            ``"gather"`` than in one call.
    """

    forward_flops: float
    backward_flops: float
    link: float
    network: float
    ranks_per_node: int
    latency: float = 0.0
    arrange: float = math.inf
    chunk_overhead: float = 0.0


class SpreadCall(NamedTuple):
    """A call of `context_parallel_moba` with shards of equal length.

    Attributes:
        heads: Number of query heads ``Hq``.
        kv_heads: Number of KV heads ``Hkv``.
        length: Tokens of all ranks.
        block_size: Keys in a block.
        topk: Number of blocks that each query attends to, or None for full attention.
        head_dim: Head dim of queries, keys and values.
        element_size: Bytes of an element.
        batch: Rows of the batch.
        gate_block_size: Keys in a sub-block, or None for blocks without sub-blocks.
    """

    heads: int
    kv_heads: int
    length: int
    block_size: int
    topk: int | None
    head_dim: int = 128
    element_size: int = 2
    batch: int = 1
    gate_block_size: int | None = None


class Cost(NamedTuple):
    """Seconds of a call on the rank that takes longest.

    Attributes:
        compute: Seconds of the attention and the gate, of all heads in one call.
        communication: Seconds of the exchanges, hidden or not.
        total: Seconds of the call.
    """

    compute: float
    communication: float
    total: float

    @property
    def exposed(self) -> float:
        """The share of the time that is not computation: waiting, copies, and chunks."""
        return 1 - self.compute / self.total if self.total > 0 else 0.0


def estimate(
    call: SpreadCall,
    ranks: int,
    machine: Machine,
    exchange: Literal["gather", "heads", "blocks"] | NestedExchange,
    *,
    backward: bool = False,
    fetched: float = 1.0,
) -> Cost:
    """Returns the modeled cost of a forward call, or of a forward with backward.

    The rank that takes longest is the last one. Each query attends to at most ``topk`` blocks and
    scores the mean keys of all past sub-blocks, which takes more operations on later ranks.

    - ``"gather"``: the last rank receives the keys and values of ``ranks - 1`` shards. While it
      attends with a chunk of KV heads, it receives the next one. It copies each chunk into place
      before it attends. The backward pass receives and copies them again and sends as many
      gradients, which the ranks before receive.
    - ``"heads"``: a rank receives its share of the heads of q, k and v, and later of the output.
      Nothing else happens at that time. The backward pass exchanges as many bytes again.
    - ``"blocks"``: as ``"gather"``, with a share of the bytes. The backward pass sends gradients
      alone, and nothing else happens at that time.
    - A pair: ``"heads"`` within the nodes, and the first exchange between nodes, of the share of
      the heads of a rank.

    Args:
        call: The call.
        ranks: Number of ranks; ``"heads"`` must support it.
        machine: Rates of the machine.
        exchange: The exchange.
        backward: Whether to add the backward pass.
        fetched: The share of the blocks before a rank that its queries select, for ``"blocks"``.

    Returns:
        The cost.

    Raises:
        ValueError: ``gate_block_size`` does not divide ``block_size``.

    Examples:
        >>> from flexmoba.distributed import Machine, SpreadCall, estimate
        >>> call = SpreadCall(heads=32, kv_heads=8, length=2**20, block_size=4096, topk=12)
        >>> machine = Machine(4e14, 4e14, link=1e11, network=2e10, ranks_per_node=8)  # assumed
        >>> alone, two = (estimate(call, n, machine, "gather").total for n in (1, 2))
        >>> 1.5 < alone / two < 2
        True
    """
    if isinstance(exchange, tuple):
        of_node = min(ranks, machine.ranks_per_node)
        nodes = ranks // of_node
        share = call._replace(
            heads=call.heads // of_node, kv_heads=max(1, call.kv_heads // of_node)
        )
        between = machine._replace(link=machine.network, ranks_per_node=1)
        cost = estimate(share, nodes, between, exchange[0], backward=backward, fetched=fetched)
        within = call._replace(length=call.length // nodes)
        moved = received_bytes(within, of_node, "heads")
        seconds = (moved / machine.link + 2 * machine.latency * (of_node > 1)) * (1 + backward)
        return Cost(cost.compute, cost.communication + seconds, cost.total + seconds)
    tokens = call.length // ranks
    first = 0 if exchange == "heads" else call.length - tokens
    heads = call.heads / ranks if exchange == "heads" else call.heads
    pairs = attended_pairs(call, call.length) - attended_pairs(call, first)
    scored = scored_means(call, call.length) - scored_means(call, first)
    products = 2 * call.batch * heads * call.head_dim
    forward_compute = products * (2 * pairs + scored) / machine.forward_flops
    backward_compute = products * 5 * pairs / machine.backward_flops
    moved = received_bytes(call, ranks, exchange)
    if exchange == "blocks":
        moved *= fetched
    each = _seconds(moved, ranks, machine)
    chunks = chunks_of(call)
    latency = machine.latency * (ranks > 1)
    if exchange == "heads":
        parts = [_in_turn(x, each + 2 * latency) for x in (forward_compute, backward_compute)]
    else:
        gathered = received_bytes(call, ranks, exchange) / (ranks - 1) + moved if ranks > 1 else 0.0
        copies = gathered / machine.arrange
        slower = backward_compute * machine.chunk_overhead * (ranks > 1)
        parts = [_pipelined(forward_compute, copies, chunks, each / chunks + latency)]
        if exchange == "gather":
            step = 2 * (each / chunks + latency)
            parts += [_pipelined(backward_compute, copies + slower, chunks, step)]
        else:
            parts += [_in_turn(backward_compute, each + chunks * latency, slower)]
    return Cost(*(sum(values) for values in zip(*parts[: 1 + backward], strict=True)))


def _in_turn(compute: float, communication: float, more: float = 0.0) -> Cost:
    return Cost(compute, communication, compute + more + communication)


def _pipelined(compute: float, more: float, chunks: int, step: float) -> Cost:
    """Returns the cost of a pass whose chunks each communicate for ``step`` seconds.

    The chunks together take ``compute + more`` seconds of the device.
    """
    busy = (compute + more) / chunks
    # A pipeline: the first chunk comes before any computation, the last one is followed by it.
    total = step + (chunks - 1) * max(step, busy) + busy
    return Cost(compute, chunks * step, total)


def received_bytes(call: SpreadCall, ranks: int, exchange: str) -> float:
    """Returns the bytes that the last rank receives in the forward call."""
    others = call.batch * call.length * (ranks - 1) / ranks  # tokens
    features = 2 * call.head_dim * call.element_size
    if exchange == "heads":
        return others * features * (call.heads + max(call.kv_heads, ranks)) / ranks
    return others * features * call.kv_heads


def _seconds(moved: float, ranks: int, machine: Machine) -> float:
    """Returns the seconds in which a rank receives bytes, evenly from all other ranks."""
    if ranks == 1:
        return 0.0
    near = (min(ranks, machine.ranks_per_node) - 1) / (ranks - 1)
    return moved * max(near / machine.link, (1 - near) / machine.network)


def attended_pairs(call: SpreadCall, n: int) -> float:
    """Returns the query-key pairs of one head among the first ``n`` queries."""
    if call.topk is None:
        return n * (n + 1) / 2
    blocks, rest = divmod(n, call.block_size)
    size, past = call.block_size, call.topk - 1
    full = blocks * size * (size + 1) / 2 + size * size * _sum_of_least(blocks, past)
    return full + rest * (rest + 1) / 2 + rest * min(past, blocks) * size


def scored_means(call: SpreadCall, n: int) -> float:
    """Returns the pairs of a query and a mean key of one head, of the first ``n`` queries."""
    sub_blocks = check_gate_block_size(call.gate_block_size, call.block_size)
    if call.topk is None or call.topk >= ceil_div(call.length, call.block_size):
        return 0.0
    blocks, rest = divmod(n, call.block_size)
    return (call.block_size * blocks * (blocks - 1) / 2 + rest * blocks) * sub_blocks


def _sum_of_least(n: int, bound: int) -> float:
    """Returns the sum of ``min(i, bound)`` for ``i`` from 0 to ``n - 1``."""
    least = min(n, bound)
    return least * (least - 1) / 2 + (n - least) * bound


def chunks_of(call: SpreadCall) -> int:
    """Returns the number of chunks of KV heads of ``"gather"``."""
    per_head = 2 * call.batch * call.length * call.head_dim * call.element_size
    return ceil_div(call.kv_heads, max(1, gather.BYTES_AT_ONCE // per_head))
