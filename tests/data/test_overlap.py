"""Which training problems an evaluation set holds too."""

from rloop_mcore.config import Config
from rloop_mcore.data.overlap import contradicting, overlapping
from rloop_mcore.types import Problem

LONG = "A train leaves the station at noon with a speed of $60$ miles per hour and meets another after two hours."


def problem(name: str, text: str) -> Problem:
    return Problem(name, text, "1")


def test_same_text_but_for_case_spaces_and_dollars() -> None:
    found = overlapping(
        [problem("a", "what is 1  + 1?"), problem("b", "What is $1+2$?"), problem("c", "What is 1 + 10?")],
        [problem("x", "What is $1+1$?")],
    )
    assert found == {"a": "exact"}


def test_a_decimal_point_is_no_punctuation_and_punctuation_no_text() -> None:
    found = overlapping(
        [problem("a", "Compute 1.5 + 2"), problem("b", "Compute 15 + 2."), problem("c", "$$")],
        [problem("x", "Compute 15 + 2"), problem("y", "?")],
    )
    assert found == {"b": "exact"}


def test_a_run_of_thirteen_words() -> None:
    words = LONG.split()
    shorter = [" ".join(words[:12]) + " and then it stops", "Before: " + " ".join(words[3:18]), "Yes. " * 30]
    assert overlapping([problem(str(n), text) for n, text in enumerate(shorter)], [problem("x", LONG)]) == {
        "1": "13-gram"
    }
    assert overlapping([problem("a", LONG + " Where?")], []) == {}


def test_a_problem_that_the_evaluation_set_repeats_is_no_turn_of_phrase() -> None:
    evaluation = [problem("x", LONG), problem("y", LONG.upper() + "!")]
    assert overlapping([problem("a", LONG + " Where?")], evaluation) == {"a": "13-gram"}


def test_a_turn_of_phrase_is_no_overlap() -> None:
    phrase = "The answer can be written as m/n where m and n are relatively prime positive integers. Find m+n."
    evaluation = [problem("x", f"First thing. {phrase}"), problem("y", f"Another. {phrase}")]
    assert overlapping([problem("a", f"A third. {phrase}")], evaluation) == {}
    assert overlapping([problem("a", f"A third. {phrase}")], evaluation[:1]) == {"a": "13-gram"}


def test_against_all_runs_counted_by_hand() -> None:
    """Two texts of single-letter words: they overlap where they share 13 letters in a row, by brute force."""
    one, others = "abcdefghijklmnopqrstuvwxyz", {"n": "nopqrstuvwxyz", "o": "opqrstuvwxyz", "m": "zzmnopqrstuvwxyaa"}
    found = overlapping([problem(name, " ".join(text)) for name, text in others.items()], [problem("x", " ".join(one))])
    by_hand = {name for name, text in others.items() if any(text[i : i + 13] in one for i in range(len(text) - 12))}
    assert set(found) == by_hand == {"n", "m"}


def test_the_option_is_off_by_default() -> None:
    assert Config().data.remove_overlap is False


def test_a_large_set_is_looked_through_once() -> None:
    problems = [problem(str(n), f"Problem {n}: {LONG}") for n in range(2000)]
    assert len(overlapping(problems, problems[:1])) == 2000


def test_one_text_with_two_answers() -> None:
    texts = [("a", "What is $1+1$?", "2"), ("b", "what is 1 + 1", " 2"), ("c", "What is 1+1?", "3"), ("d", "?", "1")]
    problems = [Problem(name, text, answer) for name, text, answer in [*texts, ("e", "!", "2")]]
    assert contradicting(problems) == {"c": "answer 3, which is 2 in a"}
