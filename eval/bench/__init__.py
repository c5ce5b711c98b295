"""Kernel benchmarks: each compares a public op with its peers in one run, after checking it against fp64."""
