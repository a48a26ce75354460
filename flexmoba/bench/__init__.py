"""The benchmark: checks each configuration against float64, then times it and its baselines."""

from flexmoba.bench.calls import ROUNDINGS, describe, matrix_rate, measure
from flexmoba.bench.configs import PRESETS, Config
from flexmoba.bench.native_sparse import measure_nsa
from flexmoba.bench.report import line, plot, tables
from flexmoba.bench.steps import measure_step

__all__ = [
    "PRESETS",
    "ROUNDINGS",
    "Config",
    "describe",
    "line",
    "matrix_rate",
    "measure",
    "measure_nsa",
    "measure_step",
    "plot",
    "tables",
]
