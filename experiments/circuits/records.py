"""Measures a base, or an arm's model on a base, and keeps it as one JSON file, so that the command goes on later."""

import hashlib
import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.circuits import measures
from experiments.circuits.measures import Questions, accuracy, necessity
from experiments.circuits.patching import Outputs, Part, head_parts, mlp_parts, record, replaced
from experiments.circuits.study import BASE, Study
from experiments.prune_update import read_weights
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.skills import Skills
from mifo_lightning.lab.cell import outcome, write_json
from mifo_lightning.lab.grid import slug
from mifo_lightning.lab.plan import commit
from mifo_lightning.policy.loading import load_policy, load_tokenizer

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Questions of a skill that are scored, and as many others that means and resampled outputs are taken from."""

    scored: Questions
    reference: Questions


def samples(study: Study, skill: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Sample, Sample]:
    """Two samples of a skill; no question is in both, or twice in one.

    Raises:
        InputError: Questions or demonstrations differ in length, so that positions are not those of one another.
    """
    rows = Skills([skill], 4 * study.questions, study.split, study.seed).rows()
    prompts = [_ids(tokenizer, row["prompt"][0]["content"]) for row in rows]
    texts = [
        [*prompt, *_ids(tokenizer, row["target"][0]["content"]), tokenizer.eos_token_id]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    lengths = {(len(prompt), len(text)) for prompt, text in zip(prompts, texts, strict=True)}
    if len(lengths) > 1:
        raise InputError(f"{skill}: questions or demonstrations differ in length; one length is needed to average over")
    ((prompt, length),) = lengths
    if prompt + study.given >= length:
        raise InputError(
            f"given: {study.given} is not allowed; demonstrations of {skill} have {length - prompt} tokens"
        )
    quarters = torch.tensor(texts).chunk(4)
    scored, reference, *other = (Questions(part, prompt + study.given) for part in quarters)
    return Sample(scored, reference), Sample(*other)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def measure_skill(model: PreTrainedModel, sample: Sample, study: Study, full: bool = True) -> Record:
    """Accuracy, necessity of each part and the heads that suffice, of one model and skill.

    Without `full` only of heads, by mean ablation, and without the smallest circuit. A skill whose accuracy is below
    `least` has no circuit.
    """
    heads, questions = head_parts(model), sample.scored
    outputs = record(model, sample.reference.inputs)
    mean = outputs.mean()
    whole = accuracy(model, questions)
    by_mean = necessity(model, questions, heads, mean, whole)
    found: Record = {"accuracy": whole, "mean": _named(by_mean), "circuit": None}
    if full:
        mlps = mlp_parts(model)
        found["mean"] |= _named(necessity(model, questions, mlps, mean, whole))
        found["resampled"] = _named(necessity(model, questions, [*heads, *mlps], outputs, whole))
        found["smallest"] = None
    if whole < study.least:
        return found

    def enough(kept: frozenset[Part]) -> bool:
        return measures.suffices(model, questions, set(heads) - kept, mean, study.kept * whole)

    circuit = measures.grow(by_mean, enough)
    found |= {"circuit": _names(circuit), "circuit_accuracy": _with_only(model, questions, heads, circuit, mean)}
    if full:
        smallest = measures.smallest(heads, enough, circuit)
        found |= {
            "smallest": _names(smallest),
            "smallest_accuracy": _with_only(model, questions, heads, smallest, mean),
        }
    return found


def _with_only(
    model: PreTrainedModel, questions: Questions, heads: list[Part], kept: frozenset[Part], mean: Outputs
) -> float:
    return accuracy(model, questions, set(heads) - kept, mean)


def transplant(
    into: PreTrainedModel,
    source: PreTrainedModel,
    sample: Sample,
    order: list[Part],
    circuit: frozenset[Part],
    others: list[frozenset[Part]],
) -> Record:
    """Accuracy of `into` with outputs of heads of `source` on the same questions in the place of its own.

    All other heads of `source` are at their mean meanwhile: what is put in is the work of these heads, not what others
    did before them.

    Args:
        into: The model that answers.
        source: The model whose outputs are put into it.
        sample: What both read, and what means are taken from; not what the heads were chosen by.
        order: All heads, the most necessary first; one more of them each time, from either end.
        circuit: Heads.
        others: Sets of heads to compare the circuit with.
    """
    questions, mean = sample.scored, record(source, sample.reference.inputs).mean()

    def patched(heads: Collection[Part], parts: Collection[Part] = ()) -> float:
        with replaced(source, set(order) - set(heads), mean):
            outputs = record(source, questions.inputs)
        return accuracy(into, questions, [*heads, *parts], outputs)

    sizes = range(1, len(order) + 1)
    return {
        "none": accuracy(into, questions),
        "circuit": patched(circuit),
        "random": [patched(other) for other in others],
        "heads": patched(order),
        "heads_and_mlps": patched(order, mlp_parts(into)),
        "most_necessary_first": [patched(order[:size]) for size in sizes],
        "least_necessary_first": [patched(order[-size:]) for size in sizes],
    }


class Bench:
    """A base on the bench: its model, its weights and the questions, for its own record and those of the arms."""

    def __init__(self, study: Study, base: str) -> None:
        self.study, self.base, self.directory = study, base, study.bases[base]
        self.model = load_policy(str(self.directory)).model
        tokenizer = load_tokenizer(str(self.directory))
        self.samples = {skill: samples(study, skill, tokenizer) for skill in study.skills}

    def of_base(self) -> Record:
        """All skills of the base, and again on another sample of questions: the floor of any comparison with it."""
        skills = {skill: measure_skill(self.model, one, self.study) for skill, (one, _) in self.samples.items()}
        again = {
            skill: measure_skill(self.model, two, self.study, full=False) for skill, (_, two) in self.samples.items()
        }
        return {"skills": skills, "other_sample": again}

    def of_arm(self, arm: str, run: Path, of_base: Record) -> Record:
        """All skills after an arm's run and after a random change of equal size; transplants of untrained skills."""
        tuned = load_policy(str(run / "model")).model
        skills = {skill: measure_skill(tuned, one, self.study) for skill, (one, _) in self.samples.items()}
        return {
            "run": str(run),
            "skills": skills,
            "transplant": self._transplants(tuned, of_base),
            "random_change": self._after_random_change(arm, run),
        }

    def _transplants(self, tuned: PreTrainedModel, of_base: Record) -> Record:
        found: Record = {}
        heads = head_parts(self.model)
        for skill in self.study.untrained:
            known = of_base["skills"][skill]
            if known["circuit"] is None:
                continue
            circuit = frozenset(map(Part.named, known["circuit"]))
            order = measures.by_necessity({head: known["mean"][str(head)] for head in heads})
            seed = f"{self.study.seed}/{self.base}/{skill}"
            others = measures.other_sets(heads, circuit, self.study.random_sets, seed)
            how = (self.samples[skill][1], order, circuit, others)
            found[skill] = {
                "into_tuned": transplant(tuned, self.model, *how),
                "into_base": transplant(self.model, tuned, *how),
            }
        return found

    def _after_random_change(self, arm: str, run: Path) -> Record:
        seed = f"{self.study.seed}/{self.base}/{arm}"
        weights = measures.random_change(read_weights(self.directory), read_weights(run / "model"), seed)
        model = load_policy(str(self.directory)).model
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        return {skill: measure_skill(model, one, self.study, full=False) for skill, (one, _) in self.samples.items()}


def measure(study: Study) -> Iterator[str]:
    """Measure what has no record yet, base by base; a line for each record, and each run that is not there.

    Raises:
        InputError: A base is missing, or a run started from another; before anything is measured.
    """
    runs = {base: _runs(study, base) for base in study.bases}
    named = {"runs": str(study.runs), "bases": list(study.bases), "arms": study.arms, "primary_arm": study.primary_arm}
    write_json(study.out / "study.json", {**study.measured, **named})
    for base, of_arms in runs.items():
        bench: Bench | None = None
        for arm, run in of_arms.items():
            if arm != BASE and run is None:
                yield f"{arm}/{base}: no finished run below {study.runs / slug(arm) / slug(base)}, left out"
                continue
            path, key = record_path(study.out, arm, base), _key(study, base, run)
            known = _read(path)
            if (known.get("key"), known.get("measured")) == (key, study.measured):
                continue
            began = time.process_time()
            bench = bench or Bench(study, base)
            of_base = _read(record_path(study.out, BASE, base))
            found = bench.of_arm(arm, run, of_base) if run else bench.of_base()
            seconds = time.process_time() - began
            about = {"key": key, "measured": study.measured, "commit": commit(), "cpu_seconds": round(seconds, 1)}
            write_json(path, {**about, **found})
            yield f"{arm}/{base}: {seconds:.0f} CPU seconds"


def _runs(study: Study, base: str) -> dict[str, Path | None]:
    """The base first, which has no run, then the run of every arm from it."""
    directory = study.bases[base]
    if not (directory / "config.json").is_file():
        make = f"; make it with `{study.make_bases}`" if study.make_bases else ""
        raise InputError(f"bases.{base}: {directory} is no model directory{make}")
    return {BASE: None, **{arm: find_run(study, arm, base) for arm in study.arms}}


def record_path(out: Path, arm: str, base: str) -> Path:
    """Where the record of an arm on a base is kept."""
    return out / slug(arm) / f"{slug(base)}.json"


def find_run(study: Study, arm: str, base: str) -> Path | None:
    """The finished run of an arm on a base, that of its lowest seed where there are several.

    Raises:
        InputError: It started from another base.
    """
    below = study.runs / slug(arm) / slug(base)
    runs = sorted(below.glob("seed*"), key=lambda path: (len(path.name), path.name))
    run = next((run for run in runs if outcome(run).status == "done" and (run / "model").is_dir()), None)
    if run is not None:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        start, own = Path(config["model"]["model"]), study.bases[base]
        if start.name != own.name:
            raise InputError(f"bases.{base}: {own} is not allowed; {run} started from {start}")
    return run


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _key(study: Study, base: str, run: Path | None) -> str:
    """What decides a record: settings and weights."""
    digest = hashlib.sha256(json.dumps(study.measured, sort_keys=True).encode())
    for directory in (study.bases[base], *([run / "model"] if run else [])):
        for path in sorted(directory.glob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _names(parts: frozenset[Part]) -> list[str]:
    return [str(part) for part in sorted(parts)]


def _named(values: dict[Part, float]) -> dict[str, float]:
    return {str(part): value for part, value in values.items()}
