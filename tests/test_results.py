"""Tests that the tables and numbers of docs/results.md are those of the JSON files."""

import json
import re
import statistics

import pytest

from tests.results import (
    DOCS,
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


def sparsity(block_size, topk, length=LENGTH):
    """Returns the share of the causal query-key pairs that MoBA does not compute, in percent."""
    read = sum(min(p + 1, (topk - 1) * block_size + p % block_size + 1) for p in range(length))
    return 100 * (1 - read / (length * (length + 1) / 2))


@pytest.fixture(scope="module")
def trained():
    """Returns the runs of models that were trained from scratch, from the JSON file."""
    return {ROWS[name]: run for name, run in runs_of("from-scratch-16k-h100").items()}


@pytest.fixture(scope="module")
def later():
    """Returns the later runs from scratch with seed 0, by their names in the table."""
    names = [f"from-scratch-16k-{x}" for x in ("h100", "more-h100", "h200", "more-h200")]
    assert len({json.dumps(report_of(name)["corpus"]) for name in names}) == 1
    full, *others = (runs_of(name) for name in names)
    full, runs = full["full"], {x: run for some in others for x, run in some.items()}
    runs = {row: runs[name] for name, row in LATER.items()}
    shared = ("length", "batch", "steps", "seed", "lr", "optimizer", "layers", "windows")
    assert all(run["options"][x] == full["options"][x] for run in runs.values() for x in shared)
    assert all(run["tokens"] == full["tokens"] for run in runs.values())
    return runs


@pytest.fixture(scope="module")
def complete(trained, later):
    """Returns the runs with seed 0."""
    return trained | later


LATER = {
    "64x16 sub8": "64 x 16, sub-blocks of 8",
    "128x8 last 2 full": "128 x 8, last two layers full",
    "64x16 sub8 last 2 full": "64 x 16, sub-blocks of 8, last two layers full",
    "512x8": "512 x 8",
}
ROWS = {
    "full": "full",
    "64x16": "64 x 16",
    "128x8": "128 x 8",
    "128x8 conv": "128 x 8, key convolution",
}


@pytest.fixture(scope="module")
def continued():
    """Returns the runs that continued the training of SmolLM2, from the JSON file."""
    file = DOCS / "results" / "smollm2-continued-8k-h100.json"
    return json.loads(file.read_text())["runs"]


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


@pytest.fixture(scope="module")
def finer():
    """Returns the losses of SmolLM2 with sub-blocks by setting, from the JSON file."""
    file = DOCS / "results" / "smollm2-sub-blocks-8k-h200.json"
    report = json.loads(file.read_text())
    return {json.dumps(x["setting"], sort_keys=True): x["texts"] for x in report["settings"]}


def test_the_table_of_sub_blocks_is_that_of_the_results(settings, finer):
    shared = finer.keys() & settings.keys()
    assert len(shared) == 2  # full attention, and one setting, on the same contexts
    for x in shared:
        for text in ("prose", "source"):
            assert finer[x][text]["by_window"] == settings[x][text]["by_window"]
    both, removed, rows = settings | finer, [], []
    for parts in (1, 2, 4, 8):
        row = [str(parts)]
        for size, topk in ((32, 32), (64, 16), (128, 8)):
            more = {"gate_block_size": size // parts} if parts > 1 else {}
            base = {"block_size": size, "topk": topk, "sink_blocks": 1}
            found = increases(both, **base, **more)
            row += [f"+{x:.1f} %" for x in found]
            if parts == 8:
                pairs = zip(found, increases(both, **base), strict=True)
                removed += [100 * (1 - x / y) for x, y in pairs]
        rows.append(row)
    assert table("### Sub-blocks") == rows
    assert f"remove {min(removed):.0f} to {max(removed):.0f} % of the increase" in page()
    finest = increases(both, block_size=32, topk=32, sink_blocks=1, gate_block_size=4)
    assert max(finest) < 1  # "stays within 1 %"


@pytest.mark.parametrize("name", ["docs/transformers.md",
                                  "flexmoba/integrations/transformers/convert.py"])  # fmt: skip
def test_pages_quote_the_sub_blocks(settings, finer, name):
    sizes = {"block_size": 64, "topk": 16, "sink_blocks": 1, "gate_block_size": 8}
    prose, source = increases(settings | finer, **sizes)
    text = re.sub(r"\s+", " ", (ROOT / name).read_text())
    assert f"to {prose:.1f} and {source:.1f} %" in text


def test_the_summary_and_the_claims_quote_the_results(settings, continued, trained):
    text = page()
    plain = increases(settings, block_size=64, topk=16, sink_blocks=1)
    assert f"raises the loss by {plain[0]:.1f} and {plain[1]:.1f} %, and finds" in text
    full, hybrid = own(continued["full"]), continued["64x16 sink hybrid"]["final"]["full"]
    left = f"{hybrid['loss'] - full['loss']:.3f}"
    assert f"leave {left} nats in [continued training]" in text
    assert f"in continued training, a gap of {left} is left" in text
    finer = own(trained["128 x 8"])["loss"] - own(trained["64 x 16"])["loss"]
    assert f"Confirmed: {finer:.3f} between 8 of 128 blocks and 16 of 256" in text


def test_the_table_of_options_is_that_of_the_results(settings):
    both = {"first_full": 2, "last_full": 3}
    options = {
        "none": {},
        "1 local": {"local_blocks": 1},
        "1 sink": {"sink_blocks": 1},
        "1 sink, 1 local": SHARED,
        "1 sink, 4 local": {"sink_blocks": 1, "local_blocks": 4},
        '1 sink, 1 local, `gate="group"`': SHARED | {"gate": "group"},
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


@pytest.fixture(scope="module")
def by_layer():
    """Returns each setting with one topk, with its list by layer, and full attention's losses."""
    report = report_of("smollm2-by-layer-4k-cpu")
    full, *rest = report["settings"]
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    for one, other in pairs:
        topks = other["setting"]["by_layer"]
        assert one["setting"] == {x: y for x, y in other["setting"].items() if x != "by_layer"}
        assert (len(topks), sum(topks)) == (30, 30 * one["setting"]["topk"])  # as many blocks
    return pairs, full["texts"]


def test_the_table_of_topks_by_layer_is_that_of_the_results(by_layer):
    pairs, full = by_layer
    expected = []
    for one, other in pairs:
        x = one["setting"]
        part = f", sub-blocks of {x['gate_block_size']}" if "gate_block_size" in x else ""
        name = f"{x['block_size']} x {x['topk']}{part}"
        for run, more in ((one, ""), (other, ", by layer")):
            row = [name + more, f"{100 * run['mass']:.1f} %"]
            for text in ("prose", "source"):
                increase = run["texts"][text]["loss"] / full[text]["loss"] - 1
                row.append(f"{100 * increase:+.1f} %")
            for text in ("prose", "source"):
                a, b = run["texts"][text], one["texts"][text]
                difference = f"{a['loss'] - b['loss']:.3f} ± {error_of(a, b):.3f}"
                row.append(difference if run is other else "")
            expected.append(row)
    assert table("#### A topk for each layer") == expected


def test_the_text_on_topks_by_layer_quotes_the_results(by_layer):
    pairs, _ = by_layer
    text = section("#### A topk for each layer by captured mass", "### Sub-blocks")
    masses = [100 * (b["mass"] - a["mass"]) for a, b in pairs]
    assert f"the mass is {min(masses):.1f} to {max(masses):.1f} percentage points higher" in text
    errors, late, late_errors = [], [], []
    for one, other in pairs:
        both = [(other["texts"][x], one["texts"][x]) for x in ("prose", "source")]
        errors.append([(a["loss"] - b["loss"]) / error_of(a, b) for a, b in both])
        late += [f"{a['second_half'] - b['second_half']:.3f}" for a, b in both]
        late_errors += [error_of(a, b, "second_half_by_window") for a, b in both]
    assert min(errors[0] + errors[1]) > 5  # "by more than five standard errors"
    assert f"at most {max(errors[2]):.1f} standard errors" in text
    quote = "{} and {} nats higher with 64 x 8, {} and {} with 64 x 16, and {} and {} with sub-"
    assert f"{quote.format(*late)}blocks (standard errors up to {max(late_errors):.3f})." in text
    lists = [other["setting"]["by_layer"] for _, other in pairs]
    for topks, (one, _) in zip(lists, pairs, strict=True):
        more = [x >= one["setting"]["topk"] for x in topks]
        assert more == [True] * 11 + [False] * 19  # "the first 11 of 30 layers"
    shown = text.split("```text\n")[1].split("\n```")[0].splitlines()
    assert [[int(x) for x in line.split(",")] for line in shown] == lists


def test_the_measurement_of_topks_by_layer_is_that_of_the_results():
    report, text = report_of("smollm2-by-layer-4k-cpu"), section("### Measurement", "### Limits")
    x = report["options"]
    settings = " ".join(x["by_layer"])
    assert f"--length {x['length']} --windows {x['windows']} --batch {x['batch']} \\" in text
    assert f"--by-layer {settings} --device {report['device']} --json" in text
    versions = "torch {torch}, transformers {transformers}".format(**report["versions"])
    assert f"on a CPU: {versions}, flexmoba at {report['commit'][:7]}" in text


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


def second_seeds():
    """Returns the runs from scratch with seed 1 by their names in the table."""
    parts = ("h200", "seed-1-h100", "more-h200", "sub-blocks-seed-1-h100")
    files = [f"from-scratch-16k-{x}" for x in parts]
    assert len({json.dumps(report_of(name)["corpus"]) for name in files}) == 1
    runs = {x: run for name in files for x, run in runs_of(name).items() if x.endswith(" seed 1")}
    assert {x["options"]["seed"] for x in runs.values()} == {1}
    names = {f"{x} seed 1": f"{row}, seed 1" for x, row in (ROWS | LATER).items()}
    return {names[x]: run for x, run in runs.items()}


def test_the_table_of_training_is_that_of_the_results(complete, later):
    expected = []
    others = [x for x in second_seeds() if "convolution" not in x and x != "128 x 8, seed 1"]
    others += later  # with later versions, or on another GPU
    for name, run in (complete | second_seeds()).items():
        options, losses = run["options"], own(run)
        sizes = options["block_size"], options["topk"], options["length"]
        share = 0 if options["attention"] == "full" else sparsity(*sizes)
        base = own(complete["full"] if options["seed"] == 0 else second_seeds()["full, seed 1"])
        times = [f"{run['tokens_per_second']:,.0f}", f"{run['history']['seconds'][-1] / 60:.1f}"]
        expected.append(
            [
                name,
                f"{share:.0f} %",
                with_increase(losses["loss"], base["loss"]),
                f"{losses['first']:.4f}",
                with_increase(losses["last"], base["last"]),
                *(["", ""] if name in others else times),
            ]
        )
    assert table("## Train") == expected


def test_the_table_of_the_switch_is_that_of_the_results(complete):
    full, expected = own(complete["full"]), []
    for name, run in complete.items():
        losses = run["final"]["full"]
        cells = [with_increase(losses[x], full[x]) for x in ("loss", "last")]
        expected.append([name, *cells])
    assert table("### Switch") == expected


def test_the_table_of_copies_is_that_of_the_results(complete):
    expected = []
    for name, run in complete.items():
        if "convolution" in name:
            continue
        for attention in ("moba", "full")[name == "full" :]:
            served = name if attention == "moba" else "full"
            copied = run["final"][attention]["copied"].values()
            expected.append([name, served, *(f"{x:.2f}" for x in copied)])
    assert table("### Copy") == expected


def test_the_numbers_of_the_text_on_later_runs_are_those_of_the_results(trained, later):
    text, full = section("## Train from scratch", "### Switch"), own(trained["full"])
    gaps = {
        name: [own(run)[x] - full[x] for x in ("loss", "last")]
        for name, run in (trained | later).items()
    }
    shown = "512x8", "64x16 sub8", "128x8 last 2 full", "64x16 sub8 last 2 full"
    coarse, parts, layers, together = (gaps[LATER[x]] for x in shown)
    assert f"Sub-blocks and two full layers leave a gap of {together[0]:.3f} nats**" in text
    again = second_seeds()
    other_full = own(again["full, seed 1"])["loss"]
    seconds = {
        x: own(again[f"{x}, seed 1"])["loss"] - other_full
        for x in ("128 x 8", *(LATER[y] for y in shown[1:]))
    }
    assert f"With seed 1, the gap with sub-blocks is {seconds[LATER['64x16 sub8']]:.3f};" in text
    quote = "and with seed 1 {:.3f} instead of {:.3f}. These"
    assert quote.format(seconds[LATER["128x8 last 2 full"]], seconds["128 x 8"]) in text
    pairs = [(f"{gaps[x][0]:.3f}", f"{y:.3f}") for x, y in seconds.items()]
    quote = "seed 0 and seed 1 are {} and {} with 128 x 8, {} and {} with 64 x 16 and sub-blocks,"
    assert quote.format(*pairs[0], *pairs[1]) in text
    quote = "{} and {} with 128 x 8 and two full layers, and {} and {} with 64 x 16, sub-blocks"
    assert quote.format(*pairs[2], *pairs[3]) in text
    assert pairs[3][0] == pairs[3][1]  # "with 64 x 16 and each of two seeds"
    assert f"Its gap is {coarse[0]:.3f}. In the last 2,048 tokens, it is {coarse[1]:.3f}." in text
    plain = gaps["64 x 16"]
    quote = f"{parts[0]:.3f} nats above full attention, and without them {plain[0]:.3f}; in the"
    assert f"{quote} last 2,048 tokens, {parts[1]:.3f} and {plain[1]:.3f}." in text
    assert later[LATER["128x8 last 2 full"]]["options"]["full_layers"] == 2
    coarser = gaps["128 x 8"][0]
    assert f"leaves a gap of {layers[0]:.3f} instead of {coarser:.3f}, and" in text
    hybrids = page("docs/hybrid.md")
    assert f"ends [{layers[0]:.3f} nats above full attention's loss]" in hybrids
    assert f"and {coarser:.3f} above it without such layers." in hybrids
    quote = f"leave a gap of {layers[0]:.3f} instead of {coarser:.3f} nats with 128 x 8,"
    quote += " sub-blocks of 8 leave the same gap with 64 x 16 (with a second seed, {} and {}), and"
    quote = quote.format(pairs[2][1], pairs[1][1])
    assert f"{quote} both together {together[0]:.3f} with each of two seeds." in page()
    assert f"{layers[0]:.3f}" == f"{parts[0]:.3f}"
    less, more = (f"{100 * x[0] / full['loss']:.1f}" for x in (parts, plain))
    again_less = f"{100 * seconds[LATER['64x16 sub8']] / other_full:.1f} %"
    quote = f"ends {more} % above full attention's loss with the paper's gate, and with sub-blocks"
    assert f"{quote} of 8 {less} and {again_less} above it with two seeds." in page()
    quote = f"ends {parts[0]:.3f} nats above full attention's loss with sub-blocks of 8, and"
    assert f"{quote} {plain[0]:.3f} above it without" in page("docs/gates.md")
    assert f"with 1,024 keys, {coarse[0]:.3f} with 4,096, {parts[0]:.3f} and" in page()
    assert f" and {seconds[LATER['64x16 sub8']]:.3f} with 1,024 and sub-blocks of 8, two" in page()
    less = seconds["128 x 8"] - seconds[LATER["128x8 last 2 full"]]
    quote = f"from scratch, with two of eight, by {coarser - layers[0]:.3f} and {less:.3f} with two"
    finer = seconds[LATER["64x16 sub8"]] - seconds[LATER["64x16 sub8 last 2 full"]]
    quote += f" seeds, and by {parts[0] - together[0]:.3f} and {finer:.3f} with sub-blocks |"
    assert quote in page()
    copied = [own(run)["copied"]["50%"] for run in (later[LATER["64x16 sub8"]], trained["64 x 16"])]
    quote = "at 50 %, the loss with 64 x 16 is {:.2f} instead of {:.2f}."
    assert quote.format(*copied) in page()
    runs = [again["full, seed 1"]]
    runs += [later[LATER[x]] for x in (shown[1], shown[3], shown[2])]
    assert {run["device"] for run in runs} == {"NVIDIA H200"}
    speeds = [run["tokens_per_second"] for run in runs]
    quote = "processes {:,.0f} tokens/s, 64 x 16 with sub-blocks {:,.0f}, with two full "
    quote += "layers in addition {:,.0f}, and 128 x 8 with two full layers {:,.0f}."
    assert quote.format(*speeds) in text
    assert f"64 x 16 with sub-blocks {speeds[1] / speeds[0]:.2f} times" in page()


def test_the_numbers_of_the_text_on_training_are_those_of_the_results(trained, complete):
    text = page().split("## Train from scratch\n", 1)[1]
    full = own(trained["full"])
    errors = {}
    first_of_seed, *others_of_seed = (own(x) for x in second_seeds().values())
    runs = [(own(x), full) for x in complete.values()]
    runs += [(x, first_of_seed) for x in others_of_seed]
    for part in ("by_window", "last_by_window"):
        for run, dense in runs:
            pairs = zip(run[part], dense[part], strict=True)
            found = [a - b for a, b in pairs]
            errors.setdefault(part, []).append(statistics.stdev(found) / len(found) ** 0.5)
    assert f"at most {max(errors['by_window']):.3f} nats of the mean" in text
    assert f"and {max(errors['last_by_window']):.3f} of the last" in text
    fine, coarse, convolution = (own(trained[x]) for x in list(ROWS.values())[1:])
    assert f"64 x 16 is {coarse['loss'] - fine['loss']:.3f} nats below" in text
    others = second_seeds()
    other_full = own(others["full, seed 1"])["loss"]
    again, with_convolution = (own(others[f"{ROWS[x]}, seed 1"])["loss"] for x in list(ROWS)[2:])
    gains = coarse["loss"] - convolution["loss"], again - with_convolution
    assert (
        f"takes {gains[0]:.3f} nats off the loss of 128 x 8 with seed 0 and {gains[1]:.3f}" in text
    )
    assert f"{gains[0]:.3f} and {gains[1]:.3f} with block 128, two seeds" in text
    changes = {
        name: own(run)["loss"] - own(complete[name.removesuffix(", seed 1")])["loss"]
        for name, run in others.items()
    }
    assert abs(changes.pop("128 x 8, last two layers full, seed 1")) < 0.001
    assert changes.pop("full, seed 1") == pytest.approx(other_full - full["loss"])
    lower = -changes.pop("64 x 16, sub-blocks of 8, last two layers full, seed 1")
    assert f"64 x 16 with sub-blocks and two full layers by {lower:.3f}, and lowers" in text
    changes = changes.values()
    assert (
        f"raises the loss of MoBA without full layers by {min(changes):.3f} to {max(changes):.3f}"
        in text
    )
    assert f"lowers that of full attention by {full['loss'] - other_full:.3f}" in text
    untrained = trained["full"]["final"]["moba"]["loss"]
    assert f"{untrained:.4f} with 128 x 8, {untrained - full['loss']:.3f} above" in text
    assert f"leaves {coarse['loss'] - full['loss']:.3f}." in text
    speeds = [trained[x]["tokens_per_second"] for x in ("full", "128 x 8", "64 x 16")]
    assert f"trains {speeds[1] / speeds[0]:.2f} times" in text
    assert f"only {speeds[2] / speeds[0]:.2f} times" in text
    closed = []
    for run in list(complete.values())[1:]:
        gaps = [run["final"][x]["loss"] - full["loss"] for x in ("moba", "full")]
        closed.append(100 * (1 - gaps[1] / gaps[0]))
    quote = "removes {:.0f} % of the smaller gap with sub-blocks, {:.0f} % of the gap with two full"
    assert f"{quote} layers, and {{:.0f}} % with both.".format(*closed[3:6]) in text
    for final in [x["final"] for x in others.values()][1:]:
        gaps = [final[x]["loss"] - other_full for x in ("moba", "full")]
        closed.append(100 * (1 - gaps[1] / gaps[0]))
    assert f"closes {min(closed):.0f} to {max(closed):.0f} % of the gap" in text
    quote = "it removes {:.0f} % of the gap of 128 x 8, {:.0f} % with the key convolution, {:.0f} %"
    quote += " with sub-blocks, {:.0f} % with two full layers and {:.0f} % with both."
    assert quote.format(*closed[-5:]) in text
    shown = [run for name, run in complete.items() if "convolution" not in name]
    copied = [x["final"]["full"]["copied"] for x in shown]
    for depth in ("90%", "25%"):
        first, *others = (x[depth] for x in copied)
        assert (
            f"{min(others):.2f} to {max(others):.2f} at {depth[:-1]} %, against {first:.2f}" in text
        )
    step, loss, _ = next(x for x in trained["full"]["history"]["checks"] if x[0] == 1750)
    assert f"a loss of {loss:.2f} after {step * 65536 / 1e6:.0f} million tokens" in text
    early = json.loads((DOCS / "results" / "first-runs-h200.json").read_text())["runs"]
    ends = {name: own(x)["loss"] for name, x in early.items() if x["status"] == "done"}
    assert f"between {min(ends.values()):.2f} and {max(ends.values()):.2f}" in text
    assert f"differed by {abs(ends['128x8'] - ends['128x8 seed 1']):.2f}," in text


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_pages_quote_the_training(complete, name):
    again = second_seeds()
    parts = LATER["64x16 sub8"]
    rows = complete["64 x 16"], complete[parts], again[f"{parts}, seed 1"]
    base = [own(x)["loss"] for x in (complete["full"], complete["full"], again["full, seed 1"])]
    more = [f"{100 * (own(x)['loss'] / y - 1):.1f}" for x, y in zip(rows, base, strict=True)]
    quote = f"{more[0]} % higher, and with sub-blocks of 8 keys {more[1]} and {more[2]} % higher"
    assert quote in (ROOT / name).read_text()


ONE_KV_HEAD = {
    "full": ("full 1 KV head", "all"),
    "64 x 16": ("64x16 1 KV head", "1,024"),
    "NSA, 4 blocks": ("nsa 1 KV head", "1,024"),
    "64 x 32": ("64x32 1 KV head", "2,048"),
    "NSA, 16 blocks": ("nsa 64x16 1 KV head", "2,048"),
}


@pytest.fixture(scope="module")
def one_kv_head():
    """Returns the runs with one KV head by their names in the table."""
    names = [f"one-kv-head-16k-{card}" for card in ("h200", "h100")]
    corpora = [report_of(x)["corpus"] for x in names]
    assert corpora[0] == corpora[1]
    runs = runs_of(names[0]) | runs_of(names[1])
    return {name: runs[key] for name, (key, _) in ONE_KV_HEAD.items()}


def speed_of(run):
    card = " (H100)" if "H100" in run["device"] else ""
    return f"{run['tokens_per_second']:,.0f}{card}"


def test_the_tables_of_one_kv_head_are_those_of_the_results(one_kv_head):
    full, rows, short = own(one_kv_head["full"]), [], []
    for name, run in one_kv_head.items():
        x, keys = own(run), ONE_KV_HEAD[name][1]
        losses = [with_increase(x[part], full[part]) for part in ("loss", "last")]
        copied = [f"{x['copied'][depth]:.2f}" for depth in ("50%", "90%")]
        cells = [f"{run['parameters'] / 1e6:.1f}M", losses[0], f"{x['first']:.4f}", losses[1]]
        rows.append([name, keys, *cells, *copied, speed_of(run)])
        name = name.replace("64 x", "MoBA, 64 x")
        short.append([name, keys, f"{x['loss']:.4f}", speed_of(run)])
    assert table("### One KV head") == rows
    assert table("## Quality after", "docs/nsa.md") == short


def test_the_numbers_of_the_text_on_one_kv_head_are_those_of_the_results(trained, one_kv_head):
    text = section("### One KV head, with NSA", "### Compare")
    losses = {name: own(run) for name, run in one_kv_head.items()}
    full = losses["full"]
    gaps = {name: x["loss"] - full["loss"] for name, x in losses.items()}
    copies = []
    for name in ("NSA, 16 blocks", "NSA, 4 blocks"):
        copied = losses[name]["copied"].values()
        copies.append(f"{min(copied):.2f} to {max(copied):.2f}")
    assert f"are {copies[0]} at every depth; with 4 blocks, they are {copies[1]}." in text
    nsa = f"are {copies[0]} with 16 blocks and {copies[1]} with 4, at every depth"
    assert nsa in page("docs/nsa.md")
    assert f"has {losses['64 x 32']['copied']['90%']:.2f} at 90 %" in text
    assert f"NSA's loss is {gaps['NSA, 16 blocks']:.3f} above" in text
    assert f"the loss of 64 x 32 {gaps['64 x 32']:.3f}." in text
    assert f"NSA has {losses['NSA, 16 blocks']['first']:.4f} and full attention " in text
    assert f"full attention {full['first']:.4f}. The" in text
    more = f"{gaps['NSA, 16 blocks']:.3f} more at these sizes, and {gaps['NSA, 4 blocks']:.3f}"
    assert more in page()
    rounded = [f"{gaps[x]:.2f}" for x in ("NSA, 16 blocks", "64 x 32", "NSA, 4 blocks", "64 x 16")]
    found = re.findall(
        r"0\.\d\d", page("docs/nsa.md").split("At the sizes of the paper, the loss")[1]
    )
    assert found[:4] == rounded
    assert f"{gaps['64 x 32']:.3f} instead of {gaps['64 x 16']:.3f} nats" in text
    many = own(trained["64 x 16"])["loss"] - own(trained["full"])["loss"]
    assert f"{gaps['64 x 16']:.3f} instead of {many:.3f} nats" in text
    checks = zip(*(trained[x]["history"]["checks"] for x in ("full", "64 x 16")), strict=True)
    gap = next(b[1] - a[1] for a, b in checks if a[0] == 2000)
    assert f"the gap was {gap:.3f} after {2000 * 65536 / 1e6:.0f} million" in text
    for name in ("64 x 16", "64 x 32"):
        switched = one_kv_head[name]["final"]["full"]["loss"]
        assert f"a loss of {switched:.4f}, {switched - full['loss']:.3f} higher" in text
