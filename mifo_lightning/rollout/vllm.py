"""vLLM inside the training process: the engine that keeps its own copy of the weights, and what it asks of vLLM."""

import os
import tempfile
from copy import deepcopy
from importlib.util import find_spec
from typing import Any, Literal

from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.collectives import ranks
from mifo_lightning.checkpoints import safe_points
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.ending import end_tokens
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rollout.engine import Completion, Decoded, Listener, RolloutEngine, Sampling
from mifo_lightning.rollout.weights import weights_as_in_files


class VLLMEngine(RolloutEngine):
    """Decodes with vLLM in the training process, which must be a single one.

    vLLM is built at the first call, without weights, and takes over those of the policy, as tensors, whenever
    `policy.version` is another. It stays until the process ends.

    Args:
        dtype: Of vLLM's weights and arithmetic.
        sleep: Whether vLLM frees the GPU between two calls, while its weights wait in the memory of the CPU; for CUDA
            alone, and untested: there was none.
        arguments: Further arguments of `vllm.LLM`, such as `gpu_memory_utilization` or `max_model_len`.

    Raises:
        InputError: vLLM is not installed.
    """

    own_numerics = True

    def __init__(
        self,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        sleep: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        if find_spec("vllm") is None:
            raise InputError("model.rollout.engine: VLLMEngine needs vLLM: pip install mifo_lightning[vllm]")
        self.dtype, self.sleep, self.arguments = dtype, sleep, arguments or {}
        self.listener: Listener | None = None
        self._llm: Any = None
        self._version: int | None = None  # of the policy's weights that vLLM has
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
            InputError: There are several processes, or vLLM cannot run this model.
        """
        if ranks() > 1:
            raise InputError(
                "model.rollout.engine: VLLMEngine is for a single process; give VLLMServerEngine, which all ranks ask"
            )
        with isolate_rng():  # vLLM seeds every generator there is, and draws from torch's
            if self._llm is None:
                self._llm = build(policy, tokenizer, self.dtype, {"enable_sleep_mode": self.sleep, **self.arguments})
            elif self.sleep:
                self._llm.wake_up()
            if self._version != policy.version or self._of not in (None, id(policy)):
                self.load(policy)
            drawn = self._draw(prompts, requests(tokenizer, keys, samples, sampling), sampling.max_new_tokens)
            if self.sleep:
                self._llm.sleep(level=1)
        return [repeated(group, samples) for group in drawn]

    def load(self, policy: Policy) -> None:
        """Let vLLM take over the policy's weights, and forget what it has computed with others."""
        # repacks what kernels have packed, which a plain `load_weights` leaves old
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_as_in_files(policy)})
        self._llm.reset_prefix_cache()
        self._version, self._of = policy.version, id(policy)

    def _draw(self, prompts: list[list[int]], asked: list[dict[str, Any]], limit: int) -> list[list[Completion]]:
        """The responses to each prompt; vLLM batches them as it likes."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, done, step = self._llm.llm_engine, dict[str, list[Completion]](), 0
        for i, (prompt, request) in enumerate(zip(prompts, asked, strict=True)):
            wanted = SamplingParams(
                **request, detokenize=bool(request["stop"]), output_kind=RequestOutputKind.FINAL_ONLY
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, wanted)
        try:
            while engine.has_unfinished_requests():
                safe_points.poll()
                done |= {out.request_id: list(map(_completion, out.outputs)) for out in engine.step() if out.finished}
                step += 1
                self._tell(done, sum(request["n"] for request in asked), min(step, limit), limit)
        except BaseException:
            engine.abort_request([str(i) for i in range(len(prompts))])
            raise
        return [done[str(i)] for i in range(len(prompts))]

    def _tell(self, done: dict[str, list[Completion]], asked: int, step: int, limit: int) -> None:
        if self.listener is not None:
            whole = [c for group in done.values() for c in group]
            self.listener(Decoded(len(whole), asked, step, limit, sum(len(c.tokens) for c in whole)))


def build(policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: str, arguments: dict[str, Any]) -> Any:
    """A `vllm.LLM` of the policy's shape, whose weights are still to come.

    Raises:
        InputError: vLLM refuses the model or an argument.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tensors are handed over within the process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the threads are the training's
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.platforms import current_platform

    config = deepcopy(policy.model.config)
    config.architectures = config.architectures or [type(policy.model).__name__]
    if current_platform.is_cpu():
        # there a tied head is packed once and would stay old; one of its own is packed anew
        config.tie_word_embeddings = False
    try:
        with tempfile.TemporaryDirectory() as directory:
            config.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            settings = {"load_format": "dummy", "logprobs_mode": "processed_logprobs", **arguments}
            return LLM(model=directory, dtype=dtype, **settings)
    except Exception as error:  # whatever vLLM raises
        text = " ".join(str(error).split())[:300]
        name = type(policy.model).__name__
        raise InputError(f"model.rollout.engine: vLLM cannot run {name} ({type(error).__name__}: {text})") from error


def requests(
    tokenizer: PreTrainedTokenizerBase, keys: list[int], samples: int, sampling: Sampling
) -> list[dict[str, Any]]:
    """What vLLM is asked for each key: `SamplingParams`, in process and of a server alike.

    vLLM gives sample i of a request the seed `seed + i`, so that a group's size does not change its first members.
    """
    shared = {
        "n": samples if sampling.temperature else 1,  # greedy samples are all the same, and vLLM refuses to draw two
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": 0,  # of the drawn token alone
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(end_tokens(tokenizer)),
        "ignore_eos": True,  # what ends a response is said above
        "skip_special_tokens": False,
    }
    return [{**shared, "seed": key % 2**62} for key in keys]


def repeated(group: list[Completion], samples: int) -> list[Completion]:
    """A group with all its samples: one greedy response stands for each."""
    return group if len(group) == samples else group * samples


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    logp = [chosen[token].logprob for token, chosen in zip(tokens, output.logprobs, strict=True)]
    return Completion(tokens, logp, finished=output.finish_reason == "stop")
