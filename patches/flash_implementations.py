"""Models that list the flash implementations they trust take "paged_flash" as well.

Why: gpt_oss and a few more name `_compatible_flash_implementations`, because flash-attn lacks what they need (sinks),
and replace any other name with "flash" in it by a hub kernel. paged_flash has what they need; there is
no list to add to.
"""

from transformers import PreTrainedModel

from hf_paged_flash.patches.base import Patch


def _check_and_adjust(original, self, attn_implementation, *args, **kwargs):
    if attn_implementation != "paged_flash" or getattr(self, "_compatible_flash_implementations", None) is None:
        return original(self, attn_implementation, *args, **kwargs)
    listed = self._compatible_flash_implementations
    had_own = "_compatible_flash_implementations" in vars(self)
    self._compatible_flash_implementations = [*listed, attn_implementation]
    try:
        return original(self, attn_implementation, *args, **kwargs)
    finally:
        if had_own:
            self._compatible_flash_implementations = listed
        else:
            del self._compatible_flash_implementations


FLASH_IMPLEMENTATIONS = Patch(
    owner=lambda: PreTrainedModel,
    name="_check_and_adjust_attn_implementation",
    parameters=("self", "attn_implementation", "is_init_check", "allow_all_kernels"),
    wrapper=_check_and_adjust,
    reason="keeps models with a list of trusted flash implementations from swapping paged_flash for a hub kernel",
    checked=("5.17.0", "5.23.0"),
)
