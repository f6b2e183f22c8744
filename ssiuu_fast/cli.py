"""The command line: `ssiuu-fast COMMAND`, options from flags or a YAML file."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import get_type_hints

import torch

from ssiuu_fast import info

# the module that has each, a function of one argument, whose type is the class of its options
COMMANDS = {
    "demo": "comparison_commands",
    "memorize": "commands",
    "unlearn": "unlearn_command",
    "attack": "commands",
    "evaluate": "commands",
    "influence": "commands",
    "compare": "comparison_commands",
    "plan": "commands",
}
WHAT_IS_LEFT = "what was finished is in the run's folder"
DESCRIPTION = (
    "Unlearning that erases instead of hiding. `info` shows what was built and can run here; `demo` tells the whole "
    "story on invented people; `memorize`, `unlearn`, `attack`, `evaluate` and `influence` are its steps, for your own "
    "model and data; `compare` does them for several methods and makes a table; `plan` tells beforehand what they will "
    "need."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. An error of the user's is one line, not a traceback.

    Of several processes (torchrun, accelerate launch) only the first prints what is not an error of its own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["info"]:
        # works with torch alone
        print(info.text())
        return 0
    rank = int(os.environ.get("RANK", 0))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            _parsed(arguments)()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        # a mistake found before the processes know of each other is the same in all
        if rank == 0 or torch.distributed.is_initialized():
            print(f"ssiuu-fast{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if rank == 0:
            print(f"ssiuu-fast: stopped; {stop or WHAT_IS_LEFT}", file=sys.stderr)
        return 130
    return 0


def _parsed(arguments: list[str]) -> Callable[[], None]:
    """The command, ready to be run with its options."""
    try:
        import jsonargparse

        commands = {name: getattr(import_module(f"ssiuu_fast.{module}"), name) for name, module in COMMANDS.items()}
    except ImportError as error:
        raise ImportError(f"{error.name or error} is missing: pip install 'ssiuu-fast[unlearn]'") from error
    parser = jsonargparse.ArgumentParser(prog="ssiuu-fast", description=DESCRIPTION)
    subcommands = parser.add_subcommands(dest="command")
    for name, command in commands.items():
        subparser = jsonargparse.ArgumentParser(description=command.__doc__)
        subparser.add_argument(
            "--config", action="config", help="YAML file with any of the options below; flags outdo it."
        )
        subparser.add_class_arguments(_options_class(command))
        subcommands.add_subcommand(name, subparser, help=command.__doc__.partition("\n")[0])
    subcommands.add_subcommand("info", jsonargparse.ArgumentParser(), help="What was built, and what can run here.")
    parsed = parser.parse_args(arguments)
    command, chosen = commands[parsed.command], parsed[parsed.command].as_dict()
    chosen.pop("config")
    return lambda: command(_options_class(command)(**chosen))


def _options_class(command: Callable) -> type:
    return get_type_hints(command)["options"]
