import copy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.redact import REDACTED, is_secret_name, redact, redact_hyperparameters

SECRET_NAMES = [
    "api_key",
    "apiKey",
    "APIKey",
    "apikey",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "token",
    "HF_TOKEN",
    "hub_token",
    "auth-token",
    "accessToken",
    "engine.token",
    "password",
    "passwords",
    "PGPASSWORD",
    "db_passwd",
    "secret",
    "client_secret",
    "secrets",
    "AWS_SECRET_ACCESS_KEY",
    "access_key",
    "private_key",
    "Authorization",
    "credential",
    "credentials",
    "auth",
    "registry_auth",
    "cookie",
    "session_cookies",
    "pwd",
    "db_pwd",
    "hf_tokens",
    "access_tokens",
    "auth_tokens",
    "apiTokens",
    "hftoken",
    "account_key",
    "signing_key",
    "encryption_keys",
    "ssh_key",
    "image_registry_token",
]
OTHER_NAMES = [
    "max_tokens",
    "tokens",
    "stop_token_ids",
    "token_ids",
    "bos_token",
    "eos_token",
    "pad_token",
    "stop_token",
    "image_token",
    "begin_of_text_token",
    "end_of_turn_token",
    "max_new_tokens",
    "special_tokens",
    "auth_method",
    "cwd",
    "sort_key",
    "additional_special_token",
    "seconds_per_token",
    "tokenizer",
    "tokenizer_mode",
    "aggregation",
    "key",
    "keys",
    "monitor_key",
    "secretary",
    "passwordless_hosts",
    "author",
    "model",
    "",
]
TOKENS = [
    "hf_" + 34 * "a",
    "sk-proj-" + 20 * "a1",
    "ghp_" + 36 * "a",
    "github_pat_" + 22 * "a",
    "glpat-" + 20 * "a",
    "xoxb-1234567890-abc",
    "AKIA" + 16 * "A",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
]
ORDINARY = [
    "Qwen/Qwen3-0.6B",
    "models/task-1-large-language-model",
    "sk-learn",
    "hf_hub",
    "/data/ghp_x",
    "http://host:8000/v1",
    "https://host/a:b@c",
    "ssh git@host:repo",
    "ssh://git@host/repo",
    "https://host/find?max_tokens=5&model=a@b&sort_key=x#top",
    "is it? key=value",
    "cosine",
    "a@b.org",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert redact({name: "hunter2"}) == {name: REDACTED}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_other_things(name):
    assert not is_secret_name(name)
    assert redact({name: "hunter2"}) == {name: "hunter2"}


@pytest.mark.parametrize("token", TOKENS)
def test_well_known_tokens_are_found_anywhere(token):
    assert redact([token, f"--key={token} --other", {"x": (token,)}]) == [
        REDACTED,
        f"--key={REDACTED} --other",
        {"x": (REDACTED,)},
    ]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_kept(text):
    assert redact({"x": text}) == {"x": text}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pw@host:80/a?b=c", f"https://{REDACTED}@host:80/a?b=c"),
        ("postgresql://u:p@ss@db/x", f"postgresql://{REDACTED}@db/x"),
        ("redis://:pw@host", f"redis://{REDACTED}@host"),
        ("see https://u:p@h/ now", f"see https://{REDACTED}@h/ now"),
        ("https://0123abcd@host/5", f"https://{REDACTED}@host/5"),
        ("git+https://pat@host/repo", f"git+https://{REDACTED}@host/repo"),
        ("https://host/v1?api_key=a/b@c", f"https://host/v1?api_key={REDACTED}"),
        (
            "https://host/?x=1&X-Amz-Signature=0a&auth=b#top",
            f"https://host/?x=1&X-Amz-Signature={REDACTED}&auth={REDACTED}#top",
        ),
        ("https://host?key=a&max_tokens=5 and ?sig=b", f"https://host?key={REDACTED}&max_tokens=5 and ?sig={REDACTED}"),
        ("http://a:b?token=x/y&z@c", f"http://{REDACTED}@c"),
    ],
)
def test_credentials_in_urls(url, expected):
    assert redact(url) == expected


def test_bearer():
    assert redact({"headers": ["X: Bearer abcdefgh12"]}) == {"headers": [f"X: Bearer {REDACTED}"]}


def test_what_says_nothing_under_a_secret_name_is_kept():
    settings = {"token": None, "use_auth_token": True, "password": "", "mask_token": "<mask>", "token ": "[MASK]"}
    assert redact(settings) == settings


def test_everything_under_a_secret_name_is_hidden():
    assert redact({"credentials": {"user": "me", "parts": ["a", 12, None]}, "password": 1234}) == {
        "credentials": {"user": REDACTED, "parts": [REDACTED, REDACTED, None]},
        "password": REDACTED,
    }


def test_checkpoints():
    checkpoint = {
        "hyper_parameters": {"token": "x", "lr": 1.0},
        "datamodule_hyper_parameters": {"password": "y"},
        "a": 1,
    }
    redact_hyperparameters(checkpoint)
    assert checkpoint == {
        "hyper_parameters": {"token": REDACTED, "lr": 1.0},
        "datamodule_hyper_parameters": {"password": REDACTED},
        "a": 1,
    }


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(ORDINARY)
URLS = ["https://hunter2@host/v1", "https://host?api_key=hunter2&x=1", "redis://u:hunter2@host"]
names = st.sampled_from(OTHER_NAMES + SECRET_NAMES) | st.text(max_size=8)
anything = st.recursive(
    plain | st.sampled_from(TOKENS + URLS),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(names | st.integers(), inner),
    max_leaves=20,
)


def same(before, after, secret=False):
    """Whether ``after`` is ``before`` but for what is a secret, by a second, plainer definition."""
    if type(before) is dict:
        keys = list(before) == list(after)
        return keys and all(
            same(v, after[k], secret or (isinstance(k, str) and is_secret_name(k))) for k, v in before.items()
        )
    if type(before) in (list, tuple):
        return (
            type(before) is type(after)
            and len(before) == len(after)
            and all(map(lambda b, a: same(b, a, secret), before, after))
        )
    if secret:
        says_nothing = before is None or isinstance(before, bool) or before == "" or is_special_token(before)
        return before == after if says_nothing else after == REDACTED
    return before is after or before == after or before in TOKENS + URLS


def is_special_token(value):
    return isinstance(value, str) and re.fullmatch(r"<.*>|\[[A-Z]+\]", value) is not None


@given(anything)
def test_all_else_stays_equal_and_twice_is_once(settings):
    before = copy.deepcopy(settings)
    once = redact(settings)
    assert settings == before
    assert same(settings, once)
    assert redact(once) == once
    assert not any(secret in repr(once) for secret in [*TOKENS, "hunter2"])
