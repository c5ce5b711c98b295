"""Every change that hf_paged_flash makes to transformers at run time, one file each."""
