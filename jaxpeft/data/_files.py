"""Files that are never seen half-written: the cache folder, hashes, locks, and a download that can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20  # bytes read at once


class AssetError(RuntimeError):
    """An asset cannot be had: the message names it, what is missing and what to do."""


def cache_dir() -> Path:
    """The cache: `$JAXPEFT_CACHE`, else `$XDG_CACHE_HOME/jaxpeft`, else `~/.cache/jaxpeft`.

    Read anew at each call, made on first use by whoever writes there.
    """
    if own := os.environ.get("JAXPEFT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "jaxpeft"


def offline() -> bool:
    """Whether `$JAXPEFT_OFFLINE` forbids the network (any value but empty, 0, false and no)."""
    return os.environ.get("JAXPEFT_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def sha256(path: Path) -> str:
    """The file's sha256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the cache's lock `name`: a second process waits here, then finds the work done.

    The operating system drops the lock of a process that dies. Where there are no such locks (no `fcntl`) nothing is
    held; every result is then still whole, because it is renamed into place, but may be made twice.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets go


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when the block has ended without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def folder_written(path: Path) -> Iterator[Path]:
    """A folder that takes the place of `path` only when the block has ended without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp shuts out others, who may share the cache
        if path.exists():  # a rename cannot replace a folder that holds files
            doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            os.replace(path, doomed / "old")
            os.replace(temporary, path)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, done: int) -> Iterator[Callable[[int], Any]]:
    """Yields `advance(bytes)`; draws only where a person is looking (standard error is a terminal)."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda n: bar.advance(task, n)


def without_secrets(url: str) -> str:
    """The address without user, password and query, fit for a message."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(
    url: str,
    target: Path,
    *,
    sha256sum: str,
    timeout: float = 30.0,
    retries: int = 5,
    backoff: float = 1.0,
    sleep: Callable[[float], Any] = time.sleep,
) -> Path:
    """Fetches `url` (http, https or file) to `target`, continuing what an earlier try has left in `target.part`.

    Args:
      url: where the file is.
      target: where it goes, whole or not at all.
      sha256sum: what it must hash to, 64 hexadecimal digits.
      timeout: seconds of silence after which a connection counts as lost.
      retries: how many tries in a row may bring no byte before it gives up.
      backoff: seconds before the second try; doubled for each further one.
      sleep: called with those seconds.

    Returns:
      `target`.

    Raises:
      AssetError: the server refuses, keeps failing, or sends other bytes than `sha256sum` promises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if url.startswith("file:"):
        source = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        try:
            shutil.copyfile(source, part)
        except OSError as error:
            raise AssetError(f"cannot read {source}: {error}") from error
        return _accept(part, target, sha256sum, url)

    resumed = part.exists() and part.stat().st_size > 0
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, timeout)
            break
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            status = None
            if isinstance(error, urllib.error.HTTPError):  # an answer, which holds its connection open
                status = error.code
                error.close()
            if status == 416:  # nothing lies beyond what we hold: either whole, or of another file
                break
            if status is not None and status < 500 and status not in (408, 429):
                raise AssetError(f"{without_secrets(url)}: the server answers {status}") from error
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures > retries:
                raise AssetError(
                    f"{without_secrets(url)}: {failures} tries in a row brought nothing ({error}); "
                    f"{after:,} bytes are kept in {part} and the next call goes on from there"
                ) from error
            sleep(min(backoff * 2 ** max(failures - 1, 0), 60.0))
    try:
        return _accept(part, target, sha256sum, url)
    except AssetError:
        if not resumed:
            raise
    # The piece an earlier run left may be of another file or damaged: once more from the first byte.
    return download(url, target, sha256sum=sha256sum, timeout=timeout, retries=retries, backoff=backoff, sleep=sleep)


def _accept(part: Path, target: Path, expected: str, url: str) -> Path:
    found = sha256(part) if part.exists() else "nothing"
    if found != expected:
        part.unlink(missing_ok=True)
        raise AssetError(f"{without_secrets(url)}: sha256 is {found}, expected {expected}; the file was thrown away")
    os.replace(part, target)
    return target


def _receive(url: str, part: Path, timeout: float) -> None:
    """One connection: appends to `part` from where it ends. Raises if the server stops before the end."""
    have = part.stat().st_size if part.exists() else 0
    # A compressed answer would have other byte positions than the file.
    headers = {"User-Agent": "jaxpeft", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        start = 0
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", answer.headers.get("Content-Range", "").strip())
            start = int(match[1]) if match else -1
            if start != have:
                raise OSError(f"asked for bytes from {have}, got {answer.headers.get('Content-Range')!r}")
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with (
            open(part, "r+b" if start else "wb") as file,  # a server without ranges starts over, and so do we
            progress_bar(part.name.removesuffix(".part"), total, start) as advance,
        ):
            file.seek(start)
            # read1 hands over what has come, so that a cut connection loses nothing that was received
            while block := answer.read1(_CHUNK):
                file.write(block)
                advance(len(block))
            end = file.tell()
    if total is not None and end != total:
        raise OSError(f"the connection ended after {end:,} of {total:,} bytes")
