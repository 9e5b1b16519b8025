"""What normal looks like: per-position statistics of good images, thresholds, and p-values.

Neither paper has this. Both methods take noise in the background of good images for defects, because a good image's
error is not the same everywhere: measuring it by what good images show at that place is worth more than any other
choice. The residual of pretrained features is measured by a Gaussian at each place, as PaDiM (Defard et al., 2021) does
with the features themselves; every map by its mean and deviation. Thresholds and p-values are conformal (Vovk et al.,
"Algorithmic Learning in a Random World", 2005): they hold for any distribution, as long as the good images to come are
like the good images measured here.
"""

from diffad.calibration.score_calibration import ScoreCalibration

__all__ = ["ScoreCalibration"]
