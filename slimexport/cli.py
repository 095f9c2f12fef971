"""The command line: every command turns options into a RunConfig (or overrides), makes one call, prints the result.

Results go to stdout, progress and errors to stderr. Everything heavy is imported inside the commands, so that
`slimexport --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from slimexport import __version__, ranks
from slimexport.errors import BadInputError, ExitCode, SlimExportError, UsageError, nearest
from slimexport.options import ConfigCommand, given
from slimexport.providers import PROVIDERS

if TYPE_CHECKING:
    from slimexport.config import RunConfig
    from slimexport.progress import Progress
    from slimexport.reporting import Report

_INTERRUPTED = 130  # 128 + SIGINT, what shells expect


class Main(click.Group):
    """The group that turns every way to fail into one line and a documented exit code."""

    def main(  # always ends the process, as Click's own does in its standalone mode
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any
    ) -> NoReturn:
        argv = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in argv
        try:
            code = super().main(argv, prog_name, standalone_mode=False)
        except BaseException as error:
            code = _fail(error, as_json="--json" in argv, debug=debug)
        sys.exit(int(code or 0))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the road, not of the alphabet

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def _fail(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Prints one line (or JSON) for `error` and returns the exit code."""
    if isinstance(error, click.UsageError) and type(error).__name__ == "NoArgsIsHelpError":  # Click 8.2
        error.show()  # no command: the help, which is no error message
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        message, code = "Interrupted.", _INTERRUPTED
    elif isinstance(error, click.ClickException):
        usage = getattr(error, "ctx", None)
        hint = f" (see {usage.command_path} --help)" if usage else ""
        message, code = error.format_message() + hint, error.exit_code
    elif isinstance(error, SlimExportError):
        message, code = str(error), error.exit_code
    elif full := _storage_problem(error):
        message, code = full, ExitCode.BAD_INPUT
    elif isinstance(error, Exception):
        message = f"internal error: {type(error).__name__}: {error}"
        message, code = message if debug else f"{message} (--debug shows the traceback)", ExitCode.INTERNAL
    else:
        raise error  # SystemExit and the like are not ours
    message = " ".join(message.split())
    if debug:
        traceback.print_exception(error)
    if as_json:
        click.echo(json.dumps({"error": message, "exit_code": int(code)}))
    else:
        click.echo(f"Error: {message}", err=True)
    return int(code)


def _storage_problem(error: BaseException) -> str | None:
    """Full disks, read-only places and paths that cannot be are the user's to mend; writers below raise them in many
    classes."""
    advice = "Make room or choose another place."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        where = f": {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}. {advice}"
    if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EPERM):
        return f"{os.strerror(error.errno)}: {error.filename}. Choose another place."
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        return "A path begins with ~ and the name of no user: write it out."
    if isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error):
        return f"{error}. {advice}"
    return None


# ------------------------------------------------------------------------------------------------ shared by commands


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command has and that do not change the result."""
    for option in (
        click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' warnings."),
        click.option("--quiet", "-q", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        function = option(function)
    return function


def resumable(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")(function)
    return click.option("--force", is_flag=True, help="Replace what the directory holds.")(function)


recipe_option = click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="YAML file with any of the settings below, or the name of a built-in one; flags win.",
)
output_option = click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path, file_okay=False), help="Run directory."
)
model_argument = click.argument("model", required=False)
directory_argument = click.argument("directory", type=click.Path(path_type=Path))


def _config(ctx: click.Context, model: str | None, recipe: Path | None, **more: Any) -> RunConfig:
    """Recipe, then flags and `more` over it, validated."""
    from slimexport.config import layered
    from slimexport.recipe import load_recipe

    flags = given(ctx) | ({"model": model} if model is not None else {}) | more
    below = load_recipe(recipe) if recipe else {}
    if "model" not in {**below, **flags}:
        raise click.UsageError("Missing argument 'MODEL' (or the key `model` in a recipe).", ctx)
    return layered(below, flags, str(recipe) if recipe else "options")


def _overrides(ctx: click.Context, directory: Path, recipe: Path | None) -> dict[str, Any]:
    """What a command that goes on in a run directory changes: only fields of its own stages."""
    from slimexport.recipe import load_recipe
    from slimexport.stages.inputs import Overrides

    if not directory.is_dir():
        raise BadInputError(f"{directory} is not a directory; `slimexport prune MODEL -o {directory}` makes one.")

    command = ctx.command
    assert isinstance(command, ConfigCommand)
    from_recipe = load_recipe(recipe) if recipe else {}
    own = {key: value for key, value in from_recipe.items() if key in command.fields}
    return Overrides(own, given(ctx), str(recipe) if recipe else "options")


def _flags(force: bool, resume: bool) -> dict[str, bool]:
    if force and resume:
        raise UsageError("--force starts again and --resume goes on: give one of them.")
    return {"force": force, "resume": resume}


@contextlib.contextmanager
def _working(quiet: bool, debug: bool) -> Iterator[Progress]:
    """Keeps stdout for the result, whatever libraries print, and their chatter away unless --debug."""
    import warnings

    from slimexport.progress import Progress

    # Threads that spin while they wait take the cores from whoever else is on the machine, ourselves included.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; ours says the same
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr), Progress(quiet=quiet) as progress:
        yield progress


def _print(as_json: bool, data: Callable[[], Any], text: Callable[[], str]) -> None:
    click.echo(json.dumps(data(), indent=2, default=str, ensure_ascii=False) if as_json else text())


def _publish(report: Report, directory: Path) -> None:
    """report.md where GitHub shows it; the last line of a log says which gate did not pass, and by how much."""
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with contextlib.suppress(OSError), open(summary, "a", encoding="utf-8") as stream:
            stream.write((directory / "report" / "report.md").read_text(encoding="utf-8") + "\n")
    if not all(result.passed for result in report.gates):
        click.echo(report.verdict, err=True)


# ---------------------------------------------------------------------------------------------------------- commands


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="slimexport")
def main() -> None:
    """Make a language model smaller with SlimGPT and ship it to ONNX Runtime, verified.

    \b
    slimexport run smollm2-135m --ratio 0.25 --target onnx -o out/
    slimexport plan MODEL --ratio 0.3        what would be removed; reads no weights

    Exit codes: 0 passed, 1 internal error, 2 wrong usage, 3 a gate failed, 4 bad input, 5 a result does not
    reproduce what it was made from.
    """
    command = click.get_current_context().invoked_subcommand
    if ranks.several() and command not in ("run", "prune", "recover"):
        raise UsageError(f"slimexport {command} is one process: start it without torchrun.")


@main.command(cls=ConfigCommand, stages=("load", "calibrate", "prune", "recover", "limits", "export", "verify", "gate"))
@model_argument
@output_option
@recipe_option
@resumable
@common
@click.pass_context
def run(ctx: click.Context, model: str | None, output: Path, recipe: Path | None, force: bool, resume: bool,
        as_json: bool, quiet: bool, debug: bool, **_: Any) -> int:  # fmt: skip
    """Prune, export, verify and report, all in one go.

    MODEL is a local directory, a Hub id, a .gguf file, or the built-in smollm2-135m.
    """
    config, flags = _config(ctx, model, recipe), _flags(force, resume)
    with _working(quiet, debug) as progress:
        from slimexport import pipeline, reporting

        if not ranks.is_first():
            pipeline.assist(config)
            return ExitCode.PASSED
        report = pipeline.run(config, output, **flags, progress=progress)
    _print(as_json, lambda: reporting.to_json(report), lambda: reporting.summary(report, output / "report"))
    _publish(report, output)
    return ExitCode.PASSED if report.passed else ExitCode.GATE_FAILED


@main.command(cls=ConfigCommand, stages=("load", "calibrate", "prune", "limits"))
@model_argument
@recipe_option
@common
@click.pass_context
def plan(ctx: click.Context, model: str | None, recipe: Path | None, as_json: bool, quiet: bool, debug: bool,
         **_: Any) -> None:  # fmt: skip
    """Show what would be removed; reads no weights, but to measure --costs.

    MODEL is a local directory, a Hub id, a .gguf file, or the built-in smollm2-135m.
    """
    config = _config(ctx, model, recipe)
    with _working(quiet, debug) as progress:
        from slimexport import artifacts, pipeline, reporting

        made = pipeline.plan(config, progress)
    _print(as_json, lambda: artifacts.to_dict(made), lambda: reporting.plan_text(made))


@main.command(cls=ConfigCommand, stages=("load", "calibrate", "prune", "limits"))
@model_argument
@output_option
@recipe_option
@resumable
@common
@click.pass_context
def prune(ctx: click.Context, model: str | None, output: Path, recipe: Path | None, force: bool, resume: bool,
          as_json: bool, quiet: bool, debug: bool, **_: Any) -> int:  # fmt: skip
    """Write the shrunk checkpoint; no export.

    MODEL is a local directory, a Hub id, a .gguf file, or the built-in smollm2-135m.
    """
    config, flags = _config(ctx, model, recipe), _flags(force, resume)
    with _working(quiet, debug) as progress:
        from slimexport import artifacts, pipeline, reporting

        if not ranks.is_first():
            pipeline.assist(config, recovers=False)
            return ExitCode.PASSED
        checkpoint = pipeline.prune(config, output, **flags, progress=progress)
    _print(as_json, lambda: artifacts.to_dict(checkpoint), lambda: reporting.checkpoint_text(checkpoint, output))
    return ExitCode.PASSED


@main.command(cls=ConfigCommand, stages=("recover", "limits"))
@directory_argument
@recipe_option
@resumable
@common
@click.pass_context
def recover(ctx: click.Context, directory: Path, recipe: Path | None, force: bool, resume: bool, as_json: bool,
            quiet: bool, debug: bool, **_: Any) -> int:  # fmt: skip
    """Train the checkpoint in a run directory toward the dense model.

    DIRECTORY is what `slimexport prune` or `run` wrote. The shape stays; what was exported before is exported anew.
    """
    overrides, flags = _overrides(ctx, directory, recipe), _flags(force, resume)
    with _working(quiet, debug) as progress:
        from slimexport import artifacts, pipeline, reporting

        if not ranks.is_first():
            pipeline.assist_recovery(directory, overrides)
            return ExitCode.PASSED
        made = pipeline.recover(directory, overrides, **flags, progress=progress)
    _print(as_json, lambda: artifacts.to_dict(made), lambda: reporting.recovery_text(made, directory))
    return ExitCode.PASSED


@main.command(cls=ConfigCommand, stages=("export",))
@directory_argument
@recipe_option
@resumable
@common
@click.pass_context
def export(ctx: click.Context, directory: Path, recipe: Path | None, force: bool, resume: bool, as_json: bool,
           quiet: bool, debug: bool, **_: Any) -> None:  # fmt: skip
    """Export the checkpoint in a run directory.

    DIRECTORY is what `slimexport prune` or `run` wrote; the dense model is exported beside the shrunk one.
    """
    overrides, flags = _overrides(ctx, directory, recipe), _flags(force, resume)
    with _working(quiet, debug) as progress:
        from slimexport import artifacts, pipeline, reporting

        made = pipeline.export(directory, overrides, **flags, progress=progress)
    _print(
        as_json,
        lambda: {name: artifacts.to_dict(artifact) for name, artifact in made.items()},
        lambda: reporting.exports_text(made),
    )


@main.command(cls=ConfigCommand, stages=("verify",))
@directory_argument
@recipe_option
@resumable
@common
@click.pass_context
def verify(ctx: click.Context, directory: Path, recipe: Path | None, force: bool, resume: bool, as_json: bool,
           quiet: bool, debug: bool, **_: Any) -> None:  # fmt: skip
    """Measure the exported graphs in ONNX Runtime.

    Numerics, accuracy and latency of the shrunk model beside the baseline, in run directory DIRECTORY.
    """
    overrides, flags = _overrides(ctx, directory, recipe), _flags(force, resume)
    with _working(quiet, debug) as progress:
        from slimexport import artifacts, pipeline, reporting

        pipeline.verify(directory, overrides, **flags, progress=progress)
        found = pipeline.verified(directory)
    first, *others = found
    several = {"others": {name: artifacts.to_dict(found[name]) for name in others}} if others else {}
    _print(as_json, lambda: artifacts.to_dict(found[first]) | several, lambda: reporting.verified_text(found))


@main.command(cls=ConfigCommand, stages=("gate",))
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIRECTORY...")
@recipe_option
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the comparison of several runs to this .html or .md file.")  # fmt: skip
@click.option("--open", "opened", is_flag=True, help="Show report.html (or the comparison) in a browser.")
@resumable
@common
@click.pass_context
def report(ctx: click.Context, directories: tuple[Path, ...], recipe: Path | None, output: Path | None, opened: bool,
           force: bool, resume: bool, as_json: bool, quiet: bool, debug: bool, **_: Any) -> int:  # fmt: skip
    """Write the report and apply the gates; compare runs.

    Measures nothing: reads what `slimexport verify` or `run` left in run directory DIRECTORY. Of several, each is
    written again, and they are shown side by side.
    """
    if output is not None and (len(directories) < 2 or output.suffix not in (".html", ".md")):
        raise UsageError("--output takes the comparison of several runs, as a .html or .md file.")
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise BadInputError(f"A run is named twice: {', '.join(map(str, directories))}.")
    if output is not None and output.exists() and not force:
        raise BadInputError(f"{output} is there already: --force replaces it.")
    flags = _flags(force, resume)
    with _working(quiet, debug) as progress:
        from slimexport import pipeline, reporting
        from slimexport.artifacts import write_text
        from slimexport.reporting import compare

        made = {}
        for directory in directories:
            made[str(directory)] = pipeline.report(
                directory, _overrides(ctx, directory, recipe), **flags, progress=progress
            )
        if output is not None:
            write_text(output, (compare.to_html if output.suffix == ".html" else compare.to_markdown)(made))
    if len(made) > 1:
        _print(as_json, lambda: compare.to_json(made), lambda: compare.to_text(made))
    else:
        (one,) = made.values()
        _print(as_json, lambda: reporting.to_json(one), lambda: reporting.summary(one, directories[0] / "report"))
    for directory, of in zip(directories, made.values(), strict=True):
        _publish(of, directory)
    if opened:
        click.launch(str((output or directories[0] / "report" / "report.html").resolve()))
    return ExitCode.PASSED if all(of.passed for of in made.values()) else ExitCode.GATE_FAILED


@main.command(
    cls=ConfigCommand,
    stages=("load", "calibrate", "prune", "limits", "export", "verify"),
    without=("ratio", "precision"),
)
@model_argument
@output_option
@recipe_option
@click.option("--ratios", required=True, metavar="R,...", help="Shares of the block linear parameters to remove.")
@click.option("--precisions", default="fp32", show_default=True, metavar="P,...", help="Of every ratio.")
@click.option("--max-latency-ms", type=click.FloatRange(min=0, min_open=True), help="Recommend under this TPOT.")
@click.option("--max-kl", type=click.FloatRange(min=0), help="Recommend under this KL divergence to the dense model.")
@click.option("--max-size-mb", type=click.FloatRange(min=0, min_open=True), help="Recommend under this size.")
@resumable
@common
@click.pass_context
def sweep(ctx: click.Context, model: str | None, output: Path, recipe: Path | None, ratios: str, precisions: str,
          max_latency_ms: float | None, max_kl: float | None, max_size_mb: float | None, force: bool, resume: bool,
          as_json: bool, quiet: bool, debug: bool, **_: Any) -> int:  # fmt: skip
    """Run several ratios and precisions; show the Pareto front.

    Costs and dense graphs are shared, and every point has the bytes of its own single run. Ends with a recommendation
    under the limits given. MODEL is a local directory, a Hub id, a .gguf file, or the built-in smollm2-135m.
    """
    try:
        wanted = [float(part) for part in ratios.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--ratios: {ratios!r} is no list of numbers, such as 0.1,0.2,0.3.") from None
    typed = ctx.get_parameter_source("precisions") is not ParameterSource.DEFAULT  # else a recipe's hold
    given = {"precision": tuple(part.strip() for part in precisions.split(","))} if typed else {}
    config = _config(ctx, model, recipe, **given)
    limits = {"max_latency_ms": max_latency_ms, "max_kl": max_kl, "max_size_mb": max_size_mb}
    with _working(quiet, debug) as progress:
        from slimexport.sweep import front
        from slimexport.sweep import report as reports
        from slimexport.sweep import run as sweeps

        made = sweeps.sweep(config, wanted, output, **_flags(force, resume), progress=progress)
        advice = front.recommend(made.points, {name: bound for name, bound in limits.items() if bound is not None})
        reports.write(made, advice, output)
    _print(as_json, lambda: reports.to_json(made, advice), lambda: reports.summary(made, advice, output))
    return made.exit_code


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--prompts", default="32,128,512", metavar="N,...", show_default=True, help="Prompt lengths, for TTFT.")
@click.option("--pasts", default="128,1024", metavar="N,...", show_default=True,
              help="Tokens before those that are decoded, for TPOT and ITL.")  # fmt: skip
@click.option("--batches", default="", metavar="N,...", help="Batch sizes, for throughput.")
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens decoded in each run.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Interleaved rounds.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default: the affinity mask.")
@click.option("--provider", type=click.Choice(tuple(PROVIDERS)), default="cpu", show_default=True,
              help="Where graphs run; all but cpu are untested.")  # fmt: skip
@click.option("--provider-option", multiple=True, metavar="KEY=VALUE", help="For the execution provider.")
@click.option("--huge-pages/--no-huge-pages", default=True, show_default=True,
              help="Weights in memory pages of 2 MB, or the model that is opened first is slower.")  # fmt: skip
@common
def bench(paths: tuple[Path, ...], prompts: str, pasts: str, batches: str, as_json: bool, quiet: bool, debug: bool,
          **options: Any) -> int:  # fmt: skip
    """Measure models side by side: exported graphs, run directories, Hugging Face directories, GGUF files.

    All take turns in one run; the first PATH is what the others are compared with.
    """
    with _working(quiet, debug) as progress:
        from slimexport.bench import Settings, bench, results

        settings = Settings(_numbers(prompts), _numbers(pasts), _numbers(batches), **options)
        with progress.stage("bench"):
            made = bench(paths, settings, progress)
    _print(as_json, made.to_dict, lambda: results.text(made))
    return ExitCode.PASSED


def _numbers(text: str) -> tuple[int, ...]:
    """`32,128` -> (32, 128)."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise click.UsageError(f"{text!r} is not a list of numbers, such as 32,128.") from None


@main.command()
@click.argument("name", required=False)
@common
def recipes(name: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the built-in recipes, or print the one called NAME.

    `--recipe NAME` takes it; flags win over what stands in it.
    """
    from slimexport import recipe

    if name is not None:
        text = recipe.text_of(name)
        _print(as_json, lambda: recipe.load_recipe(recipe.BUILTIN / f"{name}.yaml"), lambda: text.rstrip())
        return
    known = recipe.builtin()
    width = max(map(len, known))
    _print(as_json, lambda: known, lambda: "\n".join(f"{key.ljust(width)}  {about}" for key, about in known.items()))


@main.command()
@common
def architectures(as_json: bool, quiet: bool, debug: bool) -> int:
    """List the model families that can be pruned."""
    with _working(quiet, debug):
        from slimexport.architectures import overview

        rows, environment = overview.overview()
    _print(
        as_json,
        lambda: {"families": [vars(row) for row in rows], "environment": environment},
        lambda: overview.text(rows, environment),
    )
    return ExitCode.PASSED


@main.command()
@common
def doctor(as_json: bool, quiet: bool, debug: bool) -> int:
    """Check this machine and its Python packages."""
    with _working(quiet, debug):
        from slimexport import environment

        checks, machine = environment.doctor(), environment.environment(cuda=True)
    healthy = all(check.ok for check in checks)
    _print(
        as_json,
        lambda: {"ok": healthy, "checks": [vars(check) for check in checks], "environment": machine},
        lambda: environment.doctor_text(checks),
    )
    return ExitCode.PASSED if healthy else ExitCode.BAD_INPUT


if __name__ == "__main__":
    main()
