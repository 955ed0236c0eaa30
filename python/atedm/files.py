"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what shall be at ``path``: it appears there when the block ends, never as half a file.

    Raises:
        OSError: the file cannot be written, for a full disk say; the message names ``path``, which stays as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(partial)):
            # Not every library names the file; a full disk needs it named.
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
