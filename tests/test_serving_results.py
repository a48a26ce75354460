"""Tests that the numbers of docs/serving.md and the text on pages are those of the JSON files."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def page():
    return (DOCS / "serving.md").read_text()


@pytest.fixture(scope="module")
def results():
    """Returns the results of ``flexmoba bench --preset paged``."""
    return json.loads((DOCS / "benchmarks" / "h200-paged.json").read_text())["results"]


def times(results, block_size, chunk=0):
    """Returns the times of batches by name, in the order of the results."""
    return {
        f"{x['batch']} x {x['length'] // 1024}K": x["step_ms"]
        for x in results
        if (x["block_size"], x["chunk"]) == (block_size, chunk)
    }


def test_the_numbers_of_the_text_on_loads_are_those_of_the_results():
    large, small = (
        json.loads((DOCS / "results" / f"{name}.json").read_text())
        for name in ("serving-h100", "serving-small-h200")
    )
    text = page()
    options, (moba, dense) = large["options"], (large["results"][x] for x in ("moba", "dense"))
    tokens = moba["tokens_per_second"] * moba["seconds"]
    prompts = tokens - options["requests"] * options["new-tokens"]
    assert f"{prompts / 1e6:.2f} million prompt tokens" in text
    first = [x["first_token"]["median"] for x in (moba, dense)]
    assert f"after {first[0]:.1f} s in place of {first[1]:.1f} s" in text
    assert f"take {moba['seconds']:.1f} s in place of {dense['seconds']:.1f} s" in text
    assert moba["evicted"] == dense["evicted"] == 0
    rates = [x["decoding_tokens_per_second"] for x in (moba, dense)]
    assert f"decode {rates[0] / rates[1]:.1f} times as fast" in text
    steps = [1e3 * options["requests"] / x for x in rates]
    assert "takes {:.1f} ms with MoBA and {:.1f} ms with `dense`".format(*steps) in text
    for x in (moba, dense):
        assert f"Both attentions took {x['peak_GiB']:.0f} GiB" in text
    moba, dense = (small["results"][x] for x in ("moba", "dense"))
    assert f"take {moba['seconds']:.1f} s in place of {dense['seconds']:.1f} s, and dec" in text
    steps = [16e3 / x["decoding_tokens_per_second"] for x in (moba, dense)]
    assert "takes {:.1f} ms with MoBA and {:.1f} ms with `dense`".format(*steps) in text


def test_the_table_of_steps_is_that_of_the_results(results):
    rows = {}
    for block_size in (128, 512):
        for name, x in times(results, block_size).items():
            dense = min(x["SDPA flash"], x["SDPA cuDNN"])
            cells = [f"{x['flex_moba']:.3f}", f"{dense / x['flex_moba']:.1f}x"]
            rows.setdefault(name, []).extend(cells)
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines = ["| --- | --- | --- | --- | --- |", *lines]
    heading = "| sequences x context | 128/8 ms | over dense | 512/8 ms | over dense |"
    assert "\n".join(["", heading, *lines, "", ""]) in page()


def test_the_numbers_of_the_text_on_chunks_are_those_of_the_results(results):
    texts = {
        ("32 x 128K", 8192): "at 128K take {:.1f} ms at 128/8, and full attention over the same "
        "pages takes {:.1f} times as long",
        ("32 x 32K", 8192): "at 32K, {:.1f} ms and {:.1f} times.",
        ("32 x 32K", 2048): "at 32K takes {:.1f} ms, hardly less than one of 8K, and {:.1f} times.",
    }
    for (name, chunk), text in texts.items():
        step = times(results, 128, chunk)[name]
        assert text.format(step["flex_moba"], step["topk=None"] / step["flex_moba"]) in page()


def test_the_comparison_with_the_cache_is_that_of_the_results(results):
    text = (DOCS / "benchmarks.md").read_text()
    for block_size, sentence in (
        (128, "is {:.2f} to {:.2f} times that of `MobaCache` at 128/8"),
        (512, "and {:.2f} to {:.2f} times at 512/8"),
    ):
        steps = times(results, block_size)
        if block_size == 512:
            del steps["256 x 4K"]  # full attention over pages, but not in a cache
        ratios = [x["flex_moba"] / x["MobaCache"] for x in steps.values()]
        assert sentence.format(min(ratios), max(ratios)) in text
        # The timed steps of the cache read 6 to 55 keys of their own block.
        more = 8 * block_size / (7 * block_size + (6 + 55) / 2) - 1
        assert f"{100 * more:.0f} % more" in text


def test_the_comparison_at_the_same_token_is_that_of_the_results():
    report = json.loads((DOCS / "results" / "pages-and-cache-h100.json").read_text())
    text, rows, ratios = (DOCS / "benchmarks.md").read_text(), [], {}
    for name, pairs in report["results"].items():
        cells = []
        for kind in ("last", "middle", "unlike"):
            ours, cache = pairs[kind]["flex_moba"], pairs[kind]["MobaCache"]
            ratios.setdefault(kind, []).append(ours / cache)
            cells += [f"{ours:.3f}", f"{cache:.3f}", f"{ours / cache:.2f}"]
        rows.append(f"| {' | '.join([name, *cells[:6], cells[-1]])} |")
    assert "\n".join(["", *rows, "", ""]) in text
    same = ratios["last"] + ratios["middle"]
    assert max(same) <= 1.1  # the target
    assert f"takes {min(same):.2f} to {max(same):.2f} times as long" in text
    more = [f"{100 * x - 100:.0f}" for x in (min(ratios["unlike"]), max(ratios["unlike"]))]
    assert "whole excess of {} to {} %".format(*more) in text
    assert f"one {report['device']}, the same versions, at {report['commit'][:7]}" in text
