"""A report on installed versions, the device, and what is missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import blas
from ..drafts.costs import measured_costs
from ..weights.recipes import device_variant
from .checks import TF32_VARIABLE
from .local_models import recipe_models, size

DEFAULT_MODEL = "smollm2-135m"

#: The extra for developers of this project, which users do not need.
DEVELOPMENT = "dev"


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Args:
        topic: what was examined.
        value: the finding, as text.
        missing: whether something should be fixed.
        remedy: how to fix it: a command or a step.
        data: the finding as numbers, for programs.
    """

    topic: str
    value: str
    missing: bool = False
    remedy: str = ""
    data: dict[str, Any] | None = None


def examine() -> list[Finding]:
    """Examine versions, device, memory, BLAS, the default model and the extras."""
    return [
        *_versions(),
        _device(),
        *_memory(),
        _blas(),
        _tf32(),
        *_default_model(),
        *_pass_costs(),
        *_extras(),
    ]


def _versions() -> list[Finding]:
    findings = []
    for package in ("tempo-mlx", "mlx", "mlx-lm"):
        try:
            findings.append(Finding(package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(package, "not installed; runs from its folder"))
    python = f"{platform.python_version()} ({sys.executable})"
    return [*findings, Finding("Python", python), Finding("system", platform.platform())]


def _device() -> Finding:
    info = mx.device_info()
    kind = "CPU"
    if mx.default_device().type == mx.gpu:
        kind = "GPU (Metal)" if mx.metal.is_available() else "GPU (CUDA)"
    name = str(info.get("device_name", platform.processor()))
    architecture = str(info.get("architecture", platform.machine()))
    return Finding("device", f"{kind}: {name}, {architecture}", data=dict(info))


def _memory() -> list[Finding]:
    """Memory of the machine and of the device; on Metal they are the same."""
    findings = []
    total, free = _machine_memory()
    if total:
        available = f", {size(free)} available" if free else ""
        findings.append(
            Finding("memory", size(total) + available, data={"total": total, "available": free})
        )
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        limit = int(info["max_recommended_working_set_size"])
        findings.append(
            Finding(
                "wired limit",
                f"{size(limit)} for weights and cache; raised by "
                "`sudo sysctl iogpu.wired_limit_mb=MEGABYTES`",
                data={"limit": limit},
            )
        )
    if "total_memory" in info and mx.default_device().type == mx.gpu:
        total, free = int(info["total_memory"]), int(info.get("free_memory", 0))
        available = f", {size(free)} free" if free else ""
        findings.append(
            Finding("GPU memory", size(total) + available, data={"total": total, "available": free})
        )
    return findings


def _machine_memory() -> tuple[int, int]:
    """Bytes of memory, in total and available; 0 if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = int(mx.device_info().get("memory_size", 0))
    if sys.platform == "linux":
        return total, available_of_meminfo(Path("/proc/meminfo").read_text())
    if sys.platform == "darwin" and shutil.which("vm_stat"):
        statistics = subprocess.run(["vm_stat"], capture_output=True, text=True, check=False)
        return total, available_of_vm_stat(statistics.stdout)
    return total, 0


def available_of_meminfo(text: str) -> int:
    """Bytes available according to Linux's /proc/meminfo; 0 if unknown."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def available_of_vm_stat(text: str) -> int:
    """Bytes available according to macOS's vm_stat: free pages and those that can be reclaimed."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.M)
    return int(page[1]) * sum(map(int, pages)) if page else 0


def _blas() -> Finding:
    info, speed = blas.info(), blas.gflops()
    library = str(info.library) if info.library is not None else "mlx's own"
    reason = f" ({info.reason})" if info.reason else ""
    return Finding(
        "BLAS",
        f"{library}{reason}, {speed:.0f} GFLOP/s in fp32",
        bool(info.remedy),
        info.remedy,
        {"library": library, "origin": info.origin, "gflops": speed},
    )


def _tf32() -> Finding:
    """How fp32 products are rounded; only devices with matrix units have a choice."""
    if os.environ.get(TF32_VARIABLE) == "0":
        return Finding("fp32 products", f"in full precision ({TF32_VARIABLE}=0)")
    return Finding(
        "fp32 products",
        "in full precision, except that GPUs with matrix units (Apple M5, NVIDIA) may round "
        f"factors to 10 bits; {TF32_VARIABLE}=0 prevents it",
    )


def _default_model() -> list[Finding]:
    findings = []
    for model in recipe_models():
        if model.recipe.name != DEFAULT_MODEL:
            continue
        name = f"{DEFAULT_MODEL}/{model.variant}"
        if model.ready:
            value = f"ready, {size(model.n_bytes)} in {model.path}"
        else:
            value = f"not fetched; will be stored in {model.path}"
        # The other variant is needed only if it is requested by name.
        missing = not model.ready and model.variant == device_variant()
        findings.append(
            Finding(
                name,
                value,
                missing,
                f"tempo-mlx models fetch {DEFAULT_MODEL}" if missing else "",
                {"ready": model.ready, "path": str(model.path), "bytes": model.n_bytes},
            )
        )
    return findings


def _pass_costs() -> list[Finding]:
    """What passes over several tokens cost, by which drafts are as wide as they are."""
    findings = []
    for of, costs in measured_costs():
        if of.get("blas") != str(blas.info().library or "mlx's own"):
            continue
        shown = ", ".join(f"{n}: {costs(n):.2f}" for n in (2, 4, 8, 16))
        what = f"{of.get('architecture', '')} {of.get('precision', '')} on {of.get('device', '')}"
        data = {**of, "sizes": costs.sizes, "seconds": costs.seconds}
        findings.append(Finding("cost of tokens", f"{shown} passes of one, {what}", data=data))
    return findings


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in packages_of_extras().items():
        absent = [package for package in packages if not _is_installed(package)]
        value = f"missing: {', '.join(absent)}" if absent else "present"
        remedy = f"{sys.executable} -m pip install {' '.join(absent)}" if absent else ""
        findings.append(Finding(f"extra {extra}", value, bool(absent), remedy))
    return findings


def packages_of_extras() -> dict[str, list[str]]:
    """Extra -> the packages that it installs, from the metadata of the installed project."""
    found: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("tempo-mlx") or []
    except metadata.PackageNotFoundError:
        return found
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", requirement)
        if name and extra and extra[1] != DEVELOPMENT:
            found.setdefault(extra[1], []).append(name[0])
    return found


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
