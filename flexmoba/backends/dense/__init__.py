"""Full attention by torch's own dense kernels: cuDNN and FlashAttention on CUDA, and one on CPU."""

from flexmoba.backends.dense.operator import dense_attention, supports_dense

__all__ = ["dense_attention", "supports_dense"]
