"""Records of the doctor as runs leave them, made up, for tests of what is done with them."""

import math
import random

from grpo_lightning.diagnostics.conclusion import diagnose
from grpo_lightning.diagnostics.record import Record
from grpo_lightning.diagnostics.verdict import Status, Verdict

STALE = Verdict(
    "canary",
    Status.FAIL,
    "The engine serves an older policy than it reports: what it answers is the version before the last update.",
    "Look at LoRAWeightSync.publish and at the engine's name of the adapter: a name that is used again answers with "
    "the weights that were loaded first.",
    {"alpha": 0.012, "standard error of alpha": 0.021, "standard errors from 1": 47.0, "limit": 5.3, "tokens": 512},
    cause="sync_stale",
    ruled_out=(
        "a declared lag: LoRAWeightSync(max_lag=0)",
        "bfloat16 noise: alpha is 47 standard errors from 1, and the noise floor is in the error",
    ),
)
MISMATCH = Verdict(
    "mismatch",
    Status.FAIL,
    "Trainer and engine disagree by 0.31 nats.",
    "Compare temperature and adapter.",
    {"RMS difference (nats)": 0.31, "limit (nats)": 0.05},
    cause="mismatch",
)


def passing(check):
    return Verdict(check, Status.PASS)


def silent(check, why):
    return Verdict(check, Status.NO_POWER, why)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def parts(*, faulty=False):
    """Facts of the doctor's parts."""
    rng = random.Random(1)
    edges = [-2.0, -1.0, -0.3, -0.1, -0.03, -0.01, -0.003, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0]
    widths = {"0": 1.0, "1": 2.0, "2": 2.7, "3": 3.2}
    by_k = {k: [round(4000 * math.exp(-(((i - 6) / w) ** 2))) for i in range(13)] for k, w in widths.items()}
    alpha = 0.012 if faulty else 0.996
    canary = [
        {
            "version": v,
            "alpha": None if v == 0 else alpha + rng.gauss(0, 0.25 / v),
            "alpha_se": 0.25 / max(v, 1),
            "beta": None if v == 0 else 1 - (1 - alpha) / v + rng.gauss(0, 0.05 / v),
            "beta_se": 0.05 / max(v, 1),
            "mismatch": 0.02,
        }
        for v in range(0, 32, 2)
    ]
    families = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    markers = [{"family": f, "slope": 1 + rng.gauss(0, 0.004), "se": 0.004, "effect": 0.8} for f in families]
    markers += [{"family": "mlp.up_proj", "slope": 0.02 if faulty else 0.998, "se": 0.005, "effect": 0.7}]
    markers += [{"family": "mlp.down_proj", "slope": None, "se": None, "effect": 0.0}]
    surprisal, z = [], 0.0
    for update in range(32):
        z += rng.gauss(0, 0.5)
        expected = 1.4 - 0.02 * update
        surprisal.append({"update": update, "z": z, "observed": expected + rng.gauss(0, 0.03), "expected": expected})
    shares = {"noise": 0.71, "staleness": 0.12, "temperature": 0.08, "truncation": 0.05, "retokenisation": 0.0}
    return {
        "engine": {"noise_floor": 0.0021, "canary": canary, "markers": markers, "preflight_seconds": 12.1},
        "sampling": {
            "attribution": {**shares, "missing": 0.0, "unexplained": 0.04},
            "surprisal": surprisal,
            "log_ratio_histograms": {"edges": edges, "by_k": by_k},
        },
        "step": {
            "ascent": [
                {"update": u, "observed": rng.gauss(-0.02, 0.004), "predicted": -0.02, "se": 0.003}
                for u in range(0, 32, 4)
            ]
        },
        "rollout": {"rollouts": [{"number": n, "without_variance": 0.1, "distinct": 0.9} for n in range(16)]},
        "other": {"series": [{"update": u, "something": u % 3} for u in range(32)]},
    }


def content(record, *, source="run", ended_by="", facts=None):
    return record.content(
        source=source,
        run={"model": "SmolLM2-135M-Instruct", "ended_by": ended_by},
        versions={"grpo-lightning": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0"},
        settings={"min_std": 1e-4, "reactions": {}, "thresholds": {"z": 5.3, "tokens": 32}},
        parts=parts() if facts is None else facts,
    )


def healthy_record(updates=32):
    """A run of 16 epochs in which every check passed or could not tell."""
    clock, rng = Clock(), random.Random(0)
    record = Record(clock)
    for update in range(updates):
        clock.now += 11.0
        k = update % 2
        record.add_update(
            update,
            {
                "ppo/ratio_std": 0.006 + 0.001 * rng.random() if k else 2e-5 * (1 + rng.random()),
                "ppo/clip_fraction_low": 0.004 * k * rng.random(),
                "ppo/clip_fraction_high": 0.008 * k * rng.random(),
                "ppo/kl_k3": 2e-5 + 4e-4 * k * rng.random(),
                "policy/entropy": 1.4 - 0.02 * update + 0.05 * rng.random(),
                "policy/grad_norm": 0.3 + 0.1 * rng.random(),
                **({} if k else {"mismatch/logprob_abs_mean": 0.0018 + 0.0004 * rng.random()}),
            },
        )
        ratio = passing("ratio") if k else silent("ratio", "First update after sampling: a ratio of 1 is right.")
        names = ("finite", "finite gradient", "old logprobs", "sampler logprobs", "alignment", "mismatch")
        record.add_verdicts(update, [*map(passing, names), ratio], None)
        record.add_verdicts(update + 1, [passing("parameters move")], None)
        if k:
            reward = 1 - math.exp(-update / 12) + 0.04 * rng.random()
            length = 12 - 0.1 * update
            record.add_epoch(
                update // 2 + 1,
                update + 1,
                {"reward/mean": reward, "completion/length_mean": length, "completion/length_max": 20.0},
            )
    why = "All weights are trained: there is no base model beside the policy to tell it from."
    record.add_verdicts(updates, [silent("served adapter", why)], None)
    return content(record)


def failed_record():
    """A run that was halted, with a symptom, two hours and a half after its check last passed."""
    clock = Clock()
    record = Record(clock)
    record.add_verdicts(0, [passing("canary"), passing("mismatch")], None)
    record.add_update(0, {"policy/entropy": 1.2, "ppo/ratio_std": 2e-5})
    clock.now = 9000.0
    verdicts = [passing("published adapter"), STALE, MISMATCH, silent("prefix cache", "No prefix was cached yet.")]
    diagnosis = diagnose(verdicts, {})
    record.add_verdicts(8, verdicts, diagnosis, str(diagnosis))
    return content(record, ended_by="DegeneracyError", facts=parts(faulty=True))
