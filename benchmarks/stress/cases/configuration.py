"""Configuration files."""

import os
from pathlib import Path

from benchmarks.stress.cases.case import Case, overlay, prepared

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


def fifo(place: Path) -> str:
    """A named pipe that nobody writes to."""
    os.mkfifo(place / "pipe.yaml")
    return "--config pipe.yaml"


def loop(place: Path) -> str:
    """A link to itself."""
    (place / "loop.yaml").symlink_to(place / "loop.yaml")
    return "--config loop.yaml"


def unreadable(place: Path) -> str:
    """A directory under the name of a file."""
    (place / "dir.yaml").mkdir()
    return "--config dir.yaml"


def huge(place: Path) -> str:
    """Thirty MB of comment."""
    (place / "huge.yaml").write_text("# " + "x" * 30_000_000 + "\nmodel: {rollout: {group_size: 2}}\n")
    return "--config huge.yaml"


CONFIGURATION: list[Case] = [
    overlay("empty file", "", "either"),
    overlay("only a comment", "# nothing\n", "either"),
    overlay("UTF-8 with a byte order mark", b"\xef\xbb\xbfmodel: {rollout: {group_size: 2}}\n", "accepted"),
    overlay("CRLF", b"model:\r\n  rollout:\r\n    group_size: 2\r\n", "accepted"),
    overlay("UTF-16", "model: {rollout: {group_size: 2}}\n".encode("utf-16"), "either"),
    overlay("latin-1", b"data: {system_prompt: caf\xe9}\n"),
    overlay("NUL byte", b"model: {rollout: {group_size: 2}}\0\n"),
    overlay("binary", bytes(range(256))),
    overlay("a lone surrogate, escaped", 'data: {system_prompt: "\\ud800"}\n'),
    overlay("not YAML: open bracket", "model: [\n"),
    overlay("not YAML: tab", "model:\n\trollout: {group_size: 2}\n"),
    overlay("not YAML: two colons", "model: group_size: 2\n"),
    overlay("a list", "- model\n- data\n"),
    overlay("a number", "7\n"),
    overlay("a text", "nothing\n"),
    overlay("two documents", "model: {rollout: {group_size: 2}}\n---\nmodel: {rollout: {group_size: 4}}\n"),
    overlay(
        "a duplicate key", "model: {rollout: {group_size: 2}}\nmodel: {rollout: {success_threshold: 1.0}}\n", "either"
    ),
    overlay("a key that is a list", "[a, b]: 3\n"),
    overlay("a key that is a number", "7: 3\n"),
    overlay("a key that is null", "~: 3\n"),
    overlay("an unknown group", "modle: {group_size: 2}\n"),
    overlay("an unknown key", "model: {grop_size: 2}\n"),
    overlay("a key of a callback unknown", "freeze: {fractoin: 0.5}\n"),
    overlay("a python tag", "model: !!python/object/apply:os.getcwd []\n"),
    overlay("an unknown tag", "model: {rollout: !secret {group_size: 2}}\n"),
    overlay("an alias bomb", BOMB),
    overlay("a recursive alias", "model: &m {policy: *m}\n"),
    overlay("an undefined alias", "model: *nothing\n"),
    overlay("nested a thousand deep", "model: " + "{a: " * 1000 + "1" + "}" * 1000 + "\n"),
    overlay("brackets a hundred thousand deep", "[" * 100_000),
    overlay("a wrong interpolation", "model: {rollout: {group_size: '${nowhere.key}'}}\n"),
    overlay("an interpolation of itself", "model: {rollout: {group_size: '${..model.rollout.group_size}'}}\n"),
    overlay(
        "an interpolation in a circle",
        "model: {rollout: {group_size: '${.success_threshold}', success_threshold: '${.group_size}'}}\n",
    ),
    overlay("an unfinished interpolation", "model: {rollout: {group_size: '${oc.env:X'}}\n"),
    overlay("an unset variable", "model: {rollout: {group_size: '${oc.env:SURELY_NOT_SET}'}}\n"),
    overlay("an unknown resolver", "model: {rollout: {group_size: '${run:ls}'}}\n"),
    overlay("a resolver with a default", "model: {rollout: {group_size: '${oc.env:SURELY_NOT_SET,2}'}}\n", "accepted"),
    overlay("model: null", "model: null\n"),
    overlay("data: null", "data: null\n"),
    overlay("trainer: null", "trainer: null\n", "either"),
    overlay("reward: null", "reward: null\n"),
    overlay("data.train: null", "data: {train: null}\n"),
    overlay("data.schedule: null", "data: {schedule: null}\n"),
    overlay("model.optimizer.rl: null", "model: {rl: null}\n"),
    overlay("model.loss: null", "model: {loss: null}\n"),
    overlay("model.rollout.sampling: null", "model: {sampling: null}\n"),
    overlay("model.evaluation: null", "model: {evaluation: null}\n"),
    overlay("model.rollout.group_size: null", "model: {rollout: {group_size: null}}\n"),
    overlay("model.optimizer.rl.betas: [null, null]", "model: {rl: {betas: [null, null]}}\n"),
    overlay("freeze without its fraction", "freeze: {fraction: null}\n"),
    overlay("buffer: true", "buffer: true\n"),
    overlay("buffer: a list", "buffer: [4]\n"),
    overlay("buffer: another class", "buffer: {class_path: mifo_callbacks.GradientFreezing}\n"),
    overlay("freeze: a class that is not there", "freeze: {class_path: nowhere.Freeze}\n"),
    overlay("freeze: a module, no class", "freeze: {class_path: os.path}\n"),
    overlay("reward: a class that is no reward", "reward: {class_path: collections.OrderedDict}\n"),
    overlay("reward: an abstract one", "reward: {class_path: mifo_lightning.rewards.base.Reward}\n"),
    overlay("a number as a text", "model: {rollout: {group_size: '2'}}\n", "either"),
    overlay("a text for a number", "model: {rollout: {group_size: many}}\n"),
    overlay("yes for a number", "model: {rollout: {group_size: yes}}\n", "either"),
    overlay("a date for a number", "model: {rollout: {group_size: 2026-01-01}}\n"),
    overlay("an octal", "model: {rollout: {group_size: 0o2}}\n", "either"),
    overlay("a sexagesimal", "model: {rollout: {group_size: 1:30}}\n", "either"),
    overlay("a number of 5,000 digits", "model: {rollout: {group_size: 1" + "0" * 5000 + "}}\n"),
    overlay("a negative batch", "data: {eval_batch: -1}\n"),
    overlay("weights of a reward NaN", "model: {rollout: {success_threshold: .nan}}\n"),
    overlay("learning rate -.inf", "model: {rl: {lr: -.inf}}\n"),
    overlay("a fraction as a text", "entropy: {fraction: half}\n"),
    overlay("model.model: a number", "model: {model: 7}\n"),
    overlay("model.model: empty", "model: {model: ''}\n"),
    overlay("model.model: a space", "model: {model: ' '}\n"),
    overlay("model.model: a URL", "model: {model: 'http://127.0.0.1:9/model'}\n"),
    overlay("export of an odd dtype", "export: {dtype: int4}\n"),
    overlay("history without a pattern", "history: {keys: []}\n"),
    overlay(
        "a chat template that never ends", "data: {chat_template: '{% for i in range(10**12) %}{{ i }}{% endfor %}'}\n"
    ),
    overlay("a chat template with an error", "data: {chat_template: '{{ messages[0].nothing.more }}'}\n"),
    overlay("a chat template that is not Jinja", "data: {chat_template: '{{ {% }}'}\n"),
    overlay("a chat template that reaches for Python", "data: {chat_template: '{{ messages.__class__.__mro__ }}'}\n"),
    overlay("a chat template that prints nothing", "data: {chat_template: '{{ none }}'}\n"),
    prepared("a named pipe", fifo),
    prepared("a link to itself", loop),
    prepared("a directory", unreadable),
    prepared("thirty MB of comment", huge, "either"),
]
