"""The scores of pipelines are those of the model, for every form and batch of samples."""

import json
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, pipeline
from transformers import CLIPImageProcessorPil as StockImageProcessor

from modeling_vljepa import (
    VLJEPAForConditionalGeneration,
    VLJEPAForZeroShotImageClassification,
    VLJEPAModel,
)
from modeling_vljepa.pipelines import fetching, pipeline_vljepa
from modeling_vljepa.pipelines.clip_library import ClipLibrary
from modeling_vljepa.pipelines.pipeline_vljepa import (
    VLJEPARetrievalPipeline,
    VLJEPAVisualQuestionAnsweringPipeline,
    VLJEPAZeroShotClassificationPipeline,
)
from processing import MediaError, VLJEPAProcessor, read_clip, read_image
from tests.pipelines.rounding import approximately, clear_choices
from tests.tiny import noise, run_elsewhere, tiny_model, tiny_processor, tiny_writer, write_clip

QUESTION = "what is the dog doing ?"
DESCRIBE = "Describe this video in one sentence."  # the default caption and retrieval prompt
ANSWERS = ["red", "a cat", "it rides a bike", "blue green"]


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("media")
    image = Image.fromarray(noise(40, 60, 3))
    image.save(folder / "image.png")
    return SimpleNamespace(
        folder=folder,
        wide=write_clip(folder / "wide.mp4", noise(6, 48, 64, 3)),
        tall=write_clip(folder / "tall.mkv", 255 - noise(9, 64, 40, 3)),
        flat=write_clip(folder / "flat.mp4", np.full((5, 48, 48, 3), 90, np.uint8)),
        image=folder / "image.png",
    )


@pytest.fixture(scope="module")
def vqa(model, processor) -> VLJEPAVisualQuestionAnsweringPipeline:
    return VLJEPAVisualQuestionAnsweringPipeline(model=model, processor=processor)


@pytest.fixture(scope="module")
def retrieval(model, processor) -> VLJEPARetrievalPipeline:
    return VLJEPARetrievalPipeline(model=model, processor=processor)


@pytest.fixture(scope="module")
def zero_shot(model, processor) -> VLJEPAZeroShotClassificationPipeline:
    return VLJEPAZeroShotClassificationPipeline(model=model, processor=processor)


@torch.no_grad()
def cosines(model, processor, query: str, texts: list[str], **medium) -> dict[str, float]:
    """Compute the cosine of one medium and each text with the model alone."""
    predicted = model.predict(**processor(text=query, **medium))
    rows = [predicted @ model.encode_target(**processor(targets=text)).T for text in texts]
    return {text: row.item() for text, row in zip(texts, rows, strict=True)}


def scores(results: list[dict], label: str = "answer") -> dict[str, float]:
    ranked = [result["score"] for result in results]
    assert ranked == sorted(ranked, reverse=True)
    return {result[label]: result["score"] for result in results}


def close(expected: dict, tolerance: float = 1e-6) -> object:
    return pytest.approx(expected, abs=tolerance)


# -- question answering --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["video", "image"])
def test_vqa_scores_are_the_cosines_of_the_model(vqa, model, processor, media, kind):
    medium = media.wide if kind == "video" else media.image
    expected = cosines(model, processor, QUESTION, ANSWERS, **{f"{kind}s": medium})
    found = vqa(**{kind: medium}, question=QUESTION, candidates=ANSWERS)
    assert scores(found) == close(expected)
    assert len(set(expected.values())) == 4  # positive control
    best = vqa(**{kind: medium}, question=QUESTION, candidates=ANSWERS, top_k=2)
    assert best == approximately(found[:2])

    logits = torch.tensor([expected[text] for text in ANSWERS]) * model.logit_scale().item()
    by_hand = dict(zip(ANSWERS, logits.softmax(0).tolist(), strict=True))
    calibrated = vqa(
        **{kind: medium}, question=QUESTION, candidates=ANSWERS, top_k=2, calibrated=True
    )
    assert [each["answer"] for each in calibrated] == [each["answer"] for each in found[:2]]
    assert scores(calibrated) == close(
        {each["answer"]: by_hand[each["answer"]] for each in found[:2]},
        tolerance=1e-5,  # the temperature multiplies the error of a cosine
    )
    # A probability depends on the other candidates, a cosine does not.
    alone = vqa(**{kind: medium}, question=QUESTION, candidates=ANSWERS[:1])
    assert alone == [{"answer": "red", "score": pytest.approx(expected["red"], abs=1e-6)}]


def test_vqa_gives_one_result_for_every_form_of_a_medium(vqa, media):
    frames = read_clip(media.wide).frames
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    content = media.wide.read_bytes()
    undecoded = {"bytes": content, "path": None}
    expected = approximately(vqa(video=media.wide, question=QUESTION, candidates=ANSWERS))
    for video in (str(media.wide), content, frames, tensor, pictures, undecoded):
        assert vqa(video=video, question=QUESTION, candidates=ANSWERS) == expected
        assert vqa({"video": video, "question": QUESTION}, candidates=ANSWERS) == expected
    still = np.array(Image.open(media.image))
    expected = approximately(vqa(image=media.image, question=QUESTION, candidates=ANSWERS))
    for image in (media.image.read_bytes(), Image.open(media.image), still):
        assert vqa(image=image, question=QUESTION, candidates=ANSWERS) == expected
    for bare in (media.image, Image.open(media.image), still):
        assert vqa(bare, question=QUESTION, candidates=ANSWERS) == expected


def test_vqa_takes_the_calls_of_the_pipeline_that_transformers_had(vqa, media):
    image, options = Image.open(media.image), {"candidates": ANSWERS, "top_k": 2}
    expected = approximately(vqa(image=media.image, question=QUESTION, **options))
    assert len(expected) == 2
    assert vqa(image, QUESTION, **options) == expected
    assert vqa(str(media.image), QUESTION, **options) == expected
    assert vqa({"image": image, "question": QUESTION}, **options) == expected
    assert vqa([image, image], QUESTION, **options) == [expected, expected]
    with pytest.raises(ValueError, match="question is a list: give a string"):
        vqa(image, [QUESTION], **options)


def test_vqa_results_do_not_depend_on_batches_or_order(vqa, media):
    samples = [
        {"video": str(media.wide), "question": QUESTION},
        {"image": str(media.image), "question": "open the door and close the window"},
        {"video": str(media.tall), "question": "what ?"},
        {"image": str(media.image), "question": "what ?"},
        {"video": str(media.wide), "question": "a"},
    ]
    alone = [scores(vqa(sample, candidates=ANSWERS)) for sample in samples]
    assert len({each["red"] for each in alone}) == 5  # positive control

    def assert_same(found, expected=alone):
        assert [scores(each) for each in found] == [close(each) for each in expected]

    for batch_size in (1, 2, 3, 8):
        assert_same(vqa(samples, candidates=ANSWERS, batch_size=batch_size))
    assert_same(vqa(samples[::-1], candidates=ANSWERS, batch_size=2), alone[::-1])
    assert_same(vqa(samples, candidates=ANSWERS, batch_size=2, num_workers=2))
    assert_same(vqa(tuple(samples), candidates=ANSWERS))
    assert vqa([], candidates=ANSWERS) == []
    rows = datasets.Dataset.from_list([{"image": None, "video": None} | one for one in samples])
    assert_same(vqa(rows, candidates=ANSWERS, batch_size=2))
    assert_same(vqa(rows.to_iterable_dataset(), candidates=ANSWERS, batch_size=4))
    assert_same(vqa((one for one in samples), candidates=ANSWERS, num_workers=2))

    read = []
    results = vqa((read.append(0) or sample for sample in samples), candidates=ANSWERS)
    next(results)
    assert len(read) < 4  # samples are read lazily
    assert_same(results, alone[1:])


def test_vqa_embeds_candidates_once_for_all_calls_and_pipelines(processor, media, monkeypatch):
    model = tiny_model()
    counts = []
    encode = model.encode_target

    def counting(target_input_ids, *args, **kwargs):
        counts.append(len(target_input_ids))
        return encode(target_input_ids, *args, **kwargs)

    monkeypatch.setattr(model, "encode_target", counting)
    vqa = VLJEPAVisualQuestionAnsweringPipeline(model=model, processor=processor)
    samples = [{"video": media.wide, "question": "a"}] * 5
    first = vqa(samples, candidates=ANSWERS, batch_size=2)
    assert counts == [4]
    assert vqa(samples, candidates=ANSWERS, batch_size=2) == first
    VLJEPARetrievalPipeline(model=model, processor=processor)(samples[0], texts=ANSWERS)
    assert counts == [4]
    many = [f"answer {number}" for number in range(150)]
    vqa(samples[0], candidates=many)
    assert counts[1:] == [64, 64, 22]


def test_vqa_without_candidates_uses_the_answers_of_the_model(processor, media, tmp_path):
    tiny_model(answers=ANSWERS).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.answers == ANSWERS
    vqa = VLJEPAVisualQuestionAnsweringPipeline(model=model, processor=processor)
    given = vqa(video=media.wide, question=QUESTION, candidates=ANSWERS)
    for _ in range(2):
        assert vqa(video=media.wide, question=QUESTION) == approximately(given)
    with torch.no_grad():
        model.y_head.projection.weight.mul_(-1)
    given = vqa(video=media.wide, question=QUESTION, candidates=ANSWERS)
    assert vqa(video=media.wide, question=QUESTION) == approximately(given)
    model.config.answers = ["red", "another"]
    assert scores(vqa(video=media.wide, question=QUESTION)).keys() == {"red", "another"}
    model.config.answers = []
    with pytest.raises(ValueError, match="candidates is missing.*nor a Y-Decoder to write one"):
        vqa(video=media.wide, question=QUESTION)


# -- decoded answers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer() -> VLJEPAForConditionalGeneration:
    model = tiny_writer(decoder_reads_query=True)
    # A random decoder's logits are almost equal, and so are the scores of its beams.
    with torch.no_grad():
        model.y_decoder.backbone.lm_head.weight *= 10
    return model


def test_vqa_without_candidates_decodes_the_answer(writer, processor, media):
    vqa = VLJEPAVisualQuestionAnsweringPipeline(model=writer, processor=processor)
    with clear_choices(writer):
        found = vqa(video=media.wide, question=QUESTION, generate_kwargs={"max_new_tokens": 6})
    with torch.no_grad():
        predicted = writer.vljepa.predict(**processor(videos=media.wide, text=QUESTION))
    context = processor(contexts=f"{QUESTION}\n")
    tokens = writer.generate(predicted_embeds=predicted, **context, max_new_tokens=6)
    [text] = processor.batch_decode(tokens, skip_special_tokens=True)
    expected = cosines(writer.vljepa, processor, QUESTION, [text.strip()], videos=media.wide)
    assert scores(found) == close(expected)
    # The question changes the answer, through the embedding and through the decoder's context.
    other = vqa(video=media.wide, question="what ?", generate_kwargs={"max_new_tokens": 6})
    assert other[0]["answer"] != found[0]["answer"]
    chosen = vqa(video=media.wide, question=QUESTION, candidates=ANSWERS)
    by_hand = cosines(writer.vljepa, processor, QUESTION, ANSWERS, videos=media.wide)
    assert scores(chosen) == close(by_hand)


def test_vqa_ranks_decoded_answers_like_candidates(writer, processor, media):
    vqa = VLJEPAVisualQuestionAnsweringPipeline(model=writer, processor=processor)
    samples = [{"video": media.wide, "question": QUESTION}, {"image": media.image, "question": "a"}]
    how = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5}
    alone = [vqa(sample, generate_kwargs=how) for sample in samples]
    assert [len(each) for each in alone] == [3, 3]
    together = vqa(samples, generate_kwargs=how, batch_size=2)
    assert [scores(each) for each in together] == [close(scores(each)) for each in alone]
    ranked = vqa(samples[0], candidates=[each["answer"] for each in alone[0]][::-1])
    assert scores(ranked) == close(scores(alone[0]))
    assert vqa(samples[0], generate_kwargs=how, top_k=1) == approximately(alone[0][:1])


def test_vqa_rejects_generate_kwargs_with_candidates(writer, processor, media):
    vqa = VLJEPAVisualQuestionAnsweringPipeline(model=writer, processor=processor)
    with pytest.raises(ValueError, match="generate_kwargs.*chosen from candidates: leave it out"):
        vqa(video=media.wide, question="a", candidates=ANSWERS, generate_kwargs={"num_beams": 2})


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny_writer, {}), (tiny_model, {"candidates": ANSWERS})],
    ids=["with_decoder", "without_decoder"],
)
def test_pipeline_loads_the_decoder_if_the_folder_has_one(
    processor, media, tmp_path, make, options
):
    model, folder = make(), tmp_path / "model"
    VLJEPAVisualQuestionAnsweringPipeline(model=model, processor=processor).save_pretrained(folder)
    loaded = pipeline("visual-question-answering", model=str(folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == type(model).__name__
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    # Not compared with `model` itself: weights in memory round differently from the same weights
    # in a file, and 64 greedy tokens of a random decoder may then be others.
    same = VLJEPAVisualQuestionAnsweringPipeline(
        model=type(model).from_pretrained(folder), processor=processor
    )
    asked = {"video": media.wide, "question": QUESTION} | options
    assert loaded(**asked) == approximately(same(**asked))


@pytest.fixture(scope="module")
def saved_writer(writer, processor, tmp_path_factory) -> str:
    """Folder with the pipelines of a model with a Y-Decoder and answers of its own."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    writer.config.answers = ANSWERS
    VLJEPAVisualQuestionAnsweringPipeline(model=writer, processor=processor).save_pretrained(folder)
    writer.config.answers = []
    return str(folder)


def test_image_text_to_text_pipeline_decodes_the_answer(saved_writer, media):
    def load(task):
        return pipeline(task, model=saved_writer, trust_remote_code=True)

    write, vqa = load("image-text-to-text"), load("visual-question-answering")
    vqa.model.config.answers = []
    how = {"max_new_tokens": 6}
    [answer] = vqa(image=media.image, question=QUESTION, generate_kwargs=how)
    expected = [{"input_text": QUESTION, "generated_text": answer["answer"]}]
    image = Image.open(media.image)
    assert write(images=image, text=QUESTION, max_new_tokens=6) == expected
    assert write(image, text=QUESTION, generate_kwargs=how) == expected
    assert write([image, image], QUESTION, max_new_tokens=6) == [expected, expected]
    with pytest.raises(ValueError, match="text is a list: give a string"):
        write(text=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
    with pytest.raises(ValueError, match="text is a NoneType: give a string"):
        write(image)


def test_image_text_to_text_pipeline_needs_a_decoder(model, processor, tmp_path):
    retrieval = VLJEPARetrievalPipeline(model=model, processor=processor)
    retrieval.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="this checkpoint has no Y-Decoder"):
        pipeline("image-text-to-text", model=str(tmp_path / "model"), trust_remote_code=True)


def test_zero_shot_image_pipeline_of_a_saved_folder(saved_writer, writer, processor, media):
    classify = pipeline(
        "zero-shot-image-classification", model=saved_writer, trust_remote_code=True
    )
    texts = [f"This is a photo of {label}." for label in ANSWERS]
    by_hand = cosines(writer.vljepa, processor, DESCRIBE, texts, images=media.image)
    logits = torch.tensor(list(by_hand.values())) * writer.vljepa.logit_scale().item()
    expected = dict(zip(ANSWERS, logits.softmax(0).tolist(), strict=True))
    image = Image.open(media.image)
    found = classify(image, ANSWERS)
    assert scores(found, "label") == close(expected, tolerance=1e-5)  # probabilities
    both = classify([image, str(media.image)], candidate_labels=ANSWERS, batch_size=2)
    assert both == [approximately(found, tolerance=1e-5)] * 2
    plain = classify(image, ANSWERS, hypothesis_template="{}", calibrated=False)
    by_hand = cosines(writer.vljepa, processor, DESCRIBE, ANSWERS, images=media.image)
    assert scores(plain, "label") == close(by_hand)


def test_feature_extraction_pipeline_is_refused(saved_writer):
    """transformers' own would return the temperature as the features of a text."""
    extract = pipeline("feature-extraction", model=saved_writer, trust_remote_code=True)
    with pytest.raises(ValueError, match="forward needs a video .* or a target .*processor"):
        extract("a cat")


def test_vqa_takes_default_parameters_when_it_is_made(model, processor, media, vqa):
    once = VLJEPAVisualQuestionAnsweringPipeline(
        model=model, processor=processor, candidates=ANSWERS, top_k=1, question=QUESTION
    )
    expected = vqa(video=media.wide, question=QUESTION, candidates=ANSWERS)
    assert once(media.wide) == approximately(expected[:1])
    assert once(media.wide, top_k=3) == approximately(expected[:3])


# -- classification ------------------------------------------------------------------------


def test_zero_shot_puts_labels_into_the_template(zero_shot, model, processor, media):
    labels = ["riding", "sitting", "{odd}"]
    query = "What is the action shown?"
    found = zero_shot(media.wide, candidate_labels=labels)
    assert scores(found, "label") == close(
        cosines(model, processor, query, labels, videos=media.wide)
    )
    texts = [f"a {{man}} {label} there" for label in labels]
    expected = cosines(model, processor, "who ?", texts, images=media.image)
    found = zero_shot(
        image=media.image,
        candidate_labels=labels,
        hypothesis_template="a {man} {} there",
        query="who ?",
    )
    named = {label: expected[text] for label, text in zip(labels, texts, strict=True)}
    assert scores(found, "label") == close(named)
    both = zero_shot([media.wide, media.image], candidate_labels=labels, batch_size=2)
    assert [len(each) for each in both] == [3, 3]
    assert scores(both[0], "label") == close(
        cosines(model, processor, query, labels, videos=media.wide)
    )


def test_zero_shot_pipeline_of_transformers_loads_a_vljepa_model(model, processor, media, tmp_path):
    """Run `zero-shot-image-classification` on a checkpoint of a `VLJEPAModel`."""
    model.save_pretrained(tmp_path / "model")
    classifier = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "model")
    assert type(classifier) is VLJEPAForZeroShotImageClassification
    state = model.state_dict()
    assert all(torch.equal(state[n], w) for n, w in classifier.vljepa.state_dict().items())
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    found = {n for n, weight in classifier.vljepa.named_parameters() if not weight.requires_grad}
    assert found == frozen and len(frozen) > 10

    size = {"height": 32, "width": 32}
    pipe = pipeline(
        "zero-shot-image-classification",
        model=classifier,
        tokenizer=processor.target_tokenizer,
        image_processor=StockImageProcessor(
            size={"shortest_edge": 36},
            resample=2,
            crop_size=size,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        device="cpu",
    )
    image = Image.open(media.image)
    answers = pipe([image, image], ANSWERS, hypothesis_template="{}", batch_size=2)
    pixels = pipe.image_processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = model.predict(pixels[:, None])
        targets = model.encode_target(**processor(targets=ANSWERS))
        expected = (model.logit_scale() * predicted @ targets.T).softmax(-1)[0].tolist()
    for results in answers:
        by_hand = dict(zip(ANSWERS, expected, strict=True))
        assert scores(results, "label") == close(by_hand, tolerance=1e-5)  # probabilities

    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModel.from_pretrained(tmp_path / "classifier")
    assert type(again) is VLJEPAModel
    assert all(torch.equal(state[name], weight) for name, weight in again.state_dict().items())


# -- retrieval -----------------------------------------------------------------------------


def test_retrieval_ranks_texts_for_a_video_and_videos_for_a_text(
    retrieval, model, processor, media
):
    found = retrieval(video=media.wide, texts=ANSWERS)
    expected = cosines(model, processor, DESCRIBE, ANSWERS, videos=media.wide)
    assert scores(found, "text") == close(expected)

    videos = [media.wide, str(media.tall), read_clip(media.flat).frames]
    by_hand = [cosines(model, processor, "who ?", ["red"], videos=video)["red"] for video in videos]
    order = np.argsort(by_hand)[::-1].tolist()
    found = retrieval(text="red", videos=videos, query="who ?", batch_size=2)
    assert [each["index"] for each in found] == order
    assert [each["score"] for each in found] == pytest.approx(sorted(by_hand)[::-1], abs=1e-6)
    assert all(each["video"] is videos[each["index"]] for each in found)
    best = retrieval(text="red", videos=videos, query="who ?", top_k=1, calibrated=True)
    share = (torch.tensor(by_hand) * model.logit_scale().item()).softmax(0).max().item()
    assert best[0]["index"] == order[0] and len(best) == 1
    assert best[0]["score"] == pytest.approx(share, abs=1e-5)


@pytest.fixture(scope="module")
def library(retrieval, media) -> Path:
    """Library of twelve clips, made from these and two that cannot be read."""
    clips = []
    for seed in range(12):
        frames = np.random.default_rng(seed).integers(0, 256, (4, 3, 3, 3), np.uint8)
        frames = frames.repeat(16, 1).repeat(16, 2)
        clips.append(write_clip(media.folder / f"{seed}.mp4", frames))
    (media.folder / "text.mp4").write_text("no video")
    clips[3:3] = [media.folder / "text.mp4", media.folder / "gone.mp4"]
    retrieval.build_library(clips, media.folder / "library", batch_size=5)
    return media.folder / "library"


def test_library_search_equals_brute_force(retrieval, model, processor, media, library):
    loaded = retrieval.load_library(library)
    assert [Path(each["video"]).name for each in loaded.unreadable] == ["text.mp4", "gone.mp4"]
    assert "no such file" in loaded.unreadable[1]["reason"]
    clips = [media.folder / f"{seed}.mp4" for seed in range(12)]
    assert datasets.load_from_disk(library)["video"][:] == [str(clip) for clip in clips]
    assert loaded.query == DESCRIBE

    found = retrieval.search(ANSWERS, library, top_k=12)
    for text, results in zip(ANSWERS, found, strict=True):
        by_hand = {
            str(clip): cosines(model, processor, DESCRIBE, [text], videos=clip)[text]
            for clip in clips
        }
        assert scores(results, "video") == close(by_hand)
    best = [each["video"] for each in found[0]]
    assert best != [each["video"] for each in found[1]]
    for top_k in (3, 100):
        alone = retrieval.search(ANSWERS[0], loaded, top_k=top_k)
        assert [each["video"] for each in alone] == best[:top_k]


def test_build_library_names_and_counts_unreadable_clips(retrieval, media, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(pipeline_vljepa.logger, "warning", warnings.append)
    gone = tmp_path / "gone.mp4"
    made = retrieval.build_library([media.wide, gone, media.flat], tmp_path / "library")
    assert len(made.dataset) == 2 and len(made.unreadable) == 1
    assert warnings[0].startswith("1 of 3 clips cannot be read:\n") and str(gone) in warnings[0]
    with pytest.raises(ValueError, match="none could be read; no library was written"):
        retrieval.build_library([gone], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="output_dir: .*library already exists"):
        retrieval.build_library([media.wide], tmp_path / "library")


def test_library_search_rejects_a_library_of_another_model(
    retrieval, model, processor, library, tmp_path
):
    good = retrieval.search("red", library)
    half = tiny_model().to(torch.bfloat16)
    rounded = VLJEPARetrievalPipeline(model=half, processor=processor).search("red", library)
    assert [each["score"] for each in rounded] == pytest.approx(
        [each["score"] for each in good], abs=2e-2
    )
    for head in ("predictor_head", "y_head"):  # the probe covers both sides of the space
        other = tiny_model()
        torch.nn.init.normal_(other.get_submodule(head).projection.weight)
        pipe = VLJEPARetrievalPipeline(model=other, processor=processor)
        with pytest.raises(ValueError, match="library: it was made with another model"):
            pipe.search("red", library)
    wider = VLJEPARetrievalPipeline(model=tiny_model(embedding_dim=20), processor=processor)
    with pytest.raises(ValueError, match="library: it was made with another model"):
        wider.search("red", library)
    with pytest.raises(ValueError, match="has no library.json"):
        retrieval.search("red", tmp_path)
    assert retrieval.search("red", library) == approximately(good)


# -- invalid requests ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("vqa", {"question": None}, "question is missing"),
        ("vqa", {"question": " "}, "question is empty: give a text"),
        ("vqa", {"question": 7}, "question is a int"),
        ("vqa", {"candidates": []}, "candidates is empty"),
        ("vqa", {"candidates": "red"}, "candidates is a str"),
        ("vqa", {"candidates": ["red", None]}, r"candidates\[1\] is a NoneType"),
        ("vqa", {"candidates": ["red", ""]}, r"candidates\[1\] is empty"),
        ("vqa", {"candidates": None}, "candidates is missing"),
        ("vqa", {"video": None}, "give either video, image or a list"),
        ("vqa", {"image": "a.png"}, "got video and image"),
        ("vqa", {"video": "gone.mp4"}, "video: gone.mp4: no such file"),
        ("vqa", {"video": "x" * 5000}, r"video: x{50}\.\.\.: no such file"),
        ("vqa", {"video": b"no video"}, "video: 8 bytes: cannot be opened"),
        ("vqa", {"video": None, "image": b"no image"}, "image: 8 bytes: not an image"),
        ("vqa", {"video": 7}, "video is a int"),
        ("vqa", {"video": "http://127.0.0.1/a.mp4"}, "video is a URL.*allow_urls=True"),
        ("vqa", {"video": np.zeros((2, 3, 8, 8), np.uint8)}, "video: a clip is an array"),
        ("vqa", {"top_k": 0}, "top_k is 0"),
        ("vqa", {"top_k": 1.5}, "top_k is 1.5"),
        ("zero_shot", {"candidate_labels": None}, "candidate_labels is missing"),
        ("zero_shot", {"hypothesis_template": "x"}, "template is 'x' and has {} 0 times: put {}"),
        ("zero_shot", {"hypothesis_template": "{}" * 1000}, r"has \{\} 1000 times: put \{\} once"),
        ("zero_shot", {"hypothesis_template": 7}, "hypothesis_template is a int"),
        ("zero_shot", {"query": 3}, "query is a int"),
        ("retrieval", {"texts": None}, "texts is missing"),
        ("retrieval", {"text": "red"}, "videos.*missing"),
        ("retrieval", {"text": "red", "videos": ["a"]}, "not both"),
        (
            "retrieval",
            {"video": None, "texts": None, "text": "red", "videos": []},
            "videos is empty",
        ),
        (
            "retrieval",
            {"video": None, "texts": None, "text": "", "videos": ["a"]},
            "text is empty",
        ),
    ],
)
def test_pipeline_rejects_a_malformed_request_and_serves_the_next(
    request, media, task, changes, message
):
    pipe = request.getfixturevalue(task)
    good = {
        "vqa": {"question": QUESTION, "candidates": ANSWERS},
        "zero_shot": {"candidate_labels": ANSWERS},
        "retrieval": {"texts": ANSWERS},
    }[task] | {"video": media.wide}
    expected = pipe(**good)
    with pytest.raises(ValueError, match=message):
        pipe(**good | changes)
    assert pipe(**good) == approximately(expected)


LONG = "a" * 100_000  # the longest text that pipelines take
HALF = json.loads(r'"\ud83d"')  # valid JSON, but half a character


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("vqa", {"question": LONG + "a"}, "question has 100001 characters: give at most 100000"),
        ("vqa", {"candidates": ["a", LONG + "a"]}, r"candidates\[1\] has 100001 characters"),
        ("vqa", {"candidates": ["a"] * 10_000 + [LONG]}, "has 10001 texts of up to 100000 char"),
        ("retrieval", {"query": LONG + "a"}, "query has 100001 characters"),
        ("retrieval", {"texts": [LONG + "a"]}, r"texts\[0\] has 100001 characters"),
        (
            "zero_shot",
            {"candidate_labels": ["red", LONG], "hypothesis_template": "a man {}"},
            r"candidate_labels\[1\] in hypothesis_template has 100006 characters: give at most",
        ),
        (
            "zero_shot",
            {"candidate_labels": ["red"] * 10_001, "hypothesis_template": LONG[3:] + "{}"},
            "candidate_labels in hypothesis_template has 10001 texts of up to 100000 characters: "
            "give fewer or shorter ones; number times length is at most 1000000000",
        ),
        ("vqa", {"question": HALF}, r"question holds half a character, '\\ud83d': cut texts"),
        ("vqa", {"candidates": ["red", f"a {HALF}"]}, r"candidates\[1\] holds half a character"),
        ("retrieval", {"texts": ["red", HALF]}, r"texts\[1\] holds half a character"),
        ("retrieval", {"query": HALF}, "query holds half a character"),
        (
            "retrieval",
            {"video": None, "texts": None, "text": HALF, "videos": ["a"]},
            "text holds half a character",
        ),
        ("zero_shot", {"candidate_labels": [HALF]}, r"candidate_labels\[0\] holds half"),
        ("zero_shot", {"hypothesis_template": f"{{}}{HALF}"}, "hypothesis_template holds half"),
    ],
)
def test_pipeline_limits_and_checks_texts(request, media, task, changes, message):
    good = {
        "vqa": {"question": QUESTION, "candidates": ANSWERS},
        "zero_shot": {"candidate_labels": ANSWERS},
        "retrieval": {"texts": ANSWERS},
    }[task] | {"video": media.wide}
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(task)(**good | changes)


def test_retrieval_checks_texts_of_libraries(retrieval, media, tmp_path):
    with pytest.raises(ValueError, match="query holds half a character"):
        retrieval.build_library([media.wide], tmp_path / "library", query=HALF)
    with pytest.raises(ValueError, match=r"text\[1\] holds half a character"):
        retrieval.search(["red", HALF], tmp_path / "library")


def test_vqa_rejects_an_unknown_parameter(vqa, media):
    with pytest.raises(TypeError, match="'answers'"):
        vqa(video=media.wide, question=QUESTION, answers=ANSWERS)


def test_vqa_names_the_index_of_a_broken_input(vqa, media):
    good = {"video": media.wide, "question": QUESTION}
    samples = [good, good, {"video": media.folder / "gone.mp4", "question": "a"}, good]
    for broken, message in (
        (samples, "input 2: video: .*gone.mp4: no such file"),
        ([good, {"question": "a"}], "input 1: neither video nor image given"),
        ([good, 7], "input 1: a int may be a video"),
        ([good, {"video": media.wide}], "input 1: question is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            vqa(broken, candidates=ANSWERS, batch_size=2)
    results = vqa((sample for sample in samples), candidates=ANSWERS)
    assert next(results) == approximately(next(results))
    with pytest.raises(ValueError, match="input 2: video: .*no such file"):
        next(results)


# -- numbers that are not finite -----------------------------------------------------------


def broken_pipe(kind: type, part: str, processor: VLJEPAProcessor) -> Any:
    """Return a pipeline of a model with one NaN in the weights of a part."""
    model = tiny_model()
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).view(-1)[0] = torch.nan
    return kind(model=model, processor=processor)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("predictor_head", "a predicted embedding of this model is not finite"),
        ("y_head", "a target embedding of this model is not finite"),
        ("logit_scale", "logit_scale of this model is not finite"),
    ],
)
def test_pipelines_reject_numbers_that_are_not_finite(processor, media, tmp_path, part, message):
    vqa = broken_pipe(VLJEPAVisualQuestionAnsweringPipeline, part, processor)
    ask = {"question": QUESTION, "candidates": ANSWERS, "calibrated": True}
    with pytest.raises(ValueError, match=message):
        vqa(video=media.wide, **ask)
    with pytest.raises(ValueError, match=message):
        vqa([media.wide, media.image], **ask, batch_size=2)
    retrieval = broken_pipe(VLJEPARetrievalPipeline, part, processor)
    with pytest.raises(ValueError, match=message):
        retrieval(text="red", videos=[media.wide], calibrated=True)
    if part == "logit_scale":
        assert len(vqa(video=media.wide, **ask | {"calibrated": False})) == 4  # it is not used
    else:
        with pytest.raises(ValueError, match=message):
            retrieval.build_library([media.wide], tmp_path / "library")
        assert not (tmp_path / "library").exists()


def test_library_rejects_numbers_that_are_not_finite(retrieval, library, tmp_path):
    made = ClipLibrary.load(library)
    videos, embeds = made.dataset["video"][:], torch.tensor(made.dataset["embedding"][:])
    kept = {"query": DESCRIBE, "unreadable": []}
    probe, broken = made.probe, embeds.clone()
    broken[5, 3] = torch.nan
    with pytest.raises(ValueError, match="library: the embedding of .*5.mp4 is not finite"):
        ClipLibrary.from_embeddings(videos, broken, probe=probe, **kept)
    with pytest.raises(ValueError, match="library: its probe is not finite"):
        ClipLibrary.from_embeddings(videos, embeds, probe=probe * torch.nan, **kept)
    # A library that another program wrote.
    dataset = made.dataset.map(lambda row, index: {"embedding": broken[index]}, with_indices=True)
    ClipLibrary(dataset, DESCRIBE, probe, []).save(tmp_path / "embedding")
    with pytest.raises(ValueError, match="library .*/embedding: the embedding of .*5.mp4 is not"):
        retrieval.search("red", tmp_path / "embedding")
    ClipLibrary(made.dataset, DESCRIBE, probe * torch.nan, []).save(tmp_path / "probe")
    with pytest.raises(ValueError, match="library .*/probe: its probe is not finite"):
        retrieval.search("red", tmp_path / "probe")
    with pytest.raises(ValueError, match="library: it was made with another model"):
        ClipLibrary(made.dataset, DESCRIBE, probe * torch.nan, []).check_model(probe)
    with pytest.raises(ValueError, match="library: it was made with another model"):
        made.check_model(probe * torch.nan)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, float("nan"), True])
def test_build_library_rejects_a_batch_size_that_is_no_whole_number(
    retrieval, media, tmp_path, batch_size
):
    with pytest.raises(ValueError, match="batch_size is .*: give a whole number of at least 1"):
        retrieval.build_library([media.wide], tmp_path / "library", batch_size=batch_size)


# -- addresses and files -------------------------------------------------------------------


@contextmanager
def serve(folder: Path):
    """Serve a folder's files on loopback; `/file` and `/ftp` redirect to `file:` and `ftp:`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in ("/file", "/ftp"):
                self.send_response(302)
                self.send_header("Location", f"{self.path[1:]}://127.0.0.1{folder}/wide.mp4")
                self.end_headers()
                return
            path = folder / self.path.strip("/")
            self.send_response(200 if path.is_file() else 404)
            self.end_headers()
            self.wfile.write(path.read_bytes() if path.is_file() else b"")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_vqa_fetches_addresses_if_the_caller_allows_it(vqa, media, monkeypatch):
    expected = vqa(video=media.wide, question=QUESTION, candidates=ANSWERS)
    ask = {"question": QUESTION, "candidates": ANSWERS, "allow_urls": True}
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # some machines have a proxy
    with serve(media.folder) as address:
        assert vqa(video=f"{address}/wide.mp4", **ask) == approximately(expected)
        with pytest.raises(ValueError, match="pass allow_urls=True"):
            vqa(video=f"{address}/wide.mp4", **ask | {"allow_urls": False})
        with pytest.raises(ValueError, match="gone.mp4: cannot be fetched .*404"):
            vqa(video=f"{address}/gone.mp4", **ask)
        with pytest.raises(ValueError, match="/file: cannot be fetched"):
            vqa(video=f"{address}/file", **ask)
        with pytest.raises(ValueError, match="/ftp: cannot be fetched .*unknown url type"):
            vqa(video=f"{address}/ftp", **ask)
        monkeypatch.setattr(fetching, "MAX_URL_BYTES", 1000)
        with pytest.raises(ValueError, match="larger than 1000 bytes"):
            vqa(video=f"{address}/wide.mp4", **ask)
        monkeypatch.setattr(fetching, "MAX_URL_BYTES", 10**9)
    with pytest.raises(ValueError, match="cannot be fetched"):
        vqa(video=f"{address}/wide.mp4", **ask)  # the server has stopped


@contextmanager
def drip(start: bytes):
    """Serve `start`, and then one byte each 0.05 s, on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def answer():
        connection, _ = listener.accept()
        connection.recv(2**16)
        try:
            connection.sendall(start)
            while not ended.wait(0.05):
                connection.sendall(b"a")
        except OSError:
            ended.set()  # the client has gone

    threading.Thread(target=answer, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.mp4", ended
    ended.set()
    listener.close()


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Endless: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/",
    ],
    ids=["status", "header", "body", "redirect"],
)
def test_fetch_ends_at_its_time_limit(monkeypatch, start):
    monkeypatch.setattr(fetching, "MAX_URL_SECONDS", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with drip(start) as (address, ended):
        begin = time.monotonic()
        with pytest.raises(ValueError, match=f"{address}: took longer than 0.5 seconds"):
            fetching.fetch(address)
        assert time.monotonic() - begin < 5
        assert ended.wait(10)  # the connection is closed, not left open in the background


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://[",
        "http://127.0.0.1:port/a",
        "http://127.0.0.1:99999999/a",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\u00fc",
        "http://127.0.0.1/\ud83d",
        "http://\ud83d/",
        "http://127.0.0.1\r\nHost: a/",
        f"http://{'a' * 300}/",
        "http://.../",
    ],
)
def test_vqa_names_a_malformed_address(vqa, monkeypatch, address):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ValueError, match="^http.*cannot be fetched .*Check the address") as raised:
        vqa(video=address, question="a", candidates=["red"], allow_urls=True)
    assert str(raised.value).isprintable()


def test_readers_let_ffmpeg_open_no_other_file_or_address(media, tmp_path, monkeypatch):
    """FFmpeg opens the files that a playlist names, and takes some strings for addresses."""
    shutil.copy(media.wide, tmp_path)
    script = f"ffconcat version 1.0\nfile {media.wide.name}\n".encode()
    path = tmp_path / "list.mp4"
    path.write_bytes(script)
    with av.open(str(path)) as container:  # positive control: it reads the other file
        assert container.format.name == "concat"
        assert len(list(container.decode(video=0))) == 6
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for source in (path, script):
            with pytest.raises(MediaError, match="cannot be opened as a video"):
                read_clip(source)
    opened = []
    plain = av.open
    monkeypatch.setattr(av, "open", lambda file, **k: opened.append(file) or plain(file, **k))
    for scheme in ("http://127.0.0.1:1/", "file:", "concat:", "data:video/mp4;base64,", "tcp://"):
        for reader in (read_clip, read_image):
            with pytest.raises(MediaError, match="no such file"):
                reader(f"{scheme}{media.wide}")
    assert opened == []
    read_clip(media.wide)
    assert opened and not any(isinstance(file, str | Path) for file in opened)


def test_readers_read_bytes_like_files(media):
    for path in (media.wide, media.tall):
        for frames in (None, 4):
            expected, found = read_clip(path, frames), read_clip(path.read_bytes(), frames)
            np.testing.assert_array_equal(found.frames, expected.frames)
            np.testing.assert_array_equal(found.timestamps, expected.timestamps)
    np.testing.assert_array_equal(read_image(media.image.read_bytes()), read_image(media.image))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(MediaError, match="not an image"):
        read_image(postscript)


def test_processor_rejects_long_videos_and_large_frames(media):
    processor = tiny_processor()
    limits = processor.video_processor
    processor(videos=media.tall, targets="a")
    limits.max_seconds, limits.max_pixels = 0.5, 64 * 48
    processor(videos=media.wide)  # six frames, the last after 0.5 s
    with pytest.raises(MediaError, match="tall.mkv: longer than 0.5 seconds"):
        processor(videos=media.tall)
    processor(images=media.image)
    limits.max_pixels = 40 * 60 - 1
    with pytest.raises(MediaError, match="image.png: 60 x 40 pixels, but at most 2399"):
        processor(images=media.image)
    with pytest.raises(MediaError, match="wide.mp4: 64 x 48 pixels, but at most 2399"):
        processor(videos=media.wide)
    assert not {"max_seconds", "max_pixels"} & limits.to_dict().keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL warns of oddities in a file
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_readers_raise_only_media_errors_for_damaged_bytes(suffix, media, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix in ("mp4", "mkv"):
        content, reader = write_clip(path, noise(6, 48, 64, 3)).read_bytes(), read_clip
    else:
        Image.fromarray(noise(40, 60, 3)).save(path)
        content, reader = path.read_bytes(), read_image
    draw, refused = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = np.frombuffer(content, np.uint8).copy()
        indices = draw.integers(0, min(len(content), 400), 8)
        damaged[indices] = draw.integers(0, 256, 8)
        try:
            reader(damaged[: draw.integers(1, len(content))].tobytes())
        except MediaError as error:
            refused += 1
            assert " bytes: " in str(error)
    assert refused > 5


# -- without this package ------------------------------------------------------------------


@pytest.mark.slow
def test_saved_pipelines_answer_without_this_package(model, processor, media, vqa, tmp_path):
    retrieval = VLJEPARetrievalPipeline(model=tiny_model(), processor=processor)
    retrieval.save_pretrained(tmp_path / "model")
    expected = vqa(video=media.wide, question=QUESTION, candidates=ANSWERS)
    ranked = retrieval(video=media.wide, texts=ANSWERS)
    script = f"""
import json
from transformers import pipeline
def load(task):
    return pipeline(
        task, model={str(tmp_path / "model")!r}, trust_remote_code=True, device="cpu"
    )
vqa = load("visual-question-answering")
assert type(vqa).__module__.startswith("transformers_modules"), type(vqa)
clip, answers = {str(media.wide)!r}, {ANSWERS!r}
print(json.dumps([
    vqa(video=clip, question={QUESTION!r}, candidates=answers),
    load("video-text-retrieval")(video=clip, texts=answers),
    load("zero-shot-video-classification")(video=clip, candidate_labels=answers)[0]["label"],
]))
"""
    answers, texts, label = json.loads(run_elsewhere(script, tmp_path))
    assert scores(answers) == close(scores(expected))
    assert scores(texts, "text") == close(scores(ranked, "text"))
    assert label in ANSWERS
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("visual-question-answering", model=str(tmp_path / "model"))
