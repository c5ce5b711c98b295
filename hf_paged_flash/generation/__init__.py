"""What `generate()` does with a PagedCache and no other: prompts are prefilled without their padding.

Nothing here is called by a user; `hf_paged_flash.patches` puts it where `generate()` finds it.
"""
