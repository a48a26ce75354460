"""Tests of the documents: links, navigation, pictures, and an explanation for every error."""

import ast
import html
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, *ROOT.glob("*.md")]
# Pages that docs/hooks.py generates from files at the root.
FROM_ROOT = {"changelog.md": ROOT / "CHANGELOG.md", "contributing.md": ROOT / "CONTRIBUTING.md"}

# Messages that no user can cause, as (file, text). They need no explanation.
INTERNAL: set[tuple[str, str]] = set()

FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
REMEDY = re.compile(r", got |; |: ")  # the end of the first part of a message


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """Returns the anchors that the site derives from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading.lower()) for heading in plain}


@pytest.mark.parametrize(
    "path",
    TEXTS,
    ids=lambda path: path.name,
)
def test_links_and_pictures_resolve(path):
    for link in LINK.findall(prose(path)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        found = path if not target else path.parent / target
        if path.parent == DOCS:
            found = FROM_ROOT.get(target, found)
        assert found.is_file(), link
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), link


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {path.name for path in PAGES} | set(FROM_ROOT)


def test_every_picture_is_shown():
    shown = {link for path in PAGES for link in LINK.findall(prose(path))}
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name}" in shown, picture.name


def test_pictures_are_as_drawn(tmp_path, monkeypatch):
    drawn = runpy.run_path(str(DOCS / "pictures.py"))
    monkeypatch.setitem(drawn["main"].__globals__, "HERE", tmp_path)
    drawn["main"]()
    # The bytes of the pictures by `plots.py` depend on the version of matplotlib.
    committed = {path.name: path.read_text() for path in (DOCS / "pictures").glob("*.svg")}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_code_is_in_a_language_that_is_tested(path):
    # Other tests run Python. Of shell commands, the targets of make must exist. Text is output.
    languages = re.findall(r"^ *```(.*)$", path.read_text(), re.M)[::2]
    drawings = {""} if path.name == "CONTRIBUTING.md" else set()
    assert set(languages) <= {"python", "bash", "text"} | drawings
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.M)) <= set(targets)


def literal(node: ast.expr) -> str:
    """Returns a message with "…" for values that are known only when it is raised."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def messages_of(path: Path) -> Iterator[str]:
    """Yields errors and warnings of a file, and its reasons why a backend is not available."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            if name.endswith(("Error", "Warning")) or name == "warnings.warn":
                yield literal(node.args[0])
        if isinstance(node, ast.FunctionDef) and node.name.startswith("why_not"):
            for result in (x.value for x in ast.walk(node) if isinstance(x, ast.Return)):
                branches = (
                    [result.body, result.orelse] if isinstance(result, ast.IfExp) else [result]
                )
                yield from (
                    literal(x)
                    for x in branches
                    if isinstance(x, (ast.Constant, ast.JoinedStr))
                    if literal(x) != "…"
                )


def part(path: Path) -> str:
    """Returns the module or package of flexmoba that contains a file."""
    return path.relative_to(ROOT / "flexmoba").parts[0].removesuffix(".py")


SOURCES = sorted((ROOT / "flexmoba").rglob("*.py"))
MESSAGES = {
    (path.relative_to(ROOT).as_posix(), REMEDY.split(message)[0].strip())
    for path in SOURCES
    for message in messages_of(path)
}
# Rows for errors of the command line are optional.
COMMANDS = {"__main__", "bench", "commands", "reporting", "tune"}
NOT_COMMANDS = {path.relative_to(ROOT).as_posix() for path in SOURCES if part(path) not in COMMANDS}


def explained() -> set[str]:
    """Returns the messages in the first column of the tables of errors."""
    errors = (DOCS / "faq.md").read_text().split("\n## Errors\n")[1]
    return {html.unescape(text) for text in re.findall(r"^\| `(.+?)` \|", errors, re.M)}


def test_every_error_is_explained():
    missing = {
        f"{file}: add a row `{text}` to the tables of docs/faq.md"
        for file, text in MESSAGES - INTERNAL
        if file in NOT_COMMANDS and text not in explained()
    }
    assert not missing


def test_no_error_is_explained_that_is_not_raised():
    assert explained() <= {text for _, text in MESSAGES}


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "index.md"], ids=lambda x: x.name)
def test_first_words_say_what_is_lost(path):
    first = path.read_text().split("```")[0]
    assert "exact MoBA, not exact attention" in first
    example = (DOCS / "examples.md").read_text().split("\n## Find a needle\n")[1]
    means = dict(re.findall(r"^\| +([a-z+]+) \|.* (\d+)% \|$", example, re.M))
    assert f"full attention answers {means['full']} % right, MoBA {means['moba']} %" in first
    assert f"sub-blocks {means['moba+conv+sub']} %" in first
