"""Evaluations and benchmarks of hf_paged_flash, written against its public API alone."""
