"""Measures the cost of a training step of each method, side by side on this machine.

    python scripts/benchmark.py                                    # CPU or the first GPU, DeBERTa-v3-base shape
    python scripts/benchmark.py --layers 4 --batch 8 --length 128 --repeats 5
    python scripts/benchmark.py --real 0.41                        # rows of MRPC's average length, for unpadding
    python scripts/benchmark.py --scaling                          # cost against length, batch, rank and layers
    python scripts/benchmark.py --gpu-suite --output FILE.json     # the whole list of measurements for a GPU

It needs torch and transformers; PEFT takes part if it is installed. Weights and tokens are random, so nothing is
downloaded. All contestants are in one process and take turns, step by step, so that a slow moment of the machine hits
all of them. A step is that of the trainer: forward, float32 cross-entropy, backward, penalty, clipping, mask, optimizer
and allocator, with a mask in every step. The results are printed as a table and, with --output, written to a JSON file.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

if importlib.util.find_spec("loralib") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loralib.adapt import ROLES
from loralib.adapters.writing import write_json
from loralib.errors import InputError
from loralib.glue.machine import cpu_name, git_commit
from loralib.kernels.deberta import unpad, use_fast_attention
from loralib.kernels.low_rank import autocast_dtype, product
from loralib.methods import Method, adalora, lora, rm_lora, sora
from loralib.report.text import aligned
from loralib.trainer import task_loss

# hidden size, layers, heads, intermediate size (the hub's microsoft/deberta-v3-*)
SHAPES = {
    "deberta-v3-xsmall": (384, 12, 6, 1536),
    "deberta-v3-small": (768, 6, 12, 3072),
    "deberta-v3-base": (768, 12, 12, 3072),
    "deberta-v3-large": (1024, 24, 16, 4096),
}
METHODS = ("lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2")
PENALTY = 0.1
PARTS = ("forward", "backward", "method", "clip", "optimizer")
VIEWS = ("view", "detach", "alias", "expand", "transpose", "permute", "squeeze", "slice", "select", "split")
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Operations(TorchDispatchMode):
    """Counts ATen operations, except those that only make views; each is about one kernel launch. Calling it with the
    name of a part assigns the operations since the last call to that part."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.parts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten.", "mkldnn.")) and name != "aten.t.default":
            self.total += not any(view in name for view in VIEWS)
        return func(*args, **(kwargs or {}))

    def __call__(self, part: str) -> None:
        self.parts[part] += self.total - sum(self.parts.values())


class FrozenLinear(nn.Linear):
    """nn.Linear with the kernel of this project's layers: the lower bound for their time."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if autocast_dtype(x) is not None:
            return super().forward(x)
        return product(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


class Contestant:
    """A model with one way to train it. `step` runs one optimizer step and marks its parts."""

    def __init__(self, name: str, base: nn.Module, o: argparse.Namespace) -> None:
        """Build the model, its method and its optimizer.

        Args:
            name: METHOD[/stock|/longest|/unpadded], "peft lora" or "peft adalora".
            base: the shared frozen weights.
            o: the options of the command line.
        """
        self.name, self.o, self.number = name, o, 0
        self.model: Any = build(o)
        for own, shared in zip(self.model.parameters(), base.parameters(), strict=True):
            own.data = shared.data  # frozen weights exist once
        self.method = Method(name)
        self.after: Callable[[int], Any] | None = None  # PEFT's AdaLoRA needs a call after each step
        self.labels_inside = False
        if name.startswith("peft"):
            self._peft(name)
        else:
            self._own(*name.partition("/")[::2])
        for p in self.model.parameters():
            if p.requires_grad:
                p.data = p.data.clone()
        self.model.to(o.device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.method.begin(10**6)
        if self.method.own_groups:
            self.optimizer: torch.optim.Optimizer = self.method.optimizer(1e-4)
        else:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=o.device.type == "cuda")
        if o.compile:
            self.model.forward = torch.compile(self.model.forward, mode=o.compile_mode)

    def _own(self, method: str, variant: str) -> None:
        if variant == "unpadded":
            unpad(self.model)
        elif variant != "stock":
            use_fast_attention(self.model)
        if method == "frozen":
            self.model.deberta.requires_grad_(False)
            for module in self.model.deberta.modules():
                if type(module) is nn.Linear:
                    module.__class__ = FrozenLinear
            return
        r = self.o.rank
        make: dict[str, Callable[..., Method]] = {
            "lora": lora,
            "svd-lora": partial(lora, triplets=True, reg_orth_coef=PENALTY),
            "adalora": partial(adalora, target_rank=r // 2, final_warmup=1, mask_interval=1, reg_orth_coef=PENALTY),
            "sora": partial(sora, threshold=1e-4, sparse_lambda=PENALTY),
            "rm-lora-v1": partial(rm_lora, random_rank=r // 2, version="v1", reg_orth_coef=PENALTY),
            "rm-lora-v2": partial(rm_lora, random_rank=r // 2, version="v2", reg_orth_coef=PENALTY),
        }
        self.method = make[method](self.model, list(ROLES), r=r, lora_alpha=2 * r)

    def _peft(self, name: str) -> None:
        import peft

        names = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]
        common = {"task_type": "SEQ_CLS", "lora_alpha": 2 * self.o.rank, "target_modules": names}
        if name == "peft lora":
            config = peft.LoraConfig(r=self.o.rank, **common)
        else:
            budget = {"init_r": self.o.rank, "target_r": self.o.rank // 2, "tinit": 0, "tfinal": 1, "deltaT": 1}
            config = peft.AdaLoraConfig(total_step=10**6, orth_reg_weight=PENALTY, **budget, **common)
            self.labels_inside = True  # it adds its penalty to a loss that the model computes
        self.model = peft.get_peft_model(self.model, config)
        if name == "peft adalora":
            self.after = self.model.base_model.update_and_allocate

    def step(self, batch: dict[str, Tensor], mark: Callable[[str], Any]) -> None:
        """Run one optimizer step. `mark` is called at its beginning, and after each part with the part's name."""
        o = self.o
        if o.compile:
            torch.compiler.cudagraph_mark_step_begin()
        mark("start")
        inputs = batch if self.labels_inside else {k: v for k, v in batch.items() if k != "labels"}
        with torch.autocast(o.device.type, dtype=DTYPES[o.dtype], enabled=o.dtype != "float32"):
            out = self.model(**inputs)
        loss = out["loss"] if self.labels_inside else task_loss(out["logits"], batch["labels"])
        mark("forward")
        loss.backward()
        mark("backward")
        if self.method.penalty_coef:
            value = self.method.loss()
            gradients = torch.autograd.grad(value, self.trained, allow_unused=True)
            pairs = [(p.grad, g) for p, g in zip(self.trained, gradients, strict=True) if g is not None]
            torch._foreach_add_([p for p, _ in pairs], [g for _, g in pairs])
        mark("method")
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        mark("clip")
        self.method.before_step(self.number)
        mark("method")
        self.optimizer.step()
        mark("optimizer")
        self.method.after_step(self.number + 1)  # + 1, because at step 0 AdaLoRA's importance would be skipped
        if self.after is not None:
            self.after(self.number + 1)
        mark("method")
        self.optimizer.zero_grad()
        mark("optimizer")
        self.number += 1


def build(o: argparse.Namespace) -> DebertaV2ForSequenceClassification:
    """DeBERTa-v3 with random weights and a small vocabulary, because the lookup of a frozen row costs the same in
    any."""
    hidden, layers, heads, intermediate = SHAPES[o.shape]
    config = DebertaV2Config(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=o.layers or layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
    )
    torch.manual_seed(0)
    return DebertaV2ForSequenceClassification(config)


def make_batch(o: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens (batch, length). With --real S the lengths of rows are spread evenly around S * length."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1000, (o.batch, o.length), generator=g)
    spread = torch.linspace(-0.5, 0.5, o.batch) if o.batch > 1 else torch.zeros(1)
    lengths = ((1 + spread * 2 * min(1.0, 1 / o.real - 1)) * o.real * o.length).round().clamp(1, o.length)
    mask = (torch.arange(o.length)[None, :] < lengths[:, None]).long()
    labels = torch.randint(0, 2, (o.batch,), generator=g)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {k: v.to(o.device) for k, v in batch.items()}


class Clock:
    """Measures the seconds of a step's parts: with events on a GPU, otherwise with wall clock or processor time."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.gpu = o.device.type == "cuda"
        self.now = time.process_time if o.cpu_time else time.perf_counter
        self.marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        if self.gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = self.now()
        self.marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """The seconds of each part, and of the whole `step`."""
        if self.gpu:
            torch.cuda.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] += before.elapsed_time(after) / 1000 if self.gpu else after - before
        return spent | {"step": sum(spent.values())}


def measure(o: argparse.Namespace) -> dict[str, Any]:
    """Measure all contestants of `o` in turns.

    Returns:
        A record with the settings, the machine's rate of matrix products, and the results of each contestant.
    """
    base = build(o).to(o.device)
    padded = make_batch(o)
    longest = int(padded["attention_mask"].sum(1).max())
    trimmed = {k: v if k == "labels" else v[:, : -(-longest // 8) * 8].contiguous() for k, v in padded.items()}
    rate = matmul_rate(o)
    flops = model_flops(o)
    contestants = [Contestant(name, base, o) for name in o.contestants]
    batches = [trimmed if c.name.endswith(("/longest", "/unpadded")) else padded for c in contestants]
    results = [first_steps(c, batch, o) for c, batch in zip(contestants, batches, strict=True)]
    runs: list[list[dict[str, float]]] = [[] for _ in contestants]
    for _ in range(o.repeats):
        for contestant, batch, run in zip(contestants, batches, runs, strict=True):
            clock = Clock(o)
            contestant.step(batch, clock)
            run.append(clock.seconds())
    named: dict[str, dict[str, Any]] = {}
    for contestant, run, result in zip(contestants, runs, results, strict=True):
        steps = [r["step"] for r in run]
        median = statistics.median(steps)
        named[contestant.name] = result | {
            "step_s": median,
            "step_s_quartiles": statistics.quantiles(steps, n=4) if len(steps) > 1 else steps * 3,
            "parts_s": {part: statistics.median(r[part] for r in run) for part in PARTS},
            "tokens_per_s": o.batch * o.length / median,
            "matmul_share": flops / median / rate if contestant.name != "frozen" else None,
        }
    for name, result in named.items():
        rival = named.get("peft adalora" if name.startswith("adalora") else "peft lora")
        floor = named.get("frozen")
        result["ratio_to_peft"] = result["step_s"] / rival["step_s"] if rival else None
        result["ratio_to_frozen"] = result["step_s"] / floor["step_s"] if floor else None
    settings = {k: str(v) for k, v in vars(o).items() if k not in ("output", "scaling", "gpu_suite")}
    return {"settings": settings, "matmul_flops_per_s": rate, "model_flops_per_step": flops, "results": named}


def first_steps(contestant: Contestant, batch: dict[str, Tensor], o: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then count operations and memory and, on a GPU, kernels and synchronisations."""
    for _ in range(o.warmup):
        contestant.step(batch, lambda part: None)
    found: dict[str, Any] = {"trained_parameters": sum(p.numel() for p in contestant.trained)}
    if not o.compile:
        with Operations() as operations:
            contestant.step(batch, operations)
        # The optimizer is left out, because its arithmetic may be one kernel or many. SoRA's threshold, six operations,
        # is left out with it.
        found["operations"] = sum(n for part, n in operations.parts.items() if part != "optimizer")
    # The memory of a contestant as if it were the only one: weights and the optimizer's averages are added. The
    # averages of an allocator are small and left out.
    held = [*contestant.model.parameters(), *contestant.trained, *contestant.trained]
    found["peak_memory_bytes"] = peak_above(contestant, batch, o) + sum(t.numel() * t.element_size() for t in held)
    if o.device.type == "cuda":
        found["kernels"] = count_kernels(contestant, batch)
        found["synchronisations"] = count_synchronisations(contestant, batch)
    return found


def peak_above(contestant: Contestant, batch: dict[str, Tensor], o: argparse.Namespace) -> int:
    """The most bytes that one step allocates at a time, above those that were allocated before it.

    On a CPU only the step's own allocations are seen; blocks from before that it frees are not subtracted.
    """
    from torch.profiler import ProfilerActivity, profile

    if o.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.step(batch, lambda part: None)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.step(batch, lambda part: None)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def count_kernels(contestant: Contestant, batch: dict[str, Tensor]) -> int:
    """The number of kernels, copies and fills that one step launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        contestant.step(batch, lambda part: None)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def count_synchronisations(contestant: Contestant, batch: dict[str, Tensor]) -> int:
    """How often one step makes the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        contestant.step(batch, lambda part: None)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@torch.no_grad()
def matmul_rate(o: argparse.Namespace) -> float:
    """FLOP/s of the largest product of the shape, (batch length, hidden) x (hidden, intermediate), in the run's dtype.

    The product is computed by torch.mm and by the kernel of this project's layers, and the faster one counts.
    """
    hidden, _, _, intermediate = SHAPES[o.shape]
    dtype = DTYPES[o.dtype] or torch.float32
    x = torch.randn(o.batch * o.length, hidden, device=o.device, dtype=dtype)
    w = torch.randn(intermediate, hidden, device=o.device, dtype=dtype)
    seconds = []
    for multiply in (lambda: x.mm(w.t()), lambda: product(x, w)) * 8:
        clock = Clock(o)
        clock("start")
        for _ in range(4):
            multiply()
        clock("forward")
        seconds.append(clock.seconds()["step"] / 4)
    return 2 * x.shape[0] * hidden * intermediate / min(seconds)


def model_flops(o: argparse.Namespace) -> float:
    """FLOPs that a step with adapters on frozen weights needs for the padded shapes, the same for all contestants.

    They are those of forward and input gradient through the six linear layers, and of forward and backward of the two
    products of content attention. Adapters and position terms are left out.
    """
    hidden, layers, _, intermediate = SHAPES[o.shape]
    tokens = o.batch * o.length
    linear = 2 * 2 * tokens * (4 * hidden * hidden + 2 * hidden * intermediate)
    attention = 3 * 2 * 2 * tokens * o.length * hidden
    return float((o.layers or layers) * (linear + attention))


def machine(o: argparse.Namespace) -> dict[str, Any]:
    """Facts about the measurement: date, commit, command, hardware and versions."""
    facts = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if o.device.type == "cuda" else None,
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "peft"):
        found = importlib.util.find_spec(package)
        facts[package] = importlib.import_module(package).__version__ if found else None
    return facts


def table(record: dict[str, Any]) -> str:
    """The results of a record as a table with a line for each contestant."""
    columns = ["contestant", "step ms", "quartiles", *(f"{p} ms" for p in PARTS), "to peft", "to frozen", "tokens/s"]
    columns += ["matmul", "ops", "kernels", "syncs", "peak MB"]

    def number(value: Any, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    lines = [columns]
    for name, r in record["results"].items():
        low, _, high = r["step_s_quartiles"]
        row = [name, number(r["step_s"], ".1f", 1e3), f"{low * 1e3:.1f}-{high * 1e3:.1f}"]
        row += [number(r["parts_s"][part], ".1f", 1e3) for part in PARTS]
        row += [number(r["ratio_to_peft"], ".2f"), number(r["ratio_to_frozen"], ".2f")]
        row += [number(r["tokens_per_s"], ".0f"), number(r["matmul_share"], ".0%")]
        row += [number(r.get(key), ".0f") for key in ("operations", "kernels", "synchronisations")]
        row += [number(r.get("peak_memory_bytes"), ".0f", 1e-6)]
        lines.append(row)
    return "\n".join(aligned(lines))


def variations(o: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The settings that --scaling or --gpu-suite measure; otherwise only `o`."""

    def vary(**changes: Any) -> argparse.Namespace:
        return argparse.Namespace(**(vars(o) | changes))

    if o.scaling:
        for name, values in (
            ("length", (32, 64, 128, 256, 512)),
            ("batch", (1, 4, 8, 16, 32)),
            ("rank", (2, 8, 16, 64)),
            ("layers", (2, 4, 8, 12, 24)),
        ):
            for value in values:
                yield vary(**{name: value})
    elif o.gpu_suite:
        common = {"dtype": "bf16", "batch": 32, "length": 128}
        rivals = [c for c in ("peft lora", "peft adalora") if c in o.contestants]
        yield vary(**common)
        yield vary(**common, contestants=["frozen", "lora", "adalora", *rivals], compile=True, compile_mode="default")
        fast = {"compile": True, "compile_mode": "reduce-overhead"}
        yield vary(**common, **fast, contestants=["frozen", "lora", "adalora", "sora", "rm-lora-v1", *rivals[:1]])
        packed = ["lora", "lora/longest", "lora/unpadded", *rivals[:1]]
        yield vary(**common, real=0.41, contestants=packed)
        yield vary(**(common | {"length": 512, "batch": 16}), contestants=["lora", "lora/stock", *rivals[:1]])
        yield vary(**(common | {"dtype": "float32"}), contestants=["lora", "adalora", *rivals])
        yield vary(**common, shape="deberta-v3-large", contestants=["lora", "adalora", *rivals])
    else:
        yield o


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags into settings, with the device and the list of contestants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deberta-v3-base")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the shape's own")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bf16 and fp16: autocast, as the trainer does"
    )
    parser.add_argument("--real", type=float, default=1.0, help="share of real tokens (not padding), above 0, up to 1")
    parser.add_argument(
        "--methods",
        help=f"contestants, separated by commas: frozen, {', '.join(METHODS)}, svd-lora, each also as NAME/stock, "
        "NAME/longest (rows cut to the longest) and NAME/unpadded; 'peft lora', 'peft adalora'",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds of all threads, not wall clock: for a busy machine"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile_mode", default="default", help="mode of torch.compile, for example reduce-overhead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scaling", action="store_true", help="vary length, batch, rank and layers one at a time")
    parser.add_argument("--gpu-suite", action="store_true", help="the whole list for a GPU, in one process")
    parser.add_argument("--profile", action="store_true", help="also print where the first contestant's time goes")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    o = parser.parse_args(argv)
    for name in ("layers", "batch", "length", "rank", "repeats", "warmup"):
        value = getattr(o, name)
        if value is not None and value < (2 if name == "rank" else 1):
            raise InputError(f"--{name} is {value}, it must be {2 if name == 'rank' else 1} or more.")
    if not 0 < o.real <= 1:
        raise InputError(f"--real is {o.real}, it must lie above 0 and be at most 1.")
    rivals = ["peft lora", "peft adalora"] if importlib.util.find_spec("peft") else []
    extra = ["lora/longest", "lora/unpadded"] if o.real < 1 else ["lora/stock", "adalora/stock"]
    default = ["frozen", *METHODS, *extra, *rivals]
    if o.scaling:
        default = ["frozen", "lora", "adalora", "sora", "rm-lora-v1", *rivals[:1]]
    o.contestants = [name.strip() for name in o.methods.split(",")] if o.methods else default
    allowed = {"frozen", "svd-lora", *METHODS}
    for name in o.contestants:
        method, _, variant = name.partition("/")
        if name not in rivals and (method not in allowed or variant not in ("", "stock", "longest", "unpadded")):
            choices = ", ".join([*sorted(allowed), *rivals])
            raise InputError(f"--methods holds {name!r}: choose from {choices}, with /stock, /longest or /unpadded.")
    try:
        o.device = torch.device(o.device)
        torch.empty(1, device=o.device)
    except (RuntimeError, AssertionError) as error:  # the name is unknown, or torch was built without the device
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {o.device} cannot be used by this torch ({reason}): try cpu or cuda.") from error
    if o.output and o.output.is_dir():
        raise InputError(f"--output {o.output} is a folder: give the name of the JSON file to write.")
    return o


def profile(o: argparse.Namespace) -> str:
    """A table of the operators in a step of the first contestant, by time."""
    from torch.profiler import profile as recording

    contestant, batch = Contestant(o.contestants[0], build(o).to(o.device), o), make_batch(o)
    for _ in range(o.warmup):
        contestant.step(batch, lambda part: None)
    with recording() as profiler:
        contestant.step(batch, lambda part: None)
        if o.device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if o.device.type == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the file after every setting, so that a lost machine costs one setting at most."""
    o = parse(argv)
    report: dict[str, Any] = {"machine": machine(o), "records": []}
    for setting in variations(o):
        try:
            record = measure(setting)
        except RuntimeError as error:  # memory ran out or the compiler failed; the other settings still count
            if not (o.scaling or o.gpu_suite):
                raise
            record = {"settings": {k: str(v) for k, v in vars(setting).items()}, "error": str(error)[:500]}
        shown = {
            k: getattr(setting, k) for k in ("shape", "layers", "batch", "length", "rank", "dtype", "real", "compile")
        }
        print("  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
        if "error" in record:
            print(record["error"], flush=True)
        else:
            print(f"matmul {record['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s\n{table(record)}\n", flush=True)
        report["records"].append(record)
        if o.output:
            o.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(o.output, report)
        torch._dynamo.reset()
        if o.device.type == "cuda":
            torch.cuda.empty_cache()
    if o.profile or o.gpu_suite:
        print(profile(o))
    return report


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
