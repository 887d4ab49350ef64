"""Small worlds that tests share: tokenizers, models and rows made here, and one Ray cluster of three nodes."""

import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Set before torch, Ray, transformers or MLflow are imported anywhere: no token authentication, no downloads, no bars, a look at
# workers twice a second, so that short runs end soon, and one thread a process, of which there are always more than cores: a
# thread that waits for another one spins.
os.environ["OMP_NUM_THREADS"] = "1"
# Else all that waits for Ray's workers, and the other tests, have the cores before them.
os.environ |= {"RAY_worker_niceness": "0"}
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ.pop("RAY_ADDRESS", None)

import psutil
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from burnish.config import Recipe, parse
from burnish.train.ledger import lines

ROOT = Path(__file__).resolve().parent.parent
_BESIDE = (
    "tests/distributed/test_engine.py",
    "tests/distributed/test_footprint.py",
    "tests/e2e/test_verify.py",
    "tests/e2e/test_sweep.py",
    "tests/e2e/test_jobs.py::test_a_local_cluster",
)
"""Of the tests below distributed/ and e2e/ those that need no cluster, or one of their own."""

CHATML = (
    "{%- if tools %}{{- '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN3_HISTORY = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content and loop.last %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""A template that drops the reasoning of earlier turns, so a render is no prefix of the next."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 and Qwen split text before byte-pair encoding: newlines that follow each other stay together."""

TEXTS = [
    "What is bronze made of? Bronze is copper with a little tin.",
    "You are a helpful smith. Hello there, what would you like to know about iron and steel today?",
    "one\n\n\ntwo\n\n\nthree\n\n\nfour",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} Thank you. The answer is 42.',
]


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens with the control tokens of ChatML or Llama 3."""
    llama = "<|start_header_id|>" in (template or "")
    special = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"]
    special = special if llama else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>", "pad_token": "<|end|>"} if llama else {}
    names = names or {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    extra = [token for token in special if token not in names.values()]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra, **names)
    fast.chat_template = template
    return fast


def tiny_config(architecture: str, vocab_size: int, intermediate_size: int = 48) -> Any:
    """The configuration of a two-layer model."""
    import transformers

    name = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "mistral": "MistralConfig", "gemma": "Gemma3TextConfig"}
    extra: dict[str, Any] = {"mistral": {"sliding_window": 12}, "gemma": {"sliding_window": 12}}.get(architecture, {})
    return getattr(transformers, name[architecture])(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=intermediate_size, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=0, eos_token_id=2, pad_token_id=0,
        **extra,
    )  # fmt: skip


def write_model(
    folder: Path, architecture: str = "llama", template: str | None = CHATML, intermediate_size: int = 48
) -> Path:
    """A model folder with random weights from a fixed seed."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = make_tokenizer(template)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(architecture, len(tokenizer), intermediate_size), dtype=torch.float32
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def publish(folder: Path, hub: Path, commit: str) -> None:
    """Puts a model folder into a cache of the Hub, as the newest commit of owner/name."""
    cached = hub / "models--owner--name"
    (cached / "refs").mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs" / "main").write_text(commit)


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file; a text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def conversation(number: int, turns: int = 1) -> dict[str, Any]:
    """A conversation whose length depends on its number."""
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {number} of turn {turn}" + " and more" * (number % 5)})
        messages.append({"role": "assistant", "content": f"Answer {number} " + "is copper " * (number % 7)})
    return {"messages": messages}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama-chatml")


@pytest.fixture
def make_recipe(model_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of 40 rows for the small model; keyword arguments replace keys of sections."""

    def make(**sections: Any) -> Recipe:
        train = tmp_path / "train.jsonl"
        if not train.exists():
            write_rows(train, [conversation(i, 1 + i % 3) for i in range(40)])
        tree: dict[str, Any] = {
            "name": "small",
            "model": {"path": str(model_folder), "dtype": "float32", "activation_checkpointing": False},
            "lora": None,
            "data": {"train": [{"path": str(train)}], "max_length": 256, "window_rows": 16},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 1},
            "train": {"global_batch_size": 4},
            "engine": {"zero_stage": 0},
            "scale": {"num_workers": 1, "use_gpu": False},
            "checkpoint": {"storage": str(tmp_path / "runs"), "every_steps": 2},
            "tracking": {"uri": None},
        }
        for name, value in sections.items():
            tree[name] = {**tree[name], **value} if isinstance(value, dict) and isinstance(tree.get(name), dict) else value
        return parse(tree, "test")

    return make


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process has what needs the cluster, since a second one would cost its idle time, and the other the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoProcesses(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file in _BESIDE:
                return file
            if nodeid.startswith(_BESIDE):
                return nodeid
            return "ray" if file.startswith(("tests/distributed/", "tests/e2e/")) else nodeid

    return TwoProcesses(config, log)


def free_port() -> int:
    """A port that nobody listens on now, below those that systems give to connections, which would soon take it away."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket on a real S3 server of this machine, reached as any other is: by the environment."""
    from moto.server import ThreadedMotoServer

    from burnish.data import files

    port = free_port()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request else
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    files.filesystem.cache_clear()
    system, _ = files.filesystem("s3://bucket/rows?region=us-east-1&allow_bucket_creation=true")
    system.create_dir("bucket")
    yield system
    files.filesystem.cache_clear()
    os.environ.clear()
    os.environ |= before
    server.stop()


def processes_below(pid: int, name: str) -> list[psutil.Process]:
    """The processes below one of our own, with a name in their command line; no other run on this machine is touched."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it may have ended meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def as_a_user() -> dict[str, str]:
    """The environment of a command that starts a Ray of its own, with the tokens that these tests do without elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}


class Training:
    """`burnish train` as a process on a cluster; what it says lies in a file, so that it never waits for a reader.

    Without an address it starts a Ray of its own, which asks for a token as that of a user does.
    """

    deadline_seconds = 600
    """Within which all that a test waits for happens, however slow the machine."""

    def __init__(self, recipe: Path, name: str, address: str, *overrides: str) -> None:
        self.recipe, self.address, self.folder = recipe, address, recipe.parent / "runs" / name
        command = [sys.executable, "-m", "burnish.cli", "train", str(recipe), f"name={name}", *overrides]
        environment = {**os.environ, "RAY_ADDRESS": address} if address else as_a_user()
        self._said = recipe.parent / f"{name}-{time.monotonic_ns()}.log"
        with open(self._said, "w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    def said(self) -> str:
        """Everything that the command has printed so far."""
        return self._said.read_text()

    def result(self) -> Any:
        """What the command, which has ended well, says of the run."""
        return json.loads(next(line for line in reversed(self.said().splitlines()) if line.startswith("{")))

    def workers(self, number: int = 2) -> list[psutil.Process]:
        """The processes of the run's workers; those of a run before may take a moment to go."""
        found: list[psutil.Process] = []

        def all_of_them() -> bool:
            found[:] = processes_below(os.getpid(), "RayTrainWorker")
            return len(found) == number

        self.wait_until(all_of_them)
        return found

    def frozen(self, kind: str, rng: random.Random) -> psutil.Process:
        """A process of the run in which such a task or actor runs, stopped in the middle of its work."""
        frozen: list[psutil.Process] = []

        def found() -> bool:
            processes = processes_below(os.getpid(), kind)
            for process in rng.sample(processes, len(processes)):
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    if kind in " ".join(process.cmdline()):
                        frozen.append(process)
                        return True
                    process.resume()  # its task had just ended
            return False

        self.wait_until(found)
        return frozen[0]

    def wait(self) -> int:
        """The exit code of the command."""
        self.wait_until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def wait_until(self, done: Callable[[], object]) -> None:
        """Returns once something is so; fails where the command ends before or the deadline passes."""
        deadline = time.monotonic() + self.deadline_seconds
        while True:
            began, ended = time.thread_time(), self.process.poll() is not None
            if done():
                return
            assert not ended, f"the command ended before: {self.said()}"
            assert time.monotonic() < deadline, f"it was not so in {self.deadline_seconds} s: {self.said()}"
            # A look through all processes is not cheap, and what is waited for needs this machine's cores.
            time.sleep(max(0.02, 2 * (time.thread_time() - began)))

    def wait_for_step(self, step: int) -> None:
        """Returns once the run has trained this many steps."""
        self.wait_until(lambda: len(self.ledger()) >= step)

    def ledger(self) -> list[Any]:
        """The lines of the run's ledger."""
        return list(lines(self.folder / "ledger.jsonl"))

    def checkpoints(self) -> list[int]:
        """The steps whose checkpoints stand."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*"))

    def verified(self) -> list[int]:
        """The steps whose checkpoints hold what their manifests say."""
        from burnish.train.checkpoint import verify
        from burnish.train.shelf import Shelf

        shelf = Shelf(str(self.folder / "checkpoints"))
        return [found.progress.step for name in shelf.names() if (found := verify(shelf, name))]

    def attempts(self) -> list[Any]:
        """The starts of the run's attempts."""
        return [line for line in lines(self.folder / "attempts.jsonl") if line["event"] == "start"]

    def weights(self) -> dict[str, Any]:
        """The weights of the newest checkpoint."""
        from safetensors.torch import load_file

        return load_file(self.folder / "checkpoints" / f"step-{self.checkpoints()[-1]:08d}" / "weights.safetensors")

    def assert_same(self, quiet: "Training") -> None:
        """The steps, losses and weights are those of a run that nobody touched, bit for bit."""
        assert self.ledger() == quiet.ledger()
        found, wanted = self.weights(), quiet.weights()
        assert set(found) == set(wanted)
        assert all(bool((found[name] == wanted[name]).all()) for name in wanted)


@pytest.fixture(scope="session", autouse=True)
def ray_folder() -> Iterator[None]:
    """A folder of this test run's own for every Ray that it starts; short, because Unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # A simulated cluster writes its address there, and a new machine has no /tmp/ray.
        Path(folder, "ray").mkdir()
        os.environ["RAY_TMPDIR"] = folder
        yield
        del os.environ["RAY_TMPDIR"]


@contextmanager
def kept_idle() -> Iterator[None]:
    """Nodes that are started in the block keep idle processes, as those that burnish starts do."""
    from burnish.train.cluster import KEEP_IDLE

    name, value = KEEP_IDLE
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@pytest.fixture(scope="session")
def cluster(ray_folder: None) -> Iterator[dict[str, Any]]:
    """A Ray cluster of three nodes on this machine, joined by this process: addresses of its GCS and dashboard, and `add`.

    `add` adds a node for data with one CPU, and gives what takes it away.
    """
    import ray
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    dashboard = free_port()
    # Unix sockets must have short paths, so not pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="bt-", ignore_cleanup_errors=True) as folder:
        with kept_idle():
            nodes = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 2, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": 0,
                    "temp_dir": folder, "object_store_memory": 200 << 20,
                    "include_log_monitor": False,  # no test reads what Ray repeats of its workers' output
                },
            )  # fmt: skip

        def add(num_cpus: int = 1, role: str = "data") -> Callable[[], None]:
            # Its own folder, as on a machine of its own: nodes that share one unpack a job's code over each other.
            own = tempfile.mkdtemp(dir=folder)
            with kept_idle():
                node = nodes.add_node(
                    num_cpus=num_cpus, labels={"node-role": role}, temp_dir=own, object_store_memory=200 << 20
                )
            return lambda: nodes.remove_node(node, allow_graceful=False)

        for _ in range(2):
            add(1, "any")
        nodes.wait_for_nodes()
        # A job looks for its cluster in this file; without it, it joins any Ray that it finds on the machine.
        write_ray_address(nodes.address, folder)
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield {"gcs": nodes.address, "dashboard": f"http://127.0.0.1:{dashboard}", "add": add}
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="session")
def quiet(cluster: dict[str, Any], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run of about 50 steps on two workers with ZeRO-3 that nobody touched; others of its recipe are compared with it."""
    folder = tmp_path_factory.mktemp("quiet")
    rows = write_rows(folder / "rows.jsonl", [conversation(i, 1 + i % 2) for i in range(48)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: quiet
model: {{path: {model_folder}, dtype: float32}}
lora: null
data: {{train: [{{path: {rows}}}], max_length: 160, window_rows: 16}}
optim: {{learning_rate: 1e-3, warmup_steps: 2}}
train: {{global_batch_size: 4, epochs: 6}}
engine: {{zero_stage: 3}}
scale: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: 4, storage: {folder / "runs"}}}
tracking: {{uri: null}}
"""
    )
    run = Training(recipe, "quiet", cluster["gcs"])
    assert run.wait() == 0, run.said()
    return run


@contextmanager
def nodes_by_role(*roles: str) -> Iterator[tuple[Any, list[Any], Callable[[str], Any], str]]:
    """A Ray cluster of its own on this machine: a head that runs no tasks, and a node with one CPU for each role.

    Gives the cluster, its nodes, what adds one more of a role, and the address of the dashboard.
    """
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    store = 100 << 20  # Ray wants 75 MiB at least
    dashboard = free_port()
    with tempfile.TemporaryDirectory(prefix="bn-", ignore_cleanup_errors=True) as folder:
        head = {
            "num_cpus": 0, "object_store_memory": store, "temp_dir": folder, "include_dashboard": True,
            "dashboard_port": dashboard, "dashboard_agent_listen_port": 0,
        }  # fmt: skip
        with kept_idle():
            cluster = Cluster(initialize_head=True, head_node_args=head)

        def add(role: str) -> Any:
            own = tempfile.mkdtemp(dir=folder)
            with kept_idle():
                return cluster.add_node(num_cpus=1, labels={"node-role": role}, temp_dir=own, object_store_memory=store)

        added = [add(role) for role in roles]
        cluster.wait_for_nodes()
        write_ray_address(cluster.address, folder)
        yield cluster, added, add, f"http://127.0.0.1:{dashboard}"
        cluster.shutdown()
