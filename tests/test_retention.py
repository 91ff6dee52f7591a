"""What a run forgets beyond chance, how far it moves on old prompts, and how well RL still learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from monitoring import Records, answer, plain
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.retention import Retention
from mifo_lightning.monitors.summary import RunSummary
from mifo_lightning.monitors.transitions import transitions
from mifo_lightning.policy.adapter import Adapter
from mifo_lightning.policy.head import LogitTransform
from mifo_lightning.policy.loading import Loaded, export_model, load_policy, load_tokenizer
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.scoring import exact_kl
from mifo_lightning.rewards.contains import ContainsReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.steps.optimizer import AdamWSettings

MakeTrainer = Callable[..., Trainer]
VAL = Skills(["addition", "mirrored"], 16, split="val")
BASE = Path(__file__).parents[1] / "mifo_lightning" / "assets" / "base"
STILL = {"rl": AdamWSettings(lr=0.0), "sft": AdamWSettings(lr=0.0)}


# --- the estimator ----------------------------------------------------------------------------------------------------


def simulated(
    p: Tensor, after: Tensor, at_least: float = 0.25, repetitions: int = 100, samples: int = 8
) -> dict[str, float]:
    """Means over many experiments with questions that are answered with these probabilities."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for _ in range(repetitions):
        chosen, a, b, c = (
            torch.bernoulli(x[:, None].expand(-1, samples), generator=generator).mean(-1) for x in (p, p, p, after)
        )
        shares = [s for s, often in zip(torch.stack([a, b, c], 1).tolist(), chosen >= at_least, strict=True) if often]
        for name, value in (
            transitions(shares) | {"naive": sum(x * (1 - z) for x, _, z in shares) / len(shares)}
        ).items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / repetitions for name, values in found.items()}


def test_a_model_that_forgets_nothing_loses_nothing_though_its_samples_change() -> None:
    found = simulated(torch.full((200,), 0.6), torch.full((200,), 0.6))
    assert found["naive"] == pytest.approx(0.24, abs=0.005)
    assert found["floor"] == pytest.approx(0.24, abs=0.005)
    assert abs(found["lost"]) < 0.003
    assert abs(found["gained"]) < 0.003


def test_a_known_drop_and_a_known_rise_are_found() -> None:
    """Half of the questions fall from .8 to .5, the others rise from .5 to .7."""
    p, after = torch.tensor([0.8, 0.5]).repeat(100), torch.tensor([0.5, 0.7]).repeat(100)
    found = simulated(p, after, at_least=0.0)
    assert found["lost"] == pytest.approx((0.8 * 0.3 - 0.5 * 0.2) / 2, abs=0.004)
    assert found["gained"] == pytest.approx((-0.2 * 0.3 + 0.5 * 0.2) / 2, abs=0.004)


def test_transitions_by_hand() -> None:
    found = transitions([[1.0, 0.5, 0.0], [0.5, 1.0, 1.0]])
    assert found == pytest.approx(
        {"questions": 2, "before": 0.75, "after": 0.5, "lost": 0.25, "gained": 0.0, "floor": 0.25}
        | {"lost_se": 0.25, "gained_se": 0.0}
    )
    assert found["lost"] - found["gained"] == found["before"] - found["after"]
    assert transitions([[1.0, 1.0, 0.0]]).keys() == found.keys() - {"lost_se", "gained_se"}
    assert transitions([]) == {"questions": 0}


# --- the divergence ---------------------------------------------------------------------------------------------------


def sequences() -> Sequences:
    prompts, responses = [[5, 6, 7], [8, 9], [4], [10, 11, 12, 13]], [[6, 7], [9, 8, 7, 5, 1], [5, 5, 5], [4]]
    return Sequences.pack(prompts, responses, 0)


def other(policy: Policy, size: float = 0.05) -> Policy:
    """Another model of the same shape."""
    torch.manual_seed(0)
    moved = load_policy("embedded")
    with torch.no_grad():
        for p in moved.parameters():
            p += size * torch.randn_like(p) * p.std()
    return moved


@torch.no_grad()
def naive(p: Policy, q: Policy, given: Sequences, scale: float = 1.0) -> Tensor:
    """KL(p || q) [B, L] in fp64, row by row, from all logits of the whole models."""
    kl = torch.zeros(given.mask().shape, dtype=torch.float64)
    for i, (tokens, prompt, length) in enumerate(zip(*given, strict=True)):
        n, m = int(prompt), int(length)
        a, b = (
            (x.model(input_ids=tokens[None, : n + m]).logits[0, n - 1 : n + m - 1].double() * s).log_softmax(-1)
            for x, s in ((p, 1.0), (q, scale))
        )
        kl[i, :m] = (a.exp() * (a - b)).sum(-1)
    return kl


def test_the_kl_is_that_of_the_whole_distributions(policy: Policy) -> None:
    given, moved = sequences(), other(policy)
    found = exact_kl(policy, moved, given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive(policy, moved, given), rtol=1e-4, atol=1e-7)
    assert found[given.mask()].min() > 0
    assert not found[~given.mask()].any()
    assert not torch.allclose(found, exact_kl(moved, policy, given), rtol=0.01)  # it has a direction
    assert not exact_kl(policy, policy, given).any()
    assert exact_kl(policy, policy, given, regrouped=True).max() < 1e-9


def test_the_kl_is_right_where_models_hardly_agree_and_where_they_hardly_differ(policy: Policy) -> None:
    given, far, near = sequences(), other(policy), other(policy, size=1e-5)
    assert far.transform == LogitTransform()
    far.transform = LogitTransform(scale=40.0)  # probabilities of 0 in fp32 on both sides
    torch.testing.assert_close(
        exact_kl(policy, far, given).double(), naive(policy, far, given, 40.0), rtol=1e-4, atol=0
    )
    back, bits = exact_kl(far, policy, given), 20  # of nats that no distribution of 24 tokens reaches by its entropy
    assert back.isfinite().all()
    assert back.max() < bits
    tiny, exact = exact_kl(policy, near, given).double(), naive(policy, near, given)
    assert 1e-12 < float(exact.sum()) < 1e-6
    assert float(tiny.sum()) == pytest.approx(float(exact.sum()), rel=0.05)


def test_chunks_rows_and_order_do_not_change_the_kl(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    given, moved = sequences(), other(policy)
    whole = exact_kl(policy, moved, given)
    order = torch.tensor([2, 0, 3, 1])
    turned = exact_kl(policy, moved, given.select(order))
    torch.testing.assert_close(turned, whole[order, : turned.shape[1]])
    monkeypatch.setattr("mifo_lightning.policy.scoring.SCORING_TOKENS", 14)
    torch.testing.assert_close(exact_kl(policy, moved, given), whole)
    logits: list[int] = []
    kept = Policy.logits
    monkeypatch.setattr(Policy, "logits", lambda self, states: logits.append(len(states)) or kept(self, states))
    monkeypatch.setattr("mifo_lightning.policy.scoring.KL_ELEMENTS", 3 * 24)
    torch.testing.assert_close(exact_kl(policy, moved, given), whole)
    assert max(logits) <= 3


def test_a_model_whose_head_is_not_apart_and_one_of_another_vocabulary(policy: Policy) -> None:
    given, moved = sequences(), other(policy)
    whole = exact_kl(policy, moved, given)
    moved.transform = None
    torch.testing.assert_close(exact_kl(policy, moved, given), whole)
    small = Qwen2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(InputError, match="logits a token, the other 32"):
        exact_kl(policy, Policy(Qwen2ForCausalLM(small)), given)


# --- a whole run ------------------------------------------------------------------------------------------------------


class Exam:
    """Rollouts are wrong; the samples of each measurement are right as `script` says, a text of 0 and 1 a question."""

    def __init__(self, *script: list[str]) -> None:
        self.script = list(script)
        self.keys: list[list[int]] = []

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Sampling
    ) -> list[list[Completion]]:
        if samples == 4:  # rollouts
            return [[answer(tokenizer, p, False)] * samples for p in prompts]
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        self.keys.append(keys)
        right = self.script.pop(0)
        assert {len(text) for text in right} == {samples}
        return [[answer(tokenizer, p, r == "1") for r in text] for p, text in zip(prompts, right, strict=True)]


def short(**changes: Any) -> Any:
    return make_data(**{"val": VAL, "schedule": Schedule(rl_steps=1, prompts_per_step=4), **changes})


# chosen, before and again of two questions of each source, two samples each; then after
START, END = ["111011", "001111", "101110", "010001"], ["00", "00", "11", "01"]


def test_transitions_are_counted_on_questions_that_other_samples_choose(make_trainer: MakeTrainer) -> None:
    """The second addition is right in every sample before training, but not in those that choose."""
    records, monitor, engine = Records(), Retention(questions=2, samples=2), Exam(START, END)
    make_trainer([monitor], logger=records).fit(make_module(engine=engine), datamodule=short())
    addition = transitions([[0.5, 1.0, 0.0]])
    mirrored = transitions([[1.0, 0.5, 1.0], [0.0, 0.5, 0.5]])
    both = transitions([[0.5, 1.0, 0.0], [1.0, 0.5, 1.0], [0.0, 0.5, 0.5]])
    found = monitor.summary()
    without_kl = {"": found["all"], **found["sources"]}
    assert {s: {k: v for k, v in cell.items() if not k.startswith("kl")} for s, cell in without_kl.items()} == {
        "": both, "addition": addition, "mirrored": mirrored,
    }  # fmt: skip
    assert records.series("retention/addition/lost") == [0.5]
    assert records.series("retention/gained") == [both["gained"]]
    assert found["responses"] == 4 * 8
    assert len(set(engine.keys[0] + engine.keys[1])) == 8  # the samples after training are others

    everything = Retention(questions=2, samples=2, at_least=0.0)
    make_trainer([everything]).fit(make_module(engine=Exam(START, END)), datamodule=short())
    assert everything.summary()["all"]["questions"] == 4
    assert everything.summary()["sources"]["addition"]["lost"] == (0.5 * 1.0 + 1.0 * 1.0) / 2


def test_a_model_that_does_not_move_is_at_the_floor(make_trainer: MakeTrainer) -> None:
    monitor = Retention(questions=16, samples=8, at_least=0.0, others={"base": str(BASE)})
    make_trainer([*method_callbacks(), monitor]).fit(make_module(**STILL), datamodule=short())
    found = monitor.summary()["all"]
    assert found["kl"] <= found["kl_floor"] < 1e-9
    assert found["kl_from_base"] == found["kl_to_base"] == found["kl"]
    assert found["floor"] > 0.05
    assert abs(found["lost"]) < 3 * found["lost_se"]


def test_the_kl_is_to_the_initial_model_on_what_it_drew(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor, tokenizer = (
        Retention(questions=3, tokens=4, others={"moved": str(tmp_path / "moved")}),
        load_tokenizer("embedded"),
    )
    export_model(other(load_policy("embedded")), tokenizer, tmp_path / "moved", write=True)
    module, data = make_module(), make_data(val=VAL)
    make_trainer([*method_callbacks(), monitor]).fit(module, datamodule=data)
    initial, moved = load_policy("embedded"), load_policy(str(tmp_path / "moved"))
    questions = [q for load in data.val_dataloader().values() for q in load.questions[:3]]
    keys = [module.responder.key("retention", "start", q.source, q.id) for q in questions]
    drawn = module.responder.draw(initial, [q.prompt for q in questions], keys, 24, Sampling(max_new_tokens=14))
    responses = [group[8].tokens[:4] for group in drawn]
    assert responses == [d["response"] for d in monitor.own_state()["start"]]
    given = Sequences.pack([q.prompt for q in questions], responses, 0)
    pairs = {"kl": (initial, module.policy), "kl_from_moved": (moved, module.policy), "kl_to_moved": (initial, moved)}
    for name, (p, q) in pairs.items():
        kl = naive(p, q, given)
        mask = given.mask()
        assert monitor.summary()["all"][name] == pytest.approx(float(kl[mask].mean()), rel=1e-4), name
        assert monitor.summary()["sources"]["mirrored"][name] == pytest.approx(float(kl[3:][mask[3:]].mean()), rel=1e-4)
    assert monitor.summary()["all"]["kl"] > 1e-3


def test_adapters_are_compared_with_their_base(make_trainer: MakeTrainer) -> None:
    pytest.importorskip("peft")
    monitor, module = Retention(questions=3, samples=1, tokens=4), make_module(adapter=Adapter(rank=4))
    data = short(schedule=Schedule(rl_steps=0, prompts_per_step=4, sft_before=2, sft_batch=4))
    make_trainer([monitor]).fit(module, datamodule=data)
    given = Sequences.pack(
        [q.prompt for load in data.val_dataloader().values() for q in load.questions[:3]],
        [drawn["response"] for drawn in monitor.own_state()["start"]],
        0,
    )
    kl = naive(load_policy("embedded"), module.policy, given)[given.mask()]
    assert monitor.summary()["all"]["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert kl.mean() > 1e-6


def test_rl_after_sft_learns_as_it_logs(make_trainer: MakeTrainer) -> None:
    records, monitor = Records(), Retention(questions=1, samples=1)
    schedule = Schedule(rl_steps=10, prompts_per_step=4, sft_batch=4, sft_before=3, epochs_per_rollout=2)
    make_trainer([monitor], logger=records).fit(make_module(), datamodule=make_data(val=VAL, schedule=schedule))
    (phase,) = monitor.phases
    assert (phase["phase"], phase["number"], phase["after_sft_steps"], phase["rl_steps"]) == ("rl", 1, 3, 8)
    norms = records.series("rl/grad_norm")
    assert len(norms) == 20
    assert phase["grad_norm"] == pytest.approx(sum(norms[:16]) / 16)
    without = records.series("rollout/groups_without_signal")
    assert phase["groups_with_signal"] == pytest.approx(1 - sum(without[:8]) / 8)


@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")
def test_a_resumed_run_compares_with_its_true_beginning_to_the_bit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(ckpt: Path | None = None, **changes: Any) -> Retention:
        monitor = Retention(questions=4, samples=2, at_least=0.0)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(
            [BufferPhaseSwitch(size=8, max_accuracy=0.75), monitor, saver], enable_checkpointing=True
        )
        schedule = Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4)
        trainer.fit(make_module(**changes), datamodule=make_data(val=VAL, schedule=schedule), ckpt_path=ckpt)
        seen.append(trainer.global_step)
        return monitor

    seen: list[int] = []

    whole = fit()
    assert seen[0] > 4, "there was SFT"
    for step in (1, seen[0] - 1):
        assert plain(fit(tmp_path / f"step={step}.ckpt").summary()) == plain(whole.summary()), step
    assert whole.summary()["all"]["kl"] > 0
    torch.manual_seed(0)
    export_model(other(load_policy("embedded")), load_tokenizer("embedded"), tmp_path / "moved", write=True)
    with pytest.warns(UserWarning, match=r"retention: the weights of .*moved' are no longer those that training began"):
        again = fit(tmp_path / "step=1.ckpt", model=str(tmp_path / "moved")).summary()["all"]
    assert again == {name: value for name, value in whole.summary()["all"].items() if not name.startswith("kl")}


def test_a_model_in_memory_has_no_initial_weights_to_load(make_trainer: MakeTrainer) -> None:
    monitor, policy = Retention(questions=2, samples=1), load_policy("embedded")
    module = make_module(model=Loaded(policy.model, load_tokenizer("embedded")))
    with pytest.warns(UserWarning, match="retention: a model that was given in memory cannot be loaded again"):
        make_trainer([monitor]).fit(module, datamodule=short())
    assert "lost" in monitor.summary()["all"] or monitor.summary()["all"]["questions"] == 0
    assert "kl" not in monitor.summary()["all"]


# --- rows of a file ---------------------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_of_a_file_may_lack_an_answer_and_are_judged_by_a_reward_of_their_own(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    silent = [{"data_source": "open", "prompt": f"{n}x{n}="} for n in range(3)]
    told = [{"data_source": "sum", "prompt": f"{n}+11=", "reward_model": {"ground_truth": "7"}} for n in range(10, 13)]
    file = write(tmp_path / "old.jsonl", silent[0], *told, *silent[1:])

    class Sevens:
        """Every second answer holds a 7 as a word, which is not the sum."""

        asked: list[tuple[int, int, int]] = []

        def generate(
            self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Sampling
        ) -> list[list[Completion]]:
            self.asked.append((len(prompts), samples, sampling.max_new_tokens))
            texts = ["7>1<eos>", "77>1<eos>"]
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            return [[Completion(ids[i % 2], [-1.0] * len(ids[i % 2]), True) for i in range(samples)] for _ in prompts]

    engine, monitor = Sevens(), Retention(2, samples=2, tokens=5, prompts=file, reward=ContainsReward())
    make_trainer([monitor]).fit(make_module(engine=engine), datamodule=short(val=None))
    assert engine.asked == [(2, 6, 14), (2, 1, 5), (4, 4, 14), (2, 2, 14)]  # the third are rollouts
    found = monitor.summary()
    assert found["sources"]["sum"]["questions"] == 2
    assert found["sources"]["sum"]["before"] == found["sources"]["sum"]["after"] == 0.5
    assert found["sources"]["open"].keys() == {"kl", "kl_floor"}
    assert found["sources"].keys() == {"open", "sum"}
    assert found["responses"] == 2 * 8 + 2


def test_rows_that_all_lack_an_answer_give_the_kl_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    file = write(tmp_path / "old.jsonl", *({"prompt": f"{n}+11="} for n in range(10, 14)))
    monitor = Retention(prompts=file, tokens=6)
    make_trainer([monitor]).fit(make_module(), datamodule=short(val=None))
    assert monitor.summary()["all"].keys() == {"kl", "kl_floor"}
    assert monitor.summary()["all"]["kl"] > 0
    assert monitor.summary()["sources"].keys() == {"old"}
    assert monitor.responses == 4


# --- what it leaves, and what it refuses ------------------------------------------------------------------------------


def test_what_is_found_is_a_metric_of_the_final_evaluation(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor, summary = Retention(questions=4, samples=2, at_least=0.0), RunSummary()
    trainer = make_trainer([monitor, summary], limit_val_batches=1.0)
    module, data = make_module(), short()
    trainer.fit(module, datamodule=data)
    trainer.validate(module, data, verbose=False)
    capsys.readouterr()
    summary.report(trainer)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["after"] == summary.after | monitor.final_metrics()
    assert record["after"]["retention/lost"] == record["retention"]["all"]["lost"]
    assert record["after"]["retention/addition/kl"] == record["retention"]["sources"]["addition"]["kl"]
    assert "addition/avg@1" in record["after"]
    shown = capsys.readouterr().out
    assert "retention: lost " in shown
    assert "beyond chance on 8 questions, KL(initial || trained) 0." in shown
    assert "kl_floor" not in shown  # the table is that of the evaluation


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"questions": 0}, "retention.questions: 0"),
        ({"samples": 0}, "retention.samples: 0"),
        ({"tokens": 0}, "retention.tokens: 0"),
        ({"at_least": 1.5}, "retention.at_least: 1.5"),
        ({"prompts": "absent.jsonl"}, r"retention\.prompts: .*absent\.jsonl"),
        ({"others": {"x": "/no/such"}}, r"retention\.others\.x: .*/no/such"),
    ],
)
def test_bad_input_is_one_line(make_trainer: MakeTrainer, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        make_trainer([Retention(**wrong)]).fit(make_module(), datamodule=short())
    assert "\n" not in str(caught.value)


def test_questions_are_needed_and_stay_the_same(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="retention: needs questions"):
        make_trainer([Retention()]).fit(make_module(), datamodule=short(val=None))
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer([Retention(2, samples=1), saver], enable_checkpointing=True).fit(
        make_module(), datamodule=make_data(val=VAL)
    )
    with pytest.raises(InputError, match="retention began with 4 questions and would go on with 6"):
        make_trainer([Retention(3, samples=1)]).fit(
            make_module(), datamodule=make_data(val=VAL), ckpt_path=tmp_path / "step=1.ckpt"
        )


def test_a_model_of_another_vocabulary_is_no_scale(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(["q!"])
    load_policy("embedded").model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(InputError, match=r"retention\.others\.more: .* a model with the vocabulary of model\.model"):
        make_trainer([Retention(others={"more": str(tmp_path / "more")})]).fit(make_module(), datamodule=short())
