"""The documentation site: `make docs`. Needs no network; where there is one, types link to the sites of others."""

import inspect
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from pygments.lexers.special import TextLexer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # the pages' generator; the checkout

from generate import ablations, with_link, write_full_pages, write_pages  # noqa: E402

project = "mifo_lightning"
author = "the mifo_lightning authors"
release = metadata.version("mifo-lightning")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
write_pages(Path(__file__).parent / "_generated")

# --- pages ------------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "text"  # a block without a language is a command or what it prints
html_theme = "furo"
html_title = f"mifo_lightning {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False

# --- API --------------------------------------------------------------------------------------------------------------

default_role = "code"  # `name` in a docstring is code
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# References to the sites of others are links where these can be reached, and to classes that are not public never.
nitpick_ignore_regex = [
    (r"py:.*", r"(abc|collections|pathlib|torch|lightning|transformers)\..*"),
    (r"py:.*", r"mifo_\w+(\.\w+){2,}"),
    (r"py:.*", r"[A-Z]\w*"),  # named without its module, as in an annotation for the type checker alone
    (r"py:obj", r"typing\.Literal\[.*"),  # a signature with a default factory is cut at its commas
    (r"py:class", r".* .*"),  # prose before a colon, which napoleon takes for a type
]

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "transformers": "https://huggingface.co/docs/transformers/main/en/",
}


def reachable(url: str) -> bool:
    """Whether the inventory of a site can be fetched; without a network the site is built without these links."""
    try:
        with urlopen(f"{url}objects.inv", timeout=3) as answer:
            return answer.read(18) == b"# Sphinx inventory"  # not a page that says what is missing
    except OSError:  # no network, no such host, no answer in time
        return False


intersphinx_mapping = {name: (url, None) for name, url in INVENTORIES.items() if reachable(url)}


def skip_hooks(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what a class overrides of Lightning's or torch's: hooks, which users never call."""
    owner = getattr(inspect.getmodule(obj), getattr(obj, "__qualname__", "").partition(".")[0], None)
    if not inspect.isfunction(obj) or not inspect.isclass(owner):
        return None
    others = [base for base in owner.__mro__ if not base.__module__.startswith("mifo_") and base is not object]
    return True if any(hasattr(base, name) for base in others) else None


def results_apart(app: Any, page: str, source: list[str]) -> None:
    """Pages of studies are not searched, since their words hide what the words mean; old ones stand in no contents."""
    if page.startswith("results/"):
        orphan = "orphan: true\n" if page.startswith("results/tied/") else ""
        text = with_link(source[0]) if page in {f"results/{study.name}/report" for study in ablations()} else source[0]
        source[0] = f"---\nnosearch: true\n{orphan}---\n\n{text}"


def full_pages(app: Any, error: Exception | None) -> None:
    """Put the full page of every study beside the site's own page of it."""
    if error is None and app.builder.format == "html":
        write_full_pages(Path(app.outdir) / "results")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("source-read", results_apart)
    app.connect("build-finished", full_pages)
    app.add_lexer("csv", TextLexer)  # pygments has none
