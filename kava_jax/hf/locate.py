"""From what a config calls a model to a directory on disk, and the directory's fingerprint.

Three kinds of name: a local directory, ``builtin:demo_teacher`` (shipped with the package), or a
Hugging Face hub id with an optional revision. Only safetensors, JSON and tokenizer files are ever
downloaded; pickled weights are refused and no remote code is fetched.
"""

import hashlib
import re
from importlib import resources
from pathlib import Path

from kava_jax.errors import KavaError

BUILTIN_PREFIX = "builtin:"
BUILTIN_MODELS = ("demo_teacher",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_DOWNLOADED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MIB = 1 << 20
_WHOLE_UP_TO = 256 * _MIB
_SAMPLE_EVERY = 64 * _MIB


def resolve_model(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Directory with ``config.json`` and safetensors for a path, a built-in name or a hub id.

    Raises:
        KavaError: nothing is there, access is gated, the hub cannot be reached, or the weights
            are pickled; the message names what was asked for and the remedy.
    """
    name = str(path_or_id)
    if name.startswith(BUILTIN_PREFIX):
        directory = _builtin(name)
    elif Path(name).expanduser().is_dir():
        directory = Path(name).expanduser()
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise KavaError(
            f"model path={name!r} is not a directory; give an existing directory or a hub id such "
            "as Qwen/Qwen2.5-0.5B"
        )
    else:
        directory = _download(name, revision)
    _require_safetensors(directory, name)
    return directory


def model_fingerprint(directory: Path) -> str:
    """SHA-256 that changes when the weights or the geometry of a model directory change.

    Over ``config.json`` and every ``*.safetensors`` in name order, each as name, size and content.
    Files up to 256 MiB count wholly. Of larger ones count the header, the first and the last MiB
    and one MiB of every 64: seconds instead of minutes for a large teacher, and still certain to
    notice other weights, though not a single flipped bit.
    """
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    for file in files:
        try:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for start, length in _sampled_ranges(file, size):
                    stream.seek(start)
                    while length > 0 and (block := stream.read(min(length, _MIB))):
                        digest.update(block)
                        length -= len(block)
        except OSError as error:
            raise KavaError(
                f"{directory.name}/{file.name} cannot be read ({error.strerror}); "
                "give a complete model directory"
            ) from error
    return digest.hexdigest()


def _sampled_ranges(file: Path, size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE_UP_TO:
        return [(0, size)]
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    samples = [(start, _MIB) for start in range(0, size, _SAMPLE_EVERY)]
    return [(0, min(header, size)), *samples, (size - _MIB, _MIB)]


def _builtin(name: str) -> Path:
    wanted = name.removeprefix(BUILTIN_PREFIX)
    directory = Path(str(resources.files("kava_jax"))) / "assets" / wanted
    if wanted not in BUILTIN_MODELS or not directory.is_dir():
        known = ", ".join(BUILTIN_PREFIX + model for model in BUILTIN_MODELS)
        raise KavaError(
            f"model path={name!r} is not built in; use {known}, a directory or a hub id"
        )
    return directory


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f"model {name!r}" + (f" (revision {revision!r})" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(_DOWNLOADED)
            )
        )
    except errors.GatedRepoError as error:
        raise KavaError(
            f"{at} is gated; accept its licence on https://huggingface.co/{name} and log in with "
            "`hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise KavaError(f"{at} has no such revision; give a branch, tag or commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise KavaError(
            f"{at} is neither a directory nor on the hub; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise KavaError(
            f"{at} is neither a directory nor a valid hub id; check the name"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise KavaError(
            f"{at} is not in the local cache and the hub cannot be reached; download it first with "
            f"`hf download {name}`, or give a directory"
        ) from error


def _require_safetensors(directory: Path, name: str) -> None:
    if not (directory / "config.json").is_file():
        if (directory / "manifest.json").is_file() and (directory / "checkpoints").is_dir():
            raise KavaError(
                f"model path={name!r} is a run directory; write its student with `kava export "
                f"{name} --out DIR` and give DIR"
            )
        raise KavaError(
            f"model path={name!r} has no config.json; give a Hugging Face model directory"
        )
    weights = ("model.safetensors", "model.safetensors.index.json")
    if any((directory / file).is_file() for file in weights):
        return
    if pickles := sorted({f.name for p in _PICKLES for f in directory.glob(p)}):
        raise KavaError(
            f"model path={name!r} holds only pickled weights ({', '.join(pickles)}), which are "
            "never read; convert them to safetensors (load the model in transformers and call "
            "save_pretrained)"
        )
    raise KavaError(
        f"model path={name!r} has neither model.safetensors nor model.safetensors.index.json; "
        "give a directory with safetensors weights"
    )
