"""What an exported model brings along: the prompts of training and a card that says where it comes from."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import short
from conftest import ALONE, make_data
from huggingface_hub import ModelCard
from question_rows import CHAT, make_tokenizer, one, row
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mifo_lightning.cli import main
from mifo_lightning.cli.parts import METHOD
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.model_card import GROUPS, escaped, model_card
from mifo_lightning.policy.loading import export_model
from mifo_lightning.policy.policy import Policy
from mifo_lightning.policy.template import kept_template, with_system

HOSTILE = 'Say "it\'s" {{ 7 * 7 }} {% raw %} \\n\\\\ #} é 🦆\nand -%} end.\t'
OTHER = "\n{{ 'Q: ' }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ 'A:' }}"


@pytest.mark.parametrize("system", [None, "Be brief.", HOSTILE])
@pytest.mark.parametrize("template", [None, OTHER])
def test_the_exported_template_gives_the_prompts_of_training(
    policy: Policy, tmp_path: Path, template: str | None, system: str | None
) -> None:
    tokenizer = make_tokenizer()
    kept = kept_template(tokenizer.get_chat_template(template), system)
    export_model(policy, tokenizer, tmp_path, write=True, chat_template=kept)
    exported: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.chat_template == CHAT  # that of the run is left alone
    for own in ("", "You are a poet."):
        asked = row(system=own)
        trained = one([asked], tokenizer, chat_template=template, system_prompt=system).prompt
        messages: Any = with_system(asked["prompt"], system)  # as training showed them
        shown = [messages, asked["prompt"]] if not own or system is None else [messages]
        for conversation in shown:
            ids = exported.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
            assert ids == trained
    assert own in exported.apply_chat_template(asked["prompt"], tokenize=False)  # a user's system message is heard


def test_a_run_leaves_a_model_with_its_template_and_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    arguments = [*short(tmp_path / "run", data__schedule__rl_steps="1"), "--seed_everything", "3"]
    arguments += ["--data.prompts.chat_template", str(tmp_path / "chat.jinja"), "--data.prompts.max_tokens", "20"]
    main(arguments)
    model = tmp_path / "run" / "model"
    exported: Any = AutoTokenizer.from_pretrained(model)
    assert exported.chat_template == template
    rows = Skills(["addition"], 4)
    data = make_data(**ALONE, train=rows, chat_template=template, max_prompt_tokens=20)
    data.setup("fit")
    for asked, question in zip(rows.rows(), data._questions["train"], strict=True):
        conversation = asked["prompt"]
        assert exported.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"] == question.prompt
    card = ModelCard.load(model / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mifo-lightning", "reinforcement-learning"],
    }
    text = card.text.replace("\\", "")
    assert f"```\npython -m mifo_lightning {shlex.join(arguments)}\n```" in card.text
    assert "- Seed: 3" in text
    for group in ("entropy (fraction 0.2, ", "freeze (fraction 0.5, ", "buffer (size 8, max_accuracy 0.5, "):
        assert group in text
    assert "| train | addition | 32 | 32 |" in text
    assert "Results, before → after" in text
    assert "| all | " in text
    assert "| mean of sources |" in text


def test_text_of_the_data_is_no_markup() -> None:
    """A source may be called anything: it is one cell, and no tag, link or head of the card."""
    name = "a|b\n---\n<script>x</script> [link](http://x) `code` # **\x1b[31m"
    config = {
        "model": {
            "model": "org/base",
            "loss": {},
            "rollout": {"group_size": 8, "sampling": {}},
            "evaluation": {"sampling": {}},
        },
        "data": {"schedule": {}, "prompts": {}},
        "seed_everything": 0,
    }
    text = model_card(config, ["fit", "--x", "```\n# y"], {"train": {name: (2, 1)}}, {}, {"all/avg@1": 0.5}, "org/base")
    card = ModelCard(text)
    assert card.data.base_model == "org/base"
    (line,) = [line for line in text.splitlines() if line.startswith("| train | ")]
    assert line == f"| train | {escaped(name)} | 2 | 1 |"
    assert "\x1b" not in line
    assert not set("<|`[#*") & set(re.sub(r"\\.", "", escaped(name)))
    assert "\n````\npython -m mifo_lightning fit --x '```\n# y'\n````\n" in text


def test_the_card_names_every_callback_of_the_method() -> None:
    assert set(GROUPS) == set(METHOD)
