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


def test_the_tables_of_needles_are_those_of_the_results(converted):
    rows = [[name_of(x), *map(str, counts(answers))] for x, answers in converted.items()]
    assert table("### Needles\n") == rows
    some = ("full", "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4")
    depths = [[name_of(x), *map(str, by_depth(converted[x], LENGTHS[1:]))] for x in some]
    assert table("The next table shows the right answers of *single*") == depths
    assert f"column is at most {largest_error(converted):.1f}" in section("### Needles", "### Opt")


def test_the_numbers_of_the_text_on_needles_are_those_of_the_results(converted):
    text = section("### Needles", "### Options")
    four, eight = ({x: sum(y["single"][n]) for x, y in converted.items()} for n in LENGTHS[1:])
    plain, finer, finest = "64x16+sink", "64x16+sink+sub8", "32x32+sink+sub4"
    decoded, both = plain + "+full-decode", finer + "+full-decode"
    assert f"finds {eight[plain]} needles where full attention finds {eight['full']}." in text
    assert f"find {four[finer]} needles instead of {four[plain]}," in text
    assert f"they find {eight[finer]}. 32 x 32" in text
    assert f"finds {eight[finest]} there, and full attention {eight['full']}." in text
    assert max(eight[x] for x in eight if x != "full") == eight[finest]
    key = [sum(converted[x]["multi-key"]["4096"]) for x in (finest, "full")]
    assert f"finds {key[0]} where full attention finds {key[1]}" in text
    sums = [sum(answers_of(converted[x])) for x in ("full", finest, both, finer, plain)]
    assert f"Of all 300 questions, full attention answers {sums[0]}, 32 x 32" in text
    assert f"of 4 {sums[1]}, 64 x 16" in text
    assert "{} with full decoding and {} without, and 64 x 16".format(*sums[2:4]) in text
    assert f"sub-blocks {sums[4]}." in text
    assert f"finds {eight['64x32+sink']} at 8,192 tokens" in text
    assert f"64 x 16 finds {four[decoded]} and {eight[decoded]} needles" in text
    assert f"{four[both]} and {eight[both]} with sub-blocks" in text
    halves = [sum(converted[x]["single"]["2048"]) for x in (plain, "full")]
    assert f"finds {halves[0]} needles where full attention finds {halves[1]}; with a" in text
    assert f"a quarter, {four[plain]} and {four['full']}; with an eighth" in text
    assert f"with an eighth, {eight[plain]} and {eight['full']}." in text
    for x in ("64x32+sink", "128x16+sink"):  # 2,048 keys select every block
        for task in TASKS:
            assert converted[x][task]["2048"] == converted["full"][task]["2048"]


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


def test_other_sections_quote_the_needles(converted):
    text = page()
    eight = {x: sum(y["single"]["8192"]) for x, y in converted.items()}
    plain, finest = "64x16+sink", "32x32+sink+sub4"
    quote = f"it finds {eight[plain]} of 50 with 64 x 16, {eight['full']} with full attention, and"
    assert f"{quote} {eight[finest]} with 32 x 32" in text
    claim = f"finds {eight[plain]} of 50 needles at 8,192 tokens, {eight['full']} with full"
    assert f"{claim} attention, and {eight[finest]} with sub-blocks of 4 in" in text
    assert f"finds {eight[finest]} needles, and full attention {eight['full']}." in text


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/transformers.md"])
def test_pages_quote_the_needles(converted, name):
    plain, full, finest = (
        sum(converted[x]["single"]["8192"]) for x in ("64x16+sink", "full", "32x32+sink+sub4")
    )
    text = re.sub(r"\s+", " ", page(name))
    assert f"{plain} of 50 needles at 8K tokens" in text
    assert f"full attention finds {full}" in text
    assert f"find {finest}" in text


@pytest.mark.parametrize("name", ["docs/choosing.md", "docs/gates.md", "docs/transformers.md"])
def test_pages_quote_the_sub_blocks(converted, name):
    finest, full, whole, plain = (
        sum(converted[x]["single"]["8192"])
        for x in ("32x32+sink+sub4", "full", "32x32+sink", "64x16+sink")
    )
    quotes = {
        "docs/choosing.md": f"finds {finest} [needles](results.md#needles) where full attention "
        f"finds {full} and 16 blocks of 64 find {plain}",
        "docs/gates.md": f"{finest} needles at 8,192 tokens, where full attention finds {full}, "
        f"and the same blocks without sub-blocks {whole}.",
        "docs/transformers.md": f"they find {finest} needles.",
    }
    assert quotes[name] in page(name)


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
        quote = (
            f"finds {eight[plain]} of 50 needles at 8K tokens with MoBA (block 64, topk 16), and"
        )
        assert f"{quote} {eight['full']} with full attention" in page(name)


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
