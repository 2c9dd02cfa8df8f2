"""Config groups, names and options: found by any Hydra application, and nothing else is made."""

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from torch import nn

from sdkd_plugin import AdaptiveWeighting, DistillationLoss, GraphTransform
from sdkd_plugin.adapters.tsl import (
    SDKDStudent,
    SDKDTeacher,
    get_model_class,
    get_optimizer_class,
    get_scheduler_class,
    loss_from_config,
    make_model,
    refuse_targets,
)
from sdkd_plugin.models import GraphAlterNet, GraphMixer

from tsl.nn import models  # isort: skip  # after the adapter

CONF = Path(__file__).parents[1] / "sdkd_plugin/conf"
RING = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])

# The groups of tsl's traffic experiment: its models are put at the root of the configuration.
TSL_TREE = {
    "default.yaml": """
        defaults: [_self_, {logger: null}, {dataset: la}, {model: dcrnn}]
        seed: 42
        tags: [traffic, "${model.name}", "${dataset.name}"]
        workers: 0
        logger: null
        window: 12
        horizon: 6
        stride: 1
        epochs: 300
        patience: 50
        batch_size: 64
        grad_clip_val: 5
        scale_target: false
        optimizer: {name: Adam, hparams: {lr: 0.01}}
        lr_scheduler: null
        """,
    "dataset/la.yaml": """
        # @package _global_
        dataset: {name: la, connectivity: {method: distance, layout: edge_index}}
        """,
    "model/dcrnn.yaml": """
        # @package _global_
        model: {name: dcrnn, hparams: {hidden_size: 64}}
        lr_scheduler: {name: MultiStepLR, hparams: {gamma: 0.1, milestones: [20, 30]}}
        """,
    "logger/tensorboard.yaml": "backend: tensorboard",
}


class Tapped(nn.Module):
    """A teacher with a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.latent(x)


def loss_of(config: Any) -> DistillationLoss:
    return loss_from_config(config, Tapped(), RING, None, 4)


def write_tree(folder: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = textwrap.dedent(text).strip() + "\n"
        (folder / name).write_text(lines)
    return folder


def run_app(folder: Path, code: str, *arguments: str) -> str:
    (folder / "app.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "app.py", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_any_hydra_application_sees_the_groups_at_no_cost(tmp_path):
    tree = {
        "config.yaml": "window: 6\ndefaults: [{model: own}, _self_]",
        "model/own.yaml": "name: own",
        "model/sdkd_teacher.yaml": "name: mine",
    }
    write_tree(tmp_path / "conf", tree)
    code = """
        import json, sys
        import hydra
        from omegaconf import OmegaConf

        @hydra.main(config_path="conf", config_name="config", version_base=None)
        def main(cfg):
            loaded = [name for name in ("torch", "sdkd_plugin") if name in sys.modules]
            print(json.dumps([OmegaConf.to_container(cfg, resolve=True), loaded]))

        main()
        """
    shown = run_app(
        tmp_path, code, "model=sdkd_student", "+model@big=sdkd_teacher", "+sdkd/distill=adaptive"
    )
    config, loaded = json.loads(shown)
    assert config["model"]["name"] == "sdkd_student"
    assert config["model"]["hparams"]["window"] == 6
    assert config["big"] == {"name": "mine"}  # an application's own configs come first
    assert config["sdkd"]["distill"]["weighting"] == "adaptive"
    assert loaded == []


def test_a_tsl_experiment_takes_our_models(tmp_path):
    write_tree(tmp_path / "config", TSL_TREE)
    code = """
        import json, os, sys, warnings
        import sdkd_plugin.adapters.tsl
        assert "hydra" not in sys.modules
        filters = list(warnings.filters)
        from sdkd_plugin.adapters.tsl.experiment import Experiment
        assert warnings.filters == filters
        from pytorch_lightning import loggers
        import tsl.experiment
        assert tsl.experiment.Experiment is Experiment

        def run(cfg):
            saved = os.path.exists(os.path.join(cfg.run.dir, "config.yaml"))
            return [cfg.model.name, cfg.model.hparams.window, cfg.sdkd.distill.kd_weight, saved]

        result = Experiment(run_fn=run, config_path="config", config_name="default").run()
        if not hasattr(loggers, "NeptuneLogger"):  # Lightning from 2.6.5 on
            message = ""
            try:
                tsl.experiment.NeptuneLogger()
            except ValueError as error:
                message = str(error)
            assert "`NeptuneLogger` is not part of this pytorch-lightning" in message
        print(json.dumps(result))
        """
    shown = run_app(
        tmp_path, code, "model=sdkd_student", "+sdkd/distill=default", "sdkd.distill.kd_weight=3"
    )
    assert json.loads(shown.splitlines()[-1]) == ["sdkd_student", 12, 3, True]


def test_groups_compose_with_tsls_tree(tmp_path):
    write_tree(tmp_path, TSL_TREE)
    with initialize_config_dir(str(tmp_path), version_base=None):
        overrides = ["model=sdkd_teacher", "+sdkd/distill=plain_mse", "logger=tensorboard"]
        cfg = compose("default", overrides)
        assert cfg.model.name == "sdkd_teacher"
        assert cfg.lr_scheduler is None
        assert cfg.tags == ["traffic", "sdkd_teacher", "la"]
        assert cfg.dataset.connectivity.method == "distance"
        model = make_model(
            cfg.model.name, {"input_size": 1, "n_nodes": 4, "horizon": 6}, cfg.model.hparams
        )
        assert isinstance(model, SDKDTeacher)
        loss = loss_of(cfg.sdkd.distill)
        assert loss.frequency.weighting.weights.tolist() == [1.0, 1.0]
        with pytest.raises(ConfigCompositionException, match="sdkd_student") as refused:
            compose("default", ["model=sdkd_studnt"])
        assert "sdkd_teacher" in str(refused.value)
        with pytest.raises(ConfigCompositionException, match="adaptive"):
            compose("default", ["+sdkd/distill=adaptiv"])


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("sdkd/distill/*.yaml")))
def test_every_distill_group_makes_a_loss_and_takes_any_option(name, tmp_path):
    write_tree(tmp_path, {"config.yaml": f"defaults: [_self_, {{sdkd/distill: {name}}}]"})
    with initialize_config_dir(str(tmp_path), version_base=None):
        options = compose("config", ["sdkd.distill.kd_weight=3"]).sdkd.distill
    assert loss_of(options).kd_weight == 3.0
    if name == "default":
        assert set(options) == {"teacher", "kd_weight"}


@pytest.mark.parametrize(
    ("name", "network"), [("sdkd_student", GraphMixer), ("sdkd_teacher", GraphAlterNet)]
)
def test_any_hparam_reaches_the_model_and_an_unknown_one_is_refused(
    name, network, tmp_path, monkeypatch
):
    taken = inspect.signature(network).parameters
    made = []

    def record(self, **arguments):
        nn.Module.__init__(self)
        self.taps = {}
        made.append(arguments)

    monkeypatch.setattr(network, "__init__", record)
    write_tree(tmp_path, {"config.yaml": f"defaults: [_self_, {{model: {name}}}]\nwindow: 6"})
    sizes = {"n_nodes": 4, "horizon": 6}
    with initialize_config_dir(str(tmp_path), version_base=None):
        for option in taken:
            cfg = compose("config", [f"model.hparams.{option}=7"])
            make_model(name, sizes, cfg.model.hparams)
            assert made.pop() == {**sizes, "window": 6, option: 7}
        cfg = compose("config", ["+model.hparams.hiden_size=8"])
    with pytest.raises(ValueError, match=r"'hiden_size', expected one of .*'dropout'.* 'hidden_si"):
        make_model(name, sizes, cfg.model.hparams)


def test_models_are_known_by_tsls_names_and_ours():
    assert get_model_class("sdkd_student") is SDKDStudent
    assert get_model_class("sdkd_teacher") is SDKDTeacher
    assert get_model_class("gwnet") is models.GraphWaveNetModel
    assert get_model_class("grugcn") is get_model_class("GRUGCNModel") is models.GRUGCNModel
    for name in models.classes:
        if name != "BaseModel":
            assert get_model_class(name) is getattr(models, name)
    with pytest.raises(ValueError, match=r"`model.name` is 'gwnt', expected.*Did you mean 'gwnet'"):
        get_model_class("gwnt")
    with pytest.raises(ValueError, match=r"'sdkd_student', 'sdkd_teacher', .*'dcrnn'"):
        get_model_class("os.system")


def test_optimizers_and_schedulers_are_torchs():
    assert get_optimizer_class("AdamW") is torch.optim.AdamW
    assert get_scheduler_class("MultiStepLR") is torch.optim.lr_scheduler.MultiStepLR
    with pytest.raises(ValueError, match=r"`optimizer.name` is 'Adm'.*Did you mean 'Adam'"):
        get_optimizer_class("Adm")
    # Names of the module that are no optimizer: its base class, a submodule, what it imports.
    for name in ("Optimizer", "lr_scheduler", "swa_utils", "__builtins__"):
        with pytest.raises(ValueError, match="expected one of"):
            get_optimizer_class(name)
    for name in ("LRScheduler", "Optimizer", "Counter", "partial"):
        with pytest.raises(ValueError, match=r"`lr_scheduler\.name`"):
            get_scheduler_class(name)


def test_a_model_gets_the_sizes_and_options_that_it_takes():
    sizes = {"input_size": 1, "output_size": 1, "n_nodes": 4, "horizon": 6, "exog_size": 0}
    rnn = make_model("rnn", sizes, {"hidden_size": 8})
    assert isinstance(rnn, models.RNNModel)
    with pytest.raises(ValueError, match=r"`model.hparams of rnn` is 'hiden_size'.*'hidden_size'"):
        make_model("rnn", sizes, {"hiden_size": 8})
    with pytest.raises(ValueError, match=r"of sdkd_student: missing a required .*'window'; add"):
        make_model("sdkd_student", sizes, {})


def test_targets_are_refused_wherever_they_are():
    config = OmegaConf.create({"a": [{"b": 1}, {"_target_": "os.system"}], "c": "_target_"})
    with pytest.raises(ValueError, match=r"`config.a\[1\]._target_` is 'os.system'"):
        refuse_targets(config)
    refuse_targets({"c": "_target_", "d": [1, {"e": None}]})


def test_options_become_a_loss():
    loss = loss_of(
        OmegaConf.create(
            {
                "kd_weight": 2,
                "cutoff": [0.25, 0.5],
                "weighting": "adaptive",
                "latents": [{"student": "latent", "weight": 1, "teacher_index": 0}],
                "normalization": "combinatorial",
            }
        )
    )
    assert loss.bands.edges == (0.25, 0.5)
    assert isinstance(loss.frequency.weighting, AdaptiveWeighting)
    assert loss.kd_weight == 2.0
    (pair,) = loss.latents
    assert (pair.weight, pair.teacher_index) == (1.0, 0)
    wanted = GraphTransform.from_edges(RING, None, 4, normalization="combinatorial")
    assert torch.equal(loss.transform.frequencies, wanted.frequencies)
    default = DistillationLoss(Tapped(), GraphTransform.from_edges(RING, None, 4))
    assert loss_of({}).bands == default.bands
    assert loss_of({"cutoff": 0.5, "transition": 0.2}).bands.transition == 0.2


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight": 1}, "an option of sdkd.distill` is 'weight', expected one of .*'kd_weight'"),
        ({"kd_weight": -1.0}, "`kd_weight` is -1.0"),
        ({"cutoff": 1.5}, r"`edges` is \(1.5,\), expected cutoffs inside"),
        ({"weighting": "adaptiv"}, "`weighting` is 'adaptiv'.*Did you mean 'adaptive'"),
        ({"weighting": [1.0, 1.0, 1.0]}, "`weights` has 3 values, expected 2"),
        ({"aggregation": "median"}, r"`aggregation` is 'median', expected one of \['mean'"),
        ({"normalization": "random_walk"}, r"expected one of \['symmetric', 'combinatorial'\]"),
        ({"symmetrization": "min"}, r"expected one of \['mean', 'max', 'refuse'"),
        ({"latents": [{"tap": "latent"}]}, r"`a field of sdkd.distill.latents` is 'tap'"),
        ({"latents": [{"loss": "mse"}]}, r"`LatentPair.loss` is 'mse', expected one of"),
    ],
)
def test_a_wrong_option_lists_the_right_ones(config, message):
    with pytest.raises(ValueError, match=message):
        loss_of(OmegaConf.create(config))
