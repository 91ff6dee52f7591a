"""The prompt once per group: the same numbers as whole rows, and refused where it would not be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module
from monitoring import Records
from rl_steps import Coin, relative

from benchmarks.families import tiny_config, tiny_model
from mifo_lightning import PolicyLoss, Schedule
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy import prefix
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.policy.prefix import differences, share_prompts

# the layers of gpt_neo have a window that its cache knows nothing of
RIGHT = ["llama", "qwen2", "gpt2", "opt", "qwen3_moe", "olmo2", "phi3", "gpt_neo", "cohere", "minicpm3"]
WRONG = {
    "gemma3_text": "look back at everything",
    "mamba": "takes no cache",
    "git": "values differ by",  # its prompts look at one another
}


def grouped(vocabulary: int) -> Sequences:
    """Four prompts of three lengths, three responses each, of one token and more."""
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocabulary, (n,), generator=g).tolist() for n in (5, 9, 2, 5)]
    responses = [torch.randint(vocabulary, (1 + (5 * i) % 7,), generator=g).tolist() for i in range(12)]
    return Sequences.pack([prompt for prompt in prompts for _ in range(3)], responses, 0)


def scored(policy: Policy, sequences: Sequences, shared: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Log-probabilities, entropies and the gradient of a sum over both."""
    policy.zero_grad()
    policy.share_prompts = shared
    logp, entropy = policy(sequences, 0.7, entropy_gradient=True, grouped=True)
    weight = torch.linspace(-1, 1, logp.numel()).view_as(logp)
    (logp * weight + entropy * weight.flip(0)).sum().backward()
    gradient = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return logp.detach(), entropy.detach(), gradient


@pytest.mark.parametrize("family", RIGHT)
def test_values_and_gradients_are_those_of_whole_rows(family: str) -> None:
    policy = Policy(tiny_model(tiny_config(family)))
    assert share_prompts(policy.model, True, None)
    sequences = grouped(policy.model.config.vocab_size)
    whole, shared = (scored(policy, sequences, share) for share in (False, True))
    torch.testing.assert_close(shared[0], whole[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(shared[1], whole[1], atol=2e-5, rtol=1e-5)
    assert relative(shared[2], whole[2]) < 1e-5


@pytest.mark.parametrize("family", WRONG)
def test_a_family_for_which_it_is_wrong_is_refused_where_wanted_and_left_alone_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_config(family))
    with pytest.raises(InputError, match=rf"share_prompts: true is not allowed for \w+: .*{WRONG[family]}"):
        share_prompts(model, True, None)
    monkeypatch.setattr(prefix, "SHARED_FROM", 0)
    assert not share_prompts(model, None, None)


def test_small_models_are_left_alone_and_none_is_forced() -> None:
    model = tiny_model(tiny_config("llama"))
    assert not share_prompts(model, None, None)
    assert not share_prompts(model, False, None)


@pytest.mark.parametrize("nested", [False, True])
def test_positions_that_are_stretched_with_length_are_refused(nested: bool) -> None:
    rotation = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(tiny_config("llama", rope_parameters=rotation))
    if nested:
        model.config.rope_parameters = {"full_attention": rotation}
    with pytest.raises(InputError, match="positions are stretched"):
        share_prompts(model, True, None)


@pytest.mark.parametrize("broken", ["positions", "mask", "gradient"])
def test_what_the_test_at_the_start_would_see(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that ignores positions or masks, or cuts the graph at the cache, is found on the loaded model."""
    model = tiny_model(tiny_config("gpt2")).eval()  # its positions are absolute: none may be shifted
    run = model.base_model.forward

    def forward(**arguments: Any) -> Any:
        for layer in (
            arguments["past_key_values"].layers if broken == "gradient" and "past_key_values" in arguments else ()
        ):
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        arguments.pop({"positions": "position_ids", "mask": "attention_mask"}.get(broken, ""), None)
        return run(**arguments)

    monkeypatch.setattr(prefix, "accepted", lambda _, **named: {"use_cache": False} if "use_cache" in named else named)
    assert max(differences(model)) < 1e-5
    monkeypatch.setattr(model.base_model, "forward", forward)
    with pytest.raises(InputError, match="differ"):
        share_prompts(model, True, None)


def test_a_model_that_cannot_even_be_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SHARED_FROM", 0)
    monkeypatch.setattr(prefix, "DynamicCache", lambda config: config.no_such_thing)
    assert not share_prompts(tiny_model(tiny_config("llama")), None, None)


def test_layers_that_are_made_again_are_refused() -> None:
    module = make_module(share_prompts=True, gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"share_prompts: true .*: model\.loading\.gradient_checkpointing"):
        module.load()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_run_learns_the_same(make_trainer: Callable[..., Any], micro_batches: int) -> None:
    """Two updates a rollout, a reference, an entropy mask and a bonus: each of the scores takes the same path."""
    loss = PolicyLoss(kl_coefficient=0.1, entropy_bonus=0.1, entropy_fraction=0.5)
    schedule = Schedule(rl_steps=3, prompts_per_step=4, epochs_per_rollout=2)
    found = []
    for share in (False, True):
        records = Records()
        module = make_module(reward=Coin(), loss=loss, micro_batches=micro_batches, share_prompts=share)
        make_trainer([], logger=records).fit(module, make_data(schedule=schedule))
        assert module.policy is not None
        assert module.policy.share_prompts == share
        found.append(records)
    for key in ("rl/policy_loss", "rl/kl_ref", "rl/kl_old", "rl/grad_norm", "rollout/reward"):
        assert found[1].series(key) == pytest.approx(found[0].series(key), rel=2e-3, abs=2e-6), key
    assert max(map(abs, found[0].series("rl/kl_ref"))) > 1e-4
