"""The mask functions of transformers remember what they were made of.

Why: transformers describes a mask by a function composed of closures and hands our mask function the outermost one.
Whether it says "causal, in a window of 512, within these packed rows" is written nowhere else, and torch.compile can't
look into a closure. So the makers leave their arguments on what they return, as `function.made_of`.
"""

from transformers import masking_utils

from hf_paged_flash.patches.base import Patch

# {maker: its parameters}; the last came after 5.17
_MAKERS = {
    "and_masks": ("mask_functions",),
    "sliding_window_overlay": ("sliding_window",),
    "sliding_window_bidirectional_overlay": ("sliding_window",),
    "chunked_overlay": ("chunk_size", "left_padding"),
    "packed_sequence_mask_function": ("packed_sequence_mask",),
    "remap_positions_for_packed_sequence": ("mask_function", "position_ids"),
}


def _remember(name: str, parameters: tuple[str, ...]):
    def make(original, *args, **named):
        function = original(*args, **named)
        function.made_of = (name, (*args, *(named[x] for x in parameters if x in named)))
        return function

    return make


MASK_FUNCTIONS = tuple(
    Patch(
        owner=lambda: masking_utils,
        name=name,
        parameters=parameters,
        wrapper=_remember(name, parameters),
        reason="a mask function says what it masks, to eager code and to torch.compile",
        checked=("5.17.0", "5.23.0"),
    )
    for name, parameters in _MAKERS.items()
    if name != "remap_positions_for_packed_sequence" or hasattr(masking_utils, name)
)
