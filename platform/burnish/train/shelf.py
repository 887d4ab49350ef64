"""Where the checkpoints of a run stand: a folder that all nodes share, or a place on any file system that pyarrow reaches.

A folder gets a checkpoint by a rename. Object stores cannot rename, so there a checkpoint is whole once its manifest, which
is written last, is there, and what has none is no checkpoint.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from burnish import storage
from burnish.config import below
from burnish.data import files
from burnish.errors import DataError, InfrastructureError, RecipeError, one_line
from burnish.train.ledger import replace_text

MANIFEST = "manifest.json"
"""The file of a checkpoint that names all others with size and sha256; written last."""
_ASIDE = "broken-manifest.json"
"""What a manifest is called on a remote file system whose checkpoint was set aside."""
_BLOCK = 8 << 20
"""Bytes that are copied at once."""


class Shelf:
    """The checkpoints of one run, by name (`step-00000050`). It holds no open file and travels between processes.

    Methods raise OSError where the file system does, and RecipeError for a checkpoint that is a link.
    """

    def __init__(self, place: str) -> None:
        self.place, self.remote = place, files.is_remote(place)

    def path(self, name: str) -> str:
        """What a person would write to name a checkpoint."""
        return below(self.place, name)

    def stands(self) -> bool:
        """Whether the folder is there; a place without checkpoints is as one that never had any."""
        return self.remote or Path(self.place).is_dir()

    def names(self) -> list[str]:
        """The checkpoints that stand, oldest first."""
        if not self.remote:
            paths = sorted(Path(self.place).glob("step-*"))
            link = next((path for path in paths if path.is_symlink()), None)
            if link is not None:
                raise RecipeError(f"name: {link} is a link, and a checkpoint lies in its run's own folder; move it there")
            return [path.name for path in paths]
        found = (name.split("/") for name in self._listed())
        return sorted(step for step, *inner in found if step.startswith("step-") and inner == [MANIFEST])

    def read(self, name: str, file: str) -> bytes:
        """A small file of a checkpoint."""
        system, path = self._at(name, file)
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def files(self, name: str) -> dict[str, int]:
        """Names and sizes of the files of a checkpoint, hidden ones left out."""
        if self.remote:
            start = f"{name}/"
            found = {path[len(start) :]: size for path, size in self._listed(name).items() if path.startswith(start)}
        else:
            folder = Path(self.place, name)
            found = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        return {file: size for file, size in found.items() if file.rpartition("/")[2][0] != "."}

    def holds(self, name: str, file: str) -> bool:
        """Whether a name in a manifest is that of a file below the checkpoint's own folder, and of nothing outside."""
        if self.remote:
            return not file.startswith("/") and ".." not in file.split("/")
        folder = Path(self.place, name).resolve()
        return (folder / file).resolve().is_relative_to(folder)

    def described(self, name: str, file: str) -> dict[str, Any]:
        """Size and sha256 of a file, read through once."""
        system, path = self._at(name, file)
        digest, size = hashlib.sha256(), 0
        with system.open_input_stream(path, compression=None) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def broken(self) -> list[str]:
        """What was set aside."""
        if not self.remote:
            return sorted(path.name for path in Path(self.place).glob(".broken-step-*"))
        return sorted(file for file in self._listed() if file.endswith(f"/{_ASIDE}"))

    def set_aside(self, name: str) -> str:
        """Takes a checkpoint out of `names` and keeps what it has; how it is called then."""
        if self.remote:
            manifest = self.read(name, MANIFEST)
            self.write(name, _ASIDE, manifest)
            self._remove_file(name, MANIFEST)
            return f"{name}/{_ASIDE}"
        aside = Path(self.place, f".broken-{name}")
        shutil.rmtree(aside, ignore_errors=True)
        Path(self.place, name).rename(aside)
        return aside.name

    def remove(self, name: str) -> None:
        """Removes a checkpoint; it is out of `names` at once."""
        if self.remote:
            with suppress(FileNotFoundError):
                self._remove_file(name, MANIFEST)
            self._system().delete_dir(self._inner(name))
            return
        gone = Path(self.place, f".{name}.gone.partial")
        Path(self.place, name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def clear(self) -> None:
        """Removes what was begun and is no checkpoint; called where nobody writes."""
        if not self.remote:
            for unfinished in Path(self.place).glob(".step-*.partial"):
                shutil.rmtree(unfinished, ignore_errors=True)
            return
        listed = self._listed()
        steps = {name.split("/")[0] for name in listed}
        for step in steps:
            if f"{step}/{MANIFEST}" not in listed and f"{step}/{_ASIDE}" not in listed:
                self._system().delete_dir(self._inner(step))

    def complete(self, name: str, named: Collection[str], manifest: str) -> None:
        """Makes a checkpoint on a remote file system of the files that were uploaded; others of that name are removed."""
        for stale in self.files(name).keys() - named:
            self._remove_file(name, stale)
        self.write(name, MANIFEST, manifest.encode())
        with suppress(OSError):
            for path in self._listed(name):
                if "/.part-" in path:
                    self._remove_file(name, path.rpartition("/")[2])

    def write(self, name: str, file: str, data: bytes) -> None:
        """Writes a small file of a checkpoint, whole or not at all."""
        if not self.remote:
            replace_text(Path(self.place, name, file), data.decode())
            return
        system, path = self._at(name, file)
        with files.create(system, path) as stream:
            stream.write(data)

    def upload(self, folder: Path, name: str, file: str) -> None:
        """Copies a file of a folder into a checkpoint on a remote file system."""
        system, path = self._at(name, file)
        with open(folder / file, "rb") as source, files.create(system, path) as stream:
            shutil.copyfileobj(source, stream, _BLOCK)

    @contextmanager
    def fetched(self, name: str, scratch: Path, only: str = "") -> Iterator[Path]:
        """The folder of a checkpoint on this machine while the block runs.

        Of a remote one, the files whose names start with `only` are copied below `scratch`, once for all processes there,
        and removed behind the block; what fails for a while is tried again. Raises InfrastructureError where they cannot be
        had, or one is not what the manifest says.
        """
        if not self.remote:
            yield Path(self.place, name)
            return
        try:
            self._fetch(name, scratch, only)
            yield scratch / name
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _fetch(self, name: str, scratch: Path, only: str) -> None:
        """Copies files of a checkpoint below a folder of this machine, once for all processes there."""
        scratch.mkdir(parents=True, exist_ok=True)
        patiently = storage.attempts(f"{self.path(name)} could not be read")
        try:
            with open(scratch / f".{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                wrong = patiently(self._copy, name, scratch / name, only)
        except (OSError, pa.ArrowException) as error:
            done = "read" if storage.may_pass(error) else f"copied to {scratch}"
            raise InfrastructureError(
                f"{self.path(name)} cannot be {done}: {one_line(error)}; the same command may go on"
            ) from error
        if wrong is not None:
            raise InfrastructureError(f"{self.path(name)}: {wrong} is not what its manifest says; start the command again")

    def _copy(self, name: str, folder: Path, only: str) -> str | None:
        """Copies what is not there yet; the first file that is not what the manifest says, or None."""
        folder.mkdir(exist_ok=True)
        for file, entry in json.loads(self.read(name, MANIFEST))["files"].items():
            wanted = file.startswith(only) and not (folder / file).exists()
            if wanted and not self._download(name, file, entry, folder / file):
                return str(file)
        return None

    def _download(self, name: str, file: str, entry: dict[str, Any], target: Path) -> bool:
        """Copies a file of a checkpoint to a target unless it is not what the manifest says; whether it was."""
        system, path = self._at(name, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.partial")
        digest = hashlib.sha256()
        try:
            source = system.open_input_stream(path, compression=None)
        except FileNotFoundError:
            return False
        with source as stream, open(unfinished, "wb") as copy:
            while block := stream.read(_BLOCK):
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != entry["sha256"]:
            return False
        os.replace(unfinished, target)
        return True

    def _listed(self, name: str = "") -> dict[str, int]:
        """Sizes of all files below the place, or below one checkpoint, by their paths below the place."""
        base = self._inner("").rstrip("/")
        at = f"{base}/{name}" if name else base
        found = self._system().get_file_info(fs.FileSelector(at, recursive=True, allow_not_found=True))
        return {info.path[len(base) + 1 :]: info.size for info in found if info.type == fs.FileType.File}

    def _remove_file(self, name: str, file: str) -> None:
        system, path = self._at(name, file)
        system.delete_file(path)

    def _at(self, name: str, file: str) -> tuple[fs.FileSystem, str]:
        return self._system(), self._inner(f"{name}/{file}")

    def _system(self) -> fs.FileSystem:
        return files.filesystem(self.place)[0]

    def _inner(self, name: str) -> str:
        return f"{files.filesystem(self.place)[1].rstrip('/')}/{name}"


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Raises InfrastructureError in place of what a file system raises, RecipeError where nobody here knows it."""
    try:
        files.filesystem(place)
        yield
    except DataError as error:
        raise RecipeError(f"checkpoint.storage: {error}") from None
    except files.UNREADABLE as error:
        raise InfrastructureError(
            f"checkpoint.storage: {place} cannot be reached: {one_line(error)}; check the name and the credentials in every "
            "node's environment (as AWS_ACCESS_KEY_ID)"
        ) from error
