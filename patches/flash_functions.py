"""`lazy_import_flash_attention("paged_flash")` finds our functions.

Why: transformers takes any attention name with "flash" in it for a package or a hub kernel, looks it up when a model
is loaded, and raises. We keep the "flash" because it switches on what we want elsewhere: packed rows in vision towers,
no dense masks. There is no registry to add to.
"""

from transformers import modeling_flash_attention_utils as flash_utils

from hf_paged_flash.patches.base import Patch


def _lazy_imports(original, implementation, *args, **kwargs):
    if implementation is None or implementation.split("|")[-1] != "paged_flash":
        return original(implementation, *args, **kwargs)
    from hf_paged_flash import ops

    return (
        ops.flash_attn_func,
        ops.flash_attn_varlen_func,
        ops.flash_attn_with_kvcache,
        flash_utils._pad_input,
        flash_utils._unpad_input,
    )


def _forget() -> None:
    # transformers keeps the last implementation it looked up: a later "paged_flash" must be looked up again, and fail
    if (flash_utils._loaded_implementation or "").split("|")[-1] == "paged_flash":
        flash_utils._loaded_implementation = None
        for name in [name for name in vars(flash_utils) if name.endswith("_fn")]:
            setattr(flash_utils, name, None)  # what was looked up, and what was derived from it


FLASH_FUNCTIONS = Patch(
    owner=lambda: flash_utils,
    name="_lazy_imports",
    parameters=("implementation", "attention_wrapper", "allow_all_kernels"),
    wrapper=_lazy_imports,
    reason='lets a model be loaded with attn_implementation="paged_flash"',
    checked=("5.17.0", "5.23.0"),
    after_undo=_forget,
)
