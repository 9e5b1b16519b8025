"""What goes wrong with parts, as functions that draw it onto an image, by the names of `KINDS`.

Each takes an image, its part (H, W) bool, other images and a generator, and returns the changed image, which may leave
[0, 1], and the region (H, W) bool that it may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy import ndimage

VISIBLE = 0.03  # a change of colour that can be seen, in any channel

Images: TypeAlias = Sequence[np.ndarray]
Window: TypeAlias = tuple[slice, slice]
Point: TypeAlias = "Sequence[float] | np.ndarray"  # row and column
Change: TypeAlias = tuple[np.ndarray, np.ndarray]


def _scratch(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A few thin curved lines side by side, as a tool or another part leaves them."""
    length = _between(4.0 + 0.05 * _scale(part), 0.5 * _scale(part), rng)
    width = _between(0.8, max(1.2, 0.012 * _scale(part)), rng)
    along = np.linspace(0.0, 1.0, max(4, int(length / 2.0)))
    wander = 0.1 * np.cumsum(rng.normal(0.0, 1.0, along.size)) / np.sqrt(along.size)
    angles = rng.uniform(0.0, 2.0 * np.pi) + rng.normal(0.0, 0.6) * along + wander
    line = np.cumsum(np.stack([np.sin(angles), np.cos(angles)], axis=1), axis=0) * length / along.size
    lines = [(line + point(part, rng), width)]
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.3 else 0):
        first, last = np.sort(rng.integers(0, along.size, 2))
        lines.append((lines[0][0][first : last + 2] + _sign(rng) * rng.uniform(1.5, 3.0) * width, width))
    pressure = np.clip(0.75 + 0.25 * _noise(part.shape, max(4.0, length / 4.0), rng), 0.3, 1.0)
    return _brighten(image, _lines(part.shape, lines) * pressure, part, rng, _sign(rng))


def _crack(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A thin jagged line with branches, nearly always dark."""
    step, width = max(2.0, 0.015 * _scale(part)), _between(0.8, max(1.2, 0.008 * _scale(part)), rng)
    length = _between(4.0 + 0.06 * _scale(part), 0.5 * _scale(part), rng)
    branches = [(np.array(point(part, rng), dtype=float), rng.uniform(0.0, 2.0 * np.pi), length, width)]
    lines: list[tuple[np.ndarray, float]] = []
    while branches and len(lines) < 8:
        start, heading, left, width = branches.pop()
        points = [start]
        while left > 0.0:
            heading += rng.normal(0.0, 0.1)
            zigzag, stride = heading + rng.normal(0.0, 0.5), step * rng.uniform(0.5, 1.5)
            points.append(points[-1] + stride * np.array([np.sin(zigzag), np.cos(zigzag)]))
            left -= stride
            if left > 2.0 * step and rng.random() < 0.08:
                fork = heading + _sign(rng) * rng.uniform(0.4, 1.1)
                branches.append((points[-1], fork, left * rng.uniform(0.3, 0.9), 0.8 * width))
        lines.append((np.array(points), width))
    return _brighten(image, _lines(part.shape, lines), part, rng, _sign(rng, 0.1))


def _spot(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A pit, bubble, drop or speck of dirt, at times a few of them."""
    diameter = _between(3.0, max(4.0, 0.12 * _scale(part)), rng)
    center, cover = np.array(point(part, rng)), np.zeros(part.shape, dtype=np.float32)
    for number in range(int(rng.integers(2, 6)) if rng.random() < 0.25 else 1):
        beside = center + (rng.normal(0.0, 2.0 * diameter, 2) if number else 0.0)
        window, one = _blob(part.shape, beside, diameter * rng.uniform(0.6, 1.0), 0.7, rng)
        cover[window] = np.maximum(cover[window], one)
    return _brighten(image, cover, part, rng, _sign(rng), tint=0.3)


def _stain(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """Another texture or colour laid over a ragged region, more or less opaque."""
    diameter = _between(5.0, 0.4 * _scale(part), rng)
    window, cover = _blob(part.shape, point(part, rng), diameter, 0.5, rng, ragged=0.8)
    if rng.random() < 0.5:
        other = others[int(rng.integers(len(others)))] if len(others) else image
        place = rng.uniform(0.0, 1.0, 2) * other.shape[:2]
        found = other[_window(other.shape, place, cover.shape)][:: int(_sign(rng)), :: int(_sign(rng))]
        rows, columns = (np.arange(a) * b // a for a, b in zip(cover.shape, found.shape[:2], strict=True))
        laid = found[np.ix_(rows, columns)]  # stretched where the other image is smaller
    else:
        laid = rng.uniform(0.0, 1.0, 3) + 0.05 * _noise(cover.shape, max(3.0, diameter / 4.0), rng)[..., None]
    return _lay(image, laid, cover * _between(0.1, 0.9, rng), part, window)


def _missing_piece(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A hole, through which what lies behind shows; or a detail that is not there, its surroundings in its place."""
    diameter, center = _between(4.0, 0.35 * _scale(part), rng), point(part, rng)
    window, cover = _piece(part.shape, center, diameter, rng)
    beside = image[_window(part.shape, center + 1.3 * diameter * _direction(rng), cover.shape)]
    return _lay(image, beside if rng.random() < 0.5 else _behind(image, part, cover.shape, rng), cover, part, window)


def _broken_edge(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A bite out of the part's boundary, which is the image's border where the whole image is the part."""
    center = point(part & ~ndimage.binary_erosion(part), rng)
    diameter = _between(5.0, 0.4 * _scale(part), rng)
    window, cover = _piece(part.shape, center, diameter, rng)
    return _lay(image, _behind(image, part, cover.shape, rng), cover, part, window)


def _wrong_colour(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A region, or one component of the part, in another colour."""
    center = point(part, rng)
    distance = np.where(part, np.abs(image - image[center]).max(axis=2), 1.0)
    labels = [ndimage.label(distance < limit)[0] for limit in (0.08, 0.14)]
    component, wider = (one == one[center] for one in labels)
    # it ends where the colour does only if a wider range of colours hardly enlarges it
    if 0.001 < component.sum() / part.sum() < 0.4 and wider.sum() < 1.3 * component.sum():
        window = bounds(component)
        cover = fill_holes(component[window], 0.05)
    else:
        window, cover = _blob(part.shape, center, _between(5.0, 0.4 * _scale(part), rng), 0.5, rng)
    strength = _strength(image, rng)
    turn = 4.0 * strength * _sign(rng)  # of the hue, about the axis of greys
    grey = image[window].mean(axis=2, keepdims=True)
    color = image[window] - grey
    across = (np.roll(color, 1, axis=2) - np.roll(color, -1, axis=2)) / np.sqrt(3.0)
    shift = strength * _sign(rng) * (1.0 if rng.random() < 0.5 else rng.uniform(-1.0, 1.0, 3))
    return _lay(image, grey + np.cos(turn) * color + np.sin(turn) * across + shift, cover, part, window)


def _blur(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A region without its detail, as where a texture is worn or smeared."""
    center = point(_detail(image, part), rng)
    window, cover = _blob(part.shape, center, _between(8.0, 0.4 * _scale(part), rng), 0.5, rng)
    sigma = _between(1.0, max(1.5, 0.02 * _scale(part)), rng)
    return _lay(image, ndimage.gaussian_filter(image[window], (sigma, sigma, 0.0), truncate=3.0), cover, part, window)


def _shift(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A patch displaced by a little, one from elsewhere, or the whole part out of its place."""
    choice, offset = rng.random(), _between(1.0, max(2.0, 0.08 * _scale(part)), rng) * _direction(rng)
    if choice < 0.2 and not part.all():
        return _move_part(image, part, 0.0, offset)
    center = np.array(point(_detail(image, part), rng))
    window, cover = _blob(part.shape, center, _between(6.0, 0.35 * _scale(part), rng), 0.3, rng)
    there = _window(part.shape, center + offset if choice < 0.6 else point(part, rng), cover.shape)
    return _lay(image, image[there], cover, part, window)


def _turn(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A round patch, or the whole part, that is rotated."""
    angle = _sign(rng) * _between(4.0, 180.0, rng)
    if rng.random() < 0.3 and not part.all():
        return _move_part(image, part, angle, np.zeros(2))
    diameter = _between(8.0, 0.4 * _scale(part), rng)
    window = _window(part.shape, point(_detail(image, part), rng), 1.2 * diameter)
    inside = diameter / 2.0 - np.hypot(*away(window))
    cover = np.clip(inside / _between(1.0, 0.2 * diameter, rng) + 0.5, 0.0, 1.0)
    return _lay(image, _turned(image[window], angle), cover, part, window)


def _swap(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """Two patches of one shape that have changed places."""
    diameter = _between(5.0, 0.3 * _scale(part), rng)
    reach = 1.2 * diameter + 1.0  # within which no border cuts the shape
    center = np.clip(point(_detail(image, part), rng), reach, np.array(part.shape) - reach)
    window, cover = _blob(part.shape, center, diameter, 0.3, rng)
    there = _window(part.shape, point(part, rng), cover.shape)
    once, region = _lay(image, image[there], cover, part, window)
    twice, also = _lay(once, image[window], cover, part, there)
    return twice, np.zeros_like(region) if (region & also).any() else region | also


def _streaks(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """Straight parallel lines, as a roller, a brush or a printing screen leaves them, often along the image's sides."""
    length, width = _between(0.05, 0.5, rng) * _scale(part), _between(0.8, max(1.2, 0.015 * _scale(part)), rng)
    angle = np.pi / 2.0 * rng.integers(0, 2) if rng.random() < 0.7 else rng.uniform(0.0, np.pi)
    along, across = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
    start = np.array(point(part, rng), dtype=float)
    between = _between(3.0 * width, 0.1 * _scale(part) + 3.0 * width, rng)
    lines = []
    for number in range(int(rng.integers(1, 7))):
        first = start + number * between * rng.uniform(0.7, 1.3) * across + rng.normal(0.0, 0.1) * length * along
        lines.append((np.stack([first, first + length * rng.uniform(0.5, 1.0) * along]), width))
    return _brighten(image, _lines(part.shape, lines), part, rng, _sign(rng))


def _dull_region(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A region between straight lines and the part's rim that is darker or brighter, its texture kept."""
    window, center = bounds(part), np.array(point(part, rng), dtype=float)
    down, right = away(window, center)
    cover, rim = np.ones((down.shape[0], right.shape[1])), _between(1.0, 0.05 * _scale(part) + 1.0, rng)
    for _ in range(int(rng.integers(2, 5))):
        sine, cosine = _direction(rng)
        reach = _between(3.0, 0.35 * _scale(part), rng)
        cover = np.minimum(cover, np.clip((reach - down * sine - right * cosine) / rim + 0.5, 0.0, 1.0))
    return _lay(image, image[window] * _gain(image, part, rng), cover, part, window)


def _uneven_light(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator) -> Change:
    """A large region that is smoothly brighter or darker: an oval, or one side of the part."""
    window, (sine, cosine) = bounds(part), _direction(rng)
    down, right = away(window, point(part, rng))
    along = (down * sine + right * cosine) / (_scale(part) * rng.uniform(0.15, 0.5))
    across = (right * sine - down * cosine) / (_scale(part) * rng.uniform(0.15, 0.5))
    cover = np.exp(-(along**2 + across**2)) if rng.random() < 0.6 else np.clip(along, 0.0, 1.0)
    return _lay(image, image[window] * _gain(image, part, rng), cover, part, window)


_FUNCTIONS = (
    *(_scratch, _crack, _spot, _stain, _missing_piece, _broken_edge),
    *(_wrong_colour, _blur, _shift, _turn, _swap, _uneven_light, _streaks, _dull_region),
)
KINDS: dict[str, Callable[..., Change]] = {function.__name__[1:].replace("_", " "): function for function in _FUNCTIONS}


# What the kinds are made of. A window is rows and columns that lie in the image.


def _between(low: float, high: float, rng: Generator) -> float:
    """A number in [low, high], evenly on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(low), np.log(max(low, high)))))


def _sign(rng: Generator, positive: float = 0.5) -> float:
    return 1.0 if rng.random() < positive else -1.0


def _direction(rng: Generator) -> np.ndarray:
    angle = rng.uniform(0.0, 2.0 * np.pi)
    return np.array([np.sin(angle), np.cos(angle)], dtype=np.float32)


def _scale(part: np.ndarray) -> float:
    """The side of a square of the part's area, in pixels, at most the image's."""
    return float(min(np.sqrt(part.sum()), *part.shape))


def point(where: np.ndarray, rng: Generator) -> tuple[int, int]:
    """The row and column of a random True pixel."""
    chosen = np.flatnonzero(where)
    return divmod(int(chosen[rng.integers(len(chosen))]), where.shape[1])


def _detail(image: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Where the part is not of one colour, (H, W) bool: what is moved or blurred there shows."""
    grey = image.mean(axis=2)
    found = part & (np.abs(grey - ndimage.uniform_filter(grey, 5)) > 1.5 * VISIBLE)
    return found if found.any() else part


def _strength(image: np.ndarray, rng: Generator) -> float:
    """A change of brightness, from barely visible to obvious; what drowns in the image's noise is not visible."""
    return _between(max(1.5 * VISIBLE, min(2.0 * noise_level(image), 0.2)), 0.6, rng)


def noise_level(image: np.ndarray) -> float:
    """The noise's deviation, from neighbours along the direction in which the image itself is smoother."""
    green = image[..., 1]
    steps = np.diff(green[::4], axis=1), np.diff(green[:, ::4], axis=0)
    return min(float(np.median(np.abs(one))) for one in steps) / 0.954  # for normal values


def _gain(image: np.ndarray, part: np.ndarray, rng: Generator) -> float:
    """A factor of brightness, by which what is bright becomes visibly brighter or darker."""
    brightness = max(float(np.quantile(image[part][::16], 0.9)), VISIBLE)
    return 1.0 + _sign(rng) * _between(2.0 * VISIBLE, 0.4, rng) / brightness


def _lay(image: np.ndarray, laid: np.ndarray, cover: np.ndarray, part: np.ndarray, window: Window) -> Change:
    """`laid` over a window of the image by `cover` in [0, 1], on the part alone; and where that is."""
    cover = np.where(part[window], cover, 0.0).astype(np.float32)
    changed, region = image.copy(), np.zeros_like(part)
    changed[window] += cover[..., None] * (laid.astype(np.float32) - image[window])
    region[window] = cover > 0.0
    return changed, region


def _brighten(
    image: np.ndarray, cover: np.ndarray, part: np.ndarray, rng: Generator, sign: float, tint: float = 0.1
) -> Change:
    """Changes brightness by `cover`, (H, W), up or down by `sign`; the other way where there is no room for that."""
    window, strength = bounds(cover > 0.0), _strength(image, rng)
    level = float(np.average(image[window].mean(axis=2), weights=cover[window] + 1e-6))
    if not 0.0 <= level + sign * strength <= 1.0:
        sign = 1.0 if level < 0.5 else -1.0
    color = sign * strength * (1.0 + tint * rng.uniform(-1.0, 1.0, 3))
    return _lay(image, image[window] + color, cover[window], part, window)


def _turned(image: np.ndarray, angle: float) -> np.ndarray:
    return ndimage.rotate(image, angle, reshape=False, order=1, mode="nearest")


def _move_part(image: np.ndarray, part: np.ndarray, angle: float, offset: np.ndarray) -> Change:
    """The whole part turned by degrees in its bounding box and moved, with some background about it."""
    ends = np.array([(one.start, one.stop) for one in bounds(part)])
    middle, side = ends.mean(axis=1), 1.2 * float(np.diff(ends).max())
    turned = _turned(image[_window(part.shape, middle + offset, side)], angle)
    return _lay(image, turned, np.ones(1), np.ones_like(part), _window(part.shape, middle, side))


def _window(shape: Sequence[int], center: Point, size: float | Sequence[int]) -> Window:
    """A window of a size, or the largest that there is, as near to a centre as the image lets it be."""
    sides = np.minimum(np.ceil(size).astype(int), shape[:2])
    top, left = np.clip(np.round(np.asarray(center) - sides / 2).astype(int), 0, np.array(shape[:2]) - sides)
    return slice(int(top), int(top + sides[0])), slice(int(left), int(left + sides[1]))


def bounds(mask: np.ndarray) -> Window:
    """The bounding box of a mask; of one without a True pixel, everything."""
    found = ndimage.find_objects(mask.view(np.uint8))
    return found[0] if found else (slice(0, mask.shape[0]), slice(0, mask.shape[1]))


def away(window: Window, center: Point | None = None) -> Change:
    """How far a window's pixels lie below and right of a centre (its own), (h, 1) and (1, w)."""
    rows, columns = (np.arange(one.start, one.stop, dtype=np.float32) for one in window)
    down, right = (rows.mean(), columns.mean()) if center is None else center
    return rows[:, None] - np.float32(down), columns[None] - np.float32(right)


def _noise(shape: tuple[int, int], cell: float, rng: Generator) -> np.ndarray:
    """Smooth noise of about unit deviation, (H, W); `cell` is its coarsest grain, in pixels."""
    total = np.zeros(shape, dtype=np.float32)
    for share in (1.0, 0.5, 0.25):
        grid = [int(np.ceil(side / max(cell * share, 1.0))) + 1 for side in shape]
        values = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
        total += share * np.asarray(values.resize(shape[::-1], Image.Resampling.BICUBIC))
    return total


def _blob(
    shape: tuple[int, int], center: Point, diameter: float, soft: float, rng: Generator, ragged: float = 0.4
) -> tuple[Window, np.ndarray]:
    """A window and in it an irregular oval in [0, 1], whose rim is sharp or up to `soft` diameters wide."""
    stretch, rim = _between(1.0, 1.4, rng), _between(1.0, max(1.0, soft * diameter), rng)
    window = _window(shape, center, 1.4 * (1.0 + ragged) * diameter + rim + 2.0)
    (down, right), (sine, cosine) = away(window, center), _direction(rng)
    distance = np.hypot((down * cosine + right * sine) / stretch, (right * cosine - down * sine) * stretch)
    ragged_radius = diameter / 2.0 * (1.0 + ragged * np.tanh(_noise(distance.shape, max(2.0, 0.7 * diameter), rng)))
    return window, np.clip((ragged_radius - distance) / rim + 0.5, 0.0, 1.0)


def _piece(shape: tuple[int, int], center: Point, diameter: float, rng: Generator) -> tuple[Window, np.ndarray]:
    """A window and in it a region in [0, 1] with a sharp rim: angular, as pieces of brittle parts, or ragged."""
    if rng.random() < 0.5:
        return _blob(shape, center, diameter, 0.0, rng)
    window = _window(shape, center, 2.3 * diameter + 2.0)
    down, right = away(window, center)
    sides = int(rng.integers(4, 8))
    angles = 2.0 * np.pi * (np.arange(sides) + rng.uniform(0.0, 0.6, sides)) / sides
    distance = np.max([down * np.sin(angle) + right * np.cos(angle) for angle in angles], axis=0)
    return window, np.clip(0.4 * diameter - distance + 0.5, 0.0, 1.0)


def _lines(shape: tuple[int, int], lines: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """Lines, each (N, 2) rows and columns and a width in pixels, as (H, W) in [0, 1]."""
    fine = 4  # times finer, for soft rims
    drawn = Image.new("L", (shape[1] * fine, shape[0] * fine))
    for points, width in lines:
        corners = [(float(column) * fine, float(row) * fine) for row, column in points + 0.5]
        ImageDraw.Draw(drawn).line(corners, fill=255, width=max(1, round(width * fine)), joint="curve")
    return np.asarray(drawn.reduce(fine)) / np.float32(255.0)


def _behind(image: np.ndarray, part: np.ndarray, shape: tuple[int, int], rng: Generator) -> np.ndarray:
    """What lies behind the part, (*shape, 3): its background's colour and noise, else the border's or darkness."""
    if not part.all():
        pixels = image[~part]
    elif rng.random() < 0.5:
        pixels = border(image, max(1, min(part.shape) // 128))
    else:
        pixels = np.quantile(image[::4, ::4], 0.01) * rng.uniform(0.3, 1.0) + rng.normal(0.0, 0.01, (100, 3))
    middle = np.median(pixels, axis=0)
    noise = pixels[rng.integers(0, len(pixels), shape)] - middle
    return middle + np.clip(noise, -0.02, 0.02)  # without shadows and what else is rare


def border(image: np.ndarray, width: int) -> np.ndarray:
    """The pixels within `width` of the border, (N, 3)."""
    edge = np.ones(image.shape[:2], dtype=bool)
    edge[width:-width, width:-width] = False
    return image[edge]


def keep_components(mask: np.ndarray, share: float) -> np.ndarray:
    """A mask without components that are below a share of the largest one's area."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return mask & (areas >= share * areas.max())[labels]


def fill_holes(mask: np.ndarray, share: float = np.inf) -> np.ndarray:
    """A mask with its holes filled, or those that are below a share of its area."""
    padded = np.pad(mask, 1)
    labels, _ = ndimage.label(~padded)
    small = np.bincount(labels.ravel()) <= share * max(int(mask.sum()), 1)
    small[labels[0, 0]] = False
    return (padded | small[labels])[1:-1, 1:-1]
