"""What a run looks like in a terminal: steps, pruning decisions, statistics."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from ..decode.result import GenerationResult
from ..decode.verification import oracle_of
from ..io.console import Console
from ..lattice.rendering import Span, StepWriter
from ..lattice.rendering import plain as plain_text
from ..models import PositionedModel
from ..text.printable import quoted


def verdicts(result: GenerationResult) -> Table:
    """Every pruning decision as a table: after which step, scores, threshold, what was pruned."""
    table = Table("after step", "set", "token", "probability", "score", "threshold", "verdict")
    tokens = {t.slot: t for step in result.lattice.steps for t in step.tokens}
    for decision in result.lattice.pruning_decisions:
        rows = zip(decision.slots, decision.scores, decision.pruned, strict=True)
        for i, (slot, score, pruned) in enumerate(rows):
            table.add_row(
                str(decision.step) if i == 0 else "",
                str(decision.set_step) if i == 0 else "",
                quoted(tokens[slot].text),
                f"{tokens[slot].probability:.3f}",
                f"{score:.4g}",
                f"{decision.threshold:.3f}" if i == 0 else "",
                "pruned" if pruned else "kept",
                end_section=i == len(decision.slots) - 1,
            )
    return table


#: Style of each kind of span.
STYLES = {"text": "", "mark": "dim", "best": "bold green", "other": "cyan", "ending": "magenta"}


def coloured(spans: Iterable[Span]) -> Text:
    """Spans as coloured text, the best token of a set bold, pruned tokens struck through."""
    return Text.assemble(
        *((s.text, "strike red" if s.pruned else STYLES[s.kind]) for s in spans),
    )


def pruned_steps(result: GenerationResult, plain: bool) -> Text:
    """All steps; pruned tokens between tildes where there are no colours."""
    writer = StepWriter()
    spans = [span for step in result.lattice.steps for span in writer.write(step)]
    spans += writer.finish()
    return Text(plain_text(spans)) if plain else coloured(spans)


def report(result: GenerationResult, console: Console) -> None:
    """How long the set list is, how fast it came, and what the oracle said."""
    lattice, rates, drafts = result.lattice, result.rates(), ""
    if result.stats.drafted_tokens:
        stats = result.stats
        drafts = f" | drafts {stats.accepted_tokens} of {stats.drafted_tokens} tokens right"
    console.print(
        f"{len(lattice)} steps, {lattice.n_tokens} tokens, ended by {result.finish_reason} | "
        f"prompt {len(lattice.prompt_tokens)} tokens, {rates['prompt_tps']:.1f} tokens/s | "
        f"{rates['steps_per_second']:.1f} steps/s, {rates['tokens_per_second']:.1f} tokens/s | "
        f"peak memory {rates['peak_memory_gb']:.2f} GB{drafts}",
        style="dim",
    )
    if result.settings.is_sampled:
        console.print(f"seed {result.settings.seed}", style="dim")
    if result.verification is not None:
        found = result.verification
        assert isinstance(result.model, PositionedModel)
        console.print(
            f"verified: largest difference {found.max_logit_difference:.2e} of a logit "
            f"over {found.rows} rows, cached run against {oracle_of(result.model)}"
        )
