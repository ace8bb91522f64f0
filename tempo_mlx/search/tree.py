"""The tree of a Monte Carlo tree search, as arrays.

Nothing here knows what is searched: a node has an action that led to it, and what was learnt there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import TempoError

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
        terminal: np.ndarray = self.n_children == 0
        return terminal

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
            raise TempoError(f"node must be an unexpanded one, got {node}")
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
            raise TempoError(f"the root, path {self.path(ROOT)}, has no children to choose from")
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
            raise TempoError(f"child must be one of the root's, {self.children(ROOT)}, got {child}")
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
