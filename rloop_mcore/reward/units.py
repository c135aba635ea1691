r"""Units after a number: what they are called, and what stands there without being one.

math-verify drops whatever it takes for a unit: any \text{...} at the end, and letters such as c, h or ab after a digit.
To it "2ab" is 2, and 5 hours are 5 minutes. Its own search is therefore off, and this stands in its place.
"""

from __future__ import annotations

import re
from collections import Counter

# Every spelling of a unit; the first is its name. A plural "s" is understood.
_NAMES = """
nm nanometer nanometre; µm um micron micrometer micrometre; mm millimeter millimetre; cm centimeter centimetre
dm decimeter decimetre; m meter metre; km kilometer kilometre; in inch inches; ft foot feet; yd yard; mi mile
angstrom; AU; pc parsec; kpc; Mpc; ly; mg milligram; g gram gm; kg kilogram; lb pound; oz ounce; ton tonne
ns nanosecond; µs us microsecond; ms millisecond; s sec second; min minute; h hr hour; day; week wk; month; year yr
mph; kmh kmph; rpm; degree deg; radian rad; ml milliliter millilitre; L l liter litre; gal gallon; qt quart; pt pint
cup; acre; hectare ha; Hz hertz; kHz; MHz; GHz; THz; N newton; kN; dyn dyne; J joule; kJ kilojoule; MJ; mJ; erg
eV; keV; MeV; GeV; cal calorie; kcal; W watt; mW; kW kilowatt; MW; GW; V volt; mV; kV; A ampere; mA; µA; ohm; kohm; Mohm
Pa pascal; kPa; MPa; GPa; atm; C coulomb; F farad; T tesla; K kelvin; mol mole; mmol; M molar; dB decibel
bit; byte; kB KB; MB; GB; cent; dollar USD; euro EUR; rupee INR Rs; unit
cm 厘米 см; m 米 м; km 千米 公里 км; g 克; kg 千克 公斤 кг; s 秒; min 分钟 мин; h 小时 ч; day 天 дней; year 年
dollar 美元; yuan 元; ruble руб рублей; people 人; 个; 只; 本; 次; 种
"""
_NAME = {
    spelling: names.split()[0] for line in _NAMES.split("\n") for names in line.split(";") for spelling in names.split()
}
_LONG_FORM = {"mph": ("mi", "h"), "kmh": ("km", "h")}
# Of one or two letters, and yet a unit without a space: 5cm. 5m, 2mg and 3nm are products.
_UNSPACED = frozenset({"mm", "cm", "km", "ft", "yd", "kg", "lb", "oz", "hr", "Hz", "kJ", "kW"})
# Words that make of the number before them something else than an amount of that thing.
_NO_UNIT_WORDS = """
    or and not no more less fewer least most than is are was be about approximately roughly maybe perhaps possibly to
    between from through until below above under over up down plus minus times divided by mod modulo if when where for
    unless except either neither nor but hundred thousand million billion trillion dozen negative positive wrong correct
    pi sqrt sin cos tan cot csc log ln exp inf infinity frac false true yes other with without only base two three
    binary octal decimal hexadecimal ternary percent pct percentage am pm noon midnight remainder ish approx
    hundreds thousands millions billions trillions dozens gross lakh lakhs crore crores halves thirds fourths fifths
    sixths sevenths eighths ninths tenths hundredths thousandths millionths factorial root radical twice doubled tripled
    impossible incorrect invalid rejected excluded extraneous fail fails never none too
    half inverse reciprocal choose permute"""
_NO_UNIT = frozenset(_NO_UNIT_WORDS.split())
# Neither are these, but in "five-dollar bills".
_NUMBER_WORDS = re.compile(
    r"(?:one|four|five|six(?:ty)?|seven(?:ty)?|eighty?|nine(?:ty)?|ten|eleven|twelve|thirteen|fifteen"
    r"|(?:four|six|seven|eigh|nine)teen|twenty|thirty|forty|fifty)(?![A-Za-z-])",
    re.IGNORECASE,
)
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
_LETTERS = "A-Za-zµÀ-ɏЀ-ӿ一-鿿"
_FOREIGN = re.compile("[Ѐ-ӿ一-鿿]")  # of these words only known ones are units: not 以上, "or more"
_SPACE = r"(?:\s|~|\\[,;:! ])*"
_TEXT = r"\\(?:text(?:bf|it|rm|normal|up)?|mathrm|mathit|mbox|operatorname)\s*"
_POWER = r"(?:\s*\^\s*(?:[0-9]|\{-?[0-9]\}))?"
_WORDS = rf"{_TEXT}\{{(?>(?:[^{{}}]|\{{-?[0-9]\}})*)\}}{_POWER}"
_BETWEEN = r"(?>(?:[/\s~]|\\[,;:! ]|\\cdot(?![A-Za-z]))*)"
_IN_TEXT = re.compile(
    rf"(?:(?<=[0-9.}})])|(?<=\\pi)){_SPACE}({_WORDS}{_BETWEEN}(?>(?:(?:{_WORDS}|[A-Za-z]\b{_POWER}){_BETWEEN})*))$"
)
_TEXT_BEFORE = re.compile(rf"{_TEXT}\{{[^{{}}]*\}}$")  # a product of letters in text
_BARE = re.compile(rf"(?:(?<=[0-9.}})])|(?<=\\pi))({_SPACE})((?>(?:[{_LETTERS}]++\.?{_POWER}[/\s]*+)+))$")
_PRODUCT = re.compile(r"[A-Za-z](?:\s+[A-Za-z])+\s*")  # 2 m g
_WORD = re.compile(rf"([{_LETTERS}]+)(?:\s*\^\s*\{{?(-?[0-9])\}}?)?|/")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\.?")
_COMPOUND = re.compile(rf"(?:{_QUANTITY.pattern}[\s,]*){{2,}}")  # 5 feet 6 inches
_SQUARED = re.compile(r"([A-Za-z]+) (squared|cubed)\b")  # feet squared
_UNWRAP = re.compile(rf"{_TEXT}\{{((?>(?:[^{{}}]|\{{-?[0-9]\}})*))\}}|\\cdot|\\[,;:! ]")
# Units that are written with commands, as words.
_ANGSTROM = re.compile(r"\\AA(?![A-Za-z])|Å|\\mathring\s*\{\s*(?:\\(?:text|mathrm)\s*\{\s*A\s*\}|A)\s*\}")
_OHM = re.compile(rf"((?:~|\\[,;: ])\s*)(?:{_TEXT}\{{\s*([kM]?)\s*\}}|([kM]))?\s*\\Omega$")
_MICRO = re.compile(rf"\\mu\s*({_TEXT}\{{)\s*|((?:~|\\[,;: ])\s*)\\mu\s+(?=m$)|μ")


def split_unit(answer: str) -> tuple[str, str]:
    r"""(the answer without its unit, the unit's name), ("", "") standing for no change.

    The name is "" where there is no unit, "?" where it is none that is known ("apples"), else such as "cm^2" or
    "h^-1 mi", in one order. 5 feet 6 inches are (5,6) with the unit "ft, in".
    """
    if compound := _COMPOUND.fullmatch(_UNWRAP.sub(r" \1 ", answer).strip()):
        numbers, units = zip(*_QUANTITY.findall(compound[0]), strict=True)
        names = [_lookup(unit) for unit in units]
        if all(names) and len({*names}) == len(names):  # 2 cm, 3 cm is a list
            return f"({','.join(numbers)})", ", ".join(filter(None, names))
    answer = _MICRO.sub(lambda found: f"{found[1] or found[2] or ''}µ", _ANGSTROM.sub(" angstrom ", answer))
    answer = _OHM.sub(lambda found: f"{found[1]}{found[2] or found[3] or ''}ohm", answer)
    if (found := _IN_TEXT.search(answer)) and not _TEXT_BEFORE.search(answer, 0, found.start()):
        unit = _name(_UNWRAP.sub(r" \1 ", found[1]), spaced=True, known_only=False)
    elif (found := _BARE.search(answer)) and not _PRODUCT.fullmatch(found[2]):
        spaced = bool(found[1].strip("!\\")) and re.search(r"[0-9.]$", answer[: found.start()]) is not None
        unit = _name(found[2], spaced, known_only=not spaced)
    else:
        return answer, ""
    return (answer[: found.start()].rstrip(" ~"), unit) if unit else (answer, "")


def _name(text: str, spaced: bool, known_only: bool) -> str:
    """The canonical name of a unit written as `text`; "" if it is none, as of 5-adic."""
    powers: Counter[str] = Counter()
    if text.lstrip().startswith("-"):
        return ""
    known, sign, power_word = True, 1, 1
    text = _SQUARED.sub(r"\2 \1", text)
    for word in _WORD.finditer(text):
        spelling = word[1]
        if spelling is None or spelling == "per":
            sign = -1  # of all that follows: J/kg K
            continue
        if spelling.casefold() in _NO_UNIT or _NUMBER_WORDS.match(text, word.start()):
            return ""
        if spelling in _POWER_WORDS:  # 18 square units; of 18 square inches and 18 in^2
            power_word = _POWER_WORDS[spelling]
            continue
        name = _lookup(spelling)
        if name is None or (
            not spaced and len(spelling) < 3 and spelling not in _UNSPACED and not _FOREIGN.match(spelling)
        ):
            if known_only or _FOREIGN.match(spelling) or (len(spelling) < 3 and spelling != "of"):  # 20 cups of feed
                return ""
            known = False
            name = spelling
        power = int(word[2] or power_word)
        power_word = 1
        over, *under = _LONG_FORM.get(name, (name,))
        powers[over] += power if power < 0 else sign * power
        for part in under:
            powers[part] -= sign * power
    if not powers or re.search(r"[0-9]|(?<!\\),", re.sub(r"\^\s*\{?-?[0-9]\}?", "", text)):
        return ""
    units = (name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()))
    return " ".join(units) if known else "?"


def _lookup(spelling: str) -> str | None:
    if spelling in _NAME:
        return _NAME[spelling]
    small = spelling.casefold()
    if len(spelling) < 3 and small not in _UNSPACED:  # Nm is not nm
        return None
    return _NAME.get(small) or _NAME.get(small.removesuffix("s"))
