"""What rounding explains, where no GPU is needed to say it."""

from types import SimpleNamespace

import pytest
import torch

from grpo_lightning.diagnostics.rounding import MIN_APART, NOISE, computed_in, forward_rounding, rounding


@pytest.mark.parametrize(
    ("dtype", "device", "matmul", "expected"),
    [
        (torch.float32, "cuda", "highest", torch.float32),
        (torch.float32, "cuda", "ieee", torch.float32),
        (torch.float32, "cuda", "high", torch.float16),
        (torch.float32, "cuda", "medium", torch.float16),
        (torch.float32, "cuda", "tf32", torch.float16),
        (torch.float32, "cpu", "high", torch.float32),
        (torch.float64, "cuda", "high", torch.float64),
        (torch.bfloat16, "cuda", "high", torch.bfloat16),
    ],
)
def test_matrix_units_round_float32(dtype, device, matmul, expected):
    assert computed_in(dtype, device, matmul) is expected


class Model(torch.nn.Linear):
    def get_output_embeddings(self):
        return self


def a_run(device, dtype=torch.float32):
    policy = SimpleNamespace(causal_lm=Model(2, 2, dtype=dtype), has_adapter=False, trainable_parameters=dict)
    plugin = SimpleNamespace(train_step_context=lambda: torch.autocast("cpu", enabled=False))
    return SimpleNamespace(
        module=SimpleNamespace(policy=policy, device=torch.device(device)),
        trainer=SimpleNamespace(precision="32-true", precision_plugin=plugin),
        data=None,
    )


def use(setting):
    if setting == "torch.backends":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(setting)


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["high", "medium", "torch.backends"])
def test_what_was_chosen_counts_on_gpus_alone(setting):
    assert forward_rounding(a_run("cuda")) == NOISE[torch.float32]
    assert rounding(a_run("cuda")) == MIN_APART
    use(setting)
    assert forward_rounding(a_run("cuda")) == rounding(a_run("cuda")) == NOISE[torch.float16]
    assert forward_rounding(a_run("cpu")) == NOISE[torch.float32]
    assert rounding(a_run("cpu")) == MIN_APART


def test_two_programs_differ_by_more_than_one_from_itself():
    assert forward_rounding(a_run("cpu", torch.float64)) == NOISE[torch.float64] < rounding(a_run("cpu"))
    for dtype in (torch.float16, torch.bfloat16):
        assert forward_rounding(a_run("cpu", dtype)) == rounding(a_run("cpu", dtype)) == NOISE[dtype]
