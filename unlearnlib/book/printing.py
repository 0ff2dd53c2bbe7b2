"""The book on paper: its rendered pages, joined in the order of ``_toc.yml``, printed as one PDF by Chromium."""

import asyncio
import contextlib
import html
import json
import posixpath
import re
import shutil
from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup
from playwright.async_api import Browser, Error, async_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import Fit
from sphinx_external_toc.parsing import parse_toc_yaml

from unlearnlib.book.pages import BuildError
from unlearnlib.cache import atomic_file

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
OLDEST = 131  # the first that prints what style sheets put into the margins of sheets, such as their numbers
MINUTES = 45  # some times what the whole book takes on a busy machine
MISSING = """printing needs Chromium {} or later, and {}
Install it (Debian, Ubuntu: apt install chromium), or fetch a copy: .venv/bin/playwright install chromium"""
WHOLE = """<!DOCTYPE html>
<html lang="en" data-theme="light"><head><meta charset="utf-8"><title>{title}</title>
{head}
<link rel="stylesheet" href="_static/paper.css"></head><body>
<div class="cover"><p class="title">{title}</p><p>{author}</p><p>{copyright}</p>
<p>Version {version}, computed at profile {profile}. Code that the pages keep folded is left out.</p></div>
<nav class="paper-contents"><h1>Contents</h1>
{contents}
</nav>
<main class="bd-main"><div class="bd-content"><div class="bd-article-container">
{articles}
</div></div></main></body></html>"""
# Waits until all is there, makes what is too wide fit, and lists what a reader would miss.
READY = """async () => {
  await window.MathJax?.startup.promise;
  const wrong = [];
  for (const node of document.querySelectorAll('.math'))
    if (!node.querySelector('mjx-container') || node.querySelector('mjx-merror, mjx-mtext[style*="red"]'))
      wrong.push(`a formula that cannot be set: ${node.textContent.trim().slice(0, 60)}`);
  for (const image of document.images)
    await image.decode().catch(() => wrong.push(`a picture that cannot be shown: ${image.src.slice(0, 100)}`));
  await document.fonts.ready;
  for (const box of document.querySelectorAll('div.math, .pst-scrollable-table-container, .output.text_html'))
    for (let zoom = 1; box.scrollWidth > box.clientWidth && zoom > 0.2; box.style.zoom = zoom)
      zoom *= Math.min(0.99, box.clientWidth / box.scrollWidth);
  return wrong;
}"""
NUMBER = """pages => document.querySelectorAll('.paper-contents a').forEach(link => {
  link.querySelector('.number').textContent = pages[decodeURIComponent(link.hash.slice(1))];
})"""


class Entry(NamedTuple):
    """A line of the contents and of the outline: how deep it lies, from 0, its title, and where it leads."""

    level: int
    title: str
    anchor: str


def require_chromium() -> None:
    """Raise BuildError where there is no Chromium that can be started, or too old a one."""

    async def start() -> None:
        async with _chromium():
            pass

    asyncio.run(start())


@contextlib.asynccontextmanager
async def _chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        try:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        except Error as error:
            raise BuildError(MISSING.format(OLDEST, f"none could be started: {error.message}")) from None
        if int(browser.version.partition(".")[0]) < OLDEST:
            raise BuildError(MISSING.format(OLDEST, f"this one has the version {browser.version}"))
        yield browser


def print_pages(root: Path, profile: str) -> Path:
    """Print the pages that were rendered at ``profile``, and return the PDF, ``_build/<profile>/book.pdf``.

    Raises BuildError where there is no Chromium, where it does not finish, and where a page has a formula that
    cannot be set, a picture that cannot be shown, or asks for anything that is not in the folder of the site.
    """
    build = root / "_build" / profile
    site, pdf = build / "site" / "_build" / "html", build / "book.pdf"
    text, entries = join_pages(root, profile, site)
    joined = site / "on-paper.html"
    try:
        joined.write_text(text, encoding="utf-8")
        with atomic_file(pdf) as temporary:
            asyncio.run(_print(joined, temporary))
            _add_outline(temporary, entries)
    except TimeoutError:
        raise BuildError(f"Chromium has not printed the book in {MINUTES} minutes: try again") from None
    finally:
        joined.unlink(missing_ok=True)
    return pdf


async def _print(joined: Path, pdf: Path) -> None:
    wrong = []
    async with asyncio.timeout(MINUTES * 60), _chromium() as browser:
        page = await browser.new_page(viewport={"width": 680, "height": 960})  # a sheet of A4 within its margins
        await page.emulate_media(media="print")
        await page.context.set_offline(True)
        page.on("requestfailed", lambda request: wrong.append(f"what is not there: {request.url}"))
        await page.goto(joined.as_uri(), timeout=0)
        wrong += await page.evaluate(READY)
        if wrong:
            raise BuildError("\n".join(["the book cannot be printed, for its pages have", *wrong]))
        # Twice: only once there are sheets can the contents tell their numbers.
        for _ in range(2):
            await page.pdf(path=pdf, prefer_css_page_size=True, print_background=True, tagged=True)
            await page.evaluate(NUMBER, sheets(PdfReader(pdf)))


def sheets(pdf: PdfReader) -> dict[str, int]:
    """The number, from 1, of the sheet that each anchor is on, for those that anything in the PDF links to."""
    anchors = pdf.named_destinations.items()
    return {name.removeprefix("/"): pdf.get_destination_page_number(place) + 1 for name, place in anchors}


def join_pages(root: Path, profile: str, site: Path) -> tuple[str, list[Entry]]:
    """One page of HTML, to be put into ``site``, with a cover, the contents and all pages; and its contents.

    Solutions are open in it: folding them takes scripts, and of these only MathJax is left.
    """
    toc = parse_toc_yaml(root / "_toc.yml").root
    parts = {tree.files()[0]: tree.caption for tree in toc.subtrees if tree.caption}  # by their first pages
    names = [toc.docname, *toc.child_files()]
    head, articles, entries = [], [], []
    for number, name in enumerate(names):
        page = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        _lead_within(page, name, names)
        assets = [str(node) for node in page.select('link[rel="stylesheet"], script')]
        head += [asset for asset in assets if asset.startswith("<link") or "mathjax" in asset.lower()]
        article = page.select_one("article.bd-article")
        for mark in article.select(".headerlink"):
            mark.decompose()
        title, level = article.h1.get_text(), int(name != toc.docname)
        if name in parts:
            entries.append(Entry(0, parts[name], name))
        entries.append(Entry(level, title, name))
        entries += [Entry(level + 1, h2.get_text(), h2.parent["id"]) for h2 in article.select("section > h2")]
        running = f"@page page-{number} {{ @top-right {{ content: {json.dumps(title, ensure_ascii=False)} }} }}"
        part = f'<p class="part">{html.escape(parts[name])}</p>' if name in parts else ""
        head.append(f"<style>{running}</style>")
        articles.append(f'<div class="paper-page" id="{name}" style="page: page-{number}">{part}{article}</div>')
    contents = [
        f'<a class="level-{level}" href="#{html.escape(anchor)}"><span>{html.escape(title)}</span>'
        ' <span class="number"></span></a>'
        for level, title, anchor in entries
    ]
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    words = {key: html.escape(str(config[key])) for key in ("title", "author", "copyright")}
    words |= {"version": metadata.version("unlearnlib"), "profile": profile}
    lists = {"head": dict.fromkeys(head), "contents": contents, "articles": articles}
    return WHOLE.format(**words, **{key: "\n".join(lines) for key, lines in lists.items()}), entries


def _lead_within(page: BeautifulSoup, name: str, names: list[str]) -> None:
    """Make anchors and links of ``page`` good for the joined page, where anchors begin with their page's name.

    A link to another page leads to where that is now, and one to another file of the site is a link no more.
    """
    for node in page.select("[id]"):
        node["id"] = f"{name}:{node['id']}"
    for node in page.select("[href], [src]"):
        key = "href" if node.has_attr("href") else "src"
        target = urlsplit(node[key])
        if target.scheme or target.netloc:
            continue
        path = posixpath.normpath(
            posixpath.join(posixpath.dirname(name), target.path or f"{Path(name).name}.html")
        )
        if node.name != "a":
            node[key] = path
        elif path.removesuffix(".html") in names:
            node[key] = "#" + ":".join([path.removesuffix(".html"), *filter(None, [unquote(target.fragment)])])
        else:
            del node[key]


def _add_outline(pdf: Path, entries: list[Entry]) -> None:
    """Give the PDF an outline. Chromium's own says twice what stands at the top of a sheet."""
    writer, reader, above = PdfWriter(pdf, incremental=True), PdfReader(pdf), []
    numbers, places = (
        sheets(reader),
        {name.removeprefix("/"): to for name, to in reader.named_destinations.items()},
    )
    for level, title, anchor in entries:
        item = writer.add_outline_item(
            title=re.sub(r"\\[()]", "", title),
            page_number=numbers[anchor] - 1,
            parent=above[level - 1] if level else None,
            fit=Fit.xyz(top=places[anchor].top),
            is_open=level == 0,
        )
        above[level:] = [item]
    writer.page_mode = "/UseOutlines"
    writer.write(pdf)
