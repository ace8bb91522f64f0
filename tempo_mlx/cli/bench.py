"""``tempo-mlx bench``: speed and memory, measured here."""

from pathlib import Path
from typing import Annotated

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
from .effects import require_effect
from .experiment import require_extra
from .options import Model, Overwrite, at_least, output_file
from .tables import check_result, conclude, measure_model, numbers, ticking

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


PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        "-p",
        callback=at_least(1, MOST_TOKENS),
        help="Tokens of the prompt, at least 1.",
    ),
]

Steps = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        "-m",
        callback=at_least(4, MOST_TOKENS),
        help="Steps of each run, at least 4.",
    ),
]

Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        "--num-trials",
        "-n",
        callback=at_least(1, MOST_ROUNDS),
        help="Runs of each variant that count, at least 1; a first round warms up.",
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
            "so that attention costs more the longer a run is.",
        ),
    ] = 24,
    rounds: Rounds = 7,
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
    widths = numbers(siblings, "--siblings", 1, MOST_WIDTH)
    if dtype is not None and dtype not in DTYPES:
        raise TempoError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    def run(subject: Subject) -> Result:
        return bench_decode(subject, prompt_tokens, max_tokens, widths, LONG_STEPS if long else 0)

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
    """What a step costs beside the model, where the model has next to nothing to compute.

    The model is a llama of two small layers with random weights, made here. mlx-lm's steps end
    with the token on the host; ours also find its text and record the step.
    """
    check_result("host", output, overwrite)
    with ticking() as progress:
        result = bench_host(prompt_tokens, max_tokens, rounds, progress)
    conclude(result, output)


@bench.command("pruning")
def pruning(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 64,
    siblings: Annotated[
        int,
        typer.Option(
            callback=at_least(2, MOST_WIDTH), help="Tokens of each forced set, at least 2."
        ),
    ] = 4,
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
    """Cost of each kind of evidence for pruning, and what compaction saves.

    The timed runs judge every set and prune nothing, so that all variants make the same sets. The
    long runs lose half of their tokens at random, without and with compaction of the cache.
    """
    lengths = numbers(steps, "--steps", 4, MOST_TOKENS)

    def run(subject: Subject) -> Result:
        return bench_pruning(subject, prompt_tokens, siblings, max_tokens, lengths)

    measure_model("pruning", model, rounds, output, overwrite, run)


@bench.command("batch")
def batch(
    model: Model = "smollm2-135m",
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens",
            "-p",
            callback=at_least(4, MOST_TOKENS),
            help="Mean tokens of a prompt, at least 4.",
        ),
    ] = 64,
    max_tokens: Steps = 24,
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
    sizes = numbers(batch_sizes, "--batch-sizes", 1, MOST_WIDTH)

    def run(subject: Subject) -> Result:
        return bench_batch(subject, prompt_tokens, max_tokens, sizes)

    measure_model("batch", model, rounds, output, overwrite, run)


@bench.command("tree")
def tree(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 256,
    leaves: Annotated[
        int, typer.Option(callback=at_least(2, MOST_WIDTH), help="Branches, at least 2.")
    ] = 8,
    max_tokens: Steps = 32,
    rounds: Rounds = 3,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Branches of one prompt in one sequence, in a row each, and one after another.

    Then those of a hybrid model with random weights, beside mlx-lm's batch.
    """

    def run(subject: Subject) -> Result:
        return bench_tree(subject, prompt_tokens, leaves, max_tokens)

    measure_model("tree", model, rounds, output, overwrite, run)


@bench.command("draft")
def draft(
    model: Model = "smollm2-135m",
    prompts: Annotated[
        int,
        typer.Option(
            "--prompts", callback=at_least(1, MOST_TOKENS), help="Of each kind of text, at least 1."
        ),
    ] = 20,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "-m",
            callback=at_least(2, MOST_TOKENS),
            help="Tokens of each run, at least 2.",
        ),
    ] = 60,
    output: Measurements = None,
    overwrite: Overwrite = False,
) -> None:
    """Decoding at threshold 1 with drafts, beside mlx-lm, on prose, questions, copies and code.

    Every prompt is run by mlx-lm and by ours without drafts and with each source of drafts, by
    turns. Speeds are of the tokens after the first; ratios are of each prompt, their median shown.
    """

    def run(subject: Subject) -> Result:
        return bench_draft(subject, prompts, max_tokens)

    measure_model("draft", model, 1, output, overwrite, run)


@bench.command("search")
def search(
    model: Model = "smollm2-135m",
    prompt_tokens: PromptTokens = 256,
    simulations: Annotated[
        int,
        typer.Option(
            "--simulations",
            "-s",
            callback=at_least(1, MOST_TOKENS),
            help="Simulations of each run, at least 1.",
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
            help="Contexts that are scored under --max-kv-bytes; 0 for none.",
        ),
    ] = 10_000,
    max_kv_bytes: Annotated[
        str, typer.Option("--max-kv-bytes", help="Memory that these contexts may hold.")
    ] = "100MB",
    held: Annotated[
        str,
        typer.Option(
            help="Sizes of what is held while one more word is read, separated by commas; 'none' "
            "for no such calls. Those that do not fit in memory are left out."
        ),
    ] = "10MB,100MB,1GB",
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
        int,
        typer.Option(
            "--max-tokens",
            "-m",
            callback=at_least(2, MOST_TOKENS),
            help="Steps of each run, at least 2.",
        ),
    ] = 10,
    batch_size: Annotated[
        int,
        typer.Option(callback=at_least(2, MOST_WIDTH), help="Rows of the batch, at least 2."),
    ] = 64,
    workers: Annotated[int, typer.Option(callback=at_least(1), help="Processes, at least 1.")] = 2,
    rounds: Rounds = 1,
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
    from ..experiments.session import MOST_WORKERS

    check_count("--workers", workers, most=MOST_WORKERS)

    def run(subject: Subject) -> Result:
        return bench_experiments(subject, runs, max_tokens, batch_size, workers)

    measure_model("experiments", model, rounds, output, overwrite, run)
