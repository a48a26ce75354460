"""The cost model: its counts against a count one by one, and its limits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoba.distributed import Machine, SpreadCall, estimate
from flexmoba.distributed.cost import attended_pairs, chunks_of, received_bytes, scored_means
from flexmoba.distributed.plan import first_keys, plan_of
from flexmoba.distributed.ranks import Ranks

CALL = SpreadCall(heads=32, kv_heads=8, length=2**20, block_size=4096, topk=12)
FREE = Machine(1e15, 1e15, math.inf, math.inf, 8)


@given(st.integers(0, 60), st.integers(1, 9), st.none() | st.integers(1, 5))
def test_counts(n, block_size, topk):
    call = SpreadCall(4, 2, 60, block_size, topk)
    past = [i // block_size for i in range(n)]
    if topk is None:
        assert attended_pairs(call, n) == sum(i + 1 for i in range(n))
        assert scored_means(call, n) == 0
        return
    pairs = (min(topk - 1, past[i]) * block_size + i % block_size + 1 for i in range(n))
    assert attended_pairs(call, n) == sum(pairs)
    is_full = topk >= math.ceil(60 / block_size)
    scored = 0 if is_full else sum(past)
    assert scored_means(call, n) == scored
    assert scored_means(call._replace(gate_block_size=1), n) == block_size * scored


def test_sub_blocks_divide_blocks():
    with pytest.raises(ValueError, match="gate_block_size=7 and block_size=4096; pass a divisor"):
        estimate(CALL._replace(gate_block_size=7), 2, FREE, "gather")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_bytes_are_those_of_the_plan(ranks):
    shards = Ranks(None, ranks - 1, (CALL.length // ranks,) * ranks)
    plan = plan_of(shards, first_keys(shards, None), None, None)
    features = CALL.kv_heads * 2 * CALL.head_dim * CALL.element_size
    assert received_bytes(CALL, ranks, "gather") == sum(plan.received(ranks - 1)) * features
    # As in docs/distributed.md, in GiB.
    assert received_bytes(CALL, 2, "heads") == 5 * 2**30
    assert received_bytes(CALL, 8, "heads") == 2.1875 * 2**30
    assert chunks_of(CALL) == 8


@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("backward", [False, True])
def test_without_communication_it_scales(exchange, backward):
    alone = estimate(CALL, 1, FREE, exchange, backward=backward)
    eight = estimate(CALL, 8, FREE, exchange, backward=backward)
    assert eight.communication == 0
    assert eight.exposed == pytest.approx(0)
    # The last rank scores more blocks, and the first queries have few blocks to attend to.
    assert alone.total / eight.total == pytest.approx(8, rel=0.15 if exchange == "gather" else 1e-9)


def test_a_pipeline_hides_communication_until_it_is_the_limit():
    alone = estimate(CALL, 2, FREE, "gather")
    moved = received_bytes(CALL, 2, "gather")
    for share in (0.1, 0.5, 1.0, 3.0):  # of the time of computation
        machine = FREE._replace(link=moved / (share * alone.compute))
        found = estimate(CALL, 2, machine, "gather")
        step = max(share, 1) * alone.compute / 8
        assert found.total == pytest.approx(min(share, 1) * alone.compute / 8 + 8 * step)
        assert found.communication == pytest.approx(share * alone.compute)
    slow = machine._replace(ranks_per_node=1, network=machine.link / 10)
    assert estimate(CALL, 2, slow, "gather").communication > 9 * found.communication


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_copies_and_chunks_add_time(ranks):
    slow = FREE._replace(arrange=1e11, chunk_overhead=0.05)
    gathered = CALL.kv_heads * CALL.length * 2 * CALL.head_dim * CALL.element_size
    copies = gathered / 1e11 if ranks > 1 else 0.0
    forward, both = (estimate(CALL, ranks, FREE, "gather", backward=x).compute for x in (0, 1))
    slower = 0.05 * (both - forward) if ranks > 1 else 0.0
    for backward, added in ((False, copies), (True, 2 * copies + slower)):
        before, found = (
            estimate(CALL, ranks, machine, "gather", backward=backward) for machine in (FREE, slow)
        )
        assert found.total - before.total == pytest.approx(added)
        assert found.compute == before.compute
        heads = [estimate(CALL, ranks, x, "heads", backward=backward) for x in (FREE, slow)]
        assert heads[0] == heads[1]
    blocks = estimate(CALL, ranks, slow, "blocks", fetched=0.5)
    share = 1 / ranks + (1 - 1 / ranks) / 2
    assert blocks.total - blocks.compute == pytest.approx(share * copies)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_longest_rank_of_many_has_little_more_work_than_the_mean(ranks):
    """Queries of the first blocks have fewer blocks before them: docs/distributed.md has 2.4 %."""
    pairs = attended_pairs(CALL, CALL.length)
    last = pairs - attended_pairs(CALL, CALL.length - CALL.length // ranks)
    assert 0.02 < last / (pairs / ranks) - 1 < 0.024


def test_blocks_moves_a_share_of_the_bytes():
    slow = Machine(4e14, 4e14, link=1e10, network=1e9, ranks_per_node=8)
    gather, everything, half = (
        estimate(CALL, 16, slow, exchange, fetched=fetched)
        for exchange, fetched in (("gather", 1.0), ("blocks", 1.0), ("blocks", 0.5))
    )
    assert everything == gather
    assert half.communication == pytest.approx(gather.communication / 2)
    assert half.compute == gather.compute
    backward = estimate(CALL, 16, slow, "blocks", fetched=0.5, backward=True)
    assert backward.communication == pytest.approx(gather.communication)
    assert backward.exposed == pytest.approx(1 - backward.compute / backward.total)


def test_a_pair_receives_a_share_of_the_heads_from_other_nodes():
    slow = Machine(4e14, 4e14, link=math.inf, network=1e9, ranks_per_node=8)
    alone = estimate(CALL, 64, slow, "gather", backward=True)
    pair = estimate(CALL, 64, slow, ("gather", "heads"), backward=True)
    # A rank has one of 8 KV heads, of 7 nodes instead of 56 ranks.
    assert pair.communication == pytest.approx(alone.communication / 8)
    assert pair.compute == pytest.approx(alone.compute, rel=0.03)
    within = estimate(CALL, 8, slow._replace(link=1e10), ("gather", "heads"), backward=True)
    heads = estimate(CALL, 8, slow._replace(link=1e10), "heads", backward=True)
    assert within == pytest.approx(heads)


def test_heads_wins_among_many_ranks():
    machine = Machine(4e14, 4e14, link=1e11, network=1e10, ranks_per_node=8)
    totals = {
        ranks: [estimate(CALL, ranks, machine, x).total for x in ("gather", "heads")]
        for ranks in (2, 32)
    }
    assert totals[2][0] < totals[2][1]
    assert totals[32][0] > totals[32][1]
