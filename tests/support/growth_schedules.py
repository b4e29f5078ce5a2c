"""Schedules of growth drawn at random."""

from hypothesis import strategies as st

from impatient.networks.growth import Schedule


@st.composite
def schedules(draw: st.DrawFn, sections: int = 3, most: int = 4) -> Schedule:
    rows = [tuple(draw(st.integers(1, 2)) for _ in range(sections))]
    for _ in range(draw(st.integers(0, 5))):
        row = tuple(min(most, count + draw(st.sampled_from([0, 0, 1, 2]))) for count in rows[-1])
        rows += [row] if row != rows[-1] else []
    return Schedule(tuple(rows))
