"""The contract against folders and running servers: small ones that speak each protocol, and a real one."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from burnish.cli import main
from burnish.config import parse
from burnish.data.contract import Contract
from burnish.data.tokenizer import load_template
from tests.conftest import free_port, write_model
from tests.judge import PUBLISHED

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder with the contract of its template, as an export has."""
    folder = write_model(tmp_path_factory.mktemp("verify") / "model", template=PUBLISHED["qwen3"].read_text())
    tree = {"name": "x", "model": {"path": str(folder)}, "data": {"train": [{"path": "unused.jsonl"}]}}
    (folder / "contract.json").write_text(Contract.of(load_template(parse(tree, "test"))).to_json())
    return folder


class Speaks(BaseHTTPRequestHandler):
    """A server of one protocol over the exported tokenizer; `plant` changes what it makes of a request."""

    protocol, tokenizer, plant, key = "vllm", None, None, None

    def log_message(self, *_):
        pass

    def text(self, body):
        messages = json.loads(json.dumps(body["messages"]))
        for message in messages:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        kwargs = dict(body.get("chat_template_kwargs", {}))
        if self.plant == "kwargs":
            kwargs = {}
        text = self.tokenizer.apply_chat_template(
            messages, tools=body.get("tools"), add_generation_prompt=True, tokenize=False, **kwargs
        )
        return text.replace("assistant", "Assistant of") if self.plant == "text" else text

    def ids(self, text):
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [0, *ids] if self.plant == "bos" else ids

    def do_GET(self):
        self.answer({"data": [{"id": "served"}]} if self.path == "/v1/models" else None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.key and self.headers["Authorization"] != f"Bearer {self.key}":
            return self.answer({"error": "who are you"}, 401)
        known = {
            "vllm": {"/tokenize": lambda: {"tokens": self.ids(self.text(body)), "count": 1, "max_model_len": 99}},
            "llama.cpp": {
                "/apply-template": lambda: {"prompt": self.text(body)},
                "/tokenize": lambda: {"tokens": self.ids(body["content"]) if "content" in body else []},
            },
            "tgi": {
                "/chat_tokenize": lambda: {
                    "templated_text": self.text(body),
                    "tokenize_response": [{"id": i, "text": "", "start": 0, "stop": 0} for i in self.ids(self.text(body))],
                }
            },
            # An older SGLang tokenizes texts but no messages.
            "sglang": {"/tokenize": lambda: {"tokens": self.ids(body["prompt"])} if "prompt" in body else None},
            "openai": {},
        }[self.protocol]
        if self.protocol in ("sglang", "openai", "vllm"):
            known["/v1/chat/completions"] = lambda: {"usage": {"prompt_tokens": len(self.ids(self.text(body)))}}
        return self.answer(known[self.path]() if self.path in known else None)

    def answer(self, tree, code=200):
        code = self.plant if isinstance(self.plant, int) and self.command == "POST" else code
        data = json.dumps(tree or {"error": "not here"}).encode()
        self.send_response(code if tree else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve(exported):
    """Starts a small server of a protocol and gives its address."""
    servers = []
    tokenizer = AutoTokenizer.from_pretrained(str(exported))

    def start(protocol, plant=None, key=None):
        handler = type("Handler", (Speaks,), {"protocol": protocol, "tokenizer": tokenizer, "plant": plant, "key": key})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


SEEN = {"vllm": "/tokenize", "llama.cpp": "/apply-template", "tgi": "/chat_tokenize", "sglang": "usage", "openai": "usage"}


@pytest.mark.parametrize("protocol", SEEN)
def test_a_server_that_keeps_the_contract(exported, serve, capsys, protocol):
    assert main(["verify", str(exported), "--server", serve(protocol)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("kept: 72 probes") and SEEN[protocol] in said


@pytest.mark.parametrize("protocol", SEEN)
@pytest.mark.parametrize("plant", ["text", "bos", "kwargs"])
def test_a_server_that_feeds_something_else_is_found(exported, serve, capsys, protocol, plant):
    assert main(["verify", str(exported), "--server", serve(protocol, plant)]) == 3
    said = capsys.readouterr().err
    assert "probe one turn" in said and ("enable_thinking=False" in said) == (plant == "kwargs"), said
    if plant == "text" and protocol not in ("sglang", "openai"):
        assert "Assistant of" in said and "expected" in said


def test_a_server_with_a_key(exported, serve, capsys, monkeypatch):
    address = serve("vllm", key="secret-of-mine")
    assert main(["verify", str(exported), "--server", address]) == 3
    assert main(["verify", str(exported), "--server", address, "--api-key-env", "NOT_SET_AT_ALL"]) == 2
    monkeypatch.setenv("SERVER_KEY", "secret-of-mine")
    assert main(["verify", str(exported), "--server", address, "--api-key-env", "SERVER_KEY"]) == 0
    assert "secret-of-mine" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("code", [429, 503])
def test_a_server_that_is_busy_breaks_no_contract(exported, serve, capsys, code):
    address = serve("vllm", plant=code)
    assert main(["verify", str(exported), "--server", address]) == 4
    assert f"answers {code}" in capsys.readouterr().err


def test_nobody_answers_a_wrong_address_and_a_wrong_probe(exported, serve, capsys):
    port = free_port()
    assert main(["verify", str(exported), "--server", f"http://127.0.0.1:{port}"]) == 4
    assert "does not answer" in capsys.readouterr().err
    assert main(["verify", str(exported), "--server", "localhost:8000"]) == 3
    assert "http://host:port" in capsys.readouterr().err
    assert main(["verify", str(exported), "--server", serve("vllm"), "--skip", "one turns"]) == 2
    assert "did you mean 'one turn'" in capsys.readouterr().err


def test_a_folder_that_keeps_its_contract_and_each_way_to_break_it(exported, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    template = folder / "chat_template.jinja"
    whole = template.read_text()

    def verdict(code, *words):
        assert main(["verify", str(folder)]) == code
        said = "".join(capsys.readouterr())
        assert all(word in said for word in words), said

    verdict(0, "kept: 144 probes")
    template.write_text("{# harmless #}" + whole)
    verdict(0, "comments or spacing", "kept: 144 probes")
    template.write_text(
        whole.replace("<|im_start|>user", "<|im_start|>User").replace("message.role + '\\n'", "message.role + ' \\n'")
    )
    verdict(3, "the probe one turn", "expected", "found")
    template.write_text(whole)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 0}))
    verdict(3, "answers ended at ['<|im_end|>']")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    adapter = folder / "adapter_model.safetensors"
    save_file(load_file(folder / "model.safetensors"), adapter, metadata={"chat_contract": "sha256:0"})
    verdict(3, "was trained under the contract sha256:0")
    adapter.unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    verdict(3, "same text and other tokens")
    (folder / "contract.json").write_text("{}")
    verdict(3, "no contract that this version reads")
    (folder / "contract.json").unlink()
    verdict(3, "has no contract.json")
    assert main(["verify", str(tmp_path / "absent")]) == 2


def test_a_real_server(exported, capsys, tmp_path):
    """transformers' own server drops the text and the reasoning beside a tool call; everything else it keeps."""
    port = free_port()
    command = [
        os.path.join(os.path.dirname(sys.executable), "transformers"),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(
        [*command, str(exported)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        asked = ["verify", str(exported), "--server", address, "--model", str(exported)]
        assert main(asked) == 3
        said = capsys.readouterr().err
        assert "the probe two tool calls" in said and "1 other probes differ too: reasoning and tool." in said
        assert main([*asked, "--skip", "two tool calls", "--skip", "reasoning and tool"]) == 0
        assert "skipped: two tool calls, reasoning and tool" in capsys.readouterr().out
    finally:
        server.terminate()
        server.wait(60)
