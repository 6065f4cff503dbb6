"""Measurements behind docs/benchmarks.md: interleaved runs, medians and spreads, ratios."""
