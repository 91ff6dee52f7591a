"""The embedded task: rows that verify themselves, disjoint splits, a shipped base that the stock classes load."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from task_rows import demonstration, question
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments.make_base import EOS, IDS, VOCABULARY, Corpus, Recipe, make
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.skills import SIZES, Skills
from mifo_lightning.data.source import Row, Split

ALL = list(SIZES)
BASE = str(files("mifo_lightning") / "assets" / "base")


def solve(text: str) -> tuple[str, str]:
    """Steps and answer by schoolbook arithmetic on the text alone, independent of the generator."""
    if text[1] == ":":
        digits = text[2:-1]
        return digits, "".join(sorted(digits)) if text[0] == "s" else digits[::-1]
    a, b = int(text[:3]), int(text[4:7])
    steps, carry = "", 0
    for place in range(3):
        column = a // 10**place % 10 + b // 10**place % 10 + carry
        carry = column // 10
        steps += f"{column % 10}{carry}"
    answer = f"{a + b:04d}"
    return steps, answer if text[3] == "+" else answer[::-1]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return Skills(ALL, 10_000, "train", seed=3).rows()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE)


def test_rows_have_the_format_of_the_files(rows: list[Row]) -> None:
    assert len(rows) == 10_000
    for index, row in enumerate(rows):
        skill = ALL[index % len(ALL)]
        assert row["data_source"] == skill
        assert row["ability"] == "skills"
        assert row["extra_info"] == {"index": index, "split": "train"}
        assert row["reward_model"]["style"] == "rule"
        assert [message["role"] for message in row["prompt"] + row["target"]] == ["user", "assistant"]
        marker = {"addition": "+", "mirrored": "x", "sorting": "s:", "reversal": "r:"}[skill]
        assert marker in question(row)


def test_demonstrations_are_right(rows: list[Row]) -> None:
    for row in rows:
        steps, answer = solve(question(row))
        assert demonstration(row) == f"{steps}>{answer}"
        assert row["reward_model"]["ground_truth"] == answer


def test_the_plain_sum_never_passes_for_the_mirrored_one() -> None:
    mirrored = Skills(["mirrored"], 20_000, "test").rows()
    answers = [row["reward_model"]["ground_truth"] for row in mirrored]
    assert all(answer != answer[::-1] for answer in answers)


def test_a_question_is_in_one_split_whatever_the_seed() -> None:
    splits: list[Split] = ["train", "val", "test"]
    seen = {
        split: {question(row) for seed in (0, 1) for row in Skills(ALL, 4_000, split, seed).rows()} for split in splits
    }
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_a_question_comes_once_and_an_exhausted_split_is_named() -> None:
    everything = SIZES["sorting"]
    with pytest.raises(InputError, match=r"100000 val questions of 'sorting' asked for, there are \d+$") as error:
        Skills(["sorting"], everything, "val").rows()
    available = int(str(error.value).rsplit(" ", 1)[1])
    texts = {question(row) for row in Skills(["sorting"], available, "val").rows()}
    assert len(texts) == available
    assert available == pytest.approx(everything / 10, rel=0.05)


def test_the_seed_decides_the_rows() -> None:
    assert Skills(ALL, 100, "val", 5).rows() == Skills(ALL, 100, "val", 5).rows()
    texts = [{question(row) for row in Skills(["addition"], 100, "val", seed).rows()} for seed in (5, 6)]
    assert len(texts[0] & texts[1]) < 10


def test_fewer_rows_are_a_prefix_per_skill_and_shares_differ_by_one_at_most() -> None:
    rows = Skills(["reversal", "addition"], 7, "test").rows()
    assert [row["data_source"] for row in rows] == ["reversal", "addition"] * 3 + ["reversal"]
    assert len(Skills(ALL, 2).rows()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skills": ["adition"], "count": 1}, r"'adition'.*allowed are addition, mirrored, sorting, reversal"),
        ({"skills": [], "count": 1}, r"\[\] given, allowed are"),
        ({"skills": ["sorting", "sorting"], "count": 1}, "each once"),
        ({"skills": ["sorting"], "count": 0}, "count: 0 given, allowed is 1 or more"),
        ({"skills": ["sorting"], "count": 1, "split": "dev"}, "'dev' given, allowed are train, val, test"),
        ({"skills": ["sorting"], "count": 1, "seed": -1}, "seed: -1 given"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Skills(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_tokens_are_characters_and_lengths_are_as_documented(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    for row in rows[:400]:
        prompt = tokenizer.encode(question(row), add_special_tokens=False)
        response = tokenizer.encode(demonstration(row), add_special_tokens=False)
        assert len(prompt) == len(question(row)) == 8
        assert len(response) + 1 == len(demonstration(row)) + 1 <= 14
        assert tokenizer.decode([*prompt, *response]) == question(row) + demonstration(row)
        ended = [*response, tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert tokenizer.decode(ended, skip_special_tokens=True) == demonstration(row)


def test_the_chat_template_adds_nothing(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert text == question(rows[0])


def test_the_shipped_base_is_the_documented_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert model.num_parameters() == 300_672
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size == 24
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.eos_token_id == tokenizer.eos_token_id


@torch.no_grad()
@pytest.mark.parametrize(("skill", "low", "high"), [("sorting", 0.95, 1), ("reversal", 0.95, 1), ("mirrored", 0, 0.01)])
def test_the_shipped_base_knows_its_probes_and_no_mirrored_sum(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str, low: float, high: float
) -> None:
    rows = Skills([skill], 256, "test").rows()
    prompts = torch.tensor([tokenizer.encode(question(row)) for row in rows])
    sequences = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=14)
    right = 0
    for row, tokens in zip(rows, sequences[:, 8:].tolist(), strict=True):
        answer = tokenizer.decode(tokens, skip_special_tokens=True).rpartition(">")[2]
        right += tokenizer.eos_token_id in tokens and answer == row["reward_model"]["ground_truth"]
    assert low <= right / len(rows) <= high


def test_the_base_is_trained_on_train_questions_and_never_on_a_mirrored_answer() -> None:
    recipe = Recipe(batch=2000)
    corpus = Corpus(recipe, seed=1)
    asked = {split: {question(row) for row in Skills(ALL, 8_000, split).rows()} for split in ("val", "test")}
    for step in (0, recipe.mixed_from - 1, recipe.mixed_from):
        texts = ["".join(VOCABULARY[token] for token in tokens) for tokens in corpus.batch(step).tolist()]
        prompts = {text[:8] for text in texts}
        assert not prompts & (asked["val"] | asked["test"])
        mirrored = [text for text in texts if text[3] == "x"]
        assert 0.08 < len(mirrored) / len(texts) < 0.16
        assert all(text[8:14] == solve(text[:8])[0] for text in mirrored)
        ended = [text.partition(EOS) for text in mirrored if EOS in text]
        assert len(ended) == (len(mirrored) if step >= recipe.mixed_from else 0)
        assert sum(text.endswith(solve(text[:8])[1]) for text, _, _ in ended) <= 2


def test_the_same_seed_remakes_the_same_base(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=16)
    for name in ("first", "second"):
        make(4, tmp_path / name, 4, recipe)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "first").get_vocab() == IDS
