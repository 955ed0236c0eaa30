"""Write files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# The records in a folder of pictures: how they were made, how long they took, and the lab's times of UNets.
RUN, TIMES, UNET_TIMES = RECORDS = ("run.json", "times.json", "unet-seconds.json")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. When the block ends, the file appears at ``path``, never as half a file.

    A link's target is replaced, not the link. A pipe, a device or the standard output gets the content when the block
    ends. A file that already has the content stays as it is.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. The message names ``path``, which
            stays unchanged.
    """
    path = Path(path)
    stream = is_stream(path)
    target = path if stream else path.resolve()
    # A unique name, because another run may write the same file at the same time.
    partial = (Path(tempfile.gettempdir()) if stream else target.parent) / f".{secrets.token_hex(8)}.partial"
    try:
        with raising_os_error(path):
            yield partial
        if stream:
            _write_to_stream(partial, path)
        else:
            if target.exists():
                if os.access(target, os.R_OK) and filecmp.cmp(partial, target, shallow=False):
                    return  # so that starting a finished run again changes no file
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            partial.replace(target)
    except OSError as error:
        if error.errno and error.filename in (None, str(partial)):
            # Not every library names the file; a full disk needs it named.
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to. When the block ends, it replaces the folder ``path`` and gets its mode.

    Raises:
        OSError: the folder cannot be written, or ``path`` is a file; it stays unchanged.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, before = (target.parent / f".{secrets.token_hex(8)}.{name}" for name in ("partial", "before"))
    partial.mkdir()
    try:
        with raising_os_error(path):
            yield partial
        if target.exists():
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
            target.rename(before)
        partial.rename(target)
    finally:
        if before.exists() and not target.exists():
            before.rename(target)
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def raising_os_error(path: Path) -> Iterator[None]:
    """Turn what safetensors and torch raise if they cannot write a file into an OSError that names ``path``."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        # torch's writer is in inline_container.cc. It has no type of error for what goes wrong there.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


def is_stream(path: Path) -> bool:
    """Whether ``path`` must be written to and cannot be replaced: not a regular file, or what the process prints to."""
    try:
        found = path.stat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return not is_plain or _printed_to(found) is not None


def _printed_to(found: os.stat_result) -> int | None:
    """The descriptor of standard output or standard error, if ``found`` is the same file; else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), found):
                return descriptor
    return None


def _write_to_stream(partial: Path, path: Path) -> None:
    # If a file that the output is redirected to were opened by name, it would be overwritten from its start.
    descriptor = _printed_to(path.stat())
    if sys.stdout is not None:  # it is None if the caller closed it
        sys.stdout.flush()
    with partial.open("rb") as source, open(path if descriptor is None else os.dup(descriptor), "wb") as stream:
        shutil.copyfileobj(source, stream)
