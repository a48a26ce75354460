"""The benchmark: checks each configuration against float64, then times it and its baselines."""

from flexmoba.bench.baselines import FLASH_VERSIONS, why_not_flash
from flexmoba.bench.calls import ROUNDINGS, describe, failure, matrix_rate, measure
from flexmoba.bench.configs import PRESETS, Config
from flexmoba.bench.native_sparse import measure_nsa
from flexmoba.bench.paged import measure_paged
from flexmoba.bench.report import line, plot, tables, targets
from flexmoba.bench.steps import measure_step
from flexmoba.bench.training import measure_training

__all__ = [
    "FLASH_VERSIONS",
    "PRESETS",
    "ROUNDINGS",
    "Config",
    "describe",
    "failure",
    "line",
    "matrix_rate",
    "measure",
    "measure_nsa",
    "measure_paged",
    "measure_step",
    "measure_training",
    "plot",
    "tables",
    "targets",
    "why_not_flash",
]
