"""A room imports from lower floors alone, and no circle exists.

The floors are those of docs/architecture.md. The rules are read from the imports, wherever in a file they stand. A
package's `__init__` is exempt, since it only lists names. The checks are themselves checked, on small trees that break
one rule each.
"""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_ROOMS, MAX_FLOORS = 16, 8


def read_floors(page: Path) -> dict[str, int]:
    """Room -> floor, from the table of architecture.md."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`([\w.]+)`", rooms)}


FLOORS = read_floors(ROOT / "docs" / "architecture.md")
PUBLIC_API = "hi_diffusers.engine"  # `from hi_diffusers import ...` reaches it
PACKAGES = ("taylor_utils", "cache_functions", "forecasting", "hi_diffusers")
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
        # the version is the package's own, and no way to its API
        full_names = [f"{package}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        targets = {name if name in modules else package for name in full_names}
        return [Import(importer, target, node.lineno) for target in sorted(targets)]
    found = []
    for child in ast.iter_child_nodes(node):
        found += _imports_below(child, importer, modules)
    return found


def room_of(module: str) -> str | None:
    """The room that a module lies in, None for a file that has none and for everybody else's modules."""
    if module == "hi_diffusers":
        return PUBLIC_API
    return next((room for room in FLOORS if module == room or module.startswith(room + ".")), None)


def find_wrong_imports(root: Path) -> list[str]:
    """Imports of a higher floor, of a neighbour, or of what only uses the packages; one sentence each."""
    faults = []
    for each in read_imports(root):
        here, there = room_of(each.importer), room_of(each.target)
        if each.target.partition(".")[0] in NEVER_IMPORTED and (each.importer, each.target) not in IF_PRESENT:
            faults.append(f"{each.importer}:{each.line} imports {each.target}, which is not part of the packages")
        elif here is not None and there is not None and here != there and FLOORS[there] >= FLOORS[here]:
            faults.append(f"{each.importer}:{each.line} ({FLOORS[here]}) imports {each.target} ({FLOORS[there]})")
    return faults


def find_files_without_room(root: Path) -> list[str]:
    """Files that no row of the table covers."""
    return [name for name in find_modules(root) if name != "hi_diffusers" and room_of(name) is None]


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


def test_every_file_has_a_room() -> None:
    assert find_files_without_room(ROOT) == []
    assert "taylor_utils.combine" in find_modules(ROOT), "the tree was not found, so nothing was checked"


def test_no_file_imports_from_a_higher_floor_or_a_neighbour() -> None:
    assert find_wrong_imports(ROOT) == []


def test_the_house_stays_small() -> None:
    ours = {room: floor for room, floor in FLOORS.items() if room.startswith("hi_diffusers.")}
    assert len(ours) <= MAX_ROOMS and len(set(ours.values())) <= MAX_FLOORS
    missing = [room for room in FLOORS if not any(ROOT.glob(room.replace(".", "/") + suffix) for suffix in ("", ".py"))]
    assert missing == [], "the table names rooms that are not there"


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


def test_an_import_from_a_lower_floor_or_the_same_room_is_allowed(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "taylor_utils/combine.py": "import torch\n",
            "cache_functions/feature.py": "from taylor_utils import combine\n",
            "hi_diffusers/engine/generation.py": "import cache_functions.feature\nfrom ..families.toy import image\n",
            "hi_diffusers/families/toy/image.py": "from .blocks import x\n",
            "hi_diffusers/families/toy/blocks.py": "import cache_functions\n",
            "inference.py": "from hi_diffusers import generate\nimport training_log\n",
        },
    )
    assert find_wrong_imports(tree) == []
    assert find_files_without_room(tree) == []
    assert find_circle(tree) == []


def test_an_upward_or_sideways_import_is_seen_in_every_form(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "taylor_utils/a.py": "import cache_functions.state\n",
            "cache_functions/state.py": "\ndef f():\n    from hi_diffusers.weights import nf4\n",
            "hi_diffusers/weights/nf4.py": "from ..request import options\n",
            "hi_diffusers/request/options.py": "from hi_diffusers import generate\n",
            "hi_diffusers/engine/generation.py": "if TYPE_CHECKING:\n    import inference\n",
            "hi_diffusers/pictures/metrics.py": "from hi_diffusers import SamplingOptions\n",
            "inference.py": "",
        },
    )
    assert sorted(find_wrong_imports(tree)) == [
        "cache_functions.state:3 (1) imports hi_diffusers.weights.nf4 (4)",
        "hi_diffusers.engine.generation:2 (7) imports inference (11)",
        "hi_diffusers.pictures.metrics:1 (3) imports hi_diffusers (7)",
        "hi_diffusers.request.options:1 (4) imports hi_diffusers (7)",
        "hi_diffusers.weights.nf4:1 (4) imports hi_diffusers.request.options (4)",
        "taylor_utils.a:1 (0) imports cache_functions.state (1)",
    ]


def test_an_import_of_training_or_benchmarks_is_seen(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "hi_diffusers/pictures/metrics.py": "import training.scenes\n",
            "inference.py": "from benchmarks import speed\n",
        },
    )
    assert len(find_wrong_imports(tree)) == 2


def test_a_package_init_is_exempt(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"taylor_utils/combine.py": "from taylor_utils import basis_weights\n"})
    (tree / "taylor_utils/__init__.py").write_text("from taylor_utils import combine\nimport inference\n")
    assert find_wrong_imports(tree) == []
    assert find_circle(tree) == []


def test_a_file_without_a_room_is_seen(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"hi_diffusers/helpers.py": "", "scratch.py": "", "compare.py": ""})
    assert sorted(find_files_without_room(tree)) == ["hi_diffusers.helpers", "scratch"]


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
    tree = make_tree(tmp_path, {"cache_functions/a.py": source, "hi_diffusers/pictures/metrics.py": "import numpy\n"})
    assert find_other_dependencies(tree) == ["cache_functions.a:6 imports numpy"]


def test_a_blocked_package_stops_the_import(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"taylor_utils/bases/a.py": "import numpy.linalg\n"})
    assert import_all_without(("PIL",), ("taylor_utils",), tree).returncode == 0
    assert "numpy is blocked" in import_all_without(("numpy",), ("taylor_utils",), tree).stderr
