"""Choosing block size and topk for a model's own queries and keys, on this device."""

from flexmoba.tune.calls import Call, capture, sample_positions
from flexmoba.tune.measure import tune
from flexmoba.tune.quality import Quality, gate_quality, required_snr
from flexmoba.tune.report import Choice, Report

__all__ = [
    "Call",
    "Choice",
    "Quality",
    "Report",
    "capture",
    "gate_quality",
    "required_snr",
    "sample_positions",
    "tune",
]
