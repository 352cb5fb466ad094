"""The command line: `turnfast train | sft | eval | report | recipes`.

Rooms that load torch are imported by the command that needs them, so `turnfast --help` answers at
once. What the user got wrong is one line on stderr and exit code 2; what went wrong in a run is one
line and exit code 1. Neither shows a traceback unless `--traceback` asks for it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from . import __version__
from .config.recipe import describe_fields, load_config, shipped_recipes, suggest_field
from .errors import ConfigError

FIELDS = (
    "Every field of the recipe is a flag, `--loss.clip-high 0.28`. `turnfast fields` lists them."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = _parser()
    words, flags = _split(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        hint = suggest_field(unknown[0].lstrip("-")) if unknown[0].startswith("--") else ""
        parser.error(f"unrecognised arguments: {' '.join(unknown)}{hint}")
    if flags and not hasattr(arguments, "recipe"):
        parser.error(f"this command takes no fields of a recipe: {' '.join(flags)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return arguments.command(arguments, flags)
    except ConfigError as error:
        code, text = 2, str(error)
        if arguments.traceback:
            raise
    except KeyboardInterrupt:
        code, text = 128 + signal.SIGINT, "interrupted"
    except (RuntimeError, OSError) as error:
        code, text = 1, f"{error}" or type(error).__name__
        if arguments.traceback or not _is_ours(error):
            raise
    print(f"turnfast: {text}", file=sys.stderr)
    return code


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ordinary words, and the dotted flags with their values, wherever they stand."""
    words: list[str] = []
    flags: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            words.append(word)
        else:
            flags += [word] if equals else [word, *queue[:1]]
            del queue[: not equals]
    return words, flags


def _is_ours(error: Exception) -> bool:
    """Errors raised on purpose, with a text for users; a traceback of the rest reports a bug."""
    return type(error).__module__.startswith("turnfast.") or isinstance(error, OSError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="turnfast",
        description="Train language-model agents that act in turns.",
        epilog=FIELDS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"turnfast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str, *, recipe: bool = True) -> argparse.ArgumentParser:
        epilog = FIELDS if recipe else ""
        sub = commands.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        sub.set_defaults(command=function)
        # taken after the command as well; the default would undo one given before it
        sub.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        if recipe:
            sub.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
        return sub

    sub = command("train", _train, "train on a recipe with turn-level credit")
    sub.add_argument("--run-dir", type=Path, help="default: runs/<recipe>")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print token budget and a memory estimate; start nothing, write nothing",
    )
    sub = command("sft", _sft, "warm start: supervised tuning on demonstrations")
    sub.add_argument("--run-dir", type=Path, help="default: runs/<recipe>-sft")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    sub = command("eval", _eval, "rollouts on held-out tasks; prints one JSON object")
    sub.add_argument("--out", type=Path, help="also write the rollouts here, as JSON lines")
    sub.add_argument("--split", choices=["eval", "train"], default="eval", help="default: eval")
    sub.add_argument(
        "--sampled", action="store_true", help="draw at rollout.temperature instead of greedily"
    )
    sub = command("report", _report, "write report.html of a run directory again", recipe=False)
    sub.add_argument("run_dir", type=Path)
    command("recipes", _recipes, "list the shipped recipes", recipe=False)
    command("fields", _fields, "list every field of a recipe with its default", recipe=False)
    return parser


def _train(arguments: argparse.Namespace, flags: list[str]) -> int:
    config = load_config(arguments.recipe, flags)
    if arguments.dry_run:
        from .doctor.checks import preflight
        from .doctor.memory import describe, estimate

        found = estimate(config)
        preflight(config)
        print(describe(config, found))
        return 0
    run_dir = arguments.run_dir or Path("runs") / Path(arguments.recipe).stem
    from .train import train

    with stop_on_signals() as stop:
        train(config, run_dir, resume=arguments.resume, should_stop=stop)
    return _exit_code(stop.reason, f"{run_dir}; go on with --resume")


def _sft(arguments: argparse.Namespace, flags: list[str]) -> int:
    _refuse_ranks("sft")
    config = load_config(arguments.recipe, flags)
    run_dir = arguments.run_dir or Path("runs") / f"{Path(arguments.recipe).stem}-sft"
    from .sft import warm_start

    with stop_on_signals() as stop:
        folder = warm_start(config, run_dir, resume=arguments.resume, should_stop=stop)
    print(f"{'stopped' if stop.reason else 'model'}: {folder}")
    return _exit_code(stop.reason, f"{run_dir}; go on with --resume")


def _eval(arguments: argparse.Namespace, flags: list[str]) -> int:
    _refuse_ranks("eval")
    config = load_config(arguments.recipe, flags)
    from .evaluate import evaluate_model

    figures = evaluate_model(
        config, arguments.out, split=arguments.split, sampled=arguments.sampled
    )
    print(figures)
    return 0


def _report(arguments: argparse.Namespace, flags: list[str]) -> int:
    from .report import write_report

    print(write_report(arguments.run_dir))
    return 0


def _recipes(arguments: argparse.Namespace, flags: list[str]) -> int:
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<12} {first}")
    return 0


def _fields(arguments: argparse.Namespace, flags: list[str]) -> int:
    print("\n".join(describe_fields()))
    return 0


def _refuse_ranks(command: str) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE: {size} processes would each do the whole of `turnfast {command}` and "
            "write the same files; start it without torchrun"
        )


def _exit_code(reason: str, kept: str) -> int:
    if not reason:
        return 0
    print(f"turnfast: stopped by {reason}; everything is kept in {kept}", file=sys.stderr)
    return 128 + signal.Signals[reason]


class StopRequest:
    """Set by the first signal; `reason` names it."""

    def __init__(self) -> None:
        self.reason = ""

    def __call__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request; a second Ctrl-C interrupts at once."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        if request.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.reason = signal.Signals(number).name

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
