"""The rendered book: its HTML read as text, and its pages in headless Chromium."""

import functools
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
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

# The contrast of every piece of text with the background behind it, after the WCAG formula.
CONTRAST = """() => {
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, under) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * under[i]);
  const luminance = c => c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const backdrop = node => {
    if (!node) return [255, 255, 255];
    const own = rgba(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, backdrop(node.parentElement));
  };
  const poor = [];
  const kinds = ':is(h1, h2, h3, p, li, dt, dd, th, td, figcaption, a, code, pre, pre span):not(.headerlink)';
  for (const node of document.querySelectorAll(`.bd-article ${kinds}`)) {
    const text = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!text || !node.checkVisibility()) continue;
    const under = backdrop(node), ink = over(rgba(getComputedStyle(node).color), under);
    const [low, high] = [luminance(ink), luminance(under)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    const name = `${node.tagName} ${node.textContent.trim().slice(0, 40)}`;
    if (ratio < 4.5) poor.push(`${ratio.toFixed(1)}: ${name}`);
  }
  return poor;
}"""

# What sticks out on the right, other than inside a box that scrolls.
SPILLING = """() => [...document.querySelectorAll('.bd-article *')]
  .filter(node => node.getBoundingClientRect().right > innerWidth + 1)
  .filter(node => {
    for (let up = node; up.matches('.bd-article *'); up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible') return false;
    return true;
  })
  .slice(0, 3).map(node => `${node.tagName} ${node.textContent.trim().slice(0, 60)}`)"""


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
    settings = [ROOT / "_config.yml", ROOT / "README.md", ROOT / "CITATION.cff", *ROOT.glob("book/*.md")]
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
    script = """() => [...document.images].map(image => { image.loading = 'eager'; return image; })
      .filter(image => !image.complete || !image.naturalWidth).map(image => image.src)"""
    return page.evaluate(script)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_the_browser(browser, address, book_site, scheme):
    """One context for all pages: they share a browser cache, and every page's complaints are told at once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    wrong = {}
    for path in pages(book_site):
        name = path.relative_to(book_site).as_posix()
        page = context.new_page()
        found = complaints(page, f"{address}/{name}", address)
        if path.parent != book_site:  # not the redirect and the generated indices
            assert page.get_attribute("html", "data-theme") == scheme
            found += [f"poor contrast {text}" for text in page.evaluate(CONTRAST)]
        page.close()
        if found:
            wrong[name] = found
    context.close()
    assert not wrong


def test_pages_fit_a_phone(browser, address, book_site):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    wrong = {}
    for path in pages(book_site):
        name = path.relative_to(book_site).as_posix()
        page.goto(f"{address}/{name}", wait_until="networkidle")
        if page.evaluate("document.documentElement.scrollWidth") > 390:
            wrong[name] = page.evaluate(SPILLING)
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
    page.set_content('<div class="bd-article"><p style="width: 800px; color: #bbb">pale and wide</p></div>')
    assert page.evaluate(SPILLING) == ["P pale and wide"]
    assert len(page.evaluate(CONTRAST)) == 1
    page.close()
