"""
A stand-in for the Hub on loopback: creating repositories, committing files to them, listing and downloading them.

    with StandInHub() as hub:
        hub.url  # for HF_ENDPOINT, before huggingface_hub is imported
        hub.repositories["tester/name"].files  # {path: bytes}; a Space is "spaces/tester/name"
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER = "tester"
TOKEN = "hf_secret"
REVOKED_TOKEN = "hf_revoked"
API_PATH = re.compile(
    r"/api/(?P<kind>models|spaces)/(?P<id>[^/]+/[^/]+)(?:/(?P<verb>preupload|commit|revision|tree)/?.*)?"
)
FILE_PATH = re.compile(r"/(?P<id>(?:spaces/)?[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        contents = [f"{path} {git_hash(content)}" for path, content in sorted(self.files.items())]
        return hashlib.sha1("\n".join([str(len(self.commits)), *contents]).encode()).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class StandInHub:
    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        handler = type("Handler", (RequestHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class RequestHandler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.read_body() if self.command == "POST" else b""
        self.hub.requests.append((self.command, path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens.add(token)
        if token == REVOKED_TOKEN:
            self.answer_error(401, "InvalidToken")
        elif path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := API_PATH.fullmatch(path):
            repo_id = match["id"] if match["kind"] == "models" else f"spaces/{match['id']}"
            self.with_repository(repo_id, lambda repository: self.repository(repository, match, body))
        elif match := FILE_PATH.fullmatch(path):
            self.with_repository(match["id"], lambda repository: self.download(repository, match["file"]))
        else:
            self.answer_error(404, "NotKnownToTheStandIn")

    do_GET = do_HEAD = do_POST = handle_request

    def create(self, request: dict):
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        repo_id = f"spaces/{repo_id}" if request.get("type") == "space" else repo_id
        exists = repo_id in self.hub.repositories
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repositories.setdefault(repo_id, Repository(private))
        self.answer(409 if exists else 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def with_repository(self, repo_id: str, action):
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self.answer_error(404, "RepoNotFound")
        else:
            action(repository)

    def repository(self, repository: Repository, match: re.Match, body: bytes):
        verb = match["verb"]
        if verb == "preupload":
            # regular: the contents come in the commit itself
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer(200, {"files": files})
        elif verb == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    repository.files.pop(line["value"]["path"])
            repository.commits.append(repository.sha)
            url = f"{self.hub.url}/{match['id']}/commit/{repository.commits[-1]}"
            self.answer(200, {"commitUrl": url, "commitOid": repository.commits[-1], "success": True})
        elif verb == "tree":
            files = sorted(repository.files.items())
            self.answer(
                200,
                [{"type": "file", "path": path, "size": len(file), "oid": git_hash(file)} for path, file in files],
            )
        else:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            model = {"_id": "0", "id": match["id"], "modelId": match["id"], "sha": repository.sha, "tags": []}
            self.answer(
                200, {**model, "private": repository.private, "siblings": siblings, "downloads": 0, "likes": 0}
            )

    def download(self, repository: Repository, path: str):
        commit = ("X-Repo-Commit", repository.sha)
        if path not in repository.files:
            self.answer(404, {"error": "EntryNotFound"}, [("X-Error-Code", "EntryNotFound"), commit])
            return
        content = repository.files[path]
        self.answer(200, content, [("ETag", f'"{git_hash(content)}"'), commit])

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer_error(self, status: int, code: str):
        self.answer(status, {"error": code}, [("X-Error-Code", code), ("X-Error-Message", code)])

    def answer(self, status: int, content: bytes | dict | list, headers: list[tuple[str, str]] = ()):
        is_file = isinstance(content, bytes)
        body = content if is_file else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
