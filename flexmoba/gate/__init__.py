"""The gate: scores the mean keys of every block, and selects the best blocks for each query.

`moba_select` is the public function. `select_for_attention` returns the same selection without the
own block, which the backends add.
"""

from flexmoba.gate.options import Candidates, GateOptions, GateSizes
from flexmoba.gate.scores import block_means, block_scores, forced_blocks, top_blocks
from flexmoba.gate.select import (
    expand_rows,
    gate_rows,
    moba_select,
    select_by_means,
    select_for_attention,
    select_rows,
)

__all__ = [
    "Candidates",
    "GateOptions",
    "GateSizes",
    "block_means",
    "block_scores",
    "expand_rows",
    "forced_blocks",
    "gate_rows",
    "moba_select",
    "select_by_means",
    "select_for_attention",
    "select_rows",
    "top_blocks",
]
