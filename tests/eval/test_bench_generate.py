"""The benchmark of generate() on a CPU, where it shows that it works and no time is meant."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

from hf_paged_flash import ArgumentError, PagedCache, PagedFlashError
from hf_paged_flash.eval.bench import first_token, generate, generate_calls, step_bounds
from hf_paged_flash.eval.bench.generate_calls import Measured, difference
from hf_paged_flash.eval.bench.generate_cases import case_of, load

CPU = torch.device("cpu")


def run(*arguments):
    options = ["--device", "cpu", "--models", "tiny", "--new", "6", *map(str, arguments)]
    result = CliRunner().invoke(generate.app, options)
    return result, json.loads(result.stdout.strip().splitlines()[-1])


def recorded(folder):
    return [json.loads(line) for line in (folder / "generate.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", CPU)


def test_batches(tmp_path):
    result, summary = run("--cases", "2x16,ragged:3x20", "--static-cases", "2x16", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [row for row in recorded(tmp_path) if row["impl"] != "copy"]
    assert not summary["wrong"] and len(summary["rows"]) == len(rows) + 1
    dense = {"model": "llama-tiny", "b": 2, "prompt": 16, "new": 6, "compile": None}
    ragged = dense | {"b": 3, "prompt": "ragged", "tokens": 41}
    assert [row["case"] for row in rows if row["metric"] == "decode_ms"] == [dense] * 3 + [ragged] * 2
    values = {(row["case"]["prompt"], row["impl"], row["metric"]): row["value"] for row in rows}
    assert {impl for _, impl, _ in values} == set(generate_calls.IMPLEMENTATIONS)
    metrics = {"prefill_ms", "decode_ms", "tok_s", "read_ms"}
    assert {metric for prompt, _, metric in values if prompt == 16} == metrics | {"replay_ms"}
    assert {metric for prompt, _, metric in values if prompt == "ragged"} == metrics
    # a step reads the weights but for the embeddings, and 64 bytes a layer of K and of V for each token
    weights = 2 * (2 * (4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 64 + 2 * 64) + 64 + 64 * 128)
    copied = next(row["value"] for row in recorded(tmp_path) if row["impl"] == "copy")
    for prompt, tokens in ((16, 2 * (16 + 3)), ("ragged", 41 + 3 * 3)):
        expected = (weights + tokens * 2 * 2 * 64) / copied / 1e6
        assert values[prompt, "paged_flash", "read_ms"] == pytest.approx(expected)


def test_other_logits_are_exit_status_1_and_no_row_of_that_batch(tmp_path, monkeypatch):
    measure = generate_calls.measure

    def wrong(model, impl, mode, case):
        found = measure(model, impl, mode, case)
        if impl == "paged_flash" and len(case.lengths) == 1:
            found.logits[1, 0] *= 1.5
        return found

    monkeypatch.setattr(generate, "measure", wrong)
    result, summary = run("--cases", "1x9,2x9", "--implementations", "paged_flash,dynamic_sdpa", "--out", tmp_path)
    assert result.exit_code == 1 and [row["b"] for row in summary["wrong"]] == [1]
    assert {row["case"]["b"] for row in recorded(tmp_path)} == {2}


def test_out_of_memory_is_a_row_and_a_failure_of_a_peer_is_none(tmp_path, monkeypatch):
    errors = {"paged_flash": torch.OutOfMemoryError("CUDA out of memory"), "dynamic_sdpa": ValueError("no such thing")}
    original = generate_calls._measure

    def fail(model, impl, *arguments):
        if impl in errors:
            raise errors[impl]
        original(model, impl, *arguments)

    monkeypatch.setattr(generate_calls, "_measure", fail)
    result, _ = run("--cases", "1x9", "--static-cases", "1x9", "--out", tmp_path)
    shown = " ".join(result.stdout.replace("│", " ").split())  # cells are wrapped
    assert result.exit_code == 0 and "out of memory" in shown and "no such thing" in shown
    rows = [row for row in recorded(tmp_path) if row["impl"] != "static_compile"]
    assert [(row["impl"], row["metric"]) for row in rows] == [("copy", "gbps"), ("paged_flash", "out_of_memory")]
    errors["paged_flash"] = ValueError("ours")
    assert isinstance(CliRunner().invoke(generate.app, ["--device", "cpu", "--models", "tiny", "--cases", "1x9",
                                                        "--new", "4"]).exception, ValueError)  # fmt: skip


def test_difference_is_of_steps_that_both_reached_alike():
    logits = torch.ones(3, 2, 4)
    tokens = torch.tensor([[1, 1], [1, 1], [1, 1]])
    other = Measured(logits=logits.clone(), tokens=tokens.clone())
    other.tokens[0, 1] = 2  # row 1 goes another way after the first step
    other.logits[2, 1] = 9.0
    assert difference(other, Measured(logits=logits, tokens=tokens)) == 0
    other.logits[2, 0] = 1.5
    assert difference(other, Measured(logits=logits, tokens=tokens)) == pytest.approx(0.5)


def test_a_case_leaves_nothing_for_the_next(tiny, monkeypatch):
    """A StaticCache as long as the longest so far would make short cases slow."""
    lengths, init = [], StaticCache.__init__

    def note(self, *args, **kwargs):
        lengths.append(kwargs["max_cache_len"])
        init(self, *args, **kwargs)

    monkeypatch.setattr(StaticCache, "__init__", note)
    for prompt in (40, 8):
        generate_calls.measure(tiny, "static_compile", None, case_of(f"1x{prompt}", 4))
    assert set(lengths) == {43, 11} and lengths == sorted(lengths, reverse=True)


def test_a_replayed_step_is_the_models(tiny):
    """Its logits are those of a step over the same keys and values."""
    tiny.set_attn_implementation("sdpa")
    with torch.no_grad():
        cache = step_bounds.full_cache(tiny, 2, 12)
        dense = DynamicCache(config=tiny.config)
        for index, layer in enumerate(cache.layers):
            dense.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)
        token, position = torch.tensor([[5], [9]]), torch.tensor([[11], [11]])
        expected = tiny(token, position_ids=position, past_key_values=dense).logits
        for _ in range(2):  # in the same place again
            logits = tiny(token, position_ids=position, past_key_values=cache).logits
            torch.testing.assert_close(logits, expected)


def test_flat(tmp_path):
    run("--cases", "flat:8x9", "--implementations", "paged_flash", "--out", tmp_path)
    row = recorded(tmp_path)[-1]
    assert row["metric"] == "step_ms" and row["case"]["new"] == 9
    assert [place for place, _ in row["value"]] == list(range(1, 9)) and all(ms > 0 for _, ms in row["value"])


def test_first_token_of_a_process(tmp_path, monkeypatch):
    seen = []
    load_model = first_token.load
    monkeypatch.setattr(first_token, "load", lambda *a: (seen.append(first_token.os.environ["TRITON_CACHE_DIR"]),
                                                         load_model(*a))[1])  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", "as it was")
    monkeypatch.setattr(first_token, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    run("--cases", "cold:7", "--implementations", "dynamic_sdpa,paged_flash", "--out", tmp_path)
    rows = {(row["impl"], row["metric"]): row["value"] for row in recorded(tmp_path)[1:]}
    ours = [("paged_flash", f"ttft_{which}ms") for which in ("cold_", "process_", "")]
    assert list(rows) == [("dynamic_sdpa", "ttft_process_ms"), ("dynamic_sdpa", "ttft_ms"), *ours]
    assert all(value > 0 for value in rows.values())
    # ours twice over one folder of its own: empty, then with the kernels of before
    theirs, empty, filled = seen
    assert theirs == "as it was" != empty == filled


@pytest.mark.slow
def test_first_token_of_a_real_process(tmp_path):
    times = first_token.in_new_processes("dynamic_sdpa", "tiny", case_of("cold:7", 1), CPU)
    assert times["ttft_process_ms"] > times["ttft_ms"] > 0


class TestPrefix:
    def test_is_skipped_by_name_where_there_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(generate, "knows_prefixes", lambda: False)
        result, _ = run("--cases", "prefix:16+4", "--implementations", "paged_flash", "--out", tmp_path)
        assert result.exit_code == 0 and "PagedCache has no `prefix_caching`" in result.stdout
        assert [row["impl"] for row in recorded(tmp_path)] == ["copy"]

    def test_computed_again_is_an_error(self, tiny, monkeypatch):
        """A cache that has no room for what it knows."""
        monkeypatch.setattr(first_token, "PagedCache", lambda *shape, **_: PagedCache(*shape, prefix_caching=1))
        with pytest.raises(PagedFlashError, match="but 0 were found"):
            first_token.with_and_without_prefix(tiny, None, case_of("prefix:16+4", 1))

    @pytest.mark.skipif(not first_token.knows_prefixes(), reason="no prefix caching in this version")
    def test_with_and_without(self, tmp_path):
        run("--cases", "prefix:32+4", "--implementations", "paged_flash", "--out", tmp_path)
        rows = recorded(tmp_path)[1:]
        assert [(row["metric"], row["case"]["prefix"], row["case"]["prompt"]) for row in rows] == [
            ("ttft_ms", 0, 36), ("ttft_ms", 32, 36),
        ]  # fmt: skip


def test_a_model_of_the_users_own(tmp_path, tiny_model_path):
    options = ["--cases", "2x9", "--implementations", "paged_flash,dynamic_sdpa", "--out", tmp_path]
    result, _ = run("--model", tiny_model_path, *options)
    assert result.exit_code == 0, result.output
    rows = [row for row in recorded(tmp_path) if row["metric"] == "decode_ms"]
    assert [row["case"]["model"] for row in rows] == [tiny_model_path.name] * 2


@pytest.mark.parametrize("name", ["8", "x8", "8+8", "ragged:8", "cold:8x8", "warm:8", "0x8"])
def test_a_case_that_is_none(name):
    with pytest.raises(ArgumentError, match="must be of the forms 8x2048"):
        case_of(name, 4)


def test_shapes():
    sizes = {"8b": 8.03e9, "1b": 1.236e9}
    for name, size in sizes.items():
        model = load(name, torch.device("meta"))
        assert sum(x.numel() for x in model.parameters()) == pytest.approx(size, rel=0.01)
        read = step_bounds.weight_bytes(model) / 2
        assert read == pytest.approx(size - (0 if name == "1b" else 128256 * 4096), rel=0.01)
    assert sum(case_of("ragged:32x4096", 128).lengths) == 23545
    assert set(map(partial(case_of, new=4), generate.STATIC_CASES.split(","))) <= set(
        map(partial(case_of, new=4), generate.CASES.split(","))
    )
