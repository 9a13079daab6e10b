"""An SSH server on the loopback interface that takes one key, runs commands and connects to any port; run as a program.

Arguments: a directory with the server's key ``host`` and the public key ``allowed``. Its port is printed. It ends when killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncssh


class Allowing(asyncssh.SSHServer):
    """Connects clients to every port that they ask for but 1."""

    def connection_requested(self, host: str, port: int, *_: object) -> bool:
        if port == 1:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")
        return bool(host)


async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """Runs a command, as a login shell would."""
    pipe = asyncio.subprocess.PIPE
    command = await asyncio.create_subprocess_shell(process.command or "cat", stdin=pipe, stdout=pipe, stderr=pipe)
    await process.redirect(stdin=command.stdin, stdout=command.stdout, stderr=command.stderr)
    process.exit(await command.wait())


async def serve(directory: Path) -> None:
    """Serves until it is killed."""
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=Allowing,
        server_host_keys=[str(directory / "host")],
        authorized_client_keys=str(directory / "allowed"),
        process_factory=run,
        encoding=None,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
