"""From what a config calls a model to a directory on disk, and the directory's fingerprint.

Three kinds of name: a local directory, ``builtin:demo_teacher`` (shipped with the package), or a
Hugging Face hub id with an optional revision. Only safetensors, JSON and tokenizer files are ever
downloaded; pickled weights are refused and no remote code is fetched.
"""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from kava_jax.errors import KavaError
from kava_jax.storage import Place, at_revision, reachable, repeated_key, written_out

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a model that was cut from another one: where its parts came from (``cut_record``).
CUT_RECORD = "kava_cut.json"
# How one model answers from the cache of another (``handoff_files``).
HANDOFF_RECORD = "handoff.json"
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
    CUT_RECORD,
    "model*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MIB = 1 << 20
_WHOLE_UP_TO = 256 * _MIB
_SAMPLE_EVERY = 64 * _MIB


def resolve_model(path_or_id: str | Path) -> Path:
    """Directory with ``config.json`` and safetensors for a path, a built-in name or a hub id.

    ``id@revision`` pins a branch, tag or commit of a hub id.

    Raises:
        KavaError: nothing is there, access is gated, the hub cannot be reached, or the weights
            are pickled; the message names what was asked for and the remedy.
    """
    name = written_out(str(path_or_id))
    hub_id, revision = at_revision(name)
    if name.startswith(BUILTIN_PREFIX):
        directory = _builtin(name)
    elif reachable(name, "model path").is_dir():
        directory = Path(name)
    elif not _HUB_ID.fullmatch(hub_id) or name.startswith("."):
        raise KavaError(
            f"model path={name!r} is not a directory; give an existing directory or a hub id such "
            "as Qwen/Qwen2.5-0.5B"
        )
    else:
        directory = _download(hub_id, revision)
    _require_safetensors(directory, name)
    return directory


def model_fingerprint(directory: Path) -> str:
    """SHA-256 that changes when weights, geometry or cut record of a model directory change.

    Over ``config.json``, the record of a cut where there is one, every ``*.safetensors`` in name
    order, and the shards that the index places in subfolders, each as name, size and content.
    Files up to 256 MiB are read whole. Of larger ones only the header, the first and the last MiB
    and one MiB of every 64 are read: for a large teacher this takes seconds instead of minutes. It
    notices other weights for certain, but not a single flipped bit.
    """
    digest = hashlib.sha256()
    # By the record a layer map is chosen.
    record = [CUT_RECORD] if (directory / CUT_RECORD).is_file() else []
    weights = sorted(file.name for file in directory.glob("*.safetensors"))
    names = ["config.json", *record, *weights]
    names += [name for name in sorted(set(weight_index(directory).values())) if "/" in name]
    for name in names:
        file = directory / name
        try:
            size = file.stat().st_size
            # Sizes and zero bytes mark where names and contents end, so the same bytes cut into
            # other files give another digest.
            digest.update(f"{name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for start, length in _sampled_ranges(file, size):
                    stream.seek(start)
                    while length > 0 and (block := stream.read(min(length, _MIB))):
                        digest.update(block)
                        length -= len(block)
        except OSError as error:
            raise KavaError(
                f"{directory.name}/{name} cannot be read ({error.strerror}); "
                "give a complete model directory"
            ) from error
    return digest.hexdigest()


def read_json(path: Place) -> dict[str, Any]:
    """Parse a JSON object; a ``KavaError`` names the file when it is missing or broken.

    A key that is given twice counts as broken; Python's reader would take the last one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError) as error:
        raise KavaError(
            f"{path.parent.name}/{path.name} is unreadable JSON ({error}); restore the file"
        ) from error
    if not isinstance(value, dict):
        raise KavaError(f"{path.parent.name}/{path.name} is not a JSON object; restore the file")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise ValueError(f"{twice!r} is given twice")
    return dict(pairs)


def weight_index(directory: Path) -> dict[str, str]:
    """The file of every tensor by ``model.safetensors.index.json``; nothing where there is none.

    Raises:
        KavaError: the index is not one or points out of the directory, or there is also a
            ``model.safetensors`` that the index does not name.
    """
    if not (directory / INDEX).is_file():
        return {}
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise KavaError(f"{directory.name}/{INDEX} has no weight_map; restore the file")
    for tensor, file in index.items():
        path = PurePosixPath(file) if isinstance(file, str) else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise KavaError(
                f"{directory.name}/{INDEX} places {tensor} in {file!r}; name a file inside the "
                "directory"
            )
    if (directory / WEIGHTS).is_file() and WEIGHTS not in index.values():
        raise KavaError(
            f"{directory.name} holds {WEIGHTS} and an {INDEX} of other files "
            f"({min(index.values())}, ...); move away whichever is out of date"
        )
    return index


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that hold the model, relative to its directory.

    Raises:
        KavaError: as :func:`weight_index`, or files are not there.
    """
    names = sorted(set(weight_index(directory).values())) or [WEIGHTS]
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise KavaError(
            f"{directory.name} lacks {', '.join(missing)}, where its weights should be; "
            "download or copy them again"
        )
    return names


def _sampled_ranges(file: Path, size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE_UP_TO:
        return [(0, size)]
    with file.open("rb") as stream:
        # The file begins with the length of its header in 8 bytes. The header names every tensor
        # with its dtype and shape, so it is read whole.
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

    def fetched(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )

    # Of these the first kind that the error belongs to is said.
    # A gated repository's error is a kind of the missing one's, and both are OSErrors. So the
    # narrow kinds come first.
    faults = {
        errors.GatedRepoError: f"is gated; accept its licence on https://huggingface.co/{name} and "
        "log in with `hf auth login` (or set HF_TOKEN)",
        errors.RevisionNotFoundError: "has no such revision; give a branch, tag or commit of it",
        errors.RepositoryNotFoundError: "is neither a directory nor on the hub; check the name, or "
        "log in with `hf auth login` if it is private",
        errors.HFValidationError: "is neither a directory nor a valid hub id; check the name",
        OSError: "is no directory here, not in the local cache, and the hub cannot be reached; "
        f"give a directory, or download it first with `hf download {name}`",
    }
    try:
        directory = fetched(list(_DOWNLOADED))
        # The patterns find the usual names. Only the index knows shards in subfolders.
        shards = set(weight_index(directory).values())
        absent = [file for file in shards if not (directory / file).is_file()]
        return fetched([*_DOWNLOADED, *absent]) if absent else directory
    except tuple(faults) as error:
        said = next(words for kind, words in faults.items() if isinstance(error, kind))
        raise KavaError(f"{at} {said}") from error


def _require_safetensors(directory: Path, name: str) -> None:
    if not (directory / "config.json").is_file():
        if (directory / "config.yaml").is_file() and (directory / "checkpoints").is_dir():
            raise KavaError(
                f"model path={name!r} is a run directory; write its student with `kava export "
                f"{name} --out DIR` and give DIR"
            )
        raise KavaError(
            f"model path={name!r} has no config.json; give a Hugging Face model directory"
        )
    if any((directory / file).is_file() for file in (WEIGHTS, INDEX)):
        return
    if (directory / "adapter_model.safetensors").is_file():
        raise KavaError(
            f"model path={name!r} holds an adapter and not the model it adapts; merge the two "
            "(PEFT: model.merge_and_unload().save_pretrained(DIR)) and give that directory"
        )
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
