"""Native Sparse Attention (NSA, arXiv 2502.11089).

`flex_nsa` computes the attention, `nsa_select` its selection, `NsaCache` decodes, and
`nsa_reference` is the oracle.
"""

from flexmoba.nsa.attention import flex_nsa
from flexmoba.nsa.branches import block_means_of
from flexmoba.nsa.cache import NsaCache
from flexmoba.nsa.checks import check_sizes, check_window
from flexmoba.nsa.flops import seen_pairs
from flexmoba.nsa.layout import nsa_layout
from flexmoba.nsa.reference import nsa_reference
from flexmoba.nsa.select import nsa_select
from flexmoba.nsa.sizes import NsaSizes

__all__ = [
    "NsaCache",
    "NsaSizes",
    "block_means_of",
    "check_sizes",
    "check_window",
    "flex_nsa",
    "nsa_layout",
    "nsa_reference",
    "nsa_select",
    "seen_pairs",
]
