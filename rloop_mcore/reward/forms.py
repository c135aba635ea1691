r"""What two answers look like, where a parser would see one thing in two: words, units, ratios, brackets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations

from rloop_mcore.reward.reading import Reading

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|up)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt max min gcd lcm mod"
_MATHEMATICAL = frozenset(_FUNCTIONS.split()) | {"and", "inf", "infinity"}
_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_DETAILS = re.compile(
    r"[\s.,\"'`]|(?<=[0-9]):00(?=\s*[ap]\.?\s?m)|(?<=[a-z]\s[0-9])(?:st|nd|rd|th)\b|(?<=[a-z]\s[0-9]{2})(?:st|nd|rd|th)\b"
)
_SHORT_WORDS = frozenset({"no", "yes", "on", "up", "dne", "all", "odd", "am", "pm"})
_CLOCK = re.compile(r"(?:[01]?[0-9]|2[0-4]):[0-5][0-9](?::[0-5][0-9])?")
_DATE = re.compile(r"[0-9]{4}-(?:0[1-9]|1[0-2])-[0-3][0-9]")  # no difference
_RATIO = re.compile(r"[^:]+(?::[^:]+)+")
_GREEK = r"\\(?:gamma|delta|theta|lambda|xi|pi|sigma|upsilon|phi|psi|omega)(?![A-Za-z])"
# Neither a command's nor a word's: of Alice, but not of the mgR and Mgh that are products.
_LETTER = re.compile(
    rf"(?i:({_GREEK}))|\\text[a-z]*\s*\{{[^{{}}]*[A-Za-z]{{3}}[^{{}}]*\}}|\\[A-Za-z]+"
    r"|(?<![A-Za-z])(?:[a-z]{3,}|(?=[A-Za-z]*[AEIOUYaeiouy])(?:[A-Z][a-z]{2,}|[A-Z]{3,}))(?![A-Za-z])|([A-Za-z])"
)
_FEW = re.compile(r"\(?(?:[a-z]{1,3}|[A-Z]{1,3})\)?")
_LIMIT = re.compile(r"\\lim\s*_\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MATRICES = re.compile(r"[A-Z]\s*\^\s*\{(?:\(T\)|-1)\}")
_CAPITAL = re.compile(r"(?<![a-z\\])[A-Z](?:\s*\^\s*\{[^{}]*\})?")
_SIGN = re.compile(
    r"(?:(?<![A-Za-z\\])[A-Za-z]|[A-Za-z]\}|\\nabla)\s*\\(times|cdot)(?![A-Za-z])\s*(?=\\?[A-Za-z])(?!\\(?:frac|sqrt|pi|binom)(?![A-Za-z]))"
)
_VECTOR = re.compile(r"\\(?:vec|nabla|overrightarrow|mathbf)(?![A-Za-z])")
_FACTOR = re.compile(rf"\\times(?![A-Za-z])|{_LETTER.pattern}")
_SYMBOL = re.compile(r"\\[A-Za-z]+|([A-Za-z](?:_(?:[0-9]|\{\s*[0-9]\s*\}))?)")
# Of integration; and of a function that an equation was solved for: f(x) = cx.
_CONSTANT = re.compile(r"(?:^|[-+=({])\s*([Cc](?:_[0-9])?)(?=$|\s*(?:e\^|x\^|\\(?:cos|sin)|\)|[a-z]?\}))")
_FUNCTION = re.compile(r"([fgh])\(([a-z])\)\s*=(.*)")
_LEFT_SIDE = re.compile(r"([A-Za-z])(\([a-z]\))?\s*=")
_PERIOD = re.compile(r"(?<![A-Za-z\\])([klmn])\s*\\pi(?![A-Za-z])|\\pi\s*([klmn])(?![A-Za-z])")
_MULTIPLE = re.compile(r"[nN]\s*=[^=]*?(?<![A-Za-z\\])([klm])(?![A-Za-z])[^=]*")  # n = 2k + 1, of any integer k
_ANY_CONSTANT = re.compile(r"[A-DKacdklmn](?:_[0-9])?")
_OF_A_PERIOD = frozenset("xtyz")
_OF_A_SOLUTION = frozenset("efghikstuvwxyz")  # letters beside its constants: the c of a + b + c is none
_MOST_CONSTANTS = 4
_INDEXED = re.compile(r"[0-9]\s*_")
_LOOSE = re.compile(
    r"\\(?:equiv|[lc]?dots)(?![A-Za-z])|\.\.\.|…|(?<=[0-9)}])\s?['\"]|\|\s*_|\\infty\s*\]|\[\s*-\s*\\infty"
)
_ASSIGNED = re.compile(r"([A-Za-z])\s*=")
THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def words_of(answer: str) -> set[str]:
    r"""The words of three letters or more in an answer, in \text{} or out; not names of functions, nor and, or."""
    bare = _COMMAND.sub(" ", _TEXT.sub(r" \1 ", answer))
    return {word.casefold() for word in _WORD.findall(bare)} - _MATHEMATICAL


def plain_text(answer: str) -> str:
    """The words of a text answer: no text commands, spaces, periods or leading article, lower case."""
    text = re.sub(r"\\[,;:! ]|[~$]", " ", _TEXT.sub(r" \1 ", answer)).strip().casefold()
    return _DETAILS.sub("", _ARTICLE.sub("", text))


def same_text(gold: str, answer: str) -> bool | None:
    """Are two answers in words the same? None where one of them is not in words alone.

    A parser would take words for products of letters: "east" would be "seat".
    """
    one, other = plain_text(gold), plain_text(answer)
    both = [
        re.fullmatch(r"(?=.*[a-z]{3})[a-z-]{4,}|[0-9:]+[ap]m", text) or text in _SHORT_WORDS for text in (one, other)
    ]
    if all(both):
        return one == other
    formula = re.search(r"[\\/^=+*]|^\S+$", _TEXT.sub("", gold))  # of letters: abc/4R is not abc/4r
    if one and one == other and words_of(gold):
        return True if not formula or len({*map(plain_text, cases_apart(gold, answer))}) == 1 else None
    if "=" in gold and sorted(re.sub(r"\s", "", gold).split("=")) == sorted(re.sub(r"\s", "", answer).split("=")):
        return True  # AB = BA, which says nothing to a parser
    if both[0] and not _COMMAND.search(_TEXT.sub("", gold)):
        return False
    return None


def conflict(gold: Reading, answer: Reading) -> bool:
    """Does the form of the answer rule out that it is the gold, whatever a parser makes of it?"""
    known = "?" not in (gold.unit, answer.unit)
    if gold.unit and answer.unit and known and gold.unit != answer.unit:
        return True
    if _bases_conflict(gold, answer):
        return True
    if _LOOSE.search(answer.text) and not _LOOSE.search(gold.text):
        return True  # n \equiv 72, 72\ldots, 72', x|_{x=72}, (0,\infty]
    if "," in gold.text and r"\ldots" in gold.text and r"\ldots" not in answer.text:
        return True  # a parser drops them
    if "%" in answer.text and "," in answer.text and "%" not in gold.text:
        return True  # of a list the parser drops the sign
    if gold.either != answer.either and words_of(gold.text):
        return True  # Alice or Bob are not Alice and Bob
    if not all(_is_product(word, gold.text) for word in words_of(answer.text) - words_of(gold.text)):
        return True  # it says more than the gold does: "5 or maybe 6"
    if _limits(gold.text) and _limits(gold.text) != _limits(answer.text):
        return True  # to a parser the limit of a_n is a_n, wherever it is taken
    if _vector_products_conflict(gold.text, answer.text):
        return True
    if _MATRICES.search(gold.text) and _capitals(gold.text) != _capitals(answer.text):
        return True  # B^{-1}A^{-1} is not A^{-1}B^{-1}
    names = _ASSIGNED.findall(answer.text)
    if is_tuple(gold.text) and names != sorted(names):
        return True  # y = 3, x = 4 is not (3, 4)
    return _ratios_conflict(gold.text, answer.text) or _brackets_conflict(gold.text, answer.text)


def _is_product(word: str, gold: str) -> bool:
    """Is a word nothing but variables of the gold: mgl where that has m, g and l?"""
    return set(word) <= {found[2].casefold() for found in _LETTER.finditer(gold) if found[2]}


def _limits(text: str) -> list[str]:
    return [re.sub(r"\s", "", place.replace("rightarrow", "to")) for place in _LIMIT.findall(text)]


def _capitals(text: str) -> list[str]:
    capitals = [capital.replace(" ", "") for capital in _CAPITAL.findall(text)]
    return capitals if len(capitals) > 1 else []


def _vector_products_conflict(gold: str, answer: str) -> bool:
    """b x a is not a x b, nor a . b. Of letters that are no marked vectors a x b may be ab."""
    ours, theirs = (set(_SIGN.findall(side)) for side in (gold, answer))
    vectors = _VECTOR.search(gold) is not None
    if "times" not in (ours | theirs if vectors else ours) or not (vectors or theirs):
        return False
    return [found[0] for found in _FACTOR.finditer(gold)] != [found[0] for found in _FACTOR.finditer(answer)]


def _bases_conflict(gold: Reading, answer: Reading) -> bool:
    """The gold's base need not be repeated; but a number without one is decimal: 45 is neither 45_8 nor 45_x."""
    if _INDEXED.search(answer.text) and not _INDEXED.search(gold.text):
        return True
    if gold.base and not gold.text.isdigit() and gold.text != answer.text.upper():
        return True  # 4B is not B4
    if gold.base and answer.base:
        return gold.base != answer.base
    if gold.base:
        return not _is_numeral(gold)
    if answer.base and answer.base != "10":
        decimal = re.fullmatch(r"[0-9]{2,}|[0-9]*\.[0-9]+", gold.text)
        return decimal is not None or not _is_numeral(answer)
    return False


def _is_numeral(reading: Reading) -> bool:
    return not reading.base.isdigit() or all(int(d, 36) < int(reading.base) for d in reading.text if d != ".")


def cases_apart(gold: str, answer: str) -> tuple[str, str]:
    """Both texts, with other letters for capitals that occur beside their small letters: to a parser they are one.
    So are I^2 and I, which is the identity to it; and E_1 is nothing.

    Not where both are but letters of one case: choices, and x for X, are taken either way; but not mgr for mgR.
    """
    found_letters = (found[1] or found[2] for text in (gold, answer) for found in _LETTER.finditer(text))
    letters = {letter for letter in found_letters if letter}
    small = letters | {*_COMMAND.sub("", _TEXT.sub("", f"{gold} {answer}"))}  # and those of words
    capitals = [letter for letter in sorted(letters) if letter in "EI" or letter.lower() in small - {letter}]
    if not capitals or all(_FEW.fullmatch(_TEXT.sub(r"\1", text).strip(" ~.$")) for text in (gold, answer)):
        return gold, answer
    free = [letter for letter in "qwzvyuthkmnpsxabrcjgf" if not {letter, letter.upper()} & small]
    other = dict(zip(capitals, free, strict=False))

    def renamed(found: re.Match[str]) -> str:
        return other.get(found[0], found[0])

    return _LETTER.sub(renamed, gold), _LETTER.sub(renamed, answer)


def in_letters_of(gold: str, answer: str) -> Iterator[str]:
    """The answer, and that with its constants (and its function's argument) named as the gold's are, in every order.

    C e^{2x} is A e^{2x}, and f(n) = n + 2 is f(x) = x + 2; C_1 and C_2 may change places. So is \\pi/4 + n\\pi for the
    gold \\pi/4 + k\\pi, n = 2m + 1 for n = 2k + 1, and y = x for y(x) = x or f(x) = x.
    """
    answer = _with_left_side_of(gold, answer)
    yield answer
    one, other = _FUNCTION.fullmatch(gold), _FUNCTION.fullmatch(answer)
    if one and other and one[1] == other[1] and one[2] != other[2] and one[2] not in other[3]:
        answer = _with_symbols(answer, {other[2]: one[2]})
        yield answer
    in_gold = _symbols(gold)
    ours, theirs = set(in_gold), set(_symbols(answer))
    constants = {name for name in _CONSTANT.findall(gold) if len(ours) > 1 and in_gold.count(name) == 1}
    if not ours - constants <= _OF_A_SOLUTION or (constants == {"c"} and "=" not in gold and "e^" not in gold):
        constants = set()
    if one:
        constants |= {name for name in ours - theirs - {one[1]} if _ANY_CONSTANT.fullmatch(name)}
    if (found := _PERIOD.search(gold)) and ours <= _OF_A_PERIOD | set(found.groups()):
        constants = {found[1] or found[2]}
    if (found := _MULTIPLE.fullmatch(gold)) and ours <= {"n", "N", found[1]}:
        constants = {found[1]}
    named = sorted(name for name in theirs if name in constants or name not in ours)
    if len(named) == len(constants) <= _MOST_CONSTANTS and all(map(_ANY_CONSTANT.fullmatch, named)):
        for order in permutations(sorted(constants)):
            if named != list(order):
                yield _with_symbols(answer, dict(zip(named, order, strict=True)))


def _with_left_side_of(gold: str, answer: str) -> str:
    one, other = _LEFT_SIDE.match(gold), _LEFT_SIDE.match(answer)
    if not one or not other:
        return answer
    same = one[1] == other[1] and not (one[2] and other[2])
    names = {side[1] + (side[2] or "") for side in (one, other)}
    return one[0] + answer[other.end() :] if same or names == {"y", "f(x)"} else answer


def _symbols(text: str) -> list[str]:
    return [found[1] for found in _SYMBOL.finditer(text) if found[1]]


def _with_symbols(text: str, names: dict[str, str]) -> str:
    return _SYMBOL.sub(lambda found: names.get(found[0], found[0]), text)


def _ratios_conflict(gold: str, answer: str) -> bool:
    """4:30 is a time and no quotient; the quotient of 1:2:3 is not that of 1:3:2, nor a date the difference."""
    sides = [_TEXT.sub(r"\1", side).replace(" ", "") for side in (gold, answer)]
    if _DATE.fullmatch(sides[0]):
        return sides[0] != sides[1]
    parts = [side.split(":") if _RATIO.fullmatch(side) else [] for side in sides]
    if not any(parts) or parts[0] == parts[1]:
        return False
    return _CLOCK.fullmatch(sides[0]) is not None or any(len(part) > 2 for part in parts)


def _brackets_conflict(gold: str, answer: str) -> bool:
    """A set is no tuple and no interval."""
    one, other = _bracket(gold), _bracket(answer)
    if one and other:
        return (one == r"\{") != (other == r"\{")
    return False


def is_tuple(answer: str) -> bool:
    """(a, b) or [a, b], which is an interval as well."""
    return _bracket(answer) in ("(", "[")


def _bracket(answer: str) -> str:
    answer = re.sub(r"^[^=]*(?:=|\\in(?![A-Za-z]))", "", answer).strip()
    opening = next((bracket for bracket in ("(", "[", r"\{") if answer.startswith(bracket)), "")
    if not opening or "," not in answer:
        return ""
    depth = 0
    for found in re.finditer(r"\\?[()\[\]{}]", answer):
        depth += 1 if found[0].lstrip("\\") in "([{" else -1
        if depth == 0:
            return opening if found.end() == len(answer) else ""
    return ""


def entries(answer: str) -> list[str]:
    r"""The entries of a list without brackets around it, without the name in "x = 1, 1, 2" or "x = 1, x = 1"."""
    parts = parts_of_list(answer)
    names = {part.partition("=")[0].strip() for part in parts if "=" in part}
    return [(part.partition("=")[2] if len(names) == 1 and "=" in part else part).strip() for part in parts]


def parts_of_list(text: str) -> list[str]:
    """What stands between the commas that are in no brackets."""
    if THOUSANDS.fullmatch(text):
        return [text]
    depth, parts = 0, [""]
    for found in re.findall(r"\\?.", text):
        depth += (found[-1] in "([{") - (found[-1] in ")]}")
        if found == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += found
    return parts
