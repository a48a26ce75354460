"""Measures a training step of a small GPT: forward, backward and optimizer.

The model has pre-norm layers of `flexmoba.nn.MobaAttention` and an MLP of four times the width. The
step is that of a usual training loop: autocast, compiled layers, and an eager fused AdamW.
"""

import functools
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba.bench.baselines import try_to_time
from flexmoba.bench.calls import call_ms
from flexmoba.bench.configs import Config
from flexmoba.nn import FlexMoba, MobaAttention

_VOCABULARY = 32768
# Allowed relative differences of two computations of a loss and of the norm of a gradient. The loss
# of random parameters depends little on the attention; the gradient of its projection does.
_LOSS_DIFFERENCE, _GRADIENT_DIFFERENCE = 1e-3, 2e-2


class Dense(FlexMoba):
    """Full attention by `scaled_dot_product_attention`, in the place of a `FlexMoba`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Returns the causal attention of every query, ``(B, Hq, L, Dv)``."""
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


class _Layer(nn.Module):
    def __init__(self, config: Config, topk: int | None, attention: type[FlexMoba]) -> None:
        super().__init__()
        dim = config.heads * config.head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.attention = MobaAttention(
            dim,
            config.heads,
            config.kv_heads,
            block_size=config.block_size,
            topk=topk,
            rope_base=10000,
        )
        self.attention.moba = attention(config.block_size, topk)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class _Head(nn.Module):
    """The last norm and the projection to logits; returns the mean loss of the next tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.project = nn.Linear(dim, _VOCABULARY, bias=False)

    def forward(self, x: Tensor, following: Tensor) -> Tensor:
        logits = self.project(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


class GPT(nn.Module):
    """A GPT whose call returns the loss of predicting each token from the ones before it."""

    def __init__(
        self, config: Config, topk: int | None, attention: type[FlexMoba] = FlexMoba
    ) -> None:
        """Makes a model of the sizes of a configuration, with random parameters."""
        super().__init__()
        dim = config.heads * config.head_dim
        self.embedding = nn.Embedding(_VOCABULARY, dim)
        self.layers = nn.ModuleList(_Layer(config, topk, attention) for _ in range(config.layers))
        self.head = _Head(dim)

    def compile_parts(self) -> None:
        """Compiles the layers, which are alike and need one compilation, and the head."""
        for part in (*self.layers, self.head):
            part.compile(fullgraph=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss of ``tokens (B, L + 1)`` int64."""
        x = self.embedding(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        loss: Tensor = self.head(x, tokens[:, 1:])
        return loss


def measure_training(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measures a training step with MoBA and, beside it, with full attention.

    Args:
        config: The configuration, of which ``layers`` is not 0.
        device: Device of the model.
        dtype: Dtype of autocast; float32 for no autocast.

    Returns:
        ``error``, as a share of the difference that is allowed, and ``allowed``, 1: of the compiled
        and the eager loss, and of the loss and a gradient with full attention of flexmoba and of
        torch. If the error is allowed, also median milliseconds by name, with ``"topk=None"`` for
        full attention of flexmoba.
    """
    settings: dict[str, int | None] = {"flex_moba": config.topk}
    if config.dense != "nothing":
        settings |= {"topk=None": None, "SDPA": None}
    results: dict[str, tuple[float, float]] = {}
    differences: list[float] = []
    times: dict[str, float] = {}
    for name, topk in settings.items():
        torch.manual_seed(0)
        torch.compiler.reset()  # the limit of recompilations counts all models
        with device:
            model = GPT(config, topk, Dense if name == "SDPA" else FlexMoba)
            tokens = torch.randint(_VOCABULARY, (config.batch, config.length + 1))
        with torch.no_grad():
            eager = float(_loss(model, tokens, dtype))
        model.compile_parts()
        loss = _loss(model, tokens, dtype)
        loss.backward()
        gradient = model.get_parameter(f"layers.{config.layers - 1}.attention.o_proj.weight").grad
        assert gradient is not None
        results[name] = float(loss.detach()), float(torch.linalg.vector_norm(gradient))
        differences.append(_relative(results[name][0], eager) / _LOSS_DIFFERENCE)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = functools.partial(_step, model, tokens, dtype, optimizer)
        times |= try_to_time(name, functools.partial(call_ms, step, device))
        del model, optimizer, step, loss, gradient  # before the next model is made
    if "SDPA" in results:
        (loss_here, gradient_here), (loss_there, gradient_there) = (
            results[name] for name in ("topk=None", "SDPA")
        )
        differences.append(_relative(loss_here, loss_there) / _LOSS_DIFFERENCE)
        differences.append(_relative(gradient_here, gradient_there) / _GRADIENT_DIFFERENCE)
    result = {"error": max(differences), "allowed": 1.0}
    return result | {"training_ms": times} if result["error"] <= 1 else result


def _relative(x: float, y: float) -> float:
    """Returns the relative difference; a NaN counts as the largest float."""
    difference = abs(x - y) / abs(y) if y else abs(x - y)
    return difference if math.isfinite(difference) else sys.float_info.max


def _loss(model: GPT, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    half = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(tokens.device.type, dtype if half else None, enabled=half):
        loss: Tensor = model(tokens)
    return loss


def _step(model: GPT, tokens: Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer) -> None:
    _loss(model, tokens, dtype).backward()
    optimizer.step()
    optimizer.zero_grad()
