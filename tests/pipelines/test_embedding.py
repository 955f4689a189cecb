"""Target embeddings are computed once for each model and text, and never those of other weights."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig

from eval.embed import embed_texts as embed_benchmark_texts
from modeling_vljepa import LORA_MODULES_TO_SAVE, VLJEPAModel
from modeling_vljepa.pipelines import embedding
from modeling_vljepa.pipelines.embedding import embed_texts, target_embeds
from tests.tiny import tiny_model, tiny_processor, tiny_writer

WORDS = ("a cat", "red", "it rides a bike", "what is the dog doing ?")
TEXTS = [f"{WORDS[number % 4]} {number}" for number in range(1000)]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def shared() -> VLJEPAModel:
    return tiny_model().eval()


def count_encoded(model: VLJEPAModel) -> list[tuple[int, int]]:
    """Return a list to which each pass of the Y-Encoder adds its numbers of texts and tokens."""
    passes = []

    def count(module, args) -> None:
        passes.append(tuple(args[0].shape))

    model.base_model.y_encoder.register_forward_pre_hook(count)
    return passes


@torch.no_grad()
def uncached(model: VLJEPAModel, processor, texts: list[str]) -> torch.Tensor:
    model = model.base_model
    return torch.cat([model.encode_target(**processor(targets=each)) for each in texts]).float()


def test_target_embeds_of_a_thousand_texts_encode_nothing_the_second_time(processor):
    model = tiny_model().eval()
    passes = count_encoded(model)
    first = target_embeds(model, processor, TEXTS)
    assert sum(texts for texts, _ in passes) == 1000
    del passes[:]
    again = target_embeds(model, processor, TEXTS[::-1]).flip(0)
    assert passes == []
    assert torch.equal(again, first)
    chosen = list(range(0, 1000, 97))
    expected = uncached(model, processor, [TEXTS[index] for index in chosen])
    torch.testing.assert_close(again[chosen], expected, atol=1e-6, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # positive control


def test_target_embeds_encode_repeated_texts_once_and_batch_by_length(processor):
    model = tiny_model().eval()
    passes = count_encoded(model)
    texts = ["red", "a cat " * 20, "blue", "red", "a dog " * 20, "red"]
    found = target_embeds(model, processor, texts, batch_size=2)
    assert [count for count, _ in passes] == [2, 2]
    assert passes[0][1] > passes[1][1]  # the long texts, then the short ones
    torch.testing.assert_close(found, uncached(model, processor, texts), atol=1e-6, rtol=0)


def test_target_embeds_results_cannot_change_the_cache(shared, processor):
    before = target_embeds(shared, processor, ["a cat"])
    target_embeds(shared, processor, ["a cat"]).zero_()
    assert torch.equal(target_embeds(shared, processor, ["a cat"]), before)


def test_target_embeds_depend_on_the_processor(shared):
    """Its prompt and its limit of the length change the tokens of a text."""
    processor, text = tiny_processor(), ["a cat rides a bike"]
    before = target_embeds(shared, processor, text)
    processor.max_target_length = 3
    cut = target_embeds(shared, processor, text)
    assert (cut - before).abs().max() > 1e-3
    torch.testing.assert_close(cut, uncached(shared, processor, text), atol=1e-6, rtol=0)


def test_embed_texts_of_benchmarks_use_the_cache_of_pipelines(processor):
    model = tiny_writer().eval()
    passes = count_encoded(model)
    found = embed_texts(model, processor, TEXTS[:5])
    assert torch.equal(embed_benchmark_texts(model.vljepa, processor, TEXTS[:5]), found)
    assert len(passes) == 1


# -- changed models ------------------------------------------------------------------------


def train_a_step(model: VLJEPAModel) -> None:
    optimizer = torch.optim.SGD(model.y_encoder.parameters(), lr=0.1)
    for weight in model.y_encoder.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def write_past_the_version(model: VLJEPAModel) -> None:
    for weight in model.y_encoder.parameters():
        weight.data.mul_(1.1)


def load(model: VLJEPAModel, assign: bool = False) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict(), assign=assign)


def add_adapter(model: VLJEPAModel) -> None:
    """Add an adapter to the head alone, and change its copy of the weights."""
    config = LoraConfig(target_modules=r".*q_proj", modules_to_save=LORA_MODULES_TO_SAVE)
    model.add_adapter(config, "tuned")
    with torch.no_grad():
        model.y_head.modules_to_save["tuned"].projection.weight.neg_()
    model.eval()


def replace_head(model: VLJEPAModel) -> None:
    model.y_head = tiny_model(seed=2).y_head.eval()


def pool_otherwise(model: VLJEPAModel) -> None:
    model.y_encoder.pooling = "cls"


CHANGES = {
    "a step": train_a_step,
    "a step past the version": write_past_the_version,
    "load_state_dict": load,
    "load_state_dict with assign": lambda model: load(model, assign=True),
    "an adapter": add_adapter,
    "another head": replace_head,
    "another pooling": pool_otherwise,
    "bf16": lambda model: model.to(torch.bfloat16),
    "bf16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_target_embeds_are_never_those_of_other_weights(processor, change: Callable):
    model = tiny_model().eval()
    before = target_embeds(model, processor, TEXTS[:4])
    change(model)
    after = target_embeds(model, processor, TEXTS[:4])
    assert (after - before).abs().max() > 1e-5
    tolerance = 1e-6 if model.dtype == torch.float32 else 1e-2
    expected = uncached(model, processor, TEXTS[:4])
    torch.testing.assert_close(after, expected, atol=tolerance, rtol=0)


def test_target_embeds_follow_an_adapter_that_is_switched_off_and_on(processor):
    model = tiny_model().eval()
    plain = target_embeds(model, processor, TEXTS[:4])
    add_adapter(model)
    tuned = target_embeds(model, processor, TEXTS[:4])
    model.disable_adapters()
    torch.testing.assert_close(target_embeds(model, processor, TEXTS[:4]), plain, atol=1e-6, rtol=0)
    model.y_head.enable_adapters(True)  # transformers' own method leaves out saved modules
    torch.testing.assert_close(target_embeds(model, processor, TEXTS[:4]), tuned, atol=1e-6, rtol=0)
    assert (tuned - plain).abs().max() > 0.1


def test_target_embeds_under_autocast_are_not_those_without(shared, processor):
    full = target_embeds(shared, processor, TEXTS[:4])
    with torch.autocast("cpu", torch.bfloat16):
        half = target_embeds(shared, processor, TEXTS[:4])
    assert 1e-5 < (half - full).abs().max() < 0.05
    assert (target_embeds(shared, processor, TEXTS[:4]) - full).abs().max() < 1e-6


def test_target_embeds_in_training_mode_are_not_cached(processor):
    model = tiny_model().train()
    passes = count_encoded(model)
    for _ in range(2):
        target_embeds(model, processor, TEXTS[:4])
    assert len(passes) == 2


def test_target_embeds_of_weights_that_change_meanwhile_are_not_cached(processor):
    model = tiny_model().eval()

    def change(*_: object) -> None:
        model.y_head.projection.bias.fill_(1)

    handle = model.y_encoder.register_forward_hook(change)
    with torch.no_grad():
        target_embeds(model, processor, ["a cat"])
        assert not embedding.cache_of(model).embeds
        handle.remove()
        found = target_embeds(model, processor, ["a cat"])
    torch.testing.assert_close(found, uncached(model, processor, ["a cat"]), atol=1e-6, rtol=0)


# -- limits --------------------------------------------------------------------------------


def test_target_embeds_cache_a_bounded_number_of_texts(processor, monkeypatch):
    monkeypatch.setattr(embedding, "CACHED_TEXTS", 3)
    model = tiny_model().eval()
    passes = count_encoded(model)
    found = target_embeds(model, processor, TEXTS[:5])  # more than the cache holds
    torch.testing.assert_close(found, uncached(model, processor, TEXTS[:5]), atol=1e-6, rtol=0)
    cache = embedding.cache_of(model).embeds
    assert len(cache) == 3
    assert {each.untyped_storage().nbytes() for each in cache.values()} == {4 * found.shape[1]}
    target_embeds(model, processor, ["red"])
    del passes[:]
    target_embeds(model, processor, ["red"])  # the latest
    assert passes == []


def test_target_embeds_cache_ends_with_its_model(processor):
    model = tiny_model().eval()
    target_embeds(model, processor, ["a cat"])
    cache = weakref.ref(embedding.cache_of(model))
    assert cache() is not None
    del model
    gc.collect()
    assert cache() is None


def test_target_embeds_of_several_threads_are_those_of_one(processor):
    model = tiny_model().eval()
    parts = [TEXTS[start : start + 30] for start in range(0, 120, 10)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: target_embeds(model, processor, part), parts))
    everything = target_embeds(tiny_model().eval(), processor, TEXTS[:140])
    for part, embeds in zip(parts, found, strict=True):
        expected = everything[[TEXTS.index(text) for text in part]]
        torch.testing.assert_close(embeds, expected, atol=1e-6, rtol=0)
