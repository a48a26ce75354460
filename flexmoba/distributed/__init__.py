"""Attention on several devices: context parallelism, where each device has a part of the tokens."""

from flexmoba.distributed.context_parallel import context_parallel_moba

__all__ = ["context_parallel_moba"]
