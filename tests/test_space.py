"""The Space: what its functions answer and refuse, what it serves, and how it looks in a browser.

Its packages are not part of the default environment: `make app-test` installs them and runs this.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import av
import numpy as np
import pytest
import torch

from tests.tiny import noise, tiny_model, tiny_processor, write_clip

gr = pytest.importorskip("gradio", reason="no gradio here: `make app-test` installs and tests it")

from space import app, ask, search, uploads  # noqa: E402

ROOT = Path(__file__).parents[1]
BROWSER = [shutil.which("chromium"), shutil.which("chromedriver")]


@pytest.fixture(scope="module")
def pair() -> tuple:
    return tiny_model(), tiny_processor()


@pytest.fixture(scope="module")
def library(pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> search.Library:
    folder = tmp_path_factory.mktemp("library")
    for number in range(8):
        frames = np.roll(noise(6, 32, 32, 3), number * 7, axis=2) // (number + 1)
        write_clip(folder / f"clip_{number}.mp4", frames)
    (folder / "damaged.mp4").write_bytes(b"no clip")
    return search.Library.of(*pair, folder)


@pytest.fixture(scope="module")
def url(
    pair: tuple, library: search.Library, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The app on a free port of loopback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        blocks = app.build(*pair, library)
        _, url, _ = app.serve(blocks, library, prevent_thread_lock=True, quiet=True)
        yield url.rstrip("/")
        blocks.close(verbose=False)


@pytest.fixture
def clip(library: search.Library) -> str:
    return str(library.paths[0])


def refusal(function, *arguments: object) -> str:
    """The sentence with which a call is refused."""
    with pytest.raises(gr.Error) as refused:
        function(*arguments)
    return refused.value.message


# What its functions answer.


def test_answers_are_ranked_by_the_models_similarity(pair, clip):
    model, processor = pair
    names = ["red", "green", "a long answer about blue"]
    ranked = ask.Asker(*pair).rank(clip, " what is it ? ", "red\n\n green \nred\n" + names[2])
    with torch.inference_mode():
        predicted = model.predict(**processor(videos=clip, text="what is it ?"))
        similarities = (predicted @ model.encode_target(**processor(targets=names)).T)[0]
        shares = (similarities * model.logit_scale()).softmax(0)
    expected = sorted(
        zip(names, similarities.tolist(), shares.tolist(), strict=True), key=lambda row: -row[1]
    )
    assert [row[0] for row in ranked] == [row[0] for row in expected]
    np.testing.assert_allclose(
        [row[1:] for row in ranked], [row[1:] for row in expected], atol=1e-6
    )


def test_the_models_own_answers_stand_in_for_none(pair, clip, monkeypatch):
    monkeypatch.setattr(pair[0].config, "answers", ["yes", "no"], raising=False)
    ranked = ask.Asker(*pair).rank(clip, "is it red ?", " \n")
    assert {answer for answer, _, _ in ranked} == {"yes", "no"}


def test_a_clip_is_seen_once_for_all_its_questions(pair, clip, monkeypatch, tmp_path):
    model, seen = pair[0], []
    encode = model.encode_video
    monkeypatch.setattr(model, "encode_video", lambda pixels: seen.append(1) or encode(pixels))
    asker = ask.Asker(*pair)
    first = asker.rank(clip, "what is it ?", "a\nb")
    asker.rank(clip, "what color is it ?", "a\nb")
    assert asker.rank(clip, "what is it ?", "a\nb") == first
    assert len(seen) == 1
    asker.rank(str(write_clip(tmp_path / "other.mp4", noise(3, 32, 32, 3))), "what ?", "a\nb")
    assert len(seen) == 2


def test_an_image_is_a_clip_too(pair):
    picture = next(ask.EXAMPLES.glob("*.png"))
    model, processor = pair
    ranked = ask.Asker(*pair).rank(str(picture), "what is it ?", "red")
    with torch.inference_mode():
        predicted = model.predict(**processor(images=str(picture), text="what is it ?"))
        target = model.encode_target(**processor(targets="red"))
    assert ranked[0][1] == pytest.approx((predicted @ target.T).item(), abs=1e-6)


def test_a_search_equals_brute_force(pair, library):
    model, processor = pair
    assert [path.name for path in library.paths] == [f"clip_{n}.mp4" for n in range(8)]
    with torch.inference_mode():
        wanted = model.encode_target(**processor(targets="a red clip"))
        similarity = {
            path: (model.predict(**processor(videos=str(path), text=search.CAPTION)) @ wanted.T)
            for path in library.paths
        }
    expected = sorted(library.paths, key=lambda path: -similarity[path])[: search.SHOWN]
    found = search.search(*pair, library, "a red clip")
    assert [path for path, _ in found] == expected
    for path, value in found:
        assert value == pytest.approx(similarity[path].item(), abs=1e-6)


def test_a_library_without_clips_is_named(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="--library"):
        search.Library.of(*pair, tmp_path)


def test_answers_are_shown_as_text():
    shown = ask.bars([("<script>", 0.5, 0.75), ("b", 0.25, 0.25)])
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "width:75.0%" in shown and "similarity 0.500" in shown


# What it refuses.


def test_what_is_missing_is_said(pair, clip, library):
    rank = ask.Asker(*pair).rank
    assert refusal(rank, None, "what ?", "a") == (
        "Choose a clip or an image first, or take one of the examples."
    )
    assert refusal(rank, clip, "  ", "a") == "Type a question about the clip."
    assert refusal(rank, clip, "what ?", " \n ") == (
        "Give the candidate answers, one per line: the model picks among them."
    )
    assert "up to 200" in refusal(rank, clip, "what ?", "\n".join(map(str, range(201))))
    assert "sentence" in refusal(search.search, *pair, library, "")
    assert "Upload it again" in refusal(rank, clip + ".gone", "what ?", "a")
    assert rank(clip, "what ?", "a\nb")  # and goes on


@pytest.mark.parametrize("name", ["broken.mp4", "broken.png", "cut.mp4", "cut.png", "note.txt"])
def test_a_broken_file_is_refused_in_a_sentence(pair, tmp_path, name):
    path = tmp_path / name
    if name.startswith("cut"):
        whole = next(ask.EXAMPLES.glob(f"*{path.suffix}")).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_text("this is neither a video nor an image\n" * 50)
    message = refusal(ask.Asker(*pair).rank, str(path), "what ?", "a")
    assert message.startswith(f"{name} cannot be read: it is no video or image, or it is damaged.")
    assert str(tmp_path) not in message


def test_a_damaged_stream_is_refused_in_a_sentence(pair, clip, tmp_path):
    """Its header is whole; the packets are not."""
    data = bytearray(Path(clip).read_bytes())
    start = data.index(b"mdat") + 8
    data[start:-400] = bytes(len(data[start:-400]))
    (tmp_path / "damaged.mp4").write_bytes(data)
    message = refusal(ask.Asker(*pair).look, tmp_path / "damaged.mp4")
    assert message.startswith("damaged.mp4 cannot be read")


def test_a_long_clip_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", noise(1, 16, 16, 3).repeat(1210, axis=0))  # 10 fps
    assert refusal(uploads.examine, path) == (
        "long.mp4 lasts 121 seconds, and this app takes up to 120. "
        "Cut out the part that you want to ask about."
    )
    monkeypatch.setattr(uploads, "MAX_SECONDS", 121)
    assert uploads.examine(path) == "videos"
    monkeypatch.setattr(uploads, "MAX_FRAMES", 1000)
    assert "1210 frames" in refusal(uploads.examine, path)


def test_a_duration_is_counted_where_the_header_has_none(tmp_path):
    path = tmp_path / "live.mkv"  # as a stream writes it, never to be sought in
    write_clip(path, noise(1, 16, 16, 3).repeat(30, axis=0), live="1")
    with av.open(path) as container:
        assert container.duration is None
        frames, seconds = uploads.measure(container)
    assert (frames, seconds) == (30, pytest.approx(3.0, abs=0.11))


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(51_000_000)
    assert refusal(uploads.examine, path) == (
        "large.mp4 has 51 MB, and this app takes up to 50. Cut it, or save it smaller."
    )


def test_a_large_picture_is_refused_undecoded(tmp_path, monkeypatch):
    picture, clip = next(ask.EXAMPLES.glob("*.png")), next(ask.EXAMPLES.glob("*.mp4"))
    monkeypatch.setattr(uploads, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(uploads, "MAX_VIDEO_PIXELS", 64 * 64 - 1)
    assert "64 x 64 pixels" in refusal(uploads.examine, picture)
    assert "64 x 64 pixels" in refusal(uploads.examine, clip)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {clip}\n",
    ],
    ids=["hls", "concat"],
)
def test_a_playlist_cannot_name_other_files(tmp_path, playlist):
    clip = shutil.copy(next(ask.EXAMPLES.glob("*.mp4")), tmp_path / "secret.mp4")
    path = tmp_path / "list.m3u8"
    path.write_text(playlist.format(clip=Path(clip).name))
    assert "cannot be read" in refusal(uploads.examine, path)


# What it serves.


def fetch(url: str, data: dict | None = None) -> tuple[int, bytes]:
    body = None if data is None else json.dumps(data).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def called(url: str, name: str, *arguments: object) -> str:
    """What an endpoint of the app says, errors included."""
    _, started = fetch(f"{url}/gradio_api/call/{name}", {"data": list(arguments)})
    event = json.loads(started)["event_id"]
    return fetch(f"{url}/gradio_api/call/{name}/{event}")[1].decode()


def test_only_the_library_and_the_examples_can_be_read(url, library, tmp_path):
    example = next(ask.EXAMPLES.glob("*.mp4"))
    for path in (example, library.paths[0]):
        assert fetch(f"{url}/gradio_api/file={path}") == (200, path.read_bytes())
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(example.read_bytes())
    up = "%2e%2e"
    for path in (
        "/etc/passwd",
        outside,
        ROOT / "space" / "app.py",
        f"{ask.EXAMPLES}/../app.py",
        f"{ask.EXAMPLES}/{up}/app.py",
        f"{library.folder}/{up}/{up}/{up}/etc/passwd",
    ):
        status, _ = fetch(f"{url}/gradio_api/file={path}")
        assert status in (403, 404), path


def test_a_request_cannot_name_a_file_of_the_server(url, library):
    for path in ("/etc/passwd", str(ROOT / "space" / "app.py"), str(library.paths[0])):
        sent = {"path": path, "meta": {"_type": "gradio.FileData"}}
        said = called(url, "ask", sent, "what ?", "a\nb")
        assert "error" in said and "answers" not in said
    assert "clip_" in called(url, "search", "a red clip")  # and goes on


def test_the_examples_outlive_the_uploads(url):
    """gradio deletes its own copies of them with the uploads: there must be none."""
    row = json.loads((ask.EXAMPLES / "examples.jsonl").read_text().splitlines()[0])
    assert str(ask.EXAMPLES / row["file"]) in called(url, "load_example", 0)


@pytest.mark.parametrize("address", ["https://example.com/a.mp4", "http://127.0.0.1:1/a.mp4"])
def test_a_request_cannot_make_it_fetch_an_address(url, address):
    sent = {"path": address, "meta": {"_type": "gradio.FileData"}}
    assert "this app fetches no addresses" in called(url, "ask", sent, "what ?", "a\nb")


def test_a_large_upload_is_refused_by_the_server(url):
    boundary = "b0undary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    body = head.encode() + bytes(50_500_000) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"{url}/gradio_api/upload", body, kind))
    assert refused.value.code == 413


# How it looks.


class Page:
    """The app in headless Chromium, spoken to through the selectors of its parts."""

    def __init__(self, url: str, shots: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER[0]
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(BROWSER[1]))
        self.url, self.shots = url, shots

    def open(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url)
        self.until("document.querySelector('#ask')")

    def until(self, condition: str) -> object:
        """Wait for a JavaScript expression to be true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        run = self.driver.execute_script
        return WebDriverWait(self.driver, 40).until(lambda _: run(f"return {condition}"), condition)

    def texts(self, selector: str, count: int) -> list[str]:
        """Wait until there are `count` parts, and return what they say."""
        parts = f"[...document.querySelectorAll({json.dumps(selector)})]"
        self.until(f"{parts}.length == {count}")
        return self.driver.execute_script(f"return {parts}.map(part => part.innerText)")

    def press(self, selector: str) -> None:
        where = json.dumps(selector)
        self.until(f"document.querySelector({where})")
        self.driver.execute_script(f"document.querySelector({where}).click()")

    def write(self, name: str, text: str) -> None:
        field = self.driver.find_element("css selector", f"#{name} textarea, #{name} input")
        field.clear()
        field.send_keys(text)

    def upload(self, path: Path) -> None:
        self.until("document.querySelector('#clip input[type=file]')")
        self.driver.find_element("css selector", "#clip input[type=file]").send_keys(str(path))

    def refused(self) -> str:
        """The sentence of the error that is shown, which is then closed."""
        said = self.texts(".toast-body", 1)[0]
        self.press(".toast-close")
        self.texts(".toast-body", 0)
        return said

    def shot(self, name: str) -> None:
        """Take a screenshot of a page that must not scroll sideways."""
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))
        size = "[document.documentElement.scrollWidth, window.innerWidth]"
        width, inner = self.driver.execute_script(f"return {size}")
        assert width <= inner, name


@pytest.fixture
def page(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    pytest.importorskip("selenium", reason="no selenium here: `make app-test` installs it")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    page = Page(url, tmp_path)
    yield page
    page.driver.save_screenshot(str(tmp_path / "last.png"))
    page.driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(None in BROWSER, reason="no browser: apt-get install chromium chromium-driver")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(page, library, tmp_path, width, height):
    """Fail, ask, search. The screenshots lie in pytest's temporary folder (`--basetemp`)."""
    page.open(width, height)
    page.shot("start")

    (tmp_path / "broken.mp4").write_bytes(b"no clip at all")
    page.upload(tmp_path / "broken.mp4")
    page.texts(".toast-body", 1)
    page.shot("broken")
    assert "broken.mp4 cannot be read: it is no video or image" in page.refused()

    page.upload(library.paths[0])
    page.until("document.querySelector('#video video')?.readyState > 1")
    page.write("question", "what is it ?")
    page.write("candidates", "a red ball\na green key\na grey box")
    page.press("#ask")
    answers = page.texts("#answers li", 3)
    shares = [float(text.split("%")[0].split("\n")[-1]) for text in answers]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    page.driver.execute_script("document.querySelector('#answers').scrollIntoView(false)")
    page.shot("answers")

    page.write("question", " ")
    page.press("#ask")
    assert "Type a question about the clip." in page.refused()

    page.press("#examples button")
    page.texts("#answers li", 0)  # the last clip's answers go
    page.press("#ask")
    assert any("the purple key" in answer for answer in page.texts("#answers li", 5))
    page.shot("example")

    page.press("button[role=tab][aria-selected=false]")
    page.write("sentence", "a red clip")
    page.press("#search")
    page.texts("#found .thumbnail-item video", search.SHOWN)
    page.shot("search")
    page.press("#found .thumbnail-item")
    playing = "[...document.querySelectorAll('#found video')].map(video => (video.play(), video))"
    page.until(f"{playing}.some(video => video.currentTime > 0)")
    page.shot("clip")
