"""The HTTP service for uvicorn's own command: `uvicorn evalstore.api.app:app --http evalstore.api.protocol:Protocol`.

Without `--http`, uvicorn waits without limit for the head of a request: protocol.py.
"""

from models.extras import require

require("api")

from evalstore.api.application import build
from evalstore.startup import load_or_exit

app = build(load_or_exit())
