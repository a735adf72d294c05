"""A test double of the Hub's HTTP API on loopback: repositories, content-addressed blobs, LFS, pull requests, tokens.

Commits are immutable: a revision is the hash of its tree, parent and message, so a pinned one cannot change. Small
files travel inside the commit; files named like weights go through the LFS endpoints first, as on the Hub.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

TOKENS = {"good-token": "anna", "other-token": "bert"}  # token: user
LFS_SUFFIXES = (".safetensors", ".png", ".jpg", "tokenizer.json")
READ_ONLY = {"bert"}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.trees: dict[str, dict[str, dict]] = {}  # commit: {path: {"oid", "size", "lfs": sha256 or None}}
        self.log: dict[str, list[str]] = {}  # commit: itself and its ancestors, newest first
        self.messages: dict[str, str] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests = 0
        self.commit("main", {}, "initial commit")

    def commit(self, ref: str, tree: dict, message: str, parent: str | None = None) -> str:
        parent = parent or self.refs.get(ref)
        commit = hashlib.sha1(json.dumps([tree, parent, message], sort_keys=True).encode()).hexdigest()
        self.trees[commit], self.messages[commit] = tree, message
        self.log[commit] = [commit, *self.log.get(parent, [])]
        self.refs[ref] = commit
        return commit

    def resolve(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.trees:
            raise HTTPException(404, headers={"X-Error-Code": "RevisionNotFound"})
        return commit


class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.url`; `hub.uploads` and `hub.break_uploads` watch and break LFS."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by git hash or sha256
        self.uploads: list[str] = []  # sha256 of everything that arrived through LFS
        self.commits = 0
        self.break_uploads = False  # the next uploads lose their connection in the middle of the answer
        self.app = FastAPI()
        self._routes()

    def __enter__(self) -> "FakeHub":
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *exception) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def user(self, request: Request) -> str | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in TOKENS:
            raise HTTPException(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repository(self, request: Request, repo_id: str, write: bool = False) -> Repository:
        user = self.user(request)
        found = self.repositories.get(repo_id)
        if found is None or (found.private and user != repo_id.split("/")[0]):
            raise HTTPException(404, headers={"X-Error-Code": "RepoNotFound"})
        if write and (user is None or user in READ_ONLY):
            raise HTTPException(403, "this token may not write")
        return found

    def _routes(self) -> None:
        app = self.app

        @app.exception_handler(HTTPException)
        async def error(request: Request, error: HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

        @app.get("/api/whoami-v2")
        async def whoami(request: Request):
            user = self.user(request)
            if user is None:
                raise HTTPException(401, "no token")
            return {"type": "user", "name": user, "orgs": []}

        @app.post("/api/repos/create")
        async def create(request: Request):
            body, user = await request.json(), self.user(request)
            if user is None or user in READ_ONLY:
                raise HTTPException(403, "this token may not create repositories")
            repo_id = f"{body.get('organization') or user}/{body['name']}"
            answer = {"url": f"{self.url}/{repo_id}", "id": "1", "name": repo_id}
            if repo_id in self.repositories:
                return JSONResponse({**answer, "error": "You already created this model repo"}, 409)
            visibility = body.get("visibility") or ("private" if body.get("private") else "public")
            self.repositories[repo_id] = Repository(private=visibility == "private")
            return answer

        @app.post("/api/validate-yaml")
        async def validate(request: Request):
            return {"errors": [], "warnings": []}

        @app.get("/api/models/{owner}/{name}")
        @app.get("/api/models/{owner}/{name}/revision/{revision:path}")
        async def info(request: Request, owner: str, name: str, revision: str = "main"):
            found = self.repository(request, f"{owner}/{name}")
            commit = found.resolve(revision)
            files = [{"rfilename": path} for path in found.trees[commit]]
            return {"id": f"{owner}/{name}", "sha": commit, "private": found.private, "siblings": files, "tags": []}

        @app.get("/api/models/{owner}/{name}/commits/{revision:path}")
        async def commits(request: Request, owner: str, name: str, revision: str):
            found = self.repository(request, f"{owner}/{name}")
            date = "2026-01-01T00:00:00.000Z"
            return [
                {"id": commit, "title": found.messages[commit], "message": "", "date": date, "authors": []}
                for commit in found.log[found.resolve(revision)]
            ]

        @app.get("/api/models/{owner}/{name}/tree/{rest:path}")
        async def tree(request: Request, owner: str, name: str, rest: str):
            found = self.repository(request, f"{owner}/{name}")
            revision, _, folder = rest.partition("/")
            files = found.trees[found.resolve(revision)]
            entries = []
            for path, file in files.items():
                if not path.startswith(f"{folder}/" if folder else ""):
                    continue
                entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
                if file["lfs"]:
                    entry["lfs"] = {"oid": file["lfs"], "size": file["size"], "pointerSize": 130}
                entries.append(entry)
            return entries

        @app.post("/api/models/{owner}/{name}/preupload/{revision:path}")
        async def preupload(request: Request, owner: str, name: str, revision: str):
            found = self.repository(request, f"{owner}/{name}", write=True)
            files = found.trees[found.resolve(revision)]
            answers = []
            for file in (await request.json())["files"]:
                path = file["path"]
                mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
                known = files.get(path)
                oid = known and (known["lfs"] or known["oid"])
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return {"files": answers}

        @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
        async def batch(request: Request, owner: str, name: str):
            self.repository(request, f"{owner}/{name}", write=True)
            objects = []
            for item in (await request.json())["objects"]:
                answer = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in self.blobs:
                    answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
                objects.append(answer)
            return {"transfer": "basic", "objects": objects}

        @app.put("/lfs/{oid}")
        async def put(request: Request, oid: str):
            if self.break_uploads:

                def half() -> Iterator[bytes]:
                    yield b"half"
                    raise ConnectionResetError

                return StreamingResponse(half(), headers={"Content-Length": "1000"})
            content = await request.body()
            if hashlib.sha256(content).hexdigest() != oid:
                raise HTTPException(400, "content does not have the hash it was announced with")
            self.blobs[oid] = content
            self.uploads.append(oid)
            return Response()

        @app.post("/api/models/{owner}/{name}/commit/{revision:path}")
        async def commit(request: Request, owner: str, name: str, revision: str, create_pr: str | None = None):
            found = self.repository(request, f"{owner}/{name}", write=True)
            lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            base = found.resolve(revision)
            if header.get("parentCommit") not in (None, base):
                raise HTTPException(412, "parent commit is not the head")
            files = dict(found.trees[base])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    self.blobs[git_hash(content)] = content
                    files[value["path"]] = {"oid": git_hash(content), "size": len(content), "lfs": None}
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.blobs:
                        raise HTTPException(400, f"no upload of {value['path']}")
                    pointer = git_hash(value["oid"].encode())
                    files[value["path"]] = {"oid": pointer, "size": value["size"], "lfs": value["oid"]}
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            ref = revision
            if create_pr:
                found.pull_requests += 1
                ref = f"refs/pr/{found.pull_requests}"
            self.commits += 1
            made = found.commit(ref, files, header["summary"], base)
            answer = {"success": True, "commitOid": made, "commitUrl": f"{self.url}/{owner}/{name}/commit/{made}"}
            if create_pr:
                answer["pullRequestUrl"] = f"{self.url}/{owner}/{name}/discussions/{found.pull_requests}"
            return answer

        @app.api_route("/{owner}/{name}/resolve/{rest:path}", methods=["GET", "HEAD"])
        async def resolve(request: Request, owner: str, name: str, rest: str):
            found = self.repository(request, f"{owner}/{name}")
            revision, _, path = rest.partition("/")
            commit = found.resolve(revision)
            file = found.trees[commit].get(path)
            if file is None:
                raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = self.blobs[file["lfs"] or file["oid"]]
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{file["lfs"] or file["oid"]}"',
                "X-Linked-Etag": f'"{file["lfs"] or file["oid"]}"',
                "X-Linked-Size": str(file["size"]),
                "Content-Length": str(file["size"]),
            }
            body = b"" if request.method == "HEAD" else content
            return Response(body, headers=headers, media_type="application/octet-stream")
