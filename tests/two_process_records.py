"""A program for test_records_strategies.py: fits with all monitors under a strategy, writes what was kept and logged.

python tests/two_process_records.py {single|ddp|fsdp2} OUT.json    # two processes also go on from within an SFT phase
"""

import json
import sys
from pathlib import Path
from typing import Any

from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from monitoring import Records, monitors, summaries

from mifo_callbacks.collectives import gather_ranks
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills


def fit(strategy: str, out: Path, ckpt: Path | None = None) -> dict[str, Any] | None:
    """What the first rank has kept and logged."""
    chosen: Any = {
        "single": "auto",
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }[strategy]
    records, kept = Records(), monitors(5)  # an odd number for two ranks
    saver = ModelCheckpoint(out.parent / strategy, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy == "single" else 2,
        strategy=chosen,
        max_epochs=1,
        logger=records,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=ckpt is None,
        callbacks=[*method_callbacks(size=8), *kept, *([] if ckpt else [saver])],
        default_root_dir=out.parent,
    )
    schedule = Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4, epochs_per_rollout=2)
    data = make_data(val=Skills(["addition", "mirrored"], 12, split="val"), schedule=schedule)
    trainer.fit(make_module(), datamodule=data, ckpt_path=ckpt)
    timings = ("rollout/tokens_per_s", "costs/", "seconds/")
    logged = [{k: v for k, v in row.items() if not k.startswith(timings)} for row in records.metrics]
    return {**summaries(kept), "logged": logged} if trainer.is_global_zero else None


def main() -> None:
    strategy, out = sys.argv[1], Path(sys.argv[2])
    whole = fit(strategy, out)
    again = None
    if strategy != "single":
        # after the first step of the first SFT phase, which follows so many RL steps
        phases = [event["steps"] for event in (whole or {}).get("layer_updates", {}).get("phases", [])]
        step = gather_ranks(phases[0] + 1 if phases else 0)[0]
        again = fit(strategy, out, out.parent / strategy / f"step={step}.ckpt")
    if whole is not None:
        out.write_text(json.dumps({"whole": whole, "again": again}))


if __name__ == "__main__":
    main()
