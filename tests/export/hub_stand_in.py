"""A Hub on this machine: the requests of `huggingface_hub` when it makes a repository and uploads a
folder to it, https://huggingface.co/docs/hub/api and
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_canary0123456789"


class HubStandIn(ThreadingHTTPServer):
    """Knows the user `me`, who is in the organization `us`.

    Attributes:
        asked: method and path of every request.
        commits: message and files (path -> bytes) of every commit.
        created: what each new repository was asked to be.
        refusals: status by the start of a path that is refused.
        role: of the user's token.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.created: list[dict[str, Any]] = []
        self.refusals: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.role = "write"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(f"{self.command} {path}")
        refused = [s for start, s in hub.refusals.items() if path.startswith(start)]
        if refused:
            return self._answer({"error": "no, says the stand-in"}, status=refused[0])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            return self._answer({"error": "Invalid username or password."}, status=401)
        if self.command == "GET" and path.startswith("/api/models/"):  # is it there already?
            return self._answer({"error": "Repository not found"}, status=404)
        self._answer(self._result(path, body))

    def _result(self, path: str, body: bytes) -> dict[str, Any]:
        hub = self.server

        # the account, the repository and the card
        if path == "/api/whoami-v2":
            access = {"displayName": "here", "role": hub.role}
            auth = {"type": "access_token", "accessToken": access}
            return {"type": "user", "name": "me", "orgs": [{"name": "us"}], "auth": auth}
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            owner = asked.get("organization") or "me"
            return {"url": f"{hub.address}/{owner}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}

        # the files and the commit
        if "/preupload/" in path:
            return {"files": [_mode(file["path"]) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._action(o) for o in _objects(body)]}
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            assert path not in hub.blobs
            hub.blobs[path.removeprefix("/lfs/")] = body
            return {}
        if "/commit/" in path:
            return self._commit([json.loads(line) for line in body.splitlines()])
        raise AssertionError(f"the stand-in does not know {path}")

    def _action(self, item: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.address}/lfs/{item['oid']}"
        return {**item, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        files: dict[str, bytes] = {}
        for value in (line["value"] for line in lines if line["key"] != "header"):
            assert value["path"] not in files
            held = self.server.blobs.get(value.get("oid", ""))
            files[value["path"]] = base64.b64decode(value["content"]) if held is None else held
        self.server.commits.append((lines[0]["value"]["summary"], files))
        address = f"{self.server.address}/me/x/commit/{'0' * 40}"
        return {"commitUrl": address, "commitOid": "0" * 40, "success": True}

    def _answer(self, values: dict[str, Any], *, status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def _objects(body: bytes) -> list[dict[str, Any]]:
    return json.loads(body)["objects"]
