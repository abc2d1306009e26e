"""`python -m api`: the service at EVALSTORE_API_HOST and EVALSTORE_API_PORT.

`uvicorn api.app:app --http api.protocol:Protocol` runs the same, with addresses and limits as uvicorn's own options say.
"""

import sys

import uvicorn

from models.errors import InvalidSettings
from models.settings import settings

GRACE_S = 30


def main() -> int:
    """Serve until SIGINT or SIGTERM, then finish what is being answered. Exit status 2 where settings are wrong."""
    try:
        chosen = settings()
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        return 2
    uvicorn.run(
        "api.app:app",
        http="api.protocol:Protocol",
        host=chosen.api_host,
        port=chosen.api_port,
        timeout_graceful_shutdown=GRACE_S,
        access_log=False,
        server_header=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
