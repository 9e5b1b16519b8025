"""What is installed: parts that belong together, and the packages that only some of them need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUTER_FOLDERS = ("model_cards", "pipelines", "training")  # beside `diffad/` in a checkout, inside it when installed


def check_one_checkout() -> None:
    """Raises an ImportError where the outer folders are not those of this checkout.

    In a checkout's root, Python takes `diffad/` from there, and the outer folders from whichever checkout was installed
    with `pip install -e`. Two versions would run as one.
    """
    package = Path(__file__).resolve().parent
    for name in OUTER_FOLDERS:
        spec = importlib.util.find_spec(f"diffad.{name}")
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).resolve().parent
        if folder.parent not in (package, package.parent):
            raise ImportError(
                f"diffad comes from {package}, but diffad.{name} from {folder}, which is another checkout. Run from "
                f"another folder, or install this one: pip install -e {package.parent}"
            )


@contextmanager
def needs_extra(*names: str) -> Iterator[None]:
    """Where an import inside it fails, says which extra of setup.cfg brings the package; any one of `names` does."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "diffad").split(".")[0] == "diffad":
            raise
        commands = " or ".join(f"pip install 'diffad[{name}]'" for name in names)
        raise ImportError(f"This needs the package {error.name}: {commands}", name=error.name) from error
