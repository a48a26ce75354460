"""MkDocs hooks: equations as MathML, inline pictures, and pages from files at the root.

Browsers render MathML themselves, so a page loads no script for equations.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

EQUATION = re.compile(
    r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.S
)
PICTURE = re.compile(r'<img alt="([^"]*)" src="[^"]*?(pictures/[\w-]+\.svg)"[^>]*>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages for the changelog and the contributing guide, whose files are at the root."""
    for page, name in FROM_ROOT.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Converts equations to MathML and inlines SVG pictures, which then use the page colours."""
    return PICTURE.sub(_inline, EQUATION.sub(_mathml, text))


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "[" else "inline"
    return convert(html.unescape(found[2]).strip(), display=display)


def _inline(found: re.Match[str]) -> str:
    drawing = (ROOT / "docs" / found[2]).read_text()
    drawing = re.sub(
        r"<style>.*?</style>", "", drawing, flags=re.S
    )  # the style is for use outside the site
    label = f'<svg class="drawing" role="img" aria-label="{found[1]}" '
    return drawing.replace("<svg ", label, 1)
