"""The backends: attention over a selection, each with a different implementation.

`resolve` picks the backend for a call, and `attend` runs it. `flex` uses FlexAttention, `fused`
uses Triton kernels, and `portable` uses plain tensor operations.
"""

from flexmoba.backends.attend import (
    attend,
    attend_selected,
    attend_without_lse,
    check_selected_values,
    window_attention,
)
from flexmoba.backends.choice import resolve, resolve_shared, why_not
from flexmoba.backends.flex import full_mask, range_attention, run_compiled, selection_mask
from flexmoba.backends.merge import merge_two
from flexmoba.backends.options import IMPLS, AttentionOptions, ImplName
from flexmoba.backends.score_mod import ScoreMod, apply_score_mod

__all__ = [
    "IMPLS",
    "AttentionOptions",
    "ImplName",
    "ScoreMod",
    "apply_score_mod",
    "attend",
    "attend_selected",
    "attend_without_lse",
    "check_selected_values",
    "full_mask",
    "merge_two",
    "range_attention",
    "resolve",
    "resolve_shared",
    "run_compiled",
    "selection_mask",
    "why_not",
    "window_attention",
]
