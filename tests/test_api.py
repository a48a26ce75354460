"""The public API, and the libraries that the package imports."""

import ast
import inspect
import sys
import typing
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

import flexmoba
from flexmoba.backends import ImplName
from flexmoba.checks import GateName

PACKAGE = Path(flexmoba.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
}

SIGNATURES = {
    "flex_moba": (
        "(q, k, v, block_size, topk, *, is_causal=True, scale=None, score_mod=None, gate='token', "
        "gate_block_size=None, sink_blocks=0, local_blocks=0, impl='auto', kernel_options=None, "
        "return_aux=None, cache=None, cu_seqlens=None, document_ids=None, key_padding_mask=None, "
        "max_seqlen=None)"
    ),
    "MobaCache": (
        "(batch, kv_heads, head_dim, *, block_size, gate_block_size=None, value_dim=None, "
        "max_len=None, dtype=torch.float32, device=None)"
    ),
    "moba_select": (
        "(q, k, block_size, topk, *, is_causal=True, gate='token', gate_block_size=None, "
        "sink_blocks=0, local_blocks=0, cu_seqlens=None, document_ids=None, key_padding_mask=None)"
    ),
    "selected_attention": (
        "(q, k, v, selection, block_size, *, is_causal=True, scale=None, score_mod=None, "
        "impl='auto', kernel_options=None, return_aux=None, cu_seqlens=None, document_ids=None, "
        "key_padding_mask=None)"
    ),
    "window_attention": (
        "(q, k, v, window, *, scale=None, impl='auto', return_aux=None, cu_seqlens=None, "
        "document_ids=None, key_padding_mask=None)"
    ),
    "moba_block_mask": "(q, k, block_size, topk, *, is_causal=True)",
    "moba_reference": (
        "(q, k, v, block_size, topk, *, is_causal=True, scale=None, score_mod=None, gate='token', "
        "gate_block_size=None, sink_blocks=0, local_blocks=0, cu_seqlens=None, document_ids=None, "
        "key_padding_mask=None)"
    ),
}


def imports_of(module: str) -> set[str]:
    """Returns the dotted names of all imports of a module, also of imports for types only."""
    names = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_public_names():
    assert sorted(flexmoba.__all__) == sorted(SIGNATURES)
    assert isinstance(flexmoba.__version__, str)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(flexmoba, name))
    unannotated = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(unannotated)) == SIGNATURES[name]
    annotations = [p.annotation for p in signature.parameters.values()]
    assert inspect.Parameter.empty not in [*annotations, signature.return_annotation]


@pytest.mark.parametrize("name", SIGNATURES)
def test_choices_by_name_are_literal_types(name):
    parameters = inspect.signature(getattr(flexmoba, name)).parameters
    for parameter, names in (("gate", GateName), ("impl", ImplName)):
        if parameter in parameters:
            assert parameters[parameter].annotation == names


@pytest.mark.parametrize("name", ["flex_moba", "selected_attention"])
def test_overloads_take_what_the_function_takes(name):
    function = getattr(flexmoba, name)
    parameters = inspect.signature(function).parameters
    without, with_aux = map(inspect.signature, typing.get_overloads(function))
    assert without.return_annotation is Tensor
    assert with_aux.return_annotation == tuple[Tensor, AuxOutput]
    assert without.parameters["return_aux"].default is None
    assert with_aux.parameters["return_aux"].default is inspect.Parameter.empty
    for overload in (without, with_aux):
        aux = {"return_aux": parameters["return_aux"]}
        assert list((overload.parameters | aux).values()) == list(parameters.values())


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstring_has_shapes_an_example_and_the_paper(name):
    text = inspect.getdoc(getattr(flexmoba, name))
    assert "``(B, Hq, Lq, D)``" in text
    assert "``(B, Hkv, Lk, D)``" in text or name == "MobaCache"  # the cache holds them
    assert ">>> " in text
    assert f"import {name}" in text
    paper = "2502.11089" if name == "window_attention" else "2502.13189"
    assert paper in text


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_only_flex_calls_flex_attention():
    prefix = "torch.nn.attention.flex_attention."
    types = {"AuxOutput", "AuxRequest", "BlockMask", "FlexKernelOptions"}
    users = {
        module: {name.removeprefix(prefix) for name in imports_of(module) if prefix in name}
        for module in MODULES
    }
    assert "flex_attention" in users["backends.flex.compiled"]
    masks = {"block_mask", "integrations.transformers.local", "plot"}
    for module, names in users.items():
        if module != "backends.flex.compiled":
            assert names <= types, module
        if not module.startswith("backends.flex.") and module not in masks:
            assert "BlockMask" not in names, module


def test_block_masks_are_not_made_by_evaluating_them():
    # `create_block_mask` evaluates the mask for every query-key pair.
    for module, tree in MODULES.items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "create_block_mask" not in names | imports_of(module), module


def test_runtime_dependencies():
    allowed = {"torch", "einops", "triton", "flexmoba"}  # torch for CUDA includes triton
    # Optional libraries, which functions import when they need them.
    extras = {room: {"matplotlib"} for room in ("bench", "plot", "reporting")}
    for module, tree in MODULES.items():
        roots = {name.split(".")[0] for name in imports_of(module)}
        more = extras.get(module.split(".")[0], set())
        if module.startswith("integrations."):  # each integration may import its library
            more = {module.split(".")[1]} - {"__init__"}
        assert roots - sys.stdlib_module_names <= allowed | more, module
        at_once = ast.unparse([x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))])
        assert "matplotlib" not in at_once, module
