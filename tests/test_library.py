"""The library from Python: public names, what data takes from the module, rows and rewards as objects, answers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALONE, SAMPLING, make_data, make_module, weights
from datasets import Dataset
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from monitoring import Records
from rl_steps import Coin
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import mifo_callbacks
import mifo_lightning as mifo
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.rows import read_rows
from mifo_lightning.data.settings import Settings, settle
from mifo_lightning.monitors.checkpoint import LastCheckpoint
from mifo_lightning.policy import loading
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.in_process import InProcessEngine

MakeTrainer = Callable[..., Trainer]
ROWS = [
    {"question": f"{a}+{a}=", "answer": str(2 * a), "solution": f"{a}+{a}>{2 * a}"} for a in range(100, 120)
]  # in the symbols of the embedded model
COLUMNS = mifo.Columns(prompt="question", truth="answer", target="solution")
BASE = Path(mifo.__file__).parent / "assets" / "base"
ONE = mifo.Schedule(rl_steps=1, prompts_per_step=4, sft_batch=4)


def test_every_public_name_is_there_and_none_is_loaded_before_it_is_used() -> None:
    assert all(getattr(mifo, name).__name__ == name for name in mifo.__all__)
    assert set(mifo.__all__) <= set(dir(mifo))
    with pytest.raises(AttributeError, match="no attribute 'MifoModul'"):
        mifo.MifoModul  # noqa: B018
    light = (
        "import sys, mifo_lightning; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", light]).returncode == 0


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "Dataset"])
def test_rows_may_be_objects(make_trainer: MakeTrainer, rows: Any) -> None:
    module = make_module(reward=lambda responses, truths: [float(r.endswith(t)) for r, t in zip(responses, truths)])  # noqa: B905
    before = weights(module) if module.policy else None
    data = mifo.QuestionData(rows, columns=COLUMNS, demonstrations=mifo.Demonstrations(">", verify=False), schedule=ONE)
    with pytest.warns(UserWarning, match="cannot run in a process of its own"):
        make_trainer([]).fit(module, data)
    assert before is None
    assert [q.text for q in data.train_dataloader().questions] == [row["question"] for row in ROWS]


@pytest.mark.parametrize("reward", [3, LastAnswerReward, None])
def test_what_is_no_reward_is_refused(reward: Any) -> None:
    with pytest.raises(
        InputError, match=r"^reward: .* is not allowed; it must be an object of a Reward, or a function"
    ):
        make_module(reward=reward)


@pytest.mark.parametrize("rows", [{"question": ["1"]}, 3, iter(ROWS)], ids=["dict", "int", "iterator"])
def test_what_is_no_rows_is_refused(rows: Any) -> None:
    with pytest.raises(InputError, match=r"^data.train: a \w+ is not allowed; allowed are files"):
        read_rows(rows, "data.train")


def test_a_model_is_named_by_its_directory_and_an_object_is_refused() -> None:
    base = Path(mifo.__file__).parent / "assets" / "base"
    assert make_module(model=base).generate(["1+1="]) == make_module(model=str(base)).generate(["1+1="])
    with pytest.raises(InputError, match=r"^model.model: a Linear is not allowed; give a Hugging Face model directory"):
        make_module(model=nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("success_threshold", 0.5, "data.standalone: success_threshold 0.5 is not allowed; the module has 1.0"),
        (
            "reward",
            LastAnswerReward("!"),
            r"data.standalone: reward LastAnswerReward\(answer_after='!', .*\) is not allowed; the mod",
        ),
    ],
)
def test_what_data_is_given_must_be_the_module_s(make_trainer: MakeTrainer, name: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_trainer([]).fit(make_module(), make_data(schedule=ONE, **{**ALONE, name: value}))


def test_a_dict_in_the_place_of_a_group_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^model.rollout: \{'group_size': 4\} is not allowed; it must be a Rollout$"):
        mifo.MifoModule("embedded", LastAnswerReward(), rollout={"group_size": 4})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^data.schedule: None is not allowed; it must be a Schedule$"):
        mifo.QuestionData("rows.jsonl", schedule=None)  # type: ignore[arg-type]


def test_data_without_a_module_says_what_it_needs() -> None:
    data = mifo.QuestionData(mifo.Skills(["addition"], 8))
    with pytest.raises(InputError, match=r"^data: nothing says what its reward is: let a Trainer set it up for a Mifo"):
        data.setup("fit")
    with pytest.raises(InputError, match=r"^data: nothing says what its tokenizer is"):
        settle(dict.fromkeys(Settings._fields) | {"reward": LastAnswerReward()}, nn.Linear(1, 1))


def test_data_that_another_module_was_trained_on_is_prepared_anew(make_trainer: MakeTrainer) -> None:
    rows = mifo.Skills(["addition", "mirrored"], 64)
    data = mifo.QuestionData(rows, demonstrations=mifo.Demonstrations(">"), schedule=ONE)
    verified = []
    for marker in (">", "!"):  # no demonstration pleases the second
        make_trainer([]).fit(make_module(reward=LastAnswerReward(marker)), data)
        verified.append(sum(q.demonstration is not None for q in data.train_dataloader().questions))
    assert verified == [64, 0]


def test_the_recipe_is_the_four_callbacks_in_an_order_that_works() -> None:
    names = [type(callback).__name__ for callback in mifo_callbacks.mifo(size=8, frozen=0.25)]
    assert names == ["EntropyTokenSelection", "ImportanceEMA", "GradientFreezing", "BufferPhaseSwitch"]


def test_a_module_answers_before_a_fit_and_after_it(make_trainer: MakeTrainer) -> None:
    module = make_module()
    prompts: list[Any] = ["123+456=", [{"role": "user", "content": "s:40312="}]]
    first, many = module.generate(prompts, samples=3), module.generate(prompts, samples=16)
    assert [len(texts) for texts in first] == [3, 3]
    assert module.generate(prompts[1:], samples=3) == first[1:], "in whatever company"
    assert module.generate([]) == []
    greedy = module.generate(prompts, sampling=mifo.Sampling(temperature=0.0, max_new_tokens=14))
    assert greedy[1][0].endswith("01234")
    before = weights(module)
    make_trainer([]).fit(module, make_data(schedule=ONE))
    assert any(not torch.equal(before[name], p) for name, p in weights(module).items())
    assert module.generate(prompts, samples=16) != many
    with pytest.raises(InputError, match="prompt 1: the chat template refuses the prompt"):
        module.generate([5])  # type: ignore[list-item]
    for sampling, said in (
        (mifo.Sampling(temperature=-0.7), r"generate: sampling\.temperature: -0\.7 is not allowed"),
        (mifo.Sampling(max_new_tokens=10**6), r"generate: longest prompt with max_new_tokens: 10000\d\d tokens is not"),
    ):
        with pytest.raises(InputError, match=said):
            module.generate(prompts, sampling=sampling)
    with pytest.raises(InputError, match="samples: 0 is not allowed"):
        module.generate(prompts, samples=0)
    with pytest.raises(InputError, match=r"prompts: '1[+]1=' is not allowed; it must be a list"):
        module.generate("1+1=")


def test_after_a_fit_prompts_become_text_as_those_of_its_data_did(make_trainer: MakeTrainer) -> None:
    seen = []

    class Engine(InProcessEngine):
        def generate(self, policy: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
            seen.extend(tokenizer.batch_decode(prompts))
            return super().generate(policy, tokenizer, prompts, *rest)

    module = make_module(engine=Engine())
    template = "{% for m in messages %}{{ m['content'] }}>{% endfor %}"
    make_trainer([]).fit(module, make_data(schedule=ONE, chat_template=template, max_prompt_tokens=20))
    seen.clear()
    module.generate(["1+1="])
    assert seen == ["1+1=>"]


# --- a model in memory, a checkpoint without a Trainer, Lightning's own callbacks -----------------------------------


def test_a_model_in_memory_is_trained_in_place(make_trainer: MakeTrainer) -> None:
    named = make_module(reward=Coin())
    module = mifo.MifoModule.from_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        AutoTokenizer.from_pretrained(BASE),
        reward=Coin(),
        seed=0,
        rollout=mifo.Rollout(group_size=4, sampling=SAMPLING),
        optimizer=mifo.OptimizerSettings(rl=mifo.AdamWSettings(lr=5e-4, weight_decay=0.1)),
    )
    mine = module.model_name.model  # type: ignore[union-attr]
    assert module.generate(["1+1="]) == named.generate(["1+1="])
    for each in (named, module):
        make_trainer([]).fit(each, make_data(schedule=ONE))
    trained = weights(named)
    assert all(torch.equal(trained[f"policy.model.{name}"], p) for name, p in mine.named_parameters())


def test_a_checkpoint_gives_the_module_back_without_a_trainer(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"loss": mifo.PolicyLoss(kl_coefficient=0.1), "sft": mifo.AdamWSettings(lr=3e-3, betas=(0.8, 0.9))}
    module = make_module(reward=Coin(), **settings)
    make_trainer([LastCheckpoint(dirpath=str(tmp_path))], enable_checkpointing=True, max_epochs=-1).fit(
        module, make_data(schedule=ONE)
    )
    with pytest.raises(InputError, match=r"load_from_checkpoint: reward: an object that no checkpoint holds; give"):
        mifo.MifoModule.load_from_checkpoint(tmp_path / "last.ckpt")
    again = mifo.MifoModule.load_from_checkpoint(tmp_path / "last.ckpt", reward=Coin())
    assert again.generate(["1+1=", "s:132="], samples=2) == module.generate(["1+1=", "s:132="], samples=2)
    assert again.reinforcement.group_size == module.reinforcement.group_size == 4
    assert again.optimizer_settings.sft == settings["sft"]
    assert again.reinforcement.settings == settings["loss"]
    given = {"reward": Coin(), "rollout": mifo.Rollout(group_size=6)}
    other = mifo.MifoModule.load_from_checkpoint(tmp_path / "last.ckpt", **given)
    assert other.reinforcement.group_size == 6
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(InputError, match=r"load_from_checkpoint: .*bare.ckpt is no checkpoint of a MifoModule"):
        mifo.MifoModule.load_from_checkpoint(tmp_path / "bare.ckpt")


def test_early_stopping_acts_at_validations(make_trainer: MakeTrainer) -> None:
    stop = EarlyStopping("val/avg@1", mode="max", patience=2, stopping_threshold=2.0)
    data = make_data(
        schedule=mifo.Schedule(rl_steps=20, prompts_per_step=4), val=mifo.Skills(["sorting"], 8, split="val")
    )
    module = make_module(reward=Coin(), rl=mifo.AdamWSettings(lr=0.0))  # nothing can become better
    trainer = make_trainer([stop], val_check_interval=2, limit_val_batches=1.0)
    trainer.fit(module, data)
    assert (stop.stopped_epoch, trainer.global_step) == (0, 6)


def test_the_best_checkpoint_by_what_training_logs(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="rollout/reward", mode="max", every_n_train_steps=1, save_top_k=1)
    data = make_data(schedule=mifo.Schedule(rl_steps=4, prompts_per_step=4))
    make_trainer([best], enable_checkpointing=True).fit(make_module(reward=Coin()), data)
    assert best.best_model_score is not None
    assert Path(best.best_model_path).is_file()
    assert "/" not in Path(best.best_model_path).name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_of_a_model_in_memory_is_as_it_came(make_trainer: MakeTrainer, checkpointing: bool) -> None:
    settings = {"loss": mifo.PolicyLoss(kl_coefficient=0.1), "rl": mifo.AdamWSettings(lr=5e-3)}
    found = []
    for module in (
        make_module(reward=Coin(), **settings),
        make_module(
            model=(AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)),
            reward=Coin(),
            gradient_checkpointing=checkpointing,
            **settings,
        ),
    ):
        records = Records()
        make_trainer([], logger=records).fit(module, make_data(schedule=mifo.Schedule(rl_steps=3, prompts_per_step=4)))
        found.append(records.series("rl/kl_ref"))
    assert found[0][-1] > 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_models_that_differ_between_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = loading.load_policy("embedded")
    loading.check_same_weights(policy)
    monkeypatch.setattr(loading, "gather_ranks", lambda sums: [sums, [value + 1 for value in sums]])
    with pytest.raises(InputError, match="weights differ between processes"):
        loading.check_same_weights(policy)


def test_no_checkpoint_says_whether_code_may_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = make_module(reward=Coin(), trust_remote_code=True)
    make_trainer([LastCheckpoint(dirpath=str(tmp_path))], enable_checkpointing=True, max_epochs=-1).fit(
        module, make_data(schedule=ONE)
    )
    assert not mifo.MifoModule.load_from_checkpoint(tmp_path / "last.ckpt", reward=Coin()).loading.trust_remote_code
    given = {"reward": Coin(), "loading": mifo.Loading(trust_remote_code=True)}
    assert mifo.MifoModule.load_from_checkpoint(tmp_path / "last.ckpt", **given).loading.trust_remote_code


class Own(mifo.MifoModule):
    """A subclass that passes on what it does not know."""

    def __init__(self, extra: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.extra = extra


def test_a_subclass_gets_all_settings_back(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "seed": 0,
        "rollout": mifo.Rollout(group_size=6, sampling=SAMPLING),
        "optimizer": mifo.OptimizerSettings(rl=mifo.AdamWSettings(lr=3e-4)),
    }
    module = Own(extra=1, model="embedded", reward=Coin(), **settings)
    make_trainer([LastCheckpoint(dirpath=str(tmp_path))], enable_checkpointing=True, max_epochs=-1).fit(
        module, make_data(schedule=ONE)
    )
    again = Own.load_from_checkpoint(tmp_path / "last.ckpt", reward=Coin(), extra=1)
    assert again.optimizer_settings == settings["optimizer"]
    assert (again.reinforcement.group_size, again.sampling) == (6, SAMPLING)
