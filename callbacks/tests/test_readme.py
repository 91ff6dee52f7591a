"""The README's blocks run as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "2 torch.Size([3, 6])" in printed
    assert "supervised phase on ['question 0', 'question 1']" in printed
