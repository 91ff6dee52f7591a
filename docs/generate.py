"""Pages of the site that follow the code: the reference of configuration and API, the map of modules, tutorials.

Written into `docs/_generated` before Sphinx reads the pages, by `conf.py`; not kept in the repository. Nor are the full
pages of the studies, which go beside Sphinx's own when these are built.
"""

import ast
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).parents[1]
PACKAGES = {"mifo_lightning": ROOT / "mifo_lightning", "mifo_callbacks": ROOT / "callbacks" / "mifo_callbacks"}
TUTORIALS = ROOT / "examples"
STUDIES = ROOT / "docs" / "results"
FULL_PAGE = "full.html"


def write_pages(into: Path) -> None:
    """Write all generated pages into the directory `into`; a page that has not changed keeps its time."""
    pages = {
        "configuration": configuration_page,
        "api": api_page,
        "modules": modules_page,
        **{f"tutorial_{path.stem}": lambda path=path: tutorial_page(path) for path in tutorials()},
    }
    pages = {f"{name}.md": make for name, make in pages.items()}
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        pages[f"results_{page.stem}.txt"] = lambda page=page: results_of(methods_on(page))
    into.mkdir(exist_ok=True)
    for name, make in pages.items():
        path, text = into / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- configuration ----------------------------------------------------------------------------------------------------


class Key(typing.NamedTuple):
    """One key of the configuration: its full name, type, default and meaning, all as text."""

    name: str
    kind: str
    default: str
    meaning: str


def groups() -> dict[str, type]:
    """The classes behind the top-level groups of a configuration file, by the name of the group."""
    import mifo_lightning
    from mifo_lightning.cli.command_line import METHOD, MONITORS

    return {"model": mifo_lightning.MifoModule, "data": mifo_lightning.QuestionData, **METHOD, **MONITORS}


def keys(group: str, kind: type) -> Iterator[Key]:
    """All keys of a class's constructor, those of settings inside it included."""
    meanings = arguments(kind)
    hints = get_type_hints(kind.__init__)
    for name, parameter in inspect.signature(kind).parameters.items():
        hint = hints.get(name, Any)
        inner = [part for part in (hint, *get_args(hint)) if is_dataclass(part) and not is_open(part)]
        meaning = meanings.get(name, "")
        default = "" if inner and parameter.default is not None else default_text(parameter.default)
        yield Key(f"{group}.{name}", type_text(hint), default, meaning)
        for settings in inner:
            yield from keys(f"{group}.{name}", settings)


def default_text(value: Any) -> str:
    """A default as YAML writes it."""
    if value in (inspect.Parameter.empty, MISSING):
        return "needed"
    names = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return f"`{names[value]}`"
    return f"`{value}`" if isinstance(value, int | float | str | tuple | list) else ""


def type_text(hint: Any) -> str:
    """A type as a user names it: `int`, `null`, `"top"`, the name of a class."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(f"{value}" for value in get_args(hint))
    if typing.get_origin(hint) in (list, tuple, dict):
        return f"{typing.get_origin(hint).__name__} of {', '.join(type_text(part) for part in get_args(hint))}"
    if parts := [part for part in get_args(hint) if typing.get_origin(hint) is not Callable]:
        return " | ".join(type_text(part) for part in parts)
    return getattr(hint, "__name__", str(hint))


def arguments(kind: type) -> dict[str, str]:
    """What the docstring of a class says of its arguments, by name; those of its bases where it says nothing."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "") + "\n"
        for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n|\n)+)", text, re.M):
            for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.M):
                found[name] = " ".join(meaning.split())
    return found


def entries(rows: list[Key]) -> str:
    """The keys of one group as a list of definitions, which a phone can show."""
    return "\n\n".join(f"`{k.name}` {facts(k)}\n: {plain(k.meaning) or '-'}" for k in rows)


def facts(key: Key) -> str:
    """Type and default of a key in brackets."""
    return f"({key.kind}{', ' if key.default else ''}{key.default})"


def plain(text: str) -> str:
    """Text of a docstring as Markdown: what is no code is no markup either."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\\$\[])", r"\\\1", part) for part in parts)


def first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def kinds(base: type) -> list[type]:
    """The public classes of the package that a key of type `base` may name, the class itself included if it is one."""
    import_all()
    found = [base, *(below for cls in base.__subclasses__() for below in kinds(cls))]
    return [c for c in dict.fromkeys(found) if c.__module__.startswith("mifo_") and not inspect.isabstract(c)]


def named_classes() -> dict[type, list[str]]:
    """The classes whose subclasses a configuration names by `class_path`, each with the keys that name one."""
    import mifo_lightning

    bases: dict[type, list[str]] = {mifo_lightning.Reward: ["reward"]}
    for group, kind in groups().items():
        for name, hint in get_type_hints(kind.__init__).items():
            for base in filter(is_open, (hint, *get_args(hint))):
                bases.setdefault(base, []).append(f"{group}.{name}")
    return bases | {mifo_lightning.Reward: ["reward"]}


def is_open(hint: Any) -> bool:
    """Whether a type is a class of ours of which there are several to choose from."""
    return inspect.isclass(hint) and hint.__module__.startswith("mifo_") and len(kinds(hint)) > 1


def configuration_page() -> str:
    """The reference of configuration: every group with its keys, every class that a key may name."""
    parts = [
        "# Configuration",
        "Generated from the constructors and their docstrings, as the command line is. A configuration file holds "
        "these groups; a flag names one key, `--model.rollout.group_size 4`. Callbacks are groups too: the keys "
        "alone, or `class_path` and `init_args`; `null` leaves a callback out. `trainer` holds the arguments of "
        "Lightning's Trainer, `seed_everything` the seed of everything random. `--print_config` prints all that a run "
        "would use; the files in `configs/` have a comment on each of their keys.",
    ]
    for group, kind in groups().items():
        parts += [f"## {group}", f"`{kind.__module__}.{kind.__name__}`: {plain(first_line(kind))}"]
        parts += [entries(list(keys(group, kind))) or "No keys."]
    for base, named in named_classes().items():
        places = ", ".join(f"`{key}`" for key in named)
        parts += [f"## Classes: {base.__name__}", f"For {places}: `class_path` names one, `init_args` holds its keys."]
        for kind in kinds(base):
            rows = [k._replace(name=k.name.removeprefix(".")) for k in keys("", kind)]
            parts += [f"### {kind.__name__}", f"`{kind.__module__}.{kind.__name__}`: {plain(first_line(kind))}"]
            parts += [entries(rows)] if rows else []
    return "\n\n".join(parts) + "\n"


# --- API, modules -----------------------------------------------------------------------------------------------------


@cache
def import_all() -> None:
    """Import every module of the package, once, so that all subclasses are known."""
    package = import_module("mifo_lightning")
    for module in pkgutil.walk_packages(package.__path__, "mifo_lightning."):
        if not module.name.endswith("__main__") and ".lab" not in module.name:
            import_module(module.name)


def api_page() -> str:
    """The public names of both distributions, by autodoc."""
    parts = ["# API", "What `import mifo_lightning as mifo` and `import mifo_callbacks` give."]
    for package in PACKAGES:
        module = import_module(package)
        parts.append(f"## {package}")
        for name in module.__all__:
            thing = getattr(module, name)
            role = "autoclass" if inspect.isclass(thing) else "autofunction"
            parts.append(f"### {name}\n\n```{{eval-rst}}\n.. {role}:: {package}.{name}\n```")
    return "\n\n".join(parts) + "\n"


def modules_page() -> str:
    """Every module with the first line of its docstring, read without importing it."""
    parts = ["# Modules", "What stands in which file: the first line of every module, as it is in the source."]
    for package, root in PACKAGES.items():
        rooms: dict[str, list[str]] = {}
        for path in sorted(root.rglob("*.py")):
            if "__pycache__" in path.parts:
                continue
            room = ".".join((package, *path.parent.relative_to(root).parts))
            line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
            if path.stem == "__init__":
                rooms.setdefault(room, []).insert(0, f"{line}\n")
            elif path.stem != "__main__":
                rooms.setdefault(room, []).append(f"- `{path.stem}`: {line}")
        for room, lines in sorted(rooms.items()):
            parts += [f"## `{room}`", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


# --- results of a method ----------------------------------------------------------------------------------------------


def methods_on(page: Path) -> list[str]:
    """The methods whose files a page shows."""
    return re.findall(r"^```\{literalinclude\} \S*configs/methods/(\w+)\.yaml$", page.read_text(encoding="utf-8"), re.M)


def ablations() -> list[Path]:
    """Directories of the published studies that compare arms; others have pages of their own kind."""
    return [plan.parent for plan in sorted(STUDIES.glob("*/ablation.json"))]


def results_of(methods: list[str]) -> str:
    """What the published studies say of some methods: their rows, and each study's own headline."""
    parts = []
    for study in ablations():
        text = (study / "report.md").read_text(encoding="utf-8")
        head, *rows = re.search(r"^\| arm .*\n(?:\|.*\n)+", text, re.M)[0].splitlines()  # type: ignore[index]
        found = [
            row
            for row in rows[1:]
            if row.split("|")[1].replace("\\", "").strip().removesuffix("(reference)").strip() in methods
        ]
        if found:
            (headline,) = re.findall(r"^(\*\*.*\*\*)$", text, re.M)[:1]
            title = text.partition("\n")[0].removeprefix("# ")
            shown = "\n".join(columns(row, head) for row in (head, rows[0], *found))
            note = "".join(f"{line} " for line in re.findall(r"^> (.*)\n", text, re.M)[:1])
            parts.append(f"[{title}](/results/{study.name}/report.md)\n\n{shown}\n\n{note}The study: {headline}")
    none = "No evidence that it helps or harms: no study of this repository has run it as an arm of its own."
    return "\n\n".join(parts or [none]) + "\n"


def columns(row: str, head: str) -> str:
    """Of a row of a table with such a header: the arm, its score, and the difference to the reference."""
    names, cells = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in (head, row))
    third = next(i for i, name in enumerate(names) if name.startswith("difference to"))
    return f"| {cells[0]} | {cells[1]} | {cells[third]} |"


# --- full pages of studies --------------------------------------------------------------------------------------------


def write_full_pages(into: Path) -> None:
    """Write the report's own page of every study, as `into`/STUDY/full.html; one that is up to date is left alone."""
    pages = {study: into / study.name / FULL_PAGE for study in ablations()}
    code = [*(PACKAGES["mifo_lightning"] / "lab" / "report").iterdir()]
    old = [study for study, page in pages.items() if not newer(page, [*study.iterdir(), *code])]
    if old:
        from mifo_lightning.lab.report import write_page  # takes seconds

        for study in old:
            write_page(study, pages[study])


def newer(page: Path, sources: list[Path]) -> bool:
    """Whether `page` is there and has been written after every file that it is made of."""
    written = page.stat().st_mtime if page.exists() else 0.0
    return written > max(path.stat().st_mtime for path in sources if path.is_file())


def with_link(report: str) -> str:
    """The Markdown of a study with a link to its full page below the title."""
    title, _, rest = report.partition("\n")
    return f'{title}\n\n<p><a href="{FULL_PAGE}">The full page of this study</a>, with every picture.</p>\n{rest}'


# --- tutorials --------------------------------------------------------------------------------------------------------


def tutorials() -> list[Path]:
    """The tutorials, in the order of their names."""
    return sorted(TUTORIALS.glob("[0-9]*.py"))


def tutorial_page(path: Path) -> str:
    """A script with `# %%` sections as a page: its docstring, then of each section the leading comment and the code."""
    source = path.read_text(encoding="utf-8")
    intro = ast.get_docstring(ast.parse(source)) or ""
    title, _, text = intro.partition("\n")
    parts = [f"# {title.rstrip('.')}", text.strip(), f"The whole script: `python examples/{path.name}`."]
    for section in re.split(r"^# %% ?", source, flags=re.M)[1:]:
        heading, _, body = section.partition("\n")
        prose = re.match(r"(?:#.*\n)*", body)
        assert prose
        parts += [f"## {heading}", re.sub(r"^# ?", "", prose[0], flags=re.M).strip()]
        if code := body[prose.end() :].strip("\n"):
            parts.append(f"```python\n{code}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"
