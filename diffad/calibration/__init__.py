"""What normal looks like: per-position statistics of good images, thresholds, and p-values.

Neither paper has this. Both methods take noise in the background of good images for defects, because a good image's
error is not the same everywhere: measuring it by what good images show at that place is worth more than any other
choice. The residual of pretrained features is measured by a Gaussian at each place, as PaDiM (Defard et al., 2021) does
with the features themselves; every map by its mean and deviation. Thresholds and p-values are conformal (Vovk et al.,
"Algorithmic Learning in a Random World", 2005): they hold for any distribution, as long as the good images to come are
like the good images measured here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffad.calibration.score_calibration import ScoreCalibration

__all__ = ["ScoreCalibration"]


def __getattr__(name: str) -> Any:  # thresholds and drift are asked for where torch is not installed
    if name != "ScoreCalibration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffad.calibration.score_calibration import ScoreCalibration

    return ScoreCalibration
