"""Tests that the tables and numbers of docs/results.md are those of the JSON files."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LIMITS = (1, 3, 10)  # percent
LENGTH = 8192
SHARED = {"sink_blocks": 1, "local_blocks": 1}


@pytest.fixture(scope="module")
def settings():
    """Returns the losses of SmolLM2 by setting, from the JSON file."""
    report = json.loads((DOCS / "results" / "smollm2-8k-h200.json").read_text())
    assert report["options"]["length"] == LENGTH
    return {json.dumps(x["setting"], sort_keys=True): x["texts"] for x in report["settings"]}


def losses_of(settings, **setting):
    return settings[json.dumps(setting, sort_keys=True)]


def increases(settings, **setting):
    """Returns the increase of the loss over full attention's, in percent, of prose and source."""
    texts, full = losses_of(settings, **setting), losses_of(settings)
    return [100 * (texts[x]["loss"] / full[x]["loss"] - 1) for x in ("prose", "source")]


def sparsity(block_size, topk):
    """Returns the share of the causal query-key pairs that MoBA does not compute, in percent."""
    read = sum(min(p + 1, (topk - 1) * block_size + p % block_size + 1) for p in range(LENGTH))
    return 100 * (1 - read / (LENGTH * (LENGTH + 1) / 2))


def page():
    return (DOCS / "results.md").read_text()


def table(heading):
    """Returns the cells of the first table after a line that begins with ``heading``."""
    lines = page().split(f"\n{heading}", 1)[1].split("\n\n")
    rows = next(x for x in lines if x.startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_conversion_is_that_of_the_results(settings):
    full = [losses_of(settings)[x]["loss"] for x in ("prose", "source")]
    expected = [["full attention", "", "", f"{LENGTH:,}", "0 %", *(f"{x:.4f}" for x in full)]]
    found = []
    for text, texts in settings.items():
        setting = json.loads(text)
        if len(setting) == 4 and setting.items() >= SHARED.items():
            size, topk, more = (
                setting["block_size"],
                setting["topk"],
                increases(settings, **setting),
            )
            within = next((f"within {x} %" for x in LIMITS if max(more) <= x), "beyond 10 %")
            cells = [
                f"{texts[x]['loss']:.4f} (+{y:.1f} %)" for x, y in zip(texts, more, strict=True)
            ]
            keys = [f"{size * topk:,}", f"{sparsity(size, topk):.0f} %"]
            found.append((max(more), [within, str(size), str(topk), *keys, *cells]))
    assert table("## Convert") == expected + [row for _, row in sorted(found)]


def test_the_table_of_options_is_that_of_the_results(settings):
    both = {"first_full": 2, "last_full": 3}
    options = {
        "none": {},
        "1 local": {"local_blocks": 1},
        "1 sink": {"sink_blocks": 1},
        "1 sink, 1 local": SHARED,
        "1 sink, 2 local": {"sink_blocks": 1, "local_blocks": 2},
        "1 sink, 4 local": {"sink_blocks": 1, "local_blocks": 4},
        '1 sink, 1 local, `gate="group"`': SHARED | {"gate": "group"},
        "1 sink, 1 local, first 2 layers full": SHARED | {"first_full": 2},
        "1 sink, 1 local, last 3 layers full": SHARED | {"last_full": 3},
        "1 sink, 1 local, first 2 and last 3 layers full": SHARED | both,
        "first 2 and last 3 layers full": both,
    }
    expected = []
    for name, more in options.items():
        sizes = ({"block_size": 64, "topk": 16}, {"block_size": 128, "topk": 8})
        cells = [f"+{x:.1f} %" for size in sizes for x in increases(settings, **size, **more)]
        expected.append([name, *cells])
    assert table("### Options") == expected


def test_the_numbers_of_the_text_are_those_of_the_results(settings):
    text = page()
    without = [
        max(increases(settings, **x)) if largest else min(increases(settings, **x))
        for largest in (False, True)
        for x in map(json.loads, settings)
        if x and "sink_blocks" not in x
    ]
    assert f"raises the loss by {min(without):.0f} to {max(without):.0f} %" in text
    errors = [0.0]
    for setting in map(json.loads, settings):
        if setting.get("sink_blocks"):
            texts, full = losses_of(settings, **setting), losses_of(settings)
            for name, found in texts.items():
                pairs = zip(found["by_window"], full[name]["by_window"], strict=True)
                differences = [a - b for a, b in pairs]
                errors.append(statistics.stdev(differences) / len(differences) ** 0.5)
                assert statistics.mean(differences) == pytest.approx(
                    found["loss"] - full[name]["loss"], abs=2e-5
                )
    assert f"{max(errors):.3f} nats" in text


def test_convert_quotes_the_results(settings):
    pytest.importorskip("transformers")
    from flexmoba.integrations.transformers import convert

    prose, source = increases(settings, block_size=64, topk=16, sink_blocks=1)
    text = re.sub(r"\s+", " ", convert.__doc__)
    plain = [x for x in map(json.loads, settings) if x and "sink_blocks" not in x]
    without = [more for x in plain for more in increases(settings, **x)]
    assert f"{min(without):.0f} to {max(without):.0f} %" in text
    assert f"{prose:.1f} and {source:.1f} %" in text


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/transformers.md",
                                  "docs/choosing.md"])  # fmt: skip
def test_pages_quote_the_results(settings, name):
    shared = SHARED if name == "docs/choosing.md" else {"sink_blocks": 1}
    prose, source = increases(settings, block_size=64, topk=16, **shared)
    plain = increases(settings, block_size=64, topk=16)
    text = (ROOT / name).read_text()
    assert f"{prose:.1f} and {source:.1f} %" in text
    if name != "docs/choosing.md":
        assert f"{plain[0]:.0f} and {plain[1]:.0f} %" in text
    else:
        finer = increases(settings, block_size=32, topk=32, **SHARED)
        assert f"{finer[0]:.1f} and {finer[1]:.1f} %" in text
