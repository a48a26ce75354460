"""Draws the SVG pictures of the site from results of flexmoba: `python docs/pictures.py`.

A drawing is at most 480 units wide, so that its text is legible on a phone. It draws in
`currentColor`, which the site sets. Outside the site, for example on a code host, the style in the
file follows the colour scheme of the reader.
"""

import html
import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from flexmoba import moba_block_mask, moba_select
from flexmoba.bench.configs import size as tokens

WIDTH = 480
OWN, PAST = "#e8853b", "#4a90d9"
OF_BLOCK = ("#4a90d9", "#e8853b", "#4fa866", "#b667c4")
HERE = Path(__file__).parent / "pictures"
STYLE = "svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}"

Cell = tuple[float, float, float, float]  # x, y, width, height


class Drawing:
    """A list of SVG shapes in drawing order."""

    def __init__(self, height: float, width: float = WIDTH) -> None:
        """Creates an empty drawing."""
        self.height, self.width, self.shapes = height, width, []

    def cells(self, cells: list[Cell], fill: str, opacity: float = 1.0) -> None:
        """Adds rectangles of one colour."""
        path = "".join(f"M{x:g} {y:g}h{w:g}v{h:g}h{-w:g}z" for x, y, w, h in cells)
        self.shapes.append(f'<path d="{path}" fill="{fill}" fill-opacity="{opacity:g}"/>')

    def box(self, cell: Cell, fill: str = "none", opacity: float = 0.15, dash: str = "") -> None:
        """Adds a rounded rectangle with an outline."""
        x, y, w, h = cell
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        stroke = "currentColor" if fill == "none" else fill
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{stroke}" stroke-width="1.3"{dashed}/>'
        )

    def text(
        self, x: float, y: float, text: str, anchor: str = "middle", size: int = 14, weight: int = 0
    ) -> None:
        """Adds one line of text on the base line ``y``."""
        bold = f' font-weight="{weight}"' if weight else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{bold}>'
            f"{html.escape(text)}</text>"
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Adds a vertical or horizontal arrow."""
        self.line(x0, y0, x1, y1)
        ux, uy = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))
        left, right = (
            (x1 - 6 * ux + 4 * uy, y1 - 6 * uy + 4 * ux),
            (
                x1 - 6 * ux - 4 * uy,
                y1 - 6 * uy - 4 * ux,
            ),
        )
        self.shapes.append(
            f'<path d="M{x1:g} {y1:g}L{left[0]:g} {left[1]:g}L{right[0]:g} {right[1]:g}z" '
            'fill="currentColor"/>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, opacity: float = 1.0) -> None:
        """Adds a thin line."""
        self.shapes.append(
            f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" stroke="currentColor" '
            f'stroke-opacity="{opacity:g}" fill="none"/>'
        )

    def curve(self, points: list[tuple[float, float]], colour: str, dash: str = "") -> None:
        """Adds a line through points, with a dot on each."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(
            f'<path d="M{path}" stroke="{colour}" stroke-width="2.2" fill="none"{dashed}/>'
        )
        for x, y in points:
            self.shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>')

    def save(self, name: str) -> None:
        """Writes ``pictures/NAME.svg``."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-family="system-ui, sans-serif" '
            'fill="currentColor">'
        )
        text = "\n".join([head, f"<style>{STYLE}</style>", *self.shapes, "</svg>", ""])
        (HERE / f"{name}.svg").write_text(text)


def random_inputs(length: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns queries and keys of one head, each ``(1, 1, length, dim)`` float32."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, length, dim, generator=generator)
    return q, k


def pattern() -> None:
    """Draws the keys that each of 48 queries attends to: all earlier ones, or three blocks."""
    length, block, size = 48, 8, 4.75
    q, k = random_inputs(length, 16, seed=3)
    selection = moba_select(q, k, block, topk=3)[0, 0].tolist()
    drawing = Drawing(290)
    for panel, title in enumerate(("Full attention", "MoBA: block 8, topk 3")):
        x0, y0 = panel * (WIDTH - length * size), 28
        cells_of: dict[str, list[Cell]] = {OWN: [], PAST: [], "currentColor": []}
        for i, j in itertools.product(range(length), repeat=2):
            if j <= i:
                own = j // block == i // block
                colour = OWN if own else PAST if j // block in selection[i] else "currentColor"
                if panel == 0:
                    colour = PAST
                cells_of[colour].append((x0 + j * size, y0 + i * size, size - 0.75, size - 0.75))
        for colour, cells in cells_of.items():
            drawing.cells(cells, colour, 0.13 if colour == "currentColor" else 1)
        drawing.text(x0 + length * size / 2, 16, title, weight=600)
        drawing.text(x0 + length * size / 2, y0 + length * size + 18, "keys →", size=13)
    drawing.text(length * size - 6, 60, "a row is a query", "end", size=13)
    middle = WIDTH - length * size
    for x, colour, name in ((middle + 92, OWN, "own block"), (middle + 92, PAST, "selected")):
        y = 50 if colour == OWN else 68
        drawing.cells([(x + 30, y - 10, 11, 11)], colour)
        drawing.text(x + 47, y, name, "start", size=13)
    drawing.save("pattern")


def blocks() -> None:
    """Draws step 1 of MoBA: sixteen keys in blocks of four, with their mean keys."""
    drawing = Drawing(150)
    drawing.text(0, 46, "keys", "start")
    drawing.text(0, 118, "means", "start")
    for block, colour in enumerate(OF_BLOCK):
        x = 62 + block * 106
        keys = [(x + 25 * i, 28.0, 22.0, 28.0) for i in range(4)]
        drawing.cells(keys, colour, 0.8)
        drawing.text(x + 48, 18, f"block {block}", size=13)
        drawing.arrow(x + 48, 62, x + 48, 94)
        drawing.box((x + 24, 98, 48, 30), colour, 0.5)
        drawing.text(x + 48, 118, f"k̄{'₀₁₂₃'[block]}")
    drawing.save("blocks")


def scores() -> None:
    """Draws step 2 of MoBA: the scores of the past blocks for one query, and its selection."""
    length, block, position = 96, 8, 90
    q, k = random_inputs(length, 16, seed=5)
    selected = moba_select(q, k, block, topk=3)[0, 0, position].tolist()
    mean = k[0, 0].unflatten(0, (-1, block)).mean(1)
    score = (mean @ q[0, 0, position]).tolist()
    own, unit = position // block, 55 / max(map(abs, score[: position // block]))
    drawing = Drawing(190)
    base = 88
    for j in range(length // block):
        x = 8 + j * 39.5
        colour = OWN if j == own else PAST if j in selected else "currentColor"
        if j == own:
            drawing.box((x, base - 60, 30, 120), OWN, 0.2, "4 3")
        else:
            top = base - max(score[j] * unit, 0)
            opacity = 1 if j in selected else 0.25
            drawing.cells([(x, top, 30, abs(score[j] * unit))], colour, opacity)
        drawing.text(x + 15, base + 74, str(j), size=13)
    drawing.line(0, base, WIDTH, base, 0.6)
    drawing.text(0, 14, "score of each block", "start", size=13)
    drawing.text(WIDTH, 14, "own block: always", "end", size=13)
    caption = f"block; topk 3, query at position {position}, in block {own}"
    drawing.text(0, 185, caption, "start", size=13)
    drawing.save("scores")


def routing() -> None:
    """Draws step 3 of MoBA: the pairs of twelve queries, sorted by block into tiles of four."""
    length, block, tile = 12, 3, 4
    q, k = random_inputs(length, 16, seed=1)
    selection = moba_select(q, k, block, topk=2)[0, 0].tolist()
    drawing = Drawing(300)
    drawing.text(0, 14, "queries and their selected blocks", "start", weight=600)
    cell = 36
    for i, row in enumerate(selection):
        x = 24 + i * cell
        drawing.text(x + 15, 36, str(i), size=13)
        for column, j in enumerate(row):
            if j >= 0:
                drawing.cells([(x, 44 + column * 26, 30, 22)], OF_BLOCK[j], 0.75)
                drawing.text(x + 15, 60 + column * 26, str(j), size=13)
            else:
                drawing.box((x, 44 + column * 26, 30, 22), dash="3 3", opacity=0)
    drawing.arrow(WIDTH / 2, 102, WIDTH / 2, 130)
    drawing.text(WIDTH / 2 + 12, 120, "sort by block", "start", size=13)
    drawing.text(0, 150, "tiles of one block each", "start", weight=600)
    x, y = 24.0, 166.0
    for past in (False, True):
        for j in range(length // block):
            rows = [i for i, row in enumerate(selection) if j in row and (j != row[0]) == past]
            for start in range(0, len(rows), tile):
                if x + tile * 24 > WIDTH:
                    x, y = 24.0, y + 66
                drawing.text(x + tile * 12, y + 44, f"block {j}", size=13)
                for row_of_tile in range(tile):
                    cell_of_row = (x + row_of_tile * 24, y, 22, 26)
                    if start + row_of_tile < len(rows):
                        drawing.cells([cell_of_row], OF_BLOCK[j], 0.75)
                        number = str(rows[start + row_of_tile])
                        drawing.text(cell_of_row[0] + 11, y + 18, number, size=13)
                    else:
                        drawing.box(cell_of_row, dash="3 3", opacity=0)
                x += tile * 24 + 16
        if not past:
            x, y = 24.0, y + 66
    drawing.height = y + 60
    drawing.save("routing")


def pipeline() -> None:
    """Draws the stages of the routed backend, and where the other backends branch off."""
    drawing = Drawing(560)
    left, width, middle = 66, 244, 188
    stages = [
        ("gate", "scores mean keys, selects blocks", ("gate/",), PAST),
        ("routing", "sorts pairs by block, fills tiles", ("backends/", "routing.py"), PAST),
        ("BlockMask", "names the block of each tile", ("backends/", "flex/"), OWN),
        ("FlexAttention", "one call over all tiles", ("backends/", "flex/"), OWN),
        ("merge", "combines partial outputs", ("backends/", "merge.py"), PAST),
    ]
    between = [
        "q, k",
        "selection (B, Hq, Lq, topk)",
        "tiles of 128 rows",
        "tiles, BlockMask, k, v",
        "partial outputs, log-sum-exps",
        "output (B, Hq, Lq, Dv), log-sum-exp",
    ]
    y = 20.0
    drawing.text(middle, y, between[0])
    for (name, action, room, colour), after in zip(stages, between[1:], strict=True):
        drawing.arrow(middle, y + 6, middle, y + 26)
        drawing.box((left, y + 28, width, 44), colour)
        drawing.text(middle, y + 46, name, weight=600)
        drawing.text(middle, y + 63, action, size=12)
        for line, word in enumerate(room):
            drawing.text(left - 6, y + 60 - 6 * len(room) + 12 * line, word, "end", size=11)
        drawing.arrow(middle, y + 73, middle, y + 87)
        y += 101
        drawing.text(middle, y, after, size=13)
    top = 20 + 101
    for x, name, action, start, end in (
        (336, "portable", "plain tensors", top + 101, top + 4 * 101),
        (411, "fused", "Triton kernels", top, top + 4 * 101),
    ):
        drawing.line(middle + 112, start - 4, x + 34, start - 4, 0.7)
        drawing.arrow(x + 34, start - 4, x + 34, start + 60)
        drawing.box((x, start + 62, 68, 48), OF_BLOCK[2])
        drawing.text(x + 34, start + 79, name, size=12, weight=600)
        for line, word in enumerate(action.split()):
            drawing.text(x + 34, start + 92 + 12 * line, word, size=11)
        drawing.line(x + 34, start + 111, x + 34, end - 4, 0.7)
        drawing.arrow(x + 34, end - 4, middle + 122, end - 4)
    drawing.height = y + 12
    drawing.save("pipeline")


def union() -> None:
    """Draws the blocks that the last 128 of 8,192 random queries select, each and together."""
    length, block, topk = 8192, 128, 8
    q, k = random_inputs(length, 64, seed=0)
    selection = moba_select(q, k, block, topk)[0, 0, -128:]
    n_blocks = length // block
    together = sorted(set(selection.flatten().tolist()))
    w, h, x0, y0 = 7.2, 2.0, 8.0, 26.0
    drawing = Drawing(y0 + 128 * h + 66)
    drawing.text(0, 14, f"128 queries of one head, each with {topk} of {n_blocks} blocks", "start")
    own = [(x0 + (n_blocks - 1) * w, y0 + i * h, w - 0.8, h) for i in range(128)]
    past = [
        (x0 + j * w, y0 + i * h, w - 0.8, h) for i in range(128) for j in selection[i, 1:].tolist()
    ]
    drawing.cells([(x0, y0, n_blocks * w, 128 * h)], "currentColor", 0.06)
    drawing.cells(past, PAST)
    drawing.cells(own, OWN)
    y = y0 + 128 * h + 10
    drawing.cells([(x0 + j * w, y, w - 0.8, 16) for j in together], OF_BLOCK[3])
    caption = f"together they select {len(together)} of the {n_blocks} blocks"
    drawing.text(0, y + 38, caption, "start")
    drawing.save("union")
    # The page quotes the sparsity of the whole mask, which shows that this tile is typical.
    sparsity = moba_block_mask(q, k, block, topk).sparsity()
    print(f"union: {len(together)} of {n_blocks}; sparsity of the whole mask {sparsity:.1f} %")


def sequences() -> None:
    """Draws three packed documents, and the same documents laid out in blocks of four."""
    drawing = Drawing(190)
    lengths, block, cell = (5, 2, 7), 4, 24
    drawing.text(0, 14, "a row: documents of 5, 2 and 7 tokens", "start", size=13)
    drawing.text(0, 104, "laid out: every document begins a block", "start", size=13)
    x, slot = 0.0, 0
    for document, length in enumerate(lengths):
        colour = OF_BLOCK[document]
        drawing.cells([(x + i * cell, 24, cell - 2, 28) for i in range(length)], colour, 0.8)
        x += length * cell
        slots = -(-length // block) * block
        for i in range(slots):
            cell_of_slot = ((slot + i) * cell, 114, cell - 2, 28)
            if i < length:
                drawing.cells([cell_of_slot], colour, 0.8)
            else:
                drawing.box(cell_of_slot, dash="3 3", opacity=0)
        slot += slots
    for b in range(slot // block):
        drawing.line(b * block * cell, 148, (b + 1) * block * cell - 4, 148)
        drawing.text((b + 0.5) * block * cell - 2, 166, f"block {b}", size=13)
    drawing.arrow(170, 58, 170, 84)
    drawing.save("sequences")


def cache() -> None:
    """Draws the reads of one decoding step from a cache of ten blocks."""
    drawing = Drawing(170)
    selected, own = (2, 6), 9
    drawing.text(0, 14, "mean keys: the gate reads all of them", "start", size=13)
    drawing.text(0, 92, "keys and values: the attention reads topk = 3 blocks", "start", size=13)
    for j in range(10):
        x = j * 48
        if j != own:
            drawing.cells([(x, 24, 42, 14)], PAST, 0.9)
        colour = OWN if j == own else PAST if j in selected else "currentColor"
        for i in range(4 if j != own else 2):
            drawing.cells([(x + 10.6 * i, 102, 9.6, 30)], colour, 0.15 if colour[0] == "c" else 0.9)
        drawing.text(x + 21, 152, str(j), size=13)
    for j in selected:
        drawing.arrow(j * 48 + 21, 42, j * 48 + 21, 76)
    drawing.save("cache")


def shards() -> None:
    """Draws the keys that rank 2 of four has at one time: of its shard, and by each exchange."""
    ranks, of_rank, heads, rank, width, height = 4, 3, 4, 2, 18, 15
    own = {(h, x) for h in range(heads) for x in range(rank * of_rank, (rank + 1) * of_rank)}
    earlier = range(rank * of_rank)
    panels: tuple[tuple[str, set[tuple[int, int]], set[tuple[int, int]]], ...] = (
        ("the shard of rank 2", own, set()),
        ("heads: a head, all tokens", {(rank, x) for x in range(ranks * of_rank)}, set()),
        (
            "gather: a head, and the next",
            own | {(1, x) for x in earlier},
            {(2, x) for x in earlier},
        ),
        ("blocks: the selected ones", own | {(1, 1), (1, 4)}, {(2, 1), (2, 2)}),
    )
    drawing = Drawing(250)
    for panel, (title, present, under_way) in enumerate(panels):
        x0, y0 = (panel % 2) * (WIDTH - ranks * of_rank * width), 24 + panel // 2 * 108
        drawing.text(x0, y0 - 9, title, "start", weight=600)
        for h, x in itertools.product(range(heads), range(ranks * of_rank)):
            cell = (x0 + x * width, y0 + h * height, width - 2, height - 2)
            opacity = 0.9 if (h, x) in present else 0.13
            if (h, x) in under_way:
                opacity = 0.45
            drawing.cells([cell], OF_BLOCK[x // of_rank], opacity)
    drawing.text(0, 226, "a row is a KV head, a cell a block, a colour a rank;", "start", size=13)
    drawing.text(0, 243, "strong: present, medium: under way, weak: absent", "start", size=13)
    drawing.save("shards")


def times() -> None:
    """Draws time against length in two pictures, from the GPU results of MoBA with 16 heads."""
    file = Path(__file__).parent / "benchmarks" / "h100-targets.json"
    results = [
        x
        for x in json.loads(file.read_text())["results"]
        if x["kv_heads"] == 16 and x["head_dim"] == 128 and x["topk"]
    ]
    lengths = sorted({x["length"] for x in results})
    left, right, top, bottom = 44, 322, 78, 284
    curves = (
        ("SDPA flash", "SDPA flash", None, OF_BLOCK[2], ""),
        ("SDPA cuDNN", "SDPA cuDNN", None, PAST, ""),
        ("flex_moba, 128/8", "flex_moba", 128, OWN, ""),
        ("flex_moba, 512/3", "flex_moba", 512, OWN, "5 4"),
    )

    def x(length: int) -> float:
        share = math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])
        return left + 12 + (right - left - 24) * share

    def y(ms: float, low: float = 0.3, high: float = 1200) -> float:
        return bottom - (bottom - top) * math.log(ms / low) / math.log(high / low)

    for name, key, title in (
        ("time-forward", "forward_ms", "Forward"),
        ("time-both", "both_ms", "Forward and backward"),
    ):
        drawing = Drawing(330, width=340)
        drawing.text(0, 16, title, "start", 15, 600)
        drawing.text(right, 16, "milliseconds", "end", 13)
        for ms in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
            power = str(ms)[0] == "1"
            drawing.line(left, y(ms), right, y(ms), 0.3 if power else 0.1)
            if power:
                drawing.text(left - 6, y(ms) + 4.5, f"{ms:,}", "end", 13)
        drawing.line(left, bottom, right, bottom)
        for length in lengths:
            drawing.line(x(length), bottom, x(length), bottom + 5)
            drawing.text(x(length), bottom + 20, tokens(length), size=13)
        drawing.text((left + right) / 2, bottom + 40, "tokens", size=13)
        for number, (label, call, block, colour, dash) in enumerate(curves):
            rows = {r["length"]: r[key][call] for r in results if block in (None, r["block_size"])}
            drawing.curve([(x(n), y(ms)) for n, ms in sorted(rows.items())], colour, dash)
            start, line = (0, 170)[number // 2], (38, 58)[number % 2]
            drawing.curve([(start + 4, line - 4), (start + 30, line - 4)], colour, dash)
            drawing.text(start + 40, line, label, "start", 13)
        drawing.save(name)


# A label, the losses by position, the keys that a query reads, a colour, and dashes.
Curve = tuple[str, list[float], int, str, str]


def increases(
    name: str, title: str, length: int, full: list[float], curves: list[Curve], high: float
) -> None:
    """Draws the loss beyond full attention's against position, on a logarithmic axis."""
    points, low = 16, 0.001
    left, right, top, bottom = 50, 328, 98, 304

    def x(position: float) -> float:
        return left + (right - left) * position / length

    def y(nats: float) -> float:
        return bottom - (bottom - top) * math.log(nats / low) / math.log(high / low)

    drawing = Drawing(350, width=340)
    drawing.text(0, 16, title, "start", 15, 600)
    drawing.text(right, 16, "nats beyond full attention", "end", 13)
    for power in (0.001, 0.01, 0.1, 1.0):
        for nats in (power, 2 * power, 5 * power):
            if nats <= high:
                drawing.line(left, y(nats), right, y(nats), 0.3 if nats == power else 0.1)
        if power <= high:
            drawing.text(left - 6, y(power) + 4.5, f"{power:g}", "end", 13)
    for position in range(0, length + 1, length // 4):
        drawing.line(x(position), bottom, x(position), bottom + 5)
        drawing.text(x(position), bottom + 20, tokens(position) if position else "0", size=13)
    drawing.text((left + right) / 2, bottom + 40, "position", size=13)
    for number, (label, losses, keys, colour, dash) in enumerate(curves):
        both = (torch.tensor(z).view(points, -1).mean(1).tolist() for z in (losses, full))
        centres = [(i + 0.5) * length / points for i in range(points)]
        drawing.curve(
            [
                (x(at), y(max(a - b, low)))
                for at, a, b in zip(centres, *both, strict=True)
                if at > keys  # before, every block is selected
            ],
            colour,
            dash,
        )
        start, line = (0, 170)[number // 3], (38, 58, 78)[number % 3]
        drawing.curve([(start + 4, line - 4), (start + 30, line - 4)], colour, dash)
        drawing.text(start + 40, line, label, "start", 13)
    drawing.save(name)


def losses() -> None:
    """Draws the losses of a converted model on two texts, and of models that were trained."""
    folder = Path(__file__).parent / "results"
    report = json.loads((folder / "smollm2-8k-h200.json").read_text())
    settings = {x["name"]: x["texts"] for x in report["settings"]}
    curves = (
        ("128 x 8", "128 x 8, no sink", 1024, "currentColor", "5 4"),
        ("128 x 8, sink 1, local 1", "128 x 8", 1024, OWN, ""),
        ("64 x 16, sink 1, local 1", "64 x 16", 1024, OF_BLOCK[3], ""),
        ("32 x 32, sink 1, local 1", "32 x 32", 1024, OF_BLOCK[2], ""),
        ("32 x 64, sink 1, local 1", "32 x 64", 2048, PAST, ""),
    )
    for text in ("prose", "source"):
        by_name = {name: texts[text]["by_position"] for name, texts in settings.items()}
        drawn = [(label, by_name[name], *style) for name, label, *style in curves]
        full = by_name["full attention"]
        increases(f"loss-{text}", text.capitalize(), report["options"]["length"], full, drawn, 2.0)
    files = [f"from-scratch-16k-{x}.json" for x in ("h100", "h200")]
    first, second = (json.loads((folder / x).read_text())["runs"] for x in files)
    runs = first | second
    full = runs["full"]["final"]
    drawn = [("128 x 8, untrained", full["moba"]["by_position"], 1024, "currentColor", "5 4")]
    for name, label, colour in (
        ("128x8", "128 x 8", OWN),
        ("128x8 conv", "128 x 8, conv.", OF_BLOCK[2]),
        ("64x16", "64 x 16", OF_BLOCK[3]),
        ("64x16 sub8", "64 x 16, sub 8", PAST),
    ):
        drawn.append((label, runs[name]["final"]["moba"]["by_position"], 1024, colour, ""))
    length = runs["full"]["options"]["length"]
    increases("loss-trained", "Trained", length, full["full"]["by_position"], drawn, 0.5)
    files = [f"smollm2-continued-{x}8k-h100.json" for x in ("", "sub-blocks-")]
    first, second = (json.loads((folder / x).read_text())["runs"] for x in files)
    runs = first | second
    full = runs["full"]["final"]
    drawn = [("64 x 16, untrained", full["moba"]["by_position"], 1024, "currentColor", "5 4")]
    for name, read, label, colour in (
        ("64x16 sink", "moba", "64 x 16", OF_BLOCK[3]),
        ("64x16 sink sub8", "moba", "64 x 16, sub 8", PAST),
        ("32x32 sink sub4", "moba", "32 x 32, sub 4", OF_BLOCK[2]),
        ("64x16 sink hybrid", "full", "hybrid", OWN),
    ):
        drawn.append((label, runs[name]["final"][read]["by_position"], 1024, colour, ""))
    length = runs["full"]["options"]["length"]
    increases("loss-continued", "Continued", length, full["full"]["by_position"], drawn, 0.5)


def seconds() -> None:
    """Draws the validation loss against the seconds of training, of runs of equal time."""
    folder = Path(__file__).parent / "results"
    files = [f"from-scratch-32k-{x}h200.json" for x in ("", "sub-blocks-")]
    first, second = (json.loads((folder / x).read_text())["runs"] for x in files)
    runs = first | second
    left, right, top, bottom = 50, 328, 98, 304
    low, high, most = 1.5, 3.0, 480

    def x(time: float) -> float:
        return left + (right - left) * time / most

    def y(nats: float) -> float:
        return bottom - (bottom - top) * (nats - low) / (high - low)

    drawing = Drawing(350, width=340)
    drawing.text(0, 16, "32K tokens", "start", 15, 600)
    drawing.text(right, 16, "validation loss, 8 contexts", "end", 13)
    for half in range(round(2 * low), round(2 * high) + 1):
        drawing.line(left, y(half / 2), right, y(half / 2), 0.3)
        drawing.text(left - 6, y(half / 2) + 4.5, f"{half / 2:g}", "end", 13)
    for time in range(0, most + 1, 120):
        drawing.line(x(time), bottom, x(time), bottom + 5)
        drawing.text(x(time), bottom + 20, str(time), size=13)
    drawing.text((left + right) / 2, bottom + 40, "seconds of training", size=13)
    for name, label, colour, start, line in (
        ("full 32K", "full attention", PAST, 0, 46),
        ("128x8 hybrid 32K longer", "hybrid", OWN, 170, 46),
        ("64x16 sub8 full while short 32K", "sub-blocks, full while short", OF_BLOCK[3], 0, 66),
    ):
        o, history = runs[name]["options"], runs[name]["history"]
        ends = dict(zip(itertools.count(10, 10), history["seconds"], strict=False))
        checks = [(ends[step], loss) for step, loss, _ in history["checks"] if loss <= high]
        drawing.curve([(x(time), y(loss)) for time, loss in checks], colour)
        if o["attention"] == "hybrid":
            switch = x(ends[round(o["steps"] * (1 - o["full_share"]))])
            drawing.line(switch, top, switch, bottom, 0.6)
            drawing.text(switch - 5, top + 14, "hybrid: full from here", "end", 13)
        drawing.curve([(start + 4, line), (start + 30, line)], colour)
        drawing.text(start + 40, line + 4, label, "start", 13)
    drawing.save("loss-seconds")


def main() -> None:
    """Draws all pictures."""
    for draw in (
        pattern,
        blocks,
        scores,
        routing,
        pipeline,
        union,
        sequences,
        cache,
        shards,
        times,
    ):
        draw()
    losses()
    seconds()


if __name__ == "__main__":
    main()
