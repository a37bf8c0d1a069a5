#!/usr/bin/env python3
"""Measures goproxy.py beside nginx, the go command's file:// and direct, and any other proxy.

    python3 bench/run.py                       all sections, writes bench/RESULTS.md
    python3 bench/run.py --only warm athens=http://127.0.0.1:3000

Rooms: 1 Figures  2 Processes  3 Modules  4 Contestants  5 Load  6 Sections  7 Report
Everything runs on this machine and binds loopback; the one exception is the fill of --modcache,
an ordinary `go mod download` before anything is measured. See bench/README.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import functools
import hashlib
import http.client
import io
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Protocol, TypeVar

import slow_upstream

HERE = Path(__file__).resolve().parent
PROXY = HERE.parent / "goproxy.py"
UPSTREAM = HERE / "slow_upstream.py"


class Failure(Exception):
    """A measurement that cannot be made or would mean nothing; str() is for the person."""


# 1 Figures ###################################################################


class Table(NamedTuple):
    """Rows of text under a header; notes follow it, one a line."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str] = []  # noqa: RUF012 (never changed)


def progress(text: str) -> None:
    """A line for the person who waits; the tables alone go to standard output."""
    print(text, file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Three significant figures or all before the point, thousands apart: 71,234, 12.3, 0.97."""
    if math.isnan(value):
        return "n/a"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def middle(values: Sequence[float]) -> str:
    return number(statistics.median(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """Median of the ratios within each round, and their range."""
    each = [a / b if b else float("nan") for a, b in zip(over, under)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def rotated(items: Sequence[Any], turn: int) -> list[Any]:
    """The same items, each round another one first, so that none always follows another."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def render(table: Table) -> str:
    """Markdown that also reads as plain text: columns padded, figures to the right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [_padded(line, widths) for line in (table.header, rule, *table.rows)]
    return "\n".join([*padded, *([""] if table.notes else []), *(f"- {n}" for n in table.notes)])


def _padded(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
    return f"| {' | '.join(cells)} |"


# 2 Processes #################################################################


S = TypeVar("S", bound="Server")


class Server:
    """A running server: its base URL, and the process to end (None: somebody else's)."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.url = url
        self.process = process

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            end(self.process)

    def memory(self, file: str, field: str) -> float:
        """MiB over the process and all its descendants, from /proc/PID/`file`; nan if not ours."""
        if not self.process:
            return float("nan")
        pids = family(self.process.pid)
        return sum(_kib(Path(f"/proc/{pid}/{file}"), field) for pid in pids) / 1024


def launch(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that its children end with it; all output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, wait, and then end whatever is left of the session we started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def await_line(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """First group of the pattern in a log, once it is there; Failure after 30 s or an exit."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if found := re.search(pattern, text):
            return found.group(1)
        if process.poll() is not None:
            break
        time.sleep(0.001)
    end(process)
    raise Failure(f"{process.args!r} did not start:\n{log.read_text(errors='replace')[-2000:]}")


def await_port(process: subprocess.Popen[bytes], log: Path, port: int) -> None:
    """Return when somebody listens; Failure after 30 s or an exit."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.01)
    end(process)
    raise Failure(f"{process.args!r} did not start:\n{log.read_text(errors='replace')[-2000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def _parent(entry: Path) -> int:
    with contextlib.suppress(OSError):
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _kib(file: Path, field: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.M)
        return int(found.group(1)) if found else 0
    return 0


class Watch:
    """The most memory a server held while the block ran, MiB of Pss, looked at every 50 ms."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.peak = server.memory("smaps_rollup", "Pss")
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.05):
            self.peak = max(self.peak, self.server.memory("smaps_rollup", "Pss"))


def raise_file_limit() -> int:
    """As many open files as this user may have, for us and all we start; the number."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# 3 Modules ###################################################################


class Project(NamedTuple):
    """A program: its module, version, and the folder of its main package."""

    module: str
    version: str
    package: str


# 406 files in its graph (168 .mod, 119 .info, 119 .zip), 118 MB of zips: bench/README.md.
REAL = Project("github.com/bufbuild/buf", "v1.28.1", "cmd/buf")
MADE = Project("example.com/q00", "v1.0.0", "cmd/app")
_WHEN = "2024-01-01T12:00:00Z"


def module_zip(module: str, version: str, files: Mapping[str, bytes]) -> bytes:
    """A zip as the go command wants it, nothing compressed, the same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in files.items():
            archive.writestr(zipfile.ZipInfo(f"{module}@{version}/{name}"), body)
    return buffer.getvalue()


def h1(files: Mapping[str, bytes]) -> str:
    """The checksum of go.sum over file names and bodies (golang.org/x/mod/sumdb/dirhash)."""
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return "h1:" + base64.b64encode(hashlib.sha256("".join(lines).encode()).digest()).decode()


def put_module(store: Path, module: str, version: str, files: Mapping[str, bytes]) -> Path:
    """Write one version into a folder in GOPROXY layout; the path without its suffix."""
    folder = store / module / "@v"
    folder.mkdir(parents=True, exist_ok=True)
    stem = str(folder / version)
    Path(f"{stem}.mod").write_bytes(files["go.mod"])
    Path(f"{stem}.zip").write_bytes(module_zip(module, version, files))
    inside = {f"{module}@{version}/{name}": body for name, body in files.items()}
    Path(f"{stem}.ziphash").write_text(h1(inside))
    Path(f"{stem}.info").write_text(f'{{"Version":"{version}","Time":"{_WHEN}"}}')
    return Path(stem)


def put_blob(store: Path, module: str, version: str, size: int, mod_size: int = 0) -> str:
    """Write a version with `size` bytes of noise, the same in each run; its URL path, no suffix."""
    mod = f"module {module}\n\ngo 1.21\n".encode()
    padding = b"// a requirement would stand here, and a hash in go.sum\n" * (mod_size // 56)
    noise = random.Random(f"{module}@{version}").randbytes(size)
    put_module(store, module, version, {"go.mod": mod + padding, "blob": noise})
    return f"/{module}/@v/{version}"


def made_project(store: Path) -> Project:
    """A program with eleven requirements, each requiring the next; for a run without network."""
    names = [f"example.com/q{index:02}" for index in range(12)]
    sums = "".join(_put_made(store, names[index:]) for index in range(11, 0, -1))
    code = f'package main\n\nimport "{names[1]}"\n\nfunc main() {{ println(q01.Depth()) }}\n'
    mod = _made_mod(names)
    files = {"go.mod": mod, "go.sum": sums.encode(), "cmd/app/main.go": code.encode()}
    put_module(store, MADE.module, MADE.version, files)
    return MADE


def _made_mod(names: Sequence[str]) -> bytes:
    wanted = "".join(f"\t{name} v1.0.0\n" for name in names[1:])
    return f"module {names[0]}\n\ngo 1.21\n\nrequire (\n{wanted})\n".encode()


def _put_made(store: Path, names: Sequence[str]) -> str:
    """Write the first of these modules, which calls the second; its two lines of go.sum."""
    own = names[0].rpartition("/")[2]
    deeper = names[1].rpartition("/")[2] + ".Depth() + 1" if names[1:] else "1"
    imports = f'import "{names[1]}"\n\n' if names[1:] else ""
    code = f"package {own}\n\n{imports}func Depth() int {{ return {deeper} }}\n"
    mod = _made_mod(names)
    stem = put_module(store, names[0], "v1.0.0", {"go.mod": mod, f"{own}.go": code.encode()})
    total = Path(f"{stem}.ziphash").read_text()
    return f"{names[0]} v1.0.0 {total}\n{names[0]} v1.0.0/go.mod {h1({'go.mod': mod})}\n"


def real_project(store: Path, modcache: Path) -> Project:
    """REAL and its graph, from --modcache, filled the first time through the normal GOPROXY."""
    done = modcache / f".filled-{REAL.module.replace('/', '-')}-{REAL.version}"
    if not done.exists():
        _fill(modcache)
        done.touch()
    shutil.copytree(
        modcache / "cache" / "download", store, copy_function=_link_artifact, dirs_exist_ok=True
    )
    return REAL


def _fill(modcache: Path) -> None:
    env = {**os.environ, "GOMODCACHE": str(modcache), "GOFLAGS": "-modcacherw"}
    env["GOTOOLCHAIN"] = "local"
    progress(f"filling {modcache} with {REAL.module}@{REAL.version} and its graph, once")
    with tempfile.TemporaryDirectory() as work:
        whole = f"{REAL.module}@{REAL.version}"
        subprocess.run(["go", "mod", "download", whole], cwd=work, env=env, check=True)
        unpack(modcache / "cache" / "download", REAL, Path(work) / "main")
        command = ["go", "mod", "download", "all"]
        subprocess.run(command, cwd=Path(work) / "main", env=env, check=True)


def put_lists(store: Path) -> None:
    """Write the `list` and `@latest` files that file:// cannot make."""
    for folder in store.glob("**/@v"):
        (folder / "list").write_bytes(slow_upstream.listing(folder))
        (folder.parent / "@latest").write_bytes(slow_upstream.latest(folder) or b"")


def _link_artifact(source: str, target: str) -> None:
    """Hard link or copy; the go command's own lists, hashes and locks stay behind."""
    if not source.endswith((".info", ".mod", ".zip")):
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def unpack(store: Path, project: Project, target: Path) -> None:
    """The program's source as a work folder, from its zip."""
    prefix = f"{project.module}@{project.version}/"
    with zipfile.ZipFile(store / project.module / "@v" / f"{project.version}.zip") as archive:
        for name in archive.namelist():
            file = target / name[len(prefix) :]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(name))


def small_files(store: Path, count: int) -> None:
    """`count` small files: .info and .mod of versions, 500 versions to a module."""
    for index in range(count // 2):
        folder = store / _small_module(index) / "@v"
        if index % 500 == 0:
            folder.mkdir(parents=True)
        version = f"v1.0.{index % 500}"
        _put_small(f"{folder}/{version}.mod", f"module {_small_module(index)}\n")
        _put_small(f"{folder}/{version}.info", f'{{"Version":"{version}","Time":"{_WHEN}"}}')


def _small_module(index: int) -> str:
    return f"example.com/m{index // 500:04}"


def _put_small(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(handle, text.encode())
    os.close(handle)


# 4 Contestants ###############################################################


class Place(NamedTuple):
    """Where a contestant works: a fresh folder of its own, its store, and its upstream."""

    spot: Path
    cache: Path
    upstream: str


class Contestant(Protocol):
    """Somebody to measure. Only one who is `cold` can be started again with an empty store."""

    name: str
    cold: bool

    def start(self, place: Place) -> Server:
        """Listen on loopback, answering from place.cache where the contestant can."""


class Us(Contestant):
    """goproxy.py with default settings, on loopback and without a checksum database."""

    cold = True

    def __init__(self, name: str = "us", flags: Sequence[str] = ("-quiet",)) -> None:
        self.name = name
        self.flags = flags

    def start(self, place: Place) -> Server:
        cache, log = str(place.cache), place.spot / "log"
        command = [sys.executable, str(PROXY), "-port", "0", "-cache", cache]
        env = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
        env |= {"GOPROXY_HOST": "127.0.0.1", "GOPROXY_SUMDB": "off", "GOPROXY_VERIFY": "false"}
        process = launch([*command, "-upstream", place.upstream, *self.flags], log, env)
        return Server(f"http://127.0.0.1:{await_line(process, log, '  Port: ([0-9]+)')}", process)


class Nginx(Contestant):
    """nginx over the same folder: two workers, sendfile, no limit to requests per connection."""

    cold = False
    name = "nginx"

    def start(self, place: Place) -> Server:
        port, config = free_port(), place.spot / "nginx.conf"
        place.spot.mkdir(parents=True, exist_ok=True)
        config.write_text(_NGINX.format(spot=place.spot, cache=place.cache, port=port, user=_USER))
        log = place.spot / "log"
        process = launch([program("nginx"), "-p", str(place.spot), "-c", str(config)], log)
        await_port(process, log, port)
        return Server(f"http://127.0.0.1:{port}", process)


_USER = "user root root;" if os.geteuid() == 0 else ""
_NGINX = """
daemon off; worker_processes 2; worker_rlimit_nofile 20000; {user}
pid {spot}/pid; error_log {spot}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_timeout 75; keepalive_requests 1000000000;
  client_body_temp_path {spot}/body; proxy_temp_path {spot}/proxy; fastcgi_temp_path {spot}/fcgi;
  uwsgi_temp_path {spot}/uwsgi; scgi_temp_path {spot}/scgi;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {cache}; }}
}}
"""


class Address(Contestant):
    """A proxy that is already running, with its own store; it cannot be made cold."""

    cold = False

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url.rstrip("/")

    def start(self, place: Place) -> Server:
        return Server(self.url)


class Command(Contestant):
    """A proxy we start by a command line with {port}, {cache} and {upstream} in it."""

    cold = True

    def __init__(self, name: str, template: str) -> None:
        self.name = name
        self.template = template

    def start(self, place: Place) -> Server:
        port, log = free_port(), place.spot / "log"
        place.cache.mkdir(parents=True, exist_ok=True)
        line = self.template.format(port=port, cache=place.cache, upstream=place.upstream)
        process = launch(shlex.split(line), log)
        await_port(process, log, port)
        return Server(f"http://127.0.0.1:{port}", process)


def peer(text: str) -> Contestant:
    """NAME=URL or NAME=COMMAND of the command line; ArgumentTypeError if it is neither."""
    name, _, where = text.partition("=")
    if not name or not where:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL or NAME=COMMAND")
    if not where.startswith(("http://", "https://")):
        return Command(name, where)
    if urllib.parse.urlsplit(where).hostname not in ("127.0.0.1", "::1", "localhost"):
        raise argparse.ArgumentTypeError(f"{where} is not on this machine; only loopback is loaded")
    return Address(name, where)


class Slow(Server):
    """bench/slow_upstream.py over a folder; latency in ms, rate in bytes/s per connection."""

    def __init__(self, bench: Bench, folder: Path, latency: float, rate: float) -> None:
        log = bench.spot() / "log"
        command = [sys.executable, str(UPSTREAM), "--folder", str(folder)]
        command += ["--port", str(bench.upstream_port), "--latency", str(latency)]
        process = launch([*command, "--rate", str(rate)], log)
        super().__init__(await_line(process, log, "listening on (.*)"), process)

    def stats(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(get(f"{self.url}/.bench/stats"))
        return told

    def settled(self) -> dict[str, Any]:
        """The stats once nothing was asked for half a second; then they are forgotten."""
        before, deadline = self.stats(), time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.5)
            after = self.stats()
            if after == before and not after["active"]:
                break
            before = after
        get(f"{self.url}/.bench/reset")
        return before


# 5 Load ######################################################################


class Rate(NamedTuple):
    """What wrk saw: requests a second, 99th percentile in ms, and requests gone wrong."""

    per_second: float
    p99: float
    errors: int


_UNITS = {"ms": 1.0, "s": 1000.0, "us": 0.001}


def program(name: str) -> str:
    """Where a tool is; nginx is often not on a user's PATH. Empty if nowhere."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin") or ""


def wrk(url: str, connections: int, seconds: int, script: Path | None = None) -> Rate:
    """Load one URL (or what the Lua script asks); Failure if any answer was not a 200."""
    threads = str(min(2, connections))
    command = [program("wrk"), "--latency", f"-t{threads}", f"-c{connections}", f"-d{seconds}s"]
    command += ["-s", str(script)] if script else []
    told = subprocess.run([*command, url], capture_output=True, text=True, timeout=seconds + 60)
    if "Non-2xx" in told.stdout or told.returncode:
        raise Failure(f"{url}: wrk says {told.stdout}{told.stderr}")
    return _rate(told.stdout)


def _rate(text: str) -> Rate:
    speed = re.search(r"Requests/sec:\s+([0-9.]+)", text)
    tail = re.search(r"99%\s+([0-9.]+)(us|ms|s)\b", text)
    if not speed or not tail:
        raise Failure(f"wrk printed no figures: {text}")
    errors = re.search(r"Socket errors: (.*)", text)
    count = sum(int(n) for n in re.findall(r"\d+", errors.group(1))) if errors else 0
    return Rate(float(speed.group(1)), float(tail.group(1)) * _UNITS[tail.group(2)], count)


class Fetched(NamedTuple):
    """One download: when asked, when the first byte of the body came (s, monotonic), its hash."""

    asked: float
    first: float
    digest: str


def get(url: str) -> bytes:
    """A body; Failure unless the status is 200."""
    with contextlib.closing(_ask(url)) as response:
        return response.read()


def _ask(url: str) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    connection.request("GET", parts.path, headers={"Connection": "close"})
    response = connection.getresponse()
    if response.status != 200:
        raise Failure(f"{url}: {response.status} {response.read(200)!r}")
    return response


def fetch(url: str) -> Fetched:
    asked, digest = time.monotonic(), hashlib.sha256()
    with contextlib.closing(_ask(url)) as response:
        digest.update(response.read(1))
        first = time.monotonic()
        while chunk := response.read(256 * 1024):
            digest.update(chunk)
    return Fetched(asked, first, digest.hexdigest())


def fetch_at(delays: Sequence[float], url: str) -> list[Fetched]:
    """One download per delay (s after a common start), each in a thread, in their order."""
    with ThreadPoolExecutor(len(delays)) as pool:
        gate = threading.Barrier(len(delays))
        return list(pool.map(lambda delay: _fetch_after(gate, delay, url), delays))


def _fetch_after(gate: threading.Barrier, delay: float, url: str) -> Fetched:
    gate.wait(30)
    time.sleep(delay)
    return fetch(url)


class Go(NamedTuple):
    """A go command in a work folder: what to do there first, and what to measure."""

    name: str
    command: list[str]
    whole: bool  # in the program's own source; else in an empty module


def go_tasks(project: Project) -> list[Go]:
    build = ["go", "build", "-trimpath", "-o", os.devnull, f"./{project.package}"]
    wanted = f"{project.module}/{project.package}@latest"
    return [
        Go("go mod download all", ["go", "mod", "download", "all"], True),
        Go("go build", build, True),
        Go("go get @latest", ["go", "get", wanted], False),
    ]


class Workshop:
    """Runs go commands of one project, each in a fresh work folder and a fresh GOMODCACHE."""

    def __init__(self, bench: Bench, project: Project, store: Path) -> None:
        self.bench = bench
        self.project = project
        self.store = store
        self.source = bench.spot()
        unpack(store, project, self.source)

    def seconds(self, task: Go, goproxy: str) -> float:
        """How long the command took with this GOPROXY; Failure if it failed."""
        with tempfile.TemporaryDirectory(dir=self.bench.memory, prefix="goproxy-bench-") as spot:
            self._prepare(task, Path(spot) / "work")
            return self._timed(task, Path(spot), goproxy)

    def _prepare(self, task: Go, work: Path) -> None:
        if task.whole:
            shutil.copytree(self.source, work)
        else:
            work.mkdir()
            (work / "go.mod").write_text("module example.com/bench\n\ngo 1.21\n")

    def _timed(self, task: Go, spot: Path, goproxy: str) -> float:
        env = self._env(spot, goproxy)
        started = time.perf_counter()
        told = subprocess.run(
            task.command, cwd=spot / "work", env=env, capture_output=True, text=True, timeout=600
        )
        took = time.perf_counter() - started
        if told.returncode:
            raise Failure(f"{' '.join(task.command)} with GOPROXY={goproxy}: {told.stderr[-2000:]}")
        return took

    def _env(self, spot: Path, goproxy: str) -> dict[str, str]:
        """Only what we mean: no checksum database, no toolchain switch, a build cache kept."""
        kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
        return kept | {
            "CGO_ENABLED": "0",
            "GOCACHE": str(self.bench.modcache / ".build"),
            "GOENV": "off",
            "GOFLAGS": "-modcacherw -buildvcs=false",
            "GOMODCACHE": str(spot / "mod"),
            "GOPATH": str(spot / "path"),
            "GOPROXY": goproxy,
            "GOSUMDB": "off",
            "GOTOOLCHAIN": "local",
        }


# 6 Sections ##################################################################


class Bench(NamedTuple):
    """What was asked for on the command line, and the scratch folder of this run."""

    rounds: int
    quick: bool
    peers: list[Contestant]
    upstream_port: int
    scratch: Path
    modcache: Path
    files: int
    memory: Path  # a file system for a million files and for what the go command unpacks

    def spot(self) -> Path:
        """A new empty folder, gone with the run."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def place(self, cache: Path, upstream: str = "http://127.0.0.1:9") -> Place:
        """A place over a store; the upstream nobody listens at stands for one never needed."""
        return Place(self.spot(), cache, upstream)

    def project(self) -> tuple[Project, Path]:
        """The program to download, and a folder that serves its whole graph as file://."""
        store = self.spot()
        project = made_project(store) if self.quick else real_project(store, self.modcache)
        put_lists(store)
        return project, store


def warm(bench: Bench) -> list[Table]:
    """Requests a second on stored files, beside nginx over the same folder."""
    store = bench.spot()
    targets = _warm_files(store)
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(Slow(bench, store, 0, 1e9))
        entrants: list[Contestant] = [Us(), Us("us, logging", ()), Nginx(), *bench.peers]
        running = {
            e.name: stack.enter_context(e.start(_warm_place(bench, e, store, slow)))
            for e in entrants
        }
        _same_bodies(running, store, targets)
        cells = [(name, path, c) for name, path in targets for c in _connections(bench)]
        rows = [_warm_row(bench, running, cell) for cell in cells]
    names = [f"{name}, 1/s" for name in running]
    goals = ["us/nginx", "goal", "us, logging/nginx", "goal"]
    return [
        Table(
            ["file", "connections", *names, *goals],
            [row for row, _ in rows],
            sorted({note for _, notes in rows for note in notes}),
        )
    ]


def _connections(bench: Bench) -> Sequence[int]:
    return (8,) if bench.quick else (1, 8, 32)


def _warm_files(store: Path) -> list[tuple[str, str]]:
    small = put_blob(store, "example.com/warm", "v1.0.0", 300 * 1000, 3000)
    big = put_blob(store, "example.com/warm", "v1.1.0", 5 * 1000 * 1000)
    return [
        ("60 B .info", f"{small}.info"),
        ("3 KB .mod", f"{small}.mod"),
        ("300 KB .zip", f"{small}.zip"),
        ("5 MB .zip", f"{big}.zip"),
    ]


def _warm_place(bench: Bench, entrant: Contestant, store: Path, slow: Slow) -> Place:
    """We and nginx share the store; a peer fills its own from the upstream beside it."""
    return bench.place(bench.spot() if entrant in bench.peers else store, slow.url)


def _same_bodies(
    running: Mapping[str, Server], store: Path, targets: Sequence[tuple[str, str]]
) -> None:
    """Ask everybody for everything once: warms them, and shows that the answers are equal."""
    for _, path in targets:
        want = (store / path[1:]).read_bytes()
        for name, server in running.items():
            if get(server.url + path) != want:
                raise Failure(f"{name} answers {path} with other bytes than are stored")


def _warm_row(
    bench: Bench, running: Mapping[str, Server], cell: tuple[str, str, int]
) -> tuple[list[str], list[str]]:
    label, path, connections = cell
    speeds: dict[str, list[float]] = {name: [] for name in running}
    notes = set()
    progress(f"{label}, {connections} connections")
    for turn in range(bench.rounds):
        for name in rotated(list(running), turn):
            rate = wrk(running[name].url + path, connections, 1 if bench.quick else 2)
            speeds[name].append(rate.per_second)
            if rate.errors:
                notes.add(f"{name}, {label}, {connections} connections: wrk saw socket errors")
    return _warm_cells(label, connections, speeds), sorted(notes)


def _warm_cells(label: str, connections: int, speeds: Mapping[str, list[float]]) -> list[str]:
    goal = "≥ 0.90" if label.endswith(".zip") else "≥ 1.00"
    return [
        label,
        str(connections),
        *(middle(values) for values in speeds.values()),
        ratio(speeds["us"], speeds["nginx"]),
        goal,
        ratio(speeds["us, logging"], speeds["nginx"]),
        "≥ 0.80",
    ]


class Crowd(NamedTuple):
    """One round of `cold`: counts, memory in MiB (nan: not our process), delays in ms."""

    zips: float
    requests: float
    equal: float
    high: float
    pss: float
    seconds: float
    beside: float
    late: float


def cold(bench: Bench) -> list[Table]:
    """Many clients at once on one zip that nobody has yet."""
    entrants: list[Contestant] = [Us(), *bench.peers]
    rounds: dict[str, list[Crowd]] = {entrant.name: [] for entrant in entrants}
    folder, version = bench.spot(), int(time.time())  # no peer can have it from another run
    with Slow(bench, folder, 20, 20e6) as slow:
        for turn in range(bench.rounds):
            for entrant in rotated(entrants, turn):
                version += 1
                rounds[entrant.name].append(_crowd(bench, entrant, slow, folder, version))
    clients, size = _crowd_size(bench)
    title = f"{clients} clients at once, a zip of {size / 1e6:.0f} MB at 20 MB/s"
    lines = [_crowd_line(field, rounds) for field in Crowd._fields]
    return [Table([title, *rounds, "goal"], lines)]


def _crowd_size(bench: Bench) -> tuple[int, int]:
    return (16, 4 * 1000 * 1000) if bench.quick else (64, 20 * 1000 * 1000)


_CROWD_LINES = {
    "beside": ("first byte of a joiner behind the leader's, ms, the worst of 4", "≤ 50"),
    "equal": ("bodies equal to the upstream's", "all"),
    "high": ("peak memory, MiB: sum of VmHWM of all its processes", "≤ 96"),
    "late": ("first byte after joining 300 ms late, ms, the worst of 4", "≤ 50"),
    "pss": ("peak memory, MiB: sum of Pss (shared pages counted once)", ""),
    "requests": ("upstream requests, all kinds", ""),
    "seconds": ("until the last client has all, s", ""),
    "zips": ("upstream requests for the zip", "1"),
}


def _crowd_line(field: str, rounds: Mapping[str, list[Crowd]]) -> list[str]:
    label, goal = _CROWD_LINES[field]
    return [label, *(_range([getattr(r, field) for r in each]) for each in rounds.values()), goal]


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return middle(values) + (f" ({low}-{high})" if low != high else "")


def _crowd(bench: Bench, entrant: Contestant, slow: Slow, folder: Path, version: int) -> Crowd:
    progress(f"a cold zip: {entrant.name}")
    clients, size = _crowd_size(bench)
    path = put_blob(folder, "example.com/cold", f"v1.{version}.0", size) + ".zip"
    want = hashlib.sha256((folder / path[1:]).read_bytes()).hexdigest()
    with entrant.start(bench.place(bench.spot(), slow.url)) as server:
        started = time.monotonic()
        with Watch(server) as watch:
            bodies = fetch_at([0.0] * clients, server.url + path)
        took, high = time.monotonic() - started, server.memory("status", "VmHWM")
        told = slow.settled()
        beside, late = _joiners(server, folder, version, size)
        slow.settled()
    zips, equal = told["paths"].get(path, 0), sum(body.digest == want for body in bodies)
    return Crowd(zips, told["requests"], equal, high, watch.peak, took, beside, late)


def _joiners(server: Server, folder: Path, version: int, size: int) -> tuple[float, float]:
    """ms: how far joiners of the first instant are behind the leader; what late ones wait."""
    path = put_blob(folder, "example.com/cold", f"v1.{version}.1", size) + ".zip"
    leader, *joined = fetch_at([0.0, *[0.005] * 4, *[0.3] * 4], server.url + path)
    beside = max(one.first for one in joined[:4]) - leader.first
    late = max(one.first - one.asked for one in joined[4:])
    return beside * 1000, late * 1000


def readahead(bench: Bench) -> list[Table]:
    """What a cold proxy costs the go command against asking the far upstream itself."""
    project, store = bench.project()
    shop = Workshop(bench, project, store)
    tasks = go_tasks(project)
    shop.seconds(tasks[1], store.as_uri())  # compiles into the build cache, which is kept
    rounds = {
        (task.name, latency): _far_rounds(shop, task, latency)
        for latency in _latencies(bench)
        for task in tasks
    }
    notes = _graph_notes(project, store)
    return [_seconds_table(rounds)._replace(notes=notes), _requests_table(rounds)]


def _latencies(bench: Bench) -> Sequence[int]:
    return (20,) if bench.quick else (50, 150)


def _cold_entrants(bench: Bench) -> list[Contestant]:
    return [Us(), *(one for one in bench.peers if one.cold)]


def _graph_notes(project: Project, store: Path) -> list[str]:
    kinds = [(kind, len(list(store.glob(f"**/*.{kind}")))) for kind in ("mod", "info", "zip")]
    total = sum(file.stat().st_size for file in store.glob("**/*.zip")) / 1e6
    counts = ", ".join(f"{count} .{kind}" for kind, count in kinds)
    return [f"{project.module}@{project.version}: {counts}, {total:.0f} MB of zips"]


class Far(NamedTuple):
    """One go command with one GOPROXY: s, upstream requests, and how many of them at one time."""

    seconds: float
    requests: float
    peak: float


FarRounds = dict[str, list[Far]]


def _far_rounds(shop: Workshop, task: Go, latency: int) -> FarRounds:
    """All rounds of one command at one distance, by who was asked."""
    entrants = _cold_entrants(shop.bench)
    with Slow(shop.bench, shop.store, latency, 20e6) as slow:
        ways: dict[str, Callable[[], Far]] = {
            "direct": functools.partial(_far, shop, task, slow, slow.url),
            **{e.name: functools.partial(_far_cold, shop, task, slow, e) for e in entrants},
            "file://": functools.partial(_far, shop, task, slow, shop.store.as_uri()),
        }
        rounds: FarRounds = {name: [] for name in ways}
        for turn in range(shop.bench.rounds):
            progress(f"{task.name}, {latency} ms, round {turn + 1}")
            for name in rotated(list(ways), turn):
                rounds[name].append(ways[name]())
    return rounds


def _far_cold(shop: Workshop, task: Go, slow: Slow, entrant: Contestant) -> Far:
    spot = shop.bench.spot()
    with entrant.start(Place(spot, spot / "cache", slow.url)) as server:
        far = _far(shop, task, slow, server.url)
    shutil.rmtree(spot)
    return far


def _far(shop: Workshop, task: Go, slow: Slow, goproxy: str) -> Far:
    took = shop.seconds(task, goproxy)
    told = slow.settled()
    return Far(took, told["requests"], told["peak"])


def _seconds_table(rounds: Mapping[tuple[str, int], FarRounds]) -> Table:
    names = list(next(iter(rounds.values())))
    over = [name for name in names if name not in ("direct", "file://")]
    header = ["s", "ms away", *names, *(f"{name}/direct" for name in over), "goal"]
    rows = []
    for (task, latency), each in rounds.items():
        took = {name: [far.seconds for far in each[name]] for name in names}
        cells = [task, str(latency), *(middle(took[name]) for name in names)]
        goal = "≤ 0.75" if latency < 100 else "≤ 0.40"
        rows.append([*cells, *(ratio(took[name], took["direct"]) for name in over), goal])
    return Table(header, rows)


def _requests_table(rounds: Mapping[tuple[str, int], FarRounds]) -> Table:
    names = [name for name in next(iter(rounds.values())) if name != "file://"]
    over = [name for name in names if name != "direct"]
    header = ["upstream requests", "ms away", *names, *(f"{n}/direct" for n in over), "goal"]
    rows = []
    for (task, latency), each in rounds.items():
        asked = {name: [far.requests for far in each[name]] for name in names}
        cells = [task, str(latency), *(middle(asked[name]) for name in names)]
        rows.append([*cells, *(ratio(asked[name], asked["direct"]) for name in over), "≤ 1.50"])
    return _with_peaks(Table(header, rows), rounds, names)


def _with_peaks(
    table: Table, rounds: Mapping[tuple[str, int], FarRounds], names: Sequence[str]
) -> Table:
    """The same table and how many requests each had under way at one time."""
    peaks = [[middle([far.peak for far in each[n]]) for n in names] for each in rounds.values()]
    header = [*table.header, *(f"{name}, at once" for name in names)]
    return Table(header, [row + more for row, more in zip(table.rows, peaks)])


def filewarm(bench: Bench) -> list[Table]:
    """`go mod download all` from a filled store, beside file:// over the same modules."""
    project, store = bench.project()
    shop = Workshop(bench, project, store)
    task = go_tasks(project)[0]
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(Slow(bench, store, 0, 1e9))
        ways = {"file://": store.as_uri()}
        for entrant in (Us(), Nginx(), *bench.peers):
            place = bench.place(bench.spot(), slow.url)
            if isinstance(entrant, Nginx):
                place = place._replace(cache=store)  # it cannot fill one
            ways[entrant.name] = stack.enter_context(entrant.start(place)).url
        took = _in_turns(bench, shop, task, ways)
    goals = {"file://": "", "us": "≤ 1.03"}
    rows = [
        [name, middle(each), ratio(each, took["file://"]), goals.get(name, "")]
        for name, each in took.items()
    ]
    return [Table([task.name, "s", "over file://", "goal"], rows, _graph_notes(project, store))]


def _in_turns(
    bench: Bench, shop: Workshop, task: Go, ways: Mapping[str, str]
) -> dict[str, list[float]]:
    for url in ways.values():
        shop.seconds(task, url)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(bench.rounds):
        progress(f"{task.name}, warm, round {turn + 1}")
        for name in rotated(list(ways), turn):
            took[name].append(shop.seconds(task, ways[name]))
    return took


def growth(bench: Bench) -> list[Table]:
    """Whether a big store or many idle connections are felt."""
    count = 2000 if bench.quick else bench.files
    with tempfile.TemporaryDirectory(dir=bench.memory, prefix="goproxy-bench-") as many:
        small, large = Path(many) / "small", Path(many) / "large"
        asked = min(10_000, count // 10)
        progress(f"making {count:,} files in {many}")
        small_files(small, asked * 2)
        small_files(large, count)
        tables = [_store_table(bench, {"small": small, "large": large}, asked, count)]
    return [*tables, _idle_table(bench)]


def _store_table(bench: Bench, stores: Mapping[str, Path], asked: int, count: int) -> Table:
    starts: dict[str, list[float]] = {name: [] for name in stores}
    hot: dict[str, list[float]] = {name: [] for name in stores}
    spread: dict[str, list[float]] = {name: [] for name in stores}
    script = _spread_script(bench, asked)
    for turn in range(bench.rounds):
        progress(f"small and large store, round {turn + 1}")
        for name in rotated(list(stores), turn):
            begun = time.perf_counter()
            with Us().start(bench.place(stores[name])) as server:
                url = f"{server.url}/{_small_module(0)}/@v/v1.0.0.info"
                get(url)
                starts[name].append((time.perf_counter() - begun) * 1000)
                hot[name].append(wrk(url, 8, 1 if bench.quick else 2).per_second)
                rate = wrk(url, 8, 1 if bench.quick else 3, script)
                spread[name].append(rate.per_second)
    return Table(
        ["us", f"{asked * 2:,} files", f"{count:,} files", "large/small", "goal"],
        [
            _store_row("start to first answer, ms", starts, "≤ 300 ms"),
            _store_row("one hot .info, 8 connections, 1/s", hot, "1.00"),
            _store_row(f"the same {asked:,} .info in turn, 8 connections, 1/s", spread, "1.00"),
        ],
    )


def _store_row(label: str, values: Mapping[str, list[float]], goal: str) -> list[str]:
    small, large = values["small"], values["large"]
    return [label, middle(small), middle(large), ratio(large, small), goal]


def _spread_script(bench: Bench, asked: int) -> Path:
    """A wrk script that asks for the first `asked` .info files, far apart one after the other."""
    script = bench.spot() / "spread.lua"
    script.write_text(
        f"local n, total = 0, {asked}\n"
        "request = function()\n"
        "  n = (n + 7919) % total\n"
        '  local path = "/example.com/m%04d/@v/v1.0.%d.info"\n'
        '  return wrk.format("GET", string.format(path, math.floor(n / 500), n % 500))\n'
        "end\n"
    )
    return script


class Idle(NamedTuple):
    """One round with idle connections: MiB more, p99 in ms without and with, how many stayed."""

    added: float
    shared: float
    without: float
    beside: float
    stayed: float


def _idle_table(bench: Bench) -> Table:
    wanted = min(500 if bench.quick else 10_000, raise_file_limit() - 200)
    store = bench.spot()
    path = put_blob(store, "example.com/warm", "v1.0.0", 1000) + ".info"
    each = [_idle_round(bench, store, path, wanted) for _ in range(bench.rounds)]
    columns = {field: [getattr(one, field) for one in each] for field in Idle._fields}
    return Table(
        [f"us, {wanted:,} idle connections", "figure", "goal"],
        [
            ["memory added, MiB: sum of VmRSS", _range(columns["added"]), "≤ 25"],
            ["memory added, MiB: sum of Pss", _range(columns["shared"]), ""],
            ["p99 of 32 busy ones without them, ms", _range(columns["without"]), ""],
            ["p99 of 32 busy ones with them, ms", _range(columns["beside"]), ""],
            ["p99 with/without", ratio(columns["beside"], columns["without"]), "1.00"],
            ["still open at the end", _range(columns["stayed"]), f"{wanted:,}"],
        ],
    )


def _idle_round(bench: Bench, store: Path, path: str, wanted: int) -> Idle:
    progress(f"{wanted} idle connections")
    seconds = 1 if bench.quick else 3
    with Us().start(bench.place(store)) as server, contextlib.ExitStack() as stack:
        without = wrk(server.url + path, 32, seconds).p99
        rss, pss = _held(server)
        idle = [stack.enter_context(_idle_connection(server, path)) for _ in range(wanted)]
        more, shared = _held(server)
        beside = wrk(server.url + path, 32, seconds).p99
        return Idle(more - rss, shared - pss, without, beside, sum(map(_is_open, idle)))


def _held(server: Server) -> tuple[float, float]:
    return server.memory("status", "VmRSS"), server.memory("smaps_rollup", "Pss")


def _idle_connection(server: Server, path: str) -> socket.socket:
    """A connection that asked once, as a go command does, and then stays."""
    port = urllib.parse.urlsplit(server.url).port or 0
    sock = socket.create_connection(("127.0.0.1", port), 10)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    sock.recv(4096)
    return sock


def _is_open(sock: socket.socket) -> bool:
    """Whether the server has left this connection alone; a late rest of a body is read off."""
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


# 7 Report ####################################################################


class Section(NamedTuple):
    """What to run, and the tools it needs."""

    run: Callable[[Bench], list[Table]]
    tools: tuple[str, ...]


SECTIONS: dict[str, Section] = {
    "cold": Section(cold, ()),
    "filewarm": Section(filewarm, ("go",)),
    "growth": Section(growth, ("wrk",)),
    "readahead": Section(readahead, ("go",)),
    "warm": Section(warm, ("nginx", "wrk")),
}


def missing_tools(names: Sequence[str]) -> str:
    """One line that says what to install; empty when all is there."""
    wanted = sorted({tool for name in names for tool in SECTIONS[name].tools})
    missing = [tool for tool in wanted if not program(tool)]
    packages = " ".join("golang-go" if tool == "go" else tool for tool in missing)
    needed = f"needs {', '.join(missing)}: apt-get install {packages}"
    return needed if missing else "" if PROXY.exists() else f"needs {PROXY}"


def proxy_digest() -> str:
    """Which goproxy.py is measured."""
    return hashlib.sha256(PROXY.read_bytes()).hexdigest()[:12]


def heading(title: str, doc: str, took: float, load: float) -> list[str]:
    """What makes a section stand by itself: when, with what file and by which command."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = "python3 bench/run.py " + shlex.join(sys.argv[1:])
    facts = f"{today}, `{command.strip()}`, {took:.0f} s, goproxy.py sha256 {proxy_digest()}"
    facts += f", load of the machine before: {load:.1f}."
    return [f"## {title}", "", doc, "", facts, ""]


def machine() -> str:
    """The machine and the versions of everything that takes part."""
    cpu = re.search(r"model name\s*: (.*)", _text(Path("/proc/cpuinfo")))
    memory = _kib(Path("/proc/meminfo"), "MemTotal") / 1024 / 1024
    name = cpu.group(1) if cpu else platform.processor()
    facts = [
        f"- machine: {os.cpu_count()} x {name}, {memory:.0f} GiB",
        f"- system: {platform.system()} {platform.release()}",
        f"- Python {platform.python_version()}, {_version('go', 'version')}",
        f"- {_version('nginx', '-v')}, {_version('wrk', '-v')}",
    ]
    return "\n".join(facts)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _version(tool: str, flag: str) -> str:
    if not program(tool):
        return f"no {tool}"
    told = subprocess.run([program(tool), flag], capture_output=True, text=True)
    return (told.stdout + told.stderr).partition("\n")[0].partition(" Copyright")[0]


_INTRO = """# Results

Written by `bench/run.py`; what each section means is in `bench/README.md`. Figures are medians of
the rounds; a ratio is the median of the ratios within each round (range in brackets).
"""


def write_results(file: Path, parts: Mapping[str, str]) -> None:
    """Replace the sections that were run; the others stay as their own run left them."""
    old = re.split(r"^## ", _text(file), flags=re.M)[1:]
    kept = {part.partition("\n")[0]: f"## {part}" for part in old}
    kept.update(parts)
    body = "\n".join(kept[name].rstrip() + "\n" for name in sorted(kept))
    file.write_text(f"{_INTRO}\n{machine()}\n\n{body}")


def run_sections(bench: Bench, names: Sequence[str]) -> dict[str, str]:
    """Measure and print one section after the other; their text by name."""
    parts = {}
    for name in names:
        begun, load, digest = time.monotonic(), os.getloadavg()[0], proxy_digest()
        tables = SECTIONS[name].run(bench)
        if proxy_digest() != digest:
            raise Failure(f"{PROXY} was changed while {name} was measured")
        doc = SECTIONS[name].run.__doc__ or ""
        head = heading(name, doc, time.monotonic() - begun, load)
        parts[name] = "\n".join(head) + "\n" + "\n\n".join(map(render, tables)) + "\n"
        print(parts[name], flush=True)
    return parts


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="measure goproxy.py beside other proxies")
    add = made.add_argument
    add("peers", nargs="*", type=peer, metavar="NAME=URL", help="another proxy: see README.md")
    add("--peer", action="append", type=peer, default=[], metavar="NAME=URL", help="the same")
    add("--only", action="append", choices=sorted(SECTIONS), help="a section; may be repeated")
    add("--rounds", type=int, default=0, help="how often each thing is measured (default 5)")
    add("--quick", action="store_true", help="a short run to see that all works; no network")
    add(
        "--modcache",
        type=Path,
        default=Path("/var/tmp/goproxy-bench"),
        metavar="DIR",
        help="where the real project's modules are kept between runs (%(default)s)",
    )
    add("--upstream-port", type=int, default=0, help="fixed port of the upstream, for peers")
    add("--files", type=int, default=1_000_000, help="files in the large store (%(default)s)")
    add(
        "--work-in",
        type=Path,
        default=_roomy(),
        metavar="DIR",
        help="for these files and what the go command unpacks (%(default)s)",
    )
    add("--output", type=Path, metavar="FILE", help="default bench/RESULTS.md; none with --quick")
    return made


def _roomy() -> Path:
    """A file system in memory where there is one, so that no disk is measured by mistake."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def bench_of(options: argparse.Namespace, scratch: Path) -> Bench:
    return Bench(
        rounds=options.rounds or (1 if options.quick else 5),
        quick=options.quick,
        peers=[*options.peers, *options.peer],
        upstream_port=options.upstream_port,
        scratch=scratch,
        modcache=scratch / "modcache" if options.quick else options.modcache.resolve(),
        files=options.files,
        memory=options.work_in,
    )


def main() -> int:
    options = parser().parse_args()
    names = options.only or sorted(SECTIONS)
    if problem := missing_tools(names):
        print(problem, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="goproxy-bench-") as scratch:
        try:
            parts = run_sections(bench_of(options, Path(scratch)), names)
        except Failure as failure:
            print(f"failed: {failure}", file=sys.stderr)
            return 1
    output = options.output or (None if options.quick else HERE / "RESULTS.md")
    if output:
        write_results(output, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
