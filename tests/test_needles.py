"""Tests that the tables and numbers on retrieval are those of the JSON files."""

import itertools
import re

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

LENGTHS = ("2048", "4096", "8192")
TASKS = ("single", "multi-key")
NAMES = {"full": "full", "sink": "sink", "full-decode": "full decoding", "sub8": "sub-blocks of 8"}
NAMES["sub4"] = "sub-blocks of 4"


def name_of(attention):
    """Returns the name of an attention of retrieval.py in the tables."""
    parts = [NAMES.get(x, x.replace("x", " x ")) for x in attention.split("+")]
    return ", ".join(parts)


def counts(answers, lengths=LENGTHS):
    return [sum(answers[task][x]) for task in TASKS for x in lengths]


def by_depth(answers, lengths):
    """Returns the right answers of ``single`` at some lengths together, by fifths of the depth."""
    found = [answers["single"][x] for x in lengths]
    size = len(found[0]) // 5
    return [sum(sum(x[i : i + size]) for x in found) for i in range(0, 5 * size, size)]


def difference(a, b):
    """Returns how many more of the questions ``a`` answers than ``b``, and its standard error."""
    pairs = list(zip(a, b, strict=True))
    more, less = (sum(x > y for x, y in z) for z in (pairs, [(y, x) for x, y in pairs]))
    return more - less, (more + less - (more - less) ** 2 / len(pairs)) ** 0.5


def largest_error(*models):
    """Returns the greatest standard error of the difference of two counts of a column."""
    attentions = [x for model in models for x in model.values()]
    return max(
        difference(a[task][x], b[task][x])[1]
        for a, b in itertools.combinations(attentions, 2)
        for task in a
        for x in a[task]
    )


def answers_of(model, tasks=TASKS):
    """Returns the answers to the questions of all lengths."""
    return [y for task in tasks for answers in model[task].values() for y in answers]


@pytest.fixture(scope="module")
def converted():
    """Returns the answers of SmolLM2 without training, by attention, task and length."""
    report = report_of("smollm2-retrieval-8k-h100")
    assert report["options"]["samples"] == 50
    return report["right"]


@pytest.fixture(scope="module")
def second():
    """Returns the answers to 50 other questions."""
    report, base = (report_of(f"smollm2-retrieval-{x}8k-h100") for x in ("seed-1-", ""))
    assert report["options"] == base["options"] | {"seed": 1}
    assert report["device"] == base["device"]
    return report["right"]


@pytest.fixture(scope="module")
def both(converted, second):
    """Returns the answers to both sets of questions, of the attentions that answered both."""
    return {
        x: {task: {n: converted[x][task][n] + y[task][n] for n in LENGTHS} for task in TASKS}
        for x, y in second.items()
    }


@pytest.fixture(scope="module")
def settings(converted):
    """Returns the answers of all settings to the first 50 questions."""
    report, base = (report_of(f"smollm2-retrieval-{x}8k-h100") for x in ("gates-", ""))
    assert all(report[x] == base[x] for x in ("options", "device"))
    return converted | report["right"]


def keys_of(attention):
    """Returns how many keys a query reads at most."""
    sizes = re.match(r"(\d+)x(\d+)", attention)
    return int(sizes[1]) * int(sizes[2]) if sizes else None


ONLY_FIRST = "Other settings answered the first 50 of these questions."
IN_BOTH_TABLES = ("full", "32x32+sink+sub4")


def test_the_tables_of_needles_are_those_of_the_results(converted, second, both, settings):
    rows = [[name_of(x), *map(str, counts(answers))] for x, answers in both.items()]
    assert table("### Needles\n") == rows
    text = section("### Needles", "### Options")
    assert f"column is at most {largest_error(both):.1f}, so" in text
    assert f"difference of up to {2 * largest_error(both):.0f} may be chance" in text
    some, depths = ("full", "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"), []
    for x in some:
        pairs = zip(*(by_depth(y[x], LENGTHS[1:]) for y in (converted, second)), strict=True)
        depths.append([name_of(x), *(str(a + b) for a, b in pairs)])
    assert table("The next table shows the right answers of *single*") == depths
    first = {x: y for x, y in settings.items() if x not in both or x in IN_BOTH_TABLES}
    rows = {
        name_of(x): [f"{keys_of(x):,}" if keys_of(x) else "all", *map(str, counts(answers))]
        for x, answers in first.items()
    }
    assert {x: cells for x, *cells in table(ONLY_FIRST)} == rows
    assert f"difference is at most {largest_error(first):.1f} here." in text
    assert all(keys_of(x) in (None, 1024) for x in both)  # "at most 1,024 keys"


def test_settings_that_select_every_block_answer_as_full_attention(settings):
    equal = [x for x in settings if (keys_of(x) or 0) >= 2048]
    assert len(equal) == 4
    for x in equal:
        for task in TASKS:
            assert settings[x][task]["2048"] == settings["full"][task]["2048"]


def test_the_numbers_of_the_text_on_needles_are_those_of_the_results(converted, second, both):
    text = section("### Needles", "### Options")
    two, four, eight = ({x: sum(y["single"][n]) for x, y in both.items()} for n in LENGTHS)
    plain, finer, finest = "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"
    decoded = plain + "+full-decode"
    assert (
        f"finds {eight[plain]} of 100 needles where full attention finds {eight['full']}." in text
    )
    assert f"finds {two[plain]} needles where full attention finds {two['full']}; with a" in text
    assert f"a quarter, {four[plain]} and {four['full']}; with an eighth" in text
    assert f"with an eighth, {eight[plain]} and {eight['full']}." in text
    assert f"find {eight[finer]} needles instead of {eight[plain]}," in text
    assert f"finds {eight[finest]}, and full attention {eight['full']}." in text
    firsts, seconds = (
        {x: sum(y["single"]["8192"]) for x, y in z.items()} for z in (converted, second)
    )
    assert max(firsts[x] for x in firsts if x != "full") == firsts[finest]
    assert len(firsts) == 9  # "the best of eight settings"
    quote = f"with {firsts[finest]} needles where full attention found {firsts['full']}. On"
    assert quote in text
    assert f"it found {seconds[finest]}, and full attention {seconds['full']}." in text
    sums = {x: sum(answers_of(y)) for x, y in both.items()}
    assert f"Of all 600 questions, full attention answers {sums['full']} and 32 x 32" in text
    assert f"sub-blocks of 4 {sums[finest]}. The difference" in text
    more, error = difference(*(answers_of(both[x]) for x in ("full", finest)))
    assert f"The difference, {more}, has a standard error of {error:.0f}." in text
    assert f"answers {sums[finer]} with sub-blocks of 8, and {sums[plain]} without." in text
    assert f"64 x 16 finds {four[decoded]} and {eight[decoded]} of 100 needles" in text
    assert f"of 8 instead, {four[finer]} and {eight[finer]}." in text


def test_the_numbers_of_the_text_on_other_settings_are_those_of_the_results(settings):
    text = section("### Needles", "### Options")
    eight = {x: sum(y["single"]["8192"]) for x, y in settings.items()}
    assert f"in blocks of 64 find {eight['64x16+sink+sub4']}, sub-blocks of 8" in text
    assert f"of 8 in blocks of 32 find {eight['32x32+sink+sub8']}, and sub" in text
    assert f"of 4 in blocks of 32 find {eight['32x32+sink+sub4']}, with as many keys." in text
    assert f"finds {eight['64x32+sink']} of the first 50 needles at 8,192 tokens, and " in text
    assert f"and {eight['64x32+sink+sub8']} with sub-blocks of 8. With" in text
    assert f"32 x 64 finds {eight['32x64+sink+sub4']}, and 32 x 16, with" in text
    assert f"{keys_of('32x16')} keys, {eight['32x16+sink+sub4']}. Of" in text
    few, most = (sum(answers_of(settings[x])) for x in ("32x16+sink+sub4", "64x32+sink"))
    assert f"Of the first 300 questions, 32 x 16 with sub-blocks of 4 answers {few}," in text
    assert f"with four times the keys, {most}." in text


def test_the_numbers_of_the_earlier_questions_are_those_of_the_results():
    report = report_of("smollm2-retrieval-8k-h200")
    assert report["options"]["samples"] == 25
    right, text = report["right"], section("### Needles", "### Options")
    for x in right.values():
        for task, by_length in x.items():
            assert by_length["1024"] == right["full"][task]["1024"]  # every block is selected
    for task in ("multi-value", "tracking", "counting"):
        assert not any(sum(x) for x in right["full"][task].values())
    for attention, words in (("64x16", "sink block finds"), ("full", "full attention")):
        single = [str(sum(right[attention]["single"][x])) for x in LENGTHS]
        assert f"{words} {single[0]}, {single[1]} and {single[2]}" in text


@pytest.fixture(scope="module")
def eight(both):
    """Returns how many of 100 answers to ``single`` are right at 8,192 tokens."""
    assert all(len(x["single"]["8192"]) == 100 for x in both.values())
    return {x: sum(y["single"]["8192"]) for x, y in both.items()}


def test_other_sections_quote_the_needles(eight):
    text = page()
    plain, finest, full = (eight[x] for x in ("64x16+sink", "32x32+sink+sub4", "full"))
    quote = f"it finds {plain} of 100 with 64 x 16, {full} with full attention, and {finest} with"
    assert quote in text
    quote = (
        f"finds {plain} of 100 needles at 8,192 tokens, {full} with full attention, and {finest}"
    )
    assert quote in text
    assert f"finds {finest} of 100 needles, and full attention {full}. Then" in text
    assert f"sub-blocks of 4 find {finest} of 100 at 8,192 tokens, where they" in text
    assert f"an eighth of the keys and full attention finds {full}." in text


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/transformers.md"])
def test_pages_quote_the_needles(eight, name):
    text = re.sub(r"\s+|\[|\]\([^)]*\)", " ", page(name)).replace("  ", " ")
    assert f"{eight['64x16+sink']} of 100 needles at 8K tokens" in text
    assert f"full attention finds {eight['full']}." in text
    assert f"find {eight['32x32+sink+sub4']}" in text


QUOTES = {
    "docs/choosing.md": "finds {finest} of 100 [needles](results.md#needles) where full attention "
    "finds {full} and 16 blocks of 64 find {plain}.",
    "docs/gates.md": "{finest} of 100 needles at 8,192 tokens, where full attention finds {full}, "
    "and the same blocks without sub-blocks {whole}.",
    "docs/transformers.md": "they find {finest} needles. With `block_size=64, topk=16`, full "
    "attention [in decoding](hybrid.md#results-of-the-paper) finds {decoded}, and "
    "`gate_block_size=8` {finer}.",
    "docs/examples.md": "finds {finest} of 100 needles at 8,192 tokens, where full attention "
    "finds {full}.",
}


@pytest.mark.parametrize("name", QUOTES)
def test_pages_quote_the_sub_blocks(eight, name):
    quote = QUOTES[name].format(
        plain=eight["64x16+sink"],
        decoded=eight["64x16+sink+full-decode"],
        finer=eight["64x16+sink+sub8"],
        whole=eight["32x32+sink"],
        finest=eight["32x32+sink+sub4"],
        full=eight["full"],
    )
    assert quote in page(name)


TRAINED = {"none": "not trained", "full": "full", "64x16 sink": "64 x 16, sink"}


@pytest.fixture(scope="module")
def trained(converted):
    """Returns the answers after continued training, and without, by training and attention."""
    report, base = report_of("smollm2-retrieval-trained-8k-h100"), "smollm2-retrieval-8k-h100"
    for part in ("options", "device", "versions"):
        assert report[part] == report_of(base)[part]
    models = report["models"]
    asked = [x for x in converted if any(x in answers for answers in models.values())]
    return {"none": {x: converted[x] for x in asked}, **models}


def test_the_table_of_needles_after_training_is_that_of_the_results(trained):
    rows = [
        [TRAINED[model], name_of(x), *map(str, counts(answers))]
        for model, attentions in trained.items()
        for x, answers in attentions.items()
    ]
    assert table("### Needles after") == rows
    text = section("### Needles after continued training", "### Copies")
    assert f"column is at most {largest_error(*trained.values()):.1f}, so a" in text


def test_the_numbers_of_the_text_on_needles_after_training_are_those_of_the_results(trained):
    text = section("### Needles after continued training", "### Copies")
    plain, moba, full = "64x16+sink", trained["64x16 sink"], trained["full"]
    sums = {
        (model, x): sum(answers_of(answers))
        for model, attentions in trained.items()
        for x, answers in attentions.items()
    }
    assert f"trained with MoBA answers {sums['64x16 sink', plain]} with MoBA. The" in text
    assert f"full attention answers {sums['full', plain]} with MoBA. The difference" in text
    more, error = difference(answers_of(moba[plain]), answers_of(full[plain]))
    assert f"The difference, {more}, has a standard error of {error:.0f}." in text
    assert f"without training, {sums['none', plain]}, and so" in text
    assert f"attention: {sums['full', 'full']} instead of {sums['none', 'full']}." in text
    single = difference(*(answers_of(x["full"], ("single",)) for x in (moba, full)))
    assert abs(single[0]) <= 2 * single[1]  # "as many"
    many = [answers_of(x["full"], ("multi-key",)) for x in (moba, full)]
    assert f"answers {sum(many[0])} of {len(many[0])} questions, and the" in text
    assert f"other one {sum(many[1])}. The" in text
    assert f"difference has a standard error of {difference(*many)[1]:.0f}" in text
    eight = {x: sum(y["single"]["8192"]) for x, y in moba.items()}
    assert (
        f"finds {eight[plain]} needles with 64 x 16, {eight[plain + '+full-decode']} with" in text
    )
    assert f"decoding and {eight['64x32+sink']} with 64 x 32." in text
    of_full = sum(full["full"]["single"]["8192"])
    assert f"it finds {eight[plain]} of 50 [needles](#needles-after-continued-training)" in page()
    assert f"at 8,192 tokens, where full attention finds {of_full}. With" in page()
    for name in ("README.md", "docs/index.md"):
        quote = f"finds {eight[plain]} of 50 needles with MoBA, and {eight['full']} with full"
        assert quote in page(name)


LONG_LENGTHS = ("4096", "8192", "16384", "32768", "65536")
LONG = {"full 32K": "full", "64x16 sink 32K": "64 x 16, sink"}


@pytest.fixture(scope="module")
def long():
    """Returns the answers of the models that were trained with 32K of context."""
    report = report_of("smollm2-retrieval-64k-h100")
    assert report["options"]["samples"] == 25
    return report["models"]


def test_the_tables_of_long_contexts_are_those_of_the_results(long):
    needles, depths = [], []
    for model, attentions in long.items():
        for x, answers in attentions.items():
            cells = [LONG[model], name_of(x)]
            needles.append([*cells, *map(str, counts(answers, LONG_LENGTHS))])
            depths.append([*cells, *map(str, by_depth(answers, LONG_LENGTHS[2:4]))])
    assert table("The next table shows how many of 25 [needles]") == needles
    text = "The standard error of the difference of two counts of a column is at most"
    assert table(f"{text} {largest_error(*long.values()):.1f}, so a difference of up") == depths
    runs, losses = runs_of("smollm2-32k-h100"), []
    full = own(runs["full 32K"])
    for name, run in runs.items():
        for served, kind in (("full", "full"), ("64 x 16, sink", "moba")):
            x = run["final"][kind]
            ends = [with_increase(x[part], full[part]) for part in ("loss", "last")]
            between = [f"{x[part]:.4f}" for part in ("first", "middle")]
            losses.append([LONG[name], served, ends[0], *between, ends[1]])
    assert table("## Extend the context") == losses


def test_the_numbers_of_the_text_on_long_contexts_are_those_of_the_results(long):
    text, runs = section("## Extend the context", "## Train"), runs_of("smollm2-32k-h100")
    full, moba = runs["full 32K"]["final"], runs["64x16 sink 32K"]["final"]
    others = [full["moba"], moba["moba"], moba["full"]]
    errors = [
        max(error_of(x, full["full"], part) for x in others)
        for part in ("by_window", "last_by_window")
    ]
    assert len(full["full"]["by_window"]) == 16
    assert f"{errors[0]:.3f} nats of the mean and {errors[1]:.3f} of the last 4,096" in text
    untrained, gap, switched = (x["loss"] - full["full"]["loss"] for x in others)
    assert f"{gap:.3f} nats or {100 * gap / full['full']['loss']:.1f} % above full" in text
    assert f"has a loss {untrained:.3f} higher" in text
    assert 0.2 < 1 - gap / untrained < 0.3  # "a quarter"
    assert f"Its loss is {switched:.3f} higher." in text
    assert f"the loss is {100 * gap / full['full']['loss']:.1f} % higher than with full" in page()
    plain = "64x16+sink"
    found = [long[x][y]["single"]["32768"] for x, y in zip(LONG, ("full", plain), strict=True)]
    few, most = sum(found[1]), sum(found[0])
    assert f"finds {few} needles at 32K, where full attention finds {most}." in text
    quote = f"finds {few} of 25 needles at 32K, where full attention finds {most}"
    assert page().count(quote) == page().count("of 25 needles") == 2
    single, many = ([answers_of(long[x]["full"], (y,)) for x in LONG] for y in TASKS)
    more, error = difference(*single)
    assert abs(more) <= 2 * error  # "as many"
    quote = f"answers {sum(many[1])} of {len(many[1])} questions, and the other one {sum(many[0])}"
    assert quote in text
    assert not any(sum(y["65536"]) for x in long.values() for z in x.values() for y in z.values())


def test_repeated_runs_have_equal_losses():
    first, again = (runs_of(f"smollm2-continued-{x}8k-h100") for x in ("", "again-"))
    for name, run in again.items():
        assert run["final"] == first[name]["final"]
        for part in ("loss_of_10_steps", "checks"):
            assert run["history"][part] == first[name]["history"][part]
        assert run["versions"]["commit"] != first[name]["versions"]["commit"]


def test_the_tables_of_the_cost_of_sub_blocks_are_those_of_the_results():
    report = report_of("sub-blocks-time-h100")
    rows, results = {}, report["results"]
    for x in results:
        rows.setdefault((x["block_size"], x["gate_block_size"]), {})[x["call"]] = x["ms"]
    fine, coarse = [], []
    for (size, part), ms in rows.items():
        row = [str(part), str(size // part), f"{ms['gate']:.2f}"]
        if size == 128:
            fine.append([*row, f"{ms['forward']:.2f}"])
        else:
            coarse.append([*row, f"{ms['group gate']:.2f}", f"{ms['step']:.4f}"])
    assert table("### Cost of sub-blocks", "docs/gates.md") == fine
    assert table("With 32 query heads", "docs/gates.md") == coarse
    assert report["integers_equal_cpu"]
    assert f"{min(report['equal_rows'].values()):.4%}".replace("%", " %") in page("docs/gates.md")
    times = [rows[128, x]["forward"] for x in (8, 128)]
    assert f"{times[0] / times[1]:.1f} times as long" in page()
    steps = [rows[512, x]["step"] for x in (64, 512)]
    assert f"{steps[0] / steps[1]:.1f} times as long" in page()
