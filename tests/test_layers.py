"""Who may import whom: a file may import the files above it in its package's list. A new file gets its place here."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SUPIR_MODEL = [
    "errors",
    "config",
    "folder",
    "zero_sft",
    "attention",
    "unet",
    "control",
    "vae_tiling",
    "vae",
    "text",
    "networks",
    "noise",
    "denoiser",
    "sampler",
    "prompts",
    "guidance",
    "color",
    "metrics",
    "caption",
    "llava",
    "checkpoint_keys",
    "weights",
    "lora",
    "loading",
    "placement",
    "first_stage",
    "memory",
    "float8",
    "compiled",
    "model",
    "convert",
    "training.degradations",
    "training.datasets",
    "training.recipe",
    "training.stages",
    "training.loop",
    "training.start",
    "training.__main__",
]
SUPIR_BATCH = [
    "alongside",
    "errors",
    "types",
    "identity",
    "columns",
    "bookkeeping",
    "store",
    "model_folder",
    "models",
    "settings",
    "manifest_file",
    "resolve",
    "manifest",
    "tiles",
    "runlog",
    "review",
    "captions",
    "parts",
    "plan",
    "levels",
    "jpeg2000",
    "tiff",
    "probe",
    "resample",
    "released",
    "color",
    "readers",
    "gate",
    "audit",
    "provenance",
    "premis",
    "signing",
    "metadata",
    "encode",
    "commit",
    "checksums",
    "regions",
    "decode",
    "engine",
    "captioner",
    "stitch",
    "write",
    "isolation",
    "stages",
    "metrics",
    "progress",
    "events",
    "pipeline",
    "pictures",
    "report.scores",
    "report.renditions",
    "report.details",
    "report.build",
    "report.serve",
    "lease",
    "driver",
    "inspect",
    "export",
    "iiif",
    "verify",
    "caption_list",
    "evaluate",
    "evaluation_report",
    "cli",
    "__main__",
    "demo",
]

# What only some files may know. Key: a package; value: the modules that may import it.
ONLY = {
    "fsspec": {"supir_batch.store"},
    "s3fs": set[str](),
    "ray": {"supir_batch.pipeline"},
    "pyexiv2": {"supir_batch.metadata"},
    "pillow_heif": {"supir_batch.readers"},
    "cv2": {"supir_batch.audit", "supir_batch.regions"},
    "pydantic": {
        "supir_batch.settings",
        "supir_batch.manifest_file",
        "supir_batch.manifest",
        "supir_batch.review",
        "supir_model.training.recipe",
    },
    "yaml": {"supir_batch.manifest_file", "supir_model.training.recipe"},
    "typer": {"supir_batch.cli"},
    "c2pa": {"supir_batch.signing"},
    "starlette": {"supir_batch.report.serve"},
    "uvicorn": {"supir_batch.report.serve"},
    "cryptography": {"supir_batch.signing"},
    "huggingface_hub": {"supir_batch.models"},
}
FORBIDDEN_IN_MODEL = {"supir_batch", "ray", "fsspec", "s3fs", "pyvips", "pyarrow", "tifffile"}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, for every module of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules("supir_model") | modules("supir_batch")


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, also inside functions and for type checking."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module for alias in node.names
            }
    return names


@pytest.mark.parametrize(("package", "order"), [("supir_model", SUPIR_MODEL), ("supir_batch", SUPIR_BATCH)])
def test_files_import_only_files_above_them(package: str, order: list[str]) -> None:
    place = {f"{package}.{name}": index for index, name in enumerate(order)}
    for module, path in modules(package).items():
        if path.name == "__init__.py":
            continue
        assert module in place, f"{module} has no place in this file's list"
        for imported in imports(path) & set(modules(package)):
            if MODULES[imported].name != "__init__.py":
                assert place[imported] < place[module], f"{module} imports {imported}, which is below it"


def test_every_name_in_the_lists_exists() -> None:
    listed = {f"supir_model.{name}" for name in SUPIR_MODEL} | {f"supir_batch.{name}" for name in SUPIR_BATCH}
    assert listed <= set(MODULES)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("supir_model")])
def test_the_model_knows_no_pipeline_and_no_storage(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not tops & FORBIDDEN_IN_MODEL
    if not module.startswith("supir_model.training"):
        assert "PIL" not in tops


@pytest.mark.parametrize("library", sorted(ONLY))
def test_libraries_stay_where_they_belong(library: str) -> None:
    users = {name for name, path in MODULES.items() if library in {i.split(".")[0] for i in imports(path)}}
    assert users <= ONLY[library]


def test_the_pipeline_reaches_torch_only_through_the_engine() -> None:
    for module, path in MODULES.items():
        if module.startswith("supir_batch"):
            named = imports(path)
            tops = {name.split(".")[0] for name in named}
            if module not in (
                "supir_batch.engine",
                "supir_batch.models",
                "supir_batch.captioner",
                "supir_batch.evaluate",
                "supir_batch.evaluation_report",
                "supir_batch.demo",
            ):  # models converts and checks weights; evaluate and demo degrade photographs as training does
                assert not tops & {"torch", "diffusers", "transformers"}, module
                assert not {n for n in named if n.startswith("supir_model")} - {
                    "supir_model.config",
                    "supir_model.errors",
                    "supir_model.folder",
                }, module


def test_the_command_line_starts_light() -> None:
    heavy = [
        "torch",
        "ray",
        "pyvips",
        "diffusers",
        "transformers",
        "pyarrow",
        "pyexiv2",
        "tifffile",
        "fsspec",
        "huggingface_hub",
    ]
    code = f"import sys, supir_batch.cli; print(*[name for name in {heavy!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == ""
