"""Where vLLM servers are, and the key that they are asked with; what cannot be either is refused before anything is loaded.

Weights go through shared memory, by routes that no key guards: a server listens on this machine's loopback interface alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import urllib.parse
from collections.abc import Sequence


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


def check_addresses(urls: Sequence[str]) -> None:
    """Checks that every address is that of a server, and of another one.

    Raises:
        ValueError: there is none, one is no server's (see :func:`server_address`), or two are the same.
    """
    if not urls:
        raise ValueError("urls is empty; give at least one server")
    known: dict[tuple[str, int], str] = {}
    for url in urls:
        host, port = server_address(url)
        place = "127.0.0.1" if host == "localhost" else host, port
        if place in known:
            raise ValueError(f"{known[place]} and {url} are the same server; name each once")
        known[place] = url


def server_address(url: str) -> tuple[str, int]:
    """Host and port of a server's URL.

    Raises:
        ValueError: the server is on another machine, is named by another address of this one than the loopback interface's, or
            the URL is none.
    """
    mistake = f"{url!r} is not the address of a server; give one such as http://127.0.0.1:8000"
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # no port has such a number
        raise ValueError(mistake) from None
    if parts.scheme != "http" or not host or not port:
        raise ValueError(mistake)
    place = f"http://{parts.netloc.rpartition('@')[2]}"
    if parts.username is not None:
        raise ValueError(f"the address of {place} has a user name, which vLLM does not know; leave it out and set VLLM_API_KEY")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError(f"{url} has a path, but a server is named by host and port alone; give {place}")
    if not _is_loopback(host):
        if _is_own(host):
            raise ValueError(
                f"{url} is an address of this machine that others can reach too; vLLM's routes that change weights are not "
                f"protected by an API key and must not listen there; give http://127.0.0.1:{port}, where `grpo-fast serve` "
                "listens"
            )
        raise ValueError(
            f"{url} is on another machine, but weights are sent through shared memory, and vLLM's routes that change them "
            "are not protected by an API key; give a server on 127.0.0.1"
        )
    return host, port


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
