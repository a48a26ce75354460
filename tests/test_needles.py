"""Tests that the tables and numbers on retrieval are those of the JSON files."""

import itertools
import re

import pytest

from tests.results import page, report_of, section, table

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
NOT_SHOWN = ("64x16+sink+sub8+full-decode", "128x16+sink")
IN_BOTH_TABLES = ("full", "32x32+sink+sub4")


def test_the_tables_of_needles_are_those_of_the_results(converted, second, both, settings):
    rows = [[name_of(x), *map(str, counts(answers))] for x, answers in both.items()]
    assert table("### Needles\n") == rows
    text = section("### Needles", "### Options")
    assert f"column is at most {largest_error(both):.1f}, so" in text
    assert f"difference of up to {2 * largest_error(both):.0f} may be chance" in text
    quotes = {
        "full": "finds {} of 40",
        "32x32+sink+sub4": "of 4 {},",
        "64x16+sink": "64 x 16 {}.\n",
    }
    for x, quote in quotes.items():
        pairs = zip(*(by_depth(y[x], LENGTHS[1:]) for y in (converted, second)), strict=True)
        assert quote.format("{}, {}, {}, {} and {}".format(*map(sum, pairs))) in text
    first = {x: y for x, y in settings.items() if x not in both or x in IN_BOTH_TABLES}
    first = {x: y for x, y in first.items() if x not in NOT_SHOWN}
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
    assert f"decoding, 64 x 16 finds {four[decoded]} and {eight[decoded]} of 100 needles" in text
    assert f"of 8 instead, {four[finer]} and {eight[finer]}." in text


def test_the_numbers_of_the_text_on_other_settings_are_those_of_the_results(settings):
    text = section("### Needles", "### Options")
    eight = {x: sum(y["single"]["8192"]) for x, y in settings.items()}
    assert f"in blocks of 64 find {eight['64x16+sink+sub4']}, sub-blocks of 8" in text
    assert f"of 8 in blocks of 32 find {eight['32x32+sink+sub8']}, and sub" in text
    assert f"of 4 in blocks of 32 find {eight['32x32+sink+sub4']}, with as many keys." in text
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
