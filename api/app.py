"""The HTTP service: `uvicorn api.app:app`, or `python -m api`."""

from api.application import build

app = build()
