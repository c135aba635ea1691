r"""Units after a number: what they are called, and what stands there without being one.

math-verify drops whatever it takes for a unit: any \text{...} at the end, and letters such as c, h or ab after a digit.
To it "2ab" is 2, and 5 hours are 5 minutes. Its own search is therefore off, and this stands in its place.
"""

from __future__ import annotations

import re

# Every spelling of a unit; the first is its name. A plural "s" is understood.
_NAMES = """
mm millimeter millimetre; cm centimeter centimetre; dm decimeter decimetre; m meter metre; km kilometer kilometre
in inch inches; ft foot feet; yd yard; mi mile; mg milligram; g gram gm; kg kilogram; lb pound; oz ounce; ton tonne
s sec second; min minute; h hr hour; day; week wk; month; year yr; mph; kmh kmph; degree deg; radian rad
ml milliliter millilitre; L l liter litre; gal gallon; qt quart; pt pint; cup; acre; hectare ha
Hz hertz; N newton; J joule; kJ kilojoule; W watt; kW kilowatt; V volt; A ampere; Pa pascal; K kelvin; mol mole
cent; dollar; euro; rupee; unit
"""
_NAME = {
    spelling: names.split()[0] for line in _NAMES.split("\n") for names in line.split(";") for spelling in names.split()
}
_LONG_FORM = {"mph": "mi/h", "kmh": "km/h"}
# Letters that are as often variables: a unit only after a space.
_AMBIGUOUS = frozenset({"m", "g", "s", "h", "L", "l"})
# Words that make of the number before them something else than an amount of that thing.
_NO_UNIT_WORDS = """
    or and not no more less fewer least most than is are was be about approximately roughly maybe perhaps possibly to
    between from through until below above under over up down plus minus times divided by mod modulo if when where for
    unless except either neither nor but hundred thousand million billion trillion dozen negative positive wrong correct
    pi sqrt sin cos tan cot sec csc log ln exp inf infinity frac false true yes other with without only base two three
    binary octal decimal hexadecimal ternary percent pct percentage am pm noon midnight remainder"""
_NO_UNIT = frozenset(_NO_UNIT_WORDS.split())
_SPACE = r"(?:\s|~|\\[,;:! ])*"
_TEXT = r"\\(?:text(?:bf|it|rm|normal|up)?|mathrm|mathit|mbox|operatorname)\s*"
_POWER = r"(?:\s*\^\s*(?:[0-9]|\{[0-9]\}))?"
_IN_TEXT = re.compile(rf"(?:(?<=[0-9.}})])|(?<=\\pi)){_SPACE}((?:{_TEXT}\{{[^{{}}]*\}}{_POWER}[/\s~]*)+)$")
_BARE = re.compile(rf"(?<=[0-9.}})])({_SPACE})((?:[A-Za-z]++\.?{_POWER}[/\s]*+)++)$")
_WORD = re.compile(r"([A-Za-zµ]+)(?:\s*\^\s*\{?([0-9])\}?)?|/")
_UNWRAP = re.compile(rf"{_TEXT}\{{([^{{}}]*)\}}")


def split_unit(answer: str) -> tuple[str, str]:
    r"""(the answer without its unit, the unit's name), ("", "") standing for no change.

    The name is "" where there is no unit, "?" where it is none that is known ("apples"), else such as "cm^2" or "mi/h".
    """
    if found := _IN_TEXT.search(answer):
        unit = _name(_UNWRAP.sub(r" \1 ", found[1]), spaced=True, known_only=False)
    elif found := _BARE.search(answer):
        spaced = bool(found[1].strip("!\\")) and re.search(r"[0-9.]$", answer[: found.start()]) is not None
        unit = _name(found[2], spaced, known_only=not spaced)
    else:
        return answer, ""
    return (answer[: found.start()].rstrip(" ~"), unit) if unit else (answer, "")


def _name(text: str, spaced: bool, known_only: bool) -> str:
    """The canonical name of a unit written as `text`; "" if it is none."""
    parts: list[str] = []
    known = True
    for word in _WORD.finditer(text):
        spelling = word[1]
        if spelling is None or spelling == "per":
            parts.append("/")
            continue
        if spelling.casefold() in _NO_UNIT:
            return ""
        if spelling in ("square", "sq", "cubic"):  # 18 square units; of 18 square inches and 18 in^2
            parts.append(f"{spelling[:2]}:")
            continue
        name = _lookup(spelling)
        if name is None or (name in _AMBIGUOUS and not spaced):
            if known_only or len(spelling) < 3:
                return ""
            known = False
            name = spelling
        power = {"sq:": "2", "cu:": "3"}.get(parts.pop() if parts and parts[-1].endswith(":") else "", word[2] or "")
        parts.append(_LONG_FORM.get(name, name) + (f"^{power}" if power else ""))
    if not parts or re.search(r"[0-9]", re.sub(r"\^\s*\{?[0-9]\}?", "", text)):
        return ""
    return "".join(parts) if known else "?"


def _lookup(spelling: str) -> str | None:
    for form in (spelling, spelling.casefold(), spelling.casefold().removesuffix("s")):
        if form in _NAME:
            return _NAME[form]
    return None
