"""Tests of flexmoba.plot, which compare drawn cells and marks with selections and reports."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flexmoba import moba_select
from flexmoba.plot import (
    plot_block_mask,
    plot_choices,
    plot_frontier,
    plot_heads,
    plot_mass,
    plot_report,
    plot_selection,
)
from flexmoba.tune import Call, tune

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb

BLUE, ORANGE, GREY, WHITE = (to_rgb(x) for x in ("#0072B2", "#E69F00", "#E6E6E6", "white"))


def image(axes):
    """Returns the drawn picture, ``(rows, columns, 3)``."""
    return torch.as_tensor(axes.images[0].get_array().data)


def colour(x, expected):
    return torch.allclose(x.float(), torch.tensor(expected), atol=1e-6)


def saved(figure, tmp_path):
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 4_000


# 7 queries and 9 keys in blocks of 2: each query selects its own block, most another one.
SELECTION = torch.tensor([[1, 0], [1, -1], [2, 1], [2, 0], [3, 1], [3, 2], [4, -1]])[None, None]


def test_selection_cell_by_cell():
    axes = plot_selection(SELECTION, 2, kv_len=9)
    drawn = image(axes)
    assert drawn.shape == (7, 5, 3)
    for query, selected in enumerate(SELECTION[0, 0].tolist()):
        own = (query + 2) // 2
        for block in range(5):
            kind = WHITE if block < own else GREY
            if block in selected:
                kind = ORANGE if block == own else BLUE
            assert colour(drawn[query, block], kind), (query, block)
    assert axes.images[0].get_extent() == [0, 5, 9, 2]
    assert axes.get_xlabel() == "block of 2 keys"


def test_queries_that_share_a_row_share_its_colour(monkeypatch):
    monkeypatch.setattr("flexmoba.plot.MAX_ROWS", 1)
    drawn = image(plot_selection(SELECTION, 2, kv_len=9))
    assert drawn.shape == (1, 5, 3)
    blue, orange, grey = (torch.tensor(x) - 1 for x in (BLUE, ORANGE, GREY))
    for block, (past, own, future) in enumerate([(2, 0, 0), (2, 2, 0), (1, 2, 2)]):
        expected = 1 + (past * blue + own * orange + future * grey) / 7
        assert colour(drawn[0, block], expected.tolist()), block


def test_without_causality_no_block_is_out_of_reach():
    drawn = image(plot_selection(torch.tensor([[[[0, 2], [2, 1], [1, -1]]]]), 1))
    for query, row in enumerate(
        [(ORANGE, WHITE, BLUE), (WHITE, ORANGE, BLUE), (WHITE, BLUE, WHITE)]
    ):
        for block, kind in enumerate(row):
            assert colour(drawn[query, block], kind), (query, block)


def test_one_head_of_one_row_is_drawn():
    q, k = torch.randn(2, 2, 3, 64, 8)
    selection = moba_select(q, k, 8, 3)
    drawn = image(plot_selection(selection, 8, batch=1, head=2))
    alone = image(plot_selection(selection[1:, 2:], 8))
    assert torch.equal(drawn, alone)
    assert not torch.equal(drawn, image(plot_selection(selection, 8, head=2)))


@pytest.mark.parametrize(("heads", "shown"), [(1, 1), (5, 5), (9, 8)])
def test_heads_side_by_side(heads, shown, tmp_path):
    selection = moba_select(*torch.randn(2, 1, heads, 64, 8), 8, 3)
    figure = plot_heads(selection, 8)
    assert [x.get_title() for x in figure.axes if x.get_visible()] == [
        f"head {i}" for i in range(shown)
    ]
    saved(figure, tmp_path)


def test_how_often_a_distance_and_a_block_are_chosen():
    (line,) = plot_choices(SELECTION, 2, kv_len=9).lines
    # The own blocks are 1 1 2 2 3 3 4, so distances are 1 to 4.
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata() == pytest.approx([3 / 7, 2 / 5, 0, 0])
    (line,) = plot_choices(SELECTION, 2, kv_len=9, by="block").lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3]
    assert line.get_ydata() == pytest.approx([2 / 7, 2 / 5, 1 / 3, 0])


def test_the_mean_of_heads_within_their_range(tmp_path):
    selection = moba_select(*torch.randn(2, 1, 3, 256, 8), 16, 4)
    axes = plot_choices(selection, 16)
    each = [plot_choices(selection[:, [i]], 16).lines[0].get_ydata() for i in range(3)]
    mean = torch.tensor([x.tolist() for x in each]).mean(0)
    assert axes.lines[0].get_ydata() == pytest.approx(mean.tolist())
    assert len(axes.collections) == 1
    saved(axes.figure, tmp_path)


def test_a_choice_out_of_nothing_is_refused():
    with pytest.raises(ValueError, match="one block of 64 keys; pass"):
        plot_choices(SELECTION.clamp(max=0), 64)
    with pytest.raises(ValueError, match='by must be "distance" or "block", got \'key\'; pass'):
        plot_choices(SELECTION, 2, kv_len=9, by="key")


@pytest.mark.parametrize("plot", [plot_selection, plot_choices, plot_heads])
def test_a_selection_of_other_sizes_is_refused(plot):
    with pytest.raises(ValueError, match="7 keys have 4 blocks of 2; pass"):
        plot(SELECTION, 2)
    with pytest.raises(ValueError, match="5 keys"):
        plot(SELECTION, 1, kv_len=5)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        plot(SELECTION, 0)
    with pytest.raises(ValueError, match=r"selection is empty, \(1, 1, 0, 2\)"):
        plot(SELECTION[:, :, :0], 2)
    documents = moba_select(
        *torch.randn(2, 1, 1, 30, 8), 8, 2, cu_seqlens=torch.tensor([0, 10, 30])
    )
    with pytest.raises(ValueError, match="draw packed documents one at a time"):
        plot(documents, 8)


def test_block_mask_tile_by_tile(tmp_path):
    def mask_mod(b, h, i, j):
        return (i >= j) & ((h == 0) | (i - j < 8))

    mask = create_block_mask(mask_mod, 1, 2, 64, 64, device="cpu", BLOCK_SIZE=8)
    for head in range(2):
        axes = plot_block_mask(mask, head=head)
        drawn = image(axes)
        for row in range(8):
            for column in range(8):
                past = BLUE if head == 0 else ORANGE if row - column == 1 else WHITE
                kind = ORANGE if row == column else past if column < row else WHITE
                assert colour(drawn[row, column], kind), (head, row, column)
        visited = 36 if head == 0 else 15
        assert axes.get_title() == f"head {head}: {visited / 64:.0%} of the tiles visited"
    saved(axes.figure, tmp_path)


@pytest.fixture(scope="module")
def report():
    q, k = torch.randn(2, 1, 4, 256, 8)
    return tune([(q, k)], (16, 32), (2, 4))


def test_frontier_has_every_choice(report):
    for cost in ("sparsity", "forward_ms"):
        axes = plot_frontier(report, cost=cost, recommended=report.choices[1])
        marks = {
            (float(x), float(y))
            for line in axes.lines
            if line.get_label().startswith("block")
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        assert marks == {
            (1 - x.sparsity if cost == "sparsity" else x.forward_ms, x.mass) for x in report.choices
        }
        assert [text.get_text() for text in axes.texts] == ["2", "4", "2", "4"]
        labels = axes.get_legend_handles_labels()[1]
        assert "recommended" in labels
        assert ("dense attention" in labels) == (cost == "forward_ms")
        joined = next(x for x in axes.lines if x.get_label() == "frontier")
        assert len(joined.get_xdata()) == len(report.frontier(cost))


def test_mass_has_every_head(report):
    axes = plot_mass(report, report.choices[2])
    assert image(axes).tolist() == [pytest.approx(report.choices[2].heads[0])]
    assert len(axes.texts) == 4


@pytest.mark.parametrize("timed", [True, False])
def test_a_report_is_drawn_whole(report, timed, tmp_path):
    if not timed:
        report = tune([tuple(torch.randn(2, 1, 4, 256, 8))], (16, 32), (2, 4), timed=False)
    figure = plot_report(report, report.choices[0])
    assert len(figure.axes) == 2 + 1 + timed  # the last one is the colour bar
    saved(figure, tmp_path)
    saved(plot_report(report), tmp_path)


def test_names_of_many_layers_do_not_overlap(tmp_path):
    q, k, at = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 64, 8), torch.arange(0, 64, 8)
    layers = [Call(f"model.layers.{i}.self_attn", q, k, at, 1.0) for i in range(32)]
    figure = plot_report(tune(layers, (16,), (2,), timed=False))
    saved(figure, tmp_path)
    names = [x.get_window_extent() for x in figure.axes[1].get_yticklabels()]
    assert len(names) == 32
    for upper, lower in itertools.pairwise(names):
        assert lower.y1 < upper.y0


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"run pip install 'flexmoba\[plot\]'"):
        plot_heads(SELECTION, 2, kv_len=9)


DRAW = """
import os, sys
import torch
from flexmoba import moba_select
from flexmoba.bench.report import plot
from flexmoba.commands.cli import main
from flexmoba.plot import plot_block_mask, plot_selection
from torch.nn.attention.flex_attention import create_block_mask

result = {"batch": 1, "heads": 1, "kv_heads": 1, "length": 9, "block_size": 2, "topk": 2}
result |= {"forward_ms": {"flex_moba": 1.0}}
figures = [plot({"results": [result], "device": "x", "torch": "y", "dtype": "z"})]
mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 300, 300, device="cpu")
figures += [plot_block_mask(mask).figure]
figures += [plot_selection(moba_select(*torch.randn(2, 1, 1, 9, 2), 2, 2), 2).figure]
for i, figure in enumerate(figures):
    figure.savefig(f"{i}.svg")
options = "tune --example --length 99 --block-sizes 9 --topks 2 --no-times --device cpu --mass 0.1"
code = main([*options.split(), "--plot", "3.png"])
assert os.environ["MPLBACKEND"] == sys.argv[1]
raise SystemExit(code)
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_backend_that_is_not_installed_is_not_needed(backend, tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": path}
    command = [sys.executable, "-c", DRAW, backend]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert {x.name for x in tmp_path.iterdir() if x.stat().st_size > 4_000} == {
        *("0.svg", "1.svg", "2.svg", "3.png")
    }


def test_a_backend_that_is_installed_stays_chosen():
    run = "from flexmoba.reporting import new_figure; new_figure((1, 1)); import matplotlib"
    run += "; print(matplotlib.get_backend())"
    environment = os.environ | {"MPLBACKEND": "svg"}
    output = subprocess.check_output([sys.executable, "-c", run], env=environment, text=True)
    assert output == "svg\n"


@pytest.mark.gpu
def test_draws_what_is_on_a_gpu(tmp_path):
    selection = moba_select(*torch.randn(2, 1, 2, 512, 16, device="cuda"), 64, 3)
    saved(plot_heads(selection, 64), tmp_path)
    saved(plot_choices(selection, 64).figure, tmp_path)
