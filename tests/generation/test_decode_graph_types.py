"""Other types of models under graphs: eager's tokens, from replays where these can be had."""

import pytest

from hf_paged_flash.eval.finding import LENGTHS, TOLERANCE, build, difference, prompts, run

# what their forwards do besides: shared K/V, parallel blocks, partial RoPE, experts, several norms, scaled logits
REPLAYED = (
    "cohere2", "exaone4", "gemma2", "glm4", "granite", "mixtral", "modernbert-decoder", "nemotron", "olmo2", "phi",
    "phimoe", "qwen2_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
# a state outside of the cache, and in it; the cache's length; dense keys; a mask over cached keys; further outputs
NOT_REPLAYED = ("recurrent_gemma", "jamba", "opt", "bert", "deepseek_v2", "llama4_text", "moshi")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*REPLAYED, *NOT_REPLAYED])
def test_types(model_type, recorders):
    eager, paged = (build(model_type, name) for name in ("eager", "paged_flash"))
    if model_type in ("mixtral", "phimoe", "qwen2_moe"):
        paged.set_experts_implementation("batched_mm")  # as generate() does on a GPU
    inputs = prompts(eager, LENGTHS)
    for options, calls in (({}, 4), ({"num_beams": 3}, 2)):  # of a prompt the fourth is a replay
        reference = run(eager, inputs, **options)
        for _ in range(calls):
            assert difference(run(paged, inputs, **options), reference) <= TOLERANCE
    assert (recorders.replayed > 0) == (model_type in REPLAYED)
