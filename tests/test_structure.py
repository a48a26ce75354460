"""The structure of the package: the direction of imports, and the sizes of files and functions."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flexmoba

ROOT = Path(__file__).parent.parent
PACKAGE = Path(flexmoba.__file__).parent
FILES = {
    ".".join(("flexmoba", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}

# Modules that a room keeps out of its `__init__.py`, since they import Triton.
KERNELS = {
    "flexmoba.backends.fused.kernel_parts",
    "flexmoba.cache.kernels",
    "flexmoba.cache.select_kernel",
    "flexmoba.gate.kernel",
    "flexmoba.gate.lists",
    "flexmoba.runtime.triton_launch",
}


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, at its top, lazily or for types alone."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = name in FILES and alias.name not in exports_of(str(node.module))
                found.add(name if is_module else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.add(ast.unparse(node.args[0]).strip("'"))
    return {name for name in found if name in FILES}


def exports_of(module: str) -> set[str]:
    """The names in a module's ``__all__``."""
    for node in TREES[module].body if module in TREES else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def room_of(module: str) -> str:
    """The folder or file of the package that holds a module; the package itself is "flexmoba"."""
    return module.split(".")[1] if "." in module else module


def table() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md: each room, and the rooms that it may import."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {
        room.removesuffix("/").removesuffix(".py"): set(re.findall(r"`(\w+)`", allowed))
        for room, allowed in rows
    }


def test_the_table_names_every_room():
    rooms = {room_of(module) for module in FILES}
    assert set(table()) == rooms


@pytest.mark.parametrize("module", FILES)
def test_imports_go_where_the_table_says(module):
    room = room_of(module)
    arrows = {room_of(name) for name in imports_of(module)} - {room}
    assert arrows <= table()[room], f"{module} imports {arrows - table()[room]}"


def test_the_table_has_no_arrow_that_is_not_used():
    used = {(room_of(module), room_of(name)) for module in FILES for name in imports_of(module)}
    assert {(room, other) for room, others in table().items() for other in others} <= used


def test_rooms_and_modules_are_not_in_a_circle():
    # A package's `__init__` stands for its room: inside, modules import one another directly.
    modules = {module: imports_of(module) for module in FILES}
    for graph in (table(), modules):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"circle: {error.args[1]}")


@pytest.mark.parametrize("module", FILES)
def test_a_room_is_entered_by_its_door(module):
    room = room_of(module)
    for name in imports_of(module) - KERNELS:
        if room_of(name) != room:
            is_door = FILES[name].name == "__init__.py" or name.count(".") == 1
            assert is_door, f"{module} imports {name}; import it from its package"


@pytest.mark.parametrize("package", ["flexmoba", "flexmoba.nsa"])
def test_the_oracles_share_no_code(package):
    oracle = f"{package}.reference"
    assert not imports_of(oracle)
    assert {m for m in FILES if oracle in imports_of(m)} == {package}


# ---- Sizes --------------------------------------------------------------------------------------

MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION, MOST_PARAMETERS = 400, 80, 8

# Files and functions that are larger, and why.
LARGE_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "flexmoba.backends.fused.backward.attend_backward_on_cuda": "launches one after the other",
}
COMPILED = "a compiled function, whose tensors and constants `run_compiled` tells apart"
OPERATOR = "an operator, whose schema has no tuples"
MANY_PARAMETERS = {
    "flexmoba.attention.flex_moba": "public",
    "flexmoba.attention.selected_attention": "public",
    "flexmoba.backends.flex.masked._attend_over_mask": COMPILED,
    "flexmoba.backends.flex.masked._attend_over_tile_gate_mask": COMPILED,
    "flexmoba.backends.flex.masked._attend_fully": COMPILED,
    "flexmoba.backends.flex.masked._attend_within_windows": COMPILED,
    "flexmoba.backends.flex.masked._attend_within_ranges": COMPILED,
    "flexmoba.backends.flex.routed._attend_routed_tiles": COMPILED,
    "flexmoba.backends.dense.operator._differentiate_here": OPERATOR,
    "flexmoba.backends.fused.operator._differentiate_here": OPERATOR,
    "flexmoba.backends.grouped.operator._differentiate_here": OPERATOR,
    "flexmoba.backends.routing._tables": OPERATOR,
    "flexmoba.cache.moba_cache.MobaCache.__init__": "public",
    "flexmoba.cache.moba_cache.MobaCache.attend": "public",
    "flexmoba.distributed.cache.ShardedMobaCache.__init__": "public",
    "flexmoba.distributed.cache.ShardedMobaCache.attend": "public",
    "flexmoba.distributed.context_parallel.context_parallel_moba": "public",
    "flexmoba.gate.select._select_here": OPERATOR,
    "flexmoba.gate.select.moba_select": "public",
    "flexmoba.integrations.transformers.attention.attention": "called by transformers",
    "flexmoba.integrations.transformers.masks.padding_mask": "called by transformers",
    "flexmoba.integrations.vllm.backend.MobaImpl.__init__": "called by vLLM",
    "flexmoba.integrations.vllm.backend.MobaImpl.forward": "called by vLLM",
    "flexmoba.local.attend_on_one_device": "the arguments of flex_moba",
    "flexmoba.nn.attention.MobaAttention.__init__": "public",
    "flexmoba.nn.nsa_attention.NsaAttention.__init__": "public",
    "flexmoba.nsa.attention.flex_nsa": "public",
    "flexmoba.nsa.select._select_here": OPERATOR,
    "flexmoba.nsa.cache.NsaCache.__init__": "public",
    "flexmoba.nsa.reference.nsa_reference": "public",
    "flexmoba.nsa.select.nsa_select": "public",
    "flexmoba.reference.moba_reference": "public",
    "flexmoba.reference.reference_attention": "the oracle shares no types with the rest",
    "flexmoba.reference.reference_selection": "the oracle shares no types with the rest",
    "flexmoba.window.window_attention": "public",
    "flexmoba.tune.measure.reports": "those of tune",
    "flexmoba.tune.measure.tune": "public",
    "flexmoba.tune.quality.gate_quality": "public",
    "flexmoba.tune.calls._Recorder.flex": "the signature of flex_attention",
    "flexmoba.tune.calls._Recorder.sdpa": "the signature of scaled_dot_product_attention",
}


def functions_of(tree: ast.Module, prefix: str = ""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 0 if not body else function.end_lineno - body[0].lineno + 1


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    return len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])


def is_kernel_or_operator(function: ast.FunctionDef) -> bool:
    marks = (
        "kernel",
        "triton.jit",
        "gluon.jit",
        "custom_op",
        "register_fake",
        "register_flop_formula",
    )
    return any(mark in ast.unparse(x) for x in function.decorator_list for mark in marks)


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MOST_LINES_OF_FILE or module in LARGE_FILES, f"{module} has {lines} lines"
    for name, function in functions_of(TREES[module]):
        if is_kernel_or_operator(function):
            continue
        lines = body_lines(function)
        if f"{module}.{name}" not in LONG_FUNCTIONS:
            assert lines <= MOST_LINES_OF_FUNCTION, f"{module}.{name} has {lines} lines"
        count = parameters(function)
        if f"{module}.{name}" not in MANY_PARAMETERS:
            assert count <= MOST_PARAMETERS, f"{module}.{name} has {count} parameters"


def test_every_exception_is_needed():
    found = {f"{module}.{name}": x for module in FILES for name, x in functions_of(TREES[module])}
    for name in LONG_FUNCTIONS:
        assert body_lines(found[name]) > MOST_LINES_OF_FUNCTION, name
    for name in MANY_PARAMETERS:
        assert parameters(found[name]) > MOST_PARAMETERS, name
    for module in LARGE_FILES:
        assert len(FILES[module].read_text().splitlines()) > MOST_LINES_OF_FILE, module
