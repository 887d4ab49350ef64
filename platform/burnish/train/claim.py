"""One command trains at a place: it renews a claim there.

An object store has no lock that ends with its holder. A claim that nobody renewed for `LEASE_SECONDS` counts for nothing,
and a command that finds one waits as long.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from burnish.data import files
from burnish.errors import InfrastructureError, RecipeError
from burnish.train.shelf import reaching

CLAIM = ".claim"
"""The file at a place that says who trains there."""
LEASE_SECONDS = 60.0
"""Seconds after which a command that has not renewed its claim is taken for gone."""
SETTLE_SECONDS = 2.0
"""Seconds, longer than a write takes, after which a command looks whether another one claimed in the same moment."""
_NOBODY_KNOWN = {"host": "an unknown machine", "process": "?", "command": ""}

logger = logging.getLogger(__name__)


@contextmanager
def claimed(place: str) -> Iterator[None]:
    """While the block runs, no other command trains at the place.

    Raises RecipeError where another one renews its claim, or claimed the place in the same moment and a little later.
    Where another one claims it all the same, since this one was out of reach for too long, this process is asked to stop
    (SIGTERM).
    """
    _await_end(place)
    ours = uuid.uuid4().hex
    _claim(place, ours)
    time.sleep(SETTLE_SECONDS)
    holder = _claimed_by(place)
    if holder is not None and holder["command"] != ours:
        raise _taken(place, holder)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS / 6):
            with suppress(InfrastructureError):
                holder = _claimed_by(place)
                if holder is not None and holder["command"] != ours:
                    logger.error("process %s on %s trains at %s too; stopping", holder["process"], holder["host"], place)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                _claim(place, ours)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError, InfrastructureError):
            if (_claimed_by(place) or _NOBODY_KNOWN)["command"] == ours:
                system, base = files.filesystem(place)
                system.delete_file(f"{base}/{CLAIM}")


def _claim(place: str, command: str) -> None:
    claim = {"host": socket.gethostname(), "process": os.getpid(), "command": command, "renewed": uuid.uuid4().hex}
    with reaching(place):
        system, base = files.filesystem(place)
        with files.create(system, f"{base}/{CLAIM}") as stream:
            stream.write(json.dumps(claim).encode())


def _claimed_by(place: str) -> dict[str, Any] | None:
    """The claim that stands; one that cannot be read is somebody's too."""
    with reaching(place):
        system, base = files.filesystem(place)
        try:
            with system.open_input_stream(f"{base}/{CLAIM}", compression=None) as stream:
                found = json.loads(stream.read())
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
    return {**_NOBODY_KNOWN, **(found if isinstance(found, dict) else {})}


def _taken(place: str, holder: dict[str, Any]) -> RecipeError:
    who = f"process {holder['process']} on {holder['host']}"
    return RecipeError(f"name: {who} trains the run at {place}; wait for it or stop it")


def _await_end(place: str) -> None:
    """Returns when nobody has renewed a claim for `LEASE_SECONDS`; clocks of two machines are never compared."""
    first = _claimed_by(place)
    if first is None or _is_over(first):
        return
    who = f"process {first['process']} on {first['host']}"
    logger.warning("%s was training at %s; waiting until it is surely gone", who, place)
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = _claimed_by(place)
        if now is None:
            return
        if now != first:
            raise _taken(place, now)


def _is_over(claim: dict[str, Any]) -> bool:
    """Whether a claim is that of a process of this machine that has ended, so that nobody has to wait."""
    return (
        claim["host"] == socket.gethostname()
        and not Path("/proc", str(claim["process"])).exists()
        and Path("/proc").exists()
    )
