"""`python -m evalstore.api`: the service at EVALSTORE_API_HOST and EVALSTORE_API_PORT."""

from models.extras import require

require("api")

import uvicorn

from evalstore.startup import load_or_exit

GRACE_S = 30


def main() -> None:
    """Serve until SIGINT or SIGTERM, and finish open requests. Exit with status 2 if settings are wrong."""
    settings = load_or_exit()
    uvicorn.run(
        "evalstore.api.app:app",  # by name, because WEB_CONCURRENCY may ask for several processes
        http="evalstore.api.protocol:Protocol",
        host="" if settings.api_host == "::" else settings.api_host,  # With `::`, asyncio would serve IPv6 only.
        port=settings.api_port,
        timeout_graceful_shutdown=GRACE_S,
        access_log=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
