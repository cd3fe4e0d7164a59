"""Ties caches to one model: attention function, hooks and prefill chunk, and their removal."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvswap.core.errors import UnsupportedModelError
from kvswap.hf import attention
from kvswap.hf.families import QueryEstimator
from kvswap.hf.geometry import ModelShape, decoder_layers, read_shape

_BINDINGS: weakref.WeakKeyDictionary[PreTrainedModel, ModelBinding] = weakref.WeakKeyDictionary()


class ModelBinding:
    """What is changed on a model while at least one cache is attached to it.

    Parameters
    ----------
    model : PreTrainedModel
        Not patched: hooks, a registered attention function and one generation setting.

    Attributes
    ----------
    shape : ModelShape
    estimators : list of QueryEstimator or None
        By layer of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.shape: ModelShape = read_shape(model)
        layers = decoder_layers(model, self.shape)
        geometry = self.shape.geometry
        self.estimators = [
            QueryEstimator.build(
                layer,
                self.shape.model_type,
                num_heads=geometry.num_heads,
                head_dim=geometry.head_dim,
            )
            for layer in layers
        ]
        self._active = threading.local()  # what follows the forward that this thread runs
        self._model = weakref.ref(model)
        self._layers = layers
        self._holders = 0
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelBinding:
        """Return the binding of a model, made at the first call."""
        binding = _BINDINGS.get(model)
        if binding is None:
            binding = _BINDINGS[model] = cls(model)
        return binding

    @property
    def model(self) -> PreTrainedModel:
        """The model, which the binding itself does not keep alive."""
        model = self._model()
        assert model is not None, "a forward or a cache holds the model"
        return model

    def scaling(self, layer_idx: int) -> float:
        """Return the factor that a layer's attention puts on dot products."""
        attention_module = getattr(self._layers[layer_idx], "self_attn", None)
        given = getattr(attention_module, "scaling", None)
        return float(self.shape.geometry.head_dim**-0.5 if given is None else given)

    def acquire(self, prefill_chunk: int) -> None:
        """Install, for the first holder."""
        if not self._holders:
            self._install(self.model, prefill_chunk)
        self._holders += 1

    def _install(self, model: PreTrainedModel, prefill_chunk: int) -> None:
        self._stock = model.config._attn_implementation
        attention.register()
        name = attention.NAMES.get(self._stock, attention.NAMES["sdpa"])
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise UnsupportedModelError(
                self.shape.model_class, "it does not let its attention function be chosen"
            )
        self._hooks = [
            layer.register_forward_pre_hook(self._hook_for(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        for index, estimator in enumerate(self.estimators):
            if estimator is not None:
                self._watch_query(index, estimator)
        owner = _owner_of(model, self._layers[0])
        self._hooks.append(owner.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(self._layers[-1].register_forward_hook(self._after, with_kwargs=True))
        generation = getattr(model, "generation_config", None)
        self._chunk = getattr(generation, "prefill_chunk_size", None)
        self._named_cache = getattr(generation, "cache_implementation", None)
        if generation is not None:  # a checkpoint that names a cache makes generate refuse ours
            generation.cache_implementation = None
        # Before 5.0 generate's own chunks start at position 0 whatever the cache holds, and
        # count padding as tokens: there `KVSwapCache.prefill` is the way to bound memory.
        if generation is not None and not hasattr(model, "_prefill_chunking"):
            generation.prefill_chunk_size = prefill_chunk

    def release(self) -> None:
        """Remove, for the last holder."""
        self._holders -= 1
        model = self._model()
        if self._holders or model is None:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        model.set_attn_implementation(self._stock)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.prefill_chunk_size = self._chunk
            model.generation_config.cache_implementation = self._named_cache
        _BINDINGS.pop(model, None)

    def _hook_for(self, index: int) -> Any:
        def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._active.forwards = forwards = _forwards_in(args, kwargs)
            if forwards is not None:
                hidden = args[0] if args else kwargs["hidden_states"]
                forwards.before_layer(self, index, hidden, kwargs)

        return before_layer

    def _watch_query(self, index: int, estimator: QueryEstimator) -> None:
        """Follow a layer's query from where it is made, and the residual after attention."""
        watched = estimator.modules()

        def query_made(module: nn.Module, _: Any, output: Any) -> None:
            forwards = getattr(self._active, "forwards", None)
            # Within an adapter that has taken its place the output is not yet the query.
            if forwards is not None and estimator.ends_with(module):
                forwards.query_made(index, estimator, output)

        def attention_added(_: nn.Module, args: tuple[Any, ...]) -> None:
            forwards = getattr(self._active, "forwards", None)
            if forwards is not None and args:
                forwards.attention_added(index, args[0])

        self._hooks.append(watched.last.register_forward_hook(query_made))
        self._hooks.append(watched.after_attention.register_forward_pre_hook(attention_added))

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forwards = _forwards_in(args, kwargs)
        if forwards is not None:
            forwards.recover()

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        forwards = _forwards_in(args, kwargs)
        self._active.forwards = None
        if forwards is not None:
            forwards.after_layers()


def _owner_of(model: nn.Module, layer: nn.Module) -> nn.Module:
    """Return the module that runs the decoder layers, and makes their masks before."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(each is layer for each in child):
                return module
    raise AssertionError("decoder layers lie in a list of some module")


def _forwards_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what follows the cache that a layer is given; families name it differently."""
    for given in (kwargs.get("past_key_values"), *args, *kwargs.values()):
        forwards = getattr(given, "forwards", None)
        if forwards is not None:
            return forwards
    return None
