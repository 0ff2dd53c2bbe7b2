"""A figure that moves, in headless Chromium: alone, before a page of the book has one."""

from pathlib import Path

import altair as alt
import pandas as pd
import pytest

from unlearnlib.book import moving

STATIC = Path(__file__).parents[2] / "book" / "_static"
SAYS = 'A point that says "<k>", and moves.'


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving, "display", lambda bundle, raw: shown.append(bundle["text/html"]))
        k = alt.param(name="k", value=2, bind=alt.binding_range(min=0, max=4, step=1, name="k"))
        table = pd.DataFrame({"k": range(5), "says": [f"point {i}</script>" for i in range(5)]})
        points = alt.Chart(table, width=300).mark_text().encode(x="k:Q", text="says:N")
        moving.show_moving(points.add_params(k).transform_filter("datum.k == k"), SAYS)
    folder = tmp_path_factory.mktemp("moving")
    (folder / "vega.js").write_text(moving.script(), encoding="utf-8")
    for name in ("book.js", "book.css"):
        (folder / name).write_text((STATIC / name).read_text(encoding="utf-8"), encoding="utf-8")
    head = '<meta charset="utf-8"><link rel="stylesheet" href="book.css"><script>const _ = 0;</script>'
    head += '<script src="book.js" defer></script>'
    (folder / "page.html").write_text(f"{head}<body>{shown[0]}</body>", encoding="utf-8")
    return folder / "page.html"


def opened(browser, file, **how):
    context = browser.new_context(viewport={"width": 390, "height": 844}, **how)
    page = context.new_page()
    page.goto(file.as_uri(), wait_until="networkidle")
    return page


def test_the_slider_moves_the_chart_by_keyboard_and_touch(browser, page_file):
    page = opened(browser, page_file, has_touch=True)
    page.wait_for_selector(".moves svg")
    slider, text = (
        page.get_by_role("slider", name="k"),
        page.locator(".live svg .mark-text text:has-text('t')"),
    )
    assert text.text_content() == "point 2</script>"
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.live').textContent.includes('point 3')")
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    page.wait_for_function("document.querySelector('.live').textContent.includes('point 4')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("img.still").is_visible()


@pytest.mark.parametrize("how", ["on paper", "without scripts"])
def test_it_stands_still(browser, page_file, how):
    page = opened(browser, page_file, java_script_enabled=how == "on paper")
    if how == "on paper":
        page.wait_for_selector(".moves svg")
        page.emulate_media(media="print")
    still = page.locator("img.still")
    assert still.is_visible()
    assert still.get_attribute("alt") == SAYS
    assert still.bounding_box()["width"] > 200
    assert not page.locator(".live").is_visible()
