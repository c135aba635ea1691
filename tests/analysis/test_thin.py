from rloop_mcore.analysis.plots import Figure
from rloop_mcore.analysis.thin import POINTS, thin


def figure(count: int) -> Figure:
    y = [float(i % 7) for i in range(count)]
    y[count // 2] = 1000.0  # a spike must not vanish
    curve = {"type": "scatter", "x": list(range(count)), "y": [None, *y[1:]]}
    points = {"type": "scatter", "x": list(range(count)), "y": y, "text": ["θ"] * count}
    short = {"type": "scatter", "x": [1, 2], "y": [None, 3.0]}
    bars = {"type": "bar", "x": list(range(2 * POINTS)), "y": [2.0] * 2 * POINTS}
    return Figure("title", "Caption.", {"data": [curve, points, short, bars], "layout": {}})


def test_short_curves_are_left_alone() -> None:
    assert thin(figure(POINTS)) == figure(POINTS)


def test_a_long_curve_keeps_its_extremes_and_says_so() -> None:
    long = figure(10 * POINTS + 1)
    thinned = thin(long)
    curve, *others = thinned.spec["data"]
    assert POINTS / 2 <= len(curve["x"]) <= POINTS
    assert curve["x"] == sorted(curve["x"])
    assert all(long.spec["data"][0]["y"][x] == y for x, y in zip(curve["x"], curve["y"], strict=True))
    assert (max(curve["y"]), min(curve["y"])) == (1000.0, 0.0)
    assert others == long.spec["data"][1:]
    assert thinned.caption == "Caption. Drawn: the lowest and the highest of every 21 of 12001 points."
