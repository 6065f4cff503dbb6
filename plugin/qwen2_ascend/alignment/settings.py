"""AlignSettings: every flag of `launch/align_qwen2.py`, and the rules between them.

The names are those of the other launchers. Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import raise_if
from qwen2_ascend.figures import report_faults
from qwen2_ascend.files import output_faults
from qwen2_ascend.flags import Flag, given_flags
from qwen2_ascend.launching import parse_flags
from qwen2_ascend.training.fusion import FusionSettings
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.settings import (
    BatchSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    RuntimeSettings,
    TrainingSettings,
    shared_faults,
)


@dataclass(frozen=True, kw_only=True)
class SubjectSettings:
    """What is aligned: a checkpoint, computed by this project and by transformers."""

    load: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A Hugging Face folder, converted shards, or a training checkpoint."""
    config: Annotated[str | None, tyro.conf.arg(aliases=["--hf-cfg-dir"], metavar="DIR")] = None
    """Hugging Face folder with config.json and tokenizer, where --load has none."""
    reference_model: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Hugging Face folder that transformers loads; by default the weights of --load."""
    padded_vocab_size: int | None = None
    """Rows of the embedding after padding; by default what the ranks can share out evenly."""
    precision: Annotated[
        Literal["fp64", "fp32", "bf16", "fp16"], tyro.conf.arg(aliases=["--dtype"])
    ] = "fp32"
    """What the model computes in. fp64 proves the mapping: nothing but a mistake is left of the
    difference. bf16 and fp16 are judged by the noise that they have in transformers too."""
    bf16: Flag = False
    """The same as --precision bf16."""
    fp16: Flag = False
    """The same as --precision fp16."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What both sides compute on."""

    seq_length: int = 64
    """Tokens in a sequence."""
    micro_batch_size: int = 1
    """Sequences that go through a rank at once."""
    global_batch_size: int | None = None
    """Sequences in all; by default one micro-batch, or what an interleaved pipeline needs."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """A text, repeated until it fills the sequences; by default the tokens are random."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A plain text file, instead of --prompt."""
    tokenizer_name_or_path: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the tokenizer; by default where config.json is."""
    seed: int = 1234
    """Seed of random tokens."""


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What is compared besides the activations, and how much counts as a difference."""

    no_gradients: Flag = False
    """Leave the gradients out: no backward, and a third of the memory."""
    train_iters: int = 0
    """Also train so many steps on both sides and compare losses and gradient norms."""
    lr: float = 1e-4
    """Learning rate of those steps, constant."""
    weight_decay: float = 0.01
    """Their decoupled weight decay; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay rate of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Keeps the division by the second mean finite."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    noise_factor: float = 4.0
    """A sublayer differs if its error is more than this many times the measured noise."""


OF_STEPS = ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
"""What of these is for the steps of --train-iters alone."""


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is kept of it."""

    report: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write report.html, heatmap.png and report.json there."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the page there: verdict, pictures and tables in one file."""
    png: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the heat map there."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every figure there, for machines."""
    dump: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write this run's activations and gradients there, in transformers' shapes, so that a run
    elsewhere or at another layout can be compared with it."""
    dump_only: Flag = False
    """Stop after --dump: nothing is judged, transformers is not needed."""
    compare_with: Annotated[Path | None, tyro.conf.arg(aliases=["--reference"], metavar="DIR")] = (
        None
    )
    """What --dump wrote in an earlier run; its tokens are taken, and it is judged as well."""
    from_dump: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Judge what --dump wrote instead of running the model: on one process, on any machine."""

    def files(self) -> dict[str, Path]:
        """Where "html", "png" and "json" go, of those that are asked for."""
        names = {"html": "report.html", "png": "heatmap.png", "json": "report.json"}
        found = {}
        for kind, name in names.items():
            if (given := getattr(self, kind)) is not None:
                found[kind] = given
            elif self.report is not None:
                found[kind] = self.report / name
        return found


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """The machine."""

    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """Where the model runs; auto takes npu, else cuda, else cpu, and says which. transformers runs
    on the CPU, where its arithmetic is known."""
    mindspeed: Flag = False
    """Activate MindSpeed before megatron-core is imported, or fail."""
    no_mindspeed: Flag = False
    """Leave MindSpeed out even where it is installed and fits."""
    deterministic: Flag = False
    """Choose deterministic operators and communication."""


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """Find where this project's model differs from transformers', sublayer by sublayer.

    torchrun --nproc-per-node 4 launch/align_qwen2.py --load Qwen2.5-0.5B
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --bf16 --report out

    One process needs no torchrun. The exit status is 0 if both agree, 1 if they differ.
    """

    model: SubjectSettings
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)

    @property
    def precision(self) -> str:
        """fp64, fp32, bf16 or fp16."""
        if self.model.bf16:
            return "bf16"
        return "fp16" if self.model.fp16 else self.model.precision

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step."""
        if self.tokens.global_batch_size is not None:
            return max(1, self.tokens.global_batch_size // self.tokens.micro_batch_size)
        interleaved = self.parallel.num_layers_per_virtual_pipeline_stage is not None
        return self.parallel.pipeline_model_parallel_size if interleaved else 1

    @property
    def token_shape(self) -> tuple[int, int, int]:
        """`[n, b, s + 1]` of the recorded step."""
        tokens = self.tokens
        return self.num_microbatches, tokens.micro_batch_size, tokens.seq_length + 1

    def training(self) -> TrainingSettings:
        """The run that these settings ask for, in training's words."""
        checks = self.checks
        return TrainingSettings(
            model=ModelSettings(
                config=self.model.config,
                load=self.model.load,
                finetune=True,
                padded_vocab_size=self.model.padded_vocab_size,
            ),
            parallel=self.parallel,
            batch=BatchSettings(
                micro_batch_size=self.tokens.micro_batch_size,
                global_batch_size=self.num_microbatches * self.tokens.micro_batch_size,
                seq_length=self.tokens.seq_length,
                train_iters=checks.train_iters,
            ),
            optimizer=OptimizerSettings(
                lr=checks.lr,
                min_lr=checks.lr,
                lr_decay_style="constant",
                weight_decay=checks.weight_decay,
                adam_beta1=checks.adam_beta1,
                adam_beta2=checks.adam_beta2,
                adam_eps=checks.adam_eps,
                clip_grad=checks.clip_grad,
            ),
            precision=PrecisionSettings(bf16=self.precision == "bf16"),
            fusion=self.fusion,
            data=DataSettings(),
            runtime=RuntimeSettings(
                device=self.machine.device,
                mindspeed=self.machine.mindspeed,
                no_mindspeed=self.machine.no_mindspeed,
                seed=self.tokens.seed,
                deterministic=self.machine.deterministic,
            ),
        )

    def padded_vocab_size(self, config: Qwen2Config) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        tp = max(self.parallel.tensor_model_parallel_size, 1)
        return self.model.padded_vocab_size or -(-config.vocab_size // tp) * tp


def parse(arguments: Sequence[str] | None = None) -> AlignSettings:
    """The command line; on a fault it prints and exits with 2, printing on rank 0 only."""
    return parse_flags(AlignSettings, "align_qwen2.py", arguments)


def validate(settings: AlignSettings, config: Qwen2Config, world_size: int) -> None:
    """Checks all that can be checked before any process group exists.

    Raises:
        UserError: all faults at once.
    """
    faults = _run_faults(settings, config, world_size)
    faults += _token_faults(settings.tokens)
    faults += _precision_faults(settings, config)
    faults += _output_faults(settings)
    faults += _idle_faults(settings)
    raise_if(dict.fromkeys(faults))


def _run_faults(settings: AlignSettings, config: Qwen2Config, world_size: int) -> list[str]:
    training = settings.training()
    padded = settings.padded_vocab_size(config)
    training = replace(training, model=replace(training.model, padded_vocab_size=padded))
    if settings.output.from_dump is not None:
        return ["--from-dump needs one process, without torchrun."] if world_size > 1 else []
    needed = training.model_parallel_size
    faults = shared_faults(training, config, needed)
    if not faults and world_size != needed:
        faults.append(
            f"{world_size} process(es) for one copy of the model at this layout; start {needed}: "
            f"torchrun --nproc-per-node {needed}. Data parallel copies would compute the same."
        )
    return faults


def _token_faults(tokens: TokenSettings) -> list[str]:
    faults = []
    if tokens.prompt is not None and tokens.prompt_file is not None:
        faults.append("--prompt and --prompt-file: give one of them.")
    if tokens.prompt == "":
        faults.append("--prompt '' has no tokens; leave it out for random ones.")
    if tokens.prompt_file is not None and not tokens.prompt_file.is_file():
        faults.append(f"--prompt-file {tokens.prompt_file}: no such file.")
    size, micro = tokens.global_batch_size, tokens.micro_batch_size
    if size is not None and micro > 0 and (size < 1 or size % micro):
        faults.append(
            f"--global-batch-size {size} is not a multiple of --micro-batch-size {micro}."
        )
    return faults


def _precision_faults(settings: AlignSettings, config: Qwen2Config) -> list[str]:
    model, checks, faults = settings.model, settings.checks, []
    if model.bf16 and model.fp16:
        faults.append("--bf16 and --fp16: give one of them.")
    if (model.bf16 or model.fp16) and model.precision not in ("fp32", settings.precision):
        faults.append(f"--precision {model.precision} and --{settings.precision}: give one.")
    if checks.train_iters > 0 and settings.precision in ("fp64", "fp16"):
        faults.append(
            f"--train-iters with --precision {settings.precision}: the optimizer's weights are "
            "fp32; compare losses in fp32 or bf16."
        )
    if settings.precision == "fp64" and config.yarn is not None:
        faults.append(
            "--precision fp64: transformers computes YaRN's frequencies in fp32 only, so nothing "
            "can be proven beyond that; use --precision fp32."
        )
    if not checks.noise_factor >= 1:
        faults.append(f"--noise-factor {checks.noise_factor} must be at least 1.")
    if settings.precision == "fp64" and settings.machine.device == "npu":
        faults.append("--precision fp64: an NPU's operators have no fp64; use --device cpu.")
    return faults


def _output_faults(settings: AlignSettings) -> list[str]:
    output, faults = settings.output, []
    if output.dump_only and output.dump is None:
        faults.append("--dump-only needs --dump.")
    if output.dump_only and (output.compare_with or settings.checks.train_iters):
        faults.append("--dump-only judges nothing; leave --compare-with and --train-iters out.")
    if output.dump_only and output.files():
        faults.append("--dump-only judges nothing, so there is no report; leave one out.")
    for path in {output.compare_with, output.from_dump} - {None}:
        if path is not None and not (path / "description.json").is_file():
            faults.append(f"{path}: holds no description.json; give what --dump has written.")
    folder = settings.model.reference_model
    if folder is not None and not (folder / "config.json").is_file():
        faults.append(f"--reference-model {folder}: holds no config.json.")
    files = output.files()
    if "html" in files or "png" in files:
        faults += report_faults("a report, unless it is --json,", "matplotlib", "jinja2")
    for flag in ("html", "png", "json"):
        faults += output_faults(f"--{flag}", getattr(output, flag))
    return faults


def _idle_faults(settings: AlignSettings) -> list[str]:
    """Flags that are given and that nothing reads, because of others that are there or are not."""
    output, tokens, faults = settings.output, settings.tokens, []
    if output.from_dump is not None:
        if given := _said_of_a_run(settings):
            faults.append(f"--from-dump runs nothing; leave {', '.join(given)} out.")
        return faults
    if not settings.checks.train_iters and (given := given_flags(settings.checks, OF_STEPS)):
        faults.append(f"{', '.join(given)}: there are no steps without --train-iters.")
    has_text = tokens.prompt is not None or tokens.prompt_file is not None
    if output.compare_with is not None and has_text and not settings.checks.train_iters:
        faults.append("--compare-with brings its own tokens; leave --prompt and --prompt-file out.")
    return faults


def _said_of_a_run(settings: AlignSettings) -> list[str]:
    """Flags of the model's run, or of what follows it, that are not as they are by default."""
    model = ("padded_vocab_size", "precision", "bf16", "fp16")
    # a dump is judged on the CPU, and without MindSpeed
    machine = ["mindspeed", "deterministic"]
    machine += ["device"] if settings.machine.device != "cpu" else []
    return [
        *given_flags(settings.model, model),
        *given_flags(settings.parallel),
        *given_flags(settings.tokens),
        *given_flags(settings.checks, ("train_iters", *OF_STEPS)),
        *given_flags(settings.output, ("dump",)),
        *given_flags(settings.fusion),
        *given_flags(settings.machine, machine),
    ]
