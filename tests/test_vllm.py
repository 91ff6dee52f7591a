"""vLLM engines without vLLM: what a server is asked and told, by a stand-in that computes with the weights it is sent.

Against vLLM itself: `make vllm-test`.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module
from lightning import Trainer
from safetensors.torch import load_file

from mifo_callbacks import Seed
from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError, TrainingError
from mifo_lightning.monitors.history import History
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.self_check import self_check
from mifo_lightning.rollout.vllm import VLLMEngine, requests
from mifo_lightning.rollout.vllm_server import VLLMServerEngine

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [4, 5, 6, 7], [9, 16]]
KEYS = [2**63 - 1, 5, 7]
SAMPLING = Sampling(max_new_tokens=8)


class Server:
    """Answers as vLLM's does, from weights of its own."""

    def __init__(self, tokenizer: Any) -> None:
        self.policy, self.tokenizer, self.lock = load_policy("embedded"), tokenizer, threading.Lock()
        with torch.no_grad():
            for p in self.policy.parameters():
                p.zero_()  # what it was started with is nobody's
        self.asked: list[dict[str, Any]] = []
        self.reloads, self.reloading, self.developing = 0, True, True

    def answer(self, path: str, content: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/v1/completions":
            self.asked.append(content)
            sampling = Sampling(
                content["temperature"], content["top_p"], content["top_k"], content["max_tokens"], content["stop"]
            )
            with self.lock:
                (drawn,) = InProcessEngine().generate(
                    self.policy, self.tokenizer, [content["prompt"]], [content["seed"]], content["n"], sampling
                )
            return {"choices": list(map(as_choice, drawn)), "usage": {"completion_tokens": 1}}
        if not self.developing:
            return None
        if path == "/collective_rpc" and content["method"] == "reload_weights":
            self.reloads += 1
            if self.reloading or self.reloads == 1:
                file = Path(content["kwargs"]["weights_path"]) / "model.safetensors"
                self.policy.model.load_state_dict(load_file(file))
        return {"results": [None]} if path == "/collective_rpc" else {"success": True}


def as_choice(completion: Completion) -> dict[str, Any]:
    return {
        "token_ids": completion.tokens,
        "logprobs": {"token_logprobs": completion.logp},
        "finish_reason": "stop" if completion.finished else "length",
    }


@contextmanager
def listening(answer: Callable[[str, dict[str, Any]], dict[str, Any] | None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            found = answer(self.path, content)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found or {"detail": "Not Found"}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(tokenizer: Any) -> Server:
    return Server(tokenizer)


@pytest.fixture
def engine(server: Server, tmp_path: Path) -> Iterator[VLLMServerEngine]:
    with listening(server.answer) as url:
        yield VLLMServerEngine(str(tmp_path / "weights"), url, "float32")


def shift(policy: Policy) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * p.std() * torch.randn_like(p)
    policy.version += 1


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert (one.tokens, one.finished) == (other.tokens, other.finished)
        assert one.logp == pytest.approx(other.logp, abs=1e-4)


def test_it_draws_what_the_policy_would_and_follows_its_version(
    engine: VLLMServerEngine, server: Server, policy: Policy, tokenizer: Any
) -> None:
    def drawn(by: Any) -> list[list[Completion]]:
        return by.generate(policy, tokenizer, PROMPTS, [key % 2**62 for key in KEYS], 3, SAMPLING)

    first = drawn(engine)
    assert_same(first, drawn(InProcessEngine()))
    drawn(engine)
    assert server.reloads == 1, "the same weights are handed over once"
    shift(policy)
    assert [c.tokens for c in drawn(engine)[0]] != [c.tokens for c in first[0]]
    assert_same(drawn(engine), drawn(InProcessEngine()))
    assert server.reloads == 2


def test_the_file_is_that_of_a_plain_model_with_a_tied_head_apart(engine: VLLMServerEngine, policy: Policy) -> None:
    engine.load(policy)
    written = load_file(engine.directory / "model.safetensors")
    own = policy.model.state_dict()
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) for name in own)
    assert "lm_head.weight" in written
    assert [path.name for path in engine.directory.iterdir()] == ["model.safetensors"]


def test_greedy_answers_are_asked_for_once(
    engine: VLLMServerEngine, server: Server, policy: Policy, tokenizer: Any
) -> None:
    greedy = Sampling(0.0, max_new_tokens=8)
    drawn = engine.generate(policy, tokenizer, PROMPTS, KEYS, 2, greedy)
    assert [request["n"] for request in server.asked] == [1, 1, 1]
    assert_same(drawn, InProcessEngine().generate(policy, tokenizer, PROMPTS, KEYS, 2, greedy))


def test_what_is_asked_says_seeds_ends_and_stops(tokenizer: Any) -> None:
    first, second = requests(tokenizer, [2**63 - 1, 5], 4, Sampling(0.7, 0.9, 3, 8, ["="]))
    assert (first["seed"], second["seed"]) == (2**62 - 1, 5)
    assert first["seed"] + 4 < 2**63
    assert (second["temperature"], second["top_p"], second["top_k"], second["max_tokens"]) == (0.7, 0.9, 3, 8)
    assert (second["stop"], second["stop_token_ids"], second["ignore_eos"]) == (["="], [tokenizer.eos_token_id], True)
    assert second["logprobs"] == 0


def test_a_run_through_a_server_is_checked_and_corrected(
    engine: VLLMServerEngine, make_trainer: Callable[..., Trainer]
) -> None:
    history = History(["self_check/*", "rl/*", "rollout/reward"])
    module = make_module(engine=engine, self_check=True)
    make_trainer([history]).fit(module, datamodule=make_data())
    steps = [line for line in history.lines if "rl/sampler_ratio" in line]
    assert len(steps) > 1
    for line in steps:
        assert line["rl/sampler_ratio"] == pytest.approx(1, abs=1e-4)
        assert line["rl/sampler_ratio_max"] == pytest.approx(1, abs=1e-3)
        assert line["rl/sampler_cut"] == 0
    assert all(line["self_check/max"] < 1e-3 for line in steps[1:])


def test_a_server_that_reloads_no_more_is_caught_with_the_first_changed_weights(
    engine: VLLMServerEngine, server: Server, policy: Policy, tokenizer: Any
) -> None:
    responder = Responder(engine, tokenizer, LastAnswerReward(), 1.0, Seed(0, "seed"))
    server.reloading = False
    assert self_check(responder, policy, PROMPTS, SAMPLING)["max"] < 1e-3
    shift(policy)
    with pytest.raises(InputError, match=r"rollout.engine: .* by VLLMServerEngine differ by .* not those that tr"):
        self_check(responder, policy, PROMPTS, SAMPLING)


def test_a_server_without_its_switch_or_without_a_server_is_one_line(
    engine: VLLMServerEngine, server: Server, policy: Policy, tokenizer: Any, tmp_path: Path
) -> None:
    server.developing = False
    with pytest.raises(InputError, match=r"engine.url: http.*/collective_rpc answers 404: .*VLLM_SERVER_DEV_MODE=1"):
        engine.generate(policy, tokenizer, PROMPTS, KEYS, 1, SAMPLING)
    nobody = VLLMServerEngine(str(tmp_path), "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"engine.url: no vLLM server answers at http://127.0.0.1:9"):
        nobody.load(policy)
    nobody._version = policy.version
    with pytest.raises(TrainingError, match=r"engine.url: no vLLM server answers"):
        nobody.generate(policy, tokenizer, PROMPTS, KEYS, 1, SAMPLING)


def test_a_place_that_cannot_be_written_is_one_line(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"engine.directory: .*file"):
        VLLMServerEngine(str(tmp_path / "file")).load(policy)


def test_missing_vllm_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mifo_lightning.rollout.vllm.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install mifo_lightning\[vllm\]"):
        VLLMEngine()
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("fit", "--config", "tiny", "--trainer.default_root_dir", str(tmp_path)),
                *("--model.rollout.engine", "mifo_lightning.rollout.vllm.VLLMEngine"),
            ]
        )
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert "model.rollout.engine: VLLMEngine needs vLLM: pip install mifo_lightning[vllm]" in lines[0]
