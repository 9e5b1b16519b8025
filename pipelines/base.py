"""What the anomaly pipelines share: input images, the calibrated output, calibration itself, saving and sharing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo, create_repo
from huggingface_hub.errors import HfHubHTTPError
from torch.utils.data import Subset

from diffad.calibration.fitting import CalibrationFit
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import images_to_pixel_values, images_to_tensors, resize_images
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.moments import PRIOR_IMAGES
from diffad.pipelines.output import AnomalyOutput, convert_output
from diffad.pipelines.sharing import add_records_and_card, records_folder, remove_local_paths
from diffad.pipelines.version_0_1 import remove_code, upgrade_index
from diffad.scoring import feature_error, suppress_surroundings

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.get_logger(__name__)


@dataclass
class Measurement:
    """What the networks say of a batch, before any statistic of good images.

    maps: (N, S, H, W) float32 score maps at the processing resolution, not smoothed.
    residual: (N, T, C, h, w) float32, true less predicted features; None for methods without.
    reconstruction: (N, 3, H, W) in [0, 1], or None.
    """

    maps: torch.Tensor
    residual: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


class AnomalyPipeline(DiffusionPipeline):
    """Base of the anomaly pipelines.

    A subclass says what its networks measure (`measure`), how a measurement becomes smoothed maps (`score_maps`), and
    how normalised maps become one map and one score (`join_maps`, `image_scores`).
    """

    def measure(
        self,
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        resolution: int,
        generator: Sequence[torch.Generator | None],
        **options: Any,
    ) -> Measurement:
        """Runs the networks.

        Args:
            pixel_values: (N, 3, R, R) in [-1, 1], R = `input_resolution(resolution)`.
            category: (N,) integers.
            resolution: the denoiser's resolution in pixels.
            generator: one for each image.
            options: the call's own arguments.
        """
        raise NotImplementedError

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """(N, S, H, W) float32: smoothed maps; where there is a calibration, a residual's Mahalanobis distances last.

        `num_seen` is `ScoreCalibration.log_distances`'.
        """
        raise NotImplementedError

    def feature_error_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor | None,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """How far the true features are from their prediction, (N, E, H, W), not smoothed.

        Calibrated, the E = 1 or 2 log Mahalanobis distances of the residual, averaged over the noise levels.
        Uncalibrated, as in the papers, the error at each of T levels and L layers, E = T * L.
        """
        residual = measurement.residual  # (N, T, C, h, w)
        if calibration is None:
            errors = [feature_error(residual, [self.feature_extractor.layer_channels[i] for i in self.scored_layers])]
        else:
            errors = [e[:, None] for e in calibration.log_distances(residual.mean(dim=1), category, num_seen)]
        size = measurement.maps.shape[-2:]
        return torch.cat([F.interpolate(e, size, mode="bilinear") for e in errors], dim=1)

    def join_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, S, H, W), normalised where calibrated, to the anomaly map (N, H, W)."""
        raise NotImplementedError

    def image_scores(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """(N, H, W) to (N,)."""
        raise NotImplementedError

    @property
    def size_multiple(self) -> int:
        """The networks take images whose sides are multiples of this."""
        raise NotImplementedError

    @property
    def scored_layers(self) -> list[int]:
        """Which of the feature extractor's layers are scored, as indices."""
        chosen = self.config.score_strides
        if chosen is not None:
            check_score_strides(chosen, self.feature_extractor)
        strides = self.feature_extractor.layer_strides
        return [i for i, stride in enumerate(strides) if chosen is None or stride in chosen]

    def input_resolution(self, resolution: int) -> int:
        """Side to which images are resized at first; a feature extractor may look closer than the denoiser."""
        return self.feature_extractor.input_resolution(resolution)

    def check_call(
        self,
        images: Sequence[torch.Tensor],
        batch_size: int,
        processing_resolution: int,
        match_input_resolution: bool,
        generator: Any,
        output_type: str,
    ) -> None:
        """Checks what every anomaly pipeline's call takes; each message names the argument and the fix."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, but is {batch_size!r}.")
        multiple = self.size_multiple
        if not isinstance(processing_resolution, int) or processing_resolution < multiple:
            raise ValueError(f"`processing_resolution` must be at least {multiple}, but is {processing_resolution!r}.")
        if processing_resolution % multiple:
            raise ValueError(
                f"`processing_resolution` must be a multiple of {multiple} for this network, but is "
                f"{processing_resolution}. Try {round(processing_resolution / multiple) * multiple}."
            )
        if output_type not in ("np", "pt", "pil"):
            raise ValueError(f'`output_type` must be "np", "pt" or "pil", but is {output_type!r}.')
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(images)
        if len(generators) != len(images) or not all(g is None or isinstance(g, torch.Generator) for g in generators):
            raise ValueError(
                "`generator` must be a torch.Generator or a list of them, one for each of the "
                f"{len(images)} images, but is {generator!r}."
            )
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if match_input_resolution and len(sizes) > 1:
            raise ValueError(
                f"`image` holds images of different sizes ({', '.join(f'{h}x{w}' for h, w in sizes)}, height x width), "
                "whose maps do not fit one array. Pass `match_input_resolution=False`, or make one call for each size."
            )

    def category_index(self, category: str | int | Sequence[str | int] | None, num_images: int) -> torch.Tensor:
        """(N,) indices of the images' categories; a model of one category asks for nothing.

        Raises:
            ValueError: a wrong or missing name; the message lists the right ones.
        """
        names = list(self.config.categories or ["default"])
        if category is None:
            if len(names) > 1:
                raise ValueError(f"`category` is needed: this model knows {', '.join(names)}. Pass one of them.")
            return torch.zeros(num_images, dtype=torch.long)
        given = [category] * num_images if isinstance(category, (str, int)) else list(category)
        if len(given) != num_images:
            raise ValueError(f"`category` lists {len(given)} names for {num_images} images. Pass one, or one each.")
        for name in given:
            known = name in names if isinstance(name, str) else name in range(len(names))
            if not known:
                raise ValueError(f"`category` {name!r} is unknown: this model knows {', '.join(names)}.")
        return torch.tensor([names.index(name) if isinstance(name, str) else name for name in given])

    def measurements(
        self,
        images: Sequence[Any],
        category: torch.Tensor,
        batch_size: int,
        resolution: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: torch.Tensor | None = None,
        **options: Any,
    ) -> Iterator[tuple[Measurement, torch.Tensor]]:
        """Measurement and category indices (B,), batch by batch; only one batch is in memory.

        `latents`, one for each image, reach `measure` as that batch's; `options` as they are.
        """
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(images)
        side = self.input_resolution(resolution)
        starts: Any = range(0, len(images), batch_size)
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            stop = min(start + batch_size, len(images))
            batch = images_to_tensors([images[i] for i in range(start, stop)])
            pixel_values = images_to_pixel_values(batch, (side, side)).to(self._execution_device)
            indices = category[start:stop].to(self._execution_device)
            if latents is not None:
                options["latents"] = latents[start:stop]
            yield self.measure(pixel_values, indices, resolution, generators[start:stop], **options), indices

    def anomaly_maps(
        self, measurement: Measurement, category: torch.Tensor, calibration: ScoreCalibration | None
    ) -> torch.Tensor:
        """A measurement's anomaly map, (N, H, W): smoothed, normalised where calibrated, joined.

        Where places are of several positions, the distances of places say how high the map goes, those of positions how
        it falls away from there.

        Raises:
            ValueError: the calibration is of other scores.
        """
        if calibration is None:
            return self.join_maps(self.score_maps(measurement, category, None))
        self._check_calibration(measurement, calibration)
        maps = calibration.normalize(self.score_maps(measurement, category, calibration), category)  # (N, S, H, W)
        if calibration.num_distances < 2:
            anomaly_map = self.join_maps(maps)
        else:
            others, of_places, of_positions = maps.split([maps.shape[1] - 2, 1, 1], dim=1)
            of_places, of_positions = (self.join_maps(torch.cat([others, m], dim=1)) for m in (of_places, of_positions))
            peak, own_peak = (m.amax(dim=(1, 2), keepdim=True) for m in (of_places, of_positions))
            anomaly_map = of_positions + (peak - own_peak)
        return suppress_surroundings(anomaly_map, self.config.suppression)

    def _check_calibration(self, measurement: Measurement, calibration: ScoreCalibration) -> None:
        # the number of maps, the residual's distances among them, and the residual's channels
        residual, residual_shape = measurement.residual, calibration.config.residual_shape
        distances = 0 if residual is None else max(1, calibration.num_distances)
        found = (measurement.maps.shape[1] + distances, 0 if residual is None else residual.shape[2])
        if found != (calibration.config.map_shape[0], residual_shape[0] if residual_shape else 0):
            raise ValueError(
                "`calibration` was made for other scores than this pipeline's settings give (timesteps, strides or "
                "distance). Load the pipeline with `calibration=None` and call `calibrate` with good images."
            )

    def detect(
        self,
        images: Sequence[torch.Tensor],
        category: torch.Tensor,
        batch_size: int,
        resolution: int,
        match_input_resolution: bool,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        **options: Any,
    ) -> AnomalyOutput | tuple:
        """Measures checked images and puts the output together."""
        if self.calibration is None:
            logger.warning_once(
                "This pipeline is not calibrated: maps and scores are raw, and anomaly_mask, is_anomalous and p_value "
                "are None. Call `pipe.calibrate(good_images)` once and save the pipeline again."
            )
        size = tuple(images[0].shape[-2:]) if match_input_resolution else (resolution, resolution)
        maps, scores, reconstructions = [], [], []
        for measurement, indices in self.measurements(images, category, batch_size, resolution, generator, **options):
            anomaly_map = self.anomaly_maps(measurement, indices, self.calibration)  # (B, R, R)
            scores.append(self.image_scores(anomaly_map).cpu())
            maps.append(resize_images(anomaly_map[:, None], size)[:, 0].cpu())
            if measurement.reconstruction is not None:
                reconstructions.append(resize_images(measurement.reconstruction, size).clamp(0.0, 1.0).cpu())
        self.maybe_free_model_hooks()
        output = self._output(
            torch.cat(maps),
            torch.cat(scores),
            torch.cat(reconstructions) if reconstructions else None,
            category,
        )
        output = convert_output(output, output_type)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    def _output(
        self,
        anomaly_map: torch.Tensor,
        anomaly_score: torch.Tensor,
        reconstruction: torch.Tensor | None,
        category: torch.Tensor,
    ) -> AnomalyOutput:
        if self.calibration is None:
            return AnomalyOutput(anomaly_map, anomaly_score, reconstruction)
        calibration, indices = self.calibration, category.to(self.calibration.map_mean.device)
        scores = anomaly_score.to(indices.device)
        return AnomalyOutput(
            anomaly_map=anomaly_map,
            anomaly_score=anomaly_score,
            reconstruction=reconstruction,
            anomaly_mask=anomaly_map > calibration.pixel_threshold[indices].cpu()[:, None, None],
            is_anomalous=(scores > calibration.image_threshold[indices]).cpu(),
            p_value=calibration.p_value(scores, indices).cpu(),
        )

    @torch.no_grad()
    def calibrate(
        self,
        images: Sequence[Any],
        statistics_images: Sequence[Any] | None = None,
        false_alarm_rate: float = 0.01,
        category: str | int | None = None,
        batch_size: int = 16,
        generator: torch.Generator | None = None,
    ) -> AnomalyPipeline:
        """Learns what normal looks like from good images, in one pass over them and constant memory.

        Three things stand on each other: mean and covariance of the feature residual, mean and deviation of the maps,
        its Mahalanobis distances among them, and the scores of normalised maps. The first two are taken from the same
        images, each measured by the covariance of the others; the scores from images that neither has seen, so
        thresholds and p-values hold for new images.

        Args:
            images: good images that no network was trained on, of parts of which neither training nor
                `statistics_images` show other photographs: PIL images, paths, arrays, or a column of a
                `datasets.Dataset`. Thresholds and p-values come from them.
            statistics_images: more good images, for the per-position statistics; those of training may serve. Their
                measurements wait in a temporary file, 1 to 3 MB an image. Without them, every other of
                `images` does, and the rest is left for the thresholds.
            false_alarm_rate: share of good parts that may raise an alarm, in (0, 1).
            category: which category the images are of, in a unified model; the others keep what they have.
            batch_size: images in a batch.
            generator: makes the calibration repeatable.

        Returns:
            The pipeline, calibrated.

        Raises:
            ValueError: too few images, or a wrong category.
        """
        if not 0.0 < false_alarm_rate < 1.0:
            raise ValueError(f"`false_alarm_rate` must lie in (0, 1), but is {false_alarm_rate}.")
        num_images = len(images)
        if statistics_images is None:
            # in turn, as images often come in order of their time or kind; views that read one image at a time, where
            # a slice of a data set's column would decode all of it
            statistics_images = Subset(images, range(1, num_images, 2))
            images = Subset(images, range(0, num_images, 2))
        if min(len(images), len(statistics_images)) < 1:
            raise ValueError(
                f"`images` holds {num_images} good images and `statistics_images` {len(statistics_images)}, too few to "
                "calibrate: it takes 1 of each, or 2 `images`, and deserves 100."
            )
        index = int(self.category_index(category, 1)[0])
        fit = CalibrationFit(self, index, len(images), false_alarm_rate)
        for learn, part in ((fit.add_statistics, statistics_images), (fit.add_scores, images)):
            of_category = torch.full((len(part),), index)
            for measurement, _ in self.measurements(
                part, of_category, batch_size, self.processing_resolution, generator
            ):
                learn(measurement)
        self.maybe_free_model_hooks()
        self.register_modules(calibration=fit.finish())
        return self

    # -- saving and sharing --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or the Hub: diffusers' own, but never from a pickle.

        Raises:
            HfHubHTTPError: what the Hub says when it refuses, such as `RepositoryNotFoundError`.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        except OSError as error:
            # diffusers only says that the model is not cached
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from None
            raise

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # where diffusers reads `model_index.json`, from a folder and from the Hub
        return upgrade_index(super()._dict_from_json_file(json_file))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves a folder that `from_pretrained` loads.

        Args:
            save_directory: the folder.
            safe_serialization: always True: weights are saved in safetensors.
            variant: of the weights' file names, such as "fp16".
            max_shard_size: larger weights are split, as in diffusers.
            push_to_hub: uploads it as well; `kwargs` are those of `push_to_hub`, whose `repo_id` is the folder's name
                unless given.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code. Leave it out.")
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        remove_code(save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=variant, **{"folder": save_directory, **kwargs})

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        folder: str | os.PathLike | None = None,
        license: str | None = None,
    ) -> CommitInfo:
        """Uploads everything that a repository on the Hub needs, and creates the repository where there is none.

        That is: weights in safetensors, configurations, calibration and feature extractor, and from `folder`
        `training.json`, `report.json` (absolute paths cut down to their last part) and pictures (`*.png`). The model
        card is `folder`'s `README.md` if it has one. Else it is rendered (see `diffad.model_card`), unless `folder` has
        neither record and the repository a card: then that one stays. An interrupted upload goes on where it stopped
        when it is called again.

        Args:
            repo_id: "org/name", or "name" for your own account.
            commit_message: of the commit.
            private: whether a new repository is private; None takes the account's default.
            token: of the Hub; None takes the one you logged in with.
            create_pr: opens a pull request instead of a commit to `main`.
            safe_serialization: always True, as in `save_pretrained`.
            variant: of the weights' file names, such as "fp16" after `pipe.to(torch.float16)`. The repository keeps its
                other weights.
            folder: where the records and pictures are; None takes the folder that the pipeline was loaded from.
            license: of the weights, as the Hub names it, for the card; None takes that of the training data where it
                is known and binds what is made from them, else the card states none.

        Returns:
            The commit, with `commit_url` and `pr_url`.

        Raises:
            FileNotFoundError: no folder stands at `folder`.
        """
        folder = records_folder(self, folder)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as staging:
            self.save_pretrained(staging, safe_serialization, variant)
            remove_local_paths(staging)
            add_records_and_card(self, staging, folder, repo_id, token, license)
            return self._upload_folder(
                staging, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )


def check_score_strides(score_strides: Sequence[int], feature_extractor: TimmFeatureExtractor) -> None:
    """Raises a ValueError where a stride is none of the extractor's."""
    strides = list(feature_extractor.config.strides)
    if not score_strides or any(stride not in strides for stride in score_strides):
        raise ValueError(f"`score_strides` must be taken from {strides}, the extractor's, but is {score_strides}.")


def check_map_settings(suppression: float, position_prior_images: float) -> None:
    """Raises a ValueError where one is out of its range."""
    if not 0.0 <= suppression < 1.0:
        raise ValueError(f"`suppression` must lie in [0, 1), but is {suppression}.")
    if not 0.0 <= position_prior_images < math.inf:
        raise ValueError(
            f"`position_prior_images` must be finite and not negative, but is {position_prior_images}. "
            f"{PRIOR_IMAGES:g} is what all other maps have."
        )
