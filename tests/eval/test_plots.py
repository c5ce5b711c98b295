"""README's pictures show what the committed results say."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from hf_paged_flash.eval import plots

CHECKOUT = Path(plots.__file__).resolve().parent.parent


def row(impl, value, **case):
    shape = {"pass": "fwd", "b": 4, "h": 32, "hk": 8, "s": 4096, "d": 128, "causal": True}
    return {"run": "a-run", "gpu": "GPU", "impl": impl, "value": value, "case": shape | case}


def test_series_are_causal_batches_of_as_many_tokens():
    rows = [
        row("paged_flash", 3.0, b=1, s=16384),
        row("paged_flash", 2.0),
        row("sdpa_cudnn", 1.0, d=64, **{"pass": "bwd"}),
        *(row("paged_flash", 9.0, **other) for other in ({"causal": False}, {"hk": 32}, {"d": 256}, {"b": 2})),
        row("paged_flash", 9.0, packed={"tokens": 16384}),
    ]
    assert plots.series_of(rows) == {
        ("fwd", 128): {"paged_flash": [(4096, 2.0), (16384, 3.0)]},
        ("bwd", 64): {"sdpa_cudnn": [(4096, 1.0)]},
    }


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plots.draw([row("paged_flash", 2.0), row("sdpa_fa2", 1.0, b=1, s=16384)], tmp_path / "it.svg")
    text = (tmp_path / "it.svg").read_text()
    ElementTree.fromstring(text)
    assert all(word in text for word in ("runs a-run", "SDPA FA2", "backward, head_dim 64", "16384"))


def test_memory_picture(tmp_path):
    pytest.importorskip("matplotlib")
    case = {"workload": "w-1", "title": "one workload"}
    points = [[0, 1.5, 1.0], [10, 3.0, 2.0]]
    rows = [
        {"run": "a-run", "impl": impl, "case": case | {"title": title}, "metric": "gib_over_time", "value": points}
        for title in ("one workload", "another", "a third")
        for impl in ("dynamic", "static", "paged")
    ]
    plots.draw_memory(rows, tmp_path / "it.svg")
    text = (tmp_path / "it.svg").read_text()
    ElementTree.fromstring(text)
    assert all(word in text for word in ("runs a-run", "one workload", "a third", "PagedCache", "still needed"))


def generated(metric, value, impl="paged_flash", compiled=None, **case):
    shape = {"model": "llama-8b", "b": 1, "prompt": 512, "new": 128, "compile": compiled} | case
    return {"run": "a-run", "gpu": "GPU", "impl": impl, "metric": metric, "value": value, "case": shape}


def test_pictures_of_generate(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        generated(metric, value, impl, mode, b=b)
        for b in (1, 32)
        for impl, mode in (("paged_flash", None), ("paged_flash", "default"), ("dynamic_sdpa", None))
        for metric, value in (("decode_ms", 5.0), ("read_ms", 4.0))
    ]
    plots.draw_generate([*rows, generated("out_of_memory", 1, "static_compile", b=32)], tmp_path / "it.svg")
    text = (tmp_path / "it.svg").read_text()
    ElementTree.fromstring(text)
    words = ("runs a-run", "B32, prompt 512", "compiled (default)", "DynamicCache", "floor")
    assert all(word in text for word in words)
    assert "StaticCache" not in text
    series = [[64, 5.0], [128, 5.1]]
    plots.draw_steps([generated("step_ms", series, impl, new=8192) for impl in ("paged_flash", "dynamic_sdpa")],
                     tmp_path / "it.svg")  # fmt: skip
    text = (tmp_path / "it.svg").read_text()
    ElementTree.fromstring(text)
    assert all(word in text for word in ("runs a-run", "new tokens", "DynamicCache + sdpa", "prompt 512"))


def test_readme_shows_the_memory_of_the_committed_results():
    picture = CHECKOUT / "eval" / "assets" / "memory.svg"
    if not (CHECKOUT / "README.md").is_file():
        pytest.skip("no checkout")
    assert "(eval/assets/memory.svg)" in (CHECKOUT / "README.md").read_text(encoding="utf-8")
    runs = ", ".join(dict.fromkeys(row["run"] for row in plots.timelines(CHECKOUT / "eval" / "results")))
    assert runs and f"runs {runs}" in picture.read_text(encoding="utf-8"), "run python -m hf_paged_flash.eval.plots"


def test_readme_shows_the_committed_results():
    picture = CHECKOUT / "eval" / "assets" / "flash_attention.svg"
    if not (CHECKOUT / "README.md").is_file():
        pytest.skip("no checkout")
    assert "(eval/assets/flash_attention.svg)" in (CHECKOUT / "README.md").read_text(encoding="utf-8")
    runs = ", ".join(dict.fromkeys(row["run"] for row in plots.dense_attention(CHECKOUT / "eval" / "results")))
    assert f"runs {runs}" in picture.read_text(encoding="utf-8"), "run python -m hf_paged_flash.eval.plots"
