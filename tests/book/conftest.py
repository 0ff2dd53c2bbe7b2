"""The browser that looks at pages."""

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from unlearnlib.book.printing import CHROMIUM, FLAGS


@pytest.fixture(scope="session")
def needs_chromium() -> None:
    if not CHROMIUM:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no chromium: install it to check pages in a browser"
        )


@pytest.fixture(scope="session")
def browser(needs_chromium: None) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
