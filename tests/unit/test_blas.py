"""The BLAS that is loaded before mlx: it is really in use, and it changes rounding alone."""

import ctypes
import functools
import json
import os
import subprocess
import sys
from importlib import metadata

from tempo_mlx import blas

import numpy as np
import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="nothing is replaced elsewhere")
installed = {distribution.name for distribution in metadata.distributions()}
with_openblas = pytest.mark.skipif(
    not {"cmeel-openblas", "mlx-cpu"} <= installed, reason="only beside mlx-cpu and cmeel-openblas"
)

OPENBLAS = str(blas._find("cmeel-openblas", "libopenblas.so"))

PRODUCT = """
import json
from tempo_mlx import blas
import mlx.core as mx
import numpy as np
rng = np.random.default_rng(0)
a, b = (rng.standard_normal((200, 300), dtype=np.float32) for _ in range(2))
with mx.stream(mx.cpu):
    product = np.array(mx.array(a) @ mx.array(b).T)
maps = open("/proc/self/maps").read()
print(json.dumps({"product": product.tolist(), "origin": blas.info().origin,
                  "reason": blas.info().reason, "openblas": "/libopenblas" in maps,
                  "libraries": sorted({line.split()[-1] for line in maps.splitlines()})}))
"""


@functools.cache
def run(code: str, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def before_mlx(monkeypatch):
    """As if mlx were not imported yet."""
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(blas.VARIABLE, raising=False)


@with_openblas
def test_products_come_from_the_loaded_blas_and_agree_with_mlx_own():
    fast = run(PRODUCT, TEMPO_MLX_BLAS="")
    own = run(PRODUCT, TEMPO_MLX_BLAS="none")
    assert fast["openblas"] and not own["openblas"]
    assert own["origin"] == "mlx" and fast["origin"] != "mlx"
    # Another order of summation rounds differently somewhere: the proof that it is in use.
    assert fast["product"] != own["product"]
    np.testing.assert_allclose(fast["product"], own["product"], atol=1e-4)


@with_openblas
def test_variable_names_the_library():
    said = run(PRODUCT, TEMPO_MLX_BLAS=OPENBLAS)
    assert said["origin"] == "TEMPO_MLX_BLAS" and said["openblas"]
    assert said["product"] == run(PRODUCT, TEMPO_MLX_BLAS="")["product"]


@linux_only
@pytest.mark.parametrize("own", [None, "20"], ids=["default", "user's"])
def test_threads_spin_briefly_unless_the_user_sets_the_time(monkeypatch, before_mlx, own):
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    if own is not None:
        monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", own)
    when_loaded = []
    monkeypatch.setattr(
        ctypes, "CDLL", lambda *_, **__: when_loaded.append(os.getenv("OPENBLAS_THREAD_TIMEOUT"))
    )
    blas._preload()
    assert when_loaded[0] == (own or "16")


@linux_only
def test_a_variable_without_a_library_warns_and_everything_runs():
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run(
            f"import warnings; warnings.simplefilter('error'); {PRODUCT}", TEMPO_MLX_BLAS="/no/such"
        )
    assert "TEMPO_MLX_BLAS=/no/such cannot be loaded" in raised.value.stderr
    said = run(PRODUCT, TEMPO_MLX_BLAS="/no/such")
    assert said["origin"] == "mlx" and "/no/such cannot be loaded" in said["reason"]


@linux_only
def test_mlx_that_was_imported_first_is_said():
    said = run("import mlx.core\n" + PRODUCT, TEMPO_MLX_BLAS="")
    assert said["origin"] == "mlx" and not said["openblas"]
    assert "imported before tempo_mlx" in said["reason"]


@with_openblas
@pytest.mark.parametrize("module", ["tempo_mlx", "tempo_mlx.weights.loading", "tempo_mlx.cli"])
def test_every_way_into_the_package_loads_it_first(module):
    assert run(f"import {module}\n{PRODUCT}", TEMPO_MLX_BLAS="")["origin"] == "cmeel-openblas"


@with_openblas
@pytest.mark.parametrize("wanted", ["", OPENBLAS], ids=["default", "variable"])
def test_mlx_s_libgfortran_is_used_if_the_system_has_none(wanted):
    # What the system's loader says until a library of that name is in the process.
    hide = """
import ctypes
load, loaded = ctypes.CDLL, []
def without_libgfortran(name, *arguments, **options):
    if "libopenblas" in name and not loaded:
        raise OSError("libgfortran.so.5: cannot open shared object file")
    loaded.append(name)
    return load(name, *arguments, **options)
ctypes.CDLL = without_libgfortran
"""
    said = run(hide + PRODUCT, TEMPO_MLX_BLAS=wanted)
    assert said["origin"] == ("TEMPO_MLX_BLAS" if wanted else "cmeel-openblas")
    assert not any(name.endswith("/libgfortran.so.5.0.0") for name in said["libraries"])
    own = run(PRODUCT, TEMPO_MLX_BLAS="none")
    assert said["product"] != own["product"]
    np.testing.assert_allclose(said["product"], own["product"], atol=1e-4)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_nothing_is_loaded_on_other_systems(monkeypatch, before_mlx, platform):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert blas._preload().library is None


@linux_only
def test_nothing_is_loaded_with_the_cuda_backend(monkeypatch, before_mlx):
    monkeypatch.setattr(blas, "_files", lambda name: [] if name == "mlx-cuda-13" else None)
    monkeypatch.setattr(ctypes, "CDLL", None)
    info = blas._preload()
    assert info.origin == "mlx" and "mlx-cuda-13" in info.reason


@linux_only
@pytest.mark.parametrize(
    ("installed", "error", "reason", "remedy"),
    [
        (False, "libopenblas.so.0: cannot open", "no OpenBLAS was found", "pip install cmeel"),
        (True, "libgfortran.so.5: cannot open", "libgfortran.so.5", "apt-get install libgfortran5"),
    ],
)
def test_missing_library_comes_with_the_command_that_mends_it(
    monkeypatch, before_mlx, tmp_path, installed, error, reason, remedy
):
    def refuse(*_, **__):
        raise OSError(error)

    library = tmp_path / "libopenblas.so"
    monkeypatch.setattr(
        blas, "_find", lambda name, _: library if installed and name == "cmeel-openblas" else None
    )
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    info = blas._preload()
    assert info.library is None and info.origin == "mlx"
    assert reason in info.reason and remedy in info.remedy


def test_speed_is_positive():
    assert blas.gflops(size=64, repeats=1) > 0
