"""Decode steps of a model as CUDA graphs: the whole forward is captured once and replayed for every later token.

A graph belongs to a model, a batch size, a number of new tokens a row, and a width of the block tables: these grow by
powers of two, so that there are few. It reads the step from `StepBuffers` and its inputs from tensors of its own, and
knows the pools by their addresses. Pools that grow in place keep theirs, and the next cache of the model takes
them over: so a later call replays what an earlier one has captured. Pools of ordinary tensors move when they grow and
with each cache; their graphs are captured anew.

All graphs of a model share one memory pool. They run one after another, for one `generate()` at a time.
"""

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from threading import Lock
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..cache import PagedCache
from ..cache.kept_addresses import KeptAddresses
from ..cache.paged_layer import PagedLayer
from ..cache.prepared_forward import PackedTokens, static_forward
from ..cache.step_buffers import StepBuffers
from ..kernels.launches import overlapping_launches
from ..ops.layers import MOST_ROWS
from .capturable import NotCapturable, NoWaiting
from .compiled_forward import CompiledForward, CompileSettings
from .fused_layers import fused_layers
from .known_layers import captured_layers, own_layers
from .looking import Look, confirm, look_at
from .media import MOVED, of_tokens

MAX_GRAPHS = 64  # of a model; the least recently used goes first
MIN_WIDTH = 32  # blocks of the narrowest table

STEP, PROMPT = "step", "prompt"

Run = Callable[[], ModelOutput]


class CudaGraphs:
    """Captures what runs on one GPU; tests put a recorder in its place."""

    _one_at_a_time = Lock()  # torch captures on one stream

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: tuple | None = None  # of all its graphs

    def capture(self, run: Run) -> tuple[ModelOutput, Callable[[], None]]:
        """What `run` returned, still without values, and the replay that fills it."""
        with self._one_at_a_time:
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            outputs, graph = self._capture(run, self._memory)
        return outputs, graph.replay

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """What `run` returned in a capture of which nothing is kept."""
        with self._one_at_a_time:
            return self._capture(run, None)[0]  # memory of its own: that of others must not end with it

    def _capture(self, run: Callable[[], Any], memory: tuple | None) -> tuple[Any, torch.cuda.CUDAGraph]:
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # other threads may allocate memory meanwhile
                with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                    outputs = run()
            except BaseException:
                torch.cuda.set_stream(stream)  # where a capture can't be ended, torch leaves its own in place
                raise
        return outputs, graph


# by type of device; on others nothing is captured
CAPTURERS: dict[str, type] = {"cuda": CudaGraphs}


class _Graph:
    """One captured forward, or one that is about to be."""

    def __init__(self, buffers: StepBuffers, tensors: dict[str, torch.Tensor]) -> None:
        self.buffers = buffers
        self.tensors = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        self.replay: Callable[[], None] | None = None
        self._outputs: type[ModelOutput] | None = None
        self._fields: dict[str, torch.Tensor | None] = {}  # None: the cache

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def capture(self, capturer, run: Run, cache: PagedCache) -> None:
        outputs, replay = capturer.capture(run)
        self._fields = {name: None if value is cache else value for name, value in outputs.items() if name != MOVED}
        self._outputs, self.replay = type(outputs), replay

    def outputs(self, cache: PagedCache) -> ModelOutput:
        return self._outputs(**{name: cache if value is None else value for name, value in self._fields.items()})


def paged_layers(cache: PagedCache) -> Iterator[PagedLayer]:
    return (layer for layer in cache.layers if isinstance(layer, PagedLayer))


class _Like:
    """What the forwards of a model make of a new cache: shapes of its layers, and whether they keep to windows."""

    def __init__(self, cache: PagedCache) -> None:
        self._layers = {
            layer.layer_idx: [
                pool.new_empty((1, pool.shape[2], 0, pool.shape[3]), dtype=layer.dtype)
                for pool in (layer.pool.key, layer.pool.value)
            ]
            for layer in paged_layers(cache)
            if layer.is_initialized
        }
        self._keeps = [group.keeps_to_window for group in cache.groups]

    def prepare(self, cache: PagedCache) -> None:
        for layer in paged_layers(cache):
            if not layer.is_initialized and layer.layer_idx in self._layers:
                layer.lazy_initialization(*self._layers[layer.layer_idx])
                layer.group.layer_columns.setdefault(layer.layer_idx, 0)  # one that was loaded holds some
        for group, keeps in zip(cache.groups, self._keeps, strict=True):
            group.keeps_to_window = group.keeps_to_window or keeps


class DecodeGraphs:
    """The graphs of one model.

    Attributes:
        addresses: by layer, those that the pools of caches have had.
        lock: held by the `generate()` that uses them.
        thread: of who holds, or held, the lock.
        refusals: why no forward of a kind is captured any more, until the model changes; kinds are `STEP`, of a token
            or a few a row, `PROMPT`, and settings, for steps that could not be compiled so.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.addresses: dict[int, KeptAddresses] = defaultdict(KeptAddresses)
        self.lock, self.thread = Lock(), 0
        self._look: Look | None = None
        self._widths: dict[tuple, tuple[int, ...]] = {}  # by kind of forward, of the last graph that was used
        self._like: _Like | None = None  # the caches of the model
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._capturer = CAPTURERS[self.device.type](self.device)
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._last: _Graph | None = None
        self._warm: set[tuple] = set()  # forwards that have run, whose kernels are compiled
        self._compiled: dict[tuple, CompiledForward] = {}  # by kind of forward
        self.refusals: dict[str | CompileSettings, str] = {}
        self._no_room: dict[tuple, str] = {}  # by kind of forward, within one generate(): the next may find room

    def lend_addresses(self, cache: PagedCache) -> None:
        """Lets the pools of `cache` lie where those of the model's last cache lay, if it has none yet."""
        for group in cache.groups:
            group.pools.addresses = self.addresses

    def meet(self, model: PreTrainedModel) -> None:
        """Forgets what was captured if the model is not what it was."""
        look, seen = look_at(model), self._look
        if look is not seen and (seen is None or look.fingerprint != seen.fingerprint):
            self._begin_anew()
            self._like = self._like if seen is None else None
        self._look = look
        self._widths.clear()
        self._no_room.clear()

    def forward(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        inputs: dict[str, Any],
        finished: np.ndarray | None = None,
        settings: CompileSettings | None = None,
        packed: PackedTokens | None = None,
    ) -> ModelOutput:
        """The outputs of `model(**inputs)`: those of a replay last until the next one.

        Nobody looks at those of rows `finished`, bool (batch,), and nothing is stored for them. The first forward of
        its kind is run as it is, and is the warm-up; the next one is captured, compiled where there are `settings`.
        `packed`: the tokens of a prompt, which `inputs` hold as the last ones of rows that begin with anything.

        Raises:
            NotCapturable: the forward has not run, nothing has changed.
            ModelChanged: see `confirm`.
            CacheFullError: as `update()` of the cache.
        """
        inputs = of_tokens(inputs)
        tensors, constants = _sorted_out(inputs, cache)
        batch, q_length = inputs["input_ids"].shape
        if packed is not None:
            self._prepare(cache)
        kind = packed is None, batch, q_length, *((name, x.shape, x.dtype) for name, x in tensors.items())
        kind = *kind, *constants.items(), *((group.block_size, group.pools.dtypes) for group in cache.groups), settings
        if kind in self._no_room:
            raise NotCapturable(self._no_room[kind])
        graph: _Graph | None = None

        def buffers() -> StepBuffers:
            nonlocal graph
            graph = self._graph(kind, cache, tensors)
            return graph.buffers

        with static_forward(cache.groups, q_length, buffers, finished, packed) as step:
            graph.load(tensors)
            if graph.replay is None:
                confirm(model)
                fixed = inputs | graph.tensors
                if kind not in self._warm:
                    return self._first(kind, settings, model, cache, fixed)
                if "attention_mask" in inputs:
                    fixed["attention_mask"] = None  # it grows
                self._capture(graph, cache, kind, settings, model, fixed)
            step.skip_layers()
            graph.replay()
            self._last = graph
            confirm(model)  # otherwise the step is taken back
        return graph.outputs(cache)

    def replay_again(self) -> bool:
        """Replays the last forward over what it read and wrote, whose cache must still be there; for measurements.

        False where nothing has been replayed.
        """
        if self._last is not None:
            self._last.replay()
        return self._last is not None

    def note(self, cache: PagedCache) -> None:
        """Takes in what caches of the model are like, from one that was filled and may be empty again."""
        if torch.is_autocast_enabled(self.device.type):
            return  # they are like this one within autocast alone
        if self._like is None and any(layer.is_initialized for layer in paged_layers(cache)):
            self._like = _Like(cache)

    def _prepare(self, cache: PagedCache) -> None:
        """Makes a new cache ready for a replay, in which no Python code of its layers runs."""
        if not all(layer.is_initialized for layer in paged_layers(cache)):
            if self._like is None:
                raise NotCapturable("no cache of the model was seen before")
            self._like.prepare(cache)

    @overlapping_launches()
    def _first(
        self,
        kind: tuple,
        settings: CompileSettings | None,
        model: PreTrainedModel,
        cache: PagedCache,
        inputs: dict[str, Any],
    ) -> ModelOutput:
        """The outputs of a forward that runs in Python: it compiles kernels, and shows what a replay would miss."""
        if inputs.get("attention_mask") is None and "attention_mask" in signature(model.forward).parameters:
            # some models look for padding where there is no mask, to warn, though not in a capture
            ones = torch.ones(kind[1], cache.columns, dtype=torch.long, device=self.device)
            inputs = inputs | {"attention_mask": ones}
        with self._refusing(kind, _name_of(kind)), NoWaiting(), _layers_of(model, kind, settings):
            outputs = model(**inputs)
        others = [name for name, value in outputs.items() if value is not cache and name not in ("logits", MOVED)]
        reason = None
        if others:
            reason = f"it returns `{others[0]}`"
        elif not cache.groups.prepared.is_complete:
            reason = "not all layers take part in each of its forwards"
        elif Look(model).fingerprint != self._look.fingerprint:
            reason = "its forward leaves something behind in its modules"
        if reason is not None:
            self.refusals[_name_of(kind)] = reason
        self._warm.add(kind)
        return outputs

    @overlapping_launches()
    def _capture(
        self,
        graph: _Graph,
        cache: PagedCache,
        kind: tuple,
        settings: CompileSettings | None,
        model: PreTrainedModel,
        inputs: dict[str, Any],
    ) -> None:
        def run() -> ModelOutput:
            with _layers_of(model, kind, settings):
                return model(**inputs)

        with self._refusing(kind, settings or _name_of(kind)), torch.inference_mode(False), torch.no_grad():
            if settings is not None:
                if kind not in self._compiled:
                    self._compiled[kind] = CompiledForward(
                        settings, model, cache, graph.buffers, graph.tensors, run, self._capturer.rehearse
                    )
                run = self._compiled[kind].over(cache, graph.buffers, graph.tensors)
                run()  # what is compiled at its first call, and tuned, is not captured
            graph.capture(self._capturer, run, cache)

    @contextmanager
    def _refusing(self, kind: tuple, name: str | CompileSettings) -> Iterator[None]:
        """What goes wrong in a forward made for capturing is no error: the model runs as it is from then on.

        For want of memory until the end of this `generate()`, in forwards of this kind.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = self._no_room[kind] = f"of {type(error).__name__}: {error}"
            raise NotCapturable(reason) from error
        except Exception as error:
            known = isinstance(error, NotCapturable)
            reason = self.refusals[name] = str(error) if known else f"of {type(error).__name__}: {error}"
            raise NotCapturable(reason) from error

    def _graph(self, kind: tuple, cache: PagedCache, tensors: dict[str, torch.Tensor]) -> _Graph:
        """The graph for a step that has its blocks: one that is there, or a new one to capture."""
        groups = cache.groups
        widths = tuple(_bucket(int(group.manager.row_blocks().max(initial=1))) for group in groups)
        # once the longest rows have ended, their graph serves the others
        widths = self._widths[kind] = tuple(map(max, widths, self._widths.get(kind, widths)))
        key = *kind, widths, *(group.pools.addresses_in_use() for group in groups)
        graph = self._graphs.get(key)
        if graph is None:
            if not all(group.pools.is_elastic for group in groups):  # they have moved, and will not come back
                for other in [other for other in self._graphs if other[: len(kind)] == kind]:
                    del self._graphs[other]
            with torch.inference_mode(False):
                buffers = StepBuffers(*kind[1:3], widths, self.device)
                graph = _Graph(buffers, tensors)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph


@contextmanager
def _layers_of(model: PreTrainedModel, kind: tuple, settings: CompileSettings | None) -> Iterator[None]:
    # inductor fuses what is compiled, but its kernels don't start while ours, linear ones, end
    keeps_ours = settings is None or kind[1] * kind[2] <= MOST_ROWS
    with nullcontext() if keeps_ours else own_layers(), fused_layers(model), captured_layers():
        yield


def _name_of(kind: tuple) -> str:
    return STEP if kind[0] else PROMPT


def _bucket(blocks: int) -> int:
    return max(MIN_WIDTH, 1 << (blocks - 1).bit_length())


def _sorted_out(inputs: dict[str, Any], cache: PagedCache) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, whose values differ from step to step, and constants. No mask: new tokens are all real."""
    tensors, constants = {}, {}
    q_length = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        if value is cache:
            continue
        if name == "attention_mask":
            if value is not None and (not isinstance(value, torch.Tensor) or value.dim() != 2):
                raise NotCapturable("its attention mask is no 2-D tensor")
        elif isinstance(value, torch.Tensor):
            if not value.dim() or value.shape[-1] != q_length or value.device != inputs["input_ids"].device:
                raise NotCapturable(f"it gets `{name}` of shape {tuple(value.shape)} for {q_length} new tokens")
            tensors[name] = value
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants[name] = value
        else:
            raise NotCapturable(f"it gets `{name}`, a {type(value).__name__}")
    return tensors, constants


_of_models: "weakref.WeakKeyDictionary[PreTrainedModel, DecodeGraphs]" = weakref.WeakKeyDictionary()
_lock = Lock()


def may_capture(model: PreTrainedModel) -> bool:
    """Whether anything can be captured on the device of `model`."""
    return model.device.type in CAPTURERS


def graphs_of(model: PreTrainedModel) -> DecodeGraphs | None:
    """The graphs of `model`, which live as long as it does; None where nothing can be captured."""
    device = model.device
    if not may_capture(model):
        return None
    with _lock:
        graphs = _of_models.get(model)
        if graphs is None or graphs.device != device:
            graphs = _of_models[model] = DecodeGraphs(device)
        return graphs


def forget(model: PreTrainedModel) -> None:
    """Gives back what the graphs of `model` hold, once no `generate()` uses them."""
    with _lock:
        _of_models.pop(model, None)
