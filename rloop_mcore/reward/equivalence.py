r"""Two parsed answers compared by math-verify, at a precision that suits their size.

math-verify rounds decimals to six places and takes differences under 1e-15 for none, whatever the numbers' size: to it
1.6e-19 is 1.7e-19, 1/2004! is 1/2006!, and 1 - 2^{-100} is 1 - 2^{-101}. Here both grow with the leading zeros: of the
smallest number there is, and of the smallest part of one; and with the digits of the largest part, as \sqrt{10^{40}+1}
is less than 10^{-20} from 10^{20}. What its parser misreads before that is put right here.
"""

from __future__ import annotations

import cmath
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any

from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
from latex2sympy2_extended.antlr_parser import PSParser  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, parse, verify
from sympy import (  # type: ignore[import-untyped]
    Abs,
    Basic,
    Derivative,
    Eq,
    Expr,
    FiniteSet,
    Float,
    I,
    Interval,
    Limit,
    MatrixBase,
    Max,
    Min,
    Piecewise,
    Rational,
    S,
    Set,
    Symbol,
    Tuple,
    Union,
    ceiling,
    floor,
    log,
    preorder_traversal,
    solve,
    zeta,
)
from sympy.concrete.expr_with_limits import ExprWithLimits  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]
from sympy.core.relational import (  # type: ignore[import-untyped]
    GreaterThan,
    LessThan,
    Relational,
    StrictGreaterThan,
    StrictLessThan,
)
from sympy.logic.boolalg import And, BooleanAtom  # type: ignore[import-untyped]

from rloop_mcore.reward.forms import is_tuple, parts_of_list

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

# Hydra pins the antlr runtime to 4.9.3, and latex2sympy2_extended 1.11's parser for it lacks this one method: without
# it every number with a percent sign is unparsable. It is what the parser for antlr 4.13 has.
if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
    PSParser.AtomContext.FUNC_GAMMA = lambda self: self.getToken(PSParser.FUNC_GAMMA, 0)

_PROPER = re.compile(r"\\frac\{([0-9]+)\}\{([0-9]+)\}")


def _side_by_side(parser: Any, factors: list[Any], at: int = 0) -> Any:
    r"""Factors without a sign between them, from `at` on: a product, in which 2\frac{1}{3} is a mixed number.

    The parser's own adds every integer to a positive number after it: to it 7(13) is 20, and 2\binom{4}{2} is 8.
    """
    mixed = _mixed_number(factors[at : at + 2])
    first = parser.convert_postfix(factors[at]) if mixed is None else mixed
    following = at + (1 if mixed is None else 2)
    if isinstance(first, list):
        return _derivative(parser, factors, at)
    if following >= len(factors) or not isinstance(first, (Expr, MatrixBase)):
        return first
    rest = parser.convert_postfix_list(factors, following)
    matrix = any(getattr(side, "is_Matrix", False) for side in (first, rest))
    return parser.mat_mul_flat(first, rest) if matrix else parser.mul_flat(first, rest)


def _mixed_number(factors: list[Any]) -> Any | None:
    whole, *others = (factor.getText() for factor in factors)
    if not others or not whole.isdigit() or not (found := _PROPER.fullmatch(others[0])):
        return None
    top, bottom = int(found[1]), int(found[2])
    return Rational(int(whole) * bottom + top, bottom) if top < bottom else None


_derivative = _Latex2Sympy.convert_postfix_list  # the parser's own, which a derivative's sign is left to
_Latex2Sympy.convert_postfix_list = _side_by_side

# Euler's constant or the function to the parser, which takes \gamma_1 for 1 and \gamma^2 - 1 for infinity.
_GAMMA = re.compile(r"(?<!(?:hat|bar|dot|vec|lde|ine)\{)\\(?:gamma(?![A-Za-z])|Gamma(?![A-Za-z]|\s*\())")
# Of a named function the parser takes it for the reciprocal.
_INVERSE = re.compile(r"(?<![A-Za-z\\])([fghFGH])\s*\^\s*\{\s*-1\s*\}\s*(?=\()")
# Of more than a letter or a number an f is a factor to the parser, f(x+1) is fx + f; of two arguments a function.
_APPLIED = re.compile(
    r"(?<![A-Za-z\\])f\s*\((?!\s*(?:[A-Za-z]|[0-9.]+)\s*\))((?:[-+*/^{}0-9fmntxyz\s.]|\\(?:frac|sqrt|cdot)"
    r"|\((?:[-+*/^{}0-9mntxyz\s]|\\(?:frac|sqrt|cdot))*\))+)\)"
)
# Of letters the parser takes them for polynomials: to it \gcd(m, n) is 1.
_GCD = re.compile(
    r"(?:\\(?:text|mathrm|operatorname)\s*\{\s*(gcd|lcm)\s*\}|\\?\b(gcd|lcm))\s*\(((?:[^()]|\([^()]*\))*)\)"
)

# To the parser an e is Euler's number there, and a d begins a differential: m_e is nothing.
_NAMED_E_OR_D = re.compile(
    r"(?<!\\int)(?<!\\log)(?<!\\lim)(?<!\\sum)(?<!\\sup)(?<!\\inf)(?<!\\max)(?<!\\min)(?<!\\prod)(?<=[A-Za-z}])\s*"
    r"_\s*(?:([de])|\{\s*([de])\s*\})"
)

_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
)
_EXTRACTION = [
    LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=_NORMALISATION)
]
_ROUNDING, _PRECISION = 6, 15  # math-verify's: decimal places of floats, digits of other numbers
_SMALLEST = 10**9  # bits after the point: 2^{-2^{2001}} has an exponent that is no float
_MOST_ZEROS = 20_000  # beyond which only the same expression is equal
_ORDERED = (GreaterThan, LessThan, StrictGreaterThan, StrictLessThan)
_NO_FORMULA = (AppliedUndef, Derivative, ExprWithLimits, Limit)  # their values, if any, may take minutes
_POINTS = (Rational(3, 7), Rational(19, 11), Rational(29, 5))  # where two formulas are tried
_MANY = (*_POINTS, Rational(-5, 7), Rational(-61, 9), Rational(310, 7), Rational(-290, 7))
_POSITIVE = (*_POINTS, Rational(310, 7))
_INTEGERS, _MANY_INTEGERS = (7, 12, 29), (*range(1, 10), 25, 64, 99, 1000, 1024)
_INTEGER = frozenset("klmnN")  # what integers are called
_IN_STEPS = (floor, ceiling)
_IN_PIECES = (*_IN_STEPS, Abs, Max, Min, Piecewise)
_MOST_DIGITS = 2000  # of a large number, that a difference is looked for in

Parsed = tuple[Any, ...]


@lru_cache(maxsize=2048)
def parse_answer(text: str) -> Parsed:
    """The SymPy objects of an answer; empty if it is not mathematics that math-verify understands."""
    if r"\land" in text:
        parts = [parse_answer(part) for part in text.split(r"\land")]
        whole = all(len(part) == 1 and _is_inequality(part[0]) for part in parts)
        return (And(*(one for part in parts for one in And.make_args(part[0]))),) if whole else ()
    text = _APPLIED.sub(_of_two, text)
    text = _INVERSE.sub(r"\\tilde{\1}", _GCD.sub(_of_letters, _GAMMA.sub(r"\\hat{\\gamma}", text)))
    text = _NAMED_E_OR_D.sub(r"_{\\text{\1\2}}", text)
    found = parse("\\boxed{" + _both_signs(text) + "}", _EXTRACTION, parsing_timeout=None)
    items = (_each(item) for item in found if isinstance(item, (Basic, MatrixBase)))
    items = (_exact(_with_imaginary_unit(_with_values(item))) for item in items)
    return tuple(item for item in items if not _says_nothing(item))


def _of_two(found: re.Match[str]) -> str:
    return f"f({_APPLIED.sub(_of_two, found[1])},0)"


def _of_letters(found: re.Match[str]) -> str:
    """gcd and lcm as functions without a value, of their arguments in one order, where they are not of numbers."""
    name, arguments = found[1] or found[2], found[3].replace(" ", "").split(",")
    if not re.search(r"[A-Za-z]", found[3]):
        return rf"\operatorname{{{name}}}({found[3]})"
    return rf"\hat{{{name[0]}}}({','.join(sorted(arguments))})"


def equivalent(gold: Parsed, answer: Parsed) -> bool:
    """Is one of the answer's readings one of the gold's?"""
    if any(map(_is_inequality, gold)):
        answer = tuple(item for item in answer if not _lists_numbers(item))  # 1,3 is not 1 < x < 3
    solved = all(map(_is_solved, gold))
    answer = tuple(item for item in answer if _is_solved(item) or not solved)
    answer = tuple(item for item in answer if not all(_apart(one, item) for one in gold))
    items = [*gold, *answer]
    magnitudes = [_magnitude(part) for item in items for part in _parts(item)]
    zeros = _zeros(magnitudes)
    digits = max(0, min(math.ceil(max(magnitudes, default=0.0)), _MOST_DIGITS))
    if zeros > _MOST_ZEROS:
        return any(one == other for one in gold for other in answer)
    precision = _PRECISION + zeros + digits
    if any(_same_order(one, other) or _same_equation(one, other, precision) for one in gold for other in answer):
        return True
    answer = tuple(item for item in answer if not any(_nothing_solves(one, item) for one in gold))
    if verify(
        list(gold),
        list(answer),
        float_rounding=_ROUNDING + _zeros(_magnitude(number) for item in items for number in _numbers(item)),
        numeric_precision=precision,
        timeout_seconds=None,
    ):
        return True
    if any(_same_region(one, other) for one in gold for other in answer if _is_solved(other)):
        return True
    return any(_same_formula(one, other, precision) for one in gold for other in answer)


def _apart(gold: Any, answer: Any) -> bool:
    """Do two formulas differ wherever they are tried? To find that by algebra may take minutes.

    Of two equations one that is solved (y = ...) is put into the other.
    """
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        solved, other = (gold, answer) if _is_name(gold.lhs) else (answer, gold)
        if not _is_name(solved.lhs) or not _is_formula(solved.rhs) or solved.rhs.has(solved.lhs):
            return False
        left, right = (side.xreplace({solved.lhs: solved.rhs}) for side in other.args)
        return _is_formula(left) and _is_formula(right) and _tried(left - right + 1, S.One) == {False}
    return not isinstance(gold, Symbol) and not isinstance(answer, Symbol) and _tried(gold, answer) == {False}


def _nothing_solves(gold: Any, answer: Any) -> bool:
    """Is the gold an equation without a solution? All such, and the empty set, are one to math-verify."""
    if answer is S.EmptySet:
        return isinstance(gold, Eq)
    if not _are_equations(gold, answer):
        return False
    try:
        return not solve(gold, gold.free_symbols)
    except Exception:  # SymPy raises many kinds for what it cannot solve
        return False


def _same_equation(gold: Any, answer: Any, digits: int) -> bool:
    """Is one of two equations the other times a number: 2x^2 + 2 = 0 and x^2 = -1?"""
    if not _are_equations(gold, answer):
        return False
    if {*gold.args} == {*answer.args}:
        return True
    if gold.has(*_IN_PIECES) or answer.has(*_IN_PIECES):
        return False
    ratio = (gold.lhs - gold.rhs) / (answer.lhs - answer.rhs)
    place = {letter: _POINTS[0] + n for n, letter in enumerate(sorted(ratio.free_symbols, key=str))}
    return _tried(ratio, ratio.subs(place), _MANY, digits) == {True}


def _same_formula(gold: Any, answer: Any, digits: int) -> bool:
    r"""Are two formulas, or what a name is said to be, equal wherever they are tried?

    Algebra finds no way from \frac{\sin x}{1+\cos x} to \tan\frac{x}{2}, nor from \lceil\frac{n}{2}\rceil to
    \lfloor\frac{n+1}{2}\rfloor. Other formulas in pieces may be equal at these points, and differ elsewhere.
    """
    if isinstance(gold, Eq) and isinstance(answer, Eq) and gold.lhs == answer.lhs:
        gold, answer = gold.rhs, answer.rhs
    letters = gold.free_symbols | answer.free_symbols
    if not letters:
        return False
    if _of_integers(gold, answer):
        return len(letters) <= 2 and _tried(gold, answer, _MANY_INTEGERS) == {True}
    if gold.has(*_IN_PIECES) or answer.has(*_IN_PIECES):
        return False
    points = _POSITIVE if gold.has(log) or answer.has(log) else _MANY  # \log(ab) is \log a + \log b there alone
    return _tried(gold, answer, points, digits) == {True}


def _of_integers(one: Any, other: Any) -> bool:
    letters = one.free_symbols | other.free_symbols
    return (one.has(*_IN_STEPS) or other.has(*_IN_STEPS)) and all(letter.name in _INTEGER for letter in letters)


def _within(one: Any, other: Any, share: Any) -> bool:
    return bool(abs(one - other) <= max(abs(one), abs(other)) * share)


def _tried(one: Any, other: Any, points: tuple[Any, ...] = (), digits: int = _ROUNDING) -> set[bool]:
    """Are two formulas in letters equal to so many digits, at some points? Empty where they have no values."""
    if not all(isinstance(item, Expr) and not item.has(*_NO_FORMULA) for item in (one, other)):
        return set()
    letters = sorted(one.free_symbols | other.free_symbols, key=str)
    places: Iterable[Sequence[Any]] = ()
    whole = _of_integers(one, other)
    if letters and whole:
        places = product(points or _INTEGERS, repeat=len(letters))
    elif letters:
        places = ([point + Rational(n, 13) for n in range(len(letters))] for point in points or _POINTS)
    equal = set()
    try:
        for place in places:
            values = dict(zip(letters, place, strict=True))
            # exactly where there may be steps: \lfloor\sqrt{4}\rfloor is 2
            sides = [item.subs(values) if whole else item for item in (one, other)]
            first, second = (item.evalf(digits + 10, subs=values, maxn=digits + 50) for item in sides)
            rough = complex(first), complex(second)
            if not all(map(cmath.isfinite, rough)):
                return set()
            near = _within(*rough, 1e-6)
            equal.add(near and (digits <= _ROUNDING or _within(first, second, Float(10) ** -digits)))
            if len(equal) > 1:
                break
    except Exception:  # SymPy raises many kinds for what has no value
        return set()
    return equal


def is_one_value(answer: Parsed) -> bool:
    """Is every reading of the answer a number or an expression, not several, nor a condition?"""
    return bool(answer) and all(isinstance(item, Expr) for item in answer)


def as_tuple(answer: Parsed) -> Parsed:
    """A vector that is written as a matrix of one row or column, as a tuple; else the answer as it is."""
    if len(answer) == 1 and isinstance(answer[0], MatrixBase) and min(answer[0].shape) == 1 < max(answer[0].shape):
        return (Tuple(*answer[0]),)
    return answer


def _both_signs(text: str) -> str:
    r"""A list, each entry with one \pm (and the \mp that goes with it) as its two readings: x = 1 \pm i, (1, \pm 2)."""
    if r"\pm" not in text:
        return text
    readings = []
    for part in parts_of_list(text):
        both = part.count(r"\pm") == 1 and part.count(r"\mp") < 2 and ("," not in part or is_tuple(part))
        signs = (("+", "-"), ("-", "+")) if both else ((r"\pm", r"\mp"),)
        readings += [part.replace(r"\pm", a).replace(r"\mp", b) for a, b in signs]
    return ",".join(readings)


def _each(item: Any) -> Any:
    """x = 1, 2 as x = 1, x = 2: math-verify finds no two sets of formulas on the right the same."""
    if isinstance(item, Eq) and isinstance(item.rhs, FiniteSet):
        return FiniteSet(*(Eq(item.lhs, value, evaluate=False) for value in item.rhs.args))
    return item


def _with_imaginary_unit(item: Any) -> Any:
    """math-verify reads i as a variable: to it (1+i)^2 is not 2i. A t is real to it in "2 i t", not in "2it".

    In 1 < i < n it is one: complex numbers have no order. So (i, 1) is a pair, and no interval.
    """
    variables = [] if item.has(*_ORDERED, Union) else [symbol for symbol in item.free_symbols if symbol.name == "i"]
    if variables and isinstance(item, FiniteSet):
        return FiniteSet(*map(_with_imaginary_unit, item.args))
    if not variables and not item.has(I):
        return item
    names = {symbol: I if symbol in variables else Symbol(symbol.name) for symbol in item.free_symbols}
    if isinstance(item, Eq):  # not x = 3i, which is False of a real x, nor x = {3i, -3i} of any number
        return Eq(*(_pair(side).xreplace(names) for side in item.args), evaluate=False)
    return _pair(item).xreplace(names)


def _pair(item: Any) -> Any:
    return Tuple(item.start, item.end) if isinstance(item, Interval) else item


def _with_values(item: Any) -> Any:
    r"""With \zeta(2) as the number it is, and f(2), of which nothing is known, as one of that name."""
    of_numbers = [one for one in item.atoms(AppliedUndef) if not one.free_symbols]
    if not of_numbers:
        return item
    return item.xreplace(
        {one: zeta(*one.args) if str(one.func) == r"\zeta" else Symbol(str(one)) for one in of_numbers}
    )


def _exact(item: Any) -> Any:
    """An expression with its decimals made fractions. A decimal alone is left: math-verify rounds it."""
    if isinstance(item, (Float, Set, Tuple, MatrixBase, Relational, And)):
        return item
    return item.xreplace({number: Rational(str(number)) for number in item.atoms(Float)})


def _parts(item: Any) -> Iterator[Any]:
    """All that the numbers in it are made of: SymPy takes a small part for none, as the 2^{-100} of 100!/2^{100}."""
    for number in _numbers(item):
        yield from preorder_traversal(number)


def _numbers(item: Any) -> Iterator[Any]:
    if isinstance(item, (Set, Tuple, Relational, And)):
        for part in item.args:
            yield from _numbers(part)
    elif isinstance(item, MatrixBase):
        yield from item
    else:
        yield item


def _zeros(magnitudes: Iterable[float]) -> int:
    """Zeros after the decimal point of the smallest of the numbers of these magnitudes."""
    return max(0, math.ceil(-min(magnitudes, default=0.0)) - 1)


def _magnitude(number: Any) -> float:
    """The decimal logarithm of its absolute value; 0 for zero and for what has no value."""
    try:
        if not number.is_number:
            return 0
        value = abs(number.evalf(3))
        _, mantissa, exponent, _ = value._mpf_
    except Exception:  # SymPy raises many kinds for what has no value
        return 0
    if not mantissa:
        return 0
    return math.log10(mantissa) + max(-_SMALLEST, min(exponent, _SMALLEST)) * math.log10(2)


def _says_nothing(item: Any) -> bool:
    """An identity, such as AB = BA of numbers, or what is never true: whatever else is one would be equal to it."""
    parts = item.args if isinstance(item, FiniteSet) else (item,)
    if any(isinstance(part, BooleanAtom) for part in parts):
        return True
    return isinstance(item, Eq) and (item.lhs == item.rhs or _tried(item.lhs, item.rhs) == {True})


def _is_solved(item: Any) -> bool:
    """Not an inequality that is still to be solved: 2x > 10 for x > 5, or x^2 < 4."""
    if isinstance(item, (And, FiniteSet)):
        return all(map(_is_solved, item.args))
    if not isinstance(item, _ORDERED):
        return True
    sides = [(item.lhs, item.rhs), (item.rhs, item.lhs)]
    return any(_is_name(side) or _is_size(side) for side, other in sides if not side.free_symbols & other.free_symbols)


def _are_equations(*items: Any) -> bool:
    """Of formulas, on either side."""
    return all(isinstance(item, Eq) and all(map(_is_formula, item.args)) for item in items)


def _is_formula(side: Any) -> bool:
    return isinstance(side, Expr) and not isinstance(side, MatrixBase)


def _is_name(side: Any) -> bool:
    return isinstance(side, (Symbol, AppliedUndef))


def _lists_numbers(item: Any) -> bool:
    values = item.rhs if isinstance(item, Eq) else item  # x = 1, 3
    return isinstance(values, FiniteSet) and not all(map(_is_inequality, values.args))


def _is_size(side: Any) -> bool:
    return isinstance(side, Abs) and isinstance(side.args[0], Symbol)


def _same_order(gold: Any, answer: Any) -> bool:
    """Are two chains one, as a > b > c is c < b < a?"""
    if not isinstance(gold, And) or not isinstance(answer, And):
        return False
    links = [
        {one.reversed if one.gts == one.lhs else one for one in chain.args if isinstance(one, _ORDERED)}
        for chain in (gold, answer)
    ]
    return links[0] == links[1] and len(links[0]) == len(gold.args) == len(answer.args)


def _same_region(gold: Any, answer: Any) -> bool:
    """Are two conditions on one variable, or a condition and a set, true of the same numbers?"""
    names = [{symbol.name for symbol in side.free_symbols} for side in (gold, answer)]
    if all(names) and names[0] != names[1]:
        return False
    if not any(isinstance(side, (Relational, And, FiniteSet)) for side in (gold, answer)):
        return False
    try:
        one, other = _region(gold), _region(answer)
        if one is None or other is None:
            return False
        # doit: a \pi/2 as it was parsed is a product that SymPy can't compare with \frac{\pi}{2}
        return one.doit().symmetric_difference(other.doit()).is_empty is True
    except Exception:  # SymPy raises many kinds for conditions that it cannot solve
        return False


def _region(item: Any) -> Any:
    if len(item.free_symbols) > 1:
        return None
    if isinstance(item, Eq) and isinstance(item.rhs, Set):
        return item.rhs  # x in [1, 2]
    if isinstance(item, FiniteSet) and any(map(_is_inequality, item.args)):
        parts = [part.as_set() for part in item.args]  # x < -1 or x > 1; but x > 5, x > 6 says no such thing
        return Union(*parts) if all(one.is_disjoint(other) for one, other in combinations(parts, 2)) else None
    if _is_inequality(item):
        return item.as_set()
    return item if isinstance(item, Set) and not isinstance(item, FiniteSet) else None


def _is_inequality(item: Any) -> bool:
    parts = item.args if isinstance(item, And) else (item,)
    return all(isinstance(part, Relational) and not isinstance(part, Eq) for part in parts)
