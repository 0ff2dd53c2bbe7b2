"""The rendered book: its HTML read as text, and its pages in headless Chromium."""

import functools
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from playwright.sync_api import ConsoleMessage, Page

from unlearnlib.book.pages import repository

ROOT = Path(__file__).parents[2]
MATHJAX = ROOT / "book" / "_static" / "mathjax"
FETCHED = (
    "script[src]",
    "img[src]",
    "iframe[src]",
    "source[src]",
    "video[src]",
    "audio[src]",
    "object[data]",
    "link[href]",
)

# What sticks out on the right, other than inside a box that scrolls.
SPILLING = """() => [...document.querySelectorAll('.bd-article *')]
  .filter(node => node.getBoundingClientRect().right > innerWidth + 1)
  .filter(node => {
    for (let up = node; up.matches('.bd-article *'); up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible') return false;
    return true;
  })
  .slice(0, 3).map(node => `${node.tagName} ${node.textContent.trim().slice(0, 60)}`)"""

# Code and tables that would lose their right edge on paper.
CUT = """() => [...document.querySelectorAll('.bd-article :is(pre, table)')]
  .filter(node => node.checkVisibility() && node.closest('.bd-article').getBoundingClientRect().right
    < Math.max(node.getBoundingClientRect().right, node.getBoundingClientRect().left + node.scrollWidth) - 1)
  .slice(0, 3).map(node => `${node.tagName} ${node.textContent.trim().slice(0, 60)}`)"""
# The dark colours are the style sheets', so pages that have all there is of code, tables and boxes speak for all.
DARK = ("index", "notation", "04_newton", "09_fair_fight", "23_claims")
PAPER = 680  # pixels between the margins of a sheet of A4


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


@functools.cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# The files


def test_every_chapter_has_a_page(book_site):
    for name in re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text()):
        assert (book_site / f"{name}.html").is_file(), name


def test_internal_links_lead_somewhere(book_site):
    broken = []
    for path in pages(book_site):
        for link in parsed(path).select("a[href]"):
            target = urlsplit(link["href"])
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            if not file.is_file() or not has_anchor(file, unquote(target.fragment)):
                broken.append(f"{path.name}: {link['href']}")
    assert not broken


def has_anchor(page: Path, name: str) -> bool:
    if not name or page.suffix != ".html":
        return True
    return parsed(page).find(id=name) is not None


def test_pages_refer_to_no_file_elsewhere(book_site):
    outside = [
        f"{path.name}: {node.get('src') or node.get('href') or node.get('data')}"
        for path in pages(book_site)
        for node in parsed(path).select(", ".join(FETCHED))
        if is_outside(node.get("src") or node.get("href") or node.get("data"))
    ]
    assert not outside


def test_scripts_and_styles_of_pages_name_no_other_site(book_site):
    pattern = re.compile(
        r"(?:https?:)?//(?:unpkg|cdn|cdnjs|fonts|ajax)\.|@import\s+(?:url\()?['\"]?https?:|url\(['\"]?https?:"
    )
    inline = [node.text for path in pages(book_site) for node in parsed(path).select("script:not([src]), style")]
    sheets = [path.read_text(encoding="utf-8") for path in book_site.rglob("*.css")]
    assert not [found.group() for text in inline + sheets for found in pattern.finditer(text)]


def is_outside(address: str) -> bool:
    target = urlsplit(address)
    return bool(target.netloc) or target.scheme not in ("", "data")


def test_pages_name_no_folder_of_this_machine(book_site):
    for path in pages(book_site):
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path


def test_the_repository_is_named_nowhere():
    """Its address comes from the git remote: a fork's pages lead to the fork."""
    settings = [*ROOT.glob("*.md"), ROOT / "_config.yml", ROOT / "CITATION.cff", *ROOT.glob("book/*.md")]
    for path in [*settings, *ROOT.glob("notebooks/*.ipynb")]:
        assert not re.search(r"git(hub|lab)\.com/[\w-]*unlearning", path.read_text(encoding="utf-8")), path.name


def test_buttons_lead_to_the_repository_or_are_absent(book_site):
    page, found = parsed(book_site / "notebooks" / "01_unlearning_problem.html"), repository(ROOT)
    links = [link["href"] for link in page.select(".article-header-buttons a[href^='http']")]
    assert all(found[0].partition("//")[2] in link for link in links) if found else links == []


# The browser


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        pass


@pytest.fixture(scope="module")
def address(book_site) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=book_site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def complaints(page: Page, url: str, home: str) -> list[str]:
    """Open ``url`` and list all that is wrong with what a reader would get."""
    found: list[str] = []
    page.on("request", lambda request: is_abroad(request.url, home) and found.append(f"request {request.url}"))
    page.on("requestfailed", lambda request: found.append(f"failed request {request.url}"))
    page.on("response", lambda reply: reply.status >= 400 and found.append(f"{reply.status} {reply.url}"))
    page.on("pageerror", lambda error: found.append(f"script error {error}"))
    page.on("console", lambda message: is_complaint(message) and found.append(f"console {message.text}"))
    page.goto(url, wait_until="networkidle")
    found += [f"maths error {text}" for text in maths_errors(page)]
    found += [f"maths left as text: {text}" for text in untypeset(page)]
    found += [f"broken image {src}" for src in broken_images(page)]
    found += [f"does not move: {says}" for says in still_figures(page)]
    return found


def is_complaint(message: ConsoleMessage) -> bool:
    # The redirect to the first page names no icon; the browser then guesses one, if it stays there long enough.
    return message.type == "error" and not message.location["url"].endswith("/favicon.ico")


def is_abroad(url: str, home: str) -> bool:
    return not url.startswith((f"{home}/", "data:", "blob:"))


def maths_errors(page: Page) -> list[str]:
    script = """async () => {
      if (!window.MathJax) return [];
      await MathJax.startup.promise;
      return [...document.querySelectorAll('mjx-merror')].map(node => node.textContent.slice(0, 60));
    }"""
    return page.evaluate(script)


def untypeset(page: Page) -> list[str]:
    """Formulas without typeset contents, and unknown commands, which MathJax would print in red."""
    script = """() => [...document.querySelectorAll('.math')]
      .filter(node => !node.querySelector('mjx-container') || node.querySelector('mjx-mtext[style*="red"]'))
      .map(node => node.textContent.slice(0, 60))"""
    return page.evaluate(script)


def broken_images(page: Page) -> list[str]:
    script = """async () => {
      const broken = [];
      for (const image of document.images) {
        image.loading = 'eager';
        await image.decode().catch(() => broken.push(image.src.slice(0, 100)));
      }
      return broken;
    }"""
    return page.evaluate(script)


def still_figures(page: Page) -> list[str]:
    """Figures that should move and do not."""
    script = """async () => {
      const still = () => [...document.querySelectorAll('.moving-figure:not(.moves)')];
      for (let tries = 0; still().length && tries < 100; tries++) await new Promise(done => setTimeout(done, 100));
      return still().map(figure => figure.getAttribute('aria-label'));
    }"""
    return page.evaluate(script)


def barriers(page: Page, *rules: str) -> list[str]:
    """What axe finds serious or critical on ``page`` for readers with a disability, by ``rules`` or by all.

    It does not look inside formulas, which are thousands of nodes of MathJax's own.
    """
    options: dict[str, Any] = {"preload": False, "resultTypes": ["violations"]}
    options |= {"runOnly": rules} if rules else {}
    return [
        f"{found['id']}: {node['html'][:100]}"
        for found in Axe().run(page, {"exclude": ["mjx-container"]}, options).response["violations"]
        for node in found["nodes"][:3]
        if found["impact"] in ("serious", "critical")
    ]


def test_pages_in_the_browser(browser, address, book_site):
    """Each page is loaded once, wide and light, then seen on a phone and on paper. All is told together."""
    size = {"width": 1280, "height": 900}
    context = browser.new_context(viewport=size, color_scheme="light", reduced_motion="reduce")
    wrong = {}
    for path in pages(book_site):
        name = path.relative_to(book_site).as_posix()
        page = context.new_page()
        found = complaints(page, f"{address}/{name}", address)
        if path.parent != book_site:  # not the redirect and the generated indices
            found += barriers(page)
            if path.stem in DARK:
                page.emulate_media(color_scheme="dark")
                page.wait_for_selector("html[data-theme=dark]")
                found += [f"in the dark {text}" for text in barriers(page, "color-contrast")]
            page.emulate_media(media="print")
            page.set_viewport_size({"width": PAPER, "height": 900})
            found += [f"cut on paper {text}" for text in page.evaluate(CUT)]
            page.emulate_media(media="screen")
        page.set_viewport_size({"width": 390, "height": 844})
        if page.evaluate("document.documentElement.scrollWidth") > 390:
            found += [f"too wide for a phone {text}" for text in page.evaluate(SPILLING)]
        page.close()
        if found:
            wrong[name] = found
    context.close()
    assert not wrong


def test_search_finds_a_chapter(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/search.html?q=retraining")
    page.wait_for_selector("#search-results li a")
    page.close()


@pytest.mark.parametrize(
    ("formula", "wrong"),
    [(r"\frac{a}{b}", False), (r"\frac{a", True), (r"\nosuchcommand x", True), (r"\boldsymbol{a}", False)],
)
def test_a_bad_formula_is_noticed(browser, tmp_path, formula, wrong):
    """The checks above can fail: on formulas that are not right, and on no others."""
    script = (MATHJAX / "es5" / "tex-mml-chtml.js").as_uri()
    html = rf'<script src="{script}" async></script><body><span class="math">\({formula}\)</span></body>'
    (tmp_path / "page.html").write_text(html)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri(), wait_until="networkidle")
    assert bool(maths_errors(page) + untypeset(page)) == wrong
    page.close()


def test_a_wide_or_pale_page_is_noticed(browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    pale = '<p style="width: 800px; color: #bbb; background: #fff">pale and wide</p>'
    page.set_content(f'<div class="bd-article"><pre style="width: 800px">long</pre>{pale}</div>')
    assert page.evaluate(SPILLING) == ["PRE long", "P pale and wide"]
    assert page.evaluate(CUT) == ["PRE long"]
    assert [text.partition(":")[0] for text in barriers(page, "color-contrast")] == ["color-contrast"]
    page.close()
