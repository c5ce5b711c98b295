"""A decode step's forward, compiled: what torch.compile gets are the operators that one run of it called.

They are traced as they run, whatever Python code calls them: that of the cache and of its masks is beyond Dynamo. What
belongs to the cache, pools and `StepBuffers`, stays out of what is compiled: operators over it become `step_store` and
`step_decode`, which find it at run time. So one compiled forward serves tables of every width, and pools at every
address: nothing is compiled anew as rows grow.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import Library
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..cache import PagedCache
from ..cache.step_buffers import StepBuffers
from ..ops import library
from .capturable import NotCapturable
from .media import MOVED

# torch's own CUDA graphs are left out: ours are captured over what is compiled
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_GRAPHS_OPTION = "triton.cudagraphs"
_CALLS = {
    library.store_kv: ("k_cache", "v_cache", "slot_mapping"),
    library.paged_decode: ("k_cache", "v_cache", "cache_seqlens", "block_table"),
}

_under_way = threading.local()  # `calls`: what each `step_store` and `step_decode` stands for
_fragment = Library("hf_paged_flash", "FRAGMENT")
_fragment.define("step_store(Tensor k, Tensor v, int call) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_fragment.define(
    "step_decode(Tensor q, Tensor? s_aux, Tensor[] stored, int v_head_dim, int call) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class CompileSettings:
    """What torch.compile is called with, of which everything is hashable."""

    backend: str | Callable
    mode: str | None
    dynamic: bool | None
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(config) -> "CompileSettings":
        """Those of transformers' `CompileConfig`; its `fullgraph` is True in any case."""
        options = dict(config.options or {})
        if config.backend == "inductor" and options:
            options[_GRAPHS_OPTION] = False
        mode = None if options else _WITHOUT_GRAPHS.get(config.mode, config.mode)
        return CompileSettings(config.backend, mode, config.dynamic, tuple(options.items()))

    def compile(self, module: GraphModule) -> Callable:
        return torch.compile(
            module, fullgraph=True, dynamic=self.dynamic, backend=self.backend, mode=self.mode,
            options=dict(self.options) or None,
        )  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """An operator over the cache: its options, and the names of what it reads and writes there."""

    operator: Callable
    bound: dict[str, str]
    options: dict[str, Any]


class CompiledForward:
    """The forward of one kind of step, compiled when it runs for the first time.

    Args:
        inputs: tensors that differ from step to step, by name.
        run: the forward over `cache`, whose step is planned in `buffers`.
        rehearse: calls what it gets as in a capture: models look at less then, as they will in the graph to come.

    Raises:
        NotCapturable: it does more with its cache than store and attend.
    """

    def __init__(
        self,
        settings: CompileSettings,
        model: PreTrainedModel,
        cache: PagedCache,
        buffers: StepBuffers,
        inputs: dict[str, torch.Tensor],
        run: Callable[[], ModelOutput],
        rehearse: Callable[[Callable], Any],
    ) -> None:
        lasting = [*model.parameters(), *model.buffers()]
        self._lasting = list({id(tensor): tensor for tensor in lasting}.values())
        self._names = tuple(inputs)
        of_cache = _tensors_of(cache, buffers)

        def forward(*_) -> list[torch.Tensor]:
            result = run()
            self._outputs = type(result)
            self._fields = [name for name, value in result.items() if value is not cache and name != MOVED]
            self._cache_fields = [name for name, value in result.items() if value is cache]
            return [result[name] for name in self._fields]

        tensors = *self._lasting, *inputs.values(), *of_cache.values()
        traced = rehearse(lambda: make_fx(forward)(*tensors))
        first = len(self._lasting) + len(inputs)
        self._calls = _take_out(traced, dict(zip(_placeholders(traced)[first:], of_cache, strict=True)))
        self._compiled = settings.compile(traced)

    def over(self, cache: PagedCache, buffers: StepBuffers, inputs: dict[str, torch.Tensor]) -> partial[ModelOutput]:
        """The forward over the step in `buffers` and over `inputs`; it compiles at its first call."""
        of_cache = _tensors_of(cache, buffers)
        calls = [
            (call.operator, {name: of_cache[bound] for name, bound in call.bound.items()} | call.options)
            for call in self._calls
        ]
        return partial(self._run, cache, calls, [*self._lasting, *(inputs[name] for name in self._names)])

    def _run(self, cache: PagedCache, calls: list[tuple], tensors: list[torch.Tensor]) -> ModelOutput:
        _under_way.calls = calls
        try:
            results = self._compiled(*tensors)
        finally:
            del _under_way.calls
        values = {name: value for name, value in zip(self._fields, results, strict=False)}
        return self._outputs(**values | dict.fromkeys(self._cache_fields, cache))


def _tensors_of(cache: PagedCache, buffers: StepBuffers) -> dict[str, torch.Tensor]:
    """Pools and the step's tensors, by names that are the same for every cache of a model."""
    tensors = {"cache_seqlens": buffers.cache_seqlens}
    for index, group in enumerate(cache.groups):
        tensors[f"slot_mapping {index}"] = buffers.slot_mapping[index]
        tensors[f"block_table {index}"] = buffers.block_table[index]
        for layer, pool in enumerate(group.pools):
            tensors[f"keys {index} {layer}"], tensors[f"values {index} {layer}"] = pool.key, pool.value
    return tensors


def _placeholders(traced: GraphModule) -> list[Node]:
    return [node for node in traced.graph.nodes if node.op == "placeholder"]


def _take_out(traced: GraphModule, names: dict[Node, str]) -> list[_Call]:
    """Puts `step_store` and `step_decode` in the place of operators over the cache; `names` are its placeholders."""
    graph, calls = traced.graph, []
    stored: dict[str, Node] = {}  # by keys' name
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _CALLS:
            continue
        arguments = dict(zip((one.name for one in node.target._schema.arguments), node.args, strict=False))
        arguments |= node.kwargs
        bound = {name: names.get(arguments.pop(name)) for name in _CALLS[node.target]}
        if None in bound.values():
            raise NotCapturable(f"it calls `{node.target}` over something else than its cache")
        keys = bound["k_cache"]
        with graph.inserting_before(node):
            if node.target is library.store_kv:
                new = graph.call_function(step_store, (arguments.pop("k"), arguments.pop("v"), len(calls)))
                stored[keys] = new
            else:
                q, s_aux, v_head_dim = arguments.pop("q"), arguments.pop("s_aux", None), node.meta["val"][0].shape[-1]
                before = [stored[keys]] if keys in stored else []
                new = graph.call_function(step_decode, (q, s_aux, before, v_head_dim, len(calls)))
        calls.append(_Call(node.target, bound, arguments))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    # what is stored for a later step alone must be stored all the same
    unread = [node for node in stored.values() if not node.users]
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ([*output.args[0], *unread],)
    for placeholder, name in names.items():
        if placeholder.users:
            user = next(iter(placeholder.users))
            raise NotCapturable(f"`{user.target}` reads the {name.split()[0]} of its cache")
        graph.erase_node(placeholder)
    traced.recompile()
    return calls


def _step_store(k: torch.Tensor, v: torch.Tensor, call: int) -> torch.Tensor:
    """Stores k, v (B, S, Hkv, D | Dv); returns an empty tensor, for whoever must come after it."""
    store, bound = _under_way.calls[call]
    store(k, v, **bound)
    return k.new_empty(0)


def _step_decode(q, s_aux, stored: list[torch.Tensor], v_head_dim: int, call: int):
    """`paged_decode` of q (B, S, Hq, D) after `stored`; v_head_dim is Dv."""
    decode, bound = _under_way.calls[call]
    return decode(q, s_aux=s_aux, **bound)


def _step_decode_fake(q, s_aux, stored, v_head_dim, call):
    batch, q_length, heads, _ = q.shape
    lse = q.new_empty((batch, heads, q_length), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((batch, q_length, heads, v_head_dim)), lse


for _name, _implementation, _fake in (
    ("step_store", _step_store, lambda k, v, call: k.new_empty(0)),
    ("step_decode", _step_decode, _step_decode_fake),
):
    library.register(_fragment, _name, _implementation, _fake)
step_store = torch.ops.hf_paged_flash.step_store.default
step_decode = torch.ops.hf_paged_flash.step_decode.default
