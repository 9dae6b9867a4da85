"""W&B's own sweep and agent, against a stand-in for its server on this machine; the training is a stand-in, too."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from detfamily.experiments.version import PACKAGE

pytest.importorskip("wandb")

DRIVER = """
import sys
from detfamily.errors import ConfigError
from detfamily.sweeps.command import go
from detfamily.sweeps.request import read_request
try:
    status = go(read_request(sys.argv[3:]), [sys.executable, "-S", sys.argv[2]])
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
sys.exit(status)
"""

pytestmark = pytest.mark.slow


class Server(http.server.ThreadingHTTPServer):
    """Keeps one sweep, and hands out a run to each agent that has none, as many as there are learning rates."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.config, self.created = 200, "", 0
        self.rates = iter([0.01, 0.02, 0.03])

    def query(self, name: str, variables: dict) -> dict:
        project = {"id": "1", "name": "shapes", "entity": {"id": "2", "name": "me"}}
        if name == "UpsertSweep":
            self.config, self.created = variables["config"], self.created + 1
            return {"upsertSweep": {"sweep": {"name": "s1", "project": project}, "configValidationWarnings": []}}
        if name == "SweepWithRuns":
            return {"project": {"sweep": {"id": "3", "name": "s1", "config": self.config, "runs": {"edges": []}}}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "4"}}}
        if name == "Heartbeat":
            commands = [] if json.loads(variables["runState"]) else self.commands()
            return {"agentHeartbeat": {"agent": {"id": "4"}, "commands": json.dumps(commands)}}
        user = {"id": "2", "username": "me", "name": "me", "email": "me", "entity": "me", "flags": "{}", "admin": False}
        return {"viewer": {**user, "teams": {"edges": []}}}

    def commands(self) -> list[dict]:
        rate = next(self.rates, None)
        if rate is None:
            return [{"type": "exit"}]
        drawn = {"optimizer.lr": {"value": rate}, "decoder": {"value": "plain"}}
        return [{"type": "run", "run_id": f"run{rate}", "program": "detfamily", "args": drawn}]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = {}
        if self.path == "/graphql" and self.server.status == 200:
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            content = {"data": self.server.query(name, asked.get("variables") or {})}
        text = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, *words) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(server, write_sweep, launch, tmp_path):
    def call(*words, **settings):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent), "WANDB_API_KEY": "0123456789" * 4}
        environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", **settings}
        given = [str(write_sweep()), "method=wandb", f"output_dir={tmp_path / 'out'}", *words]
        return subprocess.run(
            [sys.executable, "-c", DRIVER, "--", launch[-1], *given],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )

    return call


def test_the_sweep_is_created_and_its_agent_runs_the_trials(server, call, tmp_path):
    out = tmp_path / "out"
    done = call("trials=2", "tracking.wandb.entity=me", "tracking.wandb.project=shapes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B sweep me/shapes/s1: 0 trials of 2 are done" in done.stdout
    assert "| 0 | 0.01 | plain | 4.0 | finished | 4 |" in (out / "trials.md").read_text()
    assert "best        trial 1, AP 8.0" in done.stdout
    assert sorted(path.parent.name for path in out.glob("trials/*/metrics.json")) == ["run0.01", "run0.02"]
    assert "log_uniform_values" in server.config and "${args_no_hyphens}" in server.config
    assert server.created == 1


def test_a_server_that_refuses_is_named_with_the_way_around_it(server, call, tmp_path):
    server.status = 401
    done = call("trials=2")
    assert done.returncode == 1 and "ConfigError: the sweep cannot be created" in done.stderr
    assert "without the server: tracking.wandb.mode=offline" in done.stderr
    assert not list(tmp_path.glob("out/trials/*"))
