"""The HTTP service as uvicorn loads it: `uvicorn evalstore.api.app:app --http evalstore.api.protocol:Protocol`.

Without `--http` uvicorn waits without end for the head of a request, and no application has a say in that: protocol.py.
"""

from evalstore.api.application import build
from evalstore.startup import load_or_exit

load_or_exit()
app = build()
