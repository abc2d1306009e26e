"""Compare evalstore with other queues and libraries in one run on one machine. See docs/performance.md."""
