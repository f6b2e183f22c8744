"""The commands that run and compare several methods: `demo` and `compare`."""

from dataclasses import asdict, replace

from transformers.utils.logging import disable_progress_bar

from ssiuu_fast.compare import run_sweep
from ssiuu_fast.compare_setting import setting
from ssiuu_fast.comparison_options import CompareOptions, DemoOptions
from ssiuu_fast.demo import run_demo
from ssiuu_fast.experiment import PEOPLE, TAUGHT, TOFU, Recipe, Task, memorised_in, people_task, tofu_task
from ssiuu_fast.runs import RunFolder

DIGEST = "digest.json"


def demo(options: DemoOptions) -> None:
    """Unlearn people by GD and by Ssiuu, attack both by retraining, and read which one erased."""
    if options.resume is not None:
        run, chosen = RunFolder.stopped(options.resume, "demo")
        options = DemoOptions(**chosen)
        task, _ = _demo_setting(options)
        recipe = Recipe(**run.read_json("recipe.json"))
    else:
        task, recipe = _demo_setting(options)
        run = RunFolder.create(options.output, "demo", asdict(options))
        run.write_json("recipe.json", asdict(recipe))
    run_demo(task, recipe, options.seeds, run)


def compare(options: CompareOptions) -> None:
    """Find each method's learning rate, unlearn and attack over seeds, and print one table of all methods."""
    run = None
    if options.resume is not None:
        run, chosen = RunFolder.stopped(options.resume, "compare")
        options = CompareOptions(**chosen)
    compared = setting(options)
    if run is None:
        run = RunFolder.create(options.output, "compare", asdict(options) | {"learning_rates": compared.sweep.rates})
        run.write_json(DIGEST, compared.digest)
    elif run.read_json(DIGEST) != compared.digest:
        raise ValueError(
            f"the rows, the model or the recipe that {run.path} was started with have changed: its runs can't be "
            "averaged with new ones. Compare again in a new folder"
        )
    disable_progress_bar()
    start = compared.start
    if start is None:
        taught = memorised_in(run, compared.task, compared.recipe)
        print(f"taught a model of {taught['parameters'] / 1e6:.1f} M parameters: it scores {taught['score']:.3f}")
        start = run.file(TAUGHT)
    run_sweep(compared.sweep, compared.task, compared.recipe, start, run, notes=compared.notes)


def _demo_setting(options: DemoOptions) -> tuple[Task, Recipe]:
    if options.data == "people":
        task, recipe = people_task(options.instructions or "exercises"), PEOPLE
    else:
        task, recipe = tofu_task(options.tofu, options.instructions or "tatsu-lab/alpaca"), TOFU
    if options.relative_weight is not None:
        recipe = replace(recipe, relative_weight=options.relative_weight)
    return task, recipe
