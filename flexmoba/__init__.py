"""Mixture of Block Attention (MoBA, arXiv 2502.13189) in pure PyTorch on FlexAttention."""

from flexmoba.reference import moba_reference

__version__ = "0.1.0.dev0"
__all__ = ["moba_reference"]
