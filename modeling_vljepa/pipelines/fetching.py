"""Download of a medium over http(s), with a limit of its size and one of its time."""

import http.client
import re
import socket
import string
import threading
from contextlib import suppress
from urllib import parse, request

MAX_URL_BYTES = 50 * 2**20
MAX_URL_SECONDS = 60


class Download(threading.Thread):
    """One download, in its own thread: nothing in `urllib` limits the time of a whole download.

    A timeout of a socket begins again with every byte, so a server that sends a byte per second
    would hold the caller, and looking up a name has no timeout.

    Attributes:
        content (`bytearray`): the bytes so far.
        error (`Exception`, *optional*): the reason why the download failed.
    """

    def __init__(self, url: str, max_bytes: int):
        super().__init__(daemon=True)
        self.url = url
        self.max_bytes = max_bytes
        self.content = bytearray()
        self.error: Exception | None = None
        self.sockets: list[socket.socket] = []  # one per redirect
        self.stopped = False

    def run(self) -> None:
        try:
            with self.opener().open(quoted(self.url), timeout=MAX_URL_SECONDS) as response:
                while len(self.content) <= self.max_bytes and (part := response.read1(2**16)):
                    self.content += part
        # ValueError: urllib raises it for some malformed addresses, UnicodeError for others.
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = error

    def stop(self) -> None:
        """End the thread, whatever it waits for."""
        self.stopped = True
        for each in self.sockets:
            with suppress(OSError):  # closed by now
                each.shutdown(socket.SHUT_RDWR)

    def opener(self) -> request.OpenerDirector:
        """Return an opener of http(s) addresses whose sockets `stop` can shut down."""
        download = self

        class Watched:
            def connect(self) -> None:
                super().connect()
                download.sockets.append(self.sock)
                if download.stopped:  # before the socket was in the list
                    raise TimeoutError

        class Connection(Watched, http.client.HTTPConnection):
            pass

        class SecureConnection(Watched, http.client.HTTPSConnection):
            pass

        class Handler(request.HTTPHandler):
            def http_open(self, opened: request.Request) -> http.client.HTTPResponse:
                return self.do_open(Connection, opened)

        class SecureHandler(request.HTTPSHandler):
            def https_open(self, opened: request.Request) -> http.client.HTTPResponse:
                return self.do_open(SecureConnection, opened)

        # Not `build_opener`: it also opens ftp:, file: and data:, and follows redirects to ftp:.
        opener = request.OpenerDirector()
        opener.addheaders = [("User-Agent", "vljepa")]
        for handler in (
            request.ProxyHandler,
            Handler,
            SecureHandler,
            request.HTTPRedirectHandler,
            request.HTTPDefaultErrorHandler,
            request.HTTPErrorProcessor,
            request.UnknownHandler,
        ):
            opener.add_handler(handler())
        return opener


def quoted(url: str) -> str:
    """Return an address as browsers send it: spaces and letters that are not ASCII are encoded.

    What is encoded already stays. A control character stays an error: encoded, it would be sent.
    """
    if re.search(r"[\x00-\x1f\x7f]", url):
        raise ValueError("it contains a control character")
    parts = parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    path, query = (parse.quote(each, safe=string.punctuation) for each in (parts.path, parts.query))
    return parse.urlunsplit((parts.scheme, f"{user}{at}{host}", path, query, ""))


def fetch(url: str, max_bytes: int | None = None) -> bytes:
    """Download at most `max_bytes` (default: `MAX_URL_BYTES`) over http(s) in `MAX_URL_SECONDS`.

    The address may be of a machine that only this one can reach, so the caller must allow it.

    Raises: `ValueError` that names the address, also for a malformed one.
    """
    name = ascii(url)[1:-1]  # half a surrogate pair cannot be printed
    name = name if len(name) <= 200 else f"{name[:200]}..."
    max_bytes = max_bytes or MAX_URL_BYTES
    download = Download(url, max_bytes)
    download.start()
    try:
        download.join(MAX_URL_SECONDS)
        if download.is_alive():
            raise ValueError(
                f"{name}: took longer than {MAX_URL_SECONDS} seconds. Download it first."
            )
    finally:
        download.stop()  # also if the caller is interrupted
    if download.error is not None:
        raise ValueError(
            f"{name}: cannot be fetched ({download.error}). Check the address."
        ) from download.error
    if len(download.content) > max_bytes:
        raise ValueError(f"{name}: larger than {max_bytes} bytes. Make it smaller.")
    return bytes(download.content)


__all__ = ["fetch"]
