"""Which decoder families of the installed transformers does the framework decode right? Tiny models, random weights.

python -m benchmarks.families                  # all of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
python -m benchmarks.families qwen3_next mamba # some of them
"""

import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from mifo_callbacks import Seed
from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.ending import padding
from mifo_lightning.policy.loading import load_policy, load_tokenizer
from mifo_lightning.policy.policy import Policy, Sequences
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.self_check import EXACT, self_check

LIMIT = 240  # seconds a family may take; most take two
PROMPTS = [[5, 9, 12, 3, 7, 8, 11, 4, 6, 10, 15], [6, 4, 17], [20, 3, 9, 14, 5, 6], [7, 8, 9], [13] * 5 + [4, 9]]

# what a tiny model has, whatever its family; a name that a configuration does not know is left out
SIZES = {
    64: (
        "index_topk max_position_embeddings model_max_length max_seq_len context_length n_ctx "
        "max_target_positions max_source_positions n_positions original_max_position_embeddings "
        "keep_window_size mamba_d_ssm"
    ),
    50: "ngram_vocab_size_base",
    48: (
        "intermediate_size moe_intermediate_size ffn_dim encoder_ffn_dim d_inner decoder_ffn_dim "
        "shared_expert_intermediate_size ffn_hidden_size dim_ff shared_intermediate_size "
        "expert_ffn_hidden_size dense_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size dff intermediate_size_mlp feed_forward_size prompt_mid_dim "
        "classifier_proj_size"
    ),
    40: (
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size "
        "encoder_hash_byte_group_vocab"
    ),
    32: (
        "hidden_size embedding_size d_model lru_width attention_hidden_size word_embed_proj_dim "
        "input_embedding_size output_embedding_size embedding_dim emb_dim"
    ),
    16: (
        "qk_head_dim kv_lora_rank q_lora_rank o_lora_rank index_topk_blocks attention_head_dim "
        "router_hidden_size rel_extent ple_embed_dim"
    ),
    8: (
        "head_dim linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim qk_nope_head_dim "
        "v_head_dim index_head_dim dim_head d_head kv_channels attention_head_size qk_rope_head_dim "
        "rotary_dim query_pre_attn_scalar sliding_window attention_chunk_size local_attention "
        "attention_window_size sliding_window_size window_size state_size mamba_d_state ssm_state_size "
        "mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim hc_lowrank mamba_headdim laurel_rank "
        "hidden_size_per_layer_input num_mel_bins pronunciation_embed_dim shape_embed_dim "
        "make_ngram_vocab_size_divisible_by"
    ),
    4: (
        "num_hidden_layers encoder_layers decoder_layers num_layers n_layer num_encoder_layers "
        "num_decoder_layers num_blocks n_layers num_attention_heads encoder_attention_heads "
        "decoder_attention_heads n_head n_heads num_heads attention_heads linear_num_heads "
        "swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "linear_num_value_heads num_experts n_routed_experts num_local_experts moe_num_experts "
        "index_block_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size block_size adapter_rank "
        "d_rel gated_norm_rank"
    ),
    2: (
        "bos_token_id decoder_start_token_id start_token_id sep_token_id cls_token_id num_key_value_heads "
        "num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k zero_expert_num index_n_heads n_mamba_heads num_query_groups heads_per_ngram "
        "split_ngram_parts o_groups prompt_types segment_types num_codebooks"
    ),
    1: (
        "eos_token_id n_group topk_group num_expert_group first_k_dense_replace n_shared_experts n_groups "
        "mamba_n_groups"
    ),
    0: "pad_token_id num_kv_shared_layers",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
# where a family's own rules ask for other numbers
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"] * 2}
VISION: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"hidden_size": 32, "intermediate_size": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": HYBRID,
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": EXPERTS,
    "dots1": EXPERTS,
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "fuyu": {"image_size": 16, "patch_size": 4, "hidden_size": 32},
    "gemma3": {"vision_config": VISION},
    "granitemoehybrid": HYBRID,
    "kimi_linear": HYBRID,
    "got_ocr2": {"vision_config": {**VISION, "mlp_dim": 32, "output_channels": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "moss_transcribe_diarize": {"audio_config": {"d_model": 32, "encoder_layers": 1, "max_source_positions": 16}},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mamba"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# further settings under which a family is tried
VARIANTS: dict[str, dict[str, Any]] = {
    # by default their prefill raises small time steps, and their decoding does not
    "nemotron_h": {"time_step_min": 1e-6},
    "zamba2": {"time_step_min": 1e-6},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration of a family; sub-configurations are small too."""
    kind = CONFIG_MAPPING[family]
    return kind(**{**_small(kind), **SPECIAL.get(family, {}), **changes})


def _small(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    default = kind()
    known = default.to_dict()
    names = {name: kind.attribute_map.get(name, name) for name in SMALL}
    small = {name: SMALL[plain] for plain, name in names.items() if name in known}
    # a default of null means that the family has no such part
    small = {name: value for name, value in small.items() if known[name] is not None or name.endswith("_token_id")}
    if known.get("kv_lora_rank"):
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has no groups
    parts = {name: getattr(default, name, None) for name in kind.sub_configs}
    return small | {
        name: {**_small(type(part)), "model_type": part.model_type}
        for name, part in parts.items()
        if isinstance(part, PreTrainedConfig)
    }


def tiny_model(config: PreTrainedConfig, scaled: bool = True) -> PreTrainedModel:
    """Random weights, `scaled` so large that a wrong position, mask or state shows in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters() if scaled else []:
            if p.dim() > 1 and p.mean().abs() < 0.5 * p.std():
                p.normal_(0, p.shape[-1] ** -0.5)
            elif p.dim() == 1 and (p == 0).all():
                p.normal_(0, 0.1)
    return model


def worst_difference(policy: Policy, tokenizer: Any) -> float:
    """Largest difference in nats of engine and teacher-forced forward to the bare model, run anew on every prefix."""
    sampling = Sampling(max_new_tokens=12)
    drawn = InProcessEngine().generate(policy, tokenizer, PROMPTS, [10 * i for i in range(len(PROMPTS))], 3, sampling)
    pairs = [(p, c) for p, group in zip(PROMPTS, drawn, strict=True) for c in group]
    packed = Sequences.pack([p for p, _ in pairs], [c.tokens for _, c in pairs], padding(tokenizer))
    logp, _ = policy(packed)
    logp.sum().backward()
    if not any(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in policy.parameters()):
        raise RuntimeError("no finite gradient")
    worst = 0.0
    for (prompt, c), row in zip(pairs[::2], logp[::2].detach(), strict=True):
        truth = by_prefix(policy.model, prompt, c)
        worst = max(worst, *(float((truth - x).abs().max()) for x in (torch.tensor(c.logp), row[: len(c.tokens)])))
    return worst


@torch.no_grad()
def by_prefix(model: PreTrainedModel, prompt: list[int], completion: Completion) -> torch.Tensor:
    """[L] log-probabilities in nats: each token after all that stand before it, without cache, padding or batch."""
    found = []
    for i, token in enumerate(completion.tokens):
        logits = model(input_ids=torch.tensor([prompt + completion.tokens[:i]])).logits[0, -1]
        found.append(logits.float().log_softmax(-1)[token])
    return torch.stack(found)


def judge(model: PreTrainedModel, directory: Path) -> tuple[str, str]:
    """Verdict and detail of one model, through export and load as a run does it."""
    try:
        tokenizer = load_tokenizer("embedded")
        model.save_pretrained(directory)
        policy = load_policy(str(directory))
        responder = Responder(InProcessEngine(), tokenizer, LastAnswerReward(), 1.0, Seed(0, "seed"))
        self_check(responder, policy, PROMPTS, Sampling())
        worst = worst_difference(policy, tokenizer)
    except InputError as error:
        return "refused", str(error).replace(str(directory), "DIRECTORY")
    except Exception as error:
        return "traceback", _brief(error)
    return ("equal" if worst <= EXACT else "silent difference"), f"{worst:.1e}"


def _brief(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({Path(where.filename).name}:{where.lineno})"


def _child(family: str, changes: dict[str, Any], answers: Any) -> None:
    warnings.filterwarnings("ignore")
    try:
        model = tiny_model(tiny_config(family, **changes))
    except Exception as error:
        answers.send(("not built", _brief(error)))
        return
    answers.send(None)
    with tempfile.TemporaryDirectory() as directory:
        answers.send(judge(model, Path(directory)))


def guarded(family: str, changes: dict[str, Any]) -> tuple[str, str]:
    """`judge` in a process of its own, which may be killed for its time and die of its memory."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(family, changes, there))
    child.start()
    there.close()
    answer, stage = None, "not built"
    try:
        while answer is None:
            if not here.poll(LIMIT):
                return stage, f"longer than {LIMIT} s"
            answer, stage = here.recv(), "traceback"
        return answer
    except EOFError:
        return stage, "the process died"
    finally:
        child.kill()
        child.join()


def main() -> None:
    """Print one line per family and the counts."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    families = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    counts: Counter[str] = Counter()
    print("| family | verdict | largest difference in nats, or why |\n|---|---|---|")
    for family in families:
        decoder = getattr(CONFIG_MAPPING[family], "is_decoder", None) is not False
        variant = VARIANTS.get(family, {} if decoder else {"is_decoder": True})
        for changes in [{}, variant] if variant else [{}]:
            verdict, detail = guarded(family, changes)
            counts[verdict] += 1
            name = family + "".join(f", {k} {v}".lower() for k, v in changes.items())
            print(f"| {name} | {verdict} | {detail} |", flush=True)
    print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))


if __name__ == "__main__":
    main()
