"""How far apart models are along fixed responses, the ones that are not trained loaded for it and let go again."""

from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from mifo_callbacks.collectives import gather_ranks
from mifo_callbacks.sharding import full
from mifo_lightning.common.errors import InputError, out_of_memory
from mifo_lightning.policy.adapter import FINGERPRINT, fingerprint
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.loading import load_policy, shard_policy
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.scoring import exact_kl


def response_kl(
    p: Policy,
    q: Policy,
    prompts: list[list[int]],
    responses: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    regrouped: bool = False,
) -> list[float]:
    """KL(p || q) of each of this rank's responses, summed over its tokens, in nats; collective under FSDP2.

    Arguments as of `exact_kl`.
    """
    with p.sampling(), q.sampling():
        if not responses:
            return []
        sequences = Sequences.pack(prompts, responses, padding(tokenizer)).to(p.device)
        sums: list[float] = exact_kl(p, q, sequences, regrouped).double().sum(-1).tolist()
    return sums


def load_beside(module: Any, model: object, weights: int | None = None) -> Policy:
    """A model where and as the trained one is: on its device, in its numerics, and sharded if that is; collective.

    Args:
        module: The `MifoModule` that trains a `policy`.
        model: Hugging Face directory or hub name; anything else was in memory, and has changed.
        weights: The fingerprint that its weights must have; None takes any.

    Raises:
        InputError: It cannot be loaded, on any of the ranks, or has other weights; on all of them.
    """
    trained: Policy = module.policy
    loaded, problem = None, None
    if not isinstance(model, str):
        raise InputError("a model that was given in memory cannot be loaded again")
    try:
        loaded = load_policy(model, trust_remote_code=module.loading.trust_remote_code)
        if weights is not None and int(fingerprint(loaded.model)) != weights:
            problem = f"the weights of {model!r} are no longer those that training began with"
        loaded.requires_grad_(False).to("cpu" if isinstance(trained, FSDPModule) else trained.device)
    except InputError as error:
        problem = str(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        problem = f"no memory is left to hold {model!r} beside the trained model"
    if problems := [problem for problem in gather_ranks(problem) if problem]:
        raise InputError(problems[0])
    assert loaded is not None, "what could not be loaded is a problem"
    loaded.numerics = trained.numerics
    if isinstance(trained, FSDPModule):
        shard_policy(loaded, module.device_mesh["data_parallel"])
    return loaded


def weights_of(policy: Policy) -> int:
    """The fingerprint of a policy's weights, without its adapters; collective if they are sharded."""
    found = fingerprint(policy.model) if policy.adapter is None else getattr(policy, FINGERPRINT)
    return int(full(found))
