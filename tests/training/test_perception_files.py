"""The Perception Encoder's published files: read as they are, checked by name and shape."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from modeling_vljepa import PerceptionEncoderVisionConfig, PerceptionEncoderVisionModel
from modeling_vljepa.y_encoder import YEncoder
from tests import sources
from tests.model.perception_reference import (
    encode_images,
    encode_texts,
    random_text,
    random_vision,
)
from tests.tiny import PERCEPTION, tiny_processor
from training.arguments import ModelArguments, ProcessorArguments, RecipeError
from training.init_checkpoint import main
from training.model import backbones, perception_files
from training.model.backbones import TextBackbone, VisionBackbone, read_text, read_vision
from training.model.checkpoint_files import public_name
from training.model.perception_files import Size, TextSize, read_text_tower, read_vision_tower
from training.model.recipe_model import load_processor

Weights = dict[str, torch.Tensor]

WIDTH, HEADS, TEXT_HEADS, CONTEXT = 64, 4, 2, 12
TOKENIZER = sources.clip_tokenizer()
CORE = Size("tiny core", WIDTH, 2, HEADS, 128, 14, 42, output=24, text=48)
TINY = {
    "core": (CORE, random_vision(WIDTH, 2, 128, pooled=24)),
    "lang": (
        Size("tiny lang", WIDTH, 1, HEADS, 128, 14, 56, is_scaled=True),
        random_vision(WIDTH, 1, 128, side=4, scales=True, final_norm=False, pooled=None),
    ),
    "spatial": (
        Size("tiny spatial", WIDTH, 2, HEADS, 128, 14, 56),
        random_vision(WIDTH, 2, 128, side=4, final_norm=False, pooled=None),
    ),
    "no class": (
        Size("tiny G", 32, 2, HEADS, 128, 14, 42, False, output=24, text=48),
        random_vision(32, 2, 128, class_token=False, pooled=24),
    ),
}
VISION = TINY["core"][1]
TEXT = random_text(48, 2, context=CONTEXT, vocabulary=len(TOKENIZER), output=24)
IMAGES = torch.randn(2, 3, 42, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published sizes, small enough for tests, and a tokenizer with their vocabulary."""
    sizes = [*perception_files.SIZES, *(size for size, _ in TINY.values())]
    monkeypatch.setattr(perception_files, "SIZES", sizes)
    text = TextSize(TEXT_HEADS, 2, CONTEXT, 24, vocabulary=len(TOKENIZER))
    monkeypatch.setitem(perception_files.TEXT_SIZES, 48, text)
    ids = TOKENIZER(backbones.CLIP_TEXT)["input_ids"]
    monkeypatch.setattr(backbones, "CLIP_IDS", ids)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return str(folder)


# -- layouts -------------------------------------------------------------------------------


def both(vision: Weights = VISION, text: Weights = TEXT) -> Weights:
    """Return the tensors of a file of PE core."""
    visual = {f"visual.{name}": tensor for name, tensor in vision.items()}
    return visual | text | {"logit_scale": torch.tensor(4.6)}


def timm(weights: Weights) -> Weights:
    """Return an image tower as timm names it."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in (
            ("transformer.resblocks", "blocks"),
            ("conv1", "patch_embed.proj"),
            ("ln_pre", "norm_pre"),
            ("ln_post", "norm"),
            (".ln_", ".norm"),
            (".ls_1.gamma", ".gamma_1"),
            (".ls_2.gamma", ".gamma_2"),
            ("c_fc", "fc1"),
            ("c_proj", "fc2"),
            ("attn_pool.attn.out_proj", "attn_pool.proj"),
            ("attn_pool.layernorm", "attn_pool.norm"),
            ("attn_pool.probe", "attn_pool.latent"),
            (".out_proj", ".proj"),
        ):
            name = name.replace(old, new)
        if name.startswith("attn_pool.attn.in_proj_"):
            part = name.rsplit("_", 1)[1]
            query, *rest = tensor.chunk(3)
            renamed |= {f"attn_pool.q.{part}": query, f"attn_pool.kv.{part}": torch.cat(rest)}
        elif name == "proj":
            renamed |= {"head.weight": tensor.T, "head.bias": torch.zeros(tensor.shape[1])}
        elif name == "class_embedding":
            renamed["cls_token"] = tensor[None, None]
        elif name == "positional_embedding":
            renamed["pos_embed"] = tensor[None]
        else:
            renamed[name.replace("in_proj_", "qkv.")] = tensor
    return renamed


def open_clip(vision: Weights = VISION, text: Weights = TEXT) -> Weights:
    trunk = {f"visual.trunk.{name}": tensor for name, tensor in timm(vision).items()}
    text = {f"text.{name}": tensor for name, tensor in text.items()}
    return trunk | text | {"logit_scale": torch.tensor(4.6)}


def module(weights: Weights, parameters: bool = False) -> Weights:
    """Return the names that data-parallel training gives, and if wanted parameters, not tensors."""
    kind = torch.nn.Parameter if parameters else torch.Tensor.clone
    return {f"module.{name}": kind(tensor) for name, tensor in weights.items()}


def write(path: Path, content: dict) -> str:
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    return str(path)


BOTH_TOWERS = {
    "published": ("a.pt", both),
    "module": (
        "a.pt",
        lambda *towers: {"state_dict": module(both(*towers), parameters=True), "epoch": 3},
    ),
    "safetensors": ("a.safetensors", both),
    "OpenCLIP": ("a.safetensors", open_clip),
}
IMAGE_TOWER = {
    "published": ("a.pt", lambda weights: weights),
    "weights": ("a.pt", lambda weights: {"weights": module(weights)}),
    "visual": ("a.pt", lambda weights: {f"visual.{n}": tensor for n, tensor in weights.items()}),
    "timm": ("a.safetensors", timm),
}


@torch.no_grad()
def assert_vision_equals(part: VisionBackbone, weights: Weights) -> None:
    model = PerceptionEncoderVisionModel(part.config).eval()
    model.load_state_dict({n.removeprefix("backbone."): t for n, t in part.weights.items()})
    assert not any(tensor.requires_grad for tensor in part.weights.values())
    found = model(IMAGES).last_hidden_state
    torch.testing.assert_close(found, encode_images(weights, IMAGES, HEADS), rtol=0, atol=1e-5)


@torch.no_grad()
def assert_text_equals(part: TextBackbone) -> None:
    encoder = YEncoder(part.config, True, part.pooling, part.dense)
    encoder.load_state_dict(part.weights)
    texts = ["a cat", "the dog on the mat is large", "open the door " * 9]
    tokens = part.tokenizer(
        texts, padding=True, truncation=True, return_tensors="pt", padding_side="right"
    )
    ids = tokens["input_ids"]
    assert ids.shape[1] == CONTEXT and (ids == part.tokenizer.eos_token_id).any(dim=1).all()
    found = encoder(ids, tokens["attention_mask"])
    torch.testing.assert_close(found, encode_texts(TEXT, ids, TEXT_HEADS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("file", "layout"), BOTH_TOWERS.values(), ids=BOTH_TOWERS)
def test_published_file_gives_both_towers_of_a_perception_encoder(
    file, layout, tokenizer, tmp_path
):
    source = write(tmp_path / file, layout())
    assert_vision_equals(read_vision("--vision", source), VISION)
    assert_text_equals(read_text("--text", source, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in TINY for layout in ("published", "timm")]
    + [("lang", "weights"), ("core", "visual")],
)
def test_read_vision_reads_an_image_tower_alone(kind, layout, tmp_path):
    (size, weights), (file, layout) = TINY[kind], IMAGE_TOWER[layout]
    part = read_vision("--vision", write(tmp_path / file, layout(weights)))
    assert_vision_equals(part, weights)
    assert part.name == file
    processor = part.video_processor
    side = {"height": size.side, "width": size.side}
    assert (processor.size, processor.crop_size) == (side, side)  # squashed, not cropped
    assert (*processor.image_mean, *processor.image_std) == (0.5,) * 6
    assert processor.resample == 2  # bilinear


def test_read_text_reads_a_text_tower_alone(tokenizer, tmp_path):
    part = read_text("--text", write(tmp_path / "text.pt", TEXT), tokenizer=tokenizer)
    assert_text_equals(part)
    without = read_text(
        "--text", str(tmp_path / "text.pt"), tokenizer=tokenizer, with_dense=False, pooling="cls"
    )
    assert (without.dense, without.pooling) == ([], "cls")
    assert part.weights.keys() - without.weights.keys() == {"dense.0.linear.weight"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("facebook/PE-Core-L14-336/PE-Core-L14-336.pt", "facebook/PE-Core-L14-336"),
        ("owner/repository", "owner/repository"),
        ("old-model", "old-model"),
        ("{folder}/PE-Core-L14-336.pt", "PE-Core-L14-336.pt"),
    ],
)
def test_public_name_is_a_hub_id_or_the_last_name_of_a_path(source, name, tmp_path):
    (tmp_path / "PE-Core-L14-336.pt").touch()
    assert public_name(source.format(folder=tmp_path)) == name


# -- errors --------------------------------------------------------------------------------


def changed(weights: Weights, name: str, how: str) -> Weights:
    weights = dict(weights)
    if how == "missing":
        del weights[name]
    elif how == "extra":
        weights[f"{name}s"] = weights[name].clone()
    else:
        weights[name] = weights[name][:-1]
    return weights


BLOCK = "transformer.resblocks.1.mlp.c_fc.bias"
MESSAGES = {
    "missing": "lacks {}; give a complete Perception Encoder",
    "extra": "has {}s, which this Perception Encoder does not have",
    "misshapen": r"has {} of shape \(\d+,\), but this size of Perception Encoder has \(\d+,\)",
}


@pytest.mark.parametrize("how", MESSAGES)
@pytest.mark.parametrize(
    ("option", "content", "name", "named"),
    [
        ("--vision", both(), f"visual.{BLOCK}", f"visual.{BLOCK}"),
        ("--vision", VISION, BLOCK, BLOCK),
        ("--vision", VISION, "attn_pool.attn.out_proj.bias", "attn_pool.attn.out_proj.bias"),
        ("--vision", timm(VISION), "blocks.1.mlp.fc1.bias", BLOCK),
        ("--text", both(), BLOCK, BLOCK),
        ("--text", open_clip(), f"text.{BLOCK}", BLOCK),
        ("--text", TEXT, "ln_final.bias", "ln_final.bias"),
    ],
    ids=["both", "vision", "pooling", "timm", "text of both", "OpenCLIP", "text"],
)
def test_init_checkpoint_names_a_missing_extra_or_misshapen_tensor_of_a_perception_encoder(
    option, content, name, named, how, tmp_path, tokenizer
):
    source = write(tmp_path / "a.pt", changed(content, name, how))
    read = read_vision if option == "--vision" else read_text
    with pytest.raises(RecipeError, match=f"{option}: .*{MESSAGES[how].format(named)}"):
        read(option, source)
    if option == "--vision":
        arguments = ["--vision", source, "--predictor", "x", "--text", "x"]
        with pytest.raises(RecipeError):
            main([*arguments, "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_read_vision_names_an_extra_tensor_of_the_tower_that_it_does_not_read(tmp_path):
    source = write(tmp_path / "a.pt", both() | {"text_bias": torch.zeros(1)})
    with pytest.raises(RecipeError, match="has text_bias, which this Perception"):
        read_vision("--vision", source)
    incomplete = both(text={"ln_final.bias": TEXT["ln_final.bias"]})
    assert_vision_equals(read_vision("--vision", write(tmp_path / "b.pt", incomplete)), VISION)


def clip(weights: Weights) -> Weights:
    """Return an image tower without the attention pooling that CLIP does not have."""
    return {name: tensor for name, tensor in weights.items() if "attn_pool" not in name}


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


REFUSED: dict[str, tuple[str, object, str]] = {
    "CLIP": ("--vision", both(clip(VISION)), "has no attn_pool, as a CLIP; give a complete"),
    "timm's CLIP": ("--vision", timm(clip(VISION)), "has no attn_pool, as a CLIP"),
    "width": (
        "--vision",
        VISION | {"conv1.weight": torch.zeros(80, 3, 14, 14)},
        "has 80 features, but the Perception Encoder was published with 32, 64, 192, 384, 768",
    ),
    "stem": (
        "--vision",
        VISION | {"conv1.weight": torch.zeros(64, 588)},
        "lacks a conv1.weight of four axes",
    ),
    "text alone": ("--vision", TEXT, "has a text tower, but no image tower"),
    "integers": (
        "--vision",
        VISION | {"ln_pre.bias": torch.zeros(WIDTH, dtype=torch.int8)},
        "has ln_pre.bias as torch.strided numbers of torch.int8; give a file with dense",
    ),
    "twice": ("--vision", VISION | module(VISION), "has two tensors of one name, conv1.weight"),
    "code": ("--vision", {"state_dict": Malicious()}, "refers to getattr, which torch"),
    "image alone": (
        "--text",
        TINY["lang"][1],
        "has the image tower of tiny lang alone",
    ),
    "text width": (
        "--text",
        TEXT | {"token_embedding.weight": torch.zeros(4, 768)},
        "has no token_embedding.weight of 512, 1024, 1280, 48 features",
    ),
    "V-JEPA 2.1": (
        "--text",
        {"ema_encoder": {"img_mod_embed": torch.zeros(1)}},
        "is not a Perception Encoder, the only model whose text tower is read",
    ),
}


@pytest.mark.parametrize(("option", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_readers_refuse_a_file_that_is_no_perception_encoder(
    option, content, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "file.pt")
    read = read_vision if option == "--vision" else read_text
    with pytest.raises(RecipeError, match=f"{option}: .*{message}"):
        read(option, str(tmp_path / "file.pt"))
    assert not Path("executed").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved `PerceptionEncoderVisionModel`."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {k: v for k, v in PERCEPTION.items() if k != "model_type"}
    PerceptionEncoderVisionModel(PerceptionEncoderVisionConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, None),
        ({"use_rope2d": True, "drop_path": 0.0, "use_cache": False}, None),
        ({"use_rope2d": False}, "whose 'use_rope2d' is False, which this encoder does not"),
        ({"drop_path": 0.1}, "whose 'drop_path' is 0.1, which this encoder does not"),
        ({"layer_pruning": [1]}, r"whose 'layer_pruning' is \[1\], which this encoder does not"),
        ({"hidden_size": "48"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "config.json: hidden_size is 48 for 5 heads"),
        ({"ls_init_value": 0.1}, "lacks layers.0.layer_scale1; give a complete"),
        ({"use_ln_post": False}, "has post_layernorm.bias, which this Perception Encoder does"),
        ({"num_hidden_layers": 1}, "has layers.1.layer_norm1.bias, which this"),
        ({"image_size": 196}, "has embeddings.position_embedding of shape"),
        ({"model_type": "vjepa2"}, "a 'vjepa2' whose 'attn_pooler_heads' is 8, which this"),
        ({"model_type": "vjepa2_1"}, "has the setting 'attn_pooler_heads'"),
    ],
)
def test_read_vision_reads_only_settings_of_a_saved_model_that_are_implemented(
    settings, message, saved, tmp_path
):
    folder = shutil.copytree(saved, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    if message is None:
        processor = read_vision("--vision", str(folder)).video_processor
        assert processor.image_std == (0.5,) * 3 and processor.size == processor.crop_size
    else:
        with pytest.raises(RecipeError, match=f"--vision: .*{message}"):
            read_vision("--vision", str(folder))


def test_load_processor_squashes_to_the_image_size_of_a_recipe(saved, tmp_path):
    processor = tiny_processor()
    processor.video_processor = read_vision("--vision", str(saved)).video_processor
    processor.save_pretrained(tmp_path)
    model = ModelArguments(checkpoint=str(tmp_path))
    video = load_processor(model, ProcessorArguments(image_size=48)).video_processor
    wide = torch.zeros(2, 3, 30, 90, dtype=torch.uint8)
    wide[..., :45] = 255
    pixels = video(wide, return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape == (1, 8, 3, 48, 48)
    assert (pixels[..., :20] == 1).all() and (pixels[..., -20:] == -1).all()  # nothing is cropped


@pytest.mark.parametrize("frames", [4, 2])
def test_load_processor_keeps_the_frames_of_a_checkpoint_unless_the_recipe_has_some(
    tmp_path, frames
):
    processor = tiny_processor()
    processor.video_processor.num_frames = 4
    processor.save_pretrained(tmp_path)
    arguments = ProcessorArguments() if frames == 4 else ProcessorArguments(num_frames=frames)
    video = load_processor(ModelArguments(checkpoint=str(tmp_path)), arguments).video_processor
    pixels = video(torch.zeros(9, 3, 30, 40, dtype=torch.uint8), return_tensors="pt")
    assert pixels["pixel_values_videos"].shape[1] == frames


def test_read_vision_hierarchical_refuses_a_perception_encoder(tmp_path):
    source = write(tmp_path / "a.pt", VISION)
    with pytest.raises(RecipeError, match="only V-JEPA 2.1 has levels"):
        read_vision("--vision", source, hierarchical=True)


def test_read_text_refuses_another_tokenizer_than_clips(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.pt", TEXT)
    other = sources.language_model(tmp_path / "other")
    with pytest.raises(RecipeError, match="--text-tokenizer: .*other is not CLIP's.* 'a photo of"):
        read_text("--text", source, tokenizer=str(other))
    with pytest.raises(RecipeError, match="cannot load .*missing as a folder or Hub id"):
        read_text("--text", source, tokenizer=str(tmp_path / "missing"))
    with pytest.raises(RecipeError, match="--text-tokenizer: .*other has a tokenizer of its own"):
        read_text("--text", str(other), tokenizer=tokenizer)


# -- published sizes -----------------------------------------------------------------------

# Width, layers, MLP, patch, patches of a side, class token, scales, output, and the text tower's
# width, layers and context; millions of parameters of both, of which the VL-JEPA paper has those of
# B and L.
PUBLISHED = {
    "PE-Core-T16-384": (192, 12, 768, 16, 24, 1, 0, 512, (512, 12, 32), 70),
    "PE-Core-S16-384": (384, 12, 1536, 16, 24, 1, 0, 512, (512, 12, 32), 87),
    "PE-Core-B16-224": (768, 12, 3072, 16, 14, 1, 0, 1024, (1024, 24, 32), 448),
    "PE-Core-L14-336": (1024, 24, 4096, 14, 24, 1, 0, 1024, (1024, 24, 32), 671),
    "PE-Core-G14-448": (1536, 50, 8960, 14, 32, 0, 0, 1280, (1280, 24, 72), 2419),
    "PE-Lang-L14-448": (1024, 23, 4096, 14, 32, 1, 1, None, None, None),
    "PE-Lang-G14-448": (1536, 47, 8960, 14, 32, 0, 1, None, None, None),
    "PE-Spatial-T16-512": (192, 12, 768, 16, 32, 1, 0, None, None, None),
    "PE-Spatial-S16-512": (384, 12, 1536, 16, 32, 1, 0, None, None, None),
    "PE-Spatial-B16-512": (768, 12, 3072, 16, 32, 1, 0, None, None, None),
    "PE-Spatial-L14-448": (1024, 24, 4096, 14, 32, 1, 0, None, None, None),
    "PE-Spatial-G14-448": (1536, 50, 8960, 14, 32, 0, 1, None, None, None),
}


def shapes_of(
    width: int, layers: int, mlp: int, named: dict[str, tuple[int, ...]], scales: int = 0
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of layers, and those of `named`."""
    of_layer = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (mlp, width),
        "mlp.c_fc.bias": (mlp,),
        "mlp.c_proj.weight": (width, mlp),
        "mlp.c_proj.bias": (width,),
    }
    norms = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
    of_layer |= dict.fromkeys(norms + ("ls_1.gamma", "ls_2.gamma") * scales, (width,))
    return named | {
        f"transformer.resblocks.{i}.{name}": shape
        for i in range(layers)
        for name, shape in of_layer.items()
    }


def image_shapes(
    width: int, layers: int, mlp: int, patch: int, side: int, token: int, scales: int, output: int
) -> dict[str, tuple[int, ...]]:
    names = ["ln_pre.weight", "ln_pre.bias"] + ["class_embedding"] * token
    if output is not None:
        names += ["ln_post.weight", "ln_post.bias", "attn_pool.attn.out_proj.bias"]
        names += ["attn_pool.layernorm.weight", "attn_pool.layernorm.bias"]
        names += ["attn_pool.mlp.c_proj.bias"]
    named = dict.fromkeys(names, (width,)) | {
        "conv1.weight": (width, 3, patch, patch),
        "positional_embedding": (token + side**2, width),
    }
    if output is not None:
        named |= {
            "attn_pool.probe": (1, 1, width),
            "attn_pool.attn.in_proj_weight": (3 * width, width),
            "attn_pool.attn.in_proj_bias": (3 * width,),
            "attn_pool.attn.out_proj.weight": (width, width),
            "attn_pool.mlp.c_fc.weight": (4 * width, width),
            "attn_pool.mlp.c_fc.bias": (4 * width,),
            "attn_pool.mlp.c_proj.weight": (width, 4 * width),
            "proj": (width, output),
        }
    return shapes_of(width, layers, mlp, named, scales)


def on_meta(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> Weights:
    return {prefix + n: torch.empty(shape, device="meta") for n, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_of_the_perception_encoder_is_read(name):
    *image, text, millions = PUBLISHED[name]
    shapes = image_shapes(*image)
    content = on_meta(shapes, "visual." if text else "")
    if text:
        width, layers, context = text
        named = {
            "token_embedding.weight": (49408, width),
            "positional_embedding": (context, width),
            "ln_final.weight": (width,),
            "ln_final.bias": (width,),
            "text_projection": (width, image[7]),
        }
        content |= on_meta(shapes_of(width, layers, 4 * width, named) | {"logit_scale": ()})
        config, weights, projection = read_text_tower("--text", name, content)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        model.load_state_dict(weights, assign=True)
        assert config.hidden_size // config.num_attention_heads == 64
        assert projection.shape == (image[7], width)
    config, weights = read_vision_tower("--vision", name, content)
    with torch.device("meta"):
        model = PerceptionEncoderVisionModel(config)
    model.load_state_dict(weights, assign=True)
    assert config.hidden_size // config.num_attention_heads == (96 if image[0] == 1536 else 64)
    assert config.image_size == int(name.rsplit("-", 1)[1])
    if millions:
        assert round(sum(tensor.numel() for tensor in content.values()) / 1e6) == millions
