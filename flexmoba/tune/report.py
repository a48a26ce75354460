"""What `flexmoba.tune` found: the choices, which of them are worth their cost, and a table."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flexmoba.reporting import table

Cost = Literal["sparsity", "forward_ms"]


@dataclass(frozen=True)
class Choice:
    """One block size and topk, and what was measured of it.

    Attributes:
        block_size: Keys in a block.
        topk: Blocks that each query attends to, its own included.
        sparsity: Share of the pairs of a query and a key of full causal attention that are left
            out, at the longest sequence.
        mass: Share of full attention that selected blocks capture, mean over layers and heads;
            see `flexmoba.tune.Quality`.
        best_mass: The same of the best selection of as many blocks.
        found: How often the block of the strongest past key is selected; None if never asked.
        snr: The gate's signal-to-noise ratio, mean over layers and heads; None if there are too
            few blocks to tell.
        required_snr: What `flexmoba.tune.required_snr` asks for.
        forward_ms: Median milliseconds of a forward call of `flex_moba`; None if not timed.
        both_ms: The same of forward and backward.
        heads: ``mass`` of each layer's heads.
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

    @property
    def worst_mass(self) -> float:
        """The mass of the head that has the least."""
        return min(min(layer) for layer in self.heads)


@dataclass(frozen=True)
class Report:
    """What `tune` found.

    Attributes:
        device: Where it was measured.
        versions: Of flexmoba, torch and others, with flexmoba's commit and the date.
        inputs: Shape and dtype of the longest call, which the times and the sparsity are of.
        layers: Names of the layers.
        dense_forward_ms: Median milliseconds of ``scaled_dot_product_attention``; None if not
            timed, or if it failed.
        dense_both_ms: The same of forward and backward.
        choices: What was measured of each block size and topk.
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
        """Whether the choices were timed."""
        return all(x.forward_ms is not None for x in self.choices)

    def frontier(self, cost: Cost = "sparsity") -> list[Choice]:
        """The choices that none equals in mass at less cost, or beats in mass at no more.

        Args:
            cost: ``"sparsity"`` (the more, the cheaper) or ``"forward_ms"``.
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
        """The best choice within one budget; None if no choice that was measured keeps it.

        Args:
            mass: At least this share of attention captured: the cheapest such choice, in
                milliseconds if they were measured, else in sparsity.
            sparsity: At least this sparsity: the choice that captures most.
            latency_ms: At most these milliseconds forward: the choice that captures most.

        Raises:
            ValueError: Not exactly one budget is given, or ``latency_ms`` without times.
        """
        given = [x for x in (mass, sparsity, latency_ms) if x is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of mass, sparsity and latency_ms, got mass={mass}, "
                f"sparsity={sparsity}, latency_ms={latency_ms}"
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
        """All choices as a Markdown table; ``*`` marks the frontier, ``<-`` the recommended one."""
        backward = any(x.both_ms is not None for x in self.choices)
        frontier = self.frontier("forward_ms" if self.timed else "sparsity")
        heads = ["", "block", "topk", "sparsity", "mass", "best mass", "worst head", "found"]
        heads += ["SNR", "needed"] + ["forward ms"] * self.timed + ["both ms"] * backward
        rows = []
        for x in self.choices:
            mark = "*" * (x in frontier) + " <-" * (x == recommended)
            row = [mark.strip(), str(x.block_size), str(x.topk), f"{x.sparsity:.1%}"]
            row += [f"{x.mass:.1%}", f"{x.best_mass:.1%}", f"{x.worst_mass:.1%}"]
            row += ["" if x.found is None else f"{x.found:.1%}"]
            row += ["" if y is None else f"{y:.2f}" for y in (x.snr, x.required_snr)]
            for ms, dense in (
                (x.forward_ms, self.dense_forward_ms),
                (x.both_ms, self.dense_both_ms),
            ):
                if ms is not None:
                    row.append(f"{ms:.2f}" + (f" ({dense / ms:.1f}x)" if dense else ""))
            rows.append(row)
        return table(heads, rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        report = asdict(self)
        versions: dict[str, Any] = report.pop("versions")
        return versions | report


def _price(cost: Cost, choices: list[Choice]) -> Callable[[Choice], float]:
    if cost == "sparsity":
        return lambda x: 1 - x.sparsity
    if cost != "forward_ms":
        raise ValueError(f'cost must be "sparsity" or "forward_ms", got {cost!r}')
    times = {id(x): x.forward_ms for x in choices if x.forward_ms is not None}
    if len(times) < len(choices):
        raise ValueError("nothing was timed; use the sparsity, or tune(..., timed=True)")
    return lambda x: times[id(x)]
