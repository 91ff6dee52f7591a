"""Which heads carry a skill, and does putting the base's back restore what training has lost?

    python -m experiments.bases skills --out runs/bases
    python -m mifo_lightning.lab ablation --config experiments/ablations/paper_table.yaml --jobs 2
    python -m experiments.circuits --config experiments/circuits.yaml
    python -m experiments.circuits --report docs/results/circuits  # a page again, from its records alone

For every base and every arm's model: how much accuracy each head is needed for, the heads that suffice for 90 % of it,
how alike the circuits before and after are beside their floors, and whether outputs of the base's heads, patched into
the trained model, bring an untrained skill back. About 40 CPU seconds a model; what has a record is not measured again.
"""

import argparse
from pathlib import Path

import torch
import transformers

from experiments.circuits.page import write_page
from experiments.circuits.records import measure
from experiments.circuits.study import read_study
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail, quiet


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a file such as experiments/circuits.yaml")
    what.add_argument("--report", type=Path, help="a directory with records: writes their page again")
    parser.add_argument("--out", type=Path, help="where records and page are written, in place of the file's `out`")
    args = parser.parse_args(arguments)
    quiet()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        if args.config:
            study = read_study(args.config, args.out)
            for line in measure(study):
                print(line, flush=True)
            print(f"wrote {write_page(study.out)}")
        else:
            print(f"wrote {write_page(args.report, args.out)}")
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
