"""Evaluation: written-down responses give known numbers, and demonstrations are scored token by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_module
from lightning import Trainer

from mifo_callbacks import Seed
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.skills import Skills
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.evaluation import Evaluation, EvaluationSampling, Evaluator
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder

RIGHT, WRONG, CUT, BARE = "1>7<eos>", "1>8<eos>", "1>7", "8<eos>"  # CUT is right but never ends
SAMPLED = {
    "1+1=": [RIGHT, RIGHT, RIGHT, WRONG],
    "2+2=": [WRONG, WRONG, WRONG, CUT],
    "3+3=": [RIGHT, WRONG, CUT, BARE],
    "4x4=": [RIGHT, RIGHT, RIGHT, RIGHT],
}
GREEDY = {"1+1=": [WRONG], "2+2=": [CUT], "3+3=": [RIGHT], "4x4=": [WRONG]}


class Scripted:
    """Answers each prompt with what is written down for it, and notes how it was asked."""

    def __init__(self, sampled: dict[str, list[str]], greedy: dict[str, list[str]]) -> None:
        self.sampled, self.greedy = sampled, greedy
        self.asked: list[tuple[list[int], int, Sampling]] = []

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: list[int], samples: int, sampling: Sampling
    ) -> list[list[Completion]]:
        self.asked.append((keys, samples, sampling))
        book = self.greedy if sampling.temperature == 0 else self.sampled
        return [[completion(tokenizer, text) for text in book[tokenizer.decode(p)]] for p in prompts]


class Plain:
    """Answers every question with the sum of its two numbers, right for addition and wrong for the mirrored one."""

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Any
    ) -> list[list[Completion]]:
        texts = [tokenizer.decode(p).rstrip("=").replace("x", "+") for p in prompts]
        sums = [f">{sum(map(int, text.split('+'))):04d}<eos>" for text in texts]
        return [[completion(tokenizer, text)] * samples for text in sums]


class Tenths(Reward):
    """A graded reward: the response is the number of tenths."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [int(response) / 10 for response in responses]


def completion(tokenizer: Any, text: str) -> Completion:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return Completion(tokens, [-1.0] * len(tokens), text.endswith("<eos>"))


def question(
    tokenizer: Any, text: str, number: int = 0, demonstration: str | None = None, source: str = ""
) -> Question:
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in (text, demonstration or "")]
    return Question(number, source, text, ids[0], "7", ids[1] or None)


def evaluator(engine: Any, tokenizer: Any, reward: Reward | None = None, **changes: Any) -> Evaluator:
    success_threshold, seed = changes.pop("success_threshold", 1.0), Seed(changes.pop("seed", 0), "seed")
    settings = Evaluation(**{"samples": 4, "sampling": Sampling(0.6, max_new_tokens=14), **changes})
    return Evaluator(Responder(engine, tokenizer, reward or LastAnswerReward(), success_threshold, seed), settings)


def nll(policy: Policy, q: Question) -> list[float]:
    """Negative log-likelihood in nats of each demonstration token, from the logits of the bare model."""
    assert q.demonstration is not None
    with torch.no_grad():
        logp = policy.model(torch.tensor([q.prompt + q.demonstration])).logits[0].log_softmax(-1)
    return [-logp[len(q.prompt) - 1 + t, token].item() for t, token in enumerate(q.demonstration)]


def numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


def test_every_number_of_an_evaluation(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    a = [question(tokenizer, text, i) for i, text in enumerate(list(SAMPLED)[:3])]
    b = question(tokenizer, "4x4=", 0, "1>7<eos>")
    judge = evaluator(Scripted(SAMPLED, GREEDY), tokenizer)
    judge.reset(["a"], cpu)
    judge.update(policy, a[:1], 0)  # of an evaluation before, which `reset` ends
    judge.reset(["a", "b"], cpu)
    judge.update(policy, a[:2], 0)
    judge.update(policy, [b], 1)
    judge.update(policy, a[2:], 0)
    loss = sum(nll(policy, b)) / 4
    expected = {
        # right of 4: 3, 0 and 1 in a, 4 in b; what was cut off is wrong
        "a": {"avg@4": 4 / 12, "pass@2": (1 + 0 + 1 / 2) / 3, "pass@4": 2 / 3, "greedy": 1 / 3},
        "b": {"avg@4": 1.0, "pass@2": 1.0, "pass@4": 1.0, "greedy": 0.0},
        "": {"avg@4": 8 / 16, "pass@2": (1 + 0 + 1 / 2 + 1) / 4, "pass@4": 3 / 4, "greedy": 1 / 4},
    }
    expected["a"] |= {"length": (16 + 15 + 13) / 12, "truncated": 2 / 12}
    expected["b"] |= {"length": 16 / 4, "truncated": 0.0, "demonstration_loss": loss}
    expected[""] |= {"length": 60 / 16, "truncated": 2 / 16, "demonstration_loss": loss}
    flat = {"/".join(filter(None, ("val", s, m))): x for s, ms in expected.items() for m, x in ms.items()}
    for m in expected[""]:
        each = [expected[s][m] for s in ("a", "b") if m in expected[s]]
        flat[f"val/{m}_macro"] = sum(each) / len(each)
    assert numbers(judge.compute("val")) == pytest.approx(flat)


@pytest.mark.parametrize(
    ("samples", "greedy", "names"),
    [
        (0, True, {"greedy"}),
        (1, False, {"avg@1"}),
        (2, True, {"greedy", "avg@2", "pass@2"}),
        (5, False, {"avg@5", "pass@2", "pass@4", "pass@5"}),
        (8, False, {"avg@8", "pass@2", "pass@4", "pass@8"}),
    ],
)
def test_pass_at_k_is_reported_for_powers_of_two_and_for_all_samples(
    policy: Policy, tokenizer: Any, cpu: torch.device, samples: int, greedy: bool, names: set[str]
) -> None:
    engine = Scripted({"1+1=": [RIGHT] * samples}, {"1+1=": [CUT]})
    judge = evaluator(engine, tokenizer, samples=samples, greedy=greedy)
    judge.reset(["a"], cpu)
    judge.update(policy, [question(tokenizer, "1+1=")], 0)
    values = numbers(judge.compute("test"))
    assert {name for name in values if name.count("/") == 1} == {f"test/{n}" for n in names | {"length", "truncated"}}
    # length and truncation are those of the samples; of the greedy response only where there are none
    assert values["test/truncated"] == float(samples == 0)
    assert values["test/length"] == (3 if samples == 0 else 4)


def test_the_greedy_response_is_drawn_at_temperature_0(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    engine = Scripted(SAMPLED, GREEDY)
    sampling = Sampling(0.6, top_p=0.9, max_new_tokens=5, stop=["9"])
    judge = evaluator(engine, tokenizer, sampling=sampling)
    judge.reset(["a"], cpu)
    judge.update(policy, [question(tokenizer, "1+1=")], 0)
    (_, n_sampled, sampled), (_, n_greedy, greedy) = engine.asked
    assert (n_sampled, sampled) == (4, sampling)
    assert (n_greedy, greedy.temperature, greedy.max_new_tokens, greedy.stop) == (1, 0.0, 5, ["9"])


def test_every_evaluation_draws_with_the_same_keys_one_for_each_question(
    policy: Policy, tokenizer: Any, cpu: torch.device
) -> None:
    def keys(seed: int) -> list[int]:
        engine = Scripted(SAMPLED, GREEDY)
        judge = evaluator(engine, tokenizer, greedy=False, seed=seed)
        for _ in range(2):
            judge.reset(["a", "b"], cpu)
            judge.update(policy, [question(tokenizer, "1+1=", i, source="a") for i in range(3)], 0)
            judge.update(policy, [question(tokenizer, "1+1=", i, source="b") for i in range(3)], 1)
        asked = [key for keys, _, _ in engine.asked for key in keys]
        assert asked[:6] == asked[6:]
        return asked[:6]

    first, other = keys(seed=0), keys(seed=1)
    assert len({*first, *other}) == 12


def test_a_graded_response_is_right_from_solved_at_on(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    engine = Scripted({"1+1=": ["4<eos>", "5<eos>", "6<eos>", "9"]}, {"1+1=": ["5<eos>"]})
    judge = evaluator(engine, tokenizer, Tenths(), success_threshold=0.5)
    judge.reset(["a"], cpu)
    (sample,) = judge.update(policy, [question(tokenizer, "1+1=")], 0)
    values = numbers(judge.compute("val"))
    assert (values["val/avg@4"], values["val/greedy"]) == (0.5, 1.0)
    assert sample["reward"] == 0.4


def test_the_loss_on_demonstrations_is_a_mean_over_tokens(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    shown = [("1+1=", "7<eos>"), ("22+22=", "404040>0404<eos>"), ("3+3=", "6>7<eos>"), ("4+4=", None)]
    qs = [question(tokenizer, text, i, demonstration) for i, (text, demonstration) in enumerate(shown)]
    losses = [nll(policy, q) for q in qs[:3]]
    over_tokens = sum(map(sum, losses)) / sum(map(len, losses))
    assert over_tokens != pytest.approx(sum(sum(x) / len(x) for x in losses) / 3, rel=0.05)
    for parts in ([qs], [qs[:1], qs[1:]], [[q] for q in qs]):
        judge = evaluator(InProcessEngine(), tokenizer, samples=1, greedy=False)
        judge.reset(["a"], cpu)
        for part in parts:
            judge.update(policy, part, 0)
        values = numbers(judge.compute("val"))
        assert values["val/a/demonstration_loss"] == pytest.approx(over_tokens, rel=1e-4)
        assert values["val/demonstration_loss"] == values["val/a/demonstration_loss"]


def test_the_loss_on_demonstrations_can_be_switched_off(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    judge = evaluator(Scripted(SAMPLED, GREEDY), tokenizer, demonstration_loss=False)
    judge.reset(["a"], cpu)
    judge.update(policy, [question(tokenizer, "1+1=", 0, RIGHT)], 0)
    assert not [name for name in judge.compute("val") if "demonstration" in name]


def test_a_batch_without_questions_changes_nothing(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    qs = [question(tokenizer, "12+34=", 0, "604000>0046<eos>")]
    values = []
    for parts in ([qs], [[], qs, []]):
        judge = evaluator(InProcessEngine(), tokenizer)
        judge.reset(["a"], cpu)
        samples = [judge.update(policy, part, 0) for part in parts]
        assert [len(s) for s in samples] == [len(part) for part in parts]
        values.append(numbers(judge.compute("val")))
    assert values[0] == values[1]
    judge.reset(["a"], cpu)
    judge.update(policy, [], 0)
    assert judge.compute("val") == {}


@pytest.mark.parametrize("samples", [4, 0])
def test_one_graded_response_of_each_question_is_handed_on_as_text(
    policy: Policy, tokenizer: Any, cpu: torch.device, samples: int
) -> None:
    judge = evaluator(Scripted(SAMPLED, GREEDY), tokenizer, samples=samples)
    judge.reset(["a"], cpu)
    qs = [question(tokenizer, text, source="a") for text in ("1+1=", "2+2=", "3+3=")]
    texts, rewards = (("1>7", "1>8", "1>7"), (1, 0, 1)) if samples else (("1>8", "1>7", "1>7"), (0, 0, 1))
    assert judge.update(policy, qs, 0) == [
        {
            "source": "a",
            "prompt": q.text,
            "response": text,
            "truth": "7",
            "reward": reward,
            "length": 3 if cut else 4,
            "truncated": cut,
        }
        for q, text, reward, cut in zip(qs, texts, rewards, (False, not samples, False), strict=True)
    ]


def test_scores_keep_to_their_sources_under_the_trainer(make_trainer: Callable[..., Trainer]) -> None:
    module = make_module(engine=Plain(), evaluation=Evaluation(samples=2, sampling=SAMPLING))
    rows = {name: Skills(["addition", "mirrored"], 10, split=name) for name in ("val", "test")}  # type: ignore[arg-type]
    data = make_data(**rows, holdout=12, eval_batch=4)
    trainer = make_trainer(limit_val_batches=1.0)
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        values = run(module, data, verbose=False)[0]
        for metric in ("avg@2", "pass@2", "greedy"):
            assert values[f"{stage}/addition/{metric}"] == 1
            assert values[f"{stage}/mirrored/{metric}"] == 0
        sources = {name.split("/")[1] for name in values if name.count("/") == 2}
        held_out = {"addition-holdout", "mirrored-holdout"} if stage == "val" else set()
        assert sources == {"addition", "mirrored"} | held_out
        assert values.keys() >= {f"{stage}/{metric}" for metric in ("avg@2", "pass@2", "greedy", "length")}
        if stage == "test":
            assert values["test/avg@2"] == 0.5


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": -1}, r"model\.evaluation\.samples: -1"),
        ({"samples": 0, "greedy": False}, r"model\.evaluation\.samples: 0"),
        ({"samples": 2, "sampling": Sampling(0.0)}, r"samples: 2 .* temperature 0"),
    ],
)
def test_an_evaluation_that_measures_nothing_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_module(evaluation=Evaluation(**settings))


def test_what_evaluation_leaves_open_follows_the_rollouts() -> None:
    """Length and stop strings are the task's; temperature is evaluation's own."""
    rollouts = Sampling(max_new_tokens=24, stop=["9"])
    followed = make_module(sampling=rollouts, evaluation=Evaluation()).evaluator.sampling
    assert followed == Sampling(0.6, max_new_tokens=24, stop=["9"])
    own = EvaluationSampling(temperature=1.0, top_p=0.9, top_k=5, max_new_tokens=7, stop=[])
    assert make_module(sampling=rollouts, evaluation=Evaluation(sampling=own)).evaluator.sampling == Sampling(
        1.0, 0.9, 5, 7, []
    )


def test_the_macro_mean_counts_every_source_the_same(policy: Policy, tokenizer: Any, cpu: torch.device) -> None:
    judge = evaluator(Scripted(SAMPLED, GREEDY), tokenizer, demonstration_loss=False)
    judge.reset(["a", "b"], cpu)
    judge.update(policy, [question(tokenizer, text, i) for i, text in enumerate(list(SAMPLED)[:3])], 0)
    judge.update(policy, [question(tokenizer, "4x4=", 3)], 1)
    found = numbers(judge.compute("val"))
    assert found["val/avg@4_macro"] == pytest.approx((found["val/a/avg@4"] + found["val/b/avg@4"]) / 2)
    assert found["val/avg@4_macro"] == pytest.approx((4 / 12 + 1) / 2)
    assert found["val/avg@4"] == pytest.approx(8 / 16)
    assert found["val/length_macro"] == pytest.approx((found["val/a/length"] + found["val/b/length"]) / 2)
