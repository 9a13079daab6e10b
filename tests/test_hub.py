from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from grpo_fast import hub
from grpo_fast.assets import embedded_model_dir
from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks import load_task
from grpo_fast.train.policy_source import PolicySource

TRIES_S = hub._TRIES_S


class _Slow(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        time.sleep(0.5)
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port of this machine at which the hub is said to be, and nobody listens; it is tried again sooner than elsewhere."""
    monkeypatch.setattr(hub, "_TRIES_S", (0.0, 0.1, 0.1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{number}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return number


@pytest.fixture
def late(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that comes after a second, is slow and answers with an error."""
    monkeypatch.setattr(hub, "_TRIES_S", TRIES_S)
    servers: list[HTTPServer] = []

    def serve() -> None:
        time.sleep(0.5)
        servers.append(HTTPServer(("127.0.0.1", port), _Slow))
        servers[0].serve_forever()

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    while not servers:
        time.sleep(0.01)
    servers[0].shutdown()
    servers[0].server_close()
    thread.join()


def test_a_hub_that_is_late_slow_and_failing_counts_as_reached(late: None) -> None:
    assert hub.out_of_reach() is None


def test_without_a_hub_the_reason_is_told(port: int) -> None:
    assert f"http://127.0.0.1:{port} cannot be reached (" in (hub.out_of_reach() or "")


def test_a_place_without_a_hub_is_its_cache_and_a_directory_is_itself(port: int) -> None:
    away, here = hub.Place.of("owner/name", "v1"), hub.Place.of(str(embedded_model_dir()))
    assert "cannot be reached" in (away.unreached or "")
    assert away.arguments == {"pretrained_model_name_or_path": "owner/name", "revision": "v1", "local_files_only": True}
    assert here.unreached is None
    assert here.arguments["local_files_only"] is False


def test_offline_nothing_is_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.out_of_reach() is None


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_without_a_hub_a_name_of_it_fails_within_seconds(what: str, port: int) -> None:
    begin = time.monotonic()
    config = Config.parse({what: "nobody/x"})
    message = rf"'nobody/x'.*127\.0\.0\.1:{port} cannot be reached \(.*\), and no copy of it is in the cache\. "
    with pytest.raises(ConfigError, match=message):
        PolicySource(config) if what == "model" else load_task(config, chat=True)
    assert time.monotonic() - begin < 10


@pytest.mark.slow
def test_without_a_hub_a_copy_in_the_cache_is_read(port: int, tmp_path: Path) -> None:
    kept = tmp_path / "hub/models--nobody--x"
    shutil.copytree(embedded_model_dir(), kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("a" * 40, encoding="utf-8")
    code = (
        "from grpo_fast import Config; from grpo_fast.train.policy_source import PolicySource\n"
        "print(PolicySource(Config(model='nobody/x', max_completion_length=64)).load().model.num_parameters())"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert int(done.stdout) > 10**5, done.stderr
    assert "Retrying" not in done.stderr
