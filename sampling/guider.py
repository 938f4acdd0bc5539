"""The staged guider: the host's CFG guider on a model with stages; for SamplerCustomAdvanced and any sampler."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.samplers
from torch import Tensor

from ..loaders.protocols import Model
from .conditions import check_conditions
from .patch import add_stages, is_staged
from .stages import Stages


def staged_guider(
    model: Model, stages: Stages, positive: list, negative: list | None, cfg: float, title: str = "Staged Guider"
) -> StagedGuider:
    """A guider with its conditions and guidance scale; `negative` may be left out when CFG is 1."""
    guider = StagedGuider(model, stages, title)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


class StagedGuider(comfy.samplers.CFGGuider):
    """CFG guider whose context and reference tokens follow a schedule.

    Args:
        model: The host's MODEL.
        stages: The schedule, in the place of one that the model has.
        title: Display name of the node that makes it, for the run's messages.
    """

    def __init__(self, model: Model, stages: Stages, title: str = "Staged Guider"):
        super().__init__(model)
        self.stages = stages
        self.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
        add_stages(self.model_options, stages, title=title)

    def set_conds(self, positive: list, negative: list | None = None) -> None:
        """Takes and checks the conditions; `negative` may be left out when CFG is 1."""
        self.inner_set_conds({"positive": positive} | ({} if negative is None else {"negative": negative}))
        for name, conditions in self.original_conds.items():
            check_conditions(self.model_patcher, self.stages, conditions, name)

    def set_cfg(self, cfg: float) -> None:
        """Takes the guidance scale, after the conditions. Raises ValueError where it cannot be used."""
        if not 0 <= cfg <= 100:
            raise ValueError(f"CFG is {cfg:g}, expected 0 to 100.")
        super().set_cfg(cfg)
        if cfg != 1.0 and "negative" not in self.original_conds:
            raise ValueError(
                f"CFG is {cfg:g}, which compares with a negative condition, but none is connected. "
                "Connect one (an empty prompt will do), or set CFG to 1."
            )

    def predict_noise(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's, which sees the conditions of one stage. Raises RuntimeError outside a run."""
        if not is_staged(self.model_options):
            raise RuntimeError(
                "StagedGuider.predict_noise belongs to a run, whose sigmas say which stage a call is in. Call sample."
            )
        return super().predict_noise(x, timestep, *args, **kwargs)
