"""A module proxy that is far away: serves a folder in GOPROXY layout, late and slowly, and counts.

    python3 slow_upstream.py --folder GOMODCACHE/cache/download --latency 150 --rate 20000000

Every request waits --latency milliseconds, every connection carries at most --rate bytes a second.
`@v/list` and `@latest` are made from the names of the .info files, so a GOMODCACHE serves as it is.
GET /.bench/stats tells what was asked (JSON, see Stats), GET /.bench/reset forgets it.
Binds 127.0.0.1 only. Standard library, Python 3.9 or later.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

_HEAD_LIMIT = 64 * 1024
_PSEUDO = re.compile(r"\d{14}-[0-9a-f]{12}(?:\+incompatible)?$")
_VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?$")
Order = tuple[bool, bool, int, int, int, list[tuple[bool, int, str]]]


# Versions ####################################################################


def order(version: str) -> Order:
    """Sort key for @latest: releases over pre-releases over pseudo-versions, then by precedence."""
    found = _VERSION.match(version)
    if found is None:
        return (False, False, -1, 0, 0, [])
    major, minor, patch, pre = found.groups(default="")
    marks = [
        (not mark.isdigit(), int(mark) if mark.isdigit() else 0, mark) for mark in pre.split(".")
    ]
    return (not pre, not _PSEUDO.search(version), int(major), int(minor), int(patch), marks)


def known(folder: Path) -> list[str]:
    """The versions with an .info file in an `@v` folder, the one for @latest last."""
    return sorted((file.stem for file in folder.glob("*.info")), key=order)


def listing(folder: Path) -> bytes:
    """What `@v/list` says: every known version that is not a pseudo-version, one a line."""
    return "".join(f"{v}\n" for v in known(folder) if not _PSEUDO.search(v)).encode()


def latest(folder: Path) -> bytes | None:
    """What `@latest` says: the .info of the highest version; None without any version."""
    versions = known(folder)
    return (folder / f"{versions[-1]}.info").read_bytes() if versions else None


# Answers #####################################################################


class Stats:
    """What was asked since the last reset; `peak` is the most requests under way at one time."""

    def __init__(self) -> None:
        self.active = self.peak = self.bytes = 0
        self.paths: Counter[str] = Counter()

    def reset(self) -> None:
        self.peak = self.bytes = 0
        self.paths.clear()

    def begin(self, path: str) -> None:
        self.paths[path] += 1
        self.active += 1
        self.peak = max(self.peak, self.active)

    def as_json(self) -> bytes:
        fields: dict[str, Any] = {
            "active": self.active,
            "bytes": self.bytes,
            "paths": dict(self.paths),
            "peak": self.peak,
            "requests": sum(self.paths.values()),
        }
        return json.dumps(fields).encode()


class Folder:
    """Bodies by URL path; nothing outside the folder is ever opened."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def open(self, path: str) -> IO[bytes] | None:
        """The body for a path, or None when there is no such thing."""
        target = (self.root / path.lstrip("/")).resolve()
        if self.root not in target.parents:
            return None
        body = self._made(target)
        if body is not None:
            return io.BytesIO(body)
        return target.open("rb") if target.is_file() else None

    def _made(self, target: Path) -> bytes | None:
        if target.name == "list" and target.parent.is_dir():
            return listing(target.parent)
        if target.name == "@latest":
            return latest(target.parent / "@v")
        return None


# Server ######################################################################


class Upstream:
    """Answers one request at a time on each connection; `latency` in s, `rate` in bytes/s."""

    def __init__(self, folder: Folder, latency: float, rate: float) -> None:
        self.folder = folder
        self.latency = latency
        self.rate = rate
        self.step = max(4096, min(256 * 1024, int(rate / 100)))
        self.stats = Stats()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until the client leaves it."""
        try:
            while await self._answer(await reader.readuntil(b"\r\n\r\n"), writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays; ValueError if the head is not one of a request."""
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        path = unquote(target.partition("?")[0])
        if path.startswith("/.bench/"):
            await self._reply(writer, io.BytesIO(self._control(path)), True)
        else:
            await self._artifact(writer, path, method != "HEAD")
        return b"\r\nconnection: close" not in head.lower()

    def _control(self, path: str) -> bytes:
        answer = self.stats.as_json()
        if path == "/.bench/reset":
            self.stats.reset()
        return answer

    async def _artifact(self, writer: asyncio.StreamWriter, path: str, whole: bool) -> None:
        self.stats.begin(path)
        try:
            await asyncio.sleep(self.latency)
            self.stats.bytes += await self._reply(writer, self.folder.open(path), whole)
        finally:
            self.stats.active -= 1

    async def _reply(
        self, writer: asyncio.StreamWriter, body: IO[bytes] | None, whole: bool
    ) -> int:
        """Write head and body; the size of the body."""
        status = "404 Not Found" if body is None else "200 OK"
        with body or io.BytesIO(b"not found\n") as source:
            size = source.seek(0, io.SEEK_END)
            source.seek(0)
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode())
            if whole:
                await self._pour(writer, source)
        await writer.drain()
        return size

    async def _pour(self, writer: asyncio.StreamWriter, source: IO[bytes]) -> None:
        """Send no faster than `rate`: after each step, wait until it would have arrived."""
        started, sent = asyncio.get_running_loop().time(), 0
        while chunk := source.read(self.step):
            writer.write(chunk)
            await writer.drain()
            sent += len(chunk)
            early = started + sent / self.rate - asyncio.get_running_loop().time()
            if early > 0.001:
                await asyncio.sleep(early)


async def listen(upstream: Upstream, port: int) -> None:
    """Serve until the process is ended; the first line on stdout tells the address."""
    server = await asyncio.start_server(
        upstream.serve, "127.0.0.1", port, limit=_HEAD_LIMIT, backlog=1024
    )
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="a slow module proxy over a folder, for bench/")
    parser.add_argument("--folder", required=True, type=Path, help="folder in GOPROXY layout")
    parser.add_argument("--port", default=0, type=int, help="0 picks a free one (default)")
    parser.add_argument("--latency", default=50.0, type=float, help="milliseconds per request")
    parser.add_argument("--rate", default=20e6, type=float, help="bytes a second per connection")
    return parser


def main() -> None:
    options = _parser().parse_args()
    upstream = Upstream(Folder(options.folder), options.latency / 1000, options.rate)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(listen(upstream, options.port))


if __name__ == "__main__":
    main()
