"""Model directories: the embedded model, and what can be wrong with a copy of it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.stress.cases.case import Case, Expected, changed_model, prepared

Change = Callable[[Path], object]
EMBEDDING = "model.embed_tokens.weight"


def settings(file: str, **changes: Any) -> Change:
    """Change keys of a JSON file; `...` removes one."""

    def change(directory: Path) -> None:
        path = directory / file
        held = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))

    return change


def weights(change_tensors: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the dictionary of weights."""

    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return change


def written(file: str, content: str | bytes) -> Change:
    """Overwrite a file."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda directory: (directory / file).write_bytes(raw)


def without(*files: str) -> Change:
    """Remove files."""

    def change(directory: Path) -> None:
        for file in files:
            (directory / file).unlink()

    return change


def damaged(edit: Callable[[bytearray], object], file: str = "model.safetensors") -> Change:
    """Edit a file's bytes."""

    def change(directory: Path) -> None:
        raw = bytearray((directory / file).read_bytes())
        edit(raw)
        (directory / file).write_bytes(raw)

    return change


def header(text: bytes) -> Change:
    """A safetensors file of this header and nothing else."""
    return written("model.safetensors", struct.pack("<Q", len(text)) + text)


def other(model: Callable[[], PreTrainedModel]) -> Change:
    """Weights and configuration of another kind of model."""

    def change(directory: Path) -> None:
        torch.manual_seed(0)
        model().save_pretrained(directory)

    return change


def first(tensors: dict[str, torch.Tensor]) -> str:
    """The name of one MLP weight."""
    return next(name for name in sorted(tensors) if "mlp" in name)


def custom_code(directory: Path) -> None:
    """Brings a modeling file of its own, and asks to run it."""
    settings("config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})(
        directory
    )
    (directory / "mine.py").write_text("open('ran', 'w').close()\nraise SystemExit(0)\n")


def pickled(directory: Path) -> None:
    """Weights as a pickle that runs a command."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch ran",)

    (directory / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, directory / "pytorch_model.bin")


def index_outside(directory: Path) -> None:
    """A shard index that names a file elsewhere."""
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {EMBEDDING: "../../../etc/passwd"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(directory: Path) -> None:
    """A shard index that names a file that is not there."""
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def bigger_vocabulary(directory: Path) -> None:
    """A tokenizer that knows more tokens than the embedding has rows."""
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary.update({chr(0x4E00 + i): len(vocabulary) + i for i in range(100)})
    path.write_text(json.dumps(held))


def tokenizer(**changes: Any) -> Change:
    """Change keys of tokenizer_config.json."""
    return settings("tokenizer_config.json", **changes)


def config(**changes: Any) -> Change:
    """Change keys of config.json."""
    return settings("config.json", **changes)


def place_case(name: str, prepare: Callable[[Path], str], expect: Expected = "refused") -> Case:
    """A place that is no copy of the model."""
    return prepared(name, prepare, expect)


def weights_directory(directory: Path) -> None:
    """A directory under the name of the weights."""
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


def empty_directory(place: Path) -> str:
    """Nothing in it."""
    (place / "model").mkdir()
    return "--model.model ./model"


def a_file(place: Path) -> str:
    """A file under the name of a directory."""
    (place / "model").write_text("{}")
    return "--model.model ./model"


def link_loop(place: Path) -> str:
    """A link to itself."""
    (place / "model").symlink_to(place / "model")
    return "--model.model ./model"


MODELS: list[Case] = [
    changed_model("unchanged", lambda d: None, "accepted"),
    changed_model("no config.json", without("config.json")),
    changed_model("config.json empty", written("config.json", "")),
    changed_model("config.json a list", written("config.json", "[]")),
    changed_model("config.json cut", damaged(lambda raw: raw.__delitem__(slice(100, None)), "config.json")),
    changed_model("config.json binary", written("config.json", bytes(range(256)))),
    changed_model("config.json of brackets", written("config.json", "[" * 100_000)),
    changed_model("config.json {}", written("config.json", "{}")),
    changed_model("model_type missing", config(model_type=...), "either"),
    changed_model("model_type unknown", config(model_type="nothing")),
    changed_model("model_type a number", config(model_type=7)),
    changed_model("model_type bert", config(model_type="bert", architectures=["BertModel"])),
    # weights that there is no place for are named in a warning, not refused: heads of other tasks are common
    changed_model("model_type llama", config(model_type="llama", architectures=["LlamaForCausalLM"]), "either"),
    changed_model("torch_dtype bogus", config(dtype="bogus")),
    changed_model("torch_dtype int8", config(dtype="int8")),
    changed_model("torch_dtype bfloat16", config(dtype="bfloat16"), "accepted"),
    changed_model("hidden_size 0", config(hidden_size=0)),
    changed_model("hidden_size -1", config(hidden_size=-1)),
    changed_model("hidden_size a text", config(hidden_size="many")),
    changed_model("hidden_size other than the weights", config(hidden_size=48)),
    changed_model("one layer fewer", config(num_hidden_layers=2, layer_types=["full_attention"] * 2), "either"),
    changed_model("one layer more", config(num_hidden_layers=4, layer_types=["full_attention"] * 4)),
    changed_model("heads that do not divide", config(num_attention_heads=5)),
    changed_model("heads 0", config(num_attention_heads=0)),
    changed_model("vocab_size smaller", config(vocab_size=8)),
    changed_model("vocab_size huge", config(vocab_size=10**12)),
    changed_model("layers 10^9", config(num_hidden_layers=10**9, layer_types=...)),
    changed_model("activation unknown", config(hidden_act="magic")),
    changed_model("positions 4", config(max_position_embeddings=4)),
    changed_model("untied head that is not there", config(tie_word_embeddings=False)),
    changed_model("auto_map", custom_code),
    changed_model("no weights", without("model.safetensors")),
    changed_model("weights empty", written("model.safetensors", b"")),
    changed_model("weights a text", written("model.safetensors", "nothing here")),
    changed_model("weights cut", damaged(lambda raw: raw.__delitem__(slice(600_000, None)))),
    changed_model("weights: header too long", damaged(lambda raw: raw.__setitem__(slice(0, 8), b"\xff" * 8))),
    changed_model("weights: header of brackets", header(b"[" * 100_000)),
    changed_model("weights: no tensor", header(b"{}")),
    changed_model(
        "weights: an LFS pointer", written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    ),
    changed_model("weights: a directory", weights_directory),
    changed_model("weights: the embedding missing", weights(lambda t: t.pop(EMBEDDING))),
    changed_model("weights: one MLP matrix missing", weights(lambda t: t.pop(first(t)))),
    changed_model("weights: one more", weights(lambda t: t.update(extra=torch.zeros(3))), "either"),
    changed_model("weights: one of another shape", weights(lambda t: t.update({first(t): torch.zeros(3, 5)}))),
    changed_model(
        "weights: one of integers", weights(lambda t: t.update({first(t): t[first(t)].to(torch.int8)})), "either"
    ),
    changed_model("weights: NaN", weights(lambda t: t[first(t)].fill_(torch.nan))),
    changed_model("weights: infinite", weights(lambda t: t[EMBEDDING].fill_(torch.inf))),
    changed_model("weights: huge", weights(lambda t: t[first(t)].fill_(1e38)), "either"),
    changed_model("weights: zero", weights(lambda t: [x.zero_() for x in t.values()]), "either"),
    changed_model("weights: a pickle that runs a command", pickled),
    changed_model("weights: index names a file elsewhere", index_outside),
    changed_model("weights: a shard is missing", shard_missing),
    changed_model("no tokenizer.json", without("tokenizer.json")),
    changed_model("no tokenizer at all", without("tokenizer.json", "tokenizer_config.json")),
    changed_model("tokenizer.json empty", written("tokenizer.json", "")),
    changed_model("tokenizer.json {}", written("tokenizer.json", "{}")),
    changed_model("tokenizer.json binary", written("tokenizer.json", bytes(range(256)))),
    changed_model("tokenizer.json without a model", settings("tokenizer.json", model=...)),
    changed_model("tokenizer: no pad token", tokenizer(pad_token=None), "either"),
    changed_model("tokenizer: no end token", tokenizer(eos_token=None)),
    changed_model("tokenizer: class unknown", tokenizer(tokenizer_class="Magic"), "either"),
    changed_model("tokenizer: more tokens than the embedding", bigger_vocabulary),
    changed_model("tokenizer_config.json a list", written("tokenizer_config.json", "[]")),
    changed_model("no chat template", without("chat_template.jinja")),
    changed_model("chat template empty", written("chat_template.jinja", "")),
    changed_model("chat template broken", written("chat_template.jinja", "{{ {% }}")),
    changed_model(
        "chat template that never ends",
        written("chat_template.jinja", "{% for i in range(10**9) %}{{ i }}{% endfor %}"),
    ),
    changed_model("generation_config.json broken", written("generation_config.json", "{"), "either"),
    changed_model("end token out of range", settings("generation_config.json", eos_token_id=10**9), "either"),
    changed_model(
        "a GPT-2",
        other(
            lambda: GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=24, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
                )
            )
        ),
        "accepted",
    ),
    changed_model(
        "a BERT",
        other(
            lambda: BertForMaskedLM(
                BertConfig(
                    vocab_size=24, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
                )
            )
        ),
    ),
    changed_model(
        "a T5",
        other(
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=24, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
            )
        ),
    ),
    place_case("an empty directory", empty_directory),
    place_case("a file", a_file),
    place_case("a link to itself", link_loop),
    place_case("nowhere", lambda place: "--model.model ./nowhere"),
    place_case("a hub name that looks like an option", lambda place: "--model.model=--help/x"),
    place_case("a hub name with a way out", lambda place: "--model.model ../../etc"),
    place_case("the data instead", lambda place: (shutil.copy(__file__, place / "x.py"), "--model.model ./x.py")[1]),
]
