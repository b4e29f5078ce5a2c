"""The training loop, on Lightning Fabric, which can be stopped and resumed.

It trains all exits jointly, only the heads, or the backbone first and then everything. Its pieces
are plain functions (`losses`, `schedules`, `weights`), which any other training loop can use
without this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from impatient.anytime import Network, check_network
from impatient.errors import (
    ONE_COLUMN,
    ClassCountMismatch,
    DataError,
    StaleInput,
    TrainingDiverged,
    TrainingError,
)
from impatient.files import read_header, write_text
from impatient.networks.given_weights import GivenWeights
from impatient.networks.gradients import PLAIN, GradientFlow
from impatient.provenance import fingerprint_structure, fingerprint_tensors
from impatient.recipe import Phase, Recipe
from impatient.store import from_plain
from impatient.training import schedules
from impatient.training.augmentation import augmented
from impatient.training.balancing import AdaLoss, Learner, balancer
from impatient.training.batch_norm import behind
from impatient.training.checkpoint import damage_named, load_checkpoint, save_checkpoint
from impatient.training.data import Data, Split
from impatient.training.history import EpochMetrics, History, TrainingState
from impatient.training.losses import (
    distilled,
    summed_quality,
    task_losses,
    weighted_loss,
    weighted_sample_loss,
)
from impatient.training.ordering import batches_of_epoch
from impatient.training.progress import TrainingProgress
from impatient.training.text import check_vocabulary
from impatient.training.weights import check_weights, parse_weights
from impatient.trees import map_leaves, take

if TYPE_CHECKING:
    from lightning_fabric import Fabric


log = logging.getLogger(__name__)

ExitWeights = Sequence[float] | str | AdaLoss | Tensor
CheckedWeights = tuple[float, ...] | AdaLoss | Float[Tensor, "N K"]


def fit(
    network: Network,
    data: Data,
    *,
    weights: ExitWeights | None = None,
    recipe: Recipe | None = None,
    fabric: Fabric | None = None,
    given: GivenWeights | None = None,
    checkpoint: str | Path | None = None,
    metrics_csv: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train a network with exits, in place.

    Args:
        network: network from `attach_exits`, or a `Network` of your own whose forward returns K
            outputs.
        data: data set from `load_data`; the validation split is only reported, never trained on.
        weights: weight of each exit in the loss. Give one number per exit, such as
            `exit_weights(budget, costs.contract_s())` (Impatient DNNs), used as they are; or the
            text of a static scheme for `parse_weights`, where "uniform" weighs every exit 1; or
            "adaloss" or an `AdaLoss`, which follow the losses; or a tensor [N, K] with weights for
            each training sample. The default is the network's own scheme (`default_weights`).
        recipe: options of training.
        fabric: Lightning Fabric for another device, several processes or mixed precision; the
            default is one device, the accelerator if there is one.
        given: what `load_weights` said of the network or of its backbone. Its parameters learn at
            the recipe's `backbone_lr`, and a classifier that it replaced is trained with the heads.
        checkpoint: file to save to after every epoch and on Ctrl-C, and to resume from if it
            exists.
        metrics_csv: file for loss and accuracy per epoch, split and exit.
        progress: show a progress bar.
    Returns:
        The metrics of every epoch. The network is left in eval mode. If its batch norm has not
        caught up with training, the log says so.
    Raises:
        TrainingDiverged: if a loss is NaN or infinite; the last checkpoint is kept.
        StaleInput: if the checkpoint was made with another recipe, data set, network or weights.
        TrainingError: if the options do not fit each other, the network or its task.
        DataError: if the data are no `Data`, or hold texts that the network cannot take.
        ClassCountMismatch: if the network has fewer outputs than the data have classes.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint has been written.
    Source:
        Impatient DNNs (joint training); Anytime Neural Networks (static and alternating weights,
        AdaLoss); Kubaty et al. 2025 (mixed regime).
    """
    check_network(network)
    if not isinstance(data, Data):
        raise DataError(
            f"data is a {type(data).__name__}; expected a Data, from load_data or Data.of. "
            "For a loop of your own, the network's forward returns the outputs of all exits."
        )
    recipe = recipe or Recipe()
    check_vocabulary(network.exit_free, data.splits.values(), data.name)
    if network.task.is_logits:
        check_classes(network.num_classes, data.num_classes, data.name)
    elif recipe.distillation or recipe.label_smoothing:
        raise TrainingError(
            f"distillation={recipe.distillation} and label_smoothing={recipe.label_smoothing} are "
            f"of classes, but the network's task is {network.task.name!r}; expected 0 for both."
        )
    fabric = fabric or _default_fabric()
    check_precision(fabric)
    check_given(network, recipe, given)
    targets = data.examples("train").labels
    places = not isinstance(targets, Tensor) or targets.dim() > 2
    if recipe.augment != "none" and places:
        said = (
            f"of shape {tuple(targets.shape[1:])}"
            if isinstance(targets, Tensor)
            else f"in a {type(targets).__name__}"
        )
        raise TrainingError(
            f"augment={recipe.augment!r} moves the images but not their targets {said}; expected "
            "'none' for maps and boxes."
        )
    checked = checked_weights(
        network.default_weights if weights is None else weights,
        network.num_exits,
        data.size("train"),
        recipe.sampler,
    )
    history = _Training(
        network=network,
        data=data,
        weights=checked,
        recipe=recipe,
        fabric=fabric,
        given=given,
        checkpoint=Path(checkpoint) if checkpoint else None,
        metrics_csv=metrics_csv,
        progress=progress,
    ).run()
    found = behind(network, data, history, batch_size=recipe.batch_size, seed=recipe.seed)
    if found and fabric.is_global_zero:
        log.warning(
            "batch norm has not caught up with training: %s. To bring it up to date: `impatient "
            "recalibrate DIR` (in Python impatient.training.batch_norm.recalibrate_on).",
            found,
        )
    return history


def check_precision(fabric: Fabric) -> None:
    """Refuse precisions that would change the type of the weights themselves.

    Raises:
        TrainingError: if the weights would be anything but float32.
    """
    with fabric.init_tensor():
        dtype = torch.empty(()).dtype
    if dtype != torch.float32:
        short = str(dtype).removeprefix("torch.")
        raise TrainingError(
            f"the precision of Lightning Fabric turns the weights into {short}; expected float32. "
            "Small steps would vanish in fewer bits, and profiles, recordings and checkpoints "
            "belong to the float32 network. Train with precision bf16-mixed or 32-true."
        )


def check_given(network: Network, recipe: Recipe, given: GivenWeights | None) -> None:
    """Check that the weights somebody gave are those of this network.

    Raises:
        TrainingError: if none of them is the network's, or `backbone_lr` has nothing to act on.
    """
    if given is None:
        if recipe.backbone_lr is not None:
            raise TrainingError(
                f"backbone_lr={recipe.backbone_lr:g} is for parameters that came from given "
                "weights, and there are none; expected `--init FILE_OR_RUN` (in Python: "
                "fit(..., given=load_weights(...))). Give weights, or leave backbone_lr away."
            )
        return
    own = {id(parameter) for parameter in network.parameters()}
    if not own & {id(parameter) for parameter in given.parameters()}:
        raise TrainingError(
            f"the weights of {given.source} were loaded into a {type(given.module).__name__} none "
            "of whose parameters is the network's; expected its backbone. Load them into "
            "network.backbone, or into the model before exits are attached, without a copy."
        )


def check_classes(outputs: int | None, classes: int, data: str) -> None:
    """Check that a network has an output for every class of some data.

    Raises:
        ClassCountMismatch: if it has fewer, or a single one.
    """
    if outputs == 1:
        raise ClassCountMismatch(
            f"the network has one output column, {data} has {classes} classes; expected an output "
            f"for every class. {ONE_COLUMN}"
        )
    if outputs is not None and outputs < classes:
        raise ClassCountMismatch(
            f"the network has {outputs} outputs, {data} has {classes} classes; expected an output "
            f"for every class. Build the network with num_classes={classes}."
        )


def frozen_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules that the user has frozen: in eval mode, no parameter to be trained.

    They stay in eval mode in training, so that their batch-norm statistics stay, too.
    """
    return [
        module
        for module in network.modules()
        if not module.training
        and any(True for _ in module.parameters())
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def checked_weights(
    weights: ExitWeights, count: int, samples: int, sampler: str = "none"
) -> CheckedWeights:
    """Read exit weights and check that they fit.

    Args:
        weights: exit weights in any form that `fit` takes.
        count: number of exits.
        samples: number of training samples.
        sampler: sampler of the recipe.
    Raises:
        TrainingError: if the weights do not fit the exits, the samples or the sampler.
    """
    if isinstance(weights, AdaLoss):
        return weights
    if isinstance(weights, str):
        return AdaLoss() if weights == "adaloss" else parse_weights(weights, count)
    if not (isinstance(weights, Tensor) and weights.dim() == 2):
        return check_weights([float(weight) for weight in weights], count)
    if weights.shape != (samples, count):
        raise TrainingError(
            f"weights of shape {tuple(weights.shape)} for {samples} training samples and {count} "
            "exits; expected one row per sample, one column per exit."
        )
    if not torch.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise TrainingError(
            "the weights of samples must be finite and not negative, and one must be positive."
        )
    if sampler != "none":
        raise TrainingError(
            f"sampler={sampler!r} draws from one set of weights; with weights per sample use "
            "sampler='none'."
        )
    return weights.float()


def _default_fabric() -> Fabric:
    from lightning_fabric import Fabric

    return Fabric(accelerator="auto", devices=1)


@dataclass(eq=False, kw_only=True)
class _Training:
    """State that the steps of one `fit` share."""

    network: Network
    data: Data
    weights: CheckedWeights
    recipe: Recipe
    fabric: Fabric
    given: GivenWeights | None
    checkpoint: Path | None
    metrics_csv: str | Path | None
    progress: bool

    def __post_init__(self) -> None:
        recipe = self.recipe
        count = self.network.num_exits
        # The authors' code, too, uses the weights before AdaLoss's first update.
        static = (1.0,) * count
        if isinstance(self.weights, Tensor):
            static = tuple(self.weights.mean(0).tolist())
        elif isinstance(self.weights, tuple):
            static = self.weights
        self.head_decays = [
            recipe.weight_decay * (weight if recipe.head_decay == "scaled" else 1.0)
            for weight in static
        ]
        self.balancer = balancer(
            self.weights if isinstance(self.weights, AdaLoss) else static,
            recipe.sampler,
            count=count,
            gamma=recipe.sampler_gamma,
            learner=Learner(
                even_share=recipe.sampler_even,
                last_reward=recipe.sampler_last,
                memory=recipe.sampler_memory,
            ),
            seed=recipe.seed,
        )
        self.shown = TrainingProgress(self.progress and self.fabric.is_global_zero, recipe.epochs)
        self.history: list[EpochMetrics] = []
        # Batches of the running epoch that are done, their summed losses and hits, and their time
        # in seconds.
        self.step = 0
        self.sums = torch.zeros(2, count, dtype=torch.float64)
        self.seconds = 0.0
        # "exits" is needed because heads of equal shapes would also fit after other layers.
        self.identity = {
            "recipe": dataclasses.asdict(recipe),
            "weights": _identity(self.weights),
            "data": self.data.fingerprint,
            "processes": self.fabric.world_size,
            "network": fingerprint_structure(self.network.state_dict()),
            "exits": list(self.network.exit_names),
            "given": self.given.fingerprint if self.given else None,
        }

    def run(self) -> History:
        torch.manual_seed(self.recipe.seed)
        if self.recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer_state = self._resume()
        self.frozen = frozen_modules(self.network)
        self.trainable = [
            parameter for parameter in self.network.parameters() if parameter.requires_grad
        ]
        try:
            with self.shown, interruptible() as self.interrupt:
                for phase in self.recipe.phases():
                    if len(self.history) < phase.end:
                        inside = len(self.history) > phase.start or self.step > 0
                        self._run_phase(phase, optimizer_state if inside else None)
        finally:
            for parameter in self.trainable:
                parameter.requires_grad_(True)
            self.network.eval()
        return History(epochs=tuple(self.history))

    def _run_phase(self, phase: Phase, optimizer_state: dict[int, dict[str, Any]] | None) -> None:
        groups = self._parameter_groups(phase)
        if not groups:
            raise TrainingError(
                f"nothing to train in the phase {phase.name!r} of the regime "
                f"{self.recipe.regime!r}: the network has no such parameters, or all of them are "
                "frozen. Attach exits, or set requires_grad."
            )
        optimizer: Any = _optimizer(self.recipe, groups)
        if optimizer_state:
            optimizer.load_state_dict(
                {"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        self.model, self.optimizer = self.fabric.setup(self.network, optimizer)
        for epoch in range(len(self.history), phase.end):
            self._run_epoch(phase, epoch)

    def _parameter_groups(self, phase: Phase) -> list[dict[str, Any]]:
        """Group the parameters to train by weight decay and learning rate.

        Each early head is a group, and the rest is one, or two if part of it has a learning rate of
        its own. A classifier that replaces the one of given weights is trained with the heads, and
        with the backbone, too.

        The other parameters are frozen. A zero gradient would not be enough, because momentum and
        weight decay would still change them.
        """
        exit_of = {
            id(parameter): exit
            for exit, head in enumerate(self.network.early_heads())
            for parameter in head.parameters()
        }
        # The last of the decays below belongs to parameters outside of early heads.
        rest = -1
        given = self.given.parameters() if self.given else ()
        replaced = self.given.replaced_parameters() if self.given else ()
        slow = {id(parameter) for parameter in given} if self.recipe.backbone_lr else set()
        fresh = {id(parameter) for parameter in replaced}
        factor = (self.recipe.backbone_lr or self.recipe.lr) / self.recipe.lr
        members: dict[tuple[int, float], list[nn.Parameter]] = {}
        for parameter in self.trainable:
            exit = exit_of.get(id(parameter), rest)
            parts = {
                "joint": True,
                "heads": exit != rest or id(parameter) in fresh,
                "backbone": exit == rest,
            }
            parameter.requires_grad_(parts[phase.name])
            if parameter.requires_grad:
                kind = (exit, factor if id(parameter) in slow else 1.0)
                members.setdefault(kind, []).append(parameter)
        decays = [*self.head_decays, self.recipe.weight_decay]
        return [
            {"params": parameters, "weight_decay": decays[exit], "lr_factor": lr_factor}
            for (exit, lr_factor), parameters in members.items()
        ]

    def _run_epoch(self, phase: Phase, epoch: int) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()
        if phase.name == "heads":
            # A frozen backbone keeps its batch-norm statistics.
            self.network.eval()
            for head in self.network.early_heads():
                head.train()
        batches = batches_of_epoch(
            self.data.size("train"),
            self.recipe.batch_size,
            seed=self.recipe.seed * 1_000_003 + epoch,
            lengths=self.data.examples("train").lengths,
            process=(self.fabric.global_rank, self.fabric.world_size),
        )
        self.balancer.begin_epoch(epoch)
        seen = sum(len(batch) for batch in batches[: self.step])
        started = time.perf_counter()
        lr = 0.0
        while self.step < len(batches):
            length = phase.end - phase.start
            done = (epoch - phase.start + self.step / len(batches)) / length
            lr = schedules.learning_rate(self.recipe, done, length)
            self.sums += self._update(phase.name, batches[self.step], lr)
            seen += len(batches[self.step])
            self.step += 1
            self.shown.step(epoch, phase.name, self.step / len(batches), self.sums / seen)
            if self.interrupt.asked and self.step < len(batches):
                self.seconds += time.perf_counter() - started
                self._save()
                raise KeyboardInterrupt
        train = self._over_processes(self.sums / seen)
        validation = self._validate("validation")
        if not torch.isfinite(validation[0]).all():
            raise _diverged("validation loss", validation[0], lr)
        self.history.append(
            EpochMetrics(
                epoch=epoch + 1,
                phase=phase.name,
                lr=lr,
                seconds=self.seconds + time.perf_counter() - started,
                train_loss=tuple(train[0].tolist()),
                train_accuracy=tuple(train[1].tolist()),
                validation_loss=tuple(validation[0].tolist()),
                validation_accuracy=tuple(validation[1].tolist()),
            )
        )
        self.step = 0
        self.seconds = 0.0
        self.sums = torch.zeros_like(self.sums)
        self._save()
        self._write_metrics()
        self.shown.epoch(self.history[-1])
        if self.interrupt.asked:
            raise KeyboardInterrupt

    def _update(self, phase: str, indices: Tensor, lr: float) -> Tensor:
        """Take one step of gradient descent.

        Returns:
            Summed losses and hits per exit on the CPU, shape [2, K].
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        examples = self.data.examples("train")
        labels = map_leaves(self.fabric.to_device, take(examples.labels, indices))
        taken = map_leaves(self.fabric.to_device, examples.take(indices.tolist()))
        inputs = self.data.preprocess(taken)
        recipe = self.recipe
        inputs = augmented(inputs, recipe.augment)
        if recipe.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        joint = GradientFlow(equilibrium=recipe.equilibrium, detach=recipe.detach)
        flow = joint if phase == "joint" else PLAIN
        outputs = self.model(inputs) if flow == PLAIN else self.model(inputs, gradients=flow)
        losses = task_losses(self.network.task, outputs, labels, recipe.label_smoothing)
        loss = self._objective(losses, outputs, phase, indices)
        exit_losses = losses.detach().mean(1)
        if not torch.isfinite(loss):
            raise _diverged("loss", exit_losses, lr)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if recipe.clip_norm:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=recipe.clip_norm)
        self.optimizer.step()
        hits = summed_quality(self.network.task, outputs, labels)
        sums = torch.stack([exit_losses * len(indices), hits]).double().cpu()
        if phase != "backbone":
            self.balancer.observe(self._over_processes(sums[0] / len(indices)))
        return sums

    def _objective(
        self, losses_KB: Tensor, outputs: Sequence[Tensor], phase: str, indices: Tensor
    ) -> Tensor:
        """Return the loss that this step minimises."""
        if phase == "backbone":
            return losses_KB[-1].mean()
        if self.recipe.distillation:
            losses_KB = distilled(
                losses_KB, outputs, self.recipe.distillation, self.recipe.temperature
            )
        if isinstance(self.weights, Tensor):
            return weighted_sample_loss(losses_KB, self.weights[indices].to(losses_KB.device))
        return weighted_loss(losses_KB.mean(1), self.balancer.weights().to(losses_KB.device))

    def _over_processes(self, values: Tensor) -> Tensor:
        if self.fabric.world_size == 1:
            return values
        mean = self.fabric.all_reduce(values.to(self.fabric.device), reduce_op="mean")
        return torch.as_tensor(mean).cpu()

    @torch.no_grad()
    def _validate(self, split: Split) -> Tensor:
        """Compute mean loss and accuracy per exit on a split, shape [2, K].

        Every process computes the whole split.
        """
        self.network.eval()
        sums = torch.zeros_like(self.sums)
        for inputs, labels in self.data.batches(split, 512):
            outputs = self.network(map_leaves(self.fabric.to_device, inputs))
            labels = map_leaves(self.fabric.to_device, labels)
            losses = task_losses(self.network.task, outputs, labels).sum(1)
            hits = summed_quality(self.network.task, outputs, labels)
            sums += torch.stack([losses, hits]).double().cpu()
        return sums / self.data.size(split)

    def _write_metrics(self) -> None:
        if self.metrics_csv and self.fabric.is_global_zero:
            write_text(self.metrics_csv, History(epochs=tuple(self.history)).to_csv())

    def _save(self) -> None:
        if self.checkpoint is None or not self.fabric.is_global_zero:
            return
        header = {
            "kind": "checkpoint",
            **self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums.tolist(),
            "balancer": self.balancer.state(),
            "history": [dataclasses.asdict(entry) for entry in self.history],
        }
        save_checkpoint(self.checkpoint, self.network, self.optimizer, header)

    def _resume(self) -> dict[int, dict[str, Any]] | None:
        """Resume from the checkpoint if there is one, and return the optimizer's state."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        self._check_identity(read_header(self.checkpoint))
        header, optimizer_state = load_checkpoint(self.checkpoint, self.network)
        with damage_named(self.checkpoint):
            reached = {name: header[name] for name in ("step", "seconds", "sums", "history")}
            state = from_plain(reached, TrainingState, where=str(self.checkpoint))
            state.check(self.network.num_exits, self.recipe.epochs)
            self.history = list(state.history)
            self.step = state.step
            self.seconds = state.seconds
            self.sums = torch.tensor(state.sums, dtype=torch.float64)
            self.balancer.restore(header["balancer"])
        # The metrics file may be missing, or older than the checkpoint after an interruption.
        self._write_metrics()
        return optimizer_state

    def _check_identity(self, header: Mapping[str, Any]) -> None:
        for name, wanted in json.loads(json.dumps(self.identity)).items():
            begun = header.get(name)
            if name == "recipe" and isinstance(begun, Mapping):
                # An older version knew fewer options, and did what their defaults do.
                begun = {**dataclasses.asdict(Recipe()), **begun}
            if begun != wanted:
                was, now = _differing(begun, wanted)
                raise StaleInput(
                    f"the checkpoint {self.checkpoint} was made with another {name}: {was}, but "
                    f"here it is {now}. Continue with the old settings, or delete the checkpoint "
                    "to start again (`impatient train --restart`)."
                )


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make a recipe's optimizer.

    Each group has a weight decay of its own.
    """
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
    )


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Return two values, reduced to the differing entries if both are mappings."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def _identity(weights: CheckedWeights) -> Any:
    """Return exit weights in the form in which a checkpoint stores them."""
    if isinstance(weights, Tensor):
        return fingerprint_tensors({"weights": weights})
    if isinstance(weights, AdaLoss):
        return {"adaloss": dataclasses.asdict(weights)}
    return list(weights)


def _diverged(what: str, losses: Tensor, lr: float) -> TrainingDiverged:
    return TrainingDiverged(
        f"the {what} became NaN or infinite (per exit: "
        f"{[round(value, 3) for value in losses.tolist()]}). The last checkpoint is intact. Lower "
        f"lr (now {lr:g}), add warmup or set clip_norm; check inputs and weights for NaN."
    )


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turn the first Ctrl-C into a flag and let the second one interrupt.

    So the running step can be finished and saved. Outside the main thread, where Python does not
    handle signals, the flag is never set.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
