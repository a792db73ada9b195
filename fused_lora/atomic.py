"""`write_directory`: files that must fit each other, replaced in a directory all at once, so that a
process killed in the middle of a save leaves the last complete set. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SCRATCH = ".saving"


def write_directory(directory: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write `files`, {name: content}, into `directory`, which is made if it is missing.

    Whoever opens these names afterwards finds either all of the old contents or all of the new
    ones, even if the process is killed at any moment or the machine loses power. What else is in
    the directory stays as it is; when the call returns the names are plain files, on the disk.

    How: while the set changes, each name is a symbolic link through one shared link, whose
    replacement by one rename switches all of them; before and after that, names are replaced only
    by the same content. A save that was cut off is tidied up by the next one. Processes that save
    into one directory wait for each other where the file system can lock it; a reader that opens
    two names may still see a save happen in between. Where symbolic links cannot be made (Windows
    without the right to) every file is still replaced as a whole, but one after the other.

    Raises ValueError for a name that is not a plain file name, OSError where the system does, with
    the old contents in place unless the switch had already happened.
    """
    for name in files:
        if name in ("", os.curdir, os.pardir, _SCRATCH) or Path(name).name != name:
            raise ValueError(
                f"{name!r} is not the name of a file in {os.fspath(directory)}: give plain names, "
                "without separators"
            )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _settle(folder)
        try:
            _replace(folder, files)
        finally:
            _settle(folder)


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    scratch = folder / _SCRATCH
    old, new, links = (scratch / name for name in ("old", "new", "links"))
    for path in (scratch, old, new, links):
        path.mkdir()
    for name, content in files.items():
        with open(new / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if (folder / name).exists():
            _link(folder / name, old / name)
    try:
        os.symlink("old", scratch / "current")
        os.symlink("new", scratch / "next")
        for name in files:
            os.symlink(os.path.join(_SCRATCH, "current", name), links / name)
    except (OSError, NotImplementedError):
        for name in files:
            os.replace(new / name, folder / name)
        _sync(folder)
        return
    for path in (old, new, scratch):
        _sync(path)
    for name in files:
        os.replace(links / name, folder / name)
    _sync(folder)
    os.replace(scratch / "next", scratch / "current")
    _sync(scratch)


def _settle(folder: Path) -> None:
    """Turn the names that lead through the scratch directory into plain files of the same content
    (the name of a file that does not exist yet goes), then remove it."""
    scratch = folder / _SCRATCH
    if not scratch.exists():
        return
    for path in list(folder.iterdir()):
        if not (path.is_symlink() and Path(os.readlink(path)).parts[0] == _SCRATCH):
            continue
        if path.exists():
            plain = scratch / "plain"
            plain.unlink(missing_ok=True)
            _link(path, plain)
            os.replace(plain, path)
        else:
            path.unlink()
    _sync(folder)
    shutil.rmtree(scratch)


def _link(source: Path, target: Path) -> None:
    """A second name for the file behind `source`, or a copy where there are no hard links."""
    try:
        os.link(os.path.realpath(source), target)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)
        _sync(target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes' saves out; the system lets go of the lock when a process is killed."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there, nor files synced that are only read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
