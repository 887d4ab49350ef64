"""One run, and random kills of everything that it is made of: it ends as the run that nobody touched."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.train.goodput import account
from tests.conftest import CHATML, Training, conversation, nodes_by_role, write_model, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.soak, pytest.mark.timeout(3000)]

SEED = 7
EACH = 3
"""Kills of each kind."""
EVERY = 3
"""Steps between checkpoints."""
PROCESSES = ("RayTrainWorker", "_slice_task", "_window_task", "_round_task")
NODES = {"a data node": "data", "a training node": "train"}
KINDS = (*PROCESSES, *NODES, "the command")
ATTEMPTS = ("RayTrainWorker", "a training node", "the command")
"""Kinds that cost an attempt. What feeds it is made again while it goes on."""
SLOW = "{%- for _ in range(40000) %}{%- endfor %}"
"""Before a template, it takes longer to render rows than to train them, so that data tasks are at work all the time."""


def recipe_in(folder: Path) -> Path:
    """A recipe on two workers whose rows are rendered anew in every epoch and take most of the time."""
    write_model(folder / "model", template=SLOW + CHATML)
    rows = write_rows(folder / "rows.jsonl", [conversation(i, 1 + i % 3) for i in range(4096)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: quiet
model: {{path: {folder / "model"}, dtype: float32}}
lora: null
data: {{train: [{{path: {rows}}}], max_length: 256, window_rows: 128, cache: null}}
optim: {{learning_rate: 1e-4, warmup_steps: 2}}
train: {{global_batch_size: 32, epochs: 4}}
engine: {{zero_stage: 0}}
scale: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: {EVERY}, storage: {folder / "runs"}}}
tracking: {{uri: null}}
"""
    )
    return recipe


class Chaos:
    """A run on a cluster, and what kills its parts. The next kill waits until the run has got over the one before."""

    def __init__(self, start: Callable[[], Training], cluster: Any, nodes: dict[str, list[Any]], add: Callable) -> None:
        self._start, self._cluster, self._nodes, self._add = start, cluster, nodes, add
        self._rng, self._began = random.Random(SEED), time.monotonic()
        self.run = start()
        self.kills: Counter[str] = Counter()
        self._recover(0)

    def plan(self) -> list[str]:
        """Every kind `EACH` times, in random order."""
        kinds = [kind for kind in KINDS for _ in range(EACH)]
        self._rng.shuffle(kinds)
        return kinds

    def kill(self, kind: str) -> None:
        """Kills one of a kind, some steps from now, once it is there, and returns when a checkpoint was written after it."""
        self.run.wait_for_step(len(self.run.ledger()) + self._rng.randrange(EVERY + 1))
        attempts, looked = len(self.run.attempts()), time.monotonic()
        if kind in PROCESSES:
            self.run.frozen(kind, self._rng).kill()
        elif kind in NODES:
            self._kill_node(NODES[kind])
        else:
            self.run.process.kill()
            self.run.process.wait()
        found = time.monotonic()
        self.kills[kind] += 1
        step = len(self.run.ledger())
        if kind == "the command":
            self.run = self._start()
        self._recover(attempts + (kind in ATTEMPTS))
        looking, recovering = found - looked, time.monotonic() - found
        print(
            f"{found - self._began:6.1f} s  step {step:4}  {kind:15}  found in {looking:4.1f} s, over it in {recovering:4.1f} s",
            flush=True,
        )

    def _recover(self, attempts: int) -> None:
        """Returns when so many attempts have begun, and the last one has written a checkpoint from now on."""
        self.run.wait_until(lambda: len(self.run.attempts()) >= attempts and self.run.attempts())
        at = max([self.run.attempts()[-1]["from_step"], *self.run.checkpoints()])
        self.run.wait_until(lambda: max([0, *self.run.checkpoints()]) > at)

    def _kill_node(self, role: str) -> None:
        """Kills a node that is needed, with all its processes, and adds another one."""
        nodes = self._nodes[role]
        node = self._rng.choice(nodes)
        self._cluster.remove_node(node, allow_graceful=False)
        nodes[nodes.index(node)] = self._add(role)


def test_over_twenty_random_kills_of_everything_end_in_the_quiet_run(ray_folder, tmp_path):
    recipe = recipe_in(tmp_path)
    roles = ("data", "data", "data", "train", "train")
    with nodes_by_role(*roles) as (cluster, added, add, _):
        quiet = Training(recipe, "quiet", cluster.address)
        quiet.deadline_seconds = 1200
        assert quiet.wait() == 0, quiet.said()

        nodes = {role: [node for node, of in zip(added, roles, strict=True) if of == role] for role in set(roles)}
        chaos = Chaos(lambda: Training(recipe, "chaos", cluster.address), cluster, nodes, add)
        print(f"\nseed {SEED}")
        for kind in chaos.plan():
            chaos.kill(kind)
        run = chaos.run
        run.deadline_seconds = 1200
        assert run.wait() == 0, run.said()
    print(dict(chaos.kills), {key: round(value, 3) for key, value in account(run.folder).items()})
    assert chaos.kills == dict.fromkeys(KINDS, EACH) and chaos.kills.total() > 20
    assert len(run.attempts()) == 1 + EACH * len(ATTEMPTS)
    run.assert_same(quiet)
