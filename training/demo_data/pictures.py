"""Make a demonstration set of real pictures: `python -m training.demo_data.pictures`.

Emoji in six sets by five teams, with the texts that the Unicode CLDR project wrote about them. npm
downloads seven packages, 16 MB (`picture_sets.py` lists their licences). The output folder contains

- `pictures/SET/CODE.png`: a drawing on white; `CODE_1.png`, … are altered views of it, which only
  training has.
- `{split}_captions.jsonl`, `_tags`, `_groups`, `_subgroups` and `_questions`: rows.
- `manifest.json`: arguments, counts, and the author and licence of each set.

| split      | concepts         | drawn by    |
|------------|------------------|-------------|
| train      | 1,400 of 1,900   | four teams  |
| val, test  | not in training  | five teams  |
| val_style, test_style | those of training | the fifth team |

The two validation splits have other concepts than the two test splits. A concept of `val` or `test`
may have relatives in training, which differ from it in gender or direction only. `test_unrelated`
has those of `test` that have none. Skin tones are left out: they are one concept in six colours.
`pip install ".[pictures]"` installs the renderer.
"""

import argparse
import json
import os
import random
import shutil
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from training.demo_data.picture_rows import Picture, pairs_of_tags, rows_of
from training.demo_data.picture_sets import (
    TEXTS,
    Concept,
    Drawings,
    PicturesError,
    fetch,
    merge_equal,
    read_concepts,
    read_sets,
)
from training.demo_data.picture_views import picture_of, view_of
from training.demo_data.writing import write_jsonl

# To be raised whenever the same arguments give other pictures or rows than before.
GENERATOR_VERSION = 2
# Held out for its licence too: the weights of a model trained on the other three owe nothing to
# the share-alike clause.
HELD_OUT = "openmoji"
UNSEEN = {"test": 320, "val": 120}  # concepts
STYLE_VAL = 380  # concepts of training, drawn in the held-out style
# Nobody can name the flag of a country from its picture without having seen it.
NEVER_UNSEEN = "flags"
SEED = 0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.demo_data.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("data/pictures"))
    add("--views", type=int, default=2, help="altered views of each picture of training")
    add("--size", type=int, default=112, help="side of the pictures in pixels")
    add("--packages", type=Path, default=Path("data/packages"), help="folder of the downloads")
    add("--workers", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def split_concepts(
    concepts: list[Concept], sizes: dict[str, int]
) -> tuple[list[Concept], dict[str, list[Concept]]]:
    """Return the concepts of training, and those of the other splits.

    Of concepts with equal drawings, the other splits have the first, and training has none.
    """
    equal: dict[str, list[Concept]] = {}
    for concept in concepts:
        equal.setdefault(concept.same, []).append(concept)
    nameable = [
        code
        for code, members in sorted(equal.items())
        if all(concept.group != NEVER_UNSEEN for concept in members)
    ]
    chosen = iter(random.Random(SEED).sample(nameable, sum(sizes.values())))
    unseen, held_out = {}, set()
    for split, size in sizes.items():
        codes = [next(chosen) for _ in range(size)]
        held_out.update(codes)
        unseen[split] = [equal[code][0] for code in codes]
    return [concept for concept in concepts if concept.same not in held_out], unseen


def pictures_of(
    concepts: list[Concept], sets: dict[str, Drawings], names: list[str], views: int = 0
) -> list[Picture]:
    """Return the pictures of concepts in some of the sets, with altered views."""
    return [
        Picture(concept, name, view)
        for name in names
        for view in range(views + 1)
        for concept in concepts
        if concept.code in sets[name].svg
    ]


def split_pictures(
    concepts: list[Concept], sets: dict[str, Drawings], views: int
) -> dict[str, list[Picture]]:
    """Return the pictures of each split."""
    trained, unseen = split_concepts(concepts, UNSEEN)
    seen_styles = [name for name in sets if name != HELD_OUT]
    style = pictures_of(trained, sets, [HELD_OUT])
    # Concepts of one drawing are in one split.
    same = sorted({picture.concept.same for picture in style})
    val = set(random.Random(SEED).sample(same, STYLE_VAL))
    splits = {"train": pictures_of(trained, sets, seen_styles, views)}
    splits |= {name: pictures_of(each, sets, list(sets)) for name, each in unseen.items()}
    families = {concept.family for concept in trained}
    splits["test_unrelated"] = [
        each for each in splits["test"] if each.concept.family not in families
    ]
    splits["val_style"] = [each for each in style if each.concept.same in val]
    splits["test_style"] = [each for each in style if each.concept.same not in val]
    return splits


def save(folder: Path, size: int, job: tuple[Picture, str]) -> None:
    """Render a picture from its SVG and write its file."""
    picture, svg = job
    if picture.view:
        image = view_of(svg, picture.concept.text, size, seed=picture.path)
    else:
        image = picture_of(svg, size)
    image.save(folder / picture.path, optimize=True)


def summarise(pictures: list[Picture], rows: dict[str, list[dict]]) -> dict[str, int]:
    return {
        "concepts": len({picture.concept.code for picture in pictures}),
        "pictures": len(pictures),
        **{name: len(group) for name, group in rows.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    manifest = args.output / "manifest.json"
    wanted = {"generator_version": GENERATOR_VERSION, "views": args.views, "size": args.size}
    if manifest.exists() and json.loads(manifest.read_text())["arguments"] == wanted:
        print(f"{args.output} already contains this data.")
        return

    # 1. The packages
    concepts = read_concepts(fetch(TEXTS, args.packages))
    sets = read_sets(concepts, args.packages)
    splits = split_pictures(merge_equal(concepts, sets.values()), sets, args.views)

    # 2. The pictures. The manifest is written last, so a folder without one is unfinished.
    shutil.rmtree(args.output, ignore_errors=True)
    for name in sets:
        (args.output / "pictures" / name).mkdir(parents=True)
    every = dict.fromkeys(picture for pictures in splits.values() for picture in pictures)
    todo = [(picture, sets[picture.style].svg[picture.concept.code]) for picture in every]
    with Pool(args.workers) as pool:
        done = pool.imap_unordered(partial(save, args.output, args.size), todo, chunksize=32)
        for _ in tqdm(done, "pictures", len(todo)):
            pass

    # 3. The rows
    trained = {picture.concept.code: picture.concept for picture in splits["train"]}
    pairs = pairs_of_tags(list(trained.values()), SEED)
    counts = {}
    for split, pictures in splits.items():
        rows = rows_of(pictures, pairs)
        for name, group in rows.items():
            write_jsonl(args.output / f"{split}_{name}.jsonl", group)
        counts[split] = summarise(pictures, rows)
    sources = {
        name: {"package": each.package, "licence": each.licence, "author": each.author}
        for name, each in sets.items()
    }
    sources["texts"] = {
        "package": TEXTS,
        "licence": "MIT AND Unicode-3.0",
        "author": "Miles Johnson; the Unicode CLDR project",
    }
    facts = {"arguments": wanted, "held_out_style": HELD_OUT, "counts": counts, "sources": sources}
    manifest.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"Wrote {args.output}; see {manifest} for its contents.")


if __name__ == "__main__":
    try:
        main()
    except PicturesError as error:
        sys.exit(f"error: {error}")
