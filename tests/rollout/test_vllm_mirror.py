"""The routes as ASGI has them; in vLLM's own server they are in the tests of ``vllm_copies``."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_fast.rollout.vllm_mirror import Mirror


async def ignore(*_: Any) -> Any: ...


async def vllm(scope: Mapping[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"vllm": scope["path"]}).encode()})


def ask(
    mirror: Mirror, method: str, path: str, *parts: bytes, headers: Sequence[tuple[bytes, bytes]] = (), cut: bool = False
) -> tuple[int, dict[str, Any]]:
    """One request whose body comes in parts, and whose client goes before its end if it is cut."""
    route, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": route, "query_string": query.encode(), "headers": list(headers)}
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.disconnect"} if cut else {"type": "http.request"})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(mirror(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    mirror = Mirror(vllm)
    yield mirror
    asyncio.run(mirror({"type": "lifespan"}, ignore, ignore))


def test_other_requests_are_vllms(mirror: Mirror) -> None:
    assert ask(mirror, "POST", "/pause?mode=wait") == (200, {"vllm": "/pause"})
    assert ask(mirror, "GET", "/grpo_fasts") == (200, {"vllm": "/grpo_fasts"})
    assert ask(mirror, "POST", "/grpo_fast/sees") == (404, {"error": "there is no POST /grpo_fast/sees"})


def test_memory_is_written_in_parts_and_read_by_its_path(mirror: Mirror) -> None:
    status, told = ask(mirror, "POST", "/grpo_fast/memory?num_bytes=10")
    assert status == 200
    place = f"path={told['path']}&place"
    assert ask(mirror, "PUT", f"/grpo_fast/memory?{place}=2", b"abc", b"", b"de")[0] == 200
    assert Path(told["path"]).read_bytes() == b"\0\0abcde\0\0\0"
    assert ask(mirror, "PUT", f"/grpo_fast/memory?{place}=7", b"abc")[0] == 200
    status, answer = ask(mirror, "PUT", f"/grpo_fast/memory?{place}=8", b"abc")
    assert (status, answer["error"]) == (400, "mmap slice assignment is wrong size")


def test_memory_goes_when_another_trainer_makes_its_own(mirror: Mirror) -> None:
    paths = set()
    for num_bytes in (4, 6):
        path = ask(mirror, "POST", f"/grpo_fast/memory?num_bytes={num_bytes}")[1]["path"]
        paths.add(path)
        assert len(Path(path).read_bytes()) == num_bytes
        held = [handle.readlink() for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
        assert sum("grpo_fast-weights" in str(each) for each in held) == 2, "the file and its map"
    first, second = sorted(paths, key=lambda path: Path(path).exists())
    assert ask(mirror, "PUT", f"/grpo_fast/memory?path={first}&place=0", b"a")[0] == 400
    assert not Path(first).is_symlink()
    assert ask(mirror, "PUT", f"/grpo_fast/memory?path={second}&place=0", b"a")[0] == 200


def test_adapters_of_a_trainer_that_was_killed_go_with_its_memory(mirror: Mirror) -> None:
    ask(mirror, "POST", "/grpo_fast/memory?num_bytes=4")
    directory = Path(ask(mirror, "PUT", "/grpo_fast/adapters?name=a-1&file=weights.bin", b"12")[1]["path"])
    path = ask(mirror, "POST", "/grpo_fast/memory?num_bytes=4")[1]["path"]
    assert [str(each) for each in directory.parent.iterdir()] == [path]


def test_more_memory_than_the_machine_has_is_refused_before_it_is_taken(mirror: Mirror) -> None:
    most = psutil.virtual_memory().total
    status, answer = ask(mirror, "POST", f"/grpo_fast/memory?num_bytes={2 * most}")
    assert status == 507
    assert f"{2 * most / 2**20:.1f} MiB are asked for" in answer["error"]
    assert ask(mirror, "POST", "/grpo_fast/memory?num_bytes=4")[0] == 200


def test_a_trainer_whose_memory_is_gone_is_told(mirror: Mirror) -> None:
    path = ask(mirror, "POST", "/grpo_fast/memory?num_bytes=4")[1]["path"]
    for changed in ("/proc/1/fd/0", path + "0"):
        status, answer = ask(mirror, "PUT", f"/grpo_fast/memory?path={changed}&place=0", b"a")
        assert status == 400
        assert "give each run its own server" in answer["error"]


def test_a_file_is_seen_by_what_it_begins_with(mirror: Mirror, tmp_path: Path) -> None:
    mark = bytes(range(32))
    (tmp_path / "file").write_bytes(mark + b"more")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name, sought, sees in (
        ("file", mark, True),
        ("link", mark, True),
        ("file", mark[::-1], False),
        ("none", mark, False),
        ("pipe", mark, False),
        ("", mark, False),
    ):
        assert ask(mirror, "GET", f"/grpo_fast/sees?path={tmp_path}/{name}&mark={sought.hex()}")[1] == {"sees": sees}


@pytest.mark.parametrize("mark", [b"", b"s", b"secret", bytes(33)])
def test_no_file_can_be_read_piece_by_piece(mark: bytes, mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"secret" + bytes(60))
    status, answer = ask(mirror, "GET", f"/grpo_fast/sees?path={tmp_path}/key&mark={mark.hex()}")
    assert status == 400
    assert "sees" not in answer


def test_adapters_are_files_of_a_directory_that_can_be_removed(mirror: Mirror) -> None:
    status, told = ask(mirror, "PUT", "/grpo_fast/adapters?name=a-1&file=weights.bin", b"12", b"34")
    assert status == 200
    ask(mirror, "PUT", "/grpo_fast/adapters?name=a-1&file=config.json", b"{}")
    directory = Path(told["path"])
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {"weights.bin": b"1234", "config.json": b"{}"}
    assert ask(mirror, "DELETE", "/grpo_fast/adapters?name=a-1")[0] == 200
    assert not directory.exists()
    assert ask(mirror, "DELETE", "/grpo_fast/adapters?name=a-1")[0] == 200


@pytest.mark.parametrize("name", ["..", "../a", "/etc", "a/b", ""])
def test_a_name_that_leads_elsewhere_is_refused(name: str, mirror: Mirror) -> None:
    assert ask(mirror, "PUT", f"/grpo_fast/adapters?name=a&file={name}", b"x")[0] == 400
    assert ask(mirror, "PUT", f"/grpo_fast/adapters?name={name}&file=a", b"x")[0] == 400
    assert ask(mirror, "DELETE", f"/grpo_fast/adapters?name={name}")[0] == 400


def test_a_client_that_goes_half_way_is_no_end_of_the_body_and_leaves_nothing(mirror: Mirror) -> None:
    directory = Path(ask(mirror, "PUT", "/grpo_fast/adapters?name=a&file=config.json", b"{}")[1]["path"])
    assert directory.exists()
    assert ask(mirror, "PUT", "/grpo_fast/adapters?name=a&file=b", b"half", cut=True)[0] == 507
    assert not directory.exists()


def test_memory_that_is_full_is_told_with_the_fix_and_adapters_leave_nothing_there(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(ask(mirror, "PUT", "/grpo_fast/adapters?name=a&file=config.json", b"{}")[1]["path"])
    asked: list[int] = []

    def full(handle: int, offset: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    headers = [(b"content-length", b"5000000")]
    status, answer = ask(mirror, "PUT", "/grpo_fast/adapters?name=a&file=b", b"half", headers=headers)
    assert status == 507
    told = rf"{directory.parent.parent} has no room for the adapters: 4\.8 MiB are needed, [\d.]+ are left; give more shared"
    assert re.search(told, answer["error"])
    assert asked == [5_000_000]
    assert not directory.exists()


def test_vllms_key_is_asked_for(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    for headers in ([], [(b"authorization", b"Bearer other")]):
        assert ask(mirror, "POST", "/grpo_fast/memory?num_bytes=4", headers=headers) == (401, {"error": "Unauthorized"})
    assert ask(mirror, "POST", "/grpo_fast/memory?num_bytes=4", headers=[(b"authorization", b"Bearer secret")])[0] == 200
