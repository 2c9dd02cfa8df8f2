"""The command line ``sdkd``: from a trained teacher to a student in production.

Here are the commands and their help; what they do is in `sdkd_plugin.cli.work`, which they import
when they run.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from sdkd_plugin._version import __version__

_WRONG_USE = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)
_FAILED = (RuntimeError, OSError, ImportError)


class _WrongUse(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """Errors become one line: exit code 2 for what the user can set right, 1 for what failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (*_WRONG_USE, *_FAILED) as error:
            kind = _WrongUse if isinstance(error, _WRONG_USE) else click.ClickException
            raise kind(" ".join(str(error).split()) or type(error).__name__) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A large spatiotemporal forecaster teaches a small one.

    Every command takes SETTINGS: a YAML file, the name of settings that come with the package
    (traffic, navier_stokes), or the folder of a run, which keeps its own; and changes to them as
    key=value. What a task, student or teacher can be is in "sdkd study --help".

    \b
    sdkd distill traffic teacher=null student.model=GraphAlterNet out=runs/teacher
    sdkd distill traffic teacher=runs/teacher/student out=runs/traffic
    sdkd export runs/traffic
    sdkd report runs/traffic

    Exit codes: 0 done, 1 failed, 2 wrong use. Logs have no progress bars.
    """


def _printing(function: Callable[..., dict[str, Any]]) -> click.Command:
    """A command that prints the text of what is found or, with ``--json``, all of the rest."""

    @functools.wraps(function)
    def command(as_json: bool, **arguments: Any) -> None:
        found = function(**arguments)
        text = found.pop("text")
        if as_json:
            click.echo(json.dumps(found, allow_nan=False))
        elif sys.stdout.isatty():
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(text))
        else:
            click.echo(text)

    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    return main.command()(as_json(command))


def _command(function: Callable[..., dict[str, Any]]) -> click.Command:
    """A command of settings and overrides."""
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return _printing(click.argument("settings")(overrides(function)))


def _work() -> Any:
    from sdkd_plugin.cli import work

    return work


_resume = click.option("--resume", is_flag=True, help="Go on with the run in the folder `out`.")


@_command
@_resume
def study(settings: str, overrides: tuple[str, ...], resume: bool) -> dict[str, Any]:
    """Does distillation pay on my data? Compare the student alone and distilled.

    Trains the student alone, with plain-MSE distillation and with SDKD, training.seeds times each,
    and writes table, rows, pictures and report.html into the folder `out`.

    \b
    sdkd study traffic teacher=runs/teacher/student task.data=FOLDER training.seeds=5
    sdkd study my.yaml distillation.labels=0.25 jobs=2 --resume

    The settings, with what they may hold:

    \b
    task:          {name: apebench, navier_stokes, rayleigh_benard, traffic, taxibj or
                   weatherbench; the options of sdkd_plugin.study's task; bands: [0.25], edges}
    teacher:       a model folder; {path: FILE, model: NAME, arguments: {...}} for a checkpoint
                   of neuraloperator or tsl; or a list of these
    student:       {model: NAME, arguments: {...}}: UNet, ResNet, MLPMixer, GraphMixer, ...,
                   neuralop.fno, tsl.GRUGCNModel, ...; sizes of the data are filled in
    training:      seeds, steps, lr, batch_size, weight_decay, clip, validations
    distillation:  kd_weight, weighting, latents, labels, ...: options of SDKDDistiller
    out, jobs, device
    """
    return _work().study_run("study", settings, overrides, resume)


@_command
@_resume
def distill(settings: str, overrides: tuple[str, ...], resume: bool) -> dict[str, Any]:
    """Train one student, by a saved teacher or alone, and keep it in `out`/student.

    \b
    sdkd distill navier_stokes teacher=runs/teacher/student out=runs/ns
    sdkd distill traffic teacher=null student.model=GraphAlterNet out=runs/teacher

    The second trains a model on labels alone: a teacher, for instance. See "sdkd study --help" for
    the settings.
    """
    return _work().study_run("distill", settings, overrides, resume)


@_command
@click.option("--rollout", type=click.IntRange(1, 1000), metavar="STEPS", help="Also roll out.")
def evaluate(settings: str, overrides: tuple[str, ...], rollout: int | None) -> dict[str, Any]:
    """Errors of the student, its teachers and the baselines on the test samples.

    With --rollout also of STEPS forecasts in a row, each made from the one before, on a grid.

    \b
    sdkd evaluate runs/traffic
    sdkd evaluate runs/ns --rollout 3
    sdkd evaluate traffic model=runs/other/student task.data=FOLDER
    """
    return _work().evaluate(settings, overrides, rollout)


@_command
def export(settings: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Write the student as ONNX or for torch.export, in physical units, and check the file.

    \b
    sdkd export runs/traffic
    sdkd export runs/ns export.format=pt2
    sdkd export runs/ns export.int8=true
    """
    return _work().export(settings, overrides)


@_command
@click.option("--teacher", metavar="FOLDER", help="Instead of the settings' teacher.")
def benchmark(settings: str, overrides: tuple[str, ...], teacher: str | None) -> dict[str, Any]:
    """Time the student beside its teacher, with their errors.

    Times both, eager and as ONNX and int8 files, by batch size, and writes benchmark.md, .csv and
    .png into the folder `out`. Folders of other runs or models, given after the first, are further
    students of the same data.

    \b
    sdkd benchmark runs/traffic
    sdkd benchmark runs/width8 runs/width16 --teacher runs/teacher/student
    sdkd benchmark runs/ns benchmark.batch_sizes=[1,64] benchmark.threads=2

    \b
    benchmark:  batch_sizes; threads of the CPU; seconds for each time;
                forms: eager, compiled, onnx, int8
    """
    return _work().benchmark(settings, overrides, teacher)


@_command
def report(settings: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Write report.html, table and pictures of a finished run into its folder.

    \b
    sdkd report runs/traffic
    """
    return _work().report(settings, overrides)


@_printing
@click.argument("name", type=click.Choice(["traffic", "navier_stokes", "rayleigh_benard"]))
@click.argument("out")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
def simulate(name: str, out: str, options: tuple[str, ...]) -> dict[str, Any]:
    """Simulate data: a folder of traffic files, or an .npy file of trajectories.

    \b
    sdkd simulate traffic data/simulated n_sensors=50 days=7
    sdkd simulate navier_stokes data/ns.npy n_samples=200 viscosity=1e-3 resolution=32 duration=20
    """
    return _work().simulate(name, out, options)
