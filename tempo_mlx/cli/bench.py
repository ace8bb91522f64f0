"""``tempo-mlx bench``: speed and memory, measured here."""

from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from ..arguments import check_count, parse_bytes
from ..bench.batch import bench_batch
from ..bench.decode import bench_decode
from ..bench.draft import bench_draft
from ..bench.host import bench_host
from ..bench.pruning import bench_pruning
from ..bench.rescore import bench_rescore
from ..bench.result import Result
from ..bench.runs import LONG_BLOCKS
from ..bench.score import bench_score
from ..bench.search import bench_search
from ..bench.setting import MOST_ROUNDS, MOST_TOKENS, MOST_WIDTH, Subject
from ..bench.tree import bench_tree
from ..errors import TempoError
from ..needs import Need
from ..settings import Settings
from .effects import require_effect
from .experiment import require_extra
from .options import Model, Overwrite, at_least, output_file
from .tables import check_result, conclude, measure_model, numbers, ticking

#: Steps that --long decodes.
LONG_STEPS = 2000

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on this machine. Variants alternate in one process; the "
    "tables show medians and quartiles. Targets are printed, never enforced.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    app.add_typer(bench)


def _count(help: str, least: int, most: int, *flags: str) -> Any:
    """An option for an integer in [least, most]; the help ends with the least value."""
    callback = at_least(least, most)
    return typer.Option(*flags, callback=callback, help=f"{help}, at least {least}.")


PromptTokens = Annotated[
    int, _count("Tokens of the prompt", 1, MOST_TOKENS, "--prompt-tokens", "-p")
]

Steps = Annotated[int, _count("Steps of each run", 4, MOST_TOKENS, "--max-tokens", "-m")]

Rounds = Annotated[
    int,
    _count(
        "Runs of each variant after a warm-up",
        1,
        MOST_ROUNDS,
        "--rounds",
        "--num-trials",
        "-n",
    ),
]

Measurements = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        parser=output_file,
        help="Write the measurements as JSON; '-' prints it instead of the tables.",
    ),
]


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
            callback=at_least(4, MOST_TOKENS),
            help="Steps of each run, at least 4. A step of N siblings adds N slots to the cache, "
            "so attention becomes slower in longer runs.",
        ),
    ] = 24,
    rounds: Rounds = 7,
    siblings: Annotated[
        str,
        typer.Option(help="Widths of the sets, at least 1 each, separated by commas."),
    ] = "1,2,4,8,16",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Cast the weights, or the unpacked parts of a quantised model. Default: as "
            "stored.",
        ),
    ] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help=f"Also decode {LONG_STEPS} steps on both sides and print the time per step in "
            f"{LONG_BLOCKS} blocks. A larger rise than mlx-lm's is not due to attention.",
        ),
    ] = False,
    kv_bits: Annotated[
        int | None,
        typer.Option(
            help="Also decode with keys and values quantised to so many bits, on both sides; says "
            "what a slot takes and how much log-probabilities differ."
        ),
    ] = None,
    kv_group_size: Annotated[
        int, typer.Option(help="Numbers of a key or value that share a scale with --kv-bits.")
    ] = 64,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Decoding speed of mlx-lm, ours at threshold 1, and ours with sets of N siblings.

    Every step of a set of N siblings keeps exactly N tokens, whatever their probabilities. "1
    sibling" takes the general path; threshold 1 knows that each set has one token and starts the
    next pass early. Bandwidth is the weights' bytes over the time of a step, compared with that of
    copying an array (bytes read and written).
    """
    widths = numbers(siblings, "--siblings", 1, MOST_WIDTH)
    if dtype is not None and dtype not in DTYPES:
        raise TempoError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    def run(subject: Subject) -> Result:
        return bench_decode(
            subject,
            prompt_tokens,
            max_tokens,
            widths,
            LONG_STEPS if long else 0,
            kv_bits,
            kv_group_size,
        )

    # Says what is wrong with them before the model is loaded.
    Settings(kv_bits=kv_bits, kv_group_size=kv_group_size)
    cast = DTYPES[dtype] if dtype is not None else None
    measure_model("decode", model, rounds, output, overwrite, run, cast)


@bench.command("host")
def host(
    prompt_tokens: PromptTokens = 64,
    max_tokens: Steps = 64,
    rounds: Rounds = 15,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """The cost of a step outside the model, measured with a model that computes almost nothing.

    The model is a llama with two small layers and random weights. mlx-lm's steps end with the token
    on the host; ours also look up its text and record the step.
    """
    check_result("host", output, overwrite)
    with ticking() as progress:
        result = bench_host(prompt_tokens, max_tokens, rounds, progress)
    conclude(result, output)


@bench.command("pruning")
def pruning(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 64,
    siblings: Annotated[int, _count("Tokens in each set", 2, MOST_WIDTH)] = 4,
    max_tokens: Steps = 24,
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
    """Cost of each kind of evidence for pruning, and savings of compaction.

    The timed runs judge every set but prune nothing, so all variants have the same sets. The long
    runs lose half of their tokens at random, with and without compaction of the cache.
    """
    lengths = numbers(steps, "--steps", 4, MOST_TOKENS)

    def run(subject: Subject) -> Result:
        return bench_pruning(subject, prompt_tokens, siblings, max_tokens, lengths)

    measure_model("pruning", model, rounds, output, overwrite, run)


@bench.command("batch")
def batch(
    model: Model = "smollm2-135m",
    prompt_tokens: Annotated[
        int, _count("Mean tokens of a prompt", 4, MOST_TOKENS, "--prompt-tokens", "-p")
    ] = 64,
    max_tokens: Steps = 24,
    rounds: Rounds = 3,
    batch_sizes: Annotated[
        str, typer.Option(help="Prompts in a batch, at least 1 each, separated by commas.")
    ] = "1,2,4,8,16,32",
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Throughput of batches, compared with mlx-lm's batches and with one prompt at a time.

    The prompts of a batch have 3/4 to 5/4 of the mean length. The time of a step includes the
    forward pass and everything around it; the time of a whole run also includes the prompts.
    """
    sizes = numbers(batch_sizes, "--batch-sizes", 1, MOST_WIDTH)

    def run(subject: Subject) -> Result:
        return bench_batch(subject, prompt_tokens, max_tokens, sizes)

    measure_model("batch", model, rounds, output, overwrite, run)


@bench.command("tree")
def tree(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 256,
    leaves: Annotated[int, _count("Branches", 2, MOST_WIDTH)] = 8,
    max_tokens: Steps = 32,
    rounds: Rounds = 3,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Branches of one prompt in one sequence, in one row for each, and one after another.

    Also for a hybrid model with random weights, compared with mlx-lm's batch.
    """

    def run(subject: Subject) -> Result:
        return bench_tree(subject, prompt_tokens, leaves, max_tokens)

    measure_model("tree", model, rounds, output, overwrite, run)


@bench.command("draft")
def draft(
    model: Model = "smollm2-135m",
    prompts: Annotated[
        int, _count("Prompts of each kind of text", 1, MOST_TOKENS, "--prompts")
    ] = 20,
    max_tokens: Annotated[
        int, _count("Tokens of each run", 2, MOST_TOKENS, "--max-tokens", "-m")
    ] = 60,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Decoding at threshold 1 with drafts, and by mlx-lm, on prose, questions, copies and code.

    Each prompt is run by mlx-lm, by ours without drafts, and by ours with each source of drafts, in
    alternation. Speeds exclude the first token. The table shows the median over prompts of each
    ratio.
    """

    def run(subject: Subject) -> Result:
        return bench_draft(subject, prompts, max_tokens)

    measure_model("draft", model, 1, output, overwrite, run)


@bench.command("search")
def search(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 256,
    simulations: Annotated[
        int, _count("Simulations of each run", 1, MOST_TOKENS, "--simulations", "-s")
    ] = 32,
    leaves: Annotated[
        str, typer.Option(help="Leaves in one pass, at least 1 each, separated by commas.")
    ] = "1,4,8,16",
    rounds: Rounds = 2,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Simulations per second in one sequence state by leaves in a pass, and in simpler searches.

    The simpler ones are the same search with another environment: one rereads the whole text of a
    leaf, the other keeps a copy of the cache for each node.
    """
    widths = numbers(leaves, "--leaves", 1, MOST_WIDTH)

    def run(subject: Subject) -> Result:
        return bench_search(subject, prompt_tokens, simulations, widths)

    measure_model("search", model, rounds, output, overwrite, run)


@bench.command("score")
def score(
    context: typer.Context,
    model: Model = "smollm2-135m",
    contexts: Annotated[
        int,
        typer.Option(
            "--contexts",
            "-c",
            callback=at_least(0, MOST_TOKENS),
            help="Contexts to score within --max-kv-bytes; 0 for none.",
        ),
    ] = 10_000,
    max_kv_bytes: Annotated[
        str, typer.Option("--max-kv-bytes", help="Memory limit for these contexts.")
    ] = "100MB",
    held: Annotated[
        str,
        typer.Option(
            help="Memory held while one more word is read, sizes separated by commas, or 'none' to "
            "skip this part. Sizes that do not fit in memory are left out."
        ),
    ] = "10MB,100MB,1GB",
    rounds: Rounds = 3,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Scoring candidate words with one trie of tokens, compared with three simpler ways; memory.

    The simpler ways run every text alone, or one pass for each word over the context's cache, or
    one padded batch of words over copies of the cache.
    """
    require_effect(context, {"max_kv_bytes": (Need("contexts"),)})
    kv_bytes = parse_bytes(max_kv_bytes)
    sizes = [] if held == "none" else [parse_bytes(each, "--held") for each in held.split(",")]

    def run(subject: Subject) -> Result:
        return bench_score(subject, contexts, kv_bytes, sizes)

    measure_model("score", model, rounds, output, overwrite, run)


@bench.command("rescore")
def rescore(
    model: Model = "smollm2-135m",
    beams: Annotated[
        int, typer.Option(callback=at_least(1), help="Texts of each call of a beam search.")
    ] = 24,
    hypotheses: Annotated[
        int, typer.Option(callback=at_least(1), help="Hypotheses of a list.")
    ] = 100,
    lists: Annotated[int, typer.Option(callback=at_least(1), help="Lists.")] = 3,
    rounds: Rounds = 3,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Hypotheses of a decoder: one trie of tokens beside a padded batch of stock mlx-lm.

    A beam search calls with texts that grow by a word; n-best lists come one a call, or all at
    once.
    """
    for name, value in (("beams", beams), ("hypotheses", hypotheses), ("lists", lists)):
        check_count(f"--{name}", value, most=MOST_WIDTH)

    def run(subject: Subject) -> Result:
        return bench_rescore(subject, beams, hypotheses, lists)

    measure_model("rescore", model, rounds, output, overwrite, run)


@bench.command("experiments")
def experiments(
    model: Model = "smollm2-135m",
    runs: Annotated[
        int, typer.Option(callback=at_least(2, 100), help="Runs, an even number in [2, 100].")
    ] = 100,
    max_tokens: Annotated[
        int, _count("Steps of each run", 2, MOST_TOKENS, "--max-tokens", "-m")
    ] = 10,
    batch_size: Annotated[int, _count("Rows of the batch", 2, MOST_WIDTH)] = 64,
    workers: Annotated[int, typer.Option(callback=at_least(1), help="Processes, at least 1.")] = 2,
    rounds: Rounds = 1,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """The runs of a suite: in one batch, one by one, in processes, and with one command for each.

    Every way runs the same prompts with the same seeds. Its results are compared with those of the
    runs one by one.
    """
    require_extra()
    # Suites need an extra.
    from ..bench.experiments import bench_experiments
    from ..experiments.session import MOST_WORKERS

    check_count("--workers", workers, most=MOST_WORKERS)

    def run(subject: Subject) -> Result:
        return bench_experiments(subject, runs, max_tokens, batch_size, workers)

    measure_model("experiments", model, rounds, output, overwrite, run)
