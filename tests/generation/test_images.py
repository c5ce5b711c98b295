"""Models of images and text: their steps are replayed as a text's are, whatever images came before."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, CompileConfig

from hf_paged_flash import PagedCache, disable_prefix_caching, enable_prefix_caching
from hf_paged_flash.generation import prefix_caching
from tests.pattern_models import IMAGE_TOKEN, build, image_inputs

MODEL_TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")
STEPS = 12

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(params=MODEL_TYPES)
def model_type(request):
    return request.param


@pytest.fixture
def pair(model_type):
    return models_that_see(model_type)


def models_that_see(model_type: str) -> list:
    """The same model under eager and paged_flash."""
    models = [build(model_type, attention, AutoModelForImageTextToText) for attention in ("eager", "paged_flash")]
    models[1].load_state_dict(models[0].state_dict())  # CLIP begins with a random vector of its own
    return [model.eval() for model in models]


def prompts(model_type: str, seed: int) -> dict[str, torch.Tensor]:
    """Two padded rows with an image each."""
    inputs, _ = image_inputs(model_type, "left")
    inputs["pixel_values"] = torch.randn(
        inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)
    )
    return inputs


def generate(model, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def test_steps_are_replayed(pair, model_type, recorders, elastic):
    """One capture serves all images, and texts without."""
    eager, paged = pair
    for call, seed in enumerate((1, 2, 3)):
        inputs = prompts(model_type, seed)
        assert torch.equal(generate(paged, inputs), generate(eager, inputs))
        assert (recorders.captured, recorders.replayed) == (1, (call + 1) * (STEPS - 1) - 1)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].clamp(max=80)
    before = recorders.replayed
    assert torch.equal(generate(paged, text), generate(eager, text))
    assert recorders.replayed >= before + STEPS - 2


@pytest.mark.slow
def test_steps_are_compiled(pair, model_type, recorders):
    eager, paged = pair
    for call, seed in enumerate((1, 2)):
        inputs, config = prompts(model_type, seed), CompileConfig(backend="eager", mode=None)
        assert torch.equal(generate(paged, inputs, compile_config=config), generate(eager, inputs))
        assert recorders.replayed == (call + 1) * (STEPS - 1) - 1


class TestPrefixCaching:
    """One prompt with an image: 20 tokens, the image, 30 tokens and a question."""

    @pytest.fixture(params=[name for name in MODEL_TYPES if name != "gemma3"])  # which has windows
    def model_type(self, request):
        return request.param

    @pytest.fixture(params=["by the model", "by a cache"])
    def cache(self, request, pair):
        paged = pair[1]
        if request.param == "by the model":
            yield enable_prefix_caching(paged)
            disable_prefix_caching(paged)
        else:
            yield PagedCache(paged.config, prefix_caching=True)

    @pytest.fixture
    def ask(self, pair, model_type, cache):
        """Tokens of a prompt that are computed, and whether its image is; the answer is asserted to be eager's."""
        eager, paged = pair
        options = {} if prefix_caching._enabled.get(paged) is cache else {"past_key_values": cache}

        forwards = []

        def note(model, args, given):
            forwards.append(given)

        def run(image: int, question: int, padding: int = 0, **more) -> tuple[int, bool]:
            inputs = self.prompt(model_type, image, question, padding)
            forwards.clear()
            ours = generate(paged, inputs, **options, **more)
            assert torch.equal(ours, generate(eager, inputs, **more))
            # transformers 5.24 encodes an image before the first forward
            has_image = forwards[0].get("pixel_values") is not None or bool(forwards[0].get("mm_encoder_outputs"))
            return forwards[0]["input_ids"].numel(), has_image

        hook = paged.register_forward_pre_hook(note, with_kwargs=True)  # a new one would have the prefixes forgotten
        yield run
        hook.remove()

    def prompt(self, model_type: str, image: int, question: int, padding: int) -> dict[str, torch.Tensor]:
        inputs = prompts(model_type, image)
        count = {"llava": 16}.get(model_type, 6)
        places = [2] * 19 + [IMAGE_TOKEN + 2] + [IMAGE_TOKEN] * count + list(range(5, 35))
        ids = torch.tensor([[0] * padding + places + list(range(question, question + 9))])
        given = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= padding).long()[None]}
        if model_type == "llava":
            return given | {"pixel_values": inputs["pixel_values"][:1]}
        given |= {"pixel_values": inputs["pixel_values"][:24], "image_grid_thw": inputs["image_grid_thw"][:1]}
        return given | {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()}

    def test_an_image_that_is_known_is_not_looked_at_again(self, pair, ask, cache, model_type):
        length = self.prompt(model_type, 1, 40, 0)["input_ids"].numel()
        rest = length - (length - 9) // 16 * 16
        assert ask(1, 40) == (length, True)
        assert ask(1, 50) == (rest, False)
        assert ask(1, 60, padding=3) == (rest, False)
        assert ask(2, 40) == (length - 16, True), "the text in front of another image is known"
        assert ask(2, 50) == (rest, False)
        hits = 3 * (length - rest) + 16
        assert cache.memory().prefix_tokens_hit == hits
        known = (length - 1) // 16 * 16
        if vars(type(pair[1])).get("_expand_inputs_for_generation"):  # of its own: two rows with images
            known, expected = 0, (2 * length, True)
        else:
            expected = length - known, False
        assert ask(1, 40, num_beams=2) == expected
        assert cache.memory().prefix_tokens_hit == hits + known

    def test_what_else_a_model_is_told_of_an_image(self, ask, model_type):
        if model_type != "llava":
            pytest.skip("has no such argument")
        length, _ = ask(1, 40)
        other, sees = ask(1, 40, vision_feature_layer=-2)
        assert sees and other >= length - 16, "more is known than the text in front of the image"
        assert ask(1, 40, vision_feature_layer=-2)[0] < length - 16

    def test_the_next_turn_knows_the_answer(self, pair, model_type, cache, ask):
        ask(1, 40)
        eager, paged = pair
        inputs = self.prompt(model_type, 1, 40, 0)
        answer = generate(eager, inputs)[:, inputs["input_ids"].shape[1] :]
        turn = inputs | {"input_ids": torch.cat([inputs["input_ids"], answer, torch.arange(60, 70)[None]], 1)}
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        if "mm_token_type_ids" in turn:
            turn["mm_token_type_ids"] = (turn["input_ids"] == IMAGE_TOKEN).int()
        options = {} if prefix_caching._enabled.get(paged) is cache else {"past_key_values": cache}
        assert torch.equal(generate(paged, turn, **options), generate(eager, turn))
        known = inputs["input_ids"].numel() + STEPS - 1  # the last token was never computed
        assert cache.memory().prefix_tokens_hit == known // 16 * 16

    def test_any_prompts(self, pair, model_type, cache):
        """Made of a few texts and images, many of which begin as another one did."""
        eager, paged = pair
        random, seen = np.random.default_rng(3), []
        images = prompts(model_type, 1)["pixel_values"], prompts(model_type, 2)["pixel_values"]
        given = {} if prefix_caching._enabled.get(paged) is cache else {"past_key_values": cache}
        for _ in range(16):
            begun = seen[random.integers(len(seen))] if seen and random.random() < 0.7 else []
            parts = begun[: random.integers(4)] + [random.integers(6) for _ in range(random.integers(1, 3))]
            seen.append(parts)
            inputs = self.of_parts(model_type, parts, images, padding=random.integers(3))
            options = [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 13}][random.integers(3)]
            if "pixel_values" in inputs:
                options.pop("prefill_chunk_size", None)  # transformers would leave them out
            assert torch.equal(generate(paged, inputs, **given, **options), generate(eager, inputs))
        assert cache.memory().prefix_tokens_hit > 0

    def of_parts(self, model_type: str, parts: list[int], images: tuple, padding: int) -> dict[str, torch.Tensor]:
        """Each part is an image, of two, or a text of 1 to 20 tokens."""
        count, each = (16, 1) if model_type == "llava" else (6, 24)
        ids, seen = [0] * padding, []
        for part in parts:
            if part < 2:
                ids += [IMAGE_TOKEN + 2] + [IMAGE_TOKEN] * count
                seen.append(images[part][:each])
            else:
                ids += [5 + part] * (1, 5, 16, 20)[part - 2]
        ids = torch.tensor([[*ids, 40]])
        given = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= padding).long()[None]}
        if model_type != "llava":
            given["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        if seen:
            given["pixel_values"] = torch.cat(seen)
            if model_type != "llava":
                given["image_grid_thw"] = torch.tensor([[1, 6, 4]] * len(seen))
        return given

    def test_rows_with_images_are_computed_whole(self, pair, model_type, cache):
        eager, paged = pair
        for swapped in (False, True, False):
            inputs = prompts(model_type, 1)
            if swapped and model_type == "llava":
                inputs["pixel_values"] = inputs["pixel_values"].flip(0)
            assert torch.equal(generate(paged, inputs, past_key_values=cache), generate(eager, inputs))
        assert cache.memory().prefix_tokens_hit == 0


class TestPacked:
    """Padding is not computed."""

    @pytest.fixture
    def computed(self, pair):
        counts = []
        pair[1].register_forward_pre_hook(
            lambda _, args, given: counts.append(given["input_ids"].numel()), with_kwargs=True
        )
        return counts

    @pytest.fixture(params=[name for name in MODEL_TYPES if name != "gemma3"])  # which works on its mask
    def model_type(self, request):
        return request.param

    def test_a_row_and_its_image(self, pair, model_type, computed):
        eager, paged = pair
        inputs = TestPrefixCaching().prompt(model_type, 1, 40, padding=7)
        assert torch.equal(generate(paged, inputs), generate(eager, inputs))
        assert computed[0] == inputs["input_ids"].numel() - 7

    def test_chunks_of_a_text(self, pair, model_type, computed):
        """Positions of several axes, of which transformers would cut the wrong one."""
        eager, paged = pair
        text = {"input_ids": prompts(model_type, 1)["input_ids"][1:].clamp(max=80)}
        assert torch.equal(generate(paged, text, prefill_chunk_size=7), generate(eager, text))
        assert computed[:4] == [7, 7, 7, 4]

    def test_texts_to_a_model_that_sees(self, pair, model_type, computed):
        """Its processor says where images are, even if nowhere."""
        eager, paged = pair
        inputs = prompts(model_type, 1)
        text = {"input_ids": inputs["input_ids"].clamp(max=80), "attention_mask": inputs["attention_mask"]}
        if "mm_token_type_ids" in inputs:
            text["mm_token_type_ids"] = torch.zeros_like(text["input_ids"])
        assert torch.equal(generate(paged, text), generate(eager, text))
        assert computed[0] == int(text["attention_mask"].sum())
