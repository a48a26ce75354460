"""Native Sparse Attention (NSA, arXiv 2502.11089), composed of the functions of other rooms.

`flex_nsa` computes the attention, `nsa_select` its selection, and `nsa_reference` is the oracle.
"""

from flexmoba.nsa.attention import flex_nsa
from flexmoba.nsa.reference import nsa_reference
from flexmoba.nsa.select import nsa_select

__all__ = ["flex_nsa", "nsa_reference", "nsa_select"]
