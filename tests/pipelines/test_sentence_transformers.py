"""A VL-JEPA as a SentenceTransformer: the same embeddings, the evaluators, the trainer."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)

from modeling_vljepa.pipelines.st_vljepa import VLJEPAModule
from tests.tiny import noise, tiny_model, tiny_processor, write_clip

CAPTION = "Describe this video in one sentence."  # the default retrieval prompt
TEXTS = ["a man rides a bike", "the cat sits on the mat", "red"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", noise(6, 48, 64, 3)))


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(noise(40, 60, 3))


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(modules=[VLJEPAModule(tiny_model(), tiny_processor())], device="cpu")


def test_sentence_transformer_embeds_every_kind_of_input_like_the_model(model, image, clip):
    tiny, processor = model[0].model, model[0].processor
    with torch.no_grad():
        texts = tiny.encode_target(**processor(targets=TEXTS))
        bare = tiny.predict(**processor(images=[image], text=CAPTION))
        asked = tiny.predict(**processor(images=[image], text="what is it ?"))
        video = tiny.predict(**processor(videos=[clip], text=CAPTION))
    np.testing.assert_allclose(model.encode(TEXTS), texts, atol=1e-6)
    np.testing.assert_allclose(model.encode([image]), bare, atol=1e-6)
    np.testing.assert_allclose(model.encode([clip]), video, atol=1e-6)
    question = [{"image": image, "text": "what is it ?"}]
    np.testing.assert_allclose(model.encode(question), asked, atol=1e-6)
    assert (asked - bare).abs().max() > 1e-4  # the query changes the embedding
    assert model.get_embedding_dimension() == 24


def test_sentence_transformer_prompt_is_the_query_of_media(model, image, clip):
    tiny, processor = model[0].model, model[0].processor
    model.prompts |= tiny.config.prompts  # as in a saved model's folder

    def predicted(text: str) -> np.ndarray:
        with torch.no_grad():
            return tiny.predict(**processor(images=[image], text=text)).numpy()

    asked = model.encode([image], prompt="what is it ?")
    np.testing.assert_allclose(asked, predicted("what is it ?"), atol=1e-6)
    named = model.encode([image], prompt_name="action")
    np.testing.assert_allclose(named, predicted("What is the action shown?"), atol=1e-6)
    # An empty prompt means none: `encode_query` and `encode_document` pass one.
    for embeds in (model.encode([image], prompt=""), model.encode_document([image])):
        np.testing.assert_allclose(embeds, predicted(CAPTION), atol=1e-6)
    empty = model.encode([{"image": image, "text": ""}])
    np.testing.assert_allclose(empty, predicted(""), atol=1e-6)

    question = {"image": image, "text": "what color ?"}
    filled = model.encode([question], prompt="answer: {} now")
    np.testing.assert_allclose(filled, predicted("answer: what color ? now"), atol=1e-6)
    filled = model.encode([question], prompt_name="question")
    np.testing.assert_allclose(filled, predicted("what color ?"), atol=1e-6)
    with pytest.raises(ValueError, match="prompt is 'who .', .*its text 'what color .': leave one"):
        model.encode([question], prompt="who ?")
    for each in (image, clip):
        with pytest.raises(ValueError, match="prompt 'answer: {}' is a template: give the text"):
            model.encode([each], prompt="answer: {}")

    texts = model.encode(["red"], prompt="a "), model.encode(["red"], prompt="a {}")
    expected = model.encode(["a red"])
    for embeds in texts:
        np.testing.assert_allclose(embeds, expected, atol=1e-6)


def test_sentence_transformer_keeps_the_order_of_a_mixed_batch(model, image, clip):
    mixed = model.encode([TEXTS[0], clip, TEXTS[1], {"video": clip, "text": "what ?"}])
    texts, bare = model.encode(TEXTS[:2]), model.encode([clip])
    np.testing.assert_allclose(mixed[[0, 2]], texts, atol=1e-5)
    np.testing.assert_allclose(mixed[1], bare[0], atol=1e-5)
    assert np.abs(mixed[3] - mixed[1]).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-6)


def test_sentence_transformer_similarity_and_evaluator(model, image, clip):
    similarity = model.similarity(model.encode([image, clip]), model.encode(TEXTS))
    expected = model.encode([image, clip]) @ model.encode(TEXTS).T
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    best = TEXTS[int(expected[1].argmax())]
    evaluator = InformationRetrievalEvaluator(
        queries={"q": best},
        corpus={"image": image, "clip": clip},
        relevant_docs={"q": {"image", "clip"}},
        accuracy_at_k=[1],
        precision_recall_at_k=[1],
        map_at_k=[1],
        mrr_at_k=[1],
        ndcg_at_k=[1],
        name="t2v",
    )
    assert evaluator(model)["t2v_cosine_accuracy@1"] == 1.0


def test_sentence_transformer_trainer_learns_text_and_image_pairs(tmp_path):
    torch.manual_seed(0)
    module = VLJEPAModule(tiny_model(freeze_vision=False), tiny_processor(num_frames=2))
    model = SentenceTransformer(modules=[module], device="cpu")
    pictures = [Image.fromarray(picture) for picture in noise(4, 40, 40, 3)]
    pairs = Dataset.from_dict({"anchor": pictures, "positive": ["red", "green", "a cat", "a dog"]})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=30,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] > 1.2 and losses[-1] < 0.2
    changed = {
        n.split(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == {"x_encoder", "predictor", "predictor_head", "y_encoder", "y_head"}


def test_sentence_transformer_rejects_broken_checkpoints(tmp_path):
    """Weights that are missing, and weights that are NaN."""
    VLJEPAModule(tiny_model(), tiny_processor()).save(str(tmp_path))
    path, name = tmp_path / "model.safetensors", "y_head.projection.weight"
    weights = load_file(path)
    save_file(weights | {name: weights[name] * torch.nan}, path, {"format": "pt"})
    loaded = SentenceTransformer(modules=[VLJEPAModule.load(str(tmp_path))], device="cpu")
    with pytest.raises(ValueError, match="an embedding of this model is not finite"):
        loaded.encode(TEXTS)
    del weights[name]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights are missing, such as {name}"):
        VLJEPAModule.load(str(tmp_path))
