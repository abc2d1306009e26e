"""Debian's Chromium, driven by Playwright, for tests of the console's pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)


_RECORD: Final = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""


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


class Watched:
    """A page that records scripts that ran, requests to elsewhere, and errors."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(base_url=url, **options)
        self.context.add_init_script(_RECORD)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.set_default_timeout(15_000)
        self.page.on("dialog", self._refuse)
        self.page.on("pageerror", lambda error: self.faults.append(f"error {error}"))
        self.page.on("console", lambda line: self.faults.append(f"console {line.text}") if line.type == "error" else None)
        self.context.on("request", lambda request: self._check(request.url))
        self.context.on("page", lambda _: self.faults.append("another page was opened"))

    def _refuse(self, dialog: Any) -> None:
        self.faults.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _check(self, address: str) -> None:
        if not address.startswith((self.url + "/", "data:", "blob:")):
            self.faults.append(f"request {address}")

    def sign_in(self, key: str) -> None:
        sign_in(self.page, self.url, key)

    def show(self, path: str) -> None:
        """Go to a page, wait until its scripts have run, and note what it must not do."""
        self.page.goto(f"{self.url}/console{path}", wait_until="load")
        self.page.wait_for_timeout(50)  # for handlers that a payload may have set
        self.faults += [f"violation {one}" for one in self.page.evaluate("window.violations")]
        if self.page.evaluate("window.ran"):
            self.faults.append("a payload ran")

    def take_faults(self) -> list[str]:
        found, self.faults = self.faults, []
        return found

    def close(self) -> None:
        self.context.close()
