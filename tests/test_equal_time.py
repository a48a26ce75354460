"""Tests that the numbers on training in equal time are those of the JSON files."""

import json

import pytest

from tests.results import (
    ROOT,
    error_of,
    own,
    page,
    report_of,
    runs_of,
    section,
    table,
    with_increase,
)

PARTS = "64 x 16, sub-blocks of 8"


@pytest.fixture(scope="module")
def timed():
    """Returns the runs of equal time, full attention and hybrid, from the JSON file."""
    runs = runs_of("from-scratch-32k-h200")
    return runs["full 32K"], runs["128x8 hybrid 32K longer"]


@pytest.fixture(scope="module")
def equal(timed):
    """Returns the hybrid that read as many tokens as full attention, on another GPU."""
    run = runs_of("from-scratch-32k-h100")["128x8 hybrid 32K"]
    full = timed[0]
    assert (run["tokens"], run["options"]["seed"]) == (full["tokens"], full["options"]["seed"])
    corpora = [report_of(f"from-scratch-32k-{x}")["corpus"] for x in ("h100", "h200")]
    assert corpora[0] == corpora[1]
    assert run["device"] != full["device"]
    return run


@pytest.fixture(scope="module")
def finer_timed(timed):
    """Returns full attention with seed 1, and two runs with sub-blocks, in equal time."""
    files = [f"from-scratch-32k-{x}" for x in ("h200", "sub-blocks-h200")]
    assert len({json.dumps(report_of(name)["corpus"]) for name in files}) == 1
    names = "full 32K seed 1", "64x16 sub8 32K longer", "64x16 sub8 full while short 32K"
    runs = [runs_of(files[1])[name] for name in names]
    full = timed[0]
    assert [x["options"]["seed"] for x in (full, *runs)] == [0, 1, 0, 0]
    shared = ("length", "batch", "lr", "optimizer", "layers", "windows", "short_share")
    assert all(run["options"][x] == full["options"][x] for run in runs for x in shared)
    assert {run["device"] for run in (full, *runs)} == {"NVIDIA H200"}
    return runs


def test_the_table_of_equal_time_is_that_of_the_results(timed, equal, finer_timed):
    full, rows = own(timed[0]), []
    again, every, short = finer_timed
    for name, run, read in (
        ("full", timed[0], "128 x 8"),
        ("full, seed 1", again, "128 x 8"),
        ("hybrid", timed[1], "128 x 8"),
        ("hybrid", equal, "128 x 8"),
        ("sub-blocks", every, PARTS),
        ("sub-blocks, full while short", short, PARTS),
    ):
        seconds, speed = run["history"]["seconds"][-1], run["tokens_per_second"]
        for served, kind in (("full", "full"), (read, "moba")):
            x = run["final"][kind]
            ends = [with_increase(x[part], full[part]) for part in ("loss", "last")]
            rows.append(
                [
                    name,
                    f"{run['tokens'] / 1e6:.0f}M",
                    f"{seconds:.0f}" if run is not equal else "",
                    f"{speed:,.0f}" if run is not equal else "",
                    *(served, ends[0], f"{x['first']:.4f}", ends[1]),
                ]
            )
    assert table("### Loss in equal time") == rows


def check(run, step):
    """Returns the loss of a run on a few contexts after a step, and the seconds until then."""
    loss = next(y for x, y, _ in run["history"]["checks"] if x == step)
    return loss, run["history"]["seconds"][step // 10 - 1]


def test_the_numbers_of_the_text_on_sub_blocks_in_equal_time_are_those_of_the_results(
    timed, finer_timed
):
    text = section("### Loss in equal time", "### One KV")
    full, (again, every, short) = timed[0], finer_timed
    assert (short["options"]["full_while_short"], short["options"]["short_share"]) == (True, 0.3)
    assert not every["options"]["full_while_short"]
    first, second, less, least = (own(x)["loss"] for x in (full, again, every, short))
    share = f"{100 * (1 - least / first):.1f} %"
    quote = f"ends {first - least:.3f} nats or {share} lower than full attention, and"
    assert f"{quote} {second - least:.3f} lower than full attention with seed 1." in text
    times = [run["history"]["seconds"][-1] for run in (short, full, again)]
    quote = f"read {short['tokens'] / full['tokens']:.2f} times as many tokens in {times[0]:.0f}"
    assert f"{quote} seconds, where full attention took {times[1]:.0f} and {times[2]:.0f}." in text
    quote = f"read {every['tokens'] / full['tokens']:.2f} times as many tokens and ends"
    assert f"{quote} {first - less:.3f} nats lower." in text
    quote = f"The gain of *sub-blocks, full while short*, {first - least:.3f}, is larger than the"
    assert quote in text
    assert f"The seeds of full attention end {first - second:.3f} apart." in text
    ends = [[run["history"]["seconds"][x // 10 - 1] for x in (250, 500)] for run in (short, every)]
    quote = "250 steps take {:.0f} seconds, and {:.0f} with sub-blocks."
    assert quote.format(*(x[1] - x[0] for x in ends)) in text
    gains = [
        own(full)[part] - short["final"][kind][part]
        for kind in ("moba", "full")
        for part in ("first", "last")
    ]
    quote = "is {:.3f} lower than that of full attention, and in the last 4,096 tokens {:.3f}; with"
    quote += " full attention at inference, it is {:.3f} and {:.3f} lower."
    assert quote.format(*gains) in text
    last = check(full, full["history"]["checks"][-1][0])
    above, below = check(short, 3250), check(short, 3500)
    assert f"full attention is {last[0]:.3f} after {last[1]:.0f} seconds. With" in text
    assert "has {:.3f} after {:.0f} seconds and {:.3f} after".format(*above, below[0]) in text
    assert f"{below[0]:.3f} after {below[1]:.0f}." in text
    assert above[0] > last[0] > below[0]
    read = short["final"]["full"]["loss"]
    assert f"same model ends {first - read:.3f} nats below full attention, although" in text
    hybrid = timed[1]["final"]["full"]["loss"]
    assert f"This is {hybrid - read:.3f} lower than the hybrid, a difference that may be" in text
    higher = every["final"]["full"]["loss"] - hybrid
    assert f"in all steps, it is {higher:.3f} higher than the hybrid. The hybrid took" in text
    assert f"The hybrid took {timed[1]['history']['seconds'][-1]:.0f} seconds, and" in text
    copied = [own(again)["copied"]] + [short["final"][x]["copied"] for x in ("moba", "full")]
    one, moba, dense = ([f"{x[y]:.2f}" for y in ("75%", "90%")] for x in copied)
    assert f"({one[0]} with seed 1)" in text
    assert f"({one[1]} with seed 1)" in text
    quote = f"has {moba[0]} and {moba[1]} with MoBA, and {dense[0]} and {dense[1]} with full"
    assert quote in text
    assert f"such a model ends {share} below it, with one seed, but copies less well." in page()
    for depth in ("75%", "90%"):
        best = [own(x)["copied"][depth] for x in (full, again)]
        assert short["final"]["moba"]["copied"][depth] > max(best)
    assert f"the loss of one seed ends {share} below full attention's." in page()
    assert f"1,024 keys and sub-blocks: {first - least:.3f} less, one seed." in page()
    times = short["tokens"] / full["tokens"]
    quote = f"sub-blocks to the end and {times:.2f} times the tokens, {first - read:.3f} lower |"
    assert quote in page()
    row = next(x for x in table("This page shows") if x[1:3] == [PARTS, "1,024 of 32,768"])
    assert row[3] == f"-{share}"


@pytest.fixture(scope="module")
def seeds(finer_timed):
    """Returns the losses of two seeds with sub-blocks on a few contexts, before the end."""
    again = runs_of("from-scratch-32k-sub-blocks-h200")["64x16 sub8 32K longer seed 1"]
    assert again["options"] == finer_timed[1]["options"] | {"seed": 1}
    assert again["status"] == "stopped"
    return again["steps"], [check(run, 3250)[0] for run in (finer_timed[1], again)]


def test_the_text_names_the_seed_that_did_not_end(timed, finer_timed, seeds):
    text = section("### Loss in equal time", "### One KV")
    steps, (first, second) = seeds
    every = finer_timed[1]
    quote = f"stopped after {steps:,} of its {every['steps']:,} steps, at a time limit. After 3,250"
    assert quote in text
    assert f"its loss on 8 contexts is {second:.3f}, where seed 0 has {first:.3f}." in text
    gain = own(timed[0])["loss"] - own(every)["loss"]
    quote = f"The difference, {second - first:.3f}, is larger than the gain of *sub-blocks*,"
    assert f"{quote} {gain:.3f}, so this gain may be chance." in text
    assert second - first > gain


def test_the_numbers_of_the_text_on_equal_time_are_those_of_the_results(timed, equal, finer_timed):
    text = section("### Loss in equal time", "### One KV")
    full, hybrid = timed
    assert full["options"]["seed"] == hybrid["options"]["seed"]
    less = own(full)["loss"] - hybrid["final"]["full"]["loss"]
    more = hybrid["final"]["moba"]["loss"] - own(full)["loss"]
    assert f"ends {less:.3f} nats lower" in text
    assert f"If the difference at the end, {less:.3f}, holds" in text
    times = hybrid["tokens"] / full["tokens"]
    quote = f"with {times:.2f} times the tokens in the time of full attention, the loss is"
    assert f"{quote} {less:.3f} lower; with sub-blocks to" in page()
    assert f"stays behind**: {more:.3f} nats" in text
    assert f"{hybrid['tokens'] / full['tokens']:.2f} times as many tokens" in text
    steps = [run["step_ms"] for run in (*timed, finer_timed[2])]
    quote = "takes {:.0f} ms with full attention, {:.0f} ms with 128 x 8, and {:.0f} ms with 64 x"
    assert quote.format(*steps) in text
    compiled = [run["history"]["compile_seconds"] for run in (*timed, *finer_timed)]
    assert f"with {min(compiled):.0f} to {max(compiled):.0f} seconds of compilation" in text
    again, *parts = finer_timed
    errors = [
        max(error_of(run["final"][x], own(full)) for run in runs)
        for x, runs in (
            ("full", (hybrid, equal, *finer_timed)),
            ("moba", parts),
            ("moba", (full, hybrid, equal, again)),
        )
    ]
    quote = "is at most {:.3f} nats for models that read with full attention, {:.3f} with sub-"
    assert f"{quote}blocks, and {{:.3f}} with 128 x 8;".format(*errors) in text
    gaps = [equal["final"][x]["loss"] - own(full)["loss"] for x in ("full", "moba")]
    assert f"the hybrid ends {gaps[0]:.3f} nats higher** with full" in text
    assert f"and {gaps[1]:.3f} with 128 x 8." in text
    assert f"and {gaps[0]:.3f} [from scratch](#loss-in-equal-time)" in page()
    assert f"from scratch at 32K, a gap of {gaps[0]:.3f};" in page()
    near, far = (equal["final"]["full"]["copied"][x] for x in ("90%", "75%"))
    assert f"as many tokens has {far:.2f} and {near:.2f}." in text

    switch = round(hybrid["options"]["steps"] * 0.9)
    before, after = check(hybrid, switch // 250 * 250), check(hybrid, switch // 250 * 250 + 250)
    near, last = check(full, 2250), check(full, full["history"]["checks"][-1][0])
    assert f"a loss of {before[0]:.3f} after {before[1]:.0f} seconds" in text
    assert f"full attention has {near[0]:.3f} after {near[1]:.0f}." in text
    assert f"is {after[0]:.3f} after {after[1]:.0f} seconds" in text
    assert f"is {last[0]:.3f} after {last[1]:.0f}." in text
    total = full["history"]["seconds"][-1]
    assert f"between {before[1]:.0f} and {after[1]:.0f} of the {total:.0f} seconds" in text
    # If the hybrid ends as far below full attention on the 8 contexts as on all.
    assert after[0] < hybrid["history"]["checks"][-1][1] + less
    copied = [run["final"]["full"]["copied"] for run in (hybrid, full)]
    assert "loss of {:.2f} with the longer hybrid".format(copied[0]["75%"]) in text
    assert "of {:.2f} with the model".format(copied[1]["75%"]) in text
    assert "they have {:.2f} and {:.2f} (".format(*(x["90%"] for x in copied)) in text
    speeds = [run["tokens_per_second"] for run in timed]
    assert f"trains {speeds[1] / speeds[0]:.1f} times as fast (on H200)" in page()


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_pages_quote_the_equal_time(timed, finer_timed, seeds, name):
    first, second = seeds[1]
    full, run = timed[0], finer_timed[2]
    text = (ROOT / name).read_text()
    less, least = (
        f"{100 * (1 - run['final'][x]['loss'] / own(full)['loss']):.1f} % lower"
        for x in ("moba", "full")
    )
    assert f"reads {run['tokens'] / full['tokens']:.2f} times as many tokens" in text
    quote = f"Its loss is {less} with MoBA at inference, and {least} with full attention."
    assert quote in text
    apart = f"{100 * (second / first - 1):.1f} %"
    assert 3250 / finer_timed[1]["options"]["steps"] == 5 / 6  # "five sixths of its steps"
    quote = f"This is one seed; two seeds of a similar run differ by {apart} after five sixths of"
    assert f"{quote} its steps. Queries" in text
