"""Take the screenshots of docs/console.md: `python docs/screenshots.py [--folder docs/console]`.

Start servers and a service with examples on every page, and show each page to Chromium in a light and a dark theme. It needs
what `make setup-integrations` installs, and Debian's package chromium.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, Final

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage import database, dead_letters
from evalstore.storage.migrations import upgrade
from tests import console
from tests.browser import chromium, sign_in
from tests.integration.conftest import ADMIN, Api

_WIDE: Final = {"width": 1440, "height": 900}
_NARROW: Final = {"width": 360, "height": 780}


def pages_of(ids: dict[str, str]) -> dict[str, str]:
    """Return the path of each page by the name of its picture."""
    return {
        "overview": "",
        "evaluations": "/evaluations",
        "evaluation": "/evaluations/demo-a-2",
        "output": "/evaluations/demo-a-0/output",
        "runs": "/runs",
        "run": "/runs/demo-b",
        "compare": "/compare?a=demo-a&b=demo-b",
        "dead-letters": "/dead-letters",
        "dead-letter": f"/dead-letters/{ids['letter']}",
        "redrive-plan": "/dead-letters/redrive",
        "redrive": f"/redrives/{ids['redrive']}",
        "queues": "/queues",
        "schedule": "/schedule",
        "archive": "/archive",
        "sinks": "/sinks",
        "sink": "/sinks/kafka-main",
        "webhook": f"/webhooks/{ids['webhook']}",
        "anomalies": "/anomalies",
        "keys": "/keys",
        "audit": "/audit",
    }


def take(browser: Any, url: str, pages: dict[str, str], folder: Path, name: str, **options: Any) -> None:
    """Write a picture of each page as `NAME-of-page` and the name of the variant."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(f"{url}/console/login")
    if name == "light":
        page.screenshot(path=folder / "login.png")
    sign_in(page, url, ADMIN)
    for title, path in pages.items():
        page.goto(f"{url}/console{path}")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{title}-{name}.png", full_page=name == "narrow")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/console"))
    parser.add_argument("--all", action="store_true", help="also the dark theme and 360 pixels of each page")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as place,
        Postgres(Path(place, "pg")) as postgres,
        Valkey(Path(place, "valkey")) as valkey,
    ):
        address = postgres.url("evalstore")
        upgrade(address)
        engine = database.engine(address)
        with engine.connect() as conn:
            console.store(conn)
            ids = console.fill(conn, valkey.url(0))
            dead_letters.write(conn, console.letters(140))
        engine.dispose()
        api = Api(Path(place, "api"), {"EVALSTORE_DATABASE_URL": address, "EVALSTORE_REDIS_URL": valkey.url(0)})
        api.start()
        try:
            with chromium() as browser:
                pages = pages_of(ids)
                take(browser, api.url, pages, arguments.folder, "light", viewport=_WIDE, color_scheme="light")
                if arguments.all:
                    take(browser, api.url, pages, arguments.folder, "dark", viewport=_WIDE, color_scheme="dark")
                    take(browser, api.url, pages, arguments.folder, "narrow", viewport=_NARROW, color_scheme="light")
        finally:
            api.stop()


if __name__ == "__main__":
    main()
