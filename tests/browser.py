"""Debian's Chromium, driven by Playwright, for tests of the console's pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Give a browser. Skip the test, and say what to install, without one."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: make setup-integrations")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def sign_in(page: Any, url: str, key: str) -> None:
    """Sign in to the console at `url`, as a person does."""
    page.goto(f"{url}/console/login")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{url}/console**")
