"""The demonstration's pictures: splits, altered views, balanced questions, packages."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from processing import read_rows
from training.demo_data import picture_rows, picture_sets, pictures
from training.demo_data.picture_sets import SETS, TEXTS, PicturesError, fetch
from training.demo_data.picture_views import picture_of, view_of
from training.demo_data.pictures import main

GROUPS = ("people-body", "component", "food-drink", "objects", "flags")
SPLITS = ("train", "val", "test", "test_unrelated", "val_style", "test_style")
NAMES_ONLY = ("noto-v1", "emojione")
BOX = '<rect x="{}" y="{}" width="6" height="6" fill="#{}"/>'


def body(number: int, style: str) -> str:
    shade = hashlib.sha256(f"{number} {style}".encode()).hexdigest()[:6]
    return BOX.format(number % 5, number % 7, shade)


def emoji(number: int, label: str, group: int, **others: object) -> dict:
    tags = [f"tag {group}", f"even {number % 2}", "?"]
    return {
        "label": label,
        "hexcode": f"1F{number:03X}-FE0F",
        "tags": tags,
        "group": group,
        "subgroup": group,
        **others,
    }


def data() -> list[dict]:
    found = [{"label": "regional indicator A", "hexcode": "1F1E6"}]
    found.append(emoji(900, "light skin tone", 1))
    for number, kind in enumerate(("man", "woman", "person")):
        skins = [emoji(800 + number, f"{kind} running: light skin tone", 0)]
        found.append(emoji(number, f"{kind} running", 0, skins=skins))
    found.append(emoji(3, "person running: facing right", 0))
    for number in range(10, 22):
        found.append(emoji(number, f"food {chr(87 + number)}", 2))
        found.append(emoji(number + 20, f"object {chr(87 + number)}", 3))
    found += [emoji(number, f"flag: {number}", 4) for number in range(60, 66)]
    return found


def icons(style: str) -> tuple[dict, dict, dict]:
    """Icons without the last flag in one style, whose first two flags are equal.

    Two of the sets have names only. One is that of a label, the others are those of other sets.
    """
    numbers = [number for number in range(100) if style != "noto" or number != 65]
    drawn = {f"icon-{n}": {"body": body(60 if n == 61 else n, style)} for n in numbers}
    drawn["icon-10"]["width"] = 4  # higher than wide
    codes = {f"1f{number:03x}": f"icon-{number}" for number in numbers}
    codes["1f384"] = "mirrored"  # an alias, which has no drawing of its own
    if style in NAMES_ONLY:
        drawn = {"flag-for-62" if name == "icon-62" else name: each for name, each in drawn.items()}
        drawn["unknown"] = {"body": body(1, style)}
        codes = {}
    return (
        {"icons": drawn, "width": 12, "height": 12},
        codes,
        {"license": {"spdx": f"{style}-licence"}, "author": {"name": style}},
    )


def pack(path: Path, **members: object) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            encoded = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name.replace('__', '/')}.json")
            member.size = len(encoded)
            archive.addfile(member, io.BytesIO(encoded))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("packages")
    messages = {"groups": [{"key": key, "message": key.replace("-", " & ")} for key in GROUPS]}
    numbered = {str(number): key for number, key in enumerate(GROUPS)}
    texts = {
        "en__data": data(),
        "en__messages": messages,
        "meta__groups": {"groups": numbered, "subgroups": numbered},
    }
    files = {TEXTS: ("texts.tgz", pack(folder / "texts.tgz", **texts))}
    for style, package in SETS.items():
        drawn, codes, info = icons(style)
        digest = pack(folder / f"{style}.tgz", icons=drawn, chars=codes, info=info)
        files[package] = (f"{style}.tgz", digest)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(picture_sets, "FILES", files)
        changed.setattr(pictures, "UNSEEN", {"test": 6, "val": 4})
        changed.setattr(pictures, "STYLE_VAL", 5)
        changed.setattr(picture_rows, "FREQUENT", 2)
        output = folder / "made"
        options = ["--output", output, "--packages", folder, "--views", "1", "--size", "12"]
        main([*map(str, options), "--workers", "1"])
        yield output


def rows(made: Path, split: str, kind: str) -> list[dict]:
    lines = (made / f"{split}_{kind}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def codes_of(made: Path, split: str) -> set[str]:
    """Return the concepts of a split."""
    found = (Path(row["image"]).stem for row in rows(made, split, "captions"))
    return {name.split("_")[0] for name in found}


def styles_of(made: Path, split: str) -> set[str]:
    return {Path(row["image"]).parent.name for row in rows(made, split, "captions")}


def test_picture_splits_share_concepts_and_styles_only_as_stated(made: Path) -> None:
    codes = {split: codes_of(made, split) for split in SPLITS}
    assert (len(codes["test"]), len(codes["val"])) == (6, 4)
    assert len({row["group_id"] for row in rows(made, "val_style", "captions")}) == 5
    assert not codes["test"] & codes["val"]
    assert not codes["train"] & (codes["test"] | codes["val"])
    assert codes["val_style"] | codes["test_style"] <= codes["train"]
    assert not codes["val_style"] & codes["test_style"]
    assert styles_of(made, "train") == set(SETS) - {"openmoji"}
    assert styles_of(made, "test") == styles_of(made, "val") == set(SETS)
    assert styles_of(made, "val_style") == styles_of(made, "test_style") == {"openmoji"}


def test_picture_splits_share_no_equal_drawing_and_have_no_unseen_flag(made: Path) -> None:
    labels = {name: labels_of(made, name) for name in ("train", "val", "test")}
    assert not [each for name in ("val", "test") for each in labels[name] if "flag" in each]
    every = set().union(*labels.values())
    assert not [each for each in every if "tone" in each or "regional" in each]


def labels_of(made: Path, split: str) -> set[str]:
    return {row["target"] for row in rows(made, split, "captions")}


def test_unrelated_pictures_are_those_of_the_test_without_a_relative(made: Path) -> None:
    tested, alone = labels_of(made, "test"), labels_of(made, "test_unrelated")
    running = {label for label in tested if "running" in label}
    assert running and any("running" in label for label in labels_of(made, "train"))
    assert alone == tested - running


def test_pictures_of_sets_without_codes_are_found_by_their_names(made: Path) -> None:
    drawn = {style: codes_in(made, style) for style in SETS}
    assert drawn["emojione"] == drawn["noto-v1"] == drawn["twemoji"]
    assert "1F03E" in drawn["emojione"]  # "flag: 62", by its label


def codes_in(made: Path, style: str) -> set[str]:
    return {path.stem for path in (made / "pictures" / style).glob("*.png") if "_" not in path.stem}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("flag: Åland Islands", "flag-for-aland-islands"),
        ("man’s shoe", "mans-shoe"),
        ("keycap: 1", "keycap-1"),
        ("Mrs. Claus", "mrs-claus"),
        ("light rail & rain", "light-rail-and-rain"),
    ],
)
def test_names_of_icons_follow_from_labels(label: str, name: str) -> None:
    assert picture_sets.kebab(label) == name


def test_pictures_of_equal_drawings_are_one_group(made: Path) -> None:
    groups = {row["target"]: row["group_id"] for row in rows(made, "train", "captions")}
    assert groups["flag: 60"] == groups["flag: 61"] != groups["flag: 62"]
    together = [
        {"flag: 60", "flag: 61"} <= labels_of(made, split) for split in ("val_style", "test_style")
    ]
    assert sorted(together) == [False, True]


@pytest.mark.parametrize("split", SPLITS)
def test_picture_rows_are_valid_and_only_training_has_views(made: Path, split: str) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    for kind in ("captions", "tags", "groups", "subgroups", "questions"):
        found, bad = read_rows(made / f"{split}_{kind}.jsonl")
        assert not bad
        assert len(found) == manifest["counts"][split][kind]
        assert all(Path(row["image"]).is_file() for row in found)
    images = {row["image"] for row in rows(made, split, "captions")}
    views = {image for image in images if "_" in Path(image).stem}
    assert len(views) == (len(images) // 2 if split == "train" else 0)


def test_picture_manifest_names_author_and_licence_of_each_set(made: Path) -> None:
    sources = json.loads((made / "manifest.json").read_text())["sources"]
    assert sources["noto"]["licence"] == "noto-licence"
    assert sources["noto"]["author"] == "noto"
    assert sources.keys() == {*SETS, "texts"}


@pytest.mark.parametrize("split", ["train", "test", "test_style"])
def test_picture_questions_are_right_and_balanced(made: Path, split: str) -> None:
    groups = {row["image"]: row["target"] for row in rows(made, split, "groups")}
    answers: dict[tuple, Counter] = {}
    for row in rows(made, split, "questions"):
        sheet = (Path(row["image"]).parent.name, "_" in Path(row["image"]).stem)
        counted = answers.setdefault((row["question_type"], sheet, row["query"]), Counter())
        counted[row["target"]] += 1
        if row["question_type"] == "in group":
            right = row["query"] == f"Does this picture belong to {groups[row['image']]}?"
            assert row["target"] == ("yes" if right else "no")
    for (kind, *_), counted in answers.items():
        if kind in ("in group", "has tag", "which tag"):
            assert len(counted) == 2
            assert len(set(counted.values())) == 1
    # Six pictures may be of one group.
    kinds = {kind for kind, *_ in answers} | ({"in group"} if split == "test" else set())
    assert kinds == {"group", "subgroup", "in group", "has tag", "which tag"}


def test_pictures_are_made_once(made: Path, capsys: pytest.CaptureFixture) -> None:
    main(["--output", str(made), "--views", "1", "--size", "12"])
    assert "already contains" in capsys.readouterr().out


def drawing(color: str = "ff0000") -> str:
    box = f'<rect x="4" y="6" width="8" height="4" fill="#{color}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{box}</svg>'


def filled(image: np.ndarray) -> float:
    """Return the filled share of the drawing's bounding box."""
    dark = image.min(axis=2) < 128
    down, right = np.nonzero(dark)
    return dark[down.min() : down.max() + 1, right.min() : right.max() + 1].mean()


def test_picture_view_is_smaller_and_repeatable() -> None:
    whole = np.array(picture_of(drawing(), 64))
    views = [np.array(view_of(drawing(), "box", 64, str(seed))) for seed in range(8)]
    ink = [(view.min(axis=2) < 128).sum() for view in views]
    assert whole.shape == (64, 64, 3)
    assert max(ink) < (whole.min(axis=2) < 128).sum() * 1.05 and len(set(ink)) > 4
    np.testing.assert_array_equal(views[3], np.array(view_of(drawing(), "box", 64, "3")))


@pytest.mark.parametrize(
    ("text", "turned"), [("box", True), ("right arrow", False), ("one o'clock", False)]
)
def test_picture_view_is_turned_unless_a_text_names_a_direction(text: str, turned: bool) -> None:
    shares = [filled(np.array(view_of(drawing(), text, 128, str(seed)))) for seed in range(6)]
    assert (min(shares) < 0.8) == turned
    assert turned or min(shares) > 0.95


@pytest.mark.parametrize(("text", "kept"), [("box", False), ("Red apple", True), ("flag: x", True)])
def test_picture_view_keeps_colours_that_a_text_names(text: str, kept: bool) -> None:
    found = set()
    for seed in range(6):
        pixels = np.array(view_of(drawing("c06040"), text, 64, str(seed))).reshape(-1, 3)
        found.add(Counter(map(tuple, pixels.tolist())).most_common(2)[1][0])  # after white
    assert (found == {(0xC0, 0x60, 0x40)}) == kept


def test_fetch_names_a_wrong_file_and_missing_npm(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(picture_sets.shutil, "which", lambda *args, **options: None)
    with pytest.raises(PicturesError, match="npm is missing: install it"):
        fetch(TEXTS, tmp_path)
    (tmp_path / picture_sets.FILES[TEXTS][0]).write_bytes(b"cut")
    with pytest.raises(PicturesError, match="its SHA-256 is .* Delete the file"):
        fetch(TEXTS, tmp_path)
