"""Can the whole method run on real questions on a CPU, without a download? Makes a tiny model for GSM8K.

    python -m experiments.make_gsm8k_model --data PATH/gsm8k_train.parquet --out models/gsm8k-tiny

The tokenizer is a byte-level BPE of 2048 tokens trained on the questions and worked solutions of that file. The model,
a Qwen2 shape of 1.25 million random weights, gets a language-model warm-up of about a minute on the same text: enough
for the look of it, far from enough to solve anything. A score near zero is expected. The last 512 rows of the file are
not used, so that their solutions are held out. One thread and seeded: the same seed gives the same weights on the same
machine.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import printable

HELD_OUT = 512
VOCABULARY, CONTEXT = 2048, 4096
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK = re.compile("</?think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LR, WARMUP, BATCH, MAX_TOKENS = 2e-3, 20, 16, 384
IGNORED = -100

Chat = list[dict[str, str]]


def read_chats(path: Path) -> list[Chat]:
    """Prompt and solution of every row but the last 512; raises InputError if the file is not such a parquet file."""
    try:
        rows = pq.read_table(path, columns=["prompt", "target"]).to_pylist()[:-HELD_OUT]
        chats = [[*row["prompt"], *row["target"]] for row in rows]
        contents = [message["content"] for chat in chats for message in chat]
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--data {path}: not a parquet file of rows with prompt and target ({reason})") from None
    if not contents:
        raise InputError(f"--data {path}: more than {HELD_OUT} rows are needed, as the last {HELD_OUT} are held out")
    return chats


def train_tokenizer(chats: list[Chat]) -> Qwen2Tokenizer:
    """A byte-level BPE in the layout of Qwen2.5: digits are single tokens, no character is unknown."""
    # transformers loads every qwen2 directory with this class, whatever class wrote it: so this class writes it
    texts = (THINK.sub("", message["content"]) for chat in chats for message in chat)
    layout = Qwen2Tokenizer(
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer = layout.train_new_from_iterator(texts, VOCABULARY - 2, new_special_tokens=[START], show_progress=False)
    # ordinary tokens, not special ones: decoding keeps them, and the verifier looks for the answer after </think>
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 shape of about 1.2 million parameters with random weights, float32."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=True)
    return model


def warm_up(model: Qwen2ForCausalLM, texts: list[list[int]], steps: int) -> float:
    """Language modelling on random batches, prompts included; returns the mean loss of the last ten steps in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        picked = torch.randint(len(texts), (BATCH,)).tolist()
        tokens = _pad([texts[index][:MAX_TOKENS] for index in picked])
        logits = model(tokens[:, :-1].clamp(min=0), use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / max(1, len(losses[-10:]))


def make(data: Path, out: Path, steps: int, seed: int) -> None:
    """Trains tokenizer and model and writes both to `out` as a Hugging Face directory."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chats = read_chats(data)
    tokenizer = train_tokenizer(chats)
    model = build_model(tokenizer)
    texts = [tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    start = time.process_time()
    loss = warm_up(model, texts, steps)
    seconds = time.process_time() - start
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    warmth = f"{steps} steps in {seconds:.0f} CPU seconds, loss {loss:.2f} nats a token" if steps else "no warm-up"
    print(f"{out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, {warmth}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tokenizer and a tiny model on the questions of GSM8K.")
    parser.add_argument("--data", type=Path, required=True, help="parquet file with prompt and target columns")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=60, help="steps of the warm-up, 16 rows each; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 0:
        parser.error(f"--steps: {args.steps} given, allowed is 0 or more")
    transformers.utils.logging.disable_progress_bar()
    try:
        make(args.data, args.out, args.steps, args.seed)
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def _pad(texts: list[list[int]]) -> Tensor:
    """Token ids side by side, padded on the right with the index that the loss ignores: int64 [B, longest]."""
    rows = [torch.tensor(text) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


if __name__ == "__main__":
    main()
