"""Pictures of a run: its lattice, who saw whom, and the curve of a threshold.

Matplotlib is an extra, ``tempo-mlx[plots]``, and is imported when a picture is drawn.
"""

from .figure import check_plot
from .lattice import plot_lattice
from .mask import plot_mask
from .schedule import plot_schedule
from .search import plot_search

__all__ = ["check_plot", "plot_lattice", "plot_mask", "plot_schedule", "plot_search"]
