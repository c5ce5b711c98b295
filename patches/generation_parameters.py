"""`generate()` asks a model's config for options of generation without building the config's defaults anew.

Why: each call without a `generation_config` looks for options that somebody has set on the config, as older versions
took them from there. To leave out those that the class has by itself, transformers before 5.24 builds a config of the
class and a dict of that: a millisecond of the host before the first token, also where there is none to leave out.
"""

import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedConfig

from hf_paged_flash.patches.base import Patch

_COMMON = "use_cache"  # which most classes have, and the method leaves out itself


def _get_generation_parameters(original, self):
    names = GenerationConfig._get_default_generation_params()
    has_none = all(getattr(self, name, None) is None for name in names if name != _COMMON)
    return {} if has_none else original(self)


GENERATION_PARAMETERS = Patch(
    owner=lambda: PreTrainedConfig,
    name="_get_generation_parameters",
    parameters=("self",),
    wrapper=_get_generation_parameters,
    reason="no config is built where none of its options is of generation",
    checked=("5.17.0", "5.23.0"),
)
IS_NEEDED = Version(transformers.__version__) < Version("5.24.0")
