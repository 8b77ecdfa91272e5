"""Benchmarks: ratios and times of one run on one machine, which the result names."""
