"""What the processes of a run say to its command: what data tasks are at, so that a stall can name them, and warnings."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from burnish.errors import InfrastructureError
from burnish.redact import known_secrets, redact

ASK_SECONDS = 30
"""How long a stalled worker waits for the record to say what is going on."""
_Item = TypeVar("_Item")


class _Record:
    """The tasks at work, and how many each stage has ended. A task that was killed begins again under its own name.

    Besides, the warnings of workers, each once.
    """

    def __init__(self) -> None:
        self._told: list[str] = []
        self._working: dict[tuple[str, str], tuple[float, str]] = {}
        self._ended: Counter[str] = Counter()

    def begin(self, stage: str, work: str, node: str) -> None:
        self._working[stage, work] = time.monotonic(), node

    def end(self, stage: str, work: str) -> None:
        self._working.pop((stage, work), None)
        self._ended[stage] += 1

    def tell(self, text: str) -> None:
        if text not in self._told:
            self._told.append(text)

    def told(self, known: int) -> list[str]:
        return self._told[known:]

    def say(self) -> str:
        """Who is at work for how long; without anybody, that data tasks wait for a place."""
        alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        working = sorted((begun, *key, alive[node]) for key, (begun, node) in self._working.items() if node in alive)
        done = ", ".join(f"{stage} {count}" for stage, count in self._ended.items()) or "none"
        if not working:
            return f"no data task is running (ended so far: {done}); the next one waits for a free CPU on a node for data"
        begun, stage, work, address = working[0]
        others = f", and {len(working) - 1} more task{'s' * (len(working) > 2)}" if len(working) > 1 else ""
        place = f"for {time.monotonic() - begun:.0f} s on node {address}{others}"
        return f"{stage} is at work on {work} {place} (ended so far: {done})"


class Stages:
    """A record on this process's node of what data tasks do. Nobody waits for it, and a run goes on without it."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._record: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Record).remote()

    @contextmanager
    def at_work(self, stage: str, work: str) -> Iterator[None]:
        """While the block runs, the record says that this process is at work on `work`."""
        self._record.begin.remote(stage, work, ray.get_runtime_context().get_node_id())
        yield
        self._record.end.remote(stage, work)

    def tell(self, text: str) -> None:
        """Leaves a warning for whoever started the run; nobody waits for it."""
        self._record.tell.remote(text)

    def told(self, known: int, seconds: float) -> list[str]:
        """Warnings that were left behind the `known` first ones; none where the answer takes longer than some seconds."""
        try:
            return list(ray.get(self._record.told.remote(known), timeout=seconds))
        except ray.exceptions.RayError:
            return []

    def say(self) -> str:
        """Which stage is at work on what."""
        try:
            return str(ray.get(self._record.say.remote(), timeout=ASK_SECONDS))
        except ray.exceptions.RayError as error:
            return f"the record of the data tasks does not answer ({type(error).__name__})"


class Teller(logging.Handler):
    """Sends a worker's warnings to the command that started the run, where a person reads them."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(logging.WARNING)
        self._stages = stages

    def emit(self, record: logging.LogRecord) -> None:
        """Leaves the message of a record, without secrets."""
        self._stages.tell(redact(record.getMessage(), known_secrets(os.environ)))


@dataclass(frozen=True)
class Patience:
    """How many seconds to wait for a batch, and the record that says why it did not come."""

    seconds: float
    stages: Stages

    def each(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The same items; raises InfrastructureError where one takes too long."""
        while True:
            item: Future[_Item | None] = Future()
            # A daemon, since nothing can interrupt it while it waits for Ray.
            Thread(target=_fill, args=(item, items), daemon=True).start()
            try:
                found = item.result(timeout=self.seconds)
            except TimeoutError:
                if item.done():
                    raise
                raise InfrastructureError(
                    f"no batch for {self.seconds:.0f} s (scale.stall_seconds): {self.stages.say()}. The same "
                    "command goes on from the newest checkpoint; where data is slow and not stuck, raise scale.stall_seconds"
                ) from None
            if found is None:
                return
            yield found


def _fill(item: "Future[_Item | None]", items: Iterator[_Item]) -> None:
    try:
        item.set_result(next(items, None))
    except BaseException as error:
        item.set_exception(error)
