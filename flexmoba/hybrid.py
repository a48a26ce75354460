"""Change between MoBA and full attention while a model is trained (arXiv 2502.13189, Sec. 2.3)."""

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
    """Sets what the `FlexMoba` modules of a model attend to, at any step of training.

    Parameters and optimizer state stay as they are, since neither kind of attention has any: the
    hybrids of arXiv 2502.13189, Sec. 2.3 and 3.2. A compiled model compiles once for each
    combination of settings that it meets. Nothing is changed if anything is refused.

    Args:
        model: Holds the layers, which are counted in the order of ``model.modules()``.
        topk: Blocks that each query attends to, its own included; None for full attention.
        eval_topk: The same outside training; ``"same"`` for no other.
        block_size: Keys in a block. A cache made before must have the same.
        layers: Which of them, by number, from the end if negative: an int, a slice or several
            ints. All by default.

    Raises:
        TypeError: A setting is no integer.
        ValueError: There is no `FlexMoba` in the model, or a setting is out of its range or does
            not fit a layer's options.
        IndexError: The model has no such layer.
        NotImplementedError: A layer's gate does not serve this block size.

    Examples:
        The paper's layer-wise hybrid: full attention in the last three layers.

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
    """Attention by phases of training: MoBA first and full attention last, say, or the reverse.

    The paper trains on 90 % of the tokens with MoBA and on the last 10 % with full attention
    (arXiv 2502.13189, Sec. 3.2). Steps or tokens are counted, as you like. The first phase is set
    at once, each other one by the call of `step` that reaches its start.

    Args:
        model: Holds `FlexMoba` modules, whose settings the schedule sets from now on.
        phases: Pairs of a start and the keyword arguments of `set_attention` from there on. A
            start is an int, a count, or a float, a fraction of ``total``, rounded to a count. The
            first is 0, and they rise. What a phase does not name stays as the one before left it.
        total: Steps or tokens of the whole training; needed if starts are fractions.

    Attributes:
        count: Steps or tokens so far.
        starts: The count at which each phase begins.

    Raises:
        TypeError: A start or ``total`` is no number of the right type, or a phase names what
            `set_attention` does not have.
        ValueError: Starts do not rise from 0, or a fraction lacks a total or is beyond 1; and what
            `set_attention` raises, for any phase.

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
        """Checks every phase, and sets the first."""
        if total is not None:
            _check_count("total", total)
        self.starts = [_count_of(start, total) for start, _ in phases]
        rises = all(a < b for a, b in itertools.pairwise(self.starts))
        if not rises or self.starts[:1] != [0]:
            raise ValueError(
                f"phases must begin at counts that rise from 0, got {self.starts}; give the first "
                "one the start 0"
            )
        self._modules = _layers_of(model)
        # What every layer has in every phase, so that going back or resuming is no special case.
        settings = [_setting_of(module) for module in self._modules]
        self._settings: list[list[_Setting]] = []
        for _, changes in phases:
            settings = _changed(self._modules, settings, **changes)
            self._settings.append(settings)
        self.count = 0
        _apply(self._modules, self._settings[0])

    @property
    def phase(self) -> int:
        """Which phase it is, from 0 on."""
        return bisect.bisect_right(self.starts, self.count) - 1

    def step(self, n: int = 1) -> bool:
        """Counts ``n`` more steps or tokens; whether that began another phase, which is now set."""
        _check_count("n", n)
        before = self.phase
        self.count += n
        if self.phase == before:
            return False
        _apply(self._modules, self._settings[self.phase])
        return True

    def state_dict(self) -> dict[str, int]:
        """The count: all that a schedule made from the same arguments needs to go on."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to the count of a state, forth or back, and sets what its phase says."""
        _check_count("count", state["count"])
        self.count = state["count"]
        _apply(self._modules, self._settings[self.phase])


def _layers_of(model: nn.Module) -> list[FlexMoba]:
    modules = [module for module in model.modules() if isinstance(module, FlexMoba)]
    if not modules:
        raise ValueError(
            f"there is no flexmoba.nn.FlexMoba in this {type(model).__name__}; give its attention "
            "one, or use MobaAttention, which has one"
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
    """The settings of all layers after a change of some, checked."""
    if unknown := changes.keys() - set(_Setting._fields):
        raise TypeError(
            f"set_attention has no argument {', '.join(sorted(unknown))}; it has "
            f"{', '.join(_Setting._fields)} and layers"
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
            raise IndexError(f"layers must be from {-n} to {n - 1}, as there are {n}, got {i}")
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
            f"a phase must begin at an int, a count, or a float, a fraction of total, got {start!r}"
        )
    if isinstance(start, int):
        return start
    if total is None or not 0.0 <= start <= 1.0:
        raise ValueError(
            f"a phase that begins at a fraction needs one from 0 to 1 and a total, got {start} and "
            f"total={total}"
        )
    return round(start * total)
