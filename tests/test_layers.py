"""The direction of the imports: a package of helpers/ imports only packages below it."""

import ast
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent.parent / "helpers"
LAYERS = {
    "console": -3, "heartbeat": -3, "libraries": -3, "launch": -2, "processes": -1, "sizes": -1, "files": -1, "config": 0,
    "images": 1, "captions": 1, "diffusion": 1, "models": 2, "caching": 3, "data": 4, "training": 5, "validation": 6,
    "planning": 7, "inference": 7, "pictures": 8, "check": 8, "publishing": 8, "trainer": 9, "replay": 10,
}  # fmt: skip
# What a leaf must do without, so that it stays light and free of options.
FORBIDDEN = {"images": {"torch", "diffusers", "transformers"}, "config": {"torch", "diffusers", "transformers"}}


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return modules


@pytest.mark.parametrize("path", sorted(HELPERS.rglob("*.py")), ids=lambda path: str(path.relative_to(HELPERS)))
def test_imports_only_lower_layers(path):
    own = path.relative_to(HELPERS).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imported(path):
        parts = module.split(".")
        assert parts[0] not in FORBIDDEN.get(own, set()), f"{own} must not import {module}"
        if parts[0] == "helpers" and len(parts) > 1 and parts[1] != own:
            assert LAYERS[parts[1]] < LAYERS[own], f"{own} imports {module}, which is not below it"


def test_only_the_lower_layers_know_families_by_name():
    for path in HELPERS.rglob("*.py"):
        if LAYERS.get(path.relative_to(HELPERS).parts[0], 0) > LAYERS["models"]:
            assert not {"helpers.models.families", "helpers.config.families"} & imported(path), path
