"""Text generation with parallel token sets on MLX."""

# First of all, because it has no effect once mlx.core is imported.
from . import blas

blas.preload()
