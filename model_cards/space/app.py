"""A diffad model as a Hugging Face Space: its page at /, its API at /predict."""

from __future__ import annotations

import os

import uvicorn

from diffad.cli import load_pipeline
from diffad.deployment.service import create_app

if "DIFFAD_MODEL" not in os.environ:
    raise SystemExit("Set the Space's variable DIFFAD_MODEL to the id of a calibrated diffad model on the Hub.")
app = create_app(
    load_pipeline(os.environ["DIFFAD_MODEL"]),
    category=os.environ.get("DIFFAD_CATEGORY"),
    token=os.environ.get("DIFFAD_TOKEN"),
)

if __name__ == "__main__":
    uvicorn.run(app, host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
