"""Our parameter tree out as a plain Hugging Face directory that transformers 4.x and 5.x load.

A new directory is written under another name and then renamed, so it is either a whole export or
not there. On a bucket, and where there was a directory, ``config.json`` is written last.
A directory that is not a previous export is never touched. Weights go through host memory one shard
at a time, wherever the parameters are sharded.

With several processes all must call; the first one writes.

Left out on purpose: pushing to the hub.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from kava_jax.errors import KavaError
from kava_jax.hf.config_json import FloatName, config_from_spec
from kava_jax.hf.cut_record import CUT_RECORD, CutRecord, write_cut_record
from kava_jax.hf.generation import GENERATION, passed_on
from kava_jax.hf.load import cast
from kava_jax.hf.locate import INDEX, TOKENIZER_FILES, read_json
from kava_jax.hf.names import Row, misfits, parameter_shapes, stored_rows
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.hosts import on_host
from kava_jax.storage import Place, check_target, upload

_MARKER, _PARTIAL = "kava_export.json", ".kava-partial-"
# Keys of a source config that name its machine, point to code that is not copied, or follow from
# the geometry.
_NOT_KEPT = ("_name_or_path", "auto_map", "layer_types")
# And of a model that reads images, whose text part is written alone.
_NOT_KEPT += ("text_config", "vision_config", "mm_tokens_per_image", "processor_class")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Words, case, digits, punctuation, several spaces and newlines: what pre-tokenizers differ on.
_PROBE = "Question: Tom's 12,345 apples cost $6.70 each.\n\nAnswer:  he pays (a lot)\n#### 42"


def export_model(
    directory: Place,
    params: Mapping[str, Any],
    spec: DecoderSpec,
    *,
    dtype: FloatName,
    tokenizer: Any,
    source_dir: Path | None = None,
    card: str,
    cut: CutRecord | None = None,
    more: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write ``config.json``, safetensors, generation config, tokenizer and model card.

    Args:
        directory: destination; missing, empty, or a previous export (which is replaced).
        params: nested dict of the whole decoder (all layers, head unless tied); every vocabulary
            row is kept and a tied embedding is written once. A leaf is fetched whole, or layer by
            layer where it is stacked, so it may also be one that is read then (``cut.OnDisk``).
        spec: geometry of ``params``.
        dtype: dtype of the weights on disk.
        tokenizer: directory whose tokenizer files are copied as they are, a transformers tokenizer
            to save, or None for the files of ``source_dir``.
        source_dir: Hugging Face directory the model came from; what its ``config.json`` and
            ``generation_config.json`` say beyond the geometry is kept, as far as it is used. So is
            its record of a cut (``kava_cut.json``).
        card: text of README.md (see ``card.model_card``).
        cut: where the parts of a cut model came from, in place of ``source_dir``'s own record.
        more: writes further files into a directory.
        max_shard_bytes: size above which weights are split, as transformers does.

    Raises:
        KavaError: the destination holds something else, ``params`` do not fit ``spec``, or a value
            does not fit ``dtype``, or the tokenizer would be misread. Nothing is left behind then.
    """
    check_destination(directory)
    flat = _checked_params(params, spec)
    tensors: dict[str, list[tuple[Row, int]]] = {}
    for row, layer in _tensors(spec):
        tensors.setdefault(row.name(layer), []).append((row, layer))
    itemsize = jnp.dtype(dtype).itemsize
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda parts: math.prod(parts[0][0].stored_shape(spec)) * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )

    def fetch(name: str) -> np.ndarray:
        """One tensor in Hugging Face's layout, on the host."""
        parts = []
        for row, layer in tensors[name]:
            ours = on_host(flat[row.ours][layer if row.stacked else ...], "export")
            ours = ours if row.expert is None else ours[row.expert]
            parts.append(cast(row.to_theirs(ours, spec), jnp.dtype(dtype), name))
        # safetensors writes an array's memory as it lies. Of a transposed view it would write the
        # values in another order, without an error.
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])

    if jax.process_index() != 0:  # it holds parts of the tensors that the first process writes
        for name in chain(*shards.filename_to_tensors.values()):
            fetch(name)
        return
    with _written_whole(directory) as partial:
        # The weights take longest, so the rest is written and checked before them. The tokenizer is
        # read back next to config.json, because that file decides which class reads it.
        _write_tokenizer(partial, source_dir if tokenizer is None else tokenizer)
        _write_configs(partial, spec, dtype, tokenizer, source_dir)
        if tokenizer is not None:
            _check_tokenizer_reads_back(partial, tokenizer, spec)
        if cut is not None:
            write_cut_record(partial, cut)
        elif source_dir is not None and (source_dir / CUT_RECORD).is_file():
            shutil.copyfile(source_dir / CUT_RECORD, partial / CUT_RECORD)
        if more is not None:
            more(partial)
        _write_weights(partial, shards, fetch)
        (partial / "README.md").write_text(card, encoding="utf-8")
        # The list lets the next export tell its own files from a user's, which are never replaced.
        names = sorted([_MARKER, *(path.name for path in partial.iterdir())])
        _write_json(partial / _MARKER, {"written_by": "kava-jax", "files": names})


def check_tokenizer(tokenizer: Any, spec: DecoderSpec, source_dir: Path | None) -> None:
    """Find out before a training whether its student can be exported with its tokenizer.

    Arguments and errors are those of ``export_model``.
    """
    with tempfile.TemporaryDirectory(prefix="kava-") as folder:
        _write_tokenizer(Path(folder), tokenizer)
        _write_configs(Path(folder), spec, "float32", tokenizer, source_dir)
        _check_tokenizer_reads_back(Path(folder), tokenizer, spec)


@contextmanager
def _written_whole(directory: Place) -> Iterator[Path]:
    """An empty local directory that takes the place of ``directory`` when nothing is raised."""
    if not isinstance(directory, Path):
        with tempfile.TemporaryDirectory(prefix="kava-") as folder:
            yield Path(folder)
            # Without config.json no program takes it for a model.
            upload(Path(folder), directory, first=_MARKER, last="config.json")
        return
    directory = directory.resolve()  # through a link, and ``.`` gets a name
    new = not directory.exists()
    # A directory that exists may be a mount or the working directory, so it is not replaced.
    # A new one is renamed into place from the same folder: no rename crosses file systems.
    partial = (directory.parent if new else directory) / f"{_PARTIAL}{directory.name}-{os.getpid()}"
    # A killed process with the same id may have left one.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if new:
            partial.rename(directory)
        else:
            upload(partial, directory, first=_MARKER, last="config.json")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(directory: Place) -> None:
    """Refuse a destination that cannot be written, or holds something else than an export.

    Raises KavaError.
    """
    check_target(directory, "out")
    found = [path.name for path in directory.iterdir()] if directory.exists() else []
    # What a killed export left behind counts as nobody's file.
    present = {name for name in found if not name.startswith(_PARTIAL)}
    if not present:
        return
    known = read_json(directory / _MARKER).get("files", []) if _MARKER in present else []
    if foreign := sorted(present - set(known)):
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise KavaError(
            f"out={directory} is not empty and holds files no export wrote ({shown}); "
            "give a new directory or move them away"
        )


def _checked_params(params: Mapping[str, Any], spec: DecoderSpec) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    if faults := misfits(parameter_shapes(spec), shapes):
        raise KavaError(
            f"parameters do not fit the {spec.family} geometry: {'; '.join(faults)}; "
            "export the whole decoder with its own spec"
        )
    return flat


def _tensors(spec: DecoderSpec) -> Iterator[tuple[Row, int]]:
    """Every tensor to write, layer by layer, so that a layer's tensors share a shard."""
    rows = list(stored_rows(spec))
    yield from ((row, 0) for row in rows if row.ours.startswith("embed/"))
    for layer in range(spec.num_layers):
        yield from ((row, layer) for row in rows if row.stacked)
    yield from ((r, 0) for r in rows if not r.stacked and not r.ours.startswith("embed/"))


def _write_weights(
    directory: Path, shards: StateDictSplit, fetch: Callable[[str], np.ndarray]
) -> None:
    for file, names in shards.filename_to_tensors.items():
        # transformers 4.x refuses a file whose metadata do not name a framework. The tensors are
        # "pt" because they have PyTorch's layout.
        save_file({name: fetch(name) for name in names}, directory / file, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(directory / INDEX, index)
    for file in shards.filename_to_tensors:  # written readable by their owner alone
        shutil.copymode(directory / "config.json", directory / file)


def _write_configs(
    directory: Path, spec: DecoderSpec, dtype: FloatName, tokenizer: Any, source: Path | None
) -> None:
    generation: dict[str, Any] | None = None
    if source is None:
        kept = {key: getattr(_loaded(tokenizer), key, None) for key in _TOKEN_IDS}
    else:
        config = read_json(source / "config.json")
        if config.get("text_config") is not None:
            left = {key: x for key, x in config.items() if not key.endswith("_token_index")}
            config = left | config["text_config"]
        kept = {key: value for key, value in config.items() if key not in _NOT_KEPT}
        if (source / GENERATION).is_file():
            generation = passed_on(read_json(source / GENERATION))
    # Null says that there is no such token. Where the key is absent, Llama's and Mistral's classes
    # take 1 for the beginning and 2 for the end.
    unsaid = {**dict.fromkeys(_TOKEN_IDS), "attention_dropout": 0.0, "use_cache": True}
    # Our geometry wins over the source's, because the source may use another spelling or dtype.
    config = unsaid | kept | config_from_spec(spec, dtype=dtype)
    if generation is None:
        generation = {key: config[key] for key in _TOKEN_IDS if config[key] is not None}
    _write_json(directory / "config.json", config)
    _write_json(directory / GENERATION, generation)


def _loaded(tokenizer: Any) -> Any:
    """The tokenizer object, read from its directory where that is what we were given."""
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    return tokenizer


def _check_tokenizer_reads_back(directory: Path, tokenizer: Any, spec: DecoderSpec) -> None:
    """Refuse an export that AutoTokenizer would tokenize differently than training did.

    Next to the config of some families (qwen2) transformers 5.x takes the family's own tokenizer
    class whatever tokenizer_config.json says, and rebuilds it from the vocabulary: other ids,
    silently.
    """
    again = _loaded(directory)
    if again(_PROBE).input_ids != _loaded(tokenizer)(_PROBE).input_ids:
        raise KavaError(
            f"the tokenizer gives other ids next to a model of family {spec.family}, where "
            f"transformers reads it as {type(again).__name__}; use that family's own tokenizer, or "
            "a model of another family"
        )


def _write_tokenizer(directory: Path, tokenizer: Any) -> None:
    if tokenizer is None:
        raise KavaError("tokenizer=None without a source_dir; give the tokenizer of the model")
    if isinstance(tokenizer, str | Path):
        present = [Path(tokenizer) / f for f in TOKENIZER_FILES if (Path(tokenizer) / f).is_file()]
        if not present:
            raise KavaError(f"tokenizer={Path(tokenizer).name} has no tokenizer files; give others")
        for file in present:
            shutil.copyfile(file, directory / file.name)
        return
    tokenizer.save_pretrained(directory)
    _spell_for_both(directory / "tokenizer_config.json")


def _spell_for_both(path: Path) -> None:
    """Replace what only transformers 5.x reads by spellings that 4.x reads too."""
    config = read_json(path)
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(path, config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
