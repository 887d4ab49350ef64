"""The shape of the package, read from its syntax trees: layers, doors, and a folder that must not shadow `platform`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "platform" / "burnish"

LAYERS = {
    0: {"errors", "interrupts", "complaint", "redact", "sections", "config", "reference"},
    1: {
        "data.balance", "data.contract", "data.conversation", "data.dye", "data.encoding", "data.files", "data.formats", "data.order", "data.packing", "data.probes", "data.quality", "data.question",
        "data.render", "data.rendered", "data.slices", "data.sources", "data.syntax", "data.tables", "data.template", "data.trace", "train.layout", "train.schedule", "storage", "sweep.space",
    },
    2: {
        "data.pipeline", "data.stages", "data.survey", "data.tokenizer", "tracking", "train.adapters", "train.architecture", "train.attempt", "train.attention", "train.checkpoint", "train.cluster", "train.elementwise", "train.engine", "train.evaluation", "train.failure", "train.generation",
        "train.batches", "train.build", "train.claim", "train.footprint", "train.goodput", "train.home", "train.kernel_choice", "train.kernels", "train.ledger", "train.loop", "train.memory", "train.model", "train.lora_linear", "train.objective", "train.quantized", "train.rehearsal", "train.self_test", "train.shards", "train.shelf", "train.split", "train.state", "train.step", "train.throughput", "train.tombstone", "train.watchdog", "train.weight_files", "train.worker", "train.writer",
    },
    3: {"scores", "train.prepare", "train.attempts", "train.launch", "sweep.launch", "report", "html", "export", "card", "chat", "preview", "page", "plan", "serving", "verify", "doctor", "progress"},
    4: {"cli"},
}  # fmt: skip
DOORS = {
    "accelerate": {"train.build", "train.footprint"},
    "deepspeed": {"train.engine"},
    "peft": {"train.adapters", "train.lora_linear"},
    "lm_eval": {"scores"},
    "mlflow": {"tracking"},
    "ray.data": {"data.pipeline", "data.stages", "data.survey", "train.split", "train.cluster"},
    "ray.train": {"train.loop", "train.evaluation", "train.checkpoint", "train.attempts", "train.split", "train.failure"},
    "ray.tune": {"sweep.launch"},
    "transformers": {
        "data.tokenizer",
        "train.build",
        "train.footprint",
        "train.architecture",
        "train.model",
        "train.attention",
        "train.quantized",
        "train.rehearsal",
        "export",
        "chat",
        "verify",
    },
}
"""Modules that may import a heavy library. ray.data: `split` hands a stream to workers, `cluster` turns its bars off.
ray.train: `split` and `failure` know its types."""
PURE = ("ray", "torch", "transformers", "deepspeed", "mlflow", "peft")


def imports(source: str) -> set[str]:
    """Every module that a source names in an import, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def complaints(module: str, source: str) -> list[str]:
    """What a module's imports break."""
    layer = next(level for level, names in LAYERS.items() if module in names)
    found = []
    for name in imports(source):
        inner = name.removeprefix("burnish.")
        for level, names in LAYERS.items():
            if name.startswith("burnish.") and inner in names and level > layer:
                found.append(f"{module} (layer {layer}) imports {inner} (layer {level})")
        if module.startswith("data.") and inner.startswith("train."):
            found.append(f"{module} imports {inner}: data never imports train")
        for library, doors in DOORS.items():
            if (name == library or name.startswith(library + ".")) and module not in doors:
                found.append(f"{module} imports {library}, whose doors are {sorted(doors)}")
        if layer <= 1 and name.split(".")[0] in PURE:
            found.append(f"{module} is pure and imports {name}")
    return found


def modules() -> dict[str, str]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text() for path in paths}


def test_every_module_keeps_its_layer_and_its_doors():
    found = modules()
    assert set(found) == set.union(*LAYERS.values())
    assert [line for module, source in found.items() for line in complaints(module, source)] == []


def test_a_planted_violation_is_caught():
    assert complaints("data.packing", "from burnish.data.pipeline import stream")
    assert complaints("data.pipeline", "from burnish.train import ledger\nimport burnish.train.ledger")
    assert complaints("train.loop", "def f():\n    import deepspeed.comm")
    assert complaints("data.template", "import torch")
    assert not complaints("cli", "from burnish.train.launch import train")


def test_the_folder_named_platform_does_not_shadow_the_standard_library(tmp_path):
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.python_version()); import ray"
    for folder, extra in ((ROOT, {}), (tmp_path, {"PYTHONPATH": str(ROOT)})):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={**os.environ, **extra}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def test_the_recipe_loads_in_under_a_second_without_torch_or_ray():
    code = (
        "import time; start = time.process_time(); import burnish.config, sys; "
        "print(time.process_time() - start, [m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 1.0


def test_every_package_has_a_docstring():
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in Path(PACKAGE).rglob("*.py"))


def test_a_worker_starts_without_what_it_does_not_use_and_can_import_it_later():
    code = (
        "import sys, burnish.train.loop, deepspeed.runtime.zero.stage3, deepspeed.runtime.zero.muon.muon_optimizer; "
        "print([m for m in ('mlflow', 'peft', 'bitsandbytes', 'torch._inductor.compile_fx') if m in sys.modules]); "
        "from deepspeed.runtime.compiler import compile; compile()(abs); "
        "import mlflow.exceptions, peft, torch._inductor.compile_fx"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
