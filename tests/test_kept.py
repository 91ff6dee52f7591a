"""What an initial model answered is kept for runs that begin alike, for no others, and never by half."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_module, method_callbacks
from monitoring import plain
from test_retention import END, START, Exam, MakeTrainer, other, short

from mifo_lightning.common.errors import InputError
from mifo_lightning.monitors import divergence
from mifo_lightning.monitors.kept import kept, settings
from mifo_lightning.monitors.retention import Retention
from mifo_lightning.policy.loading import export_model, load_policy, load_tokenizer
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.contains import ContainsReward
from mifo_lightning.rewards.function import FunctionReward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.math_reward import MathReward
from mifo_lightning.rewards.weighted import WeightedRewards
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.evaluation import Evaluation
from mifo_lightning.steps.optimizer import AdamWSettings, OptimizerSettings


def test_runs_that_begin_alike_ask_the_initial_model_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(monitor: Retention, **changes: Any) -> dict[str, Any]:
        make_trainer([*method_callbacks(), monitor]).fit(make_module(**changes), datamodule=short())
        return plain(monitor.summary())

    def monitor(**changes: Any) -> Retention:
        return Retention(**{"questions": 4, "samples": 2, "at_least": 0.0, "cache": str(tmp_path / "kept"), **changes})

    def files() -> int:
        return len(list((tmp_path / "kept").iterdir()))

    fresh = fit(monitor(cache=None))
    first, second = fit(monitor()), fit(monitor())
    assert fresh == first
    assert (first["responses"], second.pop("responses")) == (8 * 8, 8 * 2)
    assert second == {name: value for name, value in first.items() if name != "responses"}
    faster = {"rl": AdamWSettings(lr=0.01), "sft": AdamWSettings(lr=0.01)}
    assert fit(monitor(), **faster)["responses"] == 8 * 2  # how it goes on does not matter
    torch.manual_seed(0)
    export_model(other(load_policy("embedded")), load_tokenizer("embedded"), tmp_path / "moved", write=True)
    for changes, module in (
        ({}, {"model": str(tmp_path / "moved")}),
        ({}, {"seed": 5}),
        ({}, {"evaluation": Evaluation(sampling=Sampling(max_new_tokens=13))}),
        ({"samples": 3}, {}),
        ({"tokens": 3}, {}),
        ({"reward": ContainsReward()}, {}),
        ({"questions": 5}, {}),
        ({}, {"evaluation": Evaluation(sampling=Sampling(max_new_tokens=14, stop=["9"]))}),
        ({}, {"success_threshold": 0.5}),
        ({}, {"reward": LastAnswerReward(answer_after="=")}),
    ):
        other_one, before = monitor(**changes), files()
        assert fit(other_one, **module)["responses"] == 2 * other_one.questions * 4 * other_one.samples, changes
        assert files() == before + 2, (changes, module)  # answers, and the KL of the initial model to itself: its own
    assert files() == 2 * 11


class Close(Reward):
    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [float(abs(float(r) - float(t)) <= self._tolerance) for r, t in zip(responses, truths, strict=True)]


def test_what_is_compared_is_the_same_in_every_process_and_tells_options_apart() -> None:
    program = (
        "import json; from mifo_lightning.monitors.kept import settings; "
        "from mifo_lightning.rewards.math_reward import MathReward; "
        "from mifo_lightning.rewards.weighted import FormatReward, WeightedRewards; "
        "print(json.dumps(settings(WeightedRewards({'a': MathReward(), 'b': MathReward(timeout=3.0)}))))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = settings(WeightedRewards({"a": MathReward(), "b": MathReward(timeout=3.0)}))
    assert told == json.dumps(here) + "\n"  # its hashes are others than those of this process
    assert here[1]["rewards"]["b"][1]["timeout"] == 3.0
    assert settings({"options": ["x", "y"]}) != settings({"options": ["y", "x"]})
    assert settings(Close(0.1)) != settings(Close(0.5))  # what a user's class keeps under a private name
    with pytest.raises(InputError, match="a function is no setting that can be compared"):
        settings(FunctionReward(lambda responses, truths: [0.0] * len(responses)))


def test_a_run_whose_beginning_is_not_known_asks_for_itself(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for _ in range(2):
        monitor = Retention(questions=2, samples=2, cache=str(tmp_path / "kept"))
        with pytest.warns(UserWarning, match="retention.cache: not used, since Exam may draw otherwise another time"):
            make_trainer([monitor]).fit(make_module(engine=Exam(START, END)), datamodule=short())
        assert monitor.responses == 4 * 8
    assert not list((tmp_path / "kept").iterdir())


def test_many_runs_may_keep_the_same_answers_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(2)

    def run() -> None:
        together.wait(60)
        for number in range(300):
            kept(str(tmp_path), {"number": number}, lambda: [{"shares": [0.5] * 99}] * 20)

    runs = [fork.Process(target=run) for _ in range(2)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(60)
    assert [process.exitcode for process in runs] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 300


def test_answers_that_cannot_be_read_or_kept_are_one_line(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(cache: Path) -> None:
        make_trainer([Retention(2, samples=1, cache=str(cache))]).fit(make_module(), datamodule=short())

    fit(tmp_path / "kept")
    (file,) = (file for file in (tmp_path / "kept").iterdir() if "shares" in file.read_text(encoding="utf-8"))
    about = json.dumps(json.loads(file.read_text(encoding="utf-8"))["about"])
    for text in ("{", "[]", "{}", '{"about": "x", "found": []}', f'{{"about": {about}, "found": "x"}}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=rf"retention.cache: .*{file.name}: \w+: .*; remove it") as caught:
            kept(str(tmp_path / "kept"), json.loads(json.loads(about)), list)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=rf"retention.cache: .*{file.name}"):
        fit(tmp_path / "kept")
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"retention.cache: .*taken"):
        fit(tmp_path / "taken")


def test_a_kl_without_a_trained_model_is_kept_for_its_weights_and_found_anew_where_it_cannot_be_read(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 1):
        beside = other(load_policy("embedded"), size=0.05 + number / 10)
        export_model(beside, load_tokenizer("embedded"), tmp_path / str(number), write=True)
    computed: list[bool] = []
    exact = divergence.exact_kl
    monkeypatch.setattr(divergence, "exact_kl", lambda *given: (computed.append(given[-1]), exact(*given))[1])

    def fit(beside: int, cache: str | None = str(tmp_path / "kept"), lr: float = 1e-3) -> tuple[dict[str, float], int]:
        monitor = Retention(4, samples=1, cache=cache, others={"it": str(tmp_path / str(beside))})
        settings = AdamWSettings(lr=lr)
        module = make_module(optimizer=OptimizerSettings(rl=settings, sft=settings))
        computed.clear()
        make_trainer([*method_callbacks(), monitor]).fit(module, datamodule=short())
        return {name: value for name, value in monitor.final_metrics().items() if "kl" in name}, len(computed)

    alone, passes = fit(0, None)
    assert passes == 4
    assert fit(0) == (alone, 4)
    assert fit(0) == (alone, 2)  # those of the trained model
    faster, passes = fit(0, lr=1e-2)
    assert passes == 2
    assert faster["retention/kl"] != alone["retention/kl"]
    assert {faster[f"retention/{name}"] == alone[f"retention/{name}"] for name in ("kl_floor", "kl_to_it")} == {True}
    assert fit(1)[1] == 3  # another model beside it
    for file in (tmp_path / "kept").iterdir():
        if "shares" not in file.read_text(encoding="utf-8"):
            file.write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="found anew"):
        assert fit(0) == (alone, 4)
    assert fit(0) == (alone, 2)
