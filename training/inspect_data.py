"""Inspect the data of a recipe before training: write one HTML page and print a summary.

    python -m training.inspect_data RECIPE.yaml [training.global_batch_size=64 …] --output page.html

The page shows samples as the model gets them: frames that were decoded, resized and cropped, and
texts that were cut to their limit.
"""

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval.evaluate import at_least_one
from eval.page import png, render, strip
from processing.output import OutputError, check_output_file, writing
from processing.processing_vljepa import VLJEPAProcessor
from processing.rows import BadRow, media_file, media_name
from training.arguments import Recipe, RecipeError, SourceArguments, read_recipe
from training.data.collator import ContrastiveCollator
from training.data.dataset import build_dataset
from training.data.facts import (
    Header,
    Sharing,
    clip_seconds,
    leaks,
    read_header,
    repeated_rows,
    sharing,
)
from training.data.sources import Source, StreamedSource, read_source, texts_of
from training.model.recipe_model import load_processor, new_model

TEXTS_AT_ONCE = 1000  # texts tokenized between two updates of the progress bar


@dataclass
class Sample:
    """Row as the model gets it.

    Attributes:
        frames (`np.ndarray` of shape `(T, h, w, 3)`, uint8): resized, cropped frames.
        query_tokens, target_tokens: texts decoded from the token ids.
    """

    row: dict
    frames: np.ndarray
    query_tokens: str
    target_tokens: str


@dataclass
class Lengths:
    """Lengths of texts in tokens, and the limit to which texts are cut."""

    counts: list[int]
    limit: int

    @property
    def cut(self) -> int:
        return sum(count > self.limit for count in self.counts)


@dataclass
class SourceFacts:
    """Facts about a source that the page shows.

    Attributes:
        whole: true if `rows` are all rows; false if they are the first rows of a streamed source.
        examined: rows whose texts are tokenized and whose files are opened: all rows, or a random
            sample of `--limit` rows.
        draws: how often the recipe draws each row; `None` if the number of rows is unknown.
        headers: rows with the headers of their files.
        unreadable: names of files, with the error.
        shared: matches within a batch, by kind, because a batch holds videos or images.
    """

    arguments: SourceArguments
    rows: list[dict]
    whole: bool
    bad: list[BadRow]
    examined: list[dict]
    draws: float | None
    queries: Lengths
    targets: Lengths
    headers: list[tuple[dict, Header]]
    unreadable: list[tuple[str, str]]
    shared: dict[str, Sharing]
    samples: list[Sample]

    @property
    def name(self) -> str:
        return self.arguments.name

    @cached_property
    def media(self) -> set[str]:
        return {media_name(media_file(row)) for row in self.rows}

    @cached_property
    def distinct_targets(self) -> int:
        return len({row["target"] for row in self.rows})

    @cached_property
    def repeated(self) -> int:
        return repeated_rows(self.rows)

    @cached_property
    def leaking(self) -> list[dict]:
        return leaks(self.rows)

    @property
    def frequent(self) -> list[tuple[str, int]]:
        return Counter(row["target"] for row in self.rows).most_common(15)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Reasons of bad rows by frequency, without the part that names a file."""
        return Counter(row.reason.split(":")[0] for row in self.bad).most_common()


# -- reading as training does ------------------------------------------------------------------


def read_sources(recipe: Recipe) -> tuple[list[Source | StreamedSource], VLJEPAProcessor]:
    """Read the recipe's sources and the processor with which it trains."""
    sources = [read_source(source) for source in recipe.data.sources]
    if recipe.model.checkpoint is not None:
        return sources, load_processor(recipe.model, recipe.processor)
    texts = texts_of(sources, recipe.model.tokenizer_rows)
    return sources, new_model(recipe.model, recipe.processor, texts, recipe.training.seed)[1]


def samples_of(
    source: Source | StreamedSource,
    rows: list[dict],
    processor: VLJEPAProcessor,
    recipe: Recipe,
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Pass rows through the dataset and the collator of training.

    Returns: the samples, and the unreadable rows with the error.
    """
    part, collate = Source(source.arguments, rows, []), ContrastiveCollator(processor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = replace(
            recipe.data, max_bad_share=1.0, cache_dir=folder, num_workers=1, decode_once=True
        )
        try:
            dataset = build_dataset([part], processor.video_processor, arguments)
        except RecipeError as error:
            return [], [("the samples", str(error))]
        samples = [
            visible(row, collate([dataset[index]]), processor)
            for index, row in enumerate(dataset.rows)
        ]
    return samples, [(f"line {row.line}", row.reason) for row in part.bad]


def visible(row: dict, batch: dict[str, torch.Tensor], processor: VLJEPAProcessor) -> Sample:
    """Return the sample of a batch of one row: frames for display, and token ids as text."""
    frames = batch["frames"][0].permute(0, 2, 3, 1)  # (T, h, w, 3), uint8
    return Sample(
        row,
        frames.numpy(),
        processor.tokenizer.decode(batch["input_ids"][0]),
        processor.target_tokenizer.decode(batch["target_input_ids"][0]),
    )


# -- examining ---------------------------------------------------------------------------------


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, name: str
) -> Lengths:
    """Count the tokens of each text, special ones included, before it is cut to `limit`."""
    distinct = list(dict.fromkeys(texts))
    count_of = {}
    for start in tqdm(range(0, len(distinct), TEXTS_AT_ONCE), desc=name, leave=False):
        batch = distinct[start : start + TEXTS_AT_ONCE]
        ids = tokenizer(batch, verbose=False)["input_ids"]
        count_of |= {text: len(tokens) for text, tokens in zip(batch, ids, strict=True)}
    return Lengths([count_of[text] for text in texts], min(limit, tokenizer.model_max_length))


def read_headers(
    rows: list[dict],
) -> tuple[list[tuple[dict, Header]], list[tuple[str, str]]]:
    """Read the header of each row's file, each file once.

    Returns: rows with their headers, and names of unreadable files with the error.
    """
    found, unreadable = {}, {}
    for row in tqdm(rows, desc="files", leave=False):
        name = media_name(media_file(row))
        if name in found or name in unreadable:
            continue
        try:
            found[name] = read_header(row)
        # PIL and FFmpeg raise errors of any type; the page lists each one.
        except Exception as error:
            unreadable[name] = str(error)
    headers = [(row, found[name]) for row in rows if (name := media_name(media_file(row))) in found]
    return headers, list(unreadable.items())


def examine(
    source: Source | StreamedSource,
    processor: VLJEPAProcessor,
    recipe: Recipe,
    *,
    limit: int,
    num_samples: int,
    seed: int,
) -> SourceFacts:
    """Collect the facts about one source."""
    args, rows, whole = recipe.training, source.some_rows(), isinstance(source, Source)
    draw = random.Random(seed)
    examined = rows if len(rows) <= limit else draw.sample(rows, limit)
    batch = args.global_batch_size // args.gradient_accumulation_steps
    share = source.arguments.weight / sum(other.weight for other in recipe.data.sources)
    headers, unreadable = read_headers(examined)
    shown = draw.sample(rows, min(num_samples, len(rows)))
    samples, refused = samples_of(source, shown, processor, recipe)
    prompt = processor.prompt(processor.target_prompt_name)
    kinds = {kind: [row for row in rows if kind in row] for kind in ("video", "image")}
    shared = {kind: sharing(of_kind, batch) for kind, of_kind in kinds.items()}
    return SourceFacts(
        arguments=source.arguments,
        rows=rows,
        whole=whole,
        bad=source.bad if whole else [],
        examined=examined,
        draws=args.max_steps * args.global_batch_size * share / len(rows) if whole else None,
        queries=count_tokens(
            processor.tokenizer,
            [row["query"] for row in examined],
            processor.max_query_length,
            "queries",
        ),
        targets=count_tokens(
            processor.target_tokenizer,
            [prompt + row["target"] for row in examined],
            processor.max_target_length,
            "targets",
        ),
        headers=headers,
        unreadable=unreadable + refused,
        shared={kind: found for kind, found in shared.items() if found is not None},
        samples=samples,
    )


# -- showing -----------------------------------------------------------------------------------


def bins(values: list[int] | list[float]) -> np.ndarray:
    """Return the edges of 30 equal bins, or of one bin for each integer if these are few."""
    low, high = min(values), max(values)
    if isinstance(high, int) and high - low < 30:
        return np.arange(low - 0.5, high + 1)  # the last edge is high + 0.5
    return np.histogram_bin_edges(values, bins=30)


def histograms(facts: SourceFacts, processor: VLJEPAProcessor) -> dict[str, str]:
    """Plot the lengths of both texts, and seconds, frames and shorter sides of the clips.

    Returns: a picture for each, as a data URI, so that a narrow page can scroll through them.
    """
    video = processor.video_processor
    seconds = [clip_seconds(row, header) for row, header in facts.headers if "video" in row]
    panels = {
        "tokens of a query": (facts.queries.counts, facts.queries.limit),
        "tokens of a target": (facts.targets.counts, facts.targets.limit),
        "seconds of a clip": (seconds, None),
        "frames of a file": ([header.frames for _, header in facts.headers], video.num_frames),
        "pixels of the shorter side": (
            [min(header.width, header.height) for _, header in facts.headers],
            video.size["shortest_edge"],
        ),
    }
    known = {name: [v for v in values if v is not None] for name, (values, _) in panels.items()}
    return {name: histogram(name, known[name], panels[name][1]) for name in panels if known[name]}


def histogram(name: str, values: list[int] | list[float], mark: int | None) -> str:
    figure = Figure(figsize=(3, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=bins(values), color="#2563eb")
    if mark is not None and mark <= 2 * max(values):
        axes.axvline(mark, linestyle="--", color="#dc2626")
    axes.set_xlabel(name)
    axes.set_ylabel("number")
    axes.locator_params(integer=True, nbins=4)
    return png(figure)


def short(text: str, source: SourceFacts | None = None) -> str:
    """Make the paths in a text relative to the folder of the source's rows or to the working
    folder, if they are in it."""
    folders = [Path.cwd()]
    if source is not None and source.arguments.rows is not None:
        rows = Path(source.arguments.rows).absolute().parent
        folders = [rows, rows.resolve(), *folders]
    for folder in folders:
        # Only where a path begins: the working folder may be `/data`, and a path `/srv/data/a.mp4`.
        text = re.sub(rf"(?<![^\s'\"(:]){re.escape(str(folder))}/", "", text)
    return text


def count(number: int, noun: str) -> str:
    """Return, for example, "1 row" or "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shared_media(facts: list[SourceFacts]) -> list[tuple[str, str, int]]:
    """Return the pairs of sources that have media in common, and the number of these."""
    pairs = [(a.name, b.name, len(a.media & b.media)) for a, b in combinations(facts, 2)]
    return [pair for pair in pairs if pair[2]]


def summary(facts: SourceFacts) -> str:
    """Return the printed summary of a source."""
    drawn = (
        f"each row is drawn {facts.draws:.1f} times"
        if facts.whole
        else "the first rows of a streamed source"
    )
    lines = [
        f"{facts.name}: {len(facts.rows)} rows of {len(facts.media)} media, "
        f"{facts.distinct_targets} targets, {len(facts.bad)} bad rows; {drawn}",
        f"  tokens: query at most {max(facts.queries.counts)} ({facts.queries.cut} cut), "
        f"target at most {max(facts.targets.counts)} ({facts.targets.cut} cut)",
        f"  {facts.repeated} repeated rows, {len(facts.leaking)} queries with their target in "
        f"them, {len(facts.unreadable)} unreadable files of {len(facts.examined)} rows",
    ]
    lines += [
        f"  {kind}s, batches of {found.batch}: {found.pairs:.2%} of pairs masked, {found.rows:.0%} "
        f"of rows have a match, chance loss about {found.chance_loss:.3f}"
        for kind, found in facts.shared.items()
    ]
    return "\n".join(lines)


def write_page(
    path: Path,
    recipe_path: str,
    recipe: Recipe,
    facts: list[SourceFacts],
    processor: VLJEPAProcessor,
) -> None:
    page = render(
        Path(__file__).with_name("inspection_template.html"),
        {
            "strip": strip,
            "media_name": lambda row: media_name(media_file(row)),
            "short": short,
            "count": count,
        },
        recipe_path=recipe_path,
        recipe=recipe,
        sources=facts,
        histograms=[histograms(source, processor) for source in facts],
        shared_media=shared_media(facts),
        video_processor=processor.video_processor,
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.inspect_data", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="YAML file of the recipe")
    parser.add_argument("overrides", nargs="*", help="changed keys, such as processor.num_frames=4")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--limit", type=at_least_one, default=2000, help="rows to examine per source"
    )
    parser.add_argument(
        "--samples", type=at_least_one, default=12, help="samples to show per source"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    arguments = parser.parse_intermixed_args(argv)
    check_output_file("--output", arguments.output)

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    sources, processor = read_sources(recipe)
    facts = [
        examine(
            source,
            processor,
            recipe,
            limit=arguments.limit,
            num_samples=arguments.samples,
            seed=arguments.seed,
        )
        for source in tqdm(sources, desc="sources")
    ]
    write_page(arguments.output, arguments.recipe, recipe, facts, processor)
    print("\n".join(map(summary, facts)))
    for one, other, number in shared_media(facts):
        print(f"{one} and {other} share {number} media")
    print(f"The page: {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
