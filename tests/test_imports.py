"""Imports point one way, and the light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import turnfast.kernels

import turnfast

PACKAGE = Path(turnfast.__file__).parent
KERNELS = Path(turnfast.kernels.__file__).parent

# A package imports only packages of the lines above its own.
LEVELS = (
    ("errors", "types", "recipes"),
    ("config", "kernels", "metrics", "parallel"),
    ("tools",),
    ("chat", "credit", "envs", "packing"),
    ("model",),
    ("rundir", "sampler", "update"),
    ("report", "rollout"),
    ("doctor",),
    ("run",),
    ("evaluate", "sft"),
    ("train",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def files_by_package() -> dict[str, list[Path]]:
    """The Python files of each package; a module beside the packages counts as one."""
    found: dict[str, list[Path]] = {"kernels": sorted(KERNELS.rglob("*.py"))}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imported_packages(path: Path, package: str) -> set[str]:
    """Packages of turnfast that a file imports anywhere, also inside functions."""
    base, root = (KERNELS, "turnfast.kernels") if package == "kernels" else (PACKAGE, "turnfast")
    here = (*root.split("."), *path.relative_to(base).parent.parts)
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            modules |= {f"{module}.{alias.name}" for alias in node.names}
    parts = [module.split(".") for module in modules if module.startswith("turnfast.")]
    return {part[1] for part in parts if part[1] in LEVEL} - {package}


def test_every_package_has_a_level() -> None:
    assert set(files_by_package()) == set(LEVEL)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(path.parents[2])} imports {other}"
        for package, paths in files_by_package().items()
        for path in paths
        for other in imported_packages(path, package)
        if LEVEL[other] >= LEVEL[package]
    ]
    assert not wrong


def test_light_imports_load_no_torch() -> None:
    code = (
        "import sys; import turnfast.cli, turnfast.config.recipe, turnfast.types, turnfast.credit;"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
