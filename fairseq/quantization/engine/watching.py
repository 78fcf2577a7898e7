"""Watching: whether someone sees what goes through modules, so that these must run one by one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch.nn.modules.module as module_globals
from torch import nn


def any_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether someone sees what goes through one of the modules, or has changed what it does."""
    if module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks:
        return True
    for module in modules:
        forward = module.__dict__.get("forward")  # some transformers put the method itself there after a call
        if module.training or (forward and getattr(forward, "__func__", None) is not type(module).forward):
            return True
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked and any(map(_active, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            return True
    return False


def _active(hook: Any) -> bool:
    """Whether a hook does something: those of transformers stay after the call that collected attentions is over."""
    recorder = sys.modules.get("transformers.utils.output_capturing")
    if recorder is None or getattr(hook, "__module__", None) != recorder.__name__:
        return True
    collector = getattr(recorder, "_active_collector", None)
    return collector is None or bool(set(collector.get() or ()) - {"hidden_states", "_hidden_states_layers"})
