"""A simulation of load on the scheduler of transformers' continuous batching, on CPU.

Requests arrive at random, some share a prefix, some are cancelled, and the cache is so small that
requests are evicted. A simulated clock advances by `STEP` with each batch. The engine runs in this
thread, so that a seed repeats a run. An hour of arrivals takes minutes:

    FLEXMOBA_SECONDS=3600 python -m pytest -s -m slow tests/test_load.py -k "[0]"
"""

import os
import queue
import random
import resource
from itertools import count

import pytest
import torch

pytest.importorskip("transformers")

from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestStatus

from flexmoba.integrations.transformers import convert
from tests.test_batching import BLOCK, GREEDY
from tests.tiny_models import VOCABULARY, model_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_pieces")]

SECONDS = int(os.environ.get("FLEXMOBA_SECONDS", "180"))  # simulated
STEP = 0.1  # simulated seconds of a batch
RATES = (1, 3, 0.3)  # arrivals in a second, of one minute each, in turn
CANCELLATIONS = 0.2  # in a second
BLOCKS, LONGEST = 24, 150


class Load:
    """Requests that a seed determines, and an engine that serves them step by step."""

    def __init__(self, model, seed: int) -> None:
        self.random, self.ids = random.Random(seed), count()
        self.now, self.arrived = 0.0, 0
        self.next_arrival = 0.0
        self.prompts: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}  # of the answers
        self.running: set[str] = set()
        self.cancelled: set[str] = set()
        self.prefixes = [self.tokens(self.random.randrange(20, 60)) for _ in range(3)]
        config = ContinuousBatchingConfig(
            page_size=BLOCK, num_blocks=BLOCKS, max_batch_tokens=48, max_requests_per_batch=6
        )
        self.manager = model.init_continuous_batching(
            generation_config=GREEDY, continuous_batching_config=config
        )
        self.engine = self.manager.batch_processor = self.manager._create_batch_processor()

    def tokens(self, n: int) -> list[int]:
        return [self.random.randrange(1, VOCABULARY) for _ in range(n)]

    def advance(self) -> None:
        """Advances the clock by a step. Requests of this time arrive, or are cancelled."""
        self.now += STEP
        while self.next_arrival < min(self.now, SECONDS):
            self.arrive()
            rate = RATES[int(self.next_arrival // 60) % len(RATES)]
            self.next_arrival += self.random.expovariate(rate)
        if self.random.random() < CANCELLATIONS * STEP:
            self.cancel()

    def arrive(self) -> None:
        self.arrived += 1
        name, length = f"request {next(self.ids)}", self.random.randrange(1, 24)
        prompt = self.tokens(self.random.choice((3, 20, 60, LONGEST - 24)))
        if self.random.random() < 0.4:
            prompt = [*self.random.choice(self.prefixes), *prompt[:30]]
        self.prompts[name], self.lengths[name] = prompt, length
        self.running.add(name)
        self.manager.add_request(prompt, request_id=name, max_new_tokens=length)

    def cancel(self) -> None:
        if self.running:
            name = self.random.choice(sorted(self.running))
            self.running.remove(name)
            self.cancelled.add(name)
            self.manager.cancel_request(name)

    def step(self) -> list:
        """Computes one batch, and returns the outputs of requests that have ended."""
        if self.engine.prepare_next_batch():
            self.manager._generation_step()
            self.engine.update_batch()
        else:
            assert not self.engine.has_pending_requests(), "the engine waits forever"
        outputs = []
        while True:
            try:
                outputs.append(self.manager.output_router.output_queue.get_nowait())
            except queue.Empty:
                break
        self.running -= {x.request_id for x in outputs}
        return outputs


def free_blocks(cache) -> int:
    """Returns the free blocks of a cache, after the blocks kept for prefixes are evicted."""
    cache.evict_cached_blocks()
    (allocator,) = cache.cache_allocators.values()
    blocks = cache.pool.num_free_sectors * allocator.blocks_per_sector
    return blocks + cache.pool.count_free_blocks(allocator.index)


@torch.no_grad()
@pytest.mark.parametrize(("seed", "gate_block_size"), [(0, None), (1, 2)], ids=["0", "1"])
def test_no_wrong_token_no_lost_page_and_flat_memory(monkeypatch, seed, gate_block_size):
    offload, evictions = OffloadingManager.offload_requests, []

    def counted(manager):
        evictions.append(offload(manager))
        return evictions[-1]

    monkeypatch.setattr(OffloadingManager, "offload_requests", counted)
    options = {"sink_blocks": 0, "gate_block_size": gate_block_size}
    model = convert(model_of("llama", dtype=torch.float64), BLOCK, [3, 2], **options)
    load = Load(model, seed)
    cache, matches, peaks = load.engine.cache, 0, []
    all_blocks, finished = free_blocks(cache), 0
    search = cache.search_prefix_match

    def counted_match(*args):
        nonlocal matches
        found = search(*args)
        matches += found > 0
        return found

    monkeypatch.setattr(cache, "search_prefix_match", counted_match)
    while load.now < SECONDS or load.running or load.engine.has_pending_requests():
        load.advance()
        for output in load.step():
            name, new = output.request_id, output.generated_tokens
            assert not output.error
            if output.status == RequestStatus.FINISHED and name not in load.cancelled:
                finished += 1
                assert len(new) == load.lengths[name]
            prompt = load.prompts.pop(name)
            if new:
                logits = model(torch.tensor([prompt + new[:-1]]), use_cache=False).logits
                assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == new
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB on Linux
    grown = peaks[-1] - peaks[len(peaks) // 3]
    print(
        f"\nseed {seed}: {load.arrived} requests in {load.now:.0f} simulated seconds and "
        f"{len(peaks)} batches, {finished} finished, {len(load.cancelled)} cancelled, "
        f"{sum(evictions)} evictions, {matches} shared prefixes, memory grew by {grown / 1024:.1f} "
        "MiB in the last two thirds"
    )
    assert finished + len(load.cancelled) >= load.arrived
    assert free_blocks(cache) == all_blocks
    (allocator,) = cache.cache_allocators.values()
    assert not allocator.block_table
    assert not load.engine.scheduler.active_requests
    assert grown < 2**15, "memory grows"
    # The load covers what it should.
    assert matches > load.arrived // 20
    assert sum(evictions) > load.arrived // 20
    assert load.cancelled
