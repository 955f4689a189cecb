"""Check that each part of a new VL-JEPA is pretrained.

    python -m eval.backbones --model runs/joined --language-model data/backbones/smollm2/FILE.gguf

Each part is tested on the task of its pretraining, and so is a copy with random weights:

- X-Encoder: does an image's nearest neighbour show the same shape? (images of `--rows`)
- Predictor: the perplexity of a passage, with its layers put back into their language model
- Y-Encoder: is a sentence nearer to its paraphrase than to every other sentence?

A new joint model predicts nothing yet; this check only shows that no part lost its weights. The
command writes a picture of all three results.
"""

import argparse
import copy
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor, read_rows

# A passage and paraphrases written for this test, so that no model has seen them.
PASSAGE = (
    "The old bridge over the river was closed for repairs last spring. Since then, people who live "
    "on the other side have had to drive for twenty minutes to reach the market, and many of the "
    "small shops there have lost half of their customers. The town hopes to open it again before "
    "winter, when the longer road is often covered with snow."
)
PARAPHRASES = [
    ("A man is riding a bicycle through the park.", "Someone cycles across the park."),
    ("The chef is cutting onions for a soup.", "A cook chops onions to make soup."),
    ("Two children build a castle of sand.", "Kids are making a sandcastle."),
    ("The train to the coast leaves at noon.", "At twelve there is a train to the sea."),
    ("She repaired the broken window of her car.", "Her car's smashed window was fixed by her."),
]


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Return a control: a copy whose weights are noise of the same mean and standard deviation."""
    control = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in control.parameters():
            std = weight.std() if weight.numel() > 1 else 0.0
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.mean() + noise * std)
    return control


def neighbours(embeds: torch.Tensor) -> torch.Tensor:
    """Return the index of each row's nearest other row: `(N, D)` to `(N,)`."""
    similarity = F.normalize(embeds, dim=1) @ F.normalize(embeds, dim=1).T
    return similarity.fill_diagonal_(-1).argmax(dim=1)


@torch.no_grad()
def image_embeds(encoder: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return each image's mean visual token: `(N, 1, 3, H, W)` to `(N, Dx)`, centred.

    Centred, because one large common component would make all images look alike to a cosine.
    """
    embeds = torch.cat([encoder(part).mean(dim=1) for part in pixels.split(32)])
    return embeds - embeds.mean(dim=0)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return model(input_ids=ids, labels=ids).loss.exp().item()


def put_back(model: VLJEPAModel, language_model: torch.nn.Module) -> torch.nn.Module:
    """Return the language model with its last layers, token table and norm from the Predictor."""
    whole = copy.deepcopy(language_model)
    predictor = model.predictor.backbone
    first = len(whole.model.layers) - len(predictor.layers)
    for index, layer in enumerate(predictor.layers):
        whole.model.layers[first + index].load_state_dict(layer.state_dict())
    whole.model.embed_tokens.load_state_dict(predictor.embed_tokens.state_dict())
    whole.model.norm.load_state_dict(predictor.norm.state_dict())
    return whole


def shapes_of(path: str, limit: int) -> dict[str, str]:
    """Return each image file with the shape on it, from questions whose answer is a shape."""
    rows, _ = read_rows(path)
    shapes = {"circle", "rectangle", "triangle"}
    return dict([(row["image"], row["target"]) for row in rows if row["target"] in shapes][:limit])


def check_x_encoder(
    model: VLJEPAModel, processor: VLJEPAProcessor, shown: dict[str, str]
) -> tuple[list[int], float, float]:
    """Return each image's nearest neighbour, and the share of neighbours with the same shape, for
    the X-Encoder and for the control."""
    shapes = list(shown.values())
    pixels = processor(images=list(shown))["pixel_values_videos"]
    nearest, control = (
        neighbours(image_embeds(encoder, pixels)).tolist()
        for encoder in (model.x_encoder, randomise(model.x_encoder))
    )
    same, by_chance = (
        sum(shapes[i] == shapes[j] for i, j in enumerate(found)) / len(shapes)
        for found in (nearest, control)
    )
    return nearest, same, by_chance


def check_predictor(model: VLJEPAModel, language_model: str) -> tuple[float, float, float]:
    """Return the passage's perplexity for the language model, for the same model with the
    Predictor's layers, and with random layers."""
    folder, file = os.path.split(language_model)
    gguf = {"gguf_file": file} if file.endswith(".gguf") else {}
    source = folder if gguf else language_model
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    ids = tokenizer(PASSAGE, return_tensors="pt")["input_ids"]
    known = perplexity(put_back(model, whole), ids)
    control = copy.deepcopy(model)
    control.predictor.backbone.layers = randomise(model.predictor.backbone.layers)
    return perplexity(whole, ids), known, perplexity(put_back(control, whole), ids)


@torch.no_grad()
def check_y_encoder(
    model: VLJEPAModel, processor: VLJEPAProcessor, sentences: list[str]
) -> tuple[torch.Tensor, float, float]:
    """Return the embeddings `(N, D)` of the sentences, and the share that is nearest to its
    paraphrase, for the Y-Encoder and for the control."""
    batch = processor(targets=sentences)
    pooled = [
        encoder(batch["target_input_ids"], batch["target_attention_mask"])
        for encoder in (model.y_encoder, randomise(model.y_encoder))
    ]
    # Paraphrases are neighbours in the list: i ^ 1 is the other one of a pair.
    paired, by_chance = (
        sum(j == i ^ 1 for i, j in enumerate(neighbours(embeds).tolist())) / len(sentences)
        for embeds in pooled
    )
    return pooled[0], paired, by_chance


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(
        prog="eval.backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model made by training.init_checkpoint")
    parser.add_argument("--language-model", required=True, help="source of its predictor's layers")
    parser.add_argument("--rows", default="data/demo/easy_vqa/test_vqa.jsonl")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--output", type=Path, help="default: backbones.png in the model's folder")
    args = parser.parse_args(argv)
    model = AutoModel.from_pretrained(args.model).eval()
    processor: VLJEPAProcessor = AutoProcessor.from_pretrained(args.model)

    # 1. Each part, and its control
    shown = shapes_of(args.rows, args.images)
    nearest, same, by_chance = check_x_encoder(model, processor, shown)
    original, known, lost = check_predictor(model, args.language_model)
    sentences = [sentence for pair in PARAPHRASES for sentence in pair]
    pooled, paired, unpaired = check_y_encoder(model, processor, sentences)

    # 2. Numbers and picture
    print(
        f"X-Encoder: nearest neighbour of the same shape {same:.2f}, random weights {by_chance:.2f}"
    )
    print(
        f"Predictor: perplexity {known:.1f}, the whole language model's own {original:.1f}, "
        f"random layers {lost:.1f}"
    )
    print(f"Y-Encoder: nearest to its paraphrase {paired:.2f}, random weights {unpaired:.2f}")
    path = args.output or Path(args.model) / "backbones.png"
    draw(path, list(shown), nearest, [original, known, lost], pooled, sentences)
    print(path)
    return {
        "shape": (same, by_chance),
        "perplexity": (known, lost),
        "paraphrase": (paired, unpaired),
    }


def draw(
    path: Path,
    files: list[str],
    nearest: list[int],
    perplexities: list[float],
    pooled: torch.Tensor,
    sentences: list[str],
) -> None:
    """Draw images with their neighbours, the perplexities, and the sentences' similarities."""
    figure = plt.figure(figsize=(15, 4.5), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(5, 5, 8))
    left.suptitle("X-Encoder: image, nearest neighbour")
    for index, axes in enumerate(left.subplots(4, 4).flat):
        image = index // 2 * 7
        axes.imshow(Image.open(files[nearest[image] if index % 2 else image]))
        axes.axis("off")
    middle.suptitle("Predictor: perplexity of a passage")
    axes = middle.subplots()
    axes.bar(["whole\nmodel", "with these\nlayers", "with random\nlayers"], perplexities)
    axes.set_yscale("log")
    right.suptitle("Y-Encoder: cosine similarity of paraphrases")
    axes = right.subplots()
    similarity = F.normalize(pooled, dim=1) @ F.normalize(pooled, dim=1).T
    axes.imshow(similarity, vmin=0, vmax=1)
    axes.set_yticks(range(len(sentences)), sentences, fontsize=7)
    axes.set_xticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
