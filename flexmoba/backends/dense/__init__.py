"""Full attention by torch's own dense kernels: cuDNN and FlashAttention on CUDA, and one on CPU."""

from flexmoba.backends.dense.operator import dense_attention, supports_dense
from flexmoba.backends.dense.with_gradients import dense_with_gradients, supports_dense_gradients

__all__ = [
    "dense_attention",
    "dense_with_gradients",
    "supports_dense",
    "supports_dense_gradients",
]
