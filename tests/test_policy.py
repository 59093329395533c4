import contextlib
import logging
import types

import pytest
import torch
from fakes import make_row
from policies import make_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loading import load_policy
from grpo_lightning.policy import choose_layout, unpack
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.packing import PackedSequence, Row, pack

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Larger than usual, so that attention is far from uniform.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**TINY)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**TINY)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True)),
}
IMPLEMENTATIONS = ("grpo_shared_prompt", "sdpa", "eager")

LENGTHS = {
    # (length of the prompt, lengths of the completions) of each row.
    "mixed": [(5, (3, 1, 4)), (1, (2, 6)), (4, (1,)), (3, (5,)), (7, (1, 1)), (2, (1, 3, 2, 1, 4))],
    "one row, one sequence": [(4, (3,))],
    "prompts of one token": [(1, (1, 2)), (1, (3, 1))],
    "completions of one token": [(3, (1, 1)), (2, (1,))],
    "nothing shared": [(3, (4,)), (6, (2,)), (2, (5,))],
}


def save(directory, model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # Norm weights and biases (of Qwen2) other than 1 and 0.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Tiny products gain nothing from threads and wait for each other where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {name: save(root / name, model_class, config()) for name, (model_class, config) in FAMILIES.items()}


def randomise_adapter(policy, scale=0.2, seed=2):
    """Random A and B: a fresh B is 0, and then neither would A have a gradient nor the adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)


@contextlib.contextmanager
def float64_throughout(model):
    """Replace what transformers computes in float32 in a float64 model too.

    Its RMSNorm converts to float32, and so does the softmax of eager attention. Packed and padded tensors have other
    shapes, so their sums are rounded differently, by about 1e-7: a bound of 1e-10 would fail for no fault of the
    layout. (Rotary embeddings are float32 as well, but the same function of the position in both.)
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    softmax = nn.functional.softmax

    def same_dtype(values, dim=None, dtype=None, **kwargs):
        return softmax(values, dim=dim, dtype=values.dtype if values.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", same_dtype)
        yield


@pytest.fixture(
    scope="module",
    params=[(family, implementation) for family in FAMILIES for implementation in IMPLEMENTATIONS],
    ids=lambda p: "-".join(p),
)
def policy64(request, directories):
    family, implementation = request.param
    policy = load_policy(directories[family], dtype="float64", attn_implementation=implementation, lora_rank=3)
    policy.double()
    randomise_adapter(policy)
    with float64_throughout(policy.causal_lm):
        yield policy


def tiny_policy(directory, **kwargs):
    policy = load_policy(directory, **{"dtype": "float64", "lora_rank": 3, **kwargs})
    policy.double()
    randomise_adapter(policy)
    return policy


TURNS = {
    # Of each row the tokens of the prompt, and of each sequence its pieces: sampled, forced, or of the environment.
    "mixed turns": [
        (5, ("s3 f1 e4 s2", "s1 e2 s1 e1 s4", "s2")),
        (1, ("f2 e1 s3", "s1 f1 e3 f2 e2 s2 e5")),
        (3, ("e2 s1", "s4 f3")),
        (4, ("s1 e1 s1 e1 s1 e1 s1",)),
    ],
    "long observations": [(2, ("s1 e20 s1", "s2 e1 s2 e17 s1")), (6, ("f9 s2",))],
    "the system opens and closes": [(1, ("f1 s1 f1", "f3 e1 s2 e4 f1")), (3, ("e1 s1 e1",))],
}
ROWS = LENGTHS | TURNS


def make_rows(lengths, seed=3, vocabulary=97):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    def sequence(prompt, pieces):
        ledger = Ledger.of_prompt(prompt)
        for turn, (kind, *count) in enumerate(pieces.split()):
            tokens = ids(int("".join(count)))
            if kind == "s":
                ledger = ledger.extended(tokens, Source.SAMPLED, turn, [-1.0] * len(tokens), 0)
            else:
                ledger = ledger.extended(tokens, Source.FORCED if kind == "f" else Source.ENVIRONMENT, turn)
        return PackedSequence(ledger, 0, (1.0,) * len(pieces.split()), 1.0)

    def row(prompt, completions):
        return Row(prompt, tuple(sequence(prompt, c if isinstance(c, str) else f"s{c}") for c in completions))

    return [row(ids(prompt), completions) for prompt, completions in lengths]


def padded_logprobs(model, rows, temperature, banned=()):
    """One line for each sequence with all its tokens, padded on the right; the model's own logits."""
    ledgers = [s.ledger for row in rows for s in row.sequences]
    longest = max(map(len, ledgers))
    input_ids = torch.tensor([ledger.token_ids.tolist() + [0] * (longest - len(ledger)) for ledger in ledgers])
    mask = torch.tensor([[1] * len(ledger) + [0] * (longest - len(ledger)) for ledger in ledgers])
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    logits[..., list(banned)] = -torch.finfo(logits.dtype).max / 8
    logp = (logits / temperature).log_softmax(-1)
    picked, values = [], []
    for line, ledger in enumerate(ledgers):
        for place, source in enumerate(ledger.source):
            if source == Source.SAMPLED:
                picked.append(logp[line, place - 1])
                values.append(picked[-1][ledger.token_ids[place]])
    entropies = [-(line.exp() * line).sum() for line in picked]
    return torch.stack(values), torch.stack(entropies)


def gradients(policy, logprobs):
    parameters = policy.trainable_parameters()
    weight = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grads = torch.autograd.grad((weight.to(logprobs.dtype) * logprobs).sum(), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


def assert_packed_equals_padded(policy, rows, temperature=0.7, tolerance=1e-10, banned=()):
    logprobs, entropy, *_ = policy.token_logprobs(pack(rows, temperature, banned))
    expected, expected_entropy = padded_logprobs(policy.model, rows, temperature, banned)
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=tolerance)
    assert logprobs.std() > 0.5 or len(logprobs) < 5, "the model must tell tokens apart"
    got, wanted = gradients(policy, logprobs), gradients(policy, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * max(1.0, float(gradient.abs().max())))
    return wanted


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_packed_equals_padded(policy64, lengths):
    assert policy64._layout == "packed"
    assert_packed_equals_padded(policy64, make_rows(lengths))


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_sequences_layout_equals_padded(policy64, lengths, monkeypatch):
    monkeypatch.setattr(policy64, "_layout", "sequences")
    assert_packed_equals_padded(policy64, make_rows(lengths))


def test_every_adapter_parameter_has_a_gradient(policy64):
    wanted = assert_packed_equals_padded(policy64, make_rows(LENGTHS["mixed"]))
    # q, k, v, o, gate, up, down in two layers, A and B.
    assert len(wanted) == 28
    assert all(float(g.abs().max()) > 1e-6 for g in wanted.values())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_other_temperatures(policy64, temperature):
    assert_packed_equals_padded(policy64, make_rows(LENGTHS["mixed"]), temperature)


@pytest.mark.parametrize("layout", ["packed", "sequences"])
def test_banned_tokens(policy64, monkeypatch, layout):
    monkeypatch.setattr(policy64, "_layout", layout)
    rows = make_rows(LENGTHS["mixed"])
    sampled = {token for row in rows for s in row.sequences for token in s.ledger.token_ids.tolist()}
    banned = tuple(sorted(set(range(policy64.causal_lm.config.vocab_size)) - sampled)[:20])
    assert_packed_equals_padded(policy64, rows, banned=banned)
    with torch.no_grad():
        free, *_ = policy64.token_logprobs(pack(rows, 0.7))
        masked, *_ = policy64.token_logprobs(pack(rows, 0.7, banned))
    assert float((masked - free).min()) > 0
    assert float((masked - free).max()) > 0.05


def test_rows_and_siblings_do_not_see_each_other(policy64):
    # Other tokens in a sibling and in another row change nothing in this one's.
    rows = make_rows(LENGTHS["mixed"])
    changed = make_rows(LENGTHS["mixed"], seed=99)
    kept = [changed[0].sequences[0], changed[0].sequences[1], rows[0].sequences[2]]
    changed[0] = make_row(rows[0].prompt_ids, [s.ledger.token_ids[s.ledger.prompt_length :].tolist() for s in kept])
    with torch.no_grad():
        before, *_ = policy64.token_logprobs(pack(rows, 0.7))
        after, *_ = policy64.token_logprobs(pack(changed, 0.7))
    mine = slice(4, 8)
    torch.testing.assert_close(after[mine], before[mine], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:3], before[:3], atol=1e-3)


FIRST_ROWS = [LENGTHS["mixed"][0], (1, (1,)), *LENGTHS["mixed"][1:5]]


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, 1), (1, 1), (10, 1), (11, 2), (17, 2), (18, 3), (35, 5), (36, 6), (99, 6)]
)
def test_first_rows_are_the_leading_ones(limit, kept):
    rows = make_rows(FIRST_ROWS)
    # Input tokens: 5 + 2 + 0 + 3, 1 + 0, 1 + 1 + 5, 4 + 0, 3 + 4, 7 + 0 + 0.
    assert [row.num_tokens for row in rows] == [10, 1, 7, 4, 7, 7]
    part, expected = pack(rows, 0.7).first_rows(limit), pack(rows[:kept], 0.7)
    for name, value in vars(expected).items():
        found = getattr(part, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(found.nan_to_num(7), value.nan_to_num(7)), name
        else:
            assert found == value, name


@pytest.mark.parametrize("layout", ["packed", "sequences"])
def test_first_rows_have_the_same_logprobs(policy64, monkeypatch, layout):
    monkeypatch.setattr(policy64, "_layout", layout)
    batch = pack(make_rows(FIRST_ROWS), 0.7)
    with torch.no_grad():
        whole, *_ = policy64.token_logprobs(batch)
        for limit, count in ((0, 8), (11, 9), (18, 17), (99, 25)):
            leading, *_ = policy64.token_logprobs(batch.first_rows(limit))
            assert len(leading) == count
            torch.testing.assert_close(leading, whole[:count], rtol=0, atol=1e-12)


def test_unpack_golden():
    rows = [make_row((10, 11), [(20, 21, 22), (30,)]), make_row((12,), [(40, 41)])]
    ids, lengths, sequence, position = unpack(pack(rows, 1.0))
    assert ids.tolist() == [[10, 11, 20, 21], [10, 11, 0, 0], [12, 40, 0, 0]]
    assert lengths.tolist() == [4, 2, 2]
    assert sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert position.tolist() == [1, 2, 3, 1, 0, 1]


def test_unpack_keeps_what_was_said_between_turns():
    ledger = Ledger.of_prompt((10, 11)).extended((20,), Source.SAMPLED, 0, [-1.0], 0)
    ledger = ledger.extended((21,), Source.FORCED, 0).extended((30, 31), Source.ENVIRONMENT, 1)
    ledger = ledger.extended((40, 41), Source.SAMPLED, 1, [-1.0, -1.0], 0).extended((32,), Source.ENVIRONMENT, 2)
    single = make_row((10, 11), [(50,)]).sequences[0]
    rows = [Row((10, 11), (PackedSequence(ledger, 0, (1.0,) * 3, 1.0), single))]
    ids, lengths, sequence, position = unpack(pack(rows, 1.0))
    assert ids.tolist() == [[10, 11, 20, 21, 30, 31, 40], [10, 11, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [7, 2]
    assert sequence.tolist() == [0, 0, 0, 1]
    assert position.tolist() == [1, 5, 6, 1]


def lines_of(batch):
    """`unpack`, by a loop over sequences."""
    count = int(batch.sequence_index.max()) + 1 if batch.num_targets else 0
    lines = []
    for line in range(count):
        row = batch.row_ids[batch.target_index[batch.sequence_index == line][0]]
        prompt = batch.input_ids[(batch.row_ids == row) & (batch.sequence_ids < 0)]
        lines.append(torch.cat([prompt, batch.input_ids[batch.sequence_ids == line]]).tolist())
    return lines or [batch.input_ids.tolist()]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("leading", [1, 12, 99])
def test_unpack_equals_a_loop_over_sequences(name, leading):
    batch = pack(make_rows(ROWS[name]), 1.0).first_rows(leading)
    ids, lengths, sequence, position = unpack(batch)
    lines = lines_of(batch)
    assert lengths.tolist() == [len(line) for line in lines]
    assert ids.tolist() == [line + [0] * (max(lengths.tolist()) - len(line)) for line in lines]
    assert [ids[s, p] for s, p in zip(sequence, position, strict=True)] == [
        batch.input_ids[i] for i in batch.target_index
    ]


def test_unpack_takes_as_many_operations_for_many_sequences_as_for_few():
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for sequences in (2, 40):
        batch = pack([make_row((10, 11), [(20, 21)] * sequences)], 1.0)
        with Count() as count:
            unpack(batch)
        counts.append(count.operations)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("layout", ["packed", "sequences"])
def test_turns_see_what_was_said_before_them_and_nothing_behind(policy64, monkeypatch, layout):
    monkeypatch.setattr(policy64, "_layout", layout)

    def logprobs(observation, forced, last=40):
        ledger = Ledger.of_prompt((10, 11)).extended((20, 21), Source.SAMPLED, 0, [-1.0] * 2, 0)
        ledger = ledger.extended((forced,), Source.FORCED, 0).extended((observation, 31), Source.ENVIRONMENT, 1)
        ledger = ledger.extended((last, 41), Source.SAMPLED, 1, [-1.0] * 2, 0)
        sibling = make_row((10, 11), [(50, 51)]).sequences[0]
        batch = pack([Row((10, 11), (PackedSequence(ledger, 0, (1.0,) * 2, 1.0), sibling))], 0.7)
        with torch.no_grad():
            return policy64.token_logprobs(batch)[0]

    plain = logprobs(30, 22)
    for changed in (logprobs(35, 22), logprobs(30, 25)):
        torch.testing.assert_close(changed[[0, 1, 4, 5]], plain[[0, 1, 4, 5]], rtol=0, atol=1e-12)
        assert float((changed[2:4] - plain[2:4]).abs().min()) > 1e-4
    other = logprobs(30, 22, last=45)
    torch.testing.assert_close(other[[0, 1, 4, 5]], plain[[0, 1, 4, 5]], rtol=0, atol=1e-12)
    assert float((other[2:4] - plain[2:4]).abs().min()) > 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_turns_in_float32(directories, implementation):
    policy = load_policy(directories["qwen3"], dtype="float32", attn_implementation=implementation, lora_rank=3)
    randomise_adapter(policy)
    for lengths in TURNS.values():
        rows = make_rows(lengths)
        with torch.no_grad():
            logprobs, entropy, *_ = policy.token_logprobs(pack(rows, 0.7))
            expected, expected_entropy = padded_logprobs(policy.model, rows, 0.7)
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_checkpointing_changes_nothing(directories, implementation):
    plain = tiny_policy(directories["qwen3"], attn_implementation=implementation)
    recomputing = tiny_policy(directories["qwen3"], attn_implementation=implementation, gradient_checkpointing=True)
    assert recomputing.causal_lm.is_gradient_checkpointing
    batch = pack(make_rows(LENGTHS["mixed"]), 0.7)
    one, other = (policy.token_logprobs(batch)[0] for policy in (plain, recomputing))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    expected, got = gradients(plain, one), gradients(recomputing, other)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10)


def test_ordinary_forwards_work_with_the_shared_prompt_attention(directories):
    # Without a plan it is sdpa: causal, with padding left or right, one sequence or several.
    ids = torch.arange(24).reshape(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    ours = tiny_policy(directories["llama"])
    theirs = tiny_policy(directories["llama"], attn_implementation="sdpa")
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            got, expected = (p.model(input_ids=ids, **kwargs).logits for p in (ours, theirs))
            if kwargs:
                got, expected = got[mask.bool()], expected[mask.bool()]
            assert torch.equal(got, expected)


def configured(config, implementation="grpo_shared_prompt"):
    config._attn_implementation = implementation
    return config


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_packed_without_a_word(family, implementation, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_layout(configured(FAMILIES[family][1](), implementation)) == "packed"
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "implementation", "reason"),
    [
        (lambda: LlamaConfig(**TINY), "flash_attention_2", "'flash_attention_2' cannot take the shared-prompt mask"),
        (lambda: LlamaConfig(**TINY), "flash_attention_3", "'flash_attention_3' cannot take the shared-prompt mask"),
        (lambda: MistralConfig(**TINY, sliding_window=16), "sdpa", "within a window of 16 tokens"),
        (lambda: MistralConfig(**TINY, sliding_window=16), "grpo_shared_prompt", "within a window of 16 tokens"),
        (
            lambda: Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=1),
            "grpo_shared_prompt",
            r"layers of types \['full_attention', 'sliding_attention'\]",
        ),
        (
            lambda: Qwen3Config(**TINY, layer_types=["sliding_attention"] * 2, sliding_window=4),
            "eager",
            r"layers of types \['sliding_attention'\]",
        ),
        (
            lambda: types.SimpleNamespace(state_size=16),
            "grpo_shared_prompt",
            "not a softmax-attention transformer",
        ),
    ],
)
def test_layout_falls_back_to_sequences_with_a_warning(config, implementation, reason, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_layout(configured(config(), implementation)) == "sequences"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Prompts are not shared between the samples of a group (slower, same result)" in record.getMessage()
    caplog.clear()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(record.getMessage())


def test_a_sliding_window_that_is_off_changes_nothing():
    config = Qwen2Config(**TINY, use_sliding_window=False, sliding_window=16)
    assert choose_layout(configured(config)) == "packed"


def test_unknown_attention_is_named():
    config = configured(LlamaConfig(**TINY), "paged_banana")
    message = "unknown attn_implementation 'paged_banana'; choose one of grpo_shared_prompt, sdpa, eager, flex"
    with pytest.raises(ConfigurationError, match=message):
        choose_layout(config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sliding_windows_are_kept(tmp_path, implementation, caplog):
    directory = save(tmp_path / "mistral", MistralForCausalLM, MistralConfig(**TINY, sliding_window=3))
    with caplog.at_level(logging.WARNING):
        policy = tiny_policy(directory, attn_implementation=implementation)
    assert "within a window of 3 tokens" in caplog.text
    rows = make_rows(LENGTHS["mixed"])
    with float64_throughout(policy.causal_lm):
        assert_packed_equals_padded(policy, rows)
        # The same weights, as transformers computes them.
        other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa")
        with policy.reference(), float64_throughout(other):
            got, *_ = policy.token_logprobs(pack(rows, 0.7))
            torch.testing.assert_close(got, padded_logprobs(other, rows, 0.7)[0], rtol=0, atol=1e-10)
            # Packed, the window would span the tokens of siblings: this model must not be packed.
            policy._layout = "packed"
            packed, *_ = policy.token_logprobs(pack(rows, 0.7))
            assert not torch.allclose(packed, got, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_check_head_accepts_plain_heads(directories, family, implementation, dtype):
    policy = load_policy(directories[family], dtype=dtype, attn_implementation=implementation)
    policy.check_head()
    randomise_adapter(policy)
    policy.check_head()


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (CohereForCausalLM, lambda: CohereConfig(**TINY, logit_scale=0.25)),
        (GraniteForCausalLM, lambda: GraniteConfig(**TINY, logits_scaling=4.0)),
    ],
    ids=["cohere", "granite"],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_check_head_refuses_scaled_logits(tmp_path, model_class, config, dtype):
    policy = load_policy(save(tmp_path / "model", model_class, config()), dtype=dtype)
    with pytest.raises(ConfigurationError, match=rf"{model_class.__name__} differs from that by .* nats: it scales"):
        policy.check_head()


def test_check_head_accepts_granite_without_scaling(tmp_path):
    load_policy(save(tmp_path / "model", GraniteForCausalLM, GraniteConfig(**TINY, logits_scaling=1.0))).check_head()


def test_check_head_sees_no_dropout(directories, tmp_path):
    adapter = make_adapter(directories["qwen3"], tmp_path / "adapter")
    policy = load_policy(directories["qwen3"], adapter=str(adapter), lora_dropout=0.5)
    modes = [module.training for module in policy.modules()]
    policy.check_head()
    assert [module.training for module in policy.modules()] == modes
    assert any(modes)


def test_check_head_refuses_capped_logits(directories, monkeypatch):
    policy = load_policy(directories["llama"], dtype="float32")
    model = policy.causal_lm
    forward = type(model).forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(ConfigurationError, match="it scales, caps or shifts its logits"):
        policy.check_head()


def test_a_head_with_bias_is_refused(directories):
    policy = load_policy(directories["llama"])
    policy.causal_lm.lm_head.bias = nn.Parameter(torch.zeros(97), requires_grad=False)
    with pytest.raises(ConfigurationError, match="expected an output head without bias"):
        policy.token_logprobs(pack(make_rows(LENGTHS["mixed"]), 1.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_of_the_base_is_off(tmp_path, implementation):
    directory = save(tmp_path / "model", LlamaForCausalLM, LlamaConfig(**TINY, attention_dropout=0.5))
    policy = tiny_policy(directory, attn_implementation=implementation)
    assert policy.model.training
    batch = pack(make_rows(LENGTHS["mixed"]), 0.7)
    with torch.no_grad():
        first, second = (policy.token_logprobs(batch)[0] for _ in range(2))
        assert torch.equal(first, second)
        policy.eval()
        assert torch.equal(policy.token_logprobs(batch)[0], first)


def test_dropout_modules_of_the_base_are_off(tmp_path):
    # GPT-2 drops out after the embedding, in attention and in every residual, by 0.1 if nothing is said.
    config = GPT2Config(vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    policy = tiny_policy(save(tmp_path / "model", GPT2LMHeadModel, config), attn_implementation="sdpa")
    assert policy.model.training
    rows = make_rows(LENGTHS["mixed"])
    with torch.no_grad():
        first, second = (policy.token_logprobs(pack(rows, 0.7))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_packed_equals_padded(policy, rows)


def test_dropout_of_the_adapter_is_what_was_asked_for(directories):
    batch = pack(make_rows(LENGTHS["mixed"]), 0.7)
    for dropout in (0.0, 0.5):
        policy = tiny_policy(directories["llama"], lora_dropout=dropout)
        with torch.no_grad():
            first, second = (policy.token_logprobs(batch)[0] for _ in range(2))
        assert torch.equal(first, second) is (dropout == 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_is_float32_and_alone_trainable(directories, dtype):
    policy = load_policy(directories["llama"], dtype=dtype)
    trainable = policy.trainable_parameters()
    assert len(trainable) == 28
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert {p.dtype for n, p in policy.model.named_parameters() if n not in trainable} == {getattr(torch, dtype)}
    policy.to(torch.bfloat16)
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    logprobs, *_ = policy.token_logprobs(pack(make_rows(LENGTHS["mixed"]), 0.7))
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()
    assert all(p.grad is not None for p in policy.trainable_parameters().values())


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
    ],
)
def test_conversions_leave_the_adapter_as_it_is(directories, convert, dtype):
    # Within a larger module, as Lightning's bf16-true converts it. 1 + 2^-20 would be 1 in 16 bits.
    policy = load_policy(directories["llama"], dtype="float32")
    before = policy.trainable_parameters()
    with torch.no_grad():
        for parameter in before.values():
            parameter.fill_(1 + 2.0**-20)
    convert(nn.ModuleDict({"policy": policy}))
    after = policy.trainable_parameters()
    # The same objects: an optimizer may hold them.
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(p.dtype == torch.float32 and bool((p == 1 + 2.0**-20).all()) for p in after.values())
    assert {p.dtype for name, p in policy.model.named_parameters() if name not in after} == {dtype}


@pytest.mark.parametrize(
    "targets",
    ["lm_head", ["lm_head"], ["q_proj", "lm_head"], ".*embed_tokens", ["embed_tokens", "v_proj"], ".*head", "lm.head"],
)
def test_adapters_on_head_or_embedding_are_refused(directories, targets):
    with pytest.raises(ConfigurationError, match="expected lora_targets among the inner layers, but got"):
        load_policy(directories["llama"], lora_targets=targets)


def test_adapters_on_inner_layers(directories):
    for targets, count in (("all-linear", 28), (["q_proj", "v_proj"], 8), (r".*\.down_proj", 4)):
        assert len(load_policy(directories["llama"], lora_targets=targets).trainable_parameters()) == count


def test_rank_below_one_is_refused(directories):
    with pytest.raises(ConfigurationError, match="expected lora_rank >= 1, but got 0"):
        load_policy(directories["llama"], lora_rank=0)


def test_reference_is_the_base_and_the_adapter_comes_back(policy64):
    rows = make_rows(LENGTHS["mixed"])
    batch = pack(rows, 0.7)
    before, *_ = policy64.token_logprobs(batch)
    with policy64.reference():
        reference, *_ = policy64.token_logprobs(batch)
    config = policy64.causal_lm.config
    base = AutoModelForCausalLM.from_pretrained(
        config._name_or_path, dtype=torch.float64, attn_implementation=config._attn_implementation
    )
    with torch.no_grad(), float64_throughout(base):
        expected, _ = padded_logprobs(base, rows, 0.7)
    assert not reference.requires_grad
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-10)
    assert float((before - reference).detach().abs().max()) > 0.1
    after, *_ = policy64.token_logprobs(batch)
    assert torch.equal(after, before)
    assert after.requires_grad


def test_what_is_frozen_stays_frozen_beside_the_base(directories):
    policy = tiny_policy(directories["llama"])
    frozen, *trained = policy.trainable_parameters().values()
    frozen.requires_grad_(False)
    for context in (policy.base(), policy.reference()):
        with context:
            pass
        assert [id(p) for p in policy.trainable_parameters().values()] == [id(p) for p in trained]


def test_the_adapter_comes_back_after_an_error(policy64):
    batch = pack(make_rows(LENGTHS["mixed"]), 0.7)
    before, *_ = policy64.token_logprobs(batch)
    with pytest.raises(KeyError), policy64.reference():
        raise KeyError
    after, *_ = policy64.token_logprobs(batch)
    assert torch.equal(after, before)
    assert torch.is_grad_enabled()
    assert len(policy64.trainable_parameters()) == 28


TEXTS = {
    "What is the capital of France, and which river flows through it?": (
        "The capital of France is Paris, and the river Seine flows through it.",
        "Paris. The Seine.",
        "I",
    ),
    "Compute 17 + 25 step by step.": (
        "First add the units: 7 + 5 = 12. Write 2, carry 1. Then 1 + 2 + 1 = 4. The answer is 42.",
        "The answer is 32.",
    ),
    "Name three primary colours.": ("Red, yellow and blue.",),
}


@pytest.mark.slow
def test_demo_model_in_float32(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    rows = []
    for prompt, completions in TEXTS.items():
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        encoded = [tokenizer(c, add_special_tokens=False).input_ids for c in completions]
        rows.append(make_row(tokenizer(text, add_special_tokens=False).input_ids, encoded))
    policy = load_policy(demo_model, dtype="float32", lora_rank=4)
    randomise_adapter(policy, scale=0.02)
    logprobs, *_ = policy.token_logprobs(pack(rows, 0.9))
    expected, _ = padded_logprobs(policy.model, rows, 0.9)
    difference = float((logprobs - expected).detach().abs().max())
    got, wanted = gradients(policy, logprobs), gradients(policy, expected)
    relative = max(float((got[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    print(f"\n{len(logprobs)} tokens: largest difference {difference:.3g} nats, of gradients {relative:.3g}")
    with policy.reference():
        base, *_ = policy.token_logprobs(pack(rows, 0.9))
    assert float((base - logprobs).detach().abs().max()) > 0.05, "the adapter must have an effect"
    # Measured with one and with two threads: 1.76e-5 nats and 1.35e-5. Bounds are three times that.
    assert difference < 5e-5
    assert relative < 4e-5
