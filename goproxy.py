#!/usr/bin/env python3
"""goproxy.py: a Go module proxy in one file, with nothing but Python's standard library.

    python3 goproxy.py -port 12345            # then: export GOPROXY=http://localhost:12345,direct

The house, room by room. A room uses the rooms above it, never one below, so the file reads
downward from vocabulary to plot, and a request is followed from the last page upward.

    1. Errors: one class per status word
    2. Names: escaping, path and version checks, semver order, pseudo-versions, globs
    3. Settings: flags, variables, defaults: one table
    4. Artifacts: what is asked for, and what may be kept
    5. Tools: blobs, drafts, flights, lanes, memory with a time limit, the log
    6. Network: HTTP heads, resolvers, tunnels, the dialer, the pooled client, DNS, checks, S3
    7. Storage: where bytes live
    8. Sources: where modules come from
    9. Mirror: sources remembered in a store; policy; the checksum database
    10. Registry: what is behind /v2/, and its layers in a bucket
    11. HTTP: requests, replies, routes, the front loop
    12. Daemon: wiring, signals, commands, main

The life of a request:

    warm    11 Server reads the head -> Route -> 9 Policy -> Mirror -> Cache -> 7 Storage -> Reply
    cold    ... Cache misses -> 5 Flights -> 8 Source.open -> 6 Client -> Draft grows on disk, every
            waiting client reads it as it grows -> 4 check -> 7 Storage.adopt -> its tail is let go
    private ... 9 Policy -> 8 Direct finds the repository, git fills it -> the same store; nobody
            else is asked
    query   list, @latest, branch: fresh for -ttl, then stale while one refresh runs; stale for a
            day when upstream fails; always united with what is stored
    /v2/    ... -> 10 Registry: as it is to the registry and back; a layer: may this client have
            it? -> a link into the bucket; if it is not there: fetched once, checked, kept
    error   a ProxyError becomes its status in one place (respond); anything else is a 500 and a
            traceback in the log

To add a kind of proxy or of DNS server, write a function or class in room 6 and a row in TUNNELS
or DNS_TRANSPORTS; a storage, a class in room 7 and rows in STORAGES and in _PLACES (room 3); a
source, a class in room 8 and a row in _SOURCES; an endpoint, a function in room 11 and a row in
ROUTES; a command, a function in room 12 and a row in COMMANDS; a setting, one line in Settings. A
mutex is never held over I/O; a flight exists for I/O. Order: flight, lane, pool.
"""

from __future__ import annotations

import marshal
import os
import sys


def _begin_lean() -> None:
    """Starts this process anew, with the code that has been compiled but without its syntax tree:
    CPython keeps that of a script, 15 MB here in every process, as long as the script runs."""
    if not sys.executable or sys.argv[0] in ("-", "-c"):
        return
    try:
        with open("/proc/self/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        code = os.memfd_create("goproxy", 0)  # a file without a name, inherited
        data = marshal.dumps(sys._getframe(1).f_code)
        if os.write(code, data) < len(data):  # as ulimit -f has it
            return
        loader = (
            "import marshal,os,sys;__file__=sys.argv[1];del sys.argv[0];"
            f"os.lseek({code},0,0);_file=open({code},'rb');_code=marshal.loads(_file.read());"
            "_file.close();exec(_code)"
        )
        flags = words[1 : len(words) - len(sys.argv)]
        os.execv(sys.executable, [words[0], *flags, "-c", loader, *sys.argv])
    except OSError:
        return  # an old kernel or a closed sandbox: then with the tree


# Not for a module, nor under a debugger or profiler, which would be left behind.
if __name__ == "__main__" and sys._getframe().f_back is None and sys.platform == "linux":
    _begin_lean()

import argparse
import base64
import bisect
import calendar
import collections
import concurrent.futures
import configparser
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import errno
import functools
import hashlib
import heapq
import hmac
import html
import importlib
import io
import ipaddress
import itertools
import json
import math
import mmap
import operator
import posixpath
import queue
import random
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import tarfile
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import weakref
import xml.etree.ElementTree
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import (
    Any,
    BinaryIO,
    Callable,
    ClassVar,
    Generic,
    NamedTuple,
    Optional,
    Protocol,
    TypeVar,
)

try:
    import fcntl
except ImportError:  # not on this platform
    fcntl = None  # type: ignore[assignment]

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

__version__ = "0.1.0"

T = TypeVar("T")

# =============================================================================
# 1. Errors: one class per status word
# =============================================================================
# The go command acts on the status: 404 and 410 send it on to the next proxy or to the internet,
# anything else stops it. So only a true absence may be a NotFound; an outage never is.


class ProxyError(Exception):
    """A failure with an HTTP status. Its text is shown to clients, so it holds no secret."""

    status = 500
    retry_after: int | None = None  # seconds

    def headers(self) -> list[tuple[str, str]]:
        return [] if self.retry_after is None else [("Retry-After", str(self.retry_after))]


_E = TypeVar("_E", bound=BaseException)


def unframed(error: _E) -> _E:
    """An error of ours without the frames it has passed. Whoever keeps or shares an error would
    keep all that they hold with it, open files too."""
    if not isinstance(error, ProxyError):
        return error  # a bug, whose frames tell where it is
    found = type(error).__new__(type(error))
    found.args = error.args
    found.__dict__.update(error.__dict__)
    error.__traceback__ = error.__context__ = None
    return found


class BadRequest(ProxyError):
    status = 400


class BadBody(BadRequest):
    """The body of a client's request is malformed or cut short."""


class Unauthorized(ProxyError):
    status = 401

    def headers(self) -> list[tuple[str, str]]:
        return [("WWW-Authenticate", 'Basic realm="goproxy"')]


class Forbidden(ProxyError):
    status = 403


class NotFound(ProxyError):
    status = 404


class BadName(NotFound):
    """A path, version or escape that no module can have."""


class Gone(NotFound):
    status = 410


class Spoiled(NotFound):
    """What is stored is not what was: a disk has forgotten, or somebody has changed a file."""


class NotHere(NotFound):
    """Not in the store, for one who asked for what is in it alone: nobody else is told so."""


class MethodNotAllowed(ProxyError):
    status = 405

    def headers(self) -> list[tuple[str, str]]:
        return [("Allow", "GET, HEAD")]


class Conflict(ProxyError):
    status = 409


class HeadTooSlow(ProxyError):
    status = 408


class LengthRequired(ProxyError):
    status = 411


class BodyTooLarge(ProxyError):
    status = 413


class TargetTooLong(ProxyError):
    status = 414


class BadRange(ProxyError):
    """A range outside the body; `size` is the body's length in bytes."""

    status = 416

    def __init__(self, size: int) -> None:
        super().__init__("range not satisfiable")
        self.size = size

    def headers(self) -> list[tuple[str, str]]:
        return [("Content-Range", f"bytes */{self.size}")]


class ExpectationFailed(ProxyError):
    status = 417


class TooManyRequests(ProxyError):
    status = 429
    retry_after = 60


class HeadTooLarge(ProxyError):
    status = 431


class UnknownMethod(ProxyError):
    status = 501


class BadUpstream(ProxyError):
    """An upstream sent something invalid."""

    status = 502


class Untrusted(BadUpstream):
    """The checksum database contradicts itself: a security event."""


class Mismatch(Untrusted):
    """What contradicts the checksum database."""


class Unreachable(BadUpstream):
    """An upstream refused, broke off, cut short or answered 5xx: the next try may go well."""

    lasts = False  # whether the host has failed so often that nobody should try again at once


class LoopFound(BadUpstream):
    """A request of ours has come back to us; whoever sent it on must not try again."""

    FIELD = "X-Goproxy-Loop"

    def headers(self) -> list[tuple[str, str]]:
        return [(self.FIELD, "1")]


class UpstreamTimeout(Unreachable):
    status = 504


class Overloaded(ProxyError):
    """Not now: too busy, draining, or told so by an upstream."""

    status = 503
    hasty = False  # whether it was given up at once, because it can be done without

    def __init__(self, text: str, retry_after: int = 1) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class StoreDown(Overloaded):
    """The store cannot read or write: what upstream has can still be passed through."""


class StoreAway(StoreDown):
    """The store cannot be reached at all: who comes next need not wait to learn that."""


class VersionNotSupported(ProxyError):
    status = 505


# What taking JSON apart raises that somebody else has written.
ODD_JSON = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class UsageError(Exception):
    """A setting that cannot be used: one line that names it, its value and what is allowed."""


class StartError(Exception):
    """The settings are fine, but the machine is not: one line with the remedy."""


# =============================================================================
# 2. Names: escaping, path and version checks, semver order, pseudo-versions, globs
# =============================================================================

# Facts of golang.org/x/mod/module and semver. A name is a str; whoever decodes bytes does it
# strictly, and a lone surrogate is refused here like any other character that is no letter.

_RESERVED = frozenset(
    ["CON", "PRN", "AUX", "NUL"]
    + [port + digit for port in ("COM", "LPT") for digit in "123456789"]
)
_NOT_IN_MODULE = re.compile(r"[^-._~0-9A-Za-z]")
_NOT_PLAIN_IN_FILE = re.compile(r"[^-!#$%&()+,.=@\[\]^_{}~ 0-9A-Za-z]")
_NOT_IN_DOMAIN = re.compile(r"[^-.0-9a-z]")
_SHORT_NAME = re.compile(r"~[0-9]+\Z")
_UPPER = re.compile(r"[A-Z]")
_ESCAPE = re.compile(r"!([a-z])")
_BAD_ESCAPE = re.compile(r"[A-Z]|!(?![a-z])")
_DIGITS = "0123456789"
_PATHS = 2048  # paths whose escaping is remembered: each is needed several times in a request
_VERSIONS = 512  # the same for versions


def quoted(text: str) -> str:
    """`text` in double quotes: printable ASCII, one line, cut to what an error message can hold."""
    return json.dumps(text if len(text) <= 200 else text[:200] + "...")


def check_path(path: str) -> None:
    """Raise BadName unless `path` is a module path (module.CheckPath)."""
    try:
        if path.startswith("-"):
            raise ValueError("leading dash")
        for element in _elements(path):
            _check_module_element(element)
        _check_domain(path.partition("/")[0])
        _split_major(path)
    except ValueError as error:
        raise BadName(f"malformed module path {quoted(path)}: {error}") from None


def check_file_path(name: str) -> None:
    """Raise BadName unless `name` may stand in a module zip (module.CheckFilePath)."""
    try:
        for element in _elements(name):
            _check_file_element(element)
    except ValueError as error:
        raise BadName(f"malformed file path {quoted(name)}: {error}") from None


def check_version(version: str) -> None:
    """Raise BadName unless `version` can be written in a URL: a version, branch or commit.

    This is module.EscapeVersion: one file name element, ASCII, without `!`.
    """
    try:
        _check_file_element(version)
        if "!" in version or not version.isascii():
            raise ValueError("disallowed version string")
    except ValueError as error:
        raise BadName(f"version {quoted(version)} invalid: {error}") from None


def check_module(path: str, version: str) -> None:
    """Raise BadName unless `version` is canonical and of the major version that `path` names.

    This is module.Check together with the canonical form that .mod and .zip are asked for by.
    """
    check_path(path)
    parsed = _parse(version)
    if not parsed:
        raise BadName(f"{path}@{quoted(version)}: not a semantic version")
    exact = canonical(version)
    if version != exact:
        raise BadName(f"version {quoted(version)} is not canonical (should be {quoted(exact)})")
    _, major = split_path_version(path)
    if not fits_major(version, major):
        want = major[1:] or "v0 or v1"
        raise BadName(f"{path}@{version}: invalid version: should be {want}, not v{parsed.major}")


def split_path_version(path: str) -> tuple[str, str]:
    """`path` as (prefix, major): major is "", "/vN" or, on gopkg.in, ".vN" or ".vN-unstable".

    Raises BadName for a path that ends in an impossible major version (module.SplitPathVersion).
    """
    try:
        return _split_major(path)
    except ValueError as error:
        raise BadName(f"malformed module path {quoted(path)}: {error}") from None


@functools.lru_cache(maxsize=_PATHS)
def escape_path(path: str) -> str:
    """`path` as it stands in URLs and file names: each capital X as !x. Raises BadName."""
    check_path(path)
    return _escape(path)


@functools.lru_cache(maxsize=_PATHS)
def unescape_path(escaped: str) -> str:
    """The module path that `escaped` stands for. Raises BadName."""
    path = _unescape(escaped, "module path")
    check_path(path)
    return path


@functools.lru_cache(maxsize=_VERSIONS)
def escape_version(version: str) -> str:
    """`version` as it stands in URLs and file names: each capital X as !x. Raises BadName."""
    check_version(version)
    return _escape(version)


@functools.lru_cache(maxsize=_VERSIONS)
def unescape_version(escaped: str) -> str:
    """The version, branch or commit that `escaped` stands for. Raises BadName."""
    version = _unescape(escaped, "version")
    check_version(version)
    return version


def _escape(name: str) -> str:
    return _UPPER.sub(lambda upper: "!" + upper[0].lower(), name)


def _unescape(escaped: str, noun: str) -> str:
    if not escaped.isascii() or _BAD_ESCAPE.search(escaped):
        raise BadName(f"invalid escaped {noun} {quoted(escaped)}")
    return _ESCAPE.sub(lambda lower: lower[1].upper(), escaped)


def _elements(path: str) -> list[str]:
    if not path:
        raise ValueError("empty string")
    if "//" in path:
        raise ValueError("double slash")
    if path.endswith("/"):
        raise ValueError("trailing slash")
    return path.split("/")


def _check_module_element(element: str) -> None:
    _check_element(element, _NOT_IN_MODULE.search(element))
    if element.startswith("."):
        raise ValueError("leading dot in path element")
    if _SHORT_NAME.search(element.partition(".")[0]):
        raise ValueError("trailing tilde and digits in path element")


def _check_file_element(element: str) -> None:
    odd = _NOT_PLAIN_IN_FILE.finditer(element)
    _check_element(element, next((found for found in odd if not _is_letter(found[0])), None))


def _check_element(element: str, odd: re.Match[str] | None) -> None:
    if not element:
        raise ValueError("empty path element")
    if not element.strip("."):
        raise ValueError(f"invalid path element {quoted(element)}")
    if element.endswith("."):
        raise ValueError("trailing dot in path element")
    if odd:
        raise ValueError(f"invalid char {quoted(odd[0])}")
    stem = element.partition(".")[0]
    if stem.upper() in _RESERVED:
        raise ValueError(f"{quoted(stem)} disallowed as path element component on Windows")


def _is_letter(char: str) -> bool:
    # Go may know a newer Unicode than this Python: what is unassigned here can be a letter there,
    # and refusing it would break a module that works.
    category = unicodedata.category(char)
    return not char.isascii() and (category.startswith("L") or category == "Cn")


def _check_domain(element: str) -> None:
    if "." not in element:
        raise ValueError("missing dot in first path element")
    odd = _NOT_IN_DOMAIN.search(element)
    if odd:
        raise ValueError(f"invalid char {quoted(odd[0])} in first path element")


def _split_major(path: str) -> tuple[str, str]:
    if path.startswith("gopkg.in/"):
        return _split_gopkg(path)
    stem = path.rstrip(_DIGITS + ".")
    number = path[len(stem) :]
    if not number or not stem.endswith("/v"):
        return path, ""
    if "." in number or number.startswith("0") or number == "1":
        raise ValueError("invalid version")
    return stem[:-2], "/v" + number


def _split_gopkg(path: str) -> tuple[str, str]:
    suffix = "-unstable"
    base = path[: -len(suffix)] if path.endswith(suffix) else path
    stem = base.rstrip(_DIGITS)
    major = path[len(stem) - 2 :]
    if not stem.endswith(".v") or major == ".v" or (major.startswith(".v0") and major != ".v0"):
        raise ValueError("invalid version")
    return stem[:-2], major


class _Semver(NamedTuple):
    """The parts of a version; `pre` and `build` keep their leading - and +, "" if absent."""

    major: str
    minor: str
    patch: str
    pre: str
    build: str


_NUMBER = r"(0|[1-9][0-9]*)"
_TAIL = r"(-[-.0-9A-Za-z]+)?(\+[-.0-9A-Za-z]+)?"
_SEMVER = re.compile(rf"v{_NUMBER}(?:\.{_NUMBER}(?:\.{_NUMBER}{_TAIL})?)?")
_STAMP = re.compile(r"[0-9]{14}-[0-9A-Za-z]+")


@functools.lru_cache(maxsize=_VERSIONS)
def _parse(version: str) -> _Semver | None:
    found = _SEMVER.fullmatch(version)
    if not found:
        return None
    major, minor, patch, pre, build = found.groups(default="")
    if pre and not all(map(_is_identifier, pre[1:].split("."))):
        return None
    if build and not all(build[1:].split(".")):
        return None
    return _Semver(major, minor or "0", patch or "0", pre, build)


def _is_identifier(text: str) -> bool:
    return bool(text) and (text == "0" or not text.startswith("0") or not text.isdigit())


def minor_line(version: str) -> tuple[str, str]:
    """Major and minor of a version: what gets patches on its own. ("", "") for what is none."""
    parsed = _parse(version)
    return parsed[:2] if parsed else ("", "")


def is_semver(version: str) -> bool:
    """Whether `version` is a semantic version with a v in front, as v1 and v1.2 are, too."""
    return _parse(version) is not None


def canonical(version: str) -> str:
    """vX.Y.Z[-pre][+incompatible] of a version, "" if it is none (module.CanonicalVersion)."""
    parsed = _parse(version)
    if not parsed:
        return ""
    kept = parsed.build if parsed.build == "+incompatible" else ""
    return f"v{parsed.major}.{parsed.minor}.{parsed.patch}{parsed.pre}{kept}"


def is_canonical(version: str) -> bool:
    """Whether `version` names one immutable release, so that its .mod and .zip may be asked for."""
    return bool(version) and canonical(version) == version


def is_prerelease(version: str) -> bool:
    """Whether `version` is a valid version before a release; pseudo-versions are, too."""
    parsed = _parse(version)
    return bool(parsed and parsed.pre)


def is_pseudo(version: str) -> bool:
    """Whether `version` names a commit by time and hash (module.IsPseudoVersion)."""
    parsed = _parse(version)
    if not parsed:
        return False
    base, _, stamp = parsed.pre[1:].rpartition(".")
    untagged = not base and parsed.minor == parsed.patch == "0"
    based = base == "0" or base.endswith(".0")
    return (untagged or based) and bool(_STAMP.fullmatch(stamp))


_Number = tuple[int, str]
SemverKey = tuple[bool, tuple[_Number, ...], bool, tuple[tuple[bool, int, str], ...], str]


def semver_key(version: str) -> SemverKey:
    """Sort key in the order of semver.Sort: invalid ones first, equal ones by their spelling.

    Numbers are compared as (length, digits): they may be longer than int() accepts.
    """
    parsed = _parse(version)
    if not parsed:
        return (False, (), False, (), version)
    numbers = tuple((len(number), number) for number in parsed[:3])
    identifiers = parsed.pre[1:].split(".") if parsed.pre else []
    order = tuple((not text.isdigit(), text.isdigit() and len(text), text) for text in identifiers)
    return (True, numbers, not parsed.pre, order, version)


def precedence(version: str) -> tuple[Any, ...]:
    """The same, but versions that differ in build metadata alone are equal (semver.Compare)."""
    return semver_key(version)[:-1]


def fits_major(version: str, path_major: str) -> bool:
    """Whether a version may belong to a path of that major, as split_path_version tells it
    (module.CheckPathMajor)."""
    # gopkg.in/check.v1 has pseudo-versions v0.0.0-... from an old bug.
    parsed = _parse(version)
    if not parsed:
        return False
    if not path_major:
        return parsed.major in ("0", "1") or parsed.build == "+incompatible"
    major = path_major[1:].partition("-")[0]
    old = path_major.startswith(".v1") and parsed[:3] == ("0", "0", "0") and bool(parsed.pre)
    return major == "v" + parsed.major or (old and major == "v1")


def meant(path: str, version: str) -> str:
    """The version that a canonical one stands for where somebody asks: v2.0.0 of a path that names
    no major version is v2.0.0+incompatible (checkCanonical in modfetch/coderepo.go). Raises BadName
    for a bad path."""
    if split_path_version(path)[1] or "+" in version or fits_major(version, ""):
        return version
    return version + "+incompatible"


class Pseudo(NamedTuple):
    """A pseudo-version in parts: `base` is the version before it or "", `stamp` the time of its
    commit as %Y%m%d%H%M%S, `revision` the beginning of the commit's hash."""

    base: str
    stamp: str
    revision: str


def read_pseudo(version: str) -> Pseudo:
    """The parts of a pseudo-version. Raises BadName (module.PseudoVersionBase)."""
    parsed = _parse(version)
    if not parsed or not is_pseudo(version):
        raise BadName(f"{quoted(version)} is not a pseudo-version")
    head, _, revision = parsed.pre[1:].rpartition("-")
    mark, _, stamp = head.rpartition(".")
    if mark not in ("", "0"):
        before = f"v{parsed.major}.{parsed.minor}.{parsed.patch}-{mark[: -len('.0')]}{parsed.build}"
        return Pseudo(before, stamp, revision)
    if not mark:
        if parsed.build:
            raise BadName(f"lacks base version, but has build metadata {quoted(parsed.build)}")
        return Pseudo("", stamp, revision)
    if parsed.patch == "0":
        raise BadName("version before it would have negative patch number")
    before = f"v{parsed.major}.{parsed.minor}.{_next_number(parsed.patch, -1)}{parsed.build}"
    return Pseudo(before, stamp, revision)


def _next_number(digits: str, step: int) -> str:
    """One more (`step` 1) or less (-1), of any length: int() takes 4,300 digits at most."""
    spent, fresh = "90" if step > 0 else "09"
    stem = "0" + digits.rstrip(spent)
    turned = fresh * (len(digits) + 1 - len(stem))
    return f"{stem[:-1]}{int(stem[-1]) + step}{turned}".lstrip("0") or "0"


def make_pseudo(major: str, base: str, stamp: str, revision: str) -> str:
    """The pseudo-version after `base`, or the first of `major` ("v2"; "" for v0) if that is ""
    (module.PseudoVersion)."""
    parsed = _parse(base)
    if not parsed:
        return f"{major or 'v0'}.0.0-{stamp}-{revision}"
    if parsed.pre:
        return f"{base}.0.{stamp}-{revision}"
    patch = _next_number(parsed.patch, 1)
    return f"v{parsed.major}.{parsed.minor}.{patch}-0.{stamp}-{revision}"


# Capital letters of Unicode 14 and their small ones: Go knows them, Python 3.9 and 3.10 do not.
_LATER_SMALL = {
    0x2C2F: 0x2C5F,
    0xA7C0: 0xA7C1,
    0xA7D0: 0xA7D1,
    0xA7D6: 0xA7D7,
    0xA7D8: 0xA7D9,
    **{capital: capital + 0x27 for capital in range(0x10570, 0x10596)},
}


def fold(name: str) -> str:
    """A string that is equal for names equal but for case (zip.strToFold, strings.EqualFold)."""
    if name.isascii():
        return name.lower()
    return "".join(map(_fold_char, name.translate(_LATER_SMALL)))


def _fold_char(char: str) -> str:
    # Go folds one rune to one rune; where Python makes several of it (ß, İ), the rune has no
    # partner, or one that lower() finds.
    return next((form for form in (char.casefold(), char.lower()) if len(form) == 1), char)


_Test = Callable[[str], bool]
_Pattern = tuple[Optional[_Test], ...]  # None stands for any number of items


def parse_globs(text: str) -> tuple[str, ...]:
    """The globs of a comma-separated list as in GOPRIVATE, blanks and a last slash trimmed.

    Raises ValueError naming the first malformed one: a rule that can never match protects nobody.
    """
    trimmed = (glob.strip() for glob in text.split(","))
    globs = tuple(glob[:-1] if glob.endswith("/") else glob for glob in trimmed)
    for glob in filter(None, globs):
        try:
            _compile_glob(glob)
        except ValueError as error:
            raise ValueError(f"malformed glob {quoted(glob)}: {error}") from None
    return tuple(filter(None, globs))


def matches(globs: Sequence[str], path: str) -> bool:
    """Whether one of the globs from parse_globs matches `path` or the beginning of it.

    Each element is matched like path.Match and the whole like module.MatchPrefixPatterns; besides,
    an element ** stands for any number of elements.
    """
    elements = path.split("/")
    return any(_fits(_compile_glob(glob), True, elements) for glob in globs)


@functools.lru_cache(maxsize=1024)
def _compile_glob(glob: str) -> _Pattern:
    return tuple(
        None if element == "**" else functools.partial(_fits, _compile_element(element), False)
        for element in glob.split("/")
    )


def _compile_element(glob: str) -> _Pattern:
    if not glob:
        raise ValueError("empty path element")
    chars = iter(glob)
    return tuple(_compile_char(char, chars) for char in chars)


def _compile_char(char: str, chars: Iterator[str]) -> _Test | None:
    if char == "*":
        return None
    if char == "?":
        return bool
    if char == "[":
        return _compile_class(chars)
    return functools.partial(operator.eq, _literal(char, chars))


def _compile_class(chars: Iterator[str]) -> _Test:
    char = next(chars, "")
    negated = char == "^"
    if negated:
        char = next(chars, "")
    ranges: list[tuple[str, str]] = []
    while char != "]" or not ranges:
        low = high = _class_char(char, chars)
        char = next(chars, "")
        if char == "-":
            high = _class_char(next(chars, ""), chars)
            char = next(chars, "")
        ranges.append((low, high))
    return lambda item: negated != any(low <= item <= high for low, high in ranges)


def _class_char(char: str, chars: Iterator[str]) -> str:
    if char in ("", "-", "]"):
        raise ValueError("syntax error in [...]")
    return _literal(char, chars)


def _literal(char: str, chars: Iterator[str]) -> str:
    if char != "\\":
        return char
    escaped = next(chars, "")
    if not escaped:
        raise ValueError("nothing after the last backslash")
    return escaped


def _fits(pattern: _Pattern, prefix: bool, items: Sequence[str]) -> bool:
    # Only the latest "any number" is ever widened, which is enough, and keeps the time below
    # len(pattern) * len(items). With `prefix`, items may be left over.
    at = item = widened = 0
    wild = -1
    while at < len(pattern) or (item < len(items) and not prefix):
        test = pattern[at] if at < len(pattern) else _never
        if test is None:
            wild, widened, at = at, item, at + 1
        elif item < len(items) and test(items[item]):
            at, item = at + 1, item + 1
        elif wild < 0 or widened == len(items):
            return False
        else:
            widened += 1
            at, item = wild + 1, widened
    return True


def _never(_item: str) -> bool:
    return False


# =============================================================================
# 3. Settings: flags, variables, defaults: one table
# =============================================================================


def mask(text: str) -> str:
    """Hides the password of every URL in text, also one that is not escaped as it should be."""
    text = re.sub(r"([?&](?:ssl)?password=)[^&\s]*", r"\1***", text)
    return _PASSWORD.sub(r"\1:***@", text)


# From a colon up to the last @ before another URL begins.
_PASSWORD = re.compile(
    r"((?:^|//)[^/@\s:]*?)(?::(?!//)|%3A)(?:(?![\s,|=][a-z0-9+]+://).)*@", re.DOTALL | re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Url:
    """Where an upstream lives. `path` has no trailing slash; `port` defaults to the scheme's."""

    scheme: str
    host: str
    port: int
    path: str = ""
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)

    def __str__(self) -> str:
        """The URL without its credentials."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """What stands in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS.get(self.scheme) else f"{host}:{self.port}"

    @property
    def origin(self) -> tuple[str, str, int]:
        return (self.scheme, self.host, self.port)


_PORTS = {"http": 80, "https": 443}
_NO_HOST = "the host is missing, malformed or not in ASCII (xn--...)"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?|\[[0-9A-Fa-f:.]+\]")
_URL = re.compile(
    r"((?i:https?))://(?:([^/@\s]*)@)?([^/@\s?#]*?)(?::([0-9]*))?(/[\x21\x24-\x3e\x40-\x7e]*)?"
)


def parse_url(text: str) -> Url:
    """An http or https URL without query and fragment. Raises ValueError saying what is wrong."""
    match = _URL.fullmatch(text)
    if not match:
        raise ValueError("want http(s)://[user:password@]host[:port][/path]")
    scheme, userinfo, host, port, path = match.groups(default="")
    scheme = scheme.lower()
    if not _HOST.fullmatch(host):
        raise ValueError(_NO_HOST)
    number = int(port.lstrip("0")[:6] or 0) if port else _PORTS[scheme]
    if not 0 < number < 65536:
        raise ValueError("the port must be from 1 to 65535")
    user, _, password = userinfo.partition(":")
    return Url(
        scheme,
        host.strip("[]").lower(),
        number,
        path.rstrip("/"),
        urllib.parse.unquote(user),
        urllib.parse.unquote(password),
    )


_PROXY_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}
_DNS_PORTS = {"https": 443, "quic": 853, "tcp": 53, "tls": 853, "udp": 53}
_HOST_NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,62}(\.[a-z0-9_][a-z0-9_-]{0,62})*")
_NUMERIC_END = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")
_SERVER = re.compile(
    r"(?:([A-Za-z][A-Za-z0-9+.-]*)://)?(?:([^/?#\s]*)@)?"
    r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]?#]*)(?::([0-9]{0,9}))?(/(?!/)[!\"$->@-~]*)?"
)


def is_ip(host: str) -> bool:
    """Whether host is an IPv4 or IPv6 address, without brackets and without a zone."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def plain_host(host: str) -> str:
    """A host in lower case without its final dot. Raises ValueError for what is no name and no IP.

    Every name goes through here before it is put on a wire, so none can end a line there. "127.1"
    and "0x7f.1" end in a number, so they are no names: the system would make IPs of them."""
    name = host.lower()
    if is_ip(name):
        return name
    name = name[:-1] if name.endswith(".") else name
    if len(name) > 253 or not _HOST_NAME.fullmatch(name) or _NUMERIC_END.fullmatch(name):
        raise ValueError(_NO_HOST)
    return name


def _server(text: str, ports: Mapping[str, int], scheme: str) -> Url:
    """[scheme://][user[:password]@]host[:port][/path]; `scheme` and `ports` have the defaults."""
    match = _SERVER.fullmatch(text)
    if not match:
        raise ValueError("want [scheme://]host[:port][/path], no query")
    named, userinfo, host, port, path = match.groups()
    scheme = (named or scheme).lower()
    if scheme not in ports:
        raise ValueError(f"unknown scheme, want one of {', '.join(sorted(ports))}")
    number = ports[scheme] if port is None else int(port or 0)
    if not 0 < number < 65536:
        raise ValueError("the port must be from 1 to 65535")
    user, _, password = map(urllib.parse.unquote, (userinfo or "").partition(":"))
    return Url(scheme, plain_host(host.strip("[]")), number, path or "", user, password)


def parse_proxy(text: str) -> Url | None:
    """An outgoing proxy, None for an empty text. Raises ValueError saying what is wrong."""
    if not text:
        return None
    proxy = _server(text, _PROXY_PORTS, "http")
    if proxy.path not in ("", "/"):
        raise ValueError("a proxy has no path")
    if proxy.password and not proxy.user:
        raise ValueError("a password without a user")
    if max(len(proxy.user.encode()), len(proxy.password.encode())) > 255 or ":" in proxy.user:
        raise ValueError("user and password have 255 bytes at most, the user no colon")
    return dataclasses.replace(proxy, path="")


def parse_dns(text: str) -> tuple[Url, ...]:
    """DNS servers, separated by commas. Raises ValueError saying what is wrong."""
    return tuple(_dns_server(part.strip()) for part in text.split(",")) if text else ()


def _dns_server(text: str) -> Url:
    server = _server(f"[{text}]" if ":" in text and is_ip(text) else text, _DNS_PORTS, "udp")
    if server.user or server.password:
        raise ValueError("a DNS server takes no user and no password")
    if server.path and server.scheme != "https":
        raise ValueError("only https:// has a path")
    return server


class Hop(NamedTuple):
    """One item of an upstream list: what it is ("direct", "file", "http" or "off"), where, and
    whether any error of it (not just absence) moves on to the next item."""

    kind: str
    url: Url | None
    folder: str
    any_error: bool

    def __str__(self) -> str:
        return str(self.url) if self.url else f"file://{self.folder}" if self.folder else self.kind


_LAST = ("direct", "off")  # after these the go command asks nobody


def _hop(text: str, any_error: bool) -> Hop:
    if text in _LAST:
        return Hop(text, None, "", any_error)
    if text.startswith("file://"):
        if not text.startswith("file:///"):
            raise ValueError("want file:///absolute/folder")
        return Hop("file", None, urllib.parse.unquote(text[len("file://") :]), any_error)
    if "://" not in text and any(mark in text for mark in ".:/"):
        text = "https://" + text  # as the go command reads it
    return Hop("http", parse_url(text), "", any_error)


def _upstreams(text: str) -> tuple[Hop, ...]:
    """GOPROXY syntax (Go reference, "Environment variables"): `,` moves on at 404 and 410, `|` at
    any error; direct and off end the list."""
    hops: list[Hop] = []
    for item, mark in re.findall(r"([^,|]*)([,|]?)", text):
        if item.strip():
            hops.append(_hop(item.strip(), mark == "|"))
            if hops[-1].kind in _LAST:
                break
    if not hops:
        raise ValueError("want at least one URL, direct or off")
    return tuple(hops)


class VcsRule(NamedTuple):
    """Where the repositories are whose modules a glob names; it is as long as their root."""

    glob: str
    url: str  # with {path} for what follows the root's first element

    def covers(self, path: str) -> str:
        """The root of a module path, "" if the rule is not about it."""
        elements, length = path.split("/"), self.glob.count("/") + 1
        known = len(elements) >= length and matches((self.glob,), path)
        return "/".join(elements[:length]) if known else ""

    def is_deeper(self, path: str) -> bool:
        """Whether a path ends before the roots of the rule, and can still lead to one."""
        elements, globs = path.split("/"), self.glob.split("/")
        begun = "/".join(globs[: len(elements)])
        return len(elements) < len(globs) and matches((begun,), path)

    def place(self, root: str) -> str:
        return self.url.replace("{path}", root.partition("/")[2])


# Credentials have another place, since a URL is an argument of git, which everybody sees.
REPOSITORY = re.compile(
    r"(?:file:///|(?:(?:git|https?)://|ssh://(?:\w[\w.-]*@)?)[\w\[][\w.:\]-]*(?:/|\Z))[!-~]*",
    re.ASCII,
)


def _vcs_rules(text: str) -> tuple[VcsRule, ...]:
    """GLOB=URL, separated by commas."""
    rules = []
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, url = item.partition("=")
        glob = "".join(parse_globs(name))
        if not glob or "**" in glob.split("/"):
            raise ValueError("want GLOB=URL, the glob as long as a repository's root, without **")
        if not REPOSITORY.fullmatch(url):
            raise ValueError(
                "want a file, git, http, https or ssh URL, without user (ssh: without password)"
            )
        rules.append(VcsRule(glob, url))
    return tuple(rules)


class Verifier(NamedTuple):
    """Who signs a note, by an Ed25519 key (x/mod/sumdb/note): `mark` is what signatures by that key
    begin with."""

    name: str
    mark: bytes
    key: bytes


def parse_verifier(text: str) -> Verifier:
    """NAME+HASH+KEY. Raises ValueError saying what is wrong."""
    name, _, rest = text.partition("+")
    mark, _, encoded = rest.partition("+")
    key = unbase64(encoded)
    if not name or not re.fullmatch("[0-9A-Fa-f]{8}", mark) or not key:
        raise ValueError("want a key as NAME+HASH+KEY")
    if hashlib.sha256(f"{name}\n".encode() + key).digest()[:4] != bytes.fromhex(mark):
        raise ValueError("the hash of the key is wrong")
    if key[0] != 1 or len(key) != 33:
        raise ValueError("want an Ed25519 key")
    return Verifier(name, bytes.fromhex(mark), key[1:])


_BASE64 = re.compile("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def unbase64(text: str) -> bytes:
    """What a text in standard base64 stands for, b"" if it is none."""
    return base64.b64decode(text) if _BASE64.fullmatch(text) else b""


class SumDbName(NamedTuple):
    """A checksum database that may be asked through us, where it lives, and who signs it; without
    that nothing is compared with it."""

    name: str
    url: Url
    verifier: Verifier | None = None


# From cmd/go/internal/modfetch/key.go and sumdb.go.
_KNOWN_KEYS = {
    "sum.golang.org": "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
}
_MIRRORS = {"sum.golang.google.cn": ["sum.golang.org", "https://sum.golang.google.cn"]}


def _sumdbs(text: str) -> tuple[SumDbName, ...]:
    """`NAME`, `NAME URL` or, as in GOSUMDB, `NAME+HASH+KEY [URL]`, separated by commas; off for
    none."""
    databases = []
    for item in text.split(","):
        fields = _MIRRORS.get(item.strip()) or item.split()
        if not fields or fields == ["off"]:
            continue
        name, plus, _ = fields[0].partition("+")
        if len(fields) > 2 or not _HOST.fullmatch(name):
            raise ValueError("want NAME, NAME URL or NAME+HASH+KEY URL, by commas, or off")
        key = fields[0] if plus else _KNOWN_KEYS.get(name)
        verifier = parse_verifier(key) if key else None
        url = parse_url(([*fields, f"https://{name}"])[1])
        databases.append(SumDbName(name, url, verifier))
    return tuple(databases)


class Vanity(NamedTuple):
    """What go-import says of paths that begin with a prefix (Go reference, "Finding a repository
    for a module path"); no URL: our own."""

    prefix: str
    vcs: str
    url: str


_VCS = ("bzr", "fossil", "git", "hg", "mod", "svn")


def _vanities(text: str) -> tuple[Vanity, ...]:
    """PREFIX=mod or 'PREFIX=VCS URL', separated by commas."""
    found = []
    for item in filter(None, map(str.strip, text.split(","))):
        prefix, _, rest = item.partition("=")
        vcs, url = [*rest.split(), "", ""][:2]
        if vcs not in _VCS or len(rest.split()) > 2 or (vcs != "mod" and not url):
            raise ValueError("want PREFIX=mod or 'PREFIX=VCS URL', separated by commas")
        if url and not re.fullmatch(r"[a-z][a-z+]*://[!-~]+", url):
            raise ValueError("the URL of a repository needs a scheme")
        try:
            check_path(prefix)
        except BadName as error:
            raise ValueError(str(error)) from None
        found.append(Vanity(prefix, vcs, url))
    return tuple(found)


class Recipe(NamedTuple):
    """What -generate runs in the modules of a glob."""

    glob: str
    command: tuple[str, ...]


def _recipes(text: str) -> tuple[Recipe, ...]:
    """GLOB=COMMAND, one a line."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, command = line.partition("=")
        globs = parse_globs(name)
        script = command.strip()
        if script.startswith("shell:"):
            words = ["/bin/sh", "-c", script[len("shell:") :].strip()]
        else:
            words = shlex.split(script)
        if len(globs) != 1 or not words or not words[-1]:
            raise ValueError("want GLOB=COMMAND or GLOB=shell:SCRIPT, one a line")
        found.append(Recipe(globs[0], tuple(words)))
    return tuple(found)


def _base_url(text: str) -> Url | None:
    return parse_url(text) if text else None


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")


def _seconds(text: str) -> float:
    """60s, 5m, 1h30m; a bare number counts seconds."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    if not text or _DURATION.sub("", text):
        raise ValueError("want a duration such as 60s, 5m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("want a port number from 0 to 65535 (0 picks a free one)")
    return int(text)


def _workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 0 < int(text) <= 64:
        raise ValueError("want a number from 1 to 64")
    return int(text)


def _processors() -> int:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_WORKERS = min(4, _processors()) if sys.platform.startswith("linux") else 1


def _switch(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError("want true or false")
    return words[text.lower()]


def _host(text: str) -> str:
    if text.startswith("unix:"):
        if not text[len("unix:") :].startswith("/"):
            raise ValueError("want unix:/absolute/path")
    elif re.search(r"\A\.|\.\.|[^.]{64}", text) or not (
        _HOST.fullmatch(text) or re.fullmatch(r"[0-9A-Fa-f:.]*", text)
    ):
        raise ValueError("want a host name, an IP address or unix:/path (empty: all interfaces)")
    return text.strip("[]")


class Place(NamedTuple):
    """Where modules are kept: a row of STORAGES, and what that row makes of the text."""

    kind: str
    text: str

    def __str__(self) -> str:
        return mask(self.text)

    @property
    def path(self) -> str:
        """The folder or file that it is; "" for what is not on this machine's disks."""
        return {"folder": self.text, "sqlite": self.text.partition(":")[2]}.get(self.kind, "")


def _place(text: str) -> Place:
    """A folder, or one of the kinds in _PLACES."""
    scheme = re.match(r"([A-Za-z0-9]{2,}):", text)
    if text and "\0" not in text and not scheme:
        return Place("folder", text)
    read = _PLACES.get(scheme[1] if scheme else "")
    if not read or "\0" in text:
        raise ValueError(f"want a folder, or one of {', '.join(f'{name}:' for name in _PLACES)}")
    return read(text)


def _memory_place(text: str) -> Place:
    if text != "memory:":
        raise ValueError("want memory: and nothing after it")
    return Place("memory", text)


def _postgres_place(text: str) -> Place:
    if not re.fullmatch(r"postgres(ql)?://[^\s/?#]*/[^\s/?#]+(\?[^\s#]*)?", text):
        raise ValueError("want postgres://[user[:password]@]host[:port]/database[?option=value]")
    return Place("postgres", text)


def _sqlite_place(text: str) -> Place:
    if text.endswith((":", "/")):
        raise ValueError("want sqlite:FILE")
    return Place("sqlite", text)


@dataclasses.dataclass(frozen=True)
class BucketPlace:
    """A bucket of an S3-compatible service. `prefix` is empty or ends in a slash; `endpoint` and
    `region` say None and "" where the AWS variables and files decide."""

    bucket: str
    prefix: str = ""
    endpoint: Url | None = None
    region: str = ""
    path_style: bool | None = None  # None: what suits the endpoint
    public: Url | None = None  # where clients reach the service, if not at the endpoint
    redirect: bool = False  # zips are answered with a link into the bucket
    local: str = ""  # a folder in front


_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_KEY_PREFIX = re.compile(r"[0-9A-Za-z!._~/@+=-]*")


@dataclasses.dataclass(frozen=True)
class LayersPlace(BucketPlace):
    """A bucket for the layers of a registry."""

    max_age: float = 30 * 86400.0  # seconds since a client was permitted to have it; 0: no limit
    max_size: int | None = None  # bytes
    permit: float = 0.0  # seconds for which a client's permission need not be asked for again


def _region(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise ValueError("want letters, digits and dashes")
    return text


def _local(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("want a folder")
    return text


_BUCKET_PARAMETERS: dict[str, Callable[[str], Any]] = {
    "endpoint": parse_url,
    "local": _local,
    "path_style": _switch,
    "public": parse_url,
    "redirect": _switch,
    "region": _region,
}


def parse_bucket(text: str) -> BucketPlace:
    """s3://bucket[/prefix][?parameter=value&...]. Raises ValueError saying what is wrong."""
    return BucketPlace(**_bucket(text, _BUCKET_PARAMETERS))


def _bucket(text: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    where, _, query = text.partition("?")
    scheme, _, bucket = where.partition("://")
    bucket, _, prefix = bucket.partition("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket):
        raise ValueError("want s3://bucket/prefix (keys come from the AWS variables or files)")
    prefix = prefix.strip("/")
    if not _KEY_PREFIX.fullmatch(prefix) or "//" in prefix:
        raise ValueError("want a plain prefix: letters, digits and . _ ~ / @ + = ! -")
    given = _parameters(query, known)
    return {"bucket": bucket, "prefix": f"{prefix}/" if prefix else "", **given}


def _parameters(query: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    values = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        if name not in known:
            raise ValueError(f"unknown parameter {name}, want one of {', '.join(sorted(known))}")
        try:
            values[name] = known[name](urllib.parse.unquote(value))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return values


def _bucket_place(text: str) -> Place:
    parse_bucket(text)
    return Place("s3", text)


_PLACES: dict[str, Callable[[str], Place]] = {
    "memory": _memory_place,
    "postgres": _postgres_place,
    "postgresql": _postgres_place,
    "s3": _bucket_place,
    "sqlite": _sqlite_place,
}
_SIZES = {
    "": 1,
    **{unit: 10 ** (3 * power) for power, unit in enumerate("KMGT", 1)},
    **{f"{unit}I": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)},
}


def _size(text: str) -> int | None:
    """50GB, 500MB, 1.5TiB; a bare number counts bytes, nothing means no limit."""
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]I?)?B?", text.upper())
    size = int(float(match[1]) * _SIZES[match[2] or ""]) if match else 0
    if not size:
        raise ValueError("want a size such as 500MB or 50GB")
    return size


def _permit(text: str) -> float:
    seconds = _seconds(text)
    if seconds > 60.0:
        raise ValueError("want 60s at most")
    return seconds


def _period(text: str) -> float:
    return 0.0 if text == "off" else _seconds(text)


_LAYERS_PARAMETERS: dict[str, Callable[[str], Any]] = {
    **{name: _BUCKET_PARAMETERS[name] for name in ("endpoint", "path_style", "public", "region")},
    "max_age": _period,
    "max_size": _size,
    "permit": _permit,
}


def _layers_place(text: str) -> LayersPlace | None:
    return LayersPlace(**_bucket(text, _LAYERS_PARAMETERS)) if text else None


def _registry_url(text: str) -> Url | None:
    url = parse_url(text) if text else None
    if url and (url.path or url.user or url.password):
        raise ValueError("want http(s)://host[:port]: clients bring path and credentials")
    return url


def _folders(text: str) -> tuple[str, ...]:
    folders = tuple(filter(None, map(str.strip, text.split(","))))
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"there is no folder {quoted(folder)}")
    return folders


_REMOVABLE = ("deleted", "deprecated", "retracted")


def _removes(text: str) -> tuple[str, ...]:
    words = tuple(filter(None, map(str.strip, text.split(","))))
    if not set(words) <= {*_REMOVABLE, "none"}:
        raise ValueError(f"want any of {', '.join(_REMOVABLE)}, or none")
    return words


def _file(text: str) -> str:
    if text and not os.path.isfile(text):
        raise ValueError("no such file")
    return text


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"want {' or '.join(words)}")
        return text

    return parse


def _option(
    variable: str, default: str, parse: Callable[[str], Any], metavar: str, text: str
) -> Any:
    """One row of the table; `default` is written as a user would write it."""
    row = {
        "variable": variable,
        "default": default,
        "parse": parse,
        "metavar": metavar,
        "text": text,
    }
    return dataclasses.field(default_factory=lambda: parse(default), metadata=row)


class Argument(NamedTuple):
    """What one command alone takes: a flag, or in capitals a word at a place; "..." at its end
    stands for any number of words. `default` is None where it must be given; that of a switch is
    False."""

    name: str
    text: str
    default: str | bool | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything an operator may set. Flags, variables, -help and the README come from here."""

    auth: str = _option(
        "GOPROXY_AUTH",
        "",
        str,
        "FILE",
        "users, written by goproxy.py passwd; nobody else is let in",
    )
    cache: Place = _option(  # noqa: RUF009 (it is a dataclasses.field)
        "CACHE_DIR",
        "./cache",
        _place,
        "STORE",
        "a folder, memory:, postgres://..., s3://bucket or sqlite:FILE",
    )
    dns: tuple[Url, ...] = _option(
        "DNS_SERVER",
        "",
        parse_dns,
        "SERVERS",
        "whom to ask for addresses, by commas: IP[:port], udp://, tcp://, tls://, https://, quic://",
    )
    evict_private: bool = _option(
        "GOPROXY_EVICT_PRIVATE",
        "false",
        _switch,
        "",
        "let -max-size take modules away that no public upstream can bring back",
    )
    exclude: tuple[str, ...] = _option(
        "GOPROXY_EXCLUDE", "", parse_globs, "GLOBS", "module paths that always answer 404"
    )
    generate: tuple[Recipe, ...] = _option(
        "GOPROXY_GENERATE",
        "",
        _recipes,
        "RULES",
        "GLOB=COMMAND: run once in each public version; the result goes to -modules",
    )
    host: str = _option(
        "GOPROXY_HOST", "", _host, "ADDRESS", "listen on it: name, IP or unix:/path (default: all)"
    )
    log_format: str = _option(
        "GOPROXY_LOG_FORMAT", "text", _one_of("text", "json"), "FORMAT", "text or json"
    )
    max_size: int | None = _option(
        "GOPROXY_MAX_SIZE",
        "",
        _size,
        "SIZE",
        "of the store, as 50GB: versions least recently asked for go first (memory: 1GB if unset)",
    )
    min_age: float = _option(
        "GOPROXY_MIN_AGE", "0", _seconds, "TIME", "public versions younger than this are refused"
    )
    min_age_exempt: tuple[str, ...] = _option(
        "GOPROXY_MIN_AGE_EXEMPT", "", parse_globs, "GLOBS", "modules of any age"
    )
    modules: tuple[str, ...] = _option(
        "GOPROXY_MODULES",
        "",
        _folders,
        "FOLDERS",
        "modules of our own, by commas, each laid out as the cache; what they have wins",
    )
    offline: bool = _option("GOPROXY_OFFLINE", "false", _switch, "", "answer from the store alone")
    port: int = _option("PORT", "12345", _port, "PORT", "listen on it; 0 picks a free one")
    private: tuple[str, ...] = _option(
        "GOPROXY_PRIVATE",
        "",
        parse_globs,
        "GLOBS",
        "module paths that come from version control alone, as in GOPRIVATE",
    )
    private_auth: str = _option(
        "GOPROXY_PRIVATE_AUTH",
        "server",
        _one_of("client", "server"),
        "WHOSE",
        "credentials for private modules: the server's, or each client's own",
    )
    proxy: Url | None = _option(  # noqa: RUF009 (it is a dataclasses.field)
        "HTTP_PROXY,HTTPS_PROXY,SOCKS5_PROXY",
        "",
        parse_proxy,
        "URL",
        "the way out: http://, socks5:// or socks5h://[user:password@]host[:port]",
    )
    public_url: Url | None = _option(  # noqa: RUF009 (it is a dataclasses.field)
        "GOPROXY_PUBLIC_URL", "", _base_url, "URL", "where clients reach us, for go-import pages"
    )
    quiet: bool = _option("GOPROXY_QUIET", "false", _switch, "", "no log line per request")
    read_ahead: bool = _option(
        "GOPROXY_READ_AHEAD", "true", _switch, "", "fetch what the client will ask next"
    )
    recheck: float = _option(
        "GOPROXY_RECHECK",
        "off",
        _period,
        "TIME",
        "how often to ask the upstream again about each stored module",
    )
    recheck_removes: tuple[str, ...] = _option(
        "GOPROXY_RECHECK_REMOVES",
        "deleted",
        _removes,
        "WORDS",
        "which of them to move aside: any of deleted, retracted, deprecated; or none",
    )
    registry: Url | None = _option(  # noqa: RUF009 (it is a dataclasses.field)
        "GOPROXY_REGISTRY",
        "",
        _registry_url,
        "URL",
        "container registry behind /v2/: http(s)://host",
    )
    registry_blobs: LayersPlace | None = _option(  # noqa: RUF009 (it is a dataclasses.field)
        "GOPROXY_REGISTRY_BLOBS",
        "",
        _layers_place,
        "BUCKET",
        "where its layers are kept, and clients sent for them: s3://bucket",
    )
    registry_preserve_host: bool = _option(
        "GOPROXY_REGISTRY_PRESERVE_HOST",
        "false",
        _switch,
        "",
        "show the registry the Host that the client has asked for, not its own",
    )
    sumdb: tuple[SumDbName, ...] = _option(
        "GOPROXY_SUMDB",
        "sum.golang.org",
        _sumdbs,
        "NAMES",
        "checksum databases to proxy: NAME, 'NAME URL' or 'NAME+HASH+KEY URL', by commas; or off",
    )
    tls_cert: str = _option(
        "GOPROXY_TLS_CERT", "", _file, "FILE", "serve HTTPS with this certificate chain (PEM)"
    )
    tls_key: str = _option(
        "GOPROXY_TLS_KEY", "", _file, "FILE", "its private key, without a password (default: there)"
    )
    trace: Url | None = _option(  # noqa: RUF009 (it is a dataclasses.field)
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        _base_url,
        "URL",
        "an OpenTelemetry collector for traces: OTLP/HTTP, sent to URL/v1/traces as JSON",
    )
    ttl: float = _option(
        "GOPROXY_TTL",
        "60s",
        _seconds,
        "TIME",
        "how long list, @latest and branch answers are fresh",
    )
    upstream: tuple[Hop, ...] = _option(
        "UPSTREAM_PROXY",
        "https://proxy.golang.org",
        _upstreams,
        "LIST",
        "GOPROXY syntax: http(s)://, file://, direct, off; ',' moves on at 404, '|' at any error",
    )
    vanity: tuple[Vanity, ...] = _option(
        "GOPROXY_VANITY",
        "",
        _vanities,
        "RULES",
        "go-import pages: PREFIX=mod (from here) or 'PREFIX=git URL', by commas",
    )
    vcs: tuple[VcsRule, ...] = _option(
        "GOPROXY_VCS",
        "",
        _vcs_rules,
        "RULES",
        "where repositories are: GLOB=URL, by commas; {path} is the root's path",
    )
    vcs_auth: str = _option(
        "GOPROXY_VCS_AUTH",
        "",
        str,
        "FILE",
        "credentials for version control; the variable may hold the lines themselves",
    )
    verify: bool = _option(
        "GOPROXY_VERIFY", "true", _switch, "", "compare what is fetched with the checksum database"
    )
    workers: int = _option(
        "GOPROXY_WORKERS", str(_WORKERS), _workers, "COUNT", "processes that serve"
    )
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # by Argument

    @property
    def upstream_text(self) -> str:
        """The upstream list as it was written, without credentials."""
        marks = ["|" if hop.any_error else "," for hop in self.upstream]
        return "".join(f"{hop}{mark}" for hop, mark in zip(self.upstream, marks))[:-1]

    @property
    def dns_text(self) -> str:
        return ",".join(map(str, self.dns))

    @classmethod
    def load(
        cls,
        argv: Sequence[str],
        environ: Mapping[str, str],
        usage: str = "",
        text: str = "",
        arguments: Sequence[Argument] = (),
    ) -> Settings:
        """Reads flags and variables; a variable that is set wins over its flag, but for -dns and
        -proxy. Raises UsageError; -help and -version print and raise SystemExit."""
        parser = _parser(usage, text)
        own = parser.add_argument_group("of this command alone")
        for argument in arguments:
            _add_argument(own, argument)
        flags = parser.read(argv)
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        before = {name: told for name, told in _of_bloblo(environ).items() if name not in environ}
        environ = {**{name: value for name, (_, value) in before.items()}, **environ}
        for row in _rows():
            origin, value = _told(row, flags[row.name], environ)
            origin = before[origin][0] if origin in before else origin
            if origin:
                values[row.name] = _parsed(row, value, origin)
                origins[row.name] = origin
        given = {each.name: flags[each.name] for each in arguments}
        return cls(origins=origins, given=given, **values)


def _add_argument(parser: argparse._ArgumentGroup, argument: Argument) -> None:
    name, help_text, default = argument
    if name.endswith("..."):
        parser.add_argument(name, nargs="*", default=[], metavar=name[:-3], help=help_text)
    elif not name.startswith("-"):
        parser.add_argument(
            name, nargs=None if default is None else "?", default=default, help=help_text
        )
    elif default is False:
        parser.add_argument(name, dest=name, action="store_true", help=help_text)
    else:
        parser.add_argument(
            name,
            dest=name,
            required=default is None,
            default=default,
            metavar=name[1:].upper(),
            help=help_text,
        )


def _rows() -> list[dataclasses.Field[Any]]:
    return [row for row in dataclasses.fields(Settings) if row.metadata]


def _flag(name: str) -> str:
    return "-" + name.replace("_", "-")


_FLAG_WINS = ("dns", "proxy")  # their variables are often set for other programs
_PROXY_SCHEMES = {"HTTP_PROXY": "http://", "HTTPS_PROXY": "http://", "SOCKS5_PROXY": "socks5://"}


def _told(
    row: dataclasses.Field[Any], flag: str | None, environ: Mapping[str, str]
) -> tuple[str, str]:
    """Where the value of a setting comes from, and its text; both empty if nobody gives one."""
    names = row.metadata["variable"].split(",")
    variable = next((name for name in names if _variable(name, environ)), "")
    if flag is not None and (row.name in _FLAG_WINS or not variable):
        return _flag(row.name), flag
    text = _variable(variable, environ)
    return (variable if environ.get(variable) else variable.lower()), text


def _variable(name: str, environ: Mapping[str, str]) -> str:
    """The text of a variable. Those of proxies may be in lower case, as other programs have them,
    and without a scheme."""
    if name not in _PROXY_SCHEMES:
        return environ.get(name, "")
    text = environ.get(name) or environ.get(name.lower(), "")
    return text if "://" in text or not text else _PROXY_SCHEMES[name] + text


def _parsed(row: dataclasses.Field[Any], text: str, origin: str) -> Any:
    try:
        return row.metadata["parse"](text)
    except ValueError as error:
        shown = mask(text).encode("unicode_escape").decode()
        raise UsageError(f"{origin}={shown}: {error}") from None


def _of_bloblo(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What the variables of bloblo, in whose place -registry may be put, say as ours: by our name
    theirs and the value."""
    host, _, port = environ.get("BLOBLO_LISTEN_ADDR", "").rpartition(":")
    bucket = environ.get("BLOBLO_S3_BUCKET_NAME", "")
    local = environ.get("BLOBLO_USE_LOCALSTACK", "").lower() in ("1", "t", "true")
    query = "?endpoint=http://localhost:4566&region=us-east-1" if local else ""
    rows = {
        "GOPROXY_HOST": ("LISTEN_ADDR", host),
        "GOPROXY_REGISTRY": ("UPSTREAM_URL", environ.get("BLOBLO_UPSTREAM_URL", "").rstrip("/")),
        "GOPROXY_REGISTRY_BLOBS": ("S3_BUCKET_NAME", f"s3://{bucket}{query}" if bucket else ""),
        "GOPROXY_REGISTRY_PRESERVE_HOST": (
            "PRESERVE_HOST",
            environ.get("BLOBLO_PRESERVE_HOST", ""),
        ),
        "PORT": ("LISTEN_ADDR", port),
    }
    return {ours: (f"BLOBLO_{name}", value) for ours, (name, value) in rows.items() if value}


def likeness(word: str, words: Iterable[str]) -> str:
    """A question after a word that is none of these, if it is like one."""
    found = importlib.import_module("difflib").get_close_matches(word, words, 1, 0.7)
    return f" (did you mean {found[0]}?)" if found else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; goproxy.py -help lists the flags")

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """What was given, by name. No flag is cut short, which argparse would take."""
        words = [word[1:] if re.match("--[a-z]", word) else word for word in argv]
        for word in words:
            name, known = word.partition("=")[0], self._option_string_actions
            if re.match("-[a-z]", name) and name not in known:
                self.error(f"{name} is no flag{likeness(name, known)}")
        return vars(self.parse_intermixed_args(words))


def _parser(usage: str, text: str) -> _Parser:
    """Flags in Go's manner: -flag value, -flag=value and --flag value."""
    parser = _Parser(
        prog="goproxy.py",
        usage=usage,
        description=f"{text}\nA variable that is set wins over its flag, but for -dns and -proxy.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        conflict_handler="resolve",  # -version of a command may mean something else
    )
    for row in _rows():
        meta = row.metadata
        default = f" (default {meta['default']})" if meta["default"] not in ("", "false") else ""
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if meta["parse"] is _switch else {}
        parser.add_argument(
            _flag(row.name),
            metavar=meta["metavar"] or "BOOL",
            help=f"{meta['text']}{default} [{meta['variable']}]".replace("%", "%%"),
            **switch,
        )
    parser.add_argument("-h", "-help", action="help", help="print this and exit")
    parser.add_argument("-version", action="version", version=__version__, help="print it and exit")
    return parser


# =============================================================================
# 4. Artifacts: what is asked for and what may be kept
# =============================================================================

MAX_INFO = 64 << 10
_MAX_BRACKETS = 100  # in an .info file; real ones have two
MAX_GO_MOD = 16 << 20
MAX_LICENSE = 16 << 20
MAX_ZIP = 500 << 20  # of the file, and of all it holds (x/mod/zip)
_MAX_ENTRIES = 1_000_000
_MAX_FILES = 250_000  # of a zip that is made here, each of 2 KiB if it is as large as it may be
_MAX_DIRECTORY = 64 << 20  # bounds the memory that names can take
_CHUNK = 256 << 10
_SECTOR = 4 << 10


class Artifact(NamedTuple):
    """One immutable file of a module version, named unescaped; `kind` is info, mod or zip."""

    path: str
    version: str
    kind: str

    @property
    def name(self) -> str:
        """URL path and storage key. Raises BadName."""
        return f"{escape_path(self.path)}/@v/{escape_version(self.version)}.{self.kind}"


_STORED_NAME = re.compile(r"(.+)/@v/([^/]+)\.(info|mod|zip|ziphash)")


def stored_artifact(name: str) -> Artifact | None:
    """What of a version a stored name is, with ziphash as a fourth kind; None for what belongs to
    no version: lists, answers to queries, checksum records."""
    found = _STORED_NAME.fullmatch(name)
    if not found:
        return None
    try:
        path, version = unescape_path(found[1]), unescape_version(found[2])
    except BadName:
        return None
    return Artifact(path, version, found[3]) if is_canonical(version) else None


class Info(NamedTuple):
    """A checked .info file: `time` is RFC 3339 or "", `raw` the bytes as they came."""

    version: str
    time: str
    raw: bytes


def read_info(raw: bytes, want: str | None = None) -> Info:
    """Check an .info file, which must be about the version `want` if that is given.

    Keys are matched as Go's encoding/json does: case-insensitive, null ignored, the last one wins.
    Raises BadUpstream.
    """
    if len(raw) > MAX_INFO:
        raise BadUpstream(f"info file too large (max size is {MAX_INFO} bytes)")
    fields = _json_object(raw)
    version, moment = fields.get("version", ""), fields.get("time", "")
    if not isinstance(version, str) or not is_canonical(version):
        raise BadUpstream("info file has no valid Version")
    if want not in (None, version):
        raise BadUpstream(f"got info for version {quoted(version)} instead of requested version")
    if not isinstance(moment, str) or ("time" in fields and seconds_of(moment) is None):
        raise BadUpstream("info file has a malformed Time")
    if not isinstance(fields.get("origin", {}), dict):
        raise BadUpstream("info file has a malformed Origin")
    return Info(version, moment, raw)


def _json_object(raw: bytes) -> dict[str, Any]:
    # Deep nesting can overflow the C stack of a thread before Python notices. Numbers are read as
    # floats because int() is slow, or refuses, when there are very many digits.
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS:
        raise BadUpstream("info file is too deeply nested")
    decoder = json.JSONDecoder(
        object_pairs_hook=_last_values, parse_int=float, parse_constant=_no_constant
    )
    try:
        value = decoder.decode(raw.decode())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadUpstream("info file is not a JSON object")
    return value


def _last_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {fold(key): value for key, value in pairs if value is not None}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_RFC3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.[0-9]+)?"
    r"(?:Z|[-+](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)


def seconds_of(moment: str) -> float | None:
    """Seconds since the epoch of an RFC 3339 time, None for what is none."""
    found = _RFC3339.fullmatch(moment)
    if not found:
        return None
    year, month, day, hour, minute, second = map(int, found.groups())
    try:
        # Go has a year 0, a leap year, and Python has not.
        datetime.datetime(year or 4, month, day, hour, minute, second)
    except ValueError:
        return None
    zone = "+0000" if moment.endswith("Z") else moment[-6:].replace(":", "")
    shift = int(zone[:3]) * 3600 + int(zone[0] + zone[3:]) * 60
    return calendar.timegm((year or 1, month, day, hour, minute, second)) - shift


# A string in double quotes as strconv.Unquote reads it; Python's unicode_escape knows all of these.
_GO_STRING = re.compile(
    r'"([^"\\]*(?:\\(?:[abfnrtv\\"]|[0-3][0-7]{2}|x[0-9A-Fa-f]{2}|u(?![Dd][89A-Fa-f])[0-9A-Fa-f]{4}'
    r'|U00(?:0[0-9A-Fa-f]|10)[0-9A-Fa-f]{4})[^"\\]*)*)"'
)
_MAX_QUOTED = 64 << 10  # bounds what the expression can cost


def check_go_mod(raw: bytes) -> None:
    """Raise BadUpstream unless `raw` can be a go.mod: not too large, with a module line.

    `module (` counts: cmd/go reads the path from the block, and only cmd/go has to.
    """
    if len(raw) > MAX_GO_MOD:
        raise BadUpstream(f"go.mod file too large (max size is {MAX_GO_MOD} bytes)")
    if not module_path(raw):
        raise BadUpstream("parsing go.mod: missing module line")


def module_path(raw: bytes) -> str:
    """The path in the first module line of a go.mod, "" if there is none (modfile.ModulePath).

    Only ASCII blanks separate: the parser of cmd/go takes no others either.
    """
    for line in io.BytesIO(raw):
        words = line.partition(b"//")[0].strip()
        path = words[len(b"module") :].strip()
        if words.startswith(b"module") and path and words[len(b"module")] in b" \t\v\f\r":
            return _unquote(path.decode(errors="replace"))
    return ""


def _unquote(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1] if len(text) > 1 and text.find("`", 1) == len(text) - 1 else ""
    if not text.startswith('"'):
        return text
    found = _GO_STRING.fullmatch(text) if len(text) <= _MAX_QUOTED else None
    return found[1].encode("latin-1", "backslashreplace").decode("unicode_escape") if found else ""


_NOT_A_ZIP = "zip: not a valid zip file"


class _Archive:
    """The bytes of a zip file: read anywhere, in large steps where one place follows another."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = file.seek(0, io.SEEK_END)
        self._file = file
        self._start = 0  # of what is held
        self._held = b""
        self._left = MAX_ZIP

    def at(self, start: int, length: int) -> bytes:
        """So many bytes, which should be few, from an offset; fewer at the end of the file."""
        found = self._some(start, length)
        while len(found) < length:
            more = self._some(start + len(found), length - len(found))
            if not more:
                break
            found += more
        return found

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The data between two offsets, or up to the end of the file. Raises ValueError when more
        has been read than a file may be long: entries that share bytes cost no more than others."""
        while start < stop:
            piece = self._some(start, stop - start)
            if not piece:
                return
            self._left -= len(piece)
            if self._left < 0:
                raise ValueError("zip: entries overlap")
            start += len(piece)
            yield piece

    def _some(self, start: int, most: int) -> bytes:
        skip = start - self._start
        if not 0 <= skip < len(self._held):
            if not 0 <= start < self.size:
                return b""
            self._file.seek(start)
            self._held = self._file.read(_CHUNK if skip == len(self._held) else _SECTOR)
            self._start, skip = start, 0
        return self._held[skip : skip + most]


# Layouts of the records of a zip file (APPNOTE.TXT 4.3), each with its signature first.
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF
_INT64 = 1 << 63
_END_WITHIN = 65 << 10  # bytes at the end of the file
_DESCRIBED = 0x8  # flag: the CRC follows the data once more


class _Directory(NamedTuple):
    """Where the central directory starts, how many entries it says it has, and what to add to
    their offsets."""

    entries: int
    start: int
    base: int


class _Entry(NamedTuple):
    """One entry of the central directory."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int

    @property
    def is_folder(self) -> bool:
        return self.name.endswith(b"/")


def check_zip(file: BinaryIO, path: str, version: str) -> str:
    """Check a module zip and return its h1: hash, as in go.sum. `file` must be seekable.

    Refuses what zip.CheckZip or zip.Unzip of x/mod refuses, and reads every file as archive/zip
    does (Go: archive/zip/reader.go), from where the central directory says; what else is in the
    file is nobody's. Beyond that it refuses what costs too much: more than a million entries, 64
    MiB of directory, or 500 MiB of packed data. Reads the directory twice and the data once, in
    pieces. Raises BadUpstream, and BadName for a bad path or version.
    """
    check_module(path, version)
    archive, data = _Archive(file), _Archive(file)  # two places that are read in turn
    directory = _find_directory(archive)
    _check_names(_entries(archive, directory), f"{path}@{version}/".encode())
    return _hash1((each.name, _check_entry(data, each)) for each in _entries(archive, directory))


def mod_in_zip(file: BinaryIO, path: str, version: str) -> bytes:
    """The go.mod of a module zip, or the one that cmd/go makes where there is none (cmd/go:
    modfetch/coderepo.go, legacyGoMod). Raises BadUpstream."""
    archive = _Archive(file)
    name = f"{path}@{version}/go.mod".encode()
    entries = _entries(archive, _find_directory(archive))
    entry = next((each for each in entries if each.name == name), None)
    if not entry:
        return f"module {path}\n".encode()
    if entry.size > MAX_GO_MOD:
        raise BadUpstream(f"go.mod file too large (max size is {MAX_GO_MOD} bytes)")
    try:
        return b"".join(_unpacked(archive, entry, _body(archive, entry)))
    except (ValueError, zlib.error) as error:
        raise BadUpstream(f"go.mod: {error}") from None


def unpack_zip(file: BinaryIO, path: str, version: str, folder: str) -> None:
    """The files of a zip that check_zip has passed, below a folder. Raises OSError."""
    archive = _Archive(file)
    prefix = len(f"{path}@{version}/")
    for entry in _entries(archive, _find_directory(archive)):
        target = os.path.join(folder, *entry.name.decode()[prefix:].split("/"))
        if not entry.is_folder:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as sink:
                sink.writelines(_unpacked(archive, entry, _body(archive, entry)))


def imports_in_zip(file: BinaryIO, path: str, version: str, packages: Iterable[str]) -> set[str]:
    """The packages outside a module that those named, and what these import within it, import on
    linux/amd64, as import paths; without names, the package at the root, or if there is none all
    that anybody may import. For guesses: reads leniently, the heads of at most 1,000 files, and
    finds hardly more than 5,000. `file` is one that check_zip has passed. Raises BadUpstream.
    """
    archive = _Archive(file)
    folders: dict[str, list[_Entry]] = {}
    entries = _entries(archive, _find_directory(archive))
    for entry in itertools.islice(entries, _MOST_ENTRIES):
        name = entry.name.decode(errors="replace")[len(f"{path}@{version}") :]
        if name.endswith(".go") and not _FOREIGN.search(name, name.rfind("/")):
            folders.setdefault(path + name.rpartition("/")[0], []).append(entry)
    public = [one for one in folders if not _NOT_IMPORTED & {*one[len(path) :].split("/")}]
    todo = [*packages] or [one for one in public if one == path] or public
    seen, left = {*todo}, _MOST_SOURCES
    found: set[str] = set()
    while todo and left > 0 and len(found) < _MOST_IMPORTS:
        sources = folders.get(todo.pop(), [])[:left]
        left -= len(sources)
        new = {one for entry in sources for one in _imports(archive, entry)} - seen
        todo += new & {*folders}
        found |= new - {*folders}
        seen |= new
    return found


_MOST_ENTRIES, _MOST_SOURCES, _MOST_IMPORTS = 20_000, 1000, 5000
_MOST_HEAD, _MOST_OF_ONE = 16 << 10, 200  # bytes and imports of a file
_FOREIGN = re.compile(
    r"_(386|aix|android|arm|darwin|dragonfly|freebsd|illumos|ios|js|loong|mips|netbsd|openbsd|plan9"
    r"|ppc64|riscv64|s390x|solaris|test|wasip1|wasm|windows)(64)?(le)?[_.]"
)
_NOT_IMPORTED = {"cmd", "example", "examples", "internal", "test", "testdata", "tests", "vendor"}
_GO_COMMENT = re.compile(rb"//[^\n]*|/\*.*?(?:\*/|\Z)", re.S)
_GO_IMPORTS = re.compile(
    rb"\s*package\s+(?!main\b)\w+[\s;]*((?:import\b(?:\s*\([^)]*(?:\)|\Z)|[^\n;]*)[\s;]*)*)"
)
_GO_BUILD = re.compile(rb"^//go:build([^\n]*)", re.M)
_BUILT = re.compile(r"linux|amd64|unix|gc|go1\..*")


def _imports(archive: _Archive, entry: _Entry) -> set[str]:
    """What a source file imports of other modules or its own; nothing where it is not as usual."""
    try:
        head = archive.at(_body(archive, entry), min(entry.packed, _MOST_HEAD))
        if entry.method:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, _MOST_HEAD)
    except (ValueError, zlib.error):
        return set()
    constraint = _GO_BUILD.search(head)
    found = _GO_IMPORTS.match(_GO_COMMENT.sub(b" ", head))
    if not found or (constraint and not _is_built(constraint[1].decode(errors="replace"))):
        return set()
    paths = re.findall(r'"([^"\s]+)"', found[1].decode(errors="replace"))
    return {one for one in paths[:_MOST_OF_ONE] if "." in one.partition("/")[0]}


def _is_built(constraint: str) -> bool:
    """Whether a build constraint holds on linux/amd64, nearly: parentheses are passed over."""
    ways = re.sub(r"[\s()]", "", constraint).split("||")
    return any(all(_holds(term) for term in way.split("&&")) for way in ways)


def _holds(term: str) -> bool:
    return bool(_BUILT.fullmatch(term.lstrip("!"))) != term.startswith("!")


def _find_directory(archive: _Archive) -> _Directory:
    size = archive.size
    if size > MAX_ZIP:
        raise BadUpstream(f"module zip file is too large ({size} bytes; limit is {MAX_ZIP} bytes)")
    tail = archive.at(max(0, size - _END_WITHIN), _END_WITHIN)
    found = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size + 4))
    if found < 0:
        raise BadUpstream(_NOT_A_ZIP)
    end = size - len(tail) + found
    *_, count, length, offset, comment = _END.unpack_from(tail, found)
    if end + _END.size + comment > size:
        raise BadUpstream(_NOT_A_ZIP)
    # A length of 0xFFFF is odd, but archive/zip has it, and both must find the same directory.
    if _MAX16 in (count, length) or offset == _MAX32:
        end, count, length, offset = _find_directory64(archive, end, (end, count, length, offset))
    return _placed(archive, end, count, length, offset)


def _find_directory64(
    archive: _Archive, end: int, small: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    at = end - _END64_LOCATOR.size
    if at < 0:
        return small
    signature, disk, end, disks = _END64_LOCATOR.unpack(archive.at(at, _END64_LOCATOR.size))
    if (signature, disk, disks) != (b"PK\6\7", 0, 1) or end >= _INT64:
        return small
    record = archive.at(end, _END64.size)
    if len(record) < _END64.size or not record.startswith(b"PK\6\6"):
        raise BadUpstream(_NOT_A_ZIP)
    *_, count, length, offset = _END64.unpack(record)
    return end, count, length, offset


def _placed(archive: _Archive, end: int, count: int, length: int, offset: int) -> _Directory:
    start = end - length
    if max(length, offset) >= _INT64 or not 0 <= start < archive.size:
        raise BadUpstream(_NOT_A_ZIP)
    # Bytes before the archive shift all offsets; but some writers' lengths are wrong instead.
    if offset < start and _read_entry(archive, offset):
        start = offset
    return _Directory(count, start, start - offset)


def _entries(archive: _Archive, directory: _Directory) -> Iterator[_Entry]:
    """Raises BadUpstream for a wrong count, of which archive/zip compares the low 16 bits."""
    at, count = directory.start, 0
    while found := _read_entry(archive, at, directory.base):
        entry, at = found
        count += 1
        if count > _MAX_ENTRIES or at - directory.start > _MAX_DIRECTORY:
            raise BadUpstream(f"module zip file has too many entries (limit is {_MAX_ENTRIES})")
        yield entry
    if (count - directory.entries) & _MAX16 or _is_cut(archive, at):
        raise BadUpstream(_NOT_A_ZIP)


def _is_cut(archive: _Archive, at: int) -> bool:
    # Where the file ends at the border of a record, archive/zip refuses it; inside one it stops.
    head = archive.at(at, _CENTRAL.size)
    at_border = at + _CENTRAL.size == archive.size and head.startswith(b"PK\1\2")
    return not head or (at_border and any(head[28:34]))


def _read_entry(archive: _Archive, at: int, base: int = 0) -> tuple[_Entry, int] | None:
    """The entry at an offset and where it ends, or None if there is none."""
    head = archive.at(at, _CENTRAL.size)
    if len(head) < _CENTRAL.size or not head.startswith(b"PK\1\2"):
        return None
    # Of the fields, those not named here are versions, times, disk numbers and file modes.
    (_, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length,
     comment_length, _, _, _, offset) = _CENTRAL.unpack(head)  # fmt: skip
    at += _CENTRAL.size
    words = archive.at(at, name_length + extra_length)
    at += name_length + extra_length + comment_length
    if at > archive.size:
        return None
    if _MAX32 in (size, packed, offset):
        widened = _widened(words[name_length:], (size, packed, offset))
        if not widened:
            return None
        size, packed, offset = widened
    return _Entry(words[:name_length], flags, method, crc, packed, size, base + offset), at


def _widened(extra: bytes, values: tuple[int, int, int]) -> Sequence[int] | None:
    # Zip64: each field that is all ones has its value in the extra field, in this order. Without
    # that field, archive/zip takes a size, and no more, to be meant.
    wide = _zip64_field(extra)
    if wide is None:
        return None if _MAX32 in values[1:] else values
    longs = struct.iter_unpack("<Q", wide)
    found = [next(longs, (-1,))[0] if value == _MAX32 else value for value in values]
    return None if -1 in found else found


def _zip64_field(extra: bytes) -> bytes | None:
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if at + length > len(extra):
            break
        if tag == 1:
            return extra[at : at + length // 8 * 8]
        at += length
    return None


def _check_names(entries: Iterable[_Entry], prefix: bytes) -> None:
    names = []
    left = MAX_ZIP
    for entry in entries:
        if not entry.name.startswith(prefix):
            reason = f"path does not have prefix {quoted(prefix.decode())}"
            raise BadUpstream(f"{_shown(entry.name)}: {reason}")
        name = entry.name[len(prefix) :]
        if name:
            names.append(name)
            left -= _check_name(entry, name)
        if left < 0:
            limit = f"max size is {MAX_ZIP} bytes"
            raise BadUpstream(f"total uncompressed size of module contents too large ({limit})")
    _check_collisions(names)


def _shown(name: bytes) -> str:
    return quoted(name.decode(errors="replace"))[1:-1]


def _check_name(entry: _Entry, name: bytes) -> int:
    """Raise BadUpstream unless the file may be in a module; return its size."""
    try:
        text = name.decode()
        directory = text.endswith("/")
        _check_clean(text[:-1] if directory else text)
        if directory:
            return 0
        _check_special(text, entry.size)
    except UnicodeDecodeError:
        raise BadUpstream(f"{_shown(entry.name)}: malformed file path: invalid UTF-8") from None
    except (BadName, ValueError) as error:
        raise BadUpstream(f"{_shown(entry.name)}: {error}") from None
    return entry.size


_UNCLEAN = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)")


def _check_clean(name: str) -> None:
    if _UNCLEAN.search(name):
        raise ValueError("file path is not clean")
    check_file_path(name)


_LIMITS = {
    "LICENSE": MAX_LICENSE,
    "go.mod": MAX_GO_MOD,
}


def _check_special(name: str, size: int) -> None:
    folder, _, base = name.rpartition("/")
    if fold(base) == "go.mod" and folder:
        raise ValueError("go.mod file not in module root directory")
    if fold(base) == "go.mod" != base:
        raise ValueError("go.mod files must have lowercase names")
    limit = _LIMITS.get(name, size)
    if size > limit:
        raise ValueError(f"{name} file too large (max size is {limit} bytes)")


def _check_collisions(names: list[bytes]) -> None:
    # Sorted by folded elements, names that share a folded folder are neighbours, a file comes just
    # before what lies below a folder of its name, and so comparing neighbours finds every clash.
    names.sort(key=lambda name: fold(name.decode()).replace("/", "\0").encode())
    for left, right in zip(names, itertools.islice(names, 1, None)):
        _check_neighbours(left.decode(), right.decode())


def _check_neighbours(left: str, right: str) -> None:
    for ours, theirs in zip(left.split("/"), right.split("/")):
        if ours != theirs:
            if fold(ours) != fold(theirs):
                return
            names = f"{quoted(left)} and {quoted(right)}"
            raise BadUpstream(f"case-insensitive file name collision: {names}")
    if left == right and not left.endswith("/"):
        raise BadUpstream(f"multiple entries for file {quoted(left)}")
    if left != right:
        raise BadUpstream(f"entry {quoted(left)} is both a file and a directory")


def _check_entry(archive: _Archive, entry: _Entry) -> bytes:
    """The SHA-256 of what an entry holds."""
    try:
        body = _body(archive, entry)
        digest = _check_data(_unpacked(archive, entry, body), entry)
        if entry.flags & _DESCRIBED and not entry.is_folder:
            _check_descriptor(archive.at(body + entry.packed, _DESCRIPTOR), entry)
    except (ValueError, zlib.error) as error:
        raise BadUpstream(f"{_shown(entry.name)}: {error}") from None
    return digest


def _body(archive: _Archive, entry: _Entry) -> int:
    # Of the local header its length counts alone: what it says beside is in the directory too.
    head = archive.at(entry.offset, _LOCAL.size)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
        raise ValueError(_NOT_A_ZIP)
    lengths: tuple[int, int] = _LOCAL.unpack(head)[-2:]
    return entry.offset + _LOCAL.size + sum(lengths)


def _stored(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return pieces


def _inflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for piece in pieces:
        data = inflater.decompress(piece, _CHUNK)
        while data:
            yield data
            data = inflater.decompress(inflater.unconsumed_tail, _CHUNK)
        if inflater.eof:
            return
    raise ValueError("unexpected EOF")


_METHODS = {
    0: _stored,
    8: _inflated,
}


def _unpacked(archive: _Archive, entry: _Entry, body: int) -> Iterator[bytes]:
    if entry.is_folder:  # whatever it says: jar of Java gives it an empty deflate stream
        return iter(())
    if entry.method not in _METHODS:
        raise ValueError("zip: unsupported compression algorithm")
    return _METHODS[entry.method](archive.pieces(body, body + entry.packed))


def _check_data(pieces: Iterator[bytes], entry: _Entry) -> bytes:
    digest, crc, left = hashlib.sha256(), 0, entry.size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise ValueError(f"uncompressed size is larger than declared size ({entry.size} bytes)")
        crc = zlib.crc32(piece, crc)
        digest.update(piece)
    if left:
        raise ValueError("unexpected EOF")
    is_told = entry.crc or entry.flags & _DESCRIBED  # archive/zip: 0 may be a writer's "unknown"
    if crc != entry.crc and is_told and not entry.is_folder:
        raise ValueError("zip: checksum error")
    return digest.digest()


_DESCRIPTOR = 16  # with its signature and without it, its sizes of 32 bits


def _check_descriptor(told: bytes, entry: _Entry) -> None:
    crc = told[4:] if told.startswith(b"PK\7\10") else told[:12]
    if len(crc) < 12 or int.from_bytes(crc[:4], "little") != entry.crc:
        raise ValueError("zip: checksum error")


_SHA256 = hashlib.sha256().digest_size


def _hash1(digests: Iterable[tuple[bytes, bytes]]) -> str:
    """The h1: hash of files by name (dirhash.Hash1)."""
    # Name and digest as one bytes object halve the memory of a million files. A line feed is in no
    # name and sorts before all that is, so the order is that of the names.
    lines = sorted(name + b"\n" + digest for name, digest in digests)
    total = hashlib.sha256()
    for line in lines:
        name, digest = line[: -_SHA256 - 1], line[-_SHA256:]
        total.update(digest.hex().encode() + b"  " + name + b"\n")
    return "h1:" + base64.b64encode(total.digest()).decode()


TILE_WIDTH = 256  # hashes in a full tile
HASH_SIZE = 32  # bytes


class Tile(NamedTuple):
    """A stretch of the hashes of a checksum database's tree (x/mod/sumdb/tlog, of height 8): the
    first `width` of those from 256 * `number` on, each over 256**`level` records."""

    level: int
    number: int
    width: int

    @property
    def name(self) -> str:
        """Its path below the database."""
        groups = [f"{self.number % 1000:03}"]
        rest = self.number // 1000
        while rest:
            groups.insert(0, f"x{rest % 1000:03}")
            rest //= 1000
        part = f".p/{self.width}" if self.width < TILE_WIDTH else ""
        return f"tile/8/{self.level}/{'/'.join(groups)}{part}"


def edge_tiles(size: int) -> list[Tile]:
    """The partial tiles of a tree of `size` records, from its leaves up: they give its hash."""
    counts = [size >> 8 * level for level in range(8)]
    return [
        Tile(n, c // TILE_WIDTH, c % TILE_WIDTH) for n, c in enumerate(counts) if c % TILE_WIDTH
    ]


def proving_tiles(size: int, places: Iterable[tuple[int, int]]) -> list[Tile]:
    """The tiles that prove those at `places` (level and number) to be part of a tree of `size`
    records: the edge, and all between it and them."""
    found = {(tile.level, tile.number): tile for tile in edge_tiles(size)}
    for level, number in places:
        while (level, number) not in found:
            found[level, number] = Tile(level, number, TILE_WIDTH)
            level, number = level + 1, number // TILE_WIDTH
    return list(found.values())


class TreeHead(NamedTuple):
    """How many records a checksum database has, and the hash over all of them."""

    size: int
    hash: bytes


class Record(NamedTuple):
    """A checksum database's answer about a module version: the number of the record in the tree,
    its text of go.sum lines, and the signed note of a tree head that holds it."""

    number: int
    text: bytes
    note: bytes


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _tile_hash(data: bytes) -> bytes:
    """The hash over so many hashes as are a power of two."""
    while len(data) > HASH_SIZE:
        starts = range(0, len(data), 2 * HASH_SIZE)
        pairs = ((data[at : at + HASH_SIZE], data[at + HASH_SIZE : at + 64]) for at in starts)
        data = b"".join(_node(left, right) for left, right in pairs)
    return data


Tiles = Mapping[tuple[int, int], bytes]  # what tiles hold, by level and number


def tree_hash(size: int, tiles: Tiles) -> bytes:
    """The hash of the tree of the first `size` records, from the tiles at its edge (RFC 6962,
    section 2.1)."""
    found = b""
    for level, number, left in edge_tiles(size):
        while left:
            stop, left = left, left & left - 1  # the last of the powers of two that it is made of
            part = _tile_hash(tiles[level, number][left * HASH_SIZE : stop * HASH_SIZE])
            found = _node(part, found) if found else part
    return found or hashlib.sha256(b"").digest()


def check_tiles(head: TreeHead, tiles: Tiles, known: Set[tuple[int, int]] = frozenset()) -> None:
    """Raises Untrusted unless these, which are all of some proving_tiles, belong to the tree, as it
    is known of some."""
    edge = {(tile.level, tile.number) for tile in edge_tiles(head.size)}
    good = edge <= known or tree_hash(head.size, tiles) == head.hash
    for level, number in tiles.keys() - edge - known:
        good = good and _tile_hash(tiles[level, number]) == hash_at(tiles, level + 1, number)
    if not good:
        raise Untrusted("tiles of the checksum database do not fit its tree head")


def hash_at(tiles: Tiles, level: int, index: int) -> bytes:
    """The hash over the records from index * 256**level on."""
    at = index % TILE_WIDTH * HASH_SIZE
    return tiles[level, index // TILE_WIDTH][at : at + HASH_SIZE]


def record_hash(text: bytes) -> bytes:
    """The hash that stands for a record in the tree."""
    return hashlib.sha256(b"\0" + text).digest()


_RECORD = re.compile(rb"(0|[1-9][0-9]{0,17})\n((?:[^\0-\x1f]+\n)+)\n(.*)", re.DOTALL)
_TREE = re.compile(
    rb"go\.sum database tree\n(0|[1-9][0-9]{0,18})\n([A-Za-z0-9+/]{43}=)\n(?:.*\n)?", re.DOTALL
)


def read_record(raw: bytes) -> Record:
    """tlog.ParseRecord. Raises BadUpstream."""
    match = _RECORD.fullmatch(raw)
    if not match:
        raise BadUpstream("malformed record of a checksum database")
    return Record(int(match[1]), match[2], match[3])


def read_tree(text: bytes) -> TreeHead:
    """tlog.ParseTree: the text of a signed note, or all of it. Raises BadUpstream."""
    match = _TREE.fullmatch(text)
    if not match or int(match[1]) >= 1 << 63:
        raise BadUpstream("malformed tree head of a checksum database")
    return TreeHead(int(match[1]), unbase64(match[2].decode()))


_SIGNATURE = re.compile("\u2014 ([^ +]+) (.+)")
_MAX_SIGNATURES = 100


def open_note(note: bytes, verifier: Verifier) -> bytes:
    """The text of a note that is signed by this key (note.Open). Raises Untrusted."""
    text, mark, block = note.rpartition(b"\n\n")
    try:
        lines = block.decode().split("\n")
        clean = not re.search("[\0-\x09\x0b-\x1f]", note.decode())
    except UnicodeDecodeError:
        clean = False
    if not clean or not mark or lines.pop() or len(lines) > _MAX_SIGNATURES:
        raise Untrusted("malformed note of a checksum database")
    found = [_signature(line) for line in lines]
    ours = [sig for name, sig in found if name == verifier.name and sig[:4] == verifier.mark]
    if not ours:
        raise Untrusted("the note of the checksum database is not signed by its key")
    if not is_signed(verifier.key, text + b"\n", ours[0][4:]):
        raise Untrusted("the signature of the checksum database is wrong")
    return text + b"\n"


def _signature(line: str) -> tuple[str, bytes]:
    match = _SIGNATURE.fullmatch(line)
    signature = unbase64(match[2]) if match else b""
    if not match or len(signature) < 5 or any(char.isspace() for char in match[1]):
        raise Untrusted("malformed note of a checksum database")
    return match[1], signature


# Ed25519 (RFC 8032, section 5.1). The standard library has none. Points are (X, Y, Z, T), where
# x = X/Z, y = Y/Z and xy = T/Z. Nothing here is secret, so it may take different times.
_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_ROOT = pow(2, (_P - 1) // 4, _P)  # of -1
_Point = tuple[int, int, int, int]
_NEUTRAL: _Point = (0, 1, 1, 0)


def _plus(one: _Point, other: _Point) -> _Point:
    """Holds for all points, equal ones and those of small order, too."""
    a = (one[1] - one[0]) * (other[1] - other[0]) % _P
    b = (one[1] + one[0]) * (other[1] + other[0]) % _P
    c = 2 * _D * one[3] * other[3] % _P
    d = 2 * one[2] * other[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f % _P, g * h % _P, f * g % _P, e * h % _P)


def _point(encoded: bytes) -> _Point | None:
    """Takes y that is not reduced, and -0 for x, as crypto/ed25519 does for keys."""
    number = int.from_bytes(encoded, "little")
    y, negative = (number & (1 << 255) - 1) % _P, number >> 255
    u, v = (y * y - 1) % _P, (_D * y * y + 1) % _P
    x = u * v**3 * pow(u * v**7 % _P, (_P - 5) // 8, _P) % _P
    if v * x * x % _P == -u % _P:
        x = x * _ROOT % _P
    if v * x * x % _P != u:
        return None
    x = -x % _P if x & 1 != negative else x
    return (x, y, 1, x * y % _P)


_BASE = _point((4 * pow(5, _P - 2, _P) % _P).to_bytes(32, "little")) or _NEUTRAL


def is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether an Ed25519 signature of 64 bytes is right, by the same rules as crypto/ed25519: S is
    reduced, R compared as bytes, and the cofactor not taken away."""
    point = _point(key)
    factor = int.from_bytes(signature[32:], "little")
    if point is None or len(key) != 32 or len(signature) != 64 or factor >= _ORDER:
        return False
    digest = hashlib.sha512(signature[:32] + key + message).digest()
    challenge = int.from_bytes(digest, "little") % _ORDER
    minus = (-point[0] % _P, point[1], point[2], -point[3] % _P)
    table = (_NEUTRAL, _BASE, minus, _plus(_BASE, minus))
    found = _NEUTRAL
    for bit in range(_ORDER.bit_length() - 1, -1, -1):
        found = _plus(found, found)
        found = _plus(found, table[(factor >> bit & 1) + 2 * (challenge >> bit & 1)])
    inverse = pow(found[2], _P - 2, _P)
    x, y = found[0] * inverse % _P, found[1] * inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little") == signature[:32]


class Requirement(NamedTuple):
    """One line of a go.mod: `direct` unless it is marked // indirect."""

    path: str
    version: str
    direct: bool


def hash_of_mod(raw: bytes) -> str:
    """The h1: hash of a go.mod, as in go.sum (modfetch.goModSum)."""
    return _hash1([(b"go.mod", hashlib.sha256(raw).digest())])


class GoMod(NamedTuple):
    """What a go.mod says of other modules. `prunes`: its go line is 1.17 or later, so that the go
    command need not read the go.mod files of what it requires (Go reference, "Graph pruning")."""

    requirements: list[Requirement]
    prunes: bool


class _Directive(NamedTuple):
    """A directive of a go.mod, each line of a block on its own: its verb, the words after it
    (brackets and commas are words), the comment behind it, and `said`: that with what stands before
    it, or else the comment of its block."""

    verb: str
    words: list[str]
    behind: str
    said: str


_GO_MOD_WORD = re.compile(r"[\[\](),]|[^\s\[\](),]+")


def _directives(raw: bytes) -> Iterator[_Directive]:
    """Those of a go.mod, read leniently (Go: x/mod/modfile/read.go)."""
    verb = of_block = ""
    before: list[str] = []
    for line in raw.decode("utf-8", "replace").split("\n"):
        text, mark, comment = line.partition("//")
        behind = comment.strip()
        words = _GO_MOD_WORD.findall(text.replace('"', ""))
        if not words:
            before = [*before, behind] if mark else []
            continue
        said, before = "\n".join([*before, behind] if mark else before), []
        if words == [")"]:
            verb = ""
        elif words[1:] == ["("]:
            verb, of_block = words[0], said
        elif verb:
            yield _Directive(verb, words, behind, said or of_block)
        else:
            yield _Directive(words[0], words[1:], behind, said)


_RELEASES = {
    "go": re.compile(r"1\.[0-9]{1,3}(?:\.[0-9]+|rc[0-9]+)"),
    "toolchain": re.compile(r"go1\.[0-9]{1,3}(?:[.a-z][.0-9a-z]*)?"),
}


def go_release(raw: bytes) -> list[str]:
    """The Go that a go.mod asks for, as go1.25.0: that of its toolchain line, or else of its go
    line where that names a release (Go reference, "Go toolchains"); none before 1.21."""
    found = {
        each.verb: each.words[0].removeprefix("go")
        for each in _directives(raw)
        if each.verb in _RELEASES and _RELEASES[each.verb].fullmatch(" ".join(each.words))
    }
    name = found.get("toolchain") or found.get("go") or "1.0"
    return [f"go{name}"] if int(re.split(r"\D", name)[1]) >= 21 else []


_GO_LINE = re.compile(r"v?1\.([0-9]{1,3})(?![0-9])")


def _minor_version(directive: _Directive) -> int:
    """The 21 of `go 1.21`; 0 for any other directive."""
    found = _GO_LINE.match("".join(directive.words)) if directive.verb == "go" else None
    return int(found[1]) if found else 0


def read_go_mod(raw: bytes) -> GoMod:
    """The requirements of a go.mod; what is not understood is passed over."""
    requirements: list[Requirement] = []
    prunes = False
    for each in _directives(raw):
        prunes = prunes or _minor_version(each) >= 17
        if each.verb == "require" and len(each.words) == 2 and is_canonical(each.words[1]):
            direct = not each.behind.startswith("indirect")
            requirements.append(Requirement(each.words[0], each.words[1], direct))
    return GoMod(requirements, prunes)


def choose_files(sizes: Mapping[str, int | None], go_mod: bytes) -> list[str]:
    """The names of the files that belong into a module zip, of all files below its root with
    their sizes in bytes (None: a link, or something else that is not a regular file). `go_mod` is
    the go.mod at the root, b"" if there is none.

    Nested modules and vendored packages stay out. Raises BadUpstream for a file that no module
    may have, and for too much (zip.Create of x/mod).
    """
    modern = any(_minor_version(each) >= 24 for each in _directives(go_mod))
    nested = {
        name[: -len("go.mod")]
        for name, size in sizes.items()
        if size is not None and fold(name.rpartition("/")[2]) == "go.mod" and "/" in name
    }
    kept = [
        name
        for name in sizes
        if not (_is_vendored(name, modern) or _is_below(name, nested) or name == ".hg_archival.txt")
    ]
    chosen = {name: size for name in kept if (size := sizes[name]) is not None}
    if len(chosen) > _MAX_FILES:
        raise BadUpstream(f"module source tree has more than {_MAX_FILES} files")
    for name in kept:
        _check_chosen(name, chosen.get(name))
    _check_collisions([name.encode() for name in kept])
    if sum(chosen.values()) > MAX_ZIP:
        raise BadUpstream(f"module source tree too large (max size is {MAX_ZIP} bytes)")
    return list(chosen)


def _is_vendored(name: str, modern: bool) -> bool:
    """isVendoredPackage of x/mod/zip. Before Go 1.24 it looked for the second slash from the wrong
    place, which must stay so, because it decides the hash."""
    if modern and name == "vendor/modules.txt":
        return True
    raw = name.encode("utf-8", "surrogateescape")
    at = raw.find(b"/vendor/")
    if raw.startswith(b"vendor/"):
        start = len(b"vendor/")
    elif at >= 0:
        start = len(b"/vendor/") + (at if modern else 0)
    else:
        return False
    return b"/" in raw[start:]


def _is_below(name: str, folders: Set[str]) -> bool:
    """Whether a folder, spelt with a slash at its end, is a parent of the file."""
    ends = (at + 1 for at, char in enumerate(name) if char == "/")
    return bool(folders) and any(name[:end] in folders for end in ends)


def _check_chosen(name: str, size: int | None) -> None:
    try:
        check_file_path(name)
        if name.lower() == "go.mod" or size is not None:
            _check_special(name, size or 0)
    except (BadName, ValueError) as error:
        raise BadUpstream(f"create zip: {quoted(name)[1:-1]}: {error}") from None


class _Sink(io.RawIOBase):
    """Takes what a ZipFile writes; it cannot seek, so that a zip can leave while it grows."""

    def __init__(self) -> None:
        self._data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._data)
        self._data.clear()
        return taken


def zip_pieces(
    path: str, version: str, files: Iterable[FileContent]
) -> Generator[bytes, None, None]:
    """A module zip, piece by piece, never held whole: the same files give the same bytes. The
    files are those that choose_files names, in the order given; pieces may be empty.
    Raises BadName for a bad path or version."""
    check_module(path, version)
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, pieces in files:
            entry = zipfile.ZipInfo(f"{path}@{version}/{name}")
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w") as out:
                for piece in pieces:
                    out.write(piece)
                    yield sink.take()
            archive.NameToInfo.clear()  # which nobody asks here, and there may be many
    yield sink.take()


FileContent = tuple[str, Iterable[bytes]]  # name and pieces


class Writable(Protocol):
    def write(self, data: bytes) -> object:
        """Takes bytes."""


def write_zip(
    out: Writable,
    module: tuple[str, str],
    sizes: Mapping[str, int | None],
    opened: Callable[[str], BinaryIO],
) -> None:
    """Write the zip of a module (path, version) from files below its root: `sizes` as for
    choose_files, `opened` opens one by name. Raises BadName, and BadUpstream in the words of x/mod.
    """
    go_mod = b""
    if sizes.get("go.mod") is not None:
        with opened("go.mod") as file:
            go_mod = file.read(MAX_GO_MOD + 1)
    names = sorted(choose_files(sizes, go_mod))
    contents = ((name, _pieces(opened(name), name, sizes[name] or 0)) for name in names)
    for piece in zip_pieces(*module, contents):
        out.write(piece)


def _pieces(opened: BinaryIO, name: str, size: int) -> Iterator[bytes]:
    with opened as file:
        for piece in iter(functools.partial(file.read, _CHUNK), b""):
            size -= len(piece)
            if size < 0:
                raise BadUpstream(f"file {quoted(name)} is larger than declared size")
            yield piece


class Retraction(NamedTuple):
    """A range of versions, both ends in it, that their author takes back, and why."""

    low: str
    high: str
    reason: str

    def covers(self, version: str) -> bool:
        return precedence(self.low) <= precedence(version) <= precedence(self.high)


class Notices(NamedTuple):
    """What the go.mod of a module's newest version says of the module: why it is deprecated ("" if
    it is not), and what is retracted."""

    deprecated: str
    retractions: list[Retraction]


_DEPRECATION = re.compile(r"(?:^|\n\n)Deprecated: *(.*?)(?:$|\n\n)", re.DOTALL)


def read_notices(raw: bytes) -> Notices:
    """Deprecation and retractions of a go.mod (Go reference, "module directive" and "retract
    directive")."""
    deprecated, retractions = "", list[Retraction]()
    for each in _directives(raw):
        if each.verb == "module":
            found = _DEPRECATION.search(each.said)
            deprecated = found[1].strip() if found else deprecated
        elif each.verb == "retract":
            versions = list(filter(None, map(canonical, each.words)))  # v1 is v1.0.0, as go has it
            if versions:
                retractions.append(Retraction(versions[0], versions[-1], each.said))
    return Notices(deprecated, retractions)


def read_replacements(raw: bytes) -> dict[tuple[str, str], tuple[str, str]]:
    """The replace lines of a go.mod: by path and version ("" for all) the path and version to take
    instead, whose version is "" for a folder."""
    found = {}
    for verb, words, _, _ in _directives(raw):
        at = words.index("=>") if verb == "replace" and "=>" in words else 0
        if at in (1, 2) and len(words) - at in (2, 3):
            old, new = [*words[:at], ""], [*words[at + 1 :], ""]
            found[old[0], old[1]] = (new[0], new[1])
    return found


def read_sums(raw: bytes) -> dict[tuple[str, str], set[str]]:
    """The hashes of a go.sum, by path and version; those of go.mod files stand under
    `VERSION/go.mod`. Raises BadUpstream naming a line that is none of a go.sum."""
    sums: dict[tuple[str, str], set[str]] = {}
    for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
        fields = line.split()
        if len(fields) == 3 and ":" in fields[2]:
            sums.setdefault((fields[0], fields[1]), set()).add(fields[2])
        elif fields:
            raise BadUpstream(f"line {number} is none of a go.sum")
    return sums


class Kind(NamedTuple):
    """What an artifact of a kind may be: its type on the wire, its size limit in bytes, and what
    its bytes must pass (zips are checked by check_zip, as files)."""

    content_type: str
    limit: int
    check: Callable[[Artifact, bytes], object]


KINDS = {
    "info": Kind(
        "application/json", MAX_INFO, lambda artifact, raw: read_info(raw, artifact.version)
    ),
    "mod": Kind("text/plain; charset=utf-8", MAX_GO_MOD, lambda artifact, raw: check_go_mod(raw)),
    "zip": Kind(
        "application/zip",
        MAX_ZIP,
        lambda artifact, raw: check_zip(io.BytesIO(raw), artifact.path, artifact.version),
    ),
}


def is_piece(name: str, file: BinaryIO) -> bool:
    """Whether a stored file is plainly not all of an artifact, which takes no time to see: it is
    empty, or begins as one and does not end so."""
    artifact = stored_artifact(name)
    kind = artifact.kind if artifact else ""
    head = file.read(2)
    if kind == "zip" and head == b"PK":
        try:
            _find_directory(_Archive(file))
        except BadUpstream:
            return True
    if kind == "info" and head.startswith(b"{"):
        return not file.read(MAX_INFO).rstrip().endswith(b"}")
    return kind != "" and not head


# =============================================================================
# 5. Tools: blobs, drafts, flights, lanes, memory with a time limit, the log
# =============================================================================

CHUNK = 256 * 1024
WITHHELD = 64 * 1024  # bytes of a growing body that no client sees before the whole is checked


class Blob:
    """Bytes to be read once: `size` in bytes (None: not known yet), `modified` in seconds since
    the epoch. `read` blocks; `ready` tells how much can be had without blocking."""

    size: int | None = None
    modified = 0.0
    stamp: object = None  # tells these bytes from others that may take their name, if known

    def read(self, count: int) -> bytes:
        """At most `count` bytes, b"" at the end. Raises ProxyError when the rest cannot be had."""
        raise NotImplementedError

    def read_all(self, limit: int) -> bytes:
        """All bytes; raises BadUpstream beyond `limit` bytes."""
        parts: list[bytes] = []
        total = 0
        while True:
            part = self.read(CHUNK)
            if not part:
                return b"".join(parts)
            total += len(part)
            if total > limit:
                raise BadUpstream(f"longer than {limit} bytes")
            parts.append(part)

    def close(self) -> None:
        """Gives back what the blob holds; closing twice is fine."""


class BytesBlob(Blob):
    """A blob in memory."""

    def __init__(self, data: bytes, modified: float = 0.0) -> None:
        self._data = io.BytesIO(data)
        self.size = len(data)
        self.modified = modified

    def read(self, count: int) -> bytes:
        return self._data.read(count)


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """What tells a file from one that takes its place."""
    return (status.st_ino, status.st_size, status.st_mtime_ns)


class OpenFile:
    """A descriptor that several blobs may read by offset; it is closed with the last of them."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.cached_until = 0.0  # monotonic; a whole file that was in memory is not asked again yet
        self._mutex = threading.Lock()

    def read_at(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from an offset on; may be called from any thread."""
        if hasattr(os, "pread"):
            return os.pread(self.descriptor, count, offset)
        with self._mutex:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.read(self.descriptor, count)

    def append(self, data: bytes) -> None:
        """Writes all of data at the end."""
        view = memoryview(data)
        with self._mutex:
            os.lseek(self.descriptor, 0, os.SEEK_END)
            while view:
                view = view[os.write(self.descriptor, view) :]

    def is_cached(self, offset: int) -> bool:
        """Whether reading there cannot wait for a disk. Where the system does not tell: no."""
        try:
            return _CAN_PROBE and bool(os.preadv(self.descriptor, [_PROBE], offset, os.RWF_NOWAIT))
        except OSError:
            return False

    def reading(self) -> BinaryIO:
        """A file object of its own for what has been written so far."""
        return self.reading_of(os.fstat(self.descriptor).st_size)

    def reading_of(self, size: int) -> BinaryIO:
        """The same for so many bytes."""
        return io.BufferedReader(_Reading(self, size), CHUNK)

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenBytes(OpenFile):
    """The same for bytes in memory: there is no descriptor."""

    NO_DESCRIPTOR = -1

    def __init__(self, data: bytes | bytearray) -> None:
        self.descriptor = self.NO_DESCRIPTOR
        self.cached_until = math.inf
        self._data = memoryview(data)

    def read_at(self, count: int, offset: int) -> bytes:
        return bytes(self._data[offset : offset + count])

    def __del__(self) -> None:
        pass


class _Reading(io.RawIOBase):
    """Reads an open file by offset, beside whoever else reads it. Raises StoreDown."""

    def __init__(self, file: OpenFile, size: int) -> None:
        self._file = file
        self._length = size
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._length}
        self._offset = origins[whence] + offset
        return self._offset

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read_at(len(buffer), self._offset)
        except OSError as error:  # a disk that dies between writing and reading
            raise StoreDown(f"a file cannot be read back: {error.strerror}") from None
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


UNREADABLE: set[object] = set()  # the stamps of stored files whose disk failed while they were sent


class FileBlob(Blob):
    """A whole file, by descriptor: it stays readable when its name is removed or replaced. The
    file may also be OpenBytes."""

    def __init__(
        self, file: OpenFile, size: int | None, modified: float, stamp: object = None
    ) -> None:
        self._file: OpenFile | None = file
        self.size = size
        self.modified = modified
        self.stamp = stamp
        self.offset = 0

    @property
    def etag(self) -> str:
        """A strong validator: a stored artifact keeps its time and size for ever."""
        return "" if self.size is None else f'"{int(self.modified * 1000):x}-{self.size:x}"'

    @property
    def descriptor(self) -> int:
        assert self._file is not None
        return self._file.descriptor

    def peek(self, count: int) -> bytes:
        """At most `count` of the next bytes; the offset stays."""
        assert self._file is not None
        return self._file.read_at(count, self.offset)

    def reading(self) -> BinaryIO:
        """A file object of its own for all bytes, once they are there."""
        self.wait_for_end()
        assert self._file is not None and self.size is not None
        return self._file.reading_of(self.size)

    def again(self) -> FileBlob:
        """Another blob of the same bytes, from the start."""
        assert self._file is not None
        return FileBlob(self._file, self.size, self.modified, self.stamp)

    def ready(self) -> int | None:
        """Bytes that can be read now without waiting; None when there are none and never will be.
        Raises the error that ended a growing file."""
        assert self.size is not None
        return (self.size - self.offset) or None

    def when_ready(self, wake: Callable[[], None]) -> None:
        """Calls wake once there is more to read, or an end."""
        wake()

    def is_at_hand(self, count: int) -> bool:
        """Whether the next bytes are in memory, so that sending them cannot wait for a disk."""
        assert self._file is not None
        now = time.monotonic()
        if now < self._file.cached_until:
            return True
        last = self.offset + max(0, count - 1)
        cached = self._file.is_cached(self.offset) and self._file.is_cached(last)
        if cached and self.offset == 0 and count == self.size:
            self._file.cached_until = now + 1
        return cached

    def wait(self) -> int | None:
        """As ready, but blocks instead of answering 0."""
        while True:
            count = self.ready()
            if count != 0:
                return count
            woken = threading.Event()
            self.when_ready(woken.set)
            woken.wait()

    def send_to(self, socket_descriptor: int, offset: int, count: int) -> int:
        """Has the system send a part, as much of it as the socket takes. Raises OSError."""
        try:
            return os.sendfile(socket_descriptor, self.descriptor, offset, count)
        except OSError as error:
            if error.errno == errno.EIO:  # not the socket's
                UNREADABLE.add(self.stamp)
            raise

    def wait_for_end(self) -> None:
        """Blocks until all bytes are there, and sets the size. Raises what ended the body early."""
        start = self.offset
        while True:
            ready = self.wait()
            if ready is None:
                break
            self.offset += ready
        self.size, self.offset = self.offset, start

    def read(self, count: int) -> bytes:
        available = self.wait()
        if available is None:
            return b""
        try:
            data = self.peek(min(count, available))
        except OSError as error:
            raise StoreDown(f"a stored file cannot be read: {error.strerror}") from None
        if not data:
            raise StoreDown("a stored file became shorter while it was read")
        self.offset += len(data)
        return data

    def close(self) -> None:
        self._file = None


_CAN_PROBE = hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")
_PROBE = bytearray(1)


class Draft:
    """A temporary file that grows while readers follow it, and becomes an artifact if it is good.

    The last WITHHELD bytes stay hidden until `finish`, so that a reader of a body that fails its
    check at the end always gets a short body, which the go command can recover from, and never a
    complete but bad one, which it cannot."""

    _IN_MEMORY = 32 << 20  # bytes

    def __init__(self, folder: str = "") -> None:
        """A file in a folder; without one it has no name (`path` is empty), and nothing can be left
        of it. Raises OSError."""
        self._ways = [_in_memory, _temporary]  # the last one first
        while True:
            descriptor, self.path = _new_draft(folder) if folder else (self._nameless(), "")
            self.file = OpenFile(descriptor)
            if not folder or (lock_draft(descriptor) and not _is_gone(self.path)):
                break  # else a sweep of another process has taken it for a dead one's
        self.size: int | None = None
        self.modified = time.time()
        self.written = 0
        self.digest = hashlib.sha256()  # of what has been written
        self.error: BaseException | None = None
        self._visible = 0
        self._ended = False
        self._mutex = threading.Lock()
        self._wakes: list[Callable[[], None]] = []

    def write(self, data: bytes) -> None:
        while not self._appended(data):
            with contextlib.suppress(OSError):
                self._move()
        self.digest.update(data)
        self.written += len(data)
        if self.written - WITHHELD > self._visible:
            self._visible = self.written - WITHHELD
            self._wake()

    def _appended(self, data: bytes) -> bool:
        """Raises OSError if there is no other place to try."""
        try:
            if not self._ways and self.written + len(data) > self._IN_MEMORY:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.append(data)
        except OSError:
            if not self._ways:
                raise
            os.ftruncate(self.file.descriptor, self.written)  # a part may have had room
            return False
        return True

    def _nameless(self) -> int:
        while True:
            try:
                return self._ways.pop()()
            except OSError:
                if not self._ways:
                    raise

    def _move(self) -> None:
        """Goes on in the folder for temporary files, where the disk may not be full, at last in
        memory; readers do not notice. Without a name, the draft will not become an artifact of a
        folder."""
        other = OpenFile(self._nameless())
        with self.file.reading() as file:
            for start in range(0, self.written, CHUNK):
                other.append(file.read(min(CHUNK, self.written - start)))
        os.dup2(other.descriptor, self.file.descriptor, inheritable=False)
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.path = ""

    def finish(self) -> None:
        """All bytes are right: readers may have the tail."""
        self.size = self._visible = self.written
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """The rest never comes: readers get the error, and the file goes."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._mutex:
            self.error = error and unframed(error)
            self._ended = True
        self._wake()

    def _wake(self) -> None:
        with self._mutex:
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            wake()

    def ready(self, offset: int) -> int | None:
        """As FileBlob.ready."""
        ended = self._ended  # read before _visible: finish sets them in the other order
        if self._visible > offset:
            return self._visible - offset
        if self.error is not None:
            raise unframed(self.error)
        return None if ended else 0

    def when_ready(self, offset: int, wake: Callable[[], None]) -> None:
        with self._mutex:
            waiting = not self._ended and self._visible <= offset
            if waiting:
                self._wakes.append(wake)
        if not waiting:
            wake()

    def reader(self) -> GrowingBlob:
        return GrowingBlob(self)


def _new_draft(folder: str) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(prefix="draft-", dir=folder)
    except FileNotFoundError:  # somebody has emptied the store, which is fine
        os.makedirs(folder, exist_ok=True)
        return tempfile.mkstemp(prefix="draft-", dir=folder)


def _temporary() -> int:
    """A file of which nothing is left, however this process ends: on Linux it never has a name."""
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())


def _in_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("draft")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_gone(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:  # if the disk fails, it may be there
        return isinstance(error, FileNotFoundError)
    return False


def lock_draft(descriptor: int) -> bool:
    """Marks a draft as belonging to a living process: the kernel lets go when that ends, however
    it ends. False if another process has it. Where there is no flock, or the file system has no
    locks, every draft is free."""
    with contextlib.suppress(OSError):
        try:
            if _flock is not None:
                _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


_flock: Callable[[int, int], None] | None = getattr(fcntl, "flock", None)


class GrowingBlob(FileBlob):
    """A reader of a draft."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft.file, draft.size, draft.modified)
        self._draft = draft

    def ready(self) -> int | None:
        return self._draft.ready(self.offset)

    def when_ready(self, wake: Callable[[], None]) -> None:
        self._draft.when_ready(self.offset, wake)

    def again(self) -> GrowingBlob:
        return GrowingBlob(self._draft)

    def is_at_hand(self, count: int) -> bool:
        return True  # it has just been written

    def settle(self) -> None:
        """Blocks until there is something to send. Raises what ended the draft before that."""
        self.wait()
        self.size = self._draft.size


def _survive(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # a bug, which must not cost the thread as well
        sys.excepthook(*sys.exc_info())


def begin_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """A thread that does not keep the process alive. Raises Overloaded if it cannot be had."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise Overloaded("no more threads: the limit of the user, service or container") from None
    return thread


class Lane:
    """Threads that take work in the order it came: `least` from the start, so that these are there
    whatever limits the machine has, more as work would wait, and never more than `most`.

    All lanes of a process together never have more than TOGETHER, but that a lane without threads
    begins one. Threads beyond the least leave when there is nothing to do: at once if another lane
    has no room, and else soon."""

    TOGETHER = 76  # with all others 100; -dns has 10 more, git by way of -proxy 9
    _LINGER = 0.2  # seconds
    _mutex = threading.Lock()  # one for all lanes
    _all = 0
    _hungry: ClassVar[dict[Lane, None]] = {}  # those that had no room, in this order

    def __init__(self, name: str, most: int, least: int = 1, room: int = TOGETHER) -> None:
        """`room`: where all lanes together have so many threads, this one begins no more."""
        self._name = name
        self._most = most
        self._least = min(least, most)
        self._room = room
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0
        with Lane._mutex:
            for _ in range(self._least):
                self._begin_thread()

    def _begin_thread(self) -> None:
        name = f"{self._name}-{self._threads}"
        begin_thread(self._run, name)
        self._threads += 1
        Lane._all += 1

    def _grow(self) -> None:
        while self._threads < min(self._unfinished, self._most):
            if self._threads and Lane._all >= self._room:
                Lane._hungry[self] = None
                return
            try:
                self._begin_thread()
            except Overloaded:  # those there are do it
                if self._threads:
                    return
                raise

    def do(self, work: Callable[[], object]) -> None:
        """Queues work, which must not raise."""
        with Lane._mutex:
            self._unfinished += 1
            try:
                self._grow()
            except Overloaded:
                self._unfinished -= 1
                raise
        self._queue.put(TRACER.carried(work))

    @property
    def waiting(self) -> int:
        """How much work no thread has taken yet."""
        return self._queue.qsize()

    @property
    def unfinished(self) -> int:
        """How much work is not done yet."""
        return self._unfinished

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queues work and promises its result."""
        promise: Future[T] = Future()
        self.do(lambda: keep_promise(promise, work))
        return promise

    def _run(self) -> None:
        while True:
            work = self._next()
            if work:
                self._work(work)
            elif self._leaves():
                return
            del work  # a thread that waits must not keep a client's socket alive

    def _next(self) -> Callable[[], object] | None:
        patience = None if self._threads <= self._least else 0 if Lane._hungry else self._LINGER
        with contextlib.suppress(queue.Empty):
            return self._queue.get(timeout=patience)
        return None

    def _work(self, work: Callable[[], object]) -> None:
        _survive(work)
        with Lane._mutex:
            self._unfinished -= 1

    def _leaves(self) -> bool:
        with Lane._mutex:
            if self._threads <= min(self._most, max(self._least, self._unfinished)):
                return False
            self._threads -= 1
            Lane._all -= 1
            for lane in list(Lane._hungry):
                del Lane._hungry[lane]
                lane._grow()  # which may have no room now either, and is the last then
            return True

    def close(self) -> None:
        """Threads end after the work they have; nobody waits for them."""
        with Lane._mutex:
            self._most = 0
            for _ in range(self._threads):
                self._queue.put(None)


def keep_promise(promise: Future[T], work: Callable[[], T]) -> None:
    try:
        promise.set_result(work())
    except BaseException as error:
        promise.set_exception(error)


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Does work that nobody can cut short; its thread does not keep the process alive."""
    promise: Future[T] = Future()
    begin_thread(functools.partial(keep_promise, promise, work), "promise")
    return promise


class Alarms:
    """Does little things when their time has come, all in one thread, which ends when nothing is
    to come: nobody has one when processes are forked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[object, tuple[float, Callable[[], object]]] = {}
        self._process = 0  # whose thread it is

    def set(self, seconds: float, work: Callable[[], object]) -> object:
        """What to give to cancel."""
        alarm = object()
        with self._changed:
            if self._process != os.getpid():
                begin_thread(self._run, "alarms")
                self._process = os.getpid()
            self._due[alarm] = (time.monotonic() + seconds, work)
            self._changed.notify()
        return alarm

    def cancel(self, alarm: object) -> None:
        with self._changed:
            self._due.pop(alarm, None)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._due:
                    self._process = 0
                    return
                alarm, (at, work) = min(self._due.items(), key=lambda item: item[1][0])
                if time.monotonic() < at:
                    self._changed.wait(at - time.monotonic())
                    continue
                del self._due[alarm]
            _survive(work)


ALARMS = Alarms()


class Flights(Generic[T]):
    """One piece of work per key at a time; whoever comes meanwhile shares what it is."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._flights: dict[str, T] = {}
        self._begun_in: dict[str, Span] = {}

    def join(self, key: str, start: Callable[[], T]) -> tuple[T, bool]:
        """The flight of key, and whether this call started it. `start` must not block."""
        with self._mutex:
            if key in self._flights:
                return self._flights[key], False
            flight = self._flights[key] = start()
            span = TRACER.current
            if span:
                self._begun_in[key] = span
            return flight, True

    def waiting(self, key: str, first: bool) -> NoSpan:
        """The span of who waits for the flight of another, linked to the work that began it."""
        if first:
            return NO_SPAN
        return TRACER.span("flight wait", {"goproxy.flight": key}, link=self._begun_in.get(key))

    def land(self, key: str) -> None:
        with self._mutex:
            del self._flights[key]
            self._begun_in.pop(key, None)


def done_once(flights: Flights[Future[T]], key: str, work: Callable[[], T]) -> T:
    """What work brings, which is done once for all who want it meanwhile."""
    flight, first = flights.join(key, Future)
    if first:
        keep_promise(flight, work)
        flights.land(key)
    return flight.result()


class TtlCache(Generic[T]):
    """At most `limit` values, each for its own number of seconds; the oldest go first. A key that
    only an attacker thinks up is not remembered: a request may name 8,000 characters."""

    _LONGEST = 1000

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._mutex = threading.Lock()
        self._values: collections.OrderedDict[str, tuple[float, T]] = collections.OrderedDict()

    def get(self, key: str) -> T | None:
        with self._mutex:
            until, value = self._values.get(key, (0.0, None))
            if time.monotonic() < until:
                return value
            self._values.pop(key, None)
            return None

    def put(self, key: str, value: T, seconds: float) -> None:
        now = time.monotonic()
        with self._mutex:
            self._values.pop(key, None)
            if len(key) > self._LONGEST:
                return
            self._values[key] = (now + seconds, value)
            for _ in range(2):  # two go for one that comes, so that what has expired does not stay
                until, _ = next(iter(self._values.values()))
                if until < now or len(self._values) > self._limit:
                    self._values.popitem(last=False)

    def drop(self, key: str) -> None:
        with self._mutex:
            self._values.pop(key, None)


def printable(text: str) -> str:
    """Text that cannot forge a log line or move a terminal: control characters, line and
    paragraph separators and bidirectional marks are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Metric(NamedTuple):
    """What a family of figures is: counter, gauge or histogram (of seconds), and in words. `values`
    are all that its label may say: those are 0 from the beginning, because for Prometheus what
    appears has not increased, and an alert would miss the first."""

    kind: str
    text: str
    labels: str = ""  # by commas
    values: Sequence[str] = ()


METRICS = {
    "goproxy_build_info": Metric("gauge", "Always 1; the labels tell what runs.", "version,python"),
    "goproxy_comparisons_total": Metric(
        "counter",
        "Fetched files by what the checksum database says of them.",
        "result",
        ("agrees", "unknown", "not asked", "mismatch", "contradicts itself"),
    ),
    "goproxy_connections": Metric("gauge", "Connections of clients that are open."),
    "goproxy_evicted_bytes_total": Metric("counter", "Bytes removed to keep -max-size."),
    "goproxy_evicted_versions_total": Metric("counter", "Versions removed to keep -max-size."),
    "goproxy_log_lines_dropped_total": Metric("counter", "Log lines that nobody took in time."),
    "goproxy_received_bytes_total": Metric("counter", "Bytes that clients sent."),
    "goproxy_recheck_findings_total": Metric(
        "counter",
        "What -recheck found upstream about stored modules.",
        "finding",
        ("deleted", "retracted", "deprecated", "changed"),
    ),
    "goproxy_registry_blobs_total": Metric(
        "counter",
        "Blobs of the registry: redirected or streamed from the bucket, fetched, or refused by the "
        "registry, or passed on.",
        "result",
    ),
    "goproxy_registry_bytes_total": Metric(
        "counter", "Bytes of blobs that were redirected, streamed or fetched.", "result"
    ),
    "goproxy_registry_fills_total": Metric("counter", "Blobs put into the bucket."),
    "goproxy_registry_store_bytes": Metric(
        "gauge", "Size of all blobs in the bucket, as of the last hour."
    ),
    "goproxy_request_seconds": Metric(
        "histogram", "From a request's head to the last byte of its answer.", "kind"
    ),
    "goproxy_requests_in_flight": Metric("gauge", "Requests whose answer is not out yet."),
    "goproxy_requests_total": Metric(
        "counter",
        "Requests; the verdict is hit, miss or stale, error for what failed, else none.",
        "kind,code,verdict",
    ),
    "goproxy_sent_bytes_total": Metric("counter", "Bytes sent to clients, with heads.", "kind"),
    "goproxy_stalled_clients_total": Metric(
        "counter", "Clients that took nothing of their answer for a minute, and were cut off."
    ),
    "goproxy_store_bytes": Metric("gauge", "Size of what -max-size counts, where that is set."),
    "goproxy_store_errors_total": Metric(
        "counter",
        "Failures of the store, to read or to write, and of the bucket for the registry's layers.",
        "operation",
        ("read", "write", "read layers", "write layers"),
    ),
    "goproxy_trace_failing": Metric("gauge", "Processes whose spans no collector takes."),
    "goproxy_trace_spans_total": Metric(
        "counter",
        "Spans that were to be told: sent, or dropped because nobody took them.",
        "result",
    ),
    "goproxy_upstream_failures_total": Metric(
        "counter", "Upstream requests without a usable answer, by class of failure.", "host,failure"
    ),
    "goproxy_upstream_open": Metric(
        "gauge", "Processes that ask this host once a second, because it has not answered.", "host"
    ),
    "goproxy_upstream_received_bytes_total": Metric(
        "counter", "Bytes of bodies that upstreams sent.", "host"
    ),
    "goproxy_upstream_requests_total": Metric("counter", "Answers of upstreams.", "host,code"),
    "goproxy_worker_restarts_total": Metric("counter", "Workers that ended and were replaced."),
    "process_cpu_seconds_total": Metric("counter", "Processor time of all processes that run."),
    "process_max_fds": Metric("gauge", "Descriptors that all processes may have."),
    "process_open_fds": Metric("gauge", "Descriptors that all processes have."),
    "process_resident_memory_bytes": Metric(
        "gauge", "Memory of all processes; what they share is counted in each."
    ),
    "process_start_time_seconds": Metric("gauge", "When this began, since the epoch."),
}
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


def labelled(family: str, **labels: object) -> str:
    """The name of one figure, as in the text format of Prometheus, version 0.0.4."""
    pairs = []
    for name, value in labels.items():
        text = str(value)[:_LABEL_LIMIT].replace("\\", "\\\\").replace('"', '\\"')
        pairs.append(f'{name}="{printable(text)}"')
    return f"{family}{{{','.join(pairs)}}}" if pairs else family


_LABEL_LIMIT = 64


class Meter:
    """Figures of METRICS that every process counts for itself, in memory that all of them see, so
    that each can add up all. A process has a place; who follows a dead one goes on with its
    counts. Figures beyond a place's room are not kept."""

    _CELLS, _NAME, _HEAD = 1000, 184, 24
    _PLACE = _HEAD + _CELLS * (_NAME + 8)  # bytes: count, process id and beat; names; values
    _HOSTS = 32

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self.share(1)

    def share(self, places: int) -> None:
        """Makes room for so many processes, before they are forked, and takes the last place."""
        self.started = time.time()
        self._memory = memoryview(mmap.mmap(-1, places * self._PLACE))
        self._places = places
        self.take(places - 1)

    def take(self, place: int) -> None:
        """Counts in a place from now on. What a gauge said there is no longer so."""
        region = self._region(place)
        self._head = region[: self._HEAD].cast("Q")
        self._names = region[self._HEAD : -8 * self._CELLS]
        self._values = region[-8 * self._CELLS :].cast("d")
        self._head[1] = os.getpid()
        self.beat()
        self._hosts: set[str] = set()
        self._cells = {name: cell for cell, name in enumerate(self._names_of(region))}
        for name, cell in self._cells.items():
            if METRICS.get(name.partition("{")[0], _NO_METRIC).kind == "gauge":
                self._values[cell] = 0.0

    def _region(self, place: int) -> memoryview:
        return self._memory[place * self._PLACE : (place + 1) * self._PLACE]

    def _names_of(self, region: memoryview) -> list[str]:
        count = region[: self._HEAD].cast("Q")[0]
        names = bytes(region[self._HEAD : self._HEAD + count * self._NAME])
        starts = range(0, len(names), self._NAME)
        return [names[start : start + self._NAME].rstrip(b"\0").decode() for start in starts]

    def cell(self, name: str) -> int:
        """Where a figure is kept in this process."""
        found = self._cells.get(name)
        if found is None:
            with self._mutex:
                found = self._cells.get(name)
                if found is None:
                    found = self._cells[name] = self._new_cell(name)
        return found

    def _new_cell(self, name: str) -> int:
        number = self._head[0]
        data = name.encode("ascii", "replace")
        if number >= self._CELLS - 1 or len(data) > self._NAME:
            return self._CELLS - 1  # which is nobody's
        self._names[number * self._NAME : number * self._NAME + len(data)] = data
        self._head[0] = number + 1
        return int(number)

    def histogram(self, family: str, **labels: object) -> list[int]:
        """The cells of a histogram: one for each of BUCKETS, one for what is above, the sum."""
        limits = [*map(str, BUCKETS), "+Inf"]
        names = [labelled(f"{family}_bucket", **labels, le=limit) for limit in limits]
        return [self.cell(name) for name in (*names, labelled(f"{family}_sum", **labels))]

    def change(self, changes: Iterable[tuple[int, float]]) -> None:
        """Adds to cells."""
        with self._mutex:
            values = self._values
            for cell, amount in changes:
                values[cell] += amount

    def add(self, family: str, amount: float = 1.0, **labels: object) -> None:
        self.change([(self.cell(labelled(family, **labels)), amount)])

    def set(self, family: str, value: float) -> None:
        self._values[self.cell(family)] = value

    def host(self, name: str) -> str:
        """A host as a label: the first ones by their name, all others as one."""
        if len(self._hosts) < self._HOSTS:
            self._hosts.add(name)
        return name if name in self._hosts else "other"

    def beat(self) -> None:
        """Says that the loop of this process goes round."""
        self._head[2] = int(time.monotonic() * 1000)

    def last_beat(self) -> float:
        """When (monotonic) all loops have last been seen to go round; the last place has none,
        unless it is the only one."""
        heads = [self._region(n)[: self._HEAD].cast("Q") for n in range(max(1, self._places - 1))]
        return min(head[2] for head in heads) / 1000

    def figures(self) -> dict[str, float]:
        """The figures of all processes, added up."""
        found: dict[str, float] = {}
        for place in range(self._places):
            region = self._region(place)
            values = region[-8 * self._CELLS :].cast("d")
            for cell, name in enumerate(self._names_of(region)):
                found[name] = found.get(name, 0.0) + values[cell]
        return found

    def processes(self) -> list[int]:
        """The ids of all that count, or did so last in their place."""
        regions = map(self._region, range(self._places))
        return [process for region in regions if (process := region[: self._HEAD].cast("Q")[1])]


_NO_METRIC = Metric("untyped", "")
METER = Meter()


class NoSpan:
    """In the place of a span that nobody wants to know of."""

    def __enter__(self) -> NoSpan:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass

    def note(self, name: str, value: object) -> None:
        """Adds an attribute: text, a number or a truth value."""

    def fail(self, kind: str, words: str) -> None:
        """Marks it as failed."""


NO_SPAN = NoSpan()


TRACE_FIELDS = ("traceparent", "tracestate")


class Span(NoSpan):
    """One piece of work in a trace (OpenTelemetry specification, "Span"), and what others are told
    of it (W3C Trace Context): ids in lower-case hex, `begun` and `ended` monotonic. As a context
    manager it is the current one of its thread, and ends with the block."""

    INTERNAL, SERVER, CLIENT = 1, 2, 3  # opentelemetry/proto/trace/v1/trace.proto
    _WORDS = 300

    def __init__(
        self, name: str, kind: int, trace_id: str, parent_id: str = "", state: str = ""
    ) -> None:
        self.name = name
        self.kind = kind
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.state = state  # tracestate
        self.span_id = f"{random.getrandbits(64) or 1:016x}"
        self.is_told = True  # to the collector
        self.is_sampled = True  # as others hear
        self.begun = time.monotonic()
        self.ended = 0.0
        self.attributes: dict[str, object] = {}
        self.link: Span | None = None
        self._error = ""
        self._around: Span | None = None

    def __enter__(self) -> Span:
        self._around = _CURRENT.get()
        _CURRENT.set(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        """Absence is an answer, not an error."""
        if _CURRENT.get() is self:  # else a generator ends when another work has begun
            _CURRENT.set(self._around)
        error = raised[1]
        if isinstance(error, ProxyError) and not isinstance(error, NotFound):
            self.fail(type(error).__name__, str(error))
        self.ended = time.monotonic()
        if self.is_told:
            TRACER.keep(self.encoded)

    def note(self, name: str, value: object) -> None:
        self.attributes[name] = value

    def fail(self, kind: str, words: str) -> None:
        self._error = printable(mask(words))[: self._WORDS]
        self.attributes["error.type"] = kind

    def headers(self) -> list[tuple[str, str]]:
        """What a server is told that is asked in the course of it."""
        parent = f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"
        told = zip(TRACE_FIELDS, (parent, self.state))
        return [(name, value) for name, value in told if value]

    def encoded(self) -> dict[str, Any]:
        """As OTLP has it in JSON: ids in hex, 64-bit numbers as text."""
        epoch = time.time() - time.monotonic()
        begun, ended = (str(int((epoch + each) * 1e9)) for each in (self.begun, self.ended))
        links = [self.link] if self.link else []
        return {
            "traceId": self.trace_id,
            "spanId": self.span_id,
            "parentSpanId": self.parent_id,
            "traceState": self.state,
            "name": self.name,
            "kind": self.kind,
            "startTimeUnixNano": begun,
            "endTimeUnixNano": ended,
            "attributes": otlp_attributes(self.attributes),
            "links": [{"traceId": each.trace_id, "spanId": each.span_id} for each in links],
            "status": {"code": 2, "message": self._error}
            if "error.type" in self.attributes
            else {},
        }


def otlp_attributes(attributes: Mapping[str, object]) -> list[dict[str, Any]]:
    """Names and values as OTLP has them in JSON."""
    return [{"key": name, "value": _otlp_value(value)} for name, value in attributes.items()]


def _otlp_value(value: object) -> dict[str, object]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"stringValue": printable(str(value))}


class Sampler(NamedTuple):
    """Which traces are told: a share of them by their id; `follows`: of those that a client has
    begun, those that it wants told. (OpenTelemetry specification, "Built-in samplers")"""

    share: float = 1.0
    follows: bool = True

    def wants(self, trace_id: str, told: bool | None) -> bool:
        """`told`: what the client says, None without a client's trace."""
        if told is not None and self.follows:
            return told
        return int(trace_id[16:], 16) < self.share * (1 << 64)


_CURRENT: contextvars.ContextVar[Span | None] = contextvars.ContextVar("_CURRENT", default=None)
_TRACEPARENT = re.compile(
    "(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_TRACESTATE = re.compile("[ -~]{1,512}")


class Tracer:
    """Ended spans of this process, kept until somebody takes them; those that find no room are
    lost, and counted. Without a sampler nothing is kept, and a client's trace is only passed on.
    """

    _LIMIT = 2048  # as OTEL_BSP_MAX_QUEUE_SIZE has it by default

    def __init__(self) -> None:
        self.sampler: Sampler | None = None
        self._mutex = threading.Lock()
        self._kept: collections.deque[Callable[[], dict[str, Any]]] = collections.deque()
        self._lost = 0

    @property
    def current(self) -> Span | None:
        """The span of what this thread does."""
        return _CURRENT.get()

    def span(
        self,
        name: str,
        attributes: Mapping[str, object],
        kind: int = Span.INTERNAL,
        link: Span | None = None,
    ) -> NoSpan:
        """A part of what this thread does; nothing if nobody wants to know of the whole."""
        around = _CURRENT.get()
        if around is None or not around.is_told:
            return NO_SPAN
        span = Span(name, kind, around.trace_id, around.span_id, around.state)
        span.attributes.update(attributes)
        span.link = link
        return span

    def begin(self, name: str, kind: int, trace_id: str = "") -> Span | None:
        """The first span of a trace; None if there are none."""
        if self.sampler is None:
            return None
        span = Span(name, kind, trace_id or f"{random.getrandbits(128) or 1:032x}")
        span.is_told = span.is_sampled = self.sampler.wants(span.trace_id, None)
        return span

    def apart(self, name: str, attributes: Mapping[str, object]) -> NoSpan:
        """Work that this thread does for nobody in particular: a trace of its own."""
        span = self.begin(name, Span.INTERNAL)
        if span is None:
            return NO_SPAN
        span.attributes.update(attributes)
        span.link = _CURRENT.get()
        return span

    def serve(self, fields: Mapping[str, str], left: str = "") -> Span | None:
        """The span of a request, to be named later. `left` is what `leave` of another process has
        said of it."""
        told = fields.get("traceparent")
        if told is None and self.sampler is None:
            return None
        match = _TRACEPARENT.fullmatch(told or "")
        if match and (match[1] != "00" or not match[5]):
            span: Span | None = self._follow(match, fields.get("tracestate", ""))
        else:
            span = self.begin("", Span.SERVER, left[:32])
        if left and span:
            _, span.span_id, begun = left.split("-")
            span.begun = float(begun)
        return span

    def _follow(self, match: re.Match[str], state: str) -> Span:
        state = state if _TRACESTATE.fullmatch(state) else ""
        span = Span("", Span.SERVER, match[2], match[3], state)
        asked = bool(int(match[4], 16) & 1)
        if self.sampler:
            span.is_told = span.is_sampled = self.sampler.wants(span.trace_id, asked)
        else:  # to whom we ask we are not there
            span.is_told, span.is_sampled, span.span_id = False, asked, match[3]
        return span

    @staticmethod
    def leave(span: Span) -> str:
        """What another process needs to go on with a request."""
        return f"{span.trace_id}-{span.span_id}-{span.begun}"

    @staticmethod
    def inside(span: Span | None, work: Callable[[], T]) -> T:
        """Does work as part of a span."""
        if span is None:
            return work()
        _CURRENT.set(span)
        try:
            return work()
        finally:
            _CURRENT.set(None)

    def carried(self, work: Callable[[], T]) -> Callable[[], T]:
        """Work for another thread that is part of what this one does."""
        span = _CURRENT.get()
        return work if span is None else functools.partial(self.inside, span, work)

    def keep(self, encoded: Callable[[], dict[str, Any]]) -> None:
        """Keeps an ended span, which is called for later; this never waits."""
        if len(self._kept) < self._LIMIT:
            self._kept.append(encoded)
        else:
            with self._mutex:
                self._lost += 1

    def take(self, count: int) -> list[Callable[[], dict[str, Any]]]:
        """At most so many of those that were kept first."""
        return [self._kept.popleft() for _ in range(min(count, len(self._kept)))]

    def put_back(self, spans: Sequence[Callable[[], dict[str, Any]]]) -> None:
        self._kept.extendleft(reversed(spans))

    def lost(self) -> int:
        """How many have been lost since it was asked last."""
        with self._mutex:
            lost, self._lost = self._lost, 0
        return lost


TRACER = Tracer()


class Log:
    """Lines on a descriptor, written by a thread of its own: a full pipe or a dead reader costs
    lines (counted), never a request. Text lines have the form of Go's log package."""

    _LIMIT = 10_000
    _GATHER = 0.02  # seconds, so that a thousand lines cost one wake of the thread
    _PIECE = 1 << 16

    def __init__(self, descriptor: int, as_json: bool) -> None:
        self.as_json = as_json
        self._descriptor = descriptor
        self._lines: collections.deque[str] = collections.deque()
        self._dropped = 0
        self._second = 0
        self._stamp = ""
        self._wake = threading.Event()
        self._written = threading.Event()
        with contextlib.suppress(OSError):
            # A pipe takes so much whole, so that the lines of several processes do not mix.
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                self._PIECE = 4096

    def start(self) -> None:
        """Starts the thread; not before a process has been forked."""
        begin_thread(self._run, "log")

    def line(self, text: str, level: str = "info", **fields: Any) -> None:
        """One line; as JSON with the fields, as text without them."""
        self._add(self._formed(text, level, fields))

    def _formed(self, text: str, level: str, fields: Mapping[str, Any]) -> str:
        if not self.as_json:
            return f"{self._now()} {printable(text)}\n"
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        trace = {"trace_id": TRACER.current.trace_id} if TRACER.current else {}
        line = {"time": moment, "level": level, "message": text, **trace, **fields}
        return json.dumps(line) + "\n"

    def error(self, text: str, **fields: Any) -> None:
        self.line(text, "error", **fields)

    def security(self, text: str) -> None:
        """Somebody may be lying to us."""
        self.line(f"SECURITY: {text}", "error", event="security")

    def hit(self, client: str, path: str) -> None:
        """Both lines of a request answered at once; `path` is printable."""
        now = self._now()
        self._add(f"{now} [{client}] GET {path}\n{now} [CACHE HIT] {path}\n")

    def _add(self, lines: str) -> None:
        if len(self._lines) >= self._LIMIT:
            self._dropped += 1
            METER.add("goproxy_log_lines_dropped_total")
            return
        self._lines.append(lines)
        if not self._wake.is_set():
            self._wake.set()

    def _now(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._stamp = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(second))
            self._second = second
        return self._stamp

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(self._GATHER)
            self._wake.clear()
            self._write_out(None)
            self._written.set()

    def write_out(self) -> None:
        """Writes the lines so far, if anybody reads them within a second."""
        if self._lines:
            with contextlib.suppress(IndexError):  # the thread may be at it, too
                self._write_out(1.0)

    def _write_out(self, patience: float | None) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append(self._formed(f"{dropped} log lines dropped", "error", {"lines": dropped}))
        data = "".join(lines).encode("utf-8", "backslashreplace")
        start = 0
        with contextlib.suppress(OSError):
            while start < len(data):
                if patience and not select.select([], [self._descriptor], [], patience)[1]:
                    self._dropped += dropped + data.count(b"\n", start) - bool(dropped)
                    return  # nobody reads: lines are lost, not the process
                end = data.rfind(b"\n", start, start + self._PIECE) + 1
                try:
                    start += os.write(self._descriptor, data[start : end or start + self._PIECE])
                except BlockingIOError:  # somebody who has the descriptor too wants it so
                    select.select([], [self._descriptor], [], patience)

    def flush(self, seconds: float) -> None:
        """Waits until the lines so far are out, at most so long."""
        for _ in range(2):  # a batch may be on its way that has not all of them
            self._written.clear()
            self._wake.set()
            self._written.wait(seconds)


def shown_size(size: float) -> str:
    """Bytes as a person reads them."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


class Progress:
    """What a long command tells. Results go to stdout, a line each (a JSON object if asked for).
    How far it is goes to stderr: a bar on a terminal, elsewhere a line every ten seconds; as JSON,
    an object every second to stdout. May be called from any thread."""

    _BAR = 20  # characters

    def __init__(self, verb: str, as_json: bool) -> None:
        self._verb = verb
        self._as_json = as_json
        self._on_terminal = sys.stderr.isatty() and not as_json
        self._pause = 1.0 if as_json else 0.1 if self._on_terminal else 10.0
        self._mutex = threading.Lock()  # held while a line is written, so that lines do not mix
        self._started = time.monotonic()
        self._shown = self._started if self._pause > 1 else -math.inf
        self._done, self._count = 0, 0
        self._bytes_done, self._bytes = 0, 0

    def expect(self, count: int, size: int = 0) -> None:
        """So many things and bytes more are to be done."""
        with self._mutex:
            self._count += count
            self._bytes += size

    def advance(self, count: int = 1, size: int = 0) -> None:
        """So many more are done."""
        with self._mutex:
            self._done += count
            self._bytes_done += size
            if time.monotonic() - self._shown >= self._pause:
                self._shown = time.monotonic()
                self._show()

    def tell(self, event: str, text: str, **fields: Any) -> None:
        """A result: `text` for people, `event` and the fields for machines."""
        with self._mutex:
            if self._as_json:
                print(json.dumps({"event": event, "text": text, **fields}), flush=True)
                return
            if self._on_terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            print(printable(text), flush=True)

    def end(self, text: str, **fields: Any) -> None:
        """The last line: how much was done in which time, and the text."""
        seconds = time.monotonic() - self._started
        size = f", {shown_size(self._bytes_done)}" if self._bytes_done else ""
        told = f"{self._verb}: {self._done} done{size} in {seconds:.1f} s; {text}"
        self.tell("end", told, done=self._done, bytes=self._bytes_done, **fields)

    def _show(self) -> None:
        seconds = time.monotonic() - self._started
        share = self._share()
        if self._as_json:
            row = {"event": "progress", "done": self._done, "count": self._count}
            print(json.dumps({**row, "bytes": self._bytes_done}), flush=True)
            return
        left = int(seconds / share - seconds) if share else 0
        clock = f"  {left // 60}:{left % 60:02} left" if share else ""
        rate = shown_size(self._bytes_done / max(seconds, 0.001))
        line = f"{self._done}/{self._count}  {shown_size(self._bytes_done)}  {rate}/s{clock}"
        if self._on_terminal:
            bar = "#" * int(share * self._BAR)
            columns = os.get_terminal_size(2).columns or 80
            line = f"{self._verb} [{bar:<{self._BAR}}] {line}"[: columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{self._verb}: {line}", file=sys.stderr, flush=True)

    def _share(self) -> float:
        """How much of the whole is done, from 0 to 1."""
        done, whole = (self._bytes_done, self._bytes) if self._bytes else (self._done, self._count)
        return min(1.0, done / whole) if whole else 0.0


# =============================================================================
# 6. Network: HTTP heads, resolvers, tunnels, the dialer, the pooled client, DNS, checks, S3
# =============================================================================
# http.client is not used to read: it takes a cut body for a whole one, waits for ever on a byte a
# second, and hands heads to the email package, which one line can keep busy for seconds.

TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_NOT_IN_VALUES = bytes(set(range(32)) - {9}) + b"\x7f"
# Two of these in one head mean that two readers would see two messages (RFC 9112, section 6.3).
_SINGLE = frozenset(
    [
        "authorization",
        "content-length",
        "expect",
        "host",
        "if-none-match",
        "if-range",
        "range",
        "transfer-encoding",
    ]
)


class Fields(dict[str, str]):
    """Header fields by lower-case name; repeated ones joined by commas (RFC 9110, section 5.2)."""

    def add(self, name: str, value: str) -> None:
        """Raises BadRequest for a second field of a kind that may stand only once."""
        if name not in self:
            self[name] = value
        elif name in _SINGLE:
            raise BadRequest(f"two {name} fields")
        else:
            self[name] += ", " + value

    def tokens(self, name: str) -> list[str]:
        return [token.strip().lower() for token in self.get(name, "").split(",")]


def parse_fields(lines: Iterable[bytes]) -> Fields:
    """Field lines without their CRLF, as RFC 9112 section 5 wants them and nothing else.
    Linear in the length. Raises BadRequest."""
    fields = Fields()
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.fullmatch(name):
            raise BadRequest("malformed header line")
        if len(value.translate(None, _NOT_IN_VALUES)) != len(value):
            raise BadRequest("control character in a header")
        fields.add(name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1"))
    return fields


def split_fields(lines: Iterable[bytes]) -> list[tuple[str, str]]:
    """Each field line that parse_fields takes, on its own, as it was written."""
    pairs = (line.decode("latin-1").partition(":") for line in lines)
    return [(name, value.strip(" \t")) for name, _, value in pairs]


def content_length(fields: Fields) -> int | None:
    """The declared length in bytes, None if there is none. Raises BadRequest."""
    text = fields.get("content-length")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BadRequest("malformed content-length")
    return int(text)


class Patience(NamedTuple):
    """How long an exchange may take, in seconds: to the first header, between two bytes, in all."""

    header: float
    stall: float
    total: float


METADATA = Patience(10.0, 30.0, 30.0)
TRANSFER = Patience(10.0, 30.0, 600.0)
_CONNECT = 5.0
_HANDSHAKE = 5.0


_NO_TLS = ("HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "WRONG_VERSION_NUMBER")


@contextlib.contextmanager
def _blaming(peer: str) -> Iterator[None]:
    """The one door where the network's errors become ours."""
    try:
        yield
    except socket.timeout as error:
        raise UpstreamTimeout(f"{peer}: {error or 'timed out'}") from None
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(f"{peer}: certificate: {error.verify_message}") from None
    except ssl.SSLError as error:
        words = "it does not speak TLS here" if error.reason in _NO_TLS else error.strerror
        raise Unreachable(f"{peer}: {words or error}") from None
    except BadBody:
        raise  # which is not the peer's
    except (OSError, EOFError) as error:
        raise Unreachable(f"{peer}: {getattr(error, 'strerror', None) or error}") from None
    except BadRequest as error:
        raise BadUpstream(f"{peer}: invalid answer: {error}") from None


@contextlib.contextmanager
def naming(who: str) -> Iterator[None]:
    """As _blaming, and what is ours already gets `who` before its words."""
    try:
        yield
    except BadUpstream as error:
        raise type(error)(f"{who}: {error}") from None
    except OSError:
        with _blaming(who):
            raise


def time_left(until: float) -> float:
    """Seconds until a monotonic time. Raises socket.timeout when there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")
    return left


def _share(until: float, parts: int) -> float:
    """A deadline that leaves as much time again to each of the other attempts."""
    now = time.monotonic()
    return now + (until - now) / parts


def _checked_host(host: str) -> str:
    try:
        return plain_host(host)
    except ValueError:
        raise BadUpstream(f"dns: {host[:100]!r} is not a host name") from None


# DNS messages: RFC 1035 and 6891. Names are kept in wire form, lower case.

_A, _CNAME, _OPT, _AAAA = 1, 5, 41, 28
_FAMILIES = {_A: socket.AF_INET, _AAAA: socket.AF_INET6}
_LENGTHS = {_A: 4, _AAAA: 16}
_FORMERR, _NOTIMP = 1, 4
_RCODES = {_FORMERR: "FORMERR", 2: "SERVFAIL", _NOTIMP: "NOTIMP", 5: "REFUSED"}
_MAX_RECORDS, _MAX_ALIASES, _MAX_HOPS = 256, 8, 127
_MIN_TTL, _MAX_TTL = 5, 300  # seconds


class DnsAnswer(NamedTuple):
    """Addresses and for how many seconds; without addresses, `why` there are none."""

    addresses: tuple[str, ...]
    ttl: float
    why: str = ""


class DnsRecord(NamedTuple):
    """The data of a CNAME is a name, other data are packed addresses."""

    owner: bytes
    kind: int
    ttl: int
    data: bytes


class DnsReply(NamedTuple):
    rcode: int
    truncated: bool
    records: list[DnsRecord]


def encode_name(name: str) -> bytes:
    """A name in wire form. Raises BadUpstream if a label or the whole is too long."""
    labels = [part.encode("latin-1", "replace") for part in name.lower().rstrip(".").split(".")]
    wire = b"".join(bytes([len(label) & 255]) + label for label in labels) + b"\0"
    if len(wire) > 255 or not all(0 < len(label) < 64 for label in labels):
        raise BadUpstream("dns: bad name in an answer")
    return wire


def encode_query(name: str, kind: int, number: int, size: int) -> bytes:
    """A recursive question, with EDNS0 for answers of `size` bytes unless that is 0."""
    head = struct.pack("!6H", number, 0x0100, 1, 0, 0, size > 0)
    edns = b"\0" + struct.pack("!HHIH", _OPT, size, 0, 0) if size else b""
    return head + encode_name(name) + struct.pack("!HH", kind, 1) + edns


def _question(query: bytes) -> bytes:
    return query[12:-11] if query[11] else query[12:]


class _DnsReader:
    """A cursor over a message that may lie about every length and pointer."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    def take(self, count: int) -> bytes:
        part = self._message[self._at : self._at + count]
        if len(part) < count:
            raise BadUpstream("dns: answer is cut short")
        self._at += count
        return part

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def name(self) -> bytes:
        """Each pointer must lead further back than the one before."""
        wire, start, resume, hops = bytearray(), self._at, 0, 0
        while True:
            length = self.take(1)[0]
            if length < 0xC0:
                wire += bytes([length]) + self.take(length)
                if length > 63 or len(wire) > 255:
                    raise BadUpstream("dns: bad name in an answer")
                if length == 0:
                    self._at = resume or self._at
                    return bytes(wire).lower()
            else:
                pointer = (length & 0x3F) << 8 | self.take(1)[0]
                resume, hops = resume or self._at, hops + 1
                if pointer >= start or hops > _MAX_HOPS:
                    raise BadUpstream("dns: compression loop in an answer")
                self._at = start = pointer

    def record(self) -> DnsRecord:
        owner = self.name()
        kind, group, ttl, length = self.numbers("!HHIH")
        end = self._at + length
        data = self.name() if kind == _CNAME else self.take(length)
        if self._at != end or (group == 1 and len(data) != _LENGTHS.get(kind, len(data))):
            raise BadUpstream("dns: record of a wrong length")
        return DnsRecord(owner, kind if group == 1 else 0, ttl if ttl < 1 << 31 else 0, data)


def answers_query(message: bytes, query: bytes) -> bool:
    """Whether message is a reply with the number and the question of query; who could not read
    that (FORMERR) need not repeat it."""
    question = _question(query)
    if message[:2] != query[:2] or len(message) < 12 or message[2] & 0xF8 != 0x80:
        return False
    if len(message) == 12:
        return message[3] & 15 == _FORMERR
    told = message[12 : 12 + len(question)]
    return message[4:6] == b"\0\1" and told.lower() == question.lower()


def decode_reply(message: bytes, query: bytes) -> DnsReply:
    """The answer to query, read in linear time. Raises BadUpstream for anything malformed."""
    if not answers_query(message, query):
        raise BadUpstream("dns: answer to another question")
    reader = _DnsReader(message)
    _, bits, _, count, _, _ = reader.numbers("!6H")
    if bits & 0x0200 or bits & 15 == _FORMERR:
        return DnsReply(bits & 15, bool(bits & 0x0200), [])
    reader.take(len(_question(query)))
    if count > _MAX_RECORDS:
        raise BadUpstream("dns: too many records in an answer")
    return DnsReply(bits & 15, False, [reader.record() for _ in range(count)])


def decode_json(text: bytes) -> DnsReply:
    """The JSON that public resolvers answer: Status, and Answer with name, type, TTL, data."""
    try:
        document = json.loads(text)
        rows = [row for row in document.get("Answer") or [] if row["type"] in (*_FAMILIES, _CNAME)]
        return DnsReply(int(document["Status"]), False, [_json_record(row) for row in rows])
    except (*ODD_JSON, OSError) as error:
        raise BadUpstream("dns: malformed JSON") from error


def _json_record(row: Mapping[str, Any]) -> DnsRecord:
    kind, text = row["type"], row["data"]
    data = encode_name(text) if kind == _CNAME else socket.inet_pton(_FAMILIES[kind], text)
    return DnsRecord(encode_name(row["name"]), kind, max(0, int(row["TTL"])), data)


def find_addresses(name: str, kind: int, reply: DnsReply) -> DnsAnswer:
    """The addresses at the end of the chain of aliases that begins at name.
    A name that does not exist is an answer; raises BadUpstream when the server failed."""
    if reply.rcode == 3:
        return DnsAnswer((), _MIN_TTL, "no such host")
    if reply.rcode:
        said = _RCODES.get(reply.rcode, f"error {reply.rcode}")
        raise Unreachable(f"dns: {name}: the server says {said}")
    aliases = {record.owner: record for record in reply.records if record.kind == _CNAME}
    owner, ttl = encode_name(name), _MAX_TTL
    for _ in range(_MAX_ALIASES + 1):
        found = [record for record in reply.records if record[:2] == (owner, kind)]
        if found:
            addresses = [socket.inet_ntop(_FAMILIES[kind], record.data) for record in found]
            ttl = min([ttl, *(record.ttl for record in found)])
            return DnsAnswer(tuple(dict.fromkeys(addresses)), max(_MIN_TTL, ttl))
        if owner not in aliases:
            return DnsAnswer((), _MIN_TTL, "no address")
        owner, ttl = aliases[owner].data, min(ttl, aliases[owner].ttl)
    raise BadUpstream(f"dns: {name}: more than {_MAX_ALIASES} aliases")


# Resolvers


class Resolver(Protocol):
    """Names to addresses."""

    def lookup(self, host: str, until: float) -> list[str]:
        """The IPs of a host (an IP is its own), never none, within a monotonic time.
        Raises BadUpstream, Unreachable, UpstreamTimeout, Overloaded; the words begin with dns."""

    def close(self) -> None:
        return


class CachingResolver(Resolver):
    """Remembers what `ask(name, until)` answers, and asks once for all who wait for a name.

    Asking has a lane of its own, since nobody can cut getaddrinfo short, and a small one. While
    it fails, the last answer holds an hour longer (RFC 8767, which has these numbers)."""

    _LOOKUP_SECONDS, _OLD_SECONDS, _OLD_PATIENCE, _REST_SECONDS = 8.0, 3600.0, 1.8, 30.0
    _NAMES, _LOOKUPS, _THREADS = 10_000, 32, 10

    def __init__(self, ask: Callable[[str, float], DnsAnswer]) -> None:
        self._ask = ask
        self._fresh: TtlCache[DnsAnswer] = TtlCache(self._NAMES)
        self._stale: TtlCache[DnsAnswer] = TtlCache(self._NAMES)
        self._flights: Flights[Future[DnsAnswer]] = Flights()
        self._lane = Lane("lookup", self._THREADS, 0, room=Lane.TOGETHER + self._THREADS)

    def lookup(self, host: str, until: float) -> list[str]:
        name = _checked_host(host)
        if is_ip(name):
            return [name]
        if f".{name}".endswith(".localhost"):  # RFC 6761: never asked
            return ["127.0.0.1", "::1"]
        found = self._fresh.get(name) or self._wait(name, until)
        if not found.addresses:
            raise BadUpstream(f"dns: {name}: {found.why}")
        return list(found.addresses)

    def _wait(self, name: str, until: float) -> DnsAnswer:
        stale = self._stale.get(name)
        patience = max(0.0, until - time.monotonic())
        try:
            flight, _ = self._flights.join(name, lambda: self._start(name))
            return flight.result(min(patience, self._OLD_PATIENCE) if stale else patience)
        except (FutureTimeout, ProxyError) as error:
            if stale:
                return stale
            if isinstance(error, ProxyError):
                raise
            raise UpstreamTimeout(f"dns: {name}: timed out") from None

    def _start(self, name: str) -> Future[DnsAnswer]:
        if self._lane.unfinished >= self._LOOKUPS and not self._fresh.get(name):  # just landed
            raise Overloaded("dns: too many lookups at once")
        work = functools.partial(self._fly, name)
        return contextvars.Context().run(self._lane.submit, work)  # part of nobody's trace

    def _fly(self, name: str) -> DnsAnswer:
        try:
            found = self._fresh.get(name)
            if found:  # the flight before this one landed while it was boarded
                return found
            found = self._ask(name, time.monotonic() + self._LOOKUP_SECONDS)
            self._fresh.put(name, found, found.ttl)
            self._stale.put(name, found, found.ttl + self._OLD_SECONDS if found.addresses else 0)
            return found
        except ProxyError:
            stale = self._stale.get(name)
            if stale:  # so that not every request waits in vain
                self._fresh.put(name, stale, self._REST_SECONDS)
            raise
        finally:
            self._flights.land(name)


class SystemResolver(CachingResolver):
    """What the machine answers: hosts file, nsswitch, resolv.conf. It tells no TTL: `keep` is
    taken for it, in seconds; math.inf looks every name up once."""

    def __init__(self, keep: float = 60.0) -> None:
        super().__init__(lambda name, until: _ask_system(name, keep))


def _ask_system(name: str, keep: float) -> DnsAnswer:
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None)):
            return DnsAnswer((), _MIN_TTL, "no such host")
        raise Unreachable(f"dns: {name}: {error.strerror}") from None
    except OSError as error:
        raise Unreachable(f"dns: {name}: {error}") from None
    addresses = dict.fromkeys(str(info[4][0]) for info in infos)
    return DnsAnswer(tuple(filter(is_ip, addresses)), keep, "no address")


def _is_in(address: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    return ipaddress.ip_address(address) in network  # families that differ are never in


_INNER = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers
        "127.0.0.0/8",
        "168.63.129.16/32",  # metadata of Azure
        "169.254.0.0/16",  # link, and metadata nearly everywhere
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/3",
        "::/96",  # IPv4 in other clothes, as the next four and 2002::
        "::ffff:0:0/96",
        "::ffff:0:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "fc00::/7",  # with metadata of AWS
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)


class ScreenedResolver(Resolver):
    """For names that strangers write: addresses of this machine and of its networks are left out.

    A Dialer connects to what its resolver answers and to nothing else, so the rule holds for the
    connected address, whatever a second lookup would say. Raises Forbidden if none is left."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def lookup(self, host: str, until: float) -> list[str]:
        addresses = self._resolver.lookup(host, until)
        outer = [one for one in addresses if not any(_is_in(one, net) for net in _INNER)]
        if not outer:
            raise Forbidden(f"{host}: an address inside, where only private modules may be")
        return outer


# Connections: happy eyeballs (RFC 8305), TLS, exact reading


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def interleave(addresses: Sequence[str]) -> list[str]:
    """Ten addresses at most; families take turns, the first address's family begins."""
    ours = [one for one in addresses if _family(one) == _family(addresses[0])]
    others = [one for one in addresses if _family(one) != _family(addresses[0])]
    pairs = itertools.zip_longest(ours, others)
    return [one for pair in pairs for one in pair if one is not None][:10]


class _Race:
    """Connects without blocking, to the next address after 250 ms or a failure; the first wins."""

    _STAGGER = 0.25

    def __init__(self, addresses: Sequence[str], port: int) -> None:
        self._waiting = collections.deque(interleave(addresses))
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._failures: list[tuple[str, str]] = []
        self._next_start = 0.0

    def run(self, until: float) -> socket.socket:
        """The connected socket. Raises OSError with all failures, socket.timeout."""
        try:
            while self._waiting or self._selector.get_map():
                if self._waiting and time.monotonic() >= self._next_start:
                    self._next_start = time.monotonic() + self._STAGGER
                    self._start(self._waiting.popleft())
                pause = min(until, self._next_start) if self._waiting else until
                winner = self._poll(max(0.0, pause - time.monotonic()))
                if winner:
                    return winner
                time_left(until)
            raise ConnectionError(self._words())
        finally:
            for key in list(self._selector.get_map().values()):
                key.data[0].close()
            self._selector.close()

    def _start(self, address: str) -> None:
        try:
            sock = socket.socket(_family(address), socket.SOCK_STREAM)
        except OSError as error:  # no IPv6 in this kernel, or no descriptors left
            self._fail(address, error.errno or 0)
            return
        self._selector.register(sock, selectors.EVENT_WRITE, (sock, address))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        code = sock.connect_ex((address, self._port))
        if code not in (0, errno.EINPROGRESS):
            self._drop(sock).close()
            self._fail(address, code)

    def _poll(self, seconds: float) -> socket.socket | None:
        if not self._selector.get_map():
            return None
        for key, _ in self._selector.select(seconds):
            sock, address = key.data
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0:
                return self._drop(sock)
            self._drop(sock).close()
            self._fail(address, code)
        return None

    def _drop(self, sock: socket.socket) -> socket.socket:
        self._selector.unregister(sock)
        return sock

    def _fail(self, address: str, code: int) -> None:
        self._failures.append((address, os.strerror(code)))
        self._next_start = 0.0

    def _words(self) -> str:
        if len(self._failures) == 1:
            return self._failures[0][1]
        return "; ".join(f"{address}: {words}" for address, words in self._failures)


def connect_first(addresses: Sequence[str], port: int, until: float) -> socket.socket:
    """A connection to one of the addresses. Raises OSError."""
    sock = _Race(addresses, port).run(until)
    sock.settimeout(_CONNECT)
    return sock


def start_tls(
    sock: socket.socket, context: ssl.SSLContext, host: str, until: float
) -> ssl.SSLSocket:
    """Shakes hands in time, however slowly bytes drip; the certificate is checked for host, name
    or IP. Raises OSError, and closes the socket then."""
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        name = _checked_host(host)
        secure = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        undo.callback(secure.close)
        secure.setblocking(False)
        while not _shaken(secure, until):
            pass
        secure.settimeout(_HANDSHAKE)
        undo.pop_all()
        return secure


def _shaken(secure: ssl.SSLSocket, until: float) -> bool:
    """Whether the handshake is done; waits once if it is not."""
    try:
        secure.do_handshake()
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
        reads = isinstance(error, ssl.SSLWantReadError)
        with selectors.DefaultSelector() as selector:
            selector.register(secure, selectors.EVENT_READ if reads else selectors.EVENT_WRITE)
            selector.select(time_left(until))
        return False
    return True


class _Exact:
    """Reads and writes a socket, exactly so many bytes and all of them in time. Raises OSError."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        self._until = until

    def send(self, data: bytes) -> None:
        self._sock.settimeout(time_left(self._until))
        self._sock.sendall(data)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._sock.settimeout(time_left(self._until))
            part = self._sock.recv(count - len(data))
            if not part:
                raise ConnectionError("connection closed in the middle of an answer")
            data += part
        return data

    def head(self) -> bytes:
        """All up to an empty line, and not one byte more: what follows is for somebody else."""
        data = bytearray()
        while not data.endswith(b"\r\n\r\n"):
            if len(data) >= 16 * 1024:
                raise ConnectionError("head too large")
            data += self.read(1)
        return bytes(data)


# Outgoing proxies


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def hide(text: str, shown: Iterable[str]) -> str:
    """The text of somebody to whom the Authorization values `shown` went, without these and what
    is in them."""
    for value in shown:
        token = value.rpartition(" ")[2]
        secrets = [token]
        with contextlib.suppress(ValueError):  # it is no Basic one
            user, mark, password = base64.b64decode(token, validate=True).decode().partition(":")
            secrets += [password or user] if mark else []
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
    return text


def connect_tunnel(exact: _Exact, host: str, port: int, proxy: Url) -> None:
    """Has an HTTP proxy connect us (RFC 9110, section 9.3.6).
    Raises OSError, and BadUpstream for what a second try would not mend."""
    where = _authority(_checked_host(host), port)
    request = f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n"
    shown = _basic(proxy.user, proxy.password)
    if proxy.user:
        request += f"Proxy-Authorization: {shown}\r\n"
    exact.send(f"{request}\r\n".encode("ascii"))
    line, _, fields = exact.head().decode("latin-1").partition("\r\n")
    match = re.fullmatch(r"HTTP/1\.[01] ([0-9]{3})( [\t -~\x80-\xff]*)?", line)
    if not match:
        raise ConnectionError("this is no HTTP proxy")
    if match[1] in ("401", "407"):  # tinyproxy says 401 to a wrong password
        raise BadUpstream(_unwelcome(proxy, ", ".join(_CHALLENGE.findall(fields))))
    if match[1][0] != "2":
        raise ConnectionError(f"refuses {where}: {hide(line[9:], [shown])[:100]}")


_CHALLENGE = re.compile(r"(?im)^proxy-authenticate:[ \t]*([!-~][ -~]*)")


def _unwelcome(proxy: Url, challenges: str = "") -> str:
    if challenges and not re.search(r"(?i)(^|, *)basic\b", challenges):
        return f"it wants {challenges.split()[0].rstrip(',')[:40]}, where we know Basic alone"
    return "user or password is wrong" if proxy.user else "it wants a user and a password"


_SOCKS_REPLIES = {
    1: "general failure",
    2: "not allowed by its rules",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "TTL expired",
    7: "command not supported",
    8: "address type not supported",
}


def socks_tunnel(exact: _Exact, host: str, port: int, proxy: Url) -> None:
    """Has a SOCKS5 proxy connect us (RFC 1928). Raises as connect_tunnel does."""
    exact.send(b"\5\2\0\2" if proxy.user else b"\5\1\0")
    (method,) = _socks_reply(exact, 2)
    if method == 2 and proxy.user:
        _socks_login(exact, proxy)
    elif method != 0:
        raise BadUpstream(_unwelcome(proxy))
    exact.send(b"\5\1\0" + _socks_host(_checked_host(host)) + struct.pack("!H", port))
    code, _, kind = _socks_reply(exact, 4)
    if code:
        words = _SOCKS_REPLIES.get(code, f"error {code}")
        raise ConnectionError(f"refuses {_authority(host, port)}: {words}")
    exact.read(2 + (exact.read(1)[0] if kind == 3 else {1: 4, 4: 16}.get(kind, 0)))


def _socks_reply(exact: _Exact, count: int) -> bytes:
    reply = exact.read(count)
    if reply[0] != 5:
        raise ConnectionError("this is no SOCKS5 proxy")
    return reply[1:]


def _socks_login(exact: _Exact, proxy: Url) -> None:
    """RFC 1929. The settings have checked the lengths."""
    user, password = proxy.user.encode(), proxy.password.encode()
    exact.send(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
    if exact.read(2)[1]:
        raise BadUpstream(_unwelcome(proxy))


def _socks_host(host: str) -> bytes:
    if not is_ip(host):
        return bytes([3, len(host)]) + host.encode("ascii")
    packed = ipaddress.ip_address(host).packed
    return (b"\1" if len(packed) == 4 else b"\4") + packed


class Tunnel(NamedTuple):
    """A kind of proxy: `dig` has it connect us, it `resolves` names itself, and plain http goes
    through it in `absolute` form instead."""

    dig: Callable[[_Exact, str, int, Url], None]
    resolves: bool
    absolute: bool


TUNNELS = {
    "http": Tunnel(connect_tunnel, resolves=True, absolute=True),
    "https": Tunnel(connect_tunnel, resolves=True, absolute=True),
    "socks5": Tunnel(socks_tunnel, resolves=False, absolute=False),
    "socks5h": Tunnel(socks_tunnel, resolves=True, absolute=False),
}


class _Exemption(NamedTuple):
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    suffix: str  # with its leading dot
    exact: bool  # the name itself too, not only what is below it
    port: str

    def covers(self, host: str, port: int) -> bool:
        if self.port not in ("", str(port)):
            return False
        if self.network:
            return is_ip(host) and _is_in(host, self.network)
        return host.endswith(self.suffix) or (self.exact and host == self.suffix[1:])


def _exemption(entry: str) -> _Exemption:
    """CIDR, IP[:port], name[:port], .suffix[:port], *.suffix[:port] or *."""
    if entry == "*":
        return _Exemption(None, "", False, "")
    host, port = entry, ""
    if re.fullmatch(r"(\[[^]]*\]|[^:]*):[0-9]*", entry):
        host, _, port = entry.rpartition(":")
    with contextlib.suppress(ValueError):
        return _Exemption(ipaddress.ip_network(host.strip("[]"), strict=False), "", False, port)
    name = host[1:] if host.startswith("*.") else host
    return _Exemption(None, f".{name.lstrip('.')}", not name.startswith("."), port)


class ProxyRoute:
    """Which connections go through the proxy: all but those that NO_PROXY names.

    NO_PROXY as Go reads it (x/net/http/httpproxy) but for one rule: loopback is not exempt by
    itself. Whoever sets a proxy wants no direct attempt anywhere; who has an upstream on this
    machine names it."""

    def __init__(self, proxy: Url | None = None, no_proxy: str = "") -> None:
        self.proxy = proxy
        entries = [entry.strip().lower() for entry in no_proxy.split(",")]
        self._exempt = [_exemption(entry) for entry in entries if entry.strip(".")]

    def proxy_for(self, host: str, port: int) -> Url | None:
        """The proxy that leads to a host; None is the direct way."""
        name = _checked_host(host)
        if any(exemption.covers(name, port) for exemption in self._exempt):
            return None
        return self.proxy

    def peer(self, url: Url) -> str:
        """Who answers a request for url, in words."""
        proxy = self.proxy_for(url.host, url.port)
        return f"{url.authority} by proxy {proxy}" if proxy else url.authority


class Dialer:
    """Opens every connection that leaves the process."""

    def __init__(self, resolver: Resolver, route: ProxyRoute) -> None:
        self.resolver = resolver
        self.route = route
        self._system = SystemResolver()  # for the proxy, whose name is often an inner one

    def connect(self, host: str, port: int, until: float) -> socket.socket:
        """A connection to host, through the proxy if the route says so, in five seconds at most.
        Raises BadUpstream, Unreachable, UpstreamTimeout; nothing goes around a proxy that fails."""
        until = min(until, time.monotonic() + _CONNECT)
        if not 0 < port < 65536:
            raise BadUpstream(f"{host}: {port} is not a port")
        proxy = self.route.proxy_for(host, port)
        if proxy:
            return self._through(proxy, host, port, until)
        addresses = self.resolver.lookup(host, until)
        with _blaming(_authority(host, port)):
            return connect_first(addresses, port, until)

    def connect_proxy(self, proxy: Url, until: float) -> socket.socket:
        """A connection to the proxy itself, for requests in absolute form."""
        with naming(f"proxy {proxy}"):
            return self._reach(proxy, min(until, time.monotonic() + _CONNECT))

    def forward_proxy(self, url: Url) -> Url | None:
        """The HTTP proxy to which a request for url goes in absolute form."""
        proxy = self.route.proxy_for(url.host, url.port)
        return proxy if proxy and url.scheme == "http" and TUNNELS[proxy.scheme].absolute else None

    def resolves(self, host: str, port: int) -> bool:
        """Whether the name is looked up here, not by the proxy."""
        proxy = self.route.proxy_for(host, port)
        return proxy is None or not TUNNELS[proxy.scheme].resolves

    def _reach(self, proxy: Url, until: float) -> socket.socket:
        return connect_first(self._system.lookup(proxy.host, until), proxy.port, until)

    def _through(self, proxy: Url, host: str, port: int, until: float) -> socket.socket:
        names = [host]
        if not TUNNELS[proxy.scheme].resolves:
            names = sorted(self.resolver.lookup(host, until), key=_family)[:10]  # IPv4 first
        with naming(f"proxy {proxy}"):
            for left in range(len(names), 0, -1):
                try:
                    # Half of what is left: a proxy far away needs its time for any of many.
                    return self._dig(proxy, names[-left], port, _share(until, min(left, 2)))
                except OSError:
                    if left == 1:
                        raise
        raise AssertionError("a resolver without an address")

    def _dig(self, proxy: Url, name: str, port: int, until: float) -> socket.socket:
        sock = self._reach(proxy, until)
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            TUNNELS[proxy.scheme].dig(_Exact(sock, until), name, port, proxy)
            sock.settimeout(_CONNECT)
            undo.pop_all()
        return sock


class ScreenedDialer(Dialer):
    """For places that strangers name: nothing inside is reached. Where the proxy looks names up,
    it alone knows where they lead; addresses and this machine are refused even so."""

    def __init__(self, dialer: Dialer) -> None:
        super().__init__(ScreenedResolver(dialer.resolver), dialer.route)

    def connect(self, host: str, port: int, until: float) -> socket.socket:
        if is_ip(host) or f".{_checked_host(host)}".endswith(".localhost"):
            self.resolver.lookup(host, until)
        return super().connect(host, port, until)


class _Wire:
    """One connection to a server, and what was read ahead from it."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer  # in words
        self.until = 0.0  # monotonic time at which the exchange has taken too long
        self.idle_since = 0.0
        self._ahead = b""

    def receive(self, stall: float) -> bytes:
        """Some bytes, b"" at the end. Raises socket.timeout."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        left = self.until - time.monotonic()
        if left <= 0:
            raise socket.timeout("took too long")
        self.sock.settimeout(min(stall, left))
        return self.sock.recv(1 << 16)

    def unread(self, data: bytes) -> None:
        self._ahead = data + self._ahead

    def lines(self, limit: int, stall: float) -> list[bytes]:
        """Lines up to an empty one. Raises BadRequest beyond limit bytes, EOFError."""
        data = b""
        while True:
            end = data.find(b"\r\n\r\n") if not data.startswith(b"\r\n") else -2
            if end != -1:
                self.unread(data[end + 4 :])
                return data[:end].split(b"\r\n") if end > 0 else []
            if len(data) > limit:
                raise BadRequest("head too large")
            data += self._more(stall)

    def line(self, limit: int, stall: float) -> bytes:
        """One line, without its CRLF. Raises as lines does."""
        data = b""
        while b"\r\n" not in data:
            if len(data) > limit:
                raise BadRequest("line too long")
            data += self._more(stall)
        line, _, rest = data.partition(b"\r\n")
        self.unread(rest)
        return line

    def _more(self, stall: float) -> bytes:
        data = self.receive(stall)
        if not data:
            raise EOFError("connection closed early")
        return data

    def is_dead(self) -> bool:
        """Whether an idle connection has been closed, or has said something out of turn."""
        if self._ahead:
            return True
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        self.sock.close()


class Response(Blob):
    """An answer's head, and its body as a blob that knows when it was cut short."""

    _HEAD_LIMIT = 64 * 1024
    _STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: .*)?")

    def __init__(
        self, wire: _Wire, patience: Patience, release: Callable[[], None], request: Outgoing
    ) -> None:
        self._wire = wire
        self.peer = wire.peer  # who answers, in words
        self.shown: Sequence[str] = ()  # the Authorization values of the request
        self._host = METER.host(wire.peer.partition(" ")[0])
        self._patience = patience
        self._release = release
        self._read_head()
        # To a HEAD no body follows, whatever the head says.
        self.bodiless = request.method == "HEAD" or self.status in (204, 304)
        self._frame(request.is_passed)

    def _read_head(self) -> None:
        stall = self._patience.header
        for _ in range(8):  # a server may send a few interim answers, not an endless row of them
            lines = self._wire.lines(self._HEAD_LIMIT, stall)
            match = self._STATUS_LINE.fullmatch(lines[0]) if lines else None
            if not match:
                raise BadRequest("not HTTP")
            self.status = int(match[1])
            if self.status >= 200:
                self.fields, self.lines = parse_fields(lines[1:]), split_fields(lines[1:])
                self._keep = lines[0].startswith(b"HTTP/1.1")
                return
        raise BadRequest("too many interim answers")

    def _frame(self, may_be_coded: bool) -> None:
        """How long the body is: RFC 9112, section 6.3, with every doubtful case refused."""
        coding = self.fields.get("transfer-encoding")
        self.size = content_length(self.fields)
        if coding is not None and (self.size is not None or coding.lower() != "chunked"):
            raise BadRequest("ambiguous body length")
        is_coded = not {"", "identity"}.issuperset(self.fields.tokens("content-encoding"))
        if is_coded and not may_be_coded:
            raise BadRequest("compressed although nobody asked for it")
        if self.bodiless:
            self.size, coding = 0, None
        self.whole = coding is not None or self.size is not None  # else it ends when it ends
        self._keep = self._keep and self.whole and "close" not in self.fields.tokens("connection")
        self._left: int | None = 0 if coding else self.size
        self._chunked = coding is not None
        self._ended = False
        if self.size == 0:
            self._end()

    def read(self, count: int) -> bytes:
        if self._ended:
            return b""
        with _metered(self._host), _blaming(self.peer):
            if self._chunked and self._left == 0 and not self._next_chunk():
                return b""
            data = self._wire.receive(self._patience.stall)
            want = count if self._left is None else min(count, self._left)
            if len(data) > want:
                self._wire.unread(data[want:])
                data = data[:want]
            if not data and self._left is not None:
                raise EOFError(f"body cut short, {self._left} bytes missing")
            self._took(data)
            METER.add("goproxy_upstream_received_bytes_total", len(data), host=self._host)
            return data

    def _took(self, data: bytes) -> None:
        if not data:
            self._end()
        elif self._left is not None:
            self._left -= len(data)
            if self._left == 0 and self._chunked:
                if self._wire.line(2, self._patience.stall):
                    raise BadRequest("malformed chunk")
            elif self._left == 0:
                self._end()

    def _next_chunk(self) -> bool:
        """Reads a chunk's size line; at the last chunk, the trailers too (RFC 9112, 7.1)."""
        line = self._wire.line(256, self._patience.stall)
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;.*)?", line)
        if not match:
            raise BadRequest("malformed chunk size")
        self._left = int(match[1], 16)
        if self._left == 0:
            self._wire.lines(16 * 1024, self._patience.stall)
            self._end()
        return not self._ended

    def _end(self) -> None:
        self._ended = True
        if self._keep:
            self._release()
        else:
            self._wire.close()

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._wire.close()  # the rest of the body is in the way of the next exchange


class LongBody(Blob):
    """A body that outlives cut connections: the rest is asked for with Range, and where a server
    starts again from the beginning, what was delivered before must be the same bytes."""

    TRIES = 3

    def __init__(
        self, response: Response, passing: type[ProxyError], limit: float = math.inf
    ) -> None:
        """The rest is asked for after an error of the kind `passing`; the last of three such errors
        is raised. `limit` is in bytes."""
        self._response = response
        self._passing = passing
        self._limit = limit
        self._tries = self.TRIES
        self._delivered = 0  # bytes
        self._digest = hashlib.sha256()  # of these
        self.size = response.size

    def _ask_rest(self, begins: tuple[str, str]) -> Response:
        """A 206 for this Range, or a 200."""
        raise NotImplementedError

    def read(self, count: int) -> bytes:
        data = self._next(count)
        self._delivered += len(data)
        self._digest.update(data)
        promised = self._limit if self.size is None else self.size
        if not self._delivered <= promised <= self._limit:
            raise BadUpstream(f"{self._response.peer}: more bytes than promised or allowed")
        return data

    def _next(self, count: int) -> bytes:
        broken = False
        while True:
            try:
                if broken:
                    self._resume()
                data = self._response.read(count)
                if not data and self._delivered < (self.size or 0):  # less than was asked for
                    raise Unreachable(f"{self._response.peer}: the rest of a body is cut short")
                return data
            except self._passing:
                broken = True
                self._tries -= 1
                if self._tries <= 0:
                    raise

    def _resume(self) -> None:
        self._response.close()
        self._response = self._ask_rest(("Range", f"bytes={self._delivered}-"))
        if self._response.status != 206:
            self._skip()
            return
        begins = f"bytes {self._delivered}-"
        if not self._response.fields.get("content-range", "").startswith(begins):
            raise BadUpstream(f"{self._response.peer}: a range that was not asked for")

    def _skip(self) -> None:
        again = hashlib.sha256()
        left = self._delivered
        while left:
            data = self._response.read(min(CHUNK, left))
            if not data:
                raise Unreachable(f"{self._response.peer}: a shorter body at the second try")
            again.update(data)
            left -= len(data)
        if again.digest() != self._digest.digest():
            raise BadUpstream(f"{self._response.peer}: other bytes at the second try")

    def close(self) -> None:
        self._response.close()


HOP_FIELD = "X-Goproxy-Hop"
HOP = secrets.token_hex(8)  # in each of our requests, and so in those that come back to us


class Body(NamedTuple):
    """What a request carries: its length in bytes, and `read_at(count, offset)`, which gives the
    same bytes as often as it is asked."""

    size: int
    read_at: Callable[[int, int], bytes]

    def framing(self) -> tuple[str, str]:
        """The field that tells where it ends."""
        return ("Content-Length", str(self.size))

    def pieces(self) -> Iterator[bytes]:
        """Raises BadRequest if the bytes end early."""
        offset = 0
        while offset < self.size:
            piece = self.read_at(min(CHUNK, self.size - offset), offset)
            if not piece:
                raise BadRequest("a body became shorter while it was sent")
            offset += len(piece)
            yield piece


class OneWay(Body):
    """A body that can be had only once: `read_at` gives what comes next. Its size is -1 if nobody
    knows it; then it goes in chunks (RFC 9112, section 7.1)."""

    def framing(self) -> tuple[str, str]:
        return ("Transfer-Encoding", "chunked") if self.size < 0 else super().framing()

    def pieces(self) -> Iterator[bytes]:
        for piece in iter(lambda: self.read_at(CHUNK, 0), b""):
            yield piece if self.size >= 0 else b"%x\r\n%b\r\n" % (len(piece), piece)
        if self.size < 0:
            yield b"0\r\n\r\n"


def bytes_body(data: bytes) -> Body:
    return Body(len(data), lambda count, offset: data[offset : offset + count])


class Outgoing(NamedTuple):
    """A request. One whose method is idempotent may be sent twice (RFC 9110, section 9.2.2)."""

    method: str
    url: Url
    headers: Sequence[tuple[str, str]] = ()
    body: Body | None = None

    @property
    def may_repeat(self) -> bool:
        return self.method != "POST"

    @property
    def is_passed(self) -> bool:
        """Whether somebody else has asked it, and gets the answer as it is."""
        return False

    def head(self, proxy: Url | None) -> bytes:
        """Its first bytes, in absolute form for a proxy. Nothing in it may break a line: six CVEs
        of http.client say why."""
        url = self.url
        lines = [
            f"{self.method} {f'http://{url.authority}' if proxy else ''}{url.path or '/'} HTTP/1.1",
            *(f"{name}: {value}" for name, value in self._fields_sent()),
        ]
        if self.body is not None:
            lines.append(": ".join(self.body.framing()))
        if proxy and proxy.user:
            lines.append(f"Proxy-Authorization: {_basic(proxy.user, proxy.password)}")
        known = r"[\t\x20-\x7e\x80-\xff]+" if self.is_passed else r"[\x20-\x7e]+"
        for line in lines:
            if not re.fullmatch(known, line):
                raise BadUpstream(f"{url.authority}: unsafe character in a request")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _fields_sent(self) -> Sequence[tuple[str, str]]:
        return [
            ("Host", self.url.authority),
            ("User-Agent", f"goproxy.py/{__version__}"),
            ("Accept-Encoding", "identity"),
            *self.headers,
        ]


class Passed(Outgoing):
    """A request of somebody else: its header lines are all there are."""

    @property
    def may_repeat(self) -> bool:
        return self.body is None and self.method in ("GET", "HEAD")

    @property
    def is_passed(self) -> bool:
        return True

    def _fields_sent(self) -> Sequence[tuple[str, str]]:
        return self.headers


REDIRECTS = frozenset([301, 302, 303, 307, 308])  # what they lead to is asked in the same way


_IN_HASTE: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "_IN_HASTE", default=None
)


@contextlib.contextmanager
def hastily() -> Iterator[list[str]]:
    """For who can do without: no host that fails is waited for. Gives those passed over."""
    passed_over: list[str] = []
    token = _IN_HASTE.set(passed_over)
    try:
        yield passed_over
    finally:
        _IN_HASTE.reset(token)


def passes_over(whom: str) -> bool:
    """Whether this is done hastily; then somebody has been passed over."""
    passed_over = _IN_HASTE.get()
    if passed_over is not None:
        passed_over.append(whom)
    return passed_over is not None


@dataclasses.dataclass
class _Outage:
    """What is known of a host that has failed to answer. Times are monotonic."""

    failures: int = 0  # in a row
    kind: type[Unreachable] = Unreachable  # of the last one
    words: str = ""
    failed: float = 0.0  # when the latest request that failed began
    answered: float = 0.0
    probed: float = 0.0  # when it was asked last although it fails
    waiting: int = 0

    def refusal(self, host: str) -> Unreachable:
        times = f"has failed {self.failures} times in a row and is asked once a second"
        error = self.kind(f"{host} {times}: {self.words}")
        error.lasts = True
        return error


class Circuits:
    """Spares hosts that do not answer: after five requests in a row without a status line, a host
    is asked once a second, and whoever else comes waits for what that brings.

    A failure counts only for those that came before it began, so that the first request after an
    outage goes well. Whoever has waited for 2.5 seconds fails as the last one did."""

    _FAILURES, _REST, _PATIENCE, _WAITERS, _HOSTS = 5, 1.0, 2.5, 20, 1000

    def __init__(self, log: Log | None) -> None:
        self._log = log
        self._changed = threading.Condition()
        self._outages: dict[str, _Outage] = {}  # by scheme and authority

    @contextlib.contextmanager
    def asking(self, url: Url, until: float) -> Iterator[None]:
        """Around one request; `until` is monotonic. Raises Unreachable, UpstreamTimeout."""
        place = f"{url.scheme}://{url.authority}"
        began = self._admit(place, until)
        try:
            yield
        except Unreachable as error:
            self._fail(place, began, error)
            raise
        except BadUpstream:
            self._recover(place)  # nonsense or a refusal, but no outage
            raise
        self._recover(place)

    def _admit(self, place: str, until: float) -> float:
        """Waits while that may help; the time after it."""
        came = now = time.monotonic()
        passed_over = _IN_HASTE.get()
        until = min(until, came + (self._PATIENCE if passed_over is None else 0.0))
        with self._changed:
            while (outage := self._open(place)) and now < outage.probed + self._REST:
                if outage.failed > came or now >= until or outage.waiting >= self._WAITERS:
                    passes_over(place)
                    raise outage.refusal(place)
                outage.waiting += 1
                self._changed.wait(min(until, outage.probed + self._REST) - now)
                outage.waiting -= 1
                now = time.monotonic()
            if outage:
                outage.probed = now
        return now

    def _open(self, place: str) -> _Outage | None:
        outage = self._outages.get(place)
        return outage if outage and outage.failures >= self._FAILURES else None

    def _fail(self, place: str, began: float, error: Unreachable) -> None:
        with self._changed:
            if place not in self._outages and len(self._outages) >= self._HOSTS:
                self._recover(next(iter(self._outages)))
                del self._outages[next(iter(self._outages))]
            outage = self._outages.setdefault(place, _Outage())
            if began < outage.answered:
                return
            outage.failures += 1
            outage.failed = max(began, outage.failed)
            outage.kind, outage.words = type(error), str(error)
            error.lasts = outage.failures >= self._FAILURES
            if outage.failures == self._FAILURES:
                outage.probed = time.monotonic()
                self._tell(place, 1, str(outage.refusal(place)))
            self._changed.notify_all()

    def _recover(self, place: str) -> None:
        if place not in self._outages:
            return  # as nearly always
        with self._changed:
            outage, was_open = self._outages.get(place, _Outage()), self._open(place)
            outage.answered, outage.failures = time.monotonic(), 0
            if was_open:
                self._tell(place, -1, f"{place} is asked as usual again")
            self._changed.notify_all()

    def _tell(self, place: str, change: int, words: str) -> None:
        host = METER.host(place.partition("://")[2])
        METER.add("goproxy_upstream_open", change, host=host)
        if self._log:
            self._log.line(words, "error" if change > 0 else "info")


class Client:
    """HTTP over pooled connections: 100 idle ones in all, 10 to a host, for 90 seconds.

    Redirects are followed ten times at most, never from https to http, and credentials never
    follow to another scheme, host or port."""

    _IDLE_SECONDS, _IDLE_PER_HOST, _IDLE_IN_ALL, _REDIRECTS = 90.0, 10, 100, 10

    def __init__(
        self, dialer: Dialer, credentials: Mapping[str, str], log: Log | None = None
    ) -> None:
        """`credentials`: Authorization values by host or host:port (see read_netrc). `log` is told
        of outages."""
        self._dialer = dialer
        self._credentials = credentials
        self._circuits = Circuits(log)
        self._mutex = threading.Lock()
        self._idle: list[tuple[tuple[str, str, int], _Wire]] = []  # the oldest first
        self._wires: weakref.WeakSet[_Wire] = weakref.WeakSet()
        self._closed = False
        self._context: ssl.SSLContext | None = None

    def get(
        self,
        url: Url,
        patience: Patience,
        headers: Sequence[tuple[str, str]] = (),
        until: float = 0.0,
        authorization: str = "",
    ) -> Response:
        """The final answer, whatever its status. `until` (monotonic) shortens patience.total;
        `authorization` wins over what the client knows. Raises BadUpstream, Unreachable,
        UpstreamTimeout."""
        limit = time.monotonic() + patience.total
        until = min(limit, until or limit)
        request = Outgoing("GET", url, [*headers, (HOP_FIELD, HOP)])
        return self.follow(request, patience, until, authorization or self.authorization(url))

    def follow(
        self, request: Outgoing, patience: Patience, until: float, authorization: str = ""
    ) -> Response:
        """As get, for a request without a body, and with no other credentials than these."""
        target = request.url
        for _ in range(self._REDIRECTS + 1):
            extra = [("Authorization", authorization)] if authorization else []
            asked = request._replace(url=target, headers=[*request.headers, *extra])
            response = self.send(asked, patience, until)
            if response.status not in REDIRECTS:
                return response
            response.close()
            following = redirect_target(target, response.fields.get("location", ""))
            if following.origin != target.origin:
                authorization = ""
            target = following
        raise BadUpstream(f"{request.url.authority}: more than {self._REDIRECTS} redirects")

    def authorization(self, url: Url) -> str:
        """The value of that field for a URL, "" for none."""
        if url.user or url.password:
            return _basic(url.user, url.password)
        return self._credentials.get(f"{url.host}:{url.port}") or self._credentials.get(
            url.host, ""
        )

    def send(self, request: Outgoing, patience: Patience, until: float) -> Response:
        """The answer to one request, whatever its status; `until` is monotonic. No redirect is
        followed and no credentials are added. Raises as get does."""
        proxy = self._dialer.forward_proxy(request.url)
        host = METER.host(request.url.authority)
        asking = self._circuits.asking(request.url, until)
        with _traced(request) as span, _metered(host), asking:
            response = self._send(_with_trace(request), proxy, patience, until)
            response.shown = _credentials_in(request, proxy)
            span.note("http.response.status_code", response.status)
            if response.status >= 400 and response.status not in _ANSWERS:
                span.fail(str(response.status), f"answered {response.status}")
        METER.add("goproxy_upstream_requests_total", host=host, code=response.status)
        _check_forwarded(request, response, proxy)
        return response

    def _send(
        self, request: Outgoing, proxy: Url | None, patience: Patience, until: float
    ) -> Response:
        head = request.head(proxy)
        # An idle connection may be closed under our hands; nothing was answered then.
        wire = self._lend(request.url) if request.may_repeat else None
        if wire:
            try:
                response = self._exchange(wire, request, head, patience, until)
                if response.status != 408:  # which was for the idle connection
                    return response
                response.close()
            except UpstreamTimeout:
                raise
            except Unreachable:
                pass
        wire = self._connect(request.url, proxy, until)
        return self._exchange(wire, request, head, patience, until)

    def _exchange(
        self, wire: _Wire, request: Outgoing, head: bytes, patience: Patience, until: float
    ) -> Response:
        wire.until = until
        with self._mutex:
            self._wires.add(wire)
            if self._closed:
                wire.close()
        try:
            with _blaming(wire.peer):
                wire.sock.settimeout(patience.header)
                wire.sock.sendall(head)
                sent = self._feed(wire, request.body, patience.stall)
                release = functools.partial(self._give_back, request.url, wire)
                keep = release if sent else wire.close
                return Response(wire, patience, keep, request)
        except BaseException:
            wire.close()
            raise

    @staticmethod
    def _feed(wire: _Wire, body: Body | None, stall: float) -> bool:
        """Whether the whole body went out: who refuses it says why, and may hang up."""
        try:
            for piece in body.pieces() if body else ():
                wire.sock.settimeout(min(stall, time_left(wire.until)))
                wire.sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):  # the last one: by TLS
            return False
        return True

    def _connect(self, url: Url, proxy: Url | None, until: float) -> _Wire:
        peer = self._dialer.route.peer(url)
        if proxy:
            return _Wire(self._dialer.connect_proxy(proxy, until), peer)
        sock = self._dialer.connect(url.host, url.port, until)
        if url.scheme == "http":
            return _Wire(sock, peer)
        with _blaming(peer):
            until = min(until, time.monotonic() + _HANDSHAKE)
            return _Wire(start_tls(sock, self.tls(), url.host, until), peer)

    def tls(self) -> ssl.SSLContext:
        """Certificates of the system or of SSL_CERT_FILE; read once, at the first use."""
        with self._mutex:
            if self._context is None:
                self._context = ssl.create_default_context()
            return self._context

    def _lend(self, url: Url) -> _Wire | None:
        while True:
            with self._mutex:
                same = [n for n, (origin, _) in enumerate(self._idle) if origin == url.origin]
                if not same:
                    return None
                _, wire = self._idle.pop(same[-1])
            if time.monotonic() - wire.idle_since < self._IDLE_SECONDS and not wire.is_dead():
                return wire
            wire.close()

    def _give_back(self, url: Url, wire: _Wire) -> None:
        with self._mutex:
            wire.idle_since = time.monotonic()
            oldest = wire.idle_since - self._IDLE_SECONDS
            gone = [one for _, one in self._idle if one.idle_since <= oldest]
            del self._idle[: len(gone)]
            same = sum(origin == url.origin for origin, _ in self._idle)
            if same < self._IDLE_PER_HOST and len(self._idle) < self._IDLE_IN_ALL:
                self._idle.append((url.origin, wire))
            else:
                gone.append(wire)
        for one in gone:
            one.close()

    def close(self) -> None:
        """Ends what is idle and what is on its way."""
        with self._mutex:
            self._closed = True
            wires = list(self._wires)
            self._idle.clear()
        for wire in wires:
            wire.close()


def _credentials_in(request: Outgoing, proxy: Url | None) -> Sequence[str]:
    """The Authorization values of a request, with that for the proxy to which it goes."""
    values = [value for name, value in request.headers if name.lower() == "authorization"]
    return [*values, _basic(proxy.user, proxy.password)] if proxy else values


_ANSWERS = (404, 410, 412)  # absence, and that another was first, are no failures


def _traced(request: Outgoing) -> NoSpan:
    """The span of a request, without what may be secret: credentials and the query."""
    url = request.url
    attributes = {
        "http.request.method": request.method,
        "server.address": url.host,
        "server.port": url.port,
        "url.full": str(url).partition("?")[0],
    }
    return TRACER.span(request.method, attributes, Span.CLIENT)


def _with_trace(request: Outgoing) -> Outgoing:
    """The request with the trace that it is part of, in the place of one that it came with."""
    if TRACER.current is None:
        return request
    ours = TRACER.current.headers()
    kept = [line for line in request.headers if line[0].lower() not in TRACE_FIELDS]
    return request._replace(headers=[*kept, *ours])


@contextlib.contextmanager
def _metered(host: str) -> Iterator[None]:
    try:
        yield
    except (BadBody, HeadTooSlow):
        raise  # of the client whose body it is
    except ProxyError as error:
        failure = type(error).__name__
        METER.add("goproxy_upstream_failures_total", host=host, failure=failure)
        raise


def _check_forwarded(request: Outgoing, response: Response, proxy: Url | None) -> None:
    """Raises BadUpstream if it is the proxy that refuses: what it hands on has a Via (RFC 9110,
    section 7.6.3), or should have. A challenge of a registry must come through all the same."""
    fields = response.fields
    is_own = ("via" not in fields and not request.is_passed) or "x-squid-error" in fields
    if proxy and (response.status == 407 or (is_own and response.status in (401, 403))):
        response.close()
        wanted = _unwelcome(proxy, fields.get("proxy-authenticate", ""))
        words = "its rules forbid it" if response.status == 403 else wanted
        raise BadUpstream(f"{response.peer}: {words}")


def redirect_target(url: Url, location: str) -> Url:
    """Where a redirect leads. Raises BadUpstream for what must not be followed."""
    if not re.fullmatch(r"[\x21-\x7e]+", location):
        raise BadUpstream(f"{url.authority}: redirect without a usable location")
    try:
        joined = urllib.parse.urljoin(str(url) or "/", location).partition("#")[0]
        base, mark, query = joined.partition("?")
        target = parse_url(base)
    except ValueError:
        raise BadUpstream(f"{url.authority}: redirect to something that is not http") from None
    if url.scheme == "https" and target.scheme != "https":
        raise BadUpstream(f"{url.authority}: redirect from https to http refused")
    path = urllib.parse.urlsplit(base).path
    return dataclasses.replace(target, path=(path or "/") + mark + query)


_NETRC_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"(?!\S)|(\S+)')


def read_netrc(path: str) -> dict[str, str]:
    """Authorization values by machine of a netrc file, read as the go command does (Go:
    cmd/go/internal/auth/netrc.go): words come in pairs, those it does not know are passed over, of
    two entries the first counts, and nothing after `default`. A word may be in quotes, as curl and
    so git have it. A missing file has none. Raises UsageError naming the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"NETRC={path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"NETRC={path}: not a netrc file: not UTF-8") from None
    return _netrc_logins(text)


def _netrc_logins(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    entry: dict[str, str] = {}
    in_macro = False
    for line in text.split("\n"):
        if in_macro:
            in_macro = bool(line)
            continue
        words = [re.sub(r"\\(.)", r"\1", a) or b for a, b in _NETRC_WORD.findall(line)]
        for name, value in zip(words[::2], words[1::2]):
            if name == "machine":
                entry = {}
            entry[name] = value
            in_macro = in_macro or name == "macdef"
            if {"machine", "login", "password"} <= entry.keys():
                value = _basic(entry["login"], entry["password"])
                found.setdefault(entry["machine"].lower(), value)
                entry = {}
        if len(words) % 2 and words[-1] == "default":
            break
    return found


class VcsLogin(NamedTuple):
    """A line of -vcs-auth: for which repositories, and what is shown there."""

    glob: str  # of host[:port]/path
    authorization: str = ""  # over https
    helper: str = ""  # a git credential helper, over https
    key: str = ""  # a file, over ssh
    known_hosts: str = ""  # a file, over ssh


class _LoginKind(NamedTuple):
    form: str  # what follows the kind
    words: range  # how many words that is
    make: Callable[..., VcsLogin]


_LOGIN_KINDS = {
    "basic": _LoginKind(
        "USER PASSWORD",
        range(2, 3),
        lambda glob, user, password: VcsLogin(glob, authorization=_basic(user, password)),
    ),
    "bearer": _LoginKind(
        "TOKEN",
        range(1, 2),
        lambda glob, token: VcsLogin(glob, authorization=f"Bearer {token}"),
    ),
    "helper": _LoginKind(
        "COMMAND", range(1, 99), lambda glob, *words: VcsLogin(glob, helper=" ".join(words))
    ),
    "ssh": _LoginKind(
        "KEYFILE [KNOWN_HOSTS_FILE]",
        range(1, 3),
        lambda glob, key, hosts="": VcsLogin(glob, key=key, known_hosts=hosts),
    ),
}


def read_logins(text: str, origin: str) -> list[VcsLogin]:
    """The lines of -vcs-auth. Raises UsageError that names a line, and no word of it."""
    logins = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            try:
                logins.append(_login(*words))
            except ValueError as error:
                raise UsageError(f"{origin}: line {number}: {error}") from None
    return logins


class LoginFile:
    """The lines of a file, read anew when it changes, because tokens are renewed. What it said
    before counts as long as it cannot be read."""

    def __init__(self, path: str, origin: str) -> None:
        """Raises UsageError."""
        self._path = path
        self._origin = f"{origin}={path}"
        self._read()

    def logins(self) -> Sequence[VcsLogin]:
        with contextlib.suppress(OSError, UsageError):
            if stamp_of(os.stat(self._path)) != self._stamp:
                self._read()
        return self._logins

    def remark(self) -> str:
        """What the operator should know of the file, if anything."""
        told = f"{self._origin}: others can read it: chmod 600 {self._path}"
        return told if self._mode & 0o077 else ""

    def _read(self) -> None:
        try:
            with open(self._path, encoding="utf-8") as file:
                status, text = os.fstat(file.fileno()), file.read()
        except OSError as error:
            raise UsageError(f"{self._origin}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{self._origin}: not UTF-8") from None
        self._mode, self._stamp = status.st_mode, stamp_of(status)
        self._logins = read_logins(text, self._origin)


def _login(glob: str, name: str = "", *words: str) -> VcsLogin:
    if name not in _LOGIN_KINDS or len(parse_globs(glob)) != 1:
        raise ValueError(f"want GLOB, one of {', '.join(_LOGIN_KINDS)}, and what that takes")
    kind = _LOGIN_KINDS[name]
    if len(words) not in kind.words or not all(word.isprintable() for word in words):
        raise ValueError(f"want GLOB {name} {kind.form}")
    return kind.make(*parse_globs(glob), *words)


# DNS servers: five ways to ask one


class DnsLinks(NamedTuple):
    """What a transport may use to reach its server. Nothing here asks the servers of -dns: their
    own names are looked up by the system."""

    dialer: Dialer
    client: Client
    ca_file: str | None = None  # instead of the system's, for QUIC, which takes no SSLContext


class DnsTransport:
    """Asks one server; `carry` takes a message there and brings its answer back."""

    _SIZE = 65535  # bytes of an answer; CoreDNS heeds it in streams too

    def __init__(self, server: Url, links: DnsLinks) -> None:
        self._server = server
        self._links = links

    def ask(self, name: str, kind: int, until: float) -> DnsAnswer:
        """The addresses of one kind. Raises BadUpstream, Unreachable, UpstreamTimeout."""
        with naming(f"dns: {self._server}"):
            reply = self._exchange(name, kind, self._SIZE, until)
            if reply.rcode in (_FORMERR, _NOTIMP):  # to EDNS0, as RFC 6891 has it in section 7
                reply = self._exchange(name, kind, 0, until)
            if reply.truncated:
                raise BadUpstream("truncated answer")
        return find_addresses(name, kind, reply)

    def _exchange(self, name: str, kind: int, size: int, until: float) -> DnsReply:
        query = encode_query(name, kind, secrets.randbelow(1 << 16), size)
        return decode_reply(self.carry(query, until), query)

    def carry(self, query: bytes, until: float) -> bytes:
        """Raises OSError, BadUpstream."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back kept connections."""

    def _addresses(self, until: float) -> list[str]:
        return self._links.dialer.resolver.lookup(self._server.host, until)


class _Channel(Protocol):
    """A connection that carries one query after the other."""

    def exchange(self, query: bytes, until: float) -> bytes:
        """Raises OSError; the channel is of no use then."""

    def close(self) -> None: ...


class _DnsOverChannel(DnsTransport):
    """Keeps four channels, for ten seconds: servers and routers forget them without a word."""

    _IDLE, _IDLE_SECONDS = 4, 10.0

    def __init__(self, server: Url, links: DnsLinks) -> None:
        super().__init__(server, links)
        self._mutex = threading.Lock()
        self._idle: list[tuple[float, _Channel]] = []

    def _open(self, until: float) -> _Channel:
        raise NotImplementedError

    def carry(self, query: bytes, until: float) -> bytes:
        channel = self._lend()
        if channel:
            with contextlib.suppress(OSError):  # the server may have closed it meanwhile
                return self._use(channel, query, _share(until, 2))
        return self._use(self._open(until), query, until)

    def _lend(self) -> _Channel | None:
        """The channel used last; those that are too old are closed."""
        with self._mutex:
            idle, self._idle = self._idle, []
            oldest = time.monotonic() - self._IDLE_SECONDS
            self._idle = [pair for pair in idle if pair[0] > oldest]
            channel = self._idle.pop()[1] if self._idle else None
        for since, old in idle:
            if since <= oldest:
                old.close()
        return channel

    def _use(self, channel: _Channel, query: bytes, until: float) -> bytes:
        with contextlib.ExitStack() as undo:
            undo.callback(channel.close)
            message = channel.exchange(query, until)
            with self._mutex:
                if len(self._idle) < self._IDLE and answers_query(message, query):
                    self._idle.append((time.monotonic(), channel))
                    undo.pop_all()
        return message

    def close(self) -> None:
        with self._mutex:
            idle, self._idle = self._idle, []
        for _, channel in idle:
            channel.close()


class _StreamChannel(_Channel):
    """Messages with their length before them."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def exchange(self, query: bytes, until: float) -> bytes:
        exact = _Exact(self._sock, until)
        exact.send(struct.pack("!H", len(query)) + query)
        return exact.read(struct.unpack("!H", exact.read(2))[0])

    def close(self) -> None:
        self._sock.close()


class DnsOverTcp(_DnsOverChannel):
    """RFC 7766. Goes through the proxy."""

    def _open(self, until: float) -> _Channel:
        return _StreamChannel(self._connect(until))

    def _connect(self, until: float) -> socket.socket:
        return self._links.dialer.connect(self._server.host, self._server.port, until)


class DnsOverTls(DnsOverTcp):
    """RFC 7858, always with a certificate for the name or IP (RFC 8310). Goes through the proxy."""

    def _open(self, until: float) -> _Channel:
        sock = self._connect(until)
        return _StreamChannel(start_tls(sock, self._links.client.tls(), self._server.host, until))


class DnsOverHttps(DnsTransport):
    """JSON where the server speaks it, else messages (RFC 8484). Goes through the proxy.

    A path that ends in /resolve means JSON. Else the server is asked for JSON, and when it refused
    that and answered a message, for messages alone."""

    _MESSAGE, _JSON = "application/dns-message", ("application/dns-json", "application/json")
    _SAYS_NOTHING = (401, 403, 407, 429)  # about what the server speaks

    def __init__(self, server: Url, links: DnsLinks) -> None:
        super().__init__(dataclasses.replace(server, path=server.path or "/dns-query"), links)
        self._json_only = server.path.endswith("/resolve")
        self._messages_only = False

    def ask(self, name: str, kind: int, until: float) -> DnsAnswer:
        reply = None if self._messages_only else self._ask_json(name, kind, until)
        if reply:
            return find_addresses(name, kind, reply)
        found = super().ask(name, kind, until)
        self._messages_only = True
        return found

    def _ask_json(self, name: str, kind: int, until: float) -> DnsReply | None:
        """None from a server that does not speak JSON."""
        with naming(f"dns: {self._server}"):
            status, media, body = self._get(f"name={name}&type={kind}", self._JSON[0], until)
            if status == 200 and media in self._JSON:
                return decode_json(body)
            if self._json_only or status in self._SAYS_NOTHING or status >= 500:
                raise Unreachable(f"answered {status}, {media or 'no content type'}")
        return None

    def carry(self, query: bytes, until: float) -> bytes:
        message = b"\0\0" + query[2:]  # no number, so that caches between can answer
        text = base64.urlsafe_b64encode(message).rstrip(b"=").decode("ascii")
        status, media, body = self._get(f"dns={text}", self._MESSAGE, until)
        if status != 200 or media != self._MESSAGE:
            raise Unreachable(f"answered {status}, {media or 'no content type'}")
        return query[:2] + body[2:]

    def close(self) -> None:
        self._links.client.close()

    def _get(self, question: str, accept: str, until: float) -> tuple[int, str, bytes]:
        """Status, media type and body."""
        url = dataclasses.replace(self._server, path=f"{self._server.path}?{question}")
        response = self._links.client.get(url, METADATA, [("Accept", accept)], until)
        with contextlib.closing(response):
            media = response.fields.get("content-type", "").partition(";")[0].strip().lower()
            return response.status, media, response.read_all(self._SIZE)


def _datagram_socket(addresses: Sequence[str], port: int) -> socket.socket:
    """A socket connected to the first address to which there is a way. Raises OSError."""
    for left in range(len(addresses), 0, -1):
        sock = socket.socket(_family(addresses[-left]), socket.SOCK_DGRAM)
        try:
            sock.connect((addresses[-left], port))
            return sock
        except OSError:
            sock.close()
            if left == 1:
                raise
    raise AssertionError("a resolver without an address")


class DnsOverQuic(_DnsOverChannel):
    """RFC 9250, by the package aioquic. Raises ValueError if that is missing."""

    _MODULES = ("aioquic.quic.configuration", "aioquic.quic.connection", "aioquic.quic.events")

    def __init__(self, server: Url, links: DnsLinks) -> None:
        super().__init__(server, links)
        try:
            self._modules = tuple(map(importlib.import_module, self._MODULES))
        except ImportError:
            raise ValueError(
                "quic:// needs a package: pip install aioquic, or 'goproxy.py[quic]'"
            ) from None

    def _open(self, until: float) -> _Channel:
        configuration, connection, events = self._modules
        options = configuration.QuicConfiguration(
            alpn_protocols=["doq"], is_client=True, server_name=self._server.host
        )
        own, paths = self._links.ca_file, ssl.get_default_verify_paths()
        options.load_verify_locations(own or paths.cafile, None if own else paths.capath)
        sock = _datagram_socket(self._addresses(until), self._server.port)
        return _QuicChannel(connection.QuicConnection(configuration=options), events, sock, until)


class _QuicChannel(_Channel):
    """Turns aioquic's connection by hand: it does no I/O itself."""

    def __init__(self, quic: Any, events: Any, sock: socket.socket, until: float) -> None:
        self._quic = quic
        self._events = events
        self._sock = sock
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            quic.connect(sock.getpeername(), now=time.monotonic())
            while not any(isinstance(one, events.HandshakeCompleted) for one in self._turn(until)):
                pass
            undo.pop_all()

    def exchange(self, query: bytes, until: float) -> bytes:
        stream = self._quic.get_next_available_stream_id()
        message = b"\0\0" + query[2:]  # the number is zero (RFC 9250, section 4.2.1)
        self._quic.send_stream_data(stream, struct.pack("!H", len(message)) + message, True)
        data, ended = b"", False
        while not ended:
            for event in self._turn(until):
                if isinstance(event, self._events.StreamDataReceived) and event.stream_id == stream:
                    data += event.data
                    ended = ended or event.end_stream
        if len(data) < 4 or struct.unpack("!H", data[:2])[0] != len(data) - 2:
            raise ConnectionError("answer of a wrong length")
        return query[:2] + data[4:]

    def _turn(self, until: float) -> list[Any]:
        """Sends what is due, then takes one datagram or lets the timer run out; what came of it.
        Raises OSError."""
        self._send()
        timer = self._quic.get_timer() or until
        self._sock.settimeout(max(0.001, min(time_left(until), timer - time.monotonic())))
        try:
            data = self._sock.recv(65535)
        except socket.timeout:
            self._quic.handle_timer(now=time.monotonic())
        else:
            self._quic.receive_datagram(data, self._sock.getpeername(), now=time.monotonic())
        events = list(iter(self._quic.next_event, None))
        for event in events:
            if isinstance(event, self._events.ConnectionTerminated):
                raise ConnectionError(event.reason_phrase or "connection closed")
        return events

    def _send(self) -> None:
        for data, _ in self._quic.datagrams_to_send(now=time.monotonic()):
            self._sock.send(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._quic.close()
            self._send()
        self._sock.close()


class DnsOverUdp(DnsTransport):
    """A socket for each question, so a port that the kernel picks at random. Goes directly."""

    _SIZE = 1232  # what fits into a packet everywhere (DNS flag day 2020)
    _SENDINGS, _WAIT_SECONDS, _MAX_SIZE = 3, 2.0, 4096

    def __init__(self, server: Url, links: DnsLinks) -> None:
        super().__init__(server, links)
        direct = Dialer(links.dialer.resolver, ProxyRoute())
        self._tcp = DnsOverTcp(server, links._replace(dialer=direct))

    def carry(self, query: bytes, until: float) -> bytes:
        with _datagram_socket(self._addresses(until), self._server.port) as sock:
            message = self._ask_often(sock, query, until)
        return self._tcp.carry(query, until) if message[2] & 2 else message

    def _ask_often(self, sock: socket.socket, query: bytes, until: float) -> bytes:
        for _ in range(self._SENDINGS):
            sock.send(query)
            with contextlib.suppress(socket.timeout):
                return self._hear(sock, query, min(until, time.monotonic() + self._WAIT_SECONDS))
        raise socket.timeout("timed out")

    def _hear(self, sock: socket.socket, query: bytes, until: float) -> bytes:
        """The first datagram that answers; others are somebody else's guesses."""
        while True:
            sock.settimeout(time_left(until))
            message = sock.recv(self._MAX_SIZE)
            if answers_query(message, query):
                return message

    def close(self) -> None:
        self._tcp.close()


DNS_TRANSPORTS: dict[str, type[DnsTransport]] = {
    "https": DnsOverHttps,
    "quic": DnsOverQuic,
    "tcp": DnsOverTcp,
    "tls": DnsOverTls,
    "udp": DnsOverUdp,
}


def open_transport(server: Url, links: DnsLinks) -> DnsTransport:
    """Raises ValueError in one line if a package is missing."""
    return DNS_TRANSPORTS[server.scheme](server, links)


class DnsResolver(CachingResolver):
    """Asks the servers of -dns, the next one when one fails."""

    _TURN = 2.0  # seconds: who asks waits five for all, and has to connect as well
    _AAAA_SECONDS = 0.25  # some routers swallow questions for IPv6 (RFC 8305, section 3)

    def __init__(self, transports: Sequence[DnsTransport]) -> None:
        super().__init__(self._ask_servers)
        self._transports = list(transports)
        self._best = 0  # the one that answered last is asked first

    def close(self) -> None:
        for transport in self._transports:
            transport.close()

    def _ask_servers(self, name: str, until: float) -> DnsAnswer:
        failures: list[BadUpstream] = []
        count, best = len(self._transports), self._best
        for turn in range(count):
            self._best = (best + turn) % count
            try:
                return self._ask_both(
                    self._transports[self._best], name, self._until(until, count - turn)
                )
            except BadUpstream as error:
                failures.append(unframed(error))
        raise type(failures[-1])("; ".join(map(str, failures)))

    def _until(self, until: float, left: int) -> float:
        """When to turn to the next server, if one is left."""
        return until if left == 1 else min(_share(until, left), time.monotonic() + self._TURN)

    def _ask_both(self, transport: DnsTransport, name: str, until: float) -> DnsAnswer:
        """A and AAAA at once; one that fails is forgiven when the other brings addresses."""
        later = in_thread(lambda: transport.ask(name, _AAAA, until))
        now: Future[DnsAnswer] = Future()
        try:
            now.set_result(transport.ask(name, _A, until))
        except BadUpstream as error:
            now.set_exception(error)
        useful = now.exception() is None and now.result().addresses
        patience = self._AAAA_SECONDS if useful else max(0.0, until - time.monotonic())
        done = concurrent.futures.wait([later], patience).done
        return _merged([*([later] if done else []), now], name)


def _merged(promises: Sequence[Future[DnsAnswer]], name: str) -> DnsAnswer:
    found = [promise.result() for promise in promises if not promise.exception()]
    useful = [one for one in found if one.addresses]
    if useful:
        addresses = [address for one in useful for address in one.addresses]
        return DnsAnswer(tuple(addresses), min(one.ttl for one in useful))
    if len(promises) < 2:
        raise UpstreamTimeout(f"dns: {name}: timed out")
    return next((promise for promise in promises if promise.exception()), promises[-1]).result()


def open_links(route: ProxyRoute, ca_file: str | None) -> DnsLinks:
    """The way to DNS servers; opens nothing yet. Their names are looked up by the system, once."""
    first = Dialer(SystemResolver(math.inf), route)
    return DnsLinks(first, Client(first, {}), ca_file)


def open_dialer(servers: Sequence[Url], route: ProxyRoute, ca_file: str | None) -> Dialer:
    """The dialer for everything; opens nothing yet. Raises ValueError in one line if a package is
    missing."""
    if not servers:
        return Dialer(SystemResolver(), route)
    links = open_links(route, ca_file)
    return Dialer(DnsResolver([open_transport(server, links) for server in servers]), route)


# What is wrong: one line for each server


class Finding(NamedTuple):
    """What was found out about one server, in words."""

    label: str
    where: str
    good: bool
    words: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'FAIL'}  {self.label}  {self.where}  {self.words}"


CheckStep = tuple[str, Callable[[], str]]  # what, and doing it: returns details, raises ProxyError


def examine(label: str, where: object, steps: Iterable[CheckStep]) -> Finding:
    """Takes the steps in turn, with timings, until one fails."""
    words: list[str] = []
    for what, work in steps:
        start = time.perf_counter()
        try:
            details = work()
        except ProxyError as error:
            return Finding(label, str(where), False, ", ".join([*words, f"{what}: {error}"]))
        spent = f"{what} {(time.perf_counter() - start) * 1000:.0f} ms"
        words.append(f"{spent} ({details})" if details else spent)
    return Finding(label, str(where), True, ", ".join(words))


_CHECK_SECONDS = 10.0


class _Visit:
    """The steps to a server, up to its answer to a GET of `path` below its URL."""

    GOOD: Sequence[int] = (200, 404, 410)  # from a server that works to a question it does not know

    def __init__(self, url: Url, path: str, dialer: Dialer, client: Client) -> None:
        self._url = url
        self._question = dataclasses.replace(url, path=f"{url.path}/{path}")
        self._dialer = dialer
        self._client = client
        self._until = time.monotonic() + _CHECK_SECONDS
        self._opened: list[socket.socket] = []

    def steps(self) -> Iterator[CheckStep]:
        if self._dialer.resolves(self._url.host, self._url.port):
            yield "look up", self._look_up
        yield "connect", self._connect
        if self._url.scheme == "https":
            yield "tls", self._handshake
        yield "ask", self._ask

    def _look_up(self) -> str:
        return " ".join(self._dialer.resolver.lookup(self._url.host, self._until)[:4])

    def _connect(self) -> str:
        proxy = self._dialer.forward_proxy(self._url)
        if proxy:
            sock = self._dialer.connect_proxy(proxy, self._until)
        else:
            sock = self._dialer.connect(self._url.host, self._url.port, self._until)
        self._opened.append(sock)
        return ""

    def _handshake(self) -> str:
        with _blaming(self._dialer.route.peer(self._url)):
            secure = start_tls(self._opened[0], self._client.tls(), self._url.host, self._until)
        self._opened.append(secure)
        certificate = secure.getpeercert() or {}
        return f"{secure.version()}, certificate until {certificate.get('notAfter')}"

    def _ask(self) -> str:
        with contextlib.closing(
            self._client.get(self._question, METADATA, (), self._until)
        ) as said:
            phrase = BaseHTTPRequestHandler.responses.get(said.status, ("Unknown", ""))[0]
            if said.status not in self.GOOD:
                raise Unreachable(f"{said.peer} answered {said.status} {phrase}")
            return f"{said.status} {phrase}"

    def close(self) -> None:
        for sock in self._opened:
            sock.close()


class _Ping(_Visit):
    """That of a registry, which may ask who it is."""

    GOOD = (200, 401)


def check_server(label: str, url: Url, path: str, dialer: Dialer, client: Client) -> Finding:
    """Looks up (unless the proxy does), connects, checks the certificate of https, and asks for
    `path` below the URL."""
    with contextlib.closing(_Visit(url, path, dialer, client)) as visit:
        return examine(label, url, visit.steps())


def check_registry(url: Url, dialer: Dialer, client: Client) -> Finding:
    """The same, and asks for /v2/. `client` has no credentials."""
    with contextlib.closing(_Ping(url, "v2/", dialer, client)) as visit:
        return examine("registry", url, visit.steps())


def check_proxy(label: str, proxy: Url, dialer: Dialer) -> Finding:
    """Connects to the proxy itself; a check of a server goes through it."""

    def connect() -> str:
        dialer.connect_proxy(proxy, time.monotonic() + _CHECK_SECONDS).close()
        return ""

    return examine(label, proxy, [("connect", connect)])


def check_dns(label: str, server: Url, links: DnsLinks, name: str) -> Finding:
    """Asks one server of -dns for the addresses of name."""

    def look_up() -> str:
        with contextlib.closing(DnsResolver([open_transport(server, links)])) as resolver:
            return " ".join(resolver.lookup(name, time.monotonic() + _CHECK_SECONDS)[:4])

    return examine(label, server, [(f"look up {name}", look_up)])


# A proxy of our own, for git


class _NoPassword(ProxyError):
    status = 407

    def headers(self) -> list[tuple[str, str]]:
        return [("Proxy-Authenticate", 'Basic realm="goproxy"')]


# Why the way to a host:port was refused, of which git tells the status alone.
REFUSED: TtlCache[str] = TtlCache(1000)
_REFUSED_SECONDS = 60.0


class ConnectFilter:
    """An HTTP proxy on loopback, so that -proxy and -dns hold for git as well.

    It knows CONNECT alone, and asks for a password that only `url` tells: other users of the
    machine cannot use it. Hand `url` to git in a configuration: all see arguments and variables."""

    _CONNECTIONS = 8
    _TARGET = re.compile(r"CONNECT \[?([^\s\[\]]+?)\]?:([0-9]{1,5}) HTTP/1\.[01]")

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._secret = secrets.token_urlsafe(24)
        self._slots = threading.BoundedSemaphore(self._CONNECTIONS)
        self._closed = threading.Event()
        self._mutex = threading.Lock()
        self._open: set[socket.socket] = set()
        try:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=self._CONNECTIONS)
        except OSError:  # a machine of IPv6 alone
            self._listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        self.url = self._url("git")
        self._acceptor = in_thread(self._accept)

    def _url(self, user: str) -> str:
        place = _authority(*self._listener.getsockname()[:2])
        return f"http://{urllib.parse.quote(user, safe='')}:{self._secret}@{place}"

    def url_to(self, host: str, port: int) -> str:
        """As `url`, but it leads to one place alone."""
        return self._url(f"{host}:{port}")

    def close(self) -> None:
        """Cuts what is open and waits for all threads."""
        self._closed.set()
        _hang_up(self._listener)  # wakes the acceptor
        with self._mutex:
            for sock in self._open:  # for whose places it may wait
                _hang_up(sock)
        self._acceptor.exception()
        self._listener.close()
        for _ in range(self._CONNECTIONS):
            self._slots.acquire()

    def _accept(self) -> None:
        while not self._closed.is_set():
            self._slots.acquire()
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed, or no descriptors for a moment
                self._slots.release()
                self._closed.wait(0.1)
                continue
            try:
                begin_thread(functools.partial(self._serve, client), "filter")
            except Overloaded:
                client.close()
                self._slots.release()

    def _serve(self, client: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError), self._tracked(client):
                self._answer(client)
        finally:
            self._slots.release()

    def _answer(self, client: socket.socket) -> None:
        until = time.monotonic() + 2 * _CONNECT
        exact = _Exact(client, until)
        try:
            host, port = self._request(exact.head())
            server = self._reach(host, port, until)
        except ProxyError as error:
            exact.send(_refusal(error))
            return
        with self._tracked(server):
            exact.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            _pump(client, server)

    def _reach(self, host: str, port: int, until: float) -> socket.socket:
        try:
            return self._dialer.connect(host, port, until)
        except ProxyError as error:
            REFUSED.put(f"{host}:{port}", str(error), _REFUSED_SECONDS)
            raise

    def _request(self, head: bytes) -> tuple[str, int]:
        """The target of a request. Raises ProxyError."""
        line, _, fields = head.decode("latin-1").partition("\r\n")
        match = self._TARGET.fullmatch(line)
        if not match:
            raise MethodNotAllowed("only CONNECT host:port")
        host, port = match[1].lower(), int(match[2])
        shown = re.search(r"(?im)^proxy-authorization: *basic +(\S+)", fields)
        for user in ("git", f"{host}:{port}"):
            wanted = base64.b64encode(f"{user}:{self._secret}".encode())
            if shown and hmac.compare_digest(shown[1].encode(), wanted):
                return host, port
        raise _NoPassword("this is for the git of goproxy.py alone")

    @contextlib.contextmanager
    def _tracked(self, sock: socket.socket) -> Iterator[None]:
        """Closes the socket at the end; close() cuts it before."""
        with sock:
            with self._mutex:
                if self._closed.is_set():
                    raise ConnectionError("closed")
                self._open.add(sock)
            try:
                yield
            finally:
                with self._mutex:
                    self._open.discard(sock)


def _refusal(error: ProxyError) -> bytes:
    fields = [*error.headers(), ("Connection", "close"), ("Content-Type", "text/plain")]
    lines = [f"HTTP/1.1 {error.status} Refused", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", str(error)]).encode("ascii", "replace")


def _pump(client: socket.socket, server: socket.socket) -> None:
    """Pours both ways until the client hangs up: a server that is mute after that may be so for
    ever. Whoever waits for the bytes has the clock."""
    with selectors.DefaultSelector() as selector:
        for source, sink in ((client, server), (server, client)):
            source.settimeout(None)
            selector.register(source, selectors.EVENT_READ, sink)
        while client in selector.get_map():
            for key, _ in selector.select():
                if not _pour(key.fileobj, key.data):
                    selector.unregister(key.fileobj)


def _pour(source: Any, sink: socket.socket) -> bool:
    try:
        data = source.recv(64 * 1024)
        if data:  # git does not say much while it is told much: one thread does for both ways
            sink.sendall(data)
            return True
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        _hang_up(source)
        _hang_up(sink)
    return False


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


# Object storage: S3's REST API, signed with Signature Version 4 (Amazon S3 API Reference,
# "Authenticating Requests"), by nothing but GET, HEAD, PUT, POST and DELETE.


@dataclasses.dataclass(frozen=True)
class AwsKeys:
    """What requests are signed with; `expires` in seconds since the epoch."""

    access: str
    secret: str = dataclasses.field(repr=False)
    token: str = dataclasses.field(default="", repr=False)
    expires: float = math.inf


_ALGORITHM = "AWS4-HMAC-SHA256"
_UNSIGNED = "UNSIGNED-PAYLOAD"


class Signer(NamedTuple):
    """Signs requests for one region at one moment (seconds since the epoch)."""

    keys: AwsKeys
    region: str
    moment: float

    @property
    def stamp(self) -> str:
        return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.moment))

    @property
    def scope(self) -> str:
        return f"{self.stamp[:8]}/{self.region}/s3/aws4_request"

    def headers(
        self, method: str, url: Url, headers: Sequence[tuple[str, str]], payload: str
    ) -> list[tuple[str, str]]:
        """`headers` and those that prove who asks; all of them are signed. The path of `url` is
        as canonical_path makes it; `payload` is the SHA-256 of the body in hex."""
        ours = [("x-amz-content-sha256", payload), ("x-amz-date", self.stamp)]
        if self.keys.token:
            ours.append(("x-amz-security-token", self.keys.token))
        every = [*headers, *ours]
        signed = sorted((name.lower(), value.strip()) for name, value in every)
        signed = sorted([("host", url.authority), *signed])
        names = ";".join(name for name, _ in signed)
        proof = self._signature(method, url.path, signed, payload)
        words = f"Credential={self.keys.access}/{self.scope},SignedHeaders={names}"
        return [*every, ("Authorization", f"{_ALGORITHM} {words},Signature={proof}")]

    def link(self, method: str, url: Url, seconds: int) -> str:
        """`url`, whose path has no query, as whoever has it may ask for it for so long."""
        pairs = {
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{self.keys.access}/{self.scope}",
            "X-Amz-Date": self.stamp,
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": "host",
        }
        if self.keys.token:
            pairs["X-Amz-Security-Token"] = self.keys.token
        path = f"{url.path}?{_canonical_query(pairs)}"
        proof = self._signature(method, path, [("host", url.authority)], _UNSIGNED)
        return f"{url.scheme}://{url.authority}{path}&X-Amz-Signature={proof}"

    def _signature(
        self, method: str, path: str, signed: Sequence[tuple[str, str]], payload: str
    ) -> str:
        path, _, query = path.partition("?")
        lines = [f"{name}:{value}" for name, value in signed]
        names = ";".join(name for name, _ in signed)
        request = "\n".join([method, path or "/", query, *lines, "", names, payload])
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = "\n".join([_ALGORITHM, self.stamp, self.scope, digest])
        key = f"AWS4{self.keys.secret}".encode()
        for part in self.scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, text.encode(), "sha256").hex()


def _canonical_query(pairs: Mapping[str, str]) -> str:
    quote = functools.partial(urllib.parse.quote, safe="")
    return "&".join(sorted(f"{quote(name)}={quote(value)}" for name, value in pairs.items()))


class _NoKeys(StoreDown):
    """Nobody gives us AWS keys."""


class AwsProfile:
    """The section of the shared files that AWS_PROFILE names; both files may be missing.
    (AWS SDKs and Tools Reference Guide, "Shared config and credentials files".)"""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._name = environ.get("AWS_PROFILE") or "default"
        home = "~/.aws/"
        self._files = [
            (environ.get("AWS_CONFIG_FILE") or home + "config", "profile "),
            (environ.get("AWS_SHARED_CREDENTIALS_FILE") or home + "credentials", ""),
        ]

    def read(self) -> dict[str, str]:
        """Its settings, read anew: other programs refresh keys there. Raises UsageError."""
        values: dict[str, str] = {}
        for path, before in self._files:
            parser = configparser.RawConfigParser(strict=False)
            try:
                parser.read(os.path.expanduser(path), encoding="utf-8")
            except (configparser.Error, UnicodeDecodeError):  # whose text may hold a secret
                raise UsageError(f"{path}: not a file as the AWS tools write it") from None
            for section in (self._name, before + self._name):
                if parser.has_section(section):
                    values.update(parser.items(section))
            session = f"sso-session {values.get('sso_session')}"
            if parser.has_section(session):
                values.update(parser.items(session))
        return values


_ROLE_HOSTS = ("127.0.0.1", "169.254.170.2", "169.254.170.23", "::1", "fd00:ec2::23", "localhost")
_ROLE_PATIENCE, _SERVICE_PATIENCE = Patience(2.0, 2.0, 4.0), Patience(5.0, 10.0, 15.0)


class AwsKeyChain:
    """The keys of whoever runs us: variables, the role of a web identity, shared files, a sign-in,
    the container's role, the machine's role, in this order; those that expire are renewed before.

    Container and machine are asked on a link of the machine itself, so never through a proxy."""

    _EARLY, _PAUSE = 300.0, 10.0  # seconds before the end, and between two attempts

    def __init__(
        self, environ: Mapping[str, str], resolver: Resolver, way_out: Dialer | None = None
    ) -> None:
        """`way_out` leads to the services of AWS; without it they are asked directly."""
        self._environ = environ
        self._dialer = Dialer(resolver, ProxyRoute())
        self._way_out = way_out or self._dialer
        self._profile = AwsProfile(environ)
        self._keys: AwsKeys | None = None
        self._failure: _NoKeys | None = None
        self._next_try = 0.0  # monotonic
        self._flights: Flights[Future[AwsKeys]] = Flights()

    def keys(self) -> AwsKeys:
        """Keys that are still good. Raises StoreDown."""
        kept, now, tried = self._keys, time.time(), time.monotonic() < self._next_try
        good = kept if kept and now < kept.expires else None
        if good and (tried or now < good.expires - self._EARLY):
            return good
        if tried and self._failure:
            raise _NoKeys(str(self._failure))
        flight, first = self._flights.join("keys", Future)
        if first:
            self._renew(flight)
        elif good:
            return good
        try:
            return flight.result()
        except _NoKeys:
            if good:
                return good
            raise

    def _renew(self, flight: Future[AwsKeys]) -> None:
        try:
            self._keys, self._failure = self._find(), None
            flight.set_result(self._keys)
        except BaseException as error:
            self._failure = error if isinstance(error, _NoKeys) else None
            flight.set_exception(error)
        self._next_try = time.monotonic() + self._PAUSE
        self._flights.land("keys")

    def forget(self) -> None:
        """The service refuses the keys: they are sought again."""
        self._next_try, self._keys = 0.0, None

    def _find(self) -> AwsKeys:
        try:
            return (
                _given_keys(lambda name: self._environ.get(name.upper()))
                or self._from_web_identity()
                or _given_keys(self._profile.read().get)
                or self._from_sign_in()
                or self._from_container()
                or self._from_machine()
            )
        except (BadUpstream, OSError, UsageError) as error:
            raise _NoKeys(f"s3: no AWS keys: {error}") from None

    def _from_web_identity(self) -> AwsKeys | None:
        """A token of Kubernetes, or of a CI service, for the keys of a role (AWS STS API Reference,
        "AssumeRoleWithWebIdentity")."""
        get = self._environ.get
        file, role = get("AWS_WEB_IDENTITY_TOKEN_FILE"), get("AWS_ROLE_ARN")
        if not file or not role:
            return None
        with open(file, encoding="ascii", errors="replace") as token:
            form = {
                "Action": "AssumeRoleWithWebIdentity",
                "RoleArn": role,
                "RoleSessionName": get("AWS_ROLE_SESSION_NAME") or "goproxy",
                "Version": "2011-06-15",
                "WebIdentityToken": token.read().strip(),
            }
        region = (
            get("AWS_REGION") or get("AWS_DEFAULT_REGION") or self._profile.read().get("region")
        )
        url = self._service("STS", "sts", region or "us-east-1", "/")
        kind = [("Content-Type", "application/x-www-form-urlencoded")]
        raw = self._ask("POST", url, kind, urllib.parse.urlencode(form).encode(), away=True)
        return _web_identity_keys(raw)

    def _service(self, name: str, host: str, region: str, path: str) -> Url:
        china = ".cn" if region.startswith("cn-") else ""
        base = self._environ.get(f"AWS_ENDPOINT_URL_{name}")
        return _role_url(
            (base or f"https://{host}.{region}.amazonaws.com{china}").rstrip("/") + path
        )

    def _from_sign_in(self) -> AwsKeys | None:
        """What `aws sso login` has left (AWS IAM Identity Center Portal API Reference,
        "GetRoleCredentials")."""
        settings = self._profile.read()
        if "sso_account_id" not in settings:
            return None
        session = settings.get("sso_session") or settings.get("sso_start_url", "")
        name = hashlib.sha1(session.encode()).hexdigest()  # as the AWS tools name it
        try:
            with open(
                os.path.expanduser(f"~/.aws/sso/cache/{name}.json"), encoding="utf-8"
            ) as file:
                token = str(json.load(file)["accessToken"])
            account, role = settings["sso_account_id"], settings["sso_role_name"]
            query = urllib.parse.urlencode({"account_id": account, "role_name": role})
            path = f"/federation/credentials?{query}"
            url = self._service("SSO", "portal.sso", settings["sso_region"], path)
            raw = self._ask("GET", url, [("x-amz-sso_bearer_token", token)], away=True)
            found = json.loads(raw)["roleCredentials"]
            access, secret = str(found["accessKeyId"]), str(found["secretAccessKey"])
            ends = float(found["expiration"]) / 1000
            return AwsKeys(access, secret, str(found["sessionToken"]), ends)
        except (*ODD_JSON, FileNotFoundError):
            raise BadUpstream("sso: no sign-in that counts: run aws sso login") from None

    def _from_container(self) -> AwsKeys | None:
        get = self._environ.get
        full = get("AWS_CONTAINER_CREDENTIALS_FULL_URI", "")
        if get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
            full = f"http://169.254.170.2{get('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI')}"
        if not full:
            return None
        url = _role_url(full)
        token = get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
        if get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            with open(get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", ""), encoding="ascii") as file:
                token = file.read().strip()
        return _role_keys(self._ask("GET", url, [("Authorization", token)] if token else []))

    def _from_machine(self) -> AwsKeys:
        """Instance metadata, version 2 (Amazon EC2 User Guide, "Use IMDSv2")."""
        if self._environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise BadUpstream("none in the variables, the shared files and the container")
        base = self._environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
        url = _role_url(base.rstrip("/") + "/latest/api/token")
        lifetime = [("X-aws-ec2-metadata-token-ttl-seconds", "21600")]
        token = self._ask("PUT", url, lifetime).decode("latin-1").strip()
        proof = [("X-aws-ec2-metadata-token", token)]
        path = "/latest/meta-data/iam/security-credentials/"
        listed = self._ask("GET", dataclasses.replace(url, path=path), proof).decode("latin-1")
        role = urllib.parse.quote(listed.split()[0] if listed.split() else "", safe="")
        return _role_keys(self._ask("GET", dataclasses.replace(url, path=path + role), proof))

    def _ask(
        self,
        method: str,
        url: Url,
        headers: Sequence[tuple[str, str]],
        data: bytes = b"",
        away: bool = False,
    ) -> bytes:
        body = None if method == "GET" else bytes_body(data)
        patience = _SERVICE_PATIENCE if away else _ROLE_PATIENCE
        request = Outgoing(method, url, headers, body)
        with contextlib.closing(Client(self._way_out if away else self._dialer, {})) as client:
            response = client.send(request, patience, time.monotonic() + patience.total)
            raw = response.read_all(64 * 1024)
        if response.status != 200:
            code = re.search(rb"<Code>(\w{1,60})<", raw)
            words = f" {code[1].decode()}" if code else ""
            raise BadUpstream(f"{url.authority} answered {response.status}{words}")
        return raw


def _given_keys(get: Callable[[str], str | None]) -> AwsKeys | None:
    """Those of the variables, or of a profile, which have the same names."""
    access, secret = get("aws_access_key_id"), get("aws_secret_access_key")
    return AwsKeys(access, secret, get("aws_session_token") or "") if access and secret else None


def _role_url(text: str) -> Url:
    """Raises BadUpstream for a URL to which no secret should go in clear text."""
    base, mark, query = text.partition("?")
    try:
        url = parse_url(base)
    except ValueError as error:
        raise BadUpstream(f"the URL of the role: {error}") from None
    link_local = is_ip(url.host) and ipaddress.ip_address(url.host).is_link_local
    if url.scheme != "https" and url.host not in _ROLE_HOSTS and not link_local:
        raise BadUpstream("the URL of the role: only https leaves this machine")
    return dataclasses.replace(url, path=url.path + mark + query)


def _role_keys(raw: bytes) -> AwsKeys:
    try:
        found = json.loads(raw)
        access, secret, token = found["AccessKeyId"], found["SecretAccessKey"], found["Token"]
        return AwsKeys(str(access), str(secret), str(token), iso_seconds(found["Expiration"]))
    except ODD_JSON:
        raise BadUpstream("the role's answer holds no keys") from None


def _web_identity_keys(raw: bytes) -> AwsKeys:
    try:
        said = {element.tag: element.text or "" for element in parse_xml(raw).iter()}
        access, secret, token = said["AccessKeyId"], said["SecretAccessKey"], said["SessionToken"]
        return AwsKeys(access, secret, token, iso_seconds(said["Expiration"]))
    except (KeyError, ValueError):
        raise BadUpstream("sts: the answer holds no keys") from None


def iso_seconds(text: str) -> float:
    """Seconds since the epoch of a time like 2006-01-02T15:04:05.000Z. Raises ValueError."""
    return _utc_seconds(text[:19], "%Y-%m-%dT%H:%M:%S")


def http_seconds(text: str) -> float:
    """Seconds since the epoch of an HTTP date (RFC 9110, section 5.6.7). Raises ValueError."""
    return _utc_seconds(text, "%a, %d %b %Y %H:%M:%S GMT")


def _utc_seconds(text: str, form: str) -> float:
    moment = datetime.datetime.strptime(text, form)
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def parse_xml(data: bytes) -> xml.etree.ElementTree.Element:
    """A document, its names without their namespace. Raises ValueError, also for a document type:
    that is where entities come from, which can make gigabytes of a few lines."""
    text = data.decode("utf-8").strip()  # S3 may send blanks for as long as it works
    if "<!DOCTYPE" in text:
        raise ValueError("a document type is not wanted")
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError as error:
        raise ValueError(f"not XML: {error}") from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


class BucketError(StoreDown):
    """An object storage service refuses: `code` is its own word for why, "" if it gave none, and
    `passing` whether the same may be granted in a moment."""

    def __init__(self, text: str, answered: int, code: str, passing: bool) -> None:
        super().__init__(text)
        self.answered = answered
        self.code = code
        self.passing = passing


class Listed(NamedTuple):
    """A key in a listing; or a common prefix, which ends in a slash and has neither size (bytes)
    nor time (seconds since the epoch)."""

    key: str
    size: int = 0
    modified: float = 0.0


class ObjectHead(NamedTuple):
    """What a service says of an object: bytes, seconds since the epoch, its mark for this content,
    and the SHA-256 in hex where it is known."""

    size: int
    modified: float
    etag: str
    sha256: str


class _Ask(NamedTuple):
    """One operation; the key is "" for the bucket itself, `payload` the SHA-256 of the body."""

    method: str
    key: str
    query: Mapping[str, str] = {}
    headers: tuple[tuple[str, str], ...] = ()
    body: Body | None = None
    payload: str = hashlib.sha256().hexdigest()
    wanted: tuple[int, ...] = (200,)
    patience: Patience = Patience(5.0, 5.0, 10.0)

    @property
    def checksum(self) -> list[tuple[str, str]]:
        """The headers by which the service checks the body, or those of an upload in parts."""
        if self.method == "PUT":
            return [(_CHECKSUM, base64.b64encode(bytes.fromhex(self.payload)).decode())]
        return [("x-amz-checksum-algorithm", "SHA256")] if "uploads" in self.query else []


_READ = Patience(5.0, 30.0, 600.0)
_WRITE = Patience(30.0, 30.0, 600.0)
_ASSEMBLY = Patience(120.0, 120.0, 300.0)  # a service may take minutes to put parts together
_DAMAGED = frozenset(["BadDigest", "XAmzContentSHA256Mismatch"])  # on the way
_MAY_PASS = _DAMAGED | frozenset(
    [
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
    ]
)
_EXPIRED = frozenset(["ExpiredToken", "InvalidToken", "TokenRefreshRequired"])
_REPLACED = frozenset(["InvalidAccessKeyId", "SignatureDoesNotMatch"])
_OLD_NOTE = "x-amz-meta-old"  # of what is older than anything, although it was put just now
_SHA256_NOTE = (
    "x-amz-meta-sha256"  # our own note: no service computes it for an object made of parts
)
_CHECKSUM = "x-amz-checksum-sha256"  # by which the service refuses what was damaged on the way
_MAX_PAGE, _MAX_FAULT = 16 << 20, 64 << 10


def body_sha256(body: Body) -> str:
    """In hex."""
    digest = hashlib.sha256()
    for piece in body.pieces():
        digest.update(piece)
    return digest.hexdigest()


def _part(body: Body, start: int, size: int) -> Body:
    """At most so many bytes of a body, from there on."""
    left = min(size, body.size - start)
    return Body(left, lambda count, offset: body.read_at(count, start + offset))


class BucketLine:
    """The way to one bucket: operations are signed, sent and, where it may help, sent again."""

    _ATTEMPTS = 4

    def __init__(
        self,
        place: BucketPlace,
        chain: AwsKeyChain,
        client: Client,
        say: Callable[[str], None],
    ) -> None:
        """`place` as settled_place gives it; `say` is told what is odd about this service, once."""
        self._place = place
        self._chain = chain
        self._client = client
        self._say = say
        self._region = place.region
        self._skew = 0.0  # seconds that the service's clock is ahead of ours
        self._conditional = True  # it knows If-None-Match
        self._checks = True  # it knows checksums, or does not mind them

    def document(self, ask: _Ask) -> xml.etree.ElementTree.Element:
        """The answer, as XML."""
        with contextlib.closing(self.ask(ask)) as response, self._understanding():
            return parse_xml(response.read_all(_MAX_PAGE))

    def done(self, ask: _Ask) -> bool:
        """True when it is done. An error may stand in an answer that began with 200, too."""
        with contextlib.closing(self.ask(ask)) as response, self._understanding():
            code = _fault_in(response.read_all(_MAX_FAULT)).get("Code")
        if code:
            raise self._error(response, code, passing=False)
        return True

    def once(self, ask: _Ask) -> bool:
        """As done, but False if there is an object already."""
        if self._conditional:
            try:
                return self.done(ask._replace(headers=(*ask.headers, ("If-None-Match", "*"))))
            except BucketError as error:
                if error.answered == 412:
                    return False
                if error.answered != 501 and error.code != "NotImplemented":
                    raise
            self._conditional = False
            self._say(f"{self.peer} does not know If-None-Match: of two writers the last one wins")
        with contextlib.suppress(NotFound):
            self.find(ask.key)
            return False
        return self.done(ask)

    def find(self, key: str) -> ObjectHead:
        """Raises NotFound."""
        with contextlib.closing(self.ask(_Ask("HEAD", key))) as response:
            return self.found(response)

    def found(self, response: Response) -> ObjectHead:
        """What the head of an answer to GET or HEAD says."""
        fields = response.fields
        with self._understanding():
            size = content_length(fields)
            if size is None:
                raise ValueError("an object without a length")
            if "last-modified" not in fields:
                raise ValueError("it does not speak S3: an object without a date")
            modified = 0.0 if _OLD_NOTE in fields else http_seconds(fields["last-modified"])
        return ObjectHead(size, modified, fields.get("etag", ""), fields.get(_SHA256_NOTE, ""))

    def ask(self, ask: _Ask) -> Response:
        """An answer with a wanted status. Raises NotFound, BucketError, StoreAway."""
        attributes = {"aws.s3.bucket": self._place.bucket, "aws.s3.key": ask.key}
        with TRACER.span(f"s3 {ask.method}", attributes):
            return self._ask_often(ask)

    def _ask_often(self, ask: _Ask) -> Response:
        start = time.monotonic()
        for attempt in range(1, self._ATTEMPTS + 1):
            known = self._known
            try:
                response = self._send(ask, start + ask.patience.total)
                if response.status in ask.wanted:
                    return response
                error = self._fault(ask, response)
                if not error.passing and known == self._known:
                    raise error
                words = str(error)
            except BadUpstream as failure:
                words = f"{self.peer}: {failure}"
                if isinstance(failure, Unreachable) and failure.lasts:
                    break
            if time.monotonic() > start + 2 * ask.patience.header:
                break  # who waits has waited long enough
            time.sleep(random.uniform(0.0, 0.1 * 2.0**attempt))
        raise StoreAway(words)

    @property
    def _known(self) -> tuple[str, float, bool]:
        """What the service has told us of itself, to whichever thread."""
        return (self._region, self._skew, self._checks)

    @property
    def peer(self) -> str:
        """The service and the bucket, in words."""
        return f"s3 {self._endpoint.authority}, bucket {self._place.bucket}"

    @property
    def _endpoint(self) -> Url:
        if self._place.endpoint:
            return self._place.endpoint
        china = ".cn" if self._region.startswith("cn-") else ""
        return Url("https", f"s3.{self._region}.amazonaws.com{china}", 443)

    def _url(self, base: Url, key: str, query: Mapping[str, str] = {}) -> Url:
        host, path = base.host, base.path
        if self._place.path_style:
            path += f"/{self._place.bucket}"
        else:
            host = f"{self._place.bucket}.{host}"
        path += f"/{urllib.parse.quote(self._place.prefix + key if key else '')}"
        path += f"?{_canonical_query(query)}" if query else ""
        return dataclasses.replace(base, host=host, path=path)

    def _signer(self) -> Signer:
        return Signer(self._chain.keys(), self._region, time.time() + self._skew)

    def _send(self, ask: _Ask, until: float) -> Response:
        url = self._url(self._endpoint, ask.key, ask.query)
        wanted = [*ask.headers, *(ask.checksum if self._checks else ())]
        headers = self._signer().headers(ask.method, url, wanted, ask.payload)
        return self._client.send(Outgoing(ask.method, url, headers, ask.body), ask.patience, until)

    def _fault(self, ask: _Ask, response: Response) -> BucketError:
        """What the refusal means. Raises NotFound."""
        raw = b""
        with contextlib.closing(response), contextlib.suppress(BadUpstream):
            raw = response.read_all(_MAX_FAULT)
        said = _fault_in(raw)
        code = said.get("Code", "")
        if code == "NoSuchKey" or (response.status == 404 and ask.method == "HEAD"):
            raise NotFound("not in the store")
        if code in _EXPIRED or code in _REPLACED:
            self._chain.forget()
        region = response.fields.get("x-amz-bucket-region") or said.get("Region", "")
        self._mend_clock(response)
        self._mend_region(region)
        self._mend_checks(response.status, code, said.get("Message", ""))
        may_pass = code in _MAY_PASS or response.status in (429, 500, 502, 503, 504)
        return self._error(response, code, may_pass or code in _EXPIRED)

    def _error(self, response: Response, code: str, passing: bool) -> BucketError:
        """Its text quotes nothing that was sent: that holds signatures."""
        said = f" {code}" if code else ""
        text = f"{self.peer} answered {response.status}{said}"
        return BucketError(text, response.status, code, passing)

    def _mend_clock(self, response: Response) -> None:
        """Where we were refused for a clock that is wrong, we count with it from now on."""
        try:
            skew = http_seconds(response.fields.get("date", "")) - time.time()
        except ValueError:
            return
        if response.status == 403 and abs(skew - self._skew) >= 60:
            self._skew = skew
            self._say(f"{self.peer}: its clock and ours are {abs(skew):.0f} s apart")

    def _mend_checks(self, status: int, code: str, words: str) -> None:
        """Where a checksum was refused, not what has it, none is sent: that of R2 and of B2."""
        is_theirs = "x-amz-checksum" in words.lower() and code not in _DAMAGED
        if status in (400, 501) and is_theirs and self._checks:
            self._checks = False
            self._say(f"{self.peer} takes no checksums: it cannot tell what is damaged on the way")

    def _mend_region(self, region: str) -> None:
        if re.fullmatch("[a-z0-9-]{1,40}", region):
            self._region = region

    @contextlib.contextmanager
    def _understanding(self) -> Iterator[None]:
        try:
            yield
        except (BadUpstream, ValueError) as error:
            raise StoreDown(f"{self.peer}: {error}") from None


class Bucket(BucketLine):
    """The objects of one bucket, below a prefix. Every verb raises StoreDown with the service's
    name and its word for what is wrong; what may pass is tried again, after a random pause."""

    _SPLIT, _PART = 64 << 20, 16 << 20  # bytes: what is longer goes up in parts so long
    _ABANDONED = 86400.0  # seconds, then an upload is one that nobody will finish
    _swept = False

    def open(self, key: str, on_damage: Callable[[], None]) -> BucketObject:
        """Raises NotFound."""
        return BucketObject(self, key, on_damage)

    def listing(self, prefix: str, delimiter: str = "") -> Iterator[Listed]:
        """What has the prefix; beyond the next delimiter only what stands before it, once. A page
        of a thousand is in memory at a time."""
        query = {"encoding-type": "url", "list-type": "2", "prefix": self._place.prefix + prefix}
        if delimiter:
            query["delimiter"] = delimiter
        while True:
            page = self.document(_Ask("GET", "", query))
            for part in page.iter("CommonPrefixes"):
                yield Listed(self._key(page, part, "Prefix"))
            for part in page.iter("Contents"):
                with self._understanding():
                    size = int(part.findtext("Size", ""))
                    moment = iso_seconds(part.findtext("LastModified", ""))
                yield Listed(self._key(page, part, "Key"), size, moment)
            token = page.findtext("NextContinuationToken", "")
            if page.findtext("IsTruncated") != "true" or not token:
                return
            query["continuation-token"] = token

    def _key(
        self,
        page: xml.etree.ElementTree.Element,
        part: xml.etree.ElementTree.Element,
        tag: str,
    ) -> str:
        """Without our prefix. Not every service encodes keys when asked to."""
        key = part.findtext(tag, "")
        if page.findtext("EncodingType") == "url":
            key = urllib.parse.unquote_plus(key)
        return key[len(self._place.prefix) :]

    @property
    def public_host(self) -> str:
        """The name of the server to which links lead."""
        return self._url(self._place.public or self._endpoint, "").host

    def link(self, key: str, method: str, seconds: int) -> str:
        """A URL by which whoever has it may GET or HEAD an object for so long; so it is secret."""
        url = self._url(self._place.public or self._endpoint, key)
        return self._signer().link(method, url, seconds)

    def put(self, key: str, body: Body, once: bool, is_old: bool = False) -> bool:
        """Stores an object. With `once`, False and nothing stored if there is one already."""
        payload = body_sha256(body)
        if body.size > self._SPLIT:
            size = self._part_size(body.size)
            parts = (_part(body, start, size) for start in range(0, body.size, size))
            return self.begin(key, payload).take(parts, once)
        note = ((_SHA256_NOTE, payload), *([(_OLD_NOTE, "true")] if is_old else []))
        ask = _Ask("PUT", key, {}, note, body, payload, patience=_WRITE)
        return self.once(ask) if once else self.done(ask)

    def follow(self, key: str, draft: Draft, sha256: str, once: bool) -> bool:
        """Stores what a draft becomes, once that is finished. What is longer than a part goes up
        as it grows: nobody sees an object before its parts are put together. `sha256` is what it
        will be, "" if nobody knows. Raises also what ends the draft."""
        reader = draft.reader()
        reader.offset = self._PART
        if reader.wait():
            with contextlib.suppress(StoreDown):  # it is away for a moment, or knows no parts
                return self.begin(key, sha256).take(self._growing(draft), once)
            reader.wait_for_end()
        return self.put(key, Body(draft.written, draft.file.read_at), once)

    def _growing(self, draft: Draft) -> Iterator[Body]:
        """The parts of a draft, each once there is more; the last one when it is finished."""
        reader, size = draft.reader(), self._part_size(draft.size or 0)
        more: int | None = 1
        while more:
            start = reader.offset
            reader.offset += size
            more = reader.wait()
            yield _part(Body(draft.written, draft.file.read_at), start, size)

    def _part_size(self, size: int) -> int:
        return max(self._PART, -(-size // 10_000))  # there may be so many parts

    def begin(self, key: str, sha256: str) -> PartsUpload:
        """An object that arrives in parts."""
        if not self._swept:  # an upload costs its bytes until somebody aborts it
            self._swept = True
            with contextlib.suppress(ProxyError):
                self.sweep()
        note = ((_SHA256_NOTE, sha256),) if sha256 else ()
        page = self.document(_Ask("POST", key, {"uploads": ""}, note, bytes_body(b"")))
        return PartsUpload(self, key, page.findtext("UploadId", ""))

    def remove(self, key: str) -> None:
        """Takes an object away; it is fine if there is none."""
        self.done(_Ask("DELETE", key, wanted=(200, 202, 204)))

    def sweep(self, age: float = _ABANDONED) -> None:
        """Aborts uploads below our prefix that were begun more than `age` seconds ago."""
        query = {"encoding-type": "url", "prefix": self._place.prefix, "uploads": ""}
        page = self.document(_Ask("GET", "", query))
        for part in page.iter("Upload"):
            with self._understanding():
                begun = iso_seconds(part.findtext("Initiated", ""))
            if begun < time.time() + self._skew - age:
                PartsUpload(
                    self, self._key(page, part, "Key"), part.findtext("UploadId", "")
                ).abort()


def _fault_in(body: bytes) -> dict[str, str]:
    """The texts of an <Error>; {} if the body is none."""
    try:
        root = parse_xml(body)
    except ValueError:
        return {}
    if root.tag != "Error":
        return {}
    texts = {element.tag: (element.text or "").strip() for element in root}
    texts["Code"] = re.sub("[^0-9A-Za-z.]", "", texts.get("Code", ""))[:60] or "Error"
    return texts


class BucketObject(LongBody):
    """An object's bytes. Where its SHA-256 is known, a body that does not have it ends in Spoiled;
    `on_damage` is called before that."""

    def __init__(self, bucket: Bucket, key: str, on_damage: Callable[[], None]) -> None:
        self._bucket = bucket
        self._on_damage = on_damage
        self._ask = _Ask("GET", key, patience=_READ)
        response = bucket.ask(self._ask)
        super().__init__(response, BadUpstream)
        try:
            self.found = bucket.found(response)
        except BaseException:
            self.close()
            raise
        self.size: int = self.found.size
        self.modified = self.found.modified

    def _ask_rest(self, begins: tuple[str, str]) -> Response:
        headers = (("If-Match", self.found.etag), begins)
        return self._bucket.ask(self._ask._replace(headers=headers, wanted=(206,)))

    def read(self, count: int) -> bytes:
        try:
            data = super().read(count)
        except BadUpstream as error:
            raise StoreDown(f"{self._bucket.peer}: {error}") from None
        known = self.found.sha256 if self._delivered == self.size else ""
        if known not in ("", self._digest.hexdigest()):
            self._on_damage()
            raise Spoiled(f"{self._bucket.peer}: {self._ask.key} does not have its SHA-256")
        return data


class PartsUpload:
    """An object that goes up in parts; each but the last has at least 5 MiB."""

    def __init__(self, bucket: Bucket, key: str, number: str) -> None:
        self._bucket = bucket
        self._key = key
        self._number = number
        self._parts: list[tuple[str, str]] = []

    def add(self, body: Body) -> None:
        """The next part."""
        query = {"partNumber": str(len(self._parts) + 1), "uploadId": self._number}
        ask = _Ask("PUT", self._key, query, (), body, body_sha256(body), patience=_WRITE)
        with contextlib.closing(self._bucket.ask(ask)) as response:
            fields = response.fields
            self._parts.append((fields.get("etag", ""), fields.get(_CHECKSUM, "")))

    def take(self, parts: Iterable[Body], once: bool) -> bool:
        """All of them, then as `finish`. Whatever ends them early aborts the upload."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.abort)
            for part in parts:
                self.add(part)
            stored = self.finish(once)
            if stored:
                undo.pop_all()
        return stored

    def finish(self, once: bool) -> bool:
        """Puts the parts together. With `once`, False if there is an object already."""
        root = xml.etree.ElementTree.Element("CompleteMultipartUpload")
        for number, (etag, checksum) in enumerate(self._parts, 1):
            part = xml.etree.ElementTree.SubElement(root, "Part")
            xml.etree.ElementTree.SubElement(part, "PartNumber").text = str(number)
            xml.etree.ElementTree.SubElement(part, "ETag").text = etag
            if checksum:  # the service has checked it, and wants it again
                xml.etree.ElementTree.SubElement(part, "ChecksumSHA256").text = checksum
        body = bytes_body(xml.etree.ElementTree.tostring(root))
        query = {"uploadId": self._number}
        payload = body_sha256(body)
        ask = _Ask("POST", self._key, query, (), body, payload, patience=_ASSEMBLY)
        try:
            return self._bucket.once(ask) if once else self._bucket.done(ask)
        except BucketError as error:
            if error.code != "NoSuchUpload":
                raise
        self._bucket.find(self._key)  # the first answer was lost: it has been put together
        return True

    def abort(self) -> None:
        """Has the service forget it; what cannot be aborted now is swept a day later."""
        with contextlib.suppress(ProxyError):
            query = {"uploadId": self._number}
            self._bucket.done(_Ask("DELETE", self._key, query, wanted=(200, 204)))


def settled_place(place: BucketPlace, environ: Mapping[str, str]) -> BucketPlace:
    """`place` with what the AWS variables and files say where it says nothing: its region is known
    then. Raises UsageError."""
    profile = AwsProfile(environ).read()
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    origin = next(filter(environ.get, names), "endpoint_url")
    text = environ.get(origin) or profile.get(origin, "")
    try:
        endpoint = place.endpoint or (parse_url(text) if text else None)
    except ValueError as error:
        raise UsageError(f"{origin}={mask(text)}: {error}") from None
    regions = (place.region, environ.get("AWS_REGION"), environ.get("AWS_DEFAULT_REGION"))
    region = next(filter(None, regions), profile.get("region", "us-east-1"))
    # A certificate for *.s3.amazonaws.com does not cover a bucket with a dot in it.
    path_style = endpoint is not None or "." in place.bucket
    if place.path_style is not None:
        path_style = place.path_style
    return dataclasses.replace(place, endpoint=endpoint, region=region, path_style=path_style)


class TracePlan(NamedTuple):
    """Where spans go and which: `seconds` for one batch, `sender` tells who sends them."""

    url: Url
    headers: Sequence[tuple[str, str]]
    seconds: float
    sender: Mapping[str, str]
    sampler: Sampler


_SAMPLERS = {
    "always_off": Sampler(0.0, False),
    "always_on": Sampler(1.0, False),
    "parentbased_always_off": Sampler(0.0),
    "parentbased_always_on": Sampler(1.0),
    "parentbased_traceidratio": Sampler(),
    "traceidratio": Sampler(follows=False),
}


class TraceVariables:
    """What variables say of traces (OpenTelemetry specification, "Environment Variable
    Specification" and "OTLP Exporter Configuration"). They are often there for all programs of a
    machine, so what is wrong in one is a remark, and it counts as unset."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.remarks: list[str] = []

    def plan(self, endpoint: Url | None) -> TracePlan | None:
        """None if nobody wants traces. Raises UsageError for a bad endpoint."""
        environ = self._environ
        url = endpoint and dataclasses.replace(endpoint, path=f"{endpoint.path}/v1/traces")
        own = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
        try:
            url = parse_url(own) if own else url
        except ValueError as error:
            name = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
            raise UsageError(f"{name}={mask(own)}: {error}") from None
        is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if url is None or is_off or environ.get("OTEL_TRACES_EXPORTER") == "none":
            return None
        headers = self._pairs(self._exporter("HEADERS"))
        sender = {"service.name": "goproxy", **self._pairs("OTEL_RESOURCE_ATTRIBUTES")}
        if environ.get("OTEL_SERVICE_NAME"):
            sender["service.name"] = environ["OTEL_SERVICE_NAME"]
        seconds = self._number(self._exporter("TIMEOUT"), 10_000, math.inf) / 1000
        return TracePlan(url, list(headers.items()), max(0.001, seconds), sender, self._sampler())

    def _exporter(self, what: str) -> str:
        """The variable for traces alone, if it is set, or else the one for all signals."""
        own = f"OTEL_EXPORTER_OTLP_TRACES_{what}"
        return own if self._environ.get(own) else f"OTEL_EXPORTER_OTLP_{what}"

    def _pairs(self, variable: str) -> dict[str, str]:
        """name=value by commas, values percent-encoded. A value may be secret: no remark has it."""
        found = {}
        for item in filter(None, map(str.strip, self._environ.get(variable, "").split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            value = urllib.parse.unquote(value)
            if not equals or not TOKEN.fullmatch(name.encode()) or not value.isprintable():
                self.remarks.append(f"{variable} does not count: want name=value by commas")
                return {}
            found[name] = value
        return found

    def _number(self, variable: str, default: float, most: float) -> float:
        text = self._environ.get(variable) or str(default)
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?", text) and float(text) <= most:
            return float(text)
        self.remarks.append(f"{variable}={quoted(text)} does not count: want a number")
        return default

    def _sampler(self) -> Sampler:
        name = self._environ.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
        sampler = _SAMPLERS.get(name)
        if sampler is None:
            allowed = ", ".join(_SAMPLERS)
            remark = f"OTEL_TRACES_SAMPLER={quoted(name)} does not count: want one of {allowed}"
            self.remarks.append(remark)
            return Sampler()
        if name.endswith("ratio"):
            return sampler._replace(share=self._number("OTEL_TRACES_SAMPLER_ARG", 1, 1))
        return sampler


class _ComeLater(ProxyError):
    """A collector has no time now: then again after so many seconds, if it says so."""

    def __init__(self, words: str, seconds: float) -> None:
        super().__init__(words)
        self.seconds = seconds


class TraceLine:
    """The way to a collector: OTLP over HTTP, as JSON."""

    _ANSWER = 64 * 1024
    _LATER = (429, 502, 503, 504)

    def __init__(self, client: Client, plan: TracePlan) -> None:
        self._client = client
        self._plan = plan
        sender = json.dumps({"attributes": otlp_attributes(plan.sender)})
        scope = json.dumps({"name": "goproxy.py", "version": __version__})
        self._frame = (
            f'{{"resourceSpans":[{{"resource":{sender},"scopeSpans":[{{"scope":{scope},"spans":[',
            "]}]}]}",
        )
        authorization = client.authorization(plan.url)
        self._headers = [
            ("Content-Type", "application/json"),
            *([("Authorization", authorization)] if authorization else []),
            *plan.headers,
        ]

    def send(self, spans: Sequence[str], until: float) -> None:
        """Sends spans that are encoded; `until` is monotonic. Raises ProxyError."""
        body = bytes_body(",".join(spans).join(self._frame).encode())
        request = Outgoing("POST", self._plan.url, self._headers, body)
        seconds = self._plan.seconds
        until = min(until, time.monotonic() + seconds)
        patience = Patience(seconds, seconds, seconds)
        with contextlib.closing(self._client.send(request, patience, until)) as response:
            said = response.read_all(self._ANSWER)
        words = f"{self._plan.url.authority} answered {response.status}"
        if response.status in self._LATER:
            raise _ComeLater(words, _seconds_to_wait(response.fields.get("retry-after", "")))
        if not 200 <= response.status < 300:
            raise BadUpstream(words)
        self._hear(said)

    def _hear(self, said: bytes) -> None:
        """What a collector says that takes spans. It may not speak JSON, even if it reads it."""
        try:
            partial = json.loads(said)["partialSuccess"]
            rejected, why = int(partial.get("rejectedSpans", 0)), partial.get("errorMessage", "")
        except ODD_JSON:
            return
        if rejected > 0:
            raise BadUpstream(f"{self._plan.url.authority} rejects spans: {str(why)[:200]}")

    def check(self) -> Finding:
        """Sends no spans, which a collector takes."""

        def send() -> str:
            self.send([], time.monotonic() + _CHECK_SECONDS)
            return ""

        return examine("collector", self._plan.url, [("send", send)])


class TraceExporter:
    """Takes spans from TRACER to a collector. What that puts off is sent again; what it refuses, or
    cannot be asked to take, is lost. The log tells when that begins and when it ends, once for all
    processes."""

    _EVERY, _LONGEST, _FAREWELL = 1.0, 60.0, 0.5  # seconds
    _BATCH, _BATCHES, _AT_ONCE, _GIVE_WAY = 512, 5, 16, 0.001

    def __init__(self, line: TraceLine, sampler: Sampler, log: Log) -> None:
        """Starts a thread, and begins to collect."""
        self._line = line
        self._log = log
        self._pause = self._EVERY
        self._failing = False
        self._ended = threading.Event()
        TRACER.sampler = sampler
        self._thread = begin_thread(self._run, "traces")

    def _run(self) -> None:
        while not self._ended.wait(self._pause):
            self._send_all(math.inf)
        self._send_all(time.monotonic() + self._FAREWELL)

    def _send_all(self, until: float) -> None:
        lost = TRACER.lost()
        for _ in range(self._BATCHES):
            spans = TRACER.take(self._BATCH)
            if not spans:
                break
            try:
                self._line.send(self._encoded(spans), until)
            except _ComeLater as error:
                TRACER.put_back(spans)
                self._pause = max(error.seconds, min(2 * self._pause, self._LONGEST))
                self._fail(lost, error)
                return
            except ProxyError as error:
                self._pause = min(2 * self._pause, self._LONGEST)
                self._fail(lost + len(spans), error)
                return
            self._count("sent", len(spans))
            self._recover()
        self._count("dropped", lost)

    def _encoded(self, spans: Sequence[Callable[[], dict[str, Any]]]) -> list[str]:
        """In pieces: who answers requests must not wait long for the interpreter."""
        texts = []
        for number, encoded in enumerate(spans, 1):
            texts.append(json.dumps(encoded()))
            if number % self._AT_ONCE == 0:
                time.sleep(self._GIVE_WAY)
        return texts

    def _count(self, result: str, count: int) -> None:
        if count:
            METER.add("goproxy_trace_spans_total", count, result=result)

    def _fail(self, lost: int, error: ProxyError) -> None:
        self._count("dropped", lost)
        if not self._failing and not METER.figures().get("goproxy_trace_failing"):
            self._log.error(f"traces are lost until the collector takes them: {error}")
        self._failing = True
        METER.set("goproxy_trace_failing", 1)

    def _recover(self) -> None:
        self._pause = self._EVERY
        if self._failing:
            self._failing = False
            METER.set("goproxy_trace_failing", 0)
            if not METER.figures().get("goproxy_trace_failing"):
                self._log.line("the collector takes traces again")

    def close(self) -> None:
        """Sends what there is, if that takes no longer than a moment."""
        self._ended.set()
        self._thread.join(self._FAREWELL)


def _seconds_to_wait(text: str) -> float:
    """What Retry-After says (RFC 9110, section 10.2.3), an hour at most; 0 without it."""
    if re.fullmatch("[0-9]{1,9}", text):
        return min(3600.0, float(text))
    with contextlib.suppress(ValueError):
        return min(3600.0, max(0.0, http_seconds(text) - time.time()))
    return 0.0


# =============================================================================
# 7. Storage: where bytes live
# =============================================================================


class Item(NamedTuple):
    """A stored name, its size in bytes, and when it was stored (seconds since the epoch)."""

    name: str
    size: int
    modified: float


class Shelf(Protocol):
    """The half of a storage that only reads."""

    def open(self, name: str) -> FileBlob:
        """Raises NotFound, StoreDown."""

    def names(self, prefix: str) -> list[str]:
        """What is stored directly below a prefix that ends in a slash, without the prefix, and
        perhaps folders there."""

    def stamp(self, name: str) -> object:
        """The stamp that a blob of the name would have now, None if there is none: a quick way to
        see that what is remembered of it still holds."""

    def walk(self, prefix: str = "") -> Iterator[Item]:
        """All that is stored below a prefix (empty, or ending in a slash); our own side files only
        if the prefix is theirs. Nothing is held in memory, and what changes meanwhile may be
        missed."""


class Storage(Shelf, Protocol):
    """Bytes by name, where a name is at once URL path, key and log field. What `put` and `adopt`
    have stored appears whole or not at all, and is durable when they return.

    Every verb raises StoreDown when the store cannot do it at all."""

    remark: str = ""  # what an operator should know at the start
    is_shared: bool = True  # whether several processes see the same

    @property
    def truth(self) -> Storage:
        """The same without copies nearby."""
        return self

    def sweep(self) -> None:
        """Removes what processes that have ended left unfinished."""
        return

    def link(self, name: str, method: str) -> str:
        """A URL at which a client can GET or HEAD a stored name by itself, for some minutes, and
        which must not be told to anybody else; "" if it is to have the bytes from us.
        Raises NotFound, StoreDown."""
        return ""

    def draft(self) -> Draft:
        """An empty draft to be filled and adopted; a file without a name if it will be copied."""
        return nameless_draft()

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        """Stores small bytes: in place of what may be there, or else only if nothing is. Whether
        they have been stored."""

    def adopt(self, name: str, draft: Draft) -> bool:
        """Stores a finished draft, unless its name is taken: what came first stays. Whether it
        has been stored."""

    def remove(self, name: str) -> None:
        """Takes a name away; whoever has it open reads on. Raises NotFound."""

    def close(self) -> None:
        """Gives back what the storage holds."""
        return


class StoreErrors:
    """The one door where a file system's errors become ours. No generator: from Python 3.13 on its
    frame, and with that all its callers have open, would live until the next garbage collection."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, OSError):
            return
        absent = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        if absent or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise NotFound("not in the store") from None
        raise StoreDown(f"the store fails: {error.strerror} ({self._name})") from None


# A pipe in the place of an artifact is not an artifact; O_NONBLOCK so that opening it does not wait
# for its other end.
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


def _place_in_order(entry: os.DirEntry[str]) -> str:
    """So that whole names are in order: a/b comes after a.b."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


class Folder(Shelf):
    """A folder laid out as GOMODCACHE/cache/download, only read."""

    _flags = _READ_FLAGS

    def __init__(self, folder: str) -> None:
        self._root = os.path.abspath(folder)

    def _path(self, name: str) -> str:
        return os.path.join(self._root, name)

    def open(self, name: str) -> FileBlob:
        with StoreErrors(name):
            file = OpenFile(os.open(self._path(name), self._flags))
            status = os.fstat(file.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            return FileBlob(file, status.st_size, status.st_mtime, stamp_of(status))

    def stamp(self, name: str) -> object:
        try:
            return stamp_of(os.stat(f"{self._root}/{name}"))
        except OSError:
            return None

    def names(self, prefix: str) -> list[str]:
        try:
            with StoreErrors(prefix):
                return os.listdir(self._path(prefix))
        except NotFound:
            return []

    def walk(self, prefix: str = "") -> Iterator[Item]:
        left = self._entries(self._path(prefix))
        while left:
            entry = left.pop()
            if entry.name.startswith((OWN_MARK, "lost+found")):  # the latter a file system's own
                continue
            if entry.is_dir(follow_symlinks=False):
                left += self._entries(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield from self._item(entry)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """The last one first."""
        try:
            with StoreErrors(folder), os.scandir(folder) as entries:
                return sorted(entries, key=_place_in_order, reverse=True)
        except NotFound:
            return []

    def _item(self, entry: os.DirEntry[str]) -> list[Item]:
        """None if it has gone meanwhile."""
        try:
            with StoreErrors(entry.path):
                status = entry.stat(follow_symlinks=False)
        except NotFound:
            return []
        name = os.path.relpath(entry.path, self._root).replace(os.sep, "/")
        return [Item(name, status.st_size, status.st_mtime)]


OWN_MARK = ".goproxy-"  # begins the names of our own side files, which are no artifacts
BAD_PLACE = OWN_MARK + "bad"  # where goes what is not what it should be


def nameless_draft() -> Draft:
    """One that will be copied, or given out alone. Raises StoreDown."""
    try:
        return Draft()
    except OSError as error:
        raise StoreDown(f"no temporary file can be made: {error.strerror}") from None


def _user() -> str:
    """Which one, for whoever runs in a container."""
    return f" (uid {os.getuid()})" if hasattr(os, "getuid") else ""


def _attribute(descriptor: int, name: str) -> bytes:
    """An attribute of a file, b"" where there is none."""
    if hasattr(os, "getxattr"):
        with contextlib.suppress(OSError):
            return os.getxattr(descriptor, name)
    return b""


class _Marks:
    """Hashes of the latest 50,000 or so things, in half a MB that never becomes more: a new one
    takes the place of the eighth before it in its row. A set of as many takes ten times that."""

    _ROWS, _ROW, _MARK = 8192, 64, 8  # bytes

    def __init__(self) -> None:
        self._bytes = bytearray(self._ROWS * self._ROW)

    def _place(self, thing: object) -> tuple[bytes, int, int]:
        number = hash(thing)
        start = number % self._ROWS * self._ROW
        return number.to_bytes(self._MARK, "little", signed=True), start, start + self._ROW

    def __contains__(self, thing: object) -> bool:
        return self._bytes.find(*self._place(thing)) >= 0

    def add(self, thing: object) -> None:
        mark, start, end = self._place(thing)
        self._bytes[start:end] = mark + self._bytes[start : end - self._MARK]


_NOT_FOR_GOOD = {errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.EROFS}


class DiskStorage(Folder, Storage):
    """A folder in the layout that file:// and nginx read as well.

    Files appear by rename, after fsync, and their folder is synced too: of 200 files written and
    renamed without, a power cut left none. Where the file system keeps attributes, each has the
    digest of its bytes, and is held to it at the first use by every process."""

    _OWN = OWN_MARK + "drafts"
    _SEAL = "user.goproxy.sha256"
    _flags = _READ_FLAGS | getattr(os, "O_NOFOLLOW", 0)  # nobody else's files are given out

    def __init__(self, folder: str) -> None:
        """Creates the folder and sweeps drafts of dead processes. Raises StartError."""
        super().__init__(folder)
        self._sound = _Marks()  # of stamps of files whose bytes were found to be right
        self._drafts = os.path.join(self._root, self._OWN)
        try:
            self._make_folder(self._drafts)
            self.sweep()
            descriptor, probe = tempfile.mkstemp(dir=self._drafts)
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):  # another process has swept it
                os.unlink(probe)
        except OSError as error:
            if error.errno in _NOT_FOR_GOOD and os.path.isdir(self._root):
                self.remark = f"The store cannot be written yet: {error.strerror}"
                return
            raise StartError(
                f"cannot write to the cache folder {folder}: {error.strerror}; "
                f"make it writable for this user{_user()} or choose another one with -cache"
            ) from None

    def sweep(self) -> None:
        """Removes the drafts of processes that have ended."""
        for leftover in os.listdir(self._drafts):
            path = os.path.join(self._drafts, leftover)
            with contextlib.suppress(OSError):
                file = OpenFile(os.open(path, os.O_RDWR))
                if lock_draft(file.descriptor):
                    os.unlink(path)

    def open(self, name: str) -> FileBlob:
        """Raises Spoiled, too; the file has been moved aside then."""
        blob = super().open(name)
        if blob.stamp not in self._sound or blob.stamp in UNREADABLE:
            with StoreErrors(name):
                self._check(name, blob)
        return blob

    def _check(self, name: str, blob: FileBlob) -> None:
        trouble = self._trouble(name, blob)
        if trouble:
            aside = os.path.join(self._root, BAD_PLACE, name)
            self._make_folder(os.path.dirname(aside))
            os.replace(self._path(name), aside)
            raise Spoiled(f"{trouble}: moved aside to {BAD_PLACE}/{name}")
        self._sound.add(blob.stamp)
        UNREADABLE.discard(blob.stamp)

    def _trouble(self, name: str, blob: FileBlob) -> str:
        """Without a seal, what a glance tells: what was copied may be a piece, and files of go,
        which does not sync them, are empty after a power cut."""
        seal = _attribute(blob.descriptor, self._SEAL)
        if seal:
            is_same = seal.hex() == digest_of(blob.again())
            return "" if is_same else "its bytes have changed on the disk"
        with blob.reading() as file:
            return "it is not whole" if is_piece(name, file) else ""

    def draft(self) -> Draft:
        """On a disk that takes no file, one that cannot be stored, but given out."""
        try:
            return Draft(self._drafts)
        except OSError:
            return nameless_draft()

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        with StoreErrors(name):
            draft = self.draft()
            try:
                draft.write(data)
                return self._publish(name, draft, replace)
            except BaseException as error:
                draft.fail(error)
                raise

    def adopt(self, name: str, draft: Draft) -> bool:
        with StoreErrors(name):
            return self._publish(name, draft, replace=False)

    def _publish(self, name: str, draft: Draft, replace: bool) -> bool:
        if not draft.path:
            raise StoreDown("the store fails: its disk is full or not writable")
        path = self._path(name)
        if hasattr(os, "setxattr"):
            with contextlib.suppress(OSError):  # not every file system has attributes
                os.setxattr(draft.file.descriptor, self._SEAL, draft.digest.digest())
        os.chmod(draft.path, 0o644)
        os.utime(draft.path, (draft.modified, draft.modified))
        os.fsync(draft.file.descriptor)
        self._make_folder(os.path.dirname(path))
        stored = self._rename(draft.path, path, replace)
        self._sync_folder(os.path.dirname(path))
        return stored

    @staticmethod
    def _rename(source: str, path: str, replace: bool) -> bool:
        """Renames a file, if need be only where none has that name; else it goes."""
        if not replace:
            try:
                os.link(source, path)
            except OSError:  # it has the name, or is of a file system without hard links
                if os.path.lexists(path):
                    os.unlink(source)
                    return False
        os.replace(source, path)  # of two links to one file, it leaves both
        with contextlib.suppress(FileNotFoundError):
            os.unlink(source)
        return True

    def remove(self, name: str) -> None:
        with StoreErrors(name):
            os.unlink(self._path(name))
            self._sync_folder(os.path.dirname(self._path(name)))

    def _make_folder(self, path: str) -> None:
        """As os.makedirs, and the new entries survive a power cut."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self._make_folder(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
        self._sync_folder(parent)

    @staticmethod
    def _sync_folder(path: str) -> None:
        if not hasattr(os, "O_DIRECTORY"):
            return  # only POSIX can open a folder
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sweep()


class _Held(NamedTuple):
    """Bytes in memory: when they came, and a number that no others have."""

    data: bytes | bytearray
    modified: float
    number: int


class MemoryStorage(Storage):
    """Bytes in the memory of this process: at most `limit` of them. The versions that were not
    read for longest make room, each with all its files."""

    is_shared = False
    _DEFAULT, _EXTRA = 10**9, 512  # bytes; a name costs memory as well
    _LIGHT = 1 << 20  # beyond it, what has been removed must not live on in others' memory

    def __init__(self, limit: int | None) -> None:
        self._limit = limit or self._DEFAULT
        self._mutex = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._groups: collections.OrderedDict[str, set[str]] = collections.OrderedDict()
        self._folders: dict[str, collections.Counter[str]] = {}
        self._numbers = itertools.count()
        self._size = 0
        self.remark = (
            f"The cache is in memory, {self._limit} bytes at most: nothing survives this process"
        )

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        self._check_size(len(data))
        return self._hold(name, data, time.time(), replace)

    def adopt(self, name: str, draft: Draft) -> bool:
        self._check_size(draft.written)
        data = bytearray(draft.written)
        with StoreErrors(name):
            for start in range(0, len(data), CHUNK):
                data[start : start + CHUNK] = draft.file.read_at(CHUNK, start)
        return self._hold(name, data, draft.modified, replace=False)

    def _check_size(self, size: int) -> None:
        if size + self._EXTRA > self._limit:
            raise BodyTooLarge(f"{size} bytes are more than the whole store holds (-max-size)")

    def _hold(self, name: str, data: bytes | bytearray, modified: float, replace: bool) -> bool:
        with self._mutex:
            if name in self._held:
                if not replace:
                    return False
                self._drop(name)
            self._held[name] = _Held(data, modified, next(self._numbers))
            self._size += len(data) + self._EXTRA
            self._groups.setdefault(_version_of(name), set()).add(name)
            self._groups.move_to_end(_version_of(name))
            for folder, child in _steps(name):
                self._folders.setdefault(folder, collections.Counter())[child] += 1
            self._make_room(name)
        return True

    def _make_room(self, newest_name: str) -> None:
        """Drops what is oldest; of the newest version, at last, what came before its newest."""
        while self._size > self._limit:
            names = next(iter(self._groups.values()))
            for name in names - {newest_name}:
                self._drop(name)

    def _drop(self, name: str) -> None:
        self._size -= len(self._held.pop(name).data) + self._EXTRA
        group = self._groups[_version_of(name)]
        group.remove(name)
        if not group:
            del self._groups[_version_of(name)]
        for folder, child in _steps(name):
            children = self._folders[folder]
            children[child] -= 1
            if not children[child]:
                del children[child]
            if not children:
                del self._folders[folder]

    def open(self, name: str) -> FileBlob:
        with self._mutex:
            held = self._held.get(name)
            if not held:
                raise NotFound("not in the store")
            self._groups.move_to_end(_version_of(name))
        size = len(held.data)
        stamp = held.number if size <= self._LIGHT else None
        return FileBlob(OpenBytes(held.data), size, held.modified, stamp)

    def stamp(self, name: str) -> object:
        held = self._held.get(name)
        return held.number if held else None

    def names(self, prefix: str) -> list[str]:
        with self._mutex:
            return list(self._folders.get(prefix, ()))

    def walk(self, prefix: str = "") -> Iterator[Item]:
        with self._mutex:
            held = [(name, each) for name, each in self._held.items() if name.startswith(prefix)]
        for name, each in sorted(held):  # so that the files of a version come together
            if prefix or not name.startswith(OWN_MARK):
                yield Item(name, len(each.data), each.modified)

    def remove(self, name: str) -> None:
        with self._mutex:
            if name not in self._held:
                raise NotFound("not in the store")
            self._drop(name)


def _version_of(name: str) -> str:
    """What the files of one module version have in common; of other names, the name itself."""
    stem, dot, _ = name.rpartition(".")
    return stem if dot and "/@v/" in stem else name


def _steps(name: str) -> Iterator[tuple[str, str]]:
    """The folders on the way to a name, each with what stands in it."""
    parts = name.split("/")
    for depth, part in enumerate(parts):
        yield "".join(f"{parent}/" for parent in parts[:depth]), part


def pour(
    source: Blob, sink: weakref.ref[Draft], name: str, on_failure: Callable[[], object] = bool
) -> None:
    """Fills a draft as long as somebody reads it. What ends the source early ends the draft,
    once `on_failure` has been called."""
    with contextlib.closing(source):
        try:
            while _poured(source.read(CHUNK), sink(), name):
                pass
        except BaseException as caught:
            on_failure()
            draft, is_ours = sink(), isinstance(caught, ProxyError)
            if draft:
                draft.fail(caught if is_ours else StoreDown(f"internal error ({name})"))
            if not is_ours:
                raise


def _poured(data: bytes, draft: Draft | None, name: str) -> bool:
    """Whether there is more to do."""
    if draft and data:
        with StoreErrors(name):
            draft.write(data)
    elif draft and draft.size not in (None, draft.written):
        raise StoreDown(f"the store gives less than it has ({name})")
    elif draft:
        draft.finish()
    return bool(draft and data)


class RemoteStorage(Storage):
    """A storage whose bytes are no local files. What is small comes whole; what is big runs
    through a nameless local file, from which it is given out as it arrives, and which all share
    who read it at that time.

    A subclass has `_fetch`, and calls `_forget` for each name that it changes. Whatever it does
    has a deadline. It is made before processes fork: what must not be shared comes later."""

    _SMALL = 1 << 20  # bytes
    _STAMPS, _STAMP_SECONDS = 10_000, 10.0
    _POURS = 12

    def __init__(self) -> None:
        self._stamps: TtlCache[object] = TtlCache(self._STAMPS)
        self._spools: weakref.WeakValueDictionary[str, Draft] = weakref.WeakValueDictionary()
        self._spool_mutex = threading.Lock()
        self._pour_lane: Lane | None = None

    def _fetch(self, name: str) -> Blob:
        """The bytes of a name, with their size and when they were stored (which all who share the
        store must tell alike), to be read once. Raises NotFound, StoreDown."""
        raise NotImplementedError

    def _forget(self, name: str) -> None:
        """What is known of a name may be no longer so."""
        self._stamps.drop(name)
        with self._spool_mutex:
            self._spools.pop(name, None)

    def open(self, name: str) -> FileBlob:
        with self._spool_mutex:
            spool = self._spools.get(name)
        if spool:
            return self._follow(spool)
        blob = self._fetch(name)
        assert blob.size is not None
        if blob.size > self._SMALL:
            return self._follow(self._spool(name, blob))
        with contextlib.closing(blob):
            data = blob.read_all(self._SMALL)
        stamp = (len(data), blob.modified)
        self._stamps.put(name, stamp, self._STAMP_SECONDS)
        return FileBlob(OpenBytes(data), len(data), blob.modified, stamp)

    def stamp(self, name: str) -> object:
        """As it was a moment ago, None if nobody looked: to ask would take too long."""
        return self._stamps.get(name)

    @staticmethod
    def _follow(spool: Draft) -> GrowingBlob:
        reader = spool.reader()
        reader.settle()
        return reader

    def _spool(self, name: str, blob: Blob) -> Draft:
        """The spool of a name: one that is there by now, or a new one that the blob fills."""
        fresh = self.draft()
        fresh.size, fresh.modified = blob.size, blob.modified
        with self._spool_mutex:
            spool = self._spools.setdefault(name, fresh)
            self._pour_lane = self._pour_lane or Lane("spool", self._POURS)
        if spool is fresh:
            forget = functools.partial(self._forget, name)
            self._pour_lane.do(functools.partial(pour, blob, weakref.ref(fresh), name, forget))
        else:
            blob.close()
        return spool

    def close(self) -> None:
        if self._pour_lane:
            self._pour_lane.close()


class SqlLine:
    """A connection to a database, for one thread at a time. Each statement, with `?` for its
    values, is committed by itself, unless it stands between BEGIN and COMMIT.

    Its verbs raise StoreDown; StoreAway when the connection is of no use any more."""

    begin: str  # how a transaction that writes begins
    _driver: Any
    _connection: Any

    def _guarded(self) -> contextlib.AbstractContextManager[None]:
        """With our errors in the place of the driver's."""
        raise NotImplementedError

    def _execute(self, statement: str, values: Sequence[Any]) -> Any:
        return self._connection.execute(statement, values)

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """What a SELECT finds."""
        with self._guarded():
            return list(self._execute(statement, values).fetchall())

    def change(self, statement: str, *values: Any) -> int:
        """How many rows a statement has changed."""
        with self._guarded():
            return int(self._execute(statement, values).rowcount)

    def is_current(self) -> bool:
        """Whether it still leads to the database; nobody is asked for that."""
        raise NotImplementedError

    def close(self) -> None:
        """Never raises."""
        with contextlib.suppress(self._driver.Error):
            self._connection.close()


@contextlib.contextmanager
def _transaction(line: SqlLine) -> Iterator[None]:
    line.change(line.begin)
    try:
        yield
        line.change("COMMIT")
    except BaseException:
        with contextlib.suppress(StoreDown):
            line.change("ROLLBACK")
        raise


class SqlDialect(Protocol):
    """What databases differ in."""

    blob: str  # its type for bytes
    text: str  # its type for names, ordered by their bytes

    def connect(self) -> SqlLine:
        """Raises StoreDown, StoreAway."""

    def check_room(self, line: SqlLine, size: int) -> None:
        """Raises StoreDown if so many bytes are known to find no room."""
        return

    def refuse(self, error: StoreDown) -> None:
        """Raises StartError for an error at the start that will not go away by itself."""


class SqlLines:
    """Connections to a database, each lent to one at a time."""

    _LINES, _IDLE_LINES, _LINE_SECONDS = 8, 4, 10.0

    def __init__(self, dialect: SqlDialect) -> None:
        self._dialect = dialect
        self._idle: collections.deque[SqlLine] = collections.deque()
        self._closed = False
        self._permits = threading.BoundedSemaphore(self._LINES)

    def _tables(self) -> tuple[str, ...]:
        blob, text = self._dialect.blob, self._dialect.text
        return (
            "CREATE TABLE IF NOT EXISTS goproxy_names (name "
            f"{text} PRIMARY KEY, folder {text} NOT NULL, size BIGINT NOT NULL, "
            f"modified DOUBLE PRECISION NOT NULL, body BIGINT, data {blob})",
            "CREATE INDEX IF NOT EXISTS goproxy_folders ON goproxy_names (folder)",
            "CREATE TABLE IF NOT EXISTS goproxy_chunks (body BIGINT NOT NULL, "
            f"number INTEGER NOT NULL, data {blob} NOT NULL, UNIQUE (body, number))",
            "CREATE TABLE IF NOT EXISTS goproxy_waste (body BIGINT PRIMARY KEY, "
            "since DOUBLE PRECISION NOT NULL)",
        )

    def _connect(self) -> SqlLine:
        line = self._dialect.connect()
        try:
            with contextlib.suppress(StoreDown):
                line.rows("SELECT 1 FROM goproxy_waste LIMIT 1")
                return line
            with contextlib.suppress(StoreDown):  # another replica may be at it
                self._create(line)
            self._create(line)
        except BaseException:
            line.close()
            raise
        return line

    def _create(self, line: SqlLine) -> None:
        for statement in self._tables():
            line.change(statement)

    def _with(self, work: Callable[[SqlLine], T]) -> T:
        """Does work on a connection. One that was idle may have died meanwhile: then once more."""
        if not self._permits.acquire(timeout=self._LINE_SECONDS):
            raise StoreDown("the store is too busy")
        try:
            while True:
                idle = self._take_idle()
                line = idle or self._connect()
                try:
                    result = work(line)
                except StoreAway:
                    line.close()
                    if not idle:
                        raise
                    self._close_idle()  # they are as old
                    continue
                except BaseException:
                    line.close()
                    raise
                self._give_back(line)
                return result
        finally:
            self._permits.release()

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        return self._with(lambda line: line.rows(statement, *values))

    def _change(self, statement: str, *values: Any) -> int:
        return self._with(lambda line: line.change(statement, *values))

    def _take_idle(self) -> SqlLine | None:
        with contextlib.suppress(IndexError):
            while True:
                line = self._idle.pop()
                if line.is_current():
                    return line
                line.close()
        return None

    def _give_back(self, line: SqlLine) -> None:
        if len(self._idle) >= self._IDLE_LINES:
            line.close()
            return
        self._idle.append(line)
        if self._closed:  # by somebody else, while this was in use
            self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class _Chunks(Blob):
    """A long body, piece by piece."""

    def __init__(self, size: int, modified: float, pieces: Iterator[bytes]) -> None:
        self.size = size
        self.modified = modified
        self._pieces = pieces
        self._rest = b""
        self._left = size

    def read(self, count: int) -> bytes:
        if not self._rest and self._left:
            self._rest = next(self._pieces)
        data, self._rest = self._rest[:count], self._rest[count:]
        self._left -= len(data)
        return data


class SqlStorage(SqlLines, RemoteStorage):
    """Three tables in a database: names with small bodies, chunks of big ones, and waste: bodies
    without a name, because they are not complete yet or because it was taken away. These stay for
    a while, so that who reads one can finish. A name appears in one transaction."""

    _WASTE_SECONDS, _TIDY_SECONDS, _TIDY_BODIES = 900.0, 60.0, 100
    _PAGE = 1000
    _SEAL = -1  # the number of the chunk that is the SHA-256 of the others

    def __init__(self, dialect: SqlDialect) -> None:
        """Asks the database, but keeps no connection. Raises StartError."""
        SqlLines.__init__(self, dialect)
        RemoteStorage.__init__(self)
        self._tidy_at = 0.0
        try:
            with contextlib.closing(self._connect()) as line:
                self._tidy(line)
        except StoreDown as error:
            dialect.refuse(error)
            self.remark = f"The store cannot be used yet: {error}"

    def _fetch(self, name: str) -> Blob:
        select = "SELECT size, modified, body, data FROM goproxy_names WHERE name = ?"
        rows = self._rows(select, name)
        if not rows:
            raise NotFound("not in the store")
        size, modified, body, data = rows[0]
        if data is None:
            return _Chunks(size, modified, self._pieces(name, body, size))
        if body not in (None, self._mark(data)):
            raise self._spoiled(name, body, "its bytes have changed in the store")
        return BytesBlob(data, modified)

    @staticmethod
    def _mark(data: bytes) -> int:
        """What stands in the place of a body's number where there is none: 62 bits of a digest."""
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 2

    def _pieces(self, name: str, body: int, size: int) -> Iterator[bytes]:
        """The last one only if all is as it was stored."""
        digest = hashlib.sha256()
        for number in itertools.count():
            data = self._chunk(body, number)
            digest.update(data or b"")
            size -= len(data or b"")
            if data is None or size < 0:
                raise self._spoiled(name, body, "the store has lost a part of it")
            if not size and self._chunk(body, self._SEAL) not in (None, digest.digest()):
                raise self._spoiled(name, body, "its bytes have changed in the store")
            yield data

    def _chunk(self, body: int, number: int) -> bytes | None:
        select = "SELECT data FROM goproxy_chunks WHERE body = ? AND number = ?"
        rows = self._rows(select, body, number)
        return bytes(rows[0][0]) if rows else None

    def _spoiled(self, name: str, body: int, why: str) -> Spoiled:
        """Moves aside what is not what was stored."""
        aside = f"{BAD_PLACE}/{name}"
        with contextlib.suppress(NotFound):
            self.remove(aside)
        move = "UPDATE goproxy_names SET name = ?, folder = ? WHERE name = ? AND body = ?"
        self._change(move, aside, aside.rpartition("/")[0], name, body)
        self._forget(name)
        return Spoiled(f"{why}: moved aside to {aside}")

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        return self._store(name, len(data), time.time(), io.BytesIO(data), replace)

    def adopt(self, name: str, draft: Draft) -> bool:
        with draft.file.reading() as file:
            return self._store(name, draft.written, draft.modified, file, replace=False)

    def _store(self, name: str, size: int, modified: float, file: BinaryIO, replace: bool) -> bool:
        if size <= self._SMALL:
            data = file.read()
            body = self._mark(data)
        else:
            self._with(lambda line: self._dialect.check_room(line, size))
            body, data = self._upload(file), None
        row = (name, name.rpartition("/")[0], size, modified, body, data)
        try:
            return self._with(lambda line: self._publish(line, row, replace))
        finally:
            self._forget(name)

    def _upload(self, file: BinaryIO) -> int:
        """The number of a new body that has no name yet."""
        body = secrets.randbits(62)
        waste = "INSERT INTO goproxy_waste (body, since) VALUES (?, ?)"
        self._change(waste, body, time.time())
        insert = "INSERT INTO goproxy_chunks (body, number, data) VALUES (?, ?, ?)"
        chunks = iter(functools.partial(file.read, self._SMALL), b"")
        digest = hashlib.sha256()
        try:
            for number, data in enumerate(chunks):
                digest.update(data)
                self._change(insert, body, number, data)
            self._change(insert, body, self._SEAL, digest.digest())
        except StoreDown:
            with contextlib.suppress(StoreDown):
                self._with(lambda line: self._discard(line, body))
            raise
        return body

    def _publish(self, line: SqlLine, row: Sequence[Any], replace: bool) -> bool:
        name, body, data = row[0], *row[4:]
        action = "NOTHING"
        if replace:
            columns = ("size", "modified", "body", "data")
            action = f"UPDATE SET {', '.join(f'{key} = excluded.{key}' for key in columns)}"
        with _transaction(line):
            if replace:
                self._waste(line, name)
            stored = line.change(
                "INSERT INTO goproxy_names (name, folder, size, modified, body, data) "
                f"VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO {action}",
                *row,
            )
            kept = "DELETE FROM goproxy_waste WHERE body = ?"
            if stored and data is None and not line.change(kept, body):
                raise StoreDown("storing took so long that the parts were swept away")
        self._tidy(line)
        return bool(stored)

    @staticmethod
    def _waste(line: SqlLine, name: str) -> None:
        line.change(
            "INSERT INTO goproxy_waste (body, since) SELECT body, ? FROM goproxy_names "
            "WHERE name = ? AND data IS NULL ON CONFLICT (body) DO NOTHING",
            time.time(),
            name,
        )

    def _tidy(self, line: SqlLine) -> None:
        """Removes some of the oldest waste, once in a while, if that can be written."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + self._TIDY_SECONDS
        select = "SELECT body FROM goproxy_waste WHERE since < ? ORDER BY since LIMIT ?"
        with contextlib.suppress(StoreDown):
            for row in line.rows(select, time.time() - self._WASTE_SECONDS, self._TIDY_BODIES):
                self._discard(line, row[0])

    @staticmethod
    def _discard(line: SqlLine, body: int) -> None:
        with _transaction(line):
            if line.change("DELETE FROM goproxy_waste WHERE body = ?", body):  # no name got it
                line.change("DELETE FROM goproxy_chunks WHERE body = ?", body)

    def remove(self, name: str) -> None:
        def work(line: SqlLine) -> int:
            with _transaction(line):
                self._waste(line, name)
                removed = line.change("DELETE FROM goproxy_names WHERE name = ?", name)
            self._tidy(line)
            return removed

        removed = self._with(work)
        self._forget(name)
        if not removed:
            raise NotFound("not in the store")

    def names(self, prefix: str) -> list[str]:
        select = "SELECT name FROM goproxy_names WHERE folder = ?"
        return [row[0][len(prefix) :] for row in self._rows(select, prefix[:-1])]

    def walk(self, prefix: str = "") -> Iterator[Item]:
        select = (
            "SELECT name, size, modified FROM goproxy_names WHERE name > ? AND name < ? "
            "ORDER BY name LIMIT ?"
        )
        last, end = prefix, f"{prefix[:-1]}0" if prefix else "\U0010ffff"  # 0 comes after a slash
        while True:
            rows = self._rows(select, last, end, self._PAGE)
            for name, size, modified in rows:
                if prefix or not name.startswith(OWN_MARK):
                    yield Item(name, size, modified)
            if not rows:
                return
            last = rows[-1][0]

    def close(self) -> None:
        super().close()
        self._closed = True
        self._close_idle()


class _SqliteLine(SqlLine):
    begin = "BEGIN IMMEDIATE"

    def __init__(self, driver: Any, path: str) -> None:
        self._driver = driver
        self._path = path
        with self._guarded():
            self._connection = driver.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._file = self._identity()

    def _identity(self) -> tuple[int, int]:
        try:
            status = os.stat(self._path)
        except OSError:
            return (0, 0)
        return (status.st_dev, status.st_ino)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise StoreDown(f"the store fails: {error}") from None

    def is_current(self) -> bool:
        return self._identity() == self._file


_BUSY_SECONDS = 10.0


class Sqlite(SqlDialect):
    """One file, in write-ahead mode. What is committed is on the disk."""

    blob, text = "BLOB", "TEXT"
    _SETUP = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")
    _QUICK = 256 << 20  # bytes of a file that is looked through at the start
    _SPARE = 8 << 20  # what the write-ahead file takes

    def __init__(self, path: str) -> None:
        """Raises ValueError where Python has no SQLite, StartError."""
        try:
            self._driver = importlib.import_module("sqlite3")
        except ImportError:
            raise ValueError("this Python was built without SQLite") from None
        self._path = os.path.abspath(path)
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
        except OSError as error:
            self.refuse(StoreDown(str(error.strerror)))
        self._is_checked = False

    def connect(self) -> SqlLine:
        line = _SqliteLine(self._driver, self._path)
        try:
            for statement in self._SETUP:
                line.rows(statement)
            self._check(line)
        except BaseException:
            line.close()
            raise
        return line

    def _check(self, line: SqlLine) -> None:
        """At the start alone: a big file would take long."""
        is_checked, self._is_checked = self._is_checked, True
        if not is_checked and os.path.getsize(self._path) < self._QUICK:
            found = line.rows("PRAGMA quick_check(1)")[0][0]
            if found != "ok":
                raise StoreDown(f"the store fails: {found}")

    def check_room(self, line: SqlLine, size: int) -> None:
        """A disk filled to the last page would leave no room to take anything away either."""
        (pages,), (page,) = line.rows("PRAGMA freelist_count") + line.rows("PRAGMA page_size")
        try:
            free = shutil.disk_usage(os.path.dirname(self._path)).free
        except OSError as error:
            raise StoreDown(f"the store fails: {error.strerror}") from None
        if free + pages * page < size + self._SPARE:
            raise StoreDown("the store fails: its disk is full")

    def refuse(self, error: StoreDown) -> None:
        with contextlib.suppress(OSError):
            if shutil.disk_usage(os.path.dirname(self._path)).free < self._SPARE:
                return  # full: not for good
        raise StartError(
            f"cannot use {self._path} as a store: {error}; make it and its folder writable, or "
            "put a good copy in its place (or none: it fills again), or choose another -cache"
        )


class PostgresLine(SqlLine):
    begin = "BEGIN"
    _SECONDS = 10.0  # for one statement
    _CONNECT_SECONDS = 3
    _IDLE_SECONDS = 60  # after which the system asks whether the server is still there

    def __init__(self, driver: Any, url: str) -> None:
        self._driver = driver
        self._mutex = threading.Lock()
        self._running: object = None  # the statement, while there is one
        options: dict[str, Any] = {"application_name": "goproxy", "autocommit": True}
        options["keepalives_idle"] = self._IDLE_SECONDS
        if "connect_timeout=" not in url:
            options["connect_timeout"] = self._CONNECT_SECONDS
        try:
            # Poolers that give each transaction another session know no prepared statements.
            self._connection = driver.connect(url, prepare_threshold=None, **options)
        except driver.Error as error:
            raise StoreAway(f"the database cannot be reached: {_first_line(error)}") from None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Within a deadline, and with our errors."""
        token = self._running = object()
        alarm = ALARMS.set(self._SECONDS, functools.partial(self._cut, token))
        try:
            yield
        except self._driver.Error as error:
            kind = StoreAway if self._connection.broken else StoreDown
            raise kind(f"the database fails: {_first_line(error)}") from None
        finally:
            ALARMS.cancel(alarm)
            with self._mutex:
                self._running = None

    def _cut(self, token: object) -> None:
        """Who waits for an answer learns that none will come."""
        with self._mutex, contextlib.suppress(OSError, self._driver.Error):
            if self._running is not token:
                return
            sock = socket.socket(fileno=os.dup(self._connection.fileno()))
            with contextlib.closing(sock):
                sock.shutdown(socket.SHUT_RDWR)

    def _execute(self, statement: str, values: Sequence[Any]) -> Any:
        return self._connection.execute(statement.replace("?", "%s"), values, binary=True)

    def is_current(self) -> bool:
        return not self._connection.closed


def _first_line(error: Exception) -> str:
    return mask(str(error).strip().partition("\n")[0])


class Postgres(SqlDialect):
    """A PostgreSQL server, which many replicas may share, by the package psycopg."""

    blob, text = "BYTEA", 'TEXT COLLATE "C"'
    # A server says no for good in other words than these.
    _FOR_NOW = re.compile("starting up|shutting down|recovery|too many|connection slots")

    def __init__(self, url: str) -> None:
        """Raises ValueError if the package is missing, or libpq cannot read the URL."""
        self._url = url
        try:
            self._driver = importlib.import_module("psycopg")
        except ImportError:
            raise ValueError(
                "postgres:// needs a package: pip install 'psycopg[binary]', or "
                "'goproxy.py[postgres]'"
            ) from None
        try:
            self._driver.conninfo.conninfo_to_dict(url)
        except self._driver.Error as error:
            # What follows the colon may be a piece of the password.
            raise ValueError(_first_line(error).partition(":")[0]) from None

    def connect(self) -> SqlLine:
        return PostgresLine(self._driver, self._url)

    def refuse(self, error: StoreDown) -> None:
        """What cannot be reached may be there later; what the server itself refuses stays so."""
        refused = "FATAL" in str(error) and not self._FOR_NOW.search(str(error))
        if refused or not isinstance(error, StoreAway):
            raise StartError(
                f"cannot use {mask(self._url)} as a store: {error}; check user, password and "
                "database, and that the user may create tables in it"
            )


class WatchedStorage(Storage):
    """A storage that tells when it begins to fail and when it works again. While it is away, all
    are refused at once, and a thread of its own looks whether it is there again."""

    _PAUSE = 2.0  # seconds
    _PROBED = OWN_MARK + "probe"

    def __init__(self, storage: Storage, log: Log) -> None:
        self._storage = storage
        self._log = log
        self._mutex = threading.Lock()
        self._troubles: dict[str, StoreDown] = {}  # by what does not work: read or write
        self._is_sought = False
        self._ended = threading.Event()
        self.remark, self.is_shared = storage.remark, storage.is_shared

    @contextlib.contextmanager
    def _watch(self, half: str, name: str = "") -> Iterator[None]:
        """Without a name the work is no span: it may be spread over what its caller does."""
        away = self._away()
        if away:
            if not self._is_sought:
                self._note(half, away)
            raise StoreAway(str(away))
        try:
            with TRACER.span(f"store {half}", {"goproxy.name": name}) if name else NO_SPAN:
                yield
        except StoreDown as error:
            self._note(half, error)
            raise
        except Spoiled as error:
            self._log.error(str(error))
            raise
        except NotFound:
            self._note(half, None)
            raise
        else:
            self._note(half, None)

    def _away(self) -> StoreAway | None:
        return next((e for e in self._troubles.values() if isinstance(e, StoreAway)), None)

    def _note(self, half: str, error: StoreDown | None) -> None:
        if error is None and not self._troubles:
            return
        if error:
            METER.add("goproxy_store_errors_total", operation=half)
        with self._mutex:
            before, self._troubles = self._troubles, self._after(half, error)
            after = self._troubles
            seek = bool(self._away()) and not self._is_sought
            self._is_sought |= seek
        if after and not before:
            self._log.error(f"degraded: what cannot be read or stored is only fetched: {error}")
        elif before and not after:
            self._log.line("the store works again")
        if seek:
            try:
                begin_thread(self._seek, "seeker")
            except Overloaded:  # who comes next tries again
                self._is_sought = False

    def _after(self, half: str, error: StoreDown | None) -> dict[str, StoreDown]:
        """The troubles that are left; any other answer shows that the store is not away."""
        rest = {other: trouble for other, trouble in self._troubles.items() if other != half}
        if not isinstance(error, StoreAway):
            rest = {key: value for key, value in rest.items() if not isinstance(value, StoreAway)}
        return {**rest, half: error} if error else rest

    def _seek(self) -> None:
        """Asks until there is an answer."""
        while not self._ended.wait(self._PAUSE):
            trouble = None
            try:
                self._storage.open(self._PROBED).close()
            except StoreAway:
                continue
            except StoreDown as error:
                trouble = error
            except NotFound:
                pass
            except Exception:  # a bug, which must not make an outage endless
                self._log.error(traceback.format_exc())
                continue
            self._is_sought = False
            self._note("read", trouble)
            return

    def check(self) -> str:
        """What is wrong with the store now; nothing if it works."""
        try:
            with contextlib.suppress(NotFound):
                self.open(self._PROBED).close()
            if self._troubles:
                self.put(self._PROBED, b"")
        except StoreDown as error:
            return str(error)
        return ""

    @property
    def truth(self) -> Storage:
        return self._storage.truth

    def open(self, name: str) -> FileBlob:
        with self._watch("read", name):
            return self._storage.open(name)

    def names(self, prefix: str) -> list[str]:
        with self._watch("read", prefix):
            return self._storage.names(prefix)

    def stamp(self, name: str) -> object:
        return self._storage.stamp(name)

    def walk(self, prefix: str = "") -> Iterator[Item]:
        with self._watch("read"):
            yield from self._storage.walk(prefix)

    def link(self, name: str, method: str) -> str:
        with self._watch("read", name):
            return self._storage.link(name, method)

    def sweep(self) -> None:
        self._storage.sweep()

    def draft(self) -> Draft:
        return self._storage.draft()

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        with self._watch("write", name):
            return self._storage.put(name, data, replace)

    def adopt(self, name: str, draft: Draft) -> bool:
        with self._watch("write", name):
            return self._storage.adopt(name, draft)

    def remove(self, name: str) -> None:
        with self._watch("write"):
            self._storage.remove(name)

    def close(self) -> None:
        self._ended.set()
        self._storage.close()


def read_small(shelf: Shelf, name: str, limit: int) -> bytes:
    """All of a stored file that is small. Raises NotFound, StoreDown, and BadUpstream if it is
    longer than `limit` bytes."""
    with contextlib.closing(shelf.open(name)) as blob:
        return blob.read_all(limit)


@contextlib.contextmanager
def drafting(storage: Storage) -> Iterator[Draft]:
    """A draft that goes unless it is adopted."""
    draft = storage.draft()
    try:
        yield draft
        draft.finish()
    except BaseException as error:
        draft.fail(error)
        raise


def fill(draft: Draft, blob: Blob, name: str) -> None:
    """Writes all bytes of a blob. Raises StoreDown, and what reading raises."""
    for piece in pieces_of(blob):
        with StoreErrors(name):
            draft.write(piece)


def copy(shelf: Shelf, name: str, storage: Storage, to: str) -> None:
    """Stores under the name `to` what a shelf has under `name`, in pieces."""
    with contextlib.closing(shelf.open(name)) as blob, drafting(storage) as draft:
        fill(draft, blob, to)
        storage.adopt(to, draft)


def pieces_of(blob: Blob) -> Iterator[bytes]:
    """All bytes of a blob, in pieces of at most CHUNK bytes."""
    return iter(lambda: blob.read(CHUNK), b"")


def digest_of(blob: Blob) -> str:
    """The SHA-256 of a whole blob in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces_of(blob):
        digest.update(piece)
    return digest.hexdigest()


class Means(NamedTuple):
    """What a storage may need beside its place: a limit in bytes (-max-size), the way out, the
    variables of the environment, and somebody to tell what is odd."""

    limit: int | None
    dialer: Dialer
    environ: Mapping[str, str]
    say: Callable[[str], None]


class S3Storage(RemoteStorage):
    """Objects in a bucket, whose keys are the names. What never changes is written only where
    nothing is: of several replicas the first one wins, and no lock is needed."""

    _MAX_KEY = 1024  # bytes
    _LINK_SECONDS = 300

    def __init__(self, place: BucketPlace, means: Means) -> None:
        """Connects to nothing. Raises UsageError."""
        super().__init__()
        self._place = settled_place(place, means.environ)
        self._means = means
        self._buckets: dict[int, tuple[Bucket, Client]] = {}
        self._damaged: set[str] = set()  # names whose bytes are no good: the next ones replace them

    @property
    def _bucket(self) -> Bucket:
        """That of this process: no two may share a connection."""
        pid = os.getpid()
        made = self._buckets.get(pid) or self._buckets.setdefault(pid, self._make())
        return made[0]

    def _make(self) -> tuple[Bucket, Client]:
        client = Client(self._means.dialer, {})
        dialer = self._means.dialer
        chain = AwsKeyChain(self._means.environ, dialer.resolver, dialer)
        return Bucket(self._place, chain, client, self._means.say), client

    def _fetch(self, name: str) -> BucketObject:
        self._check_length(name)
        if name in self._damaged:
            raise NotFound("not in the store")
        return self._bucket.open(name, functools.partial(self._damaged.add, name))

    def _check_length(self, name: str) -> None:
        """As a disk says it: that a name is too long does not make the store one that fails."""
        if len((self._place.prefix + name).encode()) > self._MAX_KEY:
            raise NotFound("not in the store")

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        put = functools.partial(self._bucket.put, name, bytes_body(data))
        return self._store(name, put, replace)

    def adopt(self, name: str, draft: Draft) -> bool:
        body, is_old = Body(draft.written, draft.file.read_at), not draft.modified
        return self._store(name, functools.partial(self._bucket.put, name, body, is_old=is_old))

    def follow(self, name: str, draft: Draft, sha256: str) -> bool:
        """As `adopt`, for a draft that still grows (Bucket.follow)."""
        return self._store(name, functools.partial(self._bucket.follow, name, draft, sha256))

    def _store(self, name: str, put: Callable[[bool], bool], replace: bool = False) -> bool:
        self._check_length(name)
        with StoreErrors(name):
            stored = put(not replace and name not in self._damaged)
        self._damaged.discard(name)
        self._forget(name)
        return stored

    def names(self, prefix: str) -> list[str]:
        listing = self._bucket.listing(prefix, "/")
        return list({listed.key[len(prefix) :].rstrip("/"): None for listed in listing})

    def walk(self, prefix: str = "") -> Iterator[Item]:
        for listed in self._bucket.listing(prefix):
            if prefix or not listed.key.startswith(OWN_MARK):
                yield Item(*listed)

    def remove(self, name: str) -> None:
        self._bucket.find(name)
        self._bucket.remove(name)
        self._forget(name)

    def link(self, name: str, method: str) -> str:
        if not self._place.redirect or name in self._damaged:
            return ""
        self._bucket.find(name)
        return self._bucket.link(name, method, self._LINK_SECONDS)

    def close(self) -> None:
        super().close()
        if os.getpid() in self._buckets:
            self._buckets[os.getpid()][1].close()


_LASTING = re.compile(r".+/@v/[^/]+\.(mod|zip|ziphash)|sumdb/[^/]+/(lookup|tile)/.+")


def _is_lasting(name: str) -> bool:
    """Whether what stands under a name never changes, and is no side file of ours."""
    if name.startswith(OWN_MARK):
        return False
    stem, dot, _ = name.rpartition("/@v/")[2].rpartition(".info")
    return bool(_LASTING.fullmatch(name)) or (dot != "" and is_canonical(stem))


class FrontedStorage(Storage):
    """A folder in front of a slower store, in which the truth is. What never changes is kept in
    both; where the folder fails, the store does alone what both did."""

    def __init__(self, near: DiskStorage, far: Storage) -> None:
        self._near = near
        self._far = far
        self._mutex = threading.Lock()
        self._coming: set[str] = set()
        self._lane: Lane | None = None

    @property
    def truth(self) -> Storage:
        return self._far

    def open(self, name: str) -> FileBlob:
        if not _is_lasting(name):
            return self._far.open(name)
        with contextlib.suppress(NotFound, StoreDown):
            return self._near.open(name)
        blob = self._far.open(name)
        with self._mutex:
            self._lane = self._lane or Lane("copy", 2)  # of this process, not of its parent
            if name not in self._coming:
                self._coming.add(name)
                self._lane.do(functools.partial(self._copy, name, blob.again()))
        return blob

    def _copy(self, name: str, blob: FileBlob) -> None:
        failures = contextlib.suppress(ProxyError, OSError)
        with failures, contextlib.closing(blob), drafting(self._near) as draft:
            draft.modified = blob.modified  # so that all replicas tell the same time of it
            fill(draft, blob, name)
            self._near.adopt(name, draft)
        with self._mutex:
            self._coming.remove(name)

    def put(self, name: str, data: bytes, replace: bool = True) -> bool:
        stored = self._far.put(name, data, replace)
        if stored and _is_lasting(name):
            with contextlib.suppress(ProxyError):
                self._near.put(name, data, replace)
        return stored

    def adopt(self, name: str, draft: Draft) -> bool:
        stored = self._far.adopt(name, draft)
        with contextlib.suppress(ProxyError):
            if stored and draft.path:
                self._near.adopt(name, draft)
        with contextlib.suppress(OSError):
            os.unlink(draft.path)
        return stored

    def draft(self) -> Draft:
        with contextlib.suppress(StoreDown):
            return self._near.draft()
        return self._far.draft()

    def remove(self, name: str) -> None:
        with contextlib.suppress(NotFound, StoreDown):
            self._near.remove(name)
        self._far.remove(name)

    def stamp(self, name: str) -> object:
        return self._near.stamp(name) or self._far.stamp(name)

    def names(self, prefix: str) -> list[str]:
        return self._far.names(prefix)

    def walk(self, prefix: str = "") -> Iterator[Item]:
        return self._far.walk(prefix)

    def link(self, name: str, method: str) -> str:
        return self._far.link(name, method)

    def sweep(self) -> None:
        with contextlib.suppress(OSError):
            self._near.sweep()

    def close(self) -> None:
        if self._lane:
            self._lane.close()
        self._near.close()
        self._far.close()


def _open_s3(where: str, means: Means) -> Storage:
    place = parse_bucket(where)
    far = S3Storage(place, means)
    return FrontedStorage(DiskStorage(place.local), far) if place.local else far


STORAGES: dict[str, Callable[[str, Means], Storage]] = {
    "folder": lambda where, means: DiskStorage(where),
    "memory": lambda where, means: MemoryStorage(means.limit),
    "postgres": lambda where, means: SqlStorage(Postgres(where)),
    "s3": _open_s3,
    "sqlite": lambda where, means: SqlStorage(Sqlite(where[len("sqlite:") :])),
}


def open_storage(place: Place, means: Means) -> Storage:
    """The store that -cache names. Raises StartError, and ValueError for want of a package."""
    return STORAGES[place.kind](place.text, means)


# =============================================================================
# 8. Sources: where modules come from
# =============================================================================


class Source(Protocol):
    """Modules from somewhere. Paths and versions are unescaped and have been checked.

    NotFound is raised for authoritative absence only; other trouble is a BadUpstream, Forbidden
    or Overloaded."""

    def versions(self, path: str) -> list[str]:
        """The tagged versions of a module, in any order; [] if it exists without any."""

    def resolve(self, path: str, query: str) -> Info:
        """What "latest", a branch, a tag, a commit or a version stands for."""

    def open(self, artifact: Artifact) -> Blob:
        """The bytes of one .info, .mod or .zip; .info and .mod have been checked."""


def bytes_of(source: Source, artifact: Artifact) -> bytes:
    """All of a .info or .mod. Raises what the source does."""
    with contextlib.closing(source.open(artifact)) as blob:
        return blob.read_all(KINDS[artifact.kind].limit)


LATEST = "latest"
_FEW_SECONDS = 5
_MAX_LIST = 1 << 20  # a hundred thousand versions, which take a second to sort


def _again(work: Callable[[], T]) -> T:
    """Calls work up to three times while upstream is unreachable, with a random pause of at most
    a second between, or one of the seconds that it asks for, if they are few. The last error is
    raised."""
    for attempt in range(1, LongBody.TRIES):
        try:
            return work()
        except Overloaded as error:
            seconds = error.retry_after or 0
            error.hasty = seconds <= _FEW_SECONDS and passes_over(str(error))
            if error.hasty or seconds > _FEW_SECONDS:
                raise
            time.sleep(seconds + random.uniform(0, 0.5))
        except Unreachable as error:
            if error.lasts or isinstance(error, UpstreamTimeout):
                raise  # it has been waited for long enough
            time.sleep(random.uniform(0.05, 0.25 * attempt))
    return work()


def _refuse(response: Response, wanted: Sequence[int] = (200,)) -> None:
    """Raises what an upstream's status means, unless it is a wanted one."""
    if response.status in wanted:
        return
    words = _words(response)
    response.close()
    said = f"{response.peer} answered {response.status}{': ' if words else ''}{words}"
    if LoopFound.FIELD.lower() in response.fields:
        raise LoopFound(words)
    if response.status in (404, 410):
        raise (Gone if response.status == 410 else NotFound)(words or "not found upstream")
    if response.status in (401, 403):
        raise Forbidden(said)
    retry_after = response.fields.get("retry-after", "")
    if response.status == 429 or (response.status == 503 and retry_after):
        odd = 10 if retry_after else 1
        seconds = int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else odd
        raise Overloaded(said, min(60, seconds))
    raise (Unreachable if response.status >= 500 else BadUpstream)(said)


def _words(response: Response) -> str:
    """The first line of an error body if it is plain text, at most 300 characters."""
    if not response.fields.get("content-type", "text/plain").startswith("text/plain"):
        return ""
    try:
        text = response.read(2000).decode()
    except (BadUpstream, UnicodeDecodeError):
        return ""
    line = hide(text, response.shown).strip().partition("\n")[0][:300]
    return line[len("not found: ") :] if line.startswith("not found: ") else line


def fetch_small(client: Client, url: Url, limit: int) -> bytes:
    """A whole small body (at most `limit` bytes) within 30 seconds, retried while unreachable.
    Raises NotFound, Forbidden, Overloaded, BadUpstream."""
    until = time.monotonic() + METADATA.total

    def attempt() -> bytes:
        response = client.get(url, METADATA, until=until)
        with contextlib.closing(response):
            _refuse(response)
            if not response.whole:
                raise Unreachable(f"{url.authority}: a body without a length cannot be trusted")
            return response.read_all(limit)

    return _again(attempt)


def below(url: Url, name: str) -> Url:
    """The URL of an escaped name below a base URL, spelt as the go command spells it."""
    return dataclasses.replace(url, path=f"{url.path}/{urllib.parse.quote(name, safe='/@+~,:')}")


class Upstream(Source):
    """Another module proxy (Go reference, "GOPROXY protocol")."""

    def __init__(self, client: Client, url: Url) -> None:
        self._client = client
        self._url = url

    def versions(self, path: str) -> list[str]:
        data = self._small(f"{escape_path(path)}/@v/list", _MAX_LIST)
        lines = [line.split() for line in data.decode("utf-8", "replace").splitlines()]
        firsts = dict.fromkeys(fields[0] for fields in lines if fields)
        found = [first for first in firsts if is_semver(first)]
        if firsts and not found:
            raise BadUpstream(f"{self._url.authority}: the list holds no versions")
        return found

    def resolve(self, path: str, query: str) -> Info:
        try:
            data = self._small(query_name(path, query), MAX_INFO)
        except NotFound:
            versions = self.versions(path) if query == LATEST else []  # as proxyRepo.Latest has it
            if not versions:
                raise
            return self.resolve(path, newest(versions))
        with naming(self._url.authority):
            return read_info(data, None)

    def open(self, artifact: Artifact) -> Blob:
        if artifact.kind == "zip":
            return _Download(self._client, below(self._url, artifact.name))
        kind = KINDS[artifact.kind]
        data = self._small(artifact.name, kind.limit)
        with naming(self._url.authority):
            kind.check(artifact, data)
        return BytesBlob(data)

    def _small(self, name: str, limit: int) -> bytes:
        return fetch_small(self._client, below(self._url, name), limit)


def query_name(path: str, query: str) -> str:
    """The name under which a query's answer is asked for and stored."""
    escaped = escape_path(path)
    return f"{escaped}/@latest" if query == LATEST else f"{escaped}/@v/{escape_version(query)}.info"


class _Download(LongBody):
    """A zip from upstream. So much of it as is withheld from clients anyway is there at once:
    having that, a failure can still go elsewhere."""

    def __init__(self, client: Client, url: Url) -> None:
        self._client = client
        self._url = url
        self._until = time.monotonic() + TRANSFER.total
        super().__init__(_again(lambda: self._ask([], (200,))), Unreachable, MAX_ZIP)
        self._etag = self._response.fields.get("etag", "")
        self._ahead = b""
        try:
            self._look_ahead()
            # A page of somebody in between. What is longer may begin with something else.
            if len(self._ahead) < WITHHELD and b"PK\5\6" not in self._ahead:
                raise BadUpstream(f"{self._response.peer}: not a zip file")
        except BaseException:
            self.close()
            raise

    def _ask(self, headers: Sequence[tuple[str, str]], wanted: Sequence[int]) -> Response:
        response = self._client.get(self._url, TRANSFER, headers, self._until)
        _refuse(response, wanted)
        return response

    def _ask_rest(self, begins: tuple[str, str]) -> Response:
        same = [("If-Range", self._etag)] if self._etag.startswith('"') else []
        return _again(lambda: self._ask([begins, *same], (200, 206)))

    def _look_ahead(self) -> None:
        data = b"-"
        while data and len(self._ahead) < WITHHELD:
            data = super().read(CHUNK)
            self._ahead += data

    def read(self, count: int) -> bytes:
        data, self._ahead = self._ahead[:count], self._ahead[count:]
        return data or super().read(count)


class Stored(Source):
    """The modules of a store: what it can give in full counts as a version."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def with_zip(self, path: str) -> list[str]:
        """The canonical versions whose zip is there."""
        names = self._shelf.names(f"{escape_path(path)}/@v/")
        versions = []
        for name in names:
            if name.endswith(".zip"):
                with contextlib.suppress(BadName):
                    versions.append(unescape_version(name[: -len(".zip")]))
        major = split_path_version(path)[1]
        return [each for each in versions if is_canonical(each) and fits_major(each, major)]

    def versions(self, path: str) -> list[str]:
        found = self.with_zip(path)
        if not found:
            raise NotFound("no version in the store")
        return [version for version in found if not is_pseudo(version)]

    def resolve(self, path: str, query: str) -> Info:
        if query != LATEST:
            return read_info(read_small(self._shelf, query_name(path, query), MAX_INFO), None)
        version = newest(self.with_zip(path))
        try:
            return read_info(bytes_of(self, Artifact(path, version, "info")), version)
        except NotFound:
            return Info(version, "", json.dumps({"Version": version}).encode())

    def open(self, artifact: Artifact) -> Blob:
        return self._shelf.open(artifact.name)


def newest(versions: Sequence[str]) -> str:
    """What @latest means (Go reference, "Version queries"): the highest release, else the highest
    pre-release, else the newest pseudo-version. Raises NotFound for none."""
    if not versions:
        raise NotFound("no version in the store")

    def rank(version: str) -> tuple[int, str, Any]:
        if is_pseudo(version):
            return 0, version.rpartition("-")[0][-14:], semver_key(version)
        return 1 if is_prerelease(version) else 2, "", semver_key(version)

    return max(versions, key=rank)


def first_of(attempts: Sequence[tuple[Callable[[], T], bool]]) -> T:
    """The first success. Absence moves on to the next attempt, other trouble only where its second
    half says so. When all fail, trouble is told before absence, as the go command does. A host that
    has failed for long is waited for only if no other has it."""
    with hastily() as passed_over:
        try:
            return _first_of(attempts)
        except ProxyError:
            if not passed_over:
                raise
    return _first_of(attempts)


def _first_of(attempts: Sequence[tuple[Callable[[], T], bool]]) -> T:
    trouble: ProxyError | None = None
    absence: ProxyError | None = None
    for attempt, any_error in attempts:
        try:
            return attempt()
        except NotFound as error:
            absence = absence or unframed(error)
        except ProxyError as error:
            trouble = trouble or unframed(error)
            if not any_error:
                break
    raise trouble or absence or NotFound("no upstream is configured (-upstream off)")


class FirstOf(Source):
    """Sources in order, as GOPROXY lists them."""

    def __init__(self, sources: Sequence[tuple[Source, bool]]) -> None:
        """Each source with whether any error of it moves on."""
        self._sources = sources

    def _try(self, verb: Callable[[Source], T]) -> T:
        return first_of(
            [(functools.partial(verb, source), any_error) for source, any_error in self._sources]
        )

    def versions(self, path: str) -> list[str]:
        return self._try(lambda source: source.versions(path))

    def resolve(self, path: str, query: str) -> Info:
        return self._try(lambda source: source.resolve(path, query))

    def open(self, artifact: Artifact) -> Blob:
        return self._try(lambda source: source.open(artifact))


class LocalFolder(Stored):
    """file://: another folder in the layout of the store, only read, and not trusted."""

    def __init__(self, folder: str) -> None:
        super().__init__(Folder(folder))
        self._folder = folder

    def _check_there(self) -> None:
        """A share that is not mounted is an outage, not the absence of every module."""
        if not os.path.isdir(self._folder):
            raise Unreachable(f"file://{self._folder}: there is no such folder")

    def versions(self, path: str) -> list[str]:
        self._check_there()
        return super().versions(path)

    def resolve(self, path: str, query: str) -> Info:
        self._check_there()
        return super().resolve(path, query)

    def open(self, artifact: Artifact) -> Blob:
        self._check_there()
        blob = super().open(artifact)
        kind = KINDS[artifact.kind]
        if artifact.kind == "zip":
            return blob
        with contextlib.closing(blob):
            data = blob.read_all(kind.limit)
        kind.check(artifact, data)
        return BytesBlob(data)


class OwnModules(Source):
    """The folders of -modules, the first of which wins. A version is there once its .zip is; what
    is missing beside that is made from it. Nothing is remembered, so changes count at once."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders = folders
        self._shelves = {folder: Folder(folder) for folder in folders}

    def writable(self) -> DiskStorage:
        """The first folder, where new versions go. Raises StoreDown."""
        try:
            return open_own(self._folders[0])
        except StartError as error:
            raise StoreDown(str(error)) from None

    @staticmethod
    def _check_there(folder: str) -> None:
        """A share that is not mounted is an outage: else what it hides would be replaced by what
        others have."""
        if not os.path.isdir(folder):
            raise StoreDown(f"the folder {folder} of -modules is not there")

    def _shelf(self, stem: str) -> Folder | None:
        """The folder that has <module>/@v/<version>, both escaped."""
        for folder, shelf in self._shelves.items():
            if shelf.stamp(f"{stem}.zip") is not None:
                return shelf
            self._check_there(folder)
        return None

    def walk(self) -> Iterator[Item]:
        """All files in all folders, the first folder last."""
        for shelf in reversed(self._shelves.values()):
            yield from shelf.walk()

    def has(self, path: str, version: str) -> bool:
        return bool(self._shelf(_stem(path, version)))

    def stamp(self, name: str) -> object:
        """As Shelf.stamp; never None for a file of a version that is, or may be, ours."""
        try:
            shelf = self._shelf(name.rpartition(".")[0])
        except StoreDown:
            return "nobody knows"
        return shelf and (shelf.stamp(name) or "made of the zip")

    def versions(self, path: str) -> list[str]:
        """All versions, pseudo-versions too; [] if there are none."""
        found = []
        for folder, shelf in self._shelves.items():
            self._check_there(folder)
            found += Stored(shelf).with_zip(path)
        return found

    def resolve(self, path: str, query: str) -> Info:
        return read_info(bytes_of(self, Artifact(path, query, "info")), query)

    def open(self, artifact: Artifact) -> FileBlob:
        shelf = self._shelf(_stem(artifact.path, artifact.version))
        if not shelf:
            raise NotFound("not in -modules")
        try:
            return shelf.open(artifact.name)
        except NotFound:
            if artifact.kind not in _MADE_OF_ZIP:
                raise
        with contextlib.closing(shelf.open(artifact._replace(kind="zip").name)) as blob:
            data = _MADE_OF_ZIP[artifact.kind](artifact, blob)
        return FileBlob(OpenBytes(data), len(data), blob.modified)


def _stem(path: str, version: str) -> str:
    return Artifact(path, version, "zip").name[: -len(".zip")]


def make_info(version: str, modified: float) -> bytes:
    """An .info; `modified` in seconds since the epoch."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified))
    return json.dumps({"Version": version, "Time": moment}, separators=(",", ":")).encode()


_MADE_OF_ZIP: dict[str, Callable[[Artifact, FileBlob], bytes]] = {
    "info": lambda artifact, blob: make_info(artifact.version, blob.modified),
    "mod": lambda artifact, blob: mod_in_zip(blob.reading(), artifact.path, artifact.version),
}

_VCS_FOLDERS = frozenset([".bzr", ".git", ".hg", ".svn"])


def source_tree(root: str) -> dict[str, int | None]:
    """The regular files below a folder with their sizes in bytes, as zip.CreateFromDir of x/mod
    sees them: no links, nothing of version control, no nested modules. Raises OSError."""
    sizes: dict[str, int | None] = {}
    for folder, inner, names in os.walk(root, onerror=_give_up):
        inner[:] = [name for name in inner if _is_part(os.path.join(folder, name))]
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                sizes[os.path.relpath(path, root).replace(os.sep, "/")] = status.st_size
    return sizes


def _give_up(error: OSError) -> None:
    raise error


def _is_part(folder: str) -> bool:
    mark = os.path.join(folder, "go.mod")
    is_module = os.path.lexists(mark) and (os.path.islink(mark) or not os.path.isdir(mark))
    return os.path.basename(folder) not in _VCS_FOLDERS and not is_module


def known_to_git(root: str) -> set[str]:
    """The files below a folder that git has or would take, so without the ignored ones. Raises
    StartError."""
    command = ["git", "-C", root, "-c", "core.fsmonitor=false", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    except FileNotFoundError:
        raise StartError("there is no git to tell which files are ignored") from None
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", b"") or b""
        raise StartError(f"git: {said.decode(errors='replace').strip() or error}") from None
    return set(map(os.fsdecode, done.stdout.split(b"\0")))


class Sums(NamedTuple):
    """What a checked module version is known by: its lines in go.sum, and its go.mod."""

    zip: str
    mod: str
    go_mod: bytes


def check_module_zip(draft: Draft, path: str, version: str) -> Sums:
    """Checks a zip that is to be published. Raises BadRequest."""
    try:
        h1 = check_zip(draft.file.reading(), path, version)
        go_mod = mod_in_zip(draft.file.reading(), path, version)
        check_go_mod(go_mod)
    except (BadUpstream, NotFound) as error:
        raise BadRequest(str(error)) from None
    named = module_path(go_mod)
    if named != path:
        raise BadRequest(f"go.mod says that this is {quoted(named)}, not {quoted(path)}")
    return Sums(h1, hash_of_mod(go_mod), go_mod)


def open_own(folder: str) -> DiskStorage:
    """A folder of -modules, to write to. Raises StartError."""
    try:
        return DiskStorage(folder)
    except StartError as error:
        reason = str(error.__context__ or error)
        raise StartError(f"cannot write to the folder for modules: {reason}") from None


def _drop_beside(storage: Storage, artifact: Artifact) -> None:
    """Removes what a removal left that was cut short after the zip: it belongs to that one. Should
    a zip come meanwhile, it is whole without."""
    for kind in ("info", "ziphash", "mod"):
        with contextlib.suppress(NotFound):
            storage.remove(artifact._replace(kind=kind).name)


def publish(
    storage: Storage, artifact: Artifact, draft: Draft, sums: Sums, info: bytes = b""
) -> bool:
    """Stores a checked zip with what belongs to it; False if that very version is there already.
    Raises Conflict if another one is, and StoreDown. The zip comes first, because the first one
    wins, and because a version without the others is whole (see OwnModules); only an `info` that
    does not tell the zip's time is there before."""
    taken = storage.stamp(artifact.name) is not None
    if not taken:
        _drop_beside(storage, artifact)
        if info:
            storage.put(artifact._replace(kind="info").name, info, replace=False)
    storage.adopt(artifact.name, draft)
    with contextlib.closing(storage.open(artifact.name)) as blob:
        modified = blob.modified
        if check_zip(blob.reading(), artifact.path, artifact.version) != sums.zip:
            raise Conflict(
                f"{artifact.path}@{artifact.version} is there with other content, and a version "
                "never changes: choose another one"
            )
    beside = {
        "ziphash": sums.zip.encode(),
        "mod": sums.go_mod,
        "info": make_info(artifact.version, modified),
    }
    for kind, data in beside.items():
        storage.put(artifact._replace(kind=kind).name, data, replace=False)
    return not taken


# Git: modules straight from their repositories


class Site(NamedTuple):
    """Where a module's repository is: `root` is the module path of its top folder, `url` is for
    git and holds no password, `subdir` is the folder that stands for the root (the fourth field of
    a go-import tag; "" for the top)."""

    root: str
    url: str
    subdir: str = ""


class _GitFailed(Exception):
    """git ended with a status that is not 0; the text is the end of what it said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said[-2000:])
        self.status = status


class _Order(NamedTuple):
    """What a git is to do: its arguments, variables besides the fixed ones, and seconds at most.
    Of GIT_CONFIG_GLOBAL `variables` have the text, where git is given the name of a file.
    `feed` is its input, at most a pipe's fill. `aloud`: it uses the network, takes no input, and
    complaints are part of its output. `lock`
    is a descriptor that it inherits: what that locks stays locked while it lives, even without us.
    `largest` is the size of a file that it may write, in bytes.
    """

    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    seconds: float
    feed: bytes = b""
    aloud: bool = False
    lock: int | None = None
    largest: int | None = None

    @property
    def shown(self) -> Sequence[str]:
        """The Authorization that goes to the server, if any."""
        return re.findall('"Authorization: (.*)"', self.variables.get("GIT_CONFIG_GLOBAL", ""))


# Limits the files that git may write, in units of 512 bytes as POSIX has it, and the memory of each
# of its processes, in KiB: a few bytes of a pack can stand for gigabytes. Memory is what they may
# write to: address space would count the packs that they look into as well. Ends git with all that
# it began as soon as its input ends: ours is held open as long as we live.
_LEASHED = (
    "exec {leash}<&0; (read -r _ <&{leash}; kill -9 0) >/dev/null 2>&1 & "
    "ulimit -f {blocks} 2>/dev/null; ulimit -d {memory} 2>/dev/null; "
    'exec git "$@" {leash}<&- </dev/null'
)


class _Git:
    """One running git with all that it starts: they end together, at the deadline at the latest."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        assert process.stdout is not None
        self._process = process
        self.out = process.stdout
        self.is_late = False
        self._alarm = ALARMS.set(seconds, self._expire)

    def _expire(self) -> None:
        self.is_late = True
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:  # else the number may be another's by now
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status, once it has ended by itself or at its deadline."""
        status = self._process.wait()
        if self.is_late:
            raise UpstreamTimeout("git took too long")
        return status

    def close(self) -> int:
        """Ends it, if it has not ended; gives its status."""
        self.kill()
        status = self._process.wait()
        ALARMS.cancel(self._alarm)
        self.out.close()
        if self._process.stdin:
            self._process.stdin.close()  # which ends what watches over it
        return status


_GIT_VARIABLES = {
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GCM_INTERACTIVE": "never",
    "LC_ALL": "C",
    "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oControlMaster=no -oControlPath=none"
    " -oStrictHostKeyChecking=yes -oConnectTimeout=10 -oServerAliveInterval=15",
}
# Options of the command line win over every other configuration. Filters need no line: one is
# run only if a configuration defines it, and none is read.
_GIT_OPTIONS = (
    "core.attributesFile=" + os.devnull,
    "core.autocrlf=input",
    "core.eol=lf",
    "core.fsmonitor=false",
    "core.hooksPath=" + os.devnull,
    "fetch.recurseSubmodules=false",
    "fetch.unpackLimit=1",
    "gc.autoDetach=false",
    "http.lowSpeedLimit=1000",
    "http.lowSpeedTime=30",
    "maintenance.autoDetach=false",
    "pack.threads=4",
    "protocol.version=2",
    "safe.bareRepository=all",
    "safe.directory=*",
    "submodule.recurse=false",
)


_GIVEN_BACK = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # what others may give back
# The first that reads GIT_CONFIG_GLOBAL: an older one would miss credentials and go around filters.
OLDEST_GIT = (2, 32)


def git_version(search_path: str) -> tuple[int, ...]:
    """Major and minor number of the git on a PATH, () if there is none."""
    try:
        told = subprocess.run(
            ["git", "version"], env={"PATH": search_path}, capture_output=True, check=False
        ).stdout
    except OSError:
        return ()
    match = re.match(rb"git version ([0-9]{1,9})\.([0-9]{1,9})", told)
    return (int(match[1]), int(match[2])) if match else ()


@contextlib.contextmanager
def _hidden(order: _Order) -> Iterator[tuple[str, int]]:
    """The name of a file with the configuration of a git, and what it must inherit to read it. The
    name is in no folder, where that is possible: nothing is left of it, however we end."""
    nameless = sys.platform == "linux"
    with open(os.memfd_create("git"), "wb") if nameless else tempfile.NamedTemporaryFile() as file:
        file.write(order.variables.get("GIT_CONFIG_GLOBAL", "").encode())
        file.flush()
        number = file.fileno()
        yield (f"/proc/self/fd/{number}" if nameless else str(file.name)), number


class GitRunner:
    """Runs git so that nothing of a repository is executed, nothing of this machine's settings
    counts, nothing asks questions, and no more than eight run at once. Those that use the network
    end with this process, however it ends, and can fill neither the disk nor the memory. The others
    unfold nothing that those have not unfolded before."""

    LARGEST = 8 << 30  # bytes of a pack
    MEMORY = 2 << 30  # bytes: a file of 500 MiB, what it is a delta to, and as much again
    _AT_ONCE = 8
    _QUEUE_SECONDS = 60.0
    _LIMIT = 64 << 20  # of bytes that git may say

    def __init__(self, search_path: str) -> None:
        self._fixed = {**_GIT_VARIABLES, "PATH": search_path}
        self._slots = threading.BoundedSemaphore(self._AT_ONCE)
        self._running: set[_Git] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def start(self, order: _Order) -> Iterator[_Git]:
        """A git in a process group of its own, which ends with the block."""
        if not self._slots.acquire(timeout=self._QUEUE_SECONDS):
            raise Overloaded("too many gits at once")
        words = mask(" ".join(order.arguments))
        try:
            told = {"process.command_args": words}
            with TRACER.span(f"git {order.arguments[0]}", told) as span, _hidden(order) as config:
                git = _Git(self._spawn(order, *config), order.seconds)
                self._running.add(git)
                if self._is_closed:  # while this one began
                    git.kill()
                try:
                    yield git
                finally:
                    self._running.discard(git)
                    span.note("process.exit.code", git.close())
        finally:
            self._slots.release()

    def _spawn(self, order: _Order, config: str, *handed: int) -> subprocess.Popen[bytes]:
        handed += () if order.lock is None else (order.lock,)
        options = [word for option in _GIT_OPTIONS for word in ("-c", option)]
        program = ["git"]
        if order.aloud:
            blocks = (order.largest or self.LARGEST) // 512
            leash = next(number for number in (3, 4, 5) if number not in handed)
            memory = self.MEMORY >> 10
            script = _LEASHED.format(leash=leash, blocks=blocks, memory=memory)
            program = ["sh", "-c", script, "git"]
        try:
            process = subprocess.Popen(
                [*program, *options, *order.arguments],
                env={**self._fixed, **order.variables, "GIT_CONFIG_GLOBAL": config},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if order.aloud else subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=handed,
            )
        except OSError as error:
            kind = Overloaded if error.errno in _GIVEN_BACK else BadUpstream
            raise kind(f"git cannot be run: {error.strerror}") from None
        assert process.stdin is not None
        if not order.aloud:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(order.feed)
        return process

    def run(self, order: _Order) -> bytes:
        """What git says. Raises _GitFailed, UpstreamTimeout, Overloaded, BadUpstream."""
        with self.start(order) as git:
            said = git.out.read(self._LIMIT + 1)
            if len(said) > self._LIMIT:
                raise BadUpstream(f"git {order.arguments[0]} says more than {self._LIMIT} bytes")
            status = git.wait()
            if status:
                raise _GitFailed(status, hide(said.decode("utf-8", "replace"), order.shown))
            return said

    def close(self) -> None:
        """Ends every git, now and from now on."""
        self._is_closed = True
        for git in list(self._running):
            git.kill()


# What git and the usual forges say, and what it means. An absence is told by the one who must know;
# what is none of these may be better the next time.
_COMPLAINTS: list[tuple[str, type[ProxyError]]] = [
    (
        r"repository '.*' not found|repository not found|does not appear to be a git repository"
        r"|project you were looking for could not be found|repository not exported"
        r"|cannot find repository|repository .*does not exist|returned error: 410",
        NotFound,
    ),
    (
        r"could not read (username|password)|authentication failed|permission denied"
        r"|access denied|returned error: 40[13]|transport '.*' not allowed"
        r"|not allowed to|not authorized to|denied by",
        Forbidden,
    ),
    (r"returned error: (429|503)|cannot fork|unable to create thread", Overloaded),
]


def _meaning(said: str, url: str) -> ProxyError:
    """The error that the words of git stand for."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if re.match("(fatal|error|remote|ERROR):.*[a-z]", line)] or lines
    if told and told[0].startswith("fatal: Could not read from remote"):
        told = lines[max(0, lines.index(told[0]) - 1) :]  # ssh has said why, just before
    words = told[0] if told else "git failed"
    if "CONNECT" in words:
        place = urllib.parse.urlsplit(url)
        words = REFUSED.get(f"{place.hostname}:{place.port or 443}") or words
    words = printable(mask(words)[:300])
    kinds = (kind for pattern, kind in _COMPLAINTS if re.search(pattern, said, re.IGNORECASE))
    return next(kinds, Unreachable)(f"{mask(url)}: {words}")


_LOCAL_SECONDS = 60.0
_SCHEME = re.compile(r"(file|git|http|https|ssh|git\+ssh|ssh\+git)://[^-\s][\x21-\x7e]*")


class _Moved(NotFound):
    """A commit is no longer where the branches and tags of some seconds ago have it."""


class _Damaged(BadUpstream):
    """A repository of ours had lost what it should have, and is gone: it is to be filled anew."""


class Commit(NamedTuple):
    """A commit: `time` in seconds since the epoch, `name` the tag that led to it, else its hash."""

    hash: str
    time: int
    name: str


class BareRepository:
    """A bare repository of ours that is filled from one URL. To read it needs no lock."""

    _BLOCK = 4096  # bytes that git writes at once
    _TRUST_SECONDS = 600.0

    def __init__(self, git: GitRunner, folder: str, network: Callable[[], Mapping[str, str]]):
        """`network` gives the variables for the gits that may use the network."""
        self._git = git
        self._folder = folder
        self._network = network
        self._mutex = threading.Lock()
        self._unfinished = os.path.join(folder, "unfinished")
        self._trusted_until = 0.0

    def ask(self, *arguments: str, feed: bytes = b"") -> bytes:
        """What a git without network says. Raises _GitFailed."""
        return self._git.run(_Order(arguments, self._local(), _LOCAL_SECONDS, feed))

    def stream(self, *arguments: str) -> contextlib.AbstractContextManager[_Git]:
        return self._git.start(_Order(arguments, self._local(), TRANSFER.total))

    def _local(self) -> dict[str, str]:
        # Without a protocol a partial repository cannot ask for what it lacks, which may be a
        # commit that belongs to no branch or tag.
        return {"GIT_DIR": self._folder, "GIT_ALLOW_PROTOCOL": "none"}

    def commit(self, revision: str) -> tuple[str, int] | None:
        """Hash and time of a commit that is here."""
        if not os.path.isdir(self._folder):
            return None
        try:
            # --timestamp would take what is behind the first > of the line, which a name may hold.
            said = self.ask("rev-list", "--format=%ct", "-n1", "--end-of-options", revision, "--")
        except _GitFailed:
            return None
        words = said.decode().split()[1:]
        if len(words) == 1:
            raise BadUpstream(f"commit {words[0]} has no time")
        return (words[0], int(words[1])) if words else None

    @contextlib.contextmanager
    def filling(self, url: str, hash_length: int) -> Iterator[Callable[..., None]]:
        """The right to change the repository, as a function that runs `git fetch` with what it is
        given. Makes the repository if there is none."""
        with self._alone() as lock:
            self._make(hash_length)
            if os.path.exists(self._unfinished):
                self._sweep()
            with open(self._unfinished, "wb"):
                pass
            yield functools.partial(self._fetch, lock, url)
            os.unlink(self._unfinished)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The only right to change the repository, here and in other processes: what locks it."""
        if not self._mutex.acquire(timeout=TRANSFER.total):
            raise Overloaded("another fetch of the repository takes too long")
        try:
            os.makedirs(os.path.dirname(self._folder), exist_ok=True)
            with open(self._folder + ".lock", "ab") as lock:
                self._await(lock.fileno())
                yield lock.fileno()
        finally:
            self._mutex.release()

    def check(self) -> None:
        """To be called when a git has failed here. Looks whether that is due to damage, by a dying
        disk or by who cleans up among temporary files; then all goes, and _Damaged is raised. What
        was sound is not looked at again for a while."""
        if time.monotonic() < self._trusted_until:
            return
        with contextlib.suppress(OSError), self._alone():
            if os.path.isdir(self._folder):
                if self._is_sound():
                    self._trusted_until = time.monotonic() + self._TRUST_SECONDS
                    return
                os.rename(self._folder, self._aside())
            raise _Damaged("the repository kept here was damaged: it is fetched anew")

    def _is_sound(self) -> bool:
        """As far as can be told in time."""
        try:
            with contextlib.suppress(ProxyError):
                self.ask("fsck", "--no-dangling", "--no-progress")
        except _GitFailed as error:
            return error.status <= 1  # killed, or only its authors have made something badly
        return True

    @staticmethod
    def _await(lock: int) -> None:
        until = time.monotonic() + TRANSFER.total
        while not lock_draft(lock):
            if time.monotonic() > until:
                raise Overloaded("another process fetches the repository for too long")
            time.sleep(0.05)

    def _make(self, hash_length: int) -> None:
        kind = "sha256" if hash_length == 64 else "sha1"
        if os.path.isdir(self._folder):
            if not hash_length or self._kind() == kind:
                return
            os.rename(self._folder, self._aside())  # somebody has begun anew there
        new = self._aside()
        making = ("init", "-q", "--bare", "--template=", f"--object-format={kind}", new)
        self._git.run(_Order(making, {}, _LOCAL_SECONDS))
        os.makedirs(os.path.join(new, "info"), exist_ok=True)
        with open(os.path.join(new, "info", "attributes"), "w", encoding="ascii") as file:
            file.write("* -export-subst -export-ignore\n")
            file.flush()
            os.fsync(file.fileno())  # a power cut may damage what is noticed, but not this
        os.rename(new, self._folder)

    def _kind(self) -> str:
        with open(os.path.join(self._folder, "config"), encoding="utf-8") as file:
            return "sha256" if "sha256" in file.read() else "sha1"

    def _aside(self) -> str:
        """The name of a folder that is not there, any more at least."""
        new = f"{self._folder}.new"
        shutil.rmtree(new, ignore_errors=True)
        return new

    def _sweep(self) -> None:
        """Removes what a git leaves that was killed: nobody else would, and its locks block."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if name.endswith(".lock") or name.startswith("tmp_"):
                    os.unlink(os.path.join(folder, name))

    def _fetch(self, lock: int, url: str, *arguments: str) -> None:
        options = ("-q", "-f", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head")
        variables = {"GIT_CONFIG_GLOBAL": "", "GIT_DIR": self._folder, **self._network()}
        variables["GIT_CONFIG_GLOBAL"] += f'[remote "origin"]\nurl = {json.dumps(url)}\n'
        words = ("fetch", *options, *arguments)
        # All that run at once together leave room on the disk.
        largest = min(self._git.LARGEST, shutil.disk_usage(self._folder).free // 8)
        order = _Order(words, variables, TRANSFER.total, aloud=True, lock=lock, largest=largest)
        try:
            self._git.run(order)
        except _GitFailed as error:
            outgrew = self._outgrew(largest)
            self._sweep()  # it was killed, or one of its children
            if outgrew:
                raise BadUpstream(f"more than {shown_size(largest)} for one fetch") from None
            if "Out of memory" in str(error):
                told = f"more than {shown_size(self._git.MEMORY)} of memory for one fetch"
                raise BadUpstream(told) from None
            raise

    def _outgrew(self, largest: int) -> bool:
        """Whether a pack has been cut at its limit; git does not say so."""
        folder = os.path.join(self._folder, "objects", "pack")
        sizes = [each.stat().st_size for each in os.scandir(folder) if each.name.startswith("tmp_")]
        return max(sizes, default=0) > largest - 2 * self._BLOCK

    @property
    def is_shallow(self) -> bool:
        return os.path.exists(os.path.join(self._folder, "shallow"))

    @property
    def stamp(self) -> object:
        """Tells the objects here from fewer of them, and from others in their place."""
        return stamp_of(os.stat(os.path.join(self._folder, "objects", "pack")))


_HEX = re.compile("[0-9a-f]{7,64}")
_REF_LINE = re.compile(
    rb"^([0-9a-f]{40}|[0-9a-f]{64})\t(HEAD|refs/(?:heads|tags)/[^\x00-\x20\x7f~^:?*\[\\]+)(\^\{\})?$",
    re.MULTILINE,
)
_TREE_ROW = re.compile(rb"(\d{3})\d{3} \w+ [0-9a-f]+ +(\d+|-)\t([^\0]+)\0")
_ALL = ("+refs/heads/*:refs/{}heads/*", "+refs/tags/*:refs/{}tags/*")


class Repository:
    """A repository elsewhere, and as little of it here as the questions about it need.

    What has been asked for lies in two bare repositories: `content` has single commits with all
    their files, `history` all commits without any files (git cannot do both in one). A tag that
    has been fetched stays what it was. Only what branches and tags lead to is ever fetched:
    forges keep the commits of strangers, too (codehost/git.go)."""

    _REFS_SECONDS = 10.0

    def __init__(
        self, git: GitRunner, folder: str, url: str, environment: Callable[[str], Mapping[str, str]]
    ) -> None:
        self.url = url
        self._git = git
        self._environment = environment
        self._content = BareRepository(git, os.path.join(folder, "content"), self._network)
        self._history = BareRepository(git, os.path.join(folder, "history"), self._network)
        self._known: tuple[float, Mapping[str, str]] = (-math.inf, {})
        self._in_history: object = None  # the objects there, and the refs they were fetched by
        self._questions: Flights[Future[Mapping[str, str]]] = Flights()

    def _network(self) -> Mapping[str, str]:
        return {"GIT_ALLOW_PROTOCOL": self.url.partition(":")[0], **self._environment(self.url)}

    @contextlib.contextmanager
    def _explained(self, *filled: BareRepository) -> Iterator[None]:
        try:
            yield
        except (_GitFailed, OSError) as error:
            for each in filled:
                each.check()
            if isinstance(error, OSError):
                raise StoreDown(f"no repository can be kept: {error.strerror}") from None
            raise _meaning(str(error), self.url) from None

    def refs(self, age: float = _REFS_SECONDS) -> Mapping[str, str]:
        """Commits by branch, tag (refs/...) and HEAD, as they were at most `age` seconds ago.
        Raises NotFound if there is no such repository, Forbidden, BadUpstream, Overloaded."""
        asked_at, refs = self._known
        if time.monotonic() - asked_at <= age:
            return refs
        return done_once(self._questions, "", self._ask_refs)

    def _ask_refs(self) -> Mapping[str, str]:
        asked_at = time.monotonic()
        found = map(re.Match.groups, _REF_LINE.finditer(self._listed()))
        # A line with ^{} comes after that of its tag and tells the commit behind the tag's object.
        refs = {ref.decode("utf-8", "surrogateescape"): name.decode() for name, ref, _ in found}
        self._known = (asked_at, refs)
        return refs

    def check(self) -> None:
        """Raises what refs raises, whatever it has found before: see Borrowed."""
        self._listed()

    def _listed(self) -> bytes:
        words = ("ls-remote", "-q", "--end-of-options", self.url)
        variables = {"GIT_DIR": os.devnull, **self._network()}
        order = _Order(words, variables, METADATA.total, aloud=True)
        with self._explained():
            said = self._git.run(order)
            if self.url.startswith("http") and not _REF_LINE.search(said):
                traced = order._replace(variables={**variables, "GIT_TRACE_PACKET": "1"})
                if b" packet: " not in self._git.run(traced):
                    raise Unreachable(f"{mask(self.url)}: a page, and no repository")
            return said

    def find(self, revision: str) -> Commit:
        """What a tag, branch, HEAD or a hash of seven digits or more stands for, with its files at
        hand. Raises NotFound."""
        here = self._content.commit(_pin(revision))
        if here:
            return Commit(*here, revision)
        here = self._content.commit(revision) if _HEX.fullmatch(revision) else None
        if here:
            return Commit(*here, here[0])
        began = time.monotonic()
        ref = self._named(revision, self.refs())
        if not ref:
            ref = self._named(revision, self.refs(time.monotonic() - began))
        if not ref:
            return self._find_in_history(revision)
        tag = revision if ref == f"refs/tags/{revision}" else ""
        return self._fill(self.refs(math.inf)[ref], ref, tag)

    @staticmethod
    def _named(revision: str, refs: Mapping[str, str]) -> str:
        """The ref that a revision means, in the order of codehost/git.go; "" for none."""
        full = [f"refs/tags/{revision}", f"refs/heads/{revision}"]
        if revision == "HEAD":
            full.append("HEAD")
        named = next((ref for ref in full if ref in refs), "")
        if named or not _HEX.fullmatch(revision):
            return named
        begun = {ref: known for ref, known in refs.items() if known.startswith(revision)}
        if len(set(begun.values())) > 1:
            raise NotFound(f"ambiguous revision {revision}")
        return min(begun, default="")

    def _find_in_history(self, revision: str) -> Commit:
        if _HEX.fullmatch(revision):
            found = self._history.commit(revision)
            if not found:
                self._update_history()
                found = self._history.commit(revision)
            if found:
                return self._fill(found[0], found[0])
            self._prove_history()
        raise NotFound(f"unknown revision {revision}")

    def _prove_history(self) -> None:
        """That a commit is not there says nothing where none can be read."""
        with self._explained(self._history):
            self._history.ask("rev-list", "-n1", "--all")

    def _fill(self, wanted: str, source: str, tag: str = "") -> Commit:
        """Fetches a commit and its files by a ref or hash, and gives it a name here. What fails
        for whatever reason is tried again with everything."""
        content, pin = self._content, _pin(tag) if tag else f"refs/pinned/{wanted}"
        with self._explained(content), content.filling(self.url, len(wanted)) as fetch:
            if not content.commit(wanted):
                with contextlib.suppress(_GitFailed):
                    fetch("--depth=1", "--end-of-options", "origin", f"+{source}:{pin}")
            if not content.commit(wanted):
                deepen = ["--unshallow"] if content.is_shallow else []
                everything = [spec.format("all/") for spec in _ALL]
                fetch("--prune", *deepen, "--end-of-options", "origin", *everything)
            found = content.commit(wanted)
            if not found:
                raise _Moved(f"unknown revision {tag or wanted}")
            content.ask("update-ref", "--end-of-options", pin, wanted)
        return Commit(*found, tag or found[0])

    def _update_history(self) -> None:
        """Makes `history` what the repository is now; without files if the server can."""
        refs = self.refs()
        specs = [spec.format("") for spec in _ALL] + ["+HEAD:refs/HEAD"] * ("HEAD" in refs)
        # Of a shallow repository, which else gives nothing, we have what it has; some day it may
        # have more.
        depth = "--unshallow" if self._history.is_shallow else "--update-shallow"
        arguments = (depth, "--prune", "--end-of-options", "origin", *specs)
        length = len(next(iter(refs.values()), ""))
        with self._explained(self._history), self._history.filling(self.url, length) as fetch:
            if self._in_history == (self._history.stamp, refs):
                return
            try:
                fetch("--filter=tree:0", *arguments)
            except _GitFailed:
                fetch(*arguments)
            self._in_history = (self._history.stamp, refs)

    def tags(self) -> dict[str, str]:
        """Commits by the name of their tag."""
        start = len("refs/tags/")
        return {
            ref[start:]: known for ref, known in self.refs().items() if ref.startswith("refs/tags/")
        }

    def tags_before(self, commit: Commit) -> list[str]:
        """The tags on a commit and on all that came before it."""
        known = self.tags()
        if not known:
            return []
        words = ("for-each-ref", "--format=%(refname:strip=2)", f"--merged={commit.hash}")
        said = self._ask_history(commit, *words, "refs/tags/")
        return [tag for tag in said.decode("utf-8", "surrogateescape").splitlines() if tag in known]

    def is_before(self, tag: str, commit: Commit) -> bool:
        """Whether a tag is on a commit or on one that came before it."""
        words = ("merge-base", "--is-ancestor", "--end-of-options", f"refs/tags/{tag}")
        try:
            self._ask_history(commit, *words, commit.hash)
        except _GitFailed:
            return False
        return True

    def _ask_history(self, commit: Commit, *words: str) -> bytes:
        """Raises _GitFailed for the status 1 alone: an answer, and no trouble."""
        self._update_history()
        if not self._history.commit(commit.hash):
            self._prove_history()
            raise _Moved(f"unknown revision {commit.hash}")  # it was there once
        try:
            return self._history.ask(*words)
        except _GitFailed as error:
            if error.status == 1:
                raise
            self._history.check()
            raise BadUpstream(f"git cannot read the history of {commit.hash}") from None

    def files(self, commit: Commit, *names: str) -> list[bytes | None]:
        """The bytes of small files as they were committed, None for one that is not there."""
        feed = "".join(f"{commit.hash}:{name}\n" for name in names).encode()
        said = io.BytesIO(self._ask_content(commit, "cat-file", "--batch", feed=feed))
        return [_next_blob(said) for _ in names]

    def _ask_content(self, commit: Commit, *words: str, feed: bytes = b"") -> bytes:
        try:
            return self._content.ask(*words, feed=feed)
        except _GitFailed:
            self.check_content()
            raise BadUpstream(f"git cannot read the files of {commit.hash}") from None

    def check_content(self) -> None:
        """To be called when something is wrong with the files of a commit. Raises _Damaged."""
        self._content.check()

    def sizes(self, commit: Commit, folder: str) -> dict[str, int | None]:
        """The files below a folder ("" for the top) with their sizes in bytes; None for links."""
        words = ("ls-tree", "-r", "-l", "-z", "--full-tree", "--end-of-options", commit.hash)
        said = self._ask_content(commit, *words, *([folder + "/"] if folder else []))
        found: dict[str, int | None] = {}
        for row in _TREE_ROW.finditer(said):  # one at a time: there may be a million
            name = row[3].decode("utf-8", "surrogateescape")[len(folder) + bool(folder) :]
            if name in found:  # a tree that git would not write
                raise BadUpstream(f"create zip: {quoted(name)}: multiple entries for file")
            if row[1] != b"160":  # a submodule: an empty folder
                found[name] = int(row[2]) if row[1] == b"100" else None
        return found

    def archive(self, commit: Commit, folder: str) -> Generator[FileContent, None, None]:
        """The regular files below a folder with their contents, as git would check them out on a
        machine without settings; each is to be read before the next."""
        # Of a commit it would begin with a header of its own, behind which tarfile wants a file.
        words = ("archive", "--format=tar", "--end-of-options", commit.hash + "^{tree}")
        with self._content.stream(*words, *([folder] if folder else [])) as git:
            with tarfile.open(fileobj=git.out, mode="r|", encoding="utf-8") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # else it remembers all
                    content = archive.extractfile(member) if member.isreg() else None
                    if content:
                        name = member.name[len(folder) + bool(folder) :]
                        yield name, iter(functools.partial(content.read, CHUNK), b"")
            while git.out.read(CHUNK):
                pass
            if git.wait():
                self.check_content()
                raise BadUpstream(f"git cannot pack {commit.hash}")


def _pin(tag: str) -> str:
    """The name under which a tag is kept: any two can stand side by side, unlike a and a/b."""
    return "refs/pinned/" + hashlib.sha256(tag.encode("utf-8", "surrogateescape")).hexdigest()


def _next_blob(said: BinaryIO) -> bytes | None:
    """The next answer of cat-file --batch: a line of object, kind and size, then the bytes."""
    line = said.readline()
    words = line.split()
    if not line or len(words) != 3 or not words[2].isdigit():
        return None
    data = said.read(int(words[2]))
    said.read(1)
    return data if words[1] == b"blob" else None


class Repositories:
    """All repositories that have been asked for, kept below a folder."""

    _RECENT, _RECENT_SECONDS = 500, 3600.0

    def __init__(
        self,
        folder: str,
        environment: Callable[[str], Mapping[str, str]],
        search_path: str = os.defpath,
        ttl: float = math.inf,
    ) -> None:
        """`environment` gives the variables that git needs for a URL, besides those that are
        fixed here and that it may replace; they are for the network alone and may hold secrets.
        `search_path` is the PATH to find git by. A question about what changes begins with branches
        and tags that are at most `ttl` seconds old. Starts nothing."""
        self._folder = folder
        self.ttl = ttl
        self._environment = environment
        self._git = GitRunner(search_path)
        self._mutex = threading.Lock()
        # All that anybody uses, and the latest with what they know: anybody may ask for one more.
        self._used: weakref.WeakValueDictionary[str, Repository] = weakref.WeakValueDictionary()
        self._recent: TtlCache[Repository] = TtlCache(self._RECENT)

    def at(self, url: str) -> Repository:
        """The repository at a URL. Raises Forbidden for one that is not meant for git."""
        if not _SCHEME.fullmatch(url):
            raise Forbidden(f"not a URL that git may be given: {printable(mask(url))}")
        with self._mutex:
            found = self._used.get(url)
            if not found:
                folder = os.path.join(self._folder, hashlib.sha256(url.encode()).hexdigest())
                found = Repository(self._git, folder, url, self._environment)
                self._used[url] = found
            self._recent.put(url, found, self._RECENT_SECONDS)
            return found

    def close(self) -> None:
        """Ends every git."""
        self._git.close()


class ModuleFolder:
    """Where in its repository a module lies, which each commit may decide anew."""

    def __init__(self, path: str, site: Site, repository: Repository) -> None:
        prefix, self._major = split_path_version(path)
        if site.root != path and not (prefix + "/").startswith(site.root + "/"):
            raise NotFound(f"repository rooted at {site.root} cannot contain module {path}")
        below_root = "" if site.root == path else prefix[len(site.root) :].strip("/")
        self._path = path
        self._repository = repository
        self._folder = "/".join(filter(None, [below_root, site.subdir]))
        self._tag_prefix = self._folder + "/" if self._folder else ""
        self._can_have_major_folder = self._major[:1] == "/" and site.root != path

    def _find_folder(self, commit: Commit) -> tuple[str, bytes | None]:
        """The folder of the module and its go.mod, None if it has and needs none. Raises NotFound
        (findDir)."""
        folders = [self._folder]
        if self._can_have_major_folder:
            folders.append(self._tag_prefix + self._major[1:])
        names = [f"{folder}/go.mod" if folder else "go.mod" for folder in folders]
        contents = self._repository.files(commit, *names)
        fitting = [raw is not None and self._declares(raw) for raw in contents]
        if fitting == [True, True]:
            raise NotFound(f"{names[0]} and {names[1]} both have ...{self._major} module paths")
        if fitting[1:] == [False] and contents[1] is not None:
            raise NotFound(f"{names[1]} has non-...{self._major} module path")
        if any(fitting):
            at = fitting.index(True)
            return folders[at], contents[at]
        if contents[0] is not None:
            raise NotFound(f"{names[0]} has no module path that fits {self._path}")
        if self._folder or self._major[:1] == "/":
            raise NotFound(f"missing {' and '.join(names)}")
        return "", None

    def _declares(self, raw: bytes) -> bool:
        """Whether a go.mod has a path of our major version; the rest of it may be another's, whom
        this module replaces (isMajor)."""
        declared = module_path(raw)
        if not self._major and declared.startswith("gopkg.in/"):
            return True  # golang.org/issue/34254
        try:
            _, major = split_path_version(declared)
        except BadName:
            return False
        return bool(declared) and major[1:] == self._major[1:]

    def _has_go_mod(self, version: str) -> bool:
        try:
            commit = self._repository.find(version)
        except NotFound:
            return False
        return self._repository.files(commit, "go.mod")[0] is not None

    def _can_be_incompatible(self, commit: Commit, query: str, version: str) -> bool:
        """A tag of a major version that the path does not name is good for a module without a
        go.mod, at the top of its repository (golang.org/issue/51324)."""
        if self._folder or self._major:
            return False
        major = version.partition(".")[0]
        at_top, in_folder = self._repository.files(commit, "go.mod", f"{major}/go.mod")
        return at_top is None and (in_folder is None or query.endswith("+incompatible"))


class GitModule(ModuleFolder):
    """A module of a repository, with the rules by which the go command reads versions, go.mod and
    files out of it (modfetch/coderepo.go)."""

    def versions(self) -> list[str]:
        """The versions that tags name, sorted."""
        if self._path.startswith("gopkg.in/") and self._path.endswith("-unstable"):
            return []  # the tags are those of the module without -unstable
        start = len(self._tag_prefix)
        tags = [t[start:] for t in self._repository.tags() if t.startswith(self._tag_prefix)]
        found = sorted(
            (t for t in tags if is_canonical(t) and "+" not in t and not is_pseudo(t)),
            key=semver_key,
        )
        fitting = [version for version in found if fits_major(version, self._major)]
        others = [version for version in found if not fits_major(version, self._major)]
        if not others or self._folder or self._major:
            return fitting
        if fitting and self._has_go_mod(fitting[-1]):
            return fitting
        return fitting + self._incompatible(others)

    def _incompatible(self, versions: Sequence[str]) -> list[str]:
        groups = itertools.groupby(versions, lambda version: version.partition(".")[0])
        majors = [list(group) for _, group in groups]
        return [
            version + "+incompatible"
            for group in majors
            if not self._has_go_mod(group[-1])
            for version in group
        ]

    def resolve(self, query: str) -> Info:
        """The .info of what a query stands for, as the go command writes it without a proxy."""
        if query == LATEST:
            taken = self._retracted()
            versions = [v for v in self.versions() if not any(one.covers(v) for one in taken)]
            query = newest(versions) if versions else ""
        commit = self._find(query)
        return self._info(commit, self._convert(commit, query))

    def _find(self, query: str) -> Commit:
        """The commit of a query, "" for the newest of the main branch."""
        if query:
            return self._repository.find(self._revision(query))
        head = self._repository.refs().get("HEAD")
        if not head:
            raise NotFound("no commits")
        return self._repository.find(head)

    def _revision(self, query: str) -> str:
        if not is_semver(query):
            return query
        if is_pseudo(query):
            return query.partition("+")[0].rpartition("-")[2]
        return self._tag_prefix + _without_mark(query)

    def _info(self, commit: Commit, version: str) -> Info:
        origin = {"VCS": "git", "URL": mask(self._repository.url), "Subdir": self._folder}
        origin["Hash"] = commit.hash
        if not is_pseudo(version):
            origin["Ref"] = f"refs/tags/{self._tag_prefix}{_without_mark(version)}"
        fields = {
            "Version": version,
            "Time": _moment(commit, "%Y-%m-%dT%H:%M:%SZ"),
            "Origin": {name: value for name, value in origin.items() if value},
        }
        return read_info(json.dumps(fields, separators=(",", ":")).encode(), version)

    def _convert(self, commit: Commit, query: str) -> str:
        """The version of a commit that was asked for as `query`. Raises NotFound."""
        if is_pseudo(query):
            version = self._checked(commit, query, query)
            self._check_pseudo(commit, query)
            return version
        version, exact = self._tagged(commit.name)
        if exact:
            with contextlib.suppress(NotFound):
                return self._checked(commit, version, query)
        tags = (tag for tag, known in self._repository.tags().items() if known == commit.hash)
        best = base = ""
        for version, exact in map(self._tagged, sorted(tags)):
            if version and is_semver(query) and precedence(version) == precedence(query):
                if exact:
                    return self._checked(commit, version, query)
                base = version
            elif exact and (not best or precedence(best) < precedence(version)):
                best = version if self._is_allowed(commit, query, version) else best
        if best:
            return self._checked(commit, best, query)
        base = base or self._base(commit, query)
        stamp = _moment(commit, "%Y%m%d%H%M%S")
        major = self._major[1:].partition("-")[0]
        return self._checked(commit, make_pseudo(major, base, stamp, commit.hash[:12]), query)

    def _tagged(self, tag: str) -> tuple[str, bool]:
        """The version that a tag names, "" for none, and whether it is spelt so."""
        if is_pseudo(tag) or not tag.startswith(self._tag_prefix):
            return "", False
        rest = tag[len(self._tag_prefix) :]
        version = canonical(rest).partition("+")[0]
        return (version, version == rest) if rest.startswith(version) else ("", False)

    def _is_allowed(self, commit: Commit, query: str, version: str) -> bool:
        fits = fits_major(version, self._major)
        if not fits and not self._can_be_incompatible(commit, query, version):
            return False
        return not any(one.covers(version) for one in self._retracted())

    def _retracted(self) -> list[Retraction]:
        """The versions that the newest release takes back."""
        versions = [version for version in self.versions() if "+" not in version]
        if not versions:
            return []
        highest = next((v for v in reversed(versions) if not is_prerelease(v)), versions[-1])
        try:
            _, raw = self._find_folder(self._find(highest))
        except NotFound:
            return []
        return read_notices(raw or b"").retractions

    def _base(self, commit: Commit, query: str) -> str:
        """The highest version on a commit before, after which its pseudo-version is counted."""
        versions = {self._tagged(tag)[0] for tag in self._repository.tags_before(commit)} - {""}
        for version in sorted(versions, key=precedence, reverse=True):
            if self._is_allowed(commit, query, version):
                return version
        return ""

    def _checked(self, commit: Commit, version: str, query: str) -> str:
        """The version, marked as incompatible if need be, if the commit can have it. Raises
        NotFound (checkCanonical)."""
        self._find_folder(commit)
        if version == _without_mark(query):
            version = query
        base = _without_mark(version)
        asked = query if is_canonical(query) else ""
        if asked and _without_mark(asked) != base:
            raise NotFound(f"resolves to version {version} ({_without_mark(asked)} is not a tag)")
        if fits_major(base, self._major):
            if version != base:
                raise NotFound("+incompatible suffix not allowed: major version is compatible")
            return version
        if self._can_be_incompatible(commit, query, base):
            return base + "+incompatible"
        if self._major:
            reason = "module path includes a major version suffix, so major version must match"
        else:
            reason = "module contains a go.mod file, so module path must match major version"
        raise NotFound(reason)

    def _check_pseudo(self, commit: Commit, version: str) -> None:
        """Raises NotFound unless time, hash and base of a pseudo-version are true: else anybody
        could give a commit any place in the order of versions (validatePseudoVersion)."""
        base, stamp, revision = read_pseudo(_without_mark(version))
        short, told = commit.hash[:12], _moment(commit, "%Y%m%d%H%M%S")
        if revision != short:
            raise NotFound(f"does not match short name of revision (expected {short})")
        if stamp != told:
            raise NotFound(f"does not match version-control timestamp (expected {told})")
        if base:
            self._check_base(commit, base)
        elif not self._major and version.startswith("v1."):
            raise NotFound("major version without preceding tag must be v0, not v1")

    def _check_base(self, commit: Commit, base: str) -> None:
        tags = self._repository.tags()
        exact = self._tag_prefix + base
        # The go command takes a tag of the top folder for one of ours here. So must we: what it
        # refuses by itself must not work through us.
        if commit.hash in (tags.get(exact), tags.get(base)):
            raise NotFound(
                f"tag ({base}) found on revision {commit.hash[:12]} is already canonical"
            )
        start, order = len(self._tag_prefix), precedence(base)
        same = [tag for tag in tags if tag.startswith(exact) and precedence(tag[start:]) == order]
        if not same:
            raise NotFound(f"preceding tag ({base}) not found")
        if not any(self._repository.is_before(tag, commit) for tag in same):
            raise NotFound(f"revision is not a descendent of preceding tag ({same[-1]})")

    def at(self, version: str) -> Commit:
        """The commit of a version. Raises NotFound if it is no version of this module."""
        commit = self._find(version)
        converted = self._convert(commit, version)
        if converted != version:
            raise NotFound(f"resolves to version {converted}")
        return commit

    def info(self, version: str) -> Info:
        """The .info of a version. Raises NotFound if it is no version of this module."""
        return self._info(self.at(version), version)

    def go_mod(self, version: str) -> bytes:
        """The go.mod of a version; a made one if there is none. Raises NotFound."""
        _, raw = self._find_folder(self.at(version))
        return f"module {self._path}\n".encode() if raw is None else raw

    def pack(self, version: str) -> Blob:
        """The zip of a version, made while it is read. What can be known to be wrong with it is
        told at once. Raises NotFound, BadUpstream."""
        commit = self.at(version)
        folder, go_mod = self._find_folder(commit)
        sizes = self._repository.sizes(commit, folder)
        given: dict[str, bytes] = {}  # a module below the top has the LICENSE of the top
        if folder and "LICENSE" not in sizes:
            text = self._repository.files(commit, "LICENSE")[0]
            given = {} if text is None else {"LICENSE": text}
        sizes.update({name: len(data) for name, data in given.items()})
        chosen = choose_files(sizes, go_mod or b"")
        contents = self._contents(commit, folder, set(chosen), given)
        pieces = zip_pieces(self._path, version, contents)
        return _Packing(pieces, contents, self._repository.check_content)

    def _contents(
        self, commit: Commit, folder: str, missing: set[str], given: Mapping[str, bytes]
    ) -> Generator[FileContent, None, None]:
        with contextlib.closing(self._repository.archive(commit, folder)) as archive:
            for name, pieces in archive:
                if name in missing:
                    missing.discard(name)
                    yield name, pieces
        for name, data in given.items():
            yield name, [data]
        if missing - given.keys():
            raise BadUpstream(f"git left out {quoted(missing.pop())}")


class _Packing(Blob):
    """The pieces of a zip that is made while it is read."""

    def __init__(
        self,
        pieces: Generator[bytes, None, None],
        contents: Generator[FileContent, None, None],
        on_failure: Callable[[], None],
    ) -> None:
        self._pieces = pieces
        self._contents = contents
        self._on_failure = on_failure
        self._ready = b""

    def read(self, count: int) -> bytes:
        while not self._ready:
            try:
                piece = next(self._pieces, None)
            except tarfile.TarError as error:
                self._on_failure()
                raise BadUpstream(f"git ended amid its archive: {error}") from None
            if piece is None:
                return b""
            self._ready = piece
        data, self._ready = self._ready[:count], self._ready[count:]
        return data

    def close(self) -> None:
        self._pieces.close()
        self._contents.close()


class GitSource(Source):
    """Modules made from their git repositories, as the go command does it without a proxy."""

    def __init__(self, find: Callable[[str], Site], repositories: Repositories) -> None:
        """`find` tells where the repository of a module path is; what it raises is handed on."""
        self._find = find
        self._repositories = repositories

    def _ask(self, path: str, question: Callable[[GitModule], T], age: float = math.inf) -> T:
        site = self._find(path)
        repository = self._repositories.at(site.url)
        repository.refs(age)
        module = GitModule(path, site, repository)
        for _ in range(2):  # there are two repositories of ours that may be damaged
            with contextlib.suppress(_Moved, _Damaged):
                return question(module)
            repository.refs(0.0)
        return question(module)

    def versions(self, path: str) -> list[str]:
        return self._ask(path, GitModule.versions, self._repositories.ttl)

    def resolve(self, path: str, query: str) -> Info:
        return self._ask(path, lambda module: module.resolve(query), self._repositories.ttl)

    def open(self, artifact: Artifact) -> Blob:
        return self._ask(artifact.path, lambda module: self._open(module, artifact))

    @staticmethod
    def _open(module: GitModule, artifact: Artifact) -> Blob:
        if artifact.kind == "zip":
            return module.pack(artifact.version)
        if artifact.kind == "mod":
            return BytesBlob(module.go_mod(artifact.version))
        return BytesBlob(module.info(artifact.version).raw)


def _moment(commit: Commit, form: str) -> str:
    try:
        return time.strftime(form, time.gmtime(commit.time))
    except (OSError, OverflowError, ValueError):
        raise BadUpstream(f"commit {commit.hash} has an impossible time") from None


def _without_mark(version: str) -> str:
    mark = "+incompatible"
    return version[: -len(mark)] if version.endswith(mark) else version


# What git is given to reach a repository.


class Keyring:
    """What to show to which server: the lines of -vcs-auth, first come first served, then netrc."""

    def __init__(
        self, logins: Callable[[], Sequence[VcsLogin]], netrc_file: Mapping[str, str]
    ) -> None:
        """`netrc_file`: Authorization values by host (see read_netrc)."""
        self._logins = logins
        self._netrc = netrc_file

    def login(self, url: str) -> VcsLogin:
        """What a repository or page is to be shown; an empty one if there is nothing."""
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("?")[0].partition("/")
        place = f"{authority.rpartition('@')[2]}/{path}".removesuffix(".git").rstrip("/")
        for login in self._logins():
            if scheme == ("ssh" if login.key else "https") and matches((login.glob,), place):
                return login
        host = authority.partition(":")[0] if scheme == "https" else ""
        known = self._netrc.get(authority) or self._netrc.get(host, "")
        return VcsLogin("", authorization=known if scheme == "https" else "")


NO_KEYS = Keyring(tuple, {})

# The Authorization of a client in whose name this thread works: see Borrowed.
_LENT = contextvars.ContextVar("_LENT", default="")


class GitAccess:
    """Credentials and the way out, for git: not as arguments or variables, which are seen in /proc,
    but as the text of a configuration. https goes through a filter of ours, so that -proxy and
    -dns hold, and so that strangers lead nowhere inside."""

    def __init__(self, dialer: Dialer, keyring: Keyring, ca_file: str, filtered: bool) -> None:
        self._dialer = dialer
        self._keyring = keyring
        self._ca_file = ca_file
        self._filtered = filtered
        self._mutex = threading.Lock()
        self._filter: ConnectFilter | None = None

    def environment(self, url: str) -> Mapping[str, str]:
        """Variables that a git needs for a repository. Raises Forbidden if it may not go there."""
        scheme, lent = url.partition("://")[0], _LENT.get()
        if lent and scheme != "https":
            raise Forbidden("a client's credentials are good for https alone: see -private-auth")
        login = VcsLogin("", authorization=lent) if lent else self._keyring.login(url)
        return {"GIT_ALLOW_PROTOCOL": scheme, **_TRANSPORTS[scheme](self, url, login)}

    def over_https(self, url: str, login: VcsLogin) -> Mapping[str, str]:
        """git hands headers of its configuration on to where a redirect leads, so with credentials
        it gets no farther than the host and port that they are for."""
        origin = "/".join(url.split("/")[:3])
        config = {"http.followRedirects": "initial"}
        if login.authorization:
            config[f"http.{origin}/.extraHeader"] = f"Authorization: {login.authorization}"
        if login.helper:
            config[f"credential.{origin}.helper"] = login.helper
        place = urllib.parse.urlsplit(url)
        if login.authorization or login.helper:
            config["http.proxy"] = self._way().url_to(place.hostname or "", place.port or 443)
        elif self._filtered:
            config["http.proxy"] = self._way().url
        certificates = {"GIT_SSL_CAINFO": self._ca_file} if self._ca_file else {}
        return {**_as_config(config), **certificates}

    def over_ssh(self, url: str, login: VcsLogin) -> Mapping[str, str]:
        """Without a file of known hosts, a host that is met for the first time is believed."""
        self._check_way(url)
        options = ["-oBatchMode=yes", "-oControlMaster=no", "-oControlPath=none"]
        options += ["-oConnectTimeout=10", "-oServerAliveInterval=15"]
        if login.key:
            options += ["-oIdentitiesOnly=yes", "-i", login.key]
        if login.known_hosts:
            options += [f"-oUserKnownHostsFile={login.known_hosts}", "-oStrictHostKeyChecking=yes"]
        else:
            options.append("-oStrictHostKeyChecking=accept-new")
        return {"GIT_SSH_COMMAND": shlex.join(["ssh", *options]), "GIT_SSH_VARIANT": "ssh"}

    def plainly(self, url: str, login: VcsLogin) -> Mapping[str, str]:
        """In clear text, without credentials."""
        self._check_way(url)
        return {}

    def locally(self, url: str, login: VcsLogin) -> Mapping[str, str]:
        """From a folder of this machine."""
        return {}

    def _check_way(self, url: str) -> None:
        """Raises Forbidden where -proxy should be used and cannot."""
        place = urllib.parse.urlsplit(url)
        host = place.hostname or ""
        if self._dialer.route.proxy_for(host, place.port or _VCS_PORTS[place.scheme]):
            raise Forbidden(
                f"{place.scheme} does not go through -proxy: use https, or NO_PROXY={host}"
            )

    def _way(self) -> ConnectFilter:
        with self._mutex:
            if self._filter is None:
                self._filter = ConnectFilter(self._dialer)
            return self._filter

    def close(self) -> None:
        with self._mutex:
            if self._filter is not None:
                self._filter.close()


_VCS_PORTS = {"git": 9418, "http": 80, "ssh": 22}
_TRANSPORTS: dict[str, Callable[[GitAccess, str, VcsLogin], Mapping[str, str]]] = {
    "file": GitAccess.locally,
    "git": GitAccess.plainly,
    "http": GitAccess.plainly,
    "https": GitAccess.over_https,
    "ssh": GitAccess.over_ssh,
}


def _as_config(config: Mapping[str, str]) -> dict[str, str]:
    """Settings as the text of a file of git (git-config(1), "CONFIGURATION FILE")."""
    text = ""
    for key, value in config.items():
        section, _, rest = key.partition(".")
        place, _, name = rest.rpartition(".")
        words = [json.dumps(word, ensure_ascii=False) for word in (place, value)]
        text += f"[{section} {words[0]}]\n" if place else f"[{section}]\n"
        text += f"{name} = {words[1]}\n"
    return {"GIT_CONFIG_GLOBAL": text}


# Where repositories are: what the go command does in cmd/go/internal/vcs.


class Found(NamedTuple):
    """What is known of a module path: the path of its repository's root, "git" or "mod", where
    that is, in which folder of it the root lies, and whether the operator vouches for the place."""

    root: str
    kind: str
    url: str
    folder: str
    trusted: bool


_FORGES = {
    "bitbucket.org": re.compile(r"(bitbucket\.org/[\w.-]+/([\w.-]+))/"),
    "git.apache.org": re.compile(r"(git\.apache\.org/([a-z0-9_.-]+)\.git)/"),
    "git.openstack.org": re.compile(r"(git\.openstack\.org/[\w.-]+/([\w.-]+?))(\.git)?/"),
    "github.com": re.compile(r"(github\.com/[\w.-]+/([\w.-]+))/"),
    "hub.jazz.net/git": re.compile(r"(hub\.jazz\.net/git/[a-z0-9]+/([\w.-]+))/"),
}
_MARKED = re.compile(r"(.+)\.(bzr|fossil|git|hg|svn)")


def _known_place(path: str) -> tuple[str, str]:
    """The root and URL of a path that tells them itself, or two empty strings. Raises NotFound
    for a path that cannot be, or that needs something else than git."""
    for prefix, root in _FORGES.items():
        if is_below(path, prefix):
            match = root.match(f"{path}/")
            if not match or _MARKED.fullmatch(match[2]):
                raise NotFound(f"no repository of {prefix} has such a path")
            return match[1], f"https://{match[1]}"
    elements = path.split("/")
    for number, element in enumerate(elements[1:], 1):
        match = _MARKED.fullmatch(element)
        if match:
            _check_kind(match[2])
            base = "/".join([*elements[:number], match[1]])
            return f"{base}.git", f"https://{base}"
    return "", ""


def is_below(path: str, prefix: str) -> bool:
    """Whether a path begins with all the elements of another."""
    return path == prefix or path.startswith(f"{prefix}/")


def _check_kind(kind: str) -> None:
    if kind not in _ORIGINS:
        raise NotFound(f"its version control is {quoted(kind)}; only git is spoken here")


class ImportTag(NamedTuple):
    """The content of a go-import tag."""

    prefix: str
    kind: str
    url: str
    folder: str = ""


_TAG = re.compile(r"""<(/?)([A-Za-z_:][^\s<>/"'=]*)((?:[^<>"']|"[^"]*"|'[^']*')*)>""")
_ATTRIBUTE = re.compile(r"""([^\s"'=/]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([\w:-]+)))?""", re.ASCII)
_ENTITY = re.compile(r"&(?:amp|apos|gt|lt|quot|#([0-9]{1,7})|#x([0-9A-Fa-f]{1,6}));")
_NAMED = {"&amp;": "&", "&apos;": "'", "&gt;": ">", "&lt;": "<", "&quot;": '"'}
_PASSED_OVER = {"<!--": "-->", "<![CDATA[": "]]>", "<?": "?>", "<!": ">"}


def read_imports(page: str) -> list[ImportTag]:
    """The go-import tags before </head> or <body>, those of "mod" first, as the go command reads
    them (discovery.go): it ends at the first markup that it does not understand."""
    tags = []
    for name, attributes in _head_tags(page):
        if name == "meta" and attributes.get("name") == "go-import":
            fields = attributes.get("content", "").split()
            if len(fields) in (3, 4):
                tags.append(ImportTag(*fields))
    proxied = [tag for tag in tags if tag.kind == "mod"]
    hidden = {tag.prefix for tag in proxied}
    return proxied + [tag for tag in tags if tag.kind != "mod" and tag.prefix not in hidden]


def _head_tags(page: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Start tags with their attributes, names in lower case. Linear in the length."""
    at = page.find("<")
    while at >= 0:
        opening = next((mark for mark in _PASSED_OVER if page.startswith(mark, at)), "")
        if opening:
            end = page.find(_PASSED_OVER[opening], at + len(opening))
        else:
            tag = _TAG.match(page, at)
            if not tag or (tag[1] + tag[2]).lower() in ("/head", "body"):
                return
            if not tag[1]:
                yield tag[2].lower(), _attributes(tag[3])
            end = tag.end() - 1
        at = page.find("<", end) if end >= 0 else -1


def _attributes(text: str) -> dict[str, str]:
    """The first of each name counts."""
    found: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(text):
        found.setdefault(name.lower(), _ENTITY.sub(_entity, double or single or bare))
    return found


def _entity(match: re.Match[str]) -> str:
    number = int(match[1] or match[2] or "0", 10 if match[1] else 16)
    return _NAMED.get(match[0]) or (chr(number) if number < 0x110000 else match[0])


def _choose(tags: Sequence[ImportTag], path: str) -> ImportTag | None:
    """The tag that is about a path. Raises NotFound for two of a kind."""
    fitting = [tag for tag in tags if is_below(path, tag.prefix)]
    if len(fitting) > 1 and (fitting[0].kind == "mod") == (fitting[1].kind == "mod"):
        raise NotFound("several go-import tags are about it")
    return fitting[0] if fitting else None


class Finder:
    """Finds the repository of a module: by -vcs, in the path itself, or by asking its host with
    ?go-get=1 over https (Go reference, "Finding a repository for a module path").

    Private modules are asked for with the operator's credentials; for all others neither those
    nor addresses inside are in reach, whatever a page says."""

    _PAGE, _FRESH_SECONDS = 1 << 20, 300.0

    def __init__(
        self,
        rules: Sequence[VcsRule],
        private: Sequence[str],
        ask_ours: Callable[[Url], Response],
        ask_others: Callable[[Url], Response],
    ) -> None:
        self._rules = rules
        self._private = private
        self._ask = {True: ask_ours, False: ask_others}
        self._found: TtlCache[Found] = TtlCache(10_000)

    def find(self, path: str) -> Found:
        """Raises NotFound, Forbidden, Overloaded, BadUpstream."""
        found = self._found.get(path)
        if not found:
            found = self._look(path)
            self._found.put(path, found, self._FRESH_SECONDS)
        return found

    def site(self, path: str) -> Site:
        """As find, for git."""
        found = self.find(path)
        return Site(found.root, found.url, found.folder)

    def _look(self, path: str) -> Found:
        for rule in self._rules:
            root = rule.covers(path)
            if root:
                return Found(root, "git", rule.place(root), "", True)
        if any(rule.is_deeper(path) for rule in self._rules):
            raise NotFound("its repository would lie deeper, says -vcs")
        trusted = matches(self._private, path)
        root, url = _known_place(path)
        return Found(root, "git", url, "", trusted) if root else self._discover(path, trusted)

    def _discover(self, path: str, trusted: bool) -> Found:
        told = _again(lambda: self._read(path, path, trusted))
        root = told.prefix
        if root != path and _again(lambda: self._read(root, path, trusted)) != told:
            raise NotFound(f"the pages of {path} and {told.prefix} name different repositories")
        _check_kind(told.kind)
        _check_place(told, trusted)
        folder = posixpath.normpath(told.folder or ".")
        return Found(root, told.kind, told.url, "" if folder == "." else folder, trusted)

    def _read(self, where: str, path: str, trusted: bool) -> ImportTag:
        """What the page of `where` says of `path`; the status of a page that says it is all one."""
        host, _, rest = where.partition("/")
        response = self._ask[trusted](Url("https", host, 443, f"/{rest}?go-get=1"))
        with contextlib.closing(response):
            page = response.read_all(self._PAGE).decode("utf-8", "replace")
            told = _choose(read_imports(page), path)
            if told:
                return told
            if response.status not in (200, 404, 410):
                _refuse(response)
            raise NotFound(f"no go-import tag at https://{where}?go-get=1")


def _check_place(told: ImportTag, trusted: bool) -> None:
    """Raises BadUpstream or Forbidden for what a page must not say."""
    is_outside = told.folder[:1] in ("/", "-") or ".." in told.folder.split("/")
    if is_outside or not REPOSITORY.fullmatch(told.url):
        raise BadUpstream(f"the go-import tag of {told.prefix} is malformed")
    schemes = _ORIGINS[told.kind].schemes[trusted]
    if told.url.partition("://")[0] not in schemes:
        words = " or ".join(schemes)
        raise Forbidden(f"the go-import tag of {told.prefix} must lead to {words}: see -vcs")


class Side(NamedTuple):
    """How repositories and proxies are reached."""

    repositories: Repositories
    client: Client


class _Origin(NamedTuple):
    schemes: tuple[tuple[str, ...], tuple[str, ...]]  # for strangers, for the operator's
    open: Callable[[Side, Finder, Found], Source]


_ORIGINS = {
    "git": _Origin(
        (("https",), ("https", "ssh")),
        lambda side, finder, found: GitSource(finder.site, side.repositories),
    ),
    "mod": _Origin(
        (("https",), ("http", "https")),
        lambda side, finder, found: Upstream(side.client, _proxy_url(found)),
    ),
}


def _proxy_url(found: Found) -> Url:
    try:
        return parse_url(found.url)
    except ValueError:
        raise BadUpstream(f"the go-import tag of {found.root} is malformed") from None


class Direct(Source):
    """Modules from where they are developed."""

    def __init__(self, finder: Finder, ours: Side, others: Side) -> None:
        """`ours` has credentials and reaches everything, `others` serves strangers."""
        self._finder = finder
        self._sides = (others, ours)

    def _source(self, path: str) -> Source:
        found = self._finder.find(path)
        return _ORIGINS[found.kind].open(self._sides[found.trusted], self._finder, found)

    def versions(self, path: str) -> list[str]:
        return self._source(path).versions(path)

    def resolve(self, path: str, query: str) -> Info:
        return self._source(path).resolve(path, query)

    def open(self, artifact: Artifact) -> Blob:
        return self._source(artifact.path).open(artifact)

    def check(self, path: str) -> None:
        """Raises what asking a module's repository now raises. What it lets in is not remembered
        here."""
        found = self._finder.find(path)
        if found.kind != "git":
            raise Forbidden(f"only git is asked about credentials, and {found.root} is elsewhere")
        self._sides[found.trusted].repositories.at(found.url).check()


class Borrowed(Source):
    """A source that is asked with a client's Authorization in the place of ours."""

    def __init__(self, direct: Direct, authorization: str) -> None:
        self._direct = direct
        self._authorization = authorization

    def _lending(self, ask: Callable[[], T]) -> T:
        token = _LENT.set(self._authorization)
        try:
            return ask()
        finally:
            _LENT.reset(token)

    def versions(self, path: str) -> list[str]:
        return self._lending(lambda: self._direct.versions(path))

    def resolve(self, path: str, query: str) -> Info:
        return self._lending(lambda: self._direct.resolve(path, query))

    def open(self, artifact: Artifact) -> Blob:
        return self._lending(lambda: self._direct.open(artifact))

    def check(self, path: str) -> None:
        self._lending(lambda: self._direct.check(path))


class Maker:
    """Runs the commands of -generate: in a copy of a version that nobody else sees, in a process
    group of its own, with few variables."""

    SECONDS = 600.0
    _SHOWN = 100  # lines of output

    def __init__(self, recipes: Sequence[Recipe], path: str, log: Log) -> None:
        """`path`: where commands are looked for."""
        self._recipes = recipes
        self._path = path
        self._log = log

    def recipe(self, path: str) -> Recipe | None:
        """The first whose glob fits."""
        return next((each for each in self._recipes if matches((each.glob,), path)), None)

    def make(self, artifact: Artifact, given: Blob, info: bytes, storage: Storage) -> None:
        """Publishes what the command makes of a version. Raises BadUpstream, and what reading
        `given` does."""
        with tempfile.TemporaryDirectory(prefix="goproxy-generate-") as folder:
            root = os.path.join(folder, "module")
            packed = os.path.join(folder, "zip")
            try:
                with open(packed, "w+b") as file:
                    file.writelines(pieces_of(given))
                    unpack_zip(file, artifact.path, artifact.version, root)
                    before = mod_in_zip(file, artifact.path, artifact.version)
                self._run(artifact, root, folder)
                with drafting(storage) as draft:
                    write_zip(draft, artifact[:2], source_tree(root), opener(root))
                    sums = check_module_zip(draft, artifact.path, artifact.version)
                    if sums.go_mod != before:
                        raise BadUpstream("-generate: go.mod has changed, which clients have read")
                    publish(storage, artifact, draft, sums, info)
            except (BadRequest, OSError) as error:
                raise BadUpstream(f"-generate: {error}") from None

    def _run(self, artifact: Artifact, root: str, home: str) -> None:
        recipe = self.recipe(artifact.path)
        assert recipe
        env = {"HOME": home, "LANG": "C.UTF-8", "PATH": self._path, "TMPDIR": home}
        env.update(MODULE_PATH=artifact.path, MODULE_VERSION=artifact.version)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                recipe.command,
                cwd=root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(self.SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(OSError):  # and whatever it left running
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._tell(artifact, output)
        if status != 0:
            end = f"ended with {status}" if status else f"took more than {self.SECONDS:.0f} s"
            raise BadUpstream(f"-generate: {recipe.command[0]} {end}; its output is in the log")

    def bemoan(self, artifact: Artifact, error: ProxyError) -> None:
        self._log.error(f"{artifact.name}: {error}", status=error.status)

    def _tell(self, artifact: Artifact, output: BinaryIO) -> None:
        output.seek(max(0, output.seek(0, os.SEEK_END) - MAX_INFO))
        lines = output.read().decode(errors="replace").splitlines()
        for line in lines[-self._SHOWN :]:
            self._log.line(f"generate {artifact.path}@{artifact.version}: {line}")


def opener(folder: str) -> Callable[[str], BinaryIO]:
    """Opens a file by its name below a folder."""
    return lambda name: open(os.path.join(folder, name), "rb")


def send_zip(client: Client, url: Url, artifact: Artifact, draft: Draft) -> None:
    """PUTs a version's zip to a goproxy.py. Raises Forbidden, BadUpstream."""
    shown = client.authorization(url)
    headers = [("Authorization", shown)] if shown else []
    size = draft.written
    body = Body(size, lambda count, offset: draft.file.read_at(min(count, size), offset))
    request = Outgoing("PUT", below(url, artifact.name), headers, body)
    response = client.send(request, TRANSFER, time.monotonic() + TRANSFER.total)
    with contextlib.closing(response):
        _refuse(response, (200, 201))


_SOURCES: dict[str, Callable[[Client, Hop, Source], Source]] = {
    "direct": lambda client, hop, direct: direct,
    "file": lambda client, hop, direct: LocalFolder(hop.folder),
    "http": lambda client, hop, direct: Upstream(client, hop.url or Url("", "", 0)),
    "off": lambda client, hop, direct: FirstOf([]),
}


def open_sources(client: Client, hops: Sequence[Hop], direct: Source) -> Source:
    """The upstream list as one source."""
    return FirstOf([(_SOURCES[hop.kind](client, hop, direct), hop.any_error) for hop in hops])


# =============================================================================
# 9. Mirror: sources remembered in a store; policy; the checksum database
# =============================================================================


class Reach(enum.Enum):
    """How far an answer may be sought."""

    STORED = "only what the store has"
    READY = "what can be answered without waiting; MustWait otherwise"
    FETCH = "whatever it takes"


class MustWait(Exception):
    """Asked with Reach.READY, the answer would have to be waited for."""


class Verdict(enum.Enum):
    """How an answer came about; the word of the X-Cache field."""

    HIT = "HIT"
    MISS = "MISS"
    STALE = "STALE"


class Stamped(NamedTuple):
    """A stored file, and the stamp it had when it was read."""

    name: str
    stamp: object


class Answer(NamedTuple):
    """What the mirror says: bytes (small things) or a blob, how old they are in seconds, and how
    they came about."""

    body: bytes | FileBlob
    verdict: Verdict
    age: int = 0
    stored: Stamped | None = None  # where it is stored, if it never changes
    personal: bool = False  # whether it is for this client alone

    @property
    def data(self) -> bytes:
        """The body of an answer that is small."""
        assert isinstance(self.body, bytes)
        return self.body


class _Kept(NamedTuple):
    """Stored bytes, their age in seconds, and the stamp of their file."""

    data: bytes
    age: float
    stamp: object


ABSENT_SECONDS = 60.0
_STALE_SECONDS = 86400.0
_REFRESH_WAIT = 1.0


class Cache:
    """A storage in front of something slower. What never changes is fetched once, what changes is
    fresh for `ttl` seconds, absence is remembered as long, a minute at most, trouble never.

    A fetch belongs to its flight: the client that began it may leave, the fetch goes on, and
    everybody who asks meanwhile shares it."""

    _DOWNLOADS, _RENEWALS, _REMEMBERED = 12, 4, 10_000

    def __init__(self, storage: Storage, ttl: float, log: Log) -> None:
        self.storage = storage
        self._ttl = ttl
        self._log = log
        self.on_stored: Callable[[str, int], None] = lambda name, size: None
        self.on_lost: Callable[[str, ProxyError], None] = lambda name, error: log.error(
            f"{name}: not stored: {error}"
        )
        self._absent: TtlCache[NotFound] = TtlCache(self._REMEMBERED)
        self._failed: TtlCache[bool] = TtlCache(self._REMEMBERED)
        self._fetches: Flights[Future[bytes]] = Flights()
        self._drafts: Flights[Draft] = Flights()
        self._download_lane = Lane("download", self._DOWNLOADS)
        self._renewal_lane = Lane("renewal", self._RENEWALS)

    def small(self, name: str, reach: Reach, fetch: Callable[[], bytes]) -> Answer:
        """Small bytes that never change."""
        kept = self._read_kept(name, reach)
        if kept:
            return Answer(kept.data, Verdict.HIT, 0, _stamped(name, kept.stamp))
        self._refuse_absent(name, reach)

        def begin(flight: Future[bytes]) -> None:
            self._fetch(name, flight, fetch, lambda: self._read(name), replace=False)

        return self._share(name, begin)

    def large(self, name: str, reach: Reach, fetch: Callable[[], Blob], check: Check) -> Answer:
        """A body that never changes. It is given out while it arrives; `check` sees it whole
        before its tail is let go and before it is stored."""
        blob = self._open(name, reach)
        if blob:
            return Answer(blob, Verdict.HIT, 0, _stamped(name, blob.stamp))
        self._refuse_absent(name, reach)
        draft, first = self._drafts.join(name, self.storage.draft)
        if first:
            self._download_lane.do(lambda: self._download(name, draft, fetch, check))
        growing = draft.reader()
        with self._drafts.waiting(name, first):
            growing.settle()
        return Answer(growing, Verdict.MISS)

    def changing(self, name: str, reach: Reach, fetch: Callable[[], bytes]) -> Answer:
        """Small bytes that may change: fresh for the ttl, then stale while one fetch renews them,
        stale for a day when that fails."""
        stored = self._read_kept(name, reach)
        if reach is Reach.STORED or (stored and 0 <= stored.age < self._ttl):
            return _answer(stored, Verdict.HIT)
        if stored and stored.age >= _STALE_SECONDS:
            stored = None  # nobody is given that, so all wait
        if stored and self._failed.get(name):
            return _answer(stored, Verdict.STALE)
        self._refuse_absent(name, reach)

        def begin(flight: Future[bytes]) -> None:
            work = functools.partial(self._fetch, name, flight, fetch, lambda: None, replace=True)
            self._renewal_lane.do(work) if stored else work()

        try:
            return self._share(name, begin, stored is not None)
        except (FutureTimeout, ProxyError) as error:
            if stored and not isinstance(error, NotFound):
                return _answer(stored, Verdict.STALE)
            raise

    def _share(self, name: str, begin: Callable[..., None], stored: bool = False) -> Answer:
        """What a flight brings. One that was begun as a guess was given up at once, so who has
        joined that begins anew."""
        while True:
            flight, first = self._fetches.join(name, Future)
            if first:
                begin(flight)
            # Whoever starts a renewal gives a quick upstream time to answer; nobody else waits.
            patience = None if not stored else _REFRESH_WAIT if first else 0
            try:
                with self._fetches.waiting(name, first):
                    return Answer(flight.result(patience), Verdict.MISS)
            except Overloaded as error:
                if first or not error.hasty:
                    raise

    def _refuse_absent(self, name: str, reach: Reach) -> None:
        if reach is Reach.STORED:
            raise NotHere("not in the store, and fetching is off")
        absent = self._absent.get(name)
        if absent:
            raise type(absent)(str(absent))
        if reach is Reach.READY:
            raise MustWait

    def _fetch(
        self,
        name: str,
        flight: Future[bytes],
        fetch: Callable[[], bytes],
        look_again: Callable[[], bytes | None],
        replace: bool,
    ) -> None:
        """A flight's work. It looks into the store again: a flight may have landed between a
        miss and the take-off of this one."""
        try:
            data = look_again()
            if data is None:
                with TRACER.span("fetch", {"goproxy.name": name}):
                    data = fetch()
                if not self.keep(name, data, replace):
                    data = look_again() or data
        except BaseException as caught:
            error = self._ours(name, caught)
            self._remember(name, error)
            self._fetches.land(name)
            flight.set_exception(error)
        else:
            self._failed.drop(name)
            self._fetches.land(name)
            flight.set_result(data)

    def _ours(self, name: str, error: BaseException) -> ProxyError:
        """An error that readers in other threads can be given; a bug is told in the log."""
        if isinstance(error, NotFound):
            return unframed(self._outage(name) or error)
        if isinstance(error, ProxyError):
            return unframed(error)
        if isinstance(error, MemoryError):
            self._log.error(f"{name}: out of memory")
            return Overloaded("out of memory")
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        self._log.error(f"{name}: {''.join(lines)}")
        return ProxyError("internal error")

    def _outage(self, name: str) -> StoreDown | None:
        """Why upstream's absence says nothing: the store may have it, but cannot be asked."""
        try:
            self.storage.open(name).close()
        except StoreDown as error:
            return error
        except NotFound:
            pass
        return None

    def _remember(self, name: str, error: ProxyError) -> None:
        if isinstance(error, NotFound):
            self._absent.put(name, unframed(error), min(self._ttl, ABSENT_SECONDS))
        else:
            self._failed.put(name, True, min(self._ttl, ABSENT_SECONDS))
            self._log.error(f"{name}: {error}", status=error.status)

    def keep(self, name: str, data: bytes, replace: bool) -> bool:
        """Stores small bytes. If the store cannot, the next client pays with a fetch, not this.
        False if others were stored before them."""
        try:
            is_ours = self.storage.put(name, data, replace)
        except ProxyError as error:
            self.on_lost(name, error)
            return True
        if is_ours and not replace:
            self.on_stored(name, len(data))
        return is_ours

    def _download(self, name: str, draft: Draft, fetch: Callable[[], Blob], check: Check) -> None:
        try:
            with TRACER.span("fetch", {"goproxy.name": name}):
                self._fill(name, draft, fetch, check)
        except BaseException as caught:
            error = self._ours(name, caught)
            self._remember(name, error)
            self._drafts.land(name)
            draft.fail(error)
        else:
            self._drafts.land(name)
            draft.finish()

    def _fill(self, name: str, draft: Draft, fetch: Callable[[], Blob], check: Check) -> None:
        blob = self._open(name, Reach.FETCH) or fetch()
        with contextlib.closing(blob):
            draft.size = blob.size
            fill(draft, blob, name)
        failing, side = check(draft)
        try:
            self.storage.put(failing, side, replace=False)
            failing = name
            is_ours = self.storage.adopt(name, draft)
        except ProxyError as error:
            with contextlib.suppress(OSError):  # it may have got its name before that
                os.unlink(draft.path)
            self.on_lost(failing, error)
        else:
            if is_ours:
                self.on_stored(name, draft.written + len(side))
            else:
                self._check_same(name, draft)

    def _check_same(self, name: str, draft: Draft) -> None:
        """Whoever was first has stored the same bytes, or ours must not go out."""
        blob = self._open(name, Reach.FETCH)
        if not blob:
            return
        with contextlib.closing(blob), draft.file.reading() as file:
            while True:
                data = blob.read(CHUNK)
                if data != file.read(len(data) or 1):
                    raise BadUpstream("other bytes were stored meanwhile under this name")
                if not data:
                    return

    def _open(self, name: str, reach: Reach) -> FileBlob | None:
        """None if it must be fetched. Raises StoreDown if it must not: that is no absence."""
        try:
            return self.storage.open(name)
        except NotFound:
            return None
        except StoreDown as error:
            self._bemoan(name, error, reach)
            return None

    def _bemoan(self, name: str, error: ProxyError, reach: Reach) -> None:
        if reach is Reach.STORED:
            raise error
        if not isinstance(error, StoreAway):  # which has been told
            self._log.error(f"{name}: {error}")

    def _read_kept(self, name: str, reach: Reach) -> _Kept | None:
        blob = self._open(name, reach)
        if not blob:
            return None
        with contextlib.closing(blob):
            try:
                data = blob.read_all(_MAX_SMALL)
            except ProxyError as error:
                self._bemoan(name, error, reach)
                return None  # as if it were not there: it is fetched again
            return _Kept(data, time.time() - blob.modified, blob.stamp)

    def _read(self, name: str) -> bytes | None:
        stored = self._read_kept(name, Reach.FETCH)
        return stored.data if stored else None

    def close(self) -> None:
        self._download_lane.close()
        self._renewal_lane.close()
        self.storage.close()


Check = Callable[[Draft], tuple[str, bytes]]  # the name and bytes of a side file to keep with it
_MAX_SMALL = 32 << 20


def _stamped(name: str, stamp: object) -> Stamped | None:
    """None if there is no way to tell whether the bytes still are the stored ones."""
    return None if stamp is None else Stamped(name, stamp)


def _answer(stored: _Kept | None, verdict: Verdict) -> Answer:
    if not stored:
        raise NotHere("not in the store, and fetching is off")
    return Answer(stored.data, verdict, max(0, int(stored.age)))


class Modules(Protocol):
    """Everything a client can ask of a module, as bytes."""

    def versions(self, path: str, reach: Reach) -> Answer:
        """Versions, one per line in semver order."""

    def resolve(self, path: str, query: str, reach: Reach) -> Answer:
        """The .info of what "latest", a branch or a commit stands for."""

    def small(self, artifact: Artifact, reach: Reach) -> Answer:
        """A .info or .mod."""

    def large(self, artifact: Artifact, reach: Reach) -> Answer:
        """A .zip."""

    def link(self, artifact: Artifact, method: str) -> str:
        """Where the client itself can GET or HEAD a .zip; "" if it is to ask us for it."""


# Given a go.sum version and its h1: hash, tells whether a checksum database has that; Mismatch is
# raised if it has another one, Untrusted if its record does not count.
Comparison = Callable[[str, str], bool]
Begin = Callable[[str, str], Comparison]  # given path and version, before something is fetched


def nothing_known(version: str, h1: str) -> bool:
    """The comparison with no database."""
    return False


class Mirror(Modules):
    """A source, remembered: everything a client can ask of a module, as bytes. `begin` is called
    with path and version before something is fetched, and what it returns before that is kept."""

    def __init__(
        self, source: Source, cache: Cache, begin: Begin = lambda path, version: nothing_known
    ) -> None:
        self._source = source
        self._cache = cache
        self._begin = begin
        self._stored = Stored(cache.storage)

    def versions(self, path: str, reach: Reach) -> Answer:
        """Versions, one per line in semver order: upstream's united with the stored ones. Without
        upstream's, because it knows none or fails, the stored ones alone, if there are any."""
        name = f"{escape_path(path)}/@v/list"
        if reach is Reach.STORED:
            with contextlib.suppress(NotFound):
                return Answer(_lines(self._stored.versions(path)), Verdict.HIT)
            raise NotHere("not in the store, and fetching is off")
        try:
            answer = self._cache.changing(name, reach, lambda: _lines(self._source.versions(path)))
        except ProxyError as error:
            return self._instead(error, lambda: _lines(self._stored.versions(path)))
        with contextlib.suppress(NotFound, StoreDown):
            known = set(answer.data.decode().split())
            if not known.issuperset(stored := self._stored.versions(path)):
                answer = answer._replace(body=_lines(known.union(stored)))
        return answer

    def resolve(self, path: str, query: str, reach: Reach) -> Answer:
        """The .info of what a query stands for; without upstream's answer, @latest is made from
        what is stored."""

        def latest() -> bytes:
            if query != LATEST:
                raise NotHere("not in the store, and fetching is off")
            return self._stored.resolve(path, LATEST).raw

        if reach is Reach.STORED:
            with contextlib.suppress(NotFound):
                return Answer(latest(), Verdict.HIT)
        try:
            return self._cache.changing(
                query_name(path, query), reach, lambda: self._source.resolve(path, query).raw
            )
        except ProxyError as error:
            return self._instead(error, latest)

    @staticmethod
    def _instead(error: ProxyError, stored: Callable[[], bytes]) -> Answer:
        """What is stored, or else the error that made us look there."""
        try:
            verdict = Verdict.HIT if isinstance(error, NotFound) else Verdict.STALE
            return Answer(stored(), verdict)
        except NotFound:
            raise error from None
        except StoreDown as trouble:
            raise (trouble if isinstance(error, NotFound) else error) from None

    def small(self, artifact: Artifact, reach: Reach) -> Answer:
        """A .info or .mod."""

        def fetch() -> bytes:
            if artifact.kind != "mod":
                return bytes_of(self._source, artifact)
            compare = self._begin(artifact.path, artifact.version)
            data = bytes_of(self._source, artifact)
            compare(f"{artifact.version}/go.mod", hash_of_mod(data))
            return data

        return self._cache.small(artifact.name, reach, fetch)

    def large(self, artifact: Artifact, reach: Reach) -> Answer:
        """A .zip, given out while it arrives."""

        begun: list[Comparison] = []

        def fetch() -> Blob:
            begun.append(self._begin(artifact.path, artifact.version))
            return self._source.open(artifact)

        def check(draft: Draft) -> tuple[str, bytes]:
            with draft.file.reading() as file:
                h1 = check_zip(file, artifact.path, artifact.version)
            for compare in begun:
                compare(artifact.version, h1)
            return artifact.name + "hash", h1.encode()

        return self._cache.large(artifact.name, reach, fetch, check)

    def link(self, artifact: Artifact, method: str) -> str:
        try:
            return self._cache.storage.link(artifact.name, method)
        except (NotFound, StoreDown):
            return ""  # what is wrong is told to whoever has it opened


def _lines(versions: Iterable[str]) -> bytes:
    return "".join(version + "\n" for version in sorted(set(versions), key=semver_key)).encode()


class Asker(NamedTuple):
    """Who asks, as far as that decides what is seen: an Authorization, and how far we may go to
    find out what it is worth."""

    authorization: str = ""
    reach: Reach = Reach.FETCH


class PersonalMirror(Mirror):
    """A mirror for one client: what it says must not be remembered for others."""

    def versions(self, path: str, reach: Reach) -> Answer:
        return super().versions(path, reach)._replace(stored=None, personal=True)

    def resolve(self, path: str, query: str, reach: Reach) -> Answer:
        return super().resolve(path, query, reach)._replace(stored=None, personal=True)

    def small(self, artifact: Artifact, reach: Reach) -> Answer:
        return super().small(artifact, reach)._replace(stored=None, personal=True)

    def large(self, artifact: Artifact, reach: Reach) -> Answer:
        return super().large(artifact, reach)._replace(stored=None, personal=True)


class Permits:
    """Private modules by each client's own credentials (-private-auth=client). Version control is
    asked whether they are good for a module before anything of it is shown, stored or not; a good
    answer is believed for a minute."""

    _BELIEVED_SECONDS, _REMEMBERED = 60.0, 10_000

    def __init__(self, direct: Direct, cache: Cache) -> None:
        self._direct = direct
        self._cache = cache
        self._good: TtlCache[bool] = TtlCache(self._REMEMBERED)
        self._salt = secrets.token_bytes(16)

    def mirror(self, path: str, asker: Asker) -> Mirror:
        """Raises Unauthorized, MustWait, and what version control says."""
        if not asker.authorization:
            raise Unauthorized("private: credentials for its repository are needed")
        source = Borrowed(self._direct, asker.authorization)
        shown = f"{asker.authorization}\0{path}".encode()
        name = hashlib.blake2b(shown, key=self._salt).hexdigest()
        if not self._good.get(name):
            if asker.reach is Reach.READY:
                raise MustWait
            if asker.reach is Reach.STORED:
                raise Forbidden("private: whether credentials are good cannot be found out here")
            source.check(path)
            self._good.put(name, True, self._BELIEVED_SECONDS)
        return PersonalMirror(source, self._cache)


class Policy:
    """Who may be asked about which module. Decided on the unescaped path, before anything else."""

    def __init__(
        self,
        public: Modules,
        private: Callable[[str, Asker], Modules],
        storage: Storage,
        settings: Settings,
    ) -> None:
        self._public = public
        self._private = private
        self._storage = storage
        self._settings = settings

    def admit(self, path: str, asker: Asker) -> Modules:
        """Who answers for a module. Raises NotFound for excluded ones, and what the private ones
        raise for who must not see them."""
        with TRACER.span("policy", {"goproxy.module": path}) as span:
            if matches(self._settings.exclude, path):
                raise NotFound("excluded by this proxy")
            is_private = matches(self._settings.private, path)
            span.note("goproxy.private", is_private)
            return self._private(path, asker) if is_private else self._public

    def shows(self, path: str) -> bool:
        """Whether everybody who may ask for a module may have it: then it may be named to them."""
        try:
            self.admit(path, Asker())
        except ProxyError:
            return False
        return True

    def public(self, path: str) -> Modules:
        """Who answers for a module that others may be told of. Raises NotFound for all others."""
        if matches(self._settings.private, path):
            raise NotFound("private, so nobody else is asked about it: set GONOSUMDB for it")
        return self.admit(path, Asker())

    def check_public(self, path: str, version: str) -> None:
        """Raises NotFound for what no checksum database may be asked about."""
        self.public(path)

    def is_public(self, path: str, version: str) -> bool:
        """Whether public upstreams may be asked about a version, and so could give it again."""
        try:
            self.check_public(path, version)
        except NotFound:
            return False
        return True

    def stamp(self, name: str) -> object:
        """The stamp of the file that would answer for a name now: see Shelf.stamp."""
        return self._storage.stamp(name)


class Aged(Modules):
    """The versions that have been out for a while (-min-age): most of what is slipped into a module
    is found within days. What has no time counts as new.

    A list tells no times, so those of its newest versions are asked, down to an old one in each
    minor line; of more lines than a few, the rest is listed, and refused when it is asked for."""

    _LINES, _LOOKS = 20, 200
    _REMEMBERED, _REMEMBERED_SECONDS = 100_000, 86400.0

    def __init__(self, modules: Modules, seconds: float, exempt: Sequence[str]) -> None:
        self._modules = modules
        self._seconds = seconds
        self._exempt = exempt
        self._old: TtlCache[bool] = TtlCache(self._REMEMBERED)

    def _is_old(self, path: str, version: str, reach: Reach) -> bool:
        """Raises what asking for the .info does."""
        key = f"{path}@{version}"
        if matches(self._exempt, path) or self._old.get(key):
            return True
        data = self._modules.small(Artifact(path, version, "info"), reach).data
        moment = seconds_of(read_info(data).time)
        # Whoever knows no time may tell Go's zero one, of the year 1.
        is_old = moment is not None and 0 <= moment <= time.time() - self._seconds
        if is_old:
            self._old.put(key, True, self._REMEMBERED_SECONDS)
        return is_old

    def _check(self, path: str, version: str, reach: Reach) -> None:
        if not self._is_old(path, version, reach):
            days = self._seconds / 86400
            raise Forbidden(
                f"{path}@{version} is younger than {days:.3g} days (-min-age), or of unknown age"
            )

    def _young(self, path: str, versions: Sequence[str], reach: Reach) -> Iterator[str]:
        """The new ones among versions in semver order, the highest first."""
        looks = self._LOOKS
        lines = itertools.groupby(reversed(versions), minor_line)
        for _, line in itertools.islice(lines, self._LINES):
            for version in itertools.islice(line, looks):
                looks -= 1
                try:
                    if self._is_old(path, version, reach):
                        break
                except ProxyError:  # of unknown age
                    pass
                yield version

    def versions(self, path: str, reach: Reach) -> Answer:
        answer = self._modules.versions(path, reach)
        if matches(self._exempt, path):
            return answer
        found = answer.data.decode().split()
        return answer._replace(body=_lines({*found} - {*self._young(path, found, reach)}))

    def resolve(self, path: str, query: str, reach: Reach) -> Answer:
        answer = self._modules.resolve(path, query, reach)
        version = read_info(answer.data).version
        if query != LATEST or self._is_old(path, version, reach):
            self._check(path, version, reach)
            return answer
        others = self.versions(path, reach).data.decode().split()
        if not others:
            self._check(path, version, reach)
        info = self._modules.small(Artifact(path, newest(others), "info"), reach)
        return answer._replace(body=info.body)

    def small(self, artifact: Artifact, reach: Reach) -> Answer:
        self._check(artifact.path, artifact.version, reach)
        return self._modules.small(artifact, reach)

    def large(self, artifact: Artifact, reach: Reach) -> Answer:
        self._check(artifact.path, artifact.version, reach)
        return self._modules.large(artifact, reach)

    def link(self, artifact: Artifact, method: str) -> str:
        try:
            self._check(artifact.path, artifact.version, Reach.READY)
        except MustWait:
            return ""  # who has it opened waits for its age
        return self._modules.link(artifact, method)


class Generated(Modules):
    """The public versions that -generate makes versions of ours of, when their zip is asked for.
    .info and .mod are those of the others: a .mod never drags a zip along."""

    _AT_ONCE, _REMEMBERED, _FAILURE_SECONDS = 2, 1000, 60.0

    def __init__(self, modules: Modules, own: OwnModules, maker: Maker) -> None:
        self._modules = modules
        self._own = own
        self._maker = maker
        self._flights: Flights[Future[None]] = Flights()
        self._failed: TtlCache[ProxyError] = TtlCache(self._REMEMBERED)
        self._lane = Lane("generate", self._AT_ONCE, 0)

    def versions(self, path: str, reach: Reach) -> Answer:
        return self._modules.versions(path, reach)

    def resolve(self, path: str, query: str, reach: Reach) -> Answer:
        return self._modules.resolve(path, query, reach)

    def small(self, artifact: Artifact, reach: Reach) -> Answer:
        return self._modules.small(artifact, reach)

    def large(self, artifact: Artifact, reach: Reach) -> Answer:
        if not self._maker.recipe(artifact.path):
            return self._modules.large(artifact, reach)
        if reach is Reach.STORED:
            raise NotHere("not made yet, and fetching is off")
        failed = self._failed.get(artifact.name)
        if failed:
            raise type(failed)(str(failed))
        if reach is Reach.READY:
            raise MustWait
        make = functools.partial(self._lane.submit, functools.partial(self._make, artifact))
        flight, _ = self._flights.join(artifact.name, make)
        try:
            flight.result(self._maker.SECONDS + TRANSFER.total)
        except FutureTimeout:
            raise Overloaded("-generate: others are made first", 60) from None
        return Answer(self._own.open(artifact), Verdict.MISS)

    def _make(self, artifact: Artifact) -> None:
        try:
            if not self._own.has(artifact.path, artifact.version):
                with contextlib.suppress(Conflict):  # another replica was first
                    self._made(artifact)
        except Exception as caught:
            error = (
                caught if isinstance(caught, ProxyError) else BadUpstream(f"-generate: {caught}")
            )
            if isinstance(error, BadUpstream):  # the upstream's other failures have been told
                self._maker.bemoan(artifact, error)
            self._failed.put(artifact.name, unframed(error), self._FAILURE_SECONDS)
            raise error from None
        finally:
            self._flights.land(artifact.name)

    def _made(self, artifact: Artifact) -> None:
        info = self._modules.small(artifact._replace(kind="info"), Reach.FETCH).data
        body = self._modules.large(artifact, Reach.FETCH).body
        assert isinstance(body, FileBlob)
        with contextlib.closing(body), contextlib.closing(self._own.writable()) as storage:
            self._maker.make(artifact, body, info, storage)

    def link(self, artifact: Artifact, method: str) -> str:
        return "" if self._maker.recipe(artifact.path) else self._modules.link(artifact, method)

    def close(self) -> None:
        self._lane.close()


class OwnFirst(Policy):
    """The versions that are ours, before a policy is asked about any others."""

    def __init__(self, own: OwnModules, policy: Policy, maker: Maker) -> None:
        self._own = own
        self._policy = policy
        self._maker = maker

    def admit(self, path: str, asker: Asker) -> Modules:
        return WithOwn(self._own, lambda: self._policy.admit(path, asker))

    def shows(self, path: str) -> bool:
        return self._policy.shows(path)

    def public(self, path: str) -> Modules:
        return WithOwn(self._own, lambda: self._policy.public(path))

    def check_public(self, path: str, version: str) -> None:
        if self._own.has(path, version) or self._maker.recipe(path):
            raise NotFound("this version is made here, so set GONOSUMDB for it")
        self._policy.check_public(path, version)

    def stamp(self, name: str) -> object:
        return self._own.stamp(name) or self._policy.stamp(name)


class WithOwn(Modules):
    """A module of which some versions may be ours."""

    def __init__(self, own: OwnModules, others: Callable[[], Modules]) -> None:
        self._own = own
        self._others = others

    def versions(self, path: str, reach: Reach) -> Answer:
        """Ours and the others'; ours alone if there are no others or they cannot be had."""
        ours = self._own.versions(path)
        tagged = [version for version in ours if not is_pseudo(version)]
        try:
            answer = self._others().versions(path, reach)
        except ProxyError:
            if not ours:
                raise
            return Answer(_lines(tagged), Verdict.HIT)
        return answer._replace(body=_lines([*answer.data.decode().split(), *tagged]))

    def resolve(self, path: str, query: str, reach: Reach) -> Answer:
        """@latest is the newest of ours and the others'; other queries are none of ours."""
        ours = self._own.versions(path) if query == LATEST else []
        try:
            answer = self._others().resolve(path, query, reach)
        except ProxyError:
            if not ours:
                raise
            best = newest(ours)
        else:
            best = newest([*ours, read_info(answer.data).version])
        return Answer(self._own.resolve(path, best).raw, Verdict.HIT) if best in ours else answer

    def small(self, artifact: Artifact, reach: Reach) -> Answer:
        if not self._own.has(artifact.path, artifact.version):
            return self._others().small(artifact, reach)
        with contextlib.closing(self._own.open(artifact)) as blob:
            data = blob.read_all(KINDS[artifact.kind].limit)
            return Answer(data, Verdict.HIT, 0, _stamped(artifact.name, blob.stamp))

    def large(self, artifact: Artifact, reach: Reach) -> Answer:
        if not self._own.has(artifact.path, artifact.version):
            return self._others().large(artifact, reach)
        blob = self._own.open(artifact)
        return Answer(blob, Verdict.HIT, 0, _stamped(artifact.name, blob.stamp))

    def link(self, artifact: Artifact, method: str) -> str:
        if self._own.has(artifact.path, artifact.version):
            return ""
        return self._others().link(artifact, method)


class Sight(NamedTuple):
    """Something a client was seen to ask: `kind` is list, info, mod or zip; a list's version is
    the newest one in it. `here`: "here" if it was stored already, else ""."""

    client: str
    path: str
    version: str
    kind: str
    here: str = ""

    @property
    def name(self) -> str:
        """That of the artifact, or of the list."""
        if self.kind == "list":
            return f"{escape_path(self.path)}/@v/list"
        return Artifact(self.path, self.version, self.kind).name


class _Session:
    """What one client has asked of late, and what was fetched for it in advance."""

    def __init__(self) -> None:
        self.seen = time.monotonic()
        self.asked: dict[str, str] = {}  # the highest version whose .mod it asked, by path
        self.named: dict[str, str] = {}  # the highest version that one of these requires, by path
        self.guessed: dict[str, str] = {}  # likewise, of .mod files guessed
        self.unused: dict[str, set[str]] = {kind: set() for kind in _UNUSED}
        self.used = collections.Counter[str]()
        self.followed: set[str] = set()  # .mod files that have led on
        self.info = ("", "")  # the module and version of the last .info
        self.waiting: list[Sight] = []  # the .mod after that .info, not followed yet
        self.zips: set[tuple[str, str]] = set()
        self.needs: dict[str, str] = {}  # what a module required that was asked for by its name
        self.lists = False  # whether an .info was asked whose .mod had been read before
        # Modules and versions whose .mod will follow an .info of the list.
        self.unread: set[tuple[str, str]] = set()
        self.downloads = False  # whether a guessed .zip has been asked for after its .info
        self.sources: dict[str, str] = {}  # the version of each .zip that is here or about to come
        self.required: dict[str, str] = {}  # the highest that their go.mod files name, by path
        self.imported: dict[str, set[str]] = {}  # packages known to be imported, by module
        self.missing: set[str] = set()  # modules of which some are, not guessed yet
        self.reading = 0.0  # seconds spent on source files

    def size(self) -> int:
        """How much is remembered."""
        kept = (self.asked, self.guessed, self.followed, self.zips, self.needs, self.required)
        more = (self.named, self.unread)
        return sum(map(len, (*kept, *more, *self.imported.values())))

    def note_use(self, sight: Sight) -> None:
        self.unused[sight.kind].remove(sight.name)
        self.used[sight.kind] += 1
        named = (sight.path, sight.version) == self.info
        self.downloads |= sight.kind == "zip" and sight.path in self.asked and not named

    def note_here(self, sight: Sight) -> None:
        """What was here before anybody guessed it: so is the rest, as a rule."""
        if sight.kind == "mod":
            _note_higher(self.asked, sight.path, sight.version)
        elif sight.kind == "zip":
            self.zips.add((sight.path, sight.version))

    def note_names(self, content: GoMod) -> None:
        """Of a .mod that the client asked."""
        for path, version, _ in content.requirements:
            _note_higher(self.named, path, version)

    def listed(self, path: str) -> str:
        """The version of a module in the client's build list, as far as we know; "" if in none."""
        return max(self.asked.get(path, ""), self.named.get(path, ""), key=semver_key)

    def next_listed(self, sight: Sight, count: int) -> list[Sight]:
        """The modules that a download comes to next, each with the same kind."""
        later = (path for path in {**self.named, **self.asked} if path > sight.path)
        paths = heapq.nsmallest(count, later)
        return [sight._replace(path=path, version=self.listed(path)) for path in paths]

    def note_unread(self, sights: Iterable[Sight]) -> list[Sight]:
        """The .mod files of those of a build list that were not read before: they come next."""
        found = [
            each._replace(kind="mod")
            for each in sights
            if self.asked.get(each.path) != each.version
        ]
        self.unread.update((each.path, each.version) for each in found)
        return found

    def note_requirements(self, content: GoMod) -> None:
        """Of a module whose .zip is here. A higher version than was guessed takes its place."""
        for path, version, _ in content.requirements:
            higher = _note_higher(self.required, path, version) and path in self.imported
            if higher and (path, self.sources.get(path)) not in self.zips:
                self.sources.pop(path, None)
                self.missing.add(path)

    def note_imports(self, packages: Iterable[str]) -> set[str]:
        """The modules, as far as they are known, of those packages that are new."""
        found = set()
        for package in packages:
            path = package
            while path and path not in self.sources and path not in self.required:
                path = path.rpartition("/")[0]
            if path and package not in self.imported.setdefault(path, set()):
                self.imported[path].add(package)
                found.add(path)
        return found


def _note_higher(highest: dict[str, str], path: str, version: str) -> bool:
    """Whether a version is higher than what is known of a module; then it is what is known."""
    is_higher = semver_key(highest.get(path, "")) < semver_key(version)
    if is_higher:
        highest[path] = version
    return is_higher


class ReadAhead:
    """Fetches what a client will ask next while it is busy with what it has. Guesses follow what
    the go command does:

    - It reads the go.mod files of all that a module requires where that is older than Go 1.17, and
      of the main module's requirements in the order of their paths (modload.readModGraph). So from
      a .mod follow those of its requirements: all of them, or else those with greater paths.
    - `go mod download` then asks .info and .zip in the order of paths, of the highest versions of
      what it has read, and .info, .mod and .zip of what that names. `go build` asks the .zip
      alone, of what is imported, and of its own packages we know nothing; but each .zip that
      comes tells what those in it import in turn.
    - `go get` asks a list, then .info, .mod and .zip of the newest version in it, then the .zip
      of what that requires and imports, at last in the order of paths the list of each module
      whose .zip it has, and .info and .mod of the newest version (modload.CheckDeprecations).
      Tools that look for news ask lists and .info alone, so these never lead to a .zip.

    A guess is never in the way: few run at once, each kind stops when guesses go unused, one that
    a client asks for meanwhile is the same flight, and none is made for a minute after an upstream
    has said that it is too much."""

    _THREADS, _CLIENTS, _MEMORY = 12, 64, 20_000  # the last of each client; less if many
    _LONGEST_PATH = 500
    _LONGEST = 1 << 18  # bytes of a go.mod
    _WINDOW = 20  # modules ahead of a download
    _READING = 5.0  # seconds of computing for a client's session
    _FORGET = 60.0  # seconds after which a client's next request begins something new

    def __init__(self, policy: Policy, storage: Storage) -> None:
        self._policy = policy
        self._storage = storage
        self._sessions: collections.OrderedDict[str, _Session] = collections.OrderedDict()
        self._resting = 0.0  # until this monotonic time
        self._mind = Lane("mind", 1)  # sessions belong to this one thread
        self._lane = Lane("ahead", self._THREADS, room=Lane.TOGETHER // 2)

    def saw(self, sight: Sight) -> None:
        """Takes note of a request; returns at once."""
        if len(sight.path) <= self._LONGEST_PATH:
            self._mind.do(lambda: self._think(sight))

    def _think(self, sight: Sight) -> None:
        session = self._session(sight.client)
        guessed = sight.name in session.unused[sight.kind]
        if guessed:
            session.note_use(sight)
        if sight.here and not guessed:
            session.note_here(sight)
            return
        with contextlib.suppress(ProxyError):
            _THOUGHTS[sight.kind](self, session, sight._replace(here=""))

    def _session(self, client: str) -> _Session:
        session = self._sessions.pop(client, None)
        now = time.monotonic()
        share = 8 * self._MEMORY // max(8, len(self._sessions) + 1)
        if session is None or now - session.seen > self._FORGET or session.size() > share:
            session = _Session()
        session.seen = now
        self._sessions[client] = session
        oldest = next(iter(self._sessions.values()))
        if len(self._sessions) > self._CLIENTS or now - oldest.seen > self._FORGET:
            self._sessions.popitem(last=False)
        return session

    def after_list(self, session: _Session, sight: Sight) -> None:
        """go get, or a look for upgrades."""
        if sight.version:
            self._guess(session, sight._replace(kind="info"))
            self._guess(session, sight._replace(kind="mod"))
        zips = {path for path, _ in session.zips}
        if sight.path in zips:
            later = (path for path in zips if path > sight.path)
            for path in heapq.nsmallest(self._WINDOW, later):
                self._guess(session, sight._replace(path=path, version=""))

    def after_info(self, session: _Session, sight: Sight) -> None:
        """Of something whose .mod was read before: the download of a build list."""
        session.lists |= session.asked.get(sight.path) == sight.version
        if not session.lists or session.listed(sight.path) != sight.version:
            session.info = (sight.path, sight.version)
            self._guess(session, sight._replace(kind="mod"))
            return
        self._guess(session, sight._replace(kind="zip"))
        ahead = session.next_listed(sight, self._WINDOW)
        for each in (*ahead, *session.note_unread([sight, *ahead])):
            self._guess(session, each)

    def after_mod(self, session: _Session, sight: Sight) -> None:
        """Part of reading a module graph, unless it only completes a .zip or an .info. After its
        own .info, its .zip is likely next, and it may be all that is wanted: the next .mod tells.
        """
        if (sight.path, sight.version) in session.zips:
            return
        _note_higher(session.asked, sight.path, sight.version)
        if (sight.path, sight.version) in session.unread:
            return
        waiting, session.waiting = session.waiting, []
        if (sight.path, sight.version) == session.info and not waiting:
            self._guess(session, sight._replace(kind="zip"))
            session.waiting.append(sight)
            return
        for each in (*waiting, sight):
            self._follow(session, each)

    def after_zip(self, session: _Session, sight: Sight) -> None:
        """Part of a download; or, without its .info first, of a build, which asks for the .mod
        when it has it, and for the .info of all of them at its end."""
        session.zips.add((sight.path, sight.version))
        session.sources[sight.path] = sight.version
        if session.downloads:
            for ahead in session.next_listed(sight, self._WINDOW):
                self._guess(session, ahead, self._WINDOW)
        elif sight.path != _TOOLCHAIN:
            self._guess(session, sight._replace(kind="mod"))
            self._guess(session, sight._replace(kind="info"), len(session.zips))
            self._need(session, sight)

    def _need(self, session: _Session, sight: Sight) -> None:
        """After the .zip of a module that was asked for by name, one of what it requires tells
        that it is being built, and that others will follow. They are not a few of many: a go.mod
        that prunes lists all that its packages import, and little else."""
        if (sight.path, sight.version) == session.info:
            content = self._read(sight)
            ordered = sorted(content.requirements, key=lambda one: not one.direct)
            session.needs = {one.path: one.version for one in ordered if content.prunes}
        elif session.needs.get(sight.path) == sight.version:
            for path, version in session.needs.items():
                if (path, version) not in session.zips:
                    ahead = sight._replace(path=path, version=version)
                    self._guess(session, ahead, session.used["zip"])
                    self._guess(session, ahead._replace(kind="mod"))

    def _look_into(self, session: _Session, sight: Sight) -> None:
        """Finds out what a .zip imports that is here or about to come."""
        packages = [*session.imported.get(sight.path, ())]
        if session.reading < self._READING and not session.needs:
            self._soon(lambda: self._look(session, sight, packages))

    def _soon(self, work: Callable[[], object]) -> None:
        self._lane.do(lambda: time.monotonic() < self._resting or work())

    @contextlib.contextmanager
    def _politely(self) -> Iterator[None]:
        try:
            with hastily():
                yield
        except Overloaded:
            self._resting = time.monotonic() + self._FORGET
        except ProxyError:
            pass  # it will go wrong for a client, and be told

    def _look(self, session: _Session, sight: Sight, packages: Sequence[str]) -> None:
        with self._politely():
            mirror = self._policy.public(sight.path)
            answer = mirror.large(Artifact(sight.path, sight.version, "zip"), Reach.FETCH)
            assert isinstance(answer.body, FileBlob)
            with contextlib.closing(answer.body) as blob:
                began = time.thread_time()
                found = imports_in_zip(blob.reading(), sight.path, sight.version, packages)
                spent = time.thread_time() - began
            self._mind.do(lambda: self._unroll(session, sight, found, spent))

    def _unroll(self, session: _Session, sight: Sight, imports: Set[str], spent: float) -> None:
        """Imports lead to other modules, and within those whose .zip is known on to others."""
        session.reading += spent
        with contextlib.suppress(ProxyError):
            session.note_requirements(self._read(sight))
        for path in session.note_imports(imports) - {sight.path}:
            if path in session.sources:
                self._look_into(session, sight._replace(path=path, version=session.sources[path]))
            else:
                session.missing.add(path)
        self._guess_missing(session, sight)

    def _guess_missing(self, session: _Session, sight: Sight) -> None:
        """The .zip of what is imported, and the .mod that is asked right after it."""
        session.missing -= session.sources.keys()
        for path in sorted(session.missing):
            version = session.asked.get(path) or session.required[path]
            ahead = sight._replace(path=path, version=version, kind="zip")
            if self._guess(session, ahead, len(session.zips) // 4):
                session.sources[path] = version
                self._guess(session, ahead._replace(kind="mod"))

    def _read(self, sight: Sight) -> GoMod:
        """Nothing of what is far longer than any go.mod that is written for use."""
        mirror = self._policy.public(sight.path)
        artifact = Artifact(sight.path, sight.version, "mod")
        data = mirror.small(artifact, Reach.STORED).data
        return read_go_mod(data if len(data) <= self._LONGEST else b"")

    def _follow(self, session: _Session, sight: Sight) -> None:
        """The .mod files that reading this one leads to."""
        content = self._read(sight)
        if session.asked.get(sight.path) == sight.version:
            session.note_names(content)
        for path, version, _ in content.requirements:
            is_ahead = path > sight.path or not content.prunes
            higher = is_ahead and _note_higher(session.guessed, path, version)
            if higher or not content.prunes:
                self._guess(session, Sight(sight.client, path, version, "mod"))

    def _guess(self, session: _Session, sight: Sight, more: int = 0) -> bool:
        """False if too many guesses are unused."""
        unused = session.unused[sight.kind]
        try:
            name = sight.name
        except BadName:  # a go.mod may require anything
            return False
        if name in unused:
            return True
        if len(unused) > _UNUSED[sight.kind] + more + session.used[sight.kind]:
            return False
        if self._storage.stamp(name) is None:
            unused.add(name)
            self._soon(lambda: self._fetch(session, sight))
        elif sight.kind == "mod":
            self._go_on(session, sight)
        return True

    def _fetch(self, session: _Session, sight: Sight) -> None:
        told = {"goproxy.module": sight.path, "goproxy.version": sight.version}
        apart = TRACER.apart(f"read ahead {sight.kind}", told)
        with self._politely(), apart:
            _FETCHES[sight.kind](self._policy.public(sight.path), sight)
            if sight.kind in ("list", "mod"):
                self._mind.do(lambda: self._go_on(session, sight))

    def _go_on(self, session: _Session, sight: Sight) -> None:
        """A list leads to the newest version in it. What is older than Go 1.17 leads on even if
        the client has not asked it yet."""
        with contextlib.suppress(ProxyError):
            building = session.sources.get(sight.path) == sight.version
            if sight.kind == "list":
                answer = self._policy.public(sight.path).versions(sight.path, Reach.STORED)
                found = sight._replace(version=newest(answer.data.decode().split()))
                self._guess(session, found._replace(kind="info"))
                self._guess(session, found._replace(kind="mod"))
            elif building:
                self._look_into(session, sight)
            elif (sight.path, sight.version) in session.unread:
                return  # pruned: the client does not read on either
            elif sight.name not in session.followed:
                session.followed.add(sight.name)
                if not self._read(sight).prunes:
                    self._follow(session, sight)

    def close(self) -> None:
        self._mind.close()
        self._lane.close()


def _fetch_small(mirror: Modules, sight: Sight) -> None:
    mirror.small(Artifact(sight.path, sight.version, sight.kind), Reach.FETCH)


def _fetch_list(mirror: Modules, sight: Sight) -> None:
    if not mirror.versions(sight.path, Reach.FETCH).body:
        mirror.resolve(sight.path, LATEST, Reach.FETCH)  # as the go command does


def _fetch_zip(mirror: Modules, sight: Sight) -> None:
    answer = mirror.large(Artifact(sight.path, sight.version, sight.kind), Reach.FETCH)
    assert isinstance(answer.body, FileBlob)
    with contextlib.closing(answer.body) as blob:
        blob.wait_for_end()


_FETCHES = {"info": _fetch_small, "list": _fetch_list, "mod": _fetch_small, "zip": _fetch_zip}
# How many guesses of a kind may go unused, besides as many as were used.
_UNUSED = {"info": 32, "list": 16, "mod": 64, "zip": 4}
_TOOLCHAIN = "golang.org/toolchain"  # nothing but its .zip is ever asked
_THOUGHTS: dict[str, Callable[[ReadAhead, _Session, Sight], None]] = {
    "info": ReadAhead.after_info,
    "list": ReadAhead.after_list,
    "mod": ReadAhead.after_mod,
    "zip": ReadAhead.after_zip,
}


class Ledger:
    """What we have seen of one checksum database: the largest tree head, and in the store the tiles
    that prove every record and tree head seen to be part of it, as x/mod/sumdb.Client does. Without
    a key to verify with, the tiles are stored all the same.

    So a client finds in the store what it needs, in whatever order it meets records: the edge of
    each tree, and full tiles where a larger tree seen has outgrown that."""

    _SIGNED = 100  # notes remembered; many records come with the same one
    _KNOWN = 500  # proven tiles remembered, of 8 KiB at most

    def __init__(self, database: SumDbName, sumdb: SumDb, cache: Cache) -> None:
        self._name = database.name
        self._verifier = database.verifier
        self._sumdb = sumdb
        self._cache = cache
        self._side = f"{OWN_MARK}sumdb/{database.name}"
        self._mutex = threading.Lock()
        self._largest: TreeHead | None = None
        self._signed: TtlCache[TreeHead] = TtlCache(self._SIGNED)
        self._entered: TtlCache[bool] = TtlCache(self._SIGNED)
        self._known: dict[Tile, bytes] = {}

    def enter(self, record: Record) -> None:
        """Proves a record and stores what does. Raises Untrusted for one that does not count, and
        other ProxyErrors where tiles cannot be had."""
        head = self._open(record.note)
        if not (self._largest and self._entered.get(str(head))):
            self._prove(head, ())
            self._grow(head, record.note)
            self._entered.put(str(head), True, math.inf)
        largest = self._largest or head
        if record.number >= largest.size:
            raise Untrusted(f"{self._name}: a record from beyond the end")
        known = self._known
        wanted = proving_tiles(largest.size, [(0, record.number // TILE_WIDTH)])
        tiles = self._fetch(largest, wanted, known)
        self._known = {} if len(known) > self._KNOWN else known
        self._known.update((tile, tiles[tile.level, tile.number]) for tile in wanted)
        if self._verifier and hash_at(tiles, 0, record.number) != record_hash(record.text):
            raise Untrusted(f"{self._name}: record {record.number} is not in the tree")

    def judge(self, tile: Tile, data: bytes) -> None:
        """Holds what a client was given for a tile against the tree, the newest if it takes that.
        Raises Untrusted for what is no part of it, which then is stored no more."""
        if not self._verifier:
            return
        first = tile.number * TILE_WIDTH
        head = self._largest or self._load()
        if head.size >> 8 * tile.level < first + tile.width:
            try:
                note = self._sumdb.latest(self._name, Reach.FETCH).data
                self._grow(self._open(note), note)
            except Untrusted:
                raise
            except ProxyError:
                pass  # what is known has to do
            head = self._largest or head
        if head.size >> 8 * tile.level <= first:
            return  # nobody knows
        place = (tile.level, tile.number)
        told = self._prove(head, [place])[place]
        if told[: len(data)] != data[: len(told)]:
            self._sumdb.drop_tiles(self._name, [tile])
            raise Untrusted(f"{self._name}: {tile.name} is not part of the tree")

    def _open(self, note: bytes) -> TreeHead:
        if not self._verifier:
            return read_tree(note)
        key = hashlib.sha256(note).hexdigest()
        head = self._signed.get(key)
        if head is None:
            head = read_tree(open_note(note, self._verifier))
            self._signed.put(key, head, math.inf)
        return head

    def _grow(self, head: TreeHead, note: bytes) -> None:
        """Holds a head against the largest one seen, and makes it that if it is. Raises Untrusted
        where they are not parts of one tree: the database tells people different things."""
        while True:
            largest = self._largest or self._load()
            old, new = (head, largest) if head.size <= largest.size else (largest, head)
            edge = edge_tiles(old.size)
            tiles = self._prove(new, [(tile.level, tile.number) for tile in edge])
            if self._verifier and old.size and tree_hash(old.size, tiles) != old.hash:
                raise Untrusted(
                    f"{self._name}: the trees of {old.size} and {new.size} records contradict each "
                    f"other: {old.hash.hex()}, {new.hash.hex()}"
                )
            with self._mutex:
                grown = self._largest in (None, largest)
                if grown:
                    self._largest = new
            if grown and new is head:
                self._cache.keep(self._side, note, replace=True)
            if grown:
                return

    def _load(self) -> TreeHead:
        try:
            return self._open(self._cache.small(self._side, Reach.STORED, bytes).data)
        except ProxyError:
            return TreeHead(0, b"")

    def _prove(self, head: TreeHead, places: Iterable[tuple[int, int]]) -> Tiles:
        """What the tiles at these places, and all between them and the edge, hold."""
        return self._fetch(head, proving_tiles(head.size, places), {})

    def _fetch(self, head: TreeHead, wanted: Sequence[Tile], known: Mapping[Tile, bytes]) -> Tiles:
        """What tiles hold. Those that do not fit are fetched again once: what is stored may be
        spoilt."""
        fresh = [tile for tile in wanted if tile not in known]
        sure = {(tile.level, tile.number): known[tile] for tile in wanted if tile in known}
        for last in (False, True):
            tiles = {**sure, **self._sumdb.tiles(self._name, fresh)}
            try:
                if self._verifier and head.size:
                    check_tiles(head, tiles, sure.keys())
                break
            except Untrusted:
                self._sumdb.drop_tiles(self._name, fresh)
                self._known = {}
                if last:
                    raise
        return tiles


class SumDbOrigin:
    """Where checksum databases are asked: through an upstream that says it supports that, then at
    their own addresses, since many networks reach only the one."""

    _LIMIT = 1 << 20
    _SUPPORTED_SECONDS, _UNSUPPORTED_SECONDS = 3600.0, 60.0

    def __init__(
        self, databases: Sequence[SumDbName], upstreams: Sequence[Url], client: Client
    ) -> None:
        self.databases = {database.name: database for database in databases}
        self._upstreams = upstreams
        self._client = client
        self._support: TtlCache[bool] = TtlCache(100)
        self._questions: Flights[Future[bool]] = Flights()

    def fetch(self, database: str, what: str) -> bytes:
        """What a database has at a path. Raises NotFound and other ProxyErrors."""
        through = [
            dataclasses.replace(url, path=f"{url.path}/sumdb/{database}") for url in self._upstreams
        ]
        bases = [url for url in through if self._supports(url)] + [self.databases[database].url]
        return first_of(
            [
                (functools.partial(fetch_small, self._client, below(base, what), self._LIMIT), True)
                for base in bases
            ]
        )

    def _supports(self, base: Url) -> bool:
        """Whether an upstream proxies a database; asked once, however many want to know."""
        supported = self._support.get(str(base))
        if supported is not None:
            return supported
        return done_once(self._questions, str(base), lambda: self._ask_supported(base))

    def _ask_supported(self, base: Url) -> bool:
        try:
            fetch_small(self._client, below(base, "supported"), self._LIMIT)
            supported, seconds = True, self._SUPPORTED_SECONDS
        except ProxyError:
            supported, seconds = False, self._UNSUPPORTED_SECONDS
        self._support.put(str(base), supported, seconds)
        return supported


_TILE = re.compile(
    r"tile/8/(?P<level>data|[0-9]{1,2})/(?:x[0-9]{3}/)*[0-9]{3}(?:\.p/(?P<part>[0-9]{1,3}))?"
)


def read_tile(name: str) -> Tile:
    """The tile of hashes that has this name below its database."""
    _, _, level, place = name.split("/", 3)
    number, _, width = place.partition(".p/")
    return Tile(int(level), int(re.sub("[x/]", "", number)), int(width or TILE_WIDTH))


def stored_tile(storage: Storage, name: str) -> str:
    """A tile, or where that is not stored, one that begins with it."""
    full, _, width = name.partition(".p/")
    parts = [part for part in storage.names(f"{full}.p/") if part.isdecimal()]
    wider = sorted(int(part) for part in parts if int(part) >= int(width or TILE_WIDTH))
    return f"{full}.p/{wider[0]}" if wider else full


class SumDb:
    """Checksum databases, so that clients that reach only us can verify (Go: "Proxying a checksum
    database", go.dev/design/25530-sumdb), and so that we can. Records and tiles are kept for ever.
    """

    _THREADS, _REMEMBERED = 12, 10_000
    # Seconds that a fill waits for its record when it is there itself; the second, if the database
    # failed the last time it was asked.
    _PATIENCE, _IMPATIENCE = 10.0, 1.0
    _SILENCE = 30.0  # seconds that a database which failed is not asked for comparisons

    def __init__(self, origin: SumDbOrigin, cache: Cache, policy: Policy, log: Log) -> None:
        self._origin = origin
        self._cache = cache
        self._policy = policy
        self._log = log
        self._marked: set[str] = set()
        self._proven: TtlCache[bool] = TtlCache(self._REMEMBERED)
        self._silent: TtlCache[str] = TtlCache(100)
        self._suspect: set[str] = set()
        self._lane = Lane("record", self._THREADS)
        self._tile_lane = Lane("tile", self._THREADS)
        self._ledgers = {
            name: Ledger(database, self, cache) for name, database in origin.databases.items()
        }

    def check_known(self, database: str) -> None:
        """Raises NotFound for a database that is not proxied: clients then ask it themselves."""
        if database not in self._ledgers:
            raise NotFound("this checksum database is not proxied")

    def latest(self, database: str, reach: Reach) -> Answer:
        """The signed tree head."""
        self.check_known(database)
        return self._cache.changing(
            f"sumdb/{database}/latest", reach, lambda: self._fetch(database, "latest")
        )

    def lookup(self, database: str, module: str, version: str, reach: Reach) -> Answer:
        """The record of a module version; `module` and `version` are unescaped. What proves it is
        fetched, too, but not waited for."""
        answer = self._lookup(database, module, version, reach)
        if answer.verdict is Verdict.MISS:
            self._later(f"{module}@{version}", lambda: self._prove(database, module, version))
        return answer

    def _lookup(self, database: str, module: str, version: str, reach: Reach) -> Answer:
        self.check_known(database)
        self._policy.check_public(module, version)
        name = self._lookup_name(database, module, version)

        def fetch() -> bytes:
            data = self._fetch(database, name.partition(f"{database}/")[2])
            if f"\n{module} {version} h1:".encode() not in data:
                raise BadUpstream(f"{database}: the record is not about {module}@{version}")
            return data

        return self._cache.small(name, reach, fetch)

    def gather(self, module: str, version: str, reach: Reach) -> None:
        """Brings the records of a module version and what proves them into the store, from each
        database that has one."""
        for database in self._ledgers:
            with contextlib.suppress(NotFound):
                if reach is Reach.FETCH:
                    self._prove(database, module, version)

    def begin(self, path: str, version: str) -> Comparison:
        """Begins to ask what the databases that we have keys for say of a module version."""
        promises: dict[str, Future[bytes]] = {}
        with contextlib.suppress(NotFound):
            self._policy.check_public(path, version)
            for name, database in self._origin.databases.items():
                if database.verifier:
                    work = functools.partial(self._testimony, name, path, version)
                    promises[name] = self._lane.submit(work)
        return functools.partial(self._compare, promises, path)

    def _compare(
        self, promises: Mapping[str, Future[bytes]], path: str, version: str, h1: str
    ) -> bool:
        """A fill is not refused because a database cannot be asked; that is told in the log."""
        results = [
            self._judge(database, promise, (path, version, h1))
            for database, promise in promises.items()
        ]
        return "agrees" in results

    def _judge(self, database: str, promise: Future[bytes], line: Sequence[str]) -> str:
        """What one database says of a go.sum line, as a word for METRICS."""
        module, result = f"{line[0]}@{line[1]}", "contradicts itself"
        try:
            result = self._found(database, promise, line)
        except Untrusted as error:
            self._log.security(f"{module}: {error}")
            result = "mismatch" if isinstance(error, Mismatch) else result
            raise
        except FutureTimeout:
            result = "not asked"
            self._note_silence(database, "it did not answer in time")
            self._log.error(f"{module}: not compared with {database}: no answer yet")
        except ProxyError as error:
            result = "not asked"
            self._log.error(f"{module}: not compared with {database}: {error}")
        finally:
            METER.add("goproxy_comparisons_total", result=result)
        return result

    def _found(self, database: str, promise: Future[bytes], line: Sequence[str]) -> str:
        patience = self._IMPATIENCE if database in self._suspect else self._PATIENCE
        lines = promise.result(patience).decode("utf-8", "replace").split("\n")
        told = [each for each in lines if each.startswith(f"{line[0]} {line[1]} ")]
        if told and " ".join(line) not in told:
            raise Mismatch(f"checksum mismatch: {database} has {told[0]}, this is {line[2]}")
        return "agrees" if told else "unknown"

    def _testimony(self, database: str, path: str, version: str) -> bytes:
        """The text of a record that counts, b"" if there is none."""
        silent = self._silent.get(database)
        if silent:
            raise Unreachable(silent)
        try:
            text = self._prove(database, path, version).text
        except NotFound:
            text = b""
        except Untrusted:
            raise
        except ProxyError as error:
            self._note_silence(database, str(error))
            raise
        self._suspect.discard(database)
        return text

    def _note_silence(self, database: str, why: str) -> None:
        self._silent.put(database, why, self._SILENCE)
        self._suspect.add(database)

    def _prove(self, database: str, path: str, version: str) -> Record:
        """A record that has been proven, once. One that does not count is not kept."""
        data = self._lookup(database, path, version, Reach.FETCH).data
        key = f"{database} {hashlib.sha256(data).hexdigest()}"
        try:
            record = read_record(data)
            if not self._proven.get(key):
                self._ledgers[database].enter(record)
                self._proven.put(key, True, math.inf)
        except Untrusted:
            self._drop(self._lookup_name(database, path, version))
            raise
        return record

    def _later(self, subject: str, prove: Callable[[], object]) -> None:
        """For a client, who has its answer meanwhile and will find the tiles."""

        def work() -> None:
            try:
                prove()
            except Untrusted as error:
                self._log.security(f"{subject}: {error}")
            except ProxyError:
                pass  # whoever needs the tiles will be told

        self._lane.do(work)

    def prove_tile(self, database: str, what: str, data: bytes) -> None:
        """For a client that was given a tile as it came; one that does not fit is not kept."""
        ledger = self._ledgers[database]
        self._later(f"{database}/{what}", lambda: ledger.judge(read_tile(what), data))

    @staticmethod
    def _lookup_name(database: str, path: str, version: str) -> str:
        return f"sumdb/{database}/lookup/{escape_path(path)}@{escape_version(version)}"

    def _drop(self, name: str) -> None:
        with contextlib.suppress(ProxyError):
            self._cache.storage.remove(name)

    def tiles(self, database: str, wanted: Sequence[Tile]) -> Tiles:
        """What tiles hold, several fetched at a time."""
        promises = [
            self._tile_lane.submit(functools.partial(self.tile, database, tile.name, Reach.FETCH))
            for tile in wanted
        ]
        places = [(tile.level, tile.number) for tile in wanted]
        return dict(zip(places, (promise.result().data for promise in promises)))

    def drop_tiles(self, database: str, unwanted: Iterable[Tile]) -> None:
        """So that they are fetched again, and with them all that they might be cut from."""
        for tile in unwanted:
            full = f"sumdb/{database}/{tile._replace(width=TILE_WIDTH).name}"
            self._drop(full)
            with contextlib.suppress(StoreDown):
                for part in self._cache.storage.names(f"{full}.p/"):
                    self._drop(f"{full}.p/{part}")

    def tile(self, database: str, what: str, reach: Reach) -> Answer:
        """A tile; a partial one is cut from a wider one where that is stored."""
        self.check_known(database)
        match = _TILE.fullmatch(what)
        if not match:
            raise BadName("malformed tile")
        width = int(match["part"] or TILE_WIDTH)
        if match["part"] and not 0 < width < TILE_WIDTH:
            raise BadName("malformed tile")
        size = None if match["level"] == "data" else width * HASH_SIZE
        name = f"sumdb/{database}/{what}"
        if match["part"] and size:
            with contextlib.suppress(NotFound, StoreDown):
                return self._cache.small(name, Reach.STORED, bytes)
            with contextlib.suppress(NotFound, StoreDown):
                found = stored_tile(self._cache.storage, name)
                wider = self._cache.small(found, Reach.STORED, bytes)
                if len(wider.data) >= size:
                    return self._cut(name, wider, size, reach)

        def fetch() -> bytes:
            data = self._fetch(database, what)
            if not data or size not in (None, len(data)):
                raise BadUpstream(f"{database}: a tile of the wrong length")
            return data

        return self._cache.small(name, reach, fetch)

    def _cut(self, name: str, wider: Answer, size: int, reach: Reach) -> Answer:
        """A folder alone cannot cut, so the piece is stored, too."""
        if reach is Reach.READY:
            raise MustWait
        piece = wider.data[:size]
        if reach is Reach.FETCH:
            self._cache.keep(name, piece, replace=False)
        return wider._replace(body=piece, stored=None)

    def _fetch(self, database: str, what: str) -> bytes:
        data = self._origin.fetch(database, what)
        if database not in self._marked:
            # The go command asks a file:// proxy for records only if it holds this file.
            self._cache.keep(f"sumdb/{database}/supported", b"", replace=False)
            self._marked.add(database)
        return data

    def close(self) -> None:
        self._lane.close()
        self._tile_lane.close()


# Upkeep


def unhurried(items: Iterable[T]) -> Iterator[T]:
    """The same, with pauses: a long walk must not keep the threads that serve from running."""
    for number, item in enumerate(items):
        if number % _BREATH == 0:
            time.sleep(_PAUSE)
        yield item


_BREATH, _PAUSE = 32, 0.0003  # items, seconds


def stored_modules(items: Iterable[Item]) -> Iterator[tuple[str, dict[str, list[Item]]]]:
    """Modules, each with its stored versions and their files, from a walk over a store; a module
    comes in parts if the walk comes back to it."""
    for _, group in itertools.groupby(items, key=lambda item: item.name.rpartition("/")[0]):
        path, versions = "", dict[str, list[Item]]()
        for item in group:
            artifact = stored_artifact(item.name)
            if artifact:
                path = artifact.path
                versions.setdefault(artifact.version, []).append(item)
        if versions:
            yield path, versions


def files_of(storage: Storage, path: str, version: str) -> list[Item]:
    """What is stored of a version, the .info first and the .mod last."""
    prefix = f"{escape_path(path)}/@v/"
    stem = f"{prefix}{escape_version(version)}"
    names = [f"{stem}.{kind}" for kind in ("info", "zip", "ziphash", "mod")]
    found = [item for item in storage.walk(prefix) if item.name in names]
    return sorted(found, key=lambda item: names.index(item.name))


def take_out(storage: Storage, path: str, version: str) -> None:
    """Removes a version whole, and it from the answers that name it. Others may do so at the same
    time."""
    for item in files_of(storage, path, version):
        with contextlib.suppress(NotFound):
            storage.remove(item.name)
    forget_answers(storage, path, version)


def forget_answers(storage: Storage, path: str, version: str) -> None:
    """Drops what stored answers say of a version, so that they are asked for anew."""
    prefix = f"{escape_path(path)}/@v/"
    queries = [f"{escape_path(path)}/@latest"]
    for name in storage.names(prefix):
        if name.endswith(".info") and not stored_artifact(prefix + name):
            queries.append(prefix + name)
    for query in queries:
        with contextlib.suppress(NotFound, BadUpstream):
            if read_info(read_small(storage, query, MAX_INFO)).version == version:
                storage.remove(query)
    with contextlib.suppress(NotFound):
        _shorten_list(storage, f"{prefix}list", version)


def _shorten_list(storage: Storage, name: str, version: str) -> None:
    listed = read_small(storage, name, _MAX_SMALL).decode("utf-8", "replace").split()
    kept = [line for line in listed if line != version]
    if kept == listed:
        return
    storage.remove(name)
    if kept:  # for those who read the folder itself
        with drafting(storage) as draft:
            draft.modified = 0.0  # so old that we ask upstream before we give it out
            draft.write(_lines(kept))
            storage.adopt(name, draft)


class Uses:
    """Stored names that clients were given, gathered without a lock or a system call."""

    _LIMIT = 50_000

    def __init__(self) -> None:
        self._names: set[str] = set()

    def note(self, name: str) -> None:
        if len(self._names) < self._LIMIT:
            self._names.add(name)

    def take(self) -> list[str]:
        """What was gathered since the last time."""
        names = self._names.copy()  # one step of the interpreter, like the next
        self._names -= names
        return list(names)


class LastUses:
    """When versions were last asked for, by the beginning of their files' names. Only the latest
    are known; others count by the time they were stored. A side file keeps it over restarts."""

    _NAME, _LIMIT, _BYTES = OWN_MARK + "used", 100_000, 64 << 20

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._moments: collections.OrderedDict[str, float] = collections.OrderedDict()
        self._changed = False

    def note(self, names: Iterable[str], moment: float) -> None:
        for name in names:
            stem = name.rpartition(".")[0]
            self._moments[stem] = moment
            self._moments.move_to_end(stem)
            self._changed = True
        while len(self._moments) > self._LIMIT:
            self._moments.popitem(last=False)

    def last(self, stem: str) -> float:
        """Seconds since the epoch, 0 if that is not known."""
        return self._moments.get(stem, 0.0)

    def read(self) -> None:
        """Adds what this or another process has written. A broken file is as good as none."""
        try:
            text = zlib.decompress(read_small(self._storage, self._NAME, self._BYTES)).decode()
            pairs = [(stem, float(moment)) for moment, stem in map(str.split, text.splitlines())]
        except (NotFound, BadUpstream, ValueError, zlib.error):
            return
        moments = {stem: max(moment, self.last(stem)) for stem, moment in pairs}
        merged = {**self._moments, **moments}
        latest = sorted(merged.items(), key=operator.itemgetter(1))[-self._LIMIT :]
        self._moments = collections.OrderedDict(latest)

    def write(self) -> None:
        """Writes what is new, united with what others have written. Raises StoreDown."""
        if self._changed:
            self.read()
            text = "".join(f"{moment:.6f} {stem}\n" for stem, moment in self._moments.items())
            self._storage.put(self._NAME, zlib.compress(text.encode(), 1))
            self._changed = False


class Evictor:
    """Keeps a store below `limit` bytes: versions that nobody has asked for longest go first.

    One walk at the start tells how much there is and who goes next; after that, what this process
    stores is counted as it comes. Another walk follows when those to go next have run out, or to
    see what others have stored: not before a minute, or 50 times as long as a walk takes, is over.
    """

    _TURN, _WALK, _WALK_SHARE, _SAVE, _VICTIMS = 10.0, 60.0, 50, 600.0, 20_000

    def __init__(
        self, storage: Storage, limit: int, spares: Callable[[str, str], bool], log: Log
    ) -> None:
        """`spares` tells which versions never go. Starts a thread."""
        self.uses = Uses()
        self.on_removed: Callable[[str, str], None] = lambda path, version: None
        self._storage = storage
        self._limit = limit
        self._spares = spares
        self._log = log
        self._last = LastUses(storage)
        self._news: collections.deque[tuple[str, int]] = collections.deque()
        # A heap: last use, path, version, and how many bytes go with it if others remove it.
        self._victims: list[tuple[float, str, str, int]] = []
        self._gone: set[tuple[str, str]] = set()  # removed since the last walk: counted already
        self._total = 0
        self._is_cut = False  # whether the last walk saw more than _victims can hold
        self._walk_at = self._save_at = 0.0
        self._ended = False
        self._wake = threading.Event()
        self._thread = begin_thread(self._run, "evictor")

    def stored(self, name: str, size: int) -> None:
        """Counts what has just been stored for good; returns at once."""
        self._news.append((name, size))
        self._wake.set()

    def _run(self) -> None:
        self._save_at = time.monotonic() + self._SAVE
        self._try(self._last.read)
        while not self._ended:
            self._try(self._turn)
            self._wake.wait(self._TURN)
            self._wake.clear()
        self._last.note(self.uses.take(), time.time())
        self._try(self._last.write)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ProxyError as error:
            self._log.error(f"-max-size: {error}")

    def _turn(self) -> None:
        now = time.monotonic()
        self._last.note(self.uses.take(), time.time())
        self._count_news()  # before a walk, which counts the same files anew
        if now >= self._walk_at:
            self._walk()
        self._evict()
        if now >= self._save_at:
            self._save_at = now + self._SAVE
            self._last.write()

    def _count_news(self) -> None:
        while self._news:
            name, size = self._news.popleft()
            self._total += size
            artifact = stored_artifact(name)
            if artifact and not self._spares(artifact.path, artifact.version):
                entry = (time.time(), artifact.path, artifact.version, 0)
                heapq.heappush(self._victims, entry)

    def _walk(self) -> None:
        began = time.monotonic()
        self._walk_at = began + self._WALK
        self._total = 0
        found = heapq.nsmallest(self._VICTIMS + 1, self._candidates())
        self._is_cut = len(found) > self._VICTIMS
        self._victims, self._gone = found, set()
        pause = self._WALK_SHARE * (time.monotonic() - began)
        self._walk_at = time.monotonic() + max(self._WALK, pause)

    def _candidates(self) -> Iterator[tuple[float, str, str, int]]:
        for path, versions in stored_modules(self._counted()):
            for version, items in versions.items():
                if not self._spares(path, version):
                    yield self._used(items), path, version, sum(item.size for item in items)

    def _counted(self) -> Iterator[Item]:
        for item in unhurried(self._storage.walk()):
            if self._ended:
                return
            self._total += item.size
            yield item

    def _used(self, items: Sequence[Item]) -> float:
        stem = items[0].name.rpartition(".")[0]
        return max(self._last.last(stem), *(item.modified for item in items))

    def _evict(self) -> None:
        count = size = 0
        trouble: StoreDown | None = None
        while self._total > self._limit and not self._ended:
            if not self._victims and self._is_cut and not trouble:
                self._walk()
            if not self._victims:
                break
            used, path, version, known = heapq.heappop(self._victims)
            items = files_of(self._storage, path, version)
            if items and self._used(items) > used:  # somebody has asked for it meanwhile
                heapq.heappush(self._victims, (self._used(items), path, version, known))
                continue
            known = 0 if (path, version) in self._gone else known
            freed = sum(item.size for item in items) or known
            self._gone.add((path, version))
            if items:
                try:
                    take_out(self._storage, path, version)
                except StoreDown as error:  # files of another user, perhaps: others may go
                    trouble = error
                    continue
                self.on_removed(path, version)
                count, size = count + 1, size + freed
            self._total -= freed
        if trouble:
            self._log.error(f"-max-size: {trouble}")
        METER.set("goproxy_store_bytes", self._total)
        METER.add("goproxy_evicted_versions_total", count)
        METER.add("goproxy_evicted_bytes_total", size)
        if count:
            self._log.line(f"-max-size: {count} versions removed, {size} bytes")

    def close(self) -> None:
        """Ends the thread, which writes down the last uses."""
        self._ended = True
        self._wake.set()
        self._thread.join(_FAREWELL_SECONDS)


_FAREWELL_SECONDS = 5.0


class Attic:
    """Where versions go that are moved aside: out of sight, and to be had back for 30 days."""

    PLACE = OWN_MARK + "removed/"
    SECONDS = 30 * 86400.0

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def has_other(self, name: str) -> bool:
        """Whether a file of that name is here with other bytes than the one where it was; the same
        ones are there after a move that was cut short. Raises NotFound, StoreDown."""
        with contextlib.closing(self._storage.open(name)) as there:
            try:
                here = self._storage.open(self.PLACE + name)
            except NotFound:
                return False
            with contextlib.closing(here):
                pairs = itertools.zip_longest(pieces_of(here), pieces_of(there))
                return any(one != other for one, other in pairs)

    def put_away(self, path: str, version: str) -> None:
        """Moves a version here. Raises StoreDown; then it is still where it was."""
        for item in files_of(self._storage, path, version):
            try:
                copy(self._storage, item.name, self._storage, self.PLACE + item.name)
            except NotFound:  # the file, because others have removed it, or else its new place
                with contextlib.suppress(NotFound):
                    self._storage.open(item.name).close()
                    raise StoreDown(f"{item.name} cannot be moved to {self.PLACE}") from None
        take_out(self._storage, path, version)

    def walk(self) -> Iterator[tuple[Artifact, Item]]:
        """All files here; `modified` is when they came."""
        for item in self._storage.walk(self.PLACE):
            artifact = stored_artifact(item.name[len(self.PLACE) :])
            if artifact:
                yield artifact, item

    def bring_back(self, item: Item) -> None:
        """Copies a file to where it was; if one is there, that was fetched and checked since."""
        copy(self._storage, item.name, self._storage, item.name[len(self.PLACE) :])


def restore(storage: Storage, choice: Choice) -> list[tuple[str, str]]:
    """Brings versions back from the attic, and notes that re-checks must leave them alone. One
    leaves the attic when all is done, so that a run which was killed can be repeated."""
    attic, remarks = Attic(storage), Remarks(storage)
    found: dict[tuple[str, str], list[Item]] = {}
    for artifact, item in attic.walk():
        if choice.takes(artifact.path, artifact.version):
            found.setdefault((artifact.path, artifact.version), []).append(item)
    for (path, version), items in found.items():
        for item in items:
            attic.bring_back(item)
        now = time.time()
        mine = Remark(path, version, "restored", now, now)
        others = [each for each in remarks.read() if each.path == path and each.key != mine.key]
        remarks.replace(path, [*others, mine])
        if not is_pseudo(version):
            unite_list(storage, f"{escape_path(path)}/@v/list", [version])
        for item in items:
            storage.remove(item.name)
    return sorted(found)


class Remark(NamedTuple):
    """What a re-check has seen of a stored version, or of a whole module (`version` is ""): `what`
    is absent (once), deleted, retracted, deprecated or changed; restored is a version that was
    brought back by hand. First and last seen in seconds since the epoch; `words` explain it."""

    path: str
    version: str
    what: str
    since: float
    seen: float
    words: str = ""

    @property
    def module(self) -> str:
        return f"{self.path}@{self.version}" if self.version else self.path

    @property
    def key(self) -> tuple[str, str]:
        return self.version, self.what


class Remarks:
    """The remarks of re-checks, in a side file of the store that any process may read."""

    _NAME, _BYTES = OWN_MARK + "recheck", 64 << 20

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self) -> list[Remark]:
        """All of them. Raises StoreDown."""
        try:
            raw = json.loads(read_small(self._storage, self._NAME, self._BYTES))
            return [Remark(*fields) for fields in raw]
        except (NotFound, BadUpstream, ValueError, TypeError):
            return []

    def replace(self, path: str, found: Sequence[Remark]) -> None:
        """Writes those of one module, and forgets what was not seen for as long as the attic
        keeps things."""
        until = time.time() - Attic.SECONDS
        before = self.read()
        all_now = [*(each for each in before if each.path != path), *found]
        after = sorted(each for each in all_now if each.seen > until or each.what == "restored")
        if after != before:
            self._storage.put(self._NAME, json.dumps(after).encode())


class Recheck:
    """Asks upstream about stored versions again: each once in -recheck seconds, one at a time,
    the modules in turn by a number made from their paths, so that no restart begins anew.

    A version is deleted when it was absent twice, an interval apart. Compared are Version and Time
    of the .info and the bytes of the .mod; a .zip is not fetched again."""

    _SLOTS, _LEAST_PAUSE, _NEARLY = 24, 0.25, 0.9

    def __init__(
        self,
        source: Source,
        storage: Storage,
        is_public: Callable[[str, str], bool],
        settings: Settings,
        log: Log,
    ) -> None:
        """`is_public` tells which versions may be asked about."""
        self._source = source
        self._storage = storage
        self._is_public = is_public
        self._interval = settings.recheck
        self._removes = settings.recheck_removes
        self._log = log
        self._remarks = Remarks(storage)
        self._attic = Attic(storage)
        self._ended = threading.Event()

    def start(self) -> None:
        begin_thread(self._run, "recheck")

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        seconds = self._interval / self._SLOTS
        turn = int(time.time() / seconds)
        # A clock that is put back by a year must not make it wait for a year.
        while not self._ended.wait(min(seconds, max(0.0, turn * seconds - time.time()))):
            try:
                self._ask_slot(turn % self._SLOTS)
            except ProxyError as error:
                self._log.error(f"recheck: {error}")
                self._ended.wait(seconds)
            turn = max(turn + 1, int(time.time() / seconds) - self._SLOTS)

    def _ask_slot(self, slot: int) -> None:
        modules = [
            (path, [each for each in versions if self._is_public(path, each)])
            for path, versions in stored_modules(unhurried(self._storage.walk()))
            if zlib.crc32(path.encode()) % self._SLOTS == slot
        ]
        count = sum(len(versions) for _, versions in modules)
        pause = max(self._LEAST_PAUSE, self._interval / self._SLOTS / max(1, count))
        for path, versions in modules:
            if self._ended.wait(pause * len(versions)):
                return
            try:
                if versions:
                    self.look(path, versions)
            except ProxyError as error:
                self._log.error(f"recheck: {path}: {error}")
                self._ended.wait(error.retry_after or 0)

    def look(self, path: str, versions: Sequence[str]) -> None:
        """Asks about a module now. What upstream's trouble keeps from being known stays as it was.
        Raises ProxyError."""
        news = [*self._notices(path, versions), *self._differences(path, versions)]
        known = {each.key: each for each in self._remarks.read() if each.path == path}
        now = time.time()
        found = {}
        for version, what, words in news:
            old = known.get((version, what)) or known.get((version, "absent"))
            since = old.since if old else now
            if what == "deleted" and not self._is_sure(known, version, now):
                what = "absent"
            found[version, what] = Remark(path, version, what, since, now, words)
        lasting = [each for each in known.values() if self._lasts(each, versions)]
        self._remarks.replace(path, [*lasting, *found.values()])
        for key, remark in found.items():
            if key not in known and remark.what != "absent":
                METER.add("goproxy_recheck_findings_total", finding=remark.what)
                self._log.error(f"recheck: {remark.module}: {remark.what}: {remark.words}")
            self._act(remark, versions, known)

    def _is_sure(self, known: Mapping[tuple[str, str], Remark], version: str, now: float) -> bool:
        first = known.get((version, "absent"))
        waited = first is not None and now - first.since >= self._NEARLY * self._interval
        return waited or (version, "deleted") in known

    @staticmethod
    def _lasts(remark: Remark, versions: Sequence[str]) -> bool:
        """Whether a remark holds without being seen again: what is not here is not asked about."""
        return remark.what == "restored" or bool(remark.version and remark.version not in versions)

    def _act(
        self,
        remark: Remark,
        versions: Sequence[str],
        known: Mapping[tuple[str, str], Remark],
    ) -> None:
        if remark.what not in self._removes:
            return
        for version in [remark.version] if remark.version else versions:
            if (version, "restored") not in known:
                self._attic.put_away(remark.path, version)
                self._log.line(f"recheck: {remark.path}@{version} moved aside")

    def _notices(self, path: str, versions: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """What the author says in the go.mod of the newest version."""
        try:
            listed = self._source.versions(path)
            latest = newest(listed) if listed else self._source.resolve(path, LATEST).version
            raw = bytes_of(self._source, Artifact(path, latest, "mod"))
        except NotFound:
            return
        notices = read_notices(raw)
        if notices.deprecated:
            yield "", "deprecated", notices.deprecated
        for version in versions:
            covering = [each for each in notices.retractions if each.covers(version)]
            if covering:
                yield version, "retracted", covering[0].reason or "no reason is given"

    def _differences(self, path: str, versions: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        for version in versions:
            try:
                theirs = read_info(bytes_of(self._source, Artifact(path, version, "info")), version)
            except NotFound as error:
                yield version, "deleted", str(error)
                continue
            ours = self._stored(Artifact(path, version, "info"))
            if ours and read_info(ours).time != theirs.time:
                yield version, "changed", f"its time is {theirs.time} upstream"
            mod = self._stored(Artifact(path, version, "mod"))
            if mod is not None and mod != bytes_of(self._source, Artifact(path, version, "mod")):
                yield version, "changed", "its go.mod has other bytes upstream"

    def _stored(self, artifact: Artifact) -> bytes | None:
        try:
            return read_small(self._storage, artifact.name, KINDS[artifact.kind].limit)
        except NotFound:
            return None


class Entry(NamedTuple):
    """A stored version: when it came (microseconds since the epoch), its bytes, and whether it is
    one of -modules."""

    path: str
    version: str
    stored: int
    size: int
    is_own: int


class Holding(NamedTuple):
    """What is stored of a module, or of its versions in -modules: when the last version came
    (microseconds since the epoch), how many there are, and their bytes."""

    path: str
    is_own: int
    stored: int
    versions: int
    size: int


S = TypeVar("S", Entry, Holding)
Sees = Callable[[str, int], bool]  # given a path and is_own: whether somebody may know of it


class Catalogue:
    """All versions whose .info or .zip is stored, in a table in memory, for those who want to know
    what there is; whoever wants a module never waits for it.

    A walk over the store fills it when somebody asks for the first time. What this process stores
    and removes later is known at once; what others do is seen by another walk, when somebody asks
    and a minute, or 50 times as long as a walk takes, is over."""

    _PATIENCE, _QUICK, _PAUSE, _SHARE = 2.0, 1.0, 60.0, 50
    _NEWS, _REMARK_SECONDS = 100_000, 10.0
    _TABLES = """
        CREATE TABLE modules (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE);
        CREATE TABLE versions (module INT, version TEXT, stored INT, size INT, own INT, walk INT,
            PRIMARY KEY (module, version)) WITHOUT ROWID;
        CREATE INDEX by_time ON versions (stored);
    """
    _ENTRIES = (
        "SELECT path, version, stored, size, own FROM modules CROSS JOIN versions ON module = id "
    )
    _BY_TIME = (
        "SELECT path, version, stored, size, own FROM versions CROSS JOIN modules ON id = module "
    )
    _HOLDINGS = (
        "SELECT path, own, max(stored), count(*), sum(size) "
        "FROM modules CROSS JOIN versions ON module = id "
    )
    _INSERT = (
        "INSERT INTO versions SELECT id, ?, ?, ?, ?, ? FROM modules WHERE path = ? "
        "ON CONFLICT (module, version) DO UPDATE SET walk = excluded.walk, "
    )

    def __init__(self, storage: Storage, own: OwnModules, log: Log) -> None:
        self._storage = storage
        self._own = own
        self._log = log
        self._mutex = threading.Lock()
        self._table: Any = None
        self._news: collections.deque[Callable[[], None]] = collections.deque(maxlen=self._NEWS)
        self._walks = 0
        self._walk_at = self._until = self._floor = self._length = 0.0
        self._walked, self._ended = threading.Event(), threading.Event()
        self._remarks: tuple[float, dict[str, list[Remark]]] = (-self._REMARK_SECONDS, {})

    def is_complete(self) -> bool:
        """Whether all is in it. Begins to make or to renew it, if that is due, and waits for two
        seconds if that has never taken long. Raises UnknownMethod where there are no means."""
        with self._mutex:
            now = time.monotonic()
            if now >= self._walk_at:
                self._open()
                self._walk_at = math.inf
                self._until = now + (self._PATIENCE if self._length <= self._QUICK else 0.0)
                self._walked.clear()
                try:
                    begin_thread(self._renew, "catalogue")
                except Overloaded:
                    self._walk_at = now
                    raise
        self._walked.wait(max(0.0, self._until - time.monotonic()))
        return self._floor > 0

    def _open(self) -> None:
        if self._table is None:
            try:
                driver: Any = importlib.import_module("sqlite3")
            except ImportError:
                raise UnknownMethod("the catalogue needs a Python with sqlite3") from None
            table = driver.connect(":memory:", isolation_level=None, check_same_thread=False)
            table.executescript(self._TABLES)
            self._table = table

    def _renew(self) -> None:
        began = time.monotonic()
        try:
            self._walk()
        except Exception as error:
            if not self._ended.is_set():
                self._log.error(f"catalogue: {error}")
        self._length = time.monotonic() - began
        self._walk_at = time.monotonic() + max(self._PAUSE, self._SHARE * self._length)
        self._walked.set()

    def _walk(self) -> None:
        began = time.time()
        self._walks += 1
        for is_own, items in enumerate((self._storage.walk(), self._own.walk())):
            for path, versions in stored_modules(unhurried(items)):
                if self._ended.is_set():
                    return
                self._see(path, versions, is_own)
        with self._mutex:
            self._table.execute("DELETE FROM versions WHERE walk < ?", (self._walks,))
            left = "SELECT module FROM versions"
            self._table.execute(f"DELETE FROM modules WHERE id NOT IN ({left})")
        self._floor = began

    def _see(self, path: str, versions: Mapping[str, list[Item]], is_own: int) -> None:
        """Takes what is new as no older than the last walk: who follows by time has been there."""
        kinds = ("zip",) if is_own else ("info", "zip")
        with self._mutex:
            self._settle()  # what was noted is among the items: it must not be added to them later
            for version, items in versions.items():
                told = [item.modified for item in items if item.name.endswith(kinds)]
                if told:
                    size = sum(item.size for item in items)
                    moment = int(max(self._floor, min(told)) * 1e6)
                    entry = Entry(path, version, moment, size, is_own)
                    self._put(entry, "size = excluded.size, own = ?")

    def _put(self, entry: Entry, change: str) -> None:
        self._table.execute("INSERT OR IGNORE INTO modules (path) VALUES (?)", entry[:1])
        row = (*entry[1:], self._walks, entry.path, entry.is_own)
        self._table.execute(self._INSERT + change, row)

    def stored(self, name: str, size: int, is_own: int = 0) -> None:
        """Takes note of what has just been stored for good; returns at once."""
        if self._table is not None:
            self._news.append(functools.partial(self._add, name, size, is_own, time.time()))

    def removed(self, path: str, version: str) -> None:
        """Takes note of a version that has just been removed; returns at once."""
        if self._table is not None:
            self._news.append(functools.partial(self._drop, path, version))

    def settle(self) -> None:
        """Adds what was noted."""
        with self._mutex:
            self._settle()

    def _settle(self) -> None:
        while self._news:
            self._news.popleft()()

    def _add(self, name: str, size: int, is_own: int, moment: float) -> None:
        artifact = stored_artifact(name)
        if artifact and artifact.kind in ("info", "zip"):
            entry = Entry(*artifact[:2], int(moment * 1e6), size, is_own)
            self._put(entry, "size = size + excluded.size, own = max(own, ?)")

    def _drop(self, path: str, version: str) -> None:
        module = "(SELECT id FROM modules WHERE path = ?)"
        query = f"DELETE FROM versions WHERE module = {module} AND version = ?"
        self._table.execute(query, (path, version))

    def _rows(self, query: str, *given: object) -> Iterator[tuple[Any, ...]]:
        """Called with the mutex."""
        self._settle()
        return iter(self._table.execute(query, given))

    def _seen(self, kind: type[S], sees: Sees, count: int, query: str, *given: object) -> list[S]:
        with self._mutex:
            rows = map(kind._make, self._rows(query, *given))
            return list(
                itertools.islice((row for row in rows if sees(row.path, row.is_own)), count)
            )

    def after(self, path: str, version: str, count: int, sees: Sees) -> list[Entry]:
        """The next ones after a version, ordered by path and version as text."""
        order = "WHERE path >= ? AND (path > ? OR version > ?) ORDER BY path, version"
        return self._seen(Entry, sees, count, self._ENTRIES + order, path, path, version)

    def versions(self, path: str, sees: Sees) -> list[Entry]:
        """Those of one module."""
        return self._seen(Entry, sees, self._NEWS, f"{self._ENTRIES}WHERE path = ?", path)

    def since(self, moment: int, count: int, sees: Sees) -> list[Entry]:
        """The first ones that came at a moment (microseconds) or later, by time; so many more that
        whoever goes on from the last one's moment gets ahead."""
        query = f"{self._BY_TIME}WHERE stored >= ? ORDER BY stored, module, version"
        found: list[Entry] = []
        with self._mutex:
            for row in map(Entry._make, self._rows(query, moment)):
                if len(found) >= count and found[-1].stored > found[0].stored:
                    break
                if sees(row.path, row.is_own):
                    found.append(row)
        return found

    def search(self, words: Sequence[str], count: int, sees: Sees) -> list[Holding]:
        """Modules with all words in their paths, in upper or lower case."""
        tests = " AND ".join(["instr(lower(path), lower(?))"] * len(words)) or "1"
        query = f"{self._HOLDINGS}WHERE {tests} GROUP BY id, own ORDER BY path"
        return self._seen(Holding, sees, count, query, *words)

    def of(self, paths: Iterable[str], count: int, sees: Sees) -> list[Holding]:
        """The first of these modules that there are."""
        query = f"{self._HOLDINGS}WHERE path = ? GROUP BY id, own"
        found = (self._seen(Holding, sees, 1, query, path) for path in paths)
        return list(itertools.islice(itertools.chain.from_iterable(found), count))

    def latest(self, count: int, sees: Sees) -> list[Entry]:
        """The modules that have got a version last, with that version."""
        found: dict[str, Entry] = {}
        with self._mutex:
            for row in map(Entry._make, self._rows(f"{self._BY_TIME}ORDER BY stored DESC")):
                if len(found) == count:
                    break
                if row.path not in found and sees(row.path, row.is_own):
                    found[row.path] = row
        return list(found.values())

    def totals(self) -> tuple[int, int, int]:
        """Modules, versions and bytes that are known so far."""
        with self._mutex:
            (modules,) = next(self._rows("SELECT count(*) FROM modules"))
            count, size = next(self._rows("SELECT count(*), total(size) FROM versions"))
        return modules, count, int(size)

    def remarks(self) -> Mapping[str, list[Remark]]:
        """Those of re-checks, by module, at most ten seconds old. Raises StoreDown."""
        read, found = self._remarks
        if time.monotonic() - read >= self._REMARK_SECONDS:
            found = {}
            for remark in Remarks(self._storage).read():
                if remark.what in FINDINGS:
                    found.setdefault(remark.path, []).append(remark)
            self._remarks = (time.monotonic(), found)
        return found

    def close(self) -> None:
        """Ends a walk, and the table."""
        self._ended.set()
        with self._mutex:
            if self._table is not None:
                self._table.close()


FINDINGS = ("deleted", "retracted", "deprecated", "changed")  # what clients are told of


class Minute(NamedTuple):
    """Figures of one minute, or those at its end: requests answered from the store and by fetching,
    bytes to clients and bytes from upstreams."""

    hits: float
    misses: float
    sent: float
    received: float

    @classmethod
    def now(cls) -> Minute:
        figures = METER.figures().items()

        def total(family: str, *verdicts: str) -> float:
            return sum(
                value
                for name, value in figures
                if name.partition("{")[0] == family and name.endswith(verdicts or "}")
            )

        requests, ends = "goproxy_requests_total", ('="hit"}', '="stale"}')
        received = total("goproxy_upstream_received_bytes_total")
        sent = total("goproxy_sent_bytes_total")
        return cls(total(requests, *ends), total(requests, '="miss"}'), sent, received)


class Trouble(NamedTuple):
    """A request that failed: when, and the words the client was told. A repeated one has the first
    four fields in common with that before it."""

    status: int
    path: str
    version: str
    words: str
    moment: float = 0.0
    times: int = 1


class Chronicle:
    """What a page tells of the last hour: figures by the minute, and requests that failed; and in
    how many minutes modules were asked for."""

    _MINUTES, _SECONDS, _TROUBLES, _MODULES = 60, 60.0, 100, 50_000

    def __init__(self, settle: Callable[[], None]) -> None:
        """Calls `settle` every minute, too. Starts a thread."""
        self.uses = Uses()
        self.began = time.time()
        self._settle = settle
        self._mutex = threading.Lock()
        self._ends = collections.deque([Minute.now()], self._MINUTES + 1)
        self._asked: dict[str, tuple[int, int]] = {}  # minutes with it, the last such minute
        # The absences stand apart, since the go command makes many of them.
        self._troubles: tuple[dict[Any, Trouble], dict[Any, Trouble]] = ({}, {})
        self._ended = threading.Event()
        begin_thread(self._run, "chronicle")

    def _run(self) -> None:
        while not self._ended.wait(self._SECONDS):
            self._ends.append(Minute.now())
            self._settle()
            self._count_uses()

    def _count_uses(self) -> None:
        minute = int(time.time() / self._SECONDS)
        with self._mutex:
            for name in self.uses.take():
                artifact = stored_artifact(name)
                count, last = self._asked.get(artifact.path, (0, 0)) if artifact else (0, minute)
                if artifact and last != minute:
                    self._asked[artifact.path] = (count + 1, minute)
            if len(self._asked) > self._MODULES:
                best = heapq.nlargest(self._MODULES // 2, self._asked.items(), key=lambda i: i[1])
                self._asked = dict(best)

    def most_asked(self) -> list[tuple[str, int]]:
        """Modules and in how many minutes they were asked for, the most often asked first."""
        self._count_uses()
        with self._mutex:
            ranked = sorted(self._asked.items(), key=lambda item: (-item[1][0], item[0]))
        return [(path, count) for path, (count, _) in ranked]

    def minutes(self) -> list[Minute]:
        """The last 60 minutes, as far as there are figures; the last one is not over yet."""
        ends = [*self._ends, Minute.now()][-self._MINUTES - 1 :]
        return [Minute(*map(operator.sub, later, sooner)) for sooner, later in zip(ends, ends[1:])]

    def note(self, trouble: Trouble) -> None:
        """Remembers a failure, and forgets the oldest."""
        with self._mutex:
            kept = self._troubles[trouble.status in (404, 410)]
            before = kept.pop(trouble[:4], None)
            kept[trouble[:4]] = trouble._replace(times=before.times + 1 if before else 1)
            if len(kept) > self._TROUBLES:
                del kept[next(iter(kept))]

    def troubles(self) -> tuple[list[Trouble], list[Trouble]]:
        """Failures, and what was not found, of the last hour; the last ones first."""
        since = time.time() - self._MINUTES * self._SECONDS
        with self._mutex:
            failed, absent = (list(reversed(kept.values())) for kept in self._troubles)
        return [one for one in failed if one.moment > since], [
            one for one in absent if one.moment > since
        ]

    def close(self) -> None:
        self._ended.set()


class Overview(NamedTuple):
    """What the process that fetches knows of all."""

    catalogue: Catalogue
    chronicle: Chronicle


class Node(NamedTuple):
    """A module version whose go.mod is read; if `deep`, so is that of all that it requires."""

    path: str
    version: str
    deep: bool


class Selection:
    """The module versions that a main module builds with (Go reference, "Minimal version
    selection", "Module graph pruning")."""

    def __init__(self, go_mod: bytes) -> None:
        self._root = read_go_mod(go_mod)
        self._instead = read_replacements(go_mod)
        self._best: dict[str, str] = {}
        self._seen: set[Node] = set()

    def start(self) -> list[Node]:
        """The versions whose go.mod is to be read first."""
        return self._note(self._root, not self._root.prunes)

    def follow(self, node: Node, content: GoMod) -> list[Node]:
        """Those to be read after that of a node."""
        deep = node.deep or not content.prunes
        found = self._note(content, deep)
        return found if deep else []

    def _note(self, content: GoMod, deep: bool) -> list[Node]:
        for path, version, _ in content.requirements:
            self._best[path] = max(self._best.get(path, ""), version, key=semver_key)
        pairs = [self._target(path, version) for path, version, _ in content.requirements]
        nodes = {Node(path, version, deep) for path, version in pairs if version}
        fresh = nodes - self._seen
        self._seen |= fresh
        return sorted(fresh)

    def _target(self, path: str, version: str) -> tuple[str, str]:
        """What a replace line says, with an empty version for a folder."""
        instead = self._instead
        return instead.get((path, version)) or instead.get((path, "")) or (path, version)

    def selected(self) -> list[tuple[str, str]]:
        """Path and version of all that is built with, when everything has been read."""
        listed = {path for path, _, _ in self._root.requirements}
        paths = listed if self._root.prunes else set(self._best)
        pairs = [self._target(path, self._best[path]) for path in sorted(paths)]
        return [pair for pair in pairs if pair[1]]


K = TypeVar("K", bound=Sequence[Any])


class Crew:
    """Threads that do the same with each of many things; `fail` is told what could not be done."""

    _THREADS = 12

    def __init__(self, fail: Callable[[Any, ProxyError], None]) -> None:
        self._fail = fail
        self._lane = Lane("crew", self._THREADS)

    def each(
        self, start: Iterable[K], work: Callable[[K], T], then: Callable[[K, T], Iterable[K]]
    ) -> None:
        """Does work on each in parallel, and on what `then` makes of the results. No more is taken
        from `start` than is worked on."""
        results: queue.SimpleQueue[tuple[K, T | None]] = queue.SimpleQueue()
        source, waiting, pending = iter(start), collections.deque[K](), 0
        while True:
            room = max(0, 2 * self._THREADS - pending - len(waiting))
            waiting.extend(itertools.islice(source, room))
            pending += len(waiting)
            while waiting:
                self._lane.do(functools.partial(self._do, waiting.popleft(), work, results))
            if not pending:
                return
            item, result = results.get()
            pending -= 1
            waiting.extend(() if result is None else then(item, result))

    def _do(
        self, item: K, work: Callable[[K], T], results: queue.SimpleQueue[tuple[K, T | None]]
    ) -> None:
        result = None
        try:
            result = work(item)
        except Exception as error:  # a bug must not pass for success
            self._fail(item, error if isinstance(error, ProxyError) else ProxyError(repr(error)))
        finally:
            results.put((item, result))


class Gatherer:
    """Brings all that builds ask for into the store, with the checksum records and what proves
    them: what go.sum files name, and what is selected for a go.mod."""

    def __init__(self, policy: Policy, sumdb: SumDb, reach: Reach, progress: Progress) -> None:
        self._policy = policy
        self._sumdb = sumdb
        self._reach = reach
        self._progress = progress
        self._crew = Crew(self._fail)
        self._sums: dict[tuple[str, str], set[str]] = {}
        self._wanted: dict[Artifact, None] = {}
        self.failures = 0

    def want_sums(self, sums: Mapping[tuple[str, str], set[str]]) -> None:
        """All that go.sum lines name; their hashes count for whatever is gathered."""
        for (path, version), hashes in sums.items():
            self._sums.setdefault((path, version), set()).update(hashes)
            bare, slash, _ = version.partition("/")
            self._want(path, bare, ("mod", "record") if slash else _ALL_KINDS)

    def want_module(self, path: str, query: str) -> None:
        """A module version, or what latest, a branch or a commit stands for, and what it builds
        with."""
        found: list[bytes] = []

        def note(_: tuple[str, str], go_mod: bytes) -> Iterable[tuple[str, str]]:
            found.append(go_mod)
            return ()

        self._crew.each([(path, query)], self._find, note)
        for go_mod in found:
            self.want_mod(go_mod)

    def _find(self, module: tuple[str, str]) -> bytes:
        path, version = module
        version = meant(path, version) if is_canonical(version) else self._resolved(path, version)
        go_mod = self._small(Artifact(path, version, "mod"))
        self._want(path, version, _ALL_KINDS)
        return go_mod

    def _resolved(self, path: str, query: str) -> str:
        """As the go command does it: latest is the newest in the list, if there are any."""
        check_path(path)
        modules = self._policy.admit(path, Asker())
        if query == LATEST:
            with contextlib.suppress(NotFound):
                return newest(modules.versions(path, self._reach).data.decode().split())
        return read_info(modules.resolve(path, query, self._reach).data).version

    def want_mod(self, go_mod: bytes) -> None:
        """What the module with this go.mod builds with."""
        selection = Selection(go_mod)
        self._crew.each(selection.start(), self._read, selection.follow)
        for path, version in selection.selected():
            self._want(path, version, _ALL_KINDS)

    def _read(self, node: Node) -> GoMod:
        go_mod = self._small(Artifact(node.path, node.version, "mod"))
        self._want(node.path, node.version, ("mod", "record"))
        return read_go_mod(go_mod)

    def _want(self, path: str, version: str, kinds: Iterable[str]) -> None:
        self._wanted.update((Artifact(path, version, kind), None) for kind in kinds)

    def gather(self) -> None:
        """Brings what is wanted, and tells what cannot be had."""
        self._progress.expect(len(self._wanted))
        self._crew.each(list(self._wanted), self._bring, lambda _, __: ())

    def _bring(self, artifact: Artifact) -> None:
        size = 0
        if artifact.kind == "zip":
            size = self._bring_zip(artifact)
        elif artifact.kind == "record":
            self._sumdb.gather(artifact.path, artifact.version, self._reach)
        else:
            size = len(self._small(artifact))
        self._progress.advance(1, size)

    def _small(self, artifact: Artifact) -> bytes:
        check_module(artifact.path, artifact.version)
        data = self._policy.admit(artifact.path, Asker()).small(artifact, self._reach).data
        if artifact.kind == "mod":
            self._compare(artifact.path, f"{artifact.version}/go.mod", hash_of_mod(data))
        return data

    def _bring_zip(self, artifact: Artifact) -> int:
        path, version, _ = artifact
        check_module(path, version)
        body = self._policy.admit(path, Asker()).large(artifact, self._reach).body
        assert isinstance(body, FileBlob)
        with contextlib.closing(body):
            body.wait_for_end()
            if (path, version) in self._sums:
                self._compare(path, version, check_zip(body.reading(), path, version))
            return body.size or 0

    def _compare(self, path: str, version: str, h1: str) -> None:
        if h1 not in self._sums.get((path, version), {h1}):
            raise BadUpstream(f"checksum mismatch: it is {h1}, go.sum has another one")

    def lose(self, name: str, error: ProxyError) -> None:
        """Tells of what could be had but not stored."""
        self.failures += 1
        self._progress.tell("failed", f"{name}: not stored: {error}", name=name, error=str(error))

    def _fail(self, item: Sequence[Any], error: ProxyError) -> None:
        """Tells of an item that begins with path and version."""
        path, version, *rest = map(str, item)
        what = f" {rest[0]}" if isinstance(item, Artifact) else ""
        self.failures += 1
        fields = {"module": path, "version": version, "error": str(error)}
        self._progress.tell("failed", f"{path}@{version}{what}: {error}", **fields)


_ALL_KINDS = ("info", "mod", "zip", "record")


class Round:
    """Looks at each of the items of a store, in parallel. What is done and what was found stands in
    the store, so that a later round of the same kind goes on where this one ended, be it by a
    SIGKILL. A store that does not name things in order is gone through from the beginning."""

    _NAME, _LIMIT = OWN_MARK + "verify", 256 << 20
    _FRESH, _PAUSE, _SHARE = 86400.0, 1.0, 20  # seconds, seconds, times as long as it took

    def __init__(self, storage: Storage, kind: str, progress: Progress) -> None:
        self.compared = 0  # with something else than the store
        self._storage = storage
        self._kind = kind
        self._progress = progress
        self._mutex = threading.Lock()
        # Names, in order, with -1, or once they are done with how much was compared.
        self._under_way: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._after = ""  # all up to here are done, but for those that failed
        self._found: dict[str, dict[str, Any]] = {}
        self._again: Set[str] = set()
        self._writer = Lane("round", 1)
        self._written = b""
        self._may_write, self._ended = True, threading.Event()

    def _items(self) -> Iterator[Item]:
        """What there is."""
        raise NotImplementedError

    def _look(self, item: Item) -> int:
        """How much was compared. Raises ProxyError for what is to be looked at again."""
        raise NotImplementedError

    def count(self, event: str) -> int:
        """How many items are "bad", or have "failed"."""
        return sum(found["event"] == event for found in self._found.values())

    def go(self) -> None:
        """Walks twice: for a bar one must know how much there is."""
        self._take_up()
        before = ""
        for item in self._items():
            self._may_write &= before < item.name
            before = item.name
            if self._is_left(item):
                self._progress.expect(1, item.size)
        begin_thread(self._keep_writing, "mark")
        try:
            Crew(self._fail).each(self._begun(), self._do, lambda _, __: ())
        finally:
            self._ended.set()
            self._write()

    def _is_left(self, item: Item) -> bool:
        return item.name > self._after or item.name in self._again

    def _begun(self) -> Iterator[Item]:
        for item in filter(self._is_left, self._items()):
            with self._mutex:
                self._under_way[item.name] = -1
            yield item

    def _do(self, item: Item) -> None:
        compared = self._look(item)
        with self._mutex:
            if self._found.get(item.name, {}).get("event") == "failed":  # the last time
                del self._found[item.name]
        self._end(item, compared)

    def _fail(self, item: Item, error: ProxyError) -> None:
        self._tell("failed", item, str(error), error=str(error))
        self._end(item, 0)

    def _end(self, item: Item, compared: int) -> None:
        self._progress.advance(1, item.size)
        with self._mutex:
            self._under_way[item.name] = compared
            while self._under_way:
                first = next(iter(self._under_way))
                if self._under_way[first] < 0:
                    return
                self.compared += self._under_way.pop(first)
                self._after = max(self._after, first)

    def _tell(self, event: str, item: Item, text: str, **fields: str) -> None:
        """Returns when it is written down: who ends this now finds it again."""
        row = {"event": event, "text": f"{item.name}: {text}", "name": item.name, **fields}
        with self._mutex:
            self._found[item.name] = row
        self._write()
        self._progress.tell(**row)

    def forget(self) -> None:
        """The next round begins anew."""
        with contextlib.suppress(NotFound, StoreDown):
            self._storage.remove(self._NAME)

    def _keep_writing(self) -> None:
        seconds = 0.0
        while not self._ended.wait(max(self._PAUSE, self._SHARE * seconds)):
            began = time.monotonic()
            self._write()
            seconds = time.monotonic() - began

    def _write(self) -> None:
        self._writer.submit(self._put).result()

    def _put(self) -> None:
        with self._mutex:
            state = [self._kind, self._after, self.compared, self._found]
            data = json.dumps(state).encode()
        if self._may_write and data != self._written:
            with contextlib.suppress(StoreDown):  # then the next round begins anew
                self._storage.put(self._NAME, data)
                self._written = data

    def _take_up(self) -> None:
        try:
            with contextlib.closing(self._storage.open(self._NAME)) as blob:
                age = time.time() - blob.modified
                kind, after, compared, found = json.loads(blob.read_all(self._LIMIT))
        except NotFound:
            return
        except (BadUpstream, ValueError, TypeError):
            kind, after, age = "", "", 0.0
        if kind != self._kind or age > self._FRESH:
            why = "had other settings" if kind != self._kind else "ended a day ago or before"
            self._progress.tell("anew", f"begins anew: the last round {why}")
            return
        self._after, self.compared, self._found = after, compared, found
        self._again = {name for name in found if found[name]["event"] == "failed"}
        counts = f"{self.count('bad')} bad until there, {len(self._again)} to be looked at again"
        self._progress.tell("resumed", f"going on after {after or 'nothing'}: {counts}")
        for name in found.keys() - self._again:
            self._progress.tell(**found[name])


class Inspector(Round):
    """Holds what is stored of versions to what it should be: by structure, by the hash it was
    stored with and by the checksum database. Moves aside what is not."""

    def __init__(self, storage: Storage, begin: Begin, kind: str, progress: Progress) -> None:
        super().__init__(storage, kind, progress)
        self._truth = storage.truth
        self._begin = begin

    def _items(self) -> Iterator[Item]:
        for item in self._storage.walk():
            artifact = stored_artifact(item.name)
            if artifact and artifact.kind in KINDS:
                yield item

    def _look(self, item: Item) -> int:
        artifact = stored_artifact(item.name)
        assert artifact
        try:
            return self._check(artifact, item)
        except Spoiled as error:  # whose bytes the store itself gives to nobody any more
            self._tell("bad", item, str(error), error=str(error))
        except NotFound:
            pass  # it has gone meanwhile
        except (Mismatch, BadUpstream) as error:
            if type(error) is Untrusted or isinstance(error, Unreachable):
                raise
            self._put_aside(item, error)
        return 0

    def _check(self, artifact: Artifact, item: Item) -> int:
        """Whether the database has compared it. Raises what is wrong with it."""
        version = artifact.version + ("/go.mod" if artifact.kind == "mod" else "")
        if artifact.kind == "info":
            KINDS["info"].check(artifact, read_small(self._truth, item.name, MAX_INFO))
            return 0
        compare = self._begin(artifact.path, artifact.version)
        h1 = self._zip_hash(artifact) if artifact.kind == "zip" else self._mod_hash(artifact)
        return int(compare(version, h1))

    def _mod_hash(self, artifact: Artifact) -> str:
        data = read_small(self._truth, artifact.name, MAX_GO_MOD)
        check_go_mod(data)
        return hash_of_mod(data)

    def _zip_hash(self, artifact: Artifact) -> str:
        blob = self._truth.open(artifact.name)
        assert isinstance(blob, FileBlob)
        with contextlib.closing(blob), blob.reading() as file:
            h1 = check_zip(file, artifact.path, artifact.version)
        with contextlib.suppress(NotFound):
            stored = read_small(self._truth, artifact.name + "hash", MAX_INFO).decode("latin-1")
            if stored.strip() != h1:
                raise BadUpstream(f"it is {h1}, but was stored as {stored.strip()}")
        return h1

    def _put_aside(self, item: Item, error: ProxyError) -> None:
        place = f"{BAD_PLACE}/{item.name}"
        self._tell("bad", item, f"{error}: moved aside to {place}", error=str(error), place=place)
        sides = [item.name + "hash"] if item.name.endswith(".zip") else []
        for name in (*sides, item.name):
            with contextlib.suppress(NotFound):
                copy(self._truth, name, self._storage, f"{BAD_PLACE}/{name}")
                self._storage.remove(name)


# Export and import

MANIFEST = OWN_MARK + "manifest"  # lines as sha256sum writes and checks them
_MAX_MANIFEST = 512 << 20
_LOOKUP_NAME = re.compile(r"sumdb/[^/]+/lookup/(.+)@([^/@]+)")
_ANSWER_NAME = re.compile(r"(.+)/(?:@latest|@v/[^/]+\.info)")
_TILE_NAME = re.compile(rf"sumdb/[^/]+/{_TILE.pattern}")
_H1 = re.compile(rb"h1:[A-Za-z0-9+/]{43}=\n?")


def lookup_of(name: str) -> tuple[str, str] | None:
    """The module and version that a stored checksum record is about."""
    found = _LOOKUP_NAME.fullmatch(name)
    try:
        return (unescape_path(found[1]), unescape_version(found[2])) if found else None
    except BadName:
        return None


class Choice:
    """What an export takes: all, or what words (globs, or MODULE@VERSION) and go.sum lines name."""

    def __init__(self, words: Sequence[str], sums: Mapping[tuple[str, str], set[str]]) -> None:
        """Raises ValueError for a malformed glob."""
        self.is_all = not words and not sums
        self._exact = {tuple(word.rsplit("@", 1)) for word in words if "@" in word}
        self._globs = [glob for word in words if "@" not in word for glob in parse_globs(word)]
        self._sums = sums
        self._zips = {pair for pair in sums if "/" not in pair[1]}
        self._used: set[str] = set()

    def takes(self, path: str, version: str, kind: str = "mod") -> bool:
        """Whether it takes a version's file; of what go.sum names for its go.mod, no more."""
        found = [glob for glob in self._globs if matches([glob], path)]
        names = [*found, f"{path}@{version}" if (path, version) in self._exact else ""]
        self._used.update(filter(None, names))
        is_small = kind in ("mod", "info") and (path, f"{version}/go.mod") in self._sums
        return self.is_all or any(names) or (path, version) in self._zips or is_small

    def takes_answers(self, path: str) -> bool:
        """Whether it takes what queries about a module were answered."""
        return self.is_all or matches(self._globs, path)

    def check(self, path: str, version: str, h1: str) -> None:
        """Raises BadUpstream for a hash that is not go.sum's; version/go.mod for a .mod."""
        if h1 not in self._sums.get((path, version), (h1,)):
            raise BadUpstream(f"its hash is {h1}, which is not that of go.sum")

    def missing(self, found: Set[tuple[str, str, str]]) -> list[str]:
        """What is named and was not found, of what was (path, version and kind)."""
        needs = [(path, at, "zip") for path, at in self._zips]
        needs += [(path, at.partition("/")[0], "mod") for path, at in self._sums]
        lost = {f"{path}@{version}: .{kind}" for path, version, kind in {*needs} - found}
        words = {"@".join(pair) for pair in self._exact} | set(self._globs)
        return sorted(lost) + sorted(words - self._used)


class Target(Protocol):
    """Where an export goes."""

    def add(self, name: str, blob: Blob) -> str:
        """Takes all of a blob; returns its SHA-256 in hexadecimal."""


class TarTarget(Target):
    """A tar archive (POSIX.1-2017, pax)."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    @staticmethod
    def head_of(name: str, blob: Blob) -> bytes:
        """What stands before the bytes of a file."""
        head = tarfile.TarInfo(name)
        head.size, head.mtime, head.mode = blob.size or 0, int(blob.modified), 0o644
        return head.tobuf(tarfile.PAX_FORMAT)

    def add(self, name: str, blob: Blob) -> str:
        assert blob.size is not None
        self._out.write(self.head_of(name, blob))
        digest, left = hashlib.sha256(), blob.size
        for piece in pieces_of(blob):
            digest.update(piece)
            left -= len(piece)
            self._out.write(piece)
        if left:
            raise StoreDown(f"{name}: the store gives another number of bytes than it has")
        self._out.write(bytes(-blob.size % tarfile.BLOCKSIZE))
        return digest.hexdigest()

    def end(self) -> None:
        """Writes the mark at the end."""
        self._out.write(bytes(2 * tarfile.BLOCKSIZE))
        self._out.flush()


class ResumedTar(TarTarget):
    """The same in a file that may hold the beginning of an archive, of an export that was ended:
    as far as it is what would be written now, it is not written again."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._length = file.seek(0, io.SEEK_END)
        file.seek(0)

    def add(self, name: str, blob: Blob) -> str:
        start, head, size = self._out.tell(), self.head_of(name, blob), blob.size or 0
        body = start + len(head)
        end = body + size + -size % tarfile.BLOCKSIZE
        if end <= self._length and self._out.read(len(head)) == head:
            digest = digest_of(_Piece(self._out, body, size))
            self._out.seek(end)
            return digest
        self._length = 0
        self._out.seek(start)
        self._out.truncate()
        return super().add(name, blob)


class FolderTarget(Target):
    """A folder in GOPROXY layout; what is in it already, in full, is not written again."""

    def __init__(self, folder: str) -> None:
        """Raises StartError."""
        self._storage = DiskStorage(folder)

    def add(self, name: str, blob: Blob) -> str:
        with contextlib.suppress(NotFound), contextlib.closing(self._storage.open(name)) as there:
            if there.size == blob.size and stored_artifact(name):
                return digest_of(there)
            self._storage.remove(name)
        with drafting(self._storage) as draft:
            draft.modified = blob.modified
            fill(draft, blob, name)
            self._storage.adopt(name, draft)
        return draft.digest.hexdigest()


class Exporter:
    """Copies what is chosen from a store: files of versions, lists of what the export itself has,
    answers to queries, checksum records with all tiles that prove them, and at the end a manifest
    of hashes."""

    def __init__(
        self, storage: Storage, choice: Choice, target: Target, progress: Progress
    ) -> None:
        self._storage = storage
        self._choice = choice
        self._target = target
        self._progress = progress
        self._manifest = tempfile.TemporaryFile()
        self._found: set[tuple[str, str, str]] = set()
        self._versions: dict[str, set[str]] = {}
        self.failures = 0

    def run(self) -> None:
        """Raises StoreDown, OSError. What is missing or wrong is told and counted."""
        with self._manifest:
            self._expect()
            for item in self._storage.walk():
                if self._chooses(item.name):
                    self._try(item.name)
            for path, versions in sorted(self._versions.items()):
                self._add(f"{escape_path(path)}/@v/list", BytesBlob(_lines(versions)))
            for name in self._records():
                self._progress.expect(1)
                self._try(name)
            for what in self._choice.missing(self._found):
                self._fail(what, "not in the store")
            if not self._found and not self.failures:
                self._fail("the store", "no module is in it")
            self._manifest.flush()
            file = OpenFile(os.dup(self._manifest.fileno()))
            self._target.add(MANIFEST, FileBlob(file, self._manifest.tell(), time.time()))

    def _expect(self) -> None:
        for item in self._storage.walk():
            if self._chooses(item.name):
                self._progress.expect(1, item.size)

    def _chooses(self, name: str) -> bool:
        artifact = stored_artifact(name)
        if artifact:
            return self._choice.takes(*artifact)
        answer = _ANSWER_NAME.fullmatch(name)
        try:
            return answer is not None and self._choice.takes_answers(unescape_path(answer[1]))
        except BadName:
            return False

    def _try(self, name: str) -> None:
        try:
            with contextlib.closing(self._storage.open(name)) as blob:
                size = blob.size or 0
                self._check(name)
                self._add(name, blob)
                self._progress.advance(1, size)
        except (NotFound, BadUpstream) as error:
            self._fail(name, str(error))

    def _check(self, name: str) -> None:
        """Notes what is of a version, and compares its hash with go.sum."""
        artifact = stored_artifact(name)
        if not artifact:
            return
        path, version, kind = artifact
        if kind == "mod":
            raw = read_small(self._storage, name, MAX_GO_MOD)
            self._choice.check(path, f"{version}/go.mod", hash_of_mod(raw))
        if kind == "zip":
            with contextlib.suppress(NotFound):
                h1 = read_small(self._storage, f"{name}hash", MAX_INFO).decode().strip()
                self._choice.check(path, version, h1)
            if not is_pseudo(version):
                self._versions.setdefault(path, set()).add(version)
        self._found.add(artifact)

    def _add(self, name: str, blob: Blob) -> None:
        self._manifest.write(f"{self._target.add(name, blob)}  {name}\n".encode())

    def _fail(self, name: str, why: str) -> None:
        self.failures += 1
        self._progress.tell("failed", f"{name}: {why}", name=name, error=why)

    def _records(self) -> Iterator[str]:
        """The checksum records of what is chosen, and what proves them."""
        chosen: dict[str, list[tuple[int, int]]] = {}  # places in a tree, and its size then
        known, bad = set[str](), set[str]()
        for item in self._storage.walk("sumdb/"):
            about = lookup_of(item.name)
            if about and self._choice.takes(*about):
                known.add(item.name)
                try:
                    record = read_record(read_small(self._storage, item.name, MAX_INFO))
                    size = read_tree(record.note).size
                    if record.number >= size:  # nothing would prove it
                        raise BadUpstream("a record from beyond the end")
                except (NotFound, BadUpstream) as error:
                    self._fail(item.name, str(error))
                    bad.add(item.name)
                else:
                    place = item.name.partition("lookup/")[0]
                    chosen.setdefault(place, []).append((record.number, size))
        for place, records in chosen.items():
            known |= self._tiles(place, records)
        yield from sorted(known - bad)
        if self._choice.is_all:
            names = (item.name for item in self._storage.walk("sumdb/"))
            yield from (name for name in names if name not in known)

    def _tiles(self, place: str, records: Sequence[tuple[int, int]]) -> set[str]:
        """The tiles that prove records and their tree heads to be part of the largest one."""
        heads = {size for _, size in records}
        edges = [tile for size in heads for tile in edge_tiles(size)]
        places = [(0, number // TILE_WIDTH) for number, _ in records]
        places += [(tile.level, tile.number) for tile in edges]
        tiles = {*edges, *proving_tiles(max(heads), places)}
        kept = {"latest", "supported"} & set(self._storage.names(place))
        found = (stored_tile(self._storage, place + tile.name) for tile in tiles)
        return {place + name for name in kept}.union(found)


class Incoming(NamedTuple):
    """A file to be imported."""

    name: str
    blob: Blob


class _Piece(Blob):
    """A stretch of a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self.size = self._left = size

    def read(self, count: int) -> bytes:
        self._file.seek(self._offset)
        data = self._file.read(min(count, self._left))
        if not data and self._left:
            raise BadUpstream("the archive is cut")
        self._offset += len(data)
        self._left -= len(data)
        return data


class TarFiles:
    """The files of a tar archive (POSIX.1-2017, "ustar" and "pax"; GNU long names). It may come
    from anywhere: nothing is unpacked, and all but regular files and folders is refused."""

    _BLOCK, _MAX_HEAD = 512, 64 << 10

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = file.seek(0, io.SEEK_END)

    def __iter__(self) -> Iterator[Incoming]:
        """Raises BadUpstream when it cannot be read on."""
        offset, said = 0, dict[str, str]()
        while True:
            self._file.seek(offset)
            head = self._file.read(self._BLOCK)
            if len(head) < self._BLOCK:
                raise BadUpstream("the archive is cut, or none")
            if not any(head):
                return
            kind, size = self._check(head), _tar_number(head[124:136])
            offset += self._BLOCK
            if kind in "xL" and size <= self._MAX_HEAD:
                said.update(_tar_words(self._file.read(size), kind))
            elif kind != "g":
                size = int(said.get("size", size))
                if offset + size > self._length:
                    raise BadUpstream("the archive is cut")
                name = (said.get("path") or _tar_name(head)).removeprefix("./")  # tar -C DIR .
                if kind in "0\0":
                    yield Incoming(name, _Piece(self._file, offset, size))
                elif kind != "5":
                    yield Incoming(name, _Refused(f"neither a file nor a folder (type {kind!a})"))
                said = {}
            offset += size + -size % self._BLOCK

    @staticmethod
    def _check(head: bytes) -> str:
        """The type of an entry, if its head is whole."""
        total = sum(head[:148]) + 8 * ord(" ") + sum(head[156:])
        if total != _tar_number(head[148:156]):
            raise BadUpstream("not a tar archive")
        return chr(head[156])


class _Refused(Blob):
    """Stands for what cannot be read."""

    def __init__(self, why: str) -> None:
        self._why = why

    def read(self, count: int) -> bytes:
        raise BadUpstream(self._why)


def _tar_number(field: bytes) -> int:
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,12}", text):
        raise BadUpstream("not a tar archive, or one of files too large for modules")
    return int(text, 8)


def _tar_name(head: bytes) -> str:
    name = head[:100].partition(b"\0")[0].decode("utf-8", "replace")
    prefix = head[345:500].partition(b"\0")[0].decode("utf-8", "replace")
    return f"{prefix}/{name}" if prefix and head[257:263] == b"ustar\0" else name


def _tar_words(body: bytes, kind: str) -> dict[str, str]:
    """What a head before the head of an entry says of it."""
    if kind == "L":
        return {"path": body.partition(b"\0")[0].decode("utf-8", "replace")}
    words = {}
    while body:
        length = re.match(rb"([0-9]{1,5}) ", body)
        end = int(length[1]) if length else 0
        if not length or not length.end() < end <= len(body):
            raise BadUpstream("malformed pax head")
        key, _, value = body[length.end() : end - 1].decode("utf-8", "replace").partition("=")
        if key in ("path", "size"):
            words[key] = value
        body = body[end:]
    if not re.fullmatch("[0-9]{1,12}", words.get("size", "0")):
        raise BadUpstream("malformed pax head")
    return words


class FolderFiles:
    """The files of a folder: an export, the store of a proxy, GOMODCACHE/cache/download (also
    named as GOMODCACHE), or what Athens keeps on a disk. Links are passed over."""

    def __init__(self, folder: str) -> None:
        inner = os.path.join(folder, "cache", "download")
        self._shelf = Folder(inner if os.path.isdir(inner) else folder)

    def __iter__(self) -> Iterator[Incoming]:
        with contextlib.suppress(NotFound):
            yield Incoming(MANIFEST, self._shelf.open(MANIFEST))
        for item in self._shelf.walk():
            name = item.name if _is_known(item.name) else _athens_name(item.name)
            if name:  # else a lock or the like
                with contextlib.closing(self._shelf.open(item.name)) as blob:
                    yield Incoming(name, blob)


_ATHENS_KINDS = {"go.mod": "mod", "source.zip": "zip"}


def _athens_name(name: str) -> str:
    """The name that a file in Athens' layout has in ours, "" if it is none of these."""
    folder, _, base = name.rpartition("/")
    path, _, version = folder.rpartition("/")
    kind = "info" if base == f"{version}.info" else _ATHENS_KINDS.get(base, "")
    if not kind or not is_canonical(version):
        return ""
    try:
        return Artifact(unescape_path(path) if "!" in path else path, version, kind).name
    except BadName:
        return ""


def _is_known(name: str) -> bool:
    """Whether a store may hold the name: what is no artifact is an answer or a record."""
    artifact = stored_artifact(name)
    if artifact:
        return f"{artifact._replace(kind='').name}{artifact.kind}" == name
    if name.startswith("sumdb/"):
        is_plain = re.fullmatch(r"sumdb/[a-z0-9.-]+/(latest|supported)", name)
        return bool(is_plain or lookup_of(name) or _TILE_NAME.fullmatch(name))
    answer = re.fullmatch(r"(.+)/(?:@latest|@v/(?:list|([^/]+)\.info))", name)
    try:
        return bool(answer and unescape_path(answer[1]) and unescape_version(answer[2] or "x"))
    except BadName:
        return False


class Importer:
    """Takes files into a store, each after its check. What is there stays: other bytes for the same
    name are a failure. What was taken before is passed over, so that another run goes on."""

    def __init__(self, storage: Storage, progress: Progress) -> None:
        self._storage = storage
        self._progress = progress
        self._manifest: dict[str, str] | None = None
        self.failures = self.skipped = 0

    def run(self, files: Iterable[Incoming], needs_manifest: bool) -> None:
        """Two passes: the first looks for the manifest. Raises BadUpstream, StoreDown."""
        is_empty = True
        for name, blob in files:
            if name == MANIFEST:
                self._manifest = _read_manifest(blob)
            else:
                self._progress.expect(1, blob.size or 0)
                is_empty = False
        if needs_manifest and self._manifest is None:
            raise BadUpstream("it has no manifest: it is cut, or none of ours")
        if is_empty:
            raise BadUpstream("no modules are in it")
        for name, blob in files:
            if name != MANIFEST:
                self._take(name, blob)
                self._progress.advance(1, blob.size or 0)

    def _take(self, name: str, blob: Blob) -> None:
        try:
            if not _is_known(name):
                raise BadUpstream("no store has such a name")
            if self._manifest is not None and name not in self._manifest:
                raise BadUpstream("not in the manifest")
            self._import(name, blob)
        except (BadUpstream, NotFound) as error:  # also of a name too long for the store
            self.failures += 1
            self._progress.tell("failed", f"{name}: {error}", name=name, error=str(error))

    def _import(self, name: str, blob: Blob) -> None:
        artifact = stored_artifact(name)
        if artifact and artifact.kind == "zip":
            self._import_zip(artifact, blob)
            return
        kind = KINDS.get(artifact.kind) if artifact else None
        data = blob.read_all(kind.limit if kind else _MAX_SMALL)
        self._check_digest(name, hashlib.sha256(data).hexdigest())
        _check_small(name, artifact, data)
        if name.endswith("/@v/list"):
            unite_list(self._storage, name, data.decode().split())
        else:
            never_changes = artifact or lookup_of(name) or _TILE_NAME.fullmatch(name)
            self._put(name, data, bool(never_changes))

    def _put(self, name: str, data: bytes, never_changes: bool) -> None:
        if self._storage.put(name, data, replace=False):
            return
        self.skipped += 1
        if never_changes and read_small(self._storage, name, _MAX_SMALL) != data:
            raise BadUpstream(_OTHER_BYTES)

    def _import_zip(self, artifact: Artifact, blob: Blob) -> None:
        name, there = artifact.name, self._digest(artifact.name)
        if (blob.size or 0) > MAX_ZIP:
            raise BadUpstream(f"longer than {MAX_ZIP} bytes")
        if there:
            wanted = self._manifest[name] if self._manifest is not None else digest_of(blob)
            self.skipped += 1
            if there != wanted:
                raise BadUpstream(_OTHER_BYTES)
            return
        with drafting(self._storage) as draft:
            fill(draft, blob, name)
            self._check_digest(name, draft.digest.hexdigest())
            with draft.file.reading() as file:
                h1 = check_zip(file, artifact.path, artifact.version)
            self._put(f"{name}hash", h1.encode(), True)
            self._storage.adopt(name, draft)

    def _digest(self, name: str) -> str:
        """The SHA-256 of what is stored under a name, "" if nothing is."""
        try:
            with contextlib.closing(self._storage.open(name)) as blob:
                return digest_of(blob)
        except NotFound:
            return ""

    def _check_digest(self, name: str, found: str) -> None:
        if self._manifest is not None and self._manifest[name] != found:
            raise BadUpstream("not the bytes of the manifest")


_OTHER_BYTES = "other bytes are stored under this name, and they stay"


def _read_manifest(blob: Blob) -> dict[str, str]:
    lines = blob.read_all(_MAX_MANIFEST).decode("utf-8", "replace").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    if not all(len(pair) == 2 and re.fullmatch("[0-9a-f]{64}", pair[0]) for pair in pairs):
        raise BadUpstream("malformed manifest")
    return {name: digest for digest, name in pairs}


def _check_small(name: str, artifact: Artifact | None, data: bytes) -> None:
    """Raises BadUpstream unless data may stand under a name that is known."""
    if artifact and artifact.kind in KINDS:
        KINDS[artifact.kind].check(artifact, data)
    elif artifact:
        _insist(bool(_H1.fullmatch(data)))
    elif name.startswith("sumdb/"):
        _check_sum_file(name, data)
    elif name.endswith("/@v/list"):
        _insist(all(map(is_semver, data.decode("utf-8", "replace").split())))
    else:
        read_info(data)


def _check_sum_file(name: str, data: bytes) -> None:
    tile, about = _TILE_NAME.fullmatch(name), lookup_of(name)
    if about:
        line = f"\n{about[0]} {about[1]} h1:".encode()
        _insist(line in b"\n" + read_record(data).text)
    elif tile:
        size = int(tile["part"] or TILE_WIDTH) * HASH_SIZE
        _insist(bool(data) and (tile["level"] == "data" or len(data) == size))
    elif name.endswith("/latest"):
        read_tree(data.partition(b"\n\n")[0] + b"\n")
    else:
        _insist(not data)


def _insist(is_good: bool) -> None:
    if not is_good:
        raise BadUpstream("not what may stand under this name")


def unite_list(storage: Storage, name: str, versions: Iterable[str]) -> None:
    """Adds versions to a stored list, which need not be there."""
    listed: list[str] = []
    with contextlib.suppress(NotFound):
        listed = read_small(storage, name, _MAX_SMALL).decode("utf-8", "replace").split()
    if not set(versions) <= set(listed):
        storage.put(name, _lines([*listed, *versions]))


class Leftovers(NamedTuple):
    """A file that gc removes, and why."""

    item: Item
    why: str


def find_leftovers(storage: Storage, now: float) -> Iterator[Leftovers]:
    """What nobody can use: what was moved aside 30 days ago, and for a day at least hashes without
    their zip, and zips without both .info and .mod. `now` in seconds since the epoch."""
    for _, item in Attic(storage).walk():
        if now - item.modified > Attic.SECONDS:
            yield Leftovers(item, "moved aside 30 days ago")
    for path, versions in stored_modules(storage.walk()):
        for version, found in versions.items():
            seen = {item.name.rpartition(".")[2] for item in found}
            if seen >= {"zip", "ziphash", "mod"} or not seen & {"zip", "ziphash"}:
                continue
            items = {
                item.name.rpartition(".")[2]: item for item in files_of(storage, path, version)
            }
            alone = "ziphash" in items and "zip" not in items
            bare = "zip" in items and not {"info", "mod"} & set(items)
            for kind in ("ziphash", "zip") if alone or bare else ():
                if kind in items and now - items[kind].modified > _ORPHAN_SECONDS:
                    yield Leftovers(items[kind], "without what belongs to it")


_ORPHAN_SECONDS = 86400.0


# =============================================================================
# 10. Registry: what is behind /v2/, and its layers in a bucket
# =============================================================================
# The registry decides who may have what; nothing here knows its users. Its HTTP API: OCI
# Distribution Specification 1.1.

REGISTRY = "/v2/"  # begins all paths of a registry
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_BLOB = re.compile(
    rf"/v2/[a-z0-9]+(?:[._-]+[a-z0-9]+|/[a-z0-9]+)*/blobs/({_DIGEST.pattern})", re.ASCII
)
_HOP_BY_HOP = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ]
)
_WHOLE_OR_NOT = ("if-match", "if-modified-since", "if-none-match", "if-unmodified-since")
_RANGED = ("if-range", "range")
_HARMLESS = ("accept", "accept-encoding", "user-agent", *_RANGED)  # surely no credentials
_PULL = Patience(30.0, 30.0, 6 * 3600.0)
_PUSH = Patience(300.0, 60.0, 6 * 3600.0)  # a registry may copy a layer before it answers


Lines = Sequence[tuple[str, str]]


def end_to_end(lines: Lines, *others: str) -> list[tuple[str, str]]:
    """Header lines without those of one connection (RFC 9110, section 7.6.1) and without `others`,
    in lower case."""
    options = [value.lower().split(",") for name, value in lines if name.lower() == "connection"]
    gone = _HOP_BY_HOP.union(others, (option.strip() for row in options for option in row))
    return [line for line in lines if line[0].lower() not in gone]


def _value(lines: Lines, name: str) -> str:
    return next((value for other, value in lines if other.lower() == name), "")


class Call(NamedTuple):
    """What a client asks of the registry. `target` is the path with its query; `scheme` is what
    the client speaks; `may_wait` whether this is where layers are fetched."""

    method: str
    target: str
    lines: Lines
    scheme: str = "http"
    body: OneWay | None = None
    may_wait: bool = True

    @property
    def digest(self) -> str:
        """Of the layer (or another blob) that it asks for, "" for anything else."""
        found = _BLOB.fullmatch(self.target.partition("?")[0])
        is_plain = self.method == "GET" and not self.body
        is_plain = is_plain and not any(_value(self.lines, name) for name in _WHOLE_OR_NOT)
        return found[1] if found and is_plain else ""


class Relayed(NamedTuple):
    """An answer with its header lines; `body` is None where none may follow."""

    status: int
    lines: Lines
    body: bytes | FileBlob | None
    verdict: Verdict | None = None


class Refused(BadUpstream):
    """The registry does not give a blob, or sends for it where we cannot go: its own answer is for
    whoever has asked, and for nobody else."""


class RegistryLine:
    """The way to the registry, there and back."""

    _SMALL, _POURS = 1 << 20, 16

    def __init__(self, url: Url, keeps_host: bool, client: Client) -> None:
        """`client` has no credentials. Starts threads."""
        self._url = url
        self._keeps_host = keeps_host
        self._client = client
        self._pours = Lane("registry-body", self._POURS)

    def send(self, call: Call, *without: str) -> Response:
        """The registry's answer to a call that goes without some header lines. Raises Unreachable,
        UpstreamTimeout, BadUpstream."""
        framing = ["content-length"] if call.body else []  # a length of 0 stays: some insist on it
        lines = end_to_end(call.lines, *framing, "expect", "host", HOP_FIELD.lower(), *without)
        host = self._url.authority
        if self._keeps_host:
            host = _value(call.lines, "host")
            if not _value(lines, "x-forwarded-proto"):
                lines.append(("X-Forwarded-Proto", call.scheme))
        lines = [("Host", host), *lines, (HOP_FIELD, HOP)]
        url = dataclasses.replace(self._url, path=call.target)
        patience = _PUSH if call.body else _PULL
        request = Passed(call.method, url, lines, call.body)
        return self._client.send(request, patience, time.monotonic() + patience.total)

    def relay(self, call: Call) -> Relayed:
        """The registry's answer, as it is. What is big comes through a nameless file, so that a
        slow client keeps nobody waiting."""
        response = self.send(call)
        lines = [self._as_ours(*line) for line in end_to_end(response.lines)]
        if response.bodiless:
            return Relayed(response.status, lines, None)
        if response.size is not None and response.size <= self._SMALL:
            return Relayed(response.status, lines, self._small(response))
        return Relayed(response.status, lines, self._spooled(response, call.target))

    def _small(self, response: Response) -> bytes:
        with contextlib.closing(response):
            try:
                return response.read_all(self._SMALL)
            except BadUpstream:
                if response.status < 400:
                    raise
        return b""  # docker-registry 2.8 sends 416 with a body cut short; the status is enough

    def _as_ours(self, name: str, value: str) -> tuple[str, str]:
        """A header line; a Location or Link at the registry leads to the same path here."""
        if name.lower() in ("link", "location"):
            value = re.sub(r"(?i)(?:^|(?<=<))https?://[^/?#<>]*(?=/)", self._here, value)
        return (name, value)

    def _here(self, found: re.Match[str]) -> str:
        with contextlib.suppress(ValueError):
            # Behind what ends TLS before us the registry may take itself for one that speaks it.
            if parse_url(found[0]).authority == self._url.authority:
                return ""
        return found[0]

    def _spooled(self, response: Response, name: str) -> FileBlob:
        draft = nameless_draft()
        reader = draft.reader()
        self._pours.do(functools.partial(pour, response, weakref.ref(draft), name))
        reader.settle()
        reader.size = response.size
        return reader

    def fetch(self, call: Call) -> tuple[Response, bool]:
        """The good answer to a call for a whole blob, from wherever the registry sends for it, and
        whether that is elsewhere. Raises as `send`, and Refused."""
        response = self.send(call, "accept-encoding", *_RANGED)
        is_away = response.status in REDIRECTS
        if is_away:
            response.close()
            response = self._redirected(call, response.fields.get("location", ""))
        if response.status != 200:
            response.close()
            raise Refused(f"{response.peer}: answered {response.status}")
        return response, is_away

    def _redirected(self, call: Call, location: str) -> Response:
        """The answer from there, which is not shown what only the registry may know."""
        url = dataclasses.replace(self._url, path=call.target.partition("?")[0])
        try:
            target = redirect_target(url, location)
            shown = _value(call.lines, "authorization") if target.origin == url.origin else ""
            request = Outgoing(call.method, target, [(HOP_FIELD, HOP)])
            return self._client.follow(request, _PULL, time.monotonic() + _PULL.total, shown)
        except ProxyError as error:
            raise Refused(str(error)) from None

    def close(self) -> None:
        self._pours.close()
        self._client.close()


class LayerStore(S3Storage):
    """Blobs of a registry in a bucket, by digest; an object is a blob that has been checked, and
    beside it stands when a client was last permitted to have it."""

    _USED, _MARK_SECONDS, _MARKS = OWN_MARK + "used/", 3600.0, 20_000

    def __init__(self, place: LayersPlace, means: Means) -> None:
        """Connects to nothing. Raises UsageError."""
        super().__init__(place, means)
        self.permit = place.permit
        self._marked: TtlCache[bool] = TtlCache(self._MARKS)

    @property
    def peer(self) -> str:
        """The service and the bucket, in words."""
        return self._bucket.peer

    @property
    def public_host(self) -> str:
        """The name of the server to which clients are sent."""
        return self._bucket.public_host

    def size(self, digest: str) -> int:
        """In bytes. Raises NotFound, StoreDown, and Spoiled for what was stored as another."""
        if digest in self._damaged:
            raise NotFound("not in the store")
        return self._checked(digest, self._bucket.find(digest)).size

    @staticmethod
    def _checked(digest: str, found: ObjectHead) -> ObjectHead:
        algorithm, _, wanted = digest.partition(":")
        if algorithm == "sha256" and found.sha256 not in ("", wanted):
            raise Spoiled(f"{digest}: it is sha256:{found.sha256}")
        return found

    def link_to(self, digest: str) -> str:
        """By which whoever has it may GET that blob for some minutes; so it is secret."""
        return self._bucket.link(digest, "GET", self._LINK_SECONDS)

    def distrust(self, digest: str) -> None:
        """It is not what it should be: the next one replaces it."""
        self._damaged.add(digest)

    def stream(self, digest: str) -> Blob:
        """Its bytes, from the bucket. Raises as `size`."""
        blob = self._fetch(digest)
        try:
            self._checked(digest, blob.found)
        except Spoiled:
            blob.close()
            self.distrust(digest)
            raise
        return blob

    def sweep(self) -> None:
        """Has the service forget what processes that were killed have uploaded in part: a day after
        that began, for it may be another replica that still does."""
        with contextlib.suppress(ProxyError):  # which needs a right of its own
            self._bucket.sweep()

    def mark(self, digest: str) -> None:
        """A client has been permitted to have it."""
        if not self._marked.get(digest):
            self._marked.put(digest, True, self._MARK_SECONDS)
            self.put(self._USED + digest, b"")

    def layers(self) -> Iterator[Item]:
        """All blobs by name, with the time of their last use; a size of 0 may be one that is gone
        but for its mark."""
        marks = (
            Item(item.name[len(self._USED) :], 0, item.modified) for item in self.walk(self._USED)
        )
        blobs = (item for item in self.walk("sha") if _DIGEST.fullmatch(item.name))
        name = operator.attrgetter("name")
        for digest, rows in itertools.groupby(heapq.merge(blobs, marks, key=name), name):
            both = list(rows)
            used = max(item.modified for item in both)
            yield Item(digest, sum(item.size for item in both), used)

    def discard(self, digest: str) -> None:
        """Removes a blob and its mark."""
        for name in (digest, self._USED + digest):
            with contextlib.suppress(NotFound):
                self.remove(name)


class Ageing:
    """Takes layers out of the bucket: those that nobody was permitted to have for `max_age`
    seconds, and the ones of longest ago while there are more than `max_size` bytes."""

    _PAUSE, _VICTIMS = 3600.0, 20_000

    def __init__(self, store: LayerStore, place: LayersPlace, log: Log) -> None:
        """Starts a thread."""
        self._store = store
        self._place = place
        self._log = log
        self._ended = threading.Event()
        begin_thread(self._run, "ageing")

    def _run(self) -> None:
        while True:
            try:
                self.turn()
            except ProxyError as error:
                self._log.error(f"-registry-blobs: {error}")
            if self._ended.wait(self._PAUSE):
                return

    def turn(self) -> None:
        """Raises StoreDown."""
        self._store.sweep()
        total = 0

        def counted() -> Iterator[Item]:
            nonlocal total
            for item in self._store.layers():
                total += item.size
                yield item

        oldest = heapq.nsmallest(self._VICTIMS, counted(), key=operator.attrgetter("modified"))
        horizon = time.time() - (self._place.max_age or math.inf)
        limit = self._place.max_size or math.inf
        count = size = 0
        for item in oldest:
            if self._ended.is_set() or (item.modified >= horizon and total - size <= limit):
                break
            self._store.discard(item.name)
            count, size = count + 1, size + item.size
        METER.set("goproxy_registry_store_bytes", total - size)
        if count:
            self._log.line(f"-registry-blobs: {count} layers removed, {size} bytes")

    def close(self) -> None:
        self._ended.set()


class Permit(NamedTuple):
    """The registry's word that a client may have a blob: the header lines of its answer, and the
    length in bytes that it tells, if so. If it `is_vague`, as where the registry sends elsewhere
    for it, it may be about something else, such as a form to log in, but for that length."""

    lines: Lines
    size: int | None
    is_vague: bool

    def fits(self, size: int | None) -> bool:
        """Whether it is about a blob of that length."""
        return not self.is_vague if self.size is None else self.size == size


class Registry:
    """What answers below /v2/. Of a blob that is in the bucket the registry is only asked, with the
    client's own credentials, whether this client may have it."""

    # A second connection costs a client more than these bytes cost us.
    _STREAMED = 64 << 10
    _FILLS, _PERMITS = 8, 10_000
    _AWAY_SECONDS, _PROBE_SECONDS = 5.0, 15.0  # the longer one is what a look may take that hangs

    def __init__(
        self, line: RegistryLine, store: LayerStore | None, fetches: bool, log: Log
    ) -> None:
        """`fetches`: this is the process that fetches layers. Starts threads."""
        self._line = line
        self._store = store
        self._log = log
        self.fetches = fetches
        self._permits: TtlCache[Permit] = TtlCache(self._PERMITS)
        self._away_until = 0.0  # monotonic; 0 unless the bucket has failed
        self._trouble = ""
        self._flights: Flights[Draft] = Flights()
        self._fills = Lane("registry-fill", self._FILLS if store else 0)
        self._keeps = Lane("registry-keep", self._FILLS if store else 0)
        self._marks = Lane("registry-mark", 1 if store else 0)

    @property
    def trouble(self) -> str:
        """Why the bucket, asked within the last minute, was of no use."""
        return self._trouble if time.monotonic() < self._away_until + 60 else ""

    def answer(self, call: Call) -> Relayed:
        """Raises MustWait for a layer that has to be fetched elsewhere, BadUpstream,
        Unreachable, UpstreamTimeout."""
        store = self._store
        if not store or not call.digest or not self._may_look():
            return self._line.relay(call)
        try:
            return self._layer(call, store)
        except Refused:
            return self._counted("refused", self._line.relay(call))
        except StoreDown as error:
            METER.add("goproxy_store_errors_total", operation="read layers")
            self._away_until, self._trouble = time.monotonic() + self._AWAY_SECONDS, str(error)
            self._log.error(f"layers come from the registry itself: {error}")
            return self._line.relay(call)

    def _may_look(self) -> bool:
        """Whether to ask the bucket. Once it has failed, one call at a time finds out whether it
        is back, so that not all wait for one that hangs."""
        now = time.monotonic()
        if now < self._away_until:
            return False
        if self._away_until:
            self._away_until = now + self._PROBE_SECONDS
        return True

    def _layer(self, call: Call, store: LayerStore) -> Relayed:
        size = _size_in(store, call.digest)
        self._away_until = 0.0
        is_ranged = _value(call.lines, "range") != ""
        if size is None and not is_ranged and not call.may_wait:
            raise MustWait
        permit = self._permit(call)
        misfits = size is not None and not permit.fits(size)
        if misfits and permit.is_vague:
            raise Refused("it sends for something else, such as a form to log in")
        if self._marks.waiting < self._PERMITS:
            self._marks.do(functools.partial(self._mark, store, call.digest))
        if misfits:
            if not call.may_wait:
                raise MustWait
            self._log.error(f"{call.digest}: {size} bytes in the bucket, {permit.size} in truth")
            store.distrust(call.digest)
            size = None
        is_big = size is not None and size > self._STREAMED
        if is_big and not _shares_credentials(call, store.public_host):
            lines = [
                ("Location", store.link_to(call.digest)),
                ("Docker-Content-Digest", call.digest),
                ("Cache-Control", "no-store"),
            ]
            return self._counted("redirected", Relayed(307, lines, b"", Verdict.HIT), size)
        if is_ranged:
            return self._counted("passed", self._line.relay(call))
        return self._streamed(call, store, permit, size)

    def _streamed(self, call: Call, store: LayerStore, permit: Permit, size: int | None) -> Relayed:
        if size is not None:
            with contextlib.suppress(NotFound):
                blob = store.open(call.digest)
                relayed = Relayed(200, permit.lines, blob, Verdict.HIT)
                return self._counted("streamed", relayed, size)
        blob = self._following(call, store)
        if not permit.fits(blob.size):
            blob.close()
            raise Refused("it sends for something else than what others get")
        return self._counted("fetched", Relayed(200, permit.lines, blob, Verdict.MISS), permit.size)

    @staticmethod
    def _counted(how: str, relayed: Relayed, size: int | None = None) -> Relayed:
        METER.add("goproxy_registry_blobs_total", result=how)
        METER.add("goproxy_registry_bytes_total", size or 0, result=how)
        return relayed

    def _permit(self, call: Call) -> Permit:
        """The registry's word, or what it said a moment ago to the same credentials: any header
        may be one."""
        shown = sorted(
            f"{name.lower()}: {value}" for name, value in end_to_end(call.lines, *_HARMLESS)
        )
        key = hashlib.sha256("\n".join([call.target, *shown]).encode("latin-1")).hexdigest()
        known = self._permits.get(key)
        if known:
            return known
        head, is_away = self._line.fetch(call._replace(method="HEAD"))
        head.close()
        lines = [] if is_away else end_to_end(head.lines, "date")
        if not _value(lines, "content-type"):
            lines.append(("Content-Type", "application/octet-stream"))
        length = content_length(head.fields) or None  # some say 0 to every HEAD
        is_told = length is not None or _value(lines, "docker-content-digest") == call.digest
        permit = Permit(lines, length, is_away or not is_told)
        if self._store and self._store.permit:
            shared = permit._replace(lines=end_to_end(lines, "set-cookie"))  # that is one client's
            self._permits.put(key, shared, self._store.permit)
        return permit

    def _mark(self, store: LayerStore, digest: str) -> None:
        with contextlib.suppress(ProxyError):
            store.mark(digest)

    def _following(self, call: Call, store: LayerStore) -> FileBlob:
        """A blob that is being fetched, for whoever comes meanwhile."""
        draft, is_new = self._flights.join(call.digest, store.draft)
        reader = draft.reader()
        if is_new:
            self._fills.do(functools.partial(self._fill, call, store, draft))
        with self._flights.waiting(call.digest, is_new):
            reader.settle()
        return reader

    def _fill(self, call: Call, store: LayerStore, draft: Draft) -> None:
        is_kept = False
        try:
            with TRACER.span("fetch", {"goproxy.name": call.digest}):
                source, is_news = self._source(call, store)
                draft.size = source.size
                is_kept = is_news and self._begin_keep(call.digest, store, draft)
                self._download(call.digest, source, draft)
            draft.finish()
        except BaseException as caught:
            is_kept, is_ours = False, isinstance(caught, ProxyError)
            self._log.error(f"{call.target.partition('?')[0]}: {caught}")
            draft.fail(caught if is_ours else ProxyError("internal error"))
            if not is_ours:
                raise
        finally:
            if not is_kept:
                self._flights.land(call.digest)

    def _source(self, call: Call, store: LayerStore) -> tuple[Blob, bool]:
        """A blob, and whether the bucket does not have it yet. It may: who looked there before may
        come after the flight that brought it."""
        try:
            return store.stream(call.digest), False
        except NotFound:
            return self._line.fetch(call)[0], True

    def _download(self, name: str, source: Blob, draft: Draft) -> None:
        """All bytes into the draft, checked."""
        algorithm, _, wanted = name.partition(":")
        with contextlib.closing(source):
            digest = draft.digest if algorithm == "sha256" else hashlib.sha512()
            for piece in pieces_of(source):
                with StoreErrors(name):
                    draft.write(piece)
                if digest is not draft.digest:
                    digest.update(piece)
        if digest.hexdigest() != wanted:
            raise BadUpstream(f"the registry sent {algorithm}:{digest.hexdigest()}: not kept")

    def _begin_keep(self, digest: str, store: LayerStore, draft: Draft) -> bool:
        """Whether a blob goes to the bucket as it comes: a bucket that is slower than the registry
        must not have more and more of them wait in temporary files."""
        has_room = self._keeps.waiting < self._FILLS
        if has_room:
            self._keeps.do(functools.partial(self._keep, digest, store, draft))
        else:
            self._log.error(f"{digest} is not kept: too many wait for the bucket")
        return has_room

    def _keep(self, digest: str, store: LayerStore, draft: Draft) -> None:
        """Lands the flight of a blob that is good: until then, who asks shares its draft."""
        reader, failure = draft.reader(), None
        try:
            sha256 = digest.partition(":")[2] if digest.startswith("sha256:") else ""
            store.follow(digest, draft, sha256)
            METER.add("goproxy_registry_fills_total")
        except ProxyError as error:
            failure = error
        finally:
            with contextlib.suppress(ProxyError):
                reader.wait_for_end()
                self._flights.land(digest)
        if failure and not draft.error:
            METER.add("goproxy_store_errors_total", operation="write layers")
            self._log.error(f"{digest} is not kept: {failure}")

    def close(self) -> None:
        self._fills.close()
        self._keeps.close()
        self._marks.close()
        self._line.close()


def _shares_credentials(call: Call, host: str) -> bool:
    """Whether Go's client, sent to a host, would show its Authorization there: it does to the name
    it has asked, whatever the port, and to those below (net/http, shouldCopyHeaderOnRedirect)."""
    told = [_value(call.lines, name) for name in ("host", "x-forwarded-host")]
    names = [re.sub(r":[0-9]*$", "", name).strip("[]").lower() for name in told]
    names = list(filter(None, names))
    return not names or any(f".{host}".endswith(f".{name}") for name in names)


def _size_in(store: LayerStore, digest: str) -> int | None:
    try:
        return store.size(digest)
    except NotFound:
        return None


class LayerInspector(Round):
    """Holds each layer in the bucket to its digest, and removes what does not have it: the next one
    who asks has it fetched anew."""

    def __init__(self, store: LayerStore, progress: Progress) -> None:
        super().__init__(store, "layers", progress)
        self._store = store

    def _items(self) -> Iterator[Item]:
        return (item for item in self._store.walk("sha") if _DIGEST.fullmatch(item.name))

    def _look(self, item: Item) -> int:
        algorithm, _, wanted = item.name.partition(":")
        digest = hashlib.new(algorithm)
        try:
            with contextlib.closing(self._store.stream(item.name)) as blob:
                for piece in pieces_of(blob):
                    digest.update(piece)
        except Spoiled:
            pass  # its last bytes are wrong, too
        except NotFound:
            return 0  # it has gone meanwhile
        if digest.hexdigest() != wanted:
            self._tell("bad", item, f"it is {algorithm}:{digest.hexdigest()}; removed")
            self._store.discard(item.name)
        return 0


# =============================================================================
# 11. HTTP: requests, replies, routes, the front loop
# =============================================================================
# http.server's own loop and parser are replaced: they split request lines at any white space, see
# no body lengths, know no deadline and spend a thread on every idle or slow client.


class Upload(Blob):
    """The body of a request, which whoever wants it takes from the client, not the loop. A client
    that is silent or slow for too long is given up."""

    _STALL, _GRACE, _RATE = 10.0, 30.0, 32 << 10  # seconds, seconds, bytes a second

    def __init__(self, sock: socket.socket, ahead: bytes, size: int, awaits: bool) -> None:
        """`ahead`: what has been read of it, and beyond; `awaits`: the client asks whether to send
        it."""
        self._sock = sock
        self.rest = ahead  # once the whole body is read, it is of the next request
        self._left = self.size = size
        self._awaits = awaits and not ahead
        self._until = time.monotonic() + self._GRACE + size / self._RATE

    @property
    def is_over(self) -> bool:
        """Whether all of it has been read."""
        return self._left == 0

    def read(self, count: int) -> bytes:
        """Raises HeadTooSlow, BadRequest."""
        if self._awaits:
            self._awaits = False
            with contextlib.suppress(OSError):
                self._sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = self._take(min(count, self._left))
        self._left -= len(data)
        return data

    def _take(self, count: int) -> bytes:
        """Some of the next bytes, at most so many."""
        if count and not self.rest:
            self.rest = self._receive(count)
        data, self.rest = self.rest[:count], self.rest[count:]
        return data

    def _receive(self, count: int) -> bytes:
        try:
            while True:
                with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                    data = self._sock.recv(count)
                    break
                patience = min(self._STALL, self._until - time.monotonic())
                if patience <= 0 or not _is_ready(self._sock, READABLE, patience):
                    raise HeadTooSlow("request body too slow")
        except (OSError, ValueError):  # closed, by the client or by us
            data = b""
        if not data:
            raise BadBody("request body cut short")
        return data


class PassedUpload(Upload):
    """The same for the registry: a client may have to compress a lot that comes to little."""

    _STALL, _RATE = 60.0, 1 << 10


class ChunkedUpload(PassedUpload):
    """That in chunks, whose length nobody knows (RFC 9112, section 7.1)."""

    _SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")

    def __init__(self, sock: socket.socket, ahead: bytes, awaits: bool) -> None:
        super().__init__(sock, ahead, 0, awaits)
        self.size = -1
        self._ended = False

    @property
    def is_over(self) -> bool:
        return self._ended

    def read(self, count: int) -> bytes:
        if not self._left and not self._ended:
            super().read(0)  # says that it may come
            self._next_chunk()
        data = super().read(count)
        self._until += len(data) / self._RATE
        if data and not self._left and self._line():
            raise BadBody("malformed chunk")
        return data

    def _next_chunk(self) -> None:
        size = self._SIZE.fullmatch(self._line())
        if not size:
            raise BadBody("malformed chunk size")
        self._left = int(size[1], 16)
        if not self._left:
            while self._line():
                pass  # trailers
            self._ended = True

    def _line(self) -> bytes:
        while b"\r\n" not in self.rest:
            if len(self.rest) > _LINE_LIMIT:
                raise BadBody("malformed chunk")
            self.rest += self._receive(4096)
        line, _, self.rest = self.rest.partition(b"\r\n")
        return line


class Request(NamedTuple):
    """A request whose head has been checked. `target` is the path as sent, without the query;
    `keep` tells whether the client wants the connection kept."""

    method: str
    target: str
    fields: Fields
    keep: bool
    chunks: bool  # whether the client understands chunked bodies
    body: int  # bytes of body that follow; -1: chunks
    reach: Reach = Reach.READY
    client: str = ""
    user: str = ""  # of -auth
    go_get: bool = False  # whether it asks for the page with go-import
    query: str = ""  # as sent
    upload: Upload | None = None  # the body, if it is wanted
    head: bytes = b""  # all that it was made of
    is_passed: bool = False  # whether it is for the registry

    @property
    def asker(self) -> Asker:
        return Asker(self.fields.get("authorization", ""), self.reach)

    @property
    def has_upload(self) -> bool:
        """Whether somebody may want its body."""
        return self.method == "PUT" or (self.is_passed and self.body != 0)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but its target decides what it gets."""
        odd = self.method != "GET" or not self.keep or not self.chunks or self.body
        if odd or self.go_get or self.is_passed or self.fields.get(HOP_FIELD.lower()) == HOP:
            return False
        return _CONDITIONS.isdisjoint(self.fields)


_CONDITIONS = frozenset(["disable-module-fetch", "expect", "if-none-match", "range"])
# Lines that differ from request to request, or by client, and decide no answer. One that begins
# after the empty line would be no part of the head.
_PASSING = re.compile(
    rb"(?i)(?<!\r\n)\r\n(b3|baggage|cf-ray|trace(?:parent|state)|uber-trace-id|x-(?:amzn-trace-id|"
    rb"(?:b3|datadog)-[a-z-]+|cloud-trace-context|correlation-id|forwarded-for|real-ip|request-id))"
    rb":([ -~]{0,512})(?=\r\n)"
)
_LINE_LIMIT, _HEAD_LIMIT, _FIELD_LIMIT, _BODY_LIMIT = 8192, 32768, 64, 65536
_REQUEST_LINE = re.compile(rb"(" + TOKEN.pattern + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_KNOWN_METHODS = frozenset(
    ["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"]
)
# An element by which a server behind us may understand a path as one that is not below ours.
_CLIMB = re.compile(r"(?i)(/|%2f|%5c)(\.|%2e){2}([/;]|%2f|%5c|$)")
_AUTHORITY = re.compile(r"([A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")


def without_passing(head: bytes) -> tuple[bytes, dict[str, str]]:
    """A head without the lines of _PASSING, and these; all of it if one is there twice, or if there
    may be more of all kinds than are allowed."""
    parts = _PASSING.split(head)  # what is around a line, its name, its value, and so on
    names = [name.decode().lower() for name in parts[1::3]]
    told = dict(zip(names, (value.decode().strip() for value in parts[2::3])))
    is_odd = len(told) < len(names) or head.count(b"\r\n") > _FIELD_LIMIT
    return (head, {}) if is_odd else (b"".join(parts[::3]), told)


def with_upload(request: Request, sock: socket.socket, ahead: bytes) -> Request:
    """The request with its body, of which some has been read ahead."""
    awaits = request.chunks and "expect" in request.fields
    if request.body < 0:
        return request._replace(upload=ChunkedUpload(sock, ahead, awaits))
    kind = PassedUpload if request.is_passed else Upload
    return request._replace(upload=kind(sock, ahead, request.body, awaits))


def parse_request(head: bytes, passed: str = "\0") -> Request:
    """A request head, without the empty line at its end, as RFC 9112 wants it and nothing else:
    what two readers could understand in two ways is refused. Raises ProxyError. What is below the
    path `passed` may have any body."""
    first, *lines = head.split(b"\r\n")
    if len(first) > _LINE_LIMIT:
        raise TargetTooLong("request line too long")
    if len(lines) > _FIELD_LIMIT or any(len(line) > _LINE_LIMIT for line in lines):
        raise HeadTooLarge("request head too large")
    match = _REQUEST_LINE.fullmatch(first)
    if not match:
        raise BadRequest("malformed request line")
    if match[3] != b"1" or match[4] not in b"01":
        raise VersionNotSupported("only HTTP/1.0 and HTTP/1.1 are spoken here")
    fields = parse_fields(lines)
    is_new = match[4] == b"1"
    options = fields.tokens("connection")
    query = match[2].decode().partition("?")[2]
    target = _target(match[2].decode(), fields, is_new)
    is_passed = f"{target}/".startswith(passed) and not _CLIMB.search(target)
    return Request(
        method=_method(match[1].decode()),
        target=target,
        fields=fields,
        keep="close" not in options and (is_new or "keep-alive" in options),
        chunks=is_new,
        body=_body_length(fields, is_new, MAX_ZIP if match[1] == b"PUT" else 0, is_passed),
        go_get="go-get=1" in query.split("&"),
        query=query,
        head=head,
        is_passed=is_passed,
    )


def split_head(received: bytes) -> tuple[bytes | None, bytes]:
    """A head without its empty line, None if it is not complete, and what follows it. Raises
    ProxyError for what can be the beginning of none."""
    told = received[2:] if received.startswith(b"\r\n") else received  # RFC 9112, 2.2: robust, once
    head, end, rest = told.partition(b"\r\n\r\n")
    if end and len(head) <= _HEAD_LIMIT:
        return head, rest
    if received.startswith(b"\x16\x03"):
        raise BadRequest("this port speaks no TLS: ask http:// for it")
    if len(received) > _LINE_LIMIT and b"\r\n" not in received[: _LINE_LIMIT + 2]:
        raise TargetTooLong("request line too long")
    if len(received) > _HEAD_LIMIT:
        raise HeadTooLarge("request head too large")
    if re.search(rb"(?<!\r)\n", received):
        raise BadRequest("bare line feed")
    return None, received


def _method(method: str) -> str:
    if method not in _KNOWN_METHODS:
        raise UnknownMethod("unknown method")
    return method


def _target(target: str, fields: Fields, is_new: bool) -> str:
    """The path of origin-form or absolute-form, without its query (RFC 9112, section 3.2)."""
    host = fields.get("host")
    if host is None and is_new:
        raise BadRequest("no host field")
    if not _AUTHORITY.fullmatch(host or ""):
        raise BadRequest("malformed host field")
    if not target.startswith("/"):
        scheme, _, rest = target.partition("://")
        authority = re.split("[/?]", rest)[0]
        if scheme.lower() not in ("http", "https") or authority != host:
            raise BadRequest("malformed request target")
        target = rest[len(authority) :]
    return target.partition("?")[0] or "/"


def _body_length(fields: Fields, is_new: bool, wanted: int, is_passed: bool) -> int:
    """Bytes of body to take, or to pass over: short ones that nobody wants are tolerated. -1 for
    chunks."""
    length = content_length(fields)
    if "transfer-encoding" in fields:
        if length is not None or not is_new or fields["transfer-encoding"].lower() != "chunked":
            raise BadRequest("ambiguous body length")
        if wanted and not is_passed:
            raise LengthRequired("a body needs a content-length")
        if not is_passed:
            raise BodyTooLarge("no body is wanted here")
        length = -1
    if (length or 0) > (wanted or _BODY_LIMIT) and not is_passed:
        words = f"a module zip has {wanted} bytes at most" if wanted else "no body is wanted here"
        raise BodyTooLarge(words)
    if fields.get("expect", "100-continue").lower() != "100-continue":
        raise ExpectationFailed("unknown expectation")
    return length or 0


class Reply(NamedTuple):
    """An answer as a value. `body` is None where a HEAD is answered without knowing the length."""

    status: int
    body: bytes | FileBlob | None
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    verdict: Verdict | None = None
    stored: Stamped | None = None  # if so, the same reply is right as long as the stamp holds
    is_passed: bool = False  # somebody else's: its headers are all there are

    @property
    def etag(self) -> str:
        """A strong validator of a good answer's bytes, "" if none can be given."""
        if self.status != 200 or self.body is None:
            return ""
        if isinstance(self.body, FileBlob):
            return self.body.etag
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'


ROLES = ("reader", "publisher", "admin")  # each may what those before it may
_USER_NAME = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
_SCRYPT = re.compile(
    r"scrypt:(1[0-7]):([1-9]|1[0-6]):([1-4]):([A-Za-z0-9+/]{22,86}={0,2}):([A-Za-z0-9+/]{43}=)"
)
_TOKEN_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COST, _BLOCK, _LANES = 14, 8, 1  # of scrypt: 16 MiB, 50 ms


class User(NamedTuple):
    """A line of the file of -auth: `globs` are the modules that this user may have."""

    name: str
    role: str
    globs: tuple[str, ...]
    secret: str

    def check(self, role: str, path: str | None) -> None:
        """Raises Forbidden for what takes more than this user's role, and for a module that is
        none of theirs: a 404 would send the go command on to others, path and all."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise Forbidden(f"{self.name} is {self.role}, and this takes a {role}")
        if path is not None and not matches(self.globs, path):
            raise Forbidden(f"{self.name} may not have {path}")


def has_scrypt() -> bool:
    """Whether this Python can hash passwords: OpenSSL has to know scrypt."""
    return hasattr(hashlib, "scrypt")


def _scrypt(password: str, cost: int, block: int, lanes: int, salt: bytes) -> bytes:
    memory = (128 << cost) * block
    raw = password.encode("utf-8", "surrogateescape")
    return hashlib.scrypt(
        raw, salt=salt, n=1 << cost, r=block, p=lanes, maxmem=2 * memory, dklen=32
    )


def hash_password(password: str) -> str:
    """A slow hash, with all that it takes to check it."""
    salt = secrets.token_bytes(16)
    told, made = map(base64.b64encode, (salt, _scrypt(password, _COST, _BLOCK, _LANES, salt)))
    return f"scrypt:{_COST}:{_BLOCK}:{_LANES}:{told.decode()}:{made.decode()}"


def hash_token(token: str) -> str:
    """A quick hash, which is enough for what nobody can guess."""
    return "sha256:" + hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _is_secret(secret: str, password: str) -> bool:
    match = _SCRYPT.fullmatch(secret)
    if not match:
        return hmac.compare_digest(secret, hash_token(password))
    cost, block, lanes = map(int, match.groups()[:3])
    made = _scrypt(password, cost, block, lanes, base64.b64decode(match[4]))
    return hmac.compare_digest(made, base64.b64decode(match[5]))


def read_users(text: str) -> dict[str, User]:
    """Lines NAME ROLE GLOBS HASH; empty ones and those that begin with # are comments. Raises
    ValueError with the number of the line."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.split() and not line.startswith("#"):
            try:
                user = _read_user(line.split())
                if user.name in users:
                    raise ValueError(f"a second line for {user.name}")
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            users[user.name] = user
    return users


def _read_user(fields: Sequence[str]) -> User:
    if len(fields) != 4:
        raise ValueError("want NAME ROLE GLOBS HASH")
    name, role, globs, secret = fields
    if not _USER_NAME.fullmatch(name):
        raise ValueError("a name has letters, digits and ._@+- only")
    if role not in ROLES:
        raise ValueError(f"a role is one of {', '.join(ROLES)}")
    if not _SCRYPT.fullmatch(secret) and not _TOKEN_DIGEST.fullmatch(secret):
        raise ValueError("the hash is malformed: make the line with goproxy.py passwd")
    if secret.startswith("scrypt:") and not has_scrypt():
        raise ValueError("this Python has no hashlib.scrypt: a token needs none (passwd -token)")
    return User(name, role, parse_globs(globs), secret)


def load_users(file: str) -> dict[str, User]:
    """Raises ValueError in words that name the file."""
    try:
        with open(file, encoding="utf-8") as opened:
            if os.name == "posix" and os.fstat(opened.fileno()).st_mode & 0o007:
                raise ValueError(f"others may use it: chmod o= {file}")
            return read_users(opened.read())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except ValueError as error:  # a bad line, or not UTF-8
        raise ValueError(f"{file}: {error}") from None


class _Ring(NamedTuple):
    """The users of one reading of the file, and those of them that have shown themselves."""

    users: Mapping[str, User]
    known: TtlCache[User]


class Gate:
    """Lets in who is in the file of -auth, which is read anew when it changes.

    Slow hashes are for strangers: who has shown a password is known by it for a while. An address
    that fails often waits, unless it shows what is known."""

    _KNOWN, _KNOWN_SECONDS = 10_000, 300.0
    _FAILURES, _FAILURE_SECONDS = 10, 60.0

    def __init__(self, file: str, log: Log) -> None:
        """Raises ValueError in words that name the file."""
        self._file = file
        self._log = log
        self._key = secrets.token_bytes(32)
        slow = f"scrypt:{_COST}:{_BLOCK}:{_LANES}:{'A' * 22}==:{'A' * 43}="
        self._nobody = slow if has_scrypt() else hash_token("")
        self._failures: TtlCache[int] = TtlCache(self._KNOWN)
        self._counting = threading.Lock()
        self._stamp = self._look()
        self._ring = self._load()

    def _look(self) -> object:
        try:
            status = os.stat(self._file)
        except OSError:
            return None
        return (*stamp_of(status), status.st_mode)

    def _load(self) -> _Ring:
        return _Ring(load_users(self._file), TtlCache(self._KNOWN))

    def _refresh(self) -> _Ring:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._ring = self._load()
                self._log.line(f"{self._file}: read anew")
            except ValueError as error:
                self._log.error(f"{error}; the users stay those of before")
        return self._ring

    def _mark(self, authorization: str) -> str:
        return hmac.new(self._key, authorization.encode("latin-1"), "sha256").hexdigest()

    def is_stranger(self, request: Request) -> bool:
        """Whether telling who it is may take a slow hash."""
        shown = request.fields.get("authorization")
        return bool(shown) and not self._ring.known.get(self._mark(shown or ""))

    def user(self, request: Request) -> User:
        """Who asks. Raises Unauthorized, TooManyRequests."""
        ring = self._refresh()
        shown = request.fields.get("authorization", "")
        known = ring.known.get(self._mark(shown))
        if known:
            return known
        if not shown:
            raise Unauthorized("who is it? Put the user and password of this proxy into netrc")
        tallies = self._tallies(request, shown)
        if any(self._failed(tally) >= self._FAILURES for tally in tallies):
            raise TooManyRequests("too many wrong passwords from this address: wait a minute")
        user = self._identify(ring.users, shown)
        if not user:
            with self._counting:  # others may have failed meanwhile
                for tally in tallies:
                    self._failures.put(tally, self._failed(tally) + 1, self._FAILURE_SECONDS)
            raise Unauthorized("unknown user or wrong password")
        ring.known.put(self._mark(shown), user, self._KNOWN_SECONDS)
        return user

    def _failed(self, tally: str) -> int:
        return self._failures.get(tally) or 0

    def _tallies(self, request: Request, shown: str) -> list[str]:
        """Where its failures count: for its address. All who come through a front have that one's,
        so there it is the address that this tells, and, for anybody may tell any, the name."""
        address = _subnet(request.client)
        told = request.fields.get("x-forwarded-for", "").rpartition(",")[2].strip()[:45]
        if not told or not _is_near(request.client):
            return [address]
        return [f"{address} {_subnet(told)}", f"{address} {self._mark(_basic_name(shown))}"]

    def _identify(self, users: Mapping[str, User], shown: str) -> User | None:
        """RFC 7617 and RFC 6750; an unknown name takes as long as a wrong password."""
        scheme, _, value = shown.partition(" ")
        if scheme.lower() == "bearer":
            digest = hash_token(value.strip())
            return next((user for user in users.values() if user.secret == digest), None)
        try:
            pair = base64.b64decode(value.strip(), validate=True).decode()
        except ValueError:
            return None
        name, _, password = pair.partition(":")
        user = users.get(name)
        good = _is_secret(user.secret if user else self._nobody, password)
        return user if scheme.lower() == "basic" and good else None


def _basic_name(shown: str) -> str:
    """The user's name in Basic credentials, other ones as they are."""
    try:
        return base64.b64decode(shown.partition(" ")[2].strip()).decode().partition(":")[0]
    except ValueError:
        return shown


def _is_near(client: str) -> bool:
    """Whether it may be a front of ours: on this machine or in the same network."""
    return not is_ip(client) or ipaddress.ip_address(client).is_private


def _subnet(client: str) -> str:
    """An IPv4 address, or the 64 bits of an IPv6 address that one customer has."""
    if ":" not in client:
        return client
    try:
        return ipaddress.IPv6Address(client.partition("%")[0]).exploded[:19]
    except ValueError:
        return client


class App(NamedTuple):
    """What endpoints and the front loop need."""

    settings: Settings
    policy: Policy
    sumdb: SumDb
    storage: WatchedStorage
    log: Log
    saw: Callable[[Sight], None]
    used: Callable[[str], None]  # told the name of each stored file that a client is given
    gate: Gate | None = None
    tls: Tls | None = None
    own: OwnModules = OwnModules(())
    failed: Callable[[Trouble], None] = lambda trouble: None
    overview: Overview | None = None  # if this is the process that fetches
    registry: Registry | None = None

    def watch(self, request: Request, artifact: Sequence[str], here: bool) -> None:
        """Lets read-ahead see what a client asks; `artifact` is path, version and kind."""
        if request.method == "GET" and request.reach is not Reach.STORED:
            path, version, kind = artifact
            self.saw(Sight(request.client, path, version, kind, "here" if here else ""))


_FOR_EVER = "public, max-age=31536000, immutable"
_NO_STORE = ("Cache-Control", "no-store")


def _replied(answer: Answer, content_type: str, ttl: float | None) -> Reply:
    """An answer that is good for ever, or for ttl seconds."""
    control = _FOR_EVER if ttl is None else f"public, max-age={int(ttl)}"
    if answer.personal:
        control = "private, no-store"
    headers = [("Cache-Control", control), ("X-Cache", answer.verdict.value)]
    if ttl is not None:
        headers.append(("Age", str(answer.age)))
    return Reply(200, answer.body, content_type, tuple(headers), answer.verdict, answer.stored)


def serve_version(app: App, request: Request) -> Reply:
    """GET /version, as Athens has it."""
    body = json.dumps({"version": __version__}) + "\n"
    return Reply(200, body.encode(), "application/json", (_NO_STORE,))


def serve_metrics(app: App, request: Request) -> Reply:
    """GET /metrics: the figures of all processes, in the text format of Prometheus 0.0.4."""
    figures = {**METER.figures(), **process_figures(METER.processes())}
    figures["process_start_time_seconds"] = METER.started
    python = ".".join(map(str, sys.version_info[:3]))
    figures[labelled("goproxy_build_info", version=__version__, python=python)] = 1.0
    content_type = "text/plain; version=0.0.4; charset=utf-8"
    return Reply(200, exposition(figures), content_type, (_NO_STORE,))


def exposition(figures: Mapping[str, float]) -> bytes:
    """Figures by their names, the cells of a histogram in their order, as families of METRICS."""
    families: dict[str, list[str]] = {name: [] for name in METRICS}
    for family, metric in METRICS.items():
        unseen = (labelled(family, **{metric.labels: value}) for value in metric.values)
        families[family] += [f"{name} 0" for name in unseen if name not in figures]
    counts: dict[str, float] = {}
    for name, value in figures.items():
        family = name.partition("{")[0]
        stem, is_bucket, labels = name.partition("_bucket{")
        if is_bucket:
            others = f"{stem}_count{{{labels.rpartition(',le=')[0]}}}"
            value = counts[others] = counts.get(others, 0.0) + value
            family = stem
        family = family[: -len("_sum")] if family.endswith("_sum") else family
        families.setdefault(family, []).append(f"{name} {value:.15g}")
    for name, value in counts.items():
        families[name.partition("_count{")[0]].append(f"{name} {value:.15g}")
    lines = []
    for family, metric in METRICS.items():
        samples = families[family] or ([] if metric.labels else [f"{family} 0"])
        if samples:
            lines += [f"# HELP {family} {metric.text}", f"# TYPE {family} {metric.kind}", *samples]
    return ("\n".join(lines) + "\n").encode()


def process_figures(processes: Iterable[int]) -> dict[str, float]:
    """What the system tells of processes, added up; nothing where there is no /proc."""
    found: dict[str, float] = collections.defaultdict(float)
    for process in processes:
        with contextlib.suppress(OSError):
            with open(f"/proc/{process}/stat") as file:
                times = file.read().rpartition(")")[2].split()[11:13]
            with open(f"/proc/{process}/statm") as file:
                pages = int(file.read().split()[1])
            ticks = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
            found["process_cpu_seconds_total"] += ticks
            found["process_resident_memory_bytes"] += pages * os.sysconf("SC_PAGE_SIZE")
            found["process_open_fds"] += len(os.listdir(f"/proc/{process}/fd"))
            found["process_max_fds"] += descriptor_limit()
    return found


def serve_health(app: App, request: Request) -> Reply:
    """GET /health: the process is alive; no upstream is asked."""
    body = json.dumps({"status": "ok", "version": __version__}) + "\n"
    return Reply(200, body.encode(), "application/json", (_NO_STORE,))


def serve_ready(app: App, request: Request) -> Reply:
    """GET /readyz: whether requests should come here. While the store fails, upstream's answers
    can still be passed on; where there are none, 503."""
    asked = {"store": app.storage.check(), "layers": app.registry.trouble if app.registry else ""}
    troubles = {part: trouble for part, trouble in asked.items() if trouble}
    told = {"status": "degraded" if troubles else "ok", **troubles}
    alone = app.settings.offline or all(hop.kind == "off" for hop in app.settings.upstream)
    status = 503 if "store" in troubles and alone and not app.registry else 200
    return Reply(status, f"{json.dumps(told)}\n".encode(), "application/json", (_NO_STORE,))


def serve_list(app: App, request: Request, module: str) -> Reply:
    """GET /<module>/@v/list"""
    path = unescape_path(module)
    answer = app.policy.admit(path, request.asker).versions(path, request.reach)
    found = newest(answer.data.decode().split()) if answer.body else ""
    app.watch(request, (path, found, "list"), answer.verdict is Verdict.HIT)
    return _replied(answer, "text/plain; charset=utf-8", app.settings.ttl)


def serve_latest(app: App, request: Request, module: str) -> Reply:
    """GET /<module>/@latest"""
    return _serve_query(app, request, unescape_path(module), LATEST)


def _serve_query(app: App, request: Request, path: str, query: str) -> Reply:
    answer = app.policy.admit(path, request.asker).resolve(path, query, request.reach)
    return _replied(answer, KINDS["info"].content_type, app.settings.ttl)


def serve_artifact(app: App, request: Request, module: str, version: str, kind: str) -> Reply:
    """GET /<module>/@v/<version>.info, .mod or .zip; .info also of a branch or commit."""
    artifact = Artifact(unescape_path(module), unescape_version(version), kind)
    if not is_canonical(artifact.version):
        if kind != "info":
            raise BadName("not a canonical version")
        return _serve_query(app, request, artifact.path, artifact.version)
    if kind == "info":
        artifact = artifact._replace(version=meant(artifact.path, artifact.version))
    check_module(artifact.path, artifact.version)
    mirror = app.policy.admit(artifact.path, request.asker)
    link = mirror.link(artifact, request.method) if kind == "zip" else ""
    if link:
        app.used(artifact.name)
        headers = (_NO_STORE, ("Location", link))
        return Reply(307, b"", headers=headers, verdict=Verdict.HIT)
    if kind == "zip" and request.method == "HEAD":
        return _zip_head(mirror, artifact, request)
    try:
        ask = mirror.large if kind == "zip" else mirror.small
        answer = ask(artifact, request.reach)
    except MustWait:
        if kind != "mod":  # its successors need not wait; those of a .mod stand in it
            app.watch(request, artifact, here=False)
        raise
    if answer.verdict is Verdict.HIT:
        app.used(artifact.name)
    if kind == "mod" or request.reach is Reach.READY:
        app.watch(request, artifact, answer.verdict is Verdict.HIT)
    return _replied(answer, KINDS[kind].content_type, None)


def serve_put(app: App, request: Request, module: str, version: str, kind: str) -> Reply:
    """PUT /<module>/@v/<version>.zip: publishes a version of our own. 201 for a new one, 200 if
    that very version is there already, 409 if another one is."""
    artifact = _own_artifact(module, version, kind)
    storage = app.own.writable()
    with contextlib.closing(storage), drafting(storage) as draft:
        if app.own.has(*artifact[:2]) and storage.stamp(artifact.name) is None:
            raise Conflict("another folder of -modules has this version")
        assert request.upload
        fill(draft, request.upload, artifact.name)
        sums = check_module_zip(draft, artifact.path, artifact.version)
        is_new = publish(storage, artifact, draft, sums)
    if is_new and app.overview:
        app.overview.catalogue.stored(artifact.name, draft.written, is_own=1)
    app.log.line(f"{artifact.path}@{artifact.version}: published by {request.user} {sums.zip}")
    name = f"{artifact.path} {artifact.version}"
    lines = f"{name} {sums.zip}\n{name}/go.mod {sums.mod}\n"
    return Reply(201 if is_new else 200, lines.encode(), headers=(_NO_STORE,))


def serve_delete(app: App, request: Request, module: str, version: str, kind: str) -> Reply:
    """DELETE /<module>/@v/<version>.zip: moves a version of our own aside."""
    artifact = _own_artifact(module, version, kind)
    with contextlib.closing(app.own.writable()) as storage:
        if storage.stamp(artifact.name) is None:
            raise NotFound("not in the first folder of -modules")
        attic = Attic(storage)
        if attic.has_other(artifact.name):
            raise Conflict(f"an older one is in {Attic.PLACE} there: it has to go first")
        attic.put_away(artifact.path, artifact.version)
    if app.overview:
        app.overview.catalogue.removed(artifact.path, artifact.version)
    app.log.line(f"{artifact.path}@{artifact.version}: moved aside by {request.user}")
    return Reply(204, None, headers=(_NO_STORE,))


def _own_artifact(module: str, version: str, kind: str) -> Artifact:
    artifact = Artifact(unescape_path(module), unescape_version(version), kind)
    if kind != "zip":
        raise MethodNotAllowed("the .zip stands for all files of a version")
    check_module(artifact.path, artifact.version)
    return artifact


def _zip_head(mirror: Modules, artifact: Artifact, request: Request) -> Reply:
    """A HEAD never starts a download: of a zip that is not here it tells only that it exists."""
    content_type = KINDS["zip"].content_type
    try:
        return _replied(mirror.large(artifact, Reach.STORED), content_type, None)
    except NotFound:
        if request.reach is Reach.STORED:
            raise
        answer = mirror.small(artifact._replace(kind="info"), request.reach)
        known = _replied(answer._replace(verdict=Verdict.MISS), content_type, None)
        return known._replace(body=None)


def _scheme(app: App, request: Request) -> str:
    """What the client speaks, to us or to what ends TLS before us, if that tells."""
    told = request.fields.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return "https" if app.tls or told == "https" else "http"


def serve_go_get(app: App, request: Request, package: str) -> Reply:
    """GET /<package>?go-get=1: where the repository of an import path on this host is (cmd/go:
    vcs/discovery.go). The tag counts whatever the status, so an unknown path gets none."""
    host = request.fields.get("host", "")
    name = f"{host.partition(':')[0].lower()}/{package}".rstrip("/")
    found = _vanity(app, name, _sees(app, request))
    where = found.url or app.settings.public_url or f"{_scheme(app, request)}://{host}"
    is_page = found.vcs != "mod" and found.url.startswith("http")
    docs = found.url if is_page else f"https://pkg.go.dev/{urllib.parse.quote(name)}"
    content = f"{found.prefix} {found.vcs} {where}"
    page = _GO_IMPORT.format(*map(html.escape, (content, docs, name)))
    control = ("Cache-Control", f"public, max-age={int(app.settings.ttl)}")
    headers = (control, ("Vary", "X-Forwarded-Proto"))
    return Reply(200, page.encode(), "text/html; charset=utf-8", headers)


_GO_IMPORT = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="go-import" content="{0}">
<meta http-equiv="refresh" content="0; url={1}">
<title>{2}</title>
</head>
<body>
Documentation of <a href="{1}">{2}</a>.
</body>
</html>
"""
_MAX_ELEMENTS = 32  # of an import path whose module is looked for


def _vanity(app: App, name: str, sees: Sees) -> Vanity:
    """The longest prefix that -vanity names or that is a module of ours which may be named to the
    client. Raises NotFound."""
    configured = {each.prefix: each for each in app.settings.vanity}
    elements = name.split("/", _MAX_ELEMENTS)
    for count in range(len(elements), 0, -1):
        prefix = "/".join(elements[:count])
        if prefix in configured:
            return configured[prefix]
        with contextlib.suppress(BadName):
            if sees(prefix, 1) and app.own.versions(prefix):
                return Vanity(prefix, "mod", "")
    raise NotFound("no module of this path is told of here")


def serve_sum_supported(app: App, request: Request, database: str) -> Reply:
    """GET /sumdb/<name>/supported: answered here, without asking."""
    app.sumdb.check_known(database)
    return Reply(200, b"")


def serve_sum_latest(app: App, request: Request, database: str) -> Reply:
    """GET /sumdb/<name>/latest"""
    answer = app.sumdb.latest(database, request.reach)
    return _replied(answer, "text/plain; charset=utf-8", app.settings.ttl)


def serve_sum_lookup(app: App, request: Request, database: str, module: str, version: str) -> Reply:
    """GET /sumdb/<name>/lookup/<module>@<version>"""
    path, found = unescape_path(module), unescape_version(version)
    answer = app.sumdb.lookup(database, path, found, request.reach)
    return _replied(answer, "text/plain; charset=utf-8", None)


def serve_sum_tile(app: App, request: Request, database: str, what: str) -> Reply:
    """GET /sumdb/<name>/tile/8/<level>/<number>[.p/<width>]"""
    answer = app.sumdb.tile(database, what, request.reach)
    if answer.verdict is Verdict.MISS and "/data/" not in what:
        app.sumdb.prove_tile(database, what, answer.data)
    return _replied(answer, "application/octet-stream", None)


def serve_registry(app: App, request: Request) -> Reply:
    """Whatever is asked below /v2/."""
    assert app.registry
    lines, upload = request.head.split(b"\r\n")[1:], request.upload
    call = Call(
        request.method,
        request.target + (f"?{request.query}" if request.query else ""),
        split_fields(lines),
        "https" if app.tls else "http",
        OneWay(request.body, lambda count, _: upload.read(count)) if upload else None,
        app.registry.fetches or request.reach is Reach.FETCH,
    )
    found = app.registry.answer(call)
    return Reply(found.status, found.body, "", tuple(found.lines), found.verdict, is_passed=True)


def refuse_registry(app: App, request: Request, error: ProxyError) -> Reply:
    """An error as a registry tells it (OCI Distribution Specification, "Error Codes")."""
    if error.status >= 500:
        app.log.error(f"{request.target[1:]}: {error}", status=error.status)
    row = {"code": "UNAVAILABLE" if error.status >= 500 else "UNSUPPORTED", "message": str(error)}
    body = json.dumps({"errors": [row]}) + "\n"
    version = ("Docker-Distribution-Api-Version", "registry/2.0")
    headers = (_NO_STORE, version, *error.headers())
    return Reply(error.status, body.encode(), "application/json", headers)


class Change(NamedTuple):
    """Who answers a method that changes something, and what it takes to be let in."""

    endpoint: Callable[..., Reply]
    role: str


class Route(NamedTuple):
    """What matches the path, percent-decoded, without its leading slash, and who answers."""

    pattern: str
    endpoint: Callable[..., Reply]
    changes: Mapping[str, Change] = {}  # by method; with -auth and -modules
    is_open: bool = False  # to those as well who are none of the users
    waits: bool = False  # for the process that fetches, which alone can tell


def _sees(app: App, request: Request) -> Sees:
    """Which modules may be named to a client: those that it would get, if it asked for them."""
    user = app.gate.user(request) if app.gate else None

    @functools.lru_cache(maxsize=1024)
    def sees(path: str, is_own: int) -> bool:
        is_theirs = user is None or matches(user.globs, path)
        return is_theirs and (bool(is_own) or app.policy.shows(path))

    return sees


def _overview(app: App) -> Overview:
    if not app.overview:
        raise Overloaded("the process that knows is too busy")
    return app.overview


def _whole_catalogue(app: App) -> Catalogue:
    catalogue = _overview(app).catalogue
    if not catalogue.is_complete():
        raise Overloaded("the catalogue is being made: a store is walked through", 5)
    return catalogue


def _number(asked: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = asked.get(name) or str(default)
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text, re.ASCII):
        raise BadRequest(f"{name}: want a number above 0")
    return min(int(text), most)


_TOKEN_BAR = "|"


def serve_catalog(app: App, request: Request) -> Reply:
    """GET /catalog?token=&pagesize=, as Athens has it (cmd/proxy/actions/catalog.go); `findings`
    are those of re-checks, which Athens has not."""
    asked = dict(urllib.parse.parse_qsl(request.query))
    count = _number(asked, "pagesize", 1000, 10_000)
    token = asked.get("token", "")
    path, bar, version = token.partition(_TOKEN_BAR)
    if token and not bar:
        raise BadRequest("token: want the one of the page before")
    catalogue = _whole_catalogue(app)
    found = catalogue.after(path, version, count, _sees(app, request))
    remarks = catalogue.remarks()
    told: dict[str, Any] = {"modules": [_catalogued(entry, remarks) for entry in found]}
    if len(found) == count:
        told["next"] = f"{found[-1].path}{_TOKEN_BAR}{found[-1].version}"
    return Reply(200, f"{_compact(told)}\n".encode(), _CATALOG_TYPE, (_NO_STORE,))


_CATALOG_TYPE = "application/json; charset=utf-8"
_compact = json.JSONEncoder(separators=(",", ":")).encode


def _catalogued(entry: Entry, remarks: Mapping[str, list[Remark]]) -> dict[str, Any]:
    row: dict[str, Any] = {"module": entry.path, "version": entry.version}
    found = [] if entry.is_own else findings_of(remarks.get(entry.path, []), entry.version)
    if found:
        row["findings"] = [
            {"finding": each.what, "since": _rfc3339(int(each.since * 1e6)), "words": each.words}
            for each in found
        ]
    return row


def findings_of(remarks: Iterable[Remark], version: str) -> list[Remark]:
    """Those that are about a version, or about its whole module."""
    return [each for each in remarks if each.version in ("", version)]


def _rfc3339(moment: int) -> str:
    second, rest = divmod(moment, 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:06}Z"


def serve_index(app: App, request: Request) -> Reply:
    """GET /index?since=&limit=, in the lines of index.golang.org: what has been stored since, the
    oldest first."""
    asked = dict(urllib.parse.parse_qsl(request.query))
    count = _number(asked, "limit", 2000, 2000)
    since = asked.get("since") or "1970-01-01T00:00:00Z"
    second = seconds_of(since)
    if second is None:
        raise BadRequest("since: want a time as in RFC 3339")
    fraction = re.search(r"\.([0-9]{1,6})", since)
    moment = int(second) * 1_000_000 + (int(fraction[1].ljust(6, "0")) if fraction else 0)
    found = _whole_catalogue(app).since(moment, count, _sees(app, request))
    lines = (
        {"Path": each.path, "Version": each.version, "Timestamp": _rfc3339(each.stored)}
        for each in found
    )
    body = "".join(f"{_compact(line)}\n" for line in lines)
    return Reply(200, body.encode(), _CATALOG_TYPE, (_NO_STORE,))


class Markup(str):
    """Text that is HTML already."""


def _filled(template: str, *values: object) -> Markup:
    """The only way in which HTML is made: what is not Markup is escaped."""
    safe = (v if isinstance(v, Markup) else html.escape(str(v)) for v in values)
    return Markup(template.format(*safe))


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("".join(parts))


def serve_page(app: App, request: Request) -> Reply:
    """GET /, for people; ?q= searches, ?module=&version= shows a module. No module's path can be
    one of these, since they are no paths."""
    asked = dict(urllib.parse.parse_qsl(request.query))
    overview = _overview(app)
    is_complete = overview.catalogue.is_complete()
    sees = _sees(app, request)
    status, title, words = 200, "goproxy", asked.get("q", "").strip()[:_MAX_WORDS]
    if "module" in asked:
        title = asked["module"][:_MAX_WORDS]
        found = overview.catalogue.versions(asked["module"], sees)
        status = 200 if found else 404 if is_complete else 503
        body = _module_page(app, request, found, asked) if found else _no_module(title, status)
    elif words:
        title = words
        body = _found_modules(overview.catalogue.search(words.split(), _ROWS + 1, sees), words)
    else:
        body = _front_page(app, request, overview, sees)
    note = _HINT if not is_complete else Markup()
    page = _filled(_WHOLE_PAGE, title, Markup(_STYLE), words, note, body, __version__)
    return Reply(status, page.encode(), "text/html; charset=utf-8", _PAGE_HEADERS)


def _no_module(path: str, status: int) -> Markup:
    text = "Nothing of this module is stored here" if status == 404 else "Not found so far"
    return _filled("<h1>{}</h1><section><p>{}.</p></section>", path, text)


def _front_page(app: App, request: Request, overview: Overview, sees: Sees) -> Markup:
    catalogue, chronicle = overview
    used = dict(chronicle.most_asked()[:_RANKED])
    most = [(one.path, _plural(used[one.path], "minute")) for one in catalogue.of(used, _TOP, sees)]
    latest = [
        (f"{each.path}@{each.version}", _when(each.stored / 1e6))
        for each in catalogue.latest(_TOP, sees)
    ]
    columns = (
        _top_table("Most used", "asked for in", most, f"since the start, {_ago(chronicle.began)}"),
        _top_table("Newest", "stored", latest, "the last version of each module"),
    )
    failed, absent = (
        [one for one in several if sees(one.path, 0)] for several in chronicle.troubles()
    )
    charts = _charts(chronicle.minutes())
    return _joined(
        [
            _how_to(app, request),
            _filled('<div class="grid">{}{}</div>', charts, _store_bar(app, catalogue.totals())),
            _filled('<div class="grid">{}</div>', _joined(columns)),
            _remarks_table(catalogue.remarks(), sees),
            _troubles_table("Failures of the last hour", failed),
            _troubles_table("Not found in the last hour", absent),
        ]
    )


def _own_url(app: App, request: Request) -> str:
    """Where this client reaches us. A Host that a shell could take for more than a name is not
    told again: people copy this."""
    host = request.fields.get("host", "")
    safe = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", host)
    where = f"{_scheme(app, request)}://{host if safe else 'localhost'}"
    return str(app.settings.public_url or where)


def _how_to(app: App, request: Request) -> Markup:
    lines = [f"go env -w GOPROXY={_own_url(app, request)},direct"]
    note = "The go command keeps this; go env -u GOPROXY takes it back"
    if app.gate:
        host = urllib.parse.urlsplit(_own_url(app, request)).hostname
        lines.append(f"machine {host} login USER password PASSWORD")
        note += ". The second line belongs into your netrc file, with your own name and password"
    return _filled(_HOW_TO, _joined(_filled("<code>{}</code>", line) for line in lines), note)


def _charts(minutes: Sequence[Minute]) -> Markup:
    hits, misses = sum(one.hits for one in minutes), sum(one.misses for one in minutes)
    sent, received = sum(one.sent for one in minutes), sum(one.received for one in minutes)
    ratio = f"{100 * hits / (hits + misses):.1f} %" if hits + misses else "no requests yet"
    requests = [(one.hits, one.misses) for one in minutes]
    traffic = [(one.sent, one.received) for one in minutes]
    peaks = (
        f"a bar is a minute: at most {max(map(sum, requests)):,.0f} requests",
        f"a bar is a minute: at most {shown_size(max(map(sum, traffic)))}",
    )
    legends = (("from the store", f"{hits:,.0f}"), ("fetched", f"{misses:,.0f}"))
    flows = (("to clients", shown_size(sent)), ("from upstreams", shown_size(received)))
    return _joined(
        [
            _chart("Hit ratio", ratio, requests, legends, peaks[0]),
            _chart("Traffic", shown_size(sent + received), traffic, flows, peaks[1]),
        ]
    )


def _chart(
    title: str,
    figure: str,
    pairs: Sequence[tuple[float, float]],
    legends: Sequence[tuple[str, str]],
    peak: str,
) -> Markup:
    """Pairs of the last minutes, one above the other, scaled to the highest sum."""
    most = max(map(sum, pairs)) or 1.0
    bars = []
    for place, pair in enumerate(pairs, 60 - len(pairs)):
        low, high = (round(_HEIGHT * value / most, 1) for value in pair)
        if low:
            bars.append(_filled(_MINUTE_BAR, "a", 4 * place, _HEIGHT - low, low))
        if high:
            bars.append(_filled(_MINUTE_BAR, "b", 4 * place, round(_HEIGHT - low - high, 1), high))
    told = _joined(
        _filled('<li class="{}"><b>{}</b> {}</li>', mark, amount, name)
        for mark, (name, amount) in zip("ab", legends)
    )
    label = f"{title}: {', '.join(f'{amount} {name}' for name, amount in legends)}, {peak}"
    return _filled(_CHART, title, figure, label, _joined(bars), told, peak)


def _store_bar(app: App, totals: tuple[int, int, int]) -> Markup:
    modules, versions, size = totals
    limit, bar, words = app.settings.max_size, Markup(), "no limit (-max-size) is set"
    if limit:
        size = int(METER.figures().get("goproxy_store_bytes") or size)
        share = min(100.0, 100 * size / limit)
        words = f"{share:.0f} % of {shown_size(limit)}"
        bar = _filled(_SHARE_BAR, f"{share:.0f} percent of the limit in use", f"{share:.1f}")
    held = f"{_plural(versions, 'version')} of {_plural(modules, 'module')}"
    return _filled(_STORE, shown_size(size), bar, held, words)


def _table(names: Sequence[str], rows: Iterable[Markup]) -> Markup:
    heads = _joined(_filled("<th scope=col>{}</th>", name) for name in names)
    many = Markup(" class=many" if len(names) > 2 else "")
    return _filled(_TABLE, many, heads, _joined(rows))


def _top_table(title: str, column: str, rows: Sequence[tuple[str, object]], note: str) -> Markup:
    """`rows`: MODULE or MODULE@VERSION, and what is to be told of it."""
    told = [
        _filled("<tr><td>{}</td><td>{}</td></tr>", _link(*name.partition("@")[::2]), value)
        for name, value in rows
    ]
    table = _table(("module", column), told) if rows else Markup("<p>Nothing yet.</p>")
    return _filled("<section><h2>{}</h2><p class=note>{}</p>{}</section>", title, note, table)


def _link(path: str, version: str = "") -> Markup:
    query = {"module": path, **({"version": version} if version else {})}
    told = _filled(" <span class=version>{}</span>", version) if version else Markup()
    return _filled('<a href="?{}">{}</a>{}', urllib.parse.urlencode(query), path, told)


def _troubles_table(title: str, troubles: Sequence[Trouble]) -> Markup:
    if not troubles:
        return Markup()
    rows = [
        _filled(
            "<tr><td class=size>{}{}</td><td><b class=status>{}</b></td>"
            "<td>{} <span class=version>{}</span></td><td>{}</td></tr>",
            _when(one.moment),
            f", {one.times} times" if one.times > 1 else "",
            one.status,
            one.path,
            one.version,
            one.words,
        )
        for one in troubles[:_TOP]
    ]
    table = _table(("when", "status", "module", "reason"), rows)
    return _filled("<section><h2>{}</h2>{}</section>", title, table)


def _remarks_table(remarks: Mapping[str, list[Remark]], sees: Sees) -> Markup:
    """What re-checks have found last."""
    theirs = (each for path, several in remarks.items() if sees(path, 0) for each in several)
    last = heapq.nlargest(_TOP, theirs, key=lambda each: each.since)
    rows = [
        _filled(
            "<tr><td class=size>{}</td><td>{}</td><td>{}</td></tr>",
            _when(each.since),
            _link(each.path, each.version),
            _mark(each),
        )
        for each in last
    ]
    table = _table(("found", "module", "remark"), rows)
    return _filled("<section><h2>News from upstream</h2>{}</section>", table) if last else Markup()


def _found_modules(found: Sequence[Holding], words: str) -> Markup:
    rows = [
        _filled(
            "<tr><td>{}</td><td>{}</td><td class=size>{}</td><td>{}</td></tr>",
            _link(one.path), _plural(one.versions, "version"), shown_size(one.size),
            _when(one.stored / 1e6),
        )
        for one in found[:_ROWS]
    ]  # fmt: skip
    count = f"More than {_ROWS}" if len(found) > _ROWS else f"{len(found) or 'No'}"
    table = _table(("module", "stored", "size", "the last one"), rows) if found else Markup()
    text = f"{count} stored {'module' if len(found) == 1 else 'modules'} with “{words}”"
    return _filled(
        "<h1>{}</h1>{}", text, _filled("<section>{}</section>", table) if found else table
    )


def _module_page(
    app: App, request: Request, found: Sequence[Entry], asked: Mapping[str, str]
) -> Markup:
    """The versions of a module, the highest first, and more of one of them."""
    path = found[0].path
    held = {each.version: each for each in found}
    version = asked.get("version", "")
    chosen = held.get(version) or held[newest(list(held))]
    remarks = _overview(app).catalogue.remarks().get(path, [])
    ordered = sorted(held, key=semver_key, reverse=True)
    rows = [_version_row(held[each], remarks) for each in ordered[:_ROWS]]
    gone = (each for each in remarks if each.version and each.version not in held)
    rows += [_filled(_GONE_ROW, each.version, _mark(each)) for each in gone]
    more = f"and {len(ordered) - _ROWS} older ones" if len(ordered) > _ROWS else ""
    whole = [_filled("<p>{}</p>", _mark(each)) for each in remarks if not each.version]
    info = _stored_text(app, request, Artifact(path, chosen.version, "info"))
    mod = _stored_text(app, request, Artifact(path, chosen.version, "mod"))
    return _filled(
        _MODULE,
        path,
        _joined(whole),
        f"go get {path}@{chosen.version}",
        _published(info),
        _table(("version", "stored", "size", "remarks"), rows),
        more,
        chosen.version,
        mod or "not stored",
    )


def _published(info: str) -> Markup:
    with contextlib.suppress(BadUpstream):
        moment = seconds_of(read_info(info.encode()).time)
        if moment:
            return _filled("published {}", _when(moment))
    return Markup("publication time unknown")


def _version_row(entry: Entry, remarks: Sequence[Remark]) -> Markup:
    marks = _joined(_mark(each) for each in remarks if each.version == entry.version)
    query = urllib.parse.urlencode({"module": entry.path, "version": entry.version})
    return _filled(
        '<tr><td><a href="?{}">{}</a></td><td>{}</td><td class=size>{}</td><td>{}</td></tr>',
        query, entry.version, _when(entry.stored / 1e6), shown_size(entry.size),
        Markup("<b class=mark>ours</b>") if entry.is_own else marks,
    )  # fmt: skip


def _mark(remark: Remark) -> Markup:
    return _filled(
        '<span><b class="mark {0}">{0}</b> {1}</span> ',
        remark.what,
        printable(remark.words[:_MAX_WORDS]),
    )


def _stored_text(app: App, request: Request, artifact: Artifact) -> str:
    try:
        answer = app.policy.admit(artifact.path, request.asker).small(artifact, Reach.STORED)
    except ProxyError:
        return ""
    lines = answer.data[:_MAX_SHOWN].decode("utf-8", "replace").expandtabs(4).split("\n")
    return "\n".join(map(printable, lines))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _when(moment: float) -> Markup:
    """A time as it is told, and exactly in its title."""
    exact = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
    machine = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    return _filled('<time datetime="{}" title="{}">{}</time>', machine, exact, _ago(moment))


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("year", 31557600), ("day", 86400), ("hour", 3600)):
        if seconds >= size:
            return f"{_plural(int(seconds / size), unit)} ago"
    if seconds >= 60:
        return f"{seconds / 60:.0f} min ago"
    return "just now"


_TOP, _RANKED, _ROWS, _HEIGHT, _MAX_SHOWN = 10, 2000, 200, 60, 64 << 10
_STYLE = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#1c2228;--soft:#56606b;
--line:#dde2e8;--main:#00708a;--more:#a84f00;--bad:#b3261e;--code:#eef2f5}
@media(prefers-color-scheme:dark){:root{--page:#0e1216;--card:#171d23;--ink:#e5eaf0;--soft:#9fabb8;
--line:#2a333c;--main:#5cc8e0;--more:#f0a35e;--bad:#ff8a80;--code:#0b0f13}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main,footer{max-width:68rem;margin:0 auto;padding:1rem}
header{display:flex;flex-wrap:wrap;gap:1rem;align-items:center;justify-content:space-between}
header>a{font-size:1.3rem;font-weight:700;color:inherit;text-decoration:none}
header>a b{color:var(--main)}
form{display:flex;gap:.5rem;flex:0 1 28rem}
input{flex:1;min-width:0}
input,button{font:inherit;padding:.4rem .8rem;border:1px solid var(--soft);border-radius:.5rem;
background:var(--card);color:inherit}
button{background:var(--main);border-color:var(--main);color:var(--card);font-weight:600}
:focus-visible{outline:3px solid var(--more);outline-offset:2px}
main{display:grid;gap:1rem;padding-top:0}
main>*{min-width:0}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
section{background:var(--card);border:1px solid var(--line);border-radius:.75rem;
padding:1rem 1.2rem;min-width:0}
h1{font-size:1.4rem;line-height:1.3;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1rem;margin:0}
p{margin:.3rem 0}
.note,footer,.peak,th{color:var(--soft);font-size:.875rem}
.figure{font-size:1.9rem;font-weight:700;line-height:1.2;margin:.2rem 0}
a{color:var(--main)}
code,pre,.version{font-family:ui-monospace,monospace;font-size:.9rem}
.copy code,pre{display:block;background:var(--code);border-radius:.5rem;padding:.6rem .8rem;
margin:.5rem 0;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.copy code{user-select:all;-webkit-user-select:all}
svg{display:block;width:100%;height:5rem;margin:.6rem 0 .3rem;border-bottom:1px solid var(--line)}
.a{fill:var(--main)}
.b{fill:var(--more)}
.share{height:.8rem;margin:1rem 0;border:0;border-radius:.4rem;background:var(--code)}
ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;margin:0;padding:0;font-size:.9rem}
li::before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:.2em;
margin-right:.4em;background:var(--main)}
li.b::before{background:var(--more)}
table{width:100%;border-collapse:collapse;margin-top:.4rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .8rem .35rem 0;
border-top:1px solid var(--line);overflow-wrap:anywhere}
th{border:0;font-weight:500;overflow-wrap:normal}
td:last-child,th:last-child{padding-right:0}
time,.version{color:var(--soft)}
time,.size{white-space:nowrap}
.status{color:var(--bad)}
.mark{border:1px solid;border-radius:.4rem;padding:0 .4rem;font-size:.8rem;color:var(--soft)}
.deleted,.changed{color:var(--bad)}
.retracted,.deprecated{color:var(--more)}
@media(max-width:34rem){.many thead{display:none}
.many tr{display:block;border-top:1px solid var(--line);padding:.4rem 0}
.many td{display:inline-block;border:0;padding:0 .8rem 0 0}}
"""
_WHOLE_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{}</title>
<link rel="icon" href="data:,">
<style>{}</style>
</head>
<body>
<header><a href="?"><b>go</b>proxy</a>
<form role="search"><input type="search" name="q" value="{}" aria-label="Search stored modules"
placeholder="Search stored modules"><button>Search</button></form></header>
<main>{}{}</main>
<footer>goproxy.py {} · for programs: <a href="catalog">catalog</a>, <a href="index">index</a>,
<a href="metrics">metrics</a></footer>
</body>
</html>
"""
_HINT = Markup("<p class=note>The store is being walked through: some of it is not shown yet.</p>")
_HOW_TO = """<section class="copy"><h1>Use this Go module proxy</h1>{}
<p class="note">{}.</p></section>
"""
_CHART = """<section><h2>{}, last hour</h2><p class="figure">{}</p>
<svg viewBox="0 0 240 60" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>
<ul>{}</ul><p class="peak">{}</p></section>
"""
_MINUTE_BAR = '<rect class="{}" x="{}" y="{}" width="3" height="{}"/>'
_STORE = """<section><h2>Store</h2><p class="figure">{}</p>{}
<p>{}</p><p class="note">{}</p></section>
"""
_SHARE_BAR = """<svg class="share" viewBox="0 0 100 1" preserveAspectRatio="none" role="img"
aria-label="{}"><rect class="a" width="{}" height="1"/></svg>
"""
_TABLE = "<table{}><thead><tr>{}</tr></thead><tbody>{}</tbody></table>"
_GONE_ROW = "<tr><td>{}</td><td>not stored</td><td></td><td>{}</td></tr>"
_MODULE = """<h1>{}</h1><section class="copy">{}<h2>Use it</h2><code>{}</code>
<p class="note">{}</p></section>
<section><h2>Versions</h2>{}<p class="note">{}</p></section>
<section><h2>go.mod of {}</h2><pre>{}</pre></section>
"""
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_PAGE_HEADERS = (
    _NO_STORE,
    (
        "Content-Security-Policy",
        f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)


# Most asked first.
ROUTES = [
    Route(r"(?P<module>[^@]+)/@v/list", serve_list),
    Route(
        r"(?P<module>[^@]+)/@v/(?P<version>[^/]+)\.(?P<kind>info|mod|zip)",
        serve_artifact,
        {"DELETE": Change(serve_delete, "admin"), "PUT": Change(serve_put, "publisher")},
    ),
    Route(r"(?P<module>[^@]+)/@latest", serve_latest),
    Route(
        r"sumdb/(?P<database>[^/]+)/lookup/(?P<module>[^@]+)@(?P<version>[^/]+)", serve_sum_lookup
    ),
    Route(r"sumdb/(?P<database>[^/]+)/(?P<what>tile/.+)", serve_sum_tile),
    Route(r"sumdb/(?P<database>[^/]+)/supported", serve_sum_supported),
    Route(r"sumdb/(?P<database>[^/]+)/latest", serve_sum_latest),
    Route(r"healthz?", serve_health, is_open=True),
    Route(r"metrics", serve_metrics),
    Route(r"version", serve_version, is_open=True),
    Route(r"readyz", serve_ready, is_open=True),
    Route(r"", serve_page, waits=True),
    Route(r"catalog", serve_catalog, waits=True),
    Route(r"index", serve_index, waits=True),
]
_GO_GET = Route(r"", serve_go_get)
_CACHED_ONLY = "cached-only/"


def decode_path(target: str) -> str:
    """A target's path, percent-decoded once, without its leading slash. Raises BadName for what
    no name here can hold: it must not reach a disk, an upstream or a log."""
    if "%" not in target:
        return target[1:]
    if re.search(r"%(?![0-9A-Fa-f]{2})|%2[fF]|%5[cC]", target):
        raise BadName("invalid path")
    try:
        path = urllib.parse.unquote_to_bytes(target).decode("utf-8")
    except UnicodeDecodeError:
        raise BadName("invalid path") from None
    if not path.isprintable():
        raise BadName("invalid path")
    return path[1:]


def dispatch(app: App, request: Request) -> Reply:
    """The reply of the endpoint that the target names. Raises ProxyError, MustWait."""
    if request.fields.get(HOP_FIELD.lower()) == HOP:
        raise LoopFound("the upstream leads back to this proxy")
    if request.is_passed:
        return serve_registry(app, request)
    path = decode_path(request.target)
    asked = request.reach
    if app.settings.offline or request.fields.get("disable-module-fetch", "").lower() == "true":
        request = request._replace(reach=Reach.STORED)
    if path.startswith(_CACHED_ONLY):
        path = path[len(_CACHED_ONLY) :]
        request = request._replace(reach=Reach.STORED)
    route, groups = (_GO_GET, {"package": path}) if request.go_get else _route(path)
    change = route.changes.get(request.method) if route and app.settings.modules else None
    if app.gate and not (route and route.is_open):
        module = groups.get("module")
        user = app.gate.user(request)
        role = change.role if change else ROLES[0]
        user.check(role, None if module is None else unescape_path(module))
        request = request._replace(user=user.name)
    if not route:
        raise BadName("no such page")
    if request.method not in ("GET", "HEAD") and not (change and app.gate):
        raise MethodNotAllowed("only GET and HEAD are allowed here")
    if route.waits and asked is Reach.READY:
        raise MustWait
    endpoint = change.endpoint if change else route.endpoint
    try:
        return _explained(lambda: endpoint(app, request, **groups), path)
    except ProxyError as error:
        _note(app, groups, error)
        raise


def _note(app: App, groups: Mapping[str, str], error: ProxyError) -> None:
    """Remembers what was wrong with a module, unless that is with who asked for it."""
    if "module" in groups and not isinstance(error, (BadName, NotHere, Unauthorized)):
        path, version = unescape_path(groups["module"]), groups.get("version", "")
        words = printable(str(error)[:_MAX_WORDS])
        app.failed(Trouble(error.status, path, version, words, time.time()))


_MAX_WORDS = 500


def _route(path: str) -> tuple[Route | None, dict[str, str]]:
    for route in ROUTES:
        match = re.fullmatch(route.pattern, path)
        if match:
            return route, match.groupdict()
    return None, {}


def _explained(work: Callable[[], Reply], path: str) -> Reply:
    """Absence in the words the go command shows: not found: <module>@<version>: <reason>."""
    try:
        return work()
    except BadName:
        raise
    except NotFound as error:
        module, _, rest = path.partition("/@")
        version = (
            re.sub(r"^v/|\.(info|mod|zip)$", "", rest) if rest not in ("v/list", "latest") else ""
        )
        named = f"{module}@{version}: " if version else f"{module}: "
        named = re.sub("!([a-z])", lambda lower: lower[1].upper(), named)
        words = str(error)  # another proxy names it, too
        raise type(error)(words if words.startswith(named) else named + words) from None


def respond(app: App, request: Request) -> Reply:
    """The reply to a request, whatever happens; only MustWait passes through."""
    reply = _respond(app, request)
    is_personal = app.settings.private_auth == "client" and reply.status >= 400
    if not (app.gate or is_personal) or reply.is_passed:
        return reply
    # "public" would let a shared cache give it to anybody (RFC 9111, section 3.5).
    headers = ((name, re.sub(r"^public\b", "private", value)) for name, value in reply.headers)
    return reply._replace(headers=tuple(headers))


def _respond(app: App, request: Request) -> Reply:
    try:
        return dispatch(app, request)
    except MustWait:
        raise
    except ProxyError as error:
        if request.is_passed:
            return refuse_registry(app, request, error)
        return refuse(error, min(app.settings.ttl, ABSENT_SECONDS))
    except MemoryError:
        app.log.error(f"{request.target}: out of memory", status=503)
        return refuse(Overloaded("out of memory"))
    except Exception:
        app.log.error(f"{request.target}: internal error\n{traceback.format_exc()}", status=500)
        return refuse(ProxyError("internal error"))


def refuse(error: ProxyError, ttl: float = 0) -> Reply:
    """An error as a reply that the go command shows to its user; absence is so for ttl seconds."""
    words = "not found: " if isinstance(error, NotFound) else ""
    is_absent = isinstance(error, NotFound) and not isinstance(error, NotHere)
    control = f"public, max-age={int(ttl)}" if is_absent else "no-store"
    headers = [("Cache-Control", control), *error.headers()]
    return Reply(error.status, f"{words}{error}\n".encode(), headers=tuple(headers))


_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def _span(request: Request, reply: Reply, size: int | None) -> tuple[int, int] | None:
    """First and last-plus-one byte of a single satisfiable range, None to send everything.
    Raises BadRange (RFC 9110, section 14)."""
    match = _RANGE.fullmatch(request.fields.get("range", ""))
    if not match or size is None or reply.status != 200 or request.method != "GET":
        return None
    if request.fields.get("if-range", reply.etag) != reply.etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < start:
        return None
    if start >= size or start >= end:
        raise BadRange(size)
    return (start, end)


def _not_modified(request: Request, reply: Reply) -> bool:
    wanted = request.fields.get("if-none-match")
    if wanted is None or not reply.etag:
        return False
    tags = [tag.strip() for tag in wanted.split(",")]
    return wanted.strip() == "*" or reply.etag in [
        tag[2:] if tag[:2] == "W/" else tag for tag in tags
    ]


_SAFE_FIELD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [\t\x20-\x7e\x80-\xff]*")


def head_bytes(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """A reply's head but for its end (see head_end). What could split it is a bug of ours and
    raises ValueError."""
    phrase = BaseHTTPRequestHandler.responses.get(status, ("Unknown", ""))[0]
    lines = [f"HTTP/1.1 {status} {phrase}"]
    for name, value in headers:
        line = f"{name}: {value}"
        if not _SAFE_FIELD.fullmatch(line):
            raise ValueError(f"unsafe header {name}")
        lines.append(line)
    return "\r\n".join([*lines, ""]).encode("latin-1")


def head_end(second: int) -> bytes:
    """The last field of every head and the empty line; `second` is the time since the epoch."""
    moment = time.gmtime(second)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.tm_wday]
    month = _MONTHS[moment.tm_mon - 1]
    return time.strftime(f"Date: {day}, %d {month} %Y %H:%M:%S GMT\r\n\r\n", moment).encode()


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Message(NamedTuple):
    """A reply as it goes out: `head` but for its end, `body` in memory, and then `left` bytes of a
    blob from its offset on; None stands for all there are, in chunks."""

    status: int
    head: bytes
    body: bytes = b""
    blob: FileBlob | None = None
    left: int | None = 0
    is_dated: bool = False  # whether the head has a date already


def compose(request: Request | None, reply: Reply, keep: bool) -> Message:
    """What a request (None: something that was no request) gets for a reply, with its conditions
    and ranges heeded. The message owns the reply's blob."""
    try:
        return _compose(request, reply, keep)
    except BadRange as error:
        _close_body(reply)
        return _compose(request, refuse(error), keep)


def _close_body(reply: Reply) -> None:
    if isinstance(reply.body, FileBlob):
        reply.body.close()


def _compose_passed(reply: Reply, keep: bool) -> Message:
    """Somebody else's reply, as it came but for what is about this connection."""
    headers, body = list(reply.headers), reply.body
    is_dated = any(name.lower() == "date" for name, _ in headers)
    if not keep:
        headers.append(("Connection", "close"))
    if body is None:
        return Message(reply.status, head_bytes(reply.status, headers), is_dated=is_dated)
    size = body.size if isinstance(body, FileBlob) else len(body)
    framing = ("Transfer-Encoding", "chunked") if size is None else ("Content-Length", str(size))
    headers = [each for each in headers if each[0].lower() != "content-length"]
    head = head_bytes(reply.status, [*headers, framing])
    if isinstance(body, bytes):
        return Message(reply.status, head, body, is_dated=is_dated)
    return Message(reply.status, head, b"", body, size, is_dated)


def _compose(request: Request | None, reply: Reply, keep: bool) -> Message:
    if reply.is_passed:
        return _compose_passed(reply, keep)
    status, body = reply.status, reply.body
    headers = [("Server", "goproxy"), ("Content-Type", reply.content_type), *reply.headers]
    etag = reply.etag
    if etag:
        headers += [("ETag", etag), ("Accept-Ranges", "bytes")]
    if not keep:
        headers.append(("Connection", "close"))
    if request and _not_modified(request, reply):
        _close_body(reply)
        return Message(304, head_bytes(304, headers))
    size = body.size if isinstance(body, FileBlob) else None if body is None else len(body)
    start, end = 0, size
    span = _span(request, reply, size) if request else None
    if span:
        status, (start, end) = 206, span
        headers.append(("Content-Range", f"bytes {start}-{end - 1}/{size}"))
    if end is not None:
        headers.append(("Content-Length", str(end - start)))
    elif body is not None:
        headers.append(("Transfer-Encoding", "chunked"))
    head = head_bytes(status, headers)
    if body is None or (request and request.method == "HEAD"):
        _close_body(reply)
        return Message(status, head)
    if isinstance(body, bytes):
        return Message(status, head, body[start:end])
    body.offset = start
    return Message(status, head, b"", body, None if end is None else end - start)


class TlsSocket(ssl.SSLSocket):
    """A TLS connection that looks like a socket which does not block: whatever TLS waits for is a
    BlockingIOError, and what has been decrypted is never left where no poller sees it."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            data = super().recv(buflen)
            while self.pending():
                data += super().recv(self.pending())
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        return data

    def send(self, data: Any, flags: int = 0) -> int:
        """As much as the socket takes, though OpenSSL takes a record at a time. After a
        BlockingIOError the next call must bring the same bytes, or more."""
        sent = 0
        with memoryview(data) as view:
            try:
                while sent < len(view):
                    sent += super().send(view[sent : sent + _TLS_RECORD])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not sent:
                    raise BlockingIOError from None
        return sent

    def shutdown(self, how: int) -> None:
        """Says that no more comes, in TLS and below it; nobody waits for the client's word."""
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()
        super().shutdown(how)


_TLS_RECORD = 16384  # bytes, the most in one record (RFC 8446, section 5.1)


class Tls:
    """A certificate and its key. `context` is replaced as a whole, and only by a good one."""

    def __init__(self, cert: str, key: str) -> None:
        """Files in PEM form; no key: it stands in the file of the certificate. Raises
        ValueError saying what is wrong."""
        self._cert, self._key = cert, key
        self.reload()

    def reload(self) -> None:
        """Reads the files; raises ValueError and keeps what it has if they are bad."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = TlsSocket
        context.set_alpn_protocols(["http/1.1"])
        # The empty password is given so that nobody is asked for one on the terminal.
        try:
            context.load_cert_chain(self._cert, self._key or None, password="")
        except OSError as error:
            reason = str(error.strerror).partition(" (_ssl")[0]
            key = f" in {self._key}" if self._key else ""
            raise ValueError(
                f"no certificate with its key{key}, as PEM without a password: {reason}"
            ) from None
        self.context = context

    def wrap(self, sock: socket.socket) -> TlsSocket:
        """A connection on which nothing has been said yet."""
        wrapped = self.context.wrap_socket(sock, True, do_handshake_on_connect=False)
        assert isinstance(wrapped, TlsSocket)
        return wrapped


class Step(enum.Enum):
    """What a transfer needs to go on."""

    DONE = "nothing, it is complete"
    SOCKET = "the client to read"
    BLOB = "the body to grow"
    TURN = "its next turn"


class Transfer:
    """A message on its way: as much as the socket takes and the body has, in turns, so that one
    big body does not keep the others waiting."""

    TURN = 1024 * 1024  # bytes

    def __init__(
        self,
        sock: socket.socket,
        pending: bytes,
        blob: FileBlob | None,
        left: int | None,
        ended: Callable[[int], None],
    ) -> None:
        """`pending` goes out before the blob; at the end `ended` is told how many bytes went."""
        self._sock = sock
        self._pending = memoryview(pending)
        self._blob = blob
        self._left = left
        self._ended = ended
        self.sent = 0

    def step(self) -> Step:
        """Sends what can be sent now. Raises OSError when the client is gone, and ProxyError when
        the rest of the body will never come: then the connection must be closed short."""
        budget = self.TURN
        try:
            while budget > 0:
                if self._pending:
                    budget -= self._send_pending()
                    continue
                if self._blob is None or self._left == 0:
                    return Step.DONE
                ready = self._blob.ready()
                if ready == 0:
                    return Step.BLOB
                asked = min(ready or 0, self._left or 0, budget)
                count = self._send_body(self._blob, ready, asked)
                if count < asked:
                    return Step.SOCKET  # it is full; no need to be told so once more
                budget -= count
        except (BlockingIOError, ssl.SSLWantWriteError):
            return Step.SOCKET
        return Step.TURN

    def is_at_hand(self) -> bool:
        """Whether the next step cannot wait for a disk, and has no big part to encrypt."""
        if self._blob is None:
            return True
        return not isinstance(self._sock, TlsSocket) and self._blob.is_at_hand(
            self.TURN if self._left is None else min(self.TURN, self._left)
        )

    def _send_pending(self) -> int:
        # The head of a big body shares a packet with its beginning.
        count = self._sock.send(self._pending, _MORE if self._blob and self._left else 0)
        self._pending = self._pending[count:]
        self.sent += count
        return count

    def _send_body(self, blob: FileBlob, ready: int | None, asked: int) -> int:
        if self._left is None:
            self._pending = memoryview(self._chunk(blob, ready))
            return 0
        if ready is None:
            raise StoreDown("a body ended early")
        count = self._send_file(blob, asked)
        if count == 0:
            raise StoreDown("a stored file became shorter while it was sent")
        blob.offset += count
        self._left -= count
        self.sent += count
        return count

    def _chunk(self, blob: FileBlob, ready: int | None) -> bytes:
        if ready is None:
            self._drop_blob()
            return b"0\r\n\r\n"
        data = blob.read(min(ready, CHUNK))
        return b"%x\r\n%b\r\n" % (len(data), data)

    def _send_file(self, blob: FileBlob, count: int) -> int:
        if can_send_file(self._sock, blob):
            return blob.send_to(self._sock.fileno(), blob.offset, count)
        return self._sock.send(blob.peek(min(count, CHUNK)))

    def when_ready(self, wake: Callable[[], None]) -> None:
        """Calls wake when the body has grown."""
        if self._blob is not None:
            self._blob.when_ready(wake)

    def _drop_blob(self) -> None:
        if self._blob is not None:
            self._blob.close()
            self._blob = None

    def close(self) -> None:
        """Ends it, done or not; only once."""
        self._drop_blob()
        self._ended(self.sent)


_MORE: int = getattr(socket, "MSG_MORE", 0)


def can_send_file(sock: socket.socket, blob: FileBlob) -> bool:
    """Whether the system can send a blob without bringing it to us."""
    in_memory = blob.descriptor == OpenBytes.NO_DESCRIPTOR
    return hasattr(os, "sendfile") and not in_memory and not isinstance(sock, TlsSocket)


class _Remembered:
    """A reply that was right, and is as long as its file's stamp holds."""

    def __init__(self, target: str, stored: Stamped, message: Message) -> None:
        self.target = target
        self.kind = kind_of(target)
        self.stored = stored
        self.blob = message.blob
        self.left = (message.left or 0) if message.blob else 0  # bytes after the opening
        self._head = message.head
        self._body = message.body
        self._second = 0
        self._bytes = b""

    def opening(self, second: int) -> bytes:
        """Head and small body, made anew each second for the sake of the date."""
        if second != self._second:
            self._second = second
            self._bytes = b"".join((self._head, head_end(second), self._body))
        return self._bytes

    def send(self, sock: socket.socket, opening: bytes) -> int:
        """Sends what the socket takes at once and no disk is waited for; the number of bytes.
        Raises OSError when the client is gone."""
        sent = 0
        try:
            if self.blob is None:
                sent = sock.send(opening)
            elif self._is_one_turn(sock, self.blob):
                sent = sock.send(opening, _MORE)
                if sent == len(opening):
                    sent += self.blob.send_to(sock.fileno(), 0, self.left)
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        return sent

    def _is_one_turn(self, sock: socket.socket, blob: FileBlob) -> bool:
        whole = self.left <= Transfer.TURN and can_send_file(sock, blob)
        return whole and blob.is_at_hand(self.left)

    def rest(
        self, sock: socket.socket, opening: bytes, sent: int, ended: Callable[[int], None]
    ) -> Transfer:
        """What is left of it after so many bytes."""
        blob = self.blob.again() if self.blob else None
        into = max(0, sent - len(opening))
        if blob:
            blob.offset = into
        transfer = Transfer(sock, opening[sent:], blob, self.left - into, ended)
        transfer.sent = sent
        return transfer

    @property
    def cost(self) -> int:
        return 1024 + 2 * len(self._body)


class HotMemory:
    """Replies the loop can give without a thread: immutable artifacts, by the first line of their
    request, for the `fields` that decide nothing: clients send few different ones. Small bodies are
    kept in memory, big ones as open files, which do not push them out: one build asks for a hundred
    zips. Each is used only while the store still has the very file it was made from, which one
    stat tells."""

    _BYTES, _FILES, _SMALL, _FIELDS = 32 << 20, 512, 64 << 10, 1024
    _FILE_SECONDS = 60  # the space of a file that is evicted is free when nobody has it open

    def __init__(self, policy: Policy, files: int) -> None:
        """`files`: how many may be kept open."""
        self._stamp = policy.stamp
        self._files = max(8, min(files, self._FILES))
        self._cost = 0
        self._replies: collections.OrderedDict[bytes, _Remembered] = collections.OrderedDict()
        self._open: collections.OrderedDict[bytes, float] = collections.OrderedDict()  # until when
        self.fields: set[bytes] = set()

    def know(self, fields: bytes) -> None:
        """Remembers the fields of a plain request, from the end of its first line on."""
        if len(self.fields) >= self._FIELDS:
            self.fields.clear()
        self.fields.add(fields)

    def get(self, line: bytes, fields: bytes) -> _Remembered | None:
        reply = self._replies.get(line) if fields in self.fields else None
        stored = reply.stored if reply else None
        if stored and (stored.stamp in UNREADABLE or self._stamp(stored.name) != stored.stamp):
            self._drop(line)
            return None
        return reply

    def put(self, target: str, stored: Stamped, message: Message, now: float) -> None:
        """Remembers a message and its blob, if any. `now`: monotonic."""
        if message.status != 200 or message.left is None or len(message.body) > self._SMALL:
            return
        line = f"GET {target} HTTP/1.1".encode()
        self._drop(line)
        self._replies[line] = reply = _Remembered(target, stored, message)
        self._cost += reply.cost
        if reply.blob:
            self._open[line] = now + self._FILE_SECONDS
        while self._cost > self._BYTES:
            self._drop(next(iter(self._replies)))
        while len(self._open) > self._files:
            self._drop(next(iter(self._open)))

    def expire(self, now: float) -> None:
        """Lets go of the files that have been open for long. `now`: monotonic."""
        while self._open and now >= next(iter(self._open.values())):
            self._drop(next(iter(self._open)))

    def _drop(self, line: bytes) -> None:
        reply = self._replies.pop(line, None)
        if reply:
            self._cost -= reply.cost
            self._open.pop(line, None)


class Courier:
    """The sending half of a connection: it brings a transfer to its end, turn by turn."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.loop = server
        self.sock = sock
        self.deadline = server.now + _IDLE_SECONDS  # monotonic; then the loop loses patience
        self.filed = 0  # the second at which the loop looks at the deadline
        self.interest = 0  # what the loop waits for
        self.polled = 0  # what the poller has been told
        self.served = 0  # replies
        self._transfer: Transfer | None = None

    def receive(self, count: int = 65536, flags: int = 0) -> bytes | None:
        """What has arrived; b"" at the end of the connection; None: it is still to come."""
        try:
            return self.sock.recv(count, flags)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def on_event(self) -> None:
        """The socket is ready for what it was polled for."""
        raise NotImplementedError

    def expire(self) -> None:
        """The deadline has passed."""
        raise NotImplementedError

    def finish(self) -> None:
        """A reply is out."""
        raise NotImplementedError

    def is_idle(self) -> bool:
        """Whether it may be closed without anybody losing an answer."""
        raise NotImplementedError

    def is_asked(self) -> bool:
        """Whether a request is being answered."""
        return False

    def dismiss(self) -> None:
        """Ends it in a moment if it is idle: a request may be on its way, and the answer to that
        tells the client that it is the last one."""
        self.on_event()
        if self.is_idle():
            self.loop.allow(self, _LINGER_SECONDS)

    def resume(self) -> None:
        """Goes on sending: in the loop where nothing can be waited for, else in a lane."""
        if self._transfer is None:
            return  # closed meanwhile
        if self._transfer.is_at_hand():
            self.push()
        else:
            self.loop.poll(self, 0)
            self.loop.transfer_lane.do(self.push)

    def push(self) -> None:
        """Sends what can be sent, and arranges for the rest."""
        assert self._transfer is not None
        try:
            step = self._transfer.step()
        except (OSError, ProxyError):
            self.loop.soon(self.close)
            return
        if step is Step.DONE:
            self.loop.soon(self.finish)
        elif step is Step.SOCKET:
            self.loop.soon(self._wait_for_client)
        elif step is Step.BLOB:
            self.loop.soon(self._wait_for_blob)
        else:
            self.loop.soon(self._wait_for_turn)

    def _wait_for_turn(self) -> None:
        self.loop.poll(self, 0)  # else an event would begin a second turn beside the one posted
        self.loop.post(self.resume)

    def _wait_for_client(self) -> None:
        self.loop.poll(self, WRITABLE)
        self.loop.allow(self, _STALL_SECONDS)

    def _wait_for_blob(self) -> None:
        self.loop.poll(self, 0)
        if self._transfer is not None:
            self._transfer.when_ready(lambda: self.loop.post(self.resume))

    def close(self) -> None:
        """Ends the connection, and its transfer, wherever they are."""
        self.loop.forget(self)
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        self.sock.close()


class Handshake(Courier):
    """A client of a TLS port until TLS is spoken with it. The loop waits for its bytes; what they
    cost to work on, a signature most of all, is paid in a lane, step by step."""

    def __init__(self, server: Server, tls: Tls, sock: socket.socket, client: str) -> None:
        super().__init__(server, sock)
        self._tls = tls
        self._client = client
        self._until = server.now + _HEAD_SECONDS

    def on_event(self) -> None:
        has_begun = isinstance(self.sock, TlsSocket)
        first = _HELLO if has_begun else self.receive(1, socket.MSG_PEEK)
        if first == _HELLO:
            self.loop.poll(self, 0)
            if not has_begun:
                self.loop.ignore(self)  # while it is taken apart, the socket has no descriptor
            self.loop.handshake_lane.do(self._advance)
        elif first:
            self._pass_on().reject(BadRequest("this port speaks TLS: ask https:// for it"))
        elif first is not None:
            self.close()

    def _advance(self) -> None:
        try:
            if not isinstance(self.sock, TlsSocket):
                self.sock = self._tls.wrap(self.sock)
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.loop.soon(lambda: self._wait(READABLE))
        except ssl.SSLWantWriteError:
            self.loop.soon(lambda: self._wait(WRITABLE))
        except OSError:
            self.loop.soon(self.close)
        else:
            self.loop.soon(self.finish)

    def _wait(self, interest: int) -> None:
        self.loop.poll(self, interest)
        self.loop.allow(self, self._until - self.loop.now)

    def finish(self) -> None:
        handler = self._pass_on()
        if self.loop.draining:
            self.loop.allow(handler, _LINGER_SECONDS)

    def _pass_on(self) -> Handler:
        self.loop.forget(self)
        return self.loop.admit(self.sock, self._client)

    def expire(self) -> None:
        self.close()

    def is_idle(self) -> bool:
        return self.interest != 0  # nothing has been asked yet


_HELLO = b"\x16"  # the first byte of what a TLS client says (RFC 8446, section 5.1)


class RelayEnd(Courier):
    """One end of a relay: what arrives here leaves at the other end. A TLS connection cannot move
    to the process that fetches, so one end of a socket pair does, and this process relays."""

    def __init__(self, server: Server, sock: socket.socket, patience: float) -> None:
        """`patience`: how many seconds the peer may go on after we have ended."""
        super().__init__(server, sock)
        self.other = self
        self._patience = patience
        self._rest = b""
        self._ends = False

    def on_event(self) -> None:
        if self._rest:
            self._give(b"")
            return
        data = self.receive()
        if data:
            self.other._give(data)
        elif data is not None:
            self.loop.poll(self, 0)
            self.other._end()

    def _give(self, data: bytes) -> None:
        """Sends data; while some is left, the other end reads no more."""
        self._rest += data
        try:
            self._rest = self._rest[self.sock.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._rest:
            self.loop.poll(self, WRITABLE)
            self.loop.poll(self.other, 0)
            self.loop.allow(self, _STALL_SECONDS)
        elif self._ends:
            self._end()
        else:
            self.loop.poll(self, READABLE)
            self.loop.poll(self.other, READABLE)

    def _end(self) -> None:
        """No more comes from the other end: says so once all is sent."""
        self._ends = True
        if self._rest:
            return
        if self.other._ends:
            self.close()
            return
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.loop.poll(self, READABLE)
        self.loop.allow(self, self._patience)

    def close(self) -> None:
        for end in (self, self.other):
            Courier.close(end)

    def expire(self) -> None:
        if self._rest or self._ends:
            self.close()

    def is_idle(self) -> bool:
        return False  # the process that fetches knows, and closes its end


def relay(courier: Courier, fetcher: socket.socket, read: bytes) -> None:
    """Hands over a socket in the place of a connection's own, with what has been read from it, and
    puts a relay between the two. Raises OSError."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with far:
        try:
            socket.send_fds(fetcher, [read], [far.fileno()])
        except OSError:
            near.close()
            raise
    loop = courier.loop
    ends = RelayEnd(loop, courier.sock, _LINGER_SECONDS), RelayEnd(loop, near, _FETCH_SECONDS)
    ends[0].other, ends[1].other = ends[1], ends[0]

    def begin() -> None:
        loop.forget(courier)
        for end in ends:
            loop.enter(end, _IDLE_SECONDS)

    loop.post(begin)


class Handler(Courier, BaseHTTPRequestHandler):
    """One client connection. The front loop owns it while it waits for a request, for the client
    to read or for the end; while a request is worked on it belongs to a lane and is not polled."""

    def __init__(self, server: Server, sock: socket.socket, client: str) -> None:
        """Not BaseHTTPRequestHandler's, which would serve the whole connection here and now."""
        Courier.__init__(self, server, sock)
        self.client = client
        self._lingering = False
        self._keep = True
        self._buffer = b""
        self._skip = 0  # bytes of an unwanted body still to come
        self._head = b""
        self._asked: Request | None = None
        self._begun = server.now
        self._announced = False
        self._left = ""  # what the process that has handed it over says of its span
        self._span: Span | None = None

    def is_idle(self) -> bool:
        return self.interest == READABLE and not self._buffer and not self._skip

    def is_asked(self) -> bool:
        return self._asked is not None

    def on_event(self) -> None:
        if self._transfer is not None:
            self.resume()
        elif self._lingering:
            self._linger()
        else:
            self._receive()

    def _receive(self) -> None:
        data = self.receive()
        if data is None:
            return
        self.loop.access.received += len(data)
        if not data:
            self.close()
        elif self._buffer or self._asked:
            self._buffer += data
            self.advance()
        elif not self._serve_hot(data):
            self.loop.allow(self, _HEAD_SECONDS)
            self._buffer = data
            self.advance()

    def _serve_hot(self, data: bytes) -> bool:
        """Answers in the loop itself, if `data` is exactly one request whose fields are known word
        by word and its reply is at hand."""
        loop, span = self.loop, None
        end = data.find(b"\r\n")
        fields = data[end:]
        if fields not in loop.hot.fields and len(data) <= _KNOWN_LIMIT:
            fields, told = without_passing(fields)
            span = TRACER.serve(told) if "traceparent" in told else None
        is_last = loop.draining or self.served >= _REQUESTS_PER_CONNECTION
        reply = None if is_last else loop.hot.get(data[:end], fields)
        if reply is None:
            return False
        loop.app.used(reply.stored.name)
        opening = reply.opening(loop.second)
        try:
            sent = reply.send(self.sock, opening)
        except OSError:
            self.close()
            return True
        if sent == len(opening) + reply.left:
            self.served += 1
            self.deadline = loop.now + _IDLE_SECONDS
            loop.access.hit(self.client, reply, sent, loop.now, span)
        else:
            self._keep = True
            visit = loop.access.begins_hit(self.client, reply, loop.now, span)
            ended = functools.partial(loop.access.ends, visit)
            self._transfer = reply.rest(self.sock, opening, sent, ended)
            self.resume()
        return True

    def advance(self) -> None:
        """Takes the next request from what has been received, if it is complete."""
        if self._transfer is not None or self.interest != READABLE:
            return
        if self._asked is None:
            received = self._buffer
            try:
                head, self._buffer = split_head(received)
                if head is None:
                    return
                self._asked = parse_request(head, self.loop.passed)._replace(client=self.client)
            except ProxyError as error:
                self.reject(error)
                return
            self._head = head
            awaits = "expect" in self._asked.fields  # and need not send: the answer is the last one
            self._skip = 0 if awaits else self._asked.body
            if self._asked.has_upload:  # the body stays where it is until somebody wants it
                self._asked = with_upload(self._asked, self.sock, self._buffer)
                self._buffer, self._skip = b"", 0
            if not self._buffer and len(received) <= _KNOWN_LIMIT and self._is_alike():
                fields = head[head.find(b"\r\n") :] + b"\r\n\r\n"  # not those behind an empty line
                self.loop.hot.know(without_passing(fields)[0])
        taken = min(self._skip, len(self._buffer))
        self._skip -= taken
        self._buffer = self._buffer[taken:]
        if self._skip == 0:
            self._begin(self._asked)

    def _is_alike(self) -> bool:
        """Whether whoever sends these very fields again gets the same as everybody."""
        return bool(self._asked and self._asked.is_plain and not self.loop.app.gate)

    def _begin(self, request: Request) -> None:
        self.loop.poll(self, 0)
        self._begun = self.loop.now
        self._span, self._left = TRACER.serve(request.fields, self._left), ""
        if not self._announced:
            self.loop.access.begins(self.client, request)
        self._announced = False
        lane = self.loop.lane_for(request)
        if request.target == _HEALTH:
            self.work()
        elif lane:
            lane.do(self.work)
        else:
            self._start(refuse(Overloaded("too many passwords to check")))

    def work(self) -> None:
        """Answers with what is at hand; what must be waited for goes where misses are fetched."""
        assert self._asked is not None
        try:
            answered = functools.partial(respond, self.loop.app, self._asked)
            self._start(TRACER.inside(self._span, answered))
        except MustWait:
            if not self._hand_over():
                self._asked = self._asked._replace(reach=Reach.FETCH)
                self.loop.waiting_lane_for(self._asked).do(self.work)
        except Exception:
            self.loop.soon(self.close)
            raise

    def _hand_over(self) -> bool:
        """Gives the connection, and what has been read from it, to the process that fetches."""
        if self.loop.fetcher is None or self.loop.draining or self._asked is None:
            return False
        unread = bytes(self._asked.body) + self._buffer  # a body is passed over there once more
        who = f"{self.client} {TRACER.leave(self._span)}" if self._span else self.client
        read = b"\n".join((who.encode(), self._head + b"\r\n\r\n" + unread))
        try:
            if not _is_ready(self.loop.fetcher, WRITABLE, _HAND_OVER_SECONDS):
                return False  # it has enough to do: then this process fetches, too
            if isinstance(self.sock, TlsSocket):
                relay(self, self.loop.fetcher, read)
                return True
            socket.send_fds(self.loop.fetcher, [read], [self.sock.fileno()])
        except OSError:
            return False
        self.loop.post(self.close)
        return True

    def take_over(self, read: bytes, left: str) -> None:
        """Goes on with a connection that another process has handed over."""
        self._announced = True
        self._left = left
        self._buffer = read
        self.advance()

    def reject(self, error: ProxyError) -> None:
        """Answers something that is no request, and closes."""
        self.loop.poll(self, 0)
        self._begun = self.loop.now
        self._buffer = b""
        self._send(None, refuse(error), keep=False)

    def _start(self, reply: Reply) -> None:
        request = self._asked
        assert request is not None
        upload = request.upload
        keep = request.keep and not self.loop.draining
        keep = keep and (upload.is_over if upload else not request.body)
        if keep and upload:
            self._buffer = upload.rest
        if isinstance(reply.body, FileBlob) and reply.body.size is None and not request.chunks:
            try:
                reply.body.wait_for_end()  # HTTP/1.0 has no chunks: the length comes first
            except ProxyError as error:
                reply = refuse(error)
        self._send(request, reply, keep)

    def _send(self, request: Request | None, reply: Reply, keep: bool) -> None:
        message = compose(request, reply, keep)
        if reply.stored and request and keep and self._is_alike():
            self.loop.remember(request.target, reply.stored, message)
        self._keep = keep
        end = b"\r\n" if message.is_dated else head_end(int(time.time()))
        opening = message.head + end + message.body
        access = self.loop.access
        visit = access.answers(self.client, request, message, reply.verdict, self._begun)
        visit = visit._replace(span=self._span if request else None)
        ended = functools.partial(access.ends, visit)
        self._transfer = Transfer(self.sock, opening, message.blob, message.left, ended)
        self.push()

    def finish(self) -> None:
        """On to the next request, or to the end of the connection."""
        if self._transfer is None:
            return  # closed meanwhile
        self._transfer.close()
        self._transfer = self._asked = None
        self.served += 1
        if not self._keep or self.loop.draining or self.served >= _REQUESTS_PER_CONNECTION:
            self._begin_linger()
            return
        self.loop.allow(self, _HEAD_SECONDS if self._buffer else _IDLE_SECONDS)
        if self._buffer:  # it comes before the end of the connection, which may be here as well
            self.loop.post(self._go_on)
        else:
            self.loop.poll(self, READABLE)

    def _go_on(self) -> None:
        self.loop.poll(self, READABLE)
        self.advance()

    def _begin_linger(self) -> None:
        """Reads on for a moment: a close with unread input would make the kernel throw away the
        reply that is still on its way."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._lingering = True
        self.loop.poll(self, READABLE)
        self.loop.allow(self, _LINGER_SECONDS)

    def _linger(self) -> None:
        data = self.receive()
        self._skip += len(data or b"")
        if data == b"" or self._skip > _LINGER_LIMIT:
            self.close()

    def expire(self) -> None:
        waiting = self._transfer is None and not self._lingering
        if waiting and (self._buffer or self._skip):
            self.reject(HeadTooSlow("request head too slow"))
            return
        if self._transfer is not None:
            METER.add("goproxy_stalled_clients_total")
        self.close()


READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
_HEALTH = "/health"
_HEAD_SECONDS, _IDLE_SECONDS, _STALL_SECONDS, _LINGER_SECONDS = 10.0, 75.0, 60.0, 1.0
_REQUESTS_PER_CONNECTION = 100_000
_LINGER_LIMIT = 16 << 20  # bytes of a body that is refused
_STRANGERS = 64  # whose passwords wait to be checked
_HAND_OVER_SECONDS, _FETCH_SECONDS = 0.5, 3600.0
_KNOWN_LIMIT = 1024  # bytes of a head that is remembered


def _is_ready(sock: socket.socket, interest: int, seconds: float) -> bool:
    """Whether a socket has or takes bytes within so many seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, interest)
        return bool(selector.select(seconds))


class SelectPoller:
    """Which descriptors are ready, on any platform."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def set(self, descriptor: int, before: int, interest: int, shared: bool = False) -> None:
        """Changes what a descriptor is polled for: 0, READABLE or WRITABLE. `shared` ones are
        polled by several processes, of which few need to wake."""
        if not before:
            self._selector.register(descriptor, interest)
        elif not interest:
            self._selector.unregister(descriptor)
        else:
            self._selector.modify(descriptor, interest)

    def wait(self, seconds: float) -> list[int]:
        """Descriptors that are ready, after at most so many seconds."""
        return [key.fd for key, _ in self._selector.select(seconds)]

    def close(self) -> None:
        self._selector.close()


class EpollPoller(SelectPoller):
    """The same by epoll itself: half the cost of an event, and no herd at shared descriptors."""

    _EVENTS = 512

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def set(self, descriptor: int, before: int, interest: int, shared: bool = False) -> None:
        events = select.EPOLLIN if interest == READABLE else select.EPOLLOUT
        if not before:
            events |= getattr(select, "EPOLLEXCLUSIVE", 0) if shared else 0
            self._epoll.register(descriptor, events)
        elif not interest:
            self._epoll.unregister(descriptor)
        else:
            self._epoll.modify(descriptor, events)

    def wait(self, seconds: float) -> list[int]:
        return [descriptor for descriptor, _ in self._epoll.poll(seconds, self._EVENTS)]

    def close(self) -> None:
        self._epoll.close()


class Visit(NamedTuple):
    """A request, or what was none, and how it is answered. `verdict` is hit, miss, stale, error or
    none; `begun` is monotonic."""

    client: str
    method: str
    path: str
    kind: str
    status: int
    verdict: str
    begun: float
    span: Span | None = None


def kind_of(target: str) -> str:
    """What is asked for: list, latest, info, mod, zip, sumdb, registry or other."""
    if target.startswith("/sumdb/"):
        return "sumdb"
    if target.startswith(REGISTRY):
        return "registry"
    name = target.rpartition("/@")[2]
    if name in ("latest", "v/list"):
        return name[-6:].lstrip("v/")
    ending = name.rpartition(".")[2]
    return ending if name[:2] == "v/" and ending in KINDS else "other"


def _subject(visit: Visit) -> tuple[str, str]:
    """Module and version of what was asked for, unescaped; empty where there are none."""
    if visit.kind == "sumdb":
        module, _, version = visit.path.partition("/lookup/")[2].partition("@")
    else:
        module, _, name = visit.path.partition("/@")
        version = name[2:].rpartition(".")[0] if visit.kind in KINDS else ""
    if visit.kind in ("other", "registry"):
        return "", ""
    module = module[len(_CACHED_ONLY) :] if module.startswith(_CACHED_ONLY) else module
    both = (re.sub("!([a-z])", lambda c: c[1].upper(), word) for word in (module, version))
    return next(both), next(both)


def _told_span(visit: Visit, sent: int, ended: float) -> dict[str, Any]:
    """The span of a request that has been answered, as OTLP has it."""
    span = visit.span
    assert span is not None
    span.name = f"{visit.method} {visit.kind}"
    span.ended = ended
    module, version = _subject(visit)
    span.attributes.update(
        {
            "client.address": visit.client,
            "goproxy.verdict": visit.verdict,
            "http.request.method": visit.method,
            "http.response.size": sent,
            "http.response.status_code": visit.status,
            "url.path": f"/{visit.path}",
            **({"goproxy.module": module} if module else {}),
            **({"goproxy.version": version} if version else {}),
        }
    )
    if visit.status >= 500:
        span.fail(str(visit.status), "")
    return span.encoded()


def _told_hit(hit: tuple[str, str, str, float], sent: int, seconds: float) -> dict[str, Any]:
    """The same of one that the loop has answered, with ids only now: it has no time for more."""
    visit = _visit_of_hit(*hit)
    return _told_span(visit, sent, visit.begun + seconds)


def _visit_of_hit(
    client: str, target: str, kind: str, begun: float, span: Span | None = None
) -> Visit:
    span = span or TRACER.begin("", Span.SERVER)
    if span:
        span.begun = begun
    return Visit(client, "GET", target[1:], kind, 200, "hit", begun, span)


class AccessLog:
    """What is told about requests: figures, spans and lines. As text one line when it begins and
    one as soon as it is known how it is answered; as JSON one when the answer is out."""

    def __init__(self, log: Log, quiet: bool) -> None:
        self._log = log
        self._as_text = not log.as_json and not quiet
        self._as_json = log.as_json and not quiet
        self.received = 0  # bytes from clients
        self._told_at = 0.0
        self._cells: dict[tuple[str, int, str], tuple[int, int, list[int]]] = {}
        # By kind: requests by bucket of BUCKETS and above, bytes, seconds.
        self._hits: dict[str, list[float]] = collections.defaultdict(
            lambda: [0.0] * (len(BUCKETS) + 3)
        )

    def begins(self, client: str, request: Request) -> None:
        """A request whose head is complete."""
        if self._as_text:
            self._log.line(f"[{client}] {request.method} {request.target[1:]}")

    def hit(
        self, client: str, reply: _Remembered, sent: int, begun: float, span: Span | None
    ) -> None:
        """A GET that the loop has answered itself; `tell` hands on its figures. `span`: if it is
        part of a client's trace."""
        seconds = time.monotonic() - begun
        target, kind = reply.target, reply.kind
        tally = self._hits[kind]
        tally[bisect.bisect_left(BUCKETS, seconds)] += 1
        tally[-1] += seconds
        tally[-2] += sent
        if self._as_text:
            self._log.hit(client, target[1:])
        if self._as_json or span:
            self._tell(_visit_of_hit(client, target, kind, begun, span), sent, seconds)
        elif TRACER.sampler and random.random() < TRACER.sampler.share:
            hit = (client, target, kind, begun)
            TRACER.keep(functools.partial(_told_hit, hit, sent, seconds))

    def tell(self, now: float, couriers: Iterable[Courier]) -> None:
        """Twice a second hands on what the loop alone knows: that is cheaper than at each event."""
        if now - self._told_at < _TELL_SECONDS:
            return
        self._told_at = now
        METER.beat()
        for kind, (*counts, sent, seconds) in self._hits.items():
            requests, bytes_out, durations = self._cells_of(kind, 200, "hit")
            METER.change([(requests, sum(counts)), (bytes_out, sent), (durations[-1], seconds)])
            METER.change(zip(durations, counts))
        self._hits.clear()
        METER.add("goproxy_received_bytes_total", self.received)
        self.received = 0
        clients = [courier for courier in couriers if not isinstance(courier, RelayEnd)]
        METER.set("goproxy_connections", len(clients))
        METER.set("goproxy_requests_in_flight", sum(client.is_asked() for client in clients))

    def begins_hit(self, client: str, reply: _Remembered, begun: float, span: Span | None) -> Visit:
        """A GET that the loop has begun to answer; `span` as for `hit`."""
        if self._as_text:
            self._log.hit(client, reply.target[1:])
        return _visit_of_hit(client, reply.target, reply.kind, begun, span)

    def answers(
        self,
        client: str,
        request: Request | None,
        message: Message,
        verdict: Verdict | None,
        begun: float,
    ) -> Visit:
        """A request, or what was none, for which the answer is known."""
        method, target = (request.method, request.target) if request else ("-", "/-")
        status, path = message.status, target[1:]
        if self._as_text and not request:
            self._log.line(f"[{client}] {message.body.decode().strip()}")
        if self._as_text and status >= 400:
            self._log.line(f"[ERROR {status}] {path}")
        elif self._as_text and verdict:
            self._log.line(f"[CACHE {verdict.value}] {path}")
        word = verdict.value.lower() if verdict else "error" if status >= 400 else "none"
        return Visit(client, method, path, kind_of(target), status, word, begun)

    def ends(self, visit: Visit, sent: int) -> None:
        """The answer is out, or the client gone, after so many bytes; called from any thread."""
        seconds = max(0.0, time.monotonic() - visit.begun)
        key = (visit.kind, visit.status, visit.verdict)
        requests, bytes_out, durations = self._cells_of(*key)
        bucket = durations[bisect.bisect_left(BUCKETS, seconds)]
        METER.change(((requests, 1), (bytes_out, sent), (bucket, 1), (durations[-1], seconds)))
        self._tell(visit, sent, seconds)

    def _tell(self, visit: Visit, sent: int, seconds: float) -> None:
        if visit.span and visit.span.is_told:
            TRACER.keep(functools.partial(_told_span, visit, sent, time.monotonic()))
        if self._as_json:
            self._line(visit, sent, seconds)

    def _cells_of(self, kind: str, status: int, verdict: str) -> tuple[int, int, list[int]]:
        """Where requests, bytes and durations are counted."""
        found = self._cells.get((kind, status, verdict))
        if not found:
            name = labelled("goproxy_requests_total", kind=kind, code=status, verdict=verdict)
            bytes_out = METER.cell(labelled("goproxy_sent_bytes_total", kind=kind))
            durations = METER.histogram("goproxy_request_seconds", kind=kind)
            found = self._cells[kind, status, verdict] = METER.cell(name), bytes_out, durations
        return found

    def _line(self, visit: Visit, sent: int, seconds: float) -> None:
        module, version = _subject(visit)
        trace = {"trace_id": visit.span.trace_id} if visit.span else {}
        self._log.line(
            "request",
            "error" if visit.status >= 500 and visit.method != "-" else "info",
            client=visit.client,
            method=visit.method,
            path=visit.path,
            module=module,
            version=version,
            status=visit.status,
            bytes=sent,
            duration=round(seconds, 6),
            verdict=visit.verdict,
            **trace,
        )


_TELL_SECONDS = 0.5


class Wheel:
    """Connections by the second in which the loop looks at their deadline. Deadlines move on
    without being moved here: whoever turns out to have more time is filed again."""

    def __init__(self, now: float) -> None:
        self._seconds: dict[int, set[Courier]] = {}
        self._tick = int(now)

    def file(self, courier: Courier) -> None:
        """Files a connection for its deadline, unless it is looked at before that."""
        second = int(courier.deadline) + 1
        if not self._tick < courier.filed <= second:
            self.unfile(courier)
            courier.filed = second
            self._seconds.setdefault(second, set()).add(courier)

    def unfile(self, courier: Courier) -> None:
        """Forgets a connection, and so what it has read."""
        self._seconds.get(courier.filed, set()).discard(courier)
        courier.filed = 0

    def expire(self, now: float) -> None:
        """Tells those whose deadline has passed and that no lane is working on."""
        while self._tick < int(now):
            self._tick += 1
            for courier in self._seconds.pop(self._tick, ()):
                courier.filed = 0
                if courier.interest and courier.deadline <= self._tick:
                    courier.expire()
                elif courier.interest:
                    self.file(courier)


class Inbox:
    """What the other processes send to the one that fetches: connections that must wait, and what
    they have seen. It is open until none of them is left, also while the loop drains."""

    def __init__(self, sock: socket.socket | None, server: Server) -> None:
        self.sock = sock
        self.is_open = sock is not None
        self._server = server

    def take(self) -> bool:
        """Takes one thing that another process has sent; False if there is none."""
        assert self.sock is not None
        try:
            read, descriptors, flags, _ = socket.recv_fds(self.sock, 1 << 18, 1)
        except BlockingIOError:
            return False
        client, _, rest = read.partition(b"\n")
        if not client:
            for line in rest.decode().split("\n"):
                self._take_word(line)
        elif not descriptors and not flags & socket.MSG_CTRUNC:  # else there was no room for it
            self._server.app.saw(Sight(*read.decode().split("\n")))
        for descriptor in descriptors:
            sock = socket.socket(fileno=descriptor)
            sock.setblocking(False)
            host, _, left = client.decode().partition(" ")
            self._server.admit(sock, host).take_over(rest, left)
        return True

    def _take_word(self, line: str) -> None:
        """The name of a file that was given out, or a failure, which is a list in JSON."""
        if line.startswith("["):
            self._server.app.failed(Trouble(*json.loads(line)))
        else:
            self._server.app.used(line)

    def end(self) -> None:
        """Nobody is left to send; what is on its way is taken."""
        while self.is_open and self.take():
            pass
        self.is_open = False


class Bell:
    """Wakes a loop that waits for `sock`, and then does what has been posted."""

    def __init__(self) -> None:
        self.sock, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self._rings = False

    def ring(self) -> None:
        """May be called from any thread, after posting."""
        if not self._rings:
            self._rings = True
            with contextlib.suppress(OSError):  # a full pipe wakes the loop as well
                self._rope.send(b"\0")

    def still(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.sock.recv(4096)
        self._rings = False  # last: a byte taken together with others must not count as there

    def close(self) -> None:
        self.sock.close()
        self._rope.close()


class Server(ThreadingHTTPServer):
    """The front loop: one thread owns accepting, request heads, idle and slow connections and all
    deadlines. Complete requests go to lanes of few threads; nothing is spawned per client."""

    request_queue_size = 4096
    _REQUESTS, _WAITERS, _ZIP_WAITERS, _TRANSFERS = 4, 24, 12, 4
    _PASSWORDS, _HANDSHAKES, _UPLOADS, _PULLS, _PUSHES = 2, 2, 4, 16, 16
    _ROOM = Lane.TOGETHER - 8  # for who waits: there is room left for what they wait for

    def __init__(
        self,
        socks: Sequence[socket.socket],
        app: App,
        fetcher: socket.socket | None = None,
        handed: socket.socket | None = None,
    ) -> None:
        """`socks` are bound and listening. `fetcher` leads to the process that fetches misses, if
        that is another one; through `handed` come connections from the others, if it is this."""
        handler: Any = Handler  # which has a constructor of its own
        socketserver.BaseServer.__init__(self, socks[0].getsockname(), handler)
        self._socks = socks
        self.app = app
        self.access = AccessLog(app.log, app.settings.quiet)
        self.passed = REGISTRY if app.registry else "\0"  # what is below this path is not ours
        self.fetcher = fetcher
        self.draining = False
        self.now = time.monotonic()
        self.second = int(time.time())
        self.hot = HotMemory(app.policy, descriptor_limit() // 8)
        self.request_lane = Lane("request", self._REQUESTS, 2)
        self.upload_lane = Lane("upload", self._UPLOADS if app.gate else 1)
        self.password_lane = Lane("password", self._PASSWORDS if app.gate else 0)
        self.patient_lane = Lane("patient", self._WAITERS, room=self._ROOM)
        # Who waits for the first bytes of a zip is not in the way of who waits for a list.
        self.zip_lane = Lane("zip", self._ZIP_WAITERS, room=self._ROOM)
        self.transfer_lane = Lane("transfer", self._TRANSFERS, 2)
        self.handshake_lane = Lane("handshake", self._HANDSHAKES if app.tls else 0)
        self.pull_lane = Lane("pull", self._PULLS if app.registry else 0, room=self._ROOM)
        self.push_lane = Lane("push", self._PUSHES if app.registry else 0, room=self._ROOM)
        self._inbox = Inbox(handed, self)
        self._thread = 0
        self._poller = EpollPoller() if hasattr(select, "epoll") else SelectPoller()
        self._events: dict[int, Callable[[], object]] = {}
        self._handlers: set[Courier] = set()
        self._wheel = Wheel(self.now)
        self._posts: collections.deque[Callable[[], None]] = collections.deque()
        self._bell = Bell()
        self._stop_at: float | None = None
        self._accept_at = 0.0

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Runs until `stop`, and then until running replies are out, or its time is up."""
        self._thread = threading.get_ident()
        self._watch(self._bell.sock, self._bell.still)
        self._listen()
        if self._inbox.sock:
            self._watch(self._inbox.sock, self._inbox.take)
        while not self._is_over():
            ready = self._poller.wait(0 if self._posts else poll_interval)
            self.now = time.monotonic()
            self.second = int(time.time())
            for descriptor in ready:
                event = self._events.get(descriptor)
                if event:  # it may have been closed by an event before it in the row
                    event()
            for _ in range(len(self._posts)):
                self._posts.popleft()()
            self._wheel.expire(self.now)
            self.hot.expire(self.now)
            self.access.tell(self.now, self._handlers)
            if self._accept_at and self.now >= self._accept_at and not self.draining:
                self._accept_at = 0.0
                self._listen()
        self._close_all()

    def _watch(
        self, sock: socket.socket, event: Callable[[], object], shared: bool = False
    ) -> None:
        sock.setblocking(False)
        self._events[sock.fileno()] = event
        self._poller.set(sock.fileno(), 0, READABLE, shared)

    def _unwatch(self, sock: socket.socket) -> None:
        del self._events[sock.fileno()]
        self._poller.set(sock.fileno(), READABLE, 0)

    def soon(self, work: Callable[[], None]) -> None:
        """Has the loop do something, at once if this is the loop."""
        if threading.get_ident() == self._thread:
            work()
        else:
            self.post(work)

    def post(self, work: Callable[[], None]) -> None:
        """Has the loop do something in its next turn; may be called from any thread."""
        self._posts.append(work)
        if threading.get_ident() != self._thread:
            self._bell.ring()

    def poll(self, handler: Courier, interest: int) -> None:
        """Waits for a connection to be READABLE or WRITABLE, or for nothing: 0, a lane has it. The
        poller hears of that only if something comes meanwhile, which is rare."""
        handler.interest = interest
        descriptor = handler.sock.fileno()
        if interest and interest != handler.polled:
            self._poller.set(descriptor, handler.polled, interest)
            handler.polled = interest
        if handler.polled:
            ignore = functools.partial(self.ignore, handler)
            self._events[descriptor] = handler.on_event if interest else ignore

    def ignore(self, handler: Courier) -> None:
        """Has the poller forget a connection."""
        descriptor = handler.sock.fileno()
        self._poller.set(descriptor, handler.polled, 0)
        handler.polled = 0
        del self._events[descriptor]

    def allow(self, handler: Courier, seconds: float) -> None:
        """Gives a connection a deadline."""
        handler.deadline = self.now + seconds
        self._wheel.file(handler)

    def _listen(self) -> None:
        for sock in self._socks:
            self._watch(sock, functools.partial(self._accept, sock), shared=True)

    def _deafen(self) -> None:
        for sock in self._socks:
            self._unwatch(sock)

    def _accept(self, door: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, address = door.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors or memory: the backlog keeps clients while some are given back.
                self.app.log.error(f"cannot accept connections: {error.strerror}")
                self._deafen()
                self._accept_at = self.now + _ACCEPT_PAUSE
                self._shed()
                return
            client = address[0] if isinstance(address, tuple) else "unix"
            self._greet(sock, client[len(_MAPPED) :] if client.startswith(_MAPPED) else client)

    def _shed(self) -> None:
        """Closes idle connections, the oldest first: a new request matters more than they do."""
        idle = [handler for handler in self._handlers if handler.is_idle()]
        for handler in heapq.nsmallest(_SHED, idle, key=lambda each: each.deadline):
            handler.close()

    def _greet(self, sock: socket.socket, client: str) -> None:
        sock.setblocking(False)
        if self.app.tls:
            self.enter(Handshake(self, self.app.tls, sock, client), _HEAD_SECONDS)
        else:
            self.admit(sock, client)

    def enter(self, courier: Courier, seconds: float) -> None:
        """Waits for what a connection sends first."""
        self._handlers.add(courier)
        self.poll(courier, READABLE)
        self.allow(courier, seconds)

    def admit(self, sock: socket.socket, client: str) -> Handler:
        """Waits for the requests of a connection that does not block."""
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handler = Handler(self, sock, client)
        self.enter(handler, _IDLE_SECONDS)
        return handler

    def forget(self, handler: Courier) -> None:
        """A connection is about to close, here at least: another process may have it, too."""
        handler.interest = 0
        if handler.polled:
            self.ignore(handler)
        self._wheel.unfile(handler)
        self._handlers.discard(handler)

    def lane_for(self, request: Request) -> Lane | None:
        """Where a request is worked on; None: too many wait there."""
        gate = self.app.gate
        if request.is_passed:
            return self.push_lane if request.upload else self.pull_lane
        if request.upload:
            return self.upload_lane
        if not gate or not gate.is_stranger(request):
            return self.request_lane
        return self.password_lane if self.password_lane.waiting < _STRANGERS else None

    def waiting_lane_for(self, request: Request) -> Lane:
        """Where a request waits for what is fetched."""
        if request.is_passed:
            return self.pull_lane
        return self.zip_lane if request.target.endswith(".zip") else self.patient_lane

    def remember(self, target: str, stored: Stamped, message: Message) -> None:
        """Keeps a good reply in the hot memory; may be called from any thread."""
        kept = message._replace(blob=message.blob.again()) if message.blob else message
        self.soon(lambda: self.hot.put(target, stored, kept, self.now))

    def stop(self, seconds: float) -> None:
        """Ends serve_forever: no new connections; running replies have so many seconds. A second
        call that leaves them no less ends it at once. May be called from a signal handler."""
        self.post(lambda: self._begin_drain(seconds))
        self._bell.ring()  # a signal handler runs in the loop's own thread

    def _begin_drain(self, seconds: float) -> None:
        stop_at, self._stop_at = self._stop_at, self.now + seconds
        if stop_at is not None:
            self._stop_at = self._stop_at if self._stop_at < stop_at else 0.0
            return
        self.draining = True
        if not self._accept_at:
            self._deafen()
        for sock in self._socks:
            sock.close()
        for handler in [handler for handler in self._handlers if handler.is_idle()]:
            handler.dismiss()

    def expect_no_more(self) -> None:
        """Nobody is left who hands connections over; what is on its way is taken. May be called
        from any thread."""
        self.post(self._inbox.end)

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        return not (self._handlers or self._inbox.is_open) or self.now >= self._stop_at

    def _close_all(self) -> None:
        for handler in list(self._handlers):
            handler.close()
        lanes = [self.request_lane, self.patient_lane, self.zip_lane, self.transfer_lane]
        lanes += [self.password_lane, self.handshake_lane, self.upload_lane]
        for lane in (*lanes, self.pull_lane, self.push_lane):
            lane.close()
        self._poller.close()
        self._bell.close()


_ACCEPTS_PER_TURN = 16
_SHED = 64
_ACCEPT_PAUSE = 0.1  # seconds without accepting when descriptors have run out
_MAPPED = "::ffff:"


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else 512


def raise_descriptor_limit() -> None:
    """Lets this process, and what it begins, have as many descriptors as it may: the 1024 that a
    shell gives are few for clients that keep their connections. As syscall/rlimit.go of Go."""
    if resource:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
        if descriptor_limit() < most:
            with contextlib.suppress(OSError, ValueError):  # macOS has a lower one of its own
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


_DESCRIPTORS = 1 << 20


# =============================================================================
# 12. Daemon: wiring, signals, commands, main
# =============================================================================

_DRAIN_SECONDS = 10.0
_YIELD_SECONDS = 600.0  # for running requests while another process serves


def open_socket(settings: Settings) -> socket.socket:
    """A listening socket for -host and -port. Raises StartError."""
    try:
        if settings.host.startswith("unix:"):
            return _open_unix(settings.host[len("unix:") :])
        return _open_tcp(settings.host, settings.port)
    except OSError as error:
        where = f"port {settings.port} on {settings.host or 'all interfaces'}"
        if settings.host.startswith("unix:"):
            where = settings.host
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"{where} is taken: stop what listens there, or choose another one with -port "
                "(-port 0 picks a free one) or -host"
            ) from None
        raise StartError(
            f"cannot listen on {where}: {error.strerror or error}; choose another address with "
            "-host or -port"
        ) from None


def _open_tcp(host: str, port: int) -> socket.socket:
    """No host: all interfaces, IPv6 and IPv4 by one socket where the machine has IPv6."""
    if not host and socket.has_dualstack_ipv6():
        return _bound(socket.AF_INET6, ("::", port))
    infos = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    return _bound(infos[0][0], infos[0][4])


def _open_unix(path: str) -> socket.socket:
    """Takes the place of a socket that was left behind, but of none that is listened on."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        is_left = probe.connect_ex(path) == errno.ECONNREFUSED
        if is_left and stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    return _bound(socket.AF_UNIX, path)


def _bound(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(Server.request_queue_size)
    except BaseException:
        sock.close()
        raise
    return sock


def passed_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """Those that a service manager listens on for us (sd_listen_fds(3)). Raises StartError."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    told = environ.get("LISTEN_FDS", "")
    first, count = 3, int(told) if told.isdecimal() else 0
    socks = []
    for descriptor in range(first, first + count):
        try:
            sock = socket.socket(fileno=descriptor)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            is_listening = 0
        if not is_listening:
            raise StartError(f"LISTEN_FDS: descriptor {descriptor} is no listening stream socket")
        os.set_inheritable(descriptor, False)
        socks.append(sock)
    return socks


class ServiceManager:
    """Whoever has started this and wants to be told how it goes: sd_notify(3)."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = re.sub("^@", "\0", environ.get("NOTIFY_SOCKET", ""))
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        told = environ.get("WATCHDOG_USEC", "")
        self._patience = int(told) / 1e6 if ours and told.isdecimal() else 0.0
        self._next = 0.0

    def tell(self, *words: str) -> None:
        with contextlib.suppress(OSError):
            if self._address:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.setblocking(False)
                    sock.sendto("\n".join(words).encode(), self._address)

    def reassure(self, surely: bool = False) -> None:
        """Tells that all loops go round, if that is so (`surely`: some may have ended), wanted, and
        not told just before."""
        now = time.monotonic()
        going = surely or now - METER.last_beat() < self._patience
        if self._patience and now >= self._next and going:
            self._next = now + self._patience / 4
            self.tell("WATCHDOG=1")

    def keep_reassuring(self) -> None:
        """Does so by a thread of its own."""

        def work() -> None:
            while True:
                time.sleep(self._patience / 4)
                self.reassure()

        if self._patience:
            begin_thread(work, "watchdog")


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RELOAD: int | None = getattr(signal, "SIGHUP", None)
_RENEW: int | None = getattr(signal, "SIGUSR2", None)
_SEEN = {*_SIGNALS, *(number for number in (_RELOAD, _RENEW) if number)}


def _block_signals() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {*_SEEN, signal.SIGCHLD})


def _unblock_signals() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _call_glibc(function: str, *values: int) -> None:
    with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes  # other C libraries lack the functions, and not every Python has ctypes

        getattr(ctypes.CDLL(None), function)(*values)


def _slim() -> None:
    """Gives memory back, first what compiling this file took (10 MB of 37, in every process), and
    keeps the C library from making a heap per thread."""
    _call_glibc("mallopt", _M_ARENA_MAX, 2)
    _call_glibc("malloc_trim", 0)


def _keep_slim() -> None:
    """Gives memory back every so often: what many clients took at once is kept by the C library."""
    _call_glibc("malloc_trim", 0)
    ALARMS.set(_SLIM_SECONDS, _keep_slim)


_M_ARENA_MAX = -8  # malloc.h
_SLIM_SECONDS = 20.0


def _farewell(why: str, seconds: float) -> str:
    return f"{why}, at most {seconds:.0f} s for running requests"


def _shut_down(number: int) -> str:
    return f"{signal.Signals(number).name}: shutting down"


_MAKE_WAY = "SIGUSR2: making way"


def _own_command() -> list[str]:
    """The words that this process was started by, without what _begin_lean put among them.
    Raises OSError where the system does not tell them."""
    with open("/proc/self/cmdline", "rb") as file:
        words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    script = len(words) - len(sys.argv)
    if words[max(0, script - 2) : max(0, script - 1)] == ["-c"]:
        del words[script - 2 : script]
    return words


_HANDED = "GOPROXY_HANDED"


def _handing(process: int, line: socket.socket, socks: Sequence[socket.socket]) -> dict[str, str]:
    """Variables for whom this process hands its sockets, and a line to another: see Handed."""
    descriptors = [sock.fileno() for sock in (line, *socks)]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    without = {_HANDED, "LISTEN_FDS", "LISTEN_PID"}
    if not process:
        without |= {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return {**kept, _HANDED: " ".join(map(str, [process, *descriptors]))}


class Handed:
    """What the process before has left to this one: the sockets, and a line. If we stand in, it
    leads to whom we stand in for; else to our stand-in, which is to go once we serve."""

    def __init__(self, text: str) -> None:
        """`text`: the stand-in's process (0 if that is us), the descriptors of the line and of the
        sockets; "" if nothing was left."""
        self.stand_in, *descriptors = map(int, text.split() or ["0"])
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        socks = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        self._line = socks[0] if socks else None
        self.sockets = socks[1:]
        self.stands_in = bool(socks) and not self.stand_in

    def announce(self) -> None:
        """Tells the other one that we serve."""
        with contextlib.suppress(OSError):
            if self._line:
                self._line.send(_YIELD_WORD)

    def verdict(self) -> float | None:
        """How many seconds a stand-in's running requests have from now on; None: it goes on."""
        said = _heard(self._line) if self._line and self.stands_in else None
        if said == b"":
            self._line = None
        return None if said is None else _YIELD_SECONDS if said else _DRAIN_SECONDS

    def bury(self) -> None:
        """Does so with our stand-in once it has ended."""
        with contextlib.suppress(ChildProcessError):
            if self.stand_in and os.waitpid(self.stand_in, os.WNOHANG)[0]:
                self.stand_in = 0

    def close(self) -> None:
        """A worker has no part in this, and must not keep the line open."""
        if self._line:
            self._line.close()


def _heard(line: socket.socket) -> bytes | None:
    """What the other end has said; b"" if it is gone, None if it says nothing."""
    try:
        return line.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


class StandIn:
    """A process of the file as it is on disk now, started to serve at our sockets while we end our
    requests and begin anew."""

    _START, _PROOF = 60.0, 2.0  # seconds until it must serve, and that it must have lived on then

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        """Raises OSError."""
        self._command = _own_command()
        # A dup() of a Socket would make it block, here and in the workers that share it.
        self._socks = [socket.socket(fileno=os.dup(sock.fileno())) for sock in socks]
        self._line, theirs = socket.socketpair()
        with theirs:
            environ = _handing(0, theirs, self._socks)
            self._process = os.posix_spawn(sys.executable, self._command, environ)
        self._fails_at = time.monotonic() + self._START
        self._due_at = math.inf
        self.has_our_place, self._is_lost = False, False

    def verdict(self) -> float | None:
        """The same for us. Raises StartError once it has failed."""
        if self._is_lost:
            return None
        said, now = _heard(self._line), time.monotonic()
        self._is_lost = said == b"" or now >= self._fails_at
        if self._is_lost and not self.has_our_place:
            self._bury(said)
            self.close()
            raise StartError("the new file does not serve: the old one goes on")
        if self.has_our_place:
            return _DRAIN_SECONDS if self._is_lost else None
        if said:
            self._due_at, self._fails_at = now + self._PROOF, math.inf
        self.has_our_place = now >= self._due_at
        return _YIELD_SECONDS if self.has_our_place else None

    def _bury(self, said: bytes | None) -> None:
        """It has ended, or else it is too late for it."""
        with contextlib.suppress(ChildProcessError):  # buried with the workers
            if said is None:
                os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)

    def close(self) -> None:
        """Sends it away."""
        for sock in (self._line, *self._socks):
            sock.close()

    def become_new(self) -> None:
        """Begins this process anew with the new file; does not return. Raises OSError."""
        environ = _handing(self._process, self._line, self._socks)
        os.execve(sys.executable, self._command, environ)


class Succession:
    """Replaces this process, at SIGUSR2, by one of the file as it is on disk then, while its
    sockets stay open. A stand-in is tried first. If it serves, we end our requests, begin anew
    with the new file under the number that service managers and containers know, and send the
    stand-in away. If it does not serve, nothing has changed."""

    def __init__(self, handed: Handed, log: Log) -> None:
        self.handed = handed
        self._log = log
        self._stand_in: StandIn | None = None
        self._is_cancelled = False

    def begin(self, socks: Sequence[socket.socket]) -> None:
        """Starts a stand-in, unless there is one."""
        if not self._stand_in and not self.handed.stands_in:
            try:
                self._stand_in = StandIn(socks)
            except OSError as error:
                self._log.error(f"SIGUSR2: {error.strerror}: the old file goes on")

    def verdict(self) -> float | None:
        """How many seconds our running requests have from now on; None: we go on. To be asked
        every second or so."""
        self.handed.bury()
        if self._is_cancelled:
            return None
        try:
            return (self._stand_in or self.handed).verdict()
        except StartError as error:
            self._log.error(f"SIGUSR2: {error}")
            self._stand_in = None
            return None

    def cancel(self) -> None:
        """We are to end for good."""
        self._is_cancelled = True

    def complete(self) -> None:
        """Begins anew, if a stand-in has our place: then this does not return. Raises
        StartError."""
        self.handed.close()
        if not self._stand_in:
            return
        try:
            if self._stand_in.has_our_place and not self._is_cancelled:
                self._stand_in.become_new()
        except OSError as error:
            raise StartError(f"SIGUSR2: cannot begin anew: {error.strerror}") from None
        self._stand_in.close()


def _watching(
    settings: Settings, policy: Policy, storage: Storage, fetcher: socket.socket | None
) -> tuple[Callable[[Sight], None], Callable[[], None]]:
    """Whom to tell what clients ask, and how to end that: read-ahead here, or in the process that
    fetches, or nobody."""
    if settings.offline or not settings.read_ahead:
        return (lambda sight: None), (lambda: None)
    if fetcher is None:
        ahead = ReadAhead(policy, storage)
        return ahead.saw, ahead.close
    other = fetcher

    def tell(sight: Sight) -> None:
        with contextlib.suppress(OSError):  # a guess less
            other.send("\n".join(sight).encode(), socket.MSG_DONTWAIT)

    return tell, (lambda: None)


class Reporter:
    """Tells the process that fetches which stored files this one has given out: in batches, and
    what cannot be sent now is sent with the next ones."""

    _SECONDS, _BATCH, _TROUBLES = 5.0, 200, 40

    def __init__(self, fetcher: socket.socket) -> None:
        """Starts a thread."""
        self.uses = Uses()
        self._troubles: collections.deque[Trouble] = collections.deque(maxlen=self._TROUBLES)
        self._fetcher = fetcher
        self._ended = threading.Event()
        begin_thread(self._run, "reporter")

    def _run(self) -> None:
        while not self._ended.wait(self._SECONDS):
            self.report()

    def failed(self, trouble: Trouble) -> None:
        """Tells of a failure, too; of many only the last ones."""
        self._troubles.append(trouble)

    def report(self) -> None:
        while self._troubles:
            with contextlib.suppress(OSError):
                line = "\n" + json.dumps(self._troubles.popleft())
                self._fetcher.send(line.encode(), socket.MSG_DONTWAIT)
        names = self.uses.take()
        for start in range(0, len(names), self._BATCH):
            batch = "\n".join(["", *names[start : start + self._BATCH]])
            try:
                self._fetcher.send(batch.encode(), socket.MSG_DONTWAIT)
            except OSError:
                for name in names[start:]:
                    self.uses.note(name)
                return

    def close(self) -> None:
        self._ended.set()
        self.report()


class Noting(NamedTuple):
    """Whom to tell what is given out of the store, and what failed, and how to end that."""

    used: Callable[[str], None]
    failed: Callable[[Trouble], None]
    overview: Overview | None
    endings: Sequence[Callable[[], None]]


def _noting(
    settings: Settings, found: Answering, log: Log, fetcher: socket.socket | None
) -> Noting:
    """All that watches what happens: here, or in the process that fetches."""
    if fetcher:
        reporter = Reporter(fetcher)
        return Noting(reporter.uses.note, reporter.failed, None, [reporter.close])
    catalogue = Catalogue(found.cache.storage, OwnModules(settings.modules), log)
    chronicle = Chronicle(catalogue.settle)
    overview = Overview(catalogue, chronicle)
    used, stored = chronicle.uses.note, catalogue.stored
    endings = [catalogue.close, chronicle.close]
    if settings.max_size:

        def spares(path: str, version: str) -> bool:
            return not settings.evict_private and not found.policy.is_public(path, version)

        evictor = Evictor(found.cache.storage, settings.max_size, spares, log)
        used, stored = _both(evictor.uses.note, used), _both(evictor.stored, stored)
        evictor.on_removed = catalogue.removed
        endings.append(evictor.close)
    found.cache.on_stored = stored
    return Noting(used, chronicle.note, overview, endings)


def _both(one: Callable[..., None], other: Callable[..., None]) -> Callable[..., None]:
    def call(*told: object) -> None:
        one(*told)
        other(*told)

    return call


def _rechecking(
    settings: Settings, policy: Policy, source: Source, storage: Storage, log: Log
) -> Callable[[], None]:
    """Begins to ask upstream about what is stored, if that is wanted; and how to end it."""
    if not settings.recheck:
        return lambda: None
    recheck = Recheck(source, storage, policy.is_public, settings, log)
    recheck.start()
    return recheck.close


def _check_recheck(settings: Settings) -> None:
    """Raises UsageError for a re-check that may ask nobody."""
    asks = not settings.offline and any(hop.kind != "off" for hop in settings.upstream)
    if settings.recheck and not asks:
        why = "-offline" if settings.offline else "-upstream off"
        origin = settings.origins["recheck"]
        raise UsageError(f"{origin}={settings.recheck:g}s: with {why} nobody may be asked")


_STOP_WORD, _YIELD_WORD, _RELOAD_WORD, _ALONE_WORD = b"s", b"y", b"r", b"a"


def _obey(line: int, server: Server, reload: Callable[[], object]) -> None:
    """Each byte from the parent is a word; its end is a stop, too."""
    while True:
        said = os.read(line, 1)
        if said == _RELOAD_WORD:
            reload()
            continue
        if said in (_ALONE_WORD, b""):
            server.expect_no_more()
        if said == _ALONE_WORD:
            continue
        server.stop(_YIELD_SECONDS if said == _YIELD_WORD else _DRAIN_SECONDS)
        if not said:
            return


class Workers:
    """Processes that accept on one inherited socket, and their parent, which only forks, waits and
    passes signals on. The first of them fetches what is missing for all, so that there is one
    flight, one memory of absence and one pool of connections; the others hand it the connections
    that must wait for a fetch."""

    _NO_START = 75  # the status of a worker that cannot begin (EX_TEMPFAIL)
    _PAUSE = 1.0  # seconds before a worker that died young is replaced
    _PATIENCE = 2.0  # more seconds than its requests have for a worker to end

    def __init__(
        self,
        count: int,
        work: Callable[[int, socket.socket | None, socket.socket | None], None],
        listeners: Sequence[socket.socket],
        storage: Storage,
        log: Log,
    ) -> None:
        self._count = count
        self._work = work
        self._listeners = listeners
        self._storage = storage
        self._log = log
        self._lines: dict[int, int] = {}  # by process: a pipe that tells it to stop
        self._places: dict[int, int] = {}
        self._born: dict[int, float] = {}
        self._missing: list[int] = []
        self._first: set[int] = set()
        self._stopping = False
        self._deadline = math.inf
        self._fetcher, self._handed = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def run(
        self,
        announce: Callable[[], None],
        reload: Callable[[], bool],
        manager: ServiceManager,
        succession: Succession,
    ) -> None:
        """Announces that all workers are there, and returns when they have ended after a signal.
        `reload` tells whether the workers should reload, too. Signals are blocked and waited for,
        so that none comes at a bad moment, and all of them work for process 1 as well."""
        try:
            for place in range(self._count):
                self._fork(place)
        except OSError as error:
            raise StartError(f"cannot begin -workers {self._count}: {error.strerror}") from None
        self._first = {*self._places}
        announce()
        self._log.write_out()
        while self._places or (self._missing and not self._stopping):
            self._listen(reload, manager, succession)
            if time.monotonic() >= self._deadline:
                self._kill_all()
            self._reap()
            if self._missing and succession.handed.stands_in:
                succession.handed.close()  # it has failed, which leads to its end
            self._replace()
            if self._stopping and {*self._places.values()} == {0}:
                self._tell(_ALONE_WORD)  # until now, others may have handed it connections
            manager.reassure(self._stopping)
            self._log.write_out()
        self._fetcher.close()
        self._handed.close()

    def _listen(
        self, reload: Callable[[], bool], manager: ServiceManager, succession: Succession
    ) -> None:
        """Does what a signal, or a process of another file, says next."""
        waiting = min(self._PAUSE, max(0.0, self._deadline - time.monotonic()))
        received = signal.sigtimedwait({*_SEEN, signal.SIGCHLD}, waiting)
        number = received.si_signo if received else 0
        seconds = succession.verdict()
        if number in _SIGNALS:
            manager.tell("STOPPING=1")
            succession.cancel()
            self._stop(_STOP_WORD, _shut_down(number), _DRAIN_SECONDS)
        elif seconds is not None:
            word = _YIELD_WORD if seconds > _DRAIN_SECONDS else _STOP_WORD
            self._stop(word, _MAKE_WAY, seconds)
        elif number == _RELOAD and reload():
            self._tell(_RELOAD_WORD)
        elif number == _RENEW and not self._stopping:
            succession.begin(self._listeners)

    def _fork(self, place: int) -> None:
        reader, writer = os.pipe()
        try:
            process = os.fork()
        except OSError:
            os.close(reader)
            os.close(writer)
            raise
        if process == 0:
            self._begin(place, reader, writer)
        os.close(reader)
        self._lines[process] = writer
        self._places[process] = place
        self._born[process] = time.monotonic()

    def _begin(self, place: int, reader: int, writer: int) -> None:
        """The life of a worker; it never returns to the parent's code."""
        status = 1
        try:
            for line in (writer, *self._lines.values()):
                os.close(line)
            METER.take(place)
            for number in _SEEN:
                signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all processes
            _unblock_signals()
            fetches = place == 0
            fetcher = None if fetches else self._fetcher
            self._work(reader, fetcher, self._handed if fetches else None)
            status = 0
        except Overloaded as error:
            os.write(2, f"goproxy.py: {error}\n".encode())
            status = self._NO_START
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def _stop(self, word: bytes, why: str, seconds: float) -> None:
        self._log.line(_farewell(why, seconds))
        self._stopping = True
        self._deadline = min(self._deadline, time.monotonic() + seconds + self._PATIENCE)
        for listener in self._listeners:
            listener.close()
        self._tell(word)

    def _tell(self, word: bytes) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                os.write(line, word)

    def _kill_all(self) -> None:
        for process in self._places:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _reap(self) -> None:
        """Buries children (as process 1 also those of others), and replaces workers."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process in self._places:
                self._bury(process, status)

    def _bury(self, process: int, status: int) -> None:
        place = self._places.pop(process)
        os.close(self._lines.pop(process))
        age = time.monotonic() - self._born.pop(process)
        if self._stopping:
            return
        if process in self._first and status_of(status) == self._NO_START:
            raise StartError(f"cannot begin -workers {self._count}")
        with contextlib.suppress(OSError):
            self._storage.sweep()
        end = f"signal {-status_of(status)}" if status_of(status) < 0 else f"{status_of(status)}"
        METER.add("goproxy_worker_restarts_total")
        self._log.error(f"worker {process} ended with {end}: starting another one")
        self._log.write_out()  # before it could be inherited
        if age < self._PAUSE:
            time.sleep(self._PAUSE)
        self._missing.append(place)

    def _replace(self) -> None:
        """Forks for those that ended; what the system refuses now is tried again."""
        for place in [] if self._stopping else list(self._missing):
            with contextlib.suppress(OSError):
                self._fork(place)
                self._missing.remove(place)


def status_of(status: int) -> int:
    """An exit status, or minus the number of the signal that ended a process."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def open_way_out(settings: Settings, environ: Mapping[str, str]) -> Dialer:
    """For everything that leaves; opens nothing yet. Raises UsageError."""
    route = ProxyRoute(settings.proxy, environ.get("NO_PROXY") or environ.get("no_proxy", ""))
    try:
        return open_dialer(settings.dns, route, environ.get("SSL_CERT_FILE"))
    except ValueError as error:
        raise UsageError(f"{settings.origins['dns']}={settings.dns_text}: {error}") from None


def read_credentials(environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Those for upstreams, and a remark if there is one. A file that NETRC names must be good; one
    that happens to be there need not. Raises UsageError."""
    if environ.get("NETRC"):
        return read_netrc(environ["NETRC"]), ""
    try:
        return read_netrc(os.path.expanduser("~/.netrc")), ""
    except UsageError as error:
        return {}, f"no credentials are read: {error}"


def open_store(settings: Settings, means: Means) -> Storage:
    """What -cache names. Raises UsageError, StartError."""
    try:
        return open_storage(settings.cache, means)
    except ValueError as error:
        origin = settings.origins.get("cache", "-cache")
        raise UsageError(f"{origin}={settings.cache}: {error}") from None


def _as_shared(settings: Settings, storage: Storage) -> Settings:
    """Settings for one process if the store is that of one process. Raises UsageError."""
    if storage.is_shared or settings.workers == 1:
        return settings
    if "workers" in settings.origins:
        raise UsageError(
            f"{settings.origins['workers']}={settings.workers}: want 1, because only one process "
            f"can use -cache {settings.cache}"
        )
    return dataclasses.replace(settings, workers=1)


class Outside(NamedTuple):
    """The way out, and what is shown there."""

    dialer: Dialer
    netrc_file: Mapping[str, str]
    keyring: Keyring
    ca_file: str
    search_path: str
    remarks: Sequence[str]  # for the log


def open_outside(settings: Settings, environ: Mapping[str, str]) -> Outside:
    """Opens nothing yet. Raises UsageError."""
    netrc_file, remark = read_credentials(environ)
    keyring, other_remark = read_keyring(settings, netrc_file)
    ca_file = environ.get("SSL_CERT_FILE", "")
    last_remark = _authorities_remark(ca_file) if ca_file else ""
    return Outside(
        open_way_out(settings, environ),
        netrc_file,
        keyring,
        ca_file,
        environ.get("PATH", os.defpath),
        [one for one in (remark, other_remark, last_remark) if one],
    )


def _authorities_remark(path: str) -> str:
    """What is wrong with SSL_CERT_FILE: the TLS library passes over what it cannot read."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        why = "no certificates in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        return f"SSL_CERT_FILE={path}: {why}: nobody is trusted by it"
    return ""


def read_keyring(settings: Settings, netrc_file: Mapping[str, str]) -> tuple[Keyring, str]:
    """The credentials for version control, and a remark if there is one. Raises UsageError."""
    text, origin = settings.vcs_auth, settings.origins.get("vcs_auth", "")
    if text and not re.search(r"\s", text):
        file = LoginFile(text, origin)
        return Keyring(file.logins, netrc_file), file.remark()
    logins = read_logins(text, origin)
    return Keyring(lambda: logins, netrc_file), ""


@contextlib.contextmanager
def going_direct(settings: Settings, outside: Outside, client: Client) -> Iterator[Direct]:
    """The source of private modules and of `direct`."""
    folder, keyring = prepare_git(settings, outside.search_path), outside.keyring
    screened = ScreenedDialer(outside.dialer)
    others = Client(screened, {})
    filtered = bool(settings.proxy or settings.dns)

    def ask_ours(url: Url) -> Response:
        return client.get(url, METADATA, authorization=keyring.login(str(url)).authorization)

    def repositories(name: str, access: GitAccess) -> Repositories:
        place = os.path.join(folder, name)
        return Repositories(place, access.environment, outside.search_path, settings.ttl)

    with contextlib.closing(others), contextlib.ExitStack() as stack:
        keys = NO_KEYS if settings.private_auth == "client" else keyring
        ours_access = GitAccess(outside.dialer, keys, outside.ca_file, filtered)
        others_access = GitAccess(screened, NO_KEYS, outside.ca_file, True)
        ours = Side(repositories("private", ours_access), client)
        theirs = Side(repositories("public", others_access), others)
        for one in (ours_access, others_access, ours.repositories, theirs.repositories):
            stack.callback(one.close)
        yield Direct(
            Finder(settings.vcs, settings.private, ask_ours, lambda url: others.get(url, METADATA)),
            ours,
            theirs,
        )


def open_private(whose: str, direct: Direct, cache: Cache) -> Callable[[str, Asker], Modules]:
    """What -private-auth says: one mirror for all, or one for each client."""
    mirror = Mirror(direct, cache)
    return Permits(direct, cache).mirror if whose == "client" else lambda path, asker: mirror


def check_git(settings: Settings, search_path: str) -> bool:
    """Whether repositories are wanted. Raises StartError if there is no git for them."""
    if not settings.private and not any(hop.kind == "direct" for hop in settings.upstream):
        return False
    found = git_version(search_path)
    if found < OLDEST_GIT:
        number = ".".join(map(str, found)) or "none"
        raise StartError(f"-private and direct need git 2.32 or later on the PATH: found {number}")
    return True


def prepare_git(settings: Settings, search_path: str) -> str:
    """Where bare repositories are kept, if any are wanted: in a folder cache, or else among the
    machine's temporary files; nobody else can read them. Raises StartError."""
    if not check_git(settings, search_path):
        return ""
    folder = os.path.join(tempfile.gettempdir(), f"goproxy-git-{os.geteuid()}")
    if settings.cache.kind == "folder":
        folder = os.path.join(settings.cache.text, OWN_MARK + "git")
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        status = os.lstat(folder)
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(errno.EPERM, "it belongs to somebody else")
    except OSError as error:
        raise StartError(f"cannot keep repositories in {folder}: {error.strerror}") from None
    return folder


class Answering(NamedTuple):
    """Who answers for modules and for checksum databases, and what they work with."""

    policy: Policy
    sumdb: SumDb
    cache: Cache
    source: Source


@contextlib.contextmanager
def answering(
    settings: Settings, outside: Outside, client: Client, storage: Storage, log: Log
) -> Iterator[Answering]:
    """All that answers; closes the storage, too."""
    cache = Cache(storage, settings.ttl, log)

    def begin(path: str, version: str) -> Comparison:
        return sumdb.begin(path, version) if settings.verify else nothing_known

    with going_direct(settings, outside, client) as direct:
        source = open_sources(client, settings.upstream, direct)
        private = open_private(settings.private_auth, direct, cache)
        own = OwnModules(settings.modules)
        maker = Maker(settings.generate, outside.search_path, log)
        generated = Generated(Mirror(source, cache, begin), own, maker)
        public: Modules = generated
        if settings.min_age:
            public = Aged(public, settings.min_age, settings.min_age_exempt)
        policy = Policy(public, private, storage, settings)
        if settings.modules:
            policy = OwnFirst(own, policy, maker)
        proxies = [hop.url for hop in settings.upstream if hop.url]
        sumdb = SumDb(SumDbOrigin(settings.sumdb, proxies, client), cache, policy, log)
        yield Answering(policy, sumdb, cache, source)
    generated.close()
    sumdb.close()
    cache.close()


def _check_generate(settings: Settings) -> None:
    if settings.generate and not settings.modules:
        glob, command = settings.generate[0]
        raise UsageError(
            f"{settings.origins['generate']}={glob}={shlex.join(command)}: want -modules as well, "
            "where the results are kept"
        )


def _check_registry(settings: Settings) -> None:
    if settings.registry_blobs and not settings.registry:
        raise UsageError(f"{settings.origins['registry_blobs']}: want -registry as well")
    if settings.registry and settings.offline:
        raise UsageError(
            f"{settings.origins['registry']}={settings.registry}: not with -offline: the registry "
            "itself says who may have what"
        )


def open_layers(
    settings: Settings, dialer: Dialer, environ: Mapping[str, str], log: Log
) -> LayerStore | None:
    """What -registry-blobs names. Raises UsageError."""
    place = settings.registry_blobs
    return LayerStore(place, Means(None, dialer, environ, log.line)) if place else None


def _told_of_places(settings: Settings, layers: LayerStore | None) -> Iterator[str]:
    """What the start of the log tells about -private and -registry."""
    if settings.private:
        yield f"Private: {','.join(settings.private)}"
    if settings.registry:
        yield f"Registry: {settings.registry} behind /v2/"
    if layers:
        yield (
            f"Layers: {layers.peer}; clients are sent to {layers.public_host}, but those that have "
            "asked for that very name or one above it get them streamed: with a redirect they "
            "would send their Authorization along"
        )


def _open_registry(
    settings: Settings, dialer: Dialer, layers: LayerStore | None, log: Log, fetches: bool
) -> tuple[Registry | None, Callable[[], None]]:
    """What answers below /v2/ in this process, if anything, and how to end that."""
    if not settings.registry:
        return None, (lambda: None)
    line = RegistryLine(settings.registry, settings.registry_preserve_host, Client(dialer, {}, log))
    registry = Registry(line, layers, fetches, log)
    endings: list[Callable[[], None]] = [registry.close]
    if layers and settings.registry_blobs and fetches:
        endings.append(Ageing(layers, settings.registry_blobs, log).close)
    if layers:
        endings.append(layers.close)

    def end() -> None:
        for each in endings:
            each()

    return registry, end


def _open_gate(settings: Settings, log: Log) -> Gate | None:
    if settings.auth and settings.private_auth == "client":
        raise UsageError(
            f"{settings.origins['private_auth']}=client: not with -auth: a request can "
            "show one Authorization only"
        )
    try:
        return Gate(settings.auth, log) if settings.auth else None
    except ValueError as error:
        raise UsageError(f"{settings.origins['auth']}={settings.auth}: {error}") from None


def open_tls(settings: Settings) -> Tls | None:
    """What the settings name, if they do. Raises UsageError."""
    cert, key = settings.tls_cert, settings.tls_key
    if not cert:
        if key:
            raise UsageError(f"{settings.origins['tls_key']}={key}: want -tls-cert, too")
        return None
    try:
        return Tls(cert, key)
    except ValueError as error:
        raise UsageError(f"{settings.origins['tls_cert']}={cert}: {error}") from None


class Daemon:
    """The one place that knows all rooms."""

    _TURN = 0.5  # seconds

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Opens what the settings name. Raises UsageError, StartError."""
        self._settings = settings
        _check_generate(settings)
        _check_recheck(settings)
        _check_registry(settings)
        self._log = Log(2, settings.log_format == "json")
        self._gate = _open_gate(settings, self._log)
        self._outside = open_outside(settings, environ)
        self._tls = open_tls(settings)
        variables = TraceVariables(environ)
        self._traces = variables.plan(settings.trace)
        self._remarks = [*self._outside.remarks, *variables.remarks]
        handed = Handed(environ.get(_HANDED, ""))
        self._passed = handed.sockets or passed_sockets(environ)
        self._sockets = self._passed or [open_socket(settings)]  # before a store is made in vain
        means = Means(settings.max_size, self._outside.dialer, environ, self._log.line)
        with contextlib.ExitStack() as undo:
            for sock in self._sockets:
                undo.callback(sock.close)
            check_git(settings, self._outside.search_path)  # before a store is made in vain, too
            self._storage = open_store(settings, means)
            self._layers = open_layers(settings, self._outside.dialer, environ, self._log)
            self._settings = _as_shared(settings, self._storage)
            prepare_git(settings, self._outside.search_path)
            undo.pop_all()
        self._manager = ServiceManager(environ)
        self._succession = Succession(handed, self._log)

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM; a second signal ends it at once. SIGUSR2 replaces it."""
        _block_signals()  # until somebody listens to them
        _slim()
        raise_descriptor_limit()
        if self._settings.workers > 1 and hasattr(os, "fork"):
            METER.share(self._settings.workers + 1)
            sockets, storage, log = self._sockets, self._storage, self._log
            workers = Workers(self._settings.workers, self._work, sockets, storage, log)
            workers.run(self._announce, self._try_reload, self._manager, self._succession)
        else:
            self._serve_alone()
        for sock in self._sockets:
            sock.close()
        self._storage.close()
        self._log.line(f"{'Stand-in' if self._succession.handed.stands_in else 'Server'} stopped")
        self._log.write_out()
        _block_signals()  # the new file will listen to them
        self._succession.complete()

    def _serve_alone(self) -> None:
        def on_signal(number: int, frame: Any) -> None:
            server.post(lambda: self._log.line(_farewell(_shut_down(number), _DRAIN_SECONDS)))
            server.post(lambda: self._manager.tell("STOPPING=1"))
            server.post(self._succession.cancel)
            server.stop(_DRAIN_SECONDS)

        with self._serving(None, None) as server:
            for number in _SIGNALS:
                signal.signal(number, on_signal)
            if _RELOAD:  # by the loop: it may just have a lane's mutex where it is interrupted
                reload = functools.partial(server.patient_lane.do, self._try_reload)
                signal.signal(_RELOAD, lambda *_: server.post(reload))
            if _RENEW:
                begin = functools.partial(self._succession.begin, self._sockets)
                signal.signal(_RENEW, lambda *_: server.post(begin))
            self._announce()
            self._manager.keep_reassuring()
            begin_thread(lambda: self._watch_succession(server), "succession")
            _unblock_signals()
            server.serve_forever()

    def _watch_succession(self, server: Server) -> None:
        while True:
            time.sleep(self._TURN)
            seconds = self._succession.verdict()
            if seconds is not None:
                self._log.line(_farewell(_MAKE_WAY, seconds))
                server.stop(seconds)

    def _work(self, line: int, fetcher: socket.socket | None, handed: socket.socket | None) -> None:
        """A worker process: it serves until its line to the parent says stop, or is cut."""
        self._succession.handed.close()
        with self._serving(fetcher, handed) as server:
            work = functools.partial(_obey, line, server, lambda: self._try_reload(tells=False))
            begin_thread(work, "orders")
            server.serve_forever()

    def _reload(self) -> None:
        """Reads again what may change while it runs. Raises UsageError; then all stays."""
        if self._tls:
            try:
                self._tls.reload()
            except ValueError as error:
                raise UsageError(f"-tls-cert {self._settings.tls_cert}: {error}") from None

    def _try_reload(self, tells: bool = True) -> bool:
        """The same, but a failure is a line in the log, and success one if `tells`."""
        if tells:
            now = time.monotonic_ns() // 1000
            self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={now}")
        try:
            self._reload()
        except UsageError as error:
            self._log.error(f"SIGHUP: {error}; the old one stays")
            return False
        finally:
            if tells:
                self._manager.tell("READY=1")
        if tells:
            self._log.line("SIGHUP: what may change has been read again")
        return True

    @contextlib.contextmanager
    def _serving(
        self, fetcher: socket.socket | None, handed: socket.socket | None
    ) -> Iterator[Server]:
        """All that one process needs to serve, with its threads."""
        settings, log = self._settings, self._log
        log.start()
        _keep_slim()
        client = Client(self._outside.dialer, self._outside.netrc_file, log)
        storage = WatchedStorage(self._storage, log)
        exporter = None
        if self._traces:
            exporter = TraceExporter(TraceLine(client, self._traces), self._traces.sampler, log)
        with answering(settings, self._outside, client, storage, log) as found:
            saw, end = _watching(settings, found.policy, storage, fetcher)
            noting = _noting(settings, found, log, fetcher)
            registry, end_registry = _open_registry(
                settings, self._outside.dialer, self._layers, log, fetches=fetcher is None
            )
            endings = [end, *noting.endings, end_registry]
            doors = (self._gate, self._tls, OwnModules(settings.modules))
            told = (saw, noting.used, *doors, noting.failed, noting.overview, registry)
            app = App(settings, found.policy, found.sumdb, storage, log, *told)
            if not fetcher:
                endings.append(_rechecking(settings, found.policy, found.source, storage, log))
            yield Server(self._sockets, app, fetcher, handed)
            for each in endings:
                each()
        if exporter:
            exporter.close()
        client.close()
        self._outside.dialer.resolver.close()
        log.flush(1.0)

    def _announce(self) -> None:
        if self._succession.handed.stands_in:
            self._log.line(f"SIGUSR2: process {os.getpid()} of the new file stands in")
        else:
            self._introduce()
        self._manager.tell("READY=1")
        self._succession.handed.announce()

    def _introduce(self) -> None:
        """The block at the start, with a line that says where values other than the defaults
        came from."""
        settings = self._settings
        addresses = [sock.getsockname() for sock in self._sockets]
        ports = [address[1] for address in addresses if isinstance(address, tuple)]
        paths = [os.fsdecode(path) for path in addresses if not isinstance(path, tuple)]
        places = [*map(str, ports), *(f"unix:{path}" for path in paths)]
        self._log.line("Starting Go module proxy server")
        self._log.line(f"  Port: {', '.join(dict.fromkeys(places))}")
        if self._passed:
            self._log.line("  Sockets: handed over; -host and -port do not count")
        self._log.line(f"  Cache directory: {settings.cache}")
        if self._storage.remark:
            self._log.line(f"  {self._storage.remark}")
        self._log.line(f"  Upstream proxy: {settings.upstream_text}")
        collector = self._traces.url if self._traces else None
        ways = {"Outgoing proxy": settings.proxy, "DNS": settings.dns_text, "Traces": collector}
        for name, way in ways.items():
            if way:
                self._log.line(f"  {name}: {way}")
        if settings.offline:
            self._log.line("  Offline: answers come from the cache alone")
        if settings.origins:
            origins = sorted(f"{name} by {origin}" for name, origin in settings.origins.items())
            self._log.line(f"  Settings: {', '.join(origins)}")
        for line in _told_of_places(settings, self._layers):
            self._log.line(f"  {line}")
        for remark in self._remarks:
            self._log.error(f"  {remark}")
        if ports:
            scheme = "https" if self._tls else "http"
            self._log.line(f"  Set GOPROXY={scheme}://{self._reachable()}:{ports[0]},direct")

    def _reachable(self) -> str:
        host = _from_here(self._settings.host)
        return f"[{host}]" if ":" in host else host


def _from_here(host: str) -> str:
    """By what name this machine reaches what listens on a -host."""
    return "localhost" if host in ("", "0.0.0.0", "::") else host


def run_serve(settings: Settings, environ: Mapping[str, str]) -> int:
    """Serves until a signal comes. Raises UsageError, StartError."""
    Daemon(settings, environ).run()
    return 0


def run_check(settings: Settings, environ: Mapping[str, str]) -> int:
    """Prints a line for each server that the settings name, and one for the store; 1 if that,
    the first upstream, the registry or its bucket fails. Raises UsageError."""
    outside = open_outside(settings, environ)
    dialer, client = outside.dialer, Client(outside.dialer, outside.netrc_file)
    with contextlib.closing(dialer.resolver), contextlib.closing(client):
        for remark in outside.remarks:
            print(f"FAIL  settings  {remark}", flush=True)
        for finding in _way_findings(settings, dialer, environ.get("SSL_CERT_FILE")):
            print(finding, flush=True)
        git = git_version(environ.get("PATH", os.defpath))
        if settings.private:
            print(_git_finding("private", git), flush=True)
        status = 0
        for number, finding in enumerate(_upstream_findings(settings, dialer, client, git)):
            print(finding, flush=True)
            status = status or int(number == 0 and not finding.good)
        for database in settings.sumdb:
            finding = check_server("checksum database", database.url, "latest", dialer, client)
            print(finding, flush=True)
        traces = TraceVariables(environ).plan(settings.trace)
        if traces:
            print(TraceLine(client, traces).check(), flush=True)
        for finding in _registry_findings(settings, dialer, environ):
            print(finding, flush=True)
            status = status or int(not finding.good)
        store = _store_finding(settings, Means(settings.max_size, dialer, environ, QuietLog().line))
        print(store, flush=True)
    return status or int(not store.good)


def run_health(settings: Settings, environ: Mapping[str, str]) -> int:
    """Asks the server that these settings start for its /health; 1 if it does not answer so."""
    status = "no answer"
    with (
        contextlib.suppress(BadUpstream, OSError),
        _connected(settings.host, settings.port) as sock,
    ):
        link = _own_tls().wrap_socket(sock) if settings.tls_cert else sock
        with link:
            link.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            status = link.recv(1 << 12).decode("latin-1").partition("\r\n")[0]
    print(status)
    return 0 if status.endswith(" 200 OK") else 1


_HEALTH_SECONDS = 4.0


def _connected(host: str, port: int) -> socket.socket:
    """A connection to who listens for -host and -port, whichever address a name is. Raises
    OSError, BadUpstream."""
    if not host.startswith("unix:"):
        until = time.monotonic() + _HEALTH_SECONDS
        return connect_first(SystemResolver().lookup(_from_here(host), until), port, until)
    with contextlib.ExitStack() as failing:
        sock = failing.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(_HEALTH_SECONDS)
        sock.connect(host[len("unix:") :])
        failing.pop_all()
    return sock


def _own_tls() -> ssl.SSLContext:
    """For a server of our own on this machine, whose certificate has other names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _way_findings(settings: Settings, dialer: Dialer, ca_file: str | None) -> Iterator[Finding]:
    """The proxy, and each DNS server by a name that it is there for."""
    if settings.proxy:
        yield check_proxy("proxy", settings.proxy, dialer)
    targets = [hop.url for hop in settings.upstream if hop.url]
    targets += [database.url for database in settings.sumdb]
    ours = [url.host for url in targets if dialer.resolves(url.host, url.port)]
    names = [host for host in ours if not is_ip(host) and host != "localhost"]
    for server in settings.dns:
        if ours or not settings.proxy:
            links = open_links(dialer.route, ca_file)
            yield check_dns("dns", server, links, [*names, _SOME_NAME][0])
        else:
            yield Finding("dns", str(server), True, "not asked: the proxy looks up every name")


def _store_finding(settings: Settings, means: Means) -> Finding:
    """Opens what -cache names; something small is put there, read, and removed. A folder or file
    is not made for this. Raises UsageError."""
    folder = os.path.abspath(settings.cache.path)
    if not os.path.exists(folder):
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        may = os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
        words = f"not there, and {'can' if may else 'cannot'} be made in {folder}"
        return Finding("cache", str(settings.cache), may, words)
    return _tried("cache", settings.cache, lambda: open_store(settings, means))


def _registry_findings(
    settings: Settings, dialer: Dialer, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """The registry, and the bucket for its layers."""
    if settings.registry:
        with contextlib.closing(Client(dialer, {})) as nobody:
            yield check_registry(settings.registry, dialer, nobody)
    layers = open_layers(settings, dialer, environ, QuietLog())
    if layers:
        yield _tried("layers", layers.peer, lambda: layers)


def _tried(label: str, what: object, open_it: Callable[[], Storage]) -> Finding:
    """Puts something small into a store, reads and removes it."""
    name = f"{OWN_MARK}check-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:

        def attempt() -> str:
            storage = stack.enter_context(contextlib.closing(open_it()))
            storage.put(name, name.encode())
            try:
                with contextlib.closing(storage.open(name)) as blob:
                    if blob.read(1024) != name.encode():
                        raise StoreDown("it gives back other bytes")
            finally:
                storage.remove(name)
            return ""

        return examine(label, what, [("put, read and remove", attempt)])


def _git_finding(label: str, git: tuple[int, ...]) -> Finding:
    words = ".".join(map(str, git)) or "not on the PATH"
    return Finding(label, "git", git >= OLDEST_GIT, words)


def _upstream_findings(
    settings: Settings, dialer: Dialer, client: Client, git: tuple[int, ...]
) -> Iterator[Finding]:
    """Each upstream is asked what costs nobody a fetch."""
    databases = [database.name for database in settings.sumdb]
    question = f"sumdb/{[*databases, _SOME_NAME][0]}/supported"
    for hop in settings.upstream:
        if hop.url:
            yield check_server("upstream", hop.url, question, dialer, client)
        elif hop.folder:
            is_there = os.path.isdir(hop.folder)
            words = "a folder" if is_there else "no such folder"
            yield Finding("upstream", str(hop), is_there, words)
        elif hop.kind == "direct":
            yield _git_finding("upstream direct", git)


_SOME_NAME = "sum.golang.org"


class QuietLog(Log):
    """That of a command, which tells itself what failed."""

    def __init__(self) -> None:
        super().__init__(2, False)

    def line(self, text: str, level: str = "info", **fields: Any) -> None:
        pass


def run_fetch(settings: Settings, environ: Mapping[str, str]) -> int:
    """Fills the store with what the words on the command line build with; 1 if anything is
    missing. Raises UsageError, StartError."""
    platforms = settings.given[_TOOLCHAINS.name].replace(",", " ").split()
    wishes = [_wish(word, platforms) for word in settings.given[_WISHES.name]]
    if not wishes:
        raise UsageError(f"fetch: want {_WISHES.text}")
    progress = Progress("fetch", settings.given[_AS_JSON.name])
    reach = Reach.STORED if settings.offline else Reach.FETCH
    with _at_work(settings, environ) as found:
        gatherer = Gatherer(found.policy, found.sumdb, reach, progress)
        found.cache.on_lost = gatherer.lose
        for wish in wishes:
            wish(gatherer)
        gatherer.gather()
    progress.end(f"{gatherer.failures} missing", missing=gatherer.failures)
    return 1 if gatherer.failures else 0


@contextlib.contextmanager
def _at_work(settings: Settings, environ: Mapping[str, str]) -> Iterator[Answering]:
    """What a command needs of the daemon."""
    log = QuietLog()
    outside = open_outside(settings, environ)
    dialer, client = outside.dialer, Client(outside.dialer, outside.netrc_file)
    storage = open_store(settings, Means(settings.max_size, dialer, environ, log.line))
    with _saying(settings.cache), contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(dialer.resolver))
        stack.enter_context(contextlib.closing(client))
        yield stack.enter_context(answering(settings, outside, client, storage, log))


def _check_is_there(settings: Settings) -> None:
    """For commands that make no store. Raises StartError."""
    if not os.path.exists(os.path.abspath(settings.cache.path)):
        origin = settings.origins.get("cache", "-cache")
        raise StartError(f"{origin}={settings.cache}: no store is there")


def run_verify(settings: Settings, environ: Mapping[str, str]) -> int:
    """Holds all that is stored of versions to what it should be; 1 if anything is not, or could not
    be read. Raises UsageError, StartError."""
    _check_is_there(settings)
    progress = Progress("verify", settings.given[_AS_JSON.name])
    with _at_work(settings, environ) as found, _layers_at_work(settings, environ) as layers:
        compares = settings.verify and not settings.offline
        begin = found.sumdb.begin if compares else lambda path, version: nothing_known
        kind = repr([compares, [*map(str, settings.sumdb)], settings.private, settings.exclude])
        rounds: list[Round] = [Inspector(found.cache.storage, begin, kind, progress)]
        rounds += [LayerInspector(layers, progress)] if layers else []
        for each in rounds:
            each.go()
        for each in rounds:
            each.forget()
    counts = {event: sum(each.count(event) for each in rounds) for event in ("bad", "failed")}
    counts["compared"] = sum(each.compared for each in rounds)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    progress.end(f"{told} with the checksum database", **counts)
    return 1 if counts["bad"] or counts["failed"] else 0


@contextlib.contextmanager
def _layers_at_work(settings: Settings, environ: Mapping[str, str]) -> Iterator[LayerStore | None]:
    """The store of -registry-blobs."""
    dialer = open_way_out(settings, environ)
    with contextlib.closing(dialer.resolver), contextlib.ExitStack() as stack:
        layers = open_layers(settings, dialer, environ, QuietLog())
        if layers:
            stack.enter_context(contextlib.closing(layers))
        yield layers


_AS_JSON = Argument("-json", "prints a JSON object per line", False)
_WISHES = Argument("WANTED...", "go.mod or go.sum files, MODULE@VERSION, or - for stdin")


_TOOLCHAINS = Argument(
    "-toolchains", "platforms (linux-amd64, by commas): also the Go that go.mod files name", ""
)


def _wish(word: str, platforms: Sequence[str]) -> Callable[[Gatherer], None]:
    """What a word stands for: the path of a go.mod or go.sum, MODULE@VERSION, or - for stdin,
    which is one of these files or a list of MODULE@VERSION. Raises UsageError."""
    path, _, version = word.rpartition("@")
    if path and not os.path.exists(word):
        return lambda gatherer: gatherer.want_module(path, version)
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if word == "-" else stack.enter_context(open(word, "rb"))
            raw = file.read()
        if module_path(raw):
            toolchains = [f"v0.0.1-{go}.{each}" for go in go_release(raw) for each in platforms]
            return lambda gatherer: _want_project(gatherer, raw, toolchains)
        modules = [line.rpartition("@") for line in raw.decode().split("\n") if line.strip()]
        if all(name and " " not in name for name, _, _ in modules):
            return lambda gatherer: _want_all(gatherer, modules)
        sums = read_sums(raw)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"fetch: {word}: neither MODULE@VERSION nor a file: {why}") from None
    except BadUpstream as error:
        raise UsageError(f"fetch: {word}: neither a go.mod nor a go.sum: {error}") from None
    return lambda gatherer: gatherer.want_sums(sums)


def _want_project(gatherer: Gatherer, go_mod: bytes, toolchains: Iterable[str]) -> None:
    gatherer.want_mod(go_mod)
    for version in toolchains:
        gatherer.want_module("golang.org/toolchain", version)


def _want_all(gatherer: Gatherer, modules: Iterable[Sequence[str]]) -> None:
    for name, _, version in modules:
        gatherer.want_module(name, version.strip())


def run_pack(settings: Settings, environ: Mapping[str, str]) -> int:
    """Makes a module version of a folder, prints its lines for go.sum and stores it if told where.
    Raises UsageError, StartError."""
    given = settings.given
    artifact = Artifact(given["-module"], given["-version"], "zip")
    try:
        check_module(artifact.path, artifact.version)
    except BadName as error:
        raise UsageError(f"-module, -version: {error}") from None
    url = _upload_url(given["-to"])
    storage = open_own(given["-to"]) if given["-to"] and not url else MemoryStorage(None)
    draft = storage.draft()
    try:
        write_zip(draft, artifact[:2], _chosen(given), opener(given["SRC"]))
        sums = check_module_zip(draft, artifact.path, artifact.version)
        if url:
            _upload(settings, environ, url, (artifact, draft))
        elif given["-to"]:
            publish(storage, artifact, draft, sums)
    except (OSError, ProxyError) as error:
        raise StartError(f"{given['SRC']}: {error}") from None
    finally:
        draft.fail(StartError("not kept"))  # if it was not adopted
        storage.close()
    print(f"{artifact.path} {artifact.version} {sums.zip}")
    print(f"{artifact.path} {artifact.version}/go.mod {sums.mod}")
    return 0


def _upload_url(text: str) -> Url | None:
    """None for a folder. Raises UsageError."""
    if "://" not in text:
        return None
    try:
        return parse_url(text)
    except ValueError as error:
        raise UsageError(f"-to={mask(text)}: {error}") from None


def _upload(
    settings: Settings, environ: Mapping[str, str], url: Url, packed: tuple[Artifact, Draft]
) -> None:
    dialer = open_way_out(settings, environ)
    client = Client(dialer, read_credentials(environ)[0])
    with contextlib.closing(dialer.resolver), contextlib.closing(client):
        send_zip(client, url, *packed)


def _chosen(given: Mapping[str, Any]) -> dict[str, int | None]:
    sizes = source_tree(given["SRC"])
    if not given["-skip-ignored"]:
        return sizes
    known = known_to_git(given["SRC"])
    return {name: size for name, size in sizes.items() if name in known}


_PACK_ARGUMENTS = (
    Argument("SRC", "the folder with the module's go.mod"),
    Argument("-module", "its path"),
    Argument("-version", "its version, as v1.2.3"),
    Argument("-to", "a folder as for -modules, or a goproxy.py's URL; else nothing is stored", ""),
    Argument("-skip-ignored", "leave out what git ignores", False),
)


def run_passwd(settings: Settings, environ: Mapping[str, str]) -> int:
    """Writes one user into the file of users. Raises UsageError, StartError."""
    given = settings.given
    file = given["FILE"] or settings.auth
    if not file:
        raise UsageError("which file? Name it before the user, or set GOPROXY_AUTH")
    if not given["-token"] and not has_scrypt():
        raise StartError("this Python has no hashlib.scrypt: use -token")
    token = secrets.token_urlsafe(32)
    secret = hash_token(token) if given["-token"] else hash_password(_asked_password())
    globs = "".join(given["-allow"].split())
    line = f"{given['USER']} {given['-role']} {globs} {secret}"
    try:
        read_users(f" {line}")  # no comment, whatever the name
    except ValueError as error:
        raise UsageError(str(error).replace("line 1: ", "")) from None
    try:
        _replace_line(file, given["USER"], line)
    except (OSError, ValueError) as error:
        raise StartError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if given["-token"]:
        print(token)
    return 0


def _asked_password() -> str:
    """From the terminal, without echo and twice, or the first line of stdin. Raises UsageError."""
    if sys.stdin.isatty():
        import getpass  # loads terminal modules, which a proxy never needs

        password = getpass.getpass("Password: ")
        again = getpass.getpass("Again: ")
    else:
        password = again = sys.stdin.readline().rstrip("\r\n")
    if not password or password != again:
        raise UsageError("no password" if not password else "these were two passwords")
    return password


def _replace_line(file: str, name: str, line: str) -> None:
    """Puts a user's line in the place of the old one, or at the end; the file appears whole."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError), open(file, encoding="utf-8") as old:
        lines = old.read().splitlines()
    read_users("\n".join(lines))  # who would trust what is written into a broken file?
    at = next((n for n, each in enumerate(lines) if each.split()[:1] == [name]), len(lines))
    lines[at : at + 1] = [line]
    folder = os.path.dirname(os.path.abspath(file))
    descriptor, draft = tempfile.mkstemp(prefix=".goproxy-users-", dir=folder)  # for us alone
    try:
        with open(descriptor, "w", encoding="utf-8") as new:
            new.write("\n".join([*lines, ""]))
            new.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileNotFoundError):
            _inherit(file, draft)
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise


def _inherit(file: str, draft: str) -> None:
    """A service may read a file by its group, while root writes it."""
    status = os.stat(file)
    if hasattr(os, "chown"):
        os.chown(draft, status.st_uid, status.st_gid)
    os.chmod(draft, stat.S_IMODE(status.st_mode) & ~0o007)


_PASSWD_ARGUMENTS = (
    Argument("FILE", "the users (default: that of -auth)", ""),
    Argument("USER", "the name of the user"),
    Argument("-role", "reader, publisher (may PUT versions) or admin (may DELETE them)", "reader"),
    Argument("-allow", "globs of the modules that the user may have", "*"),
    Argument("-token", "make a token and print it, instead of asking for a password", False),
)


@contextlib.contextmanager
def _opened(settings: Settings, environ: Mapping[str, str]) -> Iterator[Storage]:
    """The store of -cache for a command. Raises UsageError, StartError."""
    dialer = open_way_out(settings, environ)
    means = Means(settings.max_size, dialer, environ, QuietLog().line)
    storage = open_store(settings, means)
    with contextlib.closing(dialer.resolver), contextlib.closing(storage), _saying(settings.cache):
        yield storage


@contextlib.contextmanager
def _saying(place: Place) -> Iterator[None]:
    """What a store cannot do is said in one line. Raises StartError."""
    try:
        yield
    except (OSError, StoreDown) as error:
        raise StartError(f"{place}: {error}") from None


def _choice(given: Mapping[str, Any]) -> Choice:
    sums: dict[tuple[str, str], set[str]] = {}
    try:
        for name in filter(None, given["-gosum"].split(",")):
            with open(name, "rb") as file:
                for key, hashes in read_sums(file.read()).items():
                    sums.setdefault(key, set()).update(hashes)
    except (OSError, BadUpstream) as error:
        raise UsageError(f"-gosum={name}: {error}") from None
    try:
        return Choice(given["WHAT..."], sums)
    except ValueError as error:
        raise UsageError(f"export: {error}") from None


def run_export(settings: Settings, environ: Mapping[str, str]) -> int:
    """Copies the store, or a part of it, to a tar archive or a folder; 1 if something named is
    missing. Raises UsageError, StartError."""
    _check_is_there(settings)
    place = settings.given["FILE"]
    choice = _choice(settings.given)
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(_opened(settings, environ))
        if place == "-":
            out = sys.stdout.buffer
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            target: Target = stack.enter_context(_ended_tar(TarTarget(out), "stdout"))
        elif place.endswith("/") or os.path.isdir(place):
            target = FolderTarget(place)
        else:
            file = stack.enter_context(_new_file(place))
            target = stack.enter_context(_ended_tar(ResumedTar(file), place))
        progress = Progress("export", settings.given[_AS_JSON.name])
        exporter = Exporter(storage, choice, target, progress)
        exporter.run()
        progress.end(f"{exporter.failures} missing or wrong", failed=exporter.failures)
    return 1 if exporter.failures else 0


@contextlib.contextmanager
def _ended_tar(target: TarTarget, place: str) -> Iterator[TarTarget]:
    """Raises StartError for what cannot be written to the place."""
    try:
        yield target
        target.end()
    except OSError as error:
        raise StartError(f"{place}: {error.strerror}") from None


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole; until then it is PATH.part, which stays for the
    next run. Raises StartError."""
    part = f"{path}.part"
    if os.path.exists(path) and not os.path.isfile(path):
        raise StartError(f"{path}: want a file, a folder, or - for stdout")
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            yield file
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from None


_EXPORT_ARGUMENTS = (
    _AS_JSON,
    Argument("FILE", "a new tar archive, - for stdout, or a folder (which ends in / or is there)"),
    Argument("WHAT...", "globs of modules, or MODULE@VERSION; without any: all"),
    Argument("-gosum", "go.sum files, by commas, that name what to take", ""),
)


def run_import(settings: Settings, environ: Mapping[str, str]) -> int:
    """Takes an export, a module cache or a store of Athens into the store; 1 if something was
    refused. Raises UsageError, StartError."""
    source = settings.given["SOURCE"]
    progress = Progress("import", settings.given[_AS_JSON.name])
    with contextlib.ExitStack() as stack:
        files: Iterable[Incoming] = FolderFiles(source)
        if not os.path.isdir(source):
            try:
                files = TarFiles(stack.enter_context(open(source, "rb")))
            except OSError as error:
                raise StartError(f"{source}: {error.strerror}") from None
        importer = Importer(stack.enter_context(_opened(settings, environ)), progress)
        try:
            importer.run(files, needs_manifest=isinstance(files, TarFiles))
        except BadUpstream as error:
            raise StartError(f"{source}: {error}") from None
    failed, skipped = importer.failures, importer.skipped
    progress.end(f"{skipped} were here, {failed} refused", skipped=skipped, failed=failed)
    return 1 if failed else 0


_IMPORT_ARGUMENTS = (
    _AS_JSON,
    Argument("SOURCE", "a tar archive of export, or a folder: exported, GOMODCACHE, Athens'"),
)


def run_restore(settings: Settings, environ: Mapping[str, str]) -> int:
    """Brings back what a re-check has moved aside; 1 if nothing was. Raises UsageError,
    StartError."""
    _check_is_there(settings)
    progress = Progress("restore", settings.given[_AS_JSON.name])
    try:
        choice = Choice(settings.given["WHAT..."], {})
    except ValueError as error:
        raise UsageError(f"restore: {error}") from None
    with _opened(settings, environ) as storage:
        restored = restore(storage, choice)
    for path, version in restored:
        progress.tell("restored", f"{path}@{version}", module=path, version=version)
    progress.advance(len(restored))
    progress.end("brought back")
    return 0 if restored else 1


_RESTORE_ARGUMENTS = (
    _AS_JSON,
    Argument("WHAT...", "globs of modules, or MODULE@VERSION; without any: all"),
)


def run_gc(settings: Settings, environ: Mapping[str, str]) -> int:
    """Removes what nobody can use. Raises UsageError, StartError."""
    _check_is_there(settings)
    progress = Progress("gc", settings.given[_AS_JSON.name])
    only_tells = settings.given["-dry-run"]
    with _opened(settings, environ) as storage:
        for item, why in find_leftovers(storage, time.time()):
            progress.tell("removed", f"{item.name}: {why}", name=item.name, size=item.size)
            if not only_tells:
                with contextlib.suppress(NotFound):
                    storage.remove(item.name)
            progress.advance(1, item.size)
        if not only_tells:
            storage.sweep()
    progress.end("nothing was removed, only told" if only_tells else "removed")
    return 0


_GC_ARGUMENTS = (
    _AS_JSON,
    Argument("-dry-run", "tell what would be removed, and remove nothing", False),
)


class Command(NamedTuple):
    """What a first word on the command line does; `run` returns the exit status."""

    run: Callable[[Settings, Mapping[str, str]], int]
    text: str
    arguments: Sequence[Argument] = ()


COMMANDS = {
    "check": Command(run_check, "Tries every server that the settings name; says what is wrong."),
    "export": Command(
        run_export, "Copies the store, or a part of it, to an archive.", _EXPORT_ARGUMENTS
    ),
    "fetch": Command(
        run_fetch,
        "Fills the store with all that go.mod, go.sum or versions need.",
        (_AS_JSON, _TOOLCHAINS, _WISHES),
    ),
    "gc": Command(run_gc, "Removes from the store what nobody can use.", _GC_ARGUMENTS),
    "health": Command(run_health, "Asks a running server whether it is well, for containers."),
    "import": Command(run_import, "Takes modules into the store.", _IMPORT_ARGUMENTS),
    "pack": Command(run_pack, "Makes a module version of a folder.", _PACK_ARGUMENTS),
    "passwd": Command(
        run_passwd, "Adds a user to the file of -auth, or changes one.", _PASSWD_ARGUMENTS
    ),
    "restore": Command(
        run_restore, "Brings back what a re-check has moved aside.", _RESTORE_ARGUMENTS
    ),
    "serve": Command(run_serve, "Serves modules; what runs if no command is named."),
    "verify": Command(
        run_verify,
        "Checks all that is stored; moves what is bad aside.",
        (_AS_JSON,),
    ),
}


def _temporary_folder(environ: Mapping[str, str]) -> str | None:
    """Where temporary files go, as tempfile finds it, which would write a file to try each: one
    that stays if this process is killed meanwhile. None: let it."""
    named = [environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")]
    folders = [folder for folder in (*named, "/tmp", "/var/tmp") if folder]
    return next((each for each in folders if os.access(each, os.W_OK | os.X_OK)), None)


def _fill_standard_streams() -> None:
    """Those that were closed: what was opened in their place would get what is printed and told."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or sys.stdout
    if isinstance(sys.stdout, io.TextIOWrapper):  # which would be strict about foreign letters
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit status 0, 2 for settings that cannot be used, 1 for a machine that does
    not let it start, or for a check that failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "-help"]
    name = words.pop(0) if words and words[0] in COMMANDS else "serve"
    command = COMMANDS[name]
    places = "".join(f" {each.name}" for each in command.arguments if each.name.isupper())
    usage, text = f"goproxy.py {name}{places} [flags]", command.text
    if name == "serve":
        listed = "".join(f"\n  {each:8} {COMMANDS[each].text}" for each in COMMANDS)
        usage = "goproxy.py [COMMAND] [flags]"
        text = f"A Go module proxy.\n\ncommands, each with -help:{listed}\n"
    tempfile.tempdir = _temporary_folder(os.environ)
    _fill_standard_streams()
    try:
        if name == "serve" and words and not words[0].startswith("-"):
            hint = likeness(words[0], COMMANDS)
            raise UsageError(f"{words[0]} is no command{hint}; goproxy.py -help lists them")
        settings = Settings.load(words, os.environ, usage, text, command.arguments)
        return command.run(settings, os.environ)
    except KeyboardInterrupt:
        print("goproxy.py: interrupted; what is done is kept", file=sys.stderr)
        return 130
    except (Overloaded, StartError, UsageError) as error:
        print(f"goproxy.py: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:  # as who reads what we print has gone, or the folder we are in
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"goproxy.py: {printable(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
