"""Checks every page of the built site in Chromium: `make check-site`.

It opens each page at desktop and phone width, light and dark. Nothing may be wider than the window,
fail to load, or request another host. Pictures, equations and text must be visible and legible. At
desktop width, no table may scroll. The screenshots in `site-screens/` are for visual checks.
"""

import functools
import http.server
import itertools
import os
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
SITE, SCREENS = ROOT / "site", ROOT / "site-screens"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
WIDTHS = {"desktop": 1400, "phone": 390}
SCHEMES = ("light", "dark")

# A script that returns the problems of the open page as a list of texts.
LOOK = """() => {
  const problems = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    problems.push(`is ${document.documentElement.scrollWidth} wide in a window of ${width}`);
  const clips = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const scrolls = e => e && e !== document.body && (clips(e) || scrolls(e.parentElement));
  const start = e => e.textContent.trim().slice(0, 40);
  for (const e of document.querySelectorAll("article *")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(e))
      problems.push(`<${e.tagName}> ${start(e)} ends at ${Math.round(box.right)}`);
  }
  if (width > 1000)
    for (const e of document.querySelectorAll(".md-typeset__scrollwrap"))
      if (e.scrollWidth > e.clientWidth + 1) problems.push(`scrolls the table ${start(e)}`);
  for (const e of document.querySelectorAll("article img"))
    if (!e.complete || !e.naturalWidth) problems.push(`does not show ${e.src}`);
  for (const e of document.querySelectorAll("article math, article svg.drawing")) {
    const box = e.getBoundingClientRect();
    if (box.width < 4 || box.height < 4) problems.push(`shows nothing for ${start(e)}`);
  }
  const light = color => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return a === 0 ? null : (0.299 * r + 0.587 * g + 0.114 * b) / 255;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const inked = "article p, article td, article math, svg.drawing text";
  for (const e of document.querySelectorAll(inked)) {
    const style = getComputedStyle(e);
    const ink = light(e.tagName === "text" ? style.fill : style.color);
    if (Math.abs(ink - ground) < 0.4) problems.push(`hardly shows ${start(e)}`);
  }
  if (document.querySelector(".arithmatex")) problems.push("has an unconverted equation");
  return problems;
}"""


def main() -> int:
    """Prints the problems of all pages; returns 1 if there are any, else 0."""
    handler = functools.partial(QuietHandler, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    pages = sorted(x.relative_to(SITE).as_posix() for x in SITE.rglob("index.html"))
    SCREENS.mkdir(exist_ok=True)
    bad = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for (name, width), scheme in itertools.product(WIDTHS.items(), SCHEMES):
            view = {"width": width, "height": 900}
            page = browser.new_page(viewport=view, color_scheme=scheme)  # type: ignore[arg-type]
            failed: list[str] = []
            page.on("requestfailed", lambda request, to=failed: to.append(request.url))
            page.on(
                "response",
                lambda got, to=failed: (
                    to.append(f"{got.status} {got.url}") if got.status >= 400 else 0
                ),
            )
            page.on("request", lambda sent, to=failed: foreign(sent.url, home, to))
            for path in pages:
                failed.clear()
                problems = look(page, home + path.removesuffix("index.html"))
                problems += [f"could not load {url}" for url in failed]
                slug = path.removesuffix("/index.html").replace("/", "-").removesuffix(".html")
                page.screenshot(path=SCREENS / f"{slug}-{name}-{scheme}.png", full_page=True)
                bad += bool(problems)
                for problem in dict.fromkeys(problems):
                    print(f"{path}, {name}, {scheme}: {problem}")
            page.close()
        links = broken_links(browser.new_page(), home, pages)
        browser.close()
    print("\n".join(links))
    print(f"{len(pages)} pages, {bad} views with problems, {len(links)} broken links")
    return int(bool(bad or links))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that prints no log."""

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


def foreign(url: str, home: str, to: list[str]) -> None:
    """Adds the URL of a request to another host to ``to``."""
    if not url.startswith((home, "data:", "blob:")):
        to.append(f"{url} from another host")


def look(page: Page, url: str) -> list[str]:
    """Returns the problems of a page."""
    page.goto(url, wait_until="load")
    page.wait_for_timeout(150)
    problems: list[str] = page.evaluate(LOOK)
    return problems


def broken_links(page: Page, home: str, pages: list[str]) -> list[str]:
    """Returns links to missing pages or anchors, as the browser resolves them."""
    ids, links = {}, []
    for path in pages:
        url = home + path.removesuffix("index.html")
        page.goto(url)
        ids[url] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        links += [
            (url, link)
            for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(e => e.href)")
        ]
    broken = []
    for url, link in dict.fromkeys(links):
        target, _, anchor = link.partition("#")
        if target in ids:
            found = not anchor or anchor in ids[target]
        else:
            found = not target.startswith(home) or (SITE / target.removeprefix(home)).is_file()
        if not found:
            broken.append(f"{url} links to {link}, which does not exist")
    return broken


if __name__ == "__main__":
    sys.exit(main())
