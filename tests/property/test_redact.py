"""Redaction, for any secret in any text."""

import json
import string
import uuid

from hypothesis import assume, given
from hypothesis import strategies as st

from burnish.redact import redact, redact_tree, secrets

ALNUM = string.ascii_letters + string.digits


def some(alphabet: str, low: int, high: int | None = None) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=low, max_size=high or low)


def text_of(*parts: str | st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts)).map("".join)


BODY = some(ALNUM, 36)
SHAPED = st.one_of(
    text_of("hf_", some(ALNUM, 34)),
    text_of(st.sampled_from(["sk-", "sk-proj-", "sk-ant-api03-"]), BODY.map(lambda body: f"A1{body}")),
    text_of("AKIA", some(string.ascii_uppercase + string.digits, 16)),
    text_of(st.sampled_from(["ghp_", "gho_", "github_pat_", "glpat-"]), BODY),
    text_of(st.sampled_from(["xoxb-", "xoxp-", "xoxa-"]), some(string.digits, 11), "-", BODY),
    text_of("eyJ", BODY, ".eyJ", BODY, ".", BODY),
)
"""Secrets that are known wherever they stand."""
PASSWORD = some(ALNUM, 12, 40)
AROUND = st.text(string.ascii_letters + string.digits + " .,;:/?!=&\"'(){}[]<>|\n-_éß你", max_size=30)


@given(AROUND, SHAPED, AROUND)
def test_a_secret_of_a_known_shape_survives_nowhere(before, secret, after):
    text = f"{before} {secret} {after}"
    assert secret not in redact(text)
    assert redact(redact(text)) == redact(text)


@given(AROUND, PASSWORD, AROUND)
def test_a_secret_in_an_address_or_behind_its_key_survives_nowhere(before, secret, after):
    forms = (
        f"https://user:{secret}@host/x", f"postgresql+psycopg2://u:{secret}/x@h/db", f"s3://b/k?a=1&X-Amz-Signature={secret}&b=2",
        f"HF_TOKEN={secret}", f'{{"api_key": "{secret}"}}', f"'password': '{secret}'", f"password: {secret}",
        f"Authorization: Bearer {secret}", f"?access_token={secret}", f"{'AKIA' + 'A1' * 8} {(secret * 4)[:40]}",
    )  # fmt: skip
    for form in forms:
        text = f"{before}\n {form} \n{after}"
        kept = redact(text)
        assert secret not in kept.replace(before, "").replace(after, ""), form
        assert redact(kept) == kept


@given(st.text())
def test_redaction_of_any_text_leaves_itself_alone(text):
    assert redact(redact(text)) == redact(text)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase + "_", max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES, st.sampled_from(["token", "password", "api_key", "hf_token", "clientSecret"]), PASSWORD, SHAPED)
def test_a_tree_loses_every_planted_secret_and_nothing_is_found_in_it_again(tree, key, plain, shaped):
    assume(plain not in json.dumps(tree) and shaped not in json.dumps(tree))
    planted = [tree, {key: plain, "rest": [{"note": f"see {shaped}"}, tree]}, {key: {"deep": [plain]}}]
    clean = redact_tree(planted)
    assert plain not in json.dumps(clean) and shaped not in json.dumps(clean)
    assert redact_tree(clean) == clean
    assert {f"1.{key}", "1.rest.0.note", f"2.{key}.deep.0"} <= set(secrets(planted))


@given(
    st.one_of(
        some("0123456789abcdef", 40), some("0123456789abcdef", 64).map(lambda digest: f"sha256:{digest}"),
        st.uuids().map(uuid.UUID.hex.fget), st.uuids().map(str), st.from_regex(r"\A[a-z][a-z0-9-]{0,46}\Z"),
        st.lists(some(string.ascii_lowercase + "0123456789._-", 1, 12), min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts)),
        st.lists(some(string.ascii_letters, 1, 12), max_size=20).map(" ".join),
    )
)  # fmt: skip
def test_digests_names_paths_and_words_are_left_alone(text):
    assert redact(text) == text
    assert redact(f"run {text}: step 10, loss=0.5, tokens: 17 (eos_token={text!r})").startswith(
        f"run {text}: step 10, loss=0.5"
    )


def test_ordinary_sentences_are_left_alone():
    for text in (
        "the text holds the control token: <|im_end|>", "What is the password policy? Ask the secret santa.",
        "lora.rank: 8 became 16", "http://127.0.0.1:8265/a@b", "task-sk-learn-baseline-of-many-words", "git@github.com:a/b.git",
        "user@example.com wrote: the bearer of this letter", "train/tokens_per_second 512", "<|im_start|>assistant\nHi<|im_end|>",
    ):  # fmt: skip
        assert redact(text) == text
