"""The command line: `ssiuu-fast COMMAND`, options from flags or a YAML file."""

import sys
from collections.abc import Sequence

from ssiuu_fast import info

COMMANDS = {
    "demo": ("demo", "DemoOptions"),
    "memorize": ("memorize", "MemorizeOptions"),
    "unlearn": ("unlearn_command", "UnlearnOptions"),
    "attack": ("attack", "AttackOptions"),
    "evaluate": ("evaluate", "EvaluateOptions"),
    "influence": ("influence", "InfluenceOptions"),
    "compare": ("compare", "CompareOptions"),
    "plan": ("plan", "PlanOptions"),
}
DESCRIPTION = (
    "Unlearning that erases instead of hiding. `info` shows what was built and can run here; `demo` tells the whole "
    "story on invented people; `memorize`, `unlearn`, `attack`, `evaluate` and `influence` are its steps, for your own "
    "model and data; `compare` does them for several methods and makes a table; `plan` tells beforehand what they will "
    "need."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. An error of the user's is one line, not a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["info"]:
        # works with torch alone
        print(info.text())
        return 0
    try:
        run = _parsed(arguments)
    except ImportError as error:
        print(f"ssiuu-fast: {error.name or error} is missing: pip install 'ssiuu-fast[unlearn]'", file=sys.stderr)
        return 1
    try:
        run()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"ssiuu-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ssiuu-fast: stopped; what was finished is in the run's folder", file=sys.stderr)
        return 130
    return 0


def _parsed(arguments: list[str]):
    import jsonargparse

    from ssiuu_fast import commands, options

    parser = jsonargparse.ArgumentParser(prog="ssiuu-fast", description=DESCRIPTION)
    subcommands = parser.add_subcommands(dest="command")
    for name, (function, options_class) in COMMANDS.items():
        help_line = getattr(commands, function).__doc__
        subparser = jsonargparse.ArgumentParser(description=help_line)
        subparser.add_argument(
            "--config", action="config", help="YAML file with any of the options below; flags outdo it."
        )
        subparser.add_class_arguments(getattr(options, options_class))
        subcommands.add_subcommand(name, subparser, help=help_line)
    subcommands.add_subcommand("info", jsonargparse.ArgumentParser(), help="What was built, and what can run here.")
    parsed = parser.parse_args(arguments)
    function, options_class = COMMANDS[parsed.command]
    chosen = parsed[parsed.command].as_dict()
    chosen.pop("config")
    return lambda: getattr(commands, function)(getattr(options, options_class)(**chosen))
