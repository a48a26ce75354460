"""Type-checks the examples in README.md, the pages and the docstrings with mypy.

Each file becomes a module with the code at the same lines, and empty lines elsewhere. An error in
`pages/README.py:33` therefore refers to line 33 of README.md.
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
    """Returns the Python blocks of a Markdown page as a module."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        _put(lines, text.count("\n", 0, block.start(1)), block.group(1))
    return "\n".join(lines) + "\n"


def of_docstrings(text: str) -> str:
    """Returns the examples in the docstrings of a module as a module, a function for each."""
    lines = [""] * (text.count("\n") + 1)
    strings = (x.value for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Expr))
    for string in strings:
        if not isinstance(string, ast.Constant) or not isinstance(string.value, str):
            continue
        for i, example in enumerate(DocTestParser().get_examples(string.value)):
            line = string.lineno - 1 + example.lineno
            if i == 0:
                lines[line - 1] = f"def example_{line}() -> None:"
            _put(lines, line, textwrap.indent(example.source, "    "))
    return "\n".join(lines) + "\n"


def _put(lines: list[str], line: int, code: str) -> None:
    lines[line : line + code.count("\n")] = code.splitlines()


def main() -> int:
    """Writes the modules to a temporary folder, runs mypy on them, and returns its exit code."""
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
