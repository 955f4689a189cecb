"""Look at what a recipe will train on, before it does: one HTML page, and a summary in print.

    python -m training.inspect_data RECIPE.yaml [training.global_batch_size=64 …] --output page.html

The page shows samples as the model gets them: decoded, resized, cropped, normalised, collated,
and made visible again.
"""

import argparse
import random
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

TEXTS_AT_ONCE = 1000  # to a tokenizer, so that progress is seen


@dataclass
class Sample:
    """A row as the model gets it.

    Attributes:
        frames (`np.ndarray` of shape `(T, h, w, 3)`, uint8): pixel values made visible.
        query_tokens, target_tokens: the token ids as text again.
    """

    row: dict
    frames: np.ndarray
    query_tokens: str
    target_tokens: str


@dataclass
class Lengths:
    """Numbers of tokens, and how many a text is cut to."""

    counts: list[int]
    limit: int

    @property
    def cut(self) -> int:
        return sum(count > self.limit for count in self.counts)


@dataclass
class SourceFacts:
    """What the page says of a source. `looked_at` are the rows whose texts were counted in tokens
    and whose files were opened: all of them, or as many as asked for, drawn at random.

    Attributes:
        whole: whether `rows` are all there are; of a streamed source they are its first.
        visits: how often the recipe draws each row, if that is known.
        shared: by kind, because a batch holds videos or images.
    """

    arguments: SourceArguments
    rows: list[dict]
    whole: bool
    bad: list[BadRow]
    looked_at: list[dict]
    visits: float | None
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
        """Why rows are bad, without what differs from file to file."""
        return Counter(row.reason.split(":")[0] for row in self.bad).most_common()


# -- reading as training does ------------------------------------------------------------------


def read_sources(recipe: Recipe) -> tuple[list[Source | StreamedSource], VLJEPAProcessor]:
    """The recipe's rows and the processor it trains with."""
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
    """Rows through the dataset and the collator of training, and those that did not get through
    with the reason."""
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
    """A batch of one row, its frames and its tokens put together again."""
    frames = batch["frames"][0].permute(0, 2, 3, 1)  # (T, h, w, 3), uint8
    return Sample(
        row,
        frames.numpy(),
        processor.tokenizer.decode(batch["input_ids"][0]),
        processor.target_tokenizer.decode(batch["target_input_ids"][0]),
    )


# -- looking -----------------------------------------------------------------------------------


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, name: str
) -> Lengths:
    """Tokens of each text, special ones included, before it is cut to `limit`."""
    distinct = list(dict.fromkeys(texts))
    count_of = {}
    for start in tqdm(range(0, len(distinct), TEXTS_AT_ONCE), desc=name, leave=False):
        some = distinct[start : start + TEXTS_AT_ONCE]
        ids = tokenizer(some, verbose=False)["input_ids"]
        count_of |= {text: len(tokens) for text, tokens in zip(some, ids, strict=True)}
    return Lengths([count_of[text] for text in texts], min(limit, tokenizer.model_max_length))


def read_headers(
    rows: list[dict],
) -> tuple[list[tuple[dict, Header]], list[tuple[str, str]]]:
    """The header of each row's file, each file opened once, and those that have none."""
    found, unreadable = {}, {}
    for row in tqdm(rows, desc="files", leave=False):
        name = media_name(media_file(row))
        if name in found or name in unreadable:
            continue
        try:
            found[name] = read_header(row)
        # PIL's and FFmpeg's readers raise what they like; whatever it is, the page names it.
        except Exception as error:
            unreadable[name] = str(error)
    headers = [(row, found[name]) for row in rows if (name := media_name(media_file(row))) in found]
    return headers, list(unreadable.items())


def look_at(
    source: Source | StreamedSource,
    processor: VLJEPAProcessor,
    recipe: Recipe,
    *,
    limit: int,
    num_samples: int,
    seed: int,
) -> SourceFacts:
    """Everything the page says of one source."""
    args, rows, whole = recipe.training, source.first_rows(), isinstance(source, Source)
    draw = random.Random(seed)
    looked_at = rows if len(rows) <= limit else draw.sample(rows, limit)
    batch = args.global_batch_size // args.gradient_accumulation_steps
    share = source.arguments.weight / sum(other.weight for other in recipe.data.sources)
    headers, unreadable = read_headers(looked_at)
    shown = draw.sample(rows, min(num_samples, len(rows)))
    samples, refused = samples_of(source, shown, processor, recipe)
    prompt = processor.prompt(processor.target_prompt_name)
    kinds = {kind: [row for row in rows if kind in row] for kind in ("video", "image")}
    shared = {kind: sharing(some, batch) for kind, some in kinds.items()}
    return SourceFacts(
        arguments=source.arguments,
        rows=rows,
        whole=whole,
        bad=source.bad if whole else [],
        looked_at=looked_at,
        visits=args.max_steps * args.global_batch_size * share / len(rows) if whole else None,
        queries=count_tokens(
            processor.tokenizer,
            [row["query"] for row in looked_at],
            processor.max_query_length,
            "queries",
        ),
        targets=count_tokens(
            processor.target_tokenizer,
            [prompt + row["target"] for row in looked_at],
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
    """Edges of at most 30 equal bins; of a few whole numbers, one around each."""
    low, high = min(values), max(values)
    if isinstance(high, int) and high - low < 30:
        return np.arange(low - 0.5, high + 1)  # whose last edge is high + 0.5
    return np.histogram_bin_edges(values, bins=30)


def histograms(facts: SourceFacts, processor: VLJEPAProcessor) -> str:
    """Tokens of both texts; seconds, frames and shorter sides of the clips, where known."""
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
    known = {name: values for name, values in known.items() if values}
    figure = Figure(figsize=(3 * len(known), 2.4), layout="constrained")
    for axes, (name, values) in zip(
        figure.subplots(1, len(known), squeeze=False)[0], known.items(), strict=True
    ):
        mark = panels[name][1]
        axes.hist(values, bins=bins(values), color="#2563eb")
        if mark is not None and mark <= 2 * max(values):
            axes.axvline(mark, linestyle="--", color="#dc2626")
        axes.set_xlabel(name)
        axes.locator_params(integer=True, nbins=4)
    return png(figure)


def shared_media(facts: list[SourceFacts]) -> list[tuple[str, str, int]]:
    """Pairs of sources that hold the same media, and how many."""
    pairs = [(a.name, b.name, len(a.media & b.media)) for a, b in combinations(facts, 2)]
    return [pair for pair in pairs if pair[2]]


def summary(facts: SourceFacts) -> str:
    """What the print says of a source."""
    drawn = (
        f"each row is drawn {facts.visits:.1f} times" if facts.whole else "the first of a stream"
    )
    lines = [
        f"{facts.name}: {len(facts.rows)} rows of {len(facts.media)} media, "
        f"{facts.distinct_targets} targets, {len(facts.bad)} bad rows; {drawn}",
        f"  tokens: query at most {max(facts.queries.counts)} ({facts.queries.cut} cut), "
        f"target at most {max(facts.targets.counts)} ({facts.targets.cut} cut)",
        f"  {facts.repeated} repeated rows, {len(facts.leaking)} queries that hold their target, "
        f"{len(facts.unreadable)} unreadable files of {len(facts.looked_at)} rows",
    ]
    lines += [
        f"  {kind}s, batches of {found.batch}: {found.pairs:.2%} of pairs masked, {found.rows:.0%} "
        f"of rows meet their own target, chance loss about {found.chance_loss:.3f}"
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
        {"strip": strip, "media_name": lambda row: media_name(media_file(row))},
        recipe_path=recipe_path,
        recipe=recipe,
        sources=facts,
        histograms=[histograms(source, processor) for source in facts],
        shared_media=shared_media(facts),
        video_processor=processor.video_processor,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.inspect_data", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="a YAML file, as training.train takes it")
    parser.add_argument(
        "overrides", nargs="*", help="changes to it, such as processor.num_frames=4"
    )
    parser.add_argument("--output", type=Path, required=True, help="the page")
    parser.add_argument(
        "--limit", type=at_least_one, default=2000, help="rows of a source to look into"
    )
    parser.add_argument(
        "--samples", type=at_least_one, default=12, help="of each source on the page"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    arguments = parser.parse_intermixed_args(argv)

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    sources, processor = read_sources(recipe)
    facts = [
        look_at(
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
    except RecipeError as error:
        sys.exit(f"error: {error}")
