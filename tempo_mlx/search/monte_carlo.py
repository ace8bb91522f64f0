"""Monte Carlo tree search over any environment.

A simulation *selects* a leaf from the root down, *expands* it into its children, *evaluates* the
leaf itself, and passes the value *backward* to the root. The search is deterministic and knows
nothing of language models: the environment is two batched functions of node numbers.

Source: Browne et al., "A Survey of Monte Carlo Tree Search Methods", IEEE TCIAIG 2012, section 3.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import check_count, shown
from ..errors import TempoError, raised_here
from ..rules.rule import Rule, find
from ..rules.table import Count, Number, RuleChoice, check_all, documented, setting
from .tree import ROOT, UNEXPANDED, Tree


@dataclass(frozen=True, eq=False)
class Siblings:
    """The n children of one node, as a selection rule sees them.

    Virtual visits count as visits of value 0, which steers the next simulation of a batch to
    another leaf.

    Args:
        visits: including virtual visits, [n].
        values: in [0, 1], 0 without visits, [n].
        priors: [n].
        parent_visits: visits of the parent, including virtual visits.
    """

    visits: np.ndarray
    values: np.ndarray
    priors: np.ndarray
    parent_visits: int


def uct(siblings: Siblings, exploration: float) -> np.ndarray:
    """value + c sqrt(ln N_parent / n); infinite for unvisited children.

    Source: Kocsis and Szepesvári, "Bandit Based Monte-Carlo Planning", ECML 2006; c = sqrt 2 is
    UCB1 of Auer et al., Machine Learning 47, 2002.
    """
    visits = np.maximum(siblings.visits, 1)
    bound = exploration * np.sqrt(math.log(max(siblings.parent_visits, 1)) / visits)
    return np.where(siblings.visits > 0, siblings.values + bound, np.inf)


def puct(siblings: Siblings, exploration: float) -> np.ndarray:
    """value + c prior sqrt(N_parent) / (1 + n); unvisited children have value 0.

    Source: Silver et al., "Mastering the game of Go without human knowledge", Nature 2017.
    """
    bound = siblings.priors * math.sqrt(siblings.parent_visits) / (1 + siblings.visits)
    scores: np.ndarray = siblings.values + exploration * bound
    return scores


@dataclass(frozen=True)
class ChildRule(Rule):
    """A rule (siblings, exploration constant c) -> scores [n] of the children.

    The child with the highest score is selected; ties go to the highest prior, then to the first
    child.
    """

    def scores(self, siblings: Siblings, exploration: float) -> np.ndarray:
        """The rule's scores, [n]; TempoError if it returns anything else."""
        found = np.asarray(self(siblings, exploration), np.float64)
        if found.shape != siblings.values.shape or np.isnan(found).any():
            raise TempoError(
                f"selection {self.name} must return {len(siblings.values)} numbers, "
                f"got {shown(found)}"
            )
        return found


#: Name -> rule.
SELECTIONS: dict[str, ChildRule] = {
    rule.name: rule for rule in (ChildRule("uct", uct), ChildRule("puct", puct))
}


def mean(tree: Tree, path: Sequence[int]) -> None:
    """The mean of all values backed up through a node, including its own evaluation."""
    tree.value[path] = tree.total[path] / tree.visits[path]


def maximum(tree: Tree, path: Sequence[int]) -> None:
    """The highest value of a node's visited children; its own evaluation if there are none.

    A node is worth its best visited leaf. Once a child is visited, the node's own evaluation no
    longer counts, so its value may fall. Visits are counted as for the mean.

    Source: the original TEMPO.
    """
    for node in reversed(path):
        children = tree.children(node)
        visited = tree.visits[children.start : children.stop] > 0
        if visited.any():
            tree.value[node] = tree.value[children.start : children.stop][visited].max()
        else:
            tree.value[node] = tree.evaluation[node]


@dataclass(frozen=True)
class BackupRule(Rule):
    """A rule (tree, path) that sets the values of the nodes on a path from the root to a leaf.

    It is called after their visits and totals have been updated.
    """


#: Name -> rule.
BACKUPS: dict[str, BackupRule] = {
    rule.name: rule for rule in (BackupRule("mean", mean), BackupRule("max", maximum))
}


def child_rule(given: Any) -> ChildRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("selection", given, SELECTIONS, ChildRule)


def backup_rule(given: Any) -> BackupRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("backup", given, BACKUPS, BackupRule)


#: Largest exploration constant; values still matter beside it.
MOST_EXPLORATION = 1e9


@documented
@dataclass(frozen=True)
class TreePolicy:
    """Settings of a tree search.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    selection: str | ChildRule = setting(
        "uct",
        RuleChoice(SELECTIONS, ChildRule),
        "How the next child is selected. uct: value + c sqrt(ln N / n). puct: value + c p sqrt(N) "
        "/ (1 + n), with the model's probability p as prior. Or your own rule.",
    )
    exploration: float = setting(
        math.sqrt(2),
        Number(0, MOST_EXPLORATION, said="finite and at least 0, "),
        "The constant c, in [0, 1e9].",
        short="-c",
    )
    backup: str | BackupRule = setting(
        "mean",
        RuleChoice(BACKUPS, BackupRule),
        "How a node's value follows from the values below it: mean, or max. Or your own rule.",
    )
    leaves_per_batch: int = setting(
        1, Count(), "Leaves expanded and evaluated in one forward pass, at least 1."
    )

    def __post_init__(self) -> None:
        check_all(self)


class SearchError(TempoError):
    """The environment returned something invalid.

    Args:
        message: the path, the value and what is allowed.
        tree: as after the last complete batch, except that leaves of the failed batch may already
            have children. A search can continue from it.
        paths: the actions that lead to each node concerned.
    """

    def __init__(self, message: str, tree: Tree, paths: list[list[int]]):
        super().__init__(message)
        self.tree = tree
        self.paths = paths


#: Types of a value; booleans are allowed as verdicts.
_NUMBERS = (int, float, np.integer, np.floating, np.bool_)

#: Node numbers -> the children of each, as (actions [n], priors [n]); empty for a terminal node.
Expand = Callable[[list[int]], Sequence[tuple[ArrayLike, ArrayLike]]]
#: Node numbers -> the value of each, in [0, 1].
Evaluate = Callable[[list[int]], Iterable[float]]


class TreeSearch:
    """Monte Carlo tree search from the root of a tree.

    The root is expanded before the first simulation but never evaluated, so each simulation visits
    exactly one of its children. Every other node is evaluated once, at its first visit. Later
    visits continue to one of its children. They back up the same value again if the node is
    terminal or was selected more than once in a batch.

    Args:
        tree: to start from, usually a single root.
        expand: (nodes) -> their children. Its exceptions are passed on, and leave the tree as after
            the last complete batch.
        evaluate: (nodes) -> their values in [0, 1]; the nodes are already expanded. If it is a
            generator, errors name the one path whose value raised.
        policy: settings of the search; None for the defaults.
    """

    def __init__(
        self, tree: Tree, expand: Expand, evaluate: Evaluate, policy: TreePolicy | None = None
    ):
        self.tree = tree
        self.policy = policy or TreePolicy()
        self._scores = child_rule(self.policy.selection).scores
        self._back_up = backup_rule(self.policy.backup)
        self._expand = expand
        self._evaluate = evaluate

    def run(self, simulations: int, stop: Callable[[], bool] | None = None) -> int:
        """Search until the budget is spent.

        Args:
            simulations: how many to add, at least 1.
            stop: called after each batch; returns whether another budget (seconds, tokens) is
                spent.

        Returns:
            simulations done, which is how many visits the root's children gained.

        Raises:
            ValueError: if the budget is less than 1, or the root is terminal.
            SearchError: see :meth:`expand` and :meth:`evaluate`.
        """
        check_count("simulations", simulations)
        self.expand([ROOT])
        if self.tree.terminal[ROOT]:
            raise TempoError(f"the root, path {self.tree.path(ROOT)}, is terminal: nothing follows")
        done = 0
        while done < simulations:
            batch = min(self.policy.leaves_per_batch, simulations - done)
            self.simulate(batch)
            done += batch
            if stop is not None and stop():
                break
        return done

    def simulate(self, n: int) -> None:
        """Run one batch of n simulations. A leaf that is selected twice counts as two."""
        paths = self._select_batch(n)
        leaves = [path[-1] for path in paths]
        self.expand(leaves)
        self.evaluate(leaves)
        for path in paths:
            self.backward(path, float(self.tree.evaluation[path[-1]]))

    def select(self) -> list[int]:
        """Nodes from the root to the next leaf, which is terminal or unvisited."""
        tree = self.tree
        path = [ROOT]
        while True:
            path.append(self._best_child(path[-1]))
            if tree.visits[path[-1]] == 0 or tree.terminal[path[-1]]:
                return path

    def expand(self, leaves: Iterable[int]) -> None:
        """Expand those of the leaves that are not expanded yet, in one call.

        Raises:
            SearchError: if the number of results is wrong, actions are not integers, priors are
                negative or not finite, or a node has different numbers of actions and priors.
        """
        tree = self.tree
        nodes = [node for node in dict.fromkeys(leaves) if tree.n_children[node] == UNEXPANDED]
        if not nodes:
            return
        results = list(self._expand(nodes))
        if len(results) != len(nodes):
            raise self._error(f"expand must give {len(nodes)} results, got {len(results)}", nodes)
        families = [
            self._checked_family(node, *result) for node, result in zip(nodes, results, strict=True)
        ]
        for node, (actions, priors) in zip(nodes, families, strict=True):
            tree.add_children(node, actions, priors)

    def evaluate(self, leaves: Iterable[int]) -> None:
        """Evaluate those of the leaves that have no value yet, in one call.

        Raises:
            SearchError: if values are not in [0, 1], their number is wrong, or the call raises.
        """
        tree = self.tree
        nodes = [node for node in dict.fromkeys(leaves) if np.isnan(tree.evaluation[node])]
        if not nodes:
            return
        values: list[Any] = []
        asked = nodes
        try:
            answers = iter(self._evaluate(nodes))
            asked = nodes[:1]
            for value in islice(answers, len(nodes) + 1):
                values.append(value)
                asked = nodes[len(values) : len(values) + 1] or nodes
        except Exception as error:
            if raised_here(error) and not isinstance(error, TempoError):
                raise
            problem = f"evaluate raised {type(error).__name__}: {error}"
            raise self._error(problem, asked) from error
        if len(values) != len(nodes):
            count = "more" if len(values) > len(nodes) else len(values)
            raise self._error(f"evaluate must give {len(nodes)} values, got {count}", nodes)
        for node, value in zip(nodes, values, strict=True):
            if not isinstance(value, _NUMBERS) or not 0 <= value <= 1:
                raise self._error(f"value must be a number in [0, 1], got {value!r}", [node])
        tree.evaluation[nodes] = values

    def backward(self, path: Sequence[int], value: float) -> None:
        """Back up a value along a path from the root to a leaf, as one visit of each node."""
        self.tree.visits[path] += 1
        self.tree.total[path] += value
        self._back_up(self.tree, path)

    def advance(self) -> np.ndarray:
        """Commit the root's best child; see :meth:`Tree.best_child` and :meth:`Tree.commit`."""
        return self.tree.commit(self.tree.best_child())

    def _select_batch(self, n: int) -> list[list[int]]:
        paths: list[list[int]] = []
        try:
            for _ in range(n):
                path = self.select()
                paths.append(path)
                self.tree.virtual[path] += 1
        finally:
            self.tree.virtual[:] = 0
        return paths

    def _best_child(self, node: int) -> int:
        tree = self.tree
        children = tree.children(node)
        span = slice(children.start, children.stop)
        visits = tree.visits[span] + tree.virtual[span]
        priors = tree.prior[span]
        values = tree.value[span] * tree.visits[span] / np.maximum(visits, 1)
        parent_visits = int(tree.visits[node] + tree.virtual[node])
        siblings = Siblings(visits, values, priors, parent_visits)
        scores = self._scores(siblings, self.policy.exploration)
        best = np.flatnonzero(scores == scores.max())
        return children[int(best[priors[best].argmax()])]

    def _checked_family(
        self, node: int, actions: ArrayLike, priors: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        actions, priors = np.asarray(actions), np.asarray(priors, float)
        if actions.ndim != 1 or actions.shape != priors.shape:
            raise self._error(
                "expand must give as many actions as priors, "
                f"got shapes {actions.shape} and {priors.shape}",
                [node],
            )
        if len(actions) and actions.dtype.kind not in "iu":
            raise self._error(f"actions must be integers, got {actions.dtype}", [node])
        wrong = priors[~(np.isfinite(priors) & (priors >= 0))]
        if len(wrong):
            raise self._error(f"priors must be finite and at least 0, got {wrong[0]}", [node])
        return actions, priors

    def _error(self, problem: str, nodes: Sequence[int]) -> SearchError:
        paths = [self.tree.path(node) for node in nodes]
        names = ", ".join(map(str, paths))
        return SearchError(f"path{'s' * (len(paths) > 1)} {names}: {problem}", self.tree, paths)
