"""A calculator as a tool: numbers and ``+ - * / **``, nothing else."""

import ast
import math
import operator
from collections.abc import Callable

_LONGEST = 1000
"""Characters of an expression."""

_MOST_BITS = 1024
"""Of a whole number: about 300 digits."""

_EXACT = 2**53
"""Up to here a float is a whole number exactly."""

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: Numbers, brackets and + - * / **, for example "3 * (4 + 5)".
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} characters, but got {len(expression)}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"expected numbers, brackets and + - * / **, but got {expression!r}") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None
    if not isinstance(value, int) and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _checked(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _applied(type(op), _value(left), _value(right))
    raise ValueError(f"expected numbers, brackets and + - * / **, but got {ast.unparse(node)!r}")


def _applied(kind: type[ast.operator], left: float, right: float) -> float:
    # The size is known before the power is: working it out could take for ever.
    if (
        kind is ast.Pow
        and isinstance(left, int)
        and isinstance(right, int)
        and right > 0
        and abs(left) > 1
        and (abs(left).bit_length() - 1) * right > _MOST_BITS
    ):
        raise OverflowError
    return _checked(_OPERATORS[kind](left, right))


def _checked(number: float) -> float:
    if isinstance(number, complex):
        raise ValueError("the result is not a real number")
    if (isinstance(number, int) and number.bit_length() > _MOST_BITS) or not math.isfinite(number):
        raise OverflowError
    return number
