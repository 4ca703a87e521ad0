"""What all pictures share: their style, and spectrograms and tokens over time.

The colours are Okabe and Ito's, which stay apart under every kind of colour blindness.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from beats_jax.fbank import BANDS, FRAME_SHIFT, PATCH_SIZE, SAMPLE_RATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
MARKERS = "osD^v"  # of lines that are compared
COLUMN_SECONDS = PATCH_SIZE * FRAME_SHIFT / SAMPLE_RATE  # 0.16 s of a column of 8 tokens
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "figure.dpi": 150,
}


def draw_image(axis: Axes, values: np.ndarray, shown: np.ndarray, **kwargs: Any):
    """The image of `values` [rows, columns] over time, lowest row below, only where `shown`."""
    height, width = values.shape
    seconds = COLUMN_SECONDS * width * (BANDS / height)  # mels and tokens keep the same aspect
    axis.grid(False)
    return axis.imshow(
        np.ma.masked_array(values, ~shown),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, seconds, 0, height),
        **kwargs,
    )


def draw_picture(axis: Axes, colours: np.ndarray) -> None:
    """`colours` [rows, columns, 3] over time in seconds, lowest row below."""
    height, width = colours.shape[:2]
    axis.grid(False)
    extent = (0, COLUMN_SECONDS * width * (BANDS / height), 0, height)
    axis.imshow(colours, origin="lower", aspect="auto", interpolation="nearest", extent=extent)


def draw_background(axis: Axes, where: np.ndarray, colour: str, height: int) -> None:
    """Fills the patches `where` [8, T'] with one colour."""
    from matplotlib.colors import ListedColormap

    image = draw_image(axis, np.ones(where.shape), where, cmap=ListedColormap([colour]))
    image.set_extent((0, COLUMN_SECONDS * where.shape[1], 0, height))


def styled() -> Any:
    """The context in which the house's pictures are drawn (`matplotlib.rc_context`)."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(
    rows: int, columns: int, inches: tuple[float, float], **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `inches`, and its axes, row by row."""
    # Without pyplot: no backend to choose, no window, and no list that keeps every figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def save_figure(figure: Figure, path: epath.PathLike) -> None:
    """Writes a picture of the kind that the name's ending says, or a PNG; its folder is made.

    Raises:
        ValueError: matplotlib knows no such kind.
        OSError: it could not be written.
    """
    path, picture = epath.Path(path), io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:  # from a full disk it comes without the file's name
        raise OSError(
            error.errno, f"{error.strerror}; make room and start again", str(path)
        ) from error
