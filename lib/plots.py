"""Plot helpers: one palette, one style, and the few pictures that several chapters draw."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY, BLACK = "#D55E00", "#CC79A7", "#56B4E9", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)


def use_style() -> None:
    """Set the book's figure style for the chapter that calls it."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "legend.frameon": False,
            "image.cmap": "viridis",
        }
    )


def scatter_plane(ax: Axes, points, colour: str, title: str, limit: float, size: float = 2) -> None:
    """Scatter points (n, 2) in the square from ``-limit`` to ``limit``."""
    points = np.asarray(points)
    ax.scatter(points[:, 0], points[:, 1], s=size, c=colour, linewidths=0, alpha=0.5)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)


def image_grid(images: Sequence, columns: int, titles: Sequence[str] = (), scale: float = 0.9):
    """Draw images (n, height, width) or (n, height, width, 3) in rows; return the figure."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(scale * columns, scale * rows), squeeze=False
    )
    for index, ax in enumerate(axes.flat):
        ax.axis("off")
        if index < len(images):
            ax.imshow(np.asarray(images[index]), cmap="gray")
            if index < len(titles):
                ax.set_title(titles[index], fontsize=8)
    return figure


def mark_threshold(ax: Axes, x: float, label: str, colour: str = BLACK) -> None:
    """Draw a labelled vertical line."""
    ax.axvline(x, color=colour, linestyle="--", linewidth=1.2, label=label)
