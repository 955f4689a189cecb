"""Train a two-layer MLP on a model's cached features, and measure it as the model is measured.

    python -m training.mlp_baseline runs/pictures/sft --features data/pictures_features \\
        --benchmarks eval/pictures.yaml --validation eval/pictures_validation.yaml

A Predictor must be better than this baseline to be worth its time. The MLP reads the first visual
token of a clip (DINOv2's class token), the mean of the others and the embedding of the query; the
mean of all visual tokens, if the class token is part of each (`concatenate_class_token`). It
predicts the embedding of the target with the same loss, from the sources of the model's last recipe
with their weights, in the processor time of all of the model's trainings. It keeps the weights with
the best retrieval on validation data. Texts are the Y-Encoder's own embeddings, without
what the model's head learnt to add to them; with `--adapter`, the MLP trains an adapter of its own
for them, as large as the model's.

The output has the files of `eval.evaluate`, so `python -m eval.compare` compares it with the model.
"""

import argparse
import copy
import math
import random
import sys
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from tqdm import tqdm

from eval.benchmarks import load_benchmarks
from eval.embed import EMBEDDING, Predictions, Reader, embed_texts
from eval.evaluate import write_results
from eval.items import FILE, write_items
from eval.models import check_vljepa, load_model
from eval.report import text_tables, write_report
from eval.results import TaskResult
from eval.task import Benchmark, Task
from eval.tasks import TASKS
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.embedding_head import EmbeddingHead, ZeroLinear
from modeling_vljepa.losses import info_nce
from processing import VLJEPAProcessor
from processing.feature_store import FeatureError, FeatureStore
from processing.output import OutputError, check_output_folder, writing
from processing.rows import clip_key
from training.arguments import RecipeError, SourceArguments
from training.data.dataset import text_id
from training.data.sources import Source, read_source
from training.hub.training_facts import read_runs

HIDDEN = 2048
BATCH = 1024
RATE = 1e-3
WEIGHT_DECAY = 0.05
DROPOUT = 0.3
CHECKS = 20  # evaluations on validation data


class MLP(nn.Module):
    """Two linear layers on standardised inputs.

    Args:
        inputs: examples of inputs `(R, n)`, which give mean and scale.
        width: size of an output.
        adapter_size: hidden width of an adapter of the target texts; default: none.
    """

    def __init__(self, inputs: torch.Tensor, width: int, adapter_size: int | None = None):
        super().__init__()
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("scale", 1 / inputs.std(0).clamp_min(1e-6))
        self.layers = nn.Sequential(
            nn.Linear(inputs.shape[1], HIDDEN),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, width),
        )
        self.text_head = EmbeddingHead(width, width, project=False, adapter_size=adapter_size)
        for module in self.text_head.modules():
            if isinstance(module, ZeroLinear):  # as a new model's adapter
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return unit vectors `(B, width)`."""
        return F.normalize(self.layers((inputs - self.mean) * self.scale).float(), dim=-1)


class Vectors:
    """Vectors of clips and of texts, each computed once and known by its index.

    The model's Y head is removed.
    """

    def __init__(self, model: VLJEPAModel, processor: VLJEPAProcessor, features: FeatureStore):
        width = model.y_encoder.output_size
        model.y_head = EmbeddingHead(width, width, project=False)
        self.model, self.processor, self.features = model, processor, features
        # Not every text encoder embeds an empty query.
        self.text_index, self.texts = {"": 0}, torch.zeros(1, width)  # (T, D)
        self.clip_index: dict[str, int] = {}
        self.concatenated = model.config.concatenate_class_token
        inputs = model.x_encoder.output_size * (1 if self.concatenated else 2)
        self.clips = torch.empty(0, inputs)  # (C, 2 Dx)

    def of_texts(self, texts: list[str]) -> torch.Tensor:
        """Return the index of each text."""
        new = sorted(set(texts) - self.text_index.keys())
        if new:
            self.text_index |= {text: len(self.texts) + i for i, text in enumerate(new)}
            embeds = embed_texts(self.model, self.processor, new)
            self.texts = torch.cat([self.texts, embeds])
        return torch.tensor([self.text_index[text] for text in texts])

    def of_clips(self, rows: list[dict]) -> torch.Tensor:
        """Return the index of each row's clip."""
        new = {key: row for row in rows if (key := clip_key(row)) not in self.clip_index}
        if new:
            self.features.check(list(new.values()))
            self.clip_index |= {key: len(self.clips) + i for i, key in enumerate(new)}
            read = []
            for row in tqdm(new.values(), "features"):
                tokens = self.features[row].float()  # (N, Dx) or (N, 2 Dx)
                if self.concatenated:
                    read.append(tokens.mean(0))
                else:
                    read.append(torch.cat([tokens[0], tokens[1:].mean(0)]))
            self.clips = torch.cat([self.clips, torch.stack(read)])
        return torch.tensor([self.clip_index[clip_key(row)] for row in rows])

    def inputs(self, clips: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return the inputs `(R, 2 Dx + D)` for indices of clips and of queries."""
        return torch.cat([self.clips[clips], self.texts[queries]], dim=1)


class Examples:
    """Rows of a source as indices, in a new order in every epoch."""

    def __init__(self, source: Source, vectors: Vectors, seed: int):
        rows, self.weight = source.rows, source.arguments.weight
        # As in training: a row without a group is a group of its own.
        groups = [
            -1 - index if row.get("group_id") is None else text_id(str(row["group_id"]))
            for index, row in enumerate(rows)
        ]
        self.columns = torch.stack(
            [
                vectors.of_clips(rows),
                vectors.of_texts([row["query"] for row in rows]),
                vectors.of_texts([row["target"] for row in rows]),
                torch.tensor([text_id(row["target"]) for row in rows]),
                torch.tensor(groups),
            ]
        )  # (5, R)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def draw(self, count: int) -> torch.Tensor:
        """Return the columns of the next rows, `(5, count)`."""
        while len(self.order) < count:
            again = torch.randperm(self.columns.shape[1], generator=self.generator)
            self.order = torch.cat([self.order, again])
        drawn, self.order = self.order[:count], self.order[count:]
        return self.columns[:, drawn]


@dataclass(frozen=True)
class MLPTask(Task):
    """A measurement of an MLP in place of the model's X-Encoder and Predictor."""

    _: KW_ONLY
    mlp: MLP
    vectors: Vectors

    @torch.inference_mode()
    def predict(
        self,
        rows: list[dict],
        *,
        num_frames: int | None = None,
        states: str | None = None,
        reader: Reader = EMBEDDING,
    ) -> Predictions:
        """Predict the answer's embedding for each row."""
        queries = [row["query"] for row in rows]
        clips, texts = self.vectors.of_clips(rows), self.vectors.of_texts(queries)
        embeds = self.mlp.eval()(self.vectors.inputs(clips, texts))
        return Predictions(rows, queries, embeds, broken={})

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed texts with the model's Y-Encoder: unit vectors `(len(texts), D)`."""
        indices = self.vectors.of_texts(texts)
        return self.mlp.eval().text_head(self.vectors.texts[indices])


class Baseline:
    """An MLP with what it reads.

    Args:
        model, processor: a trained model.
        features: its feature store.
        sources: rows to learn from.
        bf16: compute in bf16, as the model's training did.
        adapter_size: see [`MLP`].
    """

    def __init__(
        self,
        model: VLJEPAModel,
        processor: VLJEPAProcessor,
        features: FeatureStore,
        sources: list[Source],
        *,
        bf16: bool,
        seed: int,
        adapter_size: int | None = None,
    ):
        self.model, self.processor, self.features, self.bf16 = model, processor, features, bf16
        self.vectors = Vectors(model, processor, features)
        self.sources = [Examples(source, self.vectors, seed) for source in sources]
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        clips, queries = torch.cat([each.columns[:2] for each in self.sources], dim=1)
        few = torch.randperm(len(clips))[: 8 * BATCH]
        inputs = self.vectors.inputs(clips[few], queries[few])
        self.mlp = MLP(inputs, self.vectors.texts.shape[1], adapter_size)
        self.steps, self.best = 0, -math.inf

    def measure(self, benchmark: Benchmark) -> TaskResult:
        """Measure the MLP on a benchmark."""
        task = MLPTask(
            self.model,
            self.processor,
            benchmark,
            features=self.features,
            mlp=self.mlp,
            vectors=self.vectors,
        )
        return TASKS[benchmark.task].evaluate(task)

    def train(self, cpu_seconds: float, validation: list[Benchmark]) -> None:
        """Train for a processor time; keep the weights with the best score on validation data.

        The score is the mean over the benchmarks of their first score. Reading and validation do
        not count.
        """
        optimizer = torch.optim.AdamW(self.mlp.parameters(), RATE, weight_decay=WEIGHT_DECAY)
        used, check, best = 0.0, 1, copy.deepcopy(self.mlp.state_dict())
        with tqdm(total=CHECKS, desc="training", unit="check") as progress:
            while check <= CHECKS:
                since = time.process_time()
                for group in optimizer.param_groups:  # cosine, over the processor time
                    group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * min(used / cpu_seconds, 1)))
                self.step(optimizer)
                used += time.process_time() - since
                if used >= cpu_seconds * check / CHECKS:
                    results = [self.measure(benchmark) for benchmark in validation]
                    score = sum(next(iter(r.scores.values())).value for r in results) / len(results)
                    if score > self.best:
                        self.best, best = score, copy.deepcopy(self.mlp.state_dict())
                    progress.set_postfix(validation=f"{100 * score:.1f}", steps=self.steps)
                    progress.update()
                    check = math.floor(used * CHECKS / cpu_seconds) + 1
        self.mlp.load_state_dict(best)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make a training step on a batch of one source, drawn by weight."""
        weights = [source.weight for source in self.sources]
        (source,) = self.random.choices(self.sources, weights)
        clips, queries, targets, target_ids, group_ids = source.draw(BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            predicted = self.mlp.train()(self.vectors.inputs(clips, queries))
        wanted = self.mlp.text_head(self.vectors.texts[targets])
        scale = self.mlp.logit_scale.exp().clamp(max=100)
        loss = info_nce(predicted, wanted, scale, target_ids, group_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.steps += 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.mlp_baseline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a trained model")
    add("--features", type=Path, required=True, help="its feature store, with all clips")
    add("--benchmarks", type=Path, required=True, help="file of the benchmarks to measure")
    add("--validation", type=Path, required=True, help="file with retrieval on validation data")
    add("--cpu-seconds", type=float, help="processor time; default: that of the model's trainings")
    add("--adapter", action="store_true", help="an adapter of texts, as large as the model's")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="folder to write; default: MODEL/mlp")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    output = args.output or args.model / "mlp"

    # 1. The model, its training and the benchmarks
    check_output_folder("--output", output)
    runs = read_runs(args.model)
    if not runs:
        raise RecipeError(f"{args.model}: it was not trained here; give a trained model.")
    cpu_seconds = args.cpu_seconds or sum(run["cpu_seconds"] for run in runs)
    benchmarks = load_benchmarks(args.benchmarks, ["all"])
    validation = load_benchmarks(args.validation, ["all"])
    validation = [benchmark for benchmark in validation if benchmark.task == "retrieval"]
    if not validation:
        raise RecipeError(f"--validation: {args.validation} has no retrieval benchmark.")
    recipe = yaml.safe_load((args.model / "recipes.yaml").read_text(encoding="utf-8"))[-1]
    sources = [read_source(SourceArguments(**each)) for each in recipe["data"]["sources"]]
    model, processor = load_model(str(args.model))
    purpose = "the MLP predicts embeddings of a Y-Encoder"
    check_vljepa("MODEL", str(args.model), model.config, purpose, takes_hybrids=True)
    features = FeatureStore.open(args.features, model.base_model, processor.video_processor)

    # 2. Training
    adapter_size = model.config.target_adapter_size
    if args.adapter and adapter_size is None:
        raise RecipeError(f"--adapter: {args.model} has no adapter (target_adapter_size).")
    options = {"bf16": runs[-1]["precision"] == "bf16", "seed": args.seed}
    options["adapter_size"] = adapter_size if args.adapter else None
    baseline = Baseline(model.base_model, processor, features, sources, **options)
    baseline.train(cpu_seconds, validation)
    rows = baseline.steps * BATCH
    print(f"{rows:,} rows in {cpu_seconds:.0f} CPU-seconds; validation {100 * baseline.best:.1f} %")

    # 3. The benchmarks
    results = []
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for benchmark in benchmarks:
            results.append(baseline.measure(benchmark))
            write_items(output / FILE, benchmark.name, results[-1].items, append=len(results) > 1)
        facts = {"mlp_of": args.model.name, "cpu_seconds": cpu_seconds, "rows": rows}
        facts["adapter_size"] = options["adapter_size"]
        write_results(output / "results.json", "mlp", results, features, facts)
        write_report(output / "report.html", "mlp", results, output / "trainer_state.json")
    print(text_tables(results))
    print(f"\n{output / 'results.json'}\n{output / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (FeatureError, FileNotFoundError, OutputError, RecipeError, ValueError) as error:
        sys.exit(f"error: {error}")
