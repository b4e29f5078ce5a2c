"""Train a network with exits into a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

import impatient
from impatient.errors import ModelSpecError, RunError, StaleInput, TaskError, TrainingError
from impatient.files import is_file
from impatient.recipe import Recipe
from impatient.store import Stored
from impatient.verbs.network_spec import (
    DEFAULT_EXITS,
    OWN_HEADS,
    NetworkSpec,
    load_fresh,
    outputs_for,
    save_weights,
    spec_of,
)
from impatient.verbs.notes import log
from impatient.verbs.options import (
    OFF,
    Flag,
    Names,
    NewDirectory,
    Positive,
    PositiveOrNone,
    Quiet,
    Share,
    Text,
    Top,
    VerbOptions,
    one_of,
    spare_a_core,
    task_and_top,
)
from impatient.verbs.processes import alone, is_first
from impatient.verbs.replacing import discard_old, replaced
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from impatient.costs import Cost
    from impatient.networks import GivenWeights, Loaded
    from impatient.networks.stages import Cut
    from impatient.training.history import History
    from impatient.training.loop import ExitWeights

ExitRule = Literal["boosted", "arithmetic", "geometric", "poe", "caching"]
Head = Literal[
    "linear",
    "relu_linear",
    "mlp",
    "mlp_dropout",
    "flatten",
    "adaptive",
    "conv1x1",
    "rescale",
    "msdnet",
    "identity",
]


CutEngine = Literal["eager", "compile", "onnxruntime", "openvino", "aoti"]
# How targets may be meant that look like those of another task.
OR_CLASSES = {
    "regression": " If the numbers are classes, save them as integers.",
    "multi_label": " If each row has a single 1, at its class, say labels=onehot in --data.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(VerbOptions):
    """Train a network with exits, or go on from its checkpoint.

    Attributes:
        model: Network, as SOURCE:NAME[:key=value,...]: impatient:resnet, torchvision:..., timm:...,
            transformers:..., package.module:factory.
        data: Data set: digits, npz:FILE, imagefolder:DIR, text:FILE-OR-DIR or hf:NAME-OR-PATH.
        task: What the outputs mean: classification (with :top=5, ...), binary, multi_label,
            regression (with :tolerance=0.5 or :scale=2), segmentation, embedding or detection.
        init: Weights of the same model to begin with: a .safetensors or .pt file, or another run
            directory. A classifier of another width starts anew.
        exits: Number of exits, placed by measured cost; the last is the output. By default 4, or
            the model's own.
        after: Modules to exit after, instead of --exits; every:2 for every second block; calls:step
            for every call of a loop's step; auto, the default, leaves it to --exits.
        engine: Engine that the network is for: with onnxruntime, openvino, compile or aoti, exits
            are placed where few bytes cross.
        heads: Kind of early prediction layers; by default linear, or the model's own.
        weights: Exit weights: uniform, linear, half_end, sieve, exp_lin or inverse_square, with
            options (sieve:last_to_early=2,total=all); adaloss; numbers such as 1,0.5,1; or a budget
            in ms (uniform:0:10, small_likely:0:10, log:FILE), or with one of the units
            mmacs, mb and mj (uniform:0:40mmacs). By default uniform, or the model's own.
        mode: Costs behind a budget's weights.
        ensembling: How exits answer together. Boosted is for training; for the others use rather
            `impatient ensemble`.
        exit_free: Also train the backbone without exits, for comparison.
        validation: Share of the training examples held out.
        accelerator: Device as in Lightning Fabric: auto, cpu, cuda, mps.
        devices: Number of processes, one per device.
        strategy: Strategy as in Lightning Fabric: auto, ddp, ...
        precision: Precision as in Lightning Fabric: 32-true, bf16-mixed or 16-mixed.
        restart: Replace an earlier run in DIR. It stays in DIR/replaced until the new one is
            trained. Files that are not of a run are left alone.
    """

    directory: NewDirectory
    model: str = "impatient:resnet"
    data: str = "digits"
    task: str = "classification"
    top: Top = None
    init: Text = None
    exits: PositiveOrNone = None
    after: Names = ()
    engine: CutEngine = "eager"
    heads: Annotated[Head | None, one_of(Head), OFF] = None
    weights: Text = None
    mode: Literal["interruptible", "contract"] = "interruptible"
    ensembling: Annotated[ExitRule | None, one_of(ExitRule), OFF] = None
    recipe: Annotated[Recipe, arg(name="")] = field(default_factory=Recipe)
    exit_free: bool = True
    validation: Share = 0.1
    accelerator: str = "auto"
    devices: Positive = 1
    strategy: str = "auto"
    precision: str = "32-true"
    restart: Flag = False
    quiet: Quiet = False

    def __post_init__(self) -> None:
        if self.after == ("auto",):
            object.__setattr__(self, "after", ())

    @property
    def task_name(self) -> str:
        """What the outputs mean, with the number of classes that an answer may name."""
        return task_and_top(self.task, self.top)

    @property
    def rule(self) -> str | None:
        """The rule in `after`, if it is one: "every:2"."""
        return self.after[0] if len(self.after) == 1 and ":" in self.after[0] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChoice(Stored, kind="training", made_by="`impatient train`"):
    """What a training was begun with, beside the recipe, and what followed from it.

    Attributes:
        weights: Exit weights as they were asked for.
        mode: Costs behind a budget's weights.
        numbers: These weights in numbers; None if they follow the losses.
        init: Weights to begin with; empty if there are none.
    """

    weights: str
    mode: str
    numbers: tuple[float, ...] | None
    init: str = ""


@alone(make=True)
def train(options: TrainOptions) -> History:
    """Train a network with exits, and beside it the same backbone without exits.

    Returns:
        What training reported of the network with exits.
    """
    # the user has named the model, and _spec has compared it
    trust = (options.model,)
    run = RunDirectory(options.directory, trust=trust)
    recipe = options.recipe
    transform = impatient.networks.transform_of(options.model)
    data = impatient.load_data(
        options.data, seed=recipe.seed, validation=options.validation, transform=transform
    )
    _say_inputs(options, data, transform)
    # other processes of this training come through all of this, too, after the first one
    is_new = not is_file(run.spec_file) or (options.restart and is_first())
    # whatever is wrong is found before the old run is touched
    with replaced(run.path) if is_new else contextlib.nullcontext(run.path) as place:
        begun = RunDirectory(place, trust=trust)
        spec = _spec(begun, options, data, transform)
        loaded = spec.load_model(trust)
        network = spec.with_exits(loaded.model)
        log.info(network.describe(spec.example()))
        fabric = _fabric(options)
        given = _given(run, options, spec, loaded)
        for note in given.notes if given else ():
            log.info(note)
        impatient.training.loop.check_given(network, recipe, given)
        if is_new:
            _check_is_trained(options)
        bare_loaded = spec.load_model(trust) if options.exit_free else None
        bare_given = _given(run, options, spec, bare_loaded) if bare_loaded else None
        weights = _exit_weights(begun, options, network)
    # starts the other processes, if any
    fabric.launch()

    def fit(part: RunDirectory, network: Any, **how: Any) -> History:
        history = impatient.fit(
            network,
            data,
            fabric=fabric,
            progress=not options.quiet,
            checkpoint=part.here / "checkpoint.safetensors",
            metrics_csv=part.here / "metrics.csv",
            **how,
        )
        if fabric.is_global_zero:
            save_weights(network, part.weights_file)
        return history

    history = fit(run, network, given=given, weights=weights, recipe=recipe)
    if bare_loaded:
        log.info("the same backbone without exits, for comparison:")
        joint = dataclasses.replace(recipe, regime="joint")
        bare = spec.without_exits(bare_loaded.model)
        fit(run.exit_free, bare, given=bare_given, recipe=joint)
    if fabric.is_global_zero:
        discard_old(run.path)
    log.info("trained: %s", run.weights_file)
    return history


def _say_inputs(
    options: TrainOptions, data: impatient.Data, transform: impatient.networks.Transform | None
) -> None:
    """Say what is done to inputs, and whether that is what trained weights expect."""
    log.info("inputs: %s", data.preprocess)
    size = data.preprocess.size
    if transform is None or size is None:
        return
    expected = transform.for_channels(data.preprocess.channels)
    if (data.preprocess.mean, data.preprocess.std) != (expected.mean, expected.std):
        log.info(
            "the weights of %s were made for the mean %s and the deviation %s; the data spec says "
            "otherwise",
            options.model,
            ", ".join(f"{number:g}" for number in expected.mean),
            ", ".join(f"{number:g}" for number in expected.std),
        )
    if size != transform.size:
        log.info(
            "the weights of %s were made for pictures of %dx%d; these are %dx%d",
            options.model,
            *transform.size,
            *size,
        )


def _spec(
    run: RunDirectory,
    options: TrainOptions,
    data: impatient.Data,
    transform: impatient.networks.Transform | None,
) -> NetworkSpec:
    """Describe a new network, or give the run's description, which must agree."""
    if not is_file(run.spec_file):
        spec = dataclasses.replace(_new_spec(options, data), transform=transform)
        spec.save(run.spec_file)
        return spec
    spec = run.spec()
    if spec.members:
        raise RunError(
            f"{run.path} is made of trained members; train those, and make it again with "
            "`impatient ensemble` or `select`."
        )
    # of a model with exits of its own nothing need be said
    own = spec.heads == OWN_HEADS
    wanted: dict[str, object] = {
        "model": options.model,
        "data": options.data,
        "task": impatient.tasks.named(options.task_name).name,
        "heads": options.heads or (OWN_HEADS if own else "linear"),
        "seed": options.recipe.seed,
        "validation": options.validation,
        "ensembling": options.ensembling or "",
    }
    begun = {name: getattr(spec, name) for name in wanted}
    # before its model is built: the file may name another one than the user
    _compare(run, begun, wanted)
    if options.after:
        placed = _placed(spec, options.rule) if options.rule else options.after
        begun["after"] = _cuts(spec.after)
        wanted["after"] = _cuts(placed)
    else:
        begun["exits"] = len(spec.after) + 1
        wanted["exits"] = options.exits or (begun["exits"] if own else DEFAULT_EXITS)
    _compare(run, begun, wanted)
    run.check_data(data)
    return spec


def _compare(run: RunDirectory, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse options that differ from those that a training was begun with."""
    for name, value in wanted.items():
        if begun[name] != value:
            raise StaleInput(
                f"{run.path} was begun with --{name} {_written(begun[name])}, not "
                f"{_written(value)}. Say the old value, use another directory, or --restart to "
                "throw the old run away."
            )


def _new_spec(options: TrainOptions, data: impatient.Data) -> NetworkSpec:
    """Place the exits of a model that has none, and describe the network.

    Raises:
        ModelSpecError: if the model has exits, and yet `after`, `exits` or `heads` is given.
        TaskError: if the task contradicts the data or the model.
    """
    from impatient.tasks.classification import check_top

    seed = options.recipe.seed
    task = impatient.tasks.named(options.task_name).name
    _check_targets(options, data)
    outputs = outputs_for(data, task)
    if impatient.tasks.is_classification(task):
        check_top(task, outputs)
    network: Any = load_fresh(options.model, outputs, data.preprocess, seed).model
    if isinstance(network, impatient.Network):
        if options.after or options.exits is not None or options.heads is not None:
            raise ModelSpecError(
                f"{options.model} has {network.num_exits} exits of its own; leave --exits, --after "
                "and --heads away."
            )
        heads: str = OWN_HEADS
    else:
        heads = options.heads or "linear"
        impatient.training.text.check_vocabulary(network, data.splits.values(), data.name)
        network = impatient.attach_exits(
            network,
            example=data.example(),
            after=options.rule or list(options.after) or "auto",
            count=options.exits or DEFAULT_EXITS,
            heads=heads,
            num_classes=outputs,
            task=task,
            engine=options.engine,
        )
    if options.ensembling:
        network = impatient.networks.RunningEnsemble(network, options.ensembling)
    _check_outputs(network, data)
    spec = spec_of(
        network,
        data,
        model=options.model,
        seed=seed,
        validation=options.validation,
        task=task,
    )
    return dataclasses.replace(
        spec,
        after=network.exit_names[:-1],
        heads=heads,
        ensembling=options.ensembling or "",
    )


def _check_targets(options: TrainOptions, data: impatient.Data) -> None:
    """Refuse a task that the targets of some split contradict."""
    task = impatient.tasks.named(options.task_name)
    for split, examples in data.splits.items():
        try:
            if task.check_targets is not None:
                task.check_targets(examples.labels)
        except TaskError as error:
            hint = data.task_hint
            said = f" They look like {hint}: say --task {hint}." if hint else ""
            if impatient.tasks.is_classification(task.name):
                said += OR_CLASSES.get(hint, "")
            raise TaskError(
                f"--task {task.name}, but {options.data} has in its split {split} {error}{said}"
            ) from error


def _check_outputs(network: Any, data: impatient.Data) -> None:
    """Refuse outputs that do not fit the targets, on two samples of the training split."""
    import torch

    from impatient.inputs import evaluating

    inputs, targets = next(iter(data.batches("train", 2)))
    with evaluating(network), torch.no_grad():
        impatient.training.losses.task_losses(network.task, network(inputs), targets)


def _given(
    run: RunDirectory, options: TrainOptions, spec: NetworkSpec, loaded: Loaded
) -> GivenWeights | None:
    """Say what of a model was trained before: by its library, or in what the user names."""
    if options.init is None:
        return loaded.given(spec.model)
    if Path(options.init).resolve().is_relative_to(run.path.resolve()):
        raise TrainingError(
            f"--init {options.init} is in {run.path}, whose weights this training writes; expected "
            "weights from elsewhere. Train into another directory."
        )
    model = loaded.model
    # A user's own network with exits: weights are of the model that it was made from.
    module = model.backbone if isinstance(model, impatient.MultiExitNetwork) else model
    return impatient.load_weights(module, options.init, num_classes=spec.num_classes)


def _check_is_trained(options: TrainOptions) -> None:
    """Refuse to train heads alone on a backbone that nobody has trained."""
    if options.recipe.regime != "frozen" or options.init is not None:
        return
    trained = impatient.networks.specs.has_trained_weights(options.model)
    if trained is None:
        log.warning(
            "note: --regime frozen trains the heads only; expected that %s loads trained weights, "
            "which is not known here. If it does not, say --init FILE_OR_RUN.",
            options.model,
        )
    elif not trained:
        raise TrainingError(
            f"--regime frozen leaves the backbone as it is, and that of {options.model} is drawn "
            "at random; expected a trained one. Say --init FILE_OR_RUN, name a model with trained "
            "weights, or train it as well (--regime joint or mixed)."
        )


def _placed(spec: NetworkSpec, rule: str) -> tuple[str, ...]:
    """Find where a rule puts the exits."""
    backbone = load_fresh(spec.model, spec.num_classes, spec.preprocess, spec.seed).model
    network = impatient.attach_exits(
        backbone, example=spec.example(), after=rule, heads=spec.heads, task=spec.task
    )
    return tuple(map(str, network.cuts))


def _cuts(after: Sequence[str]) -> tuple[Cut, ...]:
    """Read the names of cuts: a first call may be named with or without its number."""
    from impatient.networks.stages import Cut

    return tuple(map(Cut.named, after))


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _fabric(options: TrainOptions) -> Any:
    from lightning_fabric import Fabric

    wanted = {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "strategy": options.strategy,
        "precision": options.precision,
    }
    try:
        fabric = Fabric(**wanted)
    except Exception as error:
        # its plug-ins raise what they like: ValueError, RuntimeError, exceptions of their own
        asked = " ".join(f"--{name} {value}" for name, value in wanted.items())
        raise TrainingError(
            f"Lightning Fabric cannot train with {asked}: {error} Give others, or leave them away."
        ) from error
    impatient.training.loop.check_precision(fabric)
    return fabric


def _exit_weights(run: RunDirectory, options: TrainOptions, network: Any) -> ExitWeights:
    """Give the exit weights, from a name or a budget, and keep them."""
    wanted = options.weights or network.default_weights
    init = options.init or ""
    file = run.path / "training.json"
    if is_file(file):
        begun = TrainingChoice.load(file)
        _compare(
            run,
            {"init": begun.init or "(none)", "weights": begun.weights, "mode": begun.mode},
            {"init": init or "(none)", "weights": wanted, "mode": options.mode},
        )
        return begun.numbers or wanted
    numbers = _weights_in_numbers(run, wanted, options, network)
    TrainingChoice(weights=wanted, mode=options.mode, numbers=numbers, init=init).save(file)
    return numbers or wanted


def _weights_in_numbers(
    run: RunDirectory, wanted: str, options: TrainOptions, network: Any
) -> tuple[float, ...] | None:
    """Turn the name of exit weights into numbers, but for AdaLoss."""
    if wanted == "adaloss":
        log.info("exit weights: they follow the losses (AdaLoss)")
        return None
    if ":" in wanted and "=" not in wanted:
        budget = impatient.budgets.parse_budget(wanted)
        costs = _profile_for_weights(run, network, budget.cost, progress=not options.quiet)
        numbers = impatient.exit_weights(
            budget, costs.cumulative(budget.cost, options.mode), normalise=True
        )
    else:
        numbers = impatient.training.weights.parse_weights(wanted, network.num_exits)
    log.info("exit weights: %s", ", ".join(f"{number:.3f}" for number in numbers))
    unwanted = [
        name for name, number in zip(network.exit_names, numbers, strict=True) if not number
    ]
    if unwanted:
        log.info("exits of weight 0, which are not trained: %s", ", ".join(unwanted))
    return numbers


def _profile_for_weights(
    run: RunDirectory, network: Any, cost: Cost, *, progress: bool
) -> impatient.CostProfile:
    known = impatient.CostProfile.load(run.profile_file) if is_file(run.profile_file) else None
    # joules need a meter, which only a caller from Python can bring
    if known is not None and (known.holds(cost) or cost == "energy"):
        return known
    log.info("measuring what each exit costs, for the weights:")
    import torch

    # As the later verbs do, to which this profile belongs; training takes all cores.
    threads = torch.get_num_threads()
    spare_a_core()
    try:
        costs = impatient.profile(network, run.spec().example(), repeats=100, progress=progress)
    finally:
        torch.set_num_threads(threads)
    costs.save(run.profile_file)
    return costs
