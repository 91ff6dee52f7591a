"""A tokenizer, rows and the questions that are built of them, for the tests of prompts and demonstrations."""

from datetime import date
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mifo_lightning.common.question import Question
from mifo_lightning.data.questions import Drops, build_questions
from mifo_lightning.data.settings import Demonstrations, Prompts
from mifo_lightning.data.source import Row
from mifo_lightning.policy.template import ChatTemplate
from mifo_lightning.rewards.last_answer import LastAnswerReward

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKING = CHAT.replace("assistant\n", "assistant\n<think>\n")
TEXTS = [
    "<think>\nwe add them up\n</think>\n\\boxed{12}",
    "system user assistant: how many apples > 120?\n\n",
]


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges, some of them across the markers' edges."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=alphabet,
        special_tokens=["<|pad|>", "<|eos|>", "<|start|>"],
        show_progress=False,
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    options = {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "chat_template": CHAT} | options
    return PreTrainedTokenizerFast(tokenizer_object=model, **options)


TOKENIZER = make_tokenizer()


def row(
    question: str = "2+2?",
    truth: str = "4",
    solution: str | None = None,
    source: str = "sums",
    system: str = "",
) -> Row:
    prompt = [{"role": "system", "content": system}] if system else []
    return {
        "data_source": source,
        "prompt": [*prompt, {"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "target": None if solution is None else [{"role": "assistant", "content": solution}],
    }


def build(rows: list[Row], tokenizer: Any = TOKENIZER, **options: Any) -> tuple[list[Question], Drops]:
    template = ChatTemplate(tokenizer, options.pop("chat_template", None), options.pop("today", date.today()))
    prompts = Prompts(options.pop("system_prompt", None), None, options.pop("max_prompt_tokens", 1000))
    kept = {"answer_after": ">", "max_response_tokens": 1000, "verify_demonstrations": True}
    demonstrations = Demonstrations(*(options.pop(name, default) for name, default in kept.items()))
    defaults: dict[str, Any] = {"reward": LastAnswerReward(), "where": "data.train"}
    return build_questions(rows, template, prompts, demonstrations, **(defaults | options))


def one(*args: Any, **options: Any) -> Question:
    (question,), _ = build(*args, **options)
    return question
