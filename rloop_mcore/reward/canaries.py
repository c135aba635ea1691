r"""Answers with known verdicts: the pool grades them before anything else, so that a broken verifier stops the run."""

BOXED = r"so \boxed{{{}}}"
ANSWER_LINE = "Answer: {}"

# (gold, answer, is it right)
CANARIES = [
    ("42", "42", True),
    ("42", "43", False),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("50", r"50\%", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+x+1", False),
    ("[0,1)", "[0,1]", False),
    (r"\{1,2\}", r"\{2,1\}", True),
]
