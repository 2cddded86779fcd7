"""Two models from the same weights, plain and mhc, trained in turn on the same batches."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import mhc_compile
import mhc_compile.results
from mhc_compile.errors import MhcError
from mhc_compile.tools.demo import HEAD, PATCH
from mhc_compile.tools.demo.data import stable_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from mhc_compile.tools.demo import Settings
    from mhc_compile.tools.demo.data import NextByte

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
#: Steps over which the learning rate rises, and steps between two validations.
WARM_UP, EVERY = 100, 100


def build_model(settings: Settings, classes: int) -> nn.Module:
    """Build a model of transformers from a small configuration, its weights from the seed alone.

    Its forward takes ids int64 [batch, context] and returns `.logits` [batch, context, classes]
    (gpt2, llama), or images float32 [batch, 1, side, side] and `.logits` [batch, classes] (vit).

    Weights begin with deviation 1 / sqrt(width). The 0.02 of these configurations fits a width of
    2,500; in narrow models it starves the plain one, and the comparison would not be fair.
    """
    import transformers

    torch.manual_seed(stable_seed("weights", settings.seed))
    context, width, p = settings.context, settings.width, settings.dropout
    start = {"initializer_range": width**-0.5}
    language: dict[str, Any] = {"vocab_size": classes, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    sizes: dict[str, Any]
    if settings.model == "gpt2":
        sizes = {"n_positions": context, "n_embd": width, "n_layer": settings.layers, "n_head": width // HEAD}
        gpt2 = transformers.GPT2Config(**language, **sizes, **start, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p)
        return transformers.GPT2LMHeadModel(gpt2)
    sizes = {"hidden_size": width, "num_hidden_layers": settings.layers, "num_attention_heads": width // HEAD}
    if settings.model == "llama":
        sizes |= {"num_key_value_heads": width // HEAD, "intermediate_size": 8 * width // 3 // 8 * 8}
        llama = transformers.LlamaConfig(
            **language, **sizes, **start, max_position_embeddings=context, attention_dropout=p
        )
        return transformers.LlamaForCausalLM(llama)
    sizes |= {"image_size": PATCH * math.isqrt(context), "patch_size": PATCH, "num_channels": 1}
    sizes |= {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p, "num_labels": classes}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **start, intermediate_size=4 * width))


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms inside this context; a step is as fast.

    Without them Inductor sums the gradient of an embedding with atomic additions, in the order in
    which the threads arrive: after about ten steps two runs differ in the last bit of the loss.
    """
    memory: Any = torch.utils.deterministic  # its attribute is a property of a module, which mypy does not see
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill


def learning_rate(step: int, peak: float) -> float:
    """Return the rate of `step`: a linear rise over 100 steps, then peak · sqrt(100 / step).

    A run that is continued with more steps has the rates of one long run.
    """
    return peak * min((step + 1) / WARM_UP, math.sqrt(WARM_UP / (step + 1)))


class Trainer:
    """A model under `torch.compile`, its optimizer, and its measurements.

    `model` has its hyper-connections already, so that the optimizer has all parameters;
    `preparation` is seconds of earlier work that belong to the compilation.
    """

    def __init__(self, model: nn.Module, backend: str, options: dict[str, Any] | None, preparation: float) -> None:
        self.model = model
        self.compiled = torch.compile(model, backend=backend, options=options)
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        self.losses: list[float] = []  # of training, of every step before its update, in nats
        self.seconds: list[float] = []  # duration of every step
        self.starts = [(0, preparation)]  # first step and preparation of every process of the run

    def compile(self, inputs: Tensor, targets: Tensor) -> None:
        """Compile the step on tensors as `train` takes them; no parameter changes."""
        step, preparation = self.starts[-1]
        begin = time.perf_counter() - preparation
        self._loss(inputs, targets).backward()
        self.optimizer.zero_grad()
        self.starts[-1] = step, time.perf_counter() - begin

    def train(self, inputs: Tensor, targets: Tensor, *, seed: int, lr: float) -> float:
        """Train one step with clipping and AdamW. Return the loss before the update, in nats.

        `targets`, int64, have the shape of the logits without the last axis; `seed` is for dropout.
        """
        begin = time.perf_counter()
        torch.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)
        return self.losses[-1]

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.compiled(inputs).logits.flatten(0, -2), targets.flatten())

    def evaluate(self, batches: list[tuple[Tensor, Tensor]], *, dropout: bool) -> float:
        """Return the mean loss over `batches`, in nats, without `dropout` if the model has any.

        Without any, the graph of the training gives the same: nothing else has to be compiled.
        """
        self.model.train(not dropout)
        with torch.set_grad_enabled(not dropout):
            loss = statistics.fmean(self._loss(*batch).item() for batch in batches)
        self.model.train()
        return loss

    @property
    def step_seconds(self) -> float:
        """Median of the steps, if possible without the first three of each process."""
        cold = {start + i for start, _ in self.starts for i in range(3)}
        warm = [seconds for step, seconds in enumerate(self.seconds) if step not in cold]
        return statistics.median(warm or self.seconds)

    @property
    def compile_seconds(self) -> list[float]:
        """Preparation of each process of the run that trained, with the compilation."""
        return [preparation for step, preparation in self.starts if step < len(self.seconds)]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, and the history."""
        history = {"losses": self.losses, "seconds": self.seconds, "starts": self.starts}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` in another process."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])
        self.starts = [*state["starts"], (len(self.losses), self.starts[-1][1])]


class PairedTraining:
    """The plain model and the one with hyper-connections, trained in turn from the same weights.

    They differ in the backend alone. The second has its hyper-connections attached before the first
    call, so that a checkpoint can be loaded into them.
    """

    def __init__(self, settings: Settings, task: NextByte) -> None:
        self.settings, self.task, self.held_out = settings, task, task.validation()
        self.step = 0  # number of steps trained
        self.validation: dict[int, dict[str, float]] = {}  # losses by step and name
        inner, sample = settings.inner_backend, task.training(0)[0]
        self._options = None if inner == "inductor" else {"inner_backend": inner}
        plain, mhc = (build_model(settings, task.classes) for _ in range(2))
        self.explanation = mhc_compile.explain(mhc, sample, options=self._options)
        begin = time.perf_counter()
        mhc_compile.attach(mhc, sample, options=self._options)
        attaching = time.perf_counter() - begin
        weights = mhc.state_dict()
        if different := [name for name, one in plain.state_dict().items() if not torch.equal(one, weights[name])]:
            raise MhcError(f"the two models start from different weights: {', '.join(different)}")
        ours = Trainer(mhc, "mhc", self._options, attaching)
        self.trainers = {"plain": Trainer(plain, inner, None, 0.0), "mhc": ours}

    def advance(self) -> dict[str, float]:
        """Train one step of both, a function of seed and step alone, and return their losses."""
        inputs, targets = self.task.training(self.step)
        seed = stable_seed("dropout", self.settings.seed, self.step)
        lr = learning_rate(self.step, self.settings.lr)
        names = ("plain", "mhc") if self.step % 2 == 0 else ("mhc", "plain")
        losses = {name: self.trainers[name].train(inputs, targets, seed=seed, lr=lr) for name in names}
        self.step += 1
        return losses

    def validate(self) -> dict[str, float]:
        """Return the validation losses of both at this step, measured once."""
        if self.step not in self.validation:
            dropout = self.settings.dropout > 0
            self.validation[self.step] = {
                name: trainer.evaluate(self.held_out, dropout=dropout) for name, trainer in self.trainers.items()
            }
        return self.validation[self.step]

    def measure_streams(self) -> mhc_compile.results.Stability:
        """Measure the gain of the composite H_res and the streams on one validation batch."""
        model = self.trainers["mhc"].model.eval()
        try:
            return mhc_compile.stability(model, self.held_out[0][0], options=self._options)
        finally:
            model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, and the history."""
        trainers = {name: trainer.state_dict() for name, trainer in self.trainers.items()}
        return {"step": self.step, "validation": self.validation, **trainers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.step, self.validation = state["step"], dict(state["validation"])
        for name, trainer in self.trainers.items():
            trainer.load_state_dict(state[name])
