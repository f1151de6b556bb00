"""A file imports from its own layer or lower ones, and no circle exists.

The rules are read from the imports, wherever in a file they stand. A package's `__init__` is exempt, since it
only lists names. The checks are themselves checked, on small trees that break one rule each.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A package stands for all files in it.
LAYERS = (
    ("taylor_utils",),
    ("cache_functions",),
    ("hi_diffusers.models",),
    (
        "hi_diffusers.presets",
        "hi_diffusers.identity",
        "hi_diffusers.hub",
        "hi_diffusers.published",
        "hi_diffusers.model_files",
        "hi_diffusers.weight_files",
        "hi_diffusers.loading",
        "hi_diffusers.memory",
        "hi_diffusers.placement",
        "hi_diffusers.options",
        "hi_diffusers.embeds",
        "hi_diffusers.metadata",
        "hi_diffusers.metrics",
        "hi_diffusers.pipelines",
        "hi_diffusers.schedulers",
        "hi_diffusers.console",
        "hi_diffusers.safety",
        "hi_diffusers.sheet",
    ),
    ("hi_diffusers.generation", "hi_diffusers.session"),
    ("hi_diffusers.runs", "hi_diffusers.calibrating", "hi_diffusers.demo"),
    ("inference", "sampling", "gradio_demo", "calibrate", "compare"),
)
PUBLIC_API = 4  # `from hi_diffusers import ...` reaches generation
PACKAGES = ("taylor_utils", "cache_functions", "hi_diffusers")
NEVER_IMPORTED = ("training", "benchmarks", "tests")
IF_PRESENT = (  # in a clone, where scores of the bundled model's pictures can be had
    ("hi_diffusers.runs.scores", "training.checker"),
    ("hi_diffusers.runs.scores", "training.scenes"),
)
TORCH_ONLY = ("taylor_utils", "cache_functions")
NOT_NEEDED = ("diffusers", "transformers", "numpy", "safetensors", "huggingface_hub", "PIL")

IMPORT_ALL_WITHOUT = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
for name in {packages!r}:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
"""


@dataclass(frozen=True)
class Import:
    """One import: who, of what, in which line."""

    importer: str
    target: str
    line: int


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for the packages and the scripts beside them."""
    files = [*root.glob("*.py"), *(file for package in PACKAGES for file in (root / package).rglob("*.py"))]
    names = {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def read_imports(root: Path) -> list[Import]:
    """Every import of every file but the `__init__` files."""
    modules = find_modules(root)
    found = []
    for name, file in modules.items():
        if file.name != "__init__.py":
            found += _imports_below(ast.parse(file.read_text(encoding="utf-8")), name, modules)
    return found


def _imports_below(node: ast.AST, importer: str, modules: dict[str, Path]) -> list[Import]:
    if isinstance(node, ast.Import):
        return [Import(importer, alias.name, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            base = importer.split(".")[: -node.level] + base
        package = ".".join(base)
        full_names = [f"{package}.{alias.name}" for alias in node.names]
        targets = {name if name in modules else package for name in full_names}
        return [Import(importer, target, node.lineno) for target in sorted(targets)]
    found = []
    for child in ast.iter_child_nodes(node):
        found += _imports_below(child, importer, modules)
    return found


def layer_of(module: str) -> int | None:
    """The layer's number, None for a file that has none and for everybody else's modules."""
    if module == "hi_diffusers":
        return PUBLIC_API
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def find_upward_imports(root: Path) -> list[str]:
    """Imports of a higher layer, or of what only uses the packages; one sentence each."""
    faults = []
    for each in read_imports(root):
        here, there = layer_of(each.importer), layer_of(each.target)
        if each.target.partition(".")[0] in NEVER_IMPORTED and (each.importer, each.target) not in IF_PRESENT:
            faults.append(f"{each.importer}:{each.line} imports {each.target}, which is not part of the packages")
        elif here is not None and there is not None and there > here:
            faults.append(f"{each.importer}:{each.line} (L{here}) imports {each.target} (L{there})")
    return faults


def find_files_without_layer(root: Path) -> list[str]:
    """Files that no row of LAYERS covers."""
    return [name for name in find_modules(root) if layer_of(name) is None]


def find_circle(root: Path) -> list[str]:
    """The files of one circle of imports, wherever in a file they stand; empty if there is none."""
    modules = find_modules(root)
    graph: dict[str, set[str]] = {}
    for each in read_imports(root):
        if each.target in modules and modules[each.target].name != "__init__.py":
            graph.setdefault(each.importer, set()).add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def find_other_dependencies(root: Path) -> list[str]:
    """Imports in the two lowest layers of anything but torch and the standard library."""
    allowed = {"torch", *TORCH_ONLY, *sys.stdlib_module_names}
    return [
        f"{each.importer}:{each.line} imports {each.target}"
        for each in read_imports(root)
        if each.importer.startswith(TORCH_ONLY) and each.target.partition(".")[0] not in allowed
    ]


def import_all_without(
    blocked: tuple[str, ...], packages: tuple[str, ...], root: Path
) -> subprocess.CompletedProcess[str]:
    """Import every file of the packages in a fresh process where the blocked packages cannot be found."""
    program = IMPORT_ALL_WITHOUT.format(blocked=blocked, packages=packages)
    return subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)


# The tree as it is.


def test_every_file_has_a_layer() -> None:
    assert find_files_without_layer(ROOT) == []
    assert "taylor_utils.combine" in find_modules(ROOT), "the tree was not found, so nothing was checked"


def test_no_file_imports_from_a_higher_layer() -> None:
    assert find_upward_imports(ROOT) == []


def test_no_circle_of_imports_exists() -> None:
    assert find_circle(ROOT) == []


def test_the_two_lowest_layers_name_only_torch_and_the_standard_library() -> None:
    assert find_other_dependencies(ROOT) == []


def test_the_two_lowest_layers_load_with_nothing_but_torch_installed() -> None:
    result = import_all_without(NOT_NEEDED, TORCH_ONLY, ROOT)
    assert result.returncode == 0, result.stderr


# The checks see what they are for.


def make_tree(root: Path, files: dict[str, str]) -> Path:
    """Write source files, with an empty `__init__` in every package."""
    for name, source in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
        file.write_text(source, encoding="utf-8")
    return root


def test_an_import_from_a_lower_layer_is_allowed(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "taylor_utils/combine.py": "import torch\n",
            "cache_functions/feature.py": "from taylor_utils import combine\n",
            "hi_diffusers/generation.py": "import cache_functions.feature\nfrom .pipelines import image\n",
            "hi_diffusers/pipelines/image.py": "from ..models.blocks import x\n",
            "hi_diffusers/models/blocks.py": "import cache_functions\n",
            "inference.py": "from hi_diffusers import generate\nimport training_log\n",
        },
    )
    assert find_upward_imports(tree) == []
    assert find_files_without_layer(tree) == []
    assert find_circle(tree) == []


def test_an_upward_import_is_seen_in_every_form(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "taylor_utils/a.py": "import cache_functions.state\n",
            "cache_functions/state.py": "\ndef f():\n    from hi_diffusers.models import blocks\n",
            "hi_diffusers/models/blocks.py": "from .. import options\n",
            "hi_diffusers/options.py": "from hi_diffusers import generate\n",
            "hi_diffusers/generation.py": "if TYPE_CHECKING:\n    import inference\n",
            "hi_diffusers/metrics.py": "from hi_diffusers import SamplingOptions\n",
            "inference.py": "",
        },
    )
    assert sorted(find_upward_imports(tree)) == [
        "cache_functions.state:3 (L1) imports hi_diffusers.models.blocks (L2)",
        "hi_diffusers.generation:2 (L4) imports inference (L6)",
        "hi_diffusers.metrics:1 (L3) imports hi_diffusers (L4)",
        "hi_diffusers.models.blocks:1 (L2) imports hi_diffusers.options (L3)",
        "hi_diffusers.options:1 (L3) imports hi_diffusers (L4)",
        "taylor_utils.a:1 (L0) imports cache_functions.state (L1)",
    ]


def test_an_import_of_training_or_benchmarks_is_seen(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "hi_diffusers/metrics.py": "import training.scenes\n",
            "inference.py": "from benchmarks import speed\n",
        },
    )
    assert len(find_upward_imports(tree)) == 2


def test_a_package_init_is_exempt(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"taylor_utils/combine.py": "from taylor_utils import basis_weights\n"})
    (tree / "taylor_utils/__init__.py").write_text("from taylor_utils import combine\nimport inference\n")
    assert find_upward_imports(tree) == []
    assert find_circle(tree) == []


def test_a_file_without_a_layer_is_seen(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"hi_diffusers/helpers.py": "", "scratch.py": "", "compare.py": ""})
    assert sorted(find_files_without_layer(tree)) == ["hi_diffusers.helpers", "scratch"]


def test_a_circle_is_seen_also_where_a_function_delays_it(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "cache_functions/a.py": "from cache_functions.b import x\n",
            "cache_functions/b.py": "try:\n    from .c import x\nexcept ImportError:\n    pass\n",
            "cache_functions/c.py": "import cache_functions.a\n",
        },
    )
    assert set(find_circle(tree)) == {"cache_functions.a", "cache_functions.b", "cache_functions.c"}
    (tree / "cache_functions/c.py").write_text("def f():\n    import cache_functions.a\n")
    assert set(find_circle(tree)) == {"cache_functions.a", "cache_functions.b", "cache_functions.c"}
    (tree / "cache_functions/c.py").write_text("import torch\n")
    assert find_circle(tree) == []


def test_another_dependency_of_the_lowest_layers_is_seen(tmp_path: Path) -> None:
    source = "import json\nimport torch.nn\nimport taylor_utils\n\ndef f():\n    import numpy as np\n"
    tree = make_tree(tmp_path, {"cache_functions/a.py": source, "hi_diffusers/metrics.py": "import numpy\n"})
    assert find_other_dependencies(tree) == ["cache_functions.a:6 imports numpy"]


def test_a_blocked_package_stops_the_import(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"taylor_utils/bases/a.py": "import numpy.linalg\n"})
    assert import_all_without(("PIL",), ("taylor_utils",), tree).returncode == 0
    assert "numpy is blocked" in import_all_without(("numpy",), ("taylor_utils",), tree).stderr
