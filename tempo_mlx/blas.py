"""A fast BLAS for mlx's CPU backend on Linux, loaded before mlx.

mlx's Linux wheel links the slow reference BLAS. Symbols of a library loaded with RTLD_GLOBAL before
mlx.core take precedence over mlx's own, so loading OpenBLAS first replaces the reference BLAS for
the whole process.
"""

import ctypes
import os
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

#: Environment variable: a path loads that library, "none" keeps mlx's own BLAS.
VARIABLE = "TEMPO_MLX_BLAS"

#: How long OpenBLAS's threads spin before they sleep: 2 to this power, in processor cycles. The
#: default is 26, about 20 ms. Spinning threads take the processor from the mlx threads that would
#: give them work: steps of a small model take twice as long, those of a large one 5 to 10 % longer.
PATIENCE_VARIABLE, PATIENCE = "OPENBLAS_THREAD_TIMEOUT", "16"

CUDA_BACKENDS = ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")
INSTALL_OPENBLAS = f"{sys.executable} -m pip install cmeel-openblas"
INSTALL_LIBGFORTRAN = "sudo apt-get install libgfortran5"
LIBGFORTRAN = "libgfortran.so.5"


@dataclass(frozen=True)
class BlasInfo:
    """The BLAS that mlx's CPU backend uses in this process, and why."""

    #: The library that replaces mlx's own BLAS, or None.
    library: Path | None
    #: "cmeel-openblas", "system", the variable's name, or "mlx" if nothing was replaced.
    origin: str
    #: One line: why mlx's own BLAS is in use; empty if it was replaced.
    reason: str = ""
    #: How to get a faster BLAS, usually a command; or empty.
    remedy: str = ""


_info: BlasInfo | None = None


def preload() -> BlasInfo:
    """Load OpenBLAS if mlx's own BLAS is slow; call it before mlx.core is imported.

    Does nothing on macOS, where Accelerate is fast, and with mlx's CUDA backend. Never raises:
    without a fast BLAS everything runs slower, and the result gives the reason. Later calls return
    the first result.
    """
    global _info
    if _info is None:
        _info = _preload()
    return _info


def info() -> BlasInfo:
    """The result of :func:`preload`."""
    return preload()


def gflops(size: int = 1024, repeats: int = 3) -> float:
    """Speed of an fp32 product of two [size, size] matrices on the CPU, in GFLOP/s."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        a = mx.random.normal((size, size), key=mx.random.key(0))
        b = mx.random.normal((size, size), key=mx.random.key(1))
        mx.eval(a, b)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            mx.eval(a @ b)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _preload() -> BlasInfo:
    if sys.platform != "linux":
        return BlasInfo(None, "mlx", "mlx has a fast BLAS on this system")
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() == "none":
        return BlasInfo(None, "mlx", f"{VARIABLE}={wanted} asks for it")
    if "mlx.core" in sys.modules:
        return BlasInfo(
            None,
            "mlx",
            "mlx.core was imported before tempo_mlx, so its BLAS can no longer be replaced",
            "import tempo_mlx before mlx and mlx_lm",
        )
    if wanted:
        try:
            _load(wanted)
        except OSError as error:
            reason = f"{VARIABLE}={wanted} cannot be loaded: {error}"
            warnings.warn(reason, RuntimeWarning, stacklevel=1)
            return BlasInfo(None, "mlx", reason, _remedy(error))
        return BlasInfo(Path(wanted), VARIABLE)
    for name in CUDA_BACKENDS:
        if _files(name) is not None:
            return BlasInfo(None, "mlx", f"mlx computes with its CUDA backend ({name})")
    return _load_openblas()


def _load_openblas() -> BlasInfo:
    """Load cmeel-openblas if possible, otherwise the system's OpenBLAS."""
    reason, remedy = "no OpenBLAS was found", INSTALL_OPENBLAS
    packaged = _find("cmeel-openblas", "libopenblas.so")
    if packaged is not None:
        try:
            _load(str(packaged))
            return BlasInfo(packaged, "cmeel-openblas")
        except OSError as error:
            reason = f"cmeel-openblas cannot be loaded: {error}"
            remedy = _remedy(error)
    try:
        _load("libopenblas.so.0")
    except OSError:
        return BlasInfo(None, "mlx", reason, remedy)
    return BlasInfo(_mapped("libopenblas"), "system")


def _load(library: str) -> None:
    """Load a BLAS to replace mlx's own; use mlx's libgfortran if the system has none."""
    os.environ.setdefault(PATIENCE_VARIABLE, PATIENCE)
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if LIBGFORTRAN not in str(error):
            raise
        _load_bundled_libgfortran()
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _remedy(error: OSError) -> str:
    return INSTALL_LIBGFORTRAN if LIBGFORTRAN in str(error) else ""


def _load_bundled_libgfortran() -> None:
    """Load the libgfortran in mlx's wheel under its standard name.

    The wheel's build renamed the file and its soname, so other libraries do not find it. A copy in
    memory gets the standard name back. If any of this fails, nothing is loaded, and loading the
    BLAS then reports what is missing.
    """
    renamed = _find("mlx-cpu", "libgfortran-")
    helper = _find("mlx-cpu", "libquadmath-")
    if renamed is None or not hasattr(os, "memfd_create"):
        return
    old = renamed.name.encode()
    new = LIBGFORTRAN.encode().ljust(len(old), b"\0")
    try:
        if helper is not None:
            ctypes.CDLL(str(helper), mode=ctypes.RTLD_GLOBAL)
        image = renamed.read_bytes().replace(b"\0" + old + b"\0", b"\0" + new + b"\0")
        with open(os.memfd_create(LIBGFORTRAN), "wb") as file:
            file.write(image)
            file.flush()
            ctypes.CDLL(f"/proc/self/fd/{file.fileno()}", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return


def _files(package: str) -> list[metadata.PackagePath] | None:
    """The files of an installed package; None if it is not installed."""
    try:
        return metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None


def _find(package: str, prefix: str) -> Path | None:
    """The package's first existing file whose name has this prefix."""
    for file in _files(package) or []:
        if file.name.startswith(prefix):
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    return None


def _mapped(name: str) -> Path | None:
    """The file of a library that this process has loaded."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if name in path.rpartition("/")[2]:
                return Path("/" + path)
    return None
