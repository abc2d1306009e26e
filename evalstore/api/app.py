"""The HTTP service: `uvicorn evalstore.api.app:app --http evalstore.api.protocol:Protocol`, or `python -m api`.

Without `--http` uvicorn waits without end for the head of a request, and no application has a say in that: evalstore/api/protocol.py.
"""

from evalstore.api.application import build
from evalstore.startup import settings_or_end

settings_or_end()
app = build()
