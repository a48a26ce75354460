"""The report of `flexmoba.tune`: choices of block size and topk, their frontier, and a table."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flexmoba.reporting import table

Cost = Literal["sparsity", "forward_ms"]


@dataclass(frozen=True)
class Choice:
    """A choice of block size and topk, with its measurements.

    Attributes:
        block_size: Number of keys in a block.
        topk: Number of blocks that each query attends to, including its own block.
        sparsity: Share of the query-key pairs of full causal attention that are not computed, for
            the longest sequence.
        mass: Captured mass, mean over layers and heads; see `flexmoba.tune.Quality`.
        best_mass: The best possible mass: captured mass of the best selection of as many blocks.
        found: Share of queries for which the block of the strongest past key is selected; None if
            no query has a past block.
        snr: Signal-to-noise ratio of the gate, mean over layers and heads; None if there are too
            few blocks.
        required_snr: The ratio that makes the gate reliable; see `flexmoba.tune.required_snr`.
        forward_ms: Median milliseconds of a forward call of `flex_moba`; None if not timed.
        both_ms: Median milliseconds of forward and backward; None if not timed.
        heads: Captured mass of each head, by layer.
        gate_block_size: Number of keys in a sub-block; None for a gate without sub-blocks.
        sink_blocks: Number of first blocks that are always selected; topk includes them.
        local_blocks: Number of blocks right before the own block that are always selected; topk
            includes them.
    """

    block_size: int
    topk: int
    sparsity: float
    mass: float
    best_mass: float
    found: float | None
    snr: float | None
    required_snr: float | None
    forward_ms: float | None
    both_ms: float | None
    heads: list[list[float]]
    gate_block_size: int | None = None
    sink_blocks: int = 0
    local_blocks: int = 0

    @property
    def block(self) -> str:
        """The sizes of block and sub-block, as in ``"block 64, sub-block 16"``."""
        part = "" if self.gate_block_size is None else f", sub-block {self.gate_block_size}"
        return f"block {self.block_size}{part}"

    @property
    def lost_mass(self) -> float:
        """The mass that the gate loses: ``best_mass - mass``."""
        return self.best_mass - self.mass

    @property
    def worst_mass(self) -> float:
        """The lowest captured mass of any head."""
        return min(min(layer) for layer in self.heads)


@dataclass(frozen=True)
class Report:
    """The result of `tune`.

    Attributes:
        device: Name of the device of the measurement.
        versions: Versions of flexmoba, torch and others, the commit of flexmoba, and the date.
        inputs: Shape and dtype of the longest call, for which times and sparsity hold.
        layers: Names of the layers.
        dense_forward_ms: Median milliseconds of ``scaled_dot_product_attention``; None if not
            timed, or if it failed.
        dense_both_ms: Median milliseconds of its forward and backward; None likewise.
        choices: The measured choices.
    """

    device: str
    versions: dict[str, str | None]
    inputs: str
    layers: list[str]
    dense_forward_ms: float | None
    dense_both_ms: float | None
    choices: list[Choice]

    @property
    def timed(self) -> bool:
        """Whether all choices were timed."""
        return all(x.forward_ms is not None for x in self.choices)

    def frontier(self, cost: Cost = "sparsity") -> list[Choice]:
        """Returns the Pareto frontier of captured mass and cost.

        It omits a choice if another one has at least the same mass at no higher cost, and is
        better in one of the two.

        Args:
            cost: ``"sparsity"`` (higher is cheaper) or ``"forward_ms"``.

        Returns:
            The choices, from the cheapest on.
        """
        price = _price(cost, self.choices)

        def beaten(x: Choice) -> bool:
            return any(
                price(y) <= price(x)
                and y.mass >= x.mass
                and (price(y), y.mass) != (price(x), x.mass)
                for y in self.choices
            )

        return sorted((x for x in self.choices if not beaten(x)), key=price)

    def recommend(
        self,
        *,
        mass: float | None = None,
        sparsity: float | None = None,
        latency_ms: float | None = None,
    ) -> Choice | None:
        """Returns the best choice for one budget.

        Args:
            mass: Least captured mass. Returns the cheapest choice with at least this mass, by
                milliseconds if measured, else by sparsity.
            sparsity: Least sparsity. Returns the choice with the most mass.
            latency_ms: Most milliseconds of a forward call. Returns the choice with the most mass.

        Returns:
            The choice, or None if no measured choice meets the budget.

        Raises:
            ValueError: Not exactly one budget is given, or ``latency_ms`` without times.
        """
        given = [x for x in (mass, sparsity, latency_ms) if x is not None]
        if len(given) != 1:
            raise ValueError(
                f"recommend takes exactly one of mass, sparsity and latency_ms, got mass={mass}, "
                f"sparsity={sparsity}, latency_ms={latency_ms}; pass one budget"
            )
        if mass is not None:
            cost: Cost = "forward_ms" if self.timed else "sparsity"
            enough = [x for x in self.choices if x.mass >= mass]
            return min(enough, key=_price(cost, enough), default=None)
        if sparsity is not None:
            fitting = [x for x in self.choices if x.sparsity >= sparsity]
        else:
            assert latency_ms is not None
            price = _price("forward_ms", self.choices)
            fitting = [x for x in self.choices if price(x) <= latency_ms]
        return max(fitting, key=lambda x: x.mass, default=None)

    def table(self, recommended: Choice | None = None) -> str:
        """Formats the choices as a Markdown table.

        Args:
            recommended: The choice to mark with ``<-``. ``*`` marks the frontier.
        """
        backward = any(x.both_ms is not None for x in self.choices)
        frontier = self.frontier("forward_ms" if self.timed else "sparsity")
        parts = any(x.gate_block_size is not None for x in self.choices)
        headings = ["", "block"] + ["sub-block"] * parts + ["topk", "sparsity", "mass", "best mass"]
        headings += ["lost", "worst head", "found", "SNR", "needed"]
        headings += ["forward ms"] * self.timed + ["both ms"] * backward
        rows = []
        for x in self.choices:
            mark = "*" * (x in frontier) + " <-" * (x == recommended)
            row = [mark.strip(), str(x.block_size)]
            row += [str(x.gate_block_size or "")] * parts + [str(x.topk), f"{x.sparsity:.1%}"]
            row += [f"{x.mass:.1%}", f"{x.best_mass:.1%}", f"{x.lost_mass:.1%}"]
            row += [f"{x.worst_mass:.1%}"]
            row += ["" if x.found is None else f"{x.found:.1%}"]
            row += ["" if y is None else f"{y:.2f}" for y in (x.snr, x.required_snr)]
            for ms, dense in (
                (x.forward_ms, self.dense_forward_ms),
                (x.both_ms, self.dense_both_ms),
            ):
                if ms is not None:
                    row.append(f"{ms:.2f}" + (f" ({dense / ms:.1f}x)" if dense else ""))
            rows.append(row)
        return table(headings, rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dict that JSON can hold, with the versions at the top level."""
        report = asdict(self)
        versions: dict[str, Any] = report.pop("versions")
        return versions | report


def _price(cost: Cost, choices: list[Choice]) -> Callable[[Choice], float]:
    """Returns the cost of a choice as a function; lower is cheaper."""
    if cost == "sparsity":
        return lambda x: 1 - x.sparsity
    if cost != "forward_ms":
        raise ValueError(f'cost must be "sparsity" or "forward_ms", got {cost!r}; pass one of them')
    times = {id(x): x.forward_ms for x in choices if x.forward_ms is not None}
    if len(times) < len(choices):
        raise ValueError("nothing was timed; use sparsity as the cost, or tune(..., timed=True)")
    return lambda x: times[id(x)]
