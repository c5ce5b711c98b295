"""Benchmarks: each compares ours with its peers in one run, and checks results before it records a number."""
