"""Each preset trains, and the doctor finds nothing wrong with it."""

import pytest
from runs import MODEL, data, trainer

from benchmarks.faults.witness import Witness
from benchmarks.presets import PRESETS, settings
from grpo_lightning import GRPOModule, TransformersEngine


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(tiny_model, tmp_path, name):
    model, shaping = settings(name)
    shaping = {"updates_per_rollout": 2, **shaping}
    doctor = Witness(ascent_every=1)
    module = GRPOModule(tiny_model, **{**MODEL, **model})
    batches = data(TransformersEngine(dtype="float32"), samples_per_prompt=4, max_tokens=8, **shaping)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[doctor])
    fit.fit(module, datamodule=batches)
    assert fit.global_step == shaping["updates_per_rollout"]
    assert not doctor.findings
    assert not {check for check, count in doctor.counts.items() if count["fail"]}
    # What judges the loss that was declared had something to judge.
    assert doctor.counts["gradient"]["pass"] + doctor.counts["loss weights"]["pass"]
