"""Find the answer in a response, by the answer format its prompt asked for.

What is outside that format is never looked at: a right number elsewhere in the text is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rloop_mcore.errors import UserError

# A box that opens, one without braces around the number that ends its formula, backslashes in pairs (a long run is read
# once), an escaped character (its brace is text), a brace.
_BRACES = re.compile(
    r"\\+boxed(?:\s*(?P<box>\{)|[ ]+(?P<number>-?[0-9]++(?>(?:[.,/][0-9]++)*))(?=[ ]*(?:\$|\\[)\]])))"
    r"|(?:\\\\)+|\\.|[{}]",
    re.DOTALL,
)
# What stands between the boxes of one answer: \boxed{2} or \boxed{3}, $x = \boxed{2}$ and $x = \boxed{3}$; and
# before that in a list: \boxed{2}, \boxed{3} and \boxed{5}.
_JOINED = re.compile(
    r"[\s$,\\()\[\]]*+(?:text\s*\{)?\s*(or|and)(?![A-Za-z])[\s$}\\()\[\]]*+(?:[A-Za-z](?:_[0-9])?\s*=\s*)?"
)
_LISTED = re.compile(r"[\s$\\()\[\]]*+,[\s$\\()\[\]]*+(?:[A-Za-z](?:_[0-9])?\s*=\s*)?")
_ANSWER = re.compile(r"\banswer[ \t]*\**[ \t]*:[ \t]*\**", re.IGNORECASE)
# What follows it, there or (as DAPO's verifier has it) on the next line with text: a displayed formula, or a line.
_LINE = re.compile(r"\s*+(?P<answer>\\\[.*?\\\]|\$\$.*?\$\$|[^\n]*)", re.DOTALL)


def extract_answer(response: str, truncated: bool, answer_format: str) -> tuple[str, str]:
    """The answer in a response and a reason.

    Returns (answer, "") where there is one, else ("", "no_answer"), or ("", "truncated") when the response was cut
    at the token limit. `answer_format` is a key of `ANSWER_FORMATS`; another one is a UserError.
    """
    if answer_format not in ANSWER_FORMATS:
        known = " or ".join(ANSWER_FORMATS)
        raise UserError(f"reward.answer_format={answer_format!r} is unknown: use {known}")
    answer = ANSWER_FORMATS[answer_format](response, truncated)
    if answer:
        return answer, ""
    return "", "truncated" if truncated else "no_answer"


def last_box(response: str, truncated: bool = False) -> str:
    r"""Content of the last complete `\boxed{}`, whatever follows it; "" if there is none or it is empty.

    `\boxed 5$` is complete too: MATH's solutions have such. Of nested boxes the outermost counts. Boxes with nothing
    but "or" or "and" between them are one answer, with that word in it and those that a comma parts from the first of
    them. One pass over the text, whatever the braces do, from the first box on: no brace before it closes one.
    """
    first = response.find(r"\boxed")
    if first < 0:
        return ""
    open_braces: list[tuple[int, int]] = []  # (where its box begins, -1 if it has none; where its content starts)
    listed: list[str] = []  # the answer, after those that a comma parts from it
    answer, end = "", 0
    for token in _BRACES.finditer(response, first):
        begin, content = token.start(), token["number"]
        if token["box"]:
            open_braces.append((begin, token.end()))
        elif token[0] == "{":
            open_braces.append((-1, token.end()))
        elif token[0] == "}" and open_braces:
            begin, start = open_braces.pop()
            content = response[start : token.start()].strip() if begin >= 0 else None
        if content is not None:
            joined = _JOINED.fullmatch(response, end, begin) if answer and content != answer else None
            answer = rf"{', '.join(listed)} \text{{ {joined[1]} }} {content}" if joined and content else content
            if not _LISTED.fullmatch(response, end, begin):
                listed = []
            listed.append(answer)
            end = token.end()
    return answer


def last_answer_line(response: str, truncated: bool) -> str:
    """What follows the last "Answer:", there or below; "" if nothing does or the cut may have shortened it."""
    labels = list(_ANSWER.finditer(response))
    line = _LINE.match(response, labels[-1].end()) if labels else None
    if line is None or (truncated and line.end() == len(response)):
        return ""
    return line["answer"].strip().strip("*`").strip()


ANSWER_FORMATS: dict[str, Callable[[str, bool], str]] = {"boxed": last_box, "answer_line": last_answer_line}
