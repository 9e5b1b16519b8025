"""The settings that a calibration was made with, and which of a pipeline's are others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffad.image_sizes import as_side

SCHEDULER = "scheduler"  # beside the settings: those of the scheduler, by their names
OWN_NOISE = "own_noise"  # likewise, whether statistics were taken with the model's noise, where there is any
SMOOTHS_INSIDE = "smooths_inside"  # likewise, where there is a region: whether maps are smoothed of it alone
RECOGNISES_INSIDE = "recognises_inside"  # likewise, of several categories: whether they are told apart by it alone
# what an earlier version did, which had no such setting to record
BEFORE_RECORDED = {
    "position_trust": 1.0,
    "weights": None,
    OWN_NOISE: False,
    SMOOTHS_INSIDE: False,
    RECOGNISES_INSIDE: False,
}
# a setting of earlier versions, at the value that did nothing
GONE = {"suppression": 0.0}


def changed_settings(recorded: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> list[str]:
    """Which settings are not those that were recorded, or that held before they were recorded."""

    def plain(name: str, value: Any) -> Any:
        if name == "weights" and value is not None:  # of which only the ratio counts
            total = sum(value.values())
            return {of: weight / total for of, weight in value.items() if weight}
        if name == "processing_resolution":
            return as_side(value)
        return list(value) if isinstance(value, (list, tuple)) else value  # a file knows no tuples

    def differs(name: str, old: Any, new: Any) -> bool:
        if name == SCHEDULER:  # of which earlier versions recorded less
            return any(differs(of, one, new[of]) for of, one in old.items() if of in new)
        return plain(name, new) != plain(name, old)

    recorded, settings = {**BEFORE_RECORDED, **recorded} if recorded else {}, {**GONE, **settings} if settings else {}
    return [name for name, value in recorded.items() if name in settings and differs(name, value, settings[name])]
