"""What all commands share: how flags are spelled, where configs are found, what is printed, how an error ends.

Flags have dashes (`--batch-size`); underscores are accepted too. A user's mistake ends a command with one
line and exit status 2, whether in the flags or later; `--verbose` shows where the error was raised.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llave_jax.common.interrupts import Interrupted, interruptible
from llave_jax.common.text import shortened

PACKAGE = Path(__file__).parents[1]
# The configs that come with the package: inside it where it was installed, beside it in a checkout.
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")

# Exit status after a user's mistake, the same as argparse's.
USER_ERROR = 2
BUCKETS = ("gs://", "s3://", "az://", "abfs://")
# What is printed of an error: about a screen.
MAX_LINES, MAX_CHARACTERS = 16, 1600
# Libraries that log every step.
TALKATIVE = (
    *("absl", "jax", "orbax", "grain", "matplotlib", "PIL", "tensorboardX", "transformers"),
    *("filelock", "httpcore", "httpx", "httpx2", "huggingface_hub"),
)


class Parser(argparse.ArgumentParser):
    """The parser of a command's flags.

    It adds `--verbose` and, for a command that takes a run's config, `--config` and its overrides.

    Args:
      module: how the command is called, "llave_jax.train" or "tools/convert_hf.py".
      description: the text in front of the flags; the module's docstring.
      takes_config: add `--config`. `values.config` is then the config with its overrides, and
        `values.config_name` what it was called.
      default_config: the config that is taken if none is given; None: one has to be given.
    """

    def __init__(
        self,
        module: str,
        description: str | None,
        *,
        takes_config: bool = False,
        default_config: str | None = None,
    ):
        called = Path(sys.argv[0]).name
        command = f"python {module}" if module.endswith(".py") else f"python -m {module}"
        super().__init__(
            prog=called if called.startswith("llave-") else command,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._takes_config = takes_config
        if takes_config:
            self.add_argument(
                "--config",
                required=default_config is None,
                default=default_config,
                metavar="NAME",
                help="a shipped config (llave_2b, tpu_v4:2b) or a file (configs/llave_2b.py); "
                "--config.KEY=VALUE sets one of its fields",
            )
        self.add_argument(
            "--verbose",
            action="store_true",
            help="show where an error comes from, and what libraries say",
        )

    def add_commands(self) -> Any:
        """For a program of several commands, `PROGRAM COMMAND --flags`; `values.command` is the one given.

        Returns:
          An object whose `add_parser(name, help=...)` gives the parser of a command's flags.
        """
        return self.add_subparsers(
            dest="command", required=True, metavar="COMMAND", parser_class=_Command
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses flags in either spelling and loads the config; the rest is as in argparse."""
        given = [_with_dashes(argument) for argument in (sys.argv[1:] if args is None else args)]
        for argument in given:
            self._refuse_bucket(argument.partition("=")[2] or argument)
        values, rest = self.parse_known_args(given, namespace)
        if self._takes_config:
            values.config_name = values.config
            try:
                values.config = load_config(values.config, rest)
            except ValueError as error:
                self.error(str(error))
        elif rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return values

    def _refuse_bucket(self, value: str) -> None:
        # As a path of the file system it would be a folder of that name.
        if value.startswith(BUCKETS):
            self.error(
                f"{value}: expected a path of the file system; mount the bucket and name the folder "
                '(docs/launch.md, "Buckets")'
            )

    def error(self, message: str) -> NoReturn:
        """Ends the command with one line, as `run` does."""
        _usage_error(self, message)


class _Command(argparse.ArgumentParser):
    """The parser of one of several commands."""

    def __init__(self, **options: Any):
        super().__init__(
            **options,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        _usage_error(self, message)


def _usage_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(USER_ERROR, f"error: {shortened(message)} (--help lists the flags)\n")


def _with_dashes(argument: str) -> str:
    """`--batch_size=8` -> `--batch-size=8`; fields of a config keep their names."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or "." in name:
        return argument
    return name.replace("_", "-") + equals + value


def find_config(name: str) -> tuple[Path, list[str]]:
    """The file of a config, and the argument behind its name.

    Args:
      name: the name of a shipped config or the path of a file; behind a colon an argument to its
        `get_config`: "llave_2b", "tpu_v4:2b", "my/own.py".

    Returns:
      The file, and a list with the argument, empty without one.

    Raises:
      ValueError: there is no such file; it lists the shipped configs.
    """
    file, *argument = name.split(":", 1)
    candidates = [Path(file)]
    if "/" not in file:
        stem = file.removesuffix(".py")
        candidates += [folder / f"{stem}.py" for folder in CONFIG_FOLDERS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate, argument
    shipped = sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.py")})
    raise ValueError(
        f"--config {name}: there is no such file, nor is it one of the shipped configs: "
        f"{', '.join(shipped)}"
    )


def load_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """A run's config.

    Args:
      name: as for `find_config`.
      overrides: `--config.KEY=VALUE` or `--config.KEY VALUE`. `None` or nothing as the value switches off
        a field that may be None.

    Returns:
      What the file's `get_config` returns, with the overrides.

    Raises:
      ValueError: there is no such file, field or argument, or a value does not suit its field.
    """
    from absl import flags
    from ml_collections import config_flags

    path, argument = find_config(name)
    make = runpy.run_path(str(path)).get("get_config")
    if make is None:
        raise ValueError(f"{path}: has no function get_config, which makes the config")
    try:
        inspect.signature(make).bind(*argument)
    except TypeError as error:
        raise ValueError(f"--config {name}: get_config in {path}: {error}") from error
    config, values = make(*argument), flags.FlagValues()
    command = ["", *_switch_off(config, overrides)]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        _, *rest = values(command)
    except (AttributeError, KeyError) as error:
        reason: Any = error
        while isinstance(reason, Exception):
            reason = reason.args[0]
        raise ValueError(f"no such field in {path}: {'. '.join(reason.splitlines())}") from error
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
    return values["config"].value


def _switch_off(config: Any, overrides: Sequence[str]) -> list[str]:
    """Sets fields to None as overrides say, and returns the other overrides.

    A field that may be None is one that the config holds by reference (`placeholder`). Of several overrides of
    a field the last one counts.
    """
    rest: list[tuple[str, list[str]]] = []
    waiting = list(overrides)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        words = [flag + equals + value]
        takes_next = not equals and waiting and not waiting[0].startswith("--")
        if takes_next:
            value = waiting.pop(0)
            words.append(value)
        *path, name = flag.removeprefix("--config.").split(".")
        if value in ("", "None") and (equals or takes_next) and _may_be_none(config, path, name):
            rest = [(other, given) for other, given in rest if other != flag]
            group = config
            for part in path:
                group = group[part]
            group[name] = None
        else:
            rest.append((flag, words))
    return [word for _, words in rest for word in words]


def _may_be_none(config: Any, path: Sequence[str], name: str) -> bool:
    from ml_collections import ConfigDict, FieldReference

    for part in path:
        config = config.get(part) if isinstance(config, ConfigDict) else None
    if not isinstance(config, ConfigDict):
        return False
    fields = dict(config.items(preserve_field_references=True))
    return isinstance(fields.get(name), FieldReference)


def add_model_argument(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds `--model` to a command line.

    Args:
      parser: of the command.
      required: whether it has to be given.
    """
    parser.add_argument(
        "--model",
        required=required,
        help="a model directory, a training run's directory, a Hugging Face checkpoint's directory, or "
        "a name on the hub: org/name or org/name@revision",
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter` to a command line.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="an adapter (LoRA) that is added to --model: a directory in the format of the peft library, or a run "
        "that trained adapters on it; a run as --model has its own already",
    )


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype` to a command line.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of parameters and activations; default: bfloat16 on accelerators, float32 on CPUs",
    )


def set_up_logging(args: argparse.Namespace, *, first: bool = True, times: bool = False) -> None:
    """Sends messages to stderr, and quiets libraries.

    Args:
      args: the command's flags.
      first: this is the first process of the job. Others log warnings and errors only.
      times: put the time of day in front of each line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s" if times else None, "%H:%M:%S"))
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO if args.verbose else logging.WARNING)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {shortened(record.message)}"
        return super().formatMessage(record)


def run(
    action: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    user_errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Runs a command; a mistake of the user's ends it with one line.

    Args:
      action: does what the flags say; returns an exit status, None for 0.
      args: what `Parser.parse_args` returned.
      user_errors: exceptions whose message says what to do.

    Returns:
      The exit status: USER_ERROR after one of `user_errors`, 128 plus its number after a signal.
    """
    try:
        with interruptible():
            return action(args) or 0
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on or starts again", file=sys.stderr)
        return interrupted.status
    except user_errors as error:
        if args.verbose:
            raise
        print(f"error: {_error_text(error)}", file=sys.stderr)
        return USER_ERROR


def _error_text(error: Exception) -> str:
    """An exception's message, cut to a screen.

    An exception that a library raised may be an error of this package. Its text then also says where it
    was raised.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and isinstance(error.filename, str) and text.startswith("[Errno"):
        text = f"{error.filename}: {error.strerror}"
    text = shortened(text.strip())
    lines = text[:MAX_CHARACTERS].splitlines()
    if len(lines) > MAX_LINES or len(text) > MAX_CHARACTERS:
        lines = [*lines[:MAX_LINES], "... (--verbose shows all of it)"]
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = any(raised_in.is_relative_to(folder) for folder in (PACKAGE, *CONFIG_FOLDERS))
    if not ours and not isinstance(error, OSError):
        lines[-1] += f" ({type(error).__name__} in {raised_in.name}; --verbose shows more)"
    return "\n".join(lines)
