"""Visibility rules against the definitions, slot by slot."""

from tempo_mlx.lattice.lattice import Lattice, Slot, Step, Token
from tempo_mlx.rules.visibility import VISIBILITY, may_attend, weighted_rows

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def lattices(draw):
    """A lattice of a short prompt and up to six sets."""
    lattice = Lattice([0] * draw(st.integers(1, 4)))
    last = [len(lattice.prompt_tokens) - 1]
    for step in range(draw(st.integers(1, 6))):
        parents = draw(st.lists(st.sampled_from(last), min_size=1, max_size=4))
        reserved = lattice.reserve(len(parents), step, parents)
        last = reserved.index.tolist()
        tokens = [
            Token(0, "", 0.5, slot, parent) for slot, parent in zip(last, parents, strict=True)
        ]
        lattice.steps.append(Step(step, step, 0.1, tokens))
    return lattice


def parent_of(lattice, slot):
    return next(t.parent for step in lattice.steps for t in step.tokens if t.slot == slot)


def by_definition(rule, lattice, q, k):
    slots, length = lattice.slots, len(lattice.prompt_tokens)
    if q == k:
        return True
    if VISIBILITY[rule].has_parents:
        if k < length:
            return k <= q
        while q > k:
            q = parent_of(lattice, q)
        return q == k
    same, earlier = slots.step[k] == slots.step[q], slots.step[k] < slots.step[q]
    if rule == "isolated":
        return earlier
    if rule == "visible":
        return earlier or same
    return earlier and slots.set_size[k] == 1


@pytest.mark.parametrize("rule", VISIBILITY)
@given(lattices())
def test_rule_is_its_definition(rule, lattice):
    slots = lattice.slots
    mask = may_attend(rule, slots, slots)
    expected = [
        [by_definition(rule, lattice, q, k) for k in range(len(slots))] for q in range(len(slots))
    ]
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("rule", VISIBILITY)
@given(lattices())
def test_sees_matches_the_definition(rule, lattice):
    chains = lattice.slots.chains
    rows = zip(lattice.slots.step.tolist(), lattice.slots.set_size.tolist(), chains, strict=True)
    slots = [Slot(i, step, size, frozenset(c.tolist())) for i, (step, size, c) in enumerate(rows)]
    for query in slots[len(lattice.prompt_tokens) :]:
        for key in slots[: query.index]:
            sees = VISIBILITY[rule].sees(query, key)
            assert sees == by_definition(rule, lattice, query.index, key.index)


@pytest.mark.parametrize("rule", VISIBILITY)
@given(lattices())
def test_no_row_is_masked_everywhere_and_nothing_sees_later_steps(rule, lattice):
    slots = lattice.slots
    mask = may_attend(rule, slots, slots)
    assert mask.any(axis=1).all()
    assert not mask[slots.step[None] > slots.step[:, None]].any()


@pytest.mark.parametrize("rule", VISIBILITY)
def test_prompt_is_causal(rule):
    slots = Lattice([0] * 5).slots
    np.testing.assert_array_equal(may_attend(rule, slots, slots), np.tri(5, dtype=bool))


@pytest.mark.parametrize("rule", VISIBILITY)
@given(lattices(), st.integers(0, 10**6))
def test_weights_are_added_as_logarithms_where_a_key_may_be_seen(rule, lattice, seed):
    slots = lattice.slots
    weights = np.random.default_rng(seed).uniform(0.1, 1, len(slots))
    allowed = may_attend(rule, slots, slots)
    rows = weighted_rows(allowed, slots, slots, weights)
    for q, k in np.ndindex(rows.shape):
        siblings = allowed[q] & (slots.step == slots.step[q])
        if not allowed[q, k]:
            assert rows[q, k] == -np.inf
        elif slots.step[q] == slots.step[k] and siblings.sum() == 1:
            assert rows[q, k] == 0
        else:
            assert rows[q, k] == pytest.approx(np.log(weights[k]), abs=1e-6)
