"""Distributes the blocks of one topk over the layers of a model: `loss_by_position.py --by-layer`.

It maximizes captured mass. This raised the loss of a pretrained model: see docs/results.md.
"""

from collections.abc import Mapping, Sequence

from flexmoba.tune import Report

# Masses count in billionths. Sums of whole numbers do not depend on the order of the layers, so
# that equal sums are found to be equal.
_ONE = 10**9

# Captured mass, and minus the sum of the squares of the topks, which prefers similar topks.
_Value = tuple[int, int]


def masses_of(report: Report, gate_block_size: int | None) -> list[dict[int, float]]:
    """The captured mass of each topk, by layer, for a report of one block size."""
    choices = [x for x in report.choices if x.gate_block_size == gate_block_size]
    return [
        {x.topk: sum(x.heads[layer]) / len(x.heads[layer]) for x in choices}
        for layer in range(len(report.layers))
    ]


def mean_mass(layers: Sequence[Mapping[int, float]], topks: Sequence[int]) -> float:
    """The captured mass of a topk for each layer, mean over layers."""
    return sum(layer[topk] for layer, topk in zip(layers, topks, strict=True)) / len(layers)


def best_topks(layers: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    """A topk for each layer, with the most mass for at most ``budget`` blocks in total.

    It is the exact solution, by dynamic programming over the layers: of all topks of the first
    layers with the same total, only the best ones can be part of it. Of equal masses, fewer blocks
    win, then similar topks.

    Args:
        layers: The captured mass of each topk, by layer.
        budget: Most blocks in total, at least the sum of the lowest topks.
    """
    best: dict[int, tuple[_Value, list[int]]] = {0: ((0, 0), [])}  # by the number of blocks
    for layer in layers:
        longer: dict[int, tuple[_Value, list[int]]] = {}
        for blocks, ((mass, evenness), topks) in best.items():
            for topk, more in layer.items():
                total = blocks + topk
                value = (mass + round(more * _ONE), evenness - topk**2)
                is_best = total not in longer or value > longer[total][0]
                if total <= budget and is_best:
                    longer[total] = value, [*topks, topk]
        best = longer
    # The fewest blocks first, as `max` returns the first of equal masses.
    _, topks = max((best[total] for total in sorted(best)), key=lambda x: x[0][0])
    return topks
