"""Secrets taken out of what leaves the process: found by the key that they stand under, and by their own shape."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

MARK = "***"
"""What stands where a secret stood."""
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = {
    "secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "authorization", "apikey",
    "authtoken", "accesskey", "signature",
}  # fmt: skip
_KEY_OF = {"api", "access", "secret", "private", "signing", "encryption", "auth", "account"}
_VOCABULARY = {
    "bos", "eos", "pad", "unk", "cls", "sep", "mask", "stop", "start", "end", "special", "control", "image", "audio",
    "video", "per", "each", "next", "first", "last", "think", "decoder", "generated",
}  # fmt: skip
"""Words before `token` that make it a token of a vocabulary."""
_PLACES = {"path", "file", "folder", "dir", "name", "env", "uri", "url", "sha"}
"""Last words of keys that say where a secret lies and not what it is."""

_SHAPES = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}"),
    re.compile(r"(?<![A-Za-z0-9])sk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,})"),
    re.compile(r"(?<![A-Za-z0-9])AIza[\w-]{35}"),
    re.compile(r"(?<![\w-])eyJ[\w-]{5,}\.eyJ[\w-]{5,}(?:\.[\w-]*)?"),
    # The secret of an AWS key has no shape of its own, so it is known by the key that stands before it.
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])(?:[\s,:;/'\"]{1,4}[A-Za-z0-9/+=]{40}(?![A-Za-z0-9/+=]))?"),
)  # fmt: skip
"""https://github.com/gitleaks/gitleaks/blob/master/config/gitleaks.toml lists these prefixes with their issuers."""
_BEARER = re.compile(r"(?i)(\bbearer\s+)(?=[^\s\"',]*\d)[\w.~+/=-]{16,}")
_HEADER = re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|digest)\s+)?+)[^\s\"',]+")
_LOGINS = (
    re.compile(r"(://)[^/\s:@\"'<>]*:[^/\s\"'<>]*@"),
    # A password with a slash in it, which SQLAlchemy takes as it is; digits before the slash are a port.
    re.compile(r"(://)[^/\s:@\"'<>]*:(?!\d{1,5}/)[^\s@\"'<>]*@"),
)
_KEY = re.compile(r"([A-Za-z_][\w.-]*)[\"']?\s*([:=])\s*")
_VALUE = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|[^\s&\"',;)}\]]+")


def is_secret_key(key: str) -> bool:
    """Whether what stands under this key is a secret: `password`, `api_key`, `HF_TOKEN`; not `eos_token`, not `tokens`."""
    words = [word.lower() for word in _WORDS.findall(key)]
    if not words or words[-1] in _PLACES:
        return False
    if _SECRET_WORDS & set(words):
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _VOCABULARY
    return (words[-1] in ("key", "keys") and before in _KEY_OF) or words[-1] == "sig"


def redact(text: str, known: Collection[str] = ()) -> str:
    """The text without secrets: those of a known shape, those assigned to a key of a secret, and the `known` ones.

    What it gives, it leaves as it is.
    """
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, MARK)
    for shape in _SHAPES:
        text = shape.sub(MARK, text)
    for pattern in _LOGINS:
        text = pattern.sub(rf"\1{MARK}@", text)
    for pattern in (_HEADER, _BEARER):
        text = pattern.sub(rf"\1{MARK}", text)
    return _without_assigned(text)


def _without_assigned(text: str) -> str:
    """The text without the values written behind the key of a secret, as in `HF_TOKEN=...` and `"password": "..."`."""
    kept, at = [], 0
    while found := _KEY.search(text, at):
        name, sign = found.groups()
        kept.append(text[at : found.end()])
        at = found.end()
        value = _VALUE.match(text, at)
        # In prose, "the token: x" speaks of a vocabulary; and of a header `_HEADER` has left the word that says its kind.
        told = (name.lower() == "token" and sign == ":" and text[found.end(1)] == ":") or name.lower() == "authorization"
        if value and is_secret_key(name) and not told:
            quote = value[0][0] if value[0][0] in "\"'" else ""
            kept.append(f"{quote}{MARK}{quote}")
            at = value.end()
    return "".join(kept) + text[at:]


def redact_tree(tree: Any, key: str = "", known: Collection[str] = ()) -> Any:
    """Nested mappings, lists and texts without secrets; `key` is the key that the tree itself stands under.

    Numbers, flags and nulls are kept: no secret is one.
    """
    if isinstance(tree, Mapping):
        return {name: redact_tree(value, _under(key, name), known) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([redact_tree(item, key, known) for item in tree])
    if isinstance(tree, str):
        return MARK if tree and is_secret_key(key) else redact(tree, known)
    return tree


def secrets(tree: Any, place: str = "", key: str = "") -> Iterator[str]:
    """The dotted places of a tree at which a secret stands."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if redact(str(name)) != str(name):
                yield f"{place}.{redact(str(name))}".lstrip(".")
            yield from secrets(value, f"{place}.{redact(str(name))}".lstrip("."), _under(key, name))
    elif isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            yield from secrets(item, f"{place}.{number}", key)
    elif redact_tree(tree, key) != tree:
        yield place


def known_secrets(environment: Mapping[str, str]) -> frozenset[str]:
    """The values of the variables that hold secrets; short ones are too much like words of a text."""
    return frozenset(value for name, value in environment.items() if len(value) >= 8 and is_secret_key(name))


def _under(key: str, name: Any) -> str:
    """The key that counts for what stands under `name`: all that is below a key of a secret is secret."""
    return key if is_secret_key(key) else str(name)
