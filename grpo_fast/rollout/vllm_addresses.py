"""Where vLLM servers are, and the key that they are asked with; what cannot be either is refused before anything is loaded.

No key guards vLLM's routes that change weights. So a server listens on its machine's loopback interface alone, and one of
another machine is reached by ssh.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import urllib.parse
from collections.abc import Sequence
from typing import Literal, NamedTuple

_MISTAKE = (
    "{url!r} is not the address of a server; give one such as http://127.0.0.1:8000, or ssh://node2:8000 on another machine"
)


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    """Of the loopback interface."""
    port: int
    machine: str | None = None
    """What ``ssh`` calls the server's machine; ``None`` for this one."""


def api_key() -> str | None:
    """The key that requests carry, from ``VLLM_API_KEY``, where vLLM's server looks for it too; ``None`` where there is none.

    Raises:
        ValueError: no header of a request can hold it; it is not shown.
    """
    key = os.environ.get("VLLM_API_KEY")
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(
            "VLLM_API_KEY begins or ends with a space or a line break, or has a character that no HTTP header can hold; set it "
            "without, for the servers too"
        )
    return key or None


def check_addresses(urls: Sequence[str]) -> Literal["server", "server elsewhere"]:
    """Checks that every address is that of a server, and of another one.

    Returns:
        Where transports of weights find them: all on this machine, or some on others.

    Raises:
        ValueError: there is none, one is no server's (see :func:`server_address`), or two are the same.
    """
    if not urls:
        raise ValueError("urls is empty; give at least one server")
    known: dict[Address, str] = {}
    for url in urls:
        place = server_address(url)
        place = place._replace(host="127.0.0.1" if place.host == "localhost" else place.host)
        if place in known:
            raise ValueError(f"{known[place]} and {url} are the same server; name each once")
        known[place] = url
    return "server" if all(place.machine is None for place in known) else "server elsewhere"


def server_address(url: str) -> Address:
    """The place that a server's URL names.

    Raises:
        ValueError: the server is on another machine and not reached by ssh, is named by another address of this one than the
            loopback interface's, or the URL is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # no port has such a number
        raise ValueError(_MISTAKE.format(url=url)) from None
    if parts.scheme not in {"http", "ssh"} or not host or not port:
        raise ValueError(_MISTAKE.format(url=url))
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError(f"{url} has a path, but a server is named by host and port alone; give {place}")
    if parts.scheme == "ssh":
        return _by_ssh(parts, port)
    if parts.username is not None:
        raise ValueError(f"the address of {place} has a user name, which vLLM does not know; leave it out and set VLLM_API_KEY")
    if not _is_loopback(host):
        if _is_own(host):
            raise ValueError(
                f"{url} is an address of this machine that others can reach too; vLLM's routes that change weights are not "
                f"protected by an API key and must not listen there; give http://127.0.0.1:{port}, where `grpo-fast serve` "
                "listens"
            )
        raise ValueError(
            f"{url} is on another machine, where others could reach vLLM's routes that change weights, which no API key "
            f"protects; have the server listen on 127.0.0.1 there, as `grpo-fast serve` does, and give ssh://{host}:{port}"
        )
    return Address(host, port)


def _by_ssh(parts: urllib.parse.SplitResult, port: int) -> Address:
    """The host's name in the letters that were given: it may be an alias of the user's."""
    machine = parts.netloc.rpartition(":")[0].replace("[", "").replace("]", "")
    if parts.password is not None:
        raise ValueError(f"the address of ssh://{parts.hostname}:{port} has a password, which ssh does not take; use a key")
    if machine.startswith("-"):  # an option of ssh's
        raise ValueError(_MISTAKE.format(url=parts.geturl()))
    return Address("127.0.0.1", port, machine)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_own(host: str) -> bool:
    """Whether a name or an address is this machine's: only its own can be bound to."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False
