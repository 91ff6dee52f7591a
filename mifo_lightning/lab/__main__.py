"""`python -m mifo_lightning.lab ablation|report ...`"""

import sys

USAGE = """usage: python -m mifo_lightning.lab COMMAND ...

    ablation  run every arm of an ablation on every base with every seed, and report
    report    write the page of an ablation that has been run

`COMMAND --help` lists its arguments."""


def main(arguments: list[str]) -> int:
    """Run a command of the lab; the exit status, 2 for one that does not exist."""
    command, *rest = arguments or [""]
    if command == "ablation":
        from mifo_lightning.lab import ablation

        return ablation.main(rest)
    if command == "report":
        from mifo_lightning.lab.report import command as report

        return report.main(rest)
    asked = command in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
