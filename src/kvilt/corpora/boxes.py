"""Files side by side in a folder or in one tar file, read and written alike. Nothing is unpacked, and no link is followed."""

from __future__ import annotations

import contextlib
import functools
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kvilt.errors import UserError
from kvilt.rows.files import replacing

Box = Mapping[str, Callable[[], bytes]]  # files by name, read when they are asked for
Add = Callable[[str, bytes], None]


def open_box(path: Path) -> Box:
    """The files of a folder or a tar file. Raises UserError where it holds anything but regular files side by side."""
    if not path.exists():
        raise UserError(f"no such file or folder: {path}.")
    box: dict[str, Callable[[], bytes]] = {}
    if path.is_dir():
        for item in path.iterdir():
            _enter(box, item.name, item.is_file() and not item.is_symlink(), item.read_bytes, path)
        return box
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                read = functools.partial(_member, path, member.offset_data, member.size)
                _enter(box, member.name, member.isreg(), read, path)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is no tar file that can be read: {error}.") from error
    return box


def _enter(
    box: dict[str, Callable[[], bytes]], name: str, regular: bool, read: Callable[[], bytes], path: Path
) -> None:
    if not regular or "/" in name or name in box:
        raise UserError(f"{path} holds {name!r}, which does not belong into a collection: nothing of it is taken.")
    box[name] = read


def _member(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Add]:
    """Adds files to a new folder, or to a tar file that is there when the block has ended well. Raises UserError."""
    try:
        if path.exists():
            raise UserError(f"{path} is there already: give a new place.")
        if path.suffix == ".tar":
            with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
                yield functools.partial(_add, tar)
        else:
            path.mkdir(parents=True)
            yield functools.partial(_write, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def _write(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
