"""Tests that the first table of docs/results.md and the README quote the JSON files."""

import re
import statistics

import pytest

from tests.results import own, page, report_of, runs_of, table

SHORT = "64x16 sub8 full while short 32K"
FULL, PLAIN, FINER, FINEST = "full", "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"


def percent(loss, full):
    return f"{100 * (loss / full - 1):+.1f} %"


def increases(losses, full):
    """Returns the increases of a loss over full attention's in each eighth of the context."""
    each = [a - b for a, b in zip(losses["by_position"], full["by_position"], strict=True)]
    part = len(each) // 8
    return [statistics.mean(each[x : x + part]) for x in range(0, len(each), part)]


def converted(**setting):
    """Returns the increases of the loss of SmolLM2 without training, on two texts."""
    for name in ("smollm2-8k-h200", "smollm2-sub-blocks-8k-h200"):
        settings = {str(x["setting"]): x["texts"] for x in report_of(name)["settings"]}
        if str(setting) in settings:
            texts, full = settings[str(setting)], settings["{}"]
            pairs = [(texts[x]["loss"], full[x]["loss"]) for x in ("prose", "source")]
            return " and ".join(percent(*x).removesuffix(" %") for x in pairs) + " %"
    raise AssertionError(f"no results of {setting}")


@pytest.fixture(scope="module")
def continued():
    """Returns the runs at 8K, and the needles found at 8K, by training."""
    runs, found = {}, {}
    for name in ("", "sub-blocks-"):
        runs |= runs_of(f"smollm2-continued-{name}8k-h100")
        found |= report_of(f"smollm2-retrieval-trained-{name}8k-h100")["models"]
    needles = {(m, x): sum(y["single"]["8192"]) for m, z in found.items() for x, y in z.items()}
    return runs, needles


@pytest.fixture(scope="module")
def control():
    """Returns the needles found at 8K, by attention, after training with full attention, seed 1."""
    answers = report_of("smollm2-retrieval-trained-seed-1-8k-h200")["models"]["full seed 1"]
    return {x: sum(y["single"]["8192"]) for x, y in answers.items()}


def test_the_first_table_is_that_of_the_results(continued, control):
    base = [report_of(f"smollm2-retrieval-{x}8k-h100")["right"] for x in ("", "seed-1-")]
    count = {x: sum(sum(y[x]["single"]["8192"]) for y in base) for x in (FULL, PLAIN, FINEST)}
    runs, found = continued
    full = own(runs["full"])["loss"]
    coarse = converted(block_size=64, topk=16, sink_blocks=1)
    fine = converted(block_size=32, topk=32, sink_blocks=1, gate_block_size=4)
    rows = [
        [coarse, count[PLAIN], count[FULL], 100],
        [fine, count[FINEST], count[FULL], 100],
    ]
    for name, read in (
        ("64x16 sink", PLAIN),
        ("64x16 sink sub8", FINER),
        ("32x32 sink sub4", FINEST),
    ):
        of_full = found["full", FULL]
        rows.append([percent(own(runs[name])["loss"], full), found[name, read], of_full, 50])
    read = runs_of("smollm2-continued-read-8k-h100")["full read 32x32 sub4"]["final"]
    loss = percent(read["moba"]["loss"], read["full"]["loss"])
    rows.append([loss, control[FINEST], control[FULL], 50])
    rows.append([percent(runs["64x16 sink hybrid"]["final"]["full"]["loss"], full)])
    alone, shared = (runs_of(f"smollm2-32k-{x}h100") for x in ("alone-", ""))
    models = report_of("smollm2-retrieval-32k-h100")["models"]
    first, longer = (models[x] for x in ("full 32K", "64x16 sink 32K longer"))
    full = own(alone["full 32K"])["loss"]
    found = {x: sum(y["single"]["32768"]) for x, y in longer.items()}
    most = sum(first["full"]["single"]["32768"])
    rows += [
        [percent(own(shared["64x16 sink 32K"])["loss"], full)],
        [percent(own(alone["64x16 sink 32K longer"])["loss"], full), found[PLAIN], most, 50],
        ["", found[FINER], most, 50],
    ]
    parts = runs_of("smollm2-32k-sub-blocks-h200")["64x16 sink sub8 32K"]
    answers = report_of("smollm2-retrieval-32k-sub-blocks-h200")["models"]["64x16 sink sub8 32K"]
    rows.append(
        [percent(own(parts)["loss"], full), sum(answers[FINER]["single"]["32768"]), most, 50]
    )
    scratch = runs_of("from-scratch-16k-h100") | runs_of("from-scratch-16k-more-h100")
    scratch |= runs_of("from-scratch-16k-h200") | runs_of("from-scratch-16k-more-h200")
    shown = "64x16", "64x16 sub8", "64x16 sub8 last 2 full", "512x8"
    rows += [[percent(own(scratch[x])["loss"], own(scratch["full"])["loss"])] for x in shown]
    scratch |= runs_of("from-scratch-16k-sub-blocks-seed-1-h100")
    for row, name in zip(rows[-3:-1], shown[1:3], strict=True):
        again = percent(*(own(scratch[f"{x} seed 1"])["loss"] for x in (name, "full")))
        row[0] = f"{row[0].removesuffix(' %')} and {again}"
    timed = runs_of("from-scratch-32k-h200")
    full, hybrid = own(timed["full 32K"])["loss"], timed["128x8 hybrid 32K longer"]["final"]
    rows += [[percent(hybrid[x]["loss"], full)] for x in ("full", "moba")]
    equal = runs_of("from-scratch-32k-sub-blocks-h200") | runs_of(
        "from-scratch-32k-sub-blocks-h100"
    )
    short = equal[SHORT]
    again = percent(*(own(equal[f"{x} seed 1"])["loss"] for x in (SHORT, "full 32K")))
    rows.append([f"{percent(own(short)['loss'], full).removesuffix(' %')} and {again}"])
    rows.append([percent(equal["64x16 sub8 hybrid 32K"]["final"]["full"]["loss"], full)])
    expected = [[loss, f"{x[0]} of {x[2]} (full: {x[1]})" if x else ""] for loss, *x in rows]
    found = table("This page shows")
    assert [row[-2:] for row in found] == expected
    asked = {"64x16": "64x16 sink", "64x16+": "64x16 sink sub8", "32x32+": "32x32 sink sub4"}
    options = [runs[x] for x in (asked["64x16"], asked["32x32+"], *asked.values())]
    options = [(*keys_of(x), x["options"]["length"]) for x in options]
    options.append((f"full, read with {options[-1][0]}", *options[-1][1:]))
    for cells, (attention, keys, length) in zip(found[:6], options, strict=True):
        assert cells[1:3] == [attention, f"{keys:,} of {length:,}"]
    for cells, name in zip(found[11:15], shown, strict=True):
        attention, keys = keys_of(run := scratch[name])
        attention = "the same, last two layers full" if "last" in name else attention
        assert cells[1:3] == [attention, f"{keys:,} of {run['options']['length']:,}"]
    extended = shared["64x16 sink 32K"], alone["64x16 sink 32K longer"], parts
    for cells, run in zip([*found[7:9], found[10]], extended, strict=True):
        attention, keys = keys_of(run)
        cell = f"{attention}, {run['tokens'] / 1e6:.0f}M tokens"
        assert cells[1:3] == [cell, f"{keys:,} of {run['options']['length']:,}"]
    attention, keys = keys_of(timed["128x8 hybrid 32K longer"])
    assert found[-3][1:3] == [f"hybrid, read with {attention}", f"{keys:,} of 32,768"]
    attention, keys = keys_of(short)
    assert found[-2][1:3] == [attention, f"{keys:,} of 32,768"]
    assert keys_of(equal["64x16 sub8 hybrid 32K"]) == (attention, keys)  # "these sub-blocks"
    others = "sub-blocks", "hybrid", "last two layers"
    of_means = [x[3] for x in found if not any(y in x[1] for y in others)]
    losses = [float(y) for x in of_means for y in re.findall(r"\d+\.\d", x)]
    quote = f"have a loss {min(losses):.0f} to {max(losses):.0f} % higher and lose needles."
    assert quote in page()


def keys_of(run):
    """Returns the attention of a run as the first table names it, and the keys that it reads."""
    size, topk, part = (run["options"].get(x) for x in ("block_size", "topk", "gate_block_size"))
    return f"{size} x {topk}" + (f", sub-blocks of {part}" if part else ""), size * topk


def test_the_comparison_with_the_papers_quotes_the_results(continued, control):
    text = page().split("### Compare with the papers\n")[1].split("\n### ")[0]
    runs, found = continued
    scratch = runs_of("from-scratch-16k-h100") | runs_of("from-scratch-16k-more-h100")
    full = own(scratch["full"])
    parts = "loss", "last"
    gaps = {x: [own(scratch[x])[y] - full[y] for y in parts] for x in ("64x16", "128x8", "512x8")}
    quote = "not confirmed: {:.3f} and {:.3f} more with 1,024 keys, {:.3f} with 4,096,"
    assert quote.format(*(gaps[x][0] for x in ("64x16", "128x8", "512x8"))) in text
    later = runs_of("from-scratch-16k-h200")
    more = runs_of("from-scratch-16k-more-h200")
    names = "64x16 sub8", "128x8 last 2 full", "64x16 sub8 last 2 full"
    other_full = own(later["full seed 1"])
    seeds = [own(x) for x in runs_of("from-scratch-16k-seed-1-h100").values()]
    more |= runs_of("from-scratch-16k-sub-blocks-seed-1-h100")
    seeds += [own(more[f"{x} seed 1"]) for x in names]
    pairs = [(own(x), full) for x in (scratch | later | more).values() if x["options"]["seed"] == 0]
    grows = [increases(*x) for x in pairs[1:]] + [increases(x, other_full) for x in seeds]
    last = [x[-1] for x in grows if x[-1] == max(x)]
    quote = f"Confirmed in {len(last)} of {len(grows)} runs from scratch: {min(last):.3f} to"
    assert f"{quote} {max(last):.3f} in the last eighth" in text
    others = [(max(x), x[-1]) for x in grows if x[-1] < max(x)]
    quote = "{:.3f} instead of {:.3f} with the key convolution and seed 0, and with seed 1 and two"
    quote += " full layers {:.3f} instead of {:.3f}, and {:.3f} instead of {:.3f} with sub-blocks |"
    assert quote.format(*(x for pair in others for x in pair)) in text
    again = runs_of("smollm2-continued-seed-1-8k-h200")
    pairs = (
        (runs["32x32 sink sub4"], runs["full"]),
        (again["32x32 sink sub4 seed 1"], again["full seed 1"]),
    )
    more = [own(x)["loss"] - own(full)["loss"] for x, full in pairs]
    assert "sub-blocks of 4: {:.4f} and {:.4f} more with two seeds,".format(*more) in text
    assert f"{seeds[0]['loss'] - other_full['loss']:.3f} with 1,024 and seed 1;" in text
    layers = own(runs["64x16 sink"])["loss"] - own(runs["64x16 sink last 3 full"])["loss"]
    assert f"In continued training, by {layers:.3f} with three of 30 layers" in text
    eight = found["32x32 sink sub4", FINEST], found["full", FULL], found["64x16 sink", PLAIN]
    quote = "inference: {} of 50 needles at 8,192 tokens, and full attention {}. With them"
    assert quote.format(*eight) in text
    quote = f"with full attention: {control[FINEST]}, and full attention {control[FULL]}. Not"
    assert quote in text
    models = report_of("smollm2-retrieval-32k-h100")["models"]
    end = [
        sum(models[x][y]["single"]["32768"])
        for x, y in (("64x16 sink 32K longer", PLAIN), ("full 32K", FULL))
    ]
    quote = (
        f"{eight[2]} of 50 there, and {end[0]} of 50 at 32K, where full attention finds {end[1]}"
    )
    assert quote in text


@pytest.fixture(scope="module")
def ms():
    """Returns the times of attention calls at SmolLM2's sizes."""
    return report_of("smollm2-step-times-h200")["ms"]


def test_the_table_of_times_is_that_of_the_results(ms):
    rows = []
    for name in ("64x16", "32x32", "64x64"):
        for part in {"64x16": ("", 8), "32x32": ("", 8, 4), "64x64": ("", 8)}[name]:
            key = f"{name}+sub{part}" if part else name
            size, topk = map(int, name.split("x"))
            label = f"{size} x {topk}" + (f", sub-blocks of {part}" if part else "")
            rows.append((key, label, f"{size * topk:,}"))
    cells = []
    for key, *first in [("full", "full", "all"), *rows]:
        calls = [x for n in (8192, 32768) for x in ms[f"call {n} {key}"]]
        cells.append([*first, *(f"{x:.2f}" for x in calls)])
    assert table("With the sizes of SmolLM2-135M", "docs/gates.md") == cells


def test_the_text_on_times_quotes_the_results(ms):
    report, text = report_of("smollm2-step-times-h200"), page("docs/gates.md")
    assert (report["device"], report["versions"]["commit"][:7]) == ("NVIDIA H200", "0228a0f")
    finest = [ms["call 32768 32x32+sub4"][i] / ms["call 32768 full"][i] for i in (0, 1)]
    assert "with sub-blocks of 4, a call takes {:.2f} and {:.2f} times".format(*finest) in text
    of_8k = report["kernels"]["8192 32x32+sub4"]["all"], ms["call 8192 32x32+sub4"][0]
    assert "sub-blocks of 4 take {:.2f} ms of its {:.2f}.".format(*of_8k) in text
    again = {
        (name, i): x / ms[name][i] for name, y in report["again"].items() for i, x in enumerate(y)
    }
    assert len(report["again"]) == 6
    coarse = again.pop(("call 32768 32x32", 1))
    quote = f"took {min(again.values()):.2f} to {max(again.values()):.2f} times as long, and 32 x"
    assert f"{quote} 32 with backward {coarse:.2f} times." in text
    earlier = report_of("smollm2-step-times-h100")["ms"]
    names = ("full", "64x16", "64x16+sub8", "32x32+sub4")
    quote = (
        "{:.0f} ms with full attention, {:.0f} with 64 x 16, {:.0f} with 64 x 16 and sub-blocks "
        "of 8, and {:.0f} with 32 x 32 and sub-blocks of 4."
    )
    assert quote.format(*(earlier[f"decoder 32768 {x}"] for x in names)) in text
    command = text.split("python examples/model_times.py")[1].split("```")[0]
    options = report["options"]
    # The names of the file leave out the sink block that all attentions had.
    names = [re.sub(r"^(\d+x\d+)", r"\1+sink", x) for x in options["attention"]]
    assert all(x in command.split() for x in (*names, *map(str, options["lengths"])))
    assert f"--heads {options['heads']} --kv-heads {options['kv_heads']}" in command


NOTED = ("full", "64x16", "32x32", "32x32+sub4", "64x64")


def test_the_note_on_lists_of_32_keys_quotes_the_times(ms):
    text, before = page("docs/performance.md"), report_of("smollm2-step-times-h100")["ms"]
    kernels = report_of("smollm2-step-times-h200")["kernels"]
    gate = [kernels[f"32768 {x}"]["_select_kernel"] for x in ("32x32", "32x32+sub4")]
    rest = [kernels["32768 32x32+sub4"][x] for x in ("attend_kernel", "finish_kernel")]
    quote = "takes {:.2f} ms, and {:.2f} with sub-blocks of 4, beside {:.2f} for the attention and"
    assert f"{quote.format(*gate, *rest)} {rest[1]:.2f} for own blocks and merge." in text
    forward, both = (
        {x: [y[f"call 32768 {x}"][i] for y in (ms, before)] for x in NOTED} for i in (0, 1)
    )
    assert "takes {:.2f} ms, instead of {:.2f} on an H100 before;".format(*forward["32x32"]) in text
    quote = "it takes {:.2f} instead of {:.2f}, and with backward {:.2f} instead of {:.2f}."
    assert quote.format(*forward["32x32+sub4"], *both["32x32+sub4"]) in text
    pairs = [forward[x] for x in ("64x16", "64x64")]
    quote = "it takes {:.2f} and {:.2f} ms, instead of {:.2f} and {:.2f}, and full attention"
    numbers = [x[i] for i in (0, 1) for x in pairs]
    assert quote.format(*numbers) + " {:.2f} instead of {:.2f}.".format(*forward["full"]) in text


def test_the_summary_quotes_the_times(ms):
    ratios = {
        (x, i): ms[f"call 32768 {x}"][i] / ms["call 32768 full"][i]
        for x in ("64x16+sub8", "32x32+sub4")
        for i in (0, 1)
    }
    text = page().split("\n## Recipe\n")[0]
    for quote, i in (("take {:.2f} times as long as full attention with 64 x 16", 1),
                     ("forward alone takes {:.2f} and", 0)):  # fmt: skip
        assert quote.format(ratios["64x16+sub8", i]) in text
    assert f"and {ratios['32x32+sub4', 1]:.2f} times with 32 x 32" in text
    assert f"and {ratios['32x32+sub4', 0]:.2f} times as long ([times]" in text
    of_8k = [ms[f"call 8192 {x}"][1] for x in ("full", "64x16+sub8", "32x32+sub4")]
    assert min(of_8k) == of_8k[0]  # "Up to 8K tokens, full attention is faster."


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_pages_quote_the_continued_training(continued, control, ms, name):
    runs, found = continued
    full = own(runs["full"])["loss"]
    share = percent(own(runs["32x32 sink sub4"])["loss"], full).removeprefix("+")
    plain = percent(own(runs["64x16 sink"])["loss"], full).removeprefix("+")
    hybrid = percent(runs["64x16 sink hybrid"]["final"]["full"]["loss"], full).removeprefix("+")
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", page(name))
    quote = f"the loss is {share} higher. The model finds {found['32x32 sink sub4', FINEST]} of 50"
    assert quote in text
    assert f"of the keys, and full attention finds {found['full', FULL]}. With" in text
    quote = (
        f"the loss is {plain} higher, the model finds {found['64x16 sink', PLAIN]}, and a hybrid"
    )
    assert f"{quote} has a loss {hybrid} higher with full attention." in text
    assert f"with full attention finds {control[FINEST]} if it has the sub-blocks" in text
    ratios = [ms["call 32768 32x32+sub4"][i] / ms["call 32768 full"][i] for i in (0, 1)]
    quote = "takes {:.2f} times as long as full attention forward, and {:.2f} times with backward;"
    assert quote.format(*ratios) in text


QUOTES = {
    "docs/transformers.md": "with blocks of 32 and sub-blocks of 4, the loss is {share} above full "
    "attention's, and the model finds {found} of 50 needles, where full attention finds {full}. A "
    "model that continued with full attention finds {alone} if it has these sub-blocks",
    "docs/gates.md": "the model finds {found} of 50 needles, and full attention {full}. A model "
    "that continued with full attention finds {alone} if it has the sub-blocks at inference alone.",
    "docs/hybrid.md": "a hybrid of 64 x 16 ends {hybrid} above full attention's loss, read with "
    "full attention; MoBA to the end, with 32 x 32 and sub-blocks of 4, ends {share} above it.",
    "docs/results.md": "the loss of a 135M model was {share} above full attention's and it found",
}


@pytest.mark.parametrize("name", QUOTES)
def test_guides_quote_the_continued_training(continued, control, name):
    runs, needles = continued
    full = own(runs["full"])["loss"]
    losses = own(runs["32x32 sink sub4"]), runs["64x16 sink hybrid"]["final"]["full"]
    share, hybrid = (percent(x["loss"], full).removeprefix("+") for x in losses)
    found = {"found": needles["32x32 sink sub4", FINEST], "full": needles["full", FULL]}
    found["alone"] = control[FINEST]
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", page(name))
    assert QUOTES[name].format(share=share, hybrid=hybrid, **found) in text
