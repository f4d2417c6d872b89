"""A model hub on this machine: as much of its HTTP interface as huggingface_hub uses to make, fill, list and read repositories."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class FakeHub(ThreadingHTTPServer):
    """repos   files by repository: {"you/an-sae": {"README.md": b"..."}}.
    private    which of them are private.
    messages   of commits, in order.
    status     answer everything with this instead, where it is not None.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.status: int | None = None
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def sha(self, repo: str) -> str:
        content = json.dumps({name: digest(content) for name, content in sorted(self.repos[repo].items())})
        return digest(content.encode())


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, document, status: int = 200) -> None:
        self.answer(status, json.dumps(document).encode(), Content_Type="application/json")

    @property
    def parts(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_POST(self) -> None:
        hub, body, parts = self.server, self.body(), self.parts
        if hub.status is not None:
            self.say({"error": "no"}, hub.status)
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            assert isinstance(front["tags"], list)
            self.say({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            how = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.say({"files": how})
        elif parts[4] == "commit":
            self.commit("/".join(parts[2:4]), [json.loads(line) for line in body.decode().splitlines()])
        else:
            self.say({"error": self.path}, 404)

    def create(self, wanted: dict) -> None:
        hub, repo = self.server, f"{wanted.get('organization') or 'you'}/{wanted['name']}"
        is_new = repo not in hub.repos
        hub.repos.setdefault(repo, {})
        hub.private.setdefault(repo, wanted.get("private") or wanted.get("visibility") == "private")
        self.say({"url": f"{hub.endpoint}/{repo}"}, 200 if is_new else 409)

    def commit(self, repo: str, entries: list[dict]) -> None:
        hub = self.server
        for entry in entries:
            if entry["key"] == "header":
                hub.messages.append(entry["value"]["summary"])
            else:
                hub.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        sha = hub.sha(repo)
        self.say({"commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def do_GET(self) -> None:
        hub, parts = self.server, self.parts
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if hub.status is not None:
            self.say({"error": "no"}, hub.status)
        elif repo not in hub.repos:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif parts[0] == "api":
            self.describe(repo, is_tree="tree" in parts)
        else:
            content = hub.repos[repo]["/".join(parts[4:])]
            self.answer(200, content, ETag=f'"{digest(content)}"', X_Repo_Commit=hub.sha(repo))

    do_HEAD = do_GET

    def describe(self, repo: str, *, is_tree: bool) -> None:
        files = self.server.repos[repo]
        if is_tree:
            self.say(
                [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in files.items()]
            )
        else:
            known = {"id": repo, "sha": self.server.sha(repo), "private": False, "tags": [], "downloads": 0}
            self.say(known | {"siblings": [{"rfilename": name} for name in files]})


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
