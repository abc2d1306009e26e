"""The console in a browser: the walk of an operator, hostile content, and accessibility."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from evalstore.storage import api_keys, database, dead_letters, sink_cursors
from tests import browser, console, payloads
from tests.chaos.world import World
from tests.integration.conftest import ADMIN

Start = Callable[..., Any]


@contextmanager
def connected(api: Any) -> Iterator[Connection]:
    engine = database.engine(api.database_url)
    with engine.connect() as conn:
        yield conn
    engine.dispose()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


def test_an_operator_walks_from_a_failed_evaluation_to_the_end_of_the_own_key(  # noqa: PLR0915 - one walk
    chromium: Any, start_api: Start, world: World, engine: Engine
) -> None:
    api = start_api()
    with engine.connect() as conn:
        console.store(conn)
        console.sum_up(conn)
        sink_cursors.create(conn, "kafka-main", "kafka")
        dead_letters.write(conn, console.letters(9))
        key, stored = api_keys.create(conn, "operator", ["admin"])
    world.workers().start()
    watched = browser.Watched(chromium, api.url)
    page = watched.page
    watched.sign_in(key)

    page.get_by_role("link", name="Evaluations", exact=True).click()
    page.get_by_label("Status").select_option("failed")
    page.get_by_role("button", name="Filter").click()
    page.get_by_role("link", name="demo-a-2").click()
    page.get_by_text("ValueError: judge").first.wait_for()

    page.get_by_role("link", name="Dead letters", exact=True).click()
    page.get_by_role("link", name="EventIdReused").first.click()
    page.get_by_role("region", name="Dead letters", exact=True).get_by_role("link").first.click()
    page.get_by_label("Message").fill(page.get_by_label("Message").input_value().replace('"exit_code": 0', '"exit_code": 42'))
    page.get_by_role("button", name="Show the difference").click()
    assert "42" in page.locator(".added").inner_text()
    page.get_by_label("Reason").fill("a wrong exit code")
    page.get_by_role("button", name="Send the edited message").click()
    page.get_by_text("1 of 1 stored").wait_for()

    page.get_by_role("link", name="Dead letters", exact=True).first.click()
    page.get_by_role("link", name="Redrive all").click()
    page.get_by_label("Canary").fill("2")
    page.get_by_label("Reason").fill("the workers are mended")
    page.get_by_role("button", name="Send 8 again").click()
    page.get_by_text("8 of 8 stored").wait_for()

    page.get_by_role("link", name="Runs", exact=True).click()
    page.get_by_label("Compare", exact=True).fill("demo-a")
    page.get_by_label("with", exact=True).fill("demo-b")
    page.get_by_role("button", name="Compare").click()
    changed = page.get_by_role("region", name="Changed").get_by_role("row")
    assert [row.inner_text().split()[1:3] for row in changed.all()[1:]] == [["passed", "failed"]]

    page.get_by_role("link", name="Sinks", exact=True).click()
    page.get_by_role("link", name="kafka-main").click()
    page.get_by_label("Reason").first.fill("the broker is moved")
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("kafka-main is paused").wait_for()

    page.get_by_role("link", name="Audit", exact=True).click()
    assert page.get_by_text("the workers are mended").count() == 1
    page.get_by_role("link", name="Keys", exact=True).click()
    own = page.get_by_role("row").filter(has_text=stored.key_id)
    own.get_by_text("Revoke", exact=True).click()
    own.get_by_label("Reason").fill("the shift is over")
    own.get_by_role("button", name="Revoke for good").click()
    page.wait_for_url("**/console/login")
    assert watched.take_faults() == []
    for _ in range(50):
        page.goto(f"{api.url}/console")
        if page.url.endswith("/login"):
            break
        page.wait_for_timeout(100)
    assert page.url.endswith("/login")
    watched.close()


@pytest.mark.parametrize("number", range(len(payloads.texts())))
def test_hostile_texts_in_every_field_run_nothing_and_ask_for_nothing(chromium: Any, api: Any, number: int) -> None:
    text = payloads.texts()[number]
    with connected(api) as conn:
        console.store(conn, text=text)
        ids = console.fill(conn, api.redis_url, text=text[:4000])
    watched = browser.Watched(chromium, api.url)
    watched.sign_in(ADMIN)
    for path in console.paths(ids):
        watched.show(path)
        assert watched.take_faults() == [], path
        assert watched.page.locator("h1").count() == 1, path
        assert watched.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    watched.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_no_page_violates_a_rule_of_accessibility(chromium: Any, api: Any, theme: str, width: int) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is missing: `make setup-integrations` installs it"
    )
    with connected(api) as conn:
        console.store(conn)
        ids = console.fill(conn, api.redis_url)
    watched = browser.Watched(chromium, api.url, color_scheme=theme, viewport={"width": width, "height": 900}, bypass_csp=True)
    page = watched.page
    page.goto(f"{api.url}/console/login")
    found = {"/login": axe.Axe().run(page).response["violations"]}
    watched.sign_in(ADMIN)
    for path in console.paths(ids):
        watched.show(path)
        found[path] = axe.Axe().run(page).response["violations"]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    faults = {
        path: [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in violations]
        for path, violations in found.items()
        if violations
    }
    assert not faults, json.dumps(faults, indent=1)
    watched.close()
