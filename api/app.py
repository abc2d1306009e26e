"""The HTTP service: `uvicorn api.app:app --http api.protocol:Protocol`, or `python -m api`.

Without `--http` uvicorn waits without end for the head of a request, and no application has a say in that: api/protocol.py.
"""

import sys

from api.application import build
from models.errors import InvalidSettings
from models.settings import settings

try:
    settings()
except InvalidSettings as error:  # where a traceback would bury what is to be mended
    print(error, file=sys.stderr)
    sys.exit(2)
app = build()
