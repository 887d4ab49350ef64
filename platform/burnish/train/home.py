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
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from burnish.config import Recipe, below
from burnish.data import files
from burnish.errors import InfrastructureError, RecipeError, one_line
from burnish.train.shelf import Shelf

COURIER_SECONDS = 2.0
"""Seconds between two looks at a place; at least ten times as long as the last one took."""
LEASE_SECONDS = 60.0
"""Seconds after which a command that has not renewed its claim on a place is taken for gone."""
RETRY_SECONDS = 300.0
"""How long what must reach the place is tried again."""
_LEASE = ".lease"
_OWN = {".lock", _LEASE}
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
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def of(cls, recipe: Recipe) -> "Home":
        """The home of a recipe's run in this process."""
        return cls.at(recipe.run_place())

    @classmethod
    def at(cls, run: str, guest: str = "") -> "Home":
        """The home of the run in a folder or at a place, for this process; `guest` tells apart several in one process."""
        if not files.is_remote(run):
            return cls(Path(run))
        return cls(working_folder(run) / f"{os.getpid()}{guest}", run.rstrip("/"))

    def arrive(self) -> "Home":
        """This home with the place's records brought over; what an earlier process of this number left is gone."""
        if self.place is not None:
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

    def look(self, *names: str) -> None:
        """Brings records over from the place, all of them or those named; what is gone there goes here too.

        Raises InfrastructureError where the place cannot be reached.
        """
        if self.place is None:
            return
        with self._lock, _reaching(self.place):
            system, base = files.filesystem(self.place)
            found = system.get_file_info(fs.FileSelector(base, allow_not_found=True))
            there = {info.base_name: info for info in found if info.type == fs.FileType.File and info.base_name not in _OWN}
            for name in [name for name in there if not names or name in names]:
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
                self._synced[name] = _state(path)
            for name in [name for name in self._synced if name not in there and (not names or name in names)]:
                (self.folder / name).unlink(missing_ok=True)
                del self._synced[name]

    def keep(self) -> None:
        """Brings records that changed here over to the place, and takes away there what is gone here.

        Raises InfrastructureError where the place cannot be reached.
        """
        if self.place is None:
            return
        with self._lock, _reaching(self.place):
            system, base = files.filesystem(self.place)
            here = {path.name: _state(path) for path in self.folder.iterdir() if _is_record(path)}
            changed = [name for name, state in here.items() if self._synced.get(name) != state]
            if changed:
                system.create_dir(base, recursive=True)
            for name in changed:
                data = (self.folder / name).read_bytes()
                with system.open_output_stream(f"{base}/{name}", compression=None) as stream:
                    stream.write(data)
                self._synced[name] = here[name]
            for name in [name for name in self._synced if name not in here]:
                with suppress(FileNotFoundError):
                    system.delete_file(f"{base}/{name}")
                del self._synced[name]

    def settle(self) -> None:
        """`keep`, tried again for minutes where the place fails for a while."""
        for attempt in Retrying(
            retry=retry_if_exception_type(InfrastructureError),
            wait=wait_exponential(multiplier=0.5, max=30),
            stop=stop_after_delay(RETRY_SECONDS),
            reraise=True,
        ):
            with attempt:
                self.keep()

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
        """This home for the command that trains; while the block runs, no other one trains at the same place.

        An object store has no lock that ends with its holder, so the command renews a claim. One that nobody renewed for
        `LEASE_SECONDS` counts for nothing, and a command that finds one waits as long. Raises RecipeError where another
        command renews it. In a shared folder the command takes a lock of the file system instead.
        """
        if self.place is None:
            yield self
            return
        ours = {"host": socket.gethostname(), "process": os.getpid()}
        self._await_claim()
        ended = threading.Event()
        self._claim(ours)
        self.arrive()

        def renew() -> None:
            while not ended.wait(LEASE_SECONDS / 6):
                with suppress(InfrastructureError):
                    self._claim(ours)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            with self.courier():
                yield self
        finally:
            ended.set()
            thread.join()
            with suppress(OSError):
                system, base = files.filesystem(self.place)
                system.delete_file(f"{base}/{_LEASE}")
            shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self, ours: dict[str, Any]) -> None:
        assert self.place is not None
        with _reaching(self.place):
            system, base = files.filesystem(self.place)
            system.create_dir(base, recursive=True)
            with system.open_output_stream(f"{base}/{_LEASE}", compression=None) as stream:
                stream.write(json.dumps({**ours, "renewed": uuid.uuid4().hex}).encode())

    def _await_claim(self) -> None:
        """Returns when nobody has renewed a claim for `LEASE_SECONDS`; clocks of two machines are never compared."""
        first = self._claimed_by()
        if first is None or _is_over(first):
            return
        who = f"process {first['process']} on {first['host']}"
        logger.warning("%s was training at %s; waiting until it is surely gone", who, self.place)
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1.0)
            now = self._claimed_by()
            if now is None:
                return
            if now != first:
                raise RecipeError(f"name: {who} trains the run at {self.place}; wait for it or stop it")

    def _claimed_by(self) -> dict[str, Any] | None:
        assert self.place is not None
        with _reaching(self.place):
            system, base = files.filesystem(self.place)
            try:
                with system.open_input_stream(f"{base}/{_LEASE}", compression=None) as stream:
                    return dict(json.loads(stream.read()))
            except FileNotFoundError:
                return None


def _is_over(claim: dict[str, Any]) -> bool:
    """Whether a claim is that of a process of this machine that has ended, so that nobody has to wait."""
    return (
        claim["host"] == socket.gethostname()
        and not Path("/proc", str(claim["process"])).exists()
        and Path("/proc").exists()
    )


def working_folder(place: str) -> Path:
    """The folder of this user on this machine in which processes work on the run of a place."""
    mine = Path(tempfile.gettempdir()) / f"burnish-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid() or mine.is_symlink():
        raise InfrastructureError(f"{mine} belongs to somebody else; set TMPDIR to a folder of your own")
    return mine / hashlib.sha256(place.encode()).hexdigest()[:16]


@contextmanager
def _reaching(place: str) -> Iterator[None]:
    """Raises InfrastructureError in place of what a file system raises."""
    try:
        yield
    except files.UNREADABLE as error:
        raise InfrastructureError(
            f"checkpoint.storage: {place} cannot be reached: {one_line(error)}; check the name and the credentials in every "
            "node's environment (as AWS_ACCESS_KEY_ID)"
        ) from error


def _is_record(path: Path) -> bool:
    return path.is_file() and path.name not in _OWN and not path.name.endswith(".partial")


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
