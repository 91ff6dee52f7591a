"""How responses end: every listed token, stop strings, what of it is text, and the one token that ends a target."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_module, method_callbacks, weights
from lightning import Trainer
from question_rows import CHAT, build, make_tokenizer, one, row
from rl_steps import item, reinforcement
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mifo_callbacks import Seed
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.skills import Skills
from mifo_lightning.methods import Luffy
from mifo_lightning.monitors.export import ExportModel
from mifo_lightning.monitors.phase_kl import PhaseKL
from mifo_lightning.policy.ending import end_tokens, read_ends, response_texts, set_ends
from mifo_lightning.policy.loading import export_model, load_policy, load_tokenizer
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.evaluation import Evaluation, Evaluator
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder

BASE = Path(__file__).parents[1] / "mifo_lightning" / "assets" / "base"
MakeTrainer = Callable[..., Trainer]
NEVER = 23  # `;`, which the embedded model never writes


def copy_base(to: Path, **changes: dict[str, Any]) -> str:
    """The embedded model with other entries in its JSON files; returns the directory."""
    shutil.copytree(BASE, to)
    for name, entries in changes.items():
        path = to / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return str(to)


def validated(make_trainer: MakeTrainer, model: str) -> dict[str, float]:
    module = make_module(model=model, evaluation=Evaluation(sampling=SAMPLING, demonstration_loss=False))
    data = make_data(val=Skills(["sorting", "reversal"], 16, split="val"))
    make_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    return {name: float(value) for name, value in module.trainer.callback_metrics.items()}


# --- several end tokens ---------------------------------------------------------------------------------------------


def test_any_listed_token_ends_a_response(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The model ends its answers with `<eos>`; its tokenizer calls another of the listed tokens its end."""
    listed = {"generation_config": {"eos_token_id": [1, NEVER]}, "tokenizer_config": {"eos_token": ";"}}
    found = validated(make_trainer, copy_base(tmp_path / "model", **listed))
    assert found == validated(make_trainer, "embedded")
    assert found["val/greedy"] > 0.9
    assert found["val/truncated"] == 0


def test_a_run_with_two_end_tokens_is_that_with_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Padding that is an end token changes nothing either: it is masked by length."""
    other = copy_base(
        tmp_path / "model",
        generation_config={"eos_token_id": [NEVER, 1], "pad_token_id": 1},
        tokenizer_config={"pad_token": "<eos>"},
    )
    runs = []
    for model in ("embedded", other):
        module = make_module(model=model)
        make_trainer(max_steps=3).fit(module, make_data())
        runs.append(weights(module))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_tokenizer_without_a_pad_token_trains_to_the_same_bits_and_says_so_once(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Rows are filled up with the end token and told apart by their lengths; the exported tokenizer is as it came."""
    bare = copy_base(tmp_path / "bare", tokenizer_config={"pad_token": None})
    runs, said = [], []
    for model in ("embedded", bare):
        export = ExportModel(str(tmp_path / f"out{len(runs)}"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = make_module(model=model, weight="flow")
            data = make_data(val=Skills(["addition"], 16, split="val"))
            trainer = make_trainer([*method_callbacks(), PhaseKL(4), export], limit_val_batches=1.0)
            trainer.validate(module, data, verbose=False)
            trainer.fit(module, data)
        said.append([str(w.message) for w in caught if "pad_token" in str(w.message)])
        metrics = {k: v for k, v in module.trainer.callback_metrics.items() if not k.endswith("_per_s")}
        runs.append((weights(module), metrics))
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())
    assert runs[0][1] == runs[1][1]
    assert said[0] == []
    assert len(said[1]) == 1
    assert "its end token '<eos>'" in said[1][0]
    assert AutoTokenizer.from_pretrained(tmp_path / "out1").pad_token is None


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 5}, {3, 7}),
        ({"eos_token_id": 4}, {}, {4}),
        ({}, {"eos_token_id": [5, 6]}, {5, 6}),
        (None, {"eos_token_id": 5}, {5}),
        (None, {}, set()),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
    ],
)
def test_the_list_is_that_of_the_model(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], ends: set[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_ends(str(tmp_path)) == ends
    tokenizer = make_tokenizer()
    set_ends(tokenizer, ends)
    assert end_tokens(tokenizer) == (ends or {tokenizer.eos_token_id})


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}', '{"eos_token_id": []}', "{", "[]"]
)
def test_a_list_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    model = copy_base(tmp_path / "model")
    Path(model, "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"^model\.model: .*generation_config\.json") as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)


def test_the_list_is_in_the_checkpoint_and_another_one_is_said(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2)
    trainer.fit(make_module(), make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["mifo"]["end_tokens"] == [1]
    model = copy_base(tmp_path / "model", generation_config={"eos_token_id": [1, NEVER]})
    again, data = make_module(model=model), make_data()
    with pytest.warns(UserWarning, match=r"tokens \[1\] ended responses .*, \[1, 23\] do now"):
        make_trainer(max_steps=3, max_epochs=-1).fit(again, data, ckpt_path=tmp_path / "a.ckpt")


# --- what is text ---------------------------------------------------------------------------------------------------

THOUGHT, UNSURE = "<think>so</think>5<|eos|>", "5</think>I do not know<|eos|>"


def thinking() -> Any:
    return make_tokenizer(additional_special_tokens=["<think>", "</think>"])


def test_special_tokens_are_text_wherever_a_response_is_graded(policy: Policy) -> None:
    tokenizer, reward = thinking(), LastAnswerReward(answer_after="</think>")
    assert "</think>" in tokenizer.all_special_tokens
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in (THOUGHT, UNSURE)]
    shown = [text.removesuffix("<|eos|>") for text in (THOUGHT, UNSURE)]
    assert response_texts(tokenizer, tokens) == shown
    completions = [[Completion(ids, [0.0] * len(ids), True) for ids in tokens]]

    class Answers:
        def generate(self, *_: Any) -> list[list[Completion]]:
            return completions

    asked = Question(0, "s", "how many?", [5, 6], "5", tokens[0])
    unsure = Question(1, "s", "how many?", [5, 6], "5", tokens[1])
    rl = reinforcement(tokenizer, reward=reward, group_size=3, engine=Answers(), mixing=Luffy())
    graded = rl.grade([asked], completions)
    assert graded.rewards.tolist() == [[1, 0]]
    assert [sample["response"] for sample in graded.samples()] == shown
    both = rl.grade([asked, unsure], completions * 2)
    rollout = rl.prepare(policy, item([asked, unsure]), both, rl.choose(both, 1, 2))  # type: ignore[arg-type]
    assert rollout.demonstrated is not None
    assert rollout.advantages is not None
    right, wrong = rollout.advantages[rollout.demonstrated.any(-1)].tolist()
    assert right > 0 > wrong

    responder = Responder(Answers(), tokenizer, reward, 1.0, Seed(0, "seed"))  # type: ignore[arg-type]
    judge = Evaluator(responder, Evaluation(samples=2, greedy=False, demonstration_loss=False))
    judge.reset(["s"], torch.device("cpu"))
    (sample,) = judge.update(policy, [asked], 0)
    assert (sample["response"], float(judge.compute("val")["val/avg@2"])) == (shown[0], 0.5)

    rows = [row(truth="5", solution=solution) for solution in (THOUGHT, UNSURE)]
    questions, drops = build(rows, tokenizer, reward=reward, answer_after="</think>")
    assert [bool(q.demonstration) for q in questions] == [True, False]
    assert drops.by_reason() == {"demonstration wrong": 1}


def test_spaces_are_not_cleaned_up() -> None:
    tokenizer = make_tokenizer(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    )
    text = "( 1 , 2 ) . do n't ? !"
    assert response_texts(tokenizer, [tokenizer.encode(text, add_special_tokens=False)]) == [text]
    assert response_texts(tokenizer, []) == []
    assert response_texts(tokenizer, [[], [tokenizer.eos_token_id]]) == ["", ""]


# --- stop strings ---------------------------------------------------------------------------------------------------


def test_a_long_stop_string_ends_at_the_token_that_completes_it(policy: Policy) -> None:
    tokenizer = load_tokenizer("embedded")
    set_ends(tokenizer, {NEVER})
    prompt = tokenizer.encode("123+456=", add_special_tokens=False)

    def greedy(**sampling: Any) -> Completion:
        settings = Sampling(0.0, max_new_tokens=80, **sampling)
        return InProcessEngine().generate(policy, tokenizer, [prompt], [0], 1, settings)[0][0]

    whole = greedy().tokens
    stop = tokenizer.decode(whole[2:70])
    ended = greedy(stop=["no such text", stop])
    assert ended.finished
    assert ended.tokens == whole[:70]
    assert response_texts(tokenizer, [ended.tokens], ["no such text", stop]) == [tokenizer.decode(whole[:2])]


def test_what_is_graded_ends_before_the_first_stop_string(policy: Policy, tokenizer: Any) -> None:
    tokens = tokenizer.encode("1>7>8>9", add_special_tokens=False)
    completions = [[Completion(tokens, [0.0] * len(tokens), True)]]
    asked = Question(0, "s", "1+1=", [3, 12, 3, 14], "7")
    for stop, reward in (([], 0.0), ([">8", ">9"], 1.0), ([">9", ">8"], 1.0), ([">9"], 0.0)):
        sampling = Sampling(max_new_tokens=14, stop=stop)
        assert reinforcement(tokenizer, sampling=sampling).grade([asked], completions).rewards.tolist() == [[reward]]


@pytest.mark.parametrize("stop", [[""], ["ok", ""], "</s>"])
def test_an_empty_stop_string_is_refused(tokenizer: Any, stop: Any) -> None:
    with pytest.raises(InputError, match=r"^model\.rollout\.sampling\.stop: "):
        reinforcement(tokenizer, sampling=Sampling(stop=stop))
    with pytest.raises(InputError, match=r"^model\.evaluation\.sampling\.stop: "):
        Evaluation(sampling=Sampling(stop=stop)).check("model.evaluation")


# --- the end of an SFT target ---------------------------------------------------------------------------------------

TURNS = CHAT.replace("<|eos|>", "<|turn|>")


@pytest.mark.parametrize("template", [CHAT, TURNS, "{% for m in messages %}{{ m.content }}{% endfor %}"])
@pytest.mark.parametrize("solution", [">4", ">4<|turn|>", ">4<|eos|>", ">4<|turn|>\n<|eos|>\n", ">4<|eos|><|eos|>"])
def test_a_target_ends_in_one_token(template: str, solution: str) -> None:
    """The template's end of turn if the model lists it, else the tokenizer's."""
    tokenizer = make_tokenizer(additional_special_tokens=["<|turn|>"], chat_template=template)
    turn, eos = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|eos|>"])
    set_ends(tokenizer, {turn, eos})
    ids = one([row(solution=solution)], tokenizer).demonstration
    assert ids is not None
    assert ids[-1] == (turn if template == TURNS else eos)
    assert response_texts(tokenizer, [ids]) == [">4"]
    assert not {turn, eos} & set(ids[:-1])


def test_a_target_that_would_end_in_what_ends_no_response_is_refused() -> None:
    tokenizer = make_tokenizer(additional_special_tokens=["<|turn|>"])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    set_ends(tokenizer, {turn})
    with pytest.raises(InputError, match=r"^data\.train: .*'<\|eos\|>' \(1\).* \[\d+\] .*generation_config\.json"):
        build([row(solution=">4")], tokenizer)
    assert one([row()], tokenizer).demonstration is None, "without a target there is nothing to end"
    assert one([row(solution=">4")], tokenizer, chat_template=TURNS).demonstration[-1] == turn  # type: ignore[index]


def test_a_demonstration_that_goes_on_after_an_end_token_is_dropped() -> None:
    questions, drops = build([row(solution="one<|eos|>two>4"), row(solution=">4")])
    assert [bool(q.demonstration) for q in questions] == [False, True]
    assert drops.by_reason() == {"end token inside demonstration": 1}


# --- what stays so ----------------------------------------------------------------------------------------------------


def test_a_generation_config_that_transformers_would_not_write_is_no_obstacle(tmp_path: Path) -> None:
    """Greedy decoding with a temperature: many published models have it."""
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    model = copy_base(tmp_path / "model", generation_config=odd)
    policy, tokenizer = load_policy(model), load_tokenizer(model)
    export_model(policy, tokenizer, tmp_path / "export", write=True)
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert written["eos_token_id"] == 1
    assert read_ends(str(tmp_path / "export")) == end_tokens(load_tokenizer(str(tmp_path / "export"))) == {1}


def test_a_tied_head_stays_tied(tokenizer: Any, tmp_path: Path) -> None:
    model = Path(copy_base(tmp_path / "tied", config={"tie_word_embeddings": True}))
    own = load_file(model / "model.safetensors")
    del own["lm_head.weight"]
    save_file(own, model / "model.safetensors", {"format": "pt"})
    policy = load_policy(str(model))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(1.5)
    export_model(policy, tokenizer, tmp_path / "export", write=True)
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    again = load_policy(str(tmp_path / "export")).model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(again.get_output_embeddings().weight, policy.model.get_output_embeddings().weight)


def test_names_of_metrics_stay_different_where_mlflow_takes_characters_out(make_trainer: MakeTrainer) -> None:
    module = make_module(evaluation=Evaluation(samples=8, sampling=SAMPLING))
    data = make_data(val=Skills(["sorting"], 4, split="val"))
    make_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    names = list(module.trainer.callback_metrics)
    assert {"val/avg@8", "val/pass@8", "val/pass@2", "val/sorting/pass@4"} <= set(names)
    assert len({re.sub("[^a-zA-Z0-9_/. -]+", "", name) for name in names}) == len(names)
