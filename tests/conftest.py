import logging
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser
from fakes import EOS, EOS_ID, PAD, PAD_ID, TINY_VOCABULARY, UNKNOWN, FakeEngine

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TINY = {
    "vocab_size": len(TINY_VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Larger than usual, so that the random model prefers some tokens to others and positions matter.
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(TINY_VOCABULARY)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def save_model(directory: Path, model_class: type, config) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    model.generation_config.eos_token_id = EOS_ID
    model.generation_config.pad_token_id = PAD_ID
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell that starts the tests in the background has their processes ignore SIGINT, which some tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def log_stays_on() -> Iterator[None]:
    """A test that silences the project's log would blind those after it, which are others in every order of files."""
    log = logging.getLogger("grpo_lightning")
    yield
    level = log.level
    log.setLevel(logging.NOTSET)
    assert level == logging.NOTSET, "this test left the project's log at another level"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", LlamaForCausalLM, LlamaConfig(**TINY))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True)
    return save_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", Qwen3ForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_qwen3_for_vllm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wider heads: vLLM's CPU attention takes heads of 32 and more."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**TINY, "hidden_size": 64}, head_dim=32, tie_word_embeddings=True)
    return save_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", Qwen3ForCausalLM, config)


@pytest.fixture(scope="session")
def demo_model() -> str:
    from grpo_lightning.demo import prepare_model

    return str(prepare_model())


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def fake_engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser; whatever a test did in it, the page must not have complained or asked for anything."""
    chromium.size(1200, 900)
    chromium.prefer("light")
    yield chromium
    assert chromium.complaints() == []
    assert [address for address in chromium.requested() if not address.startswith("file://")] == []
    assert len(chromium.requested()) == 1


@pytest.fixture(scope="session")
def trackio_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trackio has one directory for the whole process."""
    return tmp_path_factory.mktemp("trackio")
