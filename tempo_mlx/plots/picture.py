"""A figure that a notebook shows; imported with Matplotlib, when a picture is drawn."""

from io import BytesIO

from matplotlib.figure import Figure

#: Dots per inch in a notebook: letters of 8 points are legible at the width of a cell.
DPI = 120


class Picture(Figure):
    """A figure that shows itself in a notebook, where pyplot does so only for its own."""

    def _repr_png_(self) -> bytes:
        from .figure import look

        picture = BytesIO()
        with look():
            self.savefig(picture, format="png", dpi=DPI)
        return picture.getvalue()
