"""The real ``ssh`` against a real SSH server, on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_fast.rollout import RolloutError
from grpo_fast.rollout.ssh_tunnel import Tunnel, address_towards, is_hung_up
from grpo_fast.rollout.vllm_client import VLLMServer, wait_until_up
from grpo_fast.rollout.vllm_environment import held_port
from grpo_fast.rollout.vllm_requests import Requests


class Echo(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        answer = f'{{"length": {len(data)}, "last": {data[-1]}}}'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def own_ssh() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "ssh"]


@pytest.mark.usefixtures("ssh_machine")
def test_requests_and_their_bytes_go_through_it(port: int) -> None:
    server = VLLMServer(f"ssh://far:{port}", api_key=None, deadline_s=20)
    data = bytearray(3_000_000)
    data[-1] = 7
    assert server.put("/memory", memoryview(data)) == {"length": 3_000_000, "last": 7}
    assert server.machine == "far"
    assert len(own_ssh()) == 1
    server.close()
    assert own_ssh() == []
    with pytest.raises(RolloutError, match="the connection to far was closed"):
        server.put("/memory", b"x")


@pytest.mark.usefixtures("ssh_machine")
def test_what_has_ended_is_made_anew_by_the_next_request(port: int) -> None:
    """As by a sync that is repeated whole."""
    server = VLLMServer(f"ssh://far:{port}", api_key=None, deadline_s=20)
    for _ in range(2):
        assert server.put("/memory", b"x")["length"] == 1
        [ssh] = own_ssh()
        ssh.kill()
        psutil.wait_procs([ssh], timeout=10)
    server.close()
    assert own_ssh() == []


@pytest.mark.usefixtures("ssh_machine")
@pytest.mark.parametrize(("host", "words"), [("stranger", "Permission denied"), ("nowhere.invalid", "Could not resolve")])
def test_where_it_cannot_log_in_it_says_what_ssh_says(host: str, words: str) -> None:
    with pytest.raises(
        RolloutError, match=rf"ssh cannot reach {host}: .*{words}.*`ssh {host} cat` must work without a question"
    ):
        Tunnel(host, 8000).open()
    assert own_ssh() == []


def test_what_the_users_configuration_asks_for_beside_does_not_end_it(
    port: int, ssh_machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that another ssh of the user's forwards already, and a command for logging in by hand."""
    with held_port() as taken, socket.create_server(("127.0.0.1", taken)):
        config = tmp_path / "config"
        config.write_text(
            f"Host far\n  LocalForward {taken} 127.0.0.1:1\n  RemoteCommand false\nInclude {ssh_machine.config}\n"
        )
        monkeypatch.setenv("GRPO_FAST_SSH", f"ssh -F {config}")
        server = VLLMServer(f"ssh://far:{port}", api_key=None, deadline_s=20)
        assert server.put("/memory", b"x")["length"] == 1
        server.close()


@pytest.mark.usefixtures("ssh_machine")
def test_a_machine_that_connects_nobody_to_its_ports_is_not_waited_for() -> None:
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"far lets ssh log in, but forbids .*ssh://far:1 .*must allow it"):
        wait_until_up(["ssh://far:1"], timeout_s=30, deadline_s=10)
    assert time.monotonic() - begin < 20
    assert own_ssh() == []


def test_without_the_program_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_FAST_SSH", "/none/ssh -v")
    with pytest.raises(RolloutError, match=r"/none/ssh cannot be started \(No such file or directory\)"):
        Tunnel("far", 8000).open()


@pytest.mark.usefixtures("ssh_machine")
def test_a_server_that_ends_behind_it_is_not_waited_for() -> None:
    """It owes an answer and keeps that connection, as vLLM's does where its engine has died, but takes no other."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = VLLMServer(f"ssh://far:{listening.getsockname()[1]}", api_key=None, deadline_s=60)

        def end() -> None:
            held.append(listening.accept()[0])
            listening.close()

        threading.Thread(target=end, daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(RolloutError, match=r"vLLM's server ssh://far:\d+ cannot be reached \(ConnectionRefusedError"):
            server.get("/version")
        assert time.monotonic() - begin < 20
        server.close()
    held[0].close()


def test_a_refusal_is_waited_for_as_long_as_a_slow_link_takes_and_an_answer_beside_it_is_not_held_up() -> None:
    probe, other = socket.socketpair()
    waiting, answering = socket.socketpair()
    with probe, other, waiting, answering:
        answer = threading.Timer(0.2, answering.sendall, (b"an answer",))
        answer.start()
        begin = time.monotonic()
        assert not is_hung_up(probe, beside=waiting)
        assert time.monotonic() - begin < 1.5
        answer.join()
        waiting.recv(20)
        threading.Timer(0.6, other.shutdown, (socket.SHUT_RDWR,)).start()
        assert is_hung_up(probe, beside=waiting)


@pytest.mark.usefixtures("ssh_machine")
def test_a_server_that_ends_with_many_requests_behind_it_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        server = VLLMServer(f"ssh://far:{listening.getsockname()[1]}", api_key=None, deadline_s=60)
        requests = Requests([server])
        ended: list[float] = []

        def end() -> None:
            held = [listening.accept()[0] for _ in range(64)]
            ended.append(time.monotonic())
            listening.close()
            for each in held:
                each.close()

        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(RolloutError, match=r"vLLM's server ssh://far:\d+ cannot be reached"):
            requests.sample([[1]] * 64, [{}] * 64)
        requests._pool.shutdown()  # as Python does at its end
        assert time.monotonic() - ended[0] < 15
        server.close()


@pytest.mark.usefixtures("ssh_machine")
def test_a_server_that_is_not_up_yet_is_waited_for() -> None:
    with held_port() as port, pytest.raises(RolloutError, match=rf"ssh://far:{port} was not up within 2 s"):
        wait_until_up([f"ssh://far:{port}"], timeout_s=2, deadline_s=10)
    assert own_ssh() == []


def test_it_ends_with_the_process_that_made_it(port: int, ssh_machine: Any) -> None:
    script = (
        "import sys, time\nfrom grpo_fast.rollout.ssh_tunnel import Tunnel\n"
        f"tunnel = Tunnel('far', {port})\nprint(tunnel.open(), tunnel._process.pid, flush=True)\ntime.sleep(60)"
    )
    environment = os.environ | {"GRPO_FAST_SSH": f"ssh -F {ssh_machine.config}"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline().split()[1])
        ssh = psutil.Process(pid)
        assert ssh.is_running()
        owner.send_signal(signal.SIGKILL)
    ssh.wait(10)


@pytest.mark.usefixtures("ssh_machine")
def test_the_address_of_this_machine_is_that_of_the_network_that_leads_there() -> None:
    assert address_towards("far") == "127.0.0.1"
    with pytest.raises(RolloutError, match=r"nowhere\.invalid has no address that this machine can reach"):
        address_towards("nowhere.invalid")


def test_a_connection_that_breaks_is_told_as_such(ssh_machine: Any) -> None:
    """After connections to a server that was not up, of which ssh says more than the end of all."""
    with held_port() as port:
        server = VLLMServer(f"ssh://far:{port}", api_key=None, deadline_s=60)
        assert server._tunnel is not None
        local = server._tunnel.open()
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", local)) as refused:
                assert refused.recv(1) == b""
        with socket.create_server(("127.0.0.1", port)):
            begin = time.monotonic()
            threading.Timer(1.0, ssh_machine.stop).start()
            with pytest.raises(
                RolloutError, match=rf"the ssh connection to vLLM's server ssh://far:{port} has ended: "
            ) as error:
                server.get("/version")
            assert "open failed" not in str(error.value)
            assert time.monotonic() - begin < 20
    server.close()
