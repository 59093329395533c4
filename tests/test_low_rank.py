"""The product of thin factors, against float64."""

import pytest
import torch
from torch import Tensor

from grpo_lightning.low_rank import LowRank

TOKENS, INPUTS, OUTPUTS, RANK = 40, 96, 64, 5


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    a = torch.randn(RANK, INPUTS, generator=make) / INPUTS**0.5
    return a.to(dtype), torch.randn(OUTPUTS, RANK, generator=make).to(dtype)


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(2)).to(dtype)


def exact(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x.double() @ a.double().T @ b.double().T


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("narrow", "most"), [(torch.bfloat16, 3e-5), (torch.float16, 2e-6)])
def test_the_intermediate_result_is_as_exact_as_the_square_of_the_precision(narrow: torch.dtype, most: float) -> None:
    a, b = factors()
    x = inputs(narrow)
    hidden = LowRank(a, b, narrow).hidden(x)
    expected = x.double() @ a.double().T
    assert error(hidden[:, :RANK].double() + hidden[:, RANK : 2 * RANK].double(), expected) < most
    assert torch.equal(hidden[:, 2 * RANK :], hidden[:, :RANK])
    assert error(hidden[:, :RANK], expected) > 20 * most, "the example needs no second number"


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(narrow: torch.dtype) -> None:
    a, b = factors()
    x, product = inputs(narrow), LowRank(a, b, narrow)
    y = torch.zeros(TOKENS, OUTPUTS, dtype=narrow)
    product.add_to(y, product.hidden(x))
    expected = exact(x, a, b)
    assert (y == expected.to(narrow)).double().mean() > 0.97
    naive = (x @ a.to(narrow).T @ b.to(narrow).T).double()
    assert (naive == expected.to(narrow)).double().mean() < 0.5, "the example is right without care"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32])
def test_factors_of_no_more_precision_enter_as_they_are(dtype: torch.dtype, factor: torch.dtype) -> None:
    a, b = factors(factor)
    x, product = inputs(dtype), LowRank(a, b, dtype)
    y = torch.ones(TOKENS, OUTPUTS, dtype=dtype)
    hidden = product.hidden(x)
    assert hidden.shape == (TOKENS, RANK)
    product.add_to(y, hidden)
    torch.testing.assert_close(y.double(), 1 + exact(x, a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["A", "B"])
def test_what_rounding_loses_of_a_factor_counts_in_full(which: int) -> None:
    given, x = list(factors()), inputs(torch.bfloat16)
    rounded = list(given)
    rounded[which] = given[which].bfloat16().float()
    results = []
    for a, b in (given, rounded):
        product = LowRank(a, b, torch.bfloat16)
        y = torch.zeros(TOKENS, OUTPUTS, dtype=torch.bfloat16)
        product.add_to(y, product.hidden(x))
        results.append(y.double())
    wanted = exact(x, *given) - exact(x, *rounded)
    slope = float(((results[0] - results[1]) * wanted).sum() / wanted.square().sum())
    assert slope == pytest.approx(1, abs=0.1)


def test_no_tokens() -> None:
    product = LowRank(*factors(), torch.bfloat16)
    y = torch.zeros(0, OUTPUTS, dtype=torch.bfloat16)
    product.add_to(y, product.hidden(torch.zeros(0, INPUTS, dtype=torch.bfloat16)))
    assert y.shape == (0, OUTPUTS)
