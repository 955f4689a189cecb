"""FrameStream over sources that end, never end or fail on the way, and windows over its frames.

The live sources are real ones, on loopback. On a busy machine a thread can be late by seconds, so
no test fails for that: stalls are counted as "at least one", a pause ends with an event, and time
limits only end what hangs.
"""

import http.server
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from processing import MediaError, VLJEPAVideoProcessor, read_clip
from processing.frame_stream import FrameStream
from processing.windows import windows
from tests.tiny import noise, write_clip

pytestmark = pytest.mark.timeout(600)  # ends a hanging test; most take a second

PROCESSOR = VLJEPAVideoProcessor(crop_size=32)
LONG = 300.0  # seconds; longer than any delay on a busy machine


def pictures(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Return frames `(count, height, width, 3)`, each filled with its index as red level."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.arange(count)[:, None, None] % 256
    return frames


def timed(frames: np.ndarray, rate: float = 10.0) -> list[tuple[float, np.ndarray]]:
    """Return pairs (seconds, frame)."""
    return [(index / rate, frame) for index, frame in enumerate(frames)]


def write_ts(path: Path, count: int = 60, height: int = 48, width: int = 64) -> Path:
    """Write noise at ten frames per second as an MPEG transport stream; a key frame each second."""
    with av.open(path, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"g": "10", "tune": "zerolatency"}
        for frame in np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def damage(content: bytes, start: int, length: int) -> bytes:
    """Replace `length` bytes from `start` by noise."""
    junk = np.random.default_rng(1).integers(0, 256, length, np.uint8).tobytes()
    return content[:start] + junk + content[start + length :]


# -- files and iterators -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_frame_stream_of_a_file_equals_read_clip(tmp_path, name):
    path = write_clip(tmp_path / name, noise(9, 48, 64, 3))
    clip = read_clip(path)
    for source in (path, str(path), path.read_bytes()):
        stream = FrameStream(source)
        frames = list(stream)
        assert [frame.number for frame in frames] == list(range(9))
        assert np.array_equal([frame.pixels for frame in frames], clip.frames)
        np.testing.assert_allclose([frame.time for frame in frames], clip.timestamps, atol=2e-3)
        report = stream.report
        assert (report.frames, report.broken, report.leaps, len(report.events)) == (9, 0, 0, 0)
        assert report.ended == "the source has ended"


def test_frame_stream_applies_the_rotation_of_phones(tmp_path):
    path = write_clip(tmp_path / "tall.mp4", noise(3, 48, 64, 3), rotation=90)
    assert np.array_equal([frame.pixels for frame in FrameStream(path)], read_clip(path).frames)


def test_frame_stream_takes_frames_at_the_given_rate():
    frames = list(FrameStream(timed(pictures(50)), fps=2.5))  # the source has ten per second
    assert [round(frame.time, 6) for frame in frames] == [round(i * 0.4, 6) for i in range(13)]
    assert [frame.number for frame in frames] == list(range(13))
    late = [(3.0, pictures(1)[0]), (3.01, pictures(1)[0]), (3.9, pictures(1)[0])]
    assert [frame.time for frame in FrameStream(late, fps=2)] == [3.0, 3.9]
    assert len(list(FrameStream(timed(pictures(50)), fps=1000))) == 50


def test_frame_stream_reads_an_iterator_only_when_asked():
    made = []

    def source():
        for item in timed(pictures(30)):
            made.append(item)
            yield item

    stream = FrameStream(source())
    frames = iter(stream)
    for index in range(30):
        assert next(frames).number == index
        assert len(made) == index + 1  # none is read ahead
    with pytest.raises(ValueError, match="read only once"):
        iter(stream)


def test_frame_stream_leaves_out_unusable_frames():
    items = timed(pictures(6))
    items[2] = (0.2, None)
    stream = FrameStream(items, max_pixels=24 * 32)
    items[4] = (0.4, pictures(1, 48, 64)[0])
    assert [frame.time for frame in stream] == [0.0, 0.1, 0.3, 0.5]
    assert stream.report.broken == 2 and len(stream.report.events) == 2
    with pytest.raises(TypeError, match="uint8 arrays"):
        list(FrameStream([(0.0, "a frame")]))
    with pytest.raises(ValueError, match="float64 of"):
        list(FrameStream([(0.0, np.zeros((4, 4, 3)))]))


def test_frame_stream_times_never_go_backwards():
    frame = pictures(1)[0]
    stream = FrameStream([(0.0, frame), (1.0, frame), (0.5, frame), (1.5, frame)])
    assert [each.time for each in stream] == [0.0, 1.0, 1.0, 1.5]
    assert stream.report.leaps == 1


@pytest.mark.parametrize("fps", [None, 5])
def test_frame_stream_loses_no_frame_if_the_clock_starts_again(fps):
    tens = [index / 10 for index in range(50)]
    after = [5 + index / 10 for index in range(49)]
    for times, leaps in (
        (tens + tens, 1),
        ([*tens, 1e4, *after], 1),  # one wrong time
    ):
        stream = FrameStream([(seconds, pictures(1)[0]) for seconds in times], fps=fps)
        found = [frame.time for frame in stream]
        assert found == sorted(found)
        assert len(found) == pytest.approx(100 if fps is None else 50, abs=1)
        assert stream.report.leaps == leaps
        assert found[-1] - found[-40 if fps is None else -20] == pytest.approx(3.9, abs=0.11)


def test_frame_stream_fills_the_slot_of_a_broken_frame_with_the_next():
    frames = [
        (index / 10, None if index % 10 == 0 else picture)
        for index, picture in enumerate(pictures(50))
    ]
    stream = FrameStream(frames, fps=1)
    assert [round(frame.time, 1) for frame in stream] == [0.1, 1.1, 2.1, 3.1, 4.1]
    assert stream.report.broken == 5


@pytest.mark.parametrize("kind", [Fraction, np.float32, int])
def test_frame_stream_accepts_times_of_any_number_type(kind):
    frames = list(FrameStream([(kind(index), pictures(1)[0]) for index in range(3)]))
    assert [frame.time for frame in frames] == [0, 1, 2]
    assert all(type(frame.time) is float for frame in frames)


def test_frame_stream_name_hides_user_and_password():
    stream = FrameStream("RTSP://admin:p@ss@127.0.0.1:9/door?at=@", allow_urls=True)
    assert stream.name == "RTSP://127.0.0.1:9/door?at=@"


@pytest.mark.parametrize("name", ["fps", "queue_size"])
def test_frame_stream_rejects_settings_of_zero(name):
    with pytest.raises(ValueError, match=f"{name} is 0: give"):
        FrameStream([], **{name: 0})


# -- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, 3.5, True])
def test_frame_stream_rejects_sources_of_other_types(source):
    with pytest.raises(ValueError, match=f"source is a {type(source).__name__}: give a path"):
        FrameStream(source)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a.mp4", "b.mp4"], "gave a str: .* Watch several videos one after the other"),
        (noise(2, 4, 4, 3), "gave a ndarray: give pairs"),
        ([(float("nan"), noise(4, 4, 3))], "at nan: give its time in seconds"),
        ([("a", noise(4, 4, 3))], "at 'a': give its time in seconds"),
        ([(None, noise(4, 4, 3))], "at None: give its time in seconds"),
    ],
)
def test_frame_stream_rejects_items_that_are_not_seconds_and_frame(items, message):
    with pytest.raises(ValueError, match=message):
        list(FrameStream(items))
    assert len(list(FrameStream([[np.float32(0.5), noise(4, 4, 3)]]))) == 1  # positive control


def test_frame_stream_leaves_out_a_frame_without_pixels():
    stream = FrameStream([(0.0, noise(0, 4, 3)), (1.0, noise(4, 4, 3))])
    assert [frame.time for frame in stream] == [1.0] and stream.report.broken == 1


@pytest.mark.parametrize("fps", [float("nan"), float("inf")])
def test_frame_stream_rejects_a_rate_that_is_not_finite(fps):
    with pytest.raises(ValueError, match=f"fps is {fps}: give more than 0"):
        FrameStream([], fps=fps)


def test_frame_stream_rejects_a_folder(tmp_path):
    with pytest.raises(MediaError, match="is a folder. Give one of the videos in it"):
        list(FrameStream(tmp_path))


def test_frame_stream_reports_a_change_of_size_and_goes_on(tmp_path):
    small, large = write_ts(tmp_path / "a.ts", 20), write_ts(tmp_path / "b.ts", 20, 96, 128)
    stream = FrameStream(small.read_bytes() + large.read_bytes())
    batch = list(windows(stream, PROCESSOR, size=4, stride=4))
    assert stream.report.size_changes == 1
    assert "64 x 48 becomes 128 x 96" in " ".join(stream.report.events)
    assert stream.report.frames >= 39
    assert {window.pixel_values.shape for window in batch} == {(4, 3, 32, 32)}


def test_frame_stream_reports_a_broken_packet_and_goes_on(tmp_path):
    content = write_ts(tmp_path / "a.ts").read_bytes()
    whole = FrameStream(content)
    assert len(list(whole)) == 60 and whole.report.broken == 0
    stream = FrameStream(damage(content, len(content) // 2, 3000))
    frames = list(stream)
    assert stream.report.broken > 0 and len(stream.report.events) > 0
    assert 50 <= len(frames) < 60
    assert frames[-1].time == pytest.approx(5.9)  # it was read to its end


def test_frame_stream_goes_on_after_many_broken_packets_in_a_row(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", noise(60, 48, 64, 3), movflags="faststart")
    content = path.read_bytes()
    stream = FrameStream(damage(content, len(content) // 4, len(content) // 2))
    frames = list(stream)
    assert stream.report.broken > 5
    assert stream.report.ended == "the source has ended"
    assert frames[0].time == 0 and len(frames) < 60


def test_frame_stream_reports_a_source_that_ends_early(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", noise(60, 48, 64, 3))
    content = path.read_bytes()
    stream = FrameStream(content[: len(content) // 2])
    assert 20 < len(list(stream)) < 40
    assert "ends early, after 2" in stream.report.ended or "after 3" in stream.report.ended
    assert "of 6 seconds" in stream.report.ended


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing file", "none.mp4: no such file"),
        ("text", "notes.txt: (cannot be opened|has no video stream)"),
        ("truncated video", "5000 bytes: cannot be opened"),
        ("missing camera", "camera 87"),
    ],
)
def test_frame_stream_names_a_source_that_cannot_be_opened(tmp_path, kind, message):
    text = tmp_path / "notes.txt"
    text.write_text("no video\n" * 1000)
    sources = {
        "missing file": tmp_path / "none.mp4",
        "text": text,
        "truncated video": write_clip(tmp_path / "clip.mp4", noise(20, 48, 64, 3)).read_bytes(),
        "missing camera": 87,
    }
    source = sources[kind]
    with pytest.raises(MediaError, match=message):
        list(FrameStream(source[:5000] if kind == "truncated video" else source))


# -- live ----------------------------------------------------------------------------------


def test_frame_stream_of_a_live_source_drops_the_oldest_frames_for_a_slow_reader():
    """The source sends 200 frames while the reader works on its first."""
    sent = threading.Event()

    def source():
        yield from timed(pictures(200))
        sent.set()

    stream = FrameStream(source(), live=True, queue_size=4)
    frames = iter(stream)
    numbers = [next(frames).number]
    assert sent.wait(LONG)
    numbers += [frame.number for frame in frames]
    report = stream.report
    assert len(numbers) <= 5 and numbers == sorted(numbers)
    assert numbers[-4:] == [196, 197, 198, 199]
    assert report.frames == len(numbers) and report.frames + report.dropped == 200


def when_stalled(stream: FrameStream, event: threading.Event) -> None:
    """Set an event as soon as the stream has counted a stall."""

    def watch():
        while not stream.report.stalls:
            time.sleep(0.01)
        event.set()

    threading.Thread(target=watch, daemon=True).start()


def test_frame_stream_reports_a_stall_and_goes_on():
    go_on = threading.Event()

    def source():
        yield from timed(pictures(3))
        go_on.wait(LONG)
        yield from [(5.0, pictures(1)[0])]

    stream = FrameStream(source(), live=True, stall_seconds=0.5, give_up_seconds=LONG)
    when_stalled(stream, go_on)
    assert [frame.time for frame in stream] == [0.0, 0.1, 0.2, 5.0]
    assert stream.report.stalls >= 1
    assert stream.report.ended == "the source has ended"


def test_frame_stream_counts_a_long_stall_once_and_gives_up():
    hang = threading.Event()

    def source():
        yield from timed(pictures(3))
        hang.wait(LONG)

    stream = FrameStream(source(), live=True, give_up_seconds=LONG)
    frames = iter(stream)
    assert [next(frames).number for _ in range(3)] == [0, 1, 2]
    # Only now: the thread may need longer than this to start.
    before, stream.stall_seconds, stream.give_up_seconds = stream.report.stalls, 0.5, 1.5
    assert list(frames) == []
    assert stream.report.stalls == before + 1
    assert stream.report.ended == "no frame for 1.5 s: given up"
    hang.set()


@pytest.mark.parametrize("live", [False, True])
def test_frame_stream_passes_on_an_error_of_the_iterator(live):
    def source():
        yield from timed(pictures(3))
        raise RuntimeError("the camera's driver is gone")

    with pytest.raises(RuntimeError, match="driver is gone"):
        list(FrameStream(source(), live=live))


class Handler(http.server.SimpleHTTPRequestHandler):
    """HTTP handler for the files of the server's folder.

    It sends `/live/NAME` in four parts with a pause in the middle, as a live source does, and only
    the first half of `/cut/NAME`.
    """

    pause: threading.Event

    def do_GET(self):
        kind, _, name = self.path.strip("/").partition("/")
        if kind not in ("live", "cut"):
            super().do_GET()
            return
        content = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        self.end_headers()
        quarter = len(content) // 4
        for part in range(4 if kind == "live" else 2):
            if part == 2:
                self.pause.wait(LONG)
            last = len(content) if part == 3 else (part + 1) * quarter
            self.wfile.write(content[part * quarter : last])
            self.wfile.flush()

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder: Path):
    """Run an HTTP server on loopback; yield its address and the event that ends the pause."""
    pause = threading.Event()

    class Here(Handler):
        def __init__(self, *args):
            self.pause = pause
            super().__init__(*args, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", pause
        finally:
            pause.set()
            server.shutdown()


def test_frame_stream_over_http_with_live_false_drops_no_frame(tmp_path):
    path = write_ts(tmp_path / "a.ts")
    with serve(tmp_path) as (address, _):
        settings = {"allow_urls": True, "live": False, "give_up_seconds": LONG}
        stream = FrameStream(f"{address}/a.ts", **settings)
        frames = list(stream)
    expected = list(FrameStream(path))
    assert np.array_equal([f.pixels for f in frames], [f.pixels for f in expected])
    assert [f.time for f in frames] == [f.time for f in expected]
    assert stream.report.dropped == 0


def test_frame_stream_over_http_reports_a_stall_and_goes_on(tmp_path):
    write_ts(tmp_path / "a.ts", 200)
    with serve(tmp_path) as (address, pause):
        stream = FrameStream(
            f"{address}/live/a.ts",
            allow_urls=True,
            queue_size=400,
            stall_seconds=1.0,
            give_up_seconds=LONG,
        )
        when_stalled(stream, pause)
        frames = list(stream)
    assert len(frames) == 200 and frames[-1].time == pytest.approx(19.9)
    assert stream.report.stalls >= 1 and stream.report.dropped == 0


def test_frame_stream_over_http_ends_if_the_connection_breaks_off(tmp_path):
    write_ts(tmp_path / "a.ts", 100)
    with serve(tmp_path) as (address, pause):
        pause.set()
        settings = {"allow_urls": True, "queue_size": 200, "give_up_seconds": LONG}
        stream = FrameStream(f"{address}/cut/a.ts", **settings)
        frames = list(stream)
    assert 30 < len(frames) < 70
    assert "breaks off" in stream.report.ended and stream.report.broken <= 1


def test_frame_stream_over_http_gives_up_on_a_silent_server(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.ts"
        stream = FrameStream(address, allow_urls=True, stall_seconds=0.5, give_up_seconds=1.0)
        try:
            assert list(stream) == []
        except MediaError as error:  # FFmpeg's time-out came before the stream's
            assert "cannot be opened" in str(error)
        else:
            assert "given up" in stream.report.ended


@pytest.mark.parametrize("scheme", ["file", "ftp", "concat", "data", "subfile"])
def test_frame_stream_rejects_other_schemes(tmp_path, scheme):
    path = write_ts(tmp_path / "a.ts", 10)
    with pytest.raises(MediaError, match=f"a.ts: {scheme}:// is not opened"):
        FrameStream(f"{scheme}://{path}", allow_urls=True)


def test_frame_stream_opens_addresses_only_if_allowed_and_hides_passwords():
    with pytest.raises(MediaError, match="http://127.0.0.1:1/a.ts: .*allow_urls=True") as caught:
        FrameStream("http://me:secret@127.0.0.1:1/a.ts")
    assert "secret" not in str(caught.value)
    stream = FrameStream("rtsp://me:secret@127.0.0.1:1/a", allow_urls=True)
    with pytest.raises(MediaError, match="rtsp://127.0.0.1:1/a: cannot be opened") as caught:
        list(stream)
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None


def playlist(entry: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{entry}\n#EXT-X-ENDLIST\n"


def test_frame_stream_follows_no_playlist_to_a_local_file(tmp_path):
    """A playlist in a file opens nothing; one from a server opens only files of that server."""
    path = write_ts(tmp_path / "a.ts")
    (tmp_path / "good.m3u8").write_text(playlist("a.ts"))
    for name, entry in (("file", f"file://{path}"), ("concat", f"concat:{path}")):
        (tmp_path / f"{name}.m3u8").write_text(playlist(entry), encoding="utf-8")
    with pytest.raises(MediaError):
        list(FrameStream(tmp_path / "good.m3u8"))
    with serve(tmp_path) as (address, _):
        settings = {"allow_urls": True, "live": False}
        good = FrameStream(f"{address}/good.m3u8", give_up_seconds=LONG, **settings)
        assert len(list(good)) == 60  # positive control
        for name in ("file", "concat"):
            bad = FrameStream(f"{address}/{name}.m3u8", give_up_seconds=5.0, **settings)
            try:
                assert list(bad) == []
            except MediaError as error:
                assert "cannot be opened" in str(error)


class Rtsp(socketserver.StreamRequestHandler):
    """RTSP handler: sends a transport stream as RTP within the connection, and hangs up."""

    content: bytes
    sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=a\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\n"

    def handle(self):
        while request := list(iter(lambda: self.rfile.readline().decode().strip(), "")):
            verb = request[0].split()[0]
            head = [line for line in request if line.lower().startswith("cseq")]
            if verb == "DESCRIBE":
                head += ["Content-Type: application/sdp", f"Content-Length: {len(self.sdp)}"]
            if verb == "SETUP":
                head.append("Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
            answer = "\r\n".join(["RTSP/1.0 200 OK", "Session: 1", *head, "", ""])
            self.wfile.write((answer + self.sdp * (verb == "DESCRIBE")).encode())
            if verb == "PLAY":
                break
        size = 7 * 188  # seven packets of the transport stream
        for number in range(len(self.content) // size + 1):
            part = self.content[number * size : (number + 1) * size]
            packet = struct.pack(">BBHII", 0x80, 33, number, number * 900, 7) + part
            self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)


def test_frame_stream_over_rtsp_reads_every_frame(tmp_path):
    path = write_ts(tmp_path / "a.ts")
    handler = type("Handler", (Rtsp,), {"content": path.read_bytes()})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"rtsp://127.0.0.1:{server.server_address[1]}/a"
        stream = FrameStream(address, allow_urls=True, queue_size=100, give_up_seconds=LONG)
        frames = list(stream)
        server.shutdown()
    expected = {frame.pixels.tobytes() for frame in FrameStream(path)}
    # The server hangs up before FFmpeg has the end of the last frame.
    assert len(frames) >= 59 and stream.report.dropped == 0
    assert all(frame.pixels.tobytes() in expected for frame in frames)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the Debian package ffmpeg")
def test_frame_stream_of_an_ffmpeg_server_reads_every_frame(tmp_path):
    path = write_ts(tmp_path / "a.ts", 40)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}/live.ts"
    command = ["ffmpeg", "-v", "error", "-re", "-i", path, "-c", "copy", "-f", "mpegts"]
    server = subprocess.Popen([*command, "-listen", "1", address])
    try:
        frames = []
        while not frames and server.poll() is None:  # connections are refused until it listens
            stream = FrameStream(address, allow_urls=True, queue_size=100, give_up_seconds=LONG)
            try:
                frames = list(stream)
            except MediaError:
                time.sleep(0.1)
        assert len(frames) >= 35 and stream.report.dropped == 0
        assert frames[-1].time == pytest.approx(3.9, abs=0.3)
    finally:
        server.kill()
        server.wait()


# -- windows -------------------------------------------------------------------------------


def test_windows_equal_the_processor_on_their_frames():
    frames = np.stack([noise(40, 60, 3) // (index + 1) for index in range(11)])
    found = list(windows(FrameStream(timed(frames)), PROCESSOR, size=4, stride=2))
    assert [window.numbers for window in found] == [
        (0, 1, 2, 3),
        (2, 3, 4, 5),
        (4, 5, 6, 7),
        (6, 7, 8, 9),
        (7, 8, 9, 10),  # the last frame is in a window, too
    ]
    for window in found:
        first = window.numbers[0]
        clip = PROCESSOR([frames[first : first + 4]], do_sample_frames=False, return_tensors="pt")
        expected = clip["pixel_values_videos"][0]
        torch.testing.assert_close(window.pixel_values, expected, rtol=0, atol=1e-6)
        assert window.start_time == first / 10 and window.end_time == (first + 3) / 10
    assert found[0].frames[2] is found[1].frames[0]  # preprocessed once


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_windows_cover_every_frame(count, stride):
    found = list(windows(FrameStream(timed(pictures(count))), PROCESSOR, size=4, stride=stride))
    assert {number for window in found for number in window.numbers} == set(range(count))
    assert {len(window.frames) for window in found} == {4}
    starts = [window.numbers[0] for window in found[:-1]]
    assert starts == list(range(0, len(starts) * stride, stride))
    assert not list(windows(FrameStream([]), PROCESSOR, size=4, stride=stride))


@pytest.mark.parametrize("stride", [0, 5])
def test_windows_reject_a_stride_that_leaves_out_frames(stride):
    with pytest.raises(ValueError, match=f"stride is {stride} and size 4"):
        list(windows([], PROCESSOR, size=4, stride=stride))
