"""``tempo-mlx bench``: speed and memory, measured here."""

from typing import Annotated

import mlx.core as mx
import typer
from rich.table import Table

from ..arguments import parse_bytes
from ..bench.batch import MIN_SPEEDUP, SETS, bench_batch
from ..bench.decode import bench_decode
from ..bench.host import VARIANTS, bench_host
from ..bench.pruning import bench_pruning
from ..bench.runs import LONG_BLOCKS
from ..bench.score import bench_score, workloads
from ..bench.search import bench_search
from ..bench.tree import STOCK, bench_tree
from ..doctor.local_models import size
from ..errors import TempoError
from ..needs import Need
from ..weights import load
from .effects import require_effect
from .experiment import require_extra
from .options import Measurements, Model, Overwrite, PromptTokens, Rounds, at_least
from .tables import (
    check_report,
    conclude,
    parse_widths,
    print_decoding,
    print_setting,
    spread,
    ticking,
    wide_console,
)

#: Steps that --long decodes.
LONG_STEPS = 2000

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on this machine. Variants take turns in one process; the "
    "tables show medians and quartiles. Targets are printed, never enforced.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    app.add_typer(bench)


@bench.command("decode")
def decode(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 64,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "--steps",
            "-m",
            callback=at_least(4),
            help="Steps of each run, at least 4. A step of N siblings adds N slots to the cache, "
            "so that attention costs more the longer a run is.",
        ),
    ] = 24,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            "--num-trials",
            "-n",
            callback=at_least(1),
            help="Runs of each variant that count, at least 1; a first round warms up.",
        ),
    ] = 7,
    siblings: Annotated[
        str,
        typer.Option(help="Widths of the forced sets, at least 1 each, separated by commas."),
    ] = "1,2,4,8,16",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Cast the weights; of a quantised model, what is not packed in bits. "
            "Default: as they are stored.",
        ),
    ] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help=f"Also decode {LONG_STEPS} steps on both sides and print the time per step in "
            f"{LONG_BLOCKS} blocks: a rise beyond mlx-lm's is not attention over more slots.",
        ),
    ] = False,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Decoding speed of mlx-lm, of ours at threshold 1, and of forced sets of N siblings.

    Forced means that every step keeps exactly N tokens, whatever their probabilities. "1 sibling"
    are sets of one that the loop finds as it finds every set; at threshold 1 it knows beforehand
    that there is one, and starts the next pass early. Bandwidth is the weights' bytes over the
    time of a step, beside that of a plain copy of an array (read and written bytes).
    """
    widths = parse_widths(siblings)
    if dtype is not None and dtype not in DTYPES:
        raise TempoError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_report("decode", output, overwrite)
    language_model, tokenizer = load(model)
    if dtype is not None:
        language_model.set_dtype(DTYPES[dtype])
    blocks = 2 * LONG_BLOCKS if long else 0
    with ticking((rounds + 1) * (2 + len(widths)) + blocks) as tick:
        report = bench_decode(
            language_model,
            tokenizer,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            rounds=rounds,
            siblings=widths,
            long_steps=LONG_STEPS if long else 0,
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_decoding(report, console)
    conclude(report, console, output)


@bench.command("host")
def host(
    prompt_tokens: PromptTokens = 64,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-m", callback=at_least(4), help="Steps of each run, at least 4."
        ),
    ] = 64,
    rounds: Rounds = 15,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """What a step costs beside the model, where the model has next to nothing to compute.

    The model is a llama of two small layers with random weights, made here. mlx-lm's steps end
    with the token on the host; ours also find its text and record the step.
    """
    check_report("host", output, overwrite)
    with ticking((rounds + 1) * len(VARIANTS)) as tick:
        report = bench_host(
            prompt_tokens=prompt_tokens, max_tokens=max_tokens, rounds=rounds, progress=tick
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    table = Table("variant")
    for name in ("ms/step", "over mlx-lm's", "ms beyond mlx-lm's"):
        table.add_column(name, justify="right")
    for each in report.measured:
        table.add_row(
            each.name,
            spread(each.step_seconds.scaled(1e3), 3),
            spread(each.time_to_stock, 2),
            spread(each.over_stock.scaled(1e3), 3),
        )
    console.print(table)
    conclude(report, console, output)


@bench.command("pruning")
def pruning(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 64,
    siblings: Annotated[
        int, typer.Option(callback=at_least(2), help="Tokens of each forced set, at least 2.")
    ] = 4,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-m", callback=at_least(4), help="Steps of each timed run, at least 4."
        ),
    ] = 24,
    rounds: Rounds = 7,
    steps: Annotated[
        str,
        typer.Option(
            help="Lengths of the runs with and without compaction, separated by commas, "
            "at least 4 each; 256,2048 takes a while on a CPU."
        ),
    ] = "256",
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Cost of each kind of evidence for pruning, and what compaction saves.

    The timed runs judge every set and prune nothing, so that all variants make the same sets. The
    long runs lose half of their tokens at random, without and with compaction of the cache.
    """
    lengths = parse_widths(steps, "--steps", least=4)
    check_report("pruning", output, overwrite)
    language_model, tokenizer = load(model)
    with ticking((rounds + 1) * 4 + 2 * len(lengths)) as tick:
        report = bench_pruning(
            language_model,
            tokenizer,
            prompt_tokens=prompt_tokens,
            siblings=siblings,
            max_tokens=max_tokens,
            rounds=rounds,
            steps=tuple(lengths),
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    costs = Table("variant", title=f"sets of {siblings}")
    for name in ("ms/step", "over no pruning"):
        costs.add_column(name, justify="right")
    for cost in report.costs:
        milliseconds = f"{cost.step_seconds.median * 1e3:.2f}"
        costs.add_row(cost.name, milliseconds, spread(cost.over_off, 3))
    console.print(costs)
    savings = Table("steps", "compaction", title="half of the tokens pruned")
    for name in ("ms/step", "slots held", "cache MB", "peak MB beside weights"):
        savings.add_column(name, justify="right")
    for saving in report.savings:
        savings.add_row(
            str(saving.steps),
            "yes" if saving.compacted else "no",
            f"{saving.step_seconds * 1e3:.2f}",
            str(saving.slots),
            f"{saving.cache_bytes / 1e6:.1f}",
            f"{saving.peak_bytes / 1e6:.1f}",
        )
    console.print(savings)
    conclude(report, console, output)


@bench.command("batch")
def batch(
    model: Model = "smollm2-135m",
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens",
            "-p",
            callback=at_least(4),
            help="Mean tokens of a prompt, at least 4.",
        ),
    ] = 64,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-m", callback=at_least(4), help="Steps of each run, at least 4."
        ),
    ] = 24,
    rounds: Rounds = 3,
    batch_sizes: Annotated[
        str, typer.Option(help="Prompts in a batch, at least 1 each, separated by commas.")
    ] = "1,2,4,8,16,32",
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Throughput of batches, beside mlx-lm's batches and one prompt after another.

    The prompts of a batch differ in length by up to two thirds. Times of a step are those of a
    forward pass and what belongs to it; times of a whole run include reading the prompts.
    """
    sizes = parse_widths(batch_sizes, "--batch-sizes")
    check_report("batch", output, overwrite)
    language_model, tokenizer = load(model)
    variants = sum(5 if size in MIN_SPEEDUP else 3 for size in sizes)
    with ticking((rounds + 1) * variants) as tick:
        report = bench_batch(
            language_model,
            tokenizer,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            rounds=rounds,
            batch_sizes=sizes,
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    table = Table("prompts", "variant")
    for name in (
        "ms/step",
        "steps/s",
        "tokens/s, whole run",
        "s, whole run",
        "ms over mlx-lm's",
        "steps/s over one by one",
        "whole run over one by one",
    ):
        table.add_column(name, justify="right")
    for each in report.throughput:
        table.add_row(
            str(each.batch_size),
            each.name,
            f"{each.step_seconds.median * 1e3:.1f}",
            f"{each.steps_per_second:.1f}",
            f"{each.tokens / each.seconds.median:.1f}",
            f"{each.seconds.median:.2f}",
            spread(each.step_to_stock, 3),
            spread(each.speedup, 2) if each.speedup else "",
            f"{each.whole_speedup.median:.2f}" if each.whole_speedup else "",
            end_section=each.name == SETS,
        )
    console.print(table)
    copies = report.copies
    console.print(
        f"{copies.rows} rows of one prompt of {copies.prompt_tokens} tokens: read "
        f"{copies.read_seconds.median:.3f} s, replicated {copies.replicate_seconds.median:.3f} s; "
        f"copies hold {copies.bytes_before / 1e6:.1f} MB before their first tokens, "
        f"{copies.bytes_after / 1e6:.1f} MB after"
    )
    conclude(report, console, output)


@bench.command("tree")
def tree(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 256,
    leaves: Annotated[int, typer.Option(callback=at_least(2), help="Branches, at least 2.")] = 8,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-m", callback=at_least(4), help="Steps of each branch, at least 4."
        ),
    ] = 32,
    rounds: Rounds = 3,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Branches of one prompt in one sequence, in rows of their own, and one after another.

    Then those of a hybrid model with random weights, beside mlx-lm's batch.
    """
    check_report("tree", output, overwrite)
    language_model, tokenizer = load(model)
    with ticking((rounds + 1) * 6) as tick:
        report = bench_tree(
            language_model,
            tokenizer,
            prompt_tokens=prompt_tokens,
            leaves=leaves,
            max_tokens=max_tokens,
            rounds=rounds,
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    table = Table("variant", title=f"{leaves} branches, prompt left out")
    for name in ("s", "over the tree", "cache MB"):
        table.add_column(name, justify="right")
    for each in report.measured:
        table.add_row(
            each.name,
            f"{each.seconds.median:.2f}",
            spread(each.over_tree, 2),
            f"{each.cache_bytes / 1e6:.1f}",
            end_section=each.name == STOCK,
        )
    console.print(table)
    console.print(
        f"hybrid: {report.hybrid['architecture']} of {report.hybrid['parameters'] / 1e6:.1f}M "
        f"random weights, {size(report.hybrid['state_bytes'])} of states for a branch; a step of "
        f"ours over mlx-lm's: {spread(report.hybrid_over_stock, 2)}"
    )
    conclude(report, console, output)


@bench.command("search")
def search(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 256,
    simulations: Annotated[
        int,
        typer.Option(
            "--simulations", "-s", callback=at_least(1), help="Simulations of each run, at least 1."
        ),
    ] = 32,
    leaves: Annotated[
        str, typer.Option(help="Leaves in one pass, at least 1 each, separated by commas.")
    ] = "1,4,8,16",
    rounds: Rounds = 2,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Simulations per second in one sequence state, by leaves in a pass; and of plainer searches.

    The others are the same search with another environment: one rereads the whole text of a leaf,
    one keeps a copy of the cache for each node.
    """
    widths = parse_widths(leaves, "--leaves")
    check_report("search", output, overwrite)
    language_model, tokenizer = load(model)
    with ticking((rounds + 1) * (len(widths) + 2)) as tick:
        report = bench_search(
            language_model,
            tokenizer,
            prompt_tokens=prompt_tokens,
            simulations=simulations,
            leaves=widths,
            rounds=rounds,
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    table = Table("variant", title=f"{simulations} simulations of the first token")
    for name in ("simulations/s", "time over ours"):
        table.add_column(name, justify="right")
    for each in report.measured:
        table.add_row(each.name, spread(each.simulations_per_second, 1), spread(each.over_ours, 2))
    console.print(table)
    conclude(report, console, output)


@bench.command("score")
def score(
    context: typer.Context,
    model: Model = "smollm2-135m",
    contexts: Annotated[
        int,
        typer.Option(
            "--contexts",
            "-c",
            callback=at_least(0),
            help="Contexts that are scored under --max-kv-bytes; 0 for none.",
        ),
    ] = 10_000,
    max_kv_bytes: Annotated[
        str, typer.Option("--max-kv-bytes", help="Memory that these contexts may hold.")
    ] = "100MB",
    rounds: Rounds = 3,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Candidate words in contexts: one trie of tokens beside three plainer ways, and its memory.

    The others run every text alone; or a pass a word over the context's cache; or one padded
    batch of words over copies of it.
    """
    require_effect(context, {"max_kv_bytes": (Need("contexts"),)})
    kv_bytes = parse_bytes(max_kv_bytes)
    check_report("score", output, overwrite)
    language_model, tokenizer = load(model)
    with ticking((rounds + 1) * 4 * len(workloads()) + -(-contexts // 100)) as tick:
        report = bench_score(
            language_model,
            tokenizer,
            contexts=contexts,
            max_kv_bytes=kv_bytes,
            rounds=rounds,
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    table = Table("contexts x words", "variant")
    for name in ("ms", "time over ours", "largest difference, nats"):
        table.add_column(name, justify="right")
    for each in report.measured:
        table.add_row(
            each.workload,
            each.name,
            spread(each.seconds.scaled(1e3), 0),
            spread(each.over_ours, 2),
            f"{each.difference:.1e}",
        )
    console.print(table)
    calls = Table("second call, a word later", "tokens, first and second")
    calls.add_column("times faster", justify="right")
    for call in report.grown:
        calls.add_row(
            call.workload, f"{call.first_tokens} and {call.second_tokens}", spread(call.faster, 2)
        )
    console.print(calls)
    if report.memory is not None:
        held = report.memory
        console.print(
            f"{held.contexts:,} contexts in {held.seconds:.0f} s: {held.largest / 1e6:.1f} MB held "
            f"at most of {held.max_kv_bytes / 1e6:.1f} MB, {held.dropped:,} tokens dropped"
        )
    conclude(report, console, output)


@bench.command("experiments")
def experiments(
    model: Model = "smollm2-135m",
    runs: Annotated[
        int, typer.Option(callback=at_least(2), help="Runs, an even number in [2, 100].")
    ] = 100,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-m", callback=at_least(2), help="Steps of each run, at least 2."
        ),
    ] = 10,
    batch_size: Annotated[
        int, typer.Option(callback=at_least(2), help="Rows of the batch, at least 2.")
    ] = 64,
    workers: Annotated[int, typer.Option(callback=at_least(1), help="Processes, at least 1.")] = 2,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            "-n",
            callback=at_least(1),
            help="Goes of each variant that count, at least 1.",
        ),
    ] = 1,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """The runs of a suite: in one batch, one by one, in processes, and loading the model for each.

    Every way runs the same prompts with the same seeds, and what it makes is compared with what
    the runs make one by one.
    """
    require_extra()
    # What suites need is an extra.
    from ..bench.experiments import bench_experiments

    check_report("experiments", output, overwrite)
    language_model, tokenizer = load(model)
    with ticking((rounds + 1) * 6) as tick:
        report = bench_experiments(
            language_model,
            tokenizer,
            runs=runs,
            max_tokens=max_tokens,
            batch_size=batch_size,
            workers=workers,
            rounds=rounds,
            model_name=model,
            progress=tick,
        )
    console = wide_console(output)
    print_setting(report.model, report.setting, console)
    table = Table("variant", title=f"{runs} runs, {batch_size} rows, {workers} workers")
    for name in ("s/run", "over the batch", "runs that differ", "largest difference"):
        table.add_column(name, justify="right")
    for each in report.measured:
        table.add_row(
            each.name,
            f"{each.seconds.median:.3f}",
            spread(each.over_batched, 2),
            str(each.differing),
            f"{each.largest_difference:.1e}",
        )
    console.print(table)
    conclude(report, console, output)
