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


@pytest.fixture(scope="module")
def on_h100(timed, finer_timed):
    """Returns the later runs: full attention, two second seeds, a hybrid, and one that stopped."""
    report = report_of("from-scratch-32k-sub-blocks-h100")
    assert report["corpus"] == report_of("from-scratch-32k-h200")["corpus"]
    full, *again, hybrid, half = report["runs"].values()
    same = ("full_while_short", "length", "batch", "lr", "optimizer", "layers", "windows")
    for run, first in zip(again, reversed(finer_timed[1:]), strict=True):
        assert run["options"] == first["options"] | {"seed": 1}
    for run in (hybrid, half):
        assert all(run["options"][x] == finer_timed[2]["options"][x] for x in same)
    assert hybrid["options"]["full_share"] == 0.1
    assert full["tokens"] == timed[0]["tokens"] == half["options"]["steps"] * 65536
    assert [x["options"]["seed"] for x in (full, hybrid, half)] == [0, 0, 0]
    assert [x["status"] for x in report["runs"].values()] == ["done"] * 4 + ["stopped"]
    assert {x["device"] for x in report["runs"].values()} == {"NVIDIA H100 80GB HBM3"}
    return {"full": full, "short": again[0], "every": again[1], "hybrid": hybrid, "half": half}


def test_the_table_of_equal_time_is_that_of_the_results(timed, equal, finer_timed, on_h100):
    again, every, short = finer_timed
    bases, rows = [own(timed[0]), own(again)], []
    for name, run, read in (
        ("full", timed[0], "128 x 8"),
        ("full, seed 1", again, "128 x 8"),
        ("full, again", on_h100["full"], PARTS),
        ("hybrid", timed[1], "128 x 8"),
        ("hybrid", equal, "128 x 8"),
        ("sub-blocks", every, PARTS),
        ("sub-blocks, seed 1", on_h100["every"], PARTS),
        ("sub-blocks, full while short", short, PARTS),
        ("sub-blocks, full while short, seed 1", on_h100["short"], PARTS),
        ("hybrid, sub-blocks", on_h100["hybrid"], PARTS),
    ):
        full, card = bases[run["options"]["seed"]], " (H100)" if "H100" in run["device"] else ""
        times = [f"{run['history']['seconds'][-1]:.0f}", f"{run['tokens_per_second']:,.0f}"]
        for served, kind in (("full", "full"), (read, "moba")):
            x = run["final"][kind]
            ends = [with_increase(x[part], full[part]) for part in ("loss", "last")]
            rows.append(
                [
                    name,
                    f"{run['tokens'] / 1e6:.0f}M",
                    *(x + card if run is not equal else "" for x in times),
                    *(served, ends[0], f"{x['first']:.4f}", ends[1]),
                ]
            )
    assert table("### Loss in equal time") == rows


def seconds_of(run):
    """Returns the seconds of all steps."""
    return run["history"]["seconds"][-1]


def check(run, step):
    """Returns the loss of a run on a few contexts after a step, and the seconds until then."""
    loss = next(y for x, y, _ in run["history"]["checks"] if x == step)
    return loss, run["history"]["seconds"][step // 10 - 1]


def test_the_numbers_of_the_text_on_sub_blocks_in_equal_time_are_those_of_the_results(
    timed, finer_timed, on_h100
):
    text = section("### Loss in equal time", "### One KV")
    full, (again, every, short) = timed[0], finer_timed
    assert (short["options"]["full_while_short"], short["options"]["short_share"]) == (True, 0.3)
    assert not every["options"]["full_while_short"]
    first, second, least = (own(x)["loss"] for x in (full, again, short))
    last = own(on_h100["short"])["loss"]
    shares = [f"{100 * (1 - x / y):.1f} %" for x, y in ((least, first), (last, second))]
    quote = f"ends {first - least:.3f} nats or {shares[0]} lower than full attention, and with seed"
    assert f"{quote} 1 {second - last:.3f} nats or {shares[1]} lower." in text
    times = [run["history"]["seconds"][-1] for run in (short, full)]
    quote = f"read {short['tokens'] / full['tokens']:.2f} times as many tokens, on the H200 in"
    assert f"{quote} {times[0]:.0f} seconds, where full attention took {times[1]:.0f}." in text
    ends = [[run["history"]["seconds"][x // 10 - 1] for x in (250, 500)] for run in (short, every)]
    quote = "250 steps take {:.0f} seconds, and {:.0f} with sub-blocks."
    assert quote.format(*(x[1] - x[0] for x in ends)) in text
    gains = [
        own(base)[part] - run["final"][kind][part]
        for run, base in ((short, full), (on_h100["short"], again))
        for kind in ("moba", "full")
        for part in ("first", "last")
    ]
    quote = "is {:.3f} lower than that of full attention, and in the last 4,096 tokens {:.3f}; with"
    quote += (
        " full attention at inference, it is {:.3f} and {:.3f} lower. With seed 1, it is {:.3f}"
    )
    quote += " and {:.3f} lower, and {:.3f} and {:.3f}."
    assert quote.format(*gains) in text
    end = check(full, full["history"]["checks"][-1][0])
    above, below = check(short, 3250), check(short, 3500)
    assert f"full attention is {end[0]:.3f} after {end[1]:.0f} seconds. With" in text
    assert "has {:.3f} after {:.0f} seconds and {:.3f} after".format(*above, below[0]) in text
    assert f"{below[0]:.3f} after {below[1]:.0f}." in text
    assert above[0] > end[0] > below[0]
    read, reads = (x["final"]["full"]["loss"] for x in (short, on_h100["short"]))
    quote = f"same model ends {first - read:.3f} nats below full attention, and with seed 1"
    assert f"{quote} {second - reads:.3f}, although" in text
    copied = [own(again)["copied"]]
    copied += [x["final"][y]["copied"] for x in (short, on_h100["short"]) for y in ("moba", "full")]
    copied += [own(x)["copied"] for x in (every, on_h100["every"])]
    one, *others = ([f"{x[y]:.2f}" for y in ("75%", "90%")] for x in copied)
    assert f"({one[0]} with seed 1)" in text
    assert f"({one[1]} with seed 1)" in text
    quote = "has {} and {} with MoBA, and {} and {} with full attention; with seed 1 {} and {}, and"
    quote += " {} and {}. With sub-blocks in all steps, the model has {} and {} with MoBA, and"
    quote += " with seed 1 {} and {}."
    assert quote.format(*(x for pair in others for x in pair)) in text
    assert (
        f"in contexts of 32K tokens, such a model ends {shares[0]} below it on an H200." in page()
    )
    longer = f"{seconds_of(on_h100['short']) / seconds_of(on_h100['full']):.2f} times the time"
    quote = f"With a second seed, on an H100 and in {longer}, it ends {shares[1]} below it."
    assert quote in page()
    for depth in ("75%", "90%"):
        best = [own(x)["copied"][depth] for x in (full, again)]
        assert short["final"]["moba"]["copied"][depth] > max(best)
    quote = f"the loss ends {shares[0]} below full attention's; a second seed, on an H100 in"
    assert f"{quote} {longer}, ends {shares[1]} below it." in page()
    quote = f"1,024 keys and sub-blocks: {first - least:.3f} less on an H200; with seed 1, in"
    assert f"{quote} {longer} on an H100, {second - last:.3f} less." in page()
    for name in ("docs/gates.md", "docs/hybrid.md"):
        assert f"a second seed took {longer}" in page(name)
    times = short["tokens"] / full["tokens"]
    quote = f"sub-blocks to the end and {times:.2f} times the tokens, {first - read:.3f} lower |"
    assert quote in page()
    row = next(x for x in table("This page shows") if x[1:3] == [PARTS, "1,024 of 32,768"])
    assert row[3] == f"-{shares[0].removesuffix(' %')} and -{shares[1]}"


def test_the_numbers_of_the_text_on_the_runs_on_h100_are_those_of_the_results(
    timed, finer_timed, on_h100
):
    text = section("### Loss in equal time", "### One KV")
    full, hybrid, half = (on_h100[x] for x in ("full", "hybrid", "half"))
    steps = [on_h100[x]["step_ms"] for x in ("short", "full")]
    quote = "a step takes {:.0f} ms there, and {:.0f} ms with full attention: it is {:.2f} times"
    faster = [full["step_ms"] / on_h100["short"]["step_ms"]]
    faster.append(timed[0]["step_ms"] / finer_timed[2]["step_ms"])
    assert f"{quote} as fast, and {{:.2f}} times on".format(*steps, *faster) in text
    seconds = {name: seconds_of(run) for name, run in on_h100.items()}
    ratio = f"{seconds['short'] / seconds['full']:.2f} times"
    quote = f"takes {seconds['short']:.0f} seconds, {ratio} as long as full attention with seed 0."
    assert quote in text
    each = []
    for run in (on_h100["short"], hybrid):
        end = round(run["options"]["steps"] * 0.3)
        first, last = (run["history"]["seconds"][x // 10 - 1] for x in (end // 2, end))
        each.append(1e3 * (last - first) / (end - end // 2 // 10 * 10))
    quote = (
        "the second half of them takes {:.0f} ms for a step, and {:.0f} ms in *hybrid, sub-blocks*,"
    )
    assert quote.format(*each) in text
    again, every, short = finer_timed
    runs = (timed[0], again), (every, on_h100["every"]), (short, on_h100["short"])
    losses = [[own(x)["loss"] for x in pair] for pair in runs]
    gains = [x - y for x, y in zip(losses[0], losses[1], strict=True)]
    quote = (
        "ends {:.3f} nats below full attention with seed 0, and {:.3f} with seed 1, so this gain"
    )
    assert quote.format(*gains) in text
    apart = [abs(x - y) for x, y in (losses[1], losses[2], losses[0])]
    quote = "end {:.3f} apart, those of *sub-blocks, full while short* {:.3f}, and those of full"
    assert f"{quote} attention {{:.3f}}.".format(*apart) in text

    pair = [own(run)["last"] for run in (on_h100["every"], again)]
    error = error_of(own(on_h100["every"]), own(again), "last_by_window")
    quote = "*sub-blocks* with seed 1 is {:.3f} above full attention, with a standard error of"
    assert f"{quote} {{:.3f}}.".format(pair[0] - pair[1], error) in text
    ends = [check(run, x) for run, x in ((hybrid, 3250), (full, 2250), (full, 2500))]
    ends.append(check(on_h100["short"], 3500))
    quote = (
        "*hybrid, sub-blocks* has {:.3f} after {:.0f} seconds, and full attention {:.3f}. The run"
    )
    assert quote.format(*ends[0], ends[1][0]) in text
    assert abs(ends[0][1] - ends[1][1]) < 1
    quote = (
        "has {:.3f} after {:.0f} seconds, and full attention with seed 0 has {:.3f} after {:.0f}."
    )
    assert quote.format(*ends[3], *ends[2]) in text

    read = full["final"]["moba"]["loss"]
    more = f"{100 * (read / own(full)['loss'] - 1):.1f} %"
    quote = f"it has a loss of {read:.4f}, {read - own(full)['loss']:.3f} or {more} above its own"
    assert f"{quote} loss on the H100, and the copied span" in text
    copied = [full["final"][x]["copied"][y] for x in ("moba", "full") for y in ("75%", "90%")]
    assert "has {:.2f} and {:.2f} instead of {:.2f} and {:.2f}.".format(*copied) in text
    higher = f"{more} higher"
    assert (
        f"Full attention's model has a loss {higher} if it reads with these sub-blocks." in page()
    )
    quote = f"Full attention's model from scratch has a loss {higher} if it reads with these"
    assert quote in page("docs/gates.md")
    least = hybrid["final"]["full"]["loss"]
    share = f"{100 * (1 - least / losses[0][0]):.1f} %"
    times = hybrid["tokens"] / full["tokens"]
    quote = f"it ends {losses[0][0] - least:.3f} nats or {share} lower, with one seed, after"
    assert f"{quote} {times:.2f} times as many tokens." in text
    quote = f"takes {seconds['hybrid']:.0f} seconds, and full attention {seconds['full']:.0f} on"
    assert quote in text
    copied = [x["final"]["full"]["copied"] for x in (hybrid, full)]
    quote = "has losses of {:.2f} and {:.2f}, with full attention's model on this host {:.2f} and"
    numbers = [x[depth] for x in copied for depth in ("75%", "90%")]
    assert f"{quote} {{:.2f}}.".format(*numbers) in text
    longer = f"{seconds['hybrid'] / seconds['full']:.2f} times the time"
    quote = f"ends {share} below it in {longer}, and copies as well, with one seed."
    assert quote in page()
    assert f"ends below it in {longer}, and copies as well" in page("docs/hybrid.md")
    ratios = [f"{seconds[x] / seconds['full']:.2f}" for x in ("short", "hybrid")]
    assert "ran on an H100, in {} and {} times the time of full".format(*ratios) in page()
    read, copied = own(hybrid)["loss"], own(hybrid)["copied"]
    quote = f"hybrid ends {losses[0][0] - read:.3f} lower, and the span has {copied['75%']:.2f}"
    assert f"{quote} and {copied['90%']:.2f}." in text
    quote = f"is then {read - losses[2][0]:.3f} behind the model with sub-blocks to the end, which"
    assert f"{quote} read {short['tokens'] / hybrid['tokens']:.2f} times as many tokens." in page()
    quote = f"{times:.2f} times the tokens, {losses[0][0] - least:.3f} lower; with sub-blocks to"
    assert quote in page()
    quote = f"stopped it after {half['steps']:,} of its {half['options']['steps']:,} steps."
    assert quote in text
    ends = [next(x for x in run["history"]["checks"] if x[0] == 2250)[1:] for run in (half, full)]
    quote = "its loss is {:.3f}, and that of full attention {:.3f} on the same host; in the last"
    assert quote.format(*(x[0] for x in ends)) in text
    assert "4,096 tokens, they are {:.3f} and {:.3f}.".format(*(x[1] for x in ends)) in text
    stopped = runs_of("from-scratch-32k-sub-blocks-h200")["64x16 sub8 32K longer seed 1"]
    quote = f"last of these at step {stopped['steps']:,}, after {seconds_of(stopped):.0f} seconds."
    assert quote in page()
    for name in ("checks", "loss_of_10_steps"):
        equal = stopped["history"][name], on_h100["every"]["history"][name]
        assert equal[0] == equal[1][: len(equal[0])]


def test_the_numbers_of_the_text_on_equal_time_are_those_of_the_results(
    timed, equal, finer_timed, on_h100
):
    text = section("### Loss in equal time", "### One KV")
    full, hybrid = timed
    assert full["options"]["seed"] == hybrid["options"]["seed"]
    less = own(full)["loss"] - hybrid["final"]["full"]["loss"]
    more = hybrid["final"]["moba"]["loss"] - own(full)["loss"]
    assert f"ends {less:.3f} nats lower" in text
    assert f"If the difference at the end, {less:.3f}, holds" in text
    times = hybrid["tokens"] / full["tokens"]
    quote = f"with {times:.2f} times the tokens in the time of full attention, the loss is"
    assert f"{quote} {less:.3f} lower; with sub-blocks and" in page()
    assert f"stays behind**: {more:.3f} nats" in text
    assert f"{hybrid['tokens'] / full['tokens']:.2f} times as many tokens" in text
    steps = [run["step_ms"] for run in (*timed, finer_timed[2])]
    quote = "takes {:.0f} ms with full attention on an H200, {:.0f} ms with 128 x 8, and {:.0f} ms"
    assert quote.format(*steps) in text
    later = [run for run in on_h100.values() if run["status"] == "done"]
    compiled = [run["history"]["compile_seconds"] for run in (*timed, *finer_timed, *later)]
    assert f"with {min(compiled):.0f} to {max(compiled):.0f} seconds of compilation" in text
    again, *parts = finer_timed
    bases = [own(full), own(again)]
    errors = [
        max(error_of(run["final"][x], bases[run["options"]["seed"]]) for run in runs)
        for x, runs in (
            ("full", (hybrid, equal, *parts, *later)),
            ("moba", (*parts, *later)),
            ("moba", (full, hybrid, equal, again)),
        )
    ]
    quote = "is at most {:.3f} nats for models that read with full attention, {:.3f} with sub-"
    assert f"{quote}blocks, and {{:.3f}} with 128 x 8;".format(*errors) in text
    last = [
        error_of(run["final"]["moba"], bases[run["options"]["seed"]], "last_by_window")
        for run in (*parts, *later)
    ]
    assert f"In the last 4,096 tokens, it is at most {max(last):.3f} with sub-blocks." in text
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
def test_pages_quote_the_equal_time(timed, finer_timed, on_h100, name):
    full, again, run = timed[0], finer_timed[0], finer_timed[2]
    text = (ROOT / name).read_text()
    less, least, *others = (
        f"{100 * (1 - one['final'][x]['loss'] / own(base)['loss']):.1f}"
        for one, base in ((run, full), (on_h100["short"], again))
        for x in ("moba", "full")
    )
    assert f"reads {run['tokens'] / full['tokens']:.2f} times as many tokens" in text
    quote = f"Its loss is {less} % lower with MoBA at inference, and {least} % lower with full"
    assert (
        f"{quote} attention. With a second seed, it is {others[0]} and {others[1]} % lower." in text
    )
    seconds = [x["history"]["seconds"][-1] for x in (on_h100["short"], on_h100["full"])]
    quote = f"the second one ran on an H100, in {seconds[0] / seconds[1]:.2f} times the time."
    longer = f"{seconds_of(run) / seconds_of(full):.2f} times the time of full attention on an H200"
    assert f"takes {longer}; {quote}" in text
