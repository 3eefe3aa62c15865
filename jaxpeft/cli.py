"""The command `jaxpeft`."""

import dataclasses
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

Positional = tyro.conf.Positional


def _config(command: type) -> Any:
    from jaxpeft.train.plan import PlanConfig
    from jaxpeft.train.run import Config

    return PlanConfig if command is Plan else Config


@dataclass
class Finetune:
    """Adapt a pretrained model to a data set and measure it on the test split.

    Without arguments: all-MiniLM-L6-v2 on Reuters R8 with LoRA.

    Examples:
      jaxpeft finetune
      jaxpeft finetune --method dora --options rank=4 --dataset r52 --epochs 3
      jaxpeft finetune --model path/to/a/bert --dataset path/to/my.tsv
      jaxpeft finetune --resume runs/20260102-030405-lora-r8
    """

    config: Annotated[Any, tyro.conf.arg(name="")] = None
    out: Path | None = None
    """The run's folder; by default runs/<time>-<method>-<dataset>."""
    resume: Path | None = None
    """A run's folder to continue; its own configuration is used."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from jaxpeft.train.report import result_table, save_curve
        from jaxpeft.train.run import config_from, finetune

        if self.resume:
            folder = self.resume
            path = folder / "config.json"
            if not path.exists():
                raise ValueError(f"there is no config.json in {folder}: it is not the folder of a run")
            config = config_from(json.loads(path.read_text()))
        else:
            config = self.config
            folder = (
                self.out
                or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}-{Path(config.dataset).name}"
            )
        with _bar(self.quiet, f"{config.method} on {Path(config.dataset).name}") as progress:
            result = finetune(config, folder, resume=bool(self.resume), progress=progress)
        save_curve(folder, folder / "curve.png")
        _print(result_table([result]))
        texts = result["kind"] == "text"
        use = (
            f'predict {folder} "oil prices rose as opec cut output"'
            if texts
            else f"evaluate {folder} --split validation"
        )
        _print(f"everything is in {folder}  (try: jaxpeft {use})")


@dataclass
class Compare:
    """Train several methods with several seeds on one budget; one table, one figure of accuracy against parameters.

    Example: jaxpeft compare --methods lora ia3 pfeiffer full --seeds 3 --per-class 50
    """

    config: Annotated[Any, tyro.conf.arg(name="")] = None
    methods: tuple[str, ...] = ("head", "bitfit", "lora", "ia3", "pfeiffer", "full")
    """Registered methods; `name:option=value,option=value` sets a method's options, `rate=...` its learning rate."""
    seeds: int = 3
    """Seeds 0, 1, ... of initialisation, data order and subsample."""
    out: Path = Path("runs/compare")
    """Where table, figure and results are written; finished runs found there are not repeated."""

    def run(self) -> None:
        from jaxpeft.train.compare import compare

        with _bar(False, "compare") as progress:
            table = compare(self.config, self.methods, range(self.seeds), self.out, progress=progress)
        _print(table)
        _print(f"table, figure and results are in {self.out}")


@dataclass
class Sweep:
    """Train a grid of settings side by side in ONE compiled program: vmapped, the base held once.

    Examples:
      jaxpeft sweep --rates 5e-4 1e-3 2e-3 4e-3 --alphas 8 16 --seeds 1 --per-class 50
      jaxpeft sweep --ranks 2 4 8 16 --dropouts 0 0.1 --halve-at 100 200 --keep 0.5
    """

    config: Annotated[Any, tyro.conf.arg(name="")] = None
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    """Peak learning rates."""
    alphas: tuple[float, ...] = ()
    """Numerators of the scale, for methods that have `alpha` (LoRA, DoRA) or `scale`; empty for the method's own."""
    ranks: tuple[int, ...] = ()
    """Ranks of LoRA or DoRA, in arrays of the largest."""
    dropouts: tuple[float, ...] = ()
    """Probabilities of LoRA's or DoRA's dropout."""
    weight_decays: tuple[float, ...] = ()
    """AdamW's decays."""
    seeds: int = 1
    """Seeds 0, 1, ... of initialisation and dropout; all settings see the same batches."""
    halve_at: tuple[int, ...] = ()
    """Steps after which only the best on the validation split go on."""
    keep: float = 0.5
    """The share that goes on."""
    memory_mb: int = 0
    """What a step may take; where not all settings fit, they train in chunks. 0 for what the device has."""
    out: Path | None = None
    """A JSON file for the results."""

    def run(self) -> None:
        from jaxpeft.train.run import write_json
        from jaxpeft.train.sweep_command import sweep_table, sweep_validation

        axes = {"rate": self.rates, "alpha": self.alphas, "rank": self.ranks, "dropout": self.dropouts}
        axes |= {"weight_decay": self.weight_decays, "seed": tuple(range(self.seeds))}
        with _bar(False, "sweep") as progress:
            rows = sweep_validation(
                self.config,
                axes,
                halve_at=self.halve_at,
                keep=self.keep,
                memory_limit=self.memory_mb * 10**6 or None,
                progress=progress,
            )
        if self.out:
            write_json(self.out, rows)
        _print(sweep_table(rows))


@dataclass
class Merge:
    """Merge a run's delta into its base, or several models into one by a recipe; safetensors, config.json, tokenizer.

    Examples: jaxpeft merge runs/20260102-030405-lora-r8 merged
              jaxpeft merge --recipe recipe.yaml --out merged

    A recipe is YAML in mergekit's words (linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs,
    breadcrumbs_ties). Models of any size: tensors pass through once, memory holds a few. Ctrl-C and the same command
    again go on.
    """

    run_folder: Annotated[Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """A run's folder, or its delta's."""
    folder: Annotated[Positional[Path | None], tyro.conf.arg(metavar="FOLDER")] = None
    """The folder to write; it must be new or empty."""
    recipe: Path | None = None
    """A YAML file that says which models are merged and how, instead of a run."""
    out: Path | None = None
    """The folder to write, by name."""
    workers: int | None = None
    """Threads of a recipe's merge; all cores by default."""
    seed: int = 0
    """Of a recipe's random drops."""

    def run(self) -> None:
        out = self.out or self.folder
        if (self.recipe is None) == (self.run_folder is None) or out is None:
            raise ValueError("give a run and a folder (jaxpeft merge RUN OUT), or --recipe FILE --out FOLDER")
        if self.recipe is not None:
            self._by_recipe(self.recipe, out)
        elif self.run_folder is not None:
            from jaxpeft.models import save_model
            from jaxpeft.train.run import open_run

            if out.is_dir() and any(out.iterdir()):
                raise FileExistsError(f"{out} exists already and is not empty; give a new folder")
            trained = open_run(self.run_folder)
            model = trained.loaded.model
            merged = trained.adapted.merge(trained.params, trained.delta)
            save_model(out, model, merged, source=trained.loaded.folder, labels=trained.labels)
            if "jaxpeft" in model.hf_config():
                _print(
                    f"transformers has no class that pools by {trained.config.pooling!r}: its own would put a pooler that is "
                    "not trained before the head. jaxpeft.models.load_model reads the folder as it is; for transformers, "
                    "train with --pooling bert"
                )
        _print(f"merged into {out}")

    def _by_recipe(self, recipe: Path, out: Path) -> None:
        from rich.progress import Progress

        from jaxpeft.merge.recipe import load_recipe
        from jaxpeft.merge.streaming import merge_folders

        with Progress() as bar:
            task = bar.add_task("tensors", total=None)
            show = lambda done, total, name: bar.update(task, completed=done, total=total)
            merge_folders(load_recipe(recipe), out, workers=self.workers, seed=self.seed, progress=show)


@dataclass
class Evaluate:
    """Score a run's delta on a split of its data set, or of another one with the same labels."""

    run_folder: Positional[Path]
    """A run's folder, or its delta's."""
    split: str = "test"
    """train, validation or test."""

    def run(self) -> None:
        from jaxpeft.train.loop import Compiled, evaluate
        from jaxpeft.train.run import batches_of, open_run
        from jaxpeft.train.step import make_evaluation

        trained = open_run(self.run_folder)
        if self.split not in trained.loaded.dataset.splits:
            raise ValueError(f"split {self.split!r}: expected one of {', '.join(trained.loaded.dataset.splits)}")
        evaluation = Compiled(make_evaluation(trained.adapted, trained.loaded.task))
        scores = evaluate(evaluation, trained.delta, trained.params, batches_of(trained.loaded, self.split, 32))
        _print(f"{self.split}: accuracy {scores.accuracy:.4f}  macro-F1 {scores.macro_f1:.4f}  loss {scores.loss:.4f}")


@dataclass
class Predict:
    """Label texts: given as arguments, or one a line on standard input.

    Example: jaxpeft predict runs/20260102-030405-lora-r8 "oil prices rose as opec cut output"
    """

    run_folder: Positional[Path]
    """A run's folder, or its delta's."""
    texts: Positional[tuple[str, ...]] = ()
    """What to label."""

    def run(self) -> None:
        from jaxpeft.train.run import open_run, predict

        texts = list(self.texts) or [line.rstrip("\n") for line in sys.stdin]
        if not texts:
            raise ValueError("no text: give some as arguments or on standard input, one a line")
        labels, probabilities = predict(open_run(self.run_folder), texts)
        for label, p, text in zip(labels, probabilities, texts):
            print(f"{label}\t{p.max():.3f}\t{text[:80]}")


@dataclass
class Methods:
    """List the methods there are, and what each would train on a model."""

    model: str = "all-MiniLM-L6-v2"
    """The model to count parameters for; empty for none."""
    dataset: str = "r8"
    """Whose classes the head has."""

    def run(self) -> None:
        from jaxpeft.train.report import methods_table
        from jaxpeft.train.run import Config, load, parameters_for

        counts = {}
        if self.model:
            config = Config(model=self.model, dataset=self.dataset)
            counts = parameters_for(config, load(config))
        _print(methods_table(counts))


@dataclass
class Plan:
    """Compile a train step for a pod that is not here and say what it would take: bytes, collectives, cycles.

    The compilers come with the extra `aot`; nothing runs and no weights are read.

    Examples:
      jaxpeft plan --model llama-3-8b --pod v5e:4x4 --method lora --options rank=16 --rows 16 --length 2048
      jaxpeft plan --model path/to/config.json --pod h100:8 --method dora --largest
      jaxpeft plan --pod v5e:16x16 --runs 64 --run-groups 16
    """

    config: Annotated[Any, tyro.conf.arg(name="")] = None
    largest: bool = False
    """Search the largest batch that fits; some compiles."""
    out: Path | None = None
    """A JSON file for the plan, or for all plans of the search."""

    def run(self) -> None:
        from jaxpeft.train.plan import plan, prepare
        from jaxpeft.train.plan_search import largest_batch
        from jaxpeft.train.plan_table import plan_table
        from jaxpeft.train.run import write_json

        prepare()
        if self.largest:
            rows, plans = largest_batch(self.config)
        else:
            rows, plans = self.config.rows, [plan(self.config)]
        if self.out:
            write_json(self.out, [dataclasses.asdict(p) for p in plans])
        _print(plan_table(plans))
        if self.largest:
            _print(f"largest batch that fits: {rows} rows of {self.config.length}")


COMMANDS = {"finetune": Finetune, "compare": Compare, "sweep": Sweep, "merge": Merge, "evaluate": Evaluate}
COMMANDS |= {"predict": Predict, "methods": Methods, "plan": Plan}


def main(arguments: list[str] | None = None) -> int:
    """Runs a sub-command; expected errors are one line, not a traceback. Returns the exit status."""
    environment()
    commands = {name: _with_config(command) for name, command in COMMANDS.items()}
    command = tyro.extras.subcommand_cli_from_dict(
        commands, prog="jaxpeft", args=arguments, description="Adapt models in JAX: small deltas on frozen bases."
    )
    try:
        command.run()
    except KeyboardInterrupt as stop:
        return _stopped(command, stop)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        if os.environ.get("JAXPEFT_DEBUG"):
            raise
        print(f"jaxpeft: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def environment() -> None:
    """What makes XLA faster on a CPU; never needed for correctness, and never over the user's own settings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from jaxpeft.data import cache_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _with_config(command: type) -> type:
    """The command's class with the type of `config` filled in; the import is late so that --help is quick."""
    if "config" not in {f.name for f in dataclasses.fields(command)}:
        return command
    Config = _config(command)
    fields = [(f.name, f.type, f) for f in dataclasses.fields(command) if f.name != "config"]
    own = ("config", tyro.conf.OmitArgPrefixes[Config], field(default_factory=Config))
    made = dataclasses.make_dataclass(command.__name__, [*fields, own], bases=(command,), kw_only=True)
    made.__doc__ = command.__doc__
    return made


def _stopped(command: Any, stop: BaseException) -> int:
    from jaxpeft.train.loop import Interrupted

    if isinstance(stop, Interrupted):
        print(f"\njaxpeft: {stop}; a checkpoint is saved. Go on with: jaxpeft finetune --resume RUN", file=sys.stderr)
    return 130


def _print(what: Any) -> None:
    from rich.console import Console

    Console().print(what, highlight=False, soft_wrap=True)


class _bar:
    """A progress bar: loss, examples a second, time left, the last validation."""

    def __init__(self, quiet: bool, title: str):
        from rich import progress as rp

        self.bar = rp.Progress(
            rp.TextColumn(title),
            rp.BarColumn(),
            rp.MofNCompleteColumn(),
            rp.TextColumn("{task.fields[note]}"),
            rp.TimeRemainingColumn(),
            rp.TextColumn("left"),
            disable=quiet,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("", total=None, note="reading model and data")
        self.validation, self.losses = "", []

    def __enter__(self) -> Any:
        self.bar.start()
        return self.update

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def update(self, step: int, steps: int, rate: float, numbers: dict[str, float]) -> None:
        if "loss" in numbers:
            self.losses = [*self.losses[-19:], numbers["loss"]]
        if "validation_accuracy" in numbers:
            self.validation = f"  validation {100 * numbers['validation_accuracy']:.1f} %"
        loss = f"loss {statistics.fmean(self.losses):.3f}  " if self.losses else ""
        note = f"{loss}{rate:.0f} examples/s{self.validation}"
        self.bar.update(self.task, completed=step, total=steps, note=note)


if __name__ == "__main__":
    sys.exit(main())
