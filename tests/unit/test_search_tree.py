"""The search core without a language model: bandits, brute force, trees worked out by hand."""

import itertools
import json
import math
import re
from collections import Counter

from tempo_mlx.search.monte_carlo import (
    BACKUPS,
    SELECTIONS,
    SearchError,
    Siblings,
    TreePolicy,
    TreeSearch,
    puct,
    uct,
)
from tempo_mlx.search.tree import NONE, ROOT, Tree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


class Game:
    """An environment written out as {path: ([actions], [priors])} and {path: value}.

    Paths without a family are terminal.
    """

    def __init__(self, families, values, root=NONE):
        self.tree = Tree(root)
        self.families = families
        self.values = values
        self.expanded, self.evaluated = [], []  # paths of each call

    def expand(self, nodes):
        paths = [tuple(self.tree.path(node)) for node in nodes]
        self.expanded.append(paths)
        return [self.family(path) for path in paths]

    def evaluate(self, nodes):
        paths = [tuple(self.tree.path(node)) for node in nodes]
        self.evaluated.append(paths)
        return np.array([self.value(path) for path in paths])

    def family(self, path):
        return self.families.get(path, ([], []))

    def value(self, path):
        return self.values[path]

    def search(self, **policy):
        return LoggedSearch(self.tree, self.expand, self.evaluate, TreePolicy(**policy))


class RandomGame(Game):
    """Families and values drawn from a seed and the path alone, so that the order is all one."""

    def __init__(self, seed, width=3, depth=4):
        super().__init__({}, {})
        self.seed, self.width, self.depth = seed, width, depth

    def family(self, path):
        rng = np.random.default_rng([self.seed, 0, *path])
        n = int(rng.integers(0 if path else 1, self.width + 1)) if len(path) < self.depth else 0
        return rng.permutation(10)[:n], rng.random(n)

    def value(self, path):
        return np.random.default_rng([self.seed, 1, *path]).random()


class LoggedSearch(TreeSearch):
    """A search that notes what it backs up, as (path, value)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log = []

    def backward(self, path, value):
        self.log.append((tuple(self.tree.path(path[-1])), value))
        super().backward(path, value)


def snapshot(tree):
    """{path: (visits, value, prior)} of the nodes, whatever their numbers."""
    return {
        tuple(tree.path(node)): (
            int(tree.visits[node]),
            float(tree.value[node]),
            float(tree.prior[node]),
        )
        for node in range(len(tree))
    }


def visited(tree):
    return {path: entry[0] for path, entry in snapshot(tree).items() if path and entry[0]}


def values_of(tree):
    return {path: entry[1] for path, entry in snapshot(tree).items() if path and entry[0]}


policies = st.fixed_dictionaries(
    {
        "selection": st.sampled_from(sorted(SELECTIONS)),
        "backup": st.sampled_from(sorted(BACKUPS)),
        "exploration": st.sampled_from([0.0, 0.3, 1.4]),
        "leaves_per_batch": st.integers(1, 7),
    }
)
seeds = st.integers(0, 10**6)


# Trees written out by hand. Root: a (prior .6, value .5) and b (.4, .8); below a: c (.7, .9) and
# d (.3, .1); below b: e (.6, .2) and f (.4, 1). The four are terminal.
A, B, C, D, E, F = 1, 2, 3, 4, 5, 6


def golden_game():
    families = {
        (): ([B, A], [0.4, 0.6]),
        (A,): ([C, D], [0.7, 0.3]),
        (B,): ([E, F], [0.6, 0.4]),
    }
    values = {(A,): 0.5, (B,): 0.8, (A, C): 0.9, (A, D): 0.1, (B, E): 0.2, (B, F): 1.0}
    return Game(families, values)


def test_golden_tree_of_uct_and_means():
    """With c = 1; N is the root's visits before the simulation.

    1  a: unvisited, higher prior                                          a = .5
    2  b: unvisited                                                        b = .8
    3  N=2: a .5 + .833, b .8 + .833 -> b; e unvisited, higher prior       b = (.8 + .2) / 2
    4  N=3: a .5 + 1.048, b .5 + .741 -> a; c                              a = (.5 + .9) / 2
    5  N=4: a .7 + .833, b .5 + .833 -> a; d                               a = 1.5 / 3
    6  N=5: a .5 + .732, b .5 + .897 -> b; f                               b = 2 / 3
    7  N=6: a .5 + .773, b .667 + .773 -> b; N=3: e .2 + 1.048, f 1 + 1.048 -> f again: b = 3 / 4
    """
    game = golden_game()
    search = game.search(exploration=1.0)
    assert search.run(7) == 7
    order = [(A,), (B,), (B, E), (A, C), (A, D), (B, F), (B, F)]
    assert [path for path, _ in search.log] == order
    assert visited(game.tree) == {(A,): 3, (B,): 4, (A, C): 1, (A, D): 1, (B, E): 1, (B, F): 2}
    assert values_of(game.tree) == pytest.approx(
        {(A,): 0.5, (B,): 0.75, (A, C): 0.9, (A, D): 0.1, (B, E): 0.2, (B, F): 1.0}
    )
    assert game.tree.value[ROOT] == pytest.approx((0.5 + 0.8 + 0.2 + 0.9 + 0.1 + 1.0 + 1.0) / 7)
    # A terminal node is not evaluated again, and the root never is.
    assert game.evaluated == [[path] for path in order[:6]]
    assert game.expanded == [[()], *game.evaluated]


def test_golden_tree_of_uct_and_maxima():
    """As above up to the third simulation, where b falls from .8 to its only visited child's .2.

    4  N=3: a .5 + 1.048, b .2 + .741 -> a; c                              a = .9
    5  N=4: a .9 + .833, b .2 + .833 -> a; d                               a = max(.9, .1)
    6  N=5: a .9 + .732, b .2 + .897 -> a; N=3: c .9 + 1.048, d .1 + 1.048 -> c again
    """
    game = golden_game()
    search = game.search(exploration=1.0, backup="max")
    search.run(3)
    assert values_of(game.tree) == {(A,): 0.5, (B,): 0.2, (B, E): 0.2}
    assert game.tree.value[ROOT] == 0.5
    search.run(3)
    assert visited(game.tree) == {(A,): 4, (B,): 2, (A, C): 2, (A, D): 1, (B, E): 1}
    assert values_of(game.tree) == {(A,): 0.9, (B,): 0.2, (A, C): 0.9, (A, D): 0.1, (B, E): 0.2}
    assert game.tree.value[ROOT] == 0.9


def test_golden_tree_of_puct():
    """With c = 1.

    1  N=0: all scores are 0 -> a, the higher prior                        a = .5
    2  N=1: a .5 + .6/2, b .4 -> a; N=1: c .7, d .3 -> c                   a = (.5 + .9) / 2
    3  N=2: a .7 + .6 1.414/3 = .983, b .4 1.414 = .566 -> a;
       N=2: c .9 + .7 1.414/2 = 1.395, d .3 1.414 = .424 -> c again        a = 2.3 / 3
    4  N=3: a .767 + .6 1.732/4 = 1.026, b .4 1.732 = .693 -> a; c again   a = 3.2 / 4
    """
    game = golden_game()
    search = game.search(exploration=1.0, selection="puct")
    search.run(4)
    assert visited(game.tree) == {(A,): 4, (A, C): 3}
    assert values_of(game.tree) == pytest.approx({(A,): 0.8, (A, C): 0.9})


def test_golden_tree_of_batches():
    """Two leaves at a time, c = 1; virtual visits count as visits of value 0.

    1, 2  a, then b because a has a virtual visit
    3     N=2: b; e
    4     N=2+1: a .5 + 1.048, b .8 1/2 + .741 -> a; c
    """
    game = golden_game()
    game.search(exploration=1.0, leaves_per_batch=2).run(4)
    assert game.evaluated == [[(A,), (B,)], [(B, E), (A, C)]]
    assert game.expanded == [[()], *game.evaluated]


def test_a_leaf_selected_twice_in_a_batch_is_two_simulations_and_one_evaluation():
    game = Game({(): ([A], [1.0])}, {(A,): 0.25})
    search = game.search(leaves_per_batch=3)
    assert search.run(5) == 5
    assert visited(game.tree) == {(A,): 5}
    assert game.tree.value[1] == 0.25
    assert game.expanded == [[()], [(A,)]]
    assert game.evaluated == [[(A,)]]


def test_puct_prefers_the_prior_and_uct_ignores_it():
    arms = {(): ([A, B], [0.9, 0.1])}, {(A,): 0.5, (B,): 0.5}
    by_prior, alike = Game(*arms), Game(*arms)
    by_prior.search(selection="puct").run(40)
    alike.search().run(40)
    assert visited(by_prior.tree)[A,] > 3 * visited(by_prior.tree)[B,]
    assert visited(alike.tree) == {(A,): 20, (B,): 20}


def test_a_selection_rule_is_one_function(monkeypatch):
    def greedy_in_priors(siblings, exploration):
        return siblings.priors

    monkeypatch.setitem(SELECTIONS, "prior", greedy_in_priors)
    game = golden_game()
    game.search(selection="prior").run(3)
    assert visited(game.tree) == {(A,): 3, (A, C): 2}


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8, unique=True), st.integers(1, 300))
def test_bandit_arms_are_pulled_no_more_than_their_regret_bound(tenths, budget):
    """The best arm scores at least its value, so n <= 1 + c^2 ln N / gap^2 for any other."""
    means = np.array(tenths) / 20
    paths = [(action,) for action in range(len(means))]
    game = Game(
        {(): (np.arange(len(means)), np.ones(len(means)))}, dict(zip(paths, means, strict=True))
    )
    game.search(exploration=1.0).run(budget)
    pulls = game.tree.visits[1:]
    assert pulls.sum() == budget
    if budget >= len(means):
        assert pulls.min() >= 1
    gaps = means.max() - means
    worse = gaps > 0
    assert (pulls[worse] <= 1 + math.log(budget) / gaps[worse] ** 2).all()


def test_the_best_arm_of_a_bandit_is_committed():
    game = Game(
        {(): ([3, 1, 4, 15], [0.4, 0.3, 0.2, 0.1])},
        {(3,): 0.2, (1,): 0.5, (4,): 0.55, (15,): 0.9},
    )
    search = game.search()
    search.run(100)
    search.advance()
    assert game.tree.committed == [15]


def hidden(rng):
    """One text of 81 is good, nothing leads there."""
    worth = rng.random((3, 3, 3, 3)) / 2
    worth[tuple(rng.integers(0, 3, 4))] = 1.0
    return worth


def additive(rng):
    """Each step's word adds a little, so that the mean of a branch tells what is in it."""
    steps = [rng.permutation([0.0, 0.1, 0.25]) for _ in range(4)]
    return sum(np.ix_(*steps))


@pytest.mark.parametrize(("selection", "exploration"), [("uct", 2.0), ("puct", 4.0)])
@pytest.mark.parametrize(("worths", "backup"), [(hidden, "max"), (additive, "mean")])
@pytest.mark.parametrize("seed", range(3))
def test_search_finds_what_brute_force_finds(selection, exploration, worths, backup, seed):
    """Three words, four steps: the best of 81 texts, by committing one word after another."""
    worth = worths(np.random.default_rng(seed))
    texts = dict(np.ndenumerate(worth))
    best = max(texts, key=texts.__getitem__)
    prefixes = [path for n in range(4) for path in itertools.product(range(3), repeat=n)]
    families = dict.fromkeys(prefixes, (range(3), [0.3, 0.4, 0.3]))
    game = Game(families, {**dict.fromkeys(prefixes, 0.0), **texts})
    policy = {"selection": selection, "exploration": exploration, "backup": backup}
    search = game.search(**policy, leaves_per_batch=4)
    for _ in range(4):
        search.run(400)
        search.advance()
    assert tuple(game.tree.committed) == best
    assert game.tree.value[ROOT] == pytest.approx(texts[best])


class Reference:
    """The textbook's search, a dictionary for each figure."""

    def __init__(self, game, policy):
        self.game, self.policy = game, policy
        self.visits, self.sums = Counter(), Counter()

    def children(self, path):
        return {(*path, int(a)): p for a, p in zip(*self.game.family(path), strict=True)}

    def value(self, path):
        children = [child for child in self.children(path) if self.visits[child]]
        if self.policy["backup"] == "max":
            return max(map(self.value, children)) if children else self.game.value(path)
        return self.sums[path] / self.visits[path]

    def score(self, path, prior, virtual):
        above = self.visits[path[:-1]] + virtual[path[:-1]]
        n, c = self.visits[path] + virtual[path], self.policy["exploration"]
        value = self.value(path) * self.visits[path] / n if self.visits[path] else 0.0
        if self.policy["selection"] == "puct":
            return value + c * prior * above**0.5 / (1 + n)
        return value + c * (math.log(above) / n) ** 0.5 if n else math.inf

    def select(self, virtual):
        path = ()
        while path == () or (self.visits[path] and self.children(path)):
            scores = {
                child: (self.score(child, prior, virtual), prior)
                for child, prior in self.children(path).items()
            }
            path = max(scores, key=scores.__getitem__)
        return path

    def simulate(self, n):
        virtual, leaves = Counter(), []
        for _ in range(n):
            leaves.append(self.select(virtual))
            virtual.update(itertools.accumulate(leaves[-1], lambda p, a: (*p, a), initial=()))
        for leaf in leaves:
            for length in range(len(leaf) + 1):
                self.visits[leaf[:length]] += 1
                self.sums[leaf[:length]] += self.game.value(leaf)


@settings(max_examples=60)
@given(seeds, policies, st.integers(1, 12))
def test_the_search_is_the_textbook_one(seed, policy, batches):
    game, n = RandomGame(seed), policy["leaves_per_batch"]
    game.search(**policy).run(n * batches)
    reference = Reference(RandomGame(seed), policy)
    for _ in range(batches):
        reference.simulate(n)
    found = {path: entry for path, entry in snapshot(game.tree).items() if entry[0]}
    assert {path: visits for path, (visits, *_) in found.items()} == +reference.visits
    for path, (_, value, _) in found.items():
        assert value == pytest.approx(reference.value(path))


def recomputed(log, backup):
    """{path: (visits, value)} from the values that were backed up, and nothing else."""
    below = {}
    for path, value in log:
        for n in range(len(path) + 1):
            below.setdefault(path[:n], []).append((path, value))

    def value_of(path):
        if backup == "mean":
            return sum(value for _, value in below[path]) / len(below[path])
        children = {other[: len(path) + 1] for other, _ in below[path]} - {path}
        return max(map(value_of, children)) if children else below[path][0][1]

    return {path: (len(entries), value_of(path)) for path, entries in below.items()}


@settings(max_examples=60)
@given(seeds, policies, st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_visits_and_values_match_the_backed_up_values(seed, policy, budgets):
    game = RandomGame(seed)
    search = game.search(**policy)
    for budget in budgets:
        assert search.run(budget) == budget
    tree = game.tree
    # Each value that was backed up is the environment's for that leaf.
    assert all(value == game.value(path) for path, value in search.log)
    expected = recomputed(search.log, policy["backup"])
    for path, (visits, value, _) in snapshot(tree).items():
        assert visits == expected.get(path, (0, 0))[0]
        assert value == pytest.approx(expected.get(path, (0, 0.0))[1])
    assert tree.visits[tree.children(ROOT)].sum() == tree.visits[ROOT] == sum(budgets)
    assert not tree.virtual.any()
    asked = [path for call in game.evaluated for path in call]
    assert len(asked) == len(set(asked))


@settings(max_examples=40)
@given(seeds, policies, st.integers(1, 60))
def test_the_arrays_describe_one_tree(seed, policy, budget):
    game = RandomGame(seed)
    search = game.search(**policy)
    for _ in range(3):
        if game.tree.terminal[ROOT]:
            break
        search.run(budget)
        check_structure(game)
        search.advance()
        check_structure(game)


def check_structure(game):
    tree = game.tree
    claimed = [child for node in range(len(tree)) for child in tree.children(node)]
    assert sorted(claimed) == list(range(1, len(tree)))  # each node but the root has one parent
    assert tree.parent[ROOT] == NONE
    for node in range(len(tree)):
        path = tree.path(node)
        assert tree.depth[node] == len(path)
        children = tree.children(node)
        assert (tree.parent[children] == node).all()
        if tree.n_children[node] >= 0:
            actions, priors = game.family(tuple(path))
            assert tree.action[children].tolist() == list(actions)
            assert tree.prior[children].tolist() == list(priors)
            assert tree.terminal[node] == (len(actions) == 0)


@settings(max_examples=30)
@given(seeds, policies)
def test_committing_keeps_the_subtree_and_drops_the_rest(seed, policy):
    game = RandomGame(seed)
    search = game.search(**policy)
    search.run(50)
    tree = game.tree
    child = tree.best_child()
    before, paths = snapshot(tree), [tuple(tree.path(node)) for node in range(len(tree))]
    chosen = paths[child]
    mapping = search.advance()
    assert snapshot(tree) == {path: entry for path, entry in before.items() if path[:1] == chosen}
    assert mapping[child] == ROOT
    assert tree.committed == list(chosen)
    for old, new in enumerate(mapping):
        if paths[old][:1] == chosen:
            assert tuple(tree.path(new)) == paths[old]
        else:
            assert new == NONE
    assert sorted(mapping[mapping != NONE]) == list(range(len(tree)))


@settings(max_examples=30)
@given(seeds, policies, st.integers(1, 40))
def test_after_a_commit_the_budget_adds_to_the_visits_kept(seed, policy, budget):
    game = RandomGame(seed)
    search = game.search(**policy)
    search.run(60)
    search.advance()
    tree = game.tree
    if tree.terminal[ROOT]:
        with pytest.raises(ValueError, match=re.escape(str(tree.committed))):
            search.run(budget)
        return
    kept = tree.visits[tree.children(ROOT)].sum()
    asked = {path for call in game.evaluated for path in call}
    calls = len(game.evaluated)
    search.run(budget)
    assert tree.visits[tree.children(ROOT)].sum() == kept + budget
    again = {path for call in game.evaluated[calls:] for path in call}
    assert not again & asked
    expected = recomputed(search.log, policy["backup"])
    for path, (visits, value, _) in snapshot(tree).items():
        assert (visits, value) == pytest.approx(expected.get(path, (0, 0.0)))


def test_the_most_visited_child_is_best_then_its_value_then_its_prior():
    tree = Tree()
    tree.add_children(ROOT, np.array([7, 8, 9, 10]), np.array([0.1, 0.2, 0.3, 0.2]))
    assert tree.best_child() == 3
    tree.prior[3] = 0.2
    assert tree.best_child() == 2
    tree.value[4], tree.prior[4] = 0.5, 0.1
    assert tree.best_child() == 4
    tree.visits[1] = 1
    assert tree.best_child() == 1
    assert [row["action"] for row in tree.root_table()] == [7, 10, 8, 9]


@given(seeds, policies)
@settings(max_examples=15)
def test_the_same_seed_gives_the_same_tree(seed, policy):
    def run(seed):
        game = RandomGame(seed)
        game.search(**policy).run(30)
        return game.tree.to_dict()

    assert run(seed) == run(seed)
    assert run(seed) != run(seed + 1)


@given(seeds, policies)
@settings(max_examples=15)
def test_two_searches_side_by_side_do_not_mix(seed, policy):
    def one(seed):
        game = RandomGame(seed)
        return game.tree, game.search(**policy)

    together = [one(seed), one(seed + 1)]
    for _ in range(6):
        for _, search in together:
            search.run(5)
    for i, (tree, _) in enumerate(together):
        alone, search = one(seed + i)
        for _ in range(6):
            search.run(5)
        assert tree.to_dict() == alone.to_dict()
    assert together[0][0].to_dict() != together[1][0].to_dict()


BAD_VALUES = [math.nan, -0.001, 1.001, math.inf, "0.5", None, np.float32("nan"), 0.5j, [0.5]]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=repr)
@pytest.mark.parametrize("leaves_per_batch", [1, 3])
@pytest.mark.parametrize("where", [(A, C), (B,)], ids=["terminal", "inner"])
def test_a_bad_value_names_its_path_and_the_search_can_go_on(bad, leaves_per_batch, where):
    policy = {"leaves_per_batch": leaves_per_batch, "exploration": 1.0}
    undisturbed, game = golden_game(), golden_game()
    undisturbed.search(**policy).run(9)
    broken = True

    def evaluate(nodes):
        paths = [tuple(game.tree.path(node)) for node in nodes]
        return [bad if broken and path == where else game.value(path) for path in paths]

    game.evaluate = evaluate
    search = game.search(**policy)
    with pytest.raises(SearchError, match=re.escape(f"path {list(where)}: value")) as caught:
        search.run(9)
    assert "[0, 1]" in str(caught.value)
    assert caught.value.paths == [list(where)]
    assert caught.value.tree is game.tree
    expected = recomputed(search.log, "mean")
    assert visited(game.tree) == {p: v for p, (v, _) in expected.items() if p}
    assert values_of(game.tree) == {p: v for p, (_, v) in expected.items() if p}
    assert not game.tree.virtual.any()
    json.dumps(caught.value.tree.to_dict(), allow_nan=False)

    broken = False
    search.run(9 - len(search.log))
    assert len(game.tree) == len(undisturbed.tree)
    assert snapshot(game.tree) == snapshot(undisturbed.tree)


def test_an_evaluation_that_raises_names_the_paths_that_it_was_asked_for():
    game = golden_game()

    def evaluate(nodes):
        raise ZeroDivisionError("oh")

    game.evaluate = evaluate
    search = game.search(leaves_per_batch=2)
    with pytest.raises(SearchError, match=r"paths \[1\], \[2\]: .*ZeroDivisionError: oh") as caught:
        search.run(2)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.paths == [[A], [B]]
    assert not game.tree.visits.any() and not game.tree.virtual.any()


@pytest.mark.parametrize("action", [A, B])
def test_a_generator_of_values_names_the_one_path_that_raised(action):
    game = golden_game()
    del game.values[action,]
    game.evaluate = lambda nodes: (game.value(tuple(game.tree.path(node))) for node in nodes)
    search = game.search(leaves_per_batch=2)
    with pytest.raises(SearchError, match=rf"path \[{action}\]: .*KeyError") as caught:
        search.run(2)
    assert caught.value.paths == [[action]]


@pytest.mark.parametrize(
    ("give", "got"), [([], "got 0"), ([0.5], "got 1"), ([0.5] * 3, "got more")], ids=len
)
def test_another_number_of_values_than_of_leaves_is_an_error(give, got):
    game = golden_game()
    game.evaluate = lambda nodes: give
    search = game.search(leaves_per_batch=2)
    with pytest.raises(SearchError, match=rf"paths \[1\], \[2\]: .*2 values, {got}"):
        search.run(2)


@pytest.mark.parametrize("verdict", [True, np.True_, 1, np.int32(1), np.float32(1)], ids=repr)
def test_a_verdict_is_a_value(verdict):
    game = golden_game()
    game.evaluate = lambda nodes: [verdict] * len(nodes)
    search = game.search()
    search.run(2)
    assert values_of(game.tree) == {(A,): 1.0, (B,): 1.0}


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        (([A, B], [0.5]), "as many actions as priors"),
        (([[A, B]], [[0.5, 0.5]]), "as many actions as priors"),
        (([0.5], [0.5]), "integers"),
        (([A], [-0.5]), "at least 0, got -0.5"),
        (([A, B], [0.5, math.nan]), "finite"),
        (([A, B], [0.5, math.inf]), "finite"),
    ],
    ids=str,
)
def test_bad_children_name_the_path_and_leave_the_tree_alone(family, problem):
    game = golden_game()
    search = game.search(leaves_per_batch=2)
    game.families[B,] = family
    with pytest.raises(SearchError, match=rf"path \[2\]: .*{problem}") as caught:
        search.run(2)
    assert caught.value.tree is game.tree
    assert len(game.tree) == 3 and not game.tree.visits.any() and not game.tree.virtual.any()


def test_another_number_of_families_than_of_leaves_is_an_error():
    game = golden_game()
    game.expand = lambda nodes: []
    search = game.search()
    with pytest.raises(SearchError, match="1 results, got 0"):
        search.run(1)
    assert len(game.tree) == 1


def test_errors_of_expand_are_passed_on_and_the_search_can_continue():
    undisturbed, game = golden_game(), golden_game()
    undisturbed.search(leaves_per_batch=2).run(6)
    search = game.search(leaves_per_batch=2)
    search.run(2)
    before = game.tree.to_dict()

    def expand(nodes):
        raise MemoryError("full")

    failing = TreeSearch(game.tree, expand, game.evaluate, search.policy)
    with pytest.raises(MemoryError, match="full"):
        failing.run(4)
    assert game.tree.to_dict() == before and not game.tree.virtual.any()
    search.run(4)
    assert game.tree.to_dict() == undisturbed.tree.to_dict()


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_below_1_is_an_error(budget):
    game = golden_game()
    with pytest.raises(ValueError, match=f"simulations must be at least 1, got {budget}"):
        game.search().run(budget)
    assert game.expanded == []


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("selection", "best", "uct, puct"),
        ("backup", "median", "mean, max"),
        ("exploration", -0.1, "at least 0"),
        ("exploration", math.nan, "at least 0"),
        ("exploration", math.inf, "finite"),
        ("leaves_per_batch", 0, "at least 1"),
    ],
)
def test_a_bad_policy_names_argument_value_and_range(name, value, allowed):
    with pytest.raises(ValueError, match=rf"{name} must be .*{allowed}.*got '?{value}"):
        TreePolicy(**{name: value})


def test_stop_is_asked_after_each_batch():
    game = golden_game()
    answers = iter([False, True])
    search = game.search(leaves_per_batch=3)
    assert search.run(100, stop=lambda: next(answers)) == 6
    assert game.tree.visits[ROOT] == 6


def test_the_last_batch_does_not_exceed_the_budget():
    game = golden_game()
    assert game.search(leaves_per_batch=4).run(6) == 6
    assert game.tree.visits[game.tree.children(ROOT)].sum() == 6


def test_a_terminal_root_is_an_error():
    game = Game({}, {})
    with pytest.raises(ValueError, match="terminal"):
        game.search().run(1)
    with pytest.raises(ValueError, match="no children"):
        game.tree.best_child()


def test_only_children_of_the_root_can_be_committed():
    game = golden_game()
    search = game.search(exploration=1.0)
    search.run(7)
    grandchild = game.tree.children(1)[0]
    for node in (ROOT, grandchild, NONE, len(game.tree)):
        with pytest.raises(ValueError, match=f"got {node}"):
            game.tree.commit(node)
    with pytest.raises(ValueError, match="already expanded"):
        game.tree.add_children(ROOT, np.array([A]), np.array([1.0]))


def test_an_unvisited_child_can_be_committed_and_searched_from():
    game = golden_game()
    search = game.search()
    search.run(1)
    unvisited = int(np.flatnonzero(game.tree.action == B)[0])
    game.tree.commit(unvisited)
    search.run(2)
    assert visited(game.tree) == {(B,): 2, (B, E): 1, (B, F): 1}


def test_root_table_of_the_golden_tree():
    game = golden_game()
    game.search(exploration=1.0).run(3)
    assert game.tree.root_table() == [
        {"action": B, "visits": 2, "value": 0.5, "prior": 0.4},
        {"action": A, "visits": 1, "value": 0.5, "prior": 0.6},
    ]


def test_to_dict_of_the_golden_tree_survives_json():
    game = golden_game()
    search = game.search(exploration=1.0)
    search.run(1)

    def row(parent, action, prior, visits, value, depth):
        names = ("parent", "action", "prior", "visits", "value", "depth")
        return dict(zip(names, (parent, action, prior, visits, value, depth), strict=True))

    below_a = [(C, 0.7), (D, 0.3)]
    assert json.loads(json.dumps(game.tree.to_dict(), allow_nan=False)) == {
        "committed": [],
        "nodes": [
            row(None, None, 1.0, 1, 0.5, 0),
            row(0, B, 0.4, 0, None, 1),
            row(0, A, 0.6, 1, 0.5, 1),
            *(row(2, action, prior, 0, None, 2) for action, prior in below_a),
        ],
    }
    search.advance()
    assert json.loads(json.dumps(game.tree.to_dict(), allow_nan=False)) == {
        "committed": [A],
        "nodes": [
            row(None, A, 0.6, 1, 0.5, 1),
            *(row(0, action, prior, 0, None, 2) for action, prior in below_a),
        ],
    }


def test_the_root_stands_for_its_action():
    assert Tree(17).to_dict()["nodes"][0]["action"] == 17


def test_to_dot_draws_the_visited_nodes_and_quotes_their_labels():
    game = golden_game()
    game.search(exploration=1.0).run(3)
    names = {ROOT: 'say "\\n"\n'}
    lines = game.tree.to_dot(lambda node: names.get(node, f"<{game.tree.action[node]}>"))
    e = int(np.flatnonzero(game.tree.action == E)[0])
    assert lines.splitlines() == [
        "digraph tree {",
        "  node [shape=box];",
        r'  0 [label="say \"\\n\"\n\n3 visits\nvalue 0.500"];',
        r'  1 [label="<2>\n2 visits\nvalue 0.500"];',
        '  0 -> 1 [label="0.400"];',
        r'  2 [label="<1>\n1 visits\nvalue 0.500"];',
        '  0 -> 2 [label="0.600"];',
        rf'  {e} [label="<5>\n1 visits\nvalue 0.200"];',
        f'  1 -> {e} [label="0.600"];',
        "}",
    ]
    assert r'0 [label="root\n' in game.tree.to_dot()
    assert r'0 [label="root\n0 visits"]' in Tree().to_dot()


def test_trees_grow_far_beyond_their_first_room():
    n = 1000
    game = Game({(): (np.arange(n), np.linspace(1, 0, n))}, {(i,): i / n for i in range(n)})
    game.search(leaves_per_batch=100).run(n)
    assert visited(game.tree) == {(i,): 1 for i in range(n)}
    assert game.tree.value[1:].tolist() == [i / n for i in range(n)]


def test_scores_by_hand():
    siblings = Siblings(
        visits=np.array([0, 3]),
        values=np.array([0.0, 0.5]),
        priors=np.array([0.2, 0.8]),
        parent_visits=9,
    )
    assert uct(siblings, 2.0).tolist() == [
        math.inf,
        pytest.approx(0.5 + 2 * math.sqrt(2.197225 / 3)),
    ]
    assert puct(siblings, 2.0).tolist() == pytest.approx([2 * 0.2 * 3, 0.5 + 2 * 0.8 * 3 / 4])
