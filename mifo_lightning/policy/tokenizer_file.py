"""Does the loaded tokenizer give the ids that its own file says?"""

from lightning.pytorch.utilities import rank_zero_warn
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from mifo_lightning.common.errors import InputError

PROBES = (
    "123+456=579, s:40312=01234; 12 > 7",
    "Let $x^2 - 3x + 1 = 0$. Then\n\n\\boxed{\\frac{1}{2}} isn't  it?\t",
    "\u00e9t\u00e9 \u7b54\u6848 \u2014 \U0001f986",
)


def faithful(tokenizer: PreTrainedTokenizerBase, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer, or if it gives other ids than its `tokenizer.json`, one that is the file; that is said.

    transformers 5 builds a tokenizer anew by the class that belongs to the kind of model, with that class's own way of
    cutting words, whatever the file says.

    Raises:
        InputError: That one gives other ids too.
    """
    path = cached_file(model, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None or (text := _differing(tokenizer, path)) is None:
        return tokenizer
    exact: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(model, trust_remote_code=False)
    problem = (
        f"model.model: {type(tokenizer).__name__} of {model!r} reads {text!r:.40} otherwise than its tokenizer.json"
    )
    if _differing(exact, path) is not None:
        raise InputError(
            f"{problem}, and so does {type(exact).__name__}; make the file and tokenizer_config.json agree"
        )
    rank_zero_warn(f"{problem}, which is taken instead; other programs that load it by its class read other ids")
    return exact


def _differing(tokenizer: PreTrainedTokenizerBase, path: str) -> str | None:
    """The first probe that the tokenizer reads otherwise than the file at `path`."""
    written = Tokenizer.from_file(path)
    written.no_padding()
    written.no_truncation()
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != written.encode(text, add_special_tokens=False).ids:
            return text
    return None
