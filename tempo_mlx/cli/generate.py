"""``tempo-mlx generate``: text with parallel sets, as it comes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.text import Text

from ..arguments import parse_bytes
from ..decode.prompt_cache import PromptCache
from ..decode.prompt_files import read_prompts
from ..decode.scheduler import BATCH_SIZE
from ..errors import TempoError
from ..generation import stream_generate
from ..io.console import Console
from ..io.files import STANDARD_INPUT, replaceable, write_atomically
from ..io.inputs import HYPHEN
from ..lattice.rendering import StepWriter, plain
from ..models import PositionedModel
from ..needs import Need, Needs
from ..plots import check_plot, plot_mask
from ..settings import Settings
from ..text.printable import running
from ..text.vocabulary import add_end_token
from ..weights import load
from .chat_template import NEEDS as CHAT_NEEDS
from .chat_template import PrefillResponse, SystemPrompt, Template, UseChat, template_config
from .display import coloured, pruned_steps, report, verdicts
from .effects import PRINTED, require_effect, setting_needs
from .one_prompt import AS_IN_AN_EDITOR, read_prompt
from .options import (
    AdapterPath,
    ExtraEosToken,
    MaxKvSize,
    Model,
    Overwrite,
    TemplateConfig,
    at_least,
    output_file,
)
from .outputs import (
    PAGE,
    Output,
    Written,
    check_outputs,
    check_page,
    is_standard_output,
    json_where,
    picture,
    say_written,
    write_json,
)
from .prompts import RESULTS, generate_from_file, join_note, notes_on, runnable
from .setting_options import SettingsCommand, files_of, with_settings

#: Prompts longer than this show a progress bar while they are read.
LONG_PROMPT = 1024

DEFAULTS = Settings()

_ONE_PROMPT = Need("prompts_file", absent=True)
_SHARED = Need("branching", ("replicate",), absent=True)

#: What options need to have an effect.
OPTIONS: Needs = {
    **setting_needs(),
    **CHAT_NEEDS,
    "batch_size": (Need("prompts_file"),),
    "max_kv_bytes": (Need("prompts_file"),),
    "prompt_cache": (_SHARED,),
    "explain": (Need("prune"), _ONE_PROMPT, *PRINTED),
    "plot": (_ONE_PROMPT,),
    "html": (_ONE_PROMPT,),
    "plot_attention": (Need("plot"), _SHARED),
    "verify": (_SHARED,),
}

#: The same, where the text is all that a command may show.
WITHOUT_OUTPUT: Needs = {"paths": PRINTED, "verify": (_SHARED, *PRINTED)}


def register(app: typer.Typer) -> None:
    app.command("generate", cls=SettingsCommand)(with_settings(Settings)(generate))


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads it from standard input, as from --prompt-file."),
    ] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt, as an option.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help=f"Read the prompt from this file (UTF-8). {AS_IN_AN_EDITOR}"),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="Many prompts in one batch: .txt, one a line, or .jsonl, one object a line with "
            '"prompt" and settings of its own such as "threshold". Results go to --output, one '
            "JSON object a line in the same order; what is there already is not made again, what "
            "failed is tried again."
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            callback=at_least(1),
            help="Prompts of --prompts-file that generate at the same time, at least 1.",
        ),
    ] = BATCH_SIZE,
    max_kv_bytes: Annotated[
        str | None,
        typer.Option(
            help="Memory for the keys, values and states of --prompts-file, such as 800MB or 2GiB; "
            "prompts wait while they do not fit. Half of what the model leaves, by default."
        ),
    ] = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache",
            "--prompt-cache-file",
            metavar="FILE",
            parser=output_file,
            help="A prompt that has been read: prompts that begin with it go on from there, others "
            "are appended to it. With one prompt, a file that does not exist is made of it "
            "(.safetensors).",
        ),
    ] = None,
    chat: UseChat = False,
    system_prompt: SystemPrompt = None,
    prefill_response: PrefillResponse = None,
    chat_template_config: TemplateConfig = None,
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    settings: Settings = DEFAULTS,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print every verdict: set, scores, threshold, pruned."),
    ] = False,
    plot: Annotated[
        list[Path] | None,
        typer.Option(
            help="Draw the lattice into this file (.svg, .png, .pdf); where its name begins with "
            "'mask', who saw whom. Repeatable."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page that shows sets and lattice in a browser, without a server.",
        ),
    ] = None,
    plot_attention: Annotated[
        bool,
        typer.Option("--plot-attention", help="Draw attention to earlier sets as arcs, too."),
    ] = False,
    extra_eos_token: ExtraEosToken = None,
    max_kv_size: MaxKvSize = None,
    paths: Annotated[
        int,
        typer.Option(
            callback=at_least(0),
            help="Print this many of the best paths with their log-probability, or write them with "
            "--output, where 5 are written unless another number is given.",
        ),
    ] = 0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Replay the run in one uncached pass and report the difference; where layers are "
            "recurrent, each of its texts by mlx-lm alone.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=output_file,
            help="Write the result as JSON (schema 2); '-' prints it instead of the text.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the best text and nothing else.")
    ] = False,
) -> None:
    """Generate text with parallel token sets.

    At each step every token above the threshold enters the text at the same position, shown as
    [bold]\\[ on/ under/ beside][/bold]. At the end comes the best single path through the sets,
    rescored by the model as the text that it is.
    """
    rows = None
    if prompts_file is not None:
        if (prompt, prompt_option, prompt_file) != (None, None, None):
            raise TempoError("give one prompt or --prompts-file, not both")
        if prompt_cache is not None and not prompt_cache.exists():
            raise TempoError(f"--prompt-cache {prompt_cache} does not exist; make it of one prompt")
        rows = read_prompts(prompts_file)
    known_prompt = prompt_cache is not None and prompt_cache.exists()
    if prompt_cache is not None and not replaceable(prompt_cache):
        raise TempoError(f"--prompt-cache {prompt_cache} must be a regular file")
    for drawing in plot or ():
        check_plot(drawing)
    if html is not None:
        check_page(html)
    check_outputs(
        [
            Output("--output", output, is_result if prompts_file is None else RESULTS),
            Output("--prompt-cache", None if known_prompt else prompt_cache),
            Output("--html", html, PAGE),
            *(Output("--plot", path, picture("lattice", "mask")) for path in plot or (None,)),
        ],
        {
            "--prompt-file": prompt_file,
            "--prompts-file": prompts_file,
            "--prompt-cache": prompt_cache if known_prompt else None,
            "standard input": STANDARD_INPUT if HYPHEN in (prompt, prompt_option) else None,
            **files_of(Settings, context.params),
        },
        overwrite,
    )
    kv_bytes = parse_bytes(max_kv_bytes) if max_kv_bytes is not None else None
    text = read_prompt(prompt, prompt_option, prompt_file) if rows is None else ""
    template = None
    if chat:
        config = template_config(chat_template_config)
        template = Template(system_prompt, prefill_response, config)
    shown = output is not None or rows is not None
    cases = [settings] if rows is None else runnable(rows, settings) or [settings]
    needs = OPTIONS if shown else {**OPTIONS, **WITHOUT_OUTPUT}
    require_effect(context, needs, *(each.values() for each in cases))
    if plot_attention and all(is_mask(picture) for picture in plot or ()):
        raise TempoError("--plot-attention draws into the lattice, and --plot names masks only")

    out, notes = (Console(stderr=err, highlight=False, soft_wrap=True) for err in (False, True))
    out.quiet = is_standard_output(output)
    notes.quiet = quiet
    for note in settings.notes() if rows is None else notes_on(rows, settings):
        notes.print(f"note: {note}", style="yellow")

    if chat and rows is not None and not any(isinstance(row.prompt, str) for row in rows):
        notes.print("note: --chat has no effect: no prompt of the file is a text", style="yellow")

    language_model, tokenizer = load(model, adapter_path=adapter_path)
    if notes.is_terminal and not chat and rows is None and tokenizer.has_chat_template:
        notes.print("the text is continued as it is; --chat uses the model's template", style="dim")
    for token in extra_eos_token or ():
        add_end_token(tokenizer, token)
    if plot_attention:
        positioned = PositionedModel.of(language_model)
        positioned.require_capture()
        positioned.require_replay()
    known = None
    if prompt_cache is not None and prompt_cache.exists():
        known = PromptCache.load(prompt_cache, language_model)
    if rows is not None:
        failures = generate_from_file(
            rows,
            settings,
            language_model,
            tokenizer,
            notes,
            output,
            template,
            paths,
            verify,
            batch_size,
            kv_bytes,
            known,
            overwrite,
        )
        if output is not None:
            say_written(output, notes)
        if failures:
            notes.print(
                f"{failures} of {len(rows)} prompts failed, see their records", style="yellow"
            )
            raise typer.Exit(1)
        return
    content: Any = text if template is None else template.asking(text)
    if known is not None:
        joined = known.join(language_model, tokenizer, content)
        notes.print(join_note(known, [joined]), style="dim")
    elif prompt_cache is not None:
        known = PromptCache.read(language_model, tokenizer, content, settings.prefill_step_size)
        known.save(prompt_cache)
        say_written(prompt_cache, notes)
    response = None
    interrupted = False
    writer, streamed = StepWriter(), ""
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        reading: list[Any] = []

        def on_prompt(done: int, total: int) -> None:
            if total > LONG_PROMPT:
                if not reading:
                    reading.append(progress.add_task("Reading the prompt", total=total))
                progress.update(reading[0], completed=done)
                if done == total:
                    progress.remove_task(reading[0])

        responses = stream_generate(
            language_model,
            tokenizer,
            content,
            verify=verify,
            prompt_progress_callback=on_prompt,
            prompt_cache=known,
            paths=max(1, paths or 5 if output is not None else paths),
            settings=settings,
        )
        try:
            for response in responses:
                if not quiet:
                    if response.step.step == 0:
                        progress.stop()
                        out.print(Text(response.result.prompt, style="dim"), end="")
                    spans = list(writer.write(response.step))
                    streamed += plain(spans)
                    out.print(coloured(spans), end="")
        except KeyboardInterrupt:
            interrupted = True
    if not quiet:
        out.print(coloured(writer.finish()))
    if response is None:
        raise KeyboardInterrupt
    result = response.result
    if interrupted:
        result.finish_reason = "interrupted"

    with notes.status("Rescoring the paths ...") if notes.is_terminal else notes.status(""):
        ranked = result.find_paths(max(1, paths or 5 if output is not None else paths))
        best, ranked = result.text, ranked[:paths]
        data = result.to_dict(paths or 5) if output is not None else None
    if quiet and not (out.is_terminal or out.quiet):
        print(best)
    elif quiet:
        out.print(Text(best))
    else:
        if any(
            token.pruned_at is not None for step in result.lattice.steps for token in step.tokens
        ):
            pruned = pruned_steps(result, plain=not out.is_terminal)
            out.print(Text.assemble(("pruned: ", "bold"), (result.prompt, "dim"), pruned))
        if explain:
            out.print(verdicts(result))
        if streamed != running(best):
            out.print(Text.assemble(("best path: ", "bold"), (result.prompt, "dim"), best))
        for path in ranked:
            out.print(Text.assemble((f"{path.logprob:9.3f} nats ", "cyan"), path.text))
        report(result, notes)
    written = Written(notes)
    if output is not None:
        with written.output(output):
            write_json(output, data)
    if html is not None:
        with written.output(html):
            write_atomically(html, result.to_html())
    for drawing in plot or ():
        with written.output(drawing, "drawn"):
            if is_mask(drawing):
                plot_mask(result, settings.visibility_rule, drawing)
            else:
                result.plot(drawing, attention=plot_attention)
    written.finish()
    if interrupted:
        raise KeyboardInterrupt


#: Recognises a result of this command.
is_result = json_where(lambda data: data.keys() >= {"schema", "prompt", "steps", "paths"})


def is_mask(picture: Path) -> bool:
    """Whether a picture shows who saw whom, and not the lattice."""
    return picture.name.startswith("mask")
