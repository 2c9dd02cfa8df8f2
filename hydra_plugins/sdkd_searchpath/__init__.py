"""Lets every Hydra application find the config groups of sdkd_plugin.

Hydra imports whatever lies in the namespace package ``hydra_plugins``, at the start of every
application of the environment. So nothing slow is imported here: neither sdkd_plugin nor PyTorch.
"""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


class SDKDSearchPath(SearchPathPlugin):
    """Puts sdkd_plugin's configs last in the search path: an application's own come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder of the configs, where sdkd_plugin is installed as files."""
        # Finding a package does not import it. A ``pkg://`` path would.
        spec = find_spec("sdkd_plugin")
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).with_name("conf")
            # Not `as_uri()`: Hydra takes what follows the scheme as it is, escapes included.
            search_path.append(provider="sdkd_plugin", path=f"file://{folder}")
        # Our configs repeat no defaults, so Hydra must not demand a `+` before an option that it
        # does not see. YAML cannot say so; `make_model` and `loss_from_config` refuse unknown ones.
        hparams, options = OmegaConf.create({"hparams": {}}), OmegaConf.create({"distill": {}})
        for name, node in (("hparams", hparams), ("distill", options)):
            OmegaConf.set_struct(node[name], False)
            ConfigStore.instance().store(group="sdkd", name=f"any_{name}", node=node)
