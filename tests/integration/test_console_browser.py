"""The console in a browser: what only a browser shows."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from evalstore.storage import database, sink_cursors
from evalstore.storage.operator_actions import Intent
from tests.browser import chromium, sign_in
from tests.integration.conftest import READ

E = "/storage/evaluations"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Faults:
    """What went wrong on a page: errors of scripts, refusals of the policy, and requests to other hosts."""

    def __init__(self, page: Any, url: str) -> None:
        self.found: list[str] = []
        page.on("pageerror", lambda error: self.found.append(f"error: {error}"))
        page.on("console", lambda message: self.found.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith(url) else self.found.append(request.url))


@pytest.fixture
def page(browser: Any, api: Any) -> Iterator[Any]:
    context = browser.new_context(timezone_id="Asia/Tokyo")
    made = context.new_page()
    faults = Faults(made, api.url)
    sign_in(made, api.url, READ)
    yield made
    context.close()
    assert faults.found == []


def test_times_are_local_with_utc_on_hover(api: Any, page: Any) -> None:
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    page.goto(f"{api.url}/console/evaluations")
    time = page.locator("tbody time").first
    at = datetime.fromisoformat(time.get_attribute("datetime"))
    assert time.get_attribute("title") == f"{at:%Y-%m-%d %H:%M:%S} UTC"
    assert time.inner_text() != f"{at:%Y-%m-%d %H:%M:%S}"


def test_keys_open_pages_and_rows(api: Any, page: Any) -> None:
    api.both.post(E, json={"eval_id": "first", "code": "c"})
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("e")
    page.wait_for_url("**/console/evaluations")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "eval_id_prefix"
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/console/evaluations/first")


def test_a_running_evaluation_is_followed(api: Any, page: Any) -> None:
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    page.goto(f"{api.url}/console/evaluations/e")
    assert page.locator("h1 .status").inner_text() == "queued"
    api.both.put(f"{E}/e", json={"status": "completed", "exit_code": 0, "output": "it is done\n"})
    page.get_by_text("it is done").wait_for()
    assert page.locator("h1 .status").inner_text() == "completed"


def test_the_overview_changes_by_itself(api: Any, page: Any) -> None:
    page.goto(f"{api.url}/console")
    row = page.locator("tr", has_text="evaluations").first
    row.wait_for()
    engine = database.engine(api.database_url)
    with engine.connect() as conn:
        sink_cursors.create(conn, "kafka-main", "kafka")
        sink_cursors.set_state(conn, "kafka-main", "paused", Intent("sinks pause", "ann", "a test", {}))
    engine.dispose()
    page.get_by_text("The sink kafka-main is paused").wait_for()


def test_a_hidden_tab_asks_for_nothing(api: Any, page: Any) -> None:
    page.add_init_script("Object.defineProperty(document, 'hidden', {get: () => window.isHidden === true})")
    with page.expect_request("**/console/live"):
        page.goto(f"{api.url}/console")
    page.locator("#live").wait_for()
    change = "hidden => { window.isHidden = hidden; document.dispatchEvent(new Event('visibilitychange')) }"
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/console/live")):
        page.evaluate(change, True)
    with page.expect_request("**/console/live"):
        page.evaluate(change, False)


def test_every_page_can_be_read_at_360_pixels(api: Any, page: Any) -> None:
    api.both.post(
        E, json={"eval_id": "x" * 200, "code": "c" * 5000, "submitter": "s" * 1000, "metadata": {"k" * 500: "v" * 900}}
    )
    page.set_viewport_size({"width": 360, "height": 740})
    for path in (
        "",
        "/evaluations",
        f"/evaluations/{'x' * 200}",
        f"/evaluations/{'x' * 200}/code",
        "/runs",
        "/compare",
        "/runbook",
    ):
        page.goto(f"{api.url}/console{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


def test_pages_are_whole_without_scripts(browser: Any, api: Any) -> None:
    api.both.post(E, json={"eval_id": "e", "code": "print(1)"})
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    sign_in(page, api.url, READ)
    page.get_by_role("link", name="Evaluations").click()
    page.get_by_role("link", name="e", exact=True).click()
    assert "print" in page.locator("pre").first.inner_text()
    context.close()
