"""Triton kernels and their launchers. They trust their arguments: checks are settled in `hf_paged_flash.ops`."""
