"""What `generate()` does with a PagedCache and no other: prompts without their padding, decode steps as CUDA graphs.

Nothing here is called by a user; `hf_paged_flash.patches` puts it where `generate()` finds it.
"""
