"""A gateway on evalstore's own `tasks`.

EVALSTORE_REDIS_URL=redis://… python -m examples.gateway_evalstore < program.py >> sent.jsonl
"""
