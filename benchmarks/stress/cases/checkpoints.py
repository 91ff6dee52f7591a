"""Checkpoints: the one that a tiny run has left, and what can be wrong with a copy of it."""

import operator
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.stress.cases.case import Case, Expected, Pantry

Held = dict[str, Any]


def resume(name: str, change: Callable[[Path], object], expect: Expected = "refused", *more: str) -> Case:
    """A tiny run that goes on from a changed copy of its own checkpoint, in a copy of its directory."""

    def build(place: Path, pantry: Pantry) -> list[str]:
        shutil.copytree(pantry.root / "run", place / "out")
        path = place / "out" / "checkpoints" / "last.ckpt"
        change(path)
        return pantry.fit(place, "--ckpt_path", path, *more)

    return Case(name, build, expect)


def given(value: str, expect: Expected = "refused") -> Case:
    """A text as --ckpt_path."""
    return Case(f"--ckpt_path {value}", lambda place, pantry: pantry.fit(place, f"--ckpt_path={value}"), expect)


def held(change_held: Callable[[Held], object]) -> Callable[[Path], object]:
    """Change what the checkpoint holds; its archive stays whole."""

    def change(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        made = change_held(checkpoint)
        torch.save(made if isinstance(made, list) else checkpoint, path)

    return change


def raw(edit: Callable[[bytearray], object]) -> Callable[[Path], object]:
    """Change bytes of the file."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        edit(content)
        path.write_bytes(content)

    return change


def cut(share: float) -> Callable[[Path], object]:
    """Only the first part of the file."""
    return raw(lambda content: content.__delitem__(slice(int(len(content) * share), None)))


def flip(share: float, bit: int = 3) -> Callable[[Path], object]:
    """One bit turned."""

    def edit(content: bytearray) -> None:
        content[int(len(content) * share)] ^= 1 << bit

    return raw(edit)


def zero(share: float) -> Callable[[Path], object]:
    """64 bytes zeroed."""

    def edit(content: bytearray) -> None:
        at = int(len(content) * share)
        while not any(content[at : at + 64]):  # moments that are zero anyway
            at = (at + 64) % len(content)
        content[at : at + 64] = bytes(64)

    return raw(edit)


def text(content: str) -> Callable[[Path], object]:
    """Something else under its name."""
    return lambda path: path.write_text(content)


def bomb(path: Path) -> None:
    """A pickle that runs a command."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch ran",)

    torch.save({**torch.load(path, weights_only=True), "x": Bomb()}, path)


def first_weight(checkpoint: Held) -> str:
    """The name of a weight that is tied to no other."""
    return next(name for name in checkpoint["state_dict"] if "mlp" in name)


def set_weight(value: Callable[[torch.Tensor], object]) -> Callable[[Path], object]:
    """Put something else in the place of a weight."""
    return held(lambda c: c["state_dict"].update({first_weight(c): value(c["state_dict"][first_weight(c)])}))


def directory(path: Path) -> None:
    """A directory under its name."""
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Nobody writes to it."""
    path.unlink()
    os.mkfifo(path)


def other_zip(path: Path) -> None:
    """An archive of something else."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")


def link_loop(path: Path) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path)


def moments(checkpoint: Held) -> Held:
    """AdamW's state for the first weight."""
    return checkpoint["optimizer_states"][0]["state"][0]


def first_callback(checkpoint: Held) -> str:
    """The key of a state that a callback has left."""
    return next(key for key, state in checkpoint["callbacks"].items() if state)


def loops(checkpoint: Held) -> Held:
    """The state of Lightning's loops."""
    return checkpoint["loops"]["fit_loop"]


CHECKPOINTS: list[Case] = [
    resume("unchanged", lambda path: None, "accepted"),
    resume("missing", Path.unlink),
    resume("empty", text("")),
    resume("a text", text("nothing here\n" * 100)),
    resume("an HTML page", text("<!doctype html><title>404</title>")),
    resume("an LFS pointer", text("version https://git-lfs.github.com/spec/v1\n")),
    resume("a directory", directory),
    resume("a link to itself", link_loop),
    resume("a named pipe", pipe),
    resume("another archive", other_zip),
    *(resume(f"cut at {share:.1%}", cut(share)) for share in (0.001, 0.1, 0.5, 0.9, 0.999)),
    *(resume(f"one bit flipped at {share:.0%}", flip(share)) for share in (0.1, 0.25, 0.5, 0.75, 0.9)),
    *(resume(f"64 bytes zeroed at {share:.0%}", zero(share)) for share in (0.1, 0.3, 0.5, 0.7, 0.9)),
    resume("first byte flipped", flip(0)),
    resume("a hundred bytes more", raw(lambda content: content.extend(b"x" * 100)), "either"),
    resume("a pickle that runs a command", bomb),
    resume("weights only", lambda path: torch.save(torch.load(path)["state_dict"], path)),
    resume("a tensor", lambda path: torch.save(torch.zeros(3), path)),
    resume("a list", held(lambda c: [1, 2])),
    resume("nothing in it", held(lambda c: c.clear())),
    *(
        resume(f"no {key}", held(operator.methodcaller("pop", key)))
        for key in ("state_dict", "optimizer_states", "loops", "callbacks", "global_step")
    ),
    resume("no epoch", held(lambda c: c.pop("epoch")), "either"),
    resume("no version", held(lambda c: c.pop("pytorch-lightning_version")), "either"),
    resume("a version from the future", held(lambda c: c.update({"pytorch-lightning_version": "99.0"})), "either"),
    resume("a version that is none", held(lambda c: c.update({"pytorch-lightning_version": "x"})), "either"),
    resume("state_dict empty", held(lambda c: c["state_dict"].clear())),
    resume("state_dict null", held(lambda c: c.update(state_dict=None))),
    resume("a weight missing", held(lambda c: c["state_dict"].pop(first_weight(c)))),
    resume("a weight more", held(lambda c: c["state_dict"].update(extra=torch.zeros(3)))),
    resume("a weight of another shape", set_weight(lambda w: torch.zeros(3))),
    resume("a weight that is a text", set_weight(lambda w: "x")),
    resume("a weight of NaN", set_weight(lambda w: w * torch.nan)),
    resume("a weight in half precision", set_weight(lambda w: w.half()), "either"),
    resume("optimizer states empty", held(lambda c: c.update(optimizer_states=[]))),
    resume("optimizer states of another", held(lambda c: c["optimizer_states"][0].update(param_groups=[]))),
    resume("optimizer states two", held(lambda c: c.update(optimizer_states=c["optimizer_states"] * 2))),
    *(
        resume(f"loops without {part}", held(lambda c, part=part: loops(c).pop(part)))  # type: ignore[misc]
        for part in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict")
    ),
    *(
        resume(f"mifo without {part}", held(lambda c, part=part: c["mifo"].pop(part)))  # type: ignore[misc]
        for part in ("format", "optimizer", "rollouts", "finite")
    ),
    resume("mifo a text", held(lambda c: c.update(mifo="x"))),
    resume("data without a position", held(lambda c: c["QuestionData"]["loader"].pop("position"))),
    resume("moments of another shape", held(lambda c: moments(c).update(exp_avg=torch.zeros(3, 3)))),
    resume("a callback's state a text", held(lambda c: c["callbacks"].update({first_callback(c): "x"}))),
    resume("callbacks empty", held(lambda c: c.update(callbacks={})), "either"),
    resume("callbacks null", held(lambda c: c.update(callbacks=None))),
    resume("loops empty", held(lambda c: c.update(loops={}))),
    resume("loader state missing", held(lambda c: loops(c).update(state_dict={})), "either"),
    resume("global_step a text", held(lambda c: c.update(global_step="x")), "either"),
    resume("global_step -1", held(lambda c: c.update(global_step=-1)), "either"),
    resume("into another seed", lambda path: None, "either", "--seed_everything", "7"),
    resume("into another group size", lambda path: None, "either", "--model.rollout.group_size", "4"),
    resume("into other data", lambda path: None, "either", "--data.train.init_args.count", "8"),
    resume("into fewer steps", lambda path: None, "either", "--data.schedule.rl_steps", "1"),
    resume("into another method", lambda path: None, "either", "--freeze", "null", "--buffer", "null"),
    resume("in other chunks", lambda path: None, "either", "--model.optimizer.micro_batches", "2"),
    given("nowhere.ckpt"),
    given(""),
    given(" "),
    given("best"),
    given("hpc"),
    given("last"),
    given("registry"),
    given("7"),
    given("/dev/null"),
    given("/dev/zero"),
    given("/"),
    given("http://127.0.0.1:9/last.ckpt"),
    given("https://127.0.0.1:9/last.ckpt"),
    given("s3://bucket/last.ckpt"),
    given("file:///etc/passwd"),
    given("memory://last.ckpt"),
    given("~/nowhere.ckpt"),
    given("x" * 5000),
]
