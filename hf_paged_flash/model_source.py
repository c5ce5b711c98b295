"""What a model's source says of it where no flag does: the classes of its file that it is built of."""

import functools
import inspect
import re
import sys

_TOP_LEVEL = re.compile(r"^(?:class (\w+)\b|(\w+) = ).*?(?=^[^\s)\]}]|\Z)", re.MULTILINE | re.DOTALL)


@functools.cache
def module_source(model_class: type) -> str:
    """The text of the file that defines `model_class`; "" where it was typed in at a prompt."""
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (KeyError, OSError, TypeError):
        return ""


@functools.cache
def parts(model_class: type) -> dict[str, str]:
    """{name: source} of the classes and constants of its file that `model_class` names, or that those name."""
    blocks = {block[1] or block[2]: block[0] for block in _TOP_LEVEL.finditer(module_source(model_class))}
    reached, open_ends = {}, [model_class.__name__]
    while open_ends:
        name = open_ends.pop()
        if name in blocks and name not in reached:
            reached[name] = blocks[name]
            open_ends.extend(re.findall(r"\w+", blocks[name]))
    return reached
