"""What a run looks like in a terminal: its steps, its verdicts, its figures."""

from rich.table import Table
from rich.text import Text

from ..console import Console
from ..lattice import Step
from ..result import GenerationResult


def verdicts(result: GenerationResult) -> Table:
    """Every verdict on a set as a table: after which step, scores, threshold, what fell."""
    table = Table("after step", "set", "token", "probability", "score", "threshold", "verdict")
    tokens = {t.slot: t for step in result.lattice.steps for t in step.tokens}
    for judgement in result.lattice.judgements:
        rows = zip(judgement.slots, judgement.scores, judgement.pruned, strict=True)
        for i, (slot, score, pruned) in enumerate(rows):
            table.add_row(
                str(judgement.step) if i == 0 else "",
                str(judgement.set_step) if i == 0 else "",
                repr(tokens[slot].text),
                f"{tokens[slot].probability:.3f}",
                f"{score:.4g}",
                f"{judgement.threshold:.3f}" if i == 0 else "",
                "pruned" if pruned else "kept",
                end_section=i == len(judgement.slots) - 1,
            )
    return table


def render(step: Step, plain: bool = False) -> Text:
    """A step as coloured text: a plain token, or `[ on/ under]` with the best one bold.

    Pruned tokens are struck through; in plain text they stand between tildes.
    """
    endings = [Text(f"<end {ending.probability:.2f}>", style="magenta") for ending in step.endings]
    tokens = [
        Text(f"~{token.text}~" if plain and token.pruned_at is not None else token.text)
        for token in step.tokens
    ]
    if not tokens:
        return endings[0]
    if len(tokens) + len(endings) == 1:
        return tokens[0]
    for rank, (token, text) in enumerate(zip(step.tokens, tokens, strict=True)):
        text.stylize("bold green" if rank == 0 else "cyan")
        if token.pruned_at is not None:
            text.stylize("strike red")
    inner = Text("/", style="dim").join([*tokens, *endings])
    return Text.assemble(("[", "dim"), inner, ("]", "dim"))


def report(result: GenerationResult, console: Console) -> None:
    """How long the set list is, how fast it came, and what the oracle said."""
    lattice, rates = result.lattice, result.rates()
    console.print(
        f"{len(lattice)} steps, {lattice.n_tokens} tokens, ended by {result.finish_reason} | "
        f"prompt {len(lattice.prompt_tokens)} tokens, {rates['prompt_tps']:.1f} tokens/s | "
        f"{rates['steps_per_second']:.1f} steps/s, {rates['tokens_per_second']:.1f} tokens/s | "
        f"peak memory {rates['peak_memory_gb']:.2f} GB",
        style="dim",
    )
    if result.settings.samples:
        console.print(f"seed {result.settings.seed}", style="dim")
    if result.verification is not None:
        found = result.verification
        console.print(
            f"verified: largest difference {found.max_logit_difference:.2e} of a logit "
            f"over {found.rows} rows, cached run against one uncached pass"
        )
