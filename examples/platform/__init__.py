"""An evaluation platform in small: a gateway that enqueues, executors that run programs and report what came of them.

EVALSTORE_REDIS_URL=redis://… python -m examples.platform --ledger sent.jsonl
"""
