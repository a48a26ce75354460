"""Attention on several devices: context parallelism, where each device has a part of the tokens."""

from flexmoba.distributed.cache import ShardedMobaCache
from flexmoba.distributed.context_parallel import context_parallel_moba
from flexmoba.distributed.cost import Machine, SpreadCall, estimate
from flexmoba.distributed.dtensors import attend_to_dtensors
from flexmoba.distributed.shards import ContextParallel, SequenceShards

__all__ = [
    "ContextParallel",
    "Machine",
    "SequenceShards",
    "ShardedMobaCache",
    "SpreadCall",
    "attend_to_dtensors",
    "context_parallel_moba",
    "estimate",
]
