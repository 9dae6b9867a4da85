"""A stand-in for the server of Weights & Biases on this machine."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time

import pytest


class Server(http.server.ThreadingHTTPServer):
    """Keeps one run: what is streamed to it, and its files. It can be told to fail, or to be slow.

    Attributes:
        status: of every answer; other than 200, nothing is kept.
        delay: seconds before every answer.
        streams: file name -> lines.
        uploads: name -> bytes.
        runs: variables of each time that a run was begun.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status, self.delay = 200, 0.0
        self.streams: dict[str, list[str]] = {}
        self.uploads: dict[str, bytes] = {}
        self.runs: list[dict] = []

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed

    @property
    def history(self) -> list[dict]:
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict:
        return json.loads(self.streams.get("wandb-summary.json", ["{}"])[-1])

    def stream(self, files: dict) -> None:
        for name, chunk in files.items():
            lines, first = self.streams.setdefault(name, []), chunk["offset"]
            lines[first : first + len(chunk["content"])] = chunk["content"]

    def query(self, name: str, variables: dict) -> dict:
        project = {"id": "1", "name": "detfamily", "entity": {"id": "2", "name": "me"}}
        if name == "UpsertBucket":
            self.runs.append(variables)
            return {"upsertBucket": {"bucket": self._run() | {"project": project}, "inserted": len(self.runs) == 1}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._run() if self.runs else None}}
        if name == "CreateRunFiles":
            files = [{"name": one, "uploadUrl": f"{self.url}/upload/{one}"} for one in variables["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        return {}

    def _run(self) -> dict:
        history = self.streams.get("wandb-history.jsonl", [])
        return {
            "id": "3",
            "name": self.runs[0]["name"],
            "displayName": self.runs[0]["displayName"],
            "summaryMetrics": json.dumps(self.summary),
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": len(self.streams.get("wandb-events.jsonl", [])),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": "[]",
            "config": self.runs[0]["config"] or "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/control/"):  # how the process under test brings the fault about
            server.status = int(self.path.rpartition("/")[2])
            return self.answer(200, {})
        time.sleep(server.delay)
        if server.status != 200:
            return self.answer(server.status, {"error": "as told"})
        if self.path == "/graphql":
            asked = json.loads(body)
            return self.answer(200, {"data": server.query(asked["operationName"], asked["variables"])})
        if re.fullmatch("/files/.*/file_stream", self.path):
            server.stream(json.loads(body).get("files") or {})
        if self.path.startswith("/upload/"):
            server.uploads[self.path.removeprefix("/upload/")] = body
        return self.answer(200, {})

    do_GET = do_PUT = do_POST

    def answer(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words) -> None:
        pass


@pytest.fixture
def serve():
    """Makes stand-ins, each answering at its own ``url``."""
    made: list[Server] = []

    def make() -> Server:
        made.append(Server())
        threading.Thread(target=made[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()
