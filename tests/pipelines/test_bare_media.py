"""Media whose kind nobody states: pipelines look at the content, of a file or of an address."""

import http.server
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from modeling_vljepa.pipelines import fetching
from modeling_vljepa.pipelines.fetching import fetch, quoted
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPAZeroShotClassificationPipeline
from processing import FrameStream
from tests.media import encode, moving
from tests.tiny import tiny_model, tiny_processor

LABELS = ["red", "a cat"]


@pytest.fixture(scope="module")
def pipe() -> VLJEPAZeroShotClassificationPipeline:
    return VLJEPAZeroShotClassificationPipeline(model=tiny_model(), processor=tiny_processor())


@contextmanager
def serve(folder: Path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder with an image and a clip under names that say nothing or the wrong thing."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Image.fromarray(moving(1)[0]).save(tmp_path / "a.png")
    encode(tmp_path / "clip.mp4", moving(8))
    for name in ("noending", "a b ä.bin"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    for name in ("stream", "clip.gif"):
        (tmp_path / name).write_bytes((tmp_path / "clip.mp4").read_bytes())
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "noending")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("noending", "image"),
        ("a b ä.bin", "image"),
        ("stream", "video"),
        ("clip.gif", "video"),
        ("zip://noending::{folder}/all.zip", "image"),
    ],
)
def test_pipeline_finds_the_kind_of_a_bare_file(pipe, folder, name, kind):
    path = name.format(folder=folder) if "::" in name else str(folder / name)
    named = pipe({kind: path}, candidate_labels=LABELS)
    assert pipe(path, candidate_labels=LABELS) == named
    assert pipe([path], candidate_labels=LABELS) == [named]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png?width=80&v=1.2", "image"),
        ("a.png#top", "image"),
        ("noending", "image"),
        ("a b ä.bin", "image"),
        ("a%20b%20%C3%A4.bin", "image"),
        ("stream?name=a.png", "video"),
    ],
)
def test_pipeline_finds_the_kind_of_a_bare_address(pipe, folder, name, kind):
    with serve(folder) as address:
        named = pipe({kind: f"{address}/{name}"}, candidate_labels=LABELS, allow_urls=True)
        assert pipe(f"{address}/{name}", candidate_labels=LABELS, allow_urls=True) == named
    expected = {"image": "a.png", "video": "clip.mp4"}[kind]
    local = pipe({kind: str(folder / expected)}, candidate_labels=LABELS)
    assert [each["label"] for each in named] == [each["label"] for each in local]
    assert [each["score"] for each in named] == pytest.approx([each["score"] for each in local])


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1/a", "hf://datasets/user/name/a.png", "zip://a.png::hf://datasets/a/b/c.zip"],
)
def test_pipeline_reads_no_address_unless_the_caller_allows_it(pipe, address):
    for sample in (address, {"image": address}, {"video": address}):
        with pytest.raises(ValueError, match="is a URL: pass allow_urls=True"):
            pipe(sample, candidate_labels=LABELS)


def test_pipeline_fetches_nothing_through_an_archive_on_the_web(pipe, folder):
    with serve(folder) as address, pytest.raises(ValueError, match="is a URL|not opened here"):
        pipe(f"zip://noending::{address}/all.zip", candidate_labels=LABELS)
    with serve(folder) as address, pytest.raises(ValueError, match="not opened here"):
        pipe(f"zip://noending::{address}/all.zip", candidate_labels=LABELS, allow_urls=True)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://a/b c/ü.jpg?q=ü x#top", "http://a/b%20c/%C3%BC.jpg?q=%C3%BC%20x"),
        ("http://a/b%20c?x=%2F&y=[1]", "http://a/b%20c?x=%2F&y=[1]"),
        ("https://user:p@münchen.de:8/ü", "https://user:p@xn--mnchen-3ya.de:8/%C3%BC"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
    ],
)
def test_quoted_encodes_what_an_address_must_not_hold(address, expected):
    assert quoted(address) == expected
    assert quoted(expected) == expected


@pytest.mark.parametrize("bad", ["\r\nHost: b", "\n", "\x00", "\t", "\x7f"])
def test_fetch_refuses_control_characters(bad):
    with pytest.raises(ValueError, match="cannot be fetched .it contains a control character"):
        fetch(f"http://127.0.0.1/a{bad}")


def test_fetch_limits_the_size_of_a_quoted_address(folder, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_URL_BYTES", 100)
    with serve(folder) as address, pytest.raises(ValueError, match="larger than 100 bytes"):
        fetch(f"{address}/a b ä.bin")


def test_frame_stream_encodes_spaces_and_letters_of_an_address(folder):
    (folder / "a b ä.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    with serve(folder) as address:
        frames = list(FrameStream(f"{address}/a b ä.mp4", allow_urls=True, live=False))
    assert len(frames) == 8
