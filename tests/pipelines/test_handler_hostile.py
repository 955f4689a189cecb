"""Hostile requests over HTTP: each gets an answer in JSON, in little time and memory."""

import base64
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import urllib.request
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modeling_vljepa.pipelines import handler as handler_module
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPARetrievalPipeline
from tests.tiny import noise, tiny_model, tiny_processor, write_clip

REQUESTS = 200
# Processor time of a request, as a multiple of the time for the largest ordinary picture. Seconds
# would depend on the machine.
TIMES = 6
GROWTH = 2**30  # bytes of the server's memory

# A process of its own, so that its memory is measured alone. The request is read and the answer
# written as an endpoint's server does; `allow_nan=False` refuses answers that are not JSON.
SERVER = """
import importlib.util, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

spec = importlib.util.spec_from_file_location("handler", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler()

class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(handler(data), allow_nan=False).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
print(server.server_port, flush=True)
server.serve_forever()
"""


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def picture(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 1).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """Return a PNG of `side` x `side` pixels, of which the file holds only the header's claim."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 10**8))
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def nested(depth: int, value: Any = "a") -> Any:
    for _ in range(depth):
        value = [value]
    return value


class Hostile:
    """Generator of hostile requests, of every kind in turn.

    Args:
        clip, image: good files, which are mutated.
        trap (`str`): address of a server whose answers do not end.
    """

    def __init__(self, clip: bytes, image: bytes, trap: str):
        self.rng = random.Random(0)
        self.clip, self.image, self.trap = clip, image, trap
        self.kinds = [
            getattr(self, name) for name in sorted(vars(type(self))) if name.startswith("with_")
        ]

    def ask(self, **changes: Any) -> dict:
        inputs = {"image": base64_of(self.image), "question": "a", "candidates": ["red", "blue"]}
        return {"inputs": inputs | changes}

    def with_line_of_pixels(self) -> dict:
        length = self.rng.choice([1_000, 65_000, 100_000, 20_000_000])
        height = self.rng.choice([1, 1, 25])
        sides = (length, height) if length * height <= 25_000_000 else (length, 1)
        return self.ask(image=base64_of(picture(*sides[:: self.rng.choice([1, -1])])))

    def with_many_pixels(self) -> dict:
        return self.ask(image=base64_of(picture(5000, 5000, self.rng.choice(["PNG", "TIFF"]))))

    def with_bomb(self) -> dict:
        return self.ask(image=base64_of(bomb(self.rng.choice([100, 5_000, 60_000, 2**31 - 1]))))

    def with_template(self) -> dict:
        template = self.rng.choice(
            ["{}" * 1000, "{}" * 300_000, "", "{", "{0}", "{} {x}", "a" * 2000 + "{}", "{}" * 2, 3]
        )
        labels = self.rng.choice([["a"], ["a" * 1999], ["a" * 100] * 1000, ["{}"] * 10])
        return {
            "inputs": {"image": base64_of(self.image), "candidate_labels": labels},
            "parameters": {
                "task": "zero-shot-video-classification",
                "hypothesis_template": template,
            },
        }

    def with_half_a_character(self) -> dict:
        half = self.rng.choice(["\ud83d", "a\udc00", "\ud800" * 1000])
        return self.rng.choice(
            [
                self.ask(question=half),
                self.ask(candidates=["a", half]),
                self.ask(image=half),
                self.ask(**{half: 1}),
                {half: {}},
                {**self.ask(), "parameters": {"task": half}},
                {**self.ask(), "parameters": {half: 1}},
                {"inputs": {"text": half}, "parameters": {"task": "embed"}},
            ]
        )

    def with_odd_number(self) -> dict:
        value = self.rng.choice(
            [float("nan"), float("inf"), -1, 0, 1.5, 10**400, -(10**400), True, "1", [1], {}]
        )
        name = self.rng.choice(["top_k", "calibrated", "query"])
        return {**self.ask(), "parameters": {name: value}}

    def with_odd_type(self) -> Any:
        value = self.rng.choice([0, 1.5, "a", [], {}, True, [[]], [None], {"a": "b"}, ["a", 1]])
        name = self.rng.choice(["image", "video", "question", "candidates", "inputs", "whole"])
        if name == "whole":
            return value
        if name == "inputs":
            return {"inputs": value}
        return self.ask(**{name: value})

    def with_deep_nesting(self) -> Any:
        deep = nested(self.rng.choice([10, 300, 600, 800]))
        return self.rng.choice(
            [
                self.ask(candidates=deep),
                self.ask(question=deep),
                {**self.ask(), "parameters": {"task": deep}},
                {**self.ask(), "parameters": {"top_k": deep}},
            ]
        )

    def with_many_texts(self) -> dict:
        count, length = self.rng.choice(
            [(1000, 100), (1001, 1), (10**5, 1), (50, 2000), (1, 10**6)]
        )
        return self.ask(candidates=["a" * length] * count)

    def with_odd_characters(self) -> dict:
        text = self.rng.choice(
            ["\0", " \t\n", "\u202e abc", "a" + "\u0301" * 1900, "\U0010ffff" * 500, "<image>" * 99]
        )
        return self.ask(question=text, candidates=[text, "a"])

    def with_mutated_file(self) -> dict:
        kind = self.rng.choice(["image", "video"])
        content = bytearray(self.image if kind == "image" else self.clip)
        for _ in range(self.rng.choice([1, 10, 100])):
            content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        content = content[: self.rng.choice([len(content), len(content) // 2, 20])]
        ask = self.ask(image=None)
        ask["inputs"][kind] = base64_of(bytes(content))
        return ask

    def with_script(self) -> dict:
        script = self.rng.choice(
            [
                b"ffconcat version 1.0\nfile /etc/passwd\n",
                b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
                b"#EXTM3U\n#EXTINF:1,\n" + self.trap.encode() + b"\n#EXT-X-ENDLIST\n",
                b"v=0\ns=a\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n",
                b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>",
                b"\x80\x04cos\nsystem\n(S'true'\ntR.",
            ]
        )
        kind = self.rng.choice(["image", "video"])
        return {"inputs": {kind: base64_of(script), "question": "a", "candidates": ["a"]}}

    def with_many_frames(self) -> dict:
        count = self.rng.choice([2, 3000])
        frames = [Image.new("L", (8, 8), 255 * (index % 2)) for index in range(count)]
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=60_000)
        kind = self.rng.choice(["image", "video"])
        return {"inputs": {kind: base64_of(buffer.getvalue()), "question": "a"}}

    def with_many_fields(self) -> dict:
        return self.ask(**{f"field {index}": index for index in range(20_000)})

    def with_odd_base64(self) -> dict:
        good = base64_of(self.image)
        return self.ask(
            image=self.rng.choice(
                [good[:-1], good + "=", "\n".join(good), good.replace("A", "-"), "=" * 10**6]
                + [f"data:image/png;base64,{good}", "A" * (70 * 2**20), "é" * 1000]
            )
        )

    def with_address(self) -> dict:
        return self.ask(
            image=self.rng.choice(
                ["http://", "http://[", "http://127.0.0.1:99999/", "http://127.0.0.1:1/"]
                + ["http://\x00/", "http://a b/", "https://é", "http://" + "a." * 900]
                + [f"{self.trap}/redirect", f"{self.trap}/endless"]
            )
        )

    def requests(self, count: int) -> Iterator[tuple[str, Any]]:
        for index in range(count):
            kind = self.kinds[index % len(self.kinds)]
            yield kind.__name__, kind()


@pytest.fixture
def trap() -> Iterator[str]:
    """Server whose answers redirect without end, or never end."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/redirect")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**20))
            except OSError:  # the fetcher has read its limit
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def processor_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak_memory(process: int) -> int:
    """Return the largest memory that a process has had, in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory in /proc")
def test_handler_answers_hostile_requests_in_little_time_and_memory(tmp_path, trap, monkeypatch):
    model, processor = tiny_model(answers=["red", "a cat"]), tiny_processor()
    folder = tmp_path / "model"
    VLJEPARetrievalPipeline(model=model, processor=processor).save_pretrained(folder)
    shutil.copy(handler_module.__file__, folder)
    clip = write_clip(tmp_path / "clip.mp4", noise(6, 48, 64, 3)).read_bytes()
    image = tmp_path / "image.png"
    Image.fromarray(noise(40, 60, 3)).save(image)
    monkeypatch.setenv("VLJEPA_ALLOW_URLS", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    command = [sys.executable, "-c", SERVER, str(folder / "handler.py")]
    log = tmp_path / "log.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"

            def post(data: Any) -> Any:
                with opener.open(url, data=json.dumps(data).encode(), timeout=60) as response:
                    return json.loads(response.read())

            hostile = Hostile(clip, image.read_bytes(), trap)
            good = hostile.ask()
            expected = post(good)
            before, slow, results = peak_memory(server.pid), [], []

            def timed(request: Any) -> tuple[float, Any]:
                start = processor_seconds(server.pid)
                answer = post(request)
                return processor_seconds(server.pid) - start, answer

            largest = hostile.ask(image=base64_of(picture(5000, 5000)))
            usual = longest = max(timed(largest)[0] for _ in range(3))
            for kind, request in hostile.requests(REQUESTS):
                try:
                    seconds, answer = timed(request)
                except OSError as error:
                    pytest.fail(f"{kind}: {error}\n{log.read_text()[-2000:]}")
                longest = max(longest, seconds)
                if seconds > TIMES * usual:
                    slow.append((kind, seconds, str(answer)[:100]))
                results.append((kind, "error" in answer))
                assert post(good) == expected, kind
            growth = peak_memory(server.pid) - before
        finally:
            server.kill()
    assert slow == []
    assert growth < GROWTH
    # Each kind is refused at least once, except lines of pixels: their area is within the limit.
    refused = {kind for kind, is_error in results if is_error}
    assert {kind.__name__ for kind in hostile.kinds} - refused == {"with_line_of_pixels"}
    print(
        f"{longest:.2f} s of processor time at most, {usual:.2f} s for the largest picture, "
        f"growth {growth / 2**20:.0f} MiB"
    )
