"""The command line: one verb per step, all working on one run directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from impatient.errors import ImpatientError

app = typer.Typer(
    name="impatient",
    help="Make any PyTorch network anytime: a crude answer early, better ones as time allows, an answer by the deadline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The run directory.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although it is up to date.")]


@app.callback()
def _root() -> None:
    """One verb per step."""


def main() -> None:
    """Entry point: errors of ours as one message, Ctrl-C as a clean stop."""
    try:
        app(standalone_mode=False)
    except ImpatientError as error:
        err.print(f"[red]error[/red] ({type(error).__name__}): {error}", soft_wrap=True, markup=True, highlight=False)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        err.print("\nstopped; what was finished is kept. Run the same command again to go on.")
        sys.exit(130)
    except typer.Exit as exit:
        sys.exit(exit.exit_code)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()
            sys.exit(error.exit_code)
        raise


@app.command()
def train(
    directory: Directory,
    model: Annotated[str, typer.Option(help="SOURCE:NAME[:key=value,...]: impatient:resnet, torchvision:..., timm:..., "
                                            "transformers:..., package.module:factory.")] = "impatient:resnet",
    data: Annotated[str, typer.Option(help="digits, npz:FILE, imagefolder:DIR or hf:NAME-OR-PATH.")] = "digits",
    exits: Annotated[int, typer.Option(help="Number of exits, placed by measured cost; the last is the output.")] = 4,
    after: Annotated[str, typer.Option(help="Modules to exit after, with commas between, instead of --exits.")] = "",
    heads: Annotated[str, typer.Option(help="linear, relu_linear, mlp or msdnet.")] = "linear",
    weights: Annotated[str, typer.Option(help="uniform, linear, half_end, sieve, exp_lin, inverse_square, or a budget in ms: "
                                              "uniform:0:10, small_likely:0:10, log:FILE, ...")] = "uniform",
    mode: Annotated[str, typer.Option(help="Costs behind a budget's weights: interruptible or contract.")] = "interruptible",
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples per step and process.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="cosine or step.")] = "cosine",
    regime: Annotated[str, typer.Option(help="joint, frozen (heads only) or mixed (backbone first).")] = "joint",
    augment: Annotated[str, typer.Option(help="none, crop or crop-flip.")] = "none",
    label_smoothing: Annotated[float, typer.Option(help="Of the cross-entropy.")] = 0.0,
    channels_last: Annotated[bool, typer.Option(help="Memory format of convolutions; usually faster.")] = False,
    exit_free: Annotated[bool, typer.Option(help="Also train the backbone without exits, to compare with.")] = True,
    validation: Annotated[float, typer.Option(help="Share of the training examples held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, order and splits.")] = 0,
    accelerator: Annotated[str, typer.Option(help="As in Lightning Fabric: auto, cpu, cuda, mps.")] = "auto",
    devices: Annotated[int, typer.Option(help="Number of processes, one per device.")] = 1,
    strategy: Annotated[str, typer.Option(help="As in Lightning Fabric: auto, ddp, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="As in Lightning Fabric: 32-true, bf16-mixed, 16-mixed, ...")] = "32-true",
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier run in DIR away.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:  # fmt: skip
    """Train a network with exits; go on from the checkpoint if there is one."""
    from impatient import workflow
    from impatient.training.loop import Recipe

    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, schedule=schedule,  # type: ignore[arg-type]
        regime=regime, augment=augment, label_smoothing=label_smoothing, channels_last=channels_last, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    workflow.train(
        directory, model=model, data_spec=data, exits=exits, after=[name for name in after.split(",") if name], heads=heads,
        weights=weights, mode=mode, recipe=recipe, exit_free=exit_free, validation=validation, restart=restart,
        progress=not quiet, say=_say,
        fabric_options={"accelerator": accelerator, "devices": devices, "strategy": strategy, "precision": precision},
    )  # fmt: skip


def _say(text: Any) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # other processes of the same training stay silent
        out.print(text, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
