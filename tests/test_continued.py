"""Tests that the numbers on continued training and longer contexts are those of the JSON files."""

import pytest

from tests.results import (
    error_of,
    own,
    page,
    report_of,
    runs_of,
    section,
    table,
    with_increase,
)
from tests.test_needles import (
    TASKS,
    answers_of,
    by_depth,
    counts,
    difference,
    largest_error,
    name_of,
)

FINER, FINEST = "64x16 sink sub8", "32x32 sink sub4"
TRAINED = {
    "full": "full",
    "64x16 sink": "64 x 16, sink",
    FINER: "64 x 16, sink, sub-blocks of 8",
    FINEST: "32 x 32, sink, sub-blocks of 4",
    "64x16 sink last 3 full": "64 x 16, sink, last 3 layers full",
    "64x16 sink hybrid": "hybrid, sink",
    "64x16": "64 x 16",
}
PLAIN = TRAINED["64x16 sink"]
AGAIN = " seed 1"
SECOND = {f"{name}{AGAIN}": f"{TRAINED[name]}, seed 1" for name in ("full", FINEST)}
READ_WITH_ONE = ("64x16 sink last 3 full", "64x16")  # rows with full attention are left out


@pytest.fixture(scope="module")
def continued():
    """Returns the runs that continued the training of SmolLM2 with seed 0, by name."""
    names = [f"smollm2-continued-{x}8k-h100" for x in ("", "sub-blocks-")]
    assert report_of(names[0])["corpus"] == report_of(names[1])["corpus"]
    runs = runs_of(names[0]) | runs_of(names[1])
    shared = ("length", "steps", "batch", "seed", "lr", "optimizer", "windows", "check_windows")
    for run in runs.values():
        assert all(run["options"][x] == runs["full"]["options"][x] for x in shared)
        assert run["status"] == "done"
        assert run["device"] == "NVIDIA H100 80GB HBM3"
    assert {run["tokens"] for run in runs.values()} == {26_214_400}  # "26 million"
    return {name: runs[name] for name in TRAINED}


@pytest.fixture(scope="module")
def second(continued):
    """Returns the runs with seed 1, which are otherwise those with seed 0."""
    report = report_of("smollm2-continued-seed-1-8k-h200")
    assert report["corpus"] == report_of("smollm2-continued-8k-h100")["corpus"]
    assert list(report["runs"]) == list(SECOND)
    for name, run in report["runs"].items():
        first = continued[name.removesuffix(AGAIN)]
        assert {**run["options"], **first["options"]} == run["options"] | {"seed": 0}
        assert run["options"]["seed"] == 1
        assert (run["status"], run["tokens"]) == ("done", first["tokens"])
        assert (run["device"], run["versions"]["commit"][:7]) == ("NVIDIA H200", "0228a0f")
    return report["runs"]


@pytest.fixture(scope="module")
def read(continued):
    """Returns full attention's losses with sub-blocks at inference, of one more run."""
    report = report_of("smollm2-continued-read-8k-h100")
    assert report["corpus"] == report_of("smollm2-continued-8k-h100")["corpus"]
    (run,) = report["runs"].values()
    options = run["options"]
    blocks = {x: continued[FINEST]["options"][x] for x in ("block_size", "topk")}
    assert blocks.items() | {"gate_block_size": 4}.items() <= options.items()
    shared = ("length", "steps", "batch", "seed", "lr", "windows", "sink_blocks", "attention")
    assert all(options[x] == continued["full"]["options"][x] for x in shared)
    return run["final"]["moba"]


def read_with(runs):
    """Yields the two first cells of a row, and the losses, first of the attention at the end."""
    names = TRAINED | SECOND
    for name, run in runs.items():
        plain = name.removesuffix(AGAIN)
        moba = PLAIN if plain in ("full", "64x16 sink hybrid") else TRAINED[plain]
        both = [("full", "full"), (moba, "moba")]
        for served, kind in both[:: -1 if run["options"]["attention"] == "moba" else 1]:
            if name not in READ_WITH_ONE or kind != "full":
                yield [names[name], served], run["final"][kind]


def test_the_table_of_continued_training_is_that_of_the_results(continued, second, read):
    rows, pairs = [], []
    for runs, full in ((continued, own(continued["full"])), (second, own(second["full seed 1"]))):
        found = list(read_with(runs))
        if runs is continued:
            found.insert(2, (["full", TRAINED[FINEST]], read))
        for cells, x in found:
            ends = [with_increase(x[part], full[part]) for part in ("loss", "last")]
            copies = [f"{x['copied'][depth]:.2f}" for depth in ("25%", "90%")]
            rows.append([*cells, ends[0], f"{x['first']:.4f}", ends[1], *copies])
            pairs.append((x, full))
    assert table("## Continue") == rows
    text = section("## Continue the training", "### Needles after")
    for part, name in (("by_window", "of the mean"), ("last_by_window", "of the last")):
        error = max(error_of(x, full, part) for x, full in pairs)
        assert f"{error:.3f} nats {name}" in text or f"{error:.3f} {name}" in text


def test_the_numbers_of_the_text_on_continued_training_are_those_of_the_results(continued, read):
    text = section("## Continue the training", "### Needles after")
    full = own(continued["full"])
    gaps = {name: own(run)["loss"] - full["loss"] for name, run in continued.items()}
    shares = {name: 100 * gap / full["loss"] for name, gap in gaps.items()}
    quote = f"is {gaps[FINEST]:.4f} nats or {shares[FINEST]:.1f} % higher, with a standard error of"
    assert f"{quote} {error_of(own(continued[FINEST]), full):.4f}, and" in text
    assert f"sub-blocks of 8 {gaps[FINER]:.4f} or {shares[FINER]:.1f} %. Without" in text
    assert f"64 x 16 is {gaps['64x16 sink']:.3f} higher. A model" in text
    untrained = continued["full"]["final"]["moba"]["loss"] - full["loss"]
    finer = read["loss"] - full["loss"]
    quote = f"reads with 64 x 16 is {untrained:.3f} higher, and with 32 x 32 and sub-blocks of 4"
    assert f"{quote} {finer:.4f}." in text
    quote = f"with 32 x 32 and sub-blocks of 4, {gaps[FINEST]:.3f} and {finer:.3f}, a"
    assert quote in page()
    checked = {}
    for name, run in continued.items():
        pairs = zip(*(x["history"]["checks"] for x in (continued["full"], run)), strict=True)
        checked[name] = {a[0]: b[1] - a[1] for a, b in pairs}
    first, last = (step * 65536 / 1e6 for step in (50, 350))
    ends = {name: (gap[50], gap[350]) for name, gap in checked.items()}
    quote = "it is {:.3f} after {:.0f} million tokens and {:.3f} after {:.0f} million"
    assert quote.format(ends[FINEST][0], first, ends[FINEST][1], last) in text
    assert "falls from {:.3f} to {:.3f} with 64 x 16 and sub".format(*ends[FINER]) in text
    assert "and from {:.3f} to {:.3f} with 64 x 16.".format(*ends["64x16 sink"]) in text
    below = min(step for step, gap in checked[FINER].items() if gap < 0.01)
    assert f"below 0.01 after {below * 65536 / 1e6:.0f} million tokens," in text
    assert min(checked["64x16 sink"].values()) > 0.01
    assert max(checked[FINEST].values()) < 0.01
    copied = {name: own(run)["copied"]["25%"] for name, run in continued.items()}
    quote = f"has {copied[FINEST]:.2f}, full attention {copied['full']:.2f}, and 64 x 16"
    assert f"{quote} {copied['64x16 sink']:.2f}." in text
    with_sink = [x["final"]["full"] for x in continued.values() if x["options"]["sink_blocks"]]
    assert all(x["copied"]["25%"] < copied["full"] + 0.03 for x in with_sink)  # "about as well"
    hybrid = continued["64x16 sink hybrid"]
    left = hybrid["final"]["full"]["loss"] - full["loss"]
    assert f"full attention is {left:.3f} higher than if" in text
    moba, layers = (own(continued[x])["loss"] for x in ("64x16 sink", "64x16 sink last 3 full"))
    assert f"lowers the loss of 64 x 16 by {moba - layers:.3f}." in text
    assert f"the gap is {gaps['64x16']:.3f}. The" in text


def test_the_numbers_of_the_text_on_the_second_seed_are_those_of_the_results(continued, second):
    text = section("## Continue the training", "### Needles after")
    pairs = [(own(second[f"{x}{AGAIN}"]), own(continued[x])) for x in ("full", FINEST)]
    (full, _), (finest, _) = pairs
    gap = finest["loss"] - full["loss"]
    quote = f"of 4 is {gap:.4f} nats or {100 * gap / full['loss']:.1f} % higher, with a standard"
    assert f"{quote} error of {error_of(finest, full):.4f}. Between" in text
    changes = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    assert f"full attention differs by {changes[0]:.4f}, and" in text
    assert f"32 x 32 with sub-blocks of 4 by {changes[1]:.4f}.\n" in text


def test_repeated_runs_have_equal_losses():
    first, again = (runs_of(f"smollm2-continued-{x}8k-h100") for x in ("", "again-"))
    for name, run in again.items():
        assert run["final"] == first[name]["final"]
        for part in ("loss_of_10_steps", "checks"):
            assert run["history"][part] == first[name]["history"][part]
        assert run["versions"]["commit"] != first[name]["versions"]["commit"]


ASKED = {
    "none": ("full", "64x16+sink", "32x32+sink+sub4"),
    "full": ("full", "64x16+sink"),
    "64x16 sink": ("64x16+sink", "64x16+sink+full-decode", "64x32+sink", "full"),
    FINER: ("64x16+sink+sub8", "full"),
    FINEST: ("32x32+sink+sub4", "32x32+sink", "full"),
    f"full{AGAIN}": ("full", "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"),
    f"{FINEST}{AGAIN}": ("32x32+sink+sub4", "32x32+sink", "full"),
}


@pytest.fixture(scope="module")
def trained():
    """Returns the answers after continued training, and without, by training and attention."""
    names = [f"smollm2-retrieval-{x}8k-h100" for x in ("", "trained-", "trained-sub-blocks-")]
    reports = [report_of(x) for x in names]
    for part in ("options", "device"):
        assert all(x[part] == reports[0][part] for x in reports)
    again = report_of("smollm2-retrieval-trained-seed-1-8k-h200")
    assert again["options"] == reports[0]["options"]
    assert (again["device"], again["versions"]["commit"][:7]) == ("NVIDIA H200", "0228a0f")
    models = [x["models"] for x in (*reports[1:], again)]
    return {"none": reports[0]["right"], **models[0], **models[1], **models[2]}


def test_the_table_of_needles_after_training_is_that_of_the_results(trained):
    found = {model: {x: trained[model][x] for x in some} for model, some in ASKED.items()}
    names = TRAINED | SECOND | {"none": "not trained"}
    rows = [
        [names[model], name_of(x), *map(str, [*counts(answers), sum(answers_of(answers))])]
        for model, attentions in found.items()
        for x, answers in attentions.items()
    ]
    assert table("### Needles after") == rows
    error = largest_error(*found.values())
    text = section("### Needles after continued training", "### Measurement")
    assert f"column is at most {error:.1f}, so a difference of up to {2 * error:.0f} may" in text


def test_the_numbers_of_the_text_on_needles_after_training_are_those_of_the_results(trained):
    text = section("### Needles after continued training", "### Measurement")
    sums = {(m, x): sum(answers_of(y)) for m, found in trained.items() for x, y in found.items()}
    plain, finer, finest = "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"
    assert f"answers {sums[FINEST, finest]} of 300 questions. Full" in text
    assert f"in training and inference, answers {sums['full', 'full']}. The" in text
    full, best = trained["full"]["full"], trained[FINEST][finest]
    less, error = difference(answers_of(full), answers_of(best))
    assert f"The difference, {less}, has a standard error of {error:.0f}. At 8,192" in text
    eight = [sum(x["single"]["8192"]) for x in (best, full)]
    assert f"it finds {eight[0]} of 50 needles, and full attention {eight[1]}. With seed 1," in text
    assert f"64 x 16 with sub-blocks of 8 answers {sums[FINER, finer]}." in text
    assert f"trained with 64 x 16 answers {sums['64x16 sink', plain]} questions" in text
    assert f"full attention answers {sums['full', plain]} with 64 x 16. The" in text
    pair = [answers_of(trained[x][plain]) for x in ("64x16 sink", "full")]
    more, error = difference(*pair)
    assert f"The difference, {more}, has a standard error of {error:.0f}.\n" in text
    whole = sums[FINEST, "32x32+sink"], sums[FINEST + AGAIN, "32x32+sink"]
    quote = "sub-blocks of 4 answers {} questions, with seed 1 {}, and the model".format(*whole)
    assert f"{quote} that was trained with sub-blocks of 8 {sums[FINER, plain]}," in text
    assert abs(sums[FINER, plain] - sums["64x16 sink", plain]) <= 3  # "like 64 x 16"
    decoded = sums["64x16 sink", plain + "+full-decode"], sums[FINEST, finest + "+full-decode"]
    assert f"answers {decoded[0]} questions instead of {sums['64x16 sink', plain]}." in text
    assert f"answers {decoded[1]} instead of {sums[FINEST, finest]}.\n" in text
    quote = f"sub-blocks of 4 answers {sums['none', finest]} questions, and full attention"
    assert f"{quote} {sums['none', 'full']}." in text


def test_the_numbers_of_the_text_on_the_control_are_those_of_the_results(trained):
    """Compares training with sub-blocks with full attention that reads with them, at seed 1."""
    text = section("### Needles after continued training", "### Measurement")
    plain, finer, finest = "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"
    control, model = trained["full seed 1"], trained[FINEST + AGAIN]
    full, read, own_gate = control["full"], control[finest], model[finest]
    counted = {x: sum(answers_of(y)) for x, y in control.items()}
    sums = sum(answers_of(own_gate)), counted["full"]
    less, error = difference(answers_of(full), answers_of(own_gate))
    quote = "With seed 1, these models answer {} and {}; the difference,".format(*sums)
    assert f"{quote} {less}, has a standard error of {error:.0f}. Coarser" in text
    assert f"with full attention answers {counted[finest]} questions if it reads with 32 x" in text
    more, error = difference(answers_of(own_gate), answers_of(read))
    quote = f"with the same seed, answers {sums[0]}. The difference, {more}, has a standard error"
    assert f"{quote} of {error:.0f}. The first" in text
    less, error = difference(answers_of(full), answers_of(read))
    quote = f"model answers {sums[1]} with full attention; the difference to {counted[finest]},"
    assert f"{quote} {less}, has a standard error of {error:.0f} and lies in" in text
    assert less == sum(full["multi-key"]["8192"]) - sum(read["multi-key"]["8192"])
    quote = f"answers {counted[plain]} questions without sub-blocks and {counted[finer]} with sub"
    assert quote in text
    assert f"of 8, with seed 0, {sum(answers_of(trained[FINER][finer]))}. So training" in text
    recipe = section("## Recipe", "Do not use MoBA where")
    quote = f"answers {counted[finest]} of 300 questions if it reads with the same sub-blocks"
    assert f"{quote}, and the model that was trained with them {sums[0]}." in recipe


def test_the_recipe_quotes_the_losses_with_and_without_training_with_moba(continued):
    full = own(continued["full"])["loss"]
    gaps = [own(continued["64x16 sink"])["loss"], continued["full"]["final"]["moba"]["loss"]]
    quote = "with 64 x 16, it is {:.3f} above full attention's after training with MoBA, and {:.3f}"
    recipe = section("## Recipe", "Do not use MoBA where")
    assert quote.format(*(x - full for x in gaps)) in recipe


@pytest.fixture(scope="module")
def ms():
    """Returns the times of attention calls at SmolLM2's sizes."""
    return report_of("smollm2-step-times-h200")["ms"]


@pytest.fixture(scope="module")
def decoder_ms():
    """Returns the times of decoders at SmolLM2's sizes, of an earlier run."""
    return report_of("smollm2-step-times-h100")["ms"]


def test_the_cost_of_sub_blocks_in_the_text_is_that_of_the_results(ms):
    text = section("### Needles after continued training", "### Measurement")
    ratios = [ms[f"call {n} 32x32+sub4"][1] / ms[f"call {n} full"][1] for n in (8192, 32768)]
    assert f"takes {ratios[0]:.1f} times as long as full attention, with backward;" in text
    forward = ms["call 32768 32x32+sub4"][0] / ms["call 32768 full"][0]
    assert f"at 32,768 tokens, {ratios[1]:.2f} times, and forward alone {forward:.2f} times" in text


LONG = {
    "full 32K": "full, 13M",
    "64x16 sink 32K longer": "64 x 16, sink, 31M",
    "64x16 sink sub8 32K": "64 x 16, sink, sub-blocks of 8, 22M",
}


@pytest.fixture(scope="module")
def alone():
    """Returns the runs with 32K of context that each had a GPU of their own."""
    names = [f"smollm2-32k-{x}h100" for x in ("alone-", "")]
    assert report_of(names[0])["corpus"] == report_of(names[1])["corpus"]
    return runs_of(names[0])


@pytest.fixture(scope="module")
def finer():
    """Returns full attention and sub-blocks in equal time at 32K, on one H200 each."""
    names = [f"smollm2-32k-{x}" for x in ("alone-h100", "sub-blocks-h200")]
    assert report_of(names[0])["corpus"] == report_of(names[1])["corpus"]
    runs = runs_of(names[1])
    assert {x["device"] for x in runs.values()} == {"NVIDIA H200"}
    return runs["full 32K"], runs["64x16 sink sub8 32K"]


@pytest.fixture(scope="module")
def shared():
    """Returns the earlier runs with 32K of context, which read equal numbers of tokens."""
    return runs_of("smollm2-32k-h100")


@pytest.fixture(scope="module")
def long():
    """Returns the answers of the models that were trained with 32K of context."""
    reports = [report_of(f"smollm2-retrieval-32k-{x}") for x in ("h100", "sub-blocks-h200")]
    models = {}
    for report in reports:
        assert (report["options"]["samples"], report["options"]["seed"]) == (50, 0)
        models |= report["models"]
    assert list(models) == list(LONG)
    return models


def seconds_of(run):
    """Returns the seconds of all steps without those that compiled."""
    return run["history"]["seconds"][-1] - run["history"]["compile_seconds"]


def test_the_tables_of_long_contexts_are_those_of_the_results(alone, shared, finer, long):
    full, losses, found = own(alone["full 32K"]), [], []
    first, longer = alone["full 32K"], alone["64x16 sink 32K longer"]
    parts = TRAINED[FINER]
    for run, name, read in (
        (first, "full", PLAIN),
        (shared["64x16 sink 32K"], PLAIN, PLAIN),
        (longer, PLAIN, PLAIN),
        (finer[1], parts, parts),
    ):
        seconds = "" if run in shared.values() else f"{seconds_of(run):.0f}"
        seconds += " (H200)" if "H200" in run["device"] else ""
        for served, kind in (("full", "full"), (read, "moba")):
            x = run["final"][kind]
            found.append(x)
            ends = [with_increase(x[part], full[part]) for part in ("loss", "last")]
            cells = [name, f"{run['tokens'] / 1e6:.0f}M", seconds, served]
            losses.append([*cells, ends[0], f"{x['first']:.4f}", ends[1]])
    assert table("## Extend the context") == losses
    text = section("## Extend the context", "## Train")
    errors = [max(error_of(x, full, y) for x in found) for y in ("by_window", "last_by_window")]
    assert len(full["by_window"]) == 16
    assert f"{errors[0]:.3f} nats of the mean and {errors[1]:.3f} of the last 4,096" in text
    needles = [
        [LONG[model], name_of(x), *map(str, counts(answers, list(answers["single"])))]
        for model, attentions in long.items()
        for x, answers in attentions.items()
    ]
    assert table("The next table shows how many of 50 [needles]") == needles
    error = largest_error(*long.values())
    assert f"column is at most {error:.1f}, so a difference of up to {2 * error:.0f} may" in text


def test_the_numbers_of_the_text_on_equal_time_are_those_of_the_results(alone, finer):
    text, full = section("## Extend the context", "## Train"), own(finer[0])
    steps = [x["step_ms"] for x in finer]
    assert (
        "takes {:.0f} ms with full attention (cuDNN) and {:.0f} ms with sub".format(*steps) in text
    )
    times, tokens = seconds_of(finer[1]) / seconds_of(finer[0]), finer[1]["tokens"]
    quote = f"In {times:.2f} times the time, the run with sub-blocks reads"
    assert f"{quote} {tokens / finer[0]['tokens']:.2f} times as many tokens." in text
    more, switched = (finer[1]["final"][x] for x in ("moba", "full"))
    gap, rest = (x["loss"] - full["loss"] for x in (more, switched))
    assert f"sub-blocks leave a gap of {gap:.3f} nats.**" in text
    quote = f"ends {gap:.3f} nats or {100 * gap / full['loss']:.1f} % higher with MoBA, and"
    errors = [error_of(x, full) for x in (more, switched)]
    quote += f" {rest:.3f} higher with full attention (standard errors {{:.3f}} and {{:.3f}})."
    assert quote.format(*errors) in text
    assert f"On this H200, full attention takes {seconds_of(finer[0]):.0f} seconds" in text
    of_h100 = alone["full 32K"]["final"]
    differences = [
        abs(finer[0]["final"][x][y] - of_h100[x][y])
        for x in ("full", "moba")
        for y in ("loss", "first", "last")
    ]
    assert max(differences) < 0.0015  # "differ by 0.001 at most"


def test_the_numbers_of_the_text_on_long_losses_are_those_of_the_results(alone, shared, finer):
    text = section("## Extend the context", "## Train")
    first, longer = alone["full 32K"], alone["64x16 sink 32K longer"]
    full = own(first)
    compiled = [x["history"]["compile_seconds"] for x in (first, longer, *finer)]
    quote = f"without {min(compiled):.0f} to {max(compiled):.0f} seconds of compilation"
    assert quote in text
    steps = [x["step_ms"] for x in (first, longer)]
    assert f"takes {steps[0]:.0f} ms with full attention (cuDNN) and {steps[1]:.0f} ms" in text
    assert f"took {seconds_of(longer) / seconds_of(first):.2f} times as long." in text
    assert f"read {longer['tokens'] / first['tokens']:.2f} times as many tokens" in text
    moba, switched = (longer["final"][x]["loss"] - full["loss"] for x in ("moba", "full"))
    assert f"ends {moba:.3f} nats or {100 * moba / full['loss']:.1f} % higher with MoBA." in text
    quote = f"it ends {switched:.3f} higher, with a standard error of"
    assert f"{quote} {error_of(longer['final']['full'], full):.3f}." in text
    gap = own(shared["64x16 sink 32K"])["loss"] - full["loss"]
    assert f"is {gap:.3f} nats or {100 * gap / full['loss']:.1f} % higher. At 32K" in text
    again = [x["final"] for x in (first, shared["full 32K"])]
    ends = [
        abs(again[0][kind][part] - again[1][kind][part])
        for kind in ("full", "moba")
        for part in ("loss", "first", "last")
    ]
    assert max(ends) < 0.0015  # "differ by 0.001 at most"


def test_the_numbers_of_the_text_on_long_needles_are_those_of_the_results(long, ms, decoder_ms):
    text = section("## Extend the context", "## Train")
    first, longer, parts = (long[x] for x in LONG)
    plain, finer, wide = "64x16+sink", "64x16+sink+sub8", "64x64+sink+sub8"
    at_end = {x: sum(y["single"]["32768"]) for x, y in longer.items()}
    full = sum(first["full"]["single"]["32768"])
    assert f"longer run finds {at_end[plain]} of 50 needles with 64 x 16; the" in text
    assert f"reads with full attention finds {full}.\n" in text
    assert f"finds {at_end[finer]} needles with sub-blocks of 8, {at_end['full']} with" in text
    ends = [sum(parts[x][task]["32768"]) for task in TASKS for x in (finer, "full")]
    quote = "trained with sub-blocks finds {}, and {} with full attention; in *multi-key*, it finds"
    assert f"{quote} {{}} and {{}}.".format(*ends) in text
    ratio = decoder_ms["decoder 32768 64x16+sub8"] / decoder_ms["decoder 32768 full"]
    assert f"takes {ratio:.2f} times as long as with full attention, forward" in text
    single, many = ([answers_of(x, (y,)) for x in (longer[wide], first["full"])] for y in TASKS)
    assert f"run finds {sum(single[0])} of {len(single[0])} needles of *single*" in text
    assert f"reads with full attention {sum(single[1])}. The" in text
    more, error = difference(*single)
    assert f"The difference, {more}, has a standard error of {error:.0f}. At 16K" in text
    depths = [by_depth(x, ("16384", "32768")) for x in (longer[wide], first["full"])]
    cells = ["{}, {}, {}, {} and {}".format(*x) for x in depths]
    assert f"it finds {cells[0]} of 20 in successive fifths" in text
    assert f"and full attention {cells[1]}. But" in text
    ratio = ms["call 32768 64x64+sub8"][1] / ms["call 32768 full"][1]
    assert f"takes {ratio:.1f} times as long as full attention, with backward." in text
    many = [answers_of(x["full"], ("multi-key",)) for x in (longer, first)]
    assert f"answers {sum(many[0])} of {len(many[0])} of these questions" in text
    assert f"trained with full attention {sum(many[1])}. The" in text
    assert f"The difference has a standard error of {difference(*many)[1]:.0f}. The" in text
    several = answers_of(parts["full"], ("multi-key",))
    less, error = difference(many[1], several)
    quote = f"trained with sub-blocks answers {sum(several)} with full attention: {less} fewer,"
    assert f"{quote} with a standard error of {error:.0f}." in text
    earlier = report_of("smollm2-retrieval-64k-h100")
    assert earlier["options"]["samples"] == 25
    found = [y["65536"] for x in earlier["models"].values() for z in x.values() for y in z.values()]
    assert not any(sum(x) for x in found)
