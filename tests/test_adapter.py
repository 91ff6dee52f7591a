"""Low-rank adapters: which weights stand still, what is exported, resumed, measured and refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_module, method_callbacks, weights
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mifo_lightning as mifo
from mifo_callbacks import GradientFreezing
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.datamodule import QuestionData
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.monitors.costs import Costs, multiplying
from mifo_lightning.monitors.layer_updates import LayerUpdates
from mifo_lightning.monitors.update_norm import UpdateNorm
from mifo_lightning.policy.adapter import Adapter, add_adapters
from mifo_lightning.policy.loading import Loaded, export_model, load_policy, load_tokenizer, plain_weights
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.weights import weights_as_in_files
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import PolicyLoss

pytest.importorskip("peft")

FAST = AdamWSettings(lr=5e-3, weight_decay=0.1)
KINDS = [{}, {"frozen_a": True}, {"per_phase": True}]


def adapted(**changes: Any) -> mifo.MifoModule:
    """A module with adapters of rank 4, whose learning rates are ten times those of weights."""
    settings = {key: changes.pop(key) for key in ("rank", "targets", "frozen_a", "per_phase") if key in changes}
    adapter = Adapter(**{"rank": 4, "alpha": 8.0, **settings})
    return make_module(**{"adapter": adapter, "rl": FAST, "sft": FAST, **changes})


def randomized(policy: Policy) -> Policy:
    """The policy with adapters that change something."""
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=generator)
    return policy


def method(**changes: Any) -> list[Callback]:
    """The callbacks of MIFO, or those but freezing."""
    return [c for c in method_callbacks(size=8) if changes.get("freeze", True) or not isinstance(c, GradientFreezing)]


def short() -> QuestionData:
    """Four RL steps of four questions each."""
    return make_data(schedule=Schedule(rl_steps=4, prompts_per_step=4, sft_batch=4))


class Watch(Callback):
    """Phases, weights before each optimizer step and after it, and what is frozen."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        masks = next((dict(c.masks) for c in trainer.callbacks if isinstance(c, GradientFreezing)), {})
        self.seen.append((batch["phase"], self.before, weights(pl_module), masks))


def test_with_a_frozen_a_the_frozen_coordinates_of_b_keep_every_bit_and_the_others_move(
    make_trainer: Callable[..., Trainer],
) -> None:
    watch = Watch()
    module = adapted(frozen_a=True)
    make_trainer([*method(), watch]).fit(module, short())
    phases = [phase for phase, *_ in watch.seen]
    sft = [(before, after, masks) for phase, before, after, masks in watch.seen if phase == "sft" and masks]
    assert phases.count("rl") == 4
    assert len(sft) > 1
    assert {name.split(".lora_")[1] for name in sft[0][2]} == {"B.lora.weight"}
    for before, after, masks in sft:
        for name, frozen in masks.items():
            assert int(frozen.sum()) == frozen.numel() // 2
            assert torch.equal(before[name][frozen], after[name][frozen])
            assert (before[name] != after[name])[~frozen].float().mean() > 0.9
    start, end = watch.seen[0][1], watch.seen[-1][2]
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if "lora_B" in name}
    for name, a in end.items():
        if "lora_A" in name:
            assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)


def test_square_orthonormal_a_freezes_what_full_training_would_in_rotated_coordinates() -> None:
    """One gradient step of D and of B: |dB| = |dW A^T|, so the masks on B are those of |dW| after the rotation."""
    from mifo_callbacks.freezing_rules import freezing_masks

    plain, policy = load_policy("embedded"), load_policy("embedded")
    target = "model.layers.1.mlp.up_proj"  # 96 inputs, 256 outputs
    add_adapters(policy, Adapter(96, 96.0, [target.removeprefix("model.")], frozen_a=True), seed=0)
    rows = Sequences.pack([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]], 0)
    for model in (plain, policy):
        model(rows)[0].sum().backward()
    layer = policy.model.get_submodule(target)
    a, b = (part["lora"].weight for part in (layer.lora_A, layer.lora_B))
    full = plain.model.get_submodule(target).weight
    assert torch.allclose(a @ a.T, torch.eye(96), atol=1e-5)
    rotated = (full.grad @ a.T).abs()
    torch.testing.assert_close(b.grad.abs(), rotated, atol=1e-5 * float(rotated.max()), rtol=1e-4)
    masks = [freezing_masks([("w", x.detach())], 0.5).masks["w"] for x in (b.grad.abs(), rotated)]
    # coordinates that rounding puts on the other side of the threshold are few
    assert (masks[0] != masks[1]).float().mean() < 1e-3
    assert (masks[0] != freezing_masks([("w", full.grad.abs())], 0.5).masks["w"]).float().mean() > 0.3


@pytest.mark.parametrize("settings", KINDS)
def test_the_export_is_a_plain_model_with_the_same_logits_and_the_original_stays(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    policy = load_policy("embedded")
    add_adapters(policy, Adapter(4, 8.0, **settings), seed=0)
    before = copy.deepcopy(randomized(policy).model.state_dict())
    export_model(policy, load_tokenizer("embedded"), tmp_path, write=True)
    assert all(torch.equal(before[name], weight) for name, weight in policy.model.state_dict().items())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = load_policy("embedded").model
    assert exported.state_dict().keys() == base.state_dict().keys()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():  # in fp64: what is left is the rounding of the merged weights to fp32
        ours, theirs, plain = (m.double()(input_ids=tokens).logits for m in (policy.model, exported, base))
    size = float(ours.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-6 * size
    assert float((ours - plain).abs().max()) > 1e-2 * size


def test_layers_of_gpt2_lie_the_other_way_round(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    policy = load_policy(Loaded(GPT2LMHeadModel(config), load_tokenizer("embedded")))
    add_adapters(policy, Adapter(4, 8.0, ["c_attn", "mlp.c_proj"]), seed=0)
    randomized(policy)
    plain = GPT2LMHeadModel(config).eval()
    plain.load_state_dict(plain_weights(policy))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(policy.model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


@pytest.mark.parametrize("settings", KINDS)
def test_a_checkpoint_holds_the_adapters_alone_and_resuming_is_exact(
    make_trainer: Callable[..., Trainer], tmp_path: Path, settings: dict[str, Any]
) -> None:
    freeze = "per_phase" not in settings
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    watch, module = Watch(), adapted(**settings)
    callbacks = [*method(freeze=freeze), watch, saver]
    make_trainer(callbacks, enable_checkpointing=True).fit(module, short())
    inside_sft = [phase for phase, *_ in watch.seen].index("sft") + 1
    path = tmp_path / f"step={inside_sft}.ckpt"
    held = torch.load(path, weights_only=True)["state_dict"]
    assert {n for n in held if ".lora_" not in n} == {"policy.adapter_base"}
    again = adapted(**settings)
    assert again.saved_weights() == {name: weight.shape for name, weight in held.items()}, "known before it is loaded"
    make_trainer([*method(freeze=freeze)]).fit(again, short(), ckpt_path=path)
    for name, weight in weights(module).items():
        assert torch.equal(weights(again)[name], weight), name
    loaded = mifo.MifoModule.load_from_checkpoint(path, reward=LastAnswerReward())
    for name, weight in weights(loaded).items():
        assert torch.equal(watch.seen[inside_sft - 1][2][name], weight), name


def test_adapters_do_not_go_beside_other_weights(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    make_trainer([saver], enable_checkpointing=True, max_steps=1).fit(adapted(), short())
    other = load_policy("embedded").model
    other.get_input_embeddings().weight.data[3, 3] += 1e-6
    module = adapted(model=Loaded(other, load_tokenizer("embedded")))
    with pytest.raises(InputError, match="ckpt_path: its adapters were trained beside other weights"):
        make_trainer().fit(module, short(), ckpt_path=tmp_path / "step=1.ckpt")


def test_each_kind_of_phase_trains_its_own_adapter(make_trainer: Callable[..., Trainer]) -> None:
    watch = Watch()
    make_trainer([*method(freeze=False), watch]).fit(adapted(per_phase=True), short())
    assert {phase for phase, *_ in watch.seen} == {"rl", "sft"}
    for phase, before, after, _ in watch.seen:
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".lora_")[1].split(".")[1] for name in moved} == {phase}
    with pytest.raises(InputError, match=r"^model.adapter.per_phase: true is not allowed with freezing by importance"):
        make_trainer(method()).fit(adapted(per_phase=True), short())


def test_the_reference_is_the_model_without_its_adapters(make_trainer: Callable[..., Trainer]) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.kl: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.kl.append(float(trainer.callback_metrics["rl/kl_ref"]))

    seen, module = Seen(), adapted(loss=PolicyLoss(kl_coefficient=0.1))
    make_trainer([seen]).fit(module, short())
    assert module.reinforcement.references == []
    assert seen.kl[0] == 0
    assert all(kl > 0 for kl in seen.kl[1:])
    base, rows = load_policy("embedded"), Sequences.pack([[1, 2, 3]], [[6, 7]], 0)
    with torch.no_grad():
        assert not torch.equal(module.policy(rows)[0], base(rows)[0])
        with module.policy.adapter.disabled():
            assert torch.equal(module.policy(rows)[0], base(rows)[0])


def test_monitors_measure_the_weights_that_adapters_change(make_trainer: Callable[..., Trainer]) -> None:
    class Plain(Callback):
        """The weights of the exported model after each step."""

        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []
            self.norms: list[float] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append({name: w.double() for name, w in plain_weights(pl_module.policy).items()})

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.on_train_start(trainer, pl_module)
            self.norms.append(float(trainer.callback_metrics["rl/update_norm"]))

    plain, layers, costs = Plain(), LayerUpdates(), Costs()
    module = adapted(targets=["up_proj", "q_proj"])
    make_trainer([UpdateNorm(), layers, costs, plain]).fit(module, short())
    expected = [
        sum(float((new[name] - old[name]).square().sum()) for name in old) ** 0.5
        for old, new in zip(plain.seen, plain.seen[1:], strict=False)
    ]
    assert plain.norms == pytest.approx(expected, rel=1e-3)
    found = layers.summary()["phases"][0]["layers"]
    assert set(found) == {f"layers.{n}.{part}" for n in range(3) for part in ("mlp", "attention")}
    name = "model.layers.1.mlp.up_proj.weight"
    change = plain.seen[-1][name] - plain.seen[0][name]
    assert found["layers.1.mlp"]["l2"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert found["layers.1.mlp"]["changed"] == pytest.approx(float((change != 0).double().mean()), abs=1e-3)
    account = costs.summary()["rl"]
    n, t = multiplying(load_policy("embedded").model) + module.trained_size() - 1, module.trained_size() - 1
    assert account["flops"] == 2 * n * account["generated_tokens"] + (4 * n + 2 * t) * account["trained_tokens"]


def test_recomputed_layers_give_adapters_the_same_gradient() -> None:
    rows = Sequences.pack([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]], 0)
    found = []
    for recompute in (False, True):
        policy = load_policy("embedded", gradient_checkpointing=recompute)
        add_adapters(policy, Adapter(4, 8.0), seed=0)
        randomized(policy)(rows)[0].sum().backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert {name.split(".lora_")[1][0] for name in found[0]} == {"A", "B"}
    assert all(gradient.norm() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_groups_share_their_prompt_through_adapters() -> None:
    policy = load_policy("embedded")
    add_adapters(policy, Adapter(4, 8.0), seed=0)
    rows = Sequences.pack([[1, 2, 3]] * 2 + [[4, 5]] * 2, [[6, 7], [8], [9, 10], [11]], 0)
    found = []
    for policy.share_prompts in (False, True):
        policy.zero_grad()
        logp, _ = randomized(policy)(rows, grouped=True)
        logp.sum().backward()
        found.append((logp.detach(), [p.grad.clone() for p in policy.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0])


def test_a_module_generates_and_checks_its_engine_with_adapters(make_trainer: Callable[..., Trainer]) -> None:
    module = adapted(frozen_a=True)
    make_trainer().fit(module, short())  # its self-check passes at the start, while B = 0
    module.self_check.run(module.policy, [[1, 2, 3], [4, 5]], "bf16-mixed")  # anew, in another precision
    assert len(module.generate(["2+2="], samples=2, sampling=SAMPLING)[0]) == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rank": 0}, "model.adapter.rank: 0 is not allowed; it must be at least 1"),
        ({"rank": 97}, "model.adapter.rank: 97 is not allowed; it must be at most 96, the inputs of model.layers.0"),
        ({"alpha": 0.0}, "model.adapter.alpha: 0.0 is not allowed; it must be above 0"),
        ({"targets": []}, "model.adapter.targets: [] is not allowed; it must be all-linear or a list of names"),
        ({"targets": ["proj"]}, "model.adapter.targets: 'proj' is not allowed; linear layers of Qwen2ForCausalLM are "),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as refused:
        make_module(adapter=Adapter(**settings)).load()
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_what_is_no_adapter_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^model.adapter: {'rank': 4} is not allowed; it must be an Adapter"):
        make_module(adapter={"rank": 4})


def test_without_peft_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"^model.adapter: needs peft; pip install mifo_lightning\[lora\]$"):
        make_module(adapter=Adapter())


def test_the_reference_of_adapters_stands_still() -> None:
    loss = PolicyLoss(kl_coefficient=0.1, reference_sync_steps=4)
    with pytest.raises(
        InputError, match=r"^model.loss.reference_sync_steps: 4 is not allowed; it must be 0 with an ad"
    ):
        make_module(adapter=Adapter(rank=2), loss=loss)


def test_an_engine_of_its_own_takes_over_the_merged_weights() -> None:
    policy = load_policy("embedded")
    names = {name for name, _ in weights_as_in_files(policy)}
    add_adapters(policy, Adapter(4, 8.0), seed=0)
    randomized(policy)
    taken = dict(weights_as_in_files(policy))
    assert set(taken) == names
    assert all(torch.equal(taken[name], weight) for name, weight in plain_weights(policy).items())
