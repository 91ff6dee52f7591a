"""A vLLM server as rollout engine: asked over HTTP, it reads the weights from a directory that both sides see."""

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.collectives import gather_ranks, rank
from mifo_lightning.checkpoints import safe_points
from mifo_lightning.common.errors import InputError, TrainingError
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Completion, Decoded, Listener, RolloutEngine, Sampling
from mifo_lightning.rollout.vllm import repeated, requests
from mifo_lightning.rollout.weights import weights_as_in_files

WORKERS = 256  # requests under way at once: one a prompt, which the server batches
PATIENCE = 0.2  # seconds between two looks at whether the run is to stop
START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --logprobs-mode processed_logprobs --model ..."
)


class VLLMServerEngine(RolloutEngine):
    """Asks a vLLM server, which all ranks share.

    The server is started with `VLLM_SERVER_DEV_MODE=1`, without which it reloads no weights, and with
    `--logprobs-mode processed_logprobs`. Whenever `policy.version` is another, the first rank writes
    `model.safetensors` and asks the server to reload it. A key in the environment variable `VLLM_API_KEY` is sent
    along.

    Args:
        directory: Where the weights go; server and first rank must see it under the same path, best in memory such as
            /dev/shm.
        url: Of the server.
        dtype: Of the weights in the file; the server computes in its own.
        timeout: Longest wait for one answer, in seconds.
    """

    own_numerics = True

    def __init__(
        self,
        directory: str,
        url: str = "http://127.0.0.1:8000",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        timeout: float = 3600.0,
    ) -> None:
        self.directory, self.url, self.timeout = Path(directory).absolute(), url.rstrip("/"), timeout
        self.dtype = getattr(torch, dtype)
        self.listener: Listener | None = None
        self._version: int | None = None  # of the policy's weights that the server has
        self._of: int | None = None  # the id of that policy: another one counts its versions for itself

    def generate(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        keys: list[int],
        samples: int,
        sampling: Sampling,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            InputError: The server cannot take over weights.
            TrainingError: It does not answer.
        """
        if self._version != policy.version or self._of not in (None, id(policy)):
            self.load(policy)
        asked = [
            {**request, "prompt": prompt, "return_token_ids": True}
            for prompt, request in zip(prompts, requests(tokenizer, keys, samples, sampling), strict=True)
        ]
        pool = ThreadPoolExecutor(max(1, min(WORKERS, len(asked))))
        try:
            answers = [pool.submit(self._post, "/v1/completions", request) for request in asked]
            self._await(answers, samples, sampling.max_new_tokens)
            drawn = [list(map(_completion, answer.result()["choices"])) for answer in answers]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [repeated(group, samples) for group in drawn]

    def load(self, policy: Policy) -> None:
        """Write the weights and let the server take them over; collective, and so is what it raises."""
        weights = {}
        for name, tensor in weights_as_in_files(policy):
            if rank() == 0:
                kept = tensor.to("cpu", self.dtype) if tensor.is_floating_point() else tensor.cpu()
                # names that share a tensor, as a tied head does, are written apart
                weights[name] = kept.clone(memory_format=torch.contiguous_format)
        problem = None
        if rank() == 0:
            try:
                self._publish(weights)
            except (OSError, InputError, TrainingError) as error:
                problem = str(error)
        if found := next(filter(None, gather_ranks(problem)), None):
            raise InputError(found if found.startswith("model.") else f"model.rollout.engine.directory: {found}")
        self._version, self._of = policy.version, id(policy)

    def _publish(self, weights: dict[str, torch.Tensor]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # in place of the old file, never into it: the server may have it mapped
        fresh = self.directory / "model.safetensors.new"
        save_file(weights, fresh, {"format": "pt"})
        os.replace(fresh, self.directory / "model.safetensors")
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.directory)}})
        if not self._post("/reset_prefix_cache", None).get("success", True):
            raise InputError(f"model.rollout.engine.url: {self.url} keeps its prefix cache; does somebody else use it?")

    def _post(self, path: str, content: dict[str, Any] | None) -> Any:
        """The JSON that the server answers; a line that says what is wrong where it does not."""
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = b"" if content is None else json.dumps(content).encode()
        try:
            with urlopen(Request(self.url + path, body, headers), timeout=self.timeout) as answer:
                return json.loads(answer.read() or b"{}")
        except HTTPError as error:
            text = " ".join(error.read().decode(errors="replace").split())[:300]
            hint = f"; start it with {START}" if error.code == 404 else ""
            raise InputError(
                f"model.rollout.engine.url: {self.url}{path} answers {error.code}: {text}{hint}"
            ) from error
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"model.rollout.engine.url: no vLLM server answers at {self.url}{path} ({error}); start one with "
                f"{START}"
            ) from error

    def _await(self, answers: list[Future[Any]], samples: int, limit: int) -> None:
        """Until all are there; leaves by `safe_points.poll`, and at the first that fails."""
        waiting = set(answers)
        while waiting:
            safe_points.poll()
            done, waiting = wait(waiting, timeout=PATIENCE)
            for answer in done:
                answer.result()
            if self.listener is not None:
                arrived = [a.result()["usage"]["completion_tokens"] for a in answers if a.done()]
                whole = len(arrived) * samples
                self.listener(Decoded(whole, len(answers) * samples, 0 if waiting else limit, limit, sum(arrived)))


def _completion(choice: dict[str, Any]) -> Completion:
    return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop")
