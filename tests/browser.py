"""A browser for tests of the console, and what its pages did besides showing themselves."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

_FLAGS: Final = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage"),
)
_RECORD: Final = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""


@contextmanager
def launched() -> Iterator[Any]:
    """A browser. Skips the test without Playwright or Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: `make setup-integrations` installs it")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page that records scripts that ran, requests to elsewhere, and errors."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(base_url=url, **options)
        self.context.add_init_script(_RECORD)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.set_default_timeout(15_000)
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.faults.append(f"error {error}"))
        self.page.on("console", lambda line: self.faults.append(f"console {line.text}") if line.type == "error" else None)
        self.context.on("request", lambda request: self._check(request.url))
        self.context.on("page", lambda _: self.faults.append("another page was opened"))

    def _check(self, address: str) -> None:
        if not address.startswith((self.url + "/", "data:", "blob:")):
            self.faults.append(f"request {address}")

    def sign_in(self, key: str) -> None:
        self.page.goto(f"{self.url}/console/login")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url("**/console")

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
