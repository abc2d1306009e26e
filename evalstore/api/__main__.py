"""`python -m evalstore.api`: the service at EVALSTORE_API_HOST and EVALSTORE_API_PORT.

`uvicorn evalstore.api.app:app --http evalstore.api.protocol:Protocol` runs the same, with uvicorn's own options.
"""

import uvicorn

from evalstore.startup import load_or_exit

GRACE_S = 30


def main() -> None:
    """Serve until SIGINT or SIGTERM, then finish what is being answered. Exit status 2 where settings are wrong."""
    chosen = load_or_exit()
    uvicorn.run(
        "evalstore.api.app:app",
        http="evalstore.api.protocol:Protocol",
        host=chosen.api_host,
        port=chosen.api_port,
        timeout_graceful_shutdown=GRACE_S,
        access_log=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
