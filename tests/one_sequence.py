"""A batch of one sequence, with the arguments that tests of one sequence need."""

from tempo_mlx.decode.sequences import Batch, SequenceState
from tempo_mlx.rules.visibility import VISIBILITY, Isolated

#: Rules under which a set is one, without parents.
SETS_VISIBILITY = sorted(name for name, rule in VISIBILITY.items() if not rule.has_parents)


class SeesSiblings(Isolated):
    """A faulty rule: its masks let siblings see each other, which its definition does not."""

    def allowed(self, queries, keys):
        return VISIBILITY["visible"].allowed(queries, keys)


class OneSequence(Batch):
    def __init__(self, model, lattice, visibility, weighted=False):
        self.sequence = SequenceState(lattice, visibility, weighted)
        super().__init__(model, [self.sequence])

    @property
    def held(self):
        return self.sequence.held

    def append(self, tokens, queries, *args, **kwargs):
        # The batch reads prompts by this method, too.
        parts = queries if isinstance(queries, list) else [(self.sequence, queries)]
        return super().append(tokens, parts, *args, **kwargs)
