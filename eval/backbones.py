"""Is each part of a new VL-JEPA really pretrained? `python -m eval.backbones --model DIR …`

    python -m eval.backbones --model runs/small --language-model data/backbones/smollm2/FILE.gguf

Each part is asked what it knew before, beside the same part with random weights:

- X-Encoder: does an image's nearest neighbour show the same shape? (images of `--rows`)
- Predictor: perplexity of a passage, its layers put back into the language model they came from
- Y-Encoder: is a sentence nearer to its paraphrase than to every other sentence?

A joint model built a minute ago predicts nothing yet; this only shows that no part was lost on
the way. Writes a picture of all three.
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
    """A copy whose weights are noise with the spread of its own: the control."""
    control = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in control.parameters():
            spread = weight.std() if weight.numel() > 1 else 0.0
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.mean() + noise * spread)
    return control


def neighbours(embeds: torch.Tensor) -> torch.Tensor:
    """`(N, D)` to the index of each row's nearest other row, `(N,)`."""
    similarity = F.normalize(embeds, dim=1) @ F.normalize(embeds, dim=1).T
    return similarity.fill_diagonal_(-1).argmax(dim=1)


@torch.no_grad()
def image_embeds(encoder: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Mean visual token of each image: `(N, 1, 3, H, W)` to `(N, Dx)`, the average removed."""
    embeds = torch.cat([encoder(part).mean(dim=1) for part in pixels.split(32)])
    return embeds - embeds.mean(dim=0)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return model(input_ids=ids, labels=ids).loss.exp().item()


def put_back(model: VLJEPAModel, language_model: torch.nn.Module) -> torch.nn.Module:
    """The language model with the Predictor's layers, token table and norm as its last ones."""
    whole = copy.deepcopy(language_model)
    predictor = model.predictor.backbone
    first = len(whole.model.layers) - len(predictor.layers)
    for kept, layer in enumerate(predictor.layers):
        whole.model.layers[first + kept].load_state_dict(layer.state_dict())
    whole.model.embed_tokens.load_state_dict(predictor.embed_tokens.state_dict())
    whole.model.norm.load_state_dict(predictor.norm.state_dict())
    return whole


def shapes_of(path: str, limit: int) -> dict[str, str]:
    """Image file and the shape on it, from questions whose answer is a shape."""
    rows, _ = read_rows(path)
    shapes = {"circle", "rectangle", "triangle"}
    return dict([(row["image"], row["target"]) for row in rows if row["target"] in shapes][:limit])


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(
        prog="eval.backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model by training.init_checkpoint")
    parser.add_argument("--language-model", required=True, help="what its predictor was cut from")
    parser.add_argument("--rows", default="data/demo/easy_vqa/test_vqa.jsonl")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--output", type=Path, help="default: backbones.png in the model's folder")
    args = parser.parse_args(argv)
    model = AutoModel.from_pretrained(args.model).eval()
    processor: VLJEPAProcessor = AutoProcessor.from_pretrained(args.model)

    shown = shapes_of(args.rows, args.images)
    files, shapes = list(shown), list(shown.values())
    pixels = processor(images=files)["pixel_values_videos"]
    nearest, control = (
        neighbours(image_embeds(encoder, pixels)).tolist()
        for encoder in (model.x_encoder, randomise(model.x_encoder))
    )
    same, by_chance = (
        sum(shapes[i] == shapes[j] for i, j in enumerate(found)) / len(shapes)
        for found in (nearest, control)
    )

    folder, file = os.path.split(args.language_model)
    gguf = {"gguf_file": file} if file.endswith(".gguf") else {}
    source = folder if gguf else args.language_model
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    ids = tokenizer(PASSAGE, return_tensors="pt")["input_ids"]
    known = perplexity(put_back(model, whole), ids)
    original = perplexity(whole, ids)
    broken = copy.deepcopy(model)
    broken.predictor.backbone.layers = randomise(model.predictor.backbone.layers)
    lost = perplexity(put_back(broken, whole), ids)

    sentences = [sentence for pair in PARAPHRASES for sentence in pair]
    batch = processor(targets=sentences)
    with torch.no_grad():
        pooled = [
            encoder(batch["target_input_ids"], batch["target_attention_mask"])
            for encoder in (model.y_encoder, randomise(model.y_encoder))
        ]
    paired, unpaired = (
        sum(j == i ^ 1 for i, j in enumerate(neighbours(embeds).tolist())) / len(sentences)
        for embeds in pooled
    )

    print(
        f"X-Encoder: nearest neighbour of the same shape {same:.2f}, random weights {by_chance:.2f}"
    )
    print(
        f"Predictor: perplexity {known:.1f}, the whole language model's own {original:.1f}, "
        f"random layers {lost:.1f}"
    )
    print(f"Y-Encoder: nearest to its paraphrase {paired:.2f}, random weights {unpaired:.2f}")
    path = args.output or Path(args.model) / "backbones.png"
    draw(path, files, nearest, [original, known, lost], pooled[0], sentences)
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
    """Images with their neighbours, perplexities, and the similarity of the sentences."""
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
