"""Options for every argument of every stage, read from the source without importing Keras.

`keras-fpn train --help` must not wait for TensorFlow, so the constructors' signatures and docs are
read with `ast`. A test holds them equal to `inspect.signature`.
"""

import ast
import dataclasses
import functools
import inspect
import math
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import docstring_parser
import tyro

# Arguments of the builder that follow from the data or from the recipe's seed.
FROM_DATA = ("num_classes", "class_names", "image_shape", "bounding_box_format", "seed", "name")
_PACKAGE = Path(__file__).parents[1]
_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


class Argument(NamedTuple):
    """An argument of a constructor or of the builder.

    Attributes:
        type: its type on the command line; a sequence is a tuple of any length.
        default: default value; `inspect.Parameter.empty` if it is required.
        doc: its entry in the docstring's "Args:", without the default.
    """

    type: Any
    default: Any
    doc: str


def stage_classes() -> dict[str, str]:
    """Returns stage name to class name, as in `keras_fpn.builder.STAGES`."""
    _, stages = _find("builder", "STAGES")
    return {key.value: cls.id for key, cls in zip(stages.keys, stages.values, strict=True)}


@functools.cache
def read_arguments(module: str, name: str) -> dict[str, Argument]:
    """Returns the arguments of a function, or of the constructor of a class.

    Args:
        module: module of the package that defines or imports it, such as "builder".
        name: name of the function or class.
    """
    module, node = _find(module, name)
    params = docstring_parser.parse(ast.get_docstring(node)).params
    docs = {param.arg_name: " ".join(param.description.split()) for param in params}
    if isinstance(node, ast.ClassDef):
        node = next(x for x in node.body if getattr(x, "name", None) == "__init__")
    names = [*node.args.args, *node.args.kwonlyargs]
    required = len(node.args.args) - len(node.args.defaults)
    defaults = [*[None] * required, *node.args.defaults, *node.args.kw_defaults]
    return {
        name.arg: Argument(
            type=_type(name.annotation),
            default=inspect.Parameter.empty if default is None else _value(module, default),
            # The help shows the default beside the doc.
            doc=re.sub(r" ?Defaults to [^\s,]+\.(?= |$)", "", docs.get(name.arg, "")),
        )
        for name, default in zip(names, defaults, strict=True)
        if name.arg != "self"
    }


def everyday_aliases() -> dict[str, str]:
    """Returns the builder's arguments that are a stage's, with the stage's dotted names.

    They are documented as in "`sizes` of `AnchorGenerator`."; here, `anchor_sizes` is the alias of
    `anchors.sizes`.
    """
    stages = {class_name: stage for stage, class_name in stage_classes().items()}
    aliases = {}
    for name, argument in read_arguments("builder", "build_fpn_faster_rcnn").items():
        alias = re.fullmatch(r"`(\w+)` of `(\w+)`\.", argument.doc)
        if alias:
            aliases[name] = f"{stages[alias[2]]}.{alias[1]}"
    return aliases


def model_arguments() -> dict[str, Argument]:
    """Returns the arguments of the model that are options, those of stages with dotted names."""
    stages = stage_classes()
    derived = {*_value(*_find("builder", "DERIVED")), "bounding_box_format", "seed"}
    of_stages = {
        f"{stage}.{name}": argument
        for stage, class_name in stages.items()
        for name, argument in read_arguments("builder", class_name).items()
        if name not in derived
    }
    aliases = everyday_aliases()
    everyday = {
        name: of_stages[aliases[name]] if name in aliases else argument
        for name, argument in read_arguments("builder", "build_fpn_faster_rcnn").items()
        if name not in stages and name not in FROM_DATA
    }
    return everyday | of_stages


def model_options(model: Mapping[str, Any]) -> tuple[type, type]:
    """Makes the dataclasses that tyro turns into options.

    Args:
        model: arguments of the recipe, which are shown in place of the defaults.

    Returns:
        One dataclass with a field for each everyday argument of the builder, and one with a nested
        dataclass for each stage.
    """
    recipe = dict(flatten(model))
    fields = {}
    for name, argument in model_arguments().items():
        stage, _, last = name.rpartition(".")
        shown = recipe.get(name, argument.default)
        shown = " ".join(map(str, shown)) if isinstance(shown, (tuple, list)) else shown
        arg = tyro.conf.arg(help=argument.doc, help_behavior_hint=f"(default: {shown})")
        field = (last, Annotated[argument.type, arg], dataclasses.field(default=argument.default))
        fields.setdefault(stage, []).append(field)
    everyday = _dataclass("Model", fields.pop(""), "What is not given here follows --weights.")
    stages = []
    for stage, rows in fields.items():
        _, node = _find("builder", stage_classes()[stage])
        cls = _dataclass(stage, rows, ast.get_docstring(node).splitlines()[0])
        stages.append((stage, cls, dataclasses.field(default_factory=cls)))
    return everyday, _dataclass("Stages", stages, "")


def merge_model(model: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the builder's arguments of a recipe, updated with those of the command line.

    An argument that the builder and a stage both take replaces the other's of the recipe.

    Args:
        model: arguments of the builder, those of stages in dicts.
        given: the same with dotted names, `{"proposals.post_nms": 300}`.
    """
    aliases = everyday_aliases()
    # The builder's own None is "not given", a stage's is a value.
    given = {aliases.get(n, n) if value is None else n: value for n, value in given.items()}
    same = aliases | {of: name for name, of in aliases.items()}
    flat = {n: value for n, value in flatten(model) if same.get(n) not in given} | given
    merged = {}
    for name, value in flat.items():
        stage, _, last = name.rpartition(".")
        (merged.setdefault(stage, {}) if stage else merged)[last] = value
    return merged


def flatten(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the builder's arguments under dotted names, and their values."""
    for name, value in model.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{argument}", x) for argument, x in value.items())
        else:
            yield name, value


def _dataclass(name: str, fields: list[tuple], doc: str) -> type:
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": doc})


@functools.cache
def _definitions(module: str) -> dict[str, ast.AST | str]:
    """Returns what a module defines: its node, or the module that it is imported from."""
    file = _PACKAGE / f"{module.replace('.', '/')}.py"
    definitions = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("keras_fpn."):
            source = node.module.removeprefix("keras_fpn.")
            definitions |= {alias.name: source for alias in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node.value
    return definitions


def _find(module: str, name: str) -> tuple[str, Any]:
    found = _definitions(module)[name]
    return _find(found, name) if isinstance(found, str) else (module, found)


def _value(module: str, node: ast.expr) -> Any:
    """Returns the value of a default, which may name constants of the package."""
    names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} - {"math"}
    constants = {name: _value(*_find(module, name)) for name in names}
    return eval(ast.unparse(node), {"math": math, **constants})


def _type(node: ast.expr) -> Any:
    """Returns the type on the command line of an annotation; None where it has none."""
    if isinstance(node, ast.Name):
        return _TYPES.get(node.id)
    if isinstance(node, ast.Constant):
        return type(node.value)
    if isinstance(node, ast.BinOp):
        sides = [side for side in (_type(node.left), _type(node.right)) if side is not None]
        return functools.reduce(operator.or_, sides) if sides else None
    if isinstance(node, ast.Subscript):
        # An entry that may be a sequence as well, as in several sizes per level, is one number.
        inner = node.slice
        while isinstance(inner, (ast.BinOp, ast.Tuple)):
            inner = inner.left if isinstance(inner, ast.BinOp) else inner.elts[0]
        return tuple[_type(inner), ...]
    return None
