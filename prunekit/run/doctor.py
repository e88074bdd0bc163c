"""What a run will find on this machine: versions, devices, memory, disk, engines, extras, plug-ins.

Versions are read from what pip has left, so no package is imported to learn its own; torch is, for its devices, and
plug-ins are, for only an import tells which of them are broken. Nothing here stops at a fault: it is said, and the rest
goes on.
"""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from prunekit.errors import WrongInput, first_line
from prunekit.plugins.registry import EXPORTERS, KINDS, BrokenPlugin
from prunekit.recipe.presets import PRESETS, broken_presets
from prunekit.recipe.suite import SUITES

SPACES = "prunekit.spaces"  # group of entry points
OWN = "prunekit"
TIMED = 1024  # width of the linear map that is timed
SUMS = ("all", "dev")  # extras that are several others
UNITS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16", "i8mm", "sve")  # as Linux has them
PROGRAMS: Mapping[str, tuple[str, ...]] = {  # engines beside those of exporters -> what is on the path of a shell
    "llama.cpp programs": ("llama-cli", "llama-server", "llama-bench", "llama-quantize"),
}


@dataclass(frozen=True)
class Broken:
    """What cannot be used, and why."""

    kind: str  # of plug-in, or of presets
    name: str
    owner: str  # the package
    error: str  # one sentence


@dataclass(frozen=True)
class Engine:
    """A program that runs what is exported."""

    name: str
    found: str  # its version or place; "": it is not here
    formats: tuple[str, ...] = ()  # exporters whose files `prunekit verify` asks it about
    install: str = ""  # the command that installs it


@dataclass(frozen=True)
class Extra:
    """Optional dependencies of prunekit, by name."""

    name: str
    missing: tuple[str, ...]  # requirements that are not met
    install: str


@dataclass(frozen=True)
class Findings:
    """All that was found. Sizes are in bytes."""

    python: Mapping[str, str]
    packages: Mapping[str, str]  # name -> version: prunekit, what it requires, and packages with plug-ins
    plugins: Mapping[str, int]  # package -> how many plug-ins it has
    devices: tuple[Mapping[str, Any], ...]
    cpu: Mapping[str, Any]
    memory: Mapping[str, int]
    disk: tuple[Mapping[str, Any], ...]
    threads: Mapping[str, Any]
    engines: tuple[Engine, ...]
    extras: tuple[Extra, ...]
    needs: tuple[Broken, ...]  # plug-ins whose package is not installed
    broken: tuple[Broken, ...]
    problems: tuple[str, ...]  # other faults, a sentence each

    @property
    def sound(self) -> bool:
        """Whether nothing is broken. What is optional and not there does not count."""
        return not (self.broken or self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"sound": self.sound} | asdict(self)


def examine(folder: Path) -> Findings:
    """Look at everything.

    Args:
        folder: on whose disk results will be.
    """
    problems = [*_unmet()]
    with redirect_stdout(io.StringIO()):  # what others print as they are imported
        try:
            devices, cpu, threads, memory = _hardware()
        except (Exception, SystemExit) as error:  # a build of torch that does not fit this machine
            problems.append(f"torch cannot be imported ({type(error).__name__}: {first_line(error)}); install it anew")
            devices, cpu, threads, memory = (), {}, {}, {}
        broken, needs, counts = _plugins(importable=bool(cpu))
        engines = tuple(_engines(importable=bool(cpu)))
    return Findings(
        python={"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        packages=_versions(counts),
        plugins=counts,
        devices=devices,
        cpu=cpu,
        memory=memory,
        disk=tuple(_disk(folder)),
        threads=threads,
        engines=engines,
        extras=tuple(_extras()),
        needs=needs,
        broken=broken,
        problems=tuple(problems),
    )


# -- packages --------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    """As pip knows it; "": it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _requirements() -> dict[str, list[Requirement]]:
    """What prunekit requires on this machine, by extra; "" for what it always does. Extras of its own are opened."""
    every = [Requirement(text) for text in metadata.requires(OWN) or ()]
    extras = sorted({extra for each in every if (extra := _extra_of(each))})
    own = {
        extra: [each for each in every if _extra_of(each) == extra and _here(each, extra)] for extra in ("", *extras)
    }

    def opened(extra: str) -> Iterator[Requirement]:
        for each in own[extra]:
            if each.name == OWN:
                for inner in sorted(each.extras):
                    yield from opened(inner)
            else:
                yield each

    return {extra: list(opened(extra)) for extra in own}


def _extra_of(requirement: Requirement) -> str:
    found = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
    return found[1] if found else ""


def _here(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _fault(requirement: Requirement) -> str:
    """What is wrong with a requirement: "": it is met."""
    wanted = f"{requirement.name}{requirement.specifier}"
    version = _version(requirement.name)
    if not version:
        return wanted
    return "" if requirement.specifier.contains(version, prereleases=True) else f"{wanted}, not {version}"


def _unmet() -> Iterator[str]:
    for each in _requirements()[""]:
        if fault := _fault(each):
            yield f'prunekit needs {fault}; install it: pip install "{each.name}{each.specifier}"'


def _extras() -> Iterator[Extra]:
    for extra, wanted in _requirements().items():
        if extra and extra not in SUMS:
            missing = tuple(fault for each in wanted if (fault := _fault(each)))
            yield Extra(extra, missing, f'pip install "{OWN}[{extra}]"')


def _versions(owners: Iterable[str]) -> dict[str, str]:
    names = [OWN, *(each.name for each in _requirements()[""]), *owners]
    return {name: _version(name) for name in dict.fromkeys(names)}


# -- plug-ins --------------------------------------------------------------------------------------------


def _plugins(*, importable: bool) -> tuple[tuple[Broken, ...], tuple[Broken, ...], dict[str, int]]:
    """(what is broken, what needs a package that is not here, how many plug-ins every package has).

    Without torch none can be imported, and it is not their fault.
    """
    broken, needs, counts = list[Broken](), list[Broken](), dict[str, int]()
    for entry in (entry for registry in KINDS for entry in registry.values()):
        counts[entry.owner] = counts.get(entry.owner, 0) + 1
        try:
            if importable or entry.fault:
                entry.load()
        except BrokenPlugin as error:
            broken.append(Broken(entry.kind, entry.name, entry.owner, str(error)))
        except ImportError as error:
            needs.append(Broken(entry.kind, entry.name, entry.owner, str(error)))
    for group in (PRESETS, SPACES, SUITES):
        kind = group.removeprefix("prunekit.").removesuffix("s")
        broken += [Broken(kind, name, "", fault) for name, fault in broken_presets(group).items()]
    return tuple(broken), tuple(needs), counts


def _engines(*, importable: bool) -> Iterator[Engine]:
    """Those that exporters name, then programs that load what they write."""
    known = dict[str, list[str]]()
    if importable:
        from prunekit.export.formats import all_engines, check_installed

        known = all_engines()
    for name, formats in known.items():
        exporter: Any = EXPORTERS[formats[0]].load()
        modules = [*exporter.modules, *exporter.engine_modules] or [name]
        try:
            check_installed(exporter(), name, running=True)
        except WrongInput:
            found = ""
        else:
            there = {module: _version(module) or _version(_home(module)) or "elsewhere" for module in modules}
            found = ", ".join(f"{module} {version}" for module, version in there.items())
        variable = f", or name its Python in {exporter.engine_python}" if exporter.engine_python else ""
        yield Engine(name, found, tuple(formats), f'pip install "{exporter.install or name}"{variable}')
    for name, programs in PROGRAMS.items():
        yield Engine(name, ", ".join(found for program in programs if (found := shutil.which(program))))


def _home(module: str) -> str:
    """The package that has a module of another name; to find it, all that are installed are looked through."""
    return next(iter(metadata.packages_distributions().get(module, ())), module)


# -- the machine -----------------------------------------------------------------------------------------


def _hardware() -> tuple[tuple[Mapping[str, Any], ...], dict[str, Any], dict[str, Any], dict[str, int]]:
    """(accelerators, the processor, threads, memory)."""
    import torch

    from prunekit.models.opening import favoured_dtype
    from prunekit.system.memory import available

    devices = list[Mapping[str, Any]]()
    for index in range(torch.cuda.device_count()):
        what, place = torch.cuda.get_device_properties(index), torch.device("cuda", index)
        free = available(place)
        capability = f"{what.major}.{what.minor}"
        devices.append(
            {
                "device": str(place),
                "name": what.name,
                "capability": capability,
                "memory": what.total_memory,
                "free": free,
            }
        )
    dtype, ratio = favoured_dtype(TIMED, TIMED)
    cpu = {
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "matrix_units": _units(),
        "bfloat16_times_as_fast": round(ratio, 2),
        "dtype_auto": dtype,  # of a bfloat16 checkpoint
    }
    threads = {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return tuple(devices), cpu, threads, {"total": total, "free": available(torch.device("cpu"))}


def _cpuinfo(*keys: str) -> str:
    """The first value of one of the keys, as Linux has them."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^(?:{'|'.join(keys)})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _cpu_name() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _units() -> list[str]:
    flags = set(_cpuinfo("flags", "Features").split())
    return [unit for unit in UNITS if unit in flags]


def _disk(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Of the folder, and of the cache of models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, path in (("folder", folder), ("cache", Path(HF_HUB_CACHE))):
        there = path.resolve()
        while not there.exists():
            there = there.parent
        usage = shutil.disk_usage(there)
        yield {"what": what, "path": str(path.resolve()), "free": usage.free, "total": usage.total}
