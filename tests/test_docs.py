"""The pages say what is there: every logged key, method file, key of the configuration, link. Without Sphinx."""

import html
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from monitoring import Records, monitors

import mifo_lightning as mifo
from mifo_callbacks import GradientDropping
from mifo_lightning.monitors.activity import ActivityProfiler, SecondsByActivity

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("methods/*.md"))]
CODE = re.compile(r"```.*?^```", re.S | re.M)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """`docs/generate.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def explained() -> re.Pattern[str]:
    """What the page of metrics explains, as one pattern; `<name>` in a key stands for any name."""
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    terms = re.findall(r"^((?:`[^`]+`(?:, )?)+)\n: ", page, re.M)
    keys = [key for term in terms for key in re.findall(r"`([^`]+)`", term)]
    patterns = [re.sub(r"<\w+>", "[^/]+", re.sub(r"([.@])", r"\\\1", key)) for key in keys]
    whole = [p.replace("[^/]+/", "", 1) for p in patterns if p.startswith("val/")]  # over all sources
    macro = [f"{p}_macro" for p in whole]
    return re.compile("|".join([*patterns, *whole, *macro]))


def test_every_metric_that_a_run_logs_is_on_its_page(make_trainer: Callable[..., Trainer]) -> None:
    records = Records()
    module = make_module(
        reward=mifo.WeightedRewards({"right": mifo.LastAnswerReward(">")}),
        loss=mifo.PolicyLoss(kl_coefficient=0.1, entropy_bonus=0.1),
    )
    data = make_data(val=mifo.Skills(["addition", "mirrored"], 8, split="val"))
    callbacks = [*method_callbacks(size=4), GradientDropping(during="rl"), *monitors(), SecondsByActivity(every=1)]
    trainer = make_trainer(callbacks, logger=records, profiler=ActivityProfiler(), limit_val_batches=1.0)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    logged = {key for row in records.metrics for key in row} - {"epoch"}
    rooms = {key.partition("/")[0] for key in logged}
    assert rooms >= {"phase", "rollout", "rl", "sft", "val", "entropy", "importance", "freeze", "buffer", "drop"}
    assert rooms >= {"heldout", "forgetting", "phase_kl", "layer_updates", "overlap", "retention", "costs", "seconds"}
    assert not sorted(key for key in logged if not explained().fullmatch(key))


def test_every_method_has_its_page(generate: ModuleType) -> None:
    shown = [name for page in sorted(DOCS.glob("methods/*.md")) for name in generate.methods_on(page)]
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml"))
    contents = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert all(f"\nmethods/{page.stem}\n" in contents for page in DOCS.glob("methods/*.md"))


def test_a_method_s_results_are_those_of_the_studies(generate: ModuleType) -> None:
    shown = generate.results_of(["mifo", "mifo_dagger"])
    assert len(re.findall(r"^\| mifo ", shown, re.M)) >= 2
    assert re.search(r"^\| mifo\\_dagger \| 0\.\d{3} ", shown, re.M)
    assert "The study: **" in shown
    assert "relift" not in shown.replace("half lr", "")
    assert generate.results_of(["nothing"]).startswith("No evidence")


def test_every_study_has_its_full_page(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in DOCS.glob("results/*/*") if path.is_file()}
    generate.write_full_pages(tmp_path)
    studies = [study.name for study in generate.ablations()]
    for report in (DOCS / "results" / study / "report.md" for study in studies):
        linked = generate.with_link(report.read_text(encoding="utf-8"))
        title, _, link, *_ = linked.splitlines()
        (target,) = re.findall(r'href="([^"]+)"', link)
        page = (tmp_path / report.parent.name / target).read_text(encoding="utf-8")
        assert f"<h1>{title.removeprefix('# ')}</h1>" in html.unescape(page)
        swept = json.loads((report.parent / "ablation.json").read_text(encoding="utf-8")).get("sweep")
        assert page.count("<figure>") > (0 if swept else 1), "the committed page has one picture; a front is one"
    assert {path: path.read_bytes() for path in DOCS.glob("results/*/*") if path.is_file()} == before

    made: list[str] = []
    monkeypatch.setattr("mifo_lightning.lab.report.write_page", lambda study, page: made.append(study.name))
    generate.write_full_pages(tmp_path)
    assert made == [], "what is up to date is not made again"
    os.utime(tmp_path / "paper_table" / "full.html", (0, 0))
    generate.write_full_pages(tmp_path)
    assert made == ["paper_table"]


def reference(generate: ModuleType) -> list[Any]:
    return [key for group, kind in generate.groups().items() for key in generate.keys(group, kind)]


def test_every_key_of_the_reference_is_explained(generate: ModuleType) -> None:
    keys = reference(generate)
    assert {key.name for key in keys} >= {
        "model.rollout.group_size",
        "data.schedule.rl_steps",
        "freeze.fraction",
        "buffer.size",
    }
    assert not [key.name for key in keys if not key.meaning]


def test_every_key_that_a_page_names_exists(generate: ModuleType) -> None:
    names = {key.name for key in reference(generate)}
    for base, places in generate.named_classes().items():
        arguments = {key.name for kind in generate.kinds(base) for key in generate.keys("", kind)}
        names |= {f"{place}{argument}" for place in places for argument in arguments}
    known = names | {name.rpartition(".")[0] for name in names} | set(generate.groups())
    groups = "|".join(["reward", *generate.groups()])
    for page in PAGES:
        # of the terms, the first column is ours; the others are those of TRL and verl
        text = re.sub(r"^(\|[^|]*\|).*", r"\1", prose(page), flags=re.M) if page.stem == "terms" else prose(page)
        for named in re.findall(rf"`(?:--)?((?:{groups})\.(?!json)[\w.]+)", text):
            key = named.replace(".init_args", "")
            assert key in known, f"{page.name}: {named}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path = target.partition("#")[0]
        if not path or path.startswith("https://"):
            continue
        if "_generated/" in path:
            source = path.partition("tutorial_")[2].removesuffix(".md")
            assert not source or (ROOT / "examples" / f"{source}.py").exists(), target
        else:
            assert (page.parent / path).exists(), target


def test_tutorials_become_pages(generate: ModuleType) -> None:
    paths = generate.tutorials()
    assert len(paths) >= 4
    for path in paths:
        page = generate.tutorial_page(path)
        assert page.startswith("# ")
        code = "".join(re.findall(r"```python\n(.*?)```", page, re.S))
        compile(code, str(path), "exec")
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("import ", "from "))]
        assert all(line in code for line in kept), "what a section holds is shown"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
