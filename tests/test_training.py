"""Training under "paged_flash": a step's loss and gradients equal eager's, in fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch

import hf_paged_flash
from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.ops import library
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

MODEL_TYPES = ("llama", "gemma2", "gpt_oss", "mistral", "gpt2")
LENGTHS = (9, 23, 16)
BIAS = 8  # among flash_forward's arguments


pytestmark = pytest.mark.usefixtures("reference_backend")


def model_of(model_type, attention, **changes):
    model = tiny_model(tiny_config(model_type, use_cache=False, **changes), attention)
    return model.train()


def no_dropout(model_type):
    return dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if model_type == "gpt2" else {}


def gradients(model, *batches, autocast=False):
    """The loss of the last batch and all gradients, summed over the batches."""
    model.zero_grad()
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual, expected, rtol=2e-5, atol=2e-6):
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=atol)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        error = float((actual[1][name] - gradient).abs().max())
        assert error <= atol + rtol * scale, f"{name}: {error} of {scale}"


def padded(side="right", seed=0):
    input_ids, attention_mask = ragged_batch(LENGTHS, side, seed=seed)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    # the first token of a row would be predicted from padding
    labels[:, 1:].masked_fill_(attention_mask[:, :-1] == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def packed(seed=0):
    input_ids, attention_mask = ragged_batch(LENGTHS, "right", seed=seed)
    tokens = input_ids[attention_mask.bool()][None]
    starts = torch.tensor([0, LENGTHS[0], sum(LENGTHS[:2])])
    labels = tokens.clone()
    labels[:, starts] = -100
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {"input_ids": tokens, "position_ids": position_ids, "labels": labels}


BATCHES = {"right": padded, "left": lambda: padded("left"), "packed": packed}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", BATCHES)
def test_a_step_equals_eager(model_type, kind):
    batch = BATCHES[kind]()
    if kind == "left" and model_type == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = gradients(model_of(model_type, "eager", **no_dropout(model_type)), batch)
    model = model_of(model_type, "paged_flash", **no_dropout(model_type))
    hf_paged_flash.reset_counters()
    assert_equal(gradients(model, batch), expected)
    counted = hf_paged_flash.counters().reference
    layers = model.config.num_hidden_layers
    assert (counted["flash_forward"], counted["flash_backward"]) == (layers, layers)


def test_packed_rows_train_as_the_rows_alone():
    model = model_of("llama", "paged_flash")
    assert_equal(gradients(model, with_offsets(packed())), gradients(model_of("llama", "eager"), packed()))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_gradient_checkpointing(model_type, use_cache, use_reentrant):
    expected = gradients(model_of(model_type, "eager"), padded())
    model = model_of(model_type, "paged_flash")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_equal(gradients(model, padded() | {"use_cache": use_cache}), expected)


def test_a_cache_left_on_does_not_change_a_step():
    expected = gradients(model_of("llama", "eager"), padded())
    assert_equal(gradients(model_of("llama", "paged_flash"), padded() | {"use_cache": True}), expected)


def test_gradient_accumulation():
    batches = padded(), padded("left", seed=1), packed(seed=2)
    expected = gradients(model_of("mistral", "eager"), *batches)
    assert_equal(gradients(model_of("mistral", "paged_flash"), *batches), expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_autocast_stays_within_eagers_own_error(model_type):
    exact = gradients(model_of(model_type, "eager"), padded())
    eager = gradients(model_of(model_type, "eager"), padded(), autocast=True)
    ours = gradients(model_of(model_type, "paged_flash"), padded(), autocast=True)
    for name, gradient in exact[1].items():
        error, budget = ((x[1][name] - gradient).norm() / gradient.norm() for x in (ours, eager))
        assert error <= 2 * budget + 1e-3, name


def test_low_rank_adapters_in_fp32_over_a_bf16_model():
    """PEFT's LoRA computes in fp32 on a bf16 model: q and v may arrive wider than k."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = torch.nn.Parameter(0.1 * torch.randn(4, base.in_features))
            self.b = torch.nn.Parameter(0.1 * torch.randn(base.out_features, 4))

        def forward(self, x):
            return self.base(x).float() + x.float() @ self.a.T @ self.b.T

    def adapted(attention):
        model = tiny_model(tiny_config("llama", use_cache=False), attention, dtype=torch.bfloat16)
        model.requires_grad_(False)
        torch.manual_seed(1)
        for layer in model.model.layers:
            layer.self_attn.q_proj, layer.self_attn.v_proj = (
                Adapted(x) for x in (layer.self_attn.q_proj, layer.self_attn.v_proj)
            )
        return model.train()

    model = adapted("paged_flash")
    loss, adapters = gradients(model, padded())
    assert torch.isfinite(loss) and len(adapters) == 4 * model.config.num_hidden_layers
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in adapters.values())


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_compiled_step_has_no_graph_break(kind, model_type):
    torch._dynamo.reset()
    batch = BATCHES[kind]()
    expected = gradients(model_of(model_type, "eager"), batch)
    model = model_of(model_type, "paged_flash")
    model = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, compiled = gradients(model, batch)
    assert_equal((loss, {name.removeprefix("_orig_mod."): x for name, x in compiled.items()}), expected)


def with_offsets(batch):
    """A packed batch as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes it."""
    starts = torch.nonzero(batch["position_ids"][0] == 0)[:, 0]
    offsets = torch.cat([starts, starts.new_tensor([batch["position_ids"].shape[1]])]).int()
    longest = int(offsets.diff().max())
    offsets = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    return batch | offsets | {"max_length_q": longest, "max_length_k": longest}


def test_compiled_packed_rows_of_other_lengths_do_not_compile_anew_each_time():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = model_of("llama", "paged_flash")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ((9, 23, 16), (5, 31, 8, 2), (40, 3), (6, 6, 6, 7)):
        tokens = torch.randint(2, 97, (1, sum(lengths)))
        batch = {"input_ids": tokens, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        for inputs in (batch, with_offsets(batch)):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    # each of the two kinds as it is, and with sizes that vary
    assert len(graphs) <= 4
    for graph in graphs:
        calls = [node for node in graph.graph.nodes if node.target is library.flash_forward]
        assert len(calls) == model.config.num_hidden_layers and all(call.args[BIAS] is None for call in calls)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_export(kind, strict):
    batch = {name: x for name, x in BATCHES[kind]().items() if name != "labels"}
    model = model_of("llama", "paged_flash").eval()
    exported = torch.export.export(model, (), batch, strict=strict)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    actual, expected = (run(**batch).logits[real] for run in (exported.module(), model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_found_once_a_forward(monkeypatch):
    calls, find = [], library.segment_offsets
    monkeypatch.setattr(library, "segment_offsets", lambda segments: calls.append(segments) or find(segments))
    gradients(model_of("llama", "paged_flash"), packed())
    assert len(calls) == 1


def test_dropout_trains_and_is_reproducible():
    model = model_of("llama", "paged_flash", attention_dropout=0.3)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(gradients(model, padded()))
    assert_equal(results[1], results[0], rtol=0, atol=0)
    assert results[2][0] != results[0][0]
    model.eval()
    assert model(**padded()).loss == model_of("llama", "paged_flash").eval()(**padded()).loss


def test_dropout_compiles_and_draws_anew_each_step():
    torch._dynamo.reset()
    model = torch.compile(model_of("llama", "paged_flash", attention_dropout=0.3), fullgraph=True, backend="aot_eager")
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(gradients(model, packed()))
    assert_equal(results[1], results[0], rtol=0, atol=0)
    assert results[2][0] != results[0][0]


def test_dropout_is_the_same_when_a_checkpoint_recomputes_it():
    model = model_of("llama", "paged_flash", attention_dropout=0.3)
    torch.manual_seed(0)
    expected = gradients(model, padded())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    assert_equal(gradients(model, padded()), expected)


def test_a_paged_cache_refuses_to_be_trained_through():
    model = model_of("llama", "paged_flash")
    cache = hf_paged_flash.PagedCache(model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(2, 12)[None], past_key_values=cache, use_cache=True)
    out = model(input_ids=torch.arange(2, 12)[None], past_key_values=cache, use_cache=True)
    with pytest.raises(UnsupportedFeatureError, match="cache"):
        out.logits.sum().backward()
