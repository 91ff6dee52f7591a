"""Does vLLM draw from the policy that trains, before and after its weights change, and is a broken sync caught?

    make vllm-test                        # sets vLLM up in an environment of its own; MODEL=directory looks at that too
    python -m benchmarks.engines          # inside such an environment

A tiny model with tied embeddings is made on the spot. Each part is a process of its own. The exit status is 1 if a part
shows anything but what is claimed beside it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from mifo_lightning.rewards.base import Reward
from mifo_lightning.rollout.vllm import VLLMEngine
from mifo_lightning.rollout.vllm_server import VLLMServerEngine
from mifo_lightning.rollout.weights import weights_as_in_files

LENGTH = 14  # tokens of a response
ENGINE = "mifo_lightning.rollout.vllm.VLLMEngine"
ARGUMENTS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_model_len": 64}
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes longer than all of this
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
# of the embedded task, with an SFT phase before RL and buffer-triggered ones within it
FIT = [
    *("fit", "--config", "tiny", "--config", "methods/mifo", "--reward", "benchmarks.engines.Coin"),
    *("--trainer.logger", "false", "--trainer.profiler", "null", "--data.val", "null", "--export", "null"),
    *("--history.keys", '["rollout/reward", "rl/*", "sft/loss", "phase/*", "self_check/*"]'),
    *("--progress", "null", "--buffer_size", "16", "--data.train.init_args.count", "256"),
    *("--data.schedule.sft_before", "40", "--data.schedule.sft_batch", "8", "--data.schedule.rl_steps", "6"),
    *("--data.schedule.prompts_per_step", "8", "--data.demonstrations.verify", "false"),
]


class Coin(Reward):
    """Right for a third of all responses: a fresh model knows no answer, and its steps shall have a gradient."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str], *_: Any, **__: Any) -> list[float]:
        return [float(zlib.crc32(response.encode()) % 3 == 0) for response in responses]


class Stale(VLLMEngine):
    """Takes over weights once and never again."""

    def load(self, policy: Any) -> None:
        if self._version is None:
            super().load(policy)
        self._version = policy.version


class OldHead(VLLMEngine):
    """Takes over everything but the head after the first time, as where vLLM keeps a tied head that it has packed."""

    def load(self, policy: Any) -> None:
        if self._version is None:
            super().load(policy)
        rest = [(name, weight) for name, weight in weights_as_in_files(policy) if name != "lm_head.weight"]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(rest)})
        self._llm.reset_prefix_cache()
        self._version = policy.version


def make_tiny(directory: Path) -> None:
    """A random Llama of 0.3 million weights with the embedded task's vocabulary and tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mifo_lightning.policy.loading import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer("embedded")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def parity(model: str, engine: VLLMEngine | VLLMServerEngine) -> dict[str, float]:
    """Differences in nats to a teacher-forced forward in fp32, and how far responses are those of the key alone."""
    import torch

    from mifo_callbacks import Seed
    from mifo_lightning.policy.loading import load_policy, load_tokenizer
    from mifo_lightning.rewards.last_answer import LastAnswerReward
    from mifo_lightning.rollout.engine import Sampling
    from mifo_lightning.rollout.respond import Responder
    from mifo_lightning.rollout.self_check import differences

    policy, tokenizer = load_policy(model), load_tokenizer(model)
    responder = Responder(engine, tokenizer, LastAnswerReward(), 1.0, Seed(0, "seed"))
    texts = [f"{a}+{b}=" for a, b in zip(range(1, 900, 57), range(3, 9, 1), strict=False)]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found: dict[str, float] = {}

    def compare(name: str, temperature: float = 1.0) -> None:
        gaps = differences(responder, policy, prompts, Sampling(temperature, max_new_tokens=LENGTH))
        found[name], found[f"{name}, largest"] = float(gaps.mean()), float(gaps.max())

    compare("first weights")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p))
    compare("changed weights, not handed over")
    policy.version += 1
    start = time.perf_counter()
    engine.load(policy)
    found["seconds to hand over"] = time.perf_counter() - start
    compare("changed weights")
    compare("changed weights, T = 0.7", 0.7)
    sampling, keys = Sampling(max_new_tokens=LENGTH), [stable * 1000 for stable in range(len(prompts))]
    together = engine.generate(policy, tokenizer, prompts, keys, 8, sampling)
    alone = [engine.generate(policy, tokenizer, [p], [k], 4, sampling)[0] for p, k in zip(prompts, keys, strict=True)]
    pairs = [(a.tokens, b.tokens) for g, h in zip(together, alone, strict=True) for a, b in zip(g, h, strict=False)]
    found["share equal, alone and in a batch"] = sum(a == b for a, b in pairs) / len(pairs)
    return found


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of this environment, to its end."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=os.environ | QUIET | environment, capture_output=True, text=True, check=False)


def show_parity(model: str, dtype: str, most: float, *more: str) -> bool:
    """Whether typical differences are below `most` nats."""
    done = child("benchmarks.engines", "--part", "parity", "--model", model, "--dtype", dtype, *more)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        print(done.stderr[-2000:])
        return False
    found = json.loads(lines[-1])
    for name, value in found.items():
        print(f"  {name:42} {value:.2g}")
    return max(found["first weights"], found["changed weights"], found["changed weights, T = 0.7"]) <= most


def show_fit(model: str, place: Path, *more: str) -> bool:
    """Whether a run gets to its end, and what it logs of its engine."""
    done = child("mifo_lightning", *FIT, "--model.model", model, "--trainer.default_root_dir", str(place), *more)
    if done.returncode:
        print(done.stderr[-2000:])
        return False
    lines = [json.loads(line) for line in (place / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "rl/policy_loss" in line]
    names = {  # what is logged, and its column
        "rollout/reward": "reward",
        "self_check/mean": "self-check, mean",
        "self_check/max": "largest",
        "rl/sampler_gap": "|ratio - 1|, mean",
        "rl/sampler_ratio_max": "largest ratio",
        "rl/sampler_cut": "share cut",
    }
    print("  RL step  " + "".join(f"{name:>18}" for name in names.values()))
    for line in steps:
        print(f"  {line['rl_step']:7}  " + "".join(f"{line.get(key, float('nan')):18.4g}" for key in names))
    updates = sum("sft/loss" in line for line in lines)
    print(f"  {updates} SFT optimizer steps in {len({line.get('phase/sft_phase', 0) for line in lines}) - 1} phases")
    return len(steps) > 0 and updates > 40


def show_broken(model: str, place: Path, *more: str) -> bool:
    """Whether the run ends with one line and status 2."""
    done = child("mifo_lightning", *FIT, "--model.model", model, "--trainer.default_root_dir", str(place), *more)
    line = next((line for line in done.stderr.splitlines() if line.startswith("error:")), done.stderr[-500:])
    print(f"  exit status {done.returncode}: {line}")
    return done.returncode == 2 and "weights are not those that train" in line


@contextmanager
def server(model: str) -> Iterator[str]:
    """A vLLM server on this machine; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"),
        *("--logprobs-mode", "processed_logprobs", "--kv-cache-memory-bytes", str(2**28)),
        *("--hf-overrides", '{"tie_word_embeddings": false}'),
    ]
    environment = os.environ | QUIET | {"VLLM_SERVER_DEV_MODE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            for _ in range(300):
                time.sleep(1)
                if process.poll() is not None:
                    break
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    yield f"http://127.0.0.1:{port}"
                    return
                except OSError:
                    pass
            log.seek(0)
            raise RuntimeError(f"no server: {log.read()[-2000:]}")
        finally:
            process.terminate()
            process.wait(60)


def everything(model: str | None) -> int:
    """All parts; how many show something else than is claimed."""
    failed = 0

    def part(title: str, good: bool) -> None:
        nonlocal failed
        failed += not good
        print(f"{'ok' if good else 'FAILED'}: {title}\n", flush=True)

    settings = ["--model.rollout.engine", ENGINE, "--model.rollout.engine.arguments", json.dumps(ARGUMENTS)]
    exact, rounded = (["--model.rollout.engine.dtype", dtype] for dtype in ("float32", "bfloat16"))
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        tiny = str(home / "tiny")
        make_tiny(Path(tiny))
        part("in process, float32, within 1e-5 nats", show_parity(tiny, "float32", 1e-5))
        part("in process, bfloat16, within 0.05 nats", show_parity(tiny, "bfloat16", 0.05))
        with server(tiny) as url:
            served = ("--url", url, "--directory", str(home / "served"))
            part("a server, within 1e-5 nats", show_parity(tiny, "float32", 1e-5, *served))
            engine = [
                *("--model.rollout.engine", "mifo_lightning.rollout.vllm_server.VLLMServerEngine"),
                *("--model.rollout.engine.url", url, "--model.rollout.engine.directory", str(home / "served")),
            ]
            part("a run through it", show_fit(tiny, home / "run", *engine, *exact))
        if model:
            part(f"{model}, float32, within 1e-4 nats", show_parity(model, "float32", 1e-4))
        part("a run through it, float32", show_fit(tiny, home / "exact", *settings, *exact))
        mixed = ("--trainer.precision", "bf16-mixed")
        part("a run through it, bfloat16", show_fit(tiny, home / "mixed", *settings, *rounded, *mixed))
        stale = ("--model.rollout.engine", "benchmarks.engines.Stale", *settings[2:], *exact)
        part("weights never handed over again are caught", show_broken(tiny, home / "stale", *stale))
        packed = ("--model.rollout.engine", "benchmarks.engines.OldHead", *settings[2:], *exact)
        part("a tied head that stays as it was packed is caught", show_broken(tiny, home / "packed", *packed))
    return failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", help="a Hugging Face directory, looked at beside the tiny one")
    parser.add_argument("--part", choices=["parity"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None:
        sys.exit(min(everything(options.model), 1))
    if options.url:
        engine: Any = VLLMServerEngine(options.directory, options.url, options.dtype)
    else:
        engine = VLLMEngine(options.dtype, arguments=ARGUMENTS)
    print(json.dumps(parity(options.model, engine)))


if __name__ == "__main__":
    main()
