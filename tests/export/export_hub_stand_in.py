"""A stand-in for the Hub on the loopback interface: enough of its protocol for create, commit and download.

Written from the requests that huggingface_hub sends. Files that the client asks about are "lfs" when they end
in .safetensors, else "regular". There is no Xet. ``faults`` maps (method, part of the path) to what happens
instead: a status or "drop", or a list of them, one for each of the next requests.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_standInTokenForTests"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def sha(self, branch):
        content = sorted(
            (name, hashlib.sha1(data).hexdigest()) for name, data in self.branches[branch].items()
        )
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def files(self, revision):
        for branch, files in self.branches.items():
            if revision in (branch, self.sha(branch)):
                return branch, files
        return None, None


class HubStandIn:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[tuple[str, str], int | str | list[int | str]] = {}
        self.role = "write"
        self.room: int | None = None  # number of blobs that still fit
        self.tells_visibility = True
        self.echo = False  # errors repeat the token
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def count(self, method, part):
        return sum(m == method and part in path for m, path in self.requests)


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", headers=()):
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def fail(self, status, code, message):
            self.answer(status, {"error": message}, [("X-Error-Code", code), ("X-Error-Message", message)])

        def handle_any(self):
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append((self.command, path))
            for (method, part), fault in hub.faults.items():
                if method == self.command and part in path and fault != []:
                    if isinstance(fault, list):
                        fault = fault.pop(0)
                    if fault == "drop":
                        self.close_connection = True
                        self.connection.close()
                        return
                    told = self.headers.get("Authorization", "") if hub.echo else ""
                    self.answer(fault, {"error": f"as the test asked {told}".strip()})
                    return
            if path.startswith("/lfs/"):
                with hub.lock:
                    full = hub.room is not None and len(hub.blobs) >= hub.room
                    if not full:
                        hub.blobs[path.removeprefix("/lfs/")] = body
                self.answer(507 if full else 200)
                return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.fail(401, "", "Invalid credentials in Authorization header")
                return
            if path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/whoami-v2":
                self.answer(200, {"name": "user", "auth": {"accessToken": {"role": hub.role}}})
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.lfs_batch(json.loads(body))
            else:
                self.in_repo(path, body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def create(self, request):
            owner = request.get("organization") or "user"
            name = f"{owner}/{request['name']}"
            if name in hub.repos:
                url = f"{hub.endpoint}/{name}"
                self.answer(409, {"error": "You already created this model repo", "url": url})
                return
            hub.repos[name] = Repo(
                private=bool(request.get("private") or request.get("visibility") == "private")
            )
            self.answer(200, {"url": f"{hub.endpoint}/{name}", "id": name})

        def lfs_batch(self, request):
            objects = []
            for item in request["objects"]:
                known = item["oid"] in hub.blobs
                action = (
                    {} if known else {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"}}}
                )
                objects.append({"oid": item["oid"], "size": item["size"], **action})
            self.answer(200, {"transfer": "basic", "objects": objects})

        def in_repo(self, path, body):
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name, verb, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
            repo = hub.repos.get(name)
            if repo is None:
                self.fail(404, "RepoNotFound", "Repository not found")
                return
            if verb == "branch":
                if rest[0] in repo.branches:
                    self.fail(409, "", "Reference already exists")
                else:
                    repo.branches[rest[0]] = dict(repo.branches["main"])
                    self.answer(201, {})
                return
            branch, files = repo.files(rest[0] if rest else "main")
            if files is None:
                self.fail(404, "RevisionNotFound", "Invalid rev id")
            elif verb in ("", "revision"):
                siblings = [{"rfilename": file} for file in sorted(files)]
                info = {
                    "_id": "0",
                    "id": name,
                    "modelId": name,
                    "sha": repo.sha(branch),
                    "private": repo.private,
                }
                if not hub.tells_visibility:
                    del info["private"]
                self.answer(200, {**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
            elif verb == "tree":
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": _git_oid(data)}
                    for file, data in sorted(files.items())
                ]
                self.answer(200, entries)
            elif verb == "preupload":
                asked = [item["path"] for item in json.loads(body)["files"]]
                answer = [
                    {
                        "path": file,
                        "uploadMode": "lfs" if file.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": self.known_oid(files.get(file), file),
                    }
                    for file in asked
                ]
                self.answer(200, {"files": answer})
            elif verb == "commit":
                self.commit(name, repo, branch, body)
            elif verb == "resolve":
                self.resolve(repo, branch, files.get("/".join(rest[1:])))
            else:
                self.fail(404, "EntryNotFound", f"the stand-in does not know {path}")

        @staticmethod
        def known_oid(data, file):
            if data is None:
                return None
            return hashlib.sha256(data).hexdigest() if file.endswith(".safetensors") else _git_oid(data)

        def commit(self, name, repo, branch, body):
            files = dict(repo.branches[branch])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            repo.branches[branch] = files
            sha = repo.sha(branch)
            self.answer(
                200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True}
            )

        def resolve(self, repo, branch, data):
            if data is None:
                self.fail(404, "EntryNotFound", "Entry not found")
                return
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, [("ETag", etag), ("X-Repo-Commit", repo.sha(branch))])

    return Handler
