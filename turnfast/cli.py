"""The command line: `turnfast train | sft | eval | report | recipes | fields`.

Each command imports the modules it needs, so that `turnfast --help` does not load torch. An error
is one line on stderr, without a traceback unless `--traceback` is given. The exit code is
`TurnfastError.exit_code`, 1 for any other exception, and 128 + the signal's number after a signal.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from . import __version__
from .config.recipe import describe_fields, load_config, shipped_recipes, suggest_field
from .errors import ConfigError, TurnfastError

FIELDS = (
    "Every field of the recipe is a flag, `--loss.clip-high 0.28`. `turnfast fields` lists them."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    words, flags = _split(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        hint = suggest_field(unknown[0].lstrip("-")) if unknown[0].startswith("--") else ""
        parser.error(f"unrecognised arguments: {' '.join(unknown)}{hint}")
    if flags and not hasattr(arguments, "recipe"):
        parser.error(f"this command takes no recipe fields: {' '.join(flags)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return arguments.command(arguments, flags) or 0
    except KeyboardInterrupt:
        code, lines = 128 + signal.SIGINT, ["interrupted"]
    except Exception as error:
        if arguments.traceback:
            raise
        known = isinstance(error, TurnfastError)
        code = error.exit_code if known else 1
        lines = [str(error) if known else _describe_crash(error), *getattr(error, "__notes__", [])]
    text = "\n".join(lines)
    # an error may quote text that a model wrote: escape its control characters
    text = "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)
    print(f"turnfast: {text}", file=sys.stderr)
    return code


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the dotted flags and their values, in any position, from the other arguments."""
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


def _describe_crash(error: Exception) -> str:
    """One line with the type, text and place of an exception that turnfast did not raise."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f": {str(error.filename)!r}"
        text = f"{error.strerror}{name}"
    standard_library = sysconfig.get_path("stdlib")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and ("-packages" in frame.filename or not frame.filename.startswith(standard_library))
    ]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    about = f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")
    return f"{about}{place}; add --traceback to see all calls"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="turnfast",
        description="Train language-model agents that act in turns.",
        epilog=FIELDS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"turnfast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str, *, recipe: bool = True) -> argparse.ArgumentParser:
        epilog = FIELDS if recipe else ""
        sub = commands.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        sub.set_defaults(command=function)
        # SUPPRESS: a default here would overwrite a --traceback given before the command
        sub.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        if recipe:
            sub.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
        return sub

    sub = command("train", _train, "train on a recipe with turn-level credit")
    sub.add_argument("--run-dir", type=Path, help="default: runs/<recipe>")
    sub.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe and estimate the memory of a run; load no weights",
    )
    sub = command("sft", _sft, "supervised fine-tuning on demonstrations, before train")
    sub.add_argument("--run-dir", type=Path, help="default: runs/<recipe>-sft")
    sub.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    sub = command("eval", _eval, "evaluate the model on held-out tasks; prints one JSON object")
    sub.add_argument("--out", type=Path, help="also write the rollouts to this file, as JSON lines")
    sub.add_argument("--split", choices=["eval", "train"], default="eval", help="default: eval")
    sub.add_argument(
        "--sampled", action="store_true", help="sample at rollout.temperature instead of greedily"
    )
    sub = command("report", _report, "write report.html of a run directory again", recipe=False)
    sub.add_argument("run_dir", type=Path)
    command("recipes", _recipes, "list the shipped recipes", recipe=False)
    command("fields", _fields, "list every field of a recipe with its default", recipe=False)
    return parser


def _train(arguments: argparse.Namespace, flags: list[str]) -> int:
    config = load_config(arguments.recipe, flags)
    if arguments.dry_run:
        from .doctor.checks import check_training
        from .doctor.memory import describe, estimate

        check_training(config)
        print(describe(config, estimate(config)))
        return 0
    run_dir = arguments.run_dir or Path("runs") / Path(arguments.recipe).stem
    from .train import train

    with stop_on_signals() as stop:
        train(config, run_dir, resume=arguments.resume, should_stop=stop)
    return _exit_code(stop, run_dir)


def _sft(arguments: argparse.Namespace, flags: list[str]) -> int:
    _check_one_process("sft")
    config = load_config(arguments.recipe, flags)
    run_dir = arguments.run_dir or Path("runs") / f"{Path(arguments.recipe).stem}-sft"
    from .sft import warm_start

    with stop_on_signals() as stop:
        folder = warm_start(config, run_dir, resume=arguments.resume, should_stop=stop)
    print(f"{'checkpoint' if stop() else 'model'}: {folder}")
    return _exit_code(stop, run_dir)


def _eval(arguments: argparse.Namespace, flags: list[str]) -> None:
    _check_one_process("eval")
    config = load_config(arguments.recipe, flags)
    from .evaluate import evaluate_model

    print(evaluate_model(config, arguments.out, split=arguments.split, sampled=arguments.sampled))


def _report(arguments: argparse.Namespace, flags: list[str]) -> None:
    from .report import write_report

    print(write_report(arguments.run_dir))


def _recipes(arguments: argparse.Namespace, flags: list[str]) -> None:
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<12} {first}")


def _fields(arguments: argparse.Namespace, flags: list[str]) -> None:
    print("\n".join(describe_fields()))


def _check_one_process(command: str) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE: `turnfast {command}` runs in one process, not in {size}; start it "
            "without torchrun"
        )


class StopRequest:
    """Whether a signal asked the run to stop; `reason` is the signal's name, such as "SIGTERM"."""

    def __init__(self) -> None:
        self.reason = ""

    def __call__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request; a SIGINT after that raises KeyboardInterrupt."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.reason = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(stop: StopRequest, run_dir: Path) -> int:
    if not stop():
        return 0
    text = f"turnfast: stopped by {stop.reason}; continue the run in {run_dir} with --resume"
    print(text, file=sys.stderr)
    return 128 + signal.Signals[stop.reason]
