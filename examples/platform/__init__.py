"""A small evaluation platform: a gateway that enqueues, and executors that run programs and report their results.

EVALSTORE_REDIS_URL=redis://… python -m examples.platform --ledger sent.jsonl
"""
