"""The dense part of a step through Intel Extension for PyTorch. Nothing else knows about it.

The extension ended with torch 2.8 and loads beside no other. It rewrites modules, parameters and
optimizers in place; so it is given a copy of the MLPs to train, and the model's own parameters
are brought up to date whenever somebody looks at them.
"""

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqrm.comm.backends import probe_ipex
from dqrm.config import RunConfig
from dqrm.data.batch import Batch
from dqrm.models.dlrm import DLRM
from dqrm.training.optimizer import Optimizer, dense_optimizer, rate_factor


def check_ipex(config: RunConfig) -> None:
    """Refuse ``train.optimize=ipex`` where it cannot work.

    Raises:
        ValueError: the extension is not there or not for this torch, or a setting is not for it;
            the message says what to do.
    """
    if config.train.optimize != "ipex":
        return
    found = probe_ipex()
    if not found.usable:
        raise ValueError(
            f"train.optimize=ipex: Intel Extension for PyTorch is {found.detail}. It ended with "
            "torch 2.8 and wants an environment of its own (README, Intel extension); here, "
            "train.optimize=default is the way"
        )
    optim = config.optim
    for key, value, wanted, reason in (
        ("quant.mlp_bits", config.quant.mlp_bits, 32, "it replaces plain linear layers only"),
        ("optim.weight_decay", optim.weight_decay, 0.0, "its weights are split in two halves"),
        ("optim.clip_norm", optim.clip_norm, None, "its gradients are in bfloat16"),
    ):
        if value != wanted:
            text = "null" if wanted is None else wanted
            raise ValueError(f"{key}={value}: with train.optimize=ipex it must be {text}: {reason}")


class IpexStep:
    """A step whose MLPs and interaction went through ``ipex.optimize``.

    Args:
        model: to train; its MLPs are copied, and follow when it is evaluated or saved.
        optimizer: of that model; the state of its dense part follows likewise.
        bf16: bfloat16 autocast, and weights split into a bfloat16 and a rest.
    """

    def __init__(self, model: DLRM, optimizer: Optimizer, *, bf16: bool) -> None:
        ipex: Any = importlib.import_module("intel_extension_for_pytorch")
        self.optimizer = optimizer
        self.bf16 = bf16
        parts = (model.bot_l, model.interaction, model.top_l)
        dense = _Dense(*(copy.deepcopy(part) for part in parts)).train()
        dtype = torch.bfloat16 if bf16 else torch.float32
        self._dense, self._inner = ipex.optimize(
            dense,
            optimizer=dense_optimizer(list(dense.parameters()), optimizer.config, fused=False),
            dtype=dtype,
            inplace=True,
        )
        self._targets = dict(_Dense(*parts).named_parameters())
        self._load_state()
        self._ahead = False
        model.register_forward_pre_hook(lambda *_: self._write_back())
        hooked: Any = model
        hooked.register_state_dict_pre_hook(lambda *_: self._write_back())

    def __call__(self, batch: Batch, step: int) -> float:
        """Forward, backward, update."""
        from dqrm.training.step import check_loss

        config, collection = self.optimizer.config, self.optimizer.collection
        pooled = torch.empty(batch.label.numel(), len(collection.tables), collection.embedding_dim)
        collection.lookup(batch.indices, batch.offsets, pooled)
        pooled.requires_grad_()
        self._inner.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self._dense(batch.dense, pooled)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), batch.label)
        value = check_loss(loss.item(), step)
        loss.backward()  # type: ignore[no-untyped-call]
        factor = rate_factor(step, config)
        for group in self._inner.param_groups:
            group["lr"] = config.lr * factor
        self._inner.step()
        self._ahead = True
        assert pooled.grad is not None
        rate = (config.embedding_lr or config.lr) * factor
        self.optimizer.rows.update(batch.indices, batch.offsets, pooled.grad, rate)
        return value

    def _load_state(self) -> None:
        """Go on with the state of a checkpoint, if one was loaded."""
        outer = self.optimizer.dense.state
        state = [copy.deepcopy(outer.get(parameter, {})) for parameter in self._targets.values()]
        if any(state):
            whole = self._inner.state_dict()
            whole["state"] = dict(enumerate(state))
            self._inner.load_state_dict(whole)

    @torch.no_grad()
    def _write_back(self) -> None:
        """Copy the trained parameters, joined to FP32, and their state to where others look."""
        if not self._ahead:
            return
        self._ahead = False
        trained, state = self._dense.state_dict(), self._inner.state_dict()["state"]
        for number, (name, parameter) in enumerate(self._targets.items()):
            parameter.copy_(trained[name])
            if number in state:
                self.optimizer.dense.state[parameter] = copy.deepcopy(state[number])


class _Dense(nn.Module):
    """What of a DLRM comes after the look-up."""

    def __init__(self, bottom: nn.Module, interaction: nn.Module, top: nn.Module) -> None:
        super().__init__()
        self.bottom = bottom
        self.interaction = interaction
        self.top = top

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        logits: Tensor = self.top(self.interaction(self.bottom(dense), pooled))
        return logits.squeeze(1)
