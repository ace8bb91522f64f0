"""A batch of one sequence, with the arguments that tests of one sequence need."""

from tempo_mlx.decoding import Batch, SequenceState


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
