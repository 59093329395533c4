"""The fused LoRA layer, against PEFT's own and against the formula in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from grpo_lightning.lora_linear import FusedLoRALinear, fuse, lora_linear

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def inputs(dtype: torch.dtype, adapter: torch.dtype, *, bias: bool = True, leading: tuple[int, ...] = (7,)) -> Inputs:
    make = torch.Generator().manual_seed(3)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

    x, weight = normal(*leading, 6), normal(5, 6)
    a, b = normal(3, 6, dtype=adapter), normal(5, 3, dtype=adapter)
    return x.requires_grad_(), weight, normal(5) if bias else None, a.requires_grad_(), b.requires_grad_()


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The definition, in float64 and term by term."""
    x, weight, a, b = (t.double() for t in (x, weight, a, b))
    y = x @ weight.T + scale * ((x @ a.T) @ b.T)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 4), (1, 1, 3), (0,)])
def test_it_is_the_formula_with_its_gradients(bias: bool, leading: tuple[int, ...]) -> None:
    given = inputs(torch.float64, torch.float64, bias=bias, leading=leading)
    weights = torch.arange(5.0, dtype=torch.float64)
    ours = lora_linear(*given, 0.5)
    expected = formula(*given, 0.5)
    torch.testing.assert_close(ours, expected)
    learned = [t for t in given if t is not None and t.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), learned),
        torch.autograd.grad((expected * weights).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 2.0), inputs(torch.float64, torch.float64, leading=(3,)))


def test_an_input_without_gradient_gets_none_and_costs_no_product() -> None:
    x, weight, bias, a, b = inputs(torch.float64, torch.float64)
    lora_linear(x.detach(), weight, bias, a, b, 1.0).sum().backward()
    assert [t.grad is None for t in (x, a, b)] == [True, False, False]


def test_float32_beside_float32_is_as_exact_as_float32() -> None:
    given = inputs(torch.float32, torch.float32)
    torch.testing.assert_close(lora_linear(*given, 0.5).double(), formula(*given, 0.5), rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_the_adapter_gradients_in_float32_and_the_input_its_own() -> None:
    x, weight, bias, a, b = inputs(torch.bfloat16, torch.float32, leading=(200,))
    learned = [x, a, b]
    y, expected = lora_linear(x, weight, bias, a, b, 0.3), formula(x, weight, bias, a, b, 0.3)
    weights = torch.randn(200, 5, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = torch.autograd.grad((y * weights).sum(), learned)
    assert y.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    # Of the layer's own part and of the sum, each rounded.
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-6)
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), learned), strict=True):
        assert float((mine.double() - theirs.double()).norm() / theirs.double().norm()) < 2**-7


@pytest.mark.parametrize("factor", [0, 1], ids=["A", "B"])
def test_an_update_that_bfloat16_would_round_away_changes_a_bfloat16_output(factor: int) -> None:
    ones = torch.ones(1, 64, dtype=torch.bfloat16)
    minus_one = -ones / 64
    adapter = [torch.ones(1, 64) / 64, torch.ones(1, 1)]
    assert float(lora_linear(ones, minus_one, None, *adapter, 1.0)) == 0
    step = 2.0**-10
    adapter[factor] = adapter[factor] * (1 + step)
    assert torch.equal(adapter[factor].bfloat16(), (adapter[factor] / (1 + step)).bfloat16())
    assert float(lora_linear(ones, minus_one, None, *adapter, 1.0)) == step


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def peft_pair(**settings: object) -> tuple[nn.Module, nn.Module]:
    """PEFT's model, and the same one fused."""
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False} | settings
    plain = get_peft_model(Two(), LoraConfig(**config))  # type: ignore[arg-type]
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


def test_fused_layers_are_pefts_layers_in_values_gradients_and_names() -> None:
    plain, fused = peft_pair()
    assert sum(type(m) is FusedLoRALinear for m in fused.modules()) == 2
    assert not any(isinstance(m, FusedLoRALinear) for m in plain.modules())
    x = torch.randn(5, 6)
    torch.testing.assert_close(fused(x), plain(x))
    for model in (plain, fused):
        model(x).square().sum().backward()
    found, expected = (dict(m.named_parameters()) for m in (fused, plain))
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        assert (found[name].grad is None) == (parameter.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad, parameter.grad)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Notes each use of PEFT's own forward."""
    noted: list[None] = []
    own = Linear.forward

    def forward(self: Linear, *args: object, **kwargs: object) -> Tensor:
        noted.append(None)
        return own(self, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(Linear, "forward", forward)
    return noted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_adapter_does_not_go_through_pefts_forward(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    _, fused = peft_pair()
    for name, parameter in fused.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    noted = calls(monkeypatch)
    fused(torch.randn(5, 6).to(dtype))
    assert not noted


def test_a_disabled_adapter_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = peft_pair()
    noted = calls(monkeypatch)
    x = torch.randn(5, 6)
    with fused.disable_adapter(), plain.disable_adapter():  # type: ignore[operator]
        assert torch.equal(fused(x), plain(x))
    assert len(noted) == 4


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}],
    ids=["dora", "dropout", "bias of the adapter"],
)
def test_what_is_no_plain_adapter_is_left_to_peft(settings: dict[str, object]) -> None:
    plain, fused = peft_pair(**settings)
    x = torch.randn(5, 6)
    results = []
    for model in (plain, fused):
        torch.manual_seed(5)
        results.append(model(x))
    assert torch.equal(*results)


def test_a_merged_adapter_and_two_adapters_are_left_to_peft() -> None:
    plain, fused = peft_pair()
    x = torch.randn(5, 6)
    for model in (plain, fused):
        model.merge_adapter()  # type: ignore[operator]
    assert torch.equal(plain(x), fused(x))
    for model in (plain, fused):
        model.unmerge_adapter()  # type: ignore[operator]
        torch.manual_seed(7)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))  # type: ignore[operator]
        model.base_model.set_adapter(["default", "other"])  # type: ignore[operator, union-attr]
    torch.testing.assert_close(plain(x), fused(x), rtol=0, atol=1e-6)


def test_autocast_computes_as_peft_does(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = peft_pair()
    x = torch.randn(5, 6)
    noted = calls(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(x), fused(x))
    assert len(noted) == 4


def test_trained_base_weights_get_their_gradient() -> None:
    _, fused = peft_pair()
    weight = fused.base_model.model.first.base_layer.weight  # type: ignore[union-attr]
    weight.requires_grad_(True)  # type: ignore[operator, union-attr]
    fused(torch.randn(5, 6)).sum().backward()
    assert weight.grad is not None  # type: ignore[union-attr]


def test_layers_of_other_kinds_stay_pefts() -> None:
    model = get_peft_model(nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 2)), LoraConfig(target_modules=["0", "1"]))  # type: ignore[arg-type]
    fuse(model)
    kinds = {type(m).__name__ for m in model.modules()}
    assert {"FusedLoRALinear", "Embedding"} <= kinds


def test_a_copy_computes_with_its_own_weights() -> None:
    _, fused = peft_pair()
    x = torch.randn(5, 6)
    before = fused(x)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(fused(x), before)
    assert not other(x).any()
