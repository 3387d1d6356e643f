"""One training loop for the teacher, the student alone and every distillation loss."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdlib.batches import Rows, order
from kdlib.lab import cache

EVERY = 15.0  # seconds between two lines of a training that goes on
KEPT_EVERY = 15.0  # least seconds between two checkpoints
Loss = Callable[[nn.Module, Any, Any, float], Tensor]  # of model, output, batch, share of updates


@dataclass(frozen=True)
class Settings:
    """How to train. Rates are AdamW's peaks: up over the first `warmup` share of the steps, then
    down to 0, both straight."""

    steps: int = 600
    batch_size: int = 16
    encoder_rate: float = 1e-4
    head_rate: float = 1e-3
    crf_rate: float = 1e-2  # a CRF's few scores must move by whole units
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluations: int = 5
    precision: str = "no"  # accelerate's mixed precision: no, bf16, fp16
    seed: int = 0


def fit(
    model: nn.Module,
    data: Rows,
    loss: Loss,
    settings: Settings,
    evaluate: Callable[[], dict[str, float]] = dict,
    choose: str | None = None,
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place; returns the history, one row an evaluation.

    `loss(model, output, batch, progress)` is any scalar of what the model makes of a batch;
    progress is the share of the updates already made, from 0 to 1. Rows hold step, epoch, loss
    (mean since the last row), whatever `evaluate()` says of the model and seconds of training so
    far, evaluations not counted. With `choose`, the name of one of its scores, higher is better,
    the model is left as it was best; else as it was last. With `checkpoint`, a run that was killed
    goes on from one of its last evaluations (files are `KEPT_EVERY` seconds apart) and ends with
    the same numbers, and so does a loss that learns itself, which has a `state_dict` as
    `meta.Feedback` has. FloatingPointError, naming the step, when the loss is not finite. Under
    `accelerate launch` each batch is shared out among the processes.
    """
    if not data.lengths:
        raise ValueError("data: expected at least one sentence to learn from, got none")
    learns = hasattr(loss, "state_dict")
    if learns and settings.precision != "no":
        raise ValueError(
            f"precision: expected 'no' for a loss that learns itself, got {settings.precision!r}"
        )
    accelerator = Accelerator(mixed_precision=settings.precision)
    if learns and accelerator.num_processes > 1:
        raise ValueError(
            f"expected one process for a loss that learns itself, got {accelerator.num_processes}"
        )
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        _groups(model, settings), weight_decay=settings.weight_decay, fused=True
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = {"step": 0, "seconds": 0.0, "history": [], "best": None}
    stored = cache.read(checkpoint) if checkpoint else None
    if stored is not None:
        state = _resume(cache.unpacked(stored), model, optimizer, loss)
    evaluate_at = {
        round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)
    }
    per_epoch = math.ceil(len(data.lengths) / settings.batch_size)
    losses: list[float] = []
    batches, shuffled, told = [], None, time.perf_counter()
    kept = told
    wrapped.train()
    while state["step"] < settings.steps:
        start = time.perf_counter()
        epoch, position = divmod(state["step"], per_epoch)
        if epoch != shuffled:
            batches = order(data, settings.batch_size, settings.seed + 1000 * epoch)
            shuffled = epoch
        rows = batches[position]
        own = rows[accelerator.process_index :: accelerator.num_processes] or rows[:1]
        batch = data.collate(own).to(accelerator.device)
        _set_rate(optimizer, state["step"], settings)
        value = loss(model, wrapped(batch), batch, state["step"] / settings.steps)
        if not bool(value.isfinite()):
            raise FloatingPointError(
                f"loss is {value.item()} at step {state['step']} (epoch {epoch}) of {settings}"
            )
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        state["step"] += 1
        state["seconds"] += time.perf_counter() - start
        if time.perf_counter() - told > EVERY and state["step"] > 5:  # the first ones read more
            told = time.perf_counter()
            left = state["seconds"] / state["step"] * (settings.steps - state["step"])
            print(
                f"  {state['step']:,} of {settings.steps:,} updates, {left:.0f} s left", flush=True
            )
        if state["step"] in evaluate_at:
            row = {
                "step": state["step"],
                "epoch": state["step"] / per_epoch,
                "loss": sum(losses) / len(losses),
            }
            said = evaluate()
            state["history"].append(row | said | {"seconds": state["seconds"]})
            losses = []
            if choose and said[choose] >= max(row[choose] for row in state["history"]):
                state["best"] = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            due = time.perf_counter() - kept >= KEPT_EVERY
            if checkpoint and due and accelerator.is_main_process:
                kept = time.perf_counter()
                _save(checkpoint, state, model, optimizer, loss)
    if choose:
        model.load_state_dict(state["best"])
    model.eval()
    return state["history"]


def _groups(model: nn.Module, settings: Settings) -> list[dict]:
    """The model's own groups of parameters, each at its rate."""
    rates = {"encoder": settings.encoder_rate, "output": settings.head_rate}
    rates["crf"] = settings.crf_rate
    groups = [
        ([p for p in parameters if p.requires_grad], rates[name])
        for name, parameters in model.parameter_groups().items()
    ]
    return [{"params": own, "lr": rate, "peak": rate} for own, rate in groups if own]


def _set_rate(optimizer: torch.optim.Optimizer, step: int, settings: Settings) -> None:
    warm = max(1, round(settings.warmup * settings.steps))
    share = (settings.steps - step) / max(1, settings.steps - warm)
    share = (step + 1) / warm if step < warm else share
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def _save(
    checkpoint: Path, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss
) -> None:
    """All that the rest of the run depends on, random numbers included, in one file that is whole
    or absent."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    everything = state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    everything |= {"loss": loss.state_dict()} if hasattr(loss, "state_dict") else {}
    everything |= {"random": torch.get_rng_state(), "random_devices": devices}
    cache.write(checkpoint, cache.packed(everything))


def _resume(stored: dict, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> dict:
    model.load_state_dict(stored.pop("model"))
    optimizer.load_state_dict(stored.pop("optimizer"))
    if "loss" in stored:
        loss.load_state_dict(stored.pop("loss"))
    torch.set_rng_state(stored.pop("random"))
    devices = stored.pop("random_devices")
    if devices:
        torch.cuda.set_rng_state_all(devices)
    return stored
