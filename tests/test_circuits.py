"""Circuits: what is patched is what was named, sets of heads suffice as they say, and records are made once."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import t as student
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers import LlamaForCausalLM as Llama

from experiments.circuits import measures
from experiments.circuits.__main__ import main
from experiments.circuits.measures import Questions, accuracy, chance_jaccard, jaccard, other_sets, random_change
from experiments.circuits.patching import Outputs, Part, head_parts, mlp_parts, record, replaced, sites
from experiments.circuits.records import Sample, transplant
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.loading import export_model, load_policy, load_tokenizer, locate

SHAPE: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "initializer_range": 0.4,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "llama": lambda: Llama(LlamaConfig(**SHAPE, head_dim=8)),  # heads together wider than the model
}


def build(family: str = "qwen2", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def draw(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(0, 13, (rows, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_patched_head_is_the_only_one_that_changes(family: str) -> None:
    model: Any = build(family)
    tokens, other = draw(), record(model, draw(seed=1))
    own = record(model, tokens)
    for part in (Part(1, 2), Part(0, 3)):
        with replaced(model, [part], other):
            got = record(model, tokens)
        width = got.heads[0].shape[-1] // 4
        columns = torch.zeros(4 * width, dtype=torch.bool)
        columns[part.head * width : (part.head + 1) * width] = True  # type: ignore[operator]
        assert torch.equal(got.heads[part.layer][..., columns], other.heads[part.layer][..., columns])
        assert torch.equal(got.heads[part.layer][..., ~columns], own.heads[part.layer][..., ~columns])
        assert part.layer == 0 or torch.equal(got.heads[0], own.heads[0])
        assert not torch.equal(got.mlps[part.layer], own.mlps[part.layer])

    # the last layer by hand, with head 2 of the other rows
    width = own.heads[1].shape[-1] // 4
    mixed = own.heads[1].clone()
    mixed[..., 2 * width : 3 * width] = other.heads[1][..., 2 * width : 3 * width]
    layer, before = model.model.layers[1], model(tokens, output_hidden_states=True).hidden_states[1]
    after = before + layer.self_attn.o_proj(mixed)
    after = after + layer.mlp(layer.post_attention_layernorm(after))
    with replaced(model, [Part(1, 2)], other):
        torch.testing.assert_close(logits(model, tokens), model.lm_head(model.model.norm(after)))


@torch.no_grad()
def test_a_patched_mlp_is_the_only_part_that_changes() -> None:
    model = build()
    tokens, other = draw(), record(model, draw(seed=1))
    own = record(model, tokens)
    with replaced(model, [Part(0)], other):
        got = record(model, tokens)
    assert torch.equal(got.heads[0], own.heads[0])
    assert torch.equal(got.mlps[0], other.mlps[0])
    assert not torch.equal(got.heads[1], own.heads[1])


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = build()
    tokens, other = draw(), record(model, draw(seed=1))
    own = logits(model, tokens)
    with replaced(model, [Part(0, 0), Part(1)], other):
        assert not torch.equal(logits(model, tokens), own)
    with pytest.raises(RuntimeError), replaced(model, [Part(0, 0), Part(1)], other):  # of other rows
        logits(model, tokens[:3])
    assert torch.equal(logits(model, tokens), own)


@torch.no_grad()
def test_the_mean_of_a_head_that_never_varies_changes_nothing() -> None:
    model: Any = build()
    value = model.model.layers[1].self_attn.v_proj  # 2 groups of keys and values, each for two heads
    value.weight[:6] = 0.0
    value.bias.normal_()
    tokens, mean = draw(), record(model, draw(rows=9, seed=1)).mean()
    own = logits(model, tokens)
    with replaced(model, [Part(1, 0), Part(1, 1)], mean):
        torch.testing.assert_close(logits(model, tokens), own)
    with replaced(model, [Part(1, 2)], mean):
        assert not torch.allclose(logits(model, tokens), own, atol=1e-3)


def test_the_mean_is_over_questions_and_keeps_positions() -> None:
    outputs = record(build(), draw(rows=9))
    mean = outputs.mean()
    assert mean.heads[1].shape == (1, *outputs.heads[1].shape[1:])
    torch.testing.assert_close(mean.mlps[0][0, 3], outputs.mlps[0][:, 3].sum(0) / 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_patched_with_itself_is_itself_bit_for_bit(family: str) -> None:
    model, tokens = build(family), draw()
    own, outputs = logits(model, tokens), record(model, tokens)
    parts = [*head_parts(model), *mlp_parts(model)]
    assert len(parts) == 2 * (4 + 1)
    for chosen in ([], parts[:1], parts[2:7], parts):
        with replaced(model, chosen, outputs):
            assert torch.equal(logits(model, tokens), own)


@torch.no_grad()
def test_all_parts_of_the_base_make_the_base_where_the_rest_is_the_base() -> None:
    """Exact by construction: what is left is embedding, `o_proj`, the last norm and the head of the model."""
    base, tuned = build(), build()
    left = ("embed_tokens", "o_proj", "lm_head", "model.norm")
    for name, p in tuned.named_parameters():
        if not any(text in name for text in left):
            p += 0.3 * torch.randn_like(p)
    tokens = draw()
    want, outputs = logits(base, tokens), record(base, tokens)
    heads, mlps = head_parts(base), mlp_parts(base)
    assert not torch.allclose(logits(tuned, tokens), want, atol=0.1)
    with replaced(tuned, [*heads, *mlps], outputs):
        assert torch.equal(logits(tuned, tokens), want)
    with replaced(tuned, heads, outputs):
        assert not torch.allclose(logits(tuned, tokens), want, atol=0.1)


def test_a_family_without_the_named_modules_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=13, n_positions=8))
    with pytest.raises(InputError, match="GPT2LMHeadModel: not every layer has an `o_proj`"):
        sites(model)


@torch.no_grad()
def test_accuracy_is_that_of_greedy_decoding_that_gives_the_demonstration() -> None:
    model = build()
    prompts = draw(rows=40)[:, :4]
    decoded = prompts
    for _ in range(3):
        decoded = torch.cat([decoded, logits(model, decoded)[:, -1:].argmax(-1)], 1)
    wrong = decoded.clone()
    wrong[::4, 5] = (wrong[::4, 5] + 1) % 13
    assert accuracy(model, Questions(decoded, 4)) == 1.0
    assert accuracy(model, Questions(wrong, 4)) == 0.75
    wrong[::2, 3] = (wrong[::2, 3] + 1) % 13  # the prompt is not scored, though it may change what is said
    assert accuracy(model, Questions(wrong, 7 - 1)) >= accuracy(model, Questions(wrong, 4))


@pytest.mark.parametrize("rows", [20, 100])
def test_sufficing_is_exactly_reaching_the_level(rows: int) -> None:
    model = build()
    tokens = draw(rows)
    tokens[:, 6] = logits(model, tokens)[:, 5].argmax(-1)  # the model's own last token: a whole accuracy of 1
    questions, mean = Questions(tokens, 6), record(model, draw(rows=30, seed=2)[:, :-1]).mean()
    found = set()
    for ablated in list(combinations(head_parts(model), 3))[::3]:
        reached = accuracy(model, questions, ablated, mean)
        for level in (reached, reached + 1 / rows, reached - 1 / rows, 0.5):
            enough = measures.suffices(model, questions, ablated, mean, level)
            assert enough == (reached >= level - 1e-9)
            found.add(enough)
    assert found == {True, False}


@pytest.mark.parametrize("seed", range(20))
def test_grown_sets_are_enough_and_none_smaller_than_the_smallest_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [Part(layer, head) for layer in range(2) for head in range(3)]
    sets = [frozenset(s) for size in range(7) for s in combinations(parts, size)]
    good = {s for s in sets if rng.random() < 0.1} | {frozenset(parts)}
    necessities = dict(zip(parts, rng.random(6), strict=True))
    grown = measures.grow(necessities, good.__contains__)
    assert grown in good
    left = [necessities[part] for part in parts if part not in grown]
    assert min([necessities[part] for part in grown], default=1) >= max(left, default=0)
    smallest = measures.smallest(parts, good.__contains__, grown)
    assert smallest in good
    assert len(smallest) == min(len(s) for s in good) <= len(grown)


def test_growing_stops_as_soon_as_it_is_enough() -> None:
    parts = [Part(0, head) for head in range(4)]
    necessities = dict(zip(parts, [0.1, 0.4, 0.4, -0.2], strict=True))
    assert measures.grow(necessities, lambda kept: len(kept) >= 2) == {parts[1], parts[2]}
    assert measures.grow(necessities, lambda kept: True) == frozenset()
    assert measures.grow(necessities, lambda kept: False) == frozenset(parts)


@pytest.mark.parametrize(("a", "b", "n"), [(2, 3, 5), (0, 2, 4), (4, 4, 5), (5, 5, 5), (0, 0, 3), (1, 1, 1)])
def test_likeness_by_chance_is_the_mean_over_all_sets(a: int, b: int, n: int) -> None:
    parts = [Part(0, head) for head in range(n)]
    every = [jaccard(parts[:a], s) for s in combinations(parts, b)]
    assert chance_jaccard([(a, b, n)]) == pytest.approx(np.mean(every))


def test_likeness_by_chance_keeps_how_many_heads_a_layer_has() -> None:
    first, last = ([Part(layer, head) for head in range(3)] for layer in (0, 1))
    own = {*first, last[0]}  # and by chance all of the first layer again, with two of the last one
    every = [jaccard(own, {*first, *s}) for s in combinations(last, 2)]
    assert chance_jaccard([(3, 3, 3), (1, 2, 3)]) == pytest.approx(np.mean(every))


def test_other_sets_are_as_large_all_different_and_never_the_circuit() -> None:
    parts = [Part(0, head) for head in range(5)]
    circuit = frozenset(parts[:2])
    for seed in "abcdefghij":
        others = other_sets(parts, circuit, 9, seed)
        assert len(set(others)) == 9  # all there are
        assert circuit not in others
        assert {len(other) for other in others} == {2}
    assert (
        other_sets(parts, circuit, 4, "a") == other_sets(parts, circuit, 4, "a") != other_sets(parts, circuit, 4, "b")
    )
    assert other_sets(parts, frozenset(parts), 9, "a") == []


def test_a_random_change_is_as_large_in_every_matrix() -> None:
    base = {"a": torch.randn(5, 7), "b": torch.randn(9), "still": torch.ones(3)}
    tuned = {"a": base["a"] + torch.randn(5, 7), "b": base["b"] * 1.5, "still": base["still"]}
    changed = random_change(base, tuned, "0")
    assert not torch.equal(changed["a"], random_change(base, tuned, "1")["a"])
    for name in ("a", "b"):
        assert (changed[name] - base[name]).norm() == pytest.approx(float((tuned[name] - base[name]).norm()), rel=1e-5)
        assert not torch.allclose(changed[name], tuned[name], atol=0.01)
    assert torch.equal(changed["still"], base["still"])


# the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid with one finished run, whose model is the embedded base with noise, and one that is not finished."""
    policy = load_policy("embedded")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn_like(p)
    grid = tmp_path_factory.mktemp("grid")
    run = grid / "sft" / "one" / "seed3"
    export_model(policy, load_tokenizer("embedded"), run / "model", write=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"model": locate("embedded")}}))
    (run / "summary.json").write_text("{}")
    (run / "outcome.json").write_text('{"error": null, "seconds": 1.0}')
    (grid / "rl" / "one" / "seed3").mkdir(parents=True)
    return grid


def content(runs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "runs": str(runs),
        "arms": ["rl", "sft"],
        "primary_arm": "sft",
        "bases": {"one": locate("embedded")},
        "skills": ["mirrored", "sorting"],
        "untrained": ["sorting"],
        "questions": 10,
        "kept": 0.3,
        "random_sets": 2,
        "out": str(out),
    } | changes


def run(directory: Path, what: dict[str, Any]) -> None:
    file = directory / "study.yaml"
    file.write_text(yaml.safe_dump(what))
    main(["--config", str(file)])


@pytest.fixture(scope="module")
def measured(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command has left its records and page."""
    directory = tmp_path_factory.mktemp("measured")
    run(directory, content(runs, directory / "out"))
    return directory / "out"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_records_say_what_they_mean(measured: Path) -> None:
    base, sft = read(measured / "base" / "one.json"), read(measured / "sft" / "one.json")
    sorting, mirrored = base["skills"]["sorting"], base["skills"]["mirrored"]
    assert sorting["accuracy"] > 0.9
    assert (
        set(sorting["mean"])
        == set(sorting["resampled"])
        == {f"{i}.{part}" for i in range(3) for part in "012"} | {f"{i}.mlp" for i in range(3)}
    )
    assert sorting["circuit_accuracy"] >= 0.3 * sorting["accuracy"]
    assert sorting["smallest_accuracy"] >= 0.3 * sorting["accuracy"]
    assert 0 < len(sorting["smallest"]) <= len(sorting["circuit"])
    assert mirrored["accuracy"] == 0
    assert mirrored["circuit"] is None is mirrored["smallest"]
    assert base["other_sample"]["sorting"]["mean"] != sorting["mean"]

    into_tuned, into_base = (sft["transplant"]["sorting"][way] for way in ("into_tuned", "into_base"))
    assert list(sft["transplant"]) == ["sorting"]
    assert into_tuned["none"] < into_base["none"]
    assert into_base["none"] == base["other_sample"]["sorting"]["accuracy"]
    assert len(into_tuned["random"]) == 2
    for way in (into_tuned, into_base):
        size = len(sorting["circuit"])
        assert way["most_necessary_first"][size - 1] == way["circuit"]
        assert way["most_necessary_first"][8] == way["least_necessary_first"][8] == way["heads"]
    assert sft["run"].endswith("seed3")
    assert sft["random_change"]["sorting"]["accuracy"] != sorting["accuracy"]


def test_what_has_a_record_is_not_measured_again(
    runs: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in measured.glob("*/*.json")}
    assert len(before) == 2
    monkeypatch.setattr("experiments.circuits.records.Bench", None)
    run(tmp_path, content(runs, measured))
    assert {path: path.stat().st_mtime_ns for path in measured.glob("*/*.json")} == before
    printed = capsys.readouterr().out
    assert "rl/one: no finished run below" in printed
    assert "sft/one" not in printed
    monkeypatch.undo()

    (measured / "sft" / "one.json").rename(tmp_path / "kept.json")
    run(tmp_path, content(runs, measured))
    again, first = read(measured / "sft" / "one.json"), read(tmp_path / "kept.json")
    assert {**again, "cpu_seconds": 0} == {**first, "cpu_seconds": 0}
    assert (measured / "base" / "one.json").stat().st_mtime_ns == before[measured / "base" / "one.json"]


def test_other_settings_are_measured_anew(runs: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "base").mkdir(parents=True)
    (out / "base" / "one.json").write_bytes((measured / "base" / "one.json").read_bytes())
    what = content(runs, out, skills=["sorting"], questions=5, arms=["rl"], primary_arm="rl")
    with pytest.raises(SystemExit):  # no arm has a run: no page, but the base has its record
        run(tmp_path, what)
    assert read(out / "base" / "one.json")["key"] != read(measured / "base" / "one.json")["key"]


def test_the_page_is_made_of_records_alone(measured: Path, tmp_path: Path) -> None:
    main(["--report", str(measured), "--out", str(tmp_path)])
    for name in ("README.md", "circuits.svg"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes()
    page = (tmp_path / "README.md").read_text()
    assert "- sft: patching the base's circuit restores" in page
    assert "rl" not in [cell.strip() for cell in page.replace("\n", "|").split("|")]  # it has no run
    assert "most necessary first" in (tmp_path / "circuits.svg").read_text()


def test_the_primary_comparison_is_the_mean_over_bases(measured: Path, tmp_path: Path) -> None:
    """Three bases on which the order of heads makes a difference of .5, .7 and .3."""
    study = read(measured / "study.json") | {"bases": ["a", "b", "c"]}
    for base, most in (("a", 0.7), ("b", 0.9), ("c", 0.5)):
        for arm in ("base", "sft"):
            made = read(measured / arm / "one.json")
            if arm == "sft":
                made["transplant"]["sorting"]["into_tuned"] |= {
                    "none": 0.1, "circuit": most + 0.05, "random": [0.2, 0.3],
                    "most_necessary_first": [most] * 8 + [0.0], "least_necessary_first": [0.2] * 8 + [0.0],
                }  # fmt: skip
            (tmp_path / arm).mkdir(exist_ok=True)
            (tmp_path / arm / f"{base}.json").write_text(json.dumps(made))
    (tmp_path / "study.json").write_text(json.dumps(study))
    main(["--report", str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    half = student.ppf(0.975, 2) * 0.2 / 3**0.5
    assert f"+0.500 [{0.5 - half:+.3f}, {0.5 + half:+.3f}], ahead on 3 of 3 bases, p = 0.250, not significant" in page
    assert "restores 0.650 [" in page
    assert "as many random heads restore 0.150 [0.150, 0.150]" in page


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kept": 1.5}, "kept: 1.5 is not allowed; it must be above 0, at most 1"),
        ({"questions": 0}, "questions: 0 is not allowed; it must be 1 or more"),
        ({"given": 12}, "given: 12 is not allowed"),
        ({"skills": ["sorting", "juggling"]}, "skills: ['sorting', 'juggling'] is not allowed"),
        ({"untrained": ["reversal"]}, "untrained: ['reversal'] is not allowed; it must be one or more of `skills`"),
        ({"primary_arm": "mifo"}, "primary_arm: mifo is not allowed; it must be one of rl, sft"),
        ({"arms": ["sft", "base"]}, "none 'base'"),
        ({"question": 1}, "unknown key question; allowed are runs"),
        ({"bases": {"one": "nowhere"}}, "bases.one: nowhere is no model directory"),
        ({"questions": "many"}, "questions"),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run(tmp_path, content(runs, tmp_path / "out", **change))
    assert end.value.code == 2
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert line in last


def test_a_run_from_another_base_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.symlink_to(locate("embedded"))
    with pytest.raises(SystemExit):
        run(tmp_path, content(runs, tmp_path / "out", bases={"one": str(other)}, questions=2, skills=["sorting"]))
    assert f"seed3 started from {locate('embedded')}" in capsys.readouterr().err


def test_records_of_other_settings_make_no_page(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = read(measured / "study.json")
    (tmp_path / "study.json").write_text(json.dumps({**study, "measured": {**study["measured"], "questions": 11}}))
    for arm in ("base", "sft"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "one.json").write_bytes((measured / arm / "one.json").read_bytes())
    with pytest.raises(SystemExit) as end:
        main(["--report", str(tmp_path)])
    assert end.value.code == 2
    assert "one.json: was measured with other settings" in capsys.readouterr().err


def test_what_is_put_in_is_the_work_of_the_named_heads_alone() -> None:
    """A head of the last layer that is put in carries nothing of what heads of the first one did."""
    base, tuned, tokens = build(), build(seed=1), draw(60)
    tokens[:, 6] = logits(tuned, tokens)[:, 5].argmax(-1)
    sample = Sample(Questions(tokens, 6), Questions(draw(30, 3), 6))
    order = head_parts(base)
    found = transplant(tuned, base, sample, order, frozenset([Part(1, 2)]), [])
    with torch.no_grad():
        mean = record(base, sample.reference.inputs).mean()
        with replaced(base, [part for part in order if part != Part(1, 2)], mean):
            alone = record(base, sample.scored.inputs)
    intact = record(base, sample.scored.inputs)
    assert found["circuit"] == accuracy(tuned, sample.scored, [Part(1, 2)], alone)
    assert found["circuit"] != accuracy(tuned, sample.scored, [Part(1, 2)], intact)
    assert found["heads"] == accuracy(tuned, sample.scored, order, intact)


def test_a_directory_without_records_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--report", str(tmp_path)])
    assert end.value.code == 2
    assert "has no study.json" in capsys.readouterr().err


def test_the_shipped_file_is_read() -> None:
    from experiments.circuits.study import read_study

    study = read_study(Path(__file__).parents[1] / "experiments" / "circuits.yaml")
    assert len(study.bases) == 12
    assert study.arms == ["rl", "sft", "sft_then_rl", "interleave", "mifo"]


def test_outputs_are_named_tuples_of_layers() -> None:
    outputs = record(build(), draw())
    assert isinstance(outputs, Outputs)
    assert [Part.named(str(part)) for part in (Part(1, 2), Part(0))] == [Part(1, 2), Part(0)]
