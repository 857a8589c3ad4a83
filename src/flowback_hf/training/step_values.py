# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What a run knows of its steps, kept on the device until somebody looks."""

import torch
from accelerate import Accelerator


class StepValues:
    """
    The losses of the last step, and the first step that failed.

    Reading a number makes the host wait for the device, which then waits for the host. Until [`read`] nothing is read.

    Args:
        accelerator (`accelerate.Accelerator`): Its device, and the processes whose values are averaged.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.names: list[str] = []
        self._batches: list[torch.Tensor] = []
        self._step: tuple[torch.Tensor, torch.Tensor] | None = None
        # number, loss and gradient norm of the first step that was not finite
        self._failure = torch.zeros(3, device=accelerator.device)

    @property
    def num_batches(self) -> int:
        """How many batches of the running step there were."""
        return len(self._batches)

    def add(self, scalars: dict[str, torch.Tensor]):
        """Keep the scalars of a batch, the first of which is the loss."""
        self.names = list(scalars)
        self._batches.append(torch.stack(list(scalars.values())))

    def end_step(self, step: int, gradient_norm: torch.Tensor) -> torch.Tensor:
        """
        End a step, before its gradient changes the weights.

        Args:
            step (`int`): Its number, from 1.
            gradient_norm (`torch.Tensor`): Of the gradient that all processes share.
        Returns:
            `torch.Tensor`: 1.0 if this step or one before it failed, else 0.0: what AdamW takes as `found_inf`.
        """
        batches = torch.stack(self._batches)
        self._batches = []
        gradient_norm = gradient_norm.float()
        self._step = batches, gradient_norm
        loss = batches[:, 0].mean()
        # Loss scaling of fp16 meets infinite gradients and skips their steps by itself.
        judged = gradient_norm if self.accelerator.scaler is None else loss
        failure = torch.stack([torch.full_like(loss, step), loss, gradient_norm])
        is_first = ~judged.isfinite() & (self._failure[0] == 0)
        self._failure = torch.where(is_first, failure, self._failure)
        return (self._failure[0] > 0).float()

    def read(self) -> dict[str, float]:
        """
        Read the last step. Called by every process.

        Returns:
            `dict`: the scalars' means over all batches and processes, or the largest of those whose names begin with
            `max_`, and `gradient_norm`.
        Raises:
            FloatingPointError: if the loss or the gradient of a step was not finite.
        """
        batches, gradient_norm = self._step
        own = torch.cat([batches.flatten(), gradient_norm[None], self._failure])
        everyone = self.accelerator.gather(own[None])
        batches = everyone[:, : batches.numel()].reshape(-1, len(self.names))
        largest = everyone[:, -4:].amax(dim=0)
        is_maximum = torch.tensor([name.startswith("max_") for name in self.names], device=batches.device)
        scalars = torch.where(is_maximum, batches.amax(dim=0), batches.mean(dim=0))
        *scalars, gradient_norm, step, loss, norm = torch.cat([scalars, largest]).tolist()
        if step:
            raise FloatingPointError(
                f"Step {step:.0f}: the loss is {loss} and the gradient's norm {norm}. Training stopped before this"
                " step changed the weights."
            )
        return dict(zip(self.names, scalars)) | {"gradient_norm": gradient_norm}
