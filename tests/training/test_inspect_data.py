"""Tests of `training.inspect_data`: counts, samples, and a page that escapes the texts of rows."""

import io
import itertools
import json
import math
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin

from processing.video_io import read_image
from tests.media import write_tracks
from tests.tiny import noise, tiny_processor, tiny_recipe, tiny_rows, write_rows
from training.arguments import read_recipe
from training.data.facts import (
    clip_seconds,
    leaks,
    read_header,
    repeated_rows,
    sharing,
)
from training.data.sources import read_source
from training.inspect_data import count_tokens, main, samples_of, short

SCRIPT = "<script>alert(1)</script>"
ROWS = [
    {"image": "wide.png", "query": SCRIPT, "target": "a cat", "group_id": "one"},
    {"image": "wide.png", "query": "is it red or blue ?", "target": "red"},
    {"image": "wide.png", "query": "is it red or blue ?", "target": "red"},
    {"image": "tall.jpg", "query": "", "target": "<b>bold</b>", "negatives": ["<i>thin</i>"]},
    {"video": "wide.mp4", "query": "", "target": "he rides", "group_id": None},
    {"video": "broken.mp4", "query": "", "target": "nothing"},
    {"video": "absent.mp4", "query": "", "target": "nothing"},
    {"video": "wide.mp4", "query": "", "target": ""},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_rows(folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "other.jsonl", [{"image": "wide.png", "target": "a cat"}])
    path = tiny_recipe(folder / "rows.jsonl")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"]["sources"].append({"rows": str(folder / "other.jsonl"), "weight": 3})
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def inspected(folder) -> tuple[str, str]:
    """The page, and the printed summary."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        main([str(folder / "recipe.yaml"), "--output", str(folder / "pages" / "page.html")])
    return read(folder / "pages" / "page.html"), printed.getvalue()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def inspect(folder: Path, source: dict, page: Path) -> str:
    """Inspect one source with the recipe's other settings, and return the page."""
    override = f"data.sources={json.dumps([source])}"
    # The override comes after an option: the command accepts both orders.
    main([str(folder / "recipe.yaml"), "--output", str(page), override])
    return read(page)


def test_inspect_data_summary_counts_rows_media_and_matches(folder, inspected):
    _, printed = inspected
    rows, other = folder / "rows.jsonl", folder / "other.jsonl"
    # 4 steps of 2 rows, a quarter of them from the first source, which has 6 rows.
    assert f"{rows}: 6 rows of 4 media, 5 targets, 2 bad rows; each row is drawn 0.3" in printed
    assert f"{other}: 1 rows of 1 media, 1 targets, 0 bad rows; each row is drawn 6.0" in printed
    assert "1 repeated rows, 2 queries with their target in them" in printed
    assert f"{rows} and {other} share 1 media" in printed
    # Of 4 images, those with "red" are one pair of six; a batch of 2 is such a pair.
    assert "images, batches of 2: 16.67% of pairs masked, 17% of rows have a match" in printed


def test_inspect_data_page_is_self_contained_and_escapes_rows(inspected):
    page, _ = inspected
    assert SCRIPT not in page
    assert "<b>bold</b>" not in page
    assert "<i>thin</i>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert page.count('alt="histogram of ') == 5 + 3  # the second source has images only
    assert len(sources) == 5 + 3 + 5 + 1  # histograms, samples
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"<link|<iframe|<script|url\(|@import", page)


def test_inspect_data_page_lists_bad_rows_unreadable_files_and_leaks(inspected):
    page, _ = inspected
    assert "<li>1 row: video file is missing</li>" in page
    assert "<li>1 row: target is empty</li>" in page
    assert "<li>rows.jsonl:8: target is empty</li>" in page
    assert "broken.mp4: " in page  # when its header was read
    assert "line 6: " in page  # when it was decoded for the samples
    assert page.count("is it red or blue ? → red") == 2


def test_inspect_data_page_counts_files_in_two_sources(folder, inspected):
    page, _ = inspected
    assert f"<li>1 file: in {folder}/rows.jsonl and in {folder}/other.jsonl</li>" in page


def test_inspect_data_page_shows_relative_paths(folder, tmp_path, monkeypatch):
    """Relative to the folder of the rows, and for sources to the working folder."""
    monkeypatch.chdir(folder)
    main([str(folder / "recipe.yaml"), "--output", str(tmp_path / "page.html")])
    page = read(tmp_path / "page.html")
    assert str(folder) not in page
    assert "<h1>recipe.yaml</h1>" in page and "<h2>rows.jsonl</h2>" in page
    assert "<code>wide.png" in page


def test_short_changes_no_path_that_only_contains_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = f"/mnt{tmp_path}/a.mp4 and {tmp_path}er/a.mp4"
    assert short(f"{tmp_path}/a.mp4: line 3: {tmp_path}/b.mp4; {other}") == (
        f"a.mp4: line 3: b.mp4; {other}"
    )


def test_inspect_data_page_states_how_many_rows_were_examined(folder, inspected, tmp_path):
    page, _ = inspected
    assert "Lengths and files: all 6 rows." in page
    limited = tmp_path / "limited.html"
    options = ["--limit", "2", "--samples", "1", "--output", str(limited)]
    main([str(folder / "recipe.yaml"), *options])
    assert "Lengths and files: 2 rows, drawn at random from\n6." in read(limited)
    assert read(limited).count('class="card"') <= 2
    main([str(folder / "recipe.yaml"), *options[:-1], str(tmp_path / "again.html")])
    assert read(tmp_path / "again.html") == read(limited)  # drawn with one seed


def test_inspect_data_shows_the_first_rows_of_a_streamed_source(folder, tmp_path, capsys):
    """The source is a shard that contains its media, read as in training."""
    content = (folder / "tall.jpg").read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for name, member in (("0.jpg", content), ("0.txt", b"a cat"), ("0.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(member)
            shard.addfile(info, io.BytesIO(member))
    source = {
        "dataset": "webdataset",
        "data_files": str(tmp_path / "0.tar"),
        "columns": "cc3m",
        "streaming": True,
    }
    page = inspect(folder, source, tmp_path / "page.html")
    printed = capsys.readouterr().out
    assert "1 rows of 1 media, 1 targets, 0 bad rows; the first rows of a streamed" in printed
    assert "The source is streamed: this page covers its first 1 rows" in page
    assert "cc3m | " in page  # the row's group
    assert page.count('class="card"') == 1


def test_inspect_data_page_lists_odd_rows(folder, tmp_path, capsys):
    """An image that unpacks to gigabytes, a part that ends long after its video, and a folder of
    frames with a desktop's hidden file."""
    content = (folder / "wide.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + content[24:29]
    check = struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(content[:12] + header + check + content[33:])
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / ".DS_Store").write_bytes(b"Bud1")
    for number in range(3):
        Image.fromarray(noise(8, 10, 3)).save(tmp_path / "frames" / f"{number}.png")
    rows = [
        {"image": "bomb.png", "target": "a"},
        {"video": str(folder / "wide.mp4"), "end": 1e308, "target": "b"},
        {"video": "frames", "target": "c"},
    ]
    path = write_rows(tmp_path / "odd.jsonl", rows)
    page = inspect(folder, {"rows": str(path)}, tmp_path / "odd.html")
    # The header of bomb.png, and the samples of bomb.png and wide.mp4.
    assert "3 unreadable files of 3 rows" in capsys.readouterr().out
    assert "bomb.png: " in page and "decompression bomb" in page
    assert "wide.mp4: has no part from 0 to 1e+308 seconds" in page
    assert page.count('class="card"') == 1
    assert ".DS_Store" not in page


@pytest.mark.parametrize("option", ["--limit", "--samples"])
@pytest.mark.parametrize("number", ["0", "-1", "few"])
def test_inspect_data_rejects_counts_below_one(folder, option, number, capsys):
    with pytest.raises(SystemExit):
        main([str(folder / "recipe.yaml"), "--output", "page.html", f"{option}={number}"])
    assert f"argument {option}: it is {number}; give 1 or more" in capsys.readouterr().err


def test_inspect_data_counts_rows_of_a_small_streamed_source_once(folder, tmp_path, capsys):
    rows = [{"image": str(folder / "wide.png"), "target": text} for text in "abcdefgh"]
    path = write_rows(tmp_path / "small.jsonl", rows)
    inspect(folder, {"rows": str(path), "streaming": True}, tmp_path / "small.html")
    printed = capsys.readouterr().out
    assert "8 rows of 1 media, 8 targets" in printed and "0 repeated rows" in printed


# -- samples as the model gets them -------------------------------------------------------------


def test_samples_of_returns_the_processors_frames_and_the_decoded_tokens(folder):
    recipe = read_recipe(str(folder / "recipe.yaml"))
    processor = tiny_processor()
    source = read_source(recipe.data.sources[0])
    samples, refused = samples_of(source, source.rows, processor, recipe)
    assert [sample.row["target"] for sample in samples] == [
        row["target"] for row in source.rows if "broken" not in row.get("video", row.get("image"))
    ]
    assert len(refused) == 1
    image = read_image(str(folder / "tall.jpg"))
    raw = {"do_sample_frames": False, "do_rescale": False, "do_normalize": False}
    expected = processor.video_processor([image], return_tensors="pt", **raw)
    expected = expected["pixel_values_videos"][0].permute(0, 2, 3, 1)
    shown = samples[3]
    assert shown.row["target"] == "<b>bold</b>"
    # One grey level apart at most: the frames were resized in another process.
    found = torch.from_numpy(shown.frames).int()
    torch.testing.assert_close(found, expected.int(), rtol=0, atol=1)
    assert expected.float().std() > 10  # positive control: it is a picture
    assert shown.target_tokens == "<bos><b>bold</b><eos>"
    assert shown.query_tokens == "<bos>"
    assert samples[4].frames.shape == (4, 32, 32, 3)


def test_count_tokens_counts_before_texts_are_cut():
    tokenizer = tiny_processor().tokenizer
    texts = ["a man rides a bike", "", "a man rides a bike", "zzzz"]
    found = count_tokens(tokenizer, texts, 5, "texts")
    assert found.counts == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert found.counts[1] == 1  # <bos>
    assert found.cut == sum(count > 5 for count in found.counts) > 0


# -- facts about rows ------------------------------------------------------------------------------


def row(target: str, group: str | None = None, query: str = "", image: str = "1.png") -> dict:
    return {"image": image, "query": query, "target": target, "group_id": group}


def test_sharing_equals_the_mean_over_all_possible_batches():
    rows = [row("a"), row("a", "g"), row("b", "g"), row("c"), row("d", "h"), row("a"), row("e")]

    def alike(one: dict, other: dict) -> bool:
        group = one["group_id"] is not None and one["group_id"] == other["group_id"]
        return one["target"] == other["target"] or group

    for batch in (2, 3, 5, 7):
        meet, pairs, negatives = [], [], []
        for drawn in itertools.combinations(rows, batch):
            for one in drawn:
                partners = [alike(one, other) for other in drawn if other is not one]
                meet.append(any(partners))
                pairs += partners
                negatives.append(partners.count(False))
        found = sharing(rows, batch)
        assert found.rows == pytest.approx(sum(meet) / len(meet))
        assert found.pairs == pytest.approx(sum(pairs) / len(pairs))
        mean = sum(map(math.log1p, negatives)) / len(negatives)
        assert found.chance_loss == pytest.approx(mean, rel=0.1)


def test_sharing_of_equal_rows_of_distinct_rows_and_of_one_row():
    same, different = [row("a")] * 9, [row(str(number)) for number in range(1000)]
    assert sharing(same, 4) == sharing(same, 4)
    assert (sharing(same, 4).pairs, sharing(same, 4).rows) == (1, 1)
    assert sharing(same, 4).chance_loss == 0
    assert sharing(different, 128).pairs == 0
    assert sharing(different, 128).rows == pytest.approx(0, abs=1e-9)  # a sum of large logarithms
    assert sharing(different, 128).chance_loss == pytest.approx(math.log(128))
    assert sharing(different[:50], 128).batch == 50
    assert sharing(different[:1], 128) is None
    # MSR-VTT has twenty captions per video: in batches of 512, about 7 % of the rows have a match.
    captions = [row(str(n), group=str(n // 20)) for n in range(130_260)]
    assert sharing(captions, 512).rows == pytest.approx(0.07, abs=0.005)


def test_leaks_finds_whole_words_only():
    leaking = [row("red", query="Is it Red, or blue?"), row("a cat", query="is a cat there")]
    others = [row("cat", query="what category?"), row("red"), row("a dog", query="a big dog")]
    assert leaks(leaking + others + [row("?", query="what?")]) == leaking


def test_repeated_rows_compares_clip_query_and_media():
    rows = [row("a"), row("a"), row("a", query="q"), row("b"), row("a", image="2.png")]
    assert repeated_rows(rows) == 1
    clips = [row("a") | {"start": 0, "end": 1}, row("a") | {"start": 1, "end": 2}]
    assert repeated_rows(clips) == 0
    assert repeated_rows([row("a", image=b"x"), row("a", image=b"x"), row("a", image=b"y")]) == 1


def test_read_header_is_of_the_film_and_by_the_clock_of_the_file(tmp_path):
    film = write_tracks(
        tmp_path / "clip.mkv",
        {"codec": "mjpeg", "pix_fmt": "yuvj420p", "frames": noise(1, 24, 32, 3)},
        {"frames": noise(8, 48, 64, 3), "late": 2},
    )
    header = read_header({"video": str(film)})
    assert (header.width, header.height) == (64, 48)
    assert header.seconds == pytest.approx(2.8, abs=0.01)
    assert clip_seconds({"video": str(film), "start": 2.3}, header) == pytest.approx(0.5, abs=0.01)


def test_read_header_reads_members_of_archives_and_images_with_large_texts(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("about", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.fromarray(noise(8, 10, 3)).save(tmp_path / "a.png", pnginfo=texts)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    for image in (str(tmp_path / "a.png"), f"zip://a.png::{tmp_path}/all.zip"):
        assert read_header({"image": image}).width == 10


def test_read_header_returns_size_and_length_of_every_kind_of_media(folder, tmp_path):
    video = {"video": str(folder / "wide.mp4")}
    header = read_header(video)
    assert (header.width, header.height, header.frames) == (64, 48, 6)
    assert header.seconds == pytest.approx(0.6)
    assert clip_seconds(video, header) == header.seconds
    assert clip_seconds(video | {"start": 0.1, "end": 0.35}, header) == pytest.approx(0.25)
    assert clip_seconds(video | {"start": 0.5}, header) == pytest.approx(0.1)
    assert clip_seconds(video | {"start": 0.5, "end": 1e308}, header) == pytest.approx(0.1)
    assert clip_seconds(video | {"start": 5, "end": 6}, header) == 0
    matroska = read_header({"video": str(folder / "tall.mkv")})
    assert matroska.frames is None  # Matroska headers have no number of frames
    assert matroska.seconds == pytest.approx(0.9)
    content = (folder / "wide.mp4").read_bytes()
    assert read_header({"video": content}) == header
    assert read_header({"image": str(folder / "tall.jpg")}).width == 50
    for number in range(3):
        Image.fromarray(noise(8, 10, 3)).save(tmp_path / f"{number}.png")
    (tmp_path / ".DS_Store").touch()
    frames = read_header({"video": str(tmp_path)})
    assert (frames.width, frames.height, frames.frames, frames.seconds) == (10, 8, 3, None)
    assert clip_seconds({"video": str(tmp_path), "end": 2}, frames) is None
    for broken in (folder / "broken.mp4", folder / "absent.mp4"):
        with pytest.raises((OSError, ValueError)):
            read_header({"video": str(broken)})
