"""On a GPU that is none: no operation mixes devices, results are the CPU's to the bit, a token is waited for once."""

from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_gpu import GPU, OnGPU, PretendGPU, moved

import mifo_lightning as mifo
from mifo_callbacks import ImportanceEMA
from mifo_callbacks.recipe import mifo as recipe
from mifo_lightning.methods.luffy import Luffy
from mifo_lightning.policy import token_scores
from mifo_lightning.policy.ending import set_ends
from mifo_lightning.policy.loading import load_policy, load_tokenizer
from mifo_lightning.rollout.in_process import InProcessEngine

METHOD: dict[str, Any] = {"loading": mifo.Loading(share_prompts=True)}
EVERYTHING: dict[str, Any] = {
    "loss": mifo.PolicyLoss(kl_coefficient=0.1, entropy_fraction=0.5, entropy_bonus=0.01, reference_sync_steps=1),
    "mixing": Luffy(),
}


class OnPretendGPU(SingleDeviceStrategy):
    """Puts the weights there."""

    def __init__(self) -> None:
        super().__init__(device="cpu")

    def model_to_device(self) -> None:
        module: Any = self.model
        moved(module)._device = GPU
        for reference in module.reinforcement.references:
            moved(reference)


def trained(gpu: bool, settings: dict[str, Any], callbacks: list[Any], epochs: int) -> dict[str, torch.Tensor]:
    """Weights after two RL steps, an SFT phase after each where the callbacks say so."""

    def reward(responses: list[str], truths: list[str]) -> list[float]:
        return [float(i % 2) for i, _ in enumerate(responses)]

    lightning.seed_everything(0, verbose=False)
    rows: Any = [
        {"prompt": f"{99 + i}+1=", "data_source": "-", "reward_model": {"ground_truth": "1"}, "target": f"{i:03d}"}
        for i in range(8)
    ]
    rate = mifo.AdamWSettings(lr=1e-3)
    module = mifo.MifoModule(
        "embedded",
        mifo.FunctionReward(reward, isolate=False),
        mifo.Rollout(group_size=4, sampling=mifo.Sampling(max_new_tokens=8)),
        optimizer=mifo.OptimizerSettings(micro_batch_tokens=100, rl=rate, sft=rate),
        **settings,
    )
    data = mifo.QuestionData(
        rows,
        val=rows[:3],
        prompts=mifo.Prompts(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        demonstrations=mifo.Demonstrations(verify=False),
        schedule=mifo.Schedule(rl_steps=2, prompts_per_step=4, sft_batch=4, epochs_per_rollout=epochs, fit_sizes=False),
    )
    trainer = lightning.Trainer(
        max_epochs=-1,
        logger=DummyLogger(),  # with one, all is computed that is logged
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **({"strategy": OnPretendGPU()} if gpu else {"accelerator": "cpu"}),
    )
    trainer.fit(module, data)
    return {name: getattr(p, "held", p).detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("case", ["the method", "everything"])
def test_a_run_on_a_gpu_mixes_no_devices(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(gpu: bool) -> dict[str, torch.Tensor]:
        if case == "the method":
            return trained(gpu, METHOD, recipe(size=4, max_accuracy=1.0), 1)
        monkeypatch.setattr(token_scores, "RUNNING_FROM", 1)
        return trained(gpu, EVERYTHING, [ImportanceEMA(accumulate="step")], 2)

    there = weights(gpu=False)
    with PretendGPU():
        here = weights(gpu=True)
    assert all(torch.equal(here[name], weight) for name, weight in there.items())


def test_the_cpu_waits_once_for_each_token_of_a_batch() -> None:
    tokenizer, prompts = load_tokenizer("embedded"), [[1, 2, 3], [3, 2, 1]]
    set_ends(tokenizer, {23})  # a token that never comes: no row leaves
    policy = load_policy("embedded")
    moved(policy)
    waits = []
    for length in (6, 16):
        with PretendGPU():
            InProcessEngine().generate(policy, tokenizer, prompts, [0, 1], 2, mifo.Sampling(max_new_tokens=length))
            waits.append(OnGPU.waits)
    assert (waits[1] - waits[0]).total() == 10, waits[1] - waits[0]


def test_it_refuses_what_a_gpu_refuses() -> None:
    here = torch.ones(3)
    with PretendGPU():
        there = torch.ones(3, device=GPU)
        assert (there + torch.tensor(1.0)).device == GPU
        assert there[torch.tensor([0])].device == GPU
        for work in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="on the CPU"):
                work()
        assert (there.to("cpu") + here).device.type == "cpu"


@pytest.mark.parametrize("switch", ["older", "newer"])
def test_what_is_compared_in_fp32_is_computed_without_tf32(switch: str) -> None:
    policy, matmul = load_policy("embedded"), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if switch == "older":
        torch.set_float32_matmul_precision("high")  # as Lightning advises where there are tensor cores
    else:
        matmul.fp32_precision = "tf32"  # as torch advises; reading the older switch raises from here on
    try:
        with policy.in_own_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        if switch == "older":
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
