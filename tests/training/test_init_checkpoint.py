"""A VL-JEPA of pretrained parts contains their weights and computes the same outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from tests import sources
from tests.tiny import TEXTS, tiny_recipe, tiny_rows
from training.arguments import RecipeError
from training.init_checkpoint import main
from training.model.backbones import LLAMA_3_PAD, PREDICTORS, choose_pad_token, read_text
from training.train import main as train

PIXELS = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The paper's three formats: V-JEPA 2, a Llama of ten layers, EmbeddingGemma."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "vision": sources.vision(folder / "vision"),
        "predictor": sources.language_model(folder / "predictor"),
        "text": sources.sentence_transformer(folder / "text"),
    }


def build(
    parts: dict[str, Path], output: Path, *options: str, **changes: Path
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """Run the command and load its result as a user does."""
    given = {**parts, **changes}
    arguments = [word for part, path in given.items() for word in (f"--{part}", str(path))]
    main([*arguments, "--output", str(output), *options])
    return AutoModel.from_pretrained(output).eval(), AutoProcessor.from_pretrained(output)


@pytest.fixture(scope="module")
def built(parts, tmp_path_factory) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    return build(parts, tmp_path_factory.mktemp("built"), "--layers", "2")


# -- the same tensors ----------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {k: v for shard in shards for k, v in load_file(shard).items()}


def test_init_checkpoint_stores_every_tensor_of_its_parts_bitwise(tmp_path):
    """Sources are bf16, as many are published, and the result has several shards."""
    dtype = torch.bfloat16
    parts = {
        "vision": sources.vision(tmp_path / "vision", dtype=dtype),
        "predictor": sources.language_model(tmp_path / "predictor", dtype=dtype),
        "text": sources.encoder_decoder(tmp_path / "text", "t5"),
    }
    AutoModel.from_pretrained(parts["text"], dtype=dtype).save_pretrained(parts["text"])
    model, _ = build(parts, tmp_path / "out", "--layers", "2", "--max-shard-size", "100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    stored = weights_of(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    vision, language, text = (weights_of(parts[part]) for part in parts)
    expected = {
        f"x_encoder.backbone.{k}": v for k, v in vision.items() if not k.startswith("predictor.")
    }
    for name, tensor in language.items():
        name = name.removeprefix("model.")
        for kept, old in ((0, 8), (1, 9)):
            name = name.replace(f"layers.{old}.", f"layers.new{kept}.")
        if "layers." not in name or "new" in name:
            expected[f"predictor.backbone.{name.replace('new', '')}"] = tensor
    encoder = {k.removeprefix("encoder."): v for k, v in text.items() if k[:8] == "encoder."}
    expected |= {f"y_encoder.backbone.{k}": v for k, v in encoder.items()}
    expected["y_encoder.backbone.embed_tokens.weight"] = text["shared.weight"]
    assert len(expected) > 60
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    new = {name.split(".")[0] for name in stored.keys() - expected.keys()}
    assert new == {"predictor", "predictor_head", "y_head", "logit_scale"}
    assert "predictor.visual_projection.weight" in stored.keys() - expected.keys()


def test_init_checkpoint_does_not_round_parts_of_different_precision(parts, tmp_path):
    half = sources.language_model(tmp_path / "half", dtype=torch.bfloat16)
    model, _ = build(parts, tmp_path / "out", predictor=half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    gemma = weights_of(parts["text"])
    assert torch.equal(model.y_encoder.backbone.norm.weight, gemma["norm.weight"])


def test_read_predictor_reads_only_shards_of_the_wanted_layers(parts, tmp_path):
    """Shards of the other layers may be missing: only a part of a language model is fetched."""
    folder = tmp_path / "partial"
    shutil.copytree(parts["predictor"], folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for name, file in index.items() if "layers." not in name or ".9." in name}
    unwanted = set(index.values()) - wanted
    assert len(unwanted) > 3
    for file in unwanted:
        (folder / file).unlink()
    model, _ = build(parts, tmp_path / "out", "--layers", "1", predictor=folder)
    assert model.config.predictor_config.num_hidden_layers == 1
    with pytest.raises(RecipeError, match=r"lacks model-\d+-of-\d+\.safetensors"):
        build(parts, tmp_path / "other", "--layers", "2", predictor=folder)


def test_saved_configuration_contains_no_local_path(parts, tmp_path):
    build(parts, tmp_path / "out")
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert str(tmp_path.parent) not in text and str(parts["text"]) not in text


# -- the same results ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", sources.VISION)
def test_visual_tokens_equal_the_stock_encoders(kind, parts, tmp_path):
    folder = sources.vision(tmp_path / "vision", kind)
    model, processor = build(parts, tmp_path / "out", vision=folder)
    stock = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = model.encode_video(PIXELS)
        if "vjepa" in kind:
            padded = torch.cat([PIXELS, PIXELS[:, -1:]], dim=1)
            options = {"skip_predictor": True} if kind == "vjepa2" else {}
            expected = stock(padded, **options).last_hidden_state
        else:
            tower = stock.vision_model if kind in ("clip", "siglip") else stock
            frames = [tower(pixel_values=PIXELS[:, t]).last_hidden_state for t in range(3)]
            if kind in ("resnet", "convnext"):
                frames = [frame.flatten(2).transpose(1, 2) for frame in frames]
                assert processor.video_processor.size == {"shortest_edge": 36}  # 32 / 0.875
            expected = torch.cat(frames, dim=1)
    # The two files hold the weights at other addresses, so MKL may round another last bit.
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert processor.video_processor.crop_size["height"] == 32
    settings = sources.PREPROCESSOR[kind]
    for name in settings.keys() & {"image_mean", "image_std"}:
        assert list(processor.video_processor.to_dict()[name]) == settings[name]
    batch = processor(videos=[torch.zeros(4, 3, 50, 70, dtype=torch.uint8)], text="what ?")
    assert model.predict(**batch).shape == (1, 1536)


@pytest.mark.parametrize(
    ("kind", "layers"), [(kind, "2") for kind in PREDICTORS] + [("llama", "1-4")]
)
def test_predictor_equals_layers_of_the_language_model_without_its_mask(
    kind, layers, parts, tmp_path
):
    folder = sources.language_model(tmp_path / "lm", kind)
    model, _ = build(parts, tmp_path / "out", "--layers", layers, predictor=folder)
    stock = AutoModel.from_pretrained(folder).eval()
    first, last = (8, 10) if layers == "2" else (1, 4)
    stock.layers = stock.layers[first:last]
    stock.config.num_hidden_layers = last - first
    visual = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(3, 250, (2, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = model.predictor(visual, ids)[0].last_hidden_state
        embeds = torch.cat([model.predictor.visual_projection(visual), stock.embed_tokens(ids)], 1)
        full = torch.zeros(2, 1, 11, 11)  # added to the attention scores: nothing is masked
        expected, causal = (
            stock(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
            for mask in (full, None)
        )
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert (states - causal).abs().max() > 1e-3  # positive control: the mask matters


@pytest.mark.parametrize("kind", ["gemma", "qwen3", "bert"])
def test_targets_equal_sentence_transformers(kind, parts, tmp_path):
    """Pooling, Dense layers, normalisation, special tokens and length limit are read."""
    folder = sources.sentence_transformer(tmp_path / "text", kind)
    model, processor = build(parts, tmp_path / "out", "--no-target-projection", text=folder)
    stock = SentenceTransformer(str(folder), device="cpu")
    texts = [*TEXTS, "x", "a very long text " * 200]
    expected = stock.encode(texts, convert_to_tensor=True)
    with torch.no_grad():
        embeds = model.encode_target(**processor(targets=texts, max_target_length=4096))
        torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
        # Matryoshka: the first dimensions, normalised again.
        short = model.encode_target(**processor(targets=list(TEXTS)), truncate_dim=8)
        small = SentenceTransformer(str(folder), device="cpu", truncate_dim=8)
        expected = small.encode(list(TEXTS), convert_to_tensor=True, normalize_embeddings=True)
        torch.testing.assert_close(short, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="truncate_dim is 99, but an embedding has"):
        model.encode_target(**processor(targets="x"), truncate_dim=99)


def test_read_text_keeps_the_published_length_limit(parts, tmp_path):
    """MiniLM's limit is 256 tokens in sentence_bert_config.json, 512 in its tokenizer."""
    folder = Path(shutil.copytree(parts["text"], tmp_path / "text"))
    limit = {"max_seq_length": 8, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limit))
    _, processor = build(parts, tmp_path / "out", "--no-target-projection", text=folder)
    stock = SentenceTransformer(str(folder), device="cpu")
    long = "a very long text " * 20
    tokens = processor(targets=long, max_target_length=4096)["target_input_ids"]
    assert tokens.shape == (1, 8) == stock.preprocess([long])["input_ids"].shape


def test_target_prompts_come_with_the_text_encoder(parts, tmp_path, built):
    stock = SentenceTransformer(str(parts["text"]), device="cpu")
    model, processor = build(
        parts, tmp_path / "out", "--no-target-projection", "--target-prompt", "document"
    )
    assert processor.target_prompts == sources.PROMPTS
    with torch.no_grad():
        for options, prompt in (({}, "document"), ({"target_prompt_name": "query"}, "query")):
            embeds = model.encode_target(**processor(targets=list(TEXTS), **options))
            expected = stock.encode(list(TEXTS), prompt_name=prompt, convert_to_tensor=True)
            torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    plain = stock.encode(list(TEXTS), convert_to_tensor=True)
    assert (plain - expected).abs().max() > 1e-3  # positive control: a prompt matters
    assert built[1].target_prompt_name is None  # sentence-transformers' own default
    with pytest.raises(ValueError, match="no target prompt 'nothing', only"):
        processor(targets="x", target_prompt_name="nothing")


def test_without_dense_leaves_out_the_dense_layers(parts, tmp_path):
    """AutoModel reads EmbeddingGemma without them, and so did other VL-JEPA implementations."""
    model, processor = build(parts, tmp_path / "out", "--without-dense", "--no-target-projection")
    assert len(model.y_encoder.dense) == 0 and model.config.embedding_dim == 32
    transformer, pooling, *_ = SentenceTransformer(str(parts["text"]), device="cpu")
    stock = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    expected = torch.nn.functional.normalize(stock.encode(list(TEXTS), convert_to_tensor=True))
    embeds = model.encode_target(**processor(targets=list(TEXTS)))
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


def test_clip_text_tower_equals_clips_own_projection(parts, tmp_path):
    folder = sources.vision(tmp_path / "clip", "clip")
    model, processor = build(parts, tmp_path / "out", "--no-target-projection", text=folder)
    stock = AutoModel.from_pretrained(folder).eval()
    batch = processor(targets=list(TEXTS))
    with torch.no_grad():
        embeds = model.encode_target(**batch)
        ids, mask = batch["target_input_ids"], batch["target_attention_mask"]
        expected = stock.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    expected = torch.nn.functional.normalize(expected)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "alone"), [("t5", False), ("m2m_100", False), ("m2m_100", True)])
def test_read_text_takes_the_encoder_of_an_encoder_decoder(kind, alone, parts, tmp_path):
    folder = sources.encoder_decoder(tmp_path / "text", kind, encoder_alone=alone)
    model, processor = build(parts, tmp_path / "out", "--no-target-projection", text=folder)
    if alone:
        stock = type(model.y_encoder.backbone).from_pretrained(folder).eval()
    else:
        stock = AutoModel.from_pretrained(folder).get_encoder().eval()
    batch = processor(targets=list(TEXTS))
    ids, mask = batch["target_input_ids"], batch["target_attention_mask"]
    with torch.no_grad():
        states = stock(input_ids=ids, attention_mask=mask).last_hidden_state
        means = torch.stack([s[m.bool()].mean(0) for s, m in zip(states, mask, strict=True)])
        embeds = model.encode_target(**batch)
    torch.testing.assert_close(embeds, torch.nn.functional.normalize(means), rtol=0, atol=1e-6)
    assert not any("decoder" in name for name, _ in model.y_encoder.named_parameters())


# -- padding -------------------------------------------------------------------------------


def test_choose_pad_token_takes_llama_3s_reserved_token(parts, tmp_path):
    """If its end-of-text token were padding, the real ends of texts would be masked."""
    tokenizer = sources.tokenizer_of(parts["predictor"])
    tokenizer.add_special_tokens({"additional_special_tokens": [LLAMA_3_PAD]})
    tokenizer.pad_token = tokenizer.eos_token
    assert choose_pad_token(tokenizer, None) == LLAMA_3_PAD
    folder = sources.language_model(tmp_path / "lm", vocab_size=310)
    tokenizer.save_pretrained(folder)
    model, processor = build(parts, tmp_path / "out", predictor=folder)
    pad = tokenizer.convert_tokens_to_ids(LLAMA_3_PAD)
    assert model.config.predictor_config.pad_token_id == pad
    batch = processor(text=["a man <eos> rides", "a"])
    assert batch["input_ids"][1, -1] == pad
    eos = batch["input_ids"][0] == tokenizer.eos_token_id
    assert eos.sum() == 1 and batch["attention_mask"][0][eos] == 1


def test_choose_pad_token_refuses_the_end_of_text_token(parts, tmp_path):
    folder = sources.language_model(tmp_path / "lm")
    tokenizer = sources.tokenizer_of(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"--pad-token: .* among \['<pad>', '<bos>', '<eos>'\]"):
        build(parts, tmp_path / "out", predictor=folder)
    _, processor = build(parts, tmp_path / "out", "--pad-token", "<pad>", predictor=folder)
    assert processor.tokenizer.pad_token == "<pad>"
    with pytest.raises(RecipeError, match="--pad-token: the query tokenizer has no token 'nope'"):
        build(parts, tmp_path / "other", "--pad-token", "nope", predictor=folder)


# -- the Predictor's layers, frames and pooling ----------------------------------------------


def test_init_checkpoint_without_layers_reads_the_norm_and_the_token_table(parts, built, tmp_path):
    rows = tiny_rows(tmp_path)
    model, processor = build(parts, tmp_path / "out", "--layers", "0", "--calibrate", str(rows))
    backbone, other = model.predictor.backbone, built[0].predictor.backbone
    assert len(backbone.layers) == 0
    torch.testing.assert_close(backbone.norm.weight, other.norm.weight)
    torch.testing.assert_close(backbone.embed_tokens.weight, other.embed_tokens.weight)
    inputs = processor(text=["what ?"], return_tensors="pt")
    pixels = torch.zeros(1, 2, 3, 32, 32)
    predicted = model.predict(pixel_values_videos=pixels, **inputs)
    assert predicted.isfinite().all()


def test_init_checkpoint_new_layers_initialises_the_layers_alone(parts, built, tmp_path):
    model, _ = build(parts, tmp_path / "out", "--layers", "2", "--new-layers")
    old, new = built[0].state_dict(), model.state_dict()
    backbones = [name for name in old if ".backbone." in name]
    changed = {name for name in backbones if not torch.equal(old[name], new[name])}
    layers = ("predictor.backbone.layers.", "predictor.backbone.norm.")
    assert changed == {name for name in backbones if name.startswith(layers)}
    assert torch.equal(new["predictor.backbone.norm.weight"], torch.ones(32))


def test_init_checkpoint_takes_the_frames_and_the_pooling_of_the_training(parts, tmp_path):
    options = ("--layers", "1", "--num-frames", "4", "--image-size", "64")
    model, processor = build(parts, tmp_path / "out", *options, "--visual-token-pooling", "2")
    video = processor.video_processor
    assert (video.num_frames, video.size["shortest_edge"]) == (4, 64)
    assert (video.crop_size["height"], video.crop_size["width"]) == (64, 64)
    assert model.config.visual_token_pooling == 2


def test_init_checkpoint_rejects_a_class_token_of_an_encoder_without_one(parts, tmp_path):
    with pytest.raises(RecipeError, match="concatenate_class_token is true, but .*'vjepa2'"):
        build(parts, tmp_path / "out", "--layers", "1", "--concatenate-class-token")
    assert not (tmp_path / "out").exists()


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "11"), "--layers: 11 is not within the model's 10 layers"),
        (("--layers", "4-11"), "--layers: 4-11 is not within the model's 10"),
        (("--layers", "3-3"), "--layers: 3-3 is not within"),
        (("--layers", "0-0"), "--layers: 0-0 is not within"),
        (("--layers", "all"), "--layers: 'all' is neither a number nor a range of layers"),
        (("--embedding-dim", "8", "--no-target-projection"), "space is the Y-Encoder's own of 24"),
        (("--pooling", "max"), r"text_pooling is 'max': expected one of \('mean', 'cls'"),
        (("--target-prompt", "nope"), "--text: there is no target prompt 'nope'"),
    ],
)
def test_init_checkpoint_names_a_wrong_option(options, message, parts, tmp_path):
    with pytest.raises(RecipeError, match=message):
        build(parts, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "source", "message"),
    [
        ("vision", "nowhere", "--vision: cannot load .*nowhere as a folder or Hub id"),
        ("vision", "predictor", "--vision: .* is a 'llama', which has no"),
        (
            "predictor",
            "vision",
            "--predictor: .* is a 'vjepa2'; give a decoder-only language model",
        ),
        ("predictor", "text", "--predictor: .* is a 'gemma3_text'"),
        ("text", "vision", "--text: "),  # it has no tokenizer
    ],
)
def test_init_checkpoint_names_a_wrong_backbone(option, source, message, parts, tmp_path):
    folder = parts.get(source, tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=message):
        build(parts, tmp_path / "out", **{option: folder})
    assert not (tmp_path / "out").exists()


def test_init_checkpoint_names_a_missing_image_processor(parts, tmp_path):
    plain = sources.vision(tmp_path / "plain", "dinov2")
    (plain / "preprocessor_config.json").unlink()
    with pytest.raises(RecipeError, match="--vision: .* has no preprocessor_config.json"):
        build(parts, tmp_path / "out", vision=plain)
    assert not (tmp_path / "out").exists()


def test_init_checkpoint_names_broken_weights(parts, tmp_path):
    def copy(part: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(parts[part], tmp_path / "copy"))

    def refused(message: str, **changes: Path) -> None:
        with pytest.raises(RecipeError, match=message):
            build(parts, tmp_path / "out", "--layers", "2", **changes)

    folder = copy("predictor")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index["model.layers.9.mlp.up_proj.weight"]
    shard.write_bytes(shard.read_bytes()[:100])
    refused("--predictor: a weight file of .* is broken", predictor=folder)

    folder = copy("vision")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused("checkpoint given for x_encoder lacks .*encoder.layernorm.weight", vision=folder)

    config = json.loads((folder / "config.json").read_text())
    changed = json.dumps(config | {"hidden_size": 96})
    (folder / "config.json").write_text(changed)
    message = r"--vision: .* has encoder.* of shape .*48.*, but its config.json gives .*96"
    refused(message, vision=folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "48"}))
    refused("--vision: cannot load .* Field 'hidden_size' expected int, got str", vision=folder)

    folder = copy("text")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused("--text: ", text=folder)  # nothing is unpickled


@pytest.fixture
def text_folder(parts, tmp_path) -> Path:
    """A copy of the text encoder that a test may change."""
    return Path(shutil.copytree(parts["text"], tmp_path / "text"))


def test_read_text_names_an_unsupported_module(text_folder):
    modules = json.loads((text_folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.LayerNorm"
    (text_folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RecipeError, match=r"has a module sentence_transformers.models.LayerNorm"):
        read_text("--text", str(text_folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode": "max"}, "the pooling 'max' is not one of mean, cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean_tokens"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves the prompt out is not supp"),
    ],
)
def test_read_text_names_an_unsupported_pooling(settings, message, text_folder):
    (text_folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RecipeError, match=message):
        read_text("--text", str(text_folder))


def test_read_text_reads_the_older_layout_of_a_pooling(text_folder):
    """EmbeddingGemma was published in it."""
    settings = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (text_folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert read_text("--text", str(text_folder)).pooling == "mean"


def test_init_checkpoint_overwrites_nothing(parts, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(RecipeError, match="is not empty; give a new folder"):
        build(parts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# -- the table, and training from the result -----------------------------------------------


def test_paper_table_counts_the_parameters(parts, tmp_path, capsys):
    model, _ = build(parts, tmp_path / "out", "--layers", "3")
    lines = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    whole = AutoModelForCausalLM.from_pretrained(parts["predictor"]).model
    layers = sum(p.numel() for p in [*whole.layers[7:].parameters(), *whole.norm.parameters()])
    new = 48 * 32 + 32 + 32 * 1536 + 1536
    everything = sum(p.numel() for p in model.parameters())
    assert lines["Predictor"][:2] == [f"{(layers + new) / 1e6:.1f}M", "490M"]
    assert lines["all"][:2] == [f"{everything / 1e6:.1f}M", "1.6B"]
    assert lines["X-Encoder"][1] == "304M" and lines["Y-Encoder"][1] == "300M"


def test_predict_accepts_several_queries_for_one_video(built):
    model, processor = built
    queries = processor(text=["what ?", "where is the red thing ?", ""])
    with torch.no_grad():
        visual_embeds = model.encode_video(PIXELS[:1])
        together = model.predict(visual_embeds=visual_embeds, **queries)
        alone = model.predict(PIXELS[:1].expand(3, -1, -1, -1, -1), **queries)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="2 videos and 3 queries: give one query for each"):
        model.predict(PIXELS, **queries)


@pytest.mark.parametrize("kind", ["vjepa2", "vjepa2_1", "dinov2", "resnet"])
def test_init_checkpoint_result_can_be_trained(kind, parts, tmp_path):
    folder = sources.vision(tmp_path / "vision", kind)
    build(parts, tmp_path / "built", vision=folder)
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=2)
    trainer = train([str(recipe), f"model.checkpoint={tmp_path / 'built'}", "model.config={}"])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert len(rates) == 2  # the pretrained Y-Encoder's is lower
    before, after = AutoModel.from_pretrained(tmp_path / "built"), trainer.model
    after = dict(after.named_parameters())
    same = {name for name, p in before.named_parameters() if torch.equal(p, after[name])}
    assert {name.split(".")[0] for name in same} == {"x_encoder", "predictor"}  # the token table
    assert not any(".layers." in name and name.startswith("predictor") for name in same)
