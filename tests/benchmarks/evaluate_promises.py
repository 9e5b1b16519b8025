"""What a calibrated model promises, and what the good images of a test split show of it.

    python tests/benchmarks/evaluate_promises.py runs/demo --data elpv/mono

Maps are in standard deviations: over all pixels of new good images their deviation should be about 1. The stated
false-alarm rate holds on average over calibration sets, and a mask is shown in alarmed images only.
"""

from __future__ import annotations

import argparse

import numpy as np

from diffad.data import load_anomaly_dataset
from diffad.evaluation.detectors import call_arguments, promise, split_by_category
from diffad.moments import MomentSums
from diffad.pipelines.loading import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a calibrated pipeline")
    parser.add_argument("--data", required=True, help="data set's folder or Hub id, 'elpv' or 'elpv/mono'")
    parser.add_argument("--batch_size", type=int, default=16, help="images a batch (16)")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    for category, images in split_by_category(load_anomaly_dataset(args.data, split="test")).items():
        good = images.select(np.flatnonzero(np.asarray(images["label"]) == 0))
        pixels, alarms, masks, above = MomentSums(), 0, 0, 0
        for start in range(0, len(good), args.batch_size):
            chosen = list(range(start, min(start + args.batch_size, len(good))))
            arguments = call_arguments(pipeline, category, len(chosen))
            output = pipeline([good[i]["image"] for i in chosen], **arguments)
            pixels.update(output.anomaly_map.flatten())
            threshold = pipeline.calibration.pixel_threshold[arguments["category"]].cpu()
            alarms += int(output.is_anomalous.sum())
            masks += int(output.anomaly_mask.flatten(1).any(dim=1).sum())
            above += int(((output.anomaly_map > threshold).flatten(1).any(dim=1) | output.is_anomalous).sum())
        told, count = promise(pipeline, category), len(good)
        print(
            f"{category}: {count} good images. Deviation of the maps over all pixels "
            f"{float(pixels.variance()) ** 0.5:.3f}. Alarms {alarms / count:.1%}, allowed "
            f"{told['allowed_false_alarms']:.1%} on average and {told['allowed_false_alarms_95']:.1%} with 95% "
            f"confidence. Masks {masks / count:.1%}; an alarm or a pixel above its threshold {above / count:.1%}."
        )


if __name__ == "__main__":
    main()
