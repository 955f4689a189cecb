"""V-JEPA 2.1's published files and their ports: read as they are, checked by name and shape."""

import json
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_vljepa import VJEPA21Config, VJEPA21Model
from processing import VLJEPAVideoProcessor
from tests import sources
from tests.model.vjepa21_reference import encode, random_weights
from tests.tiny import tiny_config
from training.arguments import RecipeError
from training.init_checkpoint import main
from training.model import vjepa21_files
from training.model.backbones import VisionBackbone, read_vision
from training.model.recipe_model import check_config
from training.model.vjepa21_files import Size, from_published

WIDTH, HEADS, MLP = 64, 4, 128
WEIGHTS = random_weights(WIDTH, 12, MLP)
PIXELS = torch.randn(2, 4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
PORT = {
    "model_type": "vjepa21",
    "hidden_size": WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": HEADS,
    "mlp_ratio": 2.0,
    "crop_size": 384,
}


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth published size, small enough for tests."""
    monkeypatch.setitem(vjepa21_files.SIZES, WIDTH, Size("tiny", 12, HEADS, MLP, "tiny.pt"))


def published(path: Path, weights: dict[str, torch.Tensor], key: str = "ema_encoder") -> Path:
    """Write a file as upstream's training does."""
    encoder = {f"module.backbone.{name}": tensor for name, tensor in weights.items()}
    other = {"module.backbone.mask_token": torch.zeros(3)}
    content = {"epoch": 3, "opt": {"state": {0: {"step": torch.tensor(1.0)}}}, "predictor": other}
    torch.save(content | {key: encoder}, path)
    return path


def port(folder: Path, weights: dict[str, torch.Tensor], **settings: object) -> Path:
    """Write a folder of safetensors with a configuration."""
    folder.mkdir()
    weights = weights | {"predictor.layer.0.norm1.weight": torch.zeros(4)}
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PORT | settings))
    return folder


def transformers_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return published weights in the names of ports for transformers."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            parts = {"": tensor}
            if "qkv" in rest:
                thirds = tensor.chunk(3)
                parts = dict(zip(("query", "key", "value"), thirds, strict=True))
            for part, piece in parts.items():
                new = rest.replace("attn.", "attention.").replace("qkv", part)
                renamed[f"encoder.layer.{index}.{new}"] = piece.clone()
        elif name.startswith("norms_block."):
            renamed[f"encoder.{name}"] = tensor
        else:
            name = name.replace("patch_embed", "patch_embeddings")
            renamed[f"encoder.embeddings.{name}"] = tensor
    return renamed


@cache
def expected_of(frames: int) -> torch.Tensor:
    return encode(WEIGHTS, PIXELS[:, :frames], HEADS)


def assert_equals_the_reference(part: VisionBackbone) -> None:
    model = VJEPA21Model(part.config).eval()
    named = {name.removeprefix("backbone."): tensor for name, tensor in part.weights.items()}
    missing = model.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        for frames in (4, 1):
            found = model(PIXELS[:, :frames]).last_hidden_state
            torch.testing.assert_close(found, expected_of(frames), rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ["ema_encoder", "target_encoder"])
def test_read_vision_reads_a_published_file(key, tmp_path):
    part = read_vision("--vision", str(published(tmp_path / "tiny.pt", WEIGHTS, key)))
    assert_equals_the_reference(part)
    assert part.name == "tiny.pt"
    processor = part.video_processor
    assert processor.crop_size == {"height": 384, "width": 384}
    assert processor.size == {"shortest_edge": 438}  # int(384 * 256 / 224)
    assert processor.image_mean == VLJEPAVideoProcessor().image_mean
    assert processor.resample == 2  # bilinear
    assert part.config.crop_size == 384


def test_read_vision_reads_a_single_file_of_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "tiny.safetensors")
    part = read_vision("--vision", str(tmp_path / "tiny.safetensors"))
    assert_equals_the_reference(part)
    assert part.video_processor.crop_size == {"height": 384, "width": 384}


PORTS = {
    "remote code": (transformers_names, {"n_registers": 0, "has_cls_first": False}),
    "published names": (lambda w: w, {"modality_embedding": True, "teacher_embed_dim": 1664}),
    "module encoder": (
        lambda w: {f"encoder.{n}": t for n, t in w.items()},
        {"model_type": "vjepa2_1", "n_output_distillation": 4, "pred_has_context_proj": True},
    ),
    "pull request": (
        transformers_names,
        {
            "model_type": "vjepa2",
            "use_rope_interleave": True,
            "use_modality_embeddings": True,
            "interpolate_rope": True,
            "use_image_patch_embedder": True,
            "return_all_tokens": True,
            "hierarchical_layers": [2, 5, 8, 11],
            "auto_map": {"AutoModel": "modeling.Model"},
        },
    ),
    "one norm": (
        lambda w: {
            n.replace("norms_block.3", "layernorm"): t
            for n, t in transformers_names(w).items()
            if not n.startswith(tuple(f"encoder.norms_block.{i}" for i in range(3)))
        },
        {},
    ),
}


@pytest.mark.parametrize(("names", "settings"), PORTS.values(), ids=PORTS)
def test_read_vision_reads_ports(names, settings, tmp_path):
    part = read_vision("--vision", str(port(tmp_path / "port", names(WEIGHTS), **settings)))
    assert_equals_the_reference(part)
    assert part.video_processor.crop_size["height"] == 384


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_registers": 4}, "has a n_registers other than 0"),
        ({"has_cls_first": True}, "has a has_cls_first other than False"),
        ({"use_rope_interleave": False}, "has a use_rope_interleave other than True"),
        ({"window_size": 7}, "has the setting 'window_size', which is not implemented"),
        ({"img_temporal_dim_size": 2}, "img_temporal_dim_size is 2"),
        ({"hidden_size": "64"}, "config.json: "),
        ({"image_size": 256}, "has an image_size of 256 and a crop_size of 384; correct"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0: give 1 or more"),
        ({"model_type": ["vjepa21"]}, "cannot load"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "needs code of its own, which"),
        ({"hidden_act": "nothing"}, "config.json: "),
        ({"num_hidden_layers": 13}, "lacks encoder.layer.12."),
        ({"num_hidden_layers": 24}, "lacks encoder.layer.12."),
        ({"mlp_ratio": 3}, r"fc1.bias of shape \(128,\), but this size .* has \(192,\)"),
    ],
)
def test_read_vision_names_what_a_port_has_that_is_not_implemented(settings, message, tmp_path):
    folder = port(tmp_path / "port", transformers_names(WEIGHTS), **settings)
    with pytest.raises(RecipeError, match=f"--vision: .*{message}"):
        read_vision("--vision", str(folder))


def test_read_vision_reads_the_crop_of_a_port_that_names_it_image_size(tmp_path):
    folder = port(tmp_path / "port", transformers_names(WEIGHTS), image_size=256)
    config = json.loads((folder / "config.json").read_text())
    del config["crop_size"]
    (folder / "config.json").write_text(json.dumps(config))
    processor = read_vision("--vision", str(folder)).video_processor
    assert processor.crop_size == {"height": 256, "width": 256}
    assert processor.size == {"shortest_edge": 292}


def test_read_vision_names_a_tensor_that_a_port_has_twice(tmp_path):
    name = "encoder.embeddings.img_mod_embed"
    weights = transformers_names(WEIGHTS)
    weights[f"module.{name}"] = weights[name].clone()
    with pytest.raises(RecipeError, match=f"--vision: .* has two tensors of one name, {name}"):
        read_vision("--vision", str(port(tmp_path / "port", weights)))


def changed(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    weights = dict(weights)
    name = next(name for name in weights if "mlp.fc1.weight" in name)
    if how == "missing":
        del weights[name]
    elif how == "extra":
        weights[name.replace("fc1", "fc3")] = weights[name].clone()
    else:
        weights[name] = weights[name][:-1]
    return weights


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "lacks {}.0.mlp.fc1.weight; give a complete"),
        ("extra", "has {}.0.mlp.fc3.weight, which this V-JEPA 2.1 does not have"),
        ("misshapen", r"has {}.0.mlp.fc1.weight of shape \(127, 64\), but .* has \(128, 64\)"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_init_checkpoint_names_a_missing_extra_or_misshapen_tensor(how, message, tmp_path):
    file = published(tmp_path / "tiny.pt", changed(WEIGHTS, how))
    folder = port(tmp_path / "port", changed(transformers_names(WEIGHTS), how))
    for source, prefix in ((file, "blocks"), (folder, "encoder.layer")):
        arguments = ["--vision", str(source), "--predictor", "x", "--text", "x"]
        with pytest.raises(RecipeError, match=message.format(prefix)):
            main([*arguments, "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_read_vision_names_a_file_that_is_no_vjepa21(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(content: object, message: str) -> None:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(RecipeError, match=f"--vision: .*{message}"):
            read_vision("--vision", str(tmp_path / "file.pt"))

    refused({"ema_encoder": Malicious()}, "refers to getattr, which torch.s restricted")
    assert not Path("executed").exists()
    refused({"model": {}, "epoch": 1}, "has no ema_encoder or target_encoder.* it has model, epoch")
    refused([1, 2], "it has no names")
    old = {name: t for name, t in WEIGHTS.items() if not name.startswith("norms_block")}
    old |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    refused({"target_encoder": old}, "is a V-JEPA 2, which has one final norm")
    refused({"target_encoder": {}}, "lacks a patch_embed.proj.weight")
    refused({"target_encoder": {"a": 3}}, "has no ema_encoder or target_encoder")
    twice = {"module.img_mod_embed": torch.zeros(1), "img_mod_embed": torch.zeros(1)}
    refused({"target_encoder": WEIGHTS | twice}, "has two tensors of one name, img_mod_embed")
    wide = WEIGHTS | {"patch_embed.proj.weight": torch.zeros(80, 3, 2, 16, 16)}
    refused({"target_encoder": wide}, "has 80 features, but .* 768, 1024, 1408, 1664")
    bias = WEIGHTS["norms_block.3.bias"]
    for other, message in (
        (bias.to(torch.float8_e4m3fn), "has norms_block.3.bias as .* numbers of torch.float8_e4m3"),
        (bias.to("meta"), "has a tensor without values or a nested one"),
        (torch.nested.nested_tensor([bias]), "has a tensor without values or a nested one"),
    ):
        refused({"ema_encoder": WEIGHTS | {"norms_block.3.bias": other}}, message)
    (tmp_path / "broken.pt").write_bytes(b"no archive")
    (tmp_path / "broken.safetensors").write_bytes(b"no archive")
    cut = (tmp_path / "file.pt").read_bytes()[:-9]
    (tmp_path / "cut.pt").write_bytes(cut)
    with zipfile.ZipFile(tmp_path / "damaged.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02s.")  # an IndexError of the unpickler
        archive.writestr("a/byteorder", "little")
    names = ("broken.pt", "broken.safetensors", "cut.pt", "damaged.pt")
    for name in (*names, "missing.pt", "no/folder/missing.pt"):
        with pytest.raises(RecipeError, match=f"--vision: .*{name}"):
            read_vision("--vision", str(tmp_path / name))


def test_read_vision_never_takes_a_vjepa2_for_a_vjepa21_or_the_other_way(tmp_path):
    stock = sources.vision(tmp_path / "stock", "vjepa2")
    config = json.loads((stock / "config.json").read_text())
    off = {"use_rope_interleave": False, "interpolate_rope": False, "hierarchical_layers": None}
    (stock / "config.json").write_text(json.dumps(config | off))
    assert read_vision("--vision", str(stock)).config.model_type == "vjepa2"
    (stock / "config.json").write_text(json.dumps(config | {"use_rope_interleave": True}))
    with pytest.raises(RecipeError, match="lacks encoder.embeddings.img_mod_embed"):
        read_vision("--vision", str(stock))
    folder = port(tmp_path / "port", transformers_names(WEIGHTS), model_type="vjepa2")
    with pytest.raises(RecipeError, match="_mod_embed, a weight of V-JEPA 2.1, but its config"):
        read_vision("--vision", str(folder))


def test_init_checkpoint_hierarchical_reads_four_levels(tmp_path):
    part = read_vision("--vision", str(published(tmp_path / "a.pt", WEIGHTS)), hierarchical=True)
    model = VJEPA21Model(part.config).eval()
    model.load_state_dict({name.removeprefix("backbone."): t for name, t in part.weights.items()})
    with torch.no_grad():
        found = model(PIXELS).last_hidden_state
    expected = encode(WEIGHTS, PIXELS, HEADS, hierarchical=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match="only V-JEPA 2.1 has levels"):
        stock = sources.vision(tmp_path / "stock", "vjepa2")
        read_vision("--vision", str(stock), hierarchical=True)


# -- published sizes -----------------------------------------------------------------------


def published_shapes(width: int, depth: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as the published files have them."""
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        "patch_embed_img.proj.weight": (width, 3, 1, 16, 16),
        "patch_embed_img.proj.bias": (width,),
        "img_mod_embed": (1, 1, width),
        "video_mod_embed": (1, 1, width),
    }
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
        "norm1": (width,),
        "norm2": (width,),
    }
    for i in range(depth):
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    for i in range(4):
        shapes |= {f"norms_block.{i}.weight": (width,), f"norms_block.{i}.bias": (width,)}
    return shapes


PUBLISHED = {  # width, layers, width of the MLP, tensors, parameters of the model cards
    "ViT-B": (768, 12, 3072, 158, 86_833_152),
    "ViT-L": (1024, 24, 4096, 302, 304_680_960),
    "ViT-g": (1408, 40, 6144, 494, 1_013_267_968),
    "ViT-G": (1664, 48, 8192, 590, 1_845_216_768),
}


@pytest.mark.parametrize(
    ("width", "depth", "mlp", "tensors", "parameters"), PUBLISHED.values(), ids=PUBLISHED
)
def test_from_published_reads_every_published_size(width, depth, mlp, tensors, parameters):
    shapes = published_shapes(width, depth, mlp)
    assert len(shapes) == tensors
    with torch.device("meta"):
        encoder = {f"module.backbone.{name}": torch.empty(shape) for name, shape in shapes.items()}
        config, weights = from_published("--vision", "x.pt", {"target_encoder": encoder})
        model = VJEPA21Model(config)
    model.load_state_dict(weights, assign=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.crop_size == 384 and config.hidden_size // config.num_attention_heads == 64


@pytest.mark.slow
def test_read_vision_reads_vit_b_in_full(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in published_shapes(*PUBLISHED["ViT-B"][:3]).items()
    }
    part = read_vision("--vision", str(published(tmp_path / "vitb.pt", weights)))
    assert sum(tensor.numel() for tensor in part.weights.values()) == 86_833_152
    fused = weights["blocks.11.attn.qkv.weight"]
    parts = [
        part.weights[f"backbone.encoder.layer.11.attention.{n}.weight"]
        for n in ("query", "key", "value")
    ]
    assert torch.equal(torch.cat(parts), fused)
    assert isinstance(part.config, VJEPA21Config)


def test_check_config_knows_the_settings_of_the_checkpoints_encoder():
    change = {"vision_config": {"img_temporal_dim_size": None}}
    newer = tiny_config(vision_config={"model_type": "vjepa2_1"})
    assert check_config(change, newer) == change
    for checkpoint in (None, tiny_config()):
        with pytest.raises(RecipeError, match="vision_config.img_temporal_dim_size: no such"):
            check_config(change, checkpoint)
