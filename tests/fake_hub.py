"""A Hub in memory, on loopback, with the API to create, commit, list and download.

    with FakeHub() as hub:
        run(..., env=os.environ | hub.environment(tmp_path))

`huggingface_hub` reads the address of the Hub at import, so the client must be a new process.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """A server whose `repositories` map a name to its files; `log` has every request.

    A commit is applied completely or not at all, as on the real Hub.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.variables: dict[str, dict[str, str]] = {}  # by Space
        self.log: list[tuple[str, str]] = []
        self.commits = 0

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment variables of a client."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_fake",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: object = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "type": "user", "orgs": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[:2] == ["api", "spaces"] and parts[4:] == ["variables"]:
            asked = json.loads(body)
            self.hub.variables.setdefault("/".join(parts[2:4]), {})[asked["key"]] = asked["value"]
            self.answer(200, {asked["key"]: {"key": asked["key"], "value": asked["value"]}})
        elif parts[:2] in (["api", "models"], ["api", "spaces"]):
            self.api("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.download("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.answer(404, {"error": f"unhandled {path}"})

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = handle_any

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}
        if name in self.hub.repositories:
            self.answer(409, {"error": "exists", **url})
            return
        self.hub.repositories[name] = {".gitattributes": b""}
        self.hub.private[name] = asked.get("visibility") == "private"
        self.answer(200, url)

    def sha(self, name: str) -> str:
        files = sorted(self.hub.repositories[name].items())
        return digest(repr([(path, digest(content)) for path, content in files]).encode())

    def api(self, name: str, rest: list[str], body: bytes) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            reply = {"uploadMode": "regular", "shouldIgnore": False}
            for file in asked:  # the client does not send content again whose hash is known
                known = files.get(file["path"])
                file["oid"] = None if known is None else git_blob(known)
            kept = [{"path": f["path"], "oid": f["oid"], **reply} for f in asked]
            self.answer(200, {"files": kept})
        elif rest[:1] == ["commit"]:
            self.commit(name, [json.loads(line) for line in body.splitlines()])
        elif rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                for path, content in files.items()
                if path.startswith(folder)
            ]
            if listed:
                self.answer(200, listed)
            else:
                self.answer(404, {"error": "no folder"}, X_Error_Code="EntryNotFound")
        elif rest[:1] == ["xet-write-token"]:
            self.answer(404, {"error": "no xet"})
        else:
            siblings = [{"rfilename": path} for path in files]
            ids = {"_id": "1", "id": name, "modelId": name, "sha": self.sha(name)}
            self.answer(200, {**ids, "private": self.hub.private[name], "siblings": siblings})

    def commit(self, name: str, operations: list[dict]) -> None:
        files = dict(self.hub.repositories[name])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.hub.repositories[name] = files
        self.hub.commits += 1
        sha = self.sha(name)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def download(self, name: str, path: str) -> None:
        if name not in self.hub.repositories:
            self.answer(404, {"error": "x"}, X_Error_Code="RepoNotFound")
            return
        commit = {"X_Repo_Commit": self.sha(name)}
        content = self.hub.repositories[name].get(path)
        if content is None:
            self.answer(404, {"error": "x"}, X_Error_Code="EntryNotFound", **commit)
            return
        self.answer(200, content, ETag=f'"{digest(content)}"', Accept_Ranges="none", **commit)


def git_blob(content: bytes) -> str:
    """Return Git's hash of a file's content, by which the client finds unchanged files."""
    return digest(b"blob %d\0" % len(content) + content)
