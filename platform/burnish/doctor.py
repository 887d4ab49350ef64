"""What this machine has for burnish, and what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

from rich.console import Console
from rich.table import Table

REQUIRED = ("ray", "torch", "transformers", "peft", "deepspeed", "mlflow")


def examine() -> int:
    """Prints versions, processors, devices and optional tools; 0 where training can run, else 4."""
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    for name in ("burnish", *REQUIRED):
        table.add_row(name, "missing: make .venv/installed" if name in missing else importlib.metadata.version(name))
    flash = importlib.util.find_spec("flash_attn") is not None
    table.add_row("flash-attn", importlib.metadata.version("flash-attn") if flash else "not installed (optional, for GPUs)")
    table.add_row("CPUs", f"{os.cpu_count()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table.add_row("memory", f"{memory / 2**30:.1f} GiB")
    table.add_row("GPUs", _gpus() if "torch" not in missing else "not known without torch")
    table.add_row("Ray cluster", os.environ.get("RAY_ADDRESS", "none named by RAY_ADDRESS; commands start their own"))
    table.add_row("kubectl", shutil.which("kubectl") or "not found (optional, for k8s/)")
    free = shutil.disk_usage(os.getcwd()).free
    table.add_row("free disk here", f"{free / 2**30:.1f} GiB")
    console.print(table)
    if missing:
        console.print(f"missing: {', '.join(missing)}")
        return 4
    console.print("ready to train")
    return 0


def _gpus() -> str:
    """The names of the GPUs that torch sees."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none; training runs on CPUs"
