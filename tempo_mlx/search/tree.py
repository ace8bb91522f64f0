"""The tree of a Monte Carlo tree search, as arrays.

The tree is independent of the environment: a node has the action that led to it, and statistics.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import TempoError

#: The root's number, before and after every commit.
ROOT = 0
#: Stands for a missing node or action.
NONE = -1
#: Number of children of a node that is not expanded yet.
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

#: Initial capacity in nodes; it doubles whenever it is full.
_CAPACITY = 64


class Tree:
    """The N nodes of one search, as arrays [N].

    The children of a node are contiguous and come after it. Growing and committing replace the
    arrays, so read them from the tree each time.

    Args:
        root: the root's action, for display only; :data:`NONE` without one.
    """

    parent: np.ndarray  # [N] node; NONE for the root
    action: np.ndarray  # [N] that led from the parent here
    prior: np.ndarray  # [N] of the action, from the environment; 1 for the first root
    depth: np.ndarray  # [N] actions since the first root, committed ones included
    first_child: np.ndarray  # [N] node; NONE without children
    n_children: np.ndarray  # [N] number of children, or UNEXPANDED; 0 for a terminal node
    visits: np.ndarray  # [N] values backed up through the node
    virtual: np.ndarray  # [N] visits of the batch being selected; 0 at all other times
    total: np.ndarray  # [N] sum of the values backed up through the node
    value: np.ndarray  # [N] set by the backup rule; 0 without visits
    evaluation: np.ndarray  # [N] the node's own value in [0, 1]; NaN before it is evaluated

    def __init__(self, root: int = NONE):
        #: Actions from the first root to the current one.
        self.committed: list[int] = []
        self._rows = np.zeros(_CAPACITY, _NODE)
        self._resize(0)
        self._append(NONE, np.array([root]), np.array([1.0]))

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def terminal(self) -> np.ndarray:
        """[N] whether the node is expanded and has no children."""
        terminal: np.ndarray = self.n_children == 0
        return terminal

    def children(self, node: int) -> range:
        """Numbers of the node's children; empty if it is terminal or unexpanded."""
        first = int(self.first_child[node])
        return range(first, first + max(int(self.n_children[node]), 0))

    def add_children(self, node: int, actions: np.ndarray, priors: np.ndarray) -> range:
        """Expand a node; without actions it becomes terminal.

        Args:
            node: an unexpanded node.
            actions, priors: of the children, [n] each.

        Returns:
            the children's numbers.

        Raises:
            ValueError: if the node is already expanded.
        """
        if self.n_children[node] != UNEXPANDED:
            raise TempoError(f"node {node} is already expanded")
        self.first_child[node] = len(self) if len(actions) else NONE
        self.n_children[node] = len(actions)
        self._append(node, actions, priors)
        return self.children(node)

    def path(self, node: int) -> list[int]:
        """Actions from the first root to the node, including committed ones."""
        actions: list[int] = []
        while node != ROOT:
            actions.append(int(self.action[node]))
            node = int(self.parent[node])
        return self.committed + actions[::-1]

    def best_child(self) -> int:
        """The root's most visited child; ties go to the higher value, higher prior, first child.

        Raises:
            ValueError: if the root has no children.
        """
        ranked = self._ranked_children()
        if not ranked:
            raise TempoError(f"the root, path {self.path(ROOT)}, has no children to choose from")
        return ranked[0]

    def commit(self, child: int) -> np.ndarray:
        """Make a child of the root the new root. Its subtree keeps its order and statistics.

        Args:
            child: a child of the root.

        Returns:
            the new number of each old node, :data:`NONE` for dropped nodes, [old N].

        Raises:
            ValueError: if the node is not a child of the root.
        """
        if child not in self.children(ROOT):
            raise TempoError(
                f"child must be a child of the root, {self.children(ROOT)}, got {child}"
            )
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

        The most visited child comes first; ties as in :meth:`best_child`.
        """
        columns = ("action", "visits", "value", "prior")
        return [
            {name: self._entry(node, name) for name in columns} for node in self._ranked_children()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the committed actions, and the nodes by number.

        The parent of the root and the value of an unvisited node are None.
        """
        columns = ("parent", "action", "prior", "visits", "value", "depth")
        nodes = [{name: self._entry(node, name) for name in columns} for node in range(len(self))]
        return {"committed": list(self.committed), "nodes": nodes}

    def to_dot(self, label: Callable[[int], str] | None = None) -> str:
        """The root and all visited nodes as a Graphviz graph.

        Args:
            label: node number -> text; None shows the action.
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
        """Resize every array to ``size`` nodes; new entries are zero."""
        if size > len(self._rows):
            grown = np.zeros(max(size, 2 * len(self._rows)), _NODE)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        for name in _NODE.fields or ():
            setattr(self, name, self._rows[name][:size])


def _escaped(text: str) -> str:
    """Escape a text for a quoted string in DOT."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
