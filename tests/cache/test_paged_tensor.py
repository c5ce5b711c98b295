"""PagedTensor: a handle that answers as the dense tensor would, becomes it when asked, and is never silently wrong."""

import copy
import operator
import pickle

import pytest
import torch

from hf_paged_flash import PagedCache, UnsupportedFeatureError, counters, reset_counters
from hf_paged_flash.cache import PagedTensor, paged_tensor
from tests.tiny_models import tiny_config

BATCH, HEADS, COLUMNS, DIM = 2, 2, 21, 16


@pytest.fixture
def filled():
    """(cache, keys, values): two layers that hold `keys[i]`, `values[i]`, dense (B, Hkv, L, D), in two forwards."""
    reset_counters()
    cache = PagedCache(tiny_config("llama", num_hidden_layers=2))
    keys, values = (torch.randn(2, BATCH, HEADS, COLUMNS, DIM) for _ in range(2))
    for columns in (slice(0, 17), slice(17, COLUMNS)):
        for layer in range(2):
            cache.update(keys[layer, :, :, columns], values[layer, :, :, columns], layer)
    yield cache, keys, values
    reset_counters()


@pytest.fixture
def handle(filled):
    return filled[0].layers[0].keys


def test_metadata_is_the_dense_tensors_and_costs_nothing(filled, handle):
    dense = filled[1][0]
    assert isinstance(handle, torch.Tensor)
    assert type(handle.shape) is torch.Size
    assert handle.shape == handle.size() == dense.shape
    assert (handle.size(-2), handle.size(dim=1), handle.shape[2]) == (COLUMNS, HEADS, COLUMNS)
    assert handle.dim() == handle.ndim == 4
    assert handle.numel() == torch.numel(handle) == dense.numel()
    assert len(handle) == BATCH
    assert (handle.dtype, handle.device, handle.layout) == (dense.dtype, dense.device, dense.layout)
    assert handle.is_floating_point() and torch.is_floating_point(handle) and not handle.is_complex()
    assert (handle.is_cuda, handle.is_cpu, handle.is_meta) == (False, True, False)
    assert (handle.requires_grad, handle.is_leaf, handle.grad_fn) == (False, True, None)
    assert handle.element_size() == 4
    assert repr(handle) == "PagedTensor(key, size=(2, 2, 21, 16), dtype=torch.float32, device='cpu')"
    assert counters().dense_gather_total == 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.contiguous(),
        lambda x: x.detach(),
        lambda x: torch.detach(x),
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.float32),
        lambda x: x.to(torch.device("cpu"), torch.float32, non_blocking=True),
        lambda x: x.to(torch.zeros(1)),
    ],
)
def test_what_changes_nothing_returns_the_handle(handle, operation):
    assert operation(handle) is handle
    assert counters().dense_gather_total == 0


OPERATIONS = {
    "float16": lambda x: x.to(torch.float16),
    "double": lambda x: x.double(),
    "float": lambda x: x.float(),
    "to-copy": lambda x: x.to(torch.float32, copy=True),
    "clone": lambda x: x.clone(),
    "slice": lambda x: x[:, :, 3:9],
    "index": lambda x: x[1],
    "mask": lambda x: x[x > 0],
    "cat": lambda x: torch.cat([x, torch.ones(BATCH, HEADS, 1, DIM)], dim=2),
    "cat-itself": lambda x: torch.cat((x, x)),
    "stack-nested": lambda x: torch.stack([x, x + 1]),
    "matmul": lambda x: torch.ones(BATCH, HEADS, 3, DIM) @ x.transpose(2, 3),
    "radd": lambda x: 1 + x,
    "mul-out-of-place": lambda x: torch.ones(BATCH, HEADS, COLUMNS, DIM).mul_(x),
    "view": lambda x: x.view(BATCH * HEADS, COLUMNS, DIM),
    "contiguous-view": lambda x: x.contiguous().view(BATCH * HEADS, -1),
    "reshape": lambda x: x.reshape(-1),
    "permute": lambda x: x.permute(2, 0, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "expand": lambda x: x[:, :, None].expand(BATCH, HEADS, 2, COLUMNS, DIM),
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "einsum": lambda x: torch.einsum("bhld,bhmd->bhlm", x, x),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(4, DIM)),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "split": lambda x: torch.cat([part * 2 for part in x.split(8, dim=-1)]),
    "unbind": lambda x: torch.cat(x.unbind(0)),
    "iterate": lambda x: torch.cat(list(x)),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "sum": lambda x: x.sum(),
    "T": lambda x: x.mT,
    "stride": lambda x: torch.tensor(x.stride()),
    "is_contiguous": lambda x: torch.tensor(x.is_contiguous()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "copied-from": lambda x: torch.zeros(BATCH, HEADS, COLUMNS, DIM).copy_(x),
    "assigned-from": lambda x: torch.zeros(2, BATCH, HEADS, COLUMNS, DIM).index_put((torch.tensor([1]),), x),
    "isnan": lambda x: x.isnan(),
    "data": lambda x: x.data,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_any_other_operation_finds_the_dense_tensor(filled, handle, operation):
    result, expected = operation(handle), operation(filled[1][0].clone())
    assert not isinstance(result, PagedTensor)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert result.stride() == expected.stride()
    assert counters().dense_gather_total >= 1


def test_keys_and_values_of_every_layer_are_their_own(filled):
    cache, keys, values = filled
    for index, layer in enumerate(cache.layers):
        assert (layer.keys.kind, layer.values.kind) == ("key", "value")
        assert layer.keys.layer is layer.values.layer is layer
        assert torch.equal(layer.keys.clone(), keys[index])
        assert torch.equal(layer.values.clone(), values[index])
    mixed = torch.cat([cache.layers[0].keys, cache.layers[1].values])
    assert torch.equal(mixed, torch.cat([keys[0], values[1]]))


def test_update_hands_over_the_new_keys_only_where_they_are_all(filled):
    cache = PagedCache(tiny_config("llama"))
    key, value = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    handles = cache.update(key, value, 0)
    assert handles[0].fresh is key and handles[1].fresh is value
    handles = cache.update(key, value, 0)
    assert handles[0].fresh is None and handles[1].fresh is None
    assert handles[0].shape == (1, 2, 10, 16)
    assert torch.equal(handles[1].clone(), torch.cat([value, value], 2))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.zero_(),
        lambda x: x.copy_(torch.zeros(())),
        lambda x: x.masked_fill_(torch.ones(1, dtype=torch.bool), 0),
        lambda x: torch.Tensor.add_(x, 1),
        lambda x: torch.nn.init.zeros_(x),
        lambda x: torch.nn.functional.relu_(x),
        lambda x: torch.add(torch.zeros(1), 1, out=x),
        lambda x: x.__setitem__((0, 0), 0.0),
        lambda x: x.__iadd__(1),
        lambda x: x.requires_grad_(),
        lambda x: setattr(x, "data", torch.zeros(1)),
    ],
)
def test_writing_in_place_is_refused_and_changes_nothing(filled, handle, write):
    with pytest.raises(UnsupportedFeatureError, match=r"would write to paged keys in place.*`.clone\(\)`"):
        write(handle)
    assert torch.equal(handle.clone(), filled[1][0])


@pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"])
def test_augmented_assignment_is_refused(filled, handle, name):
    with pytest.raises(UnsupportedFeatureError, match="would write to paged keys in place"):
        getattr(operator, name)(handle, 2)
    assert torch.equal(handle.clone(), filled[1][0])


def test_data_ptr_raises(handle):
    with pytest.raises(RuntimeError, match="no single `data_ptr`"):
        handle.data_ptr()


def test_what_slips_past_is_nan(handle):
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.isnan(handle + 0).all()
        assert handle.untyped_storage().nbytes() == 4
    assert torch.isnan(torch._C._nn.gelu(handle.as_subclass(torch.Tensor))).all()


def test_gathers_are_counted_by_operation_and_logged_once(filled, monkeypatch):
    messages = []
    monkeypatch.setattr(paged_tensor.logger, "warning", lambda message, *args: messages.append(message))
    paged_tensor.logger.warning_once.cache_clear()
    key, value = filled[0].layers[0].keys, filled[0].layers[0].values
    for _ in range(3):
        key.cumsum(2)
    value.cumsum(2)
    torch.maximum(key, value)
    assert counters().dense_gather == {"cumsum": 4, "maximum": 2}
    assert [message.split(":")[0] for message in messages] == [
        "paged keys were gathered into a dense tensor for `cumsum`",
        "paged values were gathered into a dense tensor for `cumsum`",
        "paged keys were gathered into a dense tensor for `maximum`",
        "paged values were gathered into a dense tensor for `maximum`",
    ]


def test_a_handle_named_twice_is_gathered_once(handle):
    torch.cat([handle, handle])
    assert counters().dense_gather == {"cat": 1}


def test_padded_columns_read_as_zero():
    cache = PagedCache(tiny_config("llama"))
    cache.get_mask_sizes(4, 0)
    cache.groups[0].pending_mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    key = torch.randn(2, 2, 4, 16)
    dense = cache.update(key, key, 0)[0].clone()
    expected = key.clone()
    expected[0, :, [0, 3]] = 0
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_plain_dense_tensors(filled, handle, make):
    copied = make(handle)
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, filled[1][0])
    copied.zero_()
    assert torch.equal(handle.clone(), filled[1][0])


def test_saved_and_loaded(filled, handle, tmp_path):
    torch.save(handle, tmp_path / "keys.pt")
    assert torch.equal(torch.load(tmp_path / "keys.pt"), filled[1][0])


def test_an_older_handle_reads_the_columns_it_was_made_for(filled):
    cache, keys, _ = filled
    old = cache.layers[0].keys
    more = torch.randn(BATCH, HEADS, 30, DIM)
    for layer in range(2):
        cache.update(more, more, layer)
    assert torch.equal(old.clone(), keys[0])
    assert torch.equal(cache.layers[0].keys.clone(), torch.cat([keys[0], more], 2))


def test_handles_before_anything_is_stored():
    layer = PagedCache(tiny_config("llama")).layers[0]
    assert layer.keys is None and layer.values is None
    assert (layer.get_seq_length(), layer.get_max_length()) == (0, -1)


def test_keys_upcast_alone_are_stored_in_the_smaller_dtype():
    cache = PagedCache(tiny_config("llama"))
    key, value = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    handles = cache.update(key, value, 0)
    assert handles[0].dtype == handles[1].dtype == torch.bfloat16
    assert torch.equal(handles[0].clone(), key.bfloat16())
