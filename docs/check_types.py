"""Type-checks the examples of README.md, the pages and the docstrings, as users would see them.

Each file becomes a module whose lines are the file's: code where it has code, empty elsewhere. So
an error of `pages/README.py:33` is one of README.md, line 33.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from doctest import DocTestParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def of_page(text: str) -> str:
    """The Python blocks of a Markdown page."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        _put(lines, text.count("\n", 0, block.start(1)), block.group(1))
    return "\n".join(lines) + "\n"


def of_docstrings(text: str) -> str:
    """The examples of a module's docstrings, each docstring's in a function."""
    lines = [""] * (text.count("\n") + 1)
    strings = (x.value for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Expr))
    for string in strings:
        if not isinstance(string, ast.Constant) or not isinstance(string.value, str):
            continue
        for i, example in enumerate(DocTestParser().get_examples(string.value)):
            at = string.lineno - 1 + example.lineno
            if i == 0:
                lines[at - 1] = f"def example_{at}() -> None:"
            _put(lines, at, textwrap.indent(example.source, "    "))
    return "\n".join(lines) + "\n"


def _put(lines: list[str], at: int, code: str) -> None:
    lines[at : at + code.count("\n")] = code.splitlines()


def main() -> int:
    """Writes the modules down and runs mypy on them; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages")
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
            _write(pages / path.relative_to(ROOT).with_suffix(".py"), of_page(path.read_text()))
        for path in (ROOT / "flexmoba").rglob("*.py"):
            _write(pages / path.relative_to(ROOT), of_docstrings(path.read_text()))
        mypy = [sys.executable, "-m", "mypy", "-p", "pages"]
        return subprocess.run(mypy, cwd=ROOT, env=os.environ | {"MYPYPATH": folder}).returncode


def _write(path: Path, code: str) -> None:
    if code.strip():
        path = path.with_name(path.name.replace("-", "_"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


if __name__ == "__main__":
    sys.exit(main())
