"""Model directories that lack something, lie about something or bring code: one line, and nothing of theirs runs."""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.loading import load_policy, load_tokenizer, locate, stored_dtype

MLP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(locate("embedded"), tmp_path / "model"))


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a model directory."""
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def configure(model: Path, name: str = "config.json", **changes: Any) -> None:
    """Change keys of a file of a model directory."""
    path = model / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(model: Path) -> str:
    """The line that a model directory gets, from tokenizer or weights."""

    def load() -> None:
        load_tokenizer(str(model))
        load_policy(str(model))

    with pytest.raises(InputError) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.model: ")
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", MLP, "model.norm.weight"])
def test_a_missing_weight_is_refused_by_its_name(model: Path, name: str) -> None:
    rewrite(model, lambda weights: weights.pop(name))
    assert f"{name} is missing" in refusal(model)


def test_many_missing_weights_are_counted(model: Path) -> None:
    rewrite(model, lambda weights: [weights.pop(name) for name in list(weights) if "layers.2" in name])
    assert "layers.2.input_layernorm.weight is missing" in (line := refusal(model))
    assert "and 9 more" in line


def test_a_weight_of_another_shape_is_refused_by_its_name(model: Path) -> None:
    rewrite(model, lambda weights: weights.update({MLP: torch.zeros(256, 95)}))
    assert f"{MLP} has the shape [256, 95] in place of [256, 96]" in refusal(model)


def test_weights_under_another_kind_of_model_are_refused(model: Path) -> None:
    configure(model, model_type="bert", architectures=["BertForCausalLM"])
    assert "is missing" in refusal(model)


def test_weights_without_a_place_are_named_once(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(model, lambda weights: weights.update({"model.layers.7.extra.weight": torch.zeros(2)}))
    with pytest.warns(UserWarning, match=r"no place for these weights of .*model\.layers\.7\.extra\.weight") as said:
        load_policy(str(model))
    assert len([w for w in said if "no place" in str(w.message)]) == 1
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_tied_weights_need_not_be_written(model: Path) -> None:
    rewrite(model, lambda weights: weights.pop("lm_head.weight"))
    configure(model, tie_word_embeddings=True)
    tied = load_policy(str(model)).model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    configure(model, tie_word_embeddings=False)
    assert "lm_head.weight is missing" in refusal(model)


OWN_CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
Path({trace!r}).touch()

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(Qwen2Tokenizer):
    pass
"""


@pytest.fixture
def own_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the model's own code makes when it runs; the code is named by config.json."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    trace = tmp_path / "ran"
    (model / "own.py").write_text(OWN_CODE.format(trace=str(trace)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    return trace


AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


def test_code_of_a_model_is_not_run_and_nobody_is_asked(model: Path, own_code: Path) -> None:
    configure(model, model_type="own", auto_map=AUTO_MAP)
    assert "set model.loading.trust_remote_code: true" in refusal(model)
    with pytest.raises(InputError, match=r"model\.loading\.trust_remote_code"):
        stored_dtype(str(model))
    with pytest.raises(InputError, match=r"model\.loading\.trust_remote_code"):
        load_policy(str(model))
    assert not own_code.exists()


OWN_TOKENIZER: dict[str, Any] = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}


@pytest.mark.parametrize("kind", ["qwen2", "stablelm"])
def test_code_of_a_tokenizer_is_not_run_and_that_is_said(model: Path, own_code: Path, kind: str) -> None:
    configure(model, model_type=kind)
    configure(model, "tokenizer_config.json", **OWN_TOKENIZER)
    with pytest.warns(UserWarning, match="the code that .* brings is not run"):
        load_tokenizer(str(model))
    assert not own_code.exists()


def test_code_beside_a_known_kind_is_not_run_and_that_is_said(model: Path, own_code: Path) -> None:
    configure(model, auto_map=AUTO_MAP)
    with pytest.warns(UserWarning, match="the code that .* brings is not run"):
        load_policy(str(model))
    assert not own_code.exists()


def test_code_that_is_trusted_runs(model: Path, own_code: Path) -> None:
    configure(model, model_type="own", auto_map=AUTO_MAP)
    load_tokenizer(str(model), trust_remote_code=True)
    assert type(load_policy(str(model), trust_remote_code=True).model).__name__ == "OwnModel"
    assert stored_dtype(str(model), trust_remote_code=True) == torch.float32
    assert own_code.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "3", '"qwen2"', "\x00\x01", "[" * 100_000, "{}", '{"model_type": 3}'),
        *('{"model_type": "no such"}', '{"model_type": "qwen2", "vocab_size": "many"}'),
    ],
)
def test_a_broken_configuration_is_one_line(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    refusal(model)


@pytest.mark.parametrize(
    "changes",
    [
        *({"vocab_size": -1}, {"vocab_size": 0}, {"vocab_size": 10**9}, {"num_attention_heads": 0}, {"hidden_size": 0}),
        *({"num_hidden_layers": -1}, {"num_hidden_layers": "three"}, {"num_attention_heads": 5}, {"hidden_act": "no"}),
        *(
            {"torch_dtype": "float33", "dtype": None},
            {"dtype": "bogus"},
            {"dtype": 7},
            {"rope_parameters": 3},
            {"layer_types": 5},
        ),
        *({"eos_token_id": "x"}, {"pad_token_id": 99}, {"rms_norm_eps": "x"}, {"quantization_config": {"a": 1}}),
    ],
    ids=str,
)
def test_an_impossible_value_in_the_configuration_is_one_line(model: Path, changes: dict[str, Any]) -> None:
    (model / "generation_config.json").unlink()
    configure(model, **changes)
    refusal(model)


@pytest.mark.parametrize(
    "content",
    [b"", b"text", struct.pack("<Q", 2**60), struct.pack("<Q", 5) + b"{}", struct.pack("<Q", 2) + b"[]", None],
    ids=["empty", "text", "huge header", "short header", "no object", "cut"],
)
def test_broken_weights_are_one_line(model: Path, content: bytes | None) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert "cannot be loaded" in refusal(model)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}', "\x00", "[" * 100_000])
def test_a_broken_generation_configuration_is_one_line(model: Path, text: str) -> None:
    (model / "generation_config.json").write_text(text)
    refusal(model)


def test_a_tokenizer_without_its_file_is_one_line(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00", "[" * 100_000, '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_line(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    if (name, text) == ("tokenizer_config.json", "{}"):
        pytest.skip("the file need not say anything")
    refusal(model)


def test_a_model_that_looks_ahead_is_refused(model: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=24, **sizes)).save_pretrained(model)
    assert "depends on the tokens after it" in refusal(model)


@pytest.mark.parametrize(
    ("changes", "text"), [({"dtype": "int8"}, "no floating type"), ({"num_hidden_layers": 10**9}, "at most")]
)
def test_integers_and_endless_layers_are_refused(model: Path, changes: dict[str, Any], text: str) -> None:
    configure(model, **changes)
    assert text in refusal(model)
