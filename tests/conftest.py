"""What all tests share."""

import gc
import os
import sys

# OpenBLAS's threads spin while they wait for each other. Where other work wants the same cores, a
# second test run for example, that makes everything ten times slower and more.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# On a GPU, mlx may round the factors of fp32 products to TF32, with errors of about 1e-3. The tests
# compare at 1e-4.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# What makes rich and typer see a terminal where there is none, or another one; continuous
# integration sets some of these. The last turns errors into tracebacks.
TERMINAL = ["TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"]
LOOK = ["COLUMNS", "LINES", "TERMINAL_WIDTH", "NO_COLOR", "COLORTERM"]
for name in [*TERMINAL, *LOOK, "TEMPO_MLX_DEBUG"]:
    os.environ.pop(name, None)
os.environ["TERM"] = "xterm"

from tempo_mlx import cli  # noqa: E402
from tempo_mlx.decode import decoder  # noqa: E402
from tempo_mlx.drafts import PassCosts  # noqa: E402
from tempo_mlx.weights.loading import load  # noqa: E402

import mlx.core as mx  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# How long an example takes says nothing about the code: other work may want the same cores.
settings.register_profile(
    "no deadlines", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no deadlines")


@pytest.fixture(scope="module")
def uncompiled():
    """On a CPU, mx.compile runs a C++ compiler, for longer than tiny models compute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True, scope="session")
def dear_passes():
    """A pass costs what its tokens cost one by one, so that nothing is drafted; not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "pass_costs", lambda model: PassCosts((1, 64), (1.0, 64.0)))
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["tempo-mlx", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the embedded model, fetched once into the checkout's models/."""
    return load("smollm2-135m")


def pytest_collection_finish(session):
    """Garbage is looked for among what tests make, not in modules and tests: half of the time."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One for each processor this process may use, and for each 2 GB of memory that are free."""
    processors = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    return max(1, min(processors, int(psutil.virtual_memory().available // 2e9)))
