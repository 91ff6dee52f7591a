"""EvaluationLoader: what each rank answers of one source."""

from collections.abc import Iterator

from mifo_lightning.common.question import Question


class EvaluationLoader:
    """Batches of this rank's share of the questions; as many on every rank, the last ones may be empty.

    No DataLoader: Lightning would shard it once more.

    Attributes:
        questions: Those of all ranks.

    Args:
        questions: All questions of one source.
        size: Questions per batch.
        rank: This process.
        ranks: Number of processes.
    """

    def __init__(self, questions: list[Question], size: int, rank: int, ranks: int) -> None:
        self.questions = questions
        mine = questions[rank::ranks]
        most = -(-len(questions) // ranks)
        self.batches = [mine[i : i + size] for i in range(0, most, size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Question]]:
        return iter(self.batches)
