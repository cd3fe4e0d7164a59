"""A model without its weights: what its config says, and a shortened stand-in to time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvswap.core.errors import UnsupportedModelError
from kvswap.hf.geometry import ModelShape, shape_of
from kvswap.kernels.records import DTYPES
from kvswap.tune.synthetic import random_weights

DISK_LAYERS = 4
"""Of a shortened model, at most: the first, the last, and two that stand for all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """What is known of a model from its config alone.

    Attributes
    ----------
    config : PreTrainedConfig
    shape : ModelShape
    weight_bytes : int
        Of all its parameters.
    """

    config: Any
    shape: ModelShape
    weight_bytes: int

    @classmethod
    def of(cls, config: Any, *, dtype: str) -> ModelOutline:
        """Read a config; parameters are counted, none is made.

        Parameters
        ----------
        config : PreTrainedConfig
        dtype : str
            Of the weights, as torch names it.

        Raises
        ------
        UnsupportedModelError
            If the model cannot be served, its config lacks a field, or it is none that
            generates text.
        """
        name = (getattr(config, "architectures", None) or [config.model_type])[0]
        shape = shape_of(config, dtype=dtype, model_class=name)
        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # the libraries raise anything
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UnsupportedModelError(
                name, f"it cannot be made of its config: {first}"
            ) from error
        numbers = sum(parameter.numel() for parameter in model.parameters())
        return cls(config=config, shape=shape, weight_bytes=numbers * DTYPES[dtype].itemsize)

    def shortened(self, *, device: str = "cpu") -> PreTrainedModel:
        """Make a model of the same layers, but few of them, with random weights.

        Raises
        ------
        UnsupportedModelError
            If what is made of the shortened config has other layers.
        """
        shape = self.shape
        disk = shape.disk_layers[:DISK_LAYERS]
        config = shorten(self.config, disk[-1] + 1)
        made = random_weights(config, dtype=DTYPES[shape.geometry.dtype], device=device)
        found = shape_of(config, dtype=shape.geometry.dtype, model_class=shape.model_class)
        if found.disk_layers != disk:
            raise UnsupportedModelError(shape.model_class, "its config cannot be shortened")
        return made


def shorten(config: Any, num_layers: int) -> Any:
    """Return a config of a model's first layers.

    Parameters
    ----------
    config : PreTrainedConfig
        Left as it is.
    num_layers : int
        Lists with an entry for each layer are cut to it.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config(decoder=True)
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before > num_layers:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return made
