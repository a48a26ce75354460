"""Tests of `flexmoba.hybrid`: the attention settings change, and nothing else."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flexmoba.hybrid import HybridSchedule, set_attention
from flexmoba.nn import FlexMoba, MobaAttention
from tests.conftest import assert_bitwise_equal


class Model(nn.Module):
    """Residual attention layers, which contain their `FlexMoba` modules at any depth."""

    def __init__(self, n: int, **options) -> None:
        super().__init__()
        options = {"block_size": 8, "topk": 2} | options
        self.layers = nn.ModuleList(MobaAttention(16, 2, **options) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def settings_of(model: nn.Module) -> list[tuple]:
    found = [m for m in model.modules() if isinstance(m, FlexMoba)]
    return [(m.block_size, m.topk, m.eval_topk) for m in found]


def bare(n: int, **options) -> nn.ModuleList:
    return nn.ModuleList(FlexMoba(8, 2, **options) for _ in range(n))


@pytest.mark.parametrize(
    ("layers", "changed"),
    [
        (None, [0, 1, 2, 3]),
        (2, [2]),
        (-1, [3]),
        (slice(-3, None), [1, 2, 3]),
        (slice(4, None), []),
        ([0, -1], [0, 3]),
        (range(0, 4, 2), [0, 2]),
        ((i for i in (1, 1)), [1]),
    ],
)
def test_layers_are_chosen_by_number(layers, changed):
    model = bare(4)
    set_attention(model, topk=None, layers=layers)
    expected = [(8, None if i in changed else 2, "same") for i in range(4)]
    assert settings_of(model) == expected


def test_what_is_not_named_stays():
    model = bare(1)
    for changes, expected in (
        ({"eval_topk": None}, (8, 2, None)),
        ({"block_size": 16}, (16, 2, None)),
        ({"topk": 3, "eval_topk": 5}, (16, 3, 5)),
        ({"topk": None, "eval_topk": "same"}, (16, None, "same")),
        ({}, (16, None, "same")),
    ):
        set_attention(model, **changes)
        assert settings_of(model) == [expected]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
        ({"topk": 2.0}, TypeError, "2.0"),
        ({"eval_topk": -1}, ValueError, "got -1"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": None}, TypeError, "None"),
        ({"topk": 1}, ValueError, "topk=1 is too small for sink_blocks=1"),
        ({"layers": 2}, IndexError, "from -2 to 1 for a model with 2 FlexMoba modules, got 2"),
        ({"layers": [0, -3]}, IndexError, "got -3"),
    ],
)
def test_what_is_refused_changes_nothing(changes, error, text):
    model = nn.ModuleList([FlexMoba(8, 2), FlexMoba(8, 2, sink_blocks=1)])
    with pytest.raises(error, match=text):
        set_attention(model, **{"topk": 4} | changes)
    assert settings_of(model) == [(8, 2, "same")] * 2
    with pytest.raises(error, match=text):
        HybridSchedule(model, [(0, {"topk": 4}), (5, {"topk": 4} | changes)])
    assert settings_of(model) == [(8, 2, "same")] * 2


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"no flexmoba\.nn\.FlexMoba in this Linear"):
        set_attention(nn.Linear(2, 2), topk=None)


PHASES = [
    (0.0, {"topk": 1}),
    (0.25, {"topk": 3, "eval_topk": None}),
    (0.5, {"block_size": 4, "layers": slice(1, None)}),
    (0.9, {"topk": None}),
]
SETTINGS = [
    [(8, 1, "same"), (8, 1, "same")],
    [(8, 3, None), (8, 3, None)],
    [(8, 3, None), (4, 3, None)],
    [(8, None, None), (4, None, None)],
]
STARTS = [0, 10, 20, 36]


def expected_at(count: int) -> list[tuple]:
    return SETTINGS[sum(count >= start for start in STARTS) - 1]


@given(st.lists(st.integers(0, 30), max_size=6))
def test_every_count_has_the_settings_of_its_phase(steps):
    model = bare(2)
    schedule = HybridSchedule(model, PHASES, total=40)
    assert schedule.starts == STARTS
    for n in [0, *steps]:
        before = settings_of(model)
        began = schedule.step(n)
        assert settings_of(model) == expected_at(schedule.count)
        assert began == (settings_of(model) != before)
    assert schedule.count == sum(steps)


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_schedule_goes_on_from_any_state_and_back(there, here):
    schedule = HybridSchedule(bare(2), PHASES, total=40)
    schedule.step(there)
    model = bare(2)
    resumed = HybridSchedule(model, PHASES, total=40)
    resumed.step(here)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert resumed.count == there
    assert settings_of(model) == expected_at(there)
    resumed.step(5)
    assert settings_of(model) == expected_at(there + 5)


def test_counts_and_fractions_of_a_total():
    model = bare(1)
    schedule = HybridSchedule(model, [(0, {}), (7, {"topk": 5})])
    assert settings_of(model) == [(8, 2, "same")]
    assert not schedule.step(6)
    assert schedule.step()
    assert settings_of(model) == [(8, 5, "same")]
    fractions = HybridSchedule(model, [(0.0, {}), (0.07, {}), (0.57, {}), (1.0, {})], total=100)
    assert fractions.starts == [0, 7, 57, 100]


@pytest.mark.parametrize(
    ("phases", "total", "error", "text"),
    [
        ([], None, ValueError, r"increase from 0, got \[\]"),
        ([(1, {})], None, ValueError, r"got \[1\]"),
        ([(0, {}), (5, {}), (5, {})], None, ValueError, r"got \[0, 5, 5\]"),
        ([(0, {}), (0.5, {})], None, ValueError, "0.5 and total=None"),
        ([(0, {}), (1.5, {})], 10, ValueError, "1.5 and total=10"),
        ([(0, {}), (float("nan"), {})], 10, ValueError, "nan"),
        ([("0", {})], None, TypeError, "'0'"),
        ([(0, {}), (0.5, {})], 1e6, TypeError, "total must be an int, got 1000000.0"),
        ([(0, {"top_k": 3})], None, TypeError, "no argument top_k; use block_size, topk"),
    ],
)
def test_bad_phases(phases, total, error, text):
    with pytest.raises(error, match=text):
        HybridSchedule(bare(1), phases, total=total)


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)])
def test_bad_steps(n, error):
    schedule = HybridSchedule(bare(1), [(0, {})])
    with pytest.raises(error, match="n must be"):
        schedule.step(n)
    with pytest.raises((TypeError, ValueError), match="count must be"):
        schedule.load_state_dict({"count": n})
    assert schedule.count == 0


@pytest.mark.parametrize("topk", [1, 3, None])
def test_a_switched_model_is_one_made_that_way(topk):
    torch.manual_seed(0)
    model, x = Model(2), torch.randn(1, 50, 16)
    made = Model(2, topk=topk, block_size=16, eval_topk=2)
    made.load_state_dict(model.state_dict())
    assert not torch.equal(model(x), made(x))
    set_attention(model, topk=topk, block_size=16, eval_topk=2)
    assert_bitwise_equal(model(x), made(x))
    assert_bitwise_equal(model.eval()(x), made.eval()(x))


def test_switching_touches_neither_parameters_nor_optimizer():
    torch.manual_seed(0)
    model, x = Model(2), torch.randn(1, 50, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    parameters = list(model.parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    set_attention(model, topk=None, block_size=4, layers=-1)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    state, optimizer_state = model.state_dict(), optimizer.state_dict()
    assert state.keys() == before[0].keys()
    for name, value in state.items():
        assert_bitwise_equal(value, before[0][name])
    assert optimizer_state["param_groups"] == before[1]["param_groups"]
    for i, values in optimizer_state["state"].items():
        for name, value in values.items():
            assert_bitwise_equal(value, before[1]["state"][i][name])


def test_a_compiled_model_compiles_once_for_each_setting():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Model(2), torch.randn(1, 50, 16)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    phases = [(i, {"topk": topk}) for i, topk in enumerate((2, 3, None, 2, None, 3))]
    phases.append((6, {"topk": None, "layers": -1}))
    schedule = HybridSchedule(model, phases)
    for _ in range(2):  # through all phases, and once more after a return to the first
        for _ in phases:
            assert_bitwise_equal(compiled(x), model(x))
            schedule.step()
        schedule.load_state_dict({"count": 0})
    assert counter.frame_count == 4
    torch._dynamo.reset()
