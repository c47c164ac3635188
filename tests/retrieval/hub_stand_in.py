"""A stand-in for the Hugging Face Hub, which cannot be reached from here: the endpoints that a push and a pull touch.

It keeps commits in memory. Every file is a "regular" one, so the large-file protocol, which is huggingface_hub's own
affair, is not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from http_stand_in import JsonHandler, StandIn


class StandInHub(StandIn):
    """repos: name -> commits, oldest first, each the files of one revision. broken: path -> bytes given instead.

    claimed: path -> the size that is told of it before it is fetched. fetched: the paths, in order.
    """

    def __init__(self) -> None:
        super().__init__(Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.broken: dict[str, bytes] = {}
        self.claimed: dict[str, int] = {}
        self.fetched: list[str] = []
        self.refuse_commits = False
        self.before_commit: Callable[[], None] = lambda: None

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo, [])
        for number, files in enumerate(commits):
            oid = commit_id(repo, number)
            if revision == oid or (revision == "main" and number == len(commits) - 1):
                return oid, files
        return None


def commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


class Handler(JsonHandler):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._json({"error": f"the stand-in has no {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.read()
        if path == "/api/repos/create":
            request = json.loads(data)
            name = f"{request['organization']}/{request['name']}"
            if name in self.server.repos:
                self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
                return
            self.server.repos[name] = [{".gitattributes": b""}]
            self.server.private[name] = request.get("visibility", "public") == "private" or bool(request.get("private"))
            self._json({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = json.loads(data)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._json({"files": modes})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], data)
        else:
            self._json({"error": f"the stand-in has no {path}"}, 404)

    def _commit(self, repo: str, data: bytes) -> None:
        self.server.before_commit()
        if self.server.refuse_commits:
            self._json({"error": "You don't have the rights to commit"}, 403)
            return
        files = dict(self.server.repos[repo][-1])
        header, *lines = map(json.loads, data.splitlines())
        if header["value"]["parentCommit"] != commit_id(repo, len(self.server.repos[repo]) - 1):
            self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self.server.repos[repo].append(files)
        oid = commit_id(repo, len(self.server.repos[repo]) - 1)
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _info(self, repo: str, revision: str) -> None:
        if repo not in self.server.repos:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif (commit := self.server.find(repo, revision)) is None:
            self._json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            oid, files = commit
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "modelId": repo, "sha": oid, "siblings": siblings, "tags": [], "downloads": 0})

    def _tree(self, repo: str, revision: str) -> None:
        commit = self.server.find(repo, revision)
        if commit is None:
            self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        entries = [{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in commit[1].items()]
        self._json(entries)

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self.server.find(repo, revision)
        if commit is None or name not in commit[1]:
            self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.broken.get(name, commit[1][name])
        if self.command == "GET":
            self.server.fetched.append(name)
            claim = {}
        else:
            claim = {"X-Linked-Size": str(self.server.claimed[name])} if name in self.server.claimed else {}
        self.send(data, 200, {"X-Repo-Commit": commit[0], "ETag": f'"{_oid(data)}"', **claim})

    def _json(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        error = {"X-Error-Message": body["error"]} if isinstance(body, dict) and "error" in body else {}
        self.reply(body, status, {**error, **(headers or {})})


def _oid(data: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
