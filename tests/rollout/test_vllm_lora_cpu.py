import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from grpo_lightning.rollout.vllm_lora_cpu import GroupedPunicaWrapperCPU, group_rows

SLOTS, RANK, WIDTH = 4, 8, 24
# Slot -1 is the base model.
MAPPINGS = {
    "one adapter": [2] * 9,
    "slot 0": [0] * 5,
    "two adapters": [0, 0, 3, 3, 3, 0, 3],
    "adapter and base": [-1, 1, 1, -1, -1, 1],
    "all and base": [0, -1, 3, 2, 2, 1, -1, 0, 3, 3],
    "base alone": [-1] * 6,
    "single row": [1],
    "single base row": [-1],
}


@pytest.fixture(params=MAPPINGS.values(), ids=MAPPINGS.keys())
def slots(request):
    return request.param


def wrapper_for(slots, sampler_slots=None, cls=GroupedPunicaWrapperCPU, prefill=True):
    wrapper = cls(max_num_batched_tokens=512, max_batches=512, device="cpu")
    # vLLM names adapters by ids above 0; here slot s holds the adapter with id 10 + s, and 0 is the base.
    ids = [10 + s if s >= 0 else 0 for s in slots]
    prompts = ids if sampler_slots is None else [10 + s if s >= 0 else 0 for s in sampler_slots]
    wrapper.update_metadata(
        LoRAMapping(tuple(ids), tuple(prompts), is_prefill=prefill), [10 + s for s in range(SLOTS)], SLOTS, 100
    )
    return wrapper


def weights(out_widths, dtype=torch.float32, width=WIDTH, seed=0):
    random = torch.Generator().manual_seed(seed)
    a = tuple(torch.randn(SLOTS, 1, RANK, width, generator=random).to(dtype) for _ in out_widths)
    b = tuple(torch.randn(SLOTS, 1, w, RANK, generator=random).to(dtype) for w in out_widths)
    return a, b


def linear_by_loops(y, x, slots, a_stacked, b_stacked, scale, slices):
    """Token by token, in float64."""
    result = y.double().clone()
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        start = 0
        for a, b, width in zip(a_stacked, b_stacked, slices, strict=True):
            hidden = a[slot, 0].double() @ x[token].double() * scale
            delta = b[slot, 0].double() @ hidden
            for column in range(min(width, len(delta))):
                result[token, start + column] += delta[column]
            start += width
    return result


def inputs(tokens, out, dtype=torch.float32, seed=1):
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, WIDTH, generator=random).to(dtype),
        torch.randn(tokens, out, generator=random).to(dtype),
    )


@pytest.mark.parametrize("slices", [(16,), (16, 8, 8), (32, 32), (5, 11, 3)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_linear_equals_the_loops(slots, slices, scale):
    a, b = weights(slices)
    x, y = inputs(len(slots), sum(slices))
    expected = linear_by_loops(y, x, slots, a, b, scale, slices)
    x_before = x.clone()
    wrapper_for(slots).add_lora_linear(y, x, a, b, scale, slices)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("prefill", [True, False])
def test_linear_equals_vllms_own_wrapper(slots, prefill):
    slices = (16, 8, 8)
    a, b = weights(slices)
    x, y = inputs(len(slots), sum(slices))
    theirs = y.clone()
    wrapper_for(slots, cls=PunicaWrapperCPU, prefill=prefill).add_lora_linear(theirs, x, a, b, 0.5, slices)
    # Theirs gives rows of the base model the last slot's adapter.
    theirs = torch.where(torch.tensor(slots)[:, None] >= 0, theirs, y)
    wrapper_for(slots, prefill=prefill).add_lora_linear(y, x, a, b, 0.5, slices)
    torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-4)


def test_base_rows_are_untouched_to_the_bit():
    slots = MAPPINGS["all and base"]
    a, b = weights((16, 8))
    x, y = inputs(len(slots), 24)
    before = y.clone()
    wrapper_for(slots).add_lora_linear(y, x, a, b, 1.0, (16, 8))
    for token, slot in enumerate(slots):
        assert torch.equal(y[token], before[token]) == (slot < 0)


@pytest.mark.parametrize("mapping", ["base alone", "adapter and base"])
def test_base_rows_are_untouched_even_if_a_slot_is_not_finite(mapping):
    slots = MAPPINGS[mapping]
    a, b = weights((16,))
    a[0][3] = torch.nan
    x, y = inputs(len(slots), 16)
    wrapper_for(slots).add_lora_linear(y, x, a, b, 1.0, (16,))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(("layer", "adapter"), [((16, 8), (12, 8)), ((16, 8), (24, 8)), ((16, 8), (16, 32))])
def test_padded_widths(slots, layer, adapter):
    # B may have fewer or more rows than its slice has columns; what does not overlap is padding.
    a, b = weights(adapter)
    x, y = inputs(len(slots), sum(layer))
    expected = linear_by_loops(y, x, slots, a, b, 1.0, layer)
    wrapper_for(slots).add_lora_linear(y, x, a, b, 1.0, layer)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_close_and_keeps_its_dtype(slots, dtype):
    a, b = weights((16, 8), dtype)
    x, y = inputs(len(slots), 24, dtype)
    expected = linear_by_loops(y, x, slots, a, b, 0.1, (16, 8))
    wrapper_for(slots).add_lora_linear(y, x, a, b, 0.1, (16, 8))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.1)


def test_inputs_of_another_dtype_are_converted():
    slots = MAPPINGS["two adapters"]
    a, b = weights((16,), torch.bfloat16)
    x, y = inputs(len(slots), 16)
    expected = linear_by_loops(y, x, slots, a, b, 0.1, (16,))
    wrapper_for(slots).add_lora_linear(y, x, a, b, 0.1, (16,))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.1)


def test_the_wrapper_follows_the_metadata_of_each_step():
    a, b = weights((16,))
    wrapper = wrapper_for([0, 0, 0])
    for slots in MAPPINGS.values():
        ids = tuple(10 + s if s >= 0 else 0 for s in slots)
        wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=False), [10, 11, 12, 13], SLOTS, 100)
        x, y = inputs(len(slots), 16)
        expected = linear_by_loops(y, x, slots, a, b, 1.0, (16,))
        wrapper.add_lora_linear(y, x, a, b, 1.0, (16,))
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_an_adapter_that_is_loaded_into_a_slot_takes_effect():
    slots = [1, 1, 1]
    wrapper, (a, b) = wrapper_for(slots), weights((16, 8))
    for seed, changed in ((5, a[1]), (6, b[0])):
        x, y = inputs(len(slots), 24)
        expected = linear_by_loops(y, x, slots, a, b, 1.0, (16, 8))
        wrapper.add_lora_linear(y, x, a, b, 1.0, (16, 8))
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
        # vLLM writes a new adapter over the old one, within inference mode.
        with torch.inference_mode():
            changed[1].copy_(torch.randn(changed[1].shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("tokens", [250, 400])
@pytest.mark.parametrize("which", [0, 1], ids=["A", "B"])
def test_what_bfloat16_would_lose_of_a_float32_adapter_counts(tokens, which):
    slots, given = [2] * tokens, list(weights((16, 8)))
    rounded = list(given)
    rounded[which] = tuple(factor.bfloat16().float() for factor in given[which])
    x, _ = inputs(tokens, 24, torch.bfloat16)
    found, expected = [], []
    for a, b in (given, rounded):
        y = torch.zeros(tokens, 24, dtype=torch.bfloat16)
        wrapper_for(slots).add_lora_linear(y, x, a, b, 0.1, (16, 8))
        found.append(y.double())
        expected.append(linear_by_loops(torch.zeros(tokens, 24), x, slots, a, b, 0.1, (16, 8)))
    lost = expected[0] - expected[1]
    assert float(((found[0] - found[1]) * lost).sum() / lost.square().sum()) == pytest.approx(1, abs=0.1)


def test_before_any_metadata_there_is_no_adapter():
    wrapper = GroupedPunicaWrapperCPU(max_num_batched_tokens=8, max_batches=8, device="cpu")
    a, b = weights((16,))
    x, y = inputs(4, 16)
    before = y.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, (16,))
    assert torch.equal(y, before)


@pytest.mark.parametrize(("vocabulary", "padded"), [(40, 40), (40, 64), (48, 40)])
def test_logits_equal_the_loops(slots, vocabulary, padded):
    (a,), (b,) = weights((padded,))
    x, y = inputs(len(slots), vocabulary)
    expected = linear_by_loops(y, x, slots, (a,), (b,), 0.5, (vocabulary,))
    wrapper_for(slots).add_lora_logits(y, x, a, b, 0.5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_logits_have_their_own_rows():
    # Six tokens of three requests; only the last token of each is sampled from.
    wrapper = wrapper_for([0, 0, 0, -1, 2, 2], sampler_slots=[0, -1, 2])
    (a,), (b,) = weights((40,))
    x, y = inputs(3, 40)
    expected = linear_by_loops(y, x, [0, -1, 2], (a,), (b,), 1.0, (40,))
    wrapper.add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    x, y = inputs(6, 40)
    expected = linear_by_loops(y, x, [0, 0, 0, -1, 2, 2], (a,), (b,), 1.0, (40,))
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (40,))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_logits_of_an_adapter_without_a_head_are_untouched():
    slots = [0, 1, 0, -1]
    (a,), (b,) = weights((40,))
    a[0] = 0
    b[0] = 0
    x, y = inputs(4, 40)
    before = y.clone()
    wrapper_for(slots).add_lora_logits(y, x, a, b, 1.0)
    assert torch.equal(y[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(y[1], before[1])


def test_groups(slots):
    groups = group_rows(torch.tensor(slots))
    found = {}
    for slot, rows in groups:
        for row in range(len(slots)) if rows is None else rows.tolist():
            assert row not in found
            found[row] = slot
    assert found == {row: slot for row, slot in enumerate(slots) if slot >= 0}
    # One adapter for all rows needs no gathering.
    assert (len(set(slots)) == 1 and slots[0] >= 0) == any(rows is None for _, rows in groups)


def test_no_rows():
    assert group_rows(torch.empty(0, dtype=torch.int64)) == []
