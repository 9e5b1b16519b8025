"""DiAD's networks that train from scratch, for latents of an autoencoder that is small or trained as well."""

from __future__ import annotations

from typing import Any

# Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (WACV 2024). Stable Diffusion's
# last timestep leaves 7% of the image in the noise. A denoiser trained on it takes the coarse structure from
# there, when sampling from what is noise alone, and not from the guidance: it draws another part. Velocity is
# the image itself at the last timestep, so the guidance is learnt there first.
FROM_NOISE_ALONE = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def small_preset(resolution: int, block_out_channels: tuple[int, ...]) -> dict[str, Any]:
    """A denoiser without attention, of images `resolution` px a side, whose latents have an eighth of that."""
    return {
        "resolution": resolution,
        "unet": {
            "sample_size": resolution // 8,
            "block_out_channels": block_out_channels,
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D",) * 4,
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("UpBlock2D",) * 4,
            "cross_attention_dim": 1,
            "norm_num_groups": 16,
        },
        "conditioning_embedding_out_channels": (8, 16, 32, 64),
        "scheduler": FROM_NOISE_ALONE,
    }


DIAD_PRESETS: dict[str, dict[str, Any]] = {
    # Four levels, so that for latents of 16 x 16 the guiding skips stand at 2 x 2. They stand at 4 x 4 for the paper's
    # 256 px; a finer skip shows the denoiser the defect, and it draws it, unless it learns not to (`--defect_share`).
    "cpu-128": small_preset(128, (64, 96, 128, 192)),
    # The paper's 256 px and 4 x 4 for the guiding skips, for latents of many channels, as TAEF2's, that a small
    # autoencoder makes without blur.
    "cpu-256": small_preset(256, (64, 64, 128, 192)),
}

# Stable Diffusion's noise
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
