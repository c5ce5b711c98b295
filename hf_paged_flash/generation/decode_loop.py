"""How the forwards of a decode loop reach the graphs of their model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from transformers import CompileConfig, GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.utils import ModelOutput, logging

from .. import backend
from ..cache import PagedCache
from ..cache.length_floor import LengthFloor
from ..cache.linear_states import states_of
from ..cache.prepared_forward import new_tokens
from ..errors import UnsupportedFeatureError
from ..ops.flash_attn import MAX_DECODE_QUERIES
from .capturable import NotCapturable, obstacle
from .compiled_forward import CompileSettings
from .decode_graph import PROMPT, STEP, DecodeGraphs, forget, graphs_of, paged_layers
from .fused_layers import fused_layers
from .looking import confirm, glance_at, look_at, looking_once
from .prefix_caching import first_forward, seen_for
from .short_prompt import last_columns, length_of

LISTENING = 8  # steps after which the host asks anew which rows have finished

logger = logging.get_logger(__name__)
_here = threading.local()  # `loop`: the outermost one of this thread, `innermost`: an assistant's, perhaps


class _InLoop:
    """A model as its decode loop sees it: all of it, but calling it asks the loop. Other threads see no difference."""

    def __init__(self, model: PreTrainedModel, call) -> None:
        vars(self).update(_model=model, _call=call)

    @property
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args, **inputs) -> ModelOutput:
        return self._call(*args, **inputs)


@contextmanager
def decode_loop(
    model: PreTrainedModel,
    cache: object,
    generation_config: GenerationConfig,
    stopping_criteria: StoppingCriteriaList,
    *,
    synced_gpus: bool = False,
    begins_with_prefill: bool = False,
    keeps_logits: bool = False,
    pads_finished_rows: bool = False,
    glances: bool = True,
) -> Iterator[tuple[PreTrainedModel, StoppingCriteriaList]]:
    """Within it a loop calls the model that it yields, with a token or a few more of each row at a time.

    Args:
        cache: what the loop passes to the model.
        stopping_criteria: of which the loop uses those that are yielded.
        begins_with_prefill: the first call is none of these.
        keeps_logits: the loop goes on using what a call returned after the next one.
        pads_finished_rows: where a criterion has an end of sequence, the loop does not look at what the model says of
            rows that one has stopped.
        glances: what may have changed of the model since the last call is looked at while a prompt's graph runs.

    Raises:
        ModelChanged: it `glances`, and the model has changed. Begin anew without: no token was chosen yet.
    """
    first, seen, outer = model, seen_for(cache), getattr(_here, "loop", None)
    if begins_with_prefill and isinstance(cache, PagedCache) and cache.prefixes is not None:
        first = partial(first_forward, model, cache, generation_config)
    graphs = graphs_of(model) if _is_paged(cache) else None
    reason = None if graphs is None else _hindrance(model, cache, generation_config, synced_gpus)
    if reason is not None and (backend.graphs() or generation_config.compile_config is not None):
        _tell(reason, generation_config)
    if not seen and graphs is not None and outer is None:  # an assistant's loop begins anew with each draft
        seen = (glance_at(model) if glances else look_at(model),)
    with looking_once(*seen, confirmed=not glances):
        if graphs is None or reason is not None:
            if not backend.graphs():
                forget(model)
            confirm(model)
            with fused_layers(model) if graphs is not None and outer is None else nullcontext():
                yield (model if first is model else _InLoop(model, _begin_with(first, model))), stopping_criteria
            return
        if begins_with_prefill or getattr(model._prefill, "__func__", None) is not GenerationMixin._prefill:
            confirm(model)  # nobody would before the first token
        graphs.lend_addresses(cache)
        loop = _Loop(model, cache, generation_config, graphs, keeps_logits, outer)
        call = _begin_with(partial(loop.run, first), loop.forward) if begins_with_prefill else loop.forward
        around = getattr(_here, "innermost", None)
        _here.loop, _here.innermost = outer or loop, loop
        if pads_finished_rows and not _is_returned(cache, generation_config):
            if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
                stopping_criteria = _Watched(stopping_criteria, loop.finished)
        try:
            yield _InLoop(model, call), stopping_criteria
        finally:
            _here.loop, _here.innermost = outer, around
            loop.close()


@contextmanager
def recording_as_before(cache: object) -> Iterator[None]:
    """Around a loop that raises: windows of `cache` keep no more of what they leave behind than they did.

    transformers has them record it for a while, and takes that back at the end of its loops.
    """
    groups = cache.groups if isinstance(cache, PagedCache) else ()
    before = [group.record_past for group in groups]
    try:
        yield
    except BaseException:
        for group, was in zip(groups, before, strict=True):
            group.record_past = was
        raise


def _begin_with(first: Callable, then: Callable) -> Callable:
    """What calls `first` once, and `then` from then on."""
    calls = chain([first], repeat(then))
    return lambda *args, **inputs: next(calls)(*args, **inputs)


def loop_of(model: PreTrainedModel, cache: object) -> "_Loop | None":
    """The loop in which `model` prefills `cache` in this thread, if its forwards may be replayed."""
    loop = getattr(_here, "innermost", None)
    return loop if loop is not None and loop.is_of(model, cache) else None


def prepare_model(model: PreTrainedModel, cache: object) -> None:
    """Before a prefill of `cache` that runs in Python, see `_Loop.prepare_model`; may raise ModelChanged."""
    if (loop := loop_of(model, cache)) is not None:
        loop.prepare_model()


def _is_paged(cache: object) -> bool:
    return isinstance(getattr(cache, "self_attention_cache", cache), PagedCache)


def _hindrance(
    model: PreTrainedModel, cache: object, generation_config: GenerationConfig, synced_gpus: bool
) -> str | None:
    if not backend.graphs():
        return "`hf_paged_flash.configure(graphs=False)` has switched them off"
    if not isinstance(cache, PagedCache):
        return "it is an encoder-decoder model"
    if generation_config.disable_compile:
        return "`disable_compile` is set"
    return "`synced_gpus` is set" if synced_gpus else None


def _is_returned(cache: PagedCache, generation_config: GenerationConfig) -> bool:
    """Whether anybody finds the cache after the loop, or what it made of rows that had finished."""
    given = getattr(cache, "_is_user_defined", False) or generation_config.is_assistant or cache.prefixes is not None
    return bool(given or generation_config.return_dict_in_generate)


class _Watched(StoppingCriteriaList):
    """Stopping criteria that tell which rows have finished."""

    def __init__(self, criteria: StoppingCriteriaList, finished: "_FinishedRows") -> None:
        super().__init__(criteria)
        self._finished = finished

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        is_done = super().__call__(input_ids, scores, **kwargs)
        self._finished.note(is_done)
        return is_done


class _FinishedRows:
    """Rows that some criterion has stopped, as far as the host has heard without waiting for the device."""

    def __init__(self) -> None:
        self._on_device: torch.Tensor | None = None
        self._heard = LengthFloor()
        self._emptied: np.ndarray | None = None
        self._steps = 0

    def note(self, is_done: torch.Tensor) -> None:
        if self._on_device is None:
            self._on_device = is_done.int()
            self._heard.restart(np.zeros(len(is_done), np.int64))
        else:
            self._on_device = self._on_device | is_done
        self._steps += 1
        if self._steps % LISTENING == 0:
            self._heard.refresh(self._on_device)

    def empty(self, cache: PagedCache) -> np.ndarray | None:
        """The rows, bool (batch,), once `cache` has given back what they hold; None for none."""
        if not self._heard.lengths.any():
            return None
        rows = self._heard.lengths > 0
        if self._emptied is None or (rows & ~self._emptied).any():
            cache.groups.empty_rows(rows)
            self._emptied = rows
        return rows


def _tell(reason: str, generation_config: GenerationConfig) -> None:
    """Says why decode steps run without graphs; raises where somebody asked by name for what needs them."""
    if generation_config.compile_config is None or generation_config.disable_compile:
        return _say(reason)
    raise UnsupportedFeatureError(
        "`compile_config` compiles decode steps that are captured as CUDA graphs, and those of this model are not, "
        f"because {reason}: leave `compile_config` out, or call the model with a StaticCache"
    )


def _say(reason: str) -> None:
    logger.warning_once(f"generate() runs the decode steps of this model without CUDA graphs, because {reason}")


def _settings_of(generation_config: GenerationConfig) -> CompileSettings | None:
    config = generation_config.compile_config
    if config is None and backend.compile_mode() is not None:
        config = CompileConfig(mode=backend.compile_mode())
    return None if config is None else CompileSettings.of(config)


class _Loop:
    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        generation_config: GenerationConfig,
        graphs: DecodeGraphs,
        keeps_logits: bool,
        outer: "_Loop | None",
    ) -> None:
        self._model, self._cache, self._config, self._graphs = model, cache, generation_config, graphs
        self._keeps_logits = keeps_logits
        self._settings = _settings_of(generation_config)
        self._is_open: bool | None = None  # None: not yet known
        self.finished = _FinishedRows()
        self._outer = outer
        self._assistants: set[DecodeGraphs] = set()  # whose models have been looked at
        self._fused, self._is_fused = ExitStack(), False  # around forwards that run in Python, once there is one

    def close(self) -> None:
        try:
            self._fused.close()
            if self._is_open:
                self._own_tensors()  # a graph's are written to by the next generate()
        finally:
            if self._is_open:
                self._graphs.lock.release()
        self._graphs.note(self._cache)

    def _own_tensors(self) -> None:
        self._cache.groups.own_tensors()
        for layer in paged_layers(self._cache):
            layer.own_tensors()

    def prepare_model(self) -> None:
        """Before a forward that runs in Python: confirms the model, and fuses its layers until the loop ends.

        Not those of an assistant, whose loop begins anew with each draft.
        """
        confirm(self._model)
        if self._outer is None and not self._is_fused:
            self._is_fused = True
            self._fused.enter_context(fused_layers(self._model))

    def run(self, forward: Callable, *args, **inputs) -> ModelOutput:
        """A forward in Python."""
        self.prepare_model()
        return forward(*args, **inputs)

    def forward(self, *args, **inputs) -> ModelOutput:
        if args or not self._takes(inputs):
            return self.run(self._model, *args, **inputs)
        outputs = reason = None
        try:
            finished = self.finished.empty(self._cache)
            outputs = self._graphs.forward(self._model, self._cache, inputs, finished, self._settings)
        except NotCapturable as error:
            reason = str(error)
        if outputs is None:  # here, where the error no longer keeps what the forward had computed
            _tell(reason, self._config)
            return self.run(self._model, **inputs)
        if (reason := self._refusal()) is not None:
            _tell(reason, self._config)
        if self._keeps_logits:
            outputs.logits = outputs.logits.clone()
        return outputs

    def _takes(self, inputs: dict[str, Any]) -> bool:
        ids = inputs.get("input_ids")
        is_step = isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[1] <= MAX_DECODE_QUERIES
        if not is_step or not self._cache.columns or ids.shape[0] != self._cache.batch_size:
            return False
        if not any(value is self._cache for value in inputs.values()):
            return False
        if not self._opens():
            return False
        reason = self._refusal()
        if reason is not None and self._config.compile_config is not None:
            _tell(reason, self._config)  # a call before was told, and may not have asked for it
        return reason is None

    def _refusal(self) -> str | None:
        """Why no step is captured, or compiled as it should be; None where none was refused."""
        refusals = self._graphs.refusals
        return refusals.get(STEP) or refusals.get(self._settings)

    def prefill(self, inputs: dict[str, Any], mask: torch.Tensor) -> ModelOutput | None:
        """The outputs of a short prompt, with logits (B, 1, V) of each row's last token; None where they are not here.

        Args:
            inputs: the model's, with the new columns of all rows.
            mask: bool (B, columns) on the host, all columns so far.

        Raises:
            CacheFullError: as `update()` of the cache.
        """
        tokens = new_tokens(self._cache.groups, mask)
        length = length_of(tokens.counts)
        # padding before the tokens would look further back than a window that keeps no more than they see
        if any(group.has_given_back for group in self._cache.groups):
            length = None
        if length is None or PROMPT in self._graphs.refusals or not self._opens():
            return None
        try:
            outputs = self._graphs.forward(
                self._model, self._cache, last_columns(inputs, tokens, self._cache.columns, length), packed=tokens
            )
        except NotCapturable as error:
            logger.debug(f"a prompt of {type(self._model).__name__} is not replayed, because {error}")
            return None
        self._own_tensors()
        outputs.logits = outputs.logits[:, -1:].clone()
        return outputs

    def is_of(self, model: PreTrainedModel, cache: object) -> bool:
        return self._model is model and self._cache is cache

    def _opens(self) -> bool:
        """Whether graphs are used: settled once, when the model is as it is in all forwards."""
        if self._is_open is None:
            self._open()
        return self._is_open

    def _open(self) -> None:
        is_known = self._outer is not None and self._graphs in self._outer._assistants
        reason = None if is_known else self._obstacle()
        if reason is None and not self._graphs.lock.acquire(blocking=False):
            if self._graphs.thread == threading.get_ident():
                reason = "a generate() that has not ended uses its graphs, as where a model is its own assistant"
            else:
                reason = "a generate() of another thread uses its graphs"
        self._is_open = reason is None
        if reason is not None:
            confirm(self._model)  # it may be a reason no more
            _tell(reason, self._config)
            return
        self._graphs.thread = threading.get_ident()
        if not is_known:
            self._graphs.meet(self._model)
            # an assistant's loop begins anew with each draft; one that is the model itself, cut short, changes
            if self._outer is not None and self._outer._model is not self._model:
                self._outer._assistants.add(self._graphs)

    def _obstacle(self) -> str | None:
        if states_of(self._cache.layers):
            return "layers with linear attention or a convolution keep a state elsewhere in each cache"
        return obstacle(self._model, self._config)
