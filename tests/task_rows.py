"""The parts of a row that an embedded task makes."""

from mifo_lightning.data.source import Row


def question(row: Row) -> str:
    """The text of its only message."""
    return str(row["prompt"][0]["content"])


def demonstration(row: Row) -> str:
    """What SFT learns from."""
    return str(row["target"][0]["content"])


def truth(row: Row) -> str:
    """What the reward compares with."""
    return str(row["reward_model"]["ground_truth"])
