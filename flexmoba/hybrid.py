"""Change of the attention settings of a model during training (arXiv 2502.13189, Sec. 2.3)."""

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from flexmoba.nn import FlexMoba

TopK = int | Literal["same"] | None
Layers = int | slice | Iterable[int] | None


class _Setting(NamedTuple):
    block_size: int
    topk: int | None
    eval_topk: TopK


def set_attention(
    model: nn.Module,
    *,
    topk: int | Literal["unchanged"] | None = "unchanged",
    eval_topk: TopK | Literal["unchanged"] = "unchanged",
    block_size: int | Literal["unchanged"] = "unchanged",
    layers: Layers = None,
) -> None:
    """Sets ``topk``, ``eval_topk`` or ``block_size`` of the `FlexMoba` modules of a model.

    Call it at any step of training, as in the hybrids of arXiv 2502.13189, Sec. 2.3 and 3.2.
    Parameters and optimizer state do not change, since neither MoBA nor full attention has
    parameters. ``torch.compile`` compiles a model once for each combination of settings. If a
    setting is invalid, nothing changes.

    Args:
        model: A model that contains `FlexMoba` modules. A layer is such a module; layers are
            numbered in the order of ``model.modules()``.
        topk: Blocks that each query attends to, its own block included, at least 1; None for full
            attention; ``"unchanged"`` for the present value.
        eval_topk: ``topk`` outside training (``module.eval()``); ``"same"`` for the value of
            ``topk``.
        block_size: Keys in a block, at least 1. Existing caches keep the old block size and then
            raise an error.
        layers: Layers to change: an int, a slice or several ints, which count from the last layer
            if negative. All layers by default.

    Raises:
        TypeError: A setting is not an int.
        ValueError: The model contains no `FlexMoba`, or a setting is out of range or does not fit
            the options of a layer.
        IndexError: The model has no such layer.
        NotImplementedError: The gate of a layer does not support this block size.

    Examples:
        The paper's layer-wise hybrid uses full attention in the last three layers:

        >>> from torch import nn
        >>> from flexmoba.hybrid import set_attention
        >>> from flexmoba.nn import FlexMoba
        >>> model = nn.ModuleList(FlexMoba(512, 3) for _ in range(8))
        >>> set_attention(model, topk=None, layers=slice(-3, None))
        >>> [layer.topk for layer in model]
        [3, 3, 3, 3, 3, None, None, None]
    """
    modules = _layers_of(model)
    changes: dict[str, Any] = {"topk": topk, "eval_topk": eval_topk, "block_size": block_size}
    before = [_setting_of(module) for module in modules]
    _apply(modules, _changed(modules, before, layers=layers, **changes))


class HybridSchedule:
    """Schedule of attention settings in phases, for example MoBA first and full attention last.

    The paper trains on 90 % of the tokens with MoBA and on the last 10 % with full attention
    (arXiv 2502.13189, Sec. 3.2). The schedule counts steps or tokens. The constructor applies the
    first phase; the call of `step` that reaches the start of another phase applies that phase.

    Args:
        model: A model that contains `FlexMoba` modules.
        phases: Pairs of a start and of keyword arguments of `set_attention`. A start is an int (a
            count) or a float (a fraction of ``total``, rounded to a count). The first start is 0,
            and starts increase. Settings that a phase does not name keep their value.
        total: Number of steps or tokens of the training, required if a start is a fraction.

    Attributes:
        count: Steps or tokens so far.
        starts: The count at which each phase begins.

    Raises:
        TypeError: A start or ``total`` has the wrong type, or a phase has a keyword argument that
            `set_attention` does not have.
        ValueError: Starts do not increase from 0, a fraction has no total or exceeds 1, or
            `set_attention` would raise for a phase.
        IndexError: A phase names a layer that the model does not have.
        NotImplementedError: The gate of a layer does not support a block size.

    Examples:
        >>> from torch import nn
        >>> from flexmoba.hybrid import HybridSchedule
        >>> from flexmoba.nn import FlexMoba
        >>> model = nn.ModuleList(FlexMoba(512, 3) for _ in range(2))
        >>> schedule = HybridSchedule(model, [(0.0, {"topk": 3}), (0.9, {"topk": None})], total=100)
        >>> schedule.step(89)  # steps or tokens; after optimizer.step()
        False
        >>> schedule.step()  # True: full attention from here on
        True
        >>> [layer.topk for layer in model]
        [None, None]
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[tuple[float, Mapping[str, Any]]],
        *,
        total: int | None = None,
    ) -> None:
        """Checks every phase, and applies the first phase."""
        if total is not None:
            _check_count("total", total)
        self.starts = [_count_of(start, total) for start, _ in phases]
        increasing = all(a < b for a, b in itertools.pairwise(self.starts))
        if not increasing or self.starts[:1] != [0]:
            raise ValueError(
                f"the starts of phases must increase from 0, got {self.starts}; begin the first "
                "phase at 0, and each other phase after the phase before it"
            )
        self._modules = _layers_of(model)
        # All settings of every phase, so that going back and resuming need no special case.
        settings = [_setting_of(module) for module in self._modules]
        self._settings: list[list[_Setting]] = []
        for _, changes in phases:
            settings = _changed(self._modules, settings, **changes)
            self._settings.append(settings)
        self.count = 0
        _apply(self._modules, self._settings[0])

    @property
    def phase(self) -> int:
        """Index of the current phase, from 0."""
        return bisect.bisect_right(self.starts, self.count) - 1

    def step(self, n: int = 1) -> bool:
        """Counts steps or tokens, and applies the phase of the new count.

        Args:
            n: Steps or tokens since the last call, at least 0.

        Returns:
            Whether a new phase has begun.

        Raises:
            TypeError: ``n`` is not an int.
            ValueError: ``n`` is negative.
        """
        _check_count("n", n)
        before = self.phase
        self.count += n
        if self.phase == before:
            return False
        _apply(self._modules, self._settings[self.phase])
        return True

    def state_dict(self) -> dict[str, int]:
        """Returns the count, which a schedule with the same arguments needs to continue."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the count, and applies its phase, even if it is an earlier phase.

        Args:
            state: The result of `state_dict`.

        Raises:
            TypeError: The count is not an int.
            ValueError: The count is negative.
        """
        _check_count("count", state["count"])
        self.count = state["count"]
        _apply(self._modules, self._settings[self.phase])


def _layers_of(model: nn.Module) -> list[FlexMoba]:
    modules = [module for module in model.modules() if isinstance(module, FlexMoba)]
    if not modules:
        raise ValueError(
            f"there is no flexmoba.nn.FlexMoba in this {type(model).__name__}; call a FlexMoba in "
            "its attention, or use MobaAttention"
        )
    return modules


def _setting_of(module: FlexMoba) -> _Setting:
    return _Setting(module.block_size, module.topk, module.eval_topk)


def _changed(
    modules: list[FlexMoba],
    settings: list[_Setting],
    *,
    layers: Layers = None,
    **changes: Any,
) -> list[_Setting]:
    """Returns the settings of all layers after changes in ``layers``, or raises."""
    if unknown := changes.keys() - set(_Setting._fields):
        raise TypeError(
            f"set_attention has no argument {', '.join(sorted(unknown))}; use "
            f"{', '.join(_Setting._fields)} or layers"
        )
    settings = list(settings)
    for i in _indices(layers, len(modules)):
        named = {name: x for name, x in changes.items() if x != "unchanged"}
        settings[i] = settings[i]._replace(**named)
        modules[i].check(*settings[i])
    return settings


def _indices(layers: Layers, n: int) -> Iterable[int]:
    if layers is None:
        return range(n)
    if isinstance(layers, slice):
        return range(n)[layers]
    layers = [layers] if isinstance(layers, int) else list(layers)
    for i in layers:
        if not -n <= i < n:
            raise IndexError(
                f"layers must be from {-n} to {n - 1} for a model with {n} FlexMoba modules, got "
                f"{i}; the first layer is 0"
            )
    return layers


def _apply(modules: list[FlexMoba], settings: list[_Setting]) -> None:
    for module, setting in zip(modules, settings, strict=True):
        module.block_size, module.topk, module.eval_topk = setting


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {count!r} ({type(count).__name__})")
    if count < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")


def _count_of(start: float, total: int | None) -> int:
    if isinstance(start, bool) or not isinstance(start, (int, float)):
        raise TypeError(
            f"a phase must begin at an int (a count) or at a float (a fraction of total), got "
            f"{start!r}"
        )
    if isinstance(start, int):
        return start
    if total is None or not 0.0 <= start <= 1.0:
        raise ValueError(
            f"a phase that begins at a fraction needs a fraction from 0 to 1 and a total, got "
            f"{start} and total={total}; pass total, or begin the phase at a count"
        )
    return round(start * total)
