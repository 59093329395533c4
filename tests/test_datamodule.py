"""Which tasks a rollout is made of, and how held-out tasks are scored."""

import pytest
from fakes import FakeEngine
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.player import request_seed
from grpo_lightning.tasks import SumTasks, sequential


def even(completion):
    return float(len(completion) % 2 == 0)


def run(tmp_path, model, engine, *, epochs=2, reward=even, **settings):
    rollouts = data(engine, reward, **{"samples_per_prompt": 2, **settings})
    fit = trainer(tmp_path, max_epochs=epochs)
    fit.fit(GRPOModule(model, **MODEL), rollouts)
    return fit, rollouts


class TestOrder:
    def test_rollouts_follow_the_order(self, tmp_path, tiny_model):
        seen = []

        def note(completion, task_id):
            seen.append(task_id)
            return even(completion)

        run(tmp_path, tiny_model, FakeEngine(), reward=note, order=sequential)
        assert sorted(seen[:8]) == sorted(["0+0", "0+1", "0+2", "0+3"] * 2)
        assert sorted(seen[8:]) == sorted(["0+4", "0+5", "1+0", "1+1"] * 2)

    def test_the_order_gets_position_size_and_seed(self, tmp_path, tiny_model):
        asked = []

        def order(position, size, seed):
            asked.append((position, size, seed))
            return 0

        run(tmp_path, tiny_model, FakeEngine(), order=order, seed=5, val_size=6)
        assert asked[-8:] == [(position, 30, 5) for position in range(8)]

    def test_a_wrong_order_is_refused_before_the_engine_starts(self, tmp_path, tiny_model):
        def one_based(position, size, seed):
            return size - position % size

        engine = FakeEngine()
        with pytest.raises(
            ConfigurationError, match="the order one_based .* of one of 36 tasks .* got 36 at position 0"
        ):
            run(tmp_path, tiny_model, engine, order=one_based)
        assert not engine.specs


class TestSampledEvaluation:
    def sampled(self, engine, temperature):
        return [(prompt, seed) for prompt, params, seed, *_ in engine.requests if params.temperature == temperature]

    def test_it_is_logged_beside_the_greedy_accuracy(self, tmp_path, tiny_model):
        engine = FakeEngine()
        trainer, _ = run(tmp_path, tiny_model, engine, val_size=5, val_samples=6, val_batch_size=2, epochs=1)
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        assert set(metrics) == {
            *("val/reward", "val/accuracy", "val/reward_even"),
            *("val/avg_at_6", "val/pass_at_2", "val/pass_at_4", "val/pass_at_6"),
        }
        assert 0 < metrics["val/avg_at_6"] < metrics["val/pass_at_2"] < metrics["val/pass_at_4"]
        assert metrics["val/pass_at_4"] <= metrics["val/pass_at_6"] <= 1

    def test_the_mean_runs_over_all_tasks_whatever_the_batches(self, tmp_path, tiny_model):
        found = []
        for size in (2, 5):
            trainer, _ = run(
                tmp_path, tiny_model, FakeEngine(), val_size=5, val_samples=4, val_batch_size=size, epochs=1
            )
            found.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")})
        assert found[0] == pytest.approx(found[1])

    def test_evaluations_use_the_same_seeds_at_the_asked_temperature(self, tmp_path, tiny_model):
        engine = FakeEngine()
        _, data = run(tmp_path, tiny_model, engine, val_size=3, val_samples=4, val_temperature=0.7, seed=9)
        requests = self.sampled(engine, 0.7)
        size = 3 * 4
        # The sanity check evaluates once, each of the two epochs once more.
        assert len(requests) == 3 * size
        assert requests[:size] == requests[size : 2 * size] == requests[2 * size :]
        names = [data.val_tasks[i].id for i in range(3)]
        assert {seed for _, seed in requests} == {request_seed("9/val", name, n, 0) for name in names for n in range(4)}

    def test_greedy_answers_alone_by_default(self, tmp_path, tiny_model):
        engine = FakeEngine()
        trainer, _ = run(tmp_path, tiny_model, engine, val_size=3, epochs=1, temperature=0.5)
        assert {params.temperature for _, params, *_ in engine.requests} == {0.0, 0.5}
        assert not any("_at_" in name for name in trainer.callback_metrics)

    @pytest.mark.parametrize(
        ("val_size", "val_batch_size", "val_samples", "expected"),
        [(0, 128, 8, 8), (3, 128, 0, 8), (20, 10, 0, 10), (3, 128, 8, 24), (20, 2, 8, 16), (20, 2, 2, 8)],
    )
    def test_the_engine_knows_how_much_comes_at_once(
        self, tmp_path, tiny_model, val_size, val_batch_size, val_samples, expected
    ):
        engine = FakeEngine()
        run(
            tmp_path,
            tiny_model,
            engine,
            epochs=0,
            val_size=val_size,
            val_batch_size=val_batch_size,
            val_samples=val_samples,
        )
        assert engine.specs[0].max_concurrency == expected

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"val_samples": 1}, r"val_samples to be 0 \(greedy answers only\) or at least 2, but got 1"),
            ({"val_samples": -2}, "at least 2, but got -2"),
            ({"val_temperature": 0.0}, "val_temperature > 0 and finite, but got 0.0"),
        ],
    )
    def test_bad_settings_are_refused(self, settings, message):
        with pytest.raises(ConfigurationError, match=message):
            RolloutDataModule(SumTasks(5), even, engine=FakeEngine(), **settings)
