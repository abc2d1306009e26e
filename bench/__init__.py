"""Benchmarks: evalstore beside what else one would use, everything in one run on one machine. See docs/performance.md."""
