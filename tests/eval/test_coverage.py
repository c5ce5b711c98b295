"""Types of causal language models that were recorded to work still do, and the tool notices where one does not."""

import os
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version

from hf_paged_flash import UnsupportedFeatureError
from hf_paged_flash.eval import coverage, finding
from hf_paged_flash.eval.finding import Finding
from hf_paged_flash.eval.tiny_configs import tiny_config
from hf_paged_flash.patches import mask_readers, unreached_models

PARTS = 12  # of the third that is tried here; `make coverage` tries all


def the_record() -> dict[str, Finding]:
    """The table of this version of transformers, or of the newest one that has any."""
    recorded = coverage.recorded_versions(coverage.RESULTS)
    version = transformers.__version__ if transformers.__version__ in recorded else recorded[-1]
    return coverage.recorded(coverage.results_file(coverage.RESULTS, version))[1]


def a_third() -> list[str]:
    """Every third type, of each verdict and way."""
    kinds = sorted(the_record().values(), key=lambda one: (one.verdict, one.cache or "", one.dense, one.model_type))
    return [one.model_type for one in kinds[1::3] if one.model_type in coverage.MODEL_TYPES]


@pytest.mark.parametrize("part", range(PARTS))
def test_types_do_what_is_recorded(part):
    chosen = a_third()[part::PARTS]
    assert len(chosen) >= 4
    found = list(coverage.findings(chosen, time_limit=120))
    assert sorted(one.model_type for one in found) == sorted(chosen)
    assert coverage.shortfalls(found, the_record()) == []


class TestTheRecord:
    @pytest.mark.parametrize("version", coverage.recorded_versions(coverage.RESULTS))
    def test_nothing_is_wrong_and_refusals_say_why(self, version):
        _, found = coverage.recorded(coverage.results_file(coverage.RESULTS, version))
        assert len(found) >= 178
        assert not [one for one in found.values() if one.verdict in finding.BAD or one.beams in finding.BAD]
        for one in found.values():
            assert one.verdict in finding.VERDICTS
            assert one.verdict in finding.GOOD or one.reason, one
            assert one.verdict != finding.REFUSES or 'attn_implementation="eager"' in one.reason

    def test_both_ends_of_the_range_are_there(self):
        versions = coverage.recorded_versions(coverage.RESULTS)
        assert versions[0] == "5.17.0" and Version(versions[-1]) >= Version("5.23.0")

    def test_it_is_written_and_read(self, tmp_path):
        found = [Finding("llama", finding.WORKS, "works", cache="PagedCache", dense=("cat",), error=1e-7)]
        path = coverage.write([Finding("old", finding.WORKS)], tmp_path)
        assert coverage.write(found, tmp_path) == path
        origin, table = coverage.recorded(path)
        assert table == {"llama": replace(found[0], error=None)}
        assert origin["transformers"] == transformers.__version__ == coverage.recorded_versions(tmp_path)[0]


def test_shortfalls():
    works = Finding("a", finding.WORKS, beams=finding.WORKS)
    table = {"a": works, "b": replace(works, model_type="b", verdict=finding.REFUSES, beams=None)}

    def short(**changes):
        return len(coverage.shortfalls([replace(works, **changes)], table))

    assert short() == 0
    assert short(verdict=finding.DENSE) == short(verdict=finding.REFUSES) == short(verdict=finding.BROKEN) == 1
    assert short(beams=None) == short(beams=finding.REFUSES) == 1
    assert short(model_type="b") == 0  # more than recorded
    assert short(model_type="new", verdict=finding.REFUSES) == 0
    assert short(model_type="new", verdict=finding.WRONG) == short(model_type="b", verdict=finding.FAILS) == 1
    assert short(beams=finding.WRONG, model_type="new") == 1


class TestVerdicts:
    """Each made to happen to a Llama, which works."""

    @pytest.fixture
    def paged(self, monkeypatch):
        """A function that has the Llama under paged_flash be changed by another."""

        build = finding.build

        def by(change):
            def changed(model_type, implementation):
                model = build(model_type, implementation)
                return model if implementation == "eager" else change(model)

            monkeypatch.setattr(finding, "build", changed)

        return by

    def test_works(self):
        found = finding.examine("llama")
        assert (found.verdict, found.beams, found.cache, found.dense) == ("works", "works", "PagedCache", ())
        assert found.error < finding.TOLERANCE

    def test_other_weights_are_wrong(self, paged):
        @torch.no_grad()
        def change(model):
            model.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
            return model

        paged(change)
        assert finding.examine("llama").verdict == finding.WRONG

    def test_a_refusal_and_an_error(self, paged):
        def refuse(model):
            raise UnsupportedFeatureError("no, because")

        def fail(model):
            raise RuntimeError("oops")

        paged(refuse)
        assert finding.examine("llama") == Finding("llama", finding.REFUSES, reason="no, because")
        paged(fail)
        found = finding.examine("llama")
        assert found.verdict == finding.FAILS and "RuntimeError: oops" in found.reason

    def test_a_model_that_needs_what_is_not_installed(self, monkeypatch):
        def build(*arguments):
            raise ImportError("pip install it")

        monkeypatch.setattr(finding, "build", build)
        assert finding.examine("llama").verdict == finding.NOT_TRIED

    def test_a_model_that_hardly_looks_back_shows_nothing(self, monkeypatch):
        build = finding.build

        @torch.no_grad()
        def blind(model_type, implementation):
            model = build(model_type, implementation)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
            return model

        monkeypatch.setattr(finding, "build", blind)
        assert "hardly looks at its prompt" in finding.examine("llama").reason

    def test_a_process_that_dies_and_one_that_does_not_end(self, monkeypatch):
        def examine(model_type):
            time.sleep(60) if model_type == "slow" else os._exit(3)

        monkeypatch.setattr(coverage, "examine", examine)
        found = {one.model_type: one for one in coverage.findings(["slow", "dead"], workers=2, time_limit=2)}
        assert found["dead"].verdict == found["slow"].verdict == finding.FAILS
        assert "exit code 3" in found["dead"].reason and "no end after 2 s" in found["slow"].reason


class TestWhatSourcesTell:
    def of(self, model_type):
        return finding.model_class_of(model_type)

    @pytest.mark.parametrize("model_type", ["doge", "deepseek_v32", "deepseek_v4", "bigbird_pegasus", "hy_v4"])
    def test_who_reads_the_mask(self, model_type):
        assert mask_readers.needs_matrix(self.of(model_type))

    @pytest.mark.parametrize("model_type", ["llama", "bart", "gemma4", "llama4", "jamba", "qwen3_next", "deepseek_v3"])
    def test_who_passes_it_on(self, model_type):
        assert not mask_readers.needs_matrix(self.of(model_type))

    @pytest.mark.parametrize("model_type", ["git", "bloom", "rembert"])
    def test_who_has_attention_of_its_own(self, model_type):
        assert "has attention code of its own" in unreached_models._refusal(self.of(model_type))

    def test_an_argument_that_means_nothing_here(self, monkeypatch):
        llama = self.of("llama")
        assert unreached_models._unknown_argument.__wrapped__(llama) is None

        def eager_attention_forward(module, query, key, value, attention_mask, scaling, charm=None, **kwargs):
            raise AssertionError("never called")

        monkeypatch.setattr(sys.modules[llama.__module__], "eager_attention_forward", eager_attention_forward)
        assert unreached_models._unknown_argument.__wrapped__(llama) == "charm"
        unreached_models._unknown_argument.cache_clear()
        try:
            with pytest.raises(UnsupportedFeatureError, match="LlamaForCausalLM gives its attention `charm`.*eager"):
                finding.build("llama", "paged_flash")
        finally:
            unreached_models._unknown_argument.cache_clear()

    def test_tiny_configurations_keep_a_layer_of_each_kind(self):
        mixed = tiny_config("gemma3_text")
        assert set(mixed.layer_types) == {"sliding_attention", "full_attention"} and mixed.sliding_window < 19


def test_windows_that_only_the_cache_knows():
    """Moshi's mask says nothing of its window: DynamicCache drops what lies before it."""
    eager, model = (finding.build("moshi", name) for name in ("eager", "paged_flash"))
    inputs = finding.prompts(eager, [20, 5])
    reference, ours = finding.run(eager, inputs), finding.run(model, inputs)
    assert finding.difference(ours, reference) < finding.TOLERANCE
    with pytest.raises(UnsupportedFeatureError, match="window of 7 tokens which only its cache knows of"):
        finding.run(model, inputs, prefill_chunk_size=4)


@pytest.mark.parametrize(("model_type", "cache"), [("recurrent_gemma", "PagedCache"), ("mamba", "DynamicCache")])
def test_beams_of_models_with_other_states(model_type, cache):
    """RecurrentGemma keeps states outside of its cache, and Mamba has no keys: their prompts are not computed once."""
    found = finding.examine(model_type)
    assert (found.beams, found.cache) == (finding.WORKS, cache)
