"""Which layers a finished run compared, found again from its config, calibration and models.

A run's manifest names its models but not their depths, so these are looked up where the models are
at hand. Left out on purpose: any download, any weight.
"""

import json
from collections.abc import Mapping
from typing import Any

from kava_jax.alignment.layer_map import CALIBRATED_MAPS, LayerMap, make_layer_map
from kava_jax.config import Config, TeacherConfig
from kava_jax.config_file import dump_config
from kava_jax.errors import KavaError
from kava_jax.runs.geometry import specs_at_hand
from kava_jax.runs.prepare import calibration_path
from kava_jax.storage import Place


def depths_at_hand(config: Config) -> dict[str, int]:
    """Number of layers of ``student`` and every ``teacher-<name>``; empty if one is not here."""
    try:
        specs = specs_at_hand(dump_config(config))
    except KavaError:
        return {}
    return {name: spec.num_layers for name, spec in specs.items()}


def read_calibration(run_dir: Place, config: Config) -> dict[str, Any]:
    """What a calibration found, by teacher: ``layer_map`` and scores; empty where there is none.

    Raises KavaError when its file is not whole.
    """
    path = calibration_path(run_dir)
    if not config.needs_calibration or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["teachers"])
    except (ValueError, KeyError, TypeError) as error:
        raise KavaError(
            f"calibration={str(path)!r} cannot be read ({type(error).__name__}); restore it, or "
            f"remove it"
        ) from None


def layer_map_of(
    teacher: TeacherConfig, depths: Mapping[str, int], calibration: Mapping[str, Any]
) -> LayerMap | None:
    """The map that a run compared with one of its teachers; None where that cannot be said.

    It follows from a calibration, from pairs that are given, or from a name and both depths.

    Args:
        teacher: as the run's config has it.
        depths: of ``depths_at_hand``.
        calibration: of ``read_calibration``.

    Raises:
        KavaError: the calibration's map is not whole, or the given pairs are not within the depths.
    """
    setting = teacher.layer_map
    if teacher.name in calibration:
        raw = calibration[teacher.name].get("layer_map")
        return LayerMap.from_dict(raw, f"calibration of {teacher.name}")
    if setting in CALIBRATED_MAPS:
        return None
    sizes = [depths[name] for name in (f"teacher-{teacher.name}", "student") if name in depths]
    if len(sizes) < 2:
        if isinstance(setting, str):
            return None
        sizes = [1 + max(column) for column in zip(*setting, strict=True)]
    return make_layer_map(setting, *sizes, field=f"layer_map of {teacher.name}")
