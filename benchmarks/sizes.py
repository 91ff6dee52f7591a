"""What the steps of `benchmarks.run` are made of: sizes, prompts, rewards, a clock, and models of a million weights."""

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS, TOKENS, GROUP, LENGTH = 4, 75, 8, 32  # of a step on a pretrained model


@dataclass(frozen=True)
class Size:
    """A step.

    Attributes:
        prompts: Different prompts.
        tokens: Of each prompt.
        group: Responses to each prompt.
        length: Tokens of each response, or the most if `ends`.
        steps: Steps of a measurement, the first of which does not count.
        ends: Whether responses end by themselves.
    """

    prompts: int
    tokens: int
    group: int
    length: int
    steps: int = 3
    ends: bool = False

    @property
    def rows(self) -> int:
        """Responses."""
        return self.prompts * self.group


class Clock:
    """CPU seconds and tokens of each step."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.tokens: list[int] = []

    def begin(self) -> None:
        """A step begins."""
        self.start = time.process_time()
        self.tokens.append(0)

    def end(self) -> None:
        """It is done."""
        self.took.append(time.process_time() - self.start)

    def coin(self, texts: Sequence[str]) -> list[float]:
        """Rewards by `coin`; counts the words of `texts`, each of which is a token of a tiny model's, and an end."""
        if self.tokens:
            self.tokens[-1] += sum(len(text.split()) + 1 for text in texts)
        return coin(texts)


def coin(texts: Sequence[str]) -> list[float]:
    """0 or -1 at random: what was cut off gets at most 0 here."""
    return [-float(zlib.crc32(text.encode()) % 2) for text in texts]


def prompts(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Different texts of exactly `tokens` tokens each."""
    words = tokenizer.encode(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)
    found: list[str] = []
    start = 0
    while len(found) < count:
        text = tokenizer.decode(words[start % 300 : start % 300 + tokens])
        start += 7
        if len(tokenizer.encode(text, add_special_tokens=False)) == tokens and text not in found:
            found.append(text)
    return found


def tiny_model(place: Path, vocabulary: int) -> str:
    """Write a random Llama of a million weights beside its head, with words as tokens; returns the directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "?"]
    words = dict.fromkeys(Path(__file__).read_text(encoding="utf-8").split()[: vocabulary - len(special)])
    names = [*special, *words, *map(str, range(vocabulary))][:vocabulary]
    tokens = Tokenizer(models.WordLevel(dict(zip(names, range(vocabulary), strict=True)), unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>").save_pretrained(place)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, pad_token_id=0, bos_token_id=None, eos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(place)
    return str(place)
