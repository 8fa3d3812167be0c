"""A resolved Program as text: every value in the language's own words, with where it came from."""

from __future__ import annotations

from tunelang.dsl.program import Declared, Program
from tunelang.dsl.syntax import units
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary import data, rewards, types
from tunelang.dsl.vocabulary.base import (
    Attribute,
    DataExpression,
    Function,
    Kind,
    Measure,
    Node,
    Reference,
    RewardExpression,
    TextExpression,
    attributes,
)
from tunelang.dsl.vocabulary.raw_values import RegexValue, Word
from tunelang.dsl.vocabulary.tables import KINDS, RUN

_PRECEDENCE = {
    "or": 1,
    "and": 2,
    "==": 4,
    "!=": 4,
    "<": 4,
    "<=": 4,
    ">": 4,
    ">=": 4,
    "+": 5,
    "-": 5,
    "*": 6,
    "/": 6,
}


def literal(value: object, want: types.Type | None = None) -> str:
    """Return a value as a spec would write it; `want` decides on units and quotes."""
    if isinstance(want, types.ListOf) and isinstance(value, tuple):
        return "[" + ", ".join(literal(item, want.item) for item in value) + "]"
    if isinstance(want, types.Either):
        choices = [option for option in want.options if isinstance(option, types.Choice)]
        if isinstance(value, str) and any(value in choice.words for choice in choices):
            return value
        return literal(value, want.options[-1])
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case str():
            return _string(value, want)
        case int() | float():
            return _number(value, want)
        case Quantity():
            return units.show(value.value, value.dimension)
        case Measure():
            return units.show(value.value, value.unit)
        case Reference():
            return f"{value.name}.step({value.step})" if value.step else value.name
        case Word():
            return value.text
        case RegexValue():
            return _regex(value.pattern)
        case tuple():
            return "[" + ", ".join(literal(item) for item in value) + "]"
        case Node():
            return expression(value)
    return str(value)


def _string(value: str, want: types.Type | None) -> str:
    if isinstance(want, types.Choice | types.Metric):
        return value
    if isinstance(want, types.Pattern):
        return _regex(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


def _regex(pattern: str) -> str:
    return f"/{pattern.replace('/', chr(92) + '/')}/"


def _number(value: float, want: types.Type | None) -> str:
    if isinstance(want, types.Share):
        return units.show(float(value), "%")
    if isinstance(want, types.Amount):
        return units.show(value, want.units[0])
    if isinstance(want, types.Memory):
        return units.show(value, "bytes")
    if isinstance(want, types.Duration):
        return units.show(value, "s")
    if isinstance(want, types.Price):
        return f"{units.show(value)} per device_hour"
    return units.show(value)


def expression(node: Node, outer: int = 0) -> str:
    """Return a call or an expression over data, rewards or conditions as text."""
    match node:
        case data.TemplateText():
            return _string(node.text, None)
        case data.DataRef() | rewards.RewardRef() | data.FieldValue():
            return node.name
        case data.Weighted():
            return f"{units.show(node.weight, '%')} * {expression(node.of, 6)}"
        case data.Mixture():
            text = " + ".join(expression(part) for part in node.parts)
            return f"({text})" if outer else text
        case data.Split():
            parts = ", ".join(
                f"{name} = {units.show(share, '%')}" for name, share in node.parts.items()
            )
            return f"{expression(node.of, 9)}.split({parts}).{node.part}"
        case data.DataMethod():
            return f"{expression(node.of, 9)}.{_call(node)}"
        case rewards.RewardConstant() | data.Literal():
            return literal(node.value)
        case rewards.RewardOperator() | data.Operator():
            return _operator(node.operator, node.operands, outer)
    assert isinstance(node, Function)
    return node.word if hasattr(node, "bare") else _call(node)


def _operator(operator: str, operands: tuple[Node, ...], outer: int) -> str:
    level = _PRECEDENCE.get(operator, 7)
    if len(operands) == 1:
        gap = " " if operator == "not" else ""
        return f"{operator}{gap}{expression(operands[0], 7)}"
    parts = [expression(operand, level + (index > 0)) for index, operand in enumerate(operands)]
    text = f" {operator} ".join(parts)
    return f"({text})" if outer > level else text


def _call(node: Function) -> str:
    """Return `word(argument = value, ...)` with the arguments that differ from their defaults."""
    variadic = getattr(type(node), "variadic", None)
    if variadic is not None:
        values = getattr(node, variadic).items()
        return f"{node.word}({', '.join(f'{name} = {literal(value)}' for name, value in values)})"
    parts: list[str] = []
    for a, value in _fields(node, attributes(type(node))):
        if a.required or value != a.default:
            text = literal(value, a.type)
            parts.append(text if a.positional and a.required else f"{a.name} = {text}")
    return f"{node.word}({', '.join(parts)})"


def _fields(node: Node, known: dict[str, Attribute]) -> list[tuple[Attribute, object]]:
    aliases = {field.alias or name: name for name, field in type(node).model_fields.items()}
    return [(a, getattr(node, aliases[a.name])) for a in known.values()]


# The whole Program.


def show(program: Program) -> str:
    """Return every declaration with every attribute, and the origin of each value."""
    parts = [_block("run {", "run", program.run, RUN.attributes, program)]
    parts += [_declared(declared, program) for declared in program.declarations.values()]
    return "\n\n".join(parts) + "\n"


def _declared(declared: Declared, program: Program) -> str:
    doc = "".join(f"## {line}\n" for line in declared.doc.splitlines())
    path = f"{declared.noun}.{declared.name}"
    if declared.kind is None:
        head = f"{declared.noun} {declared.name}"
        return f"{doc}{head} = {literal(declared.value)}  # {_origin(path, program)}"
    info = KINDS[declared.noun][declared.kind]
    head = f"{declared.noun} {declared.name} : {declared.kind} {{"
    if not declared.branches:
        return doc + _block(head, path, declared.value, info.attributes, program)
    return doc + _block(head, path, declared.branches[0].value, info.attributes, program, declared)


def _block(
    head: str, path: str, value: Kind, known: dict[str, Attribute], program: Program,
    stage: Declared | None = None,
) -> str:  # fmt: skip
    rows: list[tuple[str, str, str]] = []
    for a, content in _fields(value, known):
        rows += _rows(a, content, f"{path}.{a.name}", "  ", program, _swept(stage))
    name_width = max((len(name) for name, _, _ in rows), default=0)
    lines = [head]
    for name, text, origin in rows:
        left = f"{name:<{name_width}} = {text}" if text else name
        lines.append(f"{left:<60}  # {origin}" if origin else left)
    return "\n".join([*lines, "}"])


def _swept(stage: Declared | None) -> dict[str, list[str]]:
    """Return for each attribute with an `each` its values over the branches, by path."""
    values_of: dict[str, list[str]] = {}
    for branch in stage.branches if stage is not None else ():
        for path, text in branch.choices:
            values = values_of.setdefault(path, [])
            if text not in values:
                values.append(text)
    return values_of


def _rows(
    a: Attribute,
    value: object,
    path: str,
    indent: str,
    program: Program,
    swept: dict[str, list[str]],
) -> list[tuple[str, str, str]]:
    """Return the line of an attribute; a call that the spec wrote takes a line for each of
    its arguments.
    """
    origin = _origin(path, program)
    relative = path.split(".", 2)[2] if path.count(".") > 1 else path
    if relative in swept:
        return [(indent + a.name, f"each({', '.join(swept[relative])})", origin)]
    known: dict[str, Attribute] = {}
    if isinstance(value, Function) and not isinstance(
        value, DataExpression | RewardExpression | TextExpression
    ):
        known = attributes(type(value))
    if not known or not isinstance(value, Function):
        return [(indent + a.name, literal(value, a.type), origin)]
    rows = [(indent + a.name, f"{value.word}(", origin)]
    for inner, part in _fields(value, known):
        rows += _rows(inner, part, f"{path}.{inner.name}", indent + "  ", program, swept)
    return [*rows, (f"{indent})", "", "")]


def _origin(path: str, program: Program) -> str:
    origin = program.origins.get(path)
    return origin.span.place if origin is not None else "default"
