"""The metrics against torch's own, computed another way."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged_flash.eval.comparison import Comparison, beyond, compare, evaluate, results_of
from hf_paged_flash.eval.text import batched, strided_windows


def test_compare_agrees_with_torch():
    torch.manual_seed(1)
    baseline, targets = torch.randn(2, 300, 50), torch.randint(50, (2, 300))
    logits = baseline + 0.3 * torch.randn_like(baseline)
    total = compare(logits, baseline, targets)
    log_q, log_p = logits.double().log_softmax(-1), baseline.double().log_softmax(-1)
    assert total.tokens == 600
    assert total.nll == pytest.approx(
        F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum").item()
    )
    assert total.kl == pytest.approx(F.kl_div(log_q, log_p, log_target=True, reduction="sum").item())
    assert total.top1 == (logits.argmax(-1) == baseline.argmax(-1)).sum().item() < 600
    assert total.max_abs_dlogit == (logits.double() - baseline.double()).abs().max().item()
    assert total.abs_dlogit / total.logits == pytest.approx((logits.double() - baseline.double()).abs().mean().item())


def test_equal_logits_differ_in_nothing():
    logits = torch.randn(1, 7, 11)
    total = compare(logits, logits, torch.zeros(1, 7, dtype=torch.long))
    assert (total.kl, total.max_abs_dlogit, total.abs_dlogit, total.top1) == (0, 0, 0, 7)


def test_nan_survives_every_sum():
    nan, one = Comparison(max_abs_dlogit=math.nan), Comparison(max_abs_dlogit=1.0)
    assert math.isnan((nan + one).max_abs_dlogit) and math.isnan((one + nan).max_abs_dlogit)
    logits = torch.zeros(1, 600, 3)
    logits[0, 10, 0] = math.nan
    total = compare(logits, torch.zeros(1, 600, 3), torch.zeros(1, 600, dtype=torch.long))
    assert math.isnan(total.nll) and math.isnan(total.max_abs_dlogit)


def _evaluated(path, text, implementations, window=48, stride=24):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(path)(text).input_ids[:200])
    batches = batched(strided_windows(len(tokens), window, stride), 3)
    ways = ["forward", "chunked", "decode"]
    measured = evaluate(model, tokens, batches, implementations=implementations, ways=ways, chunk=7)
    return model, tokens, {(row.way, row.implementation): row for row in results_of(measured, model.device)}


def test_perplexity_of_one_window_is_the_models_own_loss(tiny_model_path, text):
    model, tokens, rows = _evaluated(tiny_model_path, text, ["eager"], window=400, stride=100)
    with torch.no_grad():
        loss = model(tokens[None], labels=tokens[None]).loss
    for way in ("forward", "chunked", "decode"):
        assert rows[way, "eager"].tokens == len(tokens) - 1
        assert rows[way, "eager"].ppl == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("other", ["sdpa", "paged_flash"])
def test_three_ways_agree_with_eager(other, tiny_model_path, text):
    _, tokens, rows = _evaluated(tiny_model_path, text, ["eager", other])
    assert {row.tokens for row in rows.values()} == {len(tokens) - 1}
    for way in ("forward", "chunked", "decode"):
        row = rows[way, other]
        assert abs(row.delta_ppl) <= 1e-5 and row.top1 == 1 and row.max_abs_dlogit <= 1e-3, row
        assert row.tokens_per_s > 0 and row.peak_bytes is None


def test_beyond_counts_what_is_not_a_number(tiny_model_path, text):
    _, _, rows = _evaluated(tiny_model_path, text, ["eager"])
    row = rows["forward", "eager"]
    bad = [type(row)(**vars(row) | {"delta_ppl": delta}) for delta in (0.0, -0.2, math.nan)]
    assert beyond(bad, 0.1) == bad[1:]
