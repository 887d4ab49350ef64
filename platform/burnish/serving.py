"""What a running server makes of messages: one small client for each way of asking, found by trying.

vLLM and SGLang answer POST /tokenize with messages; llama.cpp renders at /apply-template and tokenizes at /tokenize; TGI
does both at /chat_tokenize. Any other OpenAI-compatible server only counts, in `usage.prompt_tokens` of an answer.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from burnish.errors import DataError, InfrastructureError

Kind = Literal["tokenize", "llama.cpp", "tgi", "usage"]
_SECONDS = 120
_SEEN: dict[Kind, str] = {
    "tokenize": "token ids from /tokenize",
    "llama.cpp": "token ids from /apply-template and /tokenize",
    "tgi": "token ids from /chat_tokenize",
    "usage": "only the number of tokens, from usage.prompt_tokens",
}


@dataclass(frozen=True)
class Prompt:
    """What a server feeds its model: token ids, or only their number where it tells no more."""

    ids: list[int] | None
    count: int


@dataclass(frozen=True)
class Server:
    """A running server that was asked once and answered in a known way; `seen` says what it lets one see."""

    url: str
    model: str
    kind: Kind
    headers: Mapping[str, str]

    @classmethod
    def find(cls, url: str, model: str | None, api_key: str | None) -> "Server":
        """The server at an address.

        Raises InfrastructureError where nobody answers, DataError where no way of asking works.
        """
        url = url.rstrip("/").removesuffix("/v1")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        model = model or _first_model(url, headers)
        messages = [{"role": "user", "content": "Hi"}]
        said = []
        for kind in _SEEN:
            server = cls(url, model, kind, headers)
            try:
                if server.prompt(messages, [], {}).count > 0:
                    return server
            except DataError as error:
                said.append(str(error))
        raise DataError(f"{url}: no known way to ask it for a prompt works: {'; '.join(said)}")

    @property
    def seen(self) -> str:
        """What this server lets one see of a prompt."""
        return _SEEN[self.kind]

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], kwargs: Mapping[str, Any]) -> Prompt:
        """The prompt that the server makes of messages, with the generation prompt.

        Raises DataError where it refuses, InfrastructureError where it does not answer.
        """
        body: dict[str, Any] = {"model": self.model, "messages": [_openai(message) for message in messages]}
        body |= {"tools": list(tools)} if tools else {}
        body |= {"chat_template_kwargs": dict(kwargs)} if kwargs else {}
        if self.kind == "tokenize":
            found = self._post("/tokenize", {**body, "add_generation_prompt": True, "add_special_tokens": False})
            return _ids(found.get("tokens"))
        if self.kind == "llama.cpp":
            text = self._post("/apply-template", body).get("prompt")
            # As its chat endpoint does, which adds a BOS where the vocabulary says so and the template writes none.
            asked = {"content": text, "add_special": True, "parse_special": True}
            return _ids(self._post("/tokenize", asked).get("tokens"))
        if self.kind == "tgi":
            found = self._post("/chat_tokenize", body)
            return _ids([token.get("id") for token in found.get("tokenize_response") or ()])
        found = self._post("/v1/chat/completions", {**body, "max_tokens": 1, "temperature": 0})
        count = (found.get("usage") or {}).get("prompt_tokens")
        if not isinstance(count, int):
            raise DataError(f"{self.url}/v1/chat/completions: its answer has no usage.prompt_tokens")
        return Prompt(None, count)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return _ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), dict(self.headers)))


def _openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as it travels: the arguments of tool calls are JSON text there (OpenAI API, chat completions)."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _ids(tokens: Any) -> Prompt:
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, int) for token in tokens):
        raise DataError(f"the answer holds no token ids: {tokens!r:.60}")
    return Prompt(tokens, len(tokens))


def _first_model(url: str, headers: Mapping[str, str]) -> str:
    """The first model that a server lists; empty where it lists none, as servers of one model may."""
    try:
        listed = _ask(urllib.request.Request(url + "/v1/models", headers=dict(headers))).get("data")
    except DataError:
        return ""
    return str(listed[0].get("id", "")) if isinstance(listed, list) and listed else ""


def _ask(request: urllib.request.Request) -> dict[str, Any]:
    """The JSON object that a server answers with."""
    if not request.full_url.startswith(("http://", "https://")):
        raise DataError(f"{request.full_url}: is no address of a server; write http://host:port")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read()[:200].decode("utf-8", "replace")
        busy = error.code in (408, 429, 502, 503, 504)  # a server that starts, or has too much to do
        raise (InfrastructureError if busy else DataError)(
            f"{request.full_url}: answers {error.code}: {' '.join(said.split())}"
        ) from None
    except ValueError:
        raise DataError(f"{request.full_url}: its answer is no JSON") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise InfrastructureError(f"{request.full_url}: does not answer ({reason}); is the server up?") from None
    if not isinstance(found, dict):
        raise DataError(f"{request.full_url}: its answer is no object: {found!r:.60}")
    return found
