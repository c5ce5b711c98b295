"""Prompts of `generate()` that begin as earlier ones did, under a cache with `prefix_caching`.

Before the prefill its rows get the blocks that are known of their tokens; the packed prefill computes the rest, and
from then on their full blocks are known. At the end of a call so are those of what was generated.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..cache import PagedCache
from ..cache.forward_step import on_host
from ..cache.prompt_row import Media, PromptRow
from ..errors import ArgumentError
from .looking import Look, ModelChanged, ModuleState, confirm, glance_at, look_at, looking_once, names_of
from .media import PLACES, has_contents, media_of, without_media
from .optimizer_steps import steps_of
from .packable import NotPacked, of_rows, settings_in, why_not_these, why_padded
from .packed_rows import packed_draft

logger = logging.get_logger(__name__)
_enabled: weakref.WeakKeyDictionary[PreTrainedModel, PagedCache] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[PagedCache, Look] = weakref.WeakKeyDictionary()  # of calls that have just begun
# attributes of PEFT's layers behind what `_root_of` reads
_OF_ADAPTERS = frozenset({"_active_adapter", "_disable_adapters", "merged_adapters", "scaling"})


def enable_prefix_caching(
    model: PreTrainedModel, max_memory: int | str | None = None, block_size: int = 16
) -> PagedCache:
    """Makes each `generate()` call of `model` compute of its prompts only what no earlier call has.

    Opt-in, as the rest of a prompt is another batch shape than the whole, whose last bits can differ and turn a near
    tie. Use the model from one thread at a time then.

    Args:
        max_memory: bytes, or "4GiB", that blocks kept for later prompts take; None for an eighth of the device.
        block_size: tokens a block; prefixes are found in whole blocks.

    Returns:
        A cache whose `memory()` is of all these calls, and whose `reset()` forgets what they have computed.

    Raises:
        ArgumentError: `max_memory` or `block_size` is not as above.
        UnsupportedFeatureError: a model whose layers do not keep all keys (sliding windows, linear attention, ...).
    """
    model = _generating(model)
    kept = True if max_memory is None else max_memory
    cache = PagedCache(model.config.get_text_config(decoder=True), block_size, prefix_caching=kept)
    _enabled[model] = cache
    return cache


def disable_prefix_caching(model: PreTrainedModel) -> None:
    """Undoes `enable_prefix_caching`: what was kept is given back."""
    _enabled.pop(_generating(model), None)


def _generating(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose `generate()` runs: PEFT's wrapper calls that of the one inside."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(f"`model` must be a model of transformers, got {type(model).__name__}")
    return model


def enabled_cache(model: PreTrainedModel) -> PagedCache | None:
    """A cache without rows for a call of `model`, sharing what earlier calls kept; None where it is not enabled."""
    cache = _enabled.get(model)
    if cache is None:
        return None
    look, are_same = _glance_for(cache, model)
    with looking_once(look):
        if cache.prefixes.weights[0] and not are_same:  # of another device or dtype, perhaps
            kept = cache.group.store.kept_memory or True
            cache.__dict__.update(vars(PagedCache(cache.config, cache.group.block_size, prefix_caching=kept)))
        _begin_rows(cache, model, are_same)
    fork = cache.fork()
    _seen[fork] = look
    return fork


def begin_rows(cache: PagedCache, model: PreTrainedModel) -> None:
    """Drops the rows of `cache`, whose full blocks stay known, for those of a call of `model`.

    The model is glanced at, whoever takes the look from `seen_for` is to confirm it.
    """
    look, are_same = _glance_for(cache, model)
    _seen[cache] = look
    with looking_once(look):
        _begin_rows(cache, model, are_same)


def _glance_for(cache: PagedCache, model: PreTrainedModel) -> tuple[Look, bool]:
    """A look at `model`, and whether by it `cache` is of the model; a glance where it is."""
    for look_of in (glance_at, look_at):
        look = look_of(model)
        with looking_once(look):
            if _are_weights_of(model, cache):
                return look, True
    return look, False


def begin_anew(cache: object, model: PreTrainedModel) -> None:
    """Leaves nothing in `cache` of what `model` was thought to be, where no earlier call has filled it."""
    if not isinstance(cache, PagedCache):
        return
    if cache.prefixes is not None:
        begin_rows(cache, model)
    elif not cache.columns:
        cache.reset()  # its layers were made ready for another model's keys, perhaps


def seen_for(cache: object) -> tuple[Look, ...]:
    """The glance at the model whose call has begun the rows of `cache`, once."""
    look = _seen.pop(cache, None) if isinstance(cache, PagedCache) else None
    return () if look is None else (look,)


def _begin_rows(cache: PagedCache, model: PreTrainedModel, are_same: bool) -> None:
    if not are_same:  # another model's, or they were changed: their keys are others
        look = look_at(model)
        cache.prefixes.weights = look.tensors, _state_of(model, look)
        cache.reset()
    else:
        _drop_rows(cache)
    cache.prompts = None


def _drop_rows(cache: PagedCache) -> None:
    cache.groups.start_from([])
    cache.group.store.shrink()


def _are_weights_of(model: PreTrainedModel, cache: PagedCache) -> bool:
    """Whether `cache` is of this model, no weight or buffer was written to since, and nothing replaced or moved.

    And whether it computes in the same dtype.
    """
    (told, state), look = cache.prefixes.weights, look_at(model)
    are_same = told is look.tensors or (
        len(told) == len(look.tensors) and all(x() is y() for x, y in zip(told, look.tensors, strict=True))
    )
    return are_same and state == _state_of(model, look)


def _state_of(model: PreTrainedModel, look: Look) -> tuple:
    """Another one once a weight was written to, or anything changed but for what tells adapters apart."""
    device = model.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    weights = [weight() for weight in chain(look.tensors, look.of(_other_tensors))]
    try:
        versions = tuple(map(attrgetter("_version"), weights))
    except RuntimeError:  # there are inference tensors, which have none
        versions = tuple(None if x.is_inference() else x._version for x in weights)
    return look.of(_beside_adapters), versions, steps_of(weights), autocast


def _other_tensors(model: PreTrainedModel) -> list[weakref.ref]:
    """Tensors that modules hold as plain attributes."""
    kept = [module for module in model.modules() if not _computes_weights(module)]
    values = [vars(module)[name] for module in kept for name in names_of(module)]
    return [weakref.ref(value) for value in values if isinstance(value, torch.Tensor)]


def _computes_weights(module: torch.nn.Module) -> bool:
    """Whether it does so in each forward, from others: torch's pruning, weight norm and spectral norm."""
    return any(_library_of(hook) == "torch" for hook in module._forward_pre_hooks.values())


def _library_of(function: object) -> str:
    """Where it was written; what `functools.wraps` has copied says where another was."""
    function = getattr(function, "__func__", function)
    name = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return name.partition(".")[0]


def _beside_adapters(model: PreTrainedModel) -> tuple:
    """The fingerprint of a look at `model`, without what `_root_of` tells and what is new in each call."""
    look = look_at(model)
    settings, states, *others = look.fingerprint
    adapted = {id(layer()) for layer in look.of(_adapted)}
    computing = {id(module): vars(module) for module in model.modules() if _computes_weights(module)}

    def is_left_out(state: ModuleState, name: str, part: object) -> bool:
        if state.module == look.model_id and name != "forward":  # PEFT puts in its own in each call
            return isinstance(part, weakref.ref) and _library_of(part()) in ("peft", "transformers")
        if state.module in adapted and name in _OF_ADAPTERS:
            return True
        return state.module in computing and isinstance(computing[state.module].get(name), torch.Tensor)

    states = [
        state._replace(own=tuple([item for item in state.own if not is_left_out(state, *item)])) for state in states
    ]
    return settings, states, tuple(model._forward_pre_hooks), *others


def _root_of(model: PreTrainedModel) -> Hashable:
    """What else keys and values of a text depend on: the adapters that are on."""
    return tuple(
        (
            tuple(module.active_adapters),
            module.disable_adapters,
            tuple(getattr(module, "merged_adapters", ())),
            tuple(getattr(module, "scaling", {}).items()),
        )
        for module in (adapted() for adapted in look_at(model).of(_adapted))
    )


def _adapted(model: PreTrainedModel) -> list[weakref.ref]:
    """PEFT's layers; models have a method of that name."""
    return [weakref.ref(x) for x in model.modules() if isinstance(getattr(x, "active_adapters", None), list)]


def prefill(
    run: Callable[[dict], ModelOutput],
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: PagedCache,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> ModelOutput:
    """`run(model_kwargs)`, the packed prefill, of what is not known of the prompts; from then on it is.

    Raises:
        ArgumentError: a mask, or positions, of more columns than the prompts.
    """
    cache.prompts = None
    try:
        with looking_once(*seen_for(cache), confirmed=False):
            confirm(model)
    except ModelChanged:  # outside of a decode loop, which has confirmed it or will
        begin_rows(cache, model)
    if cache.columns or generation_config.is_assistant:
        return run(model_kwargs)  # a forward of the user's, or one round of an assistant, began these rows
    _check_whole(input_ids, model_kwargs)
    reason = "a model in training" if model.training else why_padded(model, cache, generation_config, model_kwargs)
    if reason is not None:
        logger.warning_once(f"prefixes of prompts to {type(model).__name__} are not looked up: {reason}")
        return run(model_kwargs)
    rows = _rows(input_ids, model_kwargs, model.config)
    if rows is None:
        return run(model_kwargs)
    try:
        with _known(model, cache, rows, model_kwargs, shares=generation_config.prefill_chunk_size is None) as tokens:
            return run(without_media(model_kwargs) if rows[0].holds_media(tokens) else model_kwargs)
    except NotPacked:
        return run(model_kwargs)


def first_forward(
    model: PreTrainedModel, cache: PagedCache, generation_config: GenerationConfig, /, **inputs
) -> ModelOutput:
    """`model(**inputs)`, a prompt and a draft of what follows it, of what is not known; from then on the prompt is.

    Assisted decoding has no prefill: this is its first forward, whose last `logits_to_keep` tokens are the draft and
    the one before it.
    """
    last = inputs.get("logits_to_keep")
    reason = "a model in training" if model.training else why_padded(model, cache, generation_config, inputs)
    if type(last) is not int or last < 1:
        reason = "a model that computes all logits"
    reason = reason or why_not_these(inputs, cache)
    if reason is not None:
        logger.warning_once(f"prefixes of prompts to {type(model).__name__} are not looked up: {reason}")
        return model(**inputs)
    of_columns = ("attention_mask", "position_ids", PLACES)
    columns = inputs["input_ids"].shape[1] - (last - 1)
    prompt = {name: value[..., :columns] for name, value in inputs.items() if name in of_columns and value is not None}
    rows = _rows(inputs["input_ids"][:, :columns], inputs | prompt, model.config)
    if rows is None:
        return model(**inputs)
    with _known(model, cache, rows, inputs, draft=last - 1) as tokens:
        inputs = without_media(inputs) if rows[0].holds_media(tokens) else inputs
        return packed_draft(model, inputs, cache, last)


@contextmanager
def _known(
    model: PreTrainedModel,
    cache: PagedCache,
    rows: list[PromptRow],
    inputs: dict,
    *,
    shares: bool = False,
    draft: int = 0,
) -> Iterator[int]:
    """Within it `cache` holds what is known of `rows`, as many tokens as it yields, and gets the rest and a `draft`.

    Afterwards all of the rows is known, to calls with the same `inputs` beside tensors.
    """
    prefixes, groups, root = cache.prefixes, cache.groups, (_root_of(model), settings_in(inputs))
    known = prefixes.start_rows(groups, root, rows, shares=shares)
    try:
        yield len(known) * groups[0].block_size
    except BaseException:
        groups.start_from([])  # after some chunks a row may hold more than their columns
        raise
    finally:
        groups.sharing = None
    groups.sync_lengths()
    if groups[0].manager.lengths.tolist() != [len(row) + draft for row in rows]:
        return  # there are others in front of them, as in prompt tuning
    prefixes.count(groups, rows, known)
    prefixes.add(groups, root, rows)
    cache.prompts = root, rows


def keep_answers(cache: PagedCache, result: torch.Tensor | ModelOutput, prompt: int) -> None:
    """Makes known what a call's rows (B, columns) go on with after the `prompt` columns of their prompts.

    A cache that nobody has after the call drops its rows.
    """
    is_plain = isinstance(result, torch.Tensor)
    sequences = result if is_plain else result.sequences
    if cache.prompts is None or len(sequences) != cache.batch_size:
        return
    root, prompts = cache.prompts
    prompts = [row for row in prompts for _ in range(len(sequences) // len(prompts))]  # sequences asked for of each
    cache.groups.sync_lengths()
    lengths, block_size = cache.group.manager.lengths.tolist(), cache.group.block_size
    if any(stored // block_size > len(row) // block_size for stored, row in zip(lengths, prompts, strict=True)):
        answers = sequences[:, prompt:].cpu().numpy()
        rows = [row.followed_by(answer) for row, answer in zip(prompts, answers, strict=True)]
        cache.prefixes.add(cache.groups, root, rows)
    if is_plain and not getattr(cache, "_is_user_defined", False):
        _drop_rows(cache)


def _check_whole(input_ids: torch.Tensor, model_kwargs: dict) -> None:
    told = [model_kwargs[name] for name in ("attention_mask", "position_ids") if model_kwargs.get(name) is not None]
    columns = told[0].shape[-1] if told else input_ids.shape[-1]
    if model_kwargs.get("inputs_embeds") is None and columns != input_ids.shape[-1]:
        raise ArgumentError(
            f"`input_ids` must have the {columns} columns of `attention_mask`, got {input_ids.shape[-1]}: with "
            "`prefix_caching` each generate() call begins new rows. Pass the whole conversation, not its new turn"
        )


def _rows(input_ids: torch.Tensor, model_kwargs: dict, config: PreTrainedConfig) -> list[PromptRow] | None:
    """The prompts; None where their keys and values depend on what is not compared."""
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if input_ids.dim() != 2 or (mask is not None and mask.shape != input_ids.shape):
        return None
    if of_rows(model_kwargs, len(input_ids)) is not None:
        return None
    ids = input_ids.cpu().numpy()
    media = None
    if has_contents(model_kwargs):
        media = media_of(ids[0], model_kwargs, config)
        if media is None:
            return None
    mask = np.ones(ids.shape, bool) if mask is None else on_host(mask).numpy()
    positions = [None] * len(ids)
    if position_ids is not None:  # (batch, columns) or, of several axes, (axes, batch, columns); of one row for all
        position_ids = position_ids.cpu().expand(*position_ids.shape[:-2], *ids.shape)
        positions = position_ids.reshape(-1, *ids.shape).permute(1, 2, 0).numpy()
    return [_row(*row, media) for row in zip(ids, positions, mask, strict=True)]


def _row(ids: np.ndarray, positions: np.ndarray | None, real: np.ndarray, media: Media | None) -> PromptRow:
    """The `real` tokens of a row."""
    if media is not None:
        media = Media(media.places[real], media.digest)
    return PromptRow.of(ids[real], None if positions is None else positions[real], media)
