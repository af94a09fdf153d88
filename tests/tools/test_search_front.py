"""The front of the additive model, against trying every configuration."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from samq.tools.search_front import Choice, Option, front_of, within

sizes, losses = st.integers(1, 40), st.integers(0, 50).map(float)
layers = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(st.tuples(sizes, losses), min_size=1, max_size=4), min_size=1
).map(
    lambda found: {
        layer: [Option(str(index), *figures) for index, figures in enumerate(options)]
        for layer, options in found.items()
    }
)


def everything(options: dict[str, list[Option]]) -> list[tuple[int, float]]:
    """(bytes, loss) of every configuration."""
    return [
        (sum(option.bytes for option in chosen), sum(option.loss for option in chosen))
        for chosen in product(*options.values())
    ]


def agrees(choice: Choice, options: dict[str, list[Option]]) -> bool:
    """The sums are those of the forms."""
    chosen = [next(o for o in options[layer] if o.form == form) for layer, form in choice.forms.items()]
    sums = (sum(option.bytes for option in chosen), sum(option.loss for option in chosen))
    return choice.forms.keys() == options.keys() and (choice.bytes, choice.loss) == sums


@given(layers)
def test_no_configuration_lies_below_the_front(options: dict[str, list[Option]]) -> None:
    front = front_of(options)
    assert all(agrees(choice, options) for choice in front)
    for left, right in pairwise(front):
        slope = (right.loss - left.loss) / (right.bytes - left.bytes)
        for size, loss in everything(options):
            assert loss >= left.loss + slope * (size - left.bytes) - 1e-9


@given(layers)
def test_the_front_goes_from_the_smallest_to_the_least_loss(options: dict[str, list[Option]]) -> None:
    front = front_of(options)
    assert front[0].bytes == min(size for size, _ in everything(options))
    assert front[-1].loss == min(loss for _, loss in everything(options))
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in pairwise(front))


@given(layers, st.integers(0, 130))
def test_a_budget_is_kept_and_used(options: dict[str, list[Option]], budget: int) -> None:
    choice, front = within(options, budget), front_of(options)
    if choice is None:
        assert front[0].bytes > budget
        return
    assert agrees(choice, options)
    assert choice.bytes <= budget
    assert choice.loss <= min(point.loss for point in front if point.bytes <= budget)


def test_what_does_not_fit_is_passed_over() -> None:
    options = {
        "large": [Option("small", 10, 9.0), Option("big", 110, 0.0)],
        "narrow": [Option("small", 1, 0.1), Option("big", 3, 0.0)],
    }
    choice = within(options, 20)
    assert choice == Choice({"large": "small", "narrow": "big"}, 13, 9.0)
    assert within(options, 10) is None
