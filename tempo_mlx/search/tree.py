"""Monte Carlo tree search over any environment: the tree as arrays, and what one simulation does.

A simulation *selects* a leaf from the root down, *expands* it by its children, *evaluates* the leaf
itself, and passes the value *backward* to the root. Nothing here draws, and nothing knows of
language models: the environment is two functions of node numbers, both of them batched.

Source: Browne et al., "A Survey of Monte Carlo Tree Search Methods", IEEE TCIAIG 2012, section 3.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

#: The root's number, before and after every commit.
ROOT = 0
#: In place of a node or an action where there is none.
NONE = -1
#: In place of a number of children that is not known yet.
UNEXPANDED = -1

_NODE = np.dtype(
    [
        ("parent", np.int64),
        ("action", np.int64),
        ("prior", np.float64),
        ("depth", np.int64),
        ("first_child", np.int64),
        ("n_children", np.int64),
        ("visits", np.int64),
        ("virtual", np.int64),
        ("total", np.float64),
        ("value", np.float64),
        ("evaluation", np.float64),
    ]
)

#: Nodes that a tree has room for at first; the room doubles whenever it is full.
_CAPACITY = 64


class Tree:
    """The nodes of one search, N of them, as arrays of equal length.

    A node's children stand side by side, and after their parent. Growing and committing replace
    the arrays, so take them from the tree each time.

    Args:
        root: the action that the root stands for, for display only; :data:`NONE` if it has none.
    """

    parent: np.ndarray  # [N] node; NONE for the root
    action: np.ndarray  # [N] that led from the parent here
    prior: np.ndarray  # [N] of the action, from the environment; 1 for the first root
    depth: np.ndarray  # [N] actions since the first root, committed ones included
    first_child: np.ndarray  # [N] node; NONE without children
    n_children: np.ndarray  # [N] UNEXPANDED, or how many; 0 is a terminal node
    visits: np.ndarray  # [N] values backed up through the node
    virtual: np.ndarray  # [N] visits of a batch that is being selected; 0 at any other time
    total: np.ndarray  # [N] sum of the values backed up through the node
    value: np.ndarray  # [N] what the backup rule makes of them; 0 without visits
    evaluation: np.ndarray  # [N] the node's own value in [0, 1]; NaN before it is evaluated

    def __init__(self, root: int = NONE):
        #: Actions from the first root to the present one.
        self.committed: list[int] = []
        self._rows = np.zeros(_CAPACITY, _NODE)
        self._resize(0)
        self._append(NONE, np.array([root]), np.array([1.0]))

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def terminal(self) -> np.ndarray:
        """[N] whether the node was expanded and has no children."""
        return self.n_children == 0

    def children(self, node: int) -> range:
        """Numbers of the node's children, none if it is terminal or unexpanded."""
        first = int(self.first_child[node])
        return range(first, first + max(int(self.n_children[node]), 0))

    def add_children(self, node: int, actions: np.ndarray, priors: np.ndarray) -> range:
        """Expand a node; without actions it is terminal from now on.

        Args:
            node: an unexpanded one.
            actions, priors: of the children, [n] each.

        Returns:
            the children's numbers.

        Raises:
            ValueError: if the node is expanded already.
        """
        if self.n_children[node] != UNEXPANDED:
            raise ValueError(f"node must be an unexpanded one, got {node}")
        self.first_child[node] = len(self) if len(actions) else NONE
        self.n_children[node] = len(actions)
        self._append(node, actions, priors)
        return self.children(node)

    def path(self, node: int) -> list[int]:
        """Actions from the first root to the node, committed ones included."""
        actions: list[int] = []
        while node != ROOT:
            actions.append(int(self.action[node]))
            node = int(self.parent[node])
        return self.committed + actions[::-1]

    def best_child(self) -> int:
        """The root's most visited child; then the higher value, the higher prior, the first one.

        Raises:
            ValueError: if the root has no children.
        """
        ranked = self._ranked_children()
        if not ranked:
            raise ValueError(f"the root, path {self.path(ROOT)}, has no children to choose from")
        return ranked[0]

    def commit(self, child: int) -> np.ndarray:
        """Make a child of the root the root. Its subtree keeps its order and all it knows.

        Args:
            child: a child of the root.

        Returns:
            the new number of each old node, :data:`NONE` for those that were dropped, [N before].

        Raises:
            ValueError: if the node is not a child of the root.
        """
        if child not in self.children(ROOT):
            raise ValueError(f"child must be one of the root's, {self.children(ROOT)}, got {child}")
        kept = np.zeros(len(self), bool)
        kept[child] = True
        for depth in range(self.depth[child] + 1, self.depth.max() + 1):
            level = np.flatnonzero(self.depth == depth)
            kept[level] = kept[self.parent[level]]
        renumbered = np.where(kept, np.cumsum(kept) - 1, NONE)

        self.committed.append(int(self.action[child]))
        self._rows = self._rows[: len(self)][kept]
        self._resize(len(self._rows))
        self.parent[:] = renumbered[self.parent]
        parents = self.n_children > 0
        self.first_child[parents] = renumbered[self.first_child[parents]]
        return renumbered

    def root_table(self) -> list[dict[str, Any]]:
        """Action, visits, value (None without visits) and prior of each child of the root.

        The most visited one stands first, ties as in :meth:`best_child`.
        """
        columns = ("action", "visits", "value", "prior")
        return [
            {name: self._entry(node, name) for name in columns} for node in self._ranked_children()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: the committed actions, and the nodes in the order of their numbers.

        A root has no parent, and a node without visits no value: both are None there.
        """
        columns = ("parent", "action", "prior", "visits", "value", "depth")
        nodes = [{name: self._entry(node, name) for name in columns} for node in range(len(self))]
        return {"committed": list(self.committed), "nodes": nodes}

    def to_dot(self, label: Callable[[int], str] | None = None) -> str:
        """The root and all visited nodes as a Graphviz graph.

        Args:
            label: text of a node, given its number; its action if None.
        """
        lines = ["digraph tree {", "  node [shape=box];"]
        for node in range(len(self)):
            if node != ROOT and not self.visits[node]:
                continue
            action = self._entry(node, "action")
            text = label(node) if label else "root" if action is None else str(action)
            text += f"\n{self.visits[node]} visits"
            if self.visits[node]:
                text += f"\nvalue {self.value[node]:.3f}"
            lines.append(f'  {node} [label="{_escaped(text)}"];')
            if node != ROOT:
                lines.append(f'  {self.parent[node]} -> {node} [label="{self.prior[node]:.3f}"];')
        return "\n".join([*lines, "}", ""])

    def _ranked_children(self) -> list[int]:
        def rank(node: int) -> tuple[float, ...]:
            return (-self.visits[node], -self.value[node], -self.prior[node], node)

        return sorted(self.children(ROOT), key=rank)

    def _entry(self, node: int, name: str) -> float | int | None:
        entry = getattr(self, name)[node].item()
        absent = not self.visits[node] if name == "value" else node == ROOT and entry == NONE
        return None if absent else entry

    def _append(self, parent: int, actions: np.ndarray, priors: np.ndarray) -> None:
        start = len(self)
        self._resize(start + len(actions))
        self.parent[start:] = parent
        self.action[start:] = actions
        self.prior[start:] = priors
        self.depth[start:] = 0 if parent == NONE else self.depth[parent] + 1
        self.first_child[start:] = NONE
        self.n_children[start:] = UNEXPANDED
        self.evaluation[start:] = np.nan

    def _resize(self, size: int) -> None:
        """Give every array ``size`` nodes; further ones are all zero."""
        if size > len(self._rows):
            grown = np.zeros(max(size, 2 * len(self._rows)), _NODE)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        for name in _NODE.fields or ():
            setattr(self, name, self._rows[name][:size])


def _escaped(text: str) -> str:
    """Text for a quoted string of the DOT language."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


@dataclass(frozen=True)
class Siblings:
    """What a selection rule sees of the n children of one node.

    Virtual visits count as visits of value 0, so that the next leaf of a batch is another one.

    Args:
        visits: with virtual ones, [n].
        values: in [0, 1], 0 without visits, [n].
        priors: [n].
        parent_visits: of their parent, with virtual ones.
    """

    visits: np.ndarray
    values: np.ndarray
    priors: np.ndarray
    parent_visits: int


def uct(siblings: Siblings, exploration: float) -> np.ndarray:
    """value + c sqrt(ln N_parent / n), infinite for what was never visited.

    Source: Kocsis and Szepesvári, "Bandit Based Monte-Carlo Planning", ECML 2006; c = sqrt 2 is
    UCB1 of Auer et al., Machine Learning 47, 2002.
    """
    visits = np.maximum(siblings.visits, 1)
    bound = exploration * np.sqrt(math.log(max(siblings.parent_visits, 1)) / visits)
    return np.where(siblings.visits > 0, siblings.values + bound, np.inf)


def puct(siblings: Siblings, exploration: float) -> np.ndarray:
    """value + c prior sqrt(N_parent) / (1 + n); what was never visited has value 0.

    Source: Silver et al., "Mastering the game of Go without human knowledge", Nature 2017.
    """
    bound = siblings.priors * math.sqrt(siblings.parent_visits) / (1 + siblings.visits)
    return siblings.values + exploration * bound


#: Name -> rule (siblings, exploration constant c) -> scores [n]. The highest score is selected, of
#: equal ones the highest prior, then the first.
SELECTIONS: dict[str, Callable[[Siblings, float], np.ndarray]] = {"uct": uct, "puct": puct}


def mean(tree: Tree, path: Sequence[int]) -> None:
    """The mean of all values that were backed up through a node, its own evaluation among them."""
    tree.value[path] = tree.total[path] / tree.visits[path]


def maximum(tree: Tree, path: Sequence[int]) -> None:
    """The highest value of a node's visited children; its own evaluation while it has none.

    So a node is worth its best visited leaf, and its own evaluation no longer counts once it was
    looked into: the value may fall at that moment. Visits are counted as for the mean.

    Source: the original TEMPO.
    """
    for node in reversed(path):
        children = tree.children(node)
        visited = tree.visits[children.start : children.stop] > 0
        if visited.any():
            tree.value[node] = tree.value[children.start : children.stop][visited].max()
        else:
            tree.value[node] = tree.evaluation[node]


#: Name -> rule (tree, path) that sets the values of a path's nodes, from the root to the leaf, when
#: their visits and totals have been updated.
BACKUPS: dict[str, Callable[[Tree, Sequence[int]], None]] = {"mean": mean, "max": maximum}


@dataclass(frozen=True)
class TreePolicy:
    """How a tree is searched.

    Args:
        selection: a key of :data:`SELECTIONS`.
        exploration: the constant c of the selection rule, at least 0.
        backup: a key of :data:`BACKUPS`.
        leaves_per_batch: leaves that are expanded and evaluated together, at least 1.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    selection: str = "uct"
    exploration: float = math.sqrt(2)
    backup: str = "mean"
    leaves_per_batch: int = 1

    def __post_init__(self) -> None:
        for name, choices in (("selection", SELECTIONS), ("backup", BACKUPS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not 0 <= self.exploration < math.inf:
            raise ValueError(f"exploration must be finite and at least 0, got {self.exploration}")
        if self.leaves_per_batch < 1:
            raise ValueError(f"leaves_per_batch must be at least 1, got {self.leaves_per_batch}")


class SearchError(ValueError):
    """The environment gave what no search can use.

    Args:
        message: which path, what it gave, and what is allowed.
        tree: the tree so far, as after the last whole batch, save that leaves of the failed one
            may have children already. A search can go on from it.
        paths: the actions that lead to each node in question.
    """

    def __init__(self, message: str, tree: Tree, paths: list[list[int]]):
        super().__init__(message)
        self.tree = tree
        self.paths = paths


#: What a value may be: a bool is a verdict.
_NUMBERS = (int, float, np.integer, np.floating, np.bool_)

#: Node numbers -> for each its children as (actions [n], priors [n]); no actions: it is terminal.
Expand = Callable[[list[int]], Sequence[tuple[ArrayLike, ArrayLike]]]
#: Node numbers -> for each its value in [0, 1].
Evaluate = Callable[[list[int]], Iterable[float]]


class TreeSearch:
    """Monte Carlo tree search from the root of a tree.

    The root is expanded before the first simulation and not evaluated, so that each simulation is
    one visit of one of its children. Any other node is evaluated once, at its first visit; later
    visits go to one of its children, or back up the value again if it is terminal or was selected
    more than once in a batch.

    Args:
        tree: where it stands, usually a single root.
        expand: (nodes) -> their children. What it raises is passed on, and the tree is then as
            after the last whole batch.
        evaluate: (nodes) -> their values in [0, 1]; the nodes are expanded already. If it is a
            generator, errors name the one path whose value raised.
        policy: how; None is the default one.
    """

    def __init__(
        self, tree: Tree, expand: Expand, evaluate: Evaluate, policy: TreePolicy | None = None
    ):
        self.tree = tree
        self.policy = policy or TreePolicy()
        self._expand = expand
        self._evaluate = evaluate

    def run(self, simulations: int, stop: Callable[[], bool] | None = None) -> int:
        """Search until the budget is spent.

        Args:
            simulations: how many to add to those that the tree has, at least 1.
            stop: asked after each batch whether another budget (seconds, tokens) is spent.

        Returns:
            simulations done: the visits that the root's children gained.

        Raises:
            ValueError: if the budget is less than 1, or the root is terminal.
            SearchError: see :meth:`expand` and :meth:`evaluate`.
        """
        if simulations < 1:
            raise ValueError(f"simulations must be at least 1, got {simulations}")
        self.expand([ROOT])
        if self.tree.terminal[ROOT]:
            raise ValueError(f"the root, path {self.tree.path(ROOT)}, is terminal: nothing follows")
        done = 0
        while done < simulations:
            batch = min(self.policy.leaves_per_batch, simulations - done)
            self.simulate(batch)
            done += batch
            if stop is not None and stop():
                break
        return done

    def simulate(self, n: int) -> None:
        """One batch of n simulations; a leaf that was selected twice counts as two of them."""
        paths = self._select_batch(n)
        leaves = [path[-1] for path in paths]
        self.expand(leaves)
        self.evaluate(leaves)
        for path in paths:
            self.backward(path, float(self.tree.evaluation[path[-1]]))

    def select(self) -> list[int]:
        """Nodes from the root to the leaf that is next: a terminal one, or one without visits."""
        tree = self.tree
        path = [ROOT]
        while True:
            path.append(self._best_child(path[-1]))
            if tree.visits[path[-1]] == 0 or tree.terminal[path[-1]]:
                return path

    def expand(self, leaves: Iterable[int]) -> None:
        """Add the children of those leaves that are not expanded yet, by one call.

        Raises:
            SearchError: for another number of results than of leaves, actions that are not
                integers, priors that are negative or not finite, or as many of one as of the other.
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
        """Ask for the values of those leaves that have none yet, by one call.

        Raises:
            SearchError: for values that are not in [0, 1], another number of them than of
                leaves, and whatever the call raises.
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
        """Add a visit of that value to each node of a path from the root to a leaf."""
        self.tree.visits[path] += 1
        self.tree.total[path] += value
        BACKUPS[self.policy.backup](self.tree, path)

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
        scores = SELECTIONS[self.policy.selection](siblings, self.policy.exploration)
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
