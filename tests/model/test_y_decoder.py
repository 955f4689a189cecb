"""The Y-Decoder: learning, loss, generation, checkpoints and rejected inputs."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)

from modeling_vljepa import (
    VLJEPAConfig,
    VLJEPAForConditionalGeneration,
    VLJEPAModel,
    decode_texts,
)
from processing import VLJEPAProcessor
from tests.tiny import (
    DECODER,
    TEXTS,
    run_elsewhere,
    tiny_batch,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    tiny_writer,
)

EOS = DECODER["eos_token_id"]


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


def labels_of(processor: VLJEPAProcessor, texts: list[str]) -> torch.Tensor:
    """Return labels `(B, L)` built by hand: each text's tokens and an end token."""
    tokens = [
        [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts
    ]
    longest = max(map(len, tokens))
    return torch.tensor([ids + [-100] * (longest - len(ids)) for ids in tokens])


def points(count: int, seed: int = 0) -> torch.Tensor:
    """Return random unit vectors `(count, 24)`."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 24, generator=generator), dim=1)


def teach(model: VLJEPAForConditionalGeneration, steps: int = 100, **batch: torch.Tensor) -> float:
    """Train the Y-Decoder for a few steps on one batch; return the last loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.y_decoder.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


# -- learning --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(processor) -> VLJEPAForConditionalGeneration:
    """A model whose decoder has learnt three texts from their embeddings."""
    model = tiny_writer()
    assert teach(model, predicted_embeds=points(3), labels=labels_of(processor, TEXTS[:3])) < 0.05
    return model


def test_decoder_overfits_three_embeddings(taught, processor):
    assert decode_texts(taught, processor, points(3)) == list(TEXTS[:3])
    assert decode_texts(taught, processor, points(3).flip(0)) == list(TEXTS[2::-1])
    nearby = F.normalize(points(3) + 0.02 * points(3, seed=1), dim=1)
    assert decode_texts(taught, processor, nearby) == list(TEXTS[:3])
    untaught = decode_texts(tiny_writer(), processor, points(3))  # positive control
    assert not set(untaught) & set(TEXTS)


def test_decoder_reads_only_the_direction_of_an_embedding(taught, processor):
    """The mean of a segment's embeddings is shorter than a unit vector."""
    assert decode_texts(taught, processor, 0.1 * points(3)) == list(TEXTS[:3])
    assert decode_texts(taught, processor, points(3), max_new_tokens=1) != list(TEXTS[:3])


def test_decoder_learns_the_end_of_a_text(taught, processor):
    tokens = taught.generate(predicted_embeds=points(3))
    lengths = [len(ids[ids != -100]) for ids in labels_of(processor, TEXTS[:3])]
    for row, length in zip(tokens, lengths, strict=True):
        assert row[length - 1] == EOS
        assert (row[length:] == DECODER["pad_token_id"]).all()


def test_decoder_decodes_one_embedding_by_its_context(processor):
    model = tiny_writer(decoder_reads_query=True)
    queries = ["what ?", "what is the dog doing ?"]
    contexts = [model.config.decoder_context(query) for query in queries]
    batch = processor(contexts=contexts)
    embeds = points(1).expand(2, -1)
    teach(model, predicted_embeds=embeds, labels=labels_of(processor, TEXTS[:2]), **batch)
    assert decode_texts(model, processor, embeds, queries=queries) == list(TEXTS[:2])


# -- loss and context ------------------------------------------------------------------------


def test_decoder_loss_equals_the_loop_over_tokens(processor):
    model = tiny_writer(decoder_reads_query=True)
    contexts = processor(contexts=["what ?\n", "open the door and close the window\n"])
    labels = labels_of(processor, TEXTS[:2])
    decoder, losses = model.y_decoder, []
    embed = decoder.backbone.get_input_embeddings()
    with torch.no_grad():
        found = model(predicted_embeds=points(2), labels=labels, **contexts).loss
        for row in range(2):
            prefix = decoder.prefix_projection(points(2)[row]).view(4, 32)
            real = contexts["context_attention_mask"][row].bool()
            sequence = torch.cat([embed(contexts["context_input_ids"][row][real]), prefix])
            for token in labels[row][labels[row] != -100]:
                logits = decoder.backbone(inputs_embeds=sequence[None]).logits[0, -1]
                losses.append(F.cross_entropy(logits, token))
                sequence = torch.cat([sequence, embed(token)[None]])
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=0)


def test_decoder_ignores_a_longer_context_in_the_batch(processor):
    model = tiny_writer(decoder_reads_query=True)
    queries = ["what ?", "open the door and close the window", "the cat sits on the mat"]
    contexts = processor(contexts=[f"{query}\n" for query in queries])
    # Taught, because scores of a random decoder nearly tie and rounding could decide.
    labels = labels_of(processor, TEXTS[:3])
    assert teach(model, predicted_embeds=points(3), labels=labels, **contexts) < 0.05
    assert decode_texts(model, processor, points(3), queries=queries) == list(TEXTS[:3])
    for row, query in enumerate(queries):
        alone = decode_texts(model, processor, points(3)[row : row + 1], queries=[query])
        assert alone == [TEXTS[row]]

    assert contexts["context_attention_mask"][:, -1].tolist() == [1, 1, 1]  # padded on the left
    assert contexts["context_attention_mask"][0, 0] == 0
    labels = labels_of(processor, TEXTS[:1])
    with torch.no_grad():
        batch = model(predicted_embeds=points(3), labels=labels.expand(3, -1), **contexts)
        short = processor(contexts=f"{queries[0]}\n")
        alone = model(predicted_embeds=points(3)[:1], labels=labels, **short)
        count = alone.logits.shape[1]
        torch.testing.assert_close(batch.logits[:1, -count:], alone.logits, atol=1e-5, rtol=0)
        # Positive control: without its mask, the padding would be read.
        contexts["context_attention_mask"] = torch.ones_like(contexts["context_attention_mask"])
        read = model(predicted_embeds=points(3), labels=labels.expand(3, -1), **contexts)
    assert (read.logits[0, -count:] - alone.logits[0]).abs().max() > 1e-3


def test_decoder_context_holds_the_configured_texts():
    def config(query: bool, previous: bool) -> VLJEPAConfig:
        return tiny_config(decoder_reads_query=query, decoder_reads_previous=previous)

    assert config(False, False).decoder_context("q", "p") == ""
    assert config(True, False).decoder_context("q", "p") == "q\n"
    assert config(False, True).decoder_context("q", "p") == "p\n"
    assert config(True, True).decoder_context("q", "p") == "q\np\n"
    assert config(True, True).decoder_context("q") == "q\n\n"


# -- arguments of transformers ---------------------------------------------------------------


def test_decoder_reads_the_prediction_for_pixels_and_query(processor):
    model, batch = tiny_writer(), tiny_batch()
    pixels = batch["pixel_values_videos"]
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        predicted = model.vljepa.predict(pixels, **given)
        seen = model.vljepa.encode_video(pixels)
    # Taught, because scores of a random decoder nearly tie and rounding could decide.
    labels = labels_of(processor, TEXTS[:3])
    assert teach(model, predicted_embeds=predicted, labels=labels, steps=200) < 0.05
    for inputs, texts in (
        ({"pixel_values_videos": pixels, **given}, TEXTS[:3]),
        ({"visual_embeds": seen, **given}, TEXTS[:3]),
        ({"predicted_embeds": predicted}, TEXTS[:3]),
        ({"predicted_embeds": predicted.flip(0)}, TEXTS[2::-1]),  # positive control
    ):
        tokens = model.generate(**inputs)
        assert processor.batch_decode(tokens, skip_special_tokens=True) == list(texts)
    by_pixels = model(pixels, **given, labels=labels)
    torch.testing.assert_close(by_pixels.predicted_embeds, predicted, rtol=0, atol=1e-6)
    by_embeds = model(predicted_embeds=predicted, labels=labels)
    torch.testing.assert_close(by_pixels.loss, by_embeds.loss, rtol=1e-5, atol=0)


def test_generate_accepts_the_arguments_of_transformers(taught, processor):
    def texts(**kwargs) -> list[str]:
        return decode_texts(taught, processor, points(3), **kwargs)

    assert texts(num_beams=3) == list(TEXTS[:3])
    several = texts(num_beams=4, num_return_sequences=2)
    assert len(several) == 6 and several[::2] == list(TEXTS[:3])
    assert taught.generate(predicted_embeds=points(3), max_new_tokens=2).shape == (3, 2)
    # As in transformers, `max_length` includes the input before the text: here the embedding.
    prefix = taught.config.decoder_prefix_tokens
    assert taught.generate(predicted_embeds=points(3), max_length=prefix + 2).shape == (3, 2)
    assert texts(generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=EOS)) == texts(
        max_new_tokens=2
    )
    stopped = texts(stop_strings=["rides"], tokenizer=processor.tokenizer)
    assert stopped[0] == "a man rides"
    torch.manual_seed(0)
    sampled = texts(do_sample=True, temperature=50.0)
    torch.manual_seed(0)
    assert texts(do_sample=True, temperature=50.0) == sampled != list(TEXTS[:3])


# -- saved and loaded ------------------------------------------------------------------------


def test_checkpoint_with_decoder_is_saved_and_loaded(processor, tmp_path):
    model = tiny_writer(decoder_config=DECODER | {"tie_word_embeddings": True})
    teach(model, predicted_embeds=points(3), labels=labels_of(processor, TEXTS[:3]))
    model.save_pretrained(tmp_path)
    loaded, info = VLJEPAForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    for some in (model, loaded):
        assert decode_texts(some, processor, points(3)) == list(TEXTS[:3])
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {n for n, weight in loaded.named_parameters() if not weight.requires_grad}

    without, info = VLJEPAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = model.vljepa.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in without.state_dict().items())
    assert type(AutoModel.from_pretrained(tmp_path)) is VLJEPAModel

    without.save_pretrained(tmp_path / "without")
    assert json.loads((tmp_path / "without/config.json").read_text())["decoder_config"] is None
    with pytest.raises(ValueError, match="no Y-Decoder.*train_decoder"):
        VLJEPAForConditionalGeneration.from_pretrained(tmp_path / "without")
    without.config.decoder_config = model.config.decoder_config
    without.config.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="lacks the weights of the Y-Decoder"):
        VLJEPAForConditionalGeneration.from_pretrained(tmp_path / "without")


def test_checkpoint_without_decoder_cannot_generate(tmp_path):
    model = tiny_model()
    assert model.config.decoder_config is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no Y-Decoder"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_processor_saves_and_loads_a_decoder_tokenizer(processor, tmp_path):
    own = tiny_tokenizer(("she reads a book",), vocab_size=270)
    three = VLJEPAProcessor(
        processor.video_processor,
        processor.tokenizer,
        processor.target_tokenizer,
        decoder_tokenizer=own,
    )
    three.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    text = "she reads a book"
    ids = {len(part(text)["input_ids"]) for part in (loaded.tokenizer, loaded.text_tokenizer)}
    assert len(ids) == 2  # positive control
    assert loaded.text_tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert loaded.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    ids = own(text, add_special_tokens=False)["input_ids"]
    assert loaded(contexts=text)["context_input_ids"].tolist() == [ids]
    assert loaded.batch_decode([ids]) == [loaded.decode(ids)] == [text]

    processor.save_pretrained(tmp_path / "two")
    two = AutoProcessor.from_pretrained(tmp_path / "two")
    assert two.decoder_tokenizer is None and two.text_tokenizer is two.tokenizer
    assert not (tmp_path / "two/decoder_tokenizer").exists()


@pytest.mark.slow
def test_decoder_loads_without_this_repository(taught, processor, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")  # like a trained model's, its config names the code
    torch.save(points(3), tmp_path / "embeds.pt")
    model = copy.deepcopy(taught)
    model.config.auto_map = VLJEPAConfig.from_pretrained(tmp_path / "base").auto_map
    model.save_pretrained(tmp_path / "model")
    VLJEPAProcessor(
        processor.video_processor,
        processor.tokenizer,
        processor.target_tokenizer,
        decoder_tokenizer=tiny_tokenizer(),
    ).save_pretrained(tmp_path / "model")
    printed = run_elsewhere(
        """
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
tokens = model.generate(predicted_embeds=torch.load("embeds.pt"))
print(processor.batch_decode(tokens, skip_special_tokens=True))
print(type(AutoModel.from_pretrained("model", trust_remote_code=True)).__name__)
""",
        tmp_path,
    )
    assert printed.splitlines() == [str(list(TEXTS[:3])), "VLJEPAModel"]


# -- rejected inputs -------------------------------------------------------------------------


def test_decoder_rejects_inputs_it_cannot_read(processor):
    model, embeds = tiny_writer(), points(1)
    pixels = tiny_batch()["pixel_values_videos"]
    with pytest.raises(ValueError, match="predicted_embeds, or the inputs to predict them from"):
        model.generate(pixels, predicted_embeds=embeds)
    with pytest.raises(ValueError, match="pixel_values_videos or visual_embeds"):
        model.generate()
    with pytest.raises(ValueError, match="reads the embedding alone"):
        model.generate(predicted_embeds=embeds, **processor(contexts="what ?"))
    assert model.generate(predicted_embeds=embeds, **processor(contexts="")).shape[0] == 1
    reading = tiny_writer(decoder_reads_previous=True)
    with pytest.raises(ValueError, match="context_input_ids is missing"):
        reading.generate(predicted_embeds=embeds)
    with pytest.raises(ValueError, match="context_input_ids holds the id 300"):
        reading.generate(predicted_embeds=embeds, context_input_ids=torch.tensor([[300]]))
    with pytest.raises(ValueError, match="context_attention_mask"):
        reading.generate(predicted_embeds=embeds, context_input_ids=torch.tensor([[0, 5]]))


# -- inputs that no text can be learnt or written from ------------------------------------


LABELS = torch.tensor([[5, 6, EOS], [7, EOS, -100]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": None}, "^labels is missing: give the tokens of the texts, or call generate"),
        (
            {"labels": LABELS[:0]},
            r"^labels has shape \(0, 3\): give \(batch, length\), each at lea",
        ),
        (
            {"labels": LABELS[:, :0]},
            r"^labels has shape \(2, 0\): give \(batch, length\), each at l",
        ),
        ({"labels": LABELS[0]}, r"^labels has shape \(3,\): give \(batch, length\)"),
        ({"labels": LABELS[:1]}, "^labels has 1 rows for 2 embeddings: give one for each"),
        ({"labels": LABELS.masked_fill(LABELS == 7, 300)}, "^labels holds the id 300, but the voc"),
        ({"labels": LABELS.masked_fill(LABELS == 7, -1)}, "^labels holds the id -1, but the vocab"),
        (
            {"labels": torch.tensor([[5, EOS], [-100, -100]])},
            "^labels has no token in row 1, only -100: end every text with the end token",
        ),
        (
            {"predicted_embeds": points(0)},
            r"^predicted_embeds has shape \(0, 24\): give \(batch, e",
        ),
        ({"predicted_embeds": points(1)[0]}, r"^predicted_embeds has shape \(24,\): give \(batch"),
        ({"predicted_embeds": points(2)[:, :9]}, "^predicted_embeds has 9 dimensions, but this Y-"),
        ({"context_input_ids": torch.ones(0, 4).long()}, r"^context_input_ids has shape \(0, 4\)"),
        ({"context_input_ids": torch.ones(3, 4).long()}, "^context_input_ids has 3 rows for 2 emb"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_y_decoder_rejects_inputs_without_rows_or_tokens(given, message, training):
    """Without a check, they give NaN, or an error of torch that names no tensor."""
    model = tiny_writer(decoder_reads_query=True).train(training)
    context = {"context_input_ids": torch.full((2, 1), 5)}
    good = {"predicted_embeds": points(2), "labels": LABELS, **context}
    with pytest.raises(ValueError, match=message):
        model(**good | given)
    if "labels" not in given:
        with pytest.raises(ValueError, match=message):
            model.generate(**{name: good[name] for name in ("predicted_embeds", *context)} | given)
    assert model(**good).loss.isfinite()


def test_y_decoder_rejects_texts_beyond_its_position_table():
    """A GPT-2 has such a table; unchecked, that is an index error."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = tiny_writer(decoder_config={**gpt2, "n_positions": 20, "eos_token_id": 2})
    prefix = model.config.decoder_prefix_tokens
    labels, embeds = torch.full((1, 21 - prefix), 5), points(1)
    assert model(predicted_embeds=embeds, labels=labels[:, 1:]).loss.isfinite()
    message = "have 21 positions, but the position table of this Y-Decoder ends at 20: shorten"
    with pytest.raises(ValueError, match=message):
        model(predicted_embeds=embeds, labels=labels)
    longest = {"max_new_tokens": 20 - prefix, "eos_token_id": None}
    assert model.generate(predicted_embeds=embeds, **longest).shape == (1, 20 - prefix)
    with pytest.raises(ValueError, match=message):
        model.generate(predicted_embeds=embeds, max_new_tokens=21 - prefix)
    assert tiny_writer().y_decoder.limit is None  # rotary positions
