"""Does the loaded tokenizer give the ids that its own file says?"""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from mifo_lightning.errors import InputError

PROBES = (
    "123+456=579, s:40312=01234; 12 > 7",
    "Let $x^2 - 3x + 1 = 0$. Then\n\n\\boxed{\\frac{1}{2}} isn't  it?\t",
    "\u00e9t\u00e9 \u7b54\u6848 \u2014 \U0001f986",
)


def check_ids(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Compare a tokenizer with its `tokenizer.json`, if it has one, on a few texts.

    transformers 5 builds the tokenizer anew by the class that `tokenizer_config.json` names, with that class's own way
    of cutting words, whatever the file says.

    Raises:
        InputError: They give other ids: the model would read what it was not trained on.
    """
    path = cached_file(model, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    written = Tokenizer.from_file(path)
    written.no_padding()
    written.no_truncation()
    for text in PROBES:
        ids, expected = (
            tokenizer(text, add_special_tokens=False)["input_ids"],
            written.encode(text, add_special_tokens=False).ids,
        )
        if ids != expected:
            raise InputError(
                f"model.model: {type(tokenizer).__name__} of {model!r} reads {text!r:.40} as {ids[:8]}, its file "
                f'as {expected[:8]}; set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json to '
                "take the file as it is"
            )
