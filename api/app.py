"""The HTTP service: `uvicorn api.app:app --http api.protocol:Protocol`, or `python -m api`.

Without `--http` uvicorn waits without end for the head of a request, and no application has a say in that: api/protocol.py.
"""

from api.application import build
from tasks.environment import settings_or_end

settings_or_end()
app = build()
