"""What a patch is: one function of transformers replaced, checked before and undone after."""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import transformers

from hf_paged_flash.errors import IncompatibleTransformersError


def cache_name(model_kwargs: dict) -> str:
    """The name of the cache among a model's arguments: transformers 5.24 made `past_key_values` `cache`."""
    return "cache" if "cache" in model_kwargs else "past_key_values"


@dataclass
class Patch:
    """Replaces `owner.name`.

    Attributes:
        owner: returns the class or module (a function, so that nothing is imported before it is needed).
        name: the function's name there.
        parameters: the parameters it was written for, in order; others mean another version, and an error.
        wrapper: called as `wrapper(original, *args, **kwargs)` in the function's place.
        reason: what the patch does and why no public interface serves.
        checked: versions of transformers it was run with.
        after_undo: puts back what the patched function left behind; None for nothing.
        module: the owner's name, for a module that is patched only once something else has imported it; until then
            `check()` and `apply()` do nothing.
    """

    owner: Callable[[], object]
    name: str
    parameters: tuple[str, ...]
    wrapper: Callable
    reason: str
    checked: tuple[str, ...]
    after_undo: Callable[[], None] | None = None
    module: str | None = None
    # the owner, and the original and its replacement as the owner holds them
    _patched: object = field(default=None, init=False, repr=False)
    _stored: object = field(default=None, init=False, repr=False)
    _installed: object = field(default=None, init=False, repr=False)

    @property
    def target(self) -> str:
        """What is replaced, as one would write it."""
        owner = self.owner()
        return f"{owner.__name__}.{self.name}"

    @property
    def applied(self) -> bool:
        return self._patched is not None

    @property
    def waits(self) -> bool:
        """Whether the module is yet to be imported."""
        return self.module is not None and self.module not in sys.modules

    def check(self) -> None:
        """Raises IncompatibleTransformersError unless the function is there with the parameters it should have."""
        if self.waits:
            return
        function = getattr(self.owner(), self.name, None)
        found = tuple(inspect.signature(function).parameters) if function is not None else None
        if found != self.parameters:
            got = "is not there" if found is None else f"takes {found}"
            raise IncompatibleTransformersError(
                f"transformers {transformers.__version__} does not fit this version of hf_paged_flash: {self.target} "
                f"should take {self.parameters}, but {got}. Checked with transformers {', '.join(self.checked)}: "
                "install one of these, or a newer hf_paged_flash"
            )

    def apply(self) -> None:
        """Puts the replacement in place; nothing if it is there already."""
        if self.waits:
            return
        owner = self.owner()
        if owner is self._patched:  # another one is a module that was imported again
            return
        self.check()
        stored = inspect.getattr_static(owner, self.name)
        original = stored.__func__ if isinstance(stored, classmethod) else getattr(owner, self.name)

        @functools.wraps(original)
        def replacement(*args, **kwargs):
            # somebody may have wrapped the replacement: once undone it only passes through
            function = functools.partial(self.wrapper, original) if self._installed is installed else original
            return function(*args, **kwargs)

        kind = type(stored) if isinstance(stored, (classmethod, staticmethod)) else None
        installed = replacement if kind is None else kind(replacement)
        setattr(owner, self.name, installed)
        self._patched, self._stored, self._installed = owner, stored, installed

    def undo(self) -> None:
        """Puts the original back; where somebody wrapped the replacement since, that stays and calls the original."""
        if not self.applied:
            return
        if inspect.getattr_static(self._patched, self.name) is self._installed:
            setattr(self._patched, self.name, self._stored)
        self._patched = self._stored = self._installed = None
        if self.after_undo is not None:
            self.after_undo()
