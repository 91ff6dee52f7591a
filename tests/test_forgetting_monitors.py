"""What phases forget, move and cover: retention, KL, updates by layer, overlap with frozen weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SAMPLING, make_data, make_module, method_callbacks, weights
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from monitoring import Records, answer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mifo_callbacks import BufferPhaseSwitch, GradientFreezing, ImportanceEMA
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.monitors.forgetting import Forgetting, compare
from mifo_lightning.monitors.layer_updates import LayerUpdates, layer_changes, layer_group
from mifo_lightning.monitors.overlap import FrozenOverlap, frozen_shares
from mifo_lightning.monitors.phase_kl import PhaseKL, kl_sums
from mifo_lightning.monitors.trained import as_trained
from mifo_lightning.policy.loading import load_tokenizer
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.steps.optimizer import AdamWSettings

MakeTrainer = Callable[..., Trainer]
VAL = Skills(["addition", "mirrored"], 16, split="val")


def cell(questions: int, solved: int, retained: int, gained: int) -> dict[str, int]:
    return {"questions": questions, "solved": solved, "retained": retained, "gained": gained}


class Edges(Callback):
    """Kind and copied weights at the start of every phase, and at the end of training."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.weights: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.phases or self.phases[-1] != batch["phase"]:
            self.phases.append(batch["phase"])
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(weights(pl_module))
        self.steps.append(trainer.global_step)


def test_a_policy_that_does_not_move_forgets_nothing(make_trainer: MakeTrainer) -> None:
    monitors = forgetting, kl, layers = Forgetting(questions=8), PhaseKL(prompts=6), LayerUpdates()
    module = make_module(rl=AdamWSettings(lr=0.0), sft=AdamWSettings(lr=0.0))
    make_trainer([*method_callbacks(size=8), *monitors]).fit(module, datamodule=make_data(val=VAL))
    for monitor in monitors:
        assert [r["phase"] for r in monitor.phases][:3] == ["rl", "sft", "rl"]
    for record in (*forgetting.phases, {"sources": forgetting.summary()["run"]}):
        for found in record["sources"].values():
            assert found["retained"] == found["solved"]
            assert found["gained"] == 0
    assert forgetting.summary()["run"]["addition"]["solved"] > 0
    assert forgetting.responses == 16 * (1 + len(forgetting.phases))
    assert {(r["kl"], r["kl_response"]) for r in kl.phases} == {(0.0, 0.0)}
    for record in layers.phases:
        assert set(map(tuple, (v.values() for v in record["layers"].values()))) == {(0.0, 0.0)}


# --- retention --------------------------------------------------------------------------------------------------------


class Exam:
    """Rollouts are wrong; greedy answers are right where `script` has a 1: one text per measurement and source."""

    def __init__(self, *script: str) -> None:
        self.script = list(script)

    def generate(
        self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Sampling
    ) -> list[list[Completion]]:
        right = self.script.pop(0) if sampling.temperature == 0 else "0" * len(prompts)
        assert len(right) == len(prompts)
        return [[answer(tokenizer, p, r == "1")] * samples for p, r in zip(prompts, right, strict=True)]


def test_retention_is_counted_question_by_question(make_trainer: MakeTrainer) -> None:
    script = ["11100", "00000"], ["11010", "11000"], ["01011", "10100"], ["00011", "11111"]
    records, monitor = Records(), Forgetting(questions=5)
    module = make_module(engine=Exam(*(text for measurement in script for text in measurement)))
    trainer = make_trainer([BufferPhaseSwitch(size=8), monitor], logger=records)
    schedule = Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4)
    data = make_data(val=VAL, schedule=schedule, eval_batch=2)
    trainer.fit(module, datamodule=data)  # two RL steps fill the buffer; the third begins the last RL phase
    found = monitor.summary()
    assert [(r["phase"], r["number"], r["rl_step"]) for r in found["phases"]] == [
        ("rl", 1, 2),
        ("sft", 1, 2),
        ("rl", 2, 3),
    ]
    assert [r["sources"]["addition"] for r in found["phases"]] == [cell(5, 3, 2, 1), cell(5, 3, 2, 1), cell(5, 3, 2, 0)]
    assert [r["sources"]["mirrored"] for r in found["phases"]] == [cell(5, 0, 0, 2), cell(5, 2, 1, 1), cell(5, 2, 2, 3)]
    assert found["run"] == {"addition": cell(5, 3, 0, 2), "mirrored": cell(5, 0, 0, 5)}
    assert found["responses"] == 40
    assert records.series("forgetting/addition/accuracy") == [0.6, 0.6, 0.6, 0.4]
    assert records.series("forgetting/sft/mirrored/retained") == [1 / 2]
    assert records.series("forgetting/sft/mirrored/gained") == [1 / 3]
    assert records.series("forgetting/rl/mirrored/retained") == [1.0]  # nothing was solved before the first


def test_every_so_many_rl_steps_accuracy_is_measured_inside_a_phase(make_trainer: MakeTrainer) -> None:
    records, monitor = Records(), Forgetting(questions=2, every=2)
    script = ["00", "00", "01", "00", "11", "00", "11", "10"]  # at the start, before steps 3 and 5, at the end
    schedule = Schedule(rl_steps=5, prompts_per_step=4, epochs_per_rollout=2)
    trainer = make_trainer([monitor], logger=records)
    trainer.fit(make_module(engine=Exam(*script)), datamodule=make_data(val=VAL, schedule=schedule))
    assert records.series("forgetting/addition/accuracy") == [0.0, 0.5, 1.0, 1.0]
    assert [r["sources"]["mirrored"] for r in monitor.phases] == [cell(2, 0, 0, 1)]


def test_cells_are_bounded_and_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 20):
        before, after = ((torch.rand(n, generator=generator) < 0.5).tolist() for _ in range(2))
        there, back = compare({"s": before}, {"s": after})["s"], compare({"s": after}, {"s": before})["s"]
        assert there["retained"] == back["retained"]
        assert there["retained"] + there["gained"] == back["solved"] == sum(after)
        assert there["solved"] - there["retained"] == back["gained"]


def test_forgetting_needs_questions(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match=r"data\.val is null"):
        make_trainer([Forgetting()]).fit(make_module(), datamodule=make_data())
    for wrong in ({"questions": 0}, {"every": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Forgetting(**wrong)
    with pytest.raises(InputError, match="prompts: 0"):
        PhaseKL(prompts=0)


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_both_estimates_of_kl_are_unbiased() -> None:
    """Responses of two tokens, the second depends on the first; the exact KL is a sum over all nine."""
    generator = torch.Generator().manual_seed(0)
    n, logits = 200_000, torch.randn(2, 4, 3, generator=generator)  # policy; row 3: first token, else: after token
    before, after = logits.log_softmax(-1)
    first = torch.multinomial(before[3].exp(), n, replacement=True, generator=generator)
    second = torch.multinomial(before[first].exp(), 1, generator=generator)[:, 0]
    p = (before[3][:, None] + before[:3]).exp()  # of both tokens
    exact = float((p * (before[3] - after[3])[:, None] + p * (before[:3] - after[:3])).sum())
    scores = [torch.stack([logp[3][first], logp[first, second]], 1) for logp in (before, after)]
    padding = torch.full((n, 1), 5.0)  # outside the mask nothing counts
    k3, plain = kl_sums(
        torch.cat([scores[0], padding], 1), torch.cat([scores[1], -padding], 1), torch.tensor([[True, True, False]])
    )
    assert float(k3) / n == pytest.approx(exact, rel=0.02)
    assert float(plain) / n == pytest.approx(exact, rel=0.02)
    assert exact > 0.1
    assert (kl_sums(*scores, torch.ones(1, 2, dtype=torch.bool))[0]) >= 0


def test_the_kl_of_a_phase_is_that_of_the_policies_at_its_edges(make_trainer: MakeTrainer) -> None:
    monitor, edges = PhaseKL(prompts=512), Edges()
    module = make_module(sampling=Sampling(temperature=1.5, max_new_tokens=1), sft=AdamWSettings(lr=3e-3))
    schedule = Schedule(rl_steps=2, prompts_per_step=4, sft_batch=8)
    data = make_data(train=Skills(["addition", "mirrored"], 512), schedule=schedule)
    make_trainer([BufferPhaseSwitch(size=8), monitor, edges]).fit(module, datamodule=data)
    assert edges.phases == ["rl", "sft"]
    prompts = torch.tensor([q.prompt for q in data.train_dataloader().questions])
    logp = []
    for held in edges.weights[1:]:
        module.load_state_dict(held, strict=False)  # the head is the embedding
        with torch.no_grad():
            logp.append((module.policy.model.eval()(prompts).logits[:, -1] / 1.5).log_softmax(-1))
    d = logp[1] - logp[0]
    p, k3 = logp[0].exp(), d.expm1() - d
    exact = float((p * -d).sum(-1).mean())
    error = float(((p * k3**2).sum(-1) - (p * k3).sum(-1) ** 2).clamp_min(0).mean() / len(prompts)) ** 0.5
    assert abs(monitor.phases[1]["kl"] - exact) < 4 * error < exact
    assert monitor.phases[0]["kl"] >= 0


# --- updates by layer -------------------------------------------------------------------------------------------------


def test_updates_of_layers_add_up_to_that_of_the_model(make_trainer: MakeTrainer) -> None:
    monitor, edges = LayerUpdates(), Edges()
    trainer = make_trainer([*method_callbacks(size=8), monitor, edges])
    trainer.fit(make_module(), datamodule=make_data())
    assert [r["phase"] for r in monitor.phases] == edges.phases
    assert {"rl", "sft"} <= set(edges.phases)
    for i, record in enumerate(monitor.phases):
        before, after = edges.weights[i], edges.weights[i + 1]
        total = sum(float((after[n] - before[n]).double().square().sum()) for n in before)
        assert sum(v["l2"] ** 2 for v in record["layers"].values()) == pytest.approx(total, rel=1e-6)
        assert record["steps"] == edges.steps[i + 1] - edges.steps[i]
        gate = [n for n in before if ".layers.1.mlp." in n]
        changed = sum(int((after[n] != before[n]).sum()) for n in gate) / sum(before[n].numel() for n in gate)
        assert record["layers"]["layers.1.mlp"]["changed"] == pytest.approx(changed)
        assert (record["layers"]["layers.1.mlp"]["changed"] > 0.9) == (record["phase"] == "rl")  # half is frozen in SFT


def test_changes_by_hand() -> None:
    before = {"h.0.attn.a": torch.zeros(4), "h.0.attn.b": torch.zeros(1), "wte.weight": torch.ones(2)}
    after = {"h.0.attn.a": torch.tensor([0.0, 2, 0, 1]), "h.0.attn.b": torch.tensor([2.0]), "wte.weight": torch.ones(2)}
    assert layer_changes({f"m.{n}": t for n, t in before.items()}, {f"m.{n}": t for n, t in after.items()}) == {
        "layers.0.attention": {"l2": 3.0, "changed": 3 / 5},
        "embedding": {"l2": 0.0, "changed": 0.0},
    }


def test_rows_by_hand() -> None:
    before, after = {"wte.weight": torch.zeros(3, 2)}, {"wte.weight": torch.tensor([[0.0, 3], [4, 0], [0, 1]])}
    assert layer_changes(before, after, {"wte.weight": torch.tensor([True, True, False])}) == {
        "embedding.trained": {"l2": 5.0, "changed": 0.5},
        "embedding.untrained": {"l2": 1.0, "changed": 0.5},
    }


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_that_training_never_shows_are_told_apart(make_trainer: MakeTrainer, tied: bool) -> None:
    """No question or demonstration of addition holds an `s`; a tied head moves its embedding all the same."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    monitor = LayerUpdates()
    schedule = Schedule(rl_steps=0, sft_before=2, sft_batch=4)
    module = make_module(model=(model, load_tokenizer("embedded")), sft=AdamWSettings(lr=1e-3, weight_decay=0.0))
    make_trainer([monitor]).fit(module, datamodule=make_data(train=Skills(["addition"], 8), schedule=schedule))
    moved = monitor.phases[0]["layers"]
    ends = ["embedding"] if tied else ["embedding", "head"]
    assert moved.keys() >= {f"{end}.{rows}" for end in ends for rows in ("trained", "untrained")}
    assert all(moved[f"{end}.trained"]["l2"] > 0 for end in ends)
    assert moved[f"{ends[-1]}.untrained"]["changed"] > 0.9  # pushed down as outputs
    assert (moved["embedding.untrained"]["l2"] > 0) == tied


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("policy.model.model.embed_tokens.weight", "embedding"),
        ("policy.model.model.layers.11.self_attn.q_norm.weight", "layers.11.attention"),
        ("policy.model.model.layers.0.post_attention_layernorm.weight", "layers.0.norm"),
        ("policy.model.model.layers.3.mlp.experts.7.up_proj.weight", "layers.3.mlp"),
        ("policy.model.model.norm.weight", "norm"),
        ("policy.model.lm_head.weight", "head"),
        ("policy.model.transformer.wpe.weight", "embedding"),
        ("policy.model.transformer.h.2.ln_1.bias", "layers.2.norm"),
        ("policy.model.transformer.ln_f.weight", "norm"),
        ("policy.model.gpt_neox.layers.5.attention.dense.bias", "layers.5.attention"),
        ("policy.model.embed_out.weight", "head"),
    ],
)
def test_parts_of_models_by_their_hugging_face_names(name: str, group: str) -> None:
    assert layer_group(name) == group


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    gradients = {"a": torch.tensor([[1.0, -2.0], [0.0, 1.0]]), "b": torch.tensor([-4.0])}
    masks = {"a": torch.tensor([[False, True], [True, False]])}
    assert frozen_shares(gradients, masks) == pytest.approx([2 / 5, 2 / 8, 4 / 22])
    assert frozen_shares({"a": torch.zeros(2)}, {"a": torch.tensor([True, False])}) == [0.5, 0.0, 0.0]


class Gradients(Callback):
    """The shares of every SFT step's whole gradient."""

    def __init__(self) -> None:
        self.shares: list[list[list[float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.due = batch["phase"] == "sft"
        if self.due and batch["update"] == 0:
            self.shares.append([])

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.due:
            masks = next(c for c in trainer.callbacks if isinstance(c, GradientFreezing)).masks
            names = list(masks)
            gradient = torch.cat([dict(pl_module.named_parameters())[n].grad.flatten() for n in names]).double()
            mask = torch.cat([masks[n].flatten() for n in names])
            sizes = gradient.abs(), gradient.square()
            self.shares[-1].append([float(mask.double().mean()), *(float(s[mask].sum() / s.sum()) for s in sizes)])


@pytest.mark.parametrize("selector", ["random", "rl_topk"])
def test_overlap_is_that_of_the_unmasked_gradient(make_trainer: MakeTrainer, selector: Any) -> None:
    records, monitor, watch = Records(), FrozenOverlap(), Gradients()
    callbacks = [
        ImportanceEMA(),
        GradientFreezing(fraction=0.3, selector=selector),
        BufferPhaseSwitch(8, max_accuracy=0.75),
    ]
    trainer = make_trainer([*callbacks, monitor, watch], logger=records)
    trainer.fit(make_module(micro_batches=2), datamodule=make_data())
    keys = ("frozen", "gradient", "gradient_squared")
    expected = [torch.tensor(steps).mean(0).tolist() for steps in watch.shares]
    assert len(watch.shares[0]) == 2
    assert [[r[k] for k in keys] for r in monitor.phases] == [pytest.approx(e, rel=1e-5) for e in expected]
    assert [r["number"] for r in monitor.phases] == list(range(1, len(expected) + 1))
    assert records.series("overlap/gradient") == [r["gradient"] for r in monitor.phases]
    if selector == "random":  # a mask that knows nothing covers its own share of the gradient
        assert all(r["gradient"] == pytest.approx(0.3, abs=0.01) for r in monitor.phases)


@pytest.mark.parametrize("freezing", [[], [GradientFreezing(selector="none")]])
def test_without_frozen_weights_there_is_no_overlap(make_trainer: MakeTrainer, freezing: list[Callback]) -> None:
    monitor = FrozenOverlap()
    make_trainer([*freezing, BufferPhaseSwitch(8, max_accuracy=0.75), monitor]).fit(
        make_module(sampling=SAMPLING), datamodule=make_data()
    )
    assert monitor.summary()["phases"] == []


def test_a_module_that_answers_nothing_is_named() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"phase_kl: the module is a LightningModule without evaluator, "
    ):
        as_trained(LightningModule(), "phase_kl")
