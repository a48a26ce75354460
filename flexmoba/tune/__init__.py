"""Measurements that help choose block size and topk for the queries and keys of a model."""

from flexmoba.tune.calls import Call, capture, sample_positions
from flexmoba.tune.example import synthetic
from flexmoba.tune.measure import reports, sampled, tune
from flexmoba.tune.quality import Quality, gate_quality, required_snr
from flexmoba.tune.report import Choice, Cost, Report

__all__ = [
    "Call",
    "Choice",
    "Cost",
    "Quality",
    "Report",
    "capture",
    "gate_quality",
    "reports",
    "required_snr",
    "sample_positions",
    "sampled",
    "synthetic",
    "tune",
]
