"""Plots of selections, of reports of `flexmoba.tune`, and of the tiles of a BlockMask.

A function that takes ``axes`` draws into them, by default into axes of a new figure, and returns
them; ``axes.figure.savefig("picture.png")`` writes the picture. The functions need matplotlib:
``pip install 'flexmoba[plot]'``.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.checks import check_block_size
from flexmoba.reporting import log_scale, mpl, new_figure
from flexmoba.tune import Choice, Cost, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can distinguish, and greyscale too.
BLUE, ORANGE, FUTURE = "#0072B2", "#E69F00", "#E6E6E6"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
MAX_NAMES = 40  # layer names beside a picture
MAX_ROWS = 1024  # rows of a picture; more queries share rows


def plot_selection(
    selection: Tensor,
    block_size: int,
    *,
    kv_len: int | None = None,
    batch: int = 0,
    head: int = 0,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws the selected blocks of a head: a row for each query, a column for each block.

    Selected past blocks are blue, the own block (which contains the query's position) is orange,
    and later blocks are grey. Without causality, selected blocks on both sides are blue. If several
    queries share a row of the picture, the strength of a colour is the share of them that selected
    the block.

    Args:
        selection: Block indices, ``(B, Hq, Lq, topk)`` integer, as `flexmoba.moba_select` returns
            them. With packed documents, pass the selection of one document.
        block_size: Number of keys in a block.
        kv_len: Number of keys, by default the number of queries.
        batch: Index of the row of the batch.
        head: Index of the query head.
        axes: The axes to draw into and to return, by default axes of a new figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The selection does not fit ``block_size`` and ``kv_len``.

    Examples:
        >>> import torch
        >>> from flexmoba import moba_select
        >>> from flexmoba.plot import plot_selection
        >>> q, k = torch.randn(2, 1, 2, 512, 16)
        >>> axes = plot_selection(moba_select(q, k, 64, 3), 64, head=1)
        >>> axes.get_title()
        'head 1'
    """
    selected, own, n_blocks = _selected_blocks(selection, block_size, kv_len)
    selected, q_len = selected[batch, head], selection.shape[2]
    kv_len = q_len if kv_len is None else kv_len
    block = torch.arange(n_blocks)
    is_own = block == own[:, None]
    later = block > own[:, None]
    if (selected & later).any():  # not causal: later blocks are candidates
        later = torch.zeros_like(later)
    kinds = torch.stack([selected & ~is_own, selected & is_own, later])
    rows = min(q_len, MAX_ROWS)
    row = torch.arange(q_len) * rows // q_len
    share = torch.zeros(3, rows, n_blocks).index_add_(1, row, kinds.float())
    share = share / row.bincount(minlength=rows)[:, None]
    ink = torch.tensor([_rgb(colour) for colour in (BLUE, ORANGE, FUTURE)]) - 1
    picture = (1 + torch.einsum("krb,kc->rbc", share, ink)).clamp(0, 1)

    axes = _axes(axes, (4.2, 4.2))
    extent = (0, n_blocks, kv_len, kv_len - q_len)
    axes.imshow(picture.numpy(), extent=extent, aspect="auto", interpolation="none")
    axes.set(title=f"head {head}", xlabel=f"block of {block_size} keys", ylabel="query position")
    _integer_ticks(axes)
    return axes


def plot_heads(
    selection: Tensor, block_size: int, *, kv_len: int | None = None, batch: int = 0
) -> "Figure":
    """Draws `plot_selection` of up to eight heads in one figure with a legend.

    Args:
        selection: Block indices, ``(B, Hq, Lq, topk)``, as in `plot_selection`.
        block_size: Number of keys in a block.
        kv_len: Number of keys, by default the number of queries.
        batch: Index of the row of the batch.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The selection does not fit ``block_size`` and ``kv_len``.
    """
    heads = min(selection.shape[1], 8)
    columns = min(heads, 4)
    lines = -(-heads // columns)
    figure = new_figure((3.2 * columns + 0.6, 3.4 * lines + 0.7))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for head, axes in enumerate(panels.flat):
        if head < heads:
            plot_selection(selection, block_size, kv_len=kv_len, batch=batch, head=head, axes=axes)
            axes.label_outer()
        else:
            axes.set_visible(False)
    kinds = {
        "selected past block": BLUE,
        "own block": ORANGE,
        "not selected": "white",
        "later block": FUTURE,
    }
    figure.legend(handles=_patches(kinds), loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_choices(
    selection: Tensor,
    block_size: int,
    *,
    kv_len: int | None = None,
    batch: int = 0,
    by: str = "distance",
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws how often a past block is selected, as a share of the queries that can select it.

    Args:
        selection: Block indices, ``(B, Hq, Lq, topk)``, as in `plot_selection`.
        block_size: Number of keys in a block.
        kv_len: Number of keys, by default the number of queries.
        batch: Index of the row of the batch.
        by: The x axis: ``"distance"`` for the number of blocks before the own block, ``"block"``
            for the index of the block.
        axes: The axes to draw into and to return, by default axes of a new figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The selection does not fit, ``by`` is unknown, or there is no past block.
    """
    if by not in ("distance", "block"):
        raise ValueError(f'by must be "distance" or "block", got {by!r}; pass one of them')
    selected, own, n_blocks = _selected_blocks(selection, block_size, kv_len)
    past = torch.arange(n_blocks) < own[:, None]
    index = torch.arange(n_blocks).expand_as(past)
    if by == "distance":
        index = own[:, None] - index
    queries = index[past].bincount(minlength=n_blocks)
    if not queries.any():
        raise ValueError(
            f"no query has a past block: there is one block of {block_size} keys; pass a selection "
            "of several blocks"
        )
    heads = [index[past & x].bincount(minlength=n_blocks) for x in selected[batch]]
    is_candidate = queries > 0
    share = torch.stack(heads)[:, is_candidate] / queries[is_candidate]
    x = is_candidate.nonzero()[:, 0].numpy()

    axes = _axes(axes, (6, 3.4))
    least, most = share.amin(0).numpy(), share.amax(0).numpy()
    if len(heads) > 1:
        axes.fill_between(x, least, most, color=BLUE, alpha=0.25, lw=0, label="range of heads")
    mark = "o" if len(x) < 40 else ""
    axes.plot(x, share.mean(0).numpy(), color=BLUE, marker=mark, ms=4, label="mean of heads")
    xlabel = "blocks before the own block" if by == "distance" else f"block of {block_size} keys"
    axes.set(xlabel=xlabel, ylabel="share of queries that select it", ylim=(0, None))
    _integer_ticks(axes)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes


def plot_mass(report: Report, choice: Choice, *, axes: "Axes | None" = None) -> "Axes":
    """Draws the captured mass of a choice: a row for each layer, a column for each head.

    Args:
        report: A report of `flexmoba.tune.tune`.
        choice: One of its choices.
        axes: The axes to draw into and to return, by default axes of a new figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    width = max(len(layer) for layer in choice.heads)
    cells = torch.full((len(choice.heads), width), float("nan"))
    for layer, heads in enumerate(choice.heads):
        cells[layer, : len(heads)] = torch.tensor(heads)
    axes = _axes(axes, (1.5 + 0.5 * width, 1.5 + 0.4 * len(cells)))
    image = axes.imshow(cells.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="captured mass")
    if cells.numel() <= 64:
        for (layer, head), value in zip(_cells(cells), cells.flatten().tolist(), strict=True):
            if value == value:
                colour = "black" if value > 0.5 else "white"
                text = f"{value:.0%}"
                axes.text(head, layer, text, ha="center", va="center", color=colour, fontsize=8)
    if len(report.layers) <= MAX_NAMES:
        axes.set_yticks(range(len(report.layers)), [_short(name) for name in report.layers])
    _integer_ticks(axes)
    axes.set(title=f"{choice.block}, topk {choice.topk}", xlabel="head", ylabel="layer")
    return axes


def plot_frontier(
    report: Report,
    *,
    cost: Cost = "sparsity",
    recommended: Choice | None = None,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws captured mass against cost, with a mark for each choice, labelled with its topk.

    The line connects the choices of the frontier. The tick above a mark shows the captured mass of
    the best selection of as many blocks; the gate loses the difference.

    Args:
        report: A report of `flexmoba.tune.tune`.
        cost: ``"sparsity"``, drawn as the share of keys read, or ``"forward_ms"``.
        recommended: The choice to mark with a ring.
        axes: The axes to draw into and to return, by default axes of a new figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The cost is unknown or was not measured.
    """
    frontier = report.frontier(cost)

    def price(x: Choice) -> float:
        return 1 - x.sparsity if cost == "sparsity" else float(x.forward_ms or 0)

    axes = _axes(axes, (6, 4.2))
    points = [price(x) for x in frontier], [x.mass for x in frontier]
    axes.plot(*points, color="0.6", lw=4, alpha=0.6, zorder=1, label="frontier")
    for i, block in enumerate(dict.fromkeys(x.block for x in report.choices)):
        choices = [x for x in report.choices if x.block == block]
        costs, masses = [price(x) for x in choices], [x.mass for x in choices]
        colour, mark = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.vlines(costs, masses, [x.best_mass for x in choices], color=colour, lw=1, alpha=0.7)
        axes.plot(costs, [x.best_mass for x in choices], "_", color=colour, ms=9)
        axes.plot(costs, masses, mark, color=colour, ms=7, label=block, zorder=3)
        for x, y, choice in zip(costs, masses, choices, strict=True):
            axes.annotate(str(choice.topk), (x, y), (6, -9), textcoords="offset points", fontsize=8)
    if recommended is not None:
        point = price(recommended), recommended.mass
        axes.plot(*point, "o", ms=17, mfc="none", mec="black", mew=1.5, label="recommended")
    log_scale(axes, "{:.3g}%" if cost == "sparsity" else "{:g}", 100 if cost == "sparsity" else 1)
    if cost == "sparsity":
        axes.set_xlabel("share of keys read")
    else:
        axes.set_xlabel("milliseconds forward")
        if report.dense_forward_ms:
            axes.axvline(report.dense_forward_ms, color="black", ls=":", label="dense attention")
    axes.set_ylabel("captured mass")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return axes


def plot_report(report: Report, recommended: Choice | None = None) -> "Figure":
    """Draws a report: its frontier by keys read and by time, and the captured mass of each head.

    Args:
        report: A report of `flexmoba.tune.tune`.
        recommended: The choice to mark with a ring, whose heads are shown. By default, no choice is
            marked, and the heads of the middle choice of the frontier are shown.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    timed = report.timed
    named = len(report.layers) if len(report.layers) <= MAX_NAMES else 0
    figure = new_figure((5.4 * (2 + timed), max(4.6, 1.6 + 0.18 * named)))  # for the layer names
    panels = figure.subplots(1, 2 + timed, squeeze=False)[0]
    plot_frontier(report, recommended=recommended, axes=panels[0])
    if timed:
        plot_frontier(report, cost="forward_ms", recommended=recommended, axes=panels[1])
    frontier = report.frontier()
    plot_mass(report, recommended or frontier[len(frontier) // 2], axes=panels[-1])
    # One legend below both frontiers does not cover any marks.
    handles, names = panels[int(timed)].get_legend_handles_labels()
    for axes in panels[:-1]:
        axes.get_legend().remove()
    figure.legend(handles, names, loc="outside lower left", ncols=len(names), fontsize=9)
    figure.suptitle(
        f"{report.inputs}; {report.device}, torch {report.versions['torch']}", fontsize=10
    )
    return figure


def plot_block_mask(
    mask: BlockMask, *, batch: int = 0, head: int = 0, axes: "Axes | None" = None
) -> "Axes":
    """Draws the tiles of a BlockMask: full tiles, partial tiles, and skipped tiles.

    FlexAttention computes a full tile without a mask and evaluates the mask in a partial tile.

    Args:
        mask: A BlockMask, for example from `flexmoba.moba_block_mask`.
        batch: Index of the row of the batch.
        head: Index of the head.
        axes: The axes to draw into and to return, by default axes of a new figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    kinds = {"skipped": "white", "partial": ORANGE, "full": BLUE}
    rows, columns = mask.kv_indices.shape[-2:]
    tiles = torch.zeros(
        rows, columns + 1, dtype=torch.int64
    )  # the last column receives unused list entries
    lists = [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]
    for kind, (counts, indices) in enumerate(lists, start=1):
        if counts is not None and indices is not None:
            listed = torch.arange(columns) < counts[batch, head].cpu()[:, None]
            tiles.scatter_(1, indices[batch, head].cpu().long().where(listed, columns), kind)
    tiles = tiles[:, :-1]
    picture = torch.tensor([_rgb(colour) for colour in kinds.values()])[tiles]
    axes = _axes(axes, (4.6, 4.6))
    axes.imshow(picture.numpy(), interpolation="none")
    q_size, kv_size = mask.BLOCK_SIZE
    visited = float((tiles > 0).float().mean())
    axes.set(
        title=f"head {head}: {visited:.0%} of the tiles visited",
        xlabel=f"tile of {kv_size} keys",
        ylabel=f"tile of {q_size} queries",
    )
    axes.legend(handles=_patches(kinds), fontsize=8, loc="upper right")
    return axes


def _selected_blocks(
    selection: Tensor, block_size: int, kv_len: int | None
) -> tuple[Tensor, Tensor, int]:
    """Returns the selection as bools, the own block of each query, and the number of blocks.

    Their shapes are ``(B, Hq, Lq, blocks)`` and ``(Lq,)`` int64.
    """
    check_block_size(block_size)
    q_len = selection.shape[2]
    kv_len = q_len if kv_len is None else kv_len
    n_blocks = -(-kv_len // block_size)
    if selection.numel() == 0:
        raise ValueError(f"selection is empty, {tuple(selection.shape)}; pass one with queries")
    if kv_len < q_len or int(selection.max()) >= n_blocks:
        raise ValueError(
            f"selection holds {q_len} queries and blocks up to {int(selection.max())}, but "
            f"{kv_len} keys have {n_blocks} blocks of {block_size}; pass its block_size and "
            "kv_len, and draw packed documents one at a time"
        )
    index = selection.cpu().long()
    selected = torch.zeros(*index.shape[:3], n_blocks + 1, dtype=torch.bool)
    selected.scatter_(3, index.where(index >= 0, n_blocks), value=True)
    own = (torch.arange(q_len) + kv_len - q_len) // block_size
    return selected[..., :-1], own, n_blocks


def _axes(axes: "Axes | None", size: tuple[float, float]) -> "Axes":
    return new_figure(size).subplots() if axes is None else axes


def _integer_ticks(axes: "Axes") -> None:
    axes.xaxis.set_major_locator(mpl("ticker").MaxNLocator(integer=True))


def _patches(kinds: dict[str, str]) -> list[Any]:
    patch = mpl("patches").Patch
    return [patch(facecolor=colour, edgecolor="0.5", label=name) for name, colour in kinds.items()]


def _rgb(colour: str) -> tuple[float, float, float]:
    rgb: tuple[float, float, float] = mpl("colors").to_rgb(colour)
    return rgb


def _cells(cells: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(cells.shape[0]) for column in range(cells.shape[1])]


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"
