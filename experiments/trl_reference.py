"""What do TRL's trainers compute on the numbers our loss tests use? Writes tests/data/trl_losses.json.

    python3 -m venv trl-env && . trl-env/bin/activate
    pip install torch==2.13.0 trl==1.16.0
    python -m experiments.trl_reference --model mifo_lightning/assets/base --out tests/data/trl_losses.json

TRL's own code computes every advantage and loss. Only what needs a language model is replaced: the log-probabilities
and entropies it would compute, the responses it would sample, and the rewards it would be told are given numbers.
Which of its losses it computes is said here; clip ranges and caps are those of the shipped `configs/losses/`.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

CONFIGS = Path(__file__).parents[1] / "configs" / "losses"
QUESTIONS, GROUP, LENGTH, MAX_LENGTH = 2, 4, 6, 8
LENGTHS = [6, 3, 5, 1, 4, 6, 2, 5]
REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0]

# name of the case -> our loss file, the trainer, and its settings beside the clip of that file
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "grpo", {"loss_type": "grpo"}),
    "grpo_kl": ("grpo", "grpo", {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False}),
    "grpo_kl_times_ratio": ("grpo", "grpo", {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True}),
    "grpo_entropy_mask": ("grpo", "grpo", {"loss_type": "grpo", "top_entropy_quantile": 0.2}),
    "dr_grpo": ("dr_grpo", "grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ("dapo", "grpo", {"loss_type": "dapo"}),
    "dapo_kl": ("dapo", "grpo", {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False}),
    "dapo_entropy_mask": ("dapo", "grpo", {"loss_type": "dapo", "top_entropy_quantile": 0.2}),
    "gspo": ("gspo", "grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": ("cispo", "grpo", {"loss_type": "cispo"}),
    "rloo": ("rloo", "rloo", {}),
    "rloo_on_policy": ("rloo", "rloo", {}),
}
COMMON = {"beta": 0.0, "num_generations": GROUP, "max_completion_length": MAX_LENGTH}


def draw(seed: int) -> dict[str, Tensor]:
    """Log-probabilities under the policy, the one that sampled and the reference, and entropies, fp32 [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (QUESTIONS * GROUP, LENGTH)
    logp = -torch.rand(shape, generator=generator) * 3 - 0.05
    # the first so wide that every clip range and cap cuts something off
    near = [torch.randn(shape, generator=generator) * spread for spread in (1.0, 0.2)]
    entropy = torch.rand(shape, generator=generator) * 2
    return {"logp": logp, "logp_old": logp + near[0], "logp_ref": logp + near[1], "entropy": entropy}


def given(trainer_class: Any, tensors: dict[str, Tensor]) -> Any:
    """`trainer_class` with given numbers in place of a language model's."""

    class Given(trainer_class):
        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **options: Any) -> tuple[Any, Any, None]:
            reference = model is getattr(self, "ref_model", None)
            old = "logp_ref" if reference else "logp_old"
            return tensors["logp" if torch.is_grad_enabled() else old], tensors["entropy"], None

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            prompt_ids, completion_ids = [[1]] * len(prompts), [[1] * length for length in LENGTHS]
            texts = ["x"] * len(prompts)
            if trainer_class.__name__ == "RLOOTrainer":
                return prompt_ids, completion_ids, texts
            return prompt_ids, completion_ids, None, texts, None, {}, None, None

    return Given


def make_trainer(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor], model: str) -> Any:
    """TRL's trainer for one optimizer step on all responses at once, in training mode."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    arguments = config_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=QUESTIONS * GROUP,
        gradient_accumulation_steps=1,
        num_iterations=2,  # with one, TRL takes the ratio to be 1 and asks for no old log-probabilities
        use_cpu=True,
        bf16=False,
        report_to="none",
        **settings,
    )
    trainer = given(trainer_class, tensors)(
        model=model,
        reward_funcs=lambda completions, **columns: REWARDS,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * QUESTIONS}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def clip_of(loss: str) -> dict[str, float]:
    """TRL's names for the clip range or the cap of `configs/losses/<loss>.yaml`."""
    policy = yaml.safe_load((CONFIGS / f"{loss}.yaml").read_text(encoding="utf-8"))["model"]["loss"]
    if "ratio_cap" in policy:
        return {"epsilon_high": policy["ratio_cap"]}
    return {"epsilon": policy["clip_low"], "epsilon_high": policy["clip_high"]} if "clip_low" in policy else {}


def compute(name: str, inputs: dict[str, Tensor], model: str) -> dict[str, Any]:
    """Settings, advantages [B], loss and gradient with respect to `logp` [B, L] of one case."""
    loss_file, kind, chosen = CASES[name]
    settings = {**COMMON, **clip_of(loss_file), **chosen}
    logp = inputs["logp"].clone().requires_grad_()
    tensors = {**inputs, "logp": logp}
    if name.endswith("on_policy"):
        tensors["logp_old"] = inputs["logp"]
    trainer = make_trainer(kind, settings, tensors, model)
    batch = trainer._generate_and_score_completions([{"prompt": "1+1="}] * (QUESTIONS * GROUP))
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert logp.grad is not None
    return {
        "file": loss_file,
        "trainer": type(trainer).__mro__[1].__name__,
        "settings": settings,
        "logp_old": "logp" if name.endswith("on_policy") else "logp_old",
        "advantages": batch["advantages"].tolist(),
        "loss": loss.item(),
        "gradient": logp.grad.tolist(),
    }


def main() -> None:
    """Compute all cases, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="any small causal LM; none of its numbers are used")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    inputs = draw(args.seed)
    reference = {
        "trl": version("trl"),
        "torch": torch.__version__,
        "seed": args.seed,
        "group_size": GROUP,
        "max_length": MAX_LENGTH,
        "lengths": LENGTHS,
        "rewards": REWARDS,
        **{name: tensor.tolist() for name, tensor in inputs.items()},
        "cases": {name: compute(name, inputs, args.model) for name in CASES},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items()]
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for name, case in reference["cases"].items():
        print(f"{name:22} loss {case['loss']:+.7f}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
