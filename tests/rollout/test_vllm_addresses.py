"""Addresses of servers, and keys, that no run can begin with."""

from __future__ import annotations

import socket

import pytest

from grpo_fast.rollout.vllm_addresses import api_key, check_addresses, server_address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://192.0.2.1:8000", r"is on another machine, where others could reach .*; .*and give ssh://192\.0\.2\.1:8000$"),
        ("127.0.0.1:8000", "is not the address of a server"),
        ("http://127.0.0.1", "is not the address of a server"),
        ("http://127.0.0.1:0", "'http://127.0.0.1:0' is not the address of a server"),
        ("http://127.0.0.1:80000", "'http://127.0.0.1:80000' is not the address of a server"),
        ("http://127.0.0.1:vllm", "'http://127.0.0.1:vllm' is not the address of a server"),
        ("http://[::1:8000", r"'http://\[::1:8000' is not the address of a server"),
        ("http://127.0.0.1:8000/v1", r"/v1 has a path.*; give http://127\.0\.0\.1:8000$"),
        ("http://127.0.0.1:8000?model=a", r"has a path.*; give http://127\.0\.0\.1:8000$"),
        ("ssh://node2", "'ssh://node2' is not the address of a server"),
        ("ssh://-oProxyCommand=touch:8000", "is not the address of a server"),
        ("ssh://node2:8000/v1", "/v1 has a path.*; give ssh://node2:8000$"),
        ("https://127.0.0.1:8000", r"is not the address of a server; .* or ssh://node2:8000 on another machine$"),
        ("http://0.0.0.0:8000", r"is an address of this machine that others can reach too.*; give http://127\.0\.0\.1:8000,"),
    ],
)
def test_servers_elsewhere_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_addresses(["http://127.0.0.1:7999", url])


def test_this_machine_by_its_own_name_is_not_called_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo
    names = {"node-17": "0.0.0.0", "node-18": "192.0.2.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve(names[host], *rest, **more))
    with pytest.raises(
        ValueError, match=r"http://node-17:8000 is an address of this machine .*; give http://127\.0\.0\.1:8000,"
    ):
        server_address("http://node-17:8000")
    with pytest.raises(ValueError, match="http://node-18:8000 is on another machine"):
        server_address("http://node-18:8000")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "[::1]"])
def test_every_address_of_the_loopback_interface_is_taken(host: str) -> None:
    assert server_address(f"http://{host}:8000/") == (host.strip("[]"), 8000, None)
    assert check_addresses([f"http://{host}:8000"]) == "server"


@pytest.mark.parametrize("machine", ["node2", "Node2", "me@node2", "me@node2.example.com", "192.0.2.1"])
def test_what_ssh_calls_a_machine_is_kept_as_it_is(machine: str) -> None:
    assert server_address(f"ssh://{machine}:8000") == ("127.0.0.1", 8000, machine)
    assert check_addresses(["http://127.0.0.1:8000", f"ssh://{machine}:8000"]) == "server elsewhere"


def test_ports_of_several_machines_are_several_servers() -> None:
    check_addresses(["ssh://node2:8000", "ssh://node3:8000", "ssh://node2:8001", "http://127.0.0.1:8000"])
    with pytest.raises(ValueError, match="ssh://node2:8000 and ssh://node2:8000 are the same server"):
        check_addresses(["ssh://node2:8000", "ssh://node2:8000"])


@pytest.mark.parametrize(
    "again", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://localhost:8000", "http://LOCALHOST:8000/"]
)
def test_a_server_that_is_named_twice_is_refused(again: str) -> None:
    with pytest.raises(ValueError, match=rf"http://127\.0\.0\.1:8000 and {again} are the same server; name each once"):
        check_addresses(["http://127.0.0.1:8000", "http://127.0.0.1:8001", again])
    check_addresses(["http://127.0.0.1:8000", "http://127.0.0.1:8001", "http://[::1]:8000", "http://127.0.0.2:8000"])


def test_without_a_server_there_is_nothing_to_ask() -> None:
    with pytest.raises(ValueError, match="urls is empty; give at least one server"):
        check_addresses([])


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"the address of http://127\.0\.0\.1:8000 has a user name.*VLLM_API_KEY") as told:
        server_address("http://me:secret@127.0.0.1:8000")
    assert "secret" not in str(told.value)
    with pytest.raises(ValueError, match=r"the address of ssh://node2:8000 has a password, .*; use a key") as told:
        server_address("ssh://me:secret@node2:8000")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("key", ["secret\n", " secret", "secret\r\nX-Other: 1", "secr\u00e9t", "sec\x00ret"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes hands a secret on with the line break that its file ends with; Python's own error repeats the header."""
    monkeypatch.setattr("os.environ", {"VLLM_API_KEY": key})
    with pytest.raises(ValueError, match="VLLM_API_KEY begins or ends with a space or a line break, or has") as told:
        api_key()
    assert "secr" not in str(told.value)


def test_a_key_is_read_as_vllm_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert api_key() is None
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert api_key() is None
    monkeypatch.setenv("VLLM_API_KEY", "sk-1/a b+c=")
    assert api_key() == "sk-1/a b+c="
