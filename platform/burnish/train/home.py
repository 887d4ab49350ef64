"""Where a run lives: in a folder that all nodes share, or at a place on another file system, as an object store.

At a place no process can append to a file or wait for a change, so there each process works in a folder of its own and
brings small files over; checkpoints go to the place directly (`Shelf`). In a shared folder nothing is brought anywhere.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import fs

from burnish import storage
from burnish.config import Recipe, below
from burnish.data import files
from burnish.errors import InfrastructureError
from burnish.train.claim import CLAIM, claimed
from burnish.train.shelf import Shelf, reaching

COURIER_SECONDS = 2.0
"""Seconds between two looks at a place; at least ten times as long as the last one took."""
_OWN = {".lock", CLAIM}
"""Files of a folder that concern no other process."""

logger = logging.getLogger(__name__)


@dataclass
class Home:
    """The run as one process sees it: its records are files of `folder`, brought over from and to `place` where that is set.

    Records are the files of the folder itself. Of each, one process at a time is the writer.
    """

    folder: Path
    place: str | None = None
    _synced: dict[str, tuple[int, int]] = field(default_factory=dict)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def of(cls, recipe: Recipe) -> "Home":
        """The home of a recipe's run in this process."""
        return cls.at(recipe.run_place())

    @classmethod
    def at(cls, run: str) -> "Home":
        """The home of the run in a folder or at a place, for this process."""
        if not files.is_remote(run):
            return cls(Path(run))
        return cls(working_folder(run) / f"{socket.gethostname()}-{os.getpid()}", run.rstrip("/"))

    def arrive(self) -> "Home":
        """This home with the place's records brought over; what processes left here that were killed is gone."""
        if self.place is not None:
            _clean(self.folder.parent)
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "checkpoints").mkdir(parents=True)
            self._synced.clear()
            self.look()
        return self

    def leave(self) -> None:
        """Removes this process's own folder where the run lives at a place."""
        if self.place is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def shown(self) -> str:
        """What a person would write to name the run."""
        return self.place or str(self.folder)

    def path(self, name: str) -> str:
        """What a person would write to name something of the run."""
        return below(self.shown, name)

    def shelf(self) -> Shelf:
        """The run's checkpoints."""
        return Shelf(str(self.folder / "checkpoints") if self.place is None else below(self.place, "checkpoints"))

    def identity(self) -> str | None:
        """What tells this run from all others, drawn when it is started; None before, and of one of an earlier version."""
        try:
            return str(json.loads((self.folder / "data.json").read_text())["run"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def look(self, *names: str) -> None:
        """Brings records over from the place, all of them or those named that changed; what is gone there goes here too.

        Raises InfrastructureError where the place cannot be reached.
        """
        if self.place is None:
            return
        with self._lock, reaching(self.place):
            system, base = files.filesystem(self.place)
            found = system.get_file_info(fs.FileSelector(base, allow_not_found=True))
            there = {info.base_name: info for info in found if info.type == fs.FileType.File and info.base_name not in _OWN}
            # What changed here, or was removed, is older there until it is kept the next time.
            here = {path.name: _state(path) for path in self.folder.iterdir() if _is_record(path)}
            newer = {name for name in self._synced | here if here.get(name) != self._synced.get(name)}
            for name in [name for name in there.keys() - newer if not names or name in names]:
                state = there[name].size, there[name].mtime_ns
                if names and self._seen.get(name) == state:
                    continue
                try:
                    with system.open_input_stream(there[name].path, compression=None) as stream:
                        data = bytes(stream.read())
                except FileNotFoundError:  # gone since it was listed
                    continue
                path = self.folder / name
                if not path.exists() or path.read_bytes() != data:
                    unfinished = self.folder / f".{name}.partial"
                    unfinished.write_bytes(data)
                    os.replace(unfinished, path)
                self._synced[name], self._seen[name] = _state(path), state
            for name in [name for name in self._synced if name not in there and (not names or name in names)]:
                (self.folder / name).unlink(missing_ok=True)
                del self._synced[name]

    def keep(self) -> None:
        """Brings records that changed here over to the place, and takes away there what is gone here.

        Raises InfrastructureError where the place cannot be reached.
        """
        if self.place is None:
            return
        with self._lock, reaching(self.place):
            system, base = files.filesystem(self.place)
            here = {path.name: _state(path) for path in self.folder.iterdir() if _is_record(path)}
            changed = [name for name, state in here.items() if self._synced.get(name) != state]
            for name in changed:
                data = (self.folder / name).read_bytes()
                with files.create(system, f"{base}/{name}") as stream:
                    stream.write(data)
                self._synced[name] = here[name]
            for name in [name for name in self._synced if name not in here]:
                with suppress(FileNotFoundError):
                    system.delete_file(f"{base}/{name}")
                del self._synced[name]

    def settle(self) -> None:
        """`keep`, tried again for minutes where the place fails for a while."""
        self._patiently(self.keep)

    def catch_up(self) -> None:
        """`look` at all records, tried again for minutes where the place fails for a while."""
        self._patiently(self.look)

    def _patiently(self, work: Callable[[], None]) -> None:
        for attempt in storage.attempts(f"{self.shown} could not be reached"):
            with attempt:
                work()

    @contextmanager
    def courier(self, *wanted: str) -> Iterator[None]:
        """While the block runs, a thread keeps what changes here and looks for the `wanted` records of others.

        An outage costs nothing but news; what changed last is kept when the block ends, or InfrastructureError is raised.
        """
        if self.place is None:
            yield
            return
        ended = threading.Event()

        def carry() -> None:
            pause = COURIER_SECONDS
            while not ended.wait(pause):
                begun = time.monotonic()
                try:
                    self.keep()
                    if wanted:
                        self.look(*wanted)
                except InfrastructureError as error:
                    logger.warning("%s; trying again", error)
                pause = max(COURIER_SECONDS, 10 * (time.monotonic() - begun))

        threading.Thread(target=carry, daemon=True).start()
        try:
            yield
        except BaseException:
            ended.set()
            with suppress(InfrastructureError):  # what ended the block is what matters
                self.keep()
            raise
        ended.set()
        self.settle()

    @contextmanager
    def claimed(self) -> Iterator["Home"]:
        """This home, arrived at, for the command that trains; while the block runs, no other one trains at the same place.

        Raises RecipeError where another one does. In a shared folder the command takes a lock of the file system instead.
        """
        if self.place is None:
            yield self
            return
        with claimed(self.place):
            try:
                self.arrive()
                with self.courier():
                    yield self
            finally:
                self.leave()


def working_folder(place: str) -> Path:
    """The folder of this user on this machine in which processes work on the run of a place."""
    mine = Path(tempfile.gettempdir()) / f"burnish-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid() or mine.is_symlink():
        raise InfrastructureError(f"{mine} belongs to somebody else; set TMPDIR to a folder of your own")
    return mine / hashlib.sha256(place.encode()).hexdigest()[:16]


def _clean(machine: Path) -> None:
    """Removes what processes of this machine left in its folder of a place that were killed."""
    mine, day_ago = f"{socket.gethostname()}-", time.time() - 86_400
    for left in machine.iterdir() if machine.exists() else ():
        process = left.name.removeprefix(mine)
        over = process.isdigit() and Path("/proc").exists() and not Path("/proc", process).exists()
        with suppress(OSError):
            if over or (left.name[0] == "." and left.stat().st_mtime < day_ago):
                shutil.rmtree(left)


def _is_record(path: Path) -> bool:
    return path.is_file() and path.name not in _OWN and not path.name.endswith(".partial")


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
