"""PretrainSettings: every flag of `launch/pretrain_qwen2.py`, grouped, and the rules between them.

The names are Megatron's. The attribute docstrings are the text of `--help`. There is no flag for
the model's shape: the config says it. Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import Faults, UserError, raise_if
from qwen2_ascend.flags import LAYOUT_SIZES, Flag, given_flags, layer_list, number_faults
from qwen2_ascend.parallel import (
    ContextParallelAlgorithm,
    ParallelLayout,
    padded_vocab_size,
    sequence_faults,
)
from qwen2_ascend.pasted_flags import Pasted, expert_faults, pasted_faults
from qwen2_ascend.planning.job import Zero
from qwen2_ascend.telemetry.settings import ProfileSettings
from qwen2_ascend.training.fusion import FusionSettings
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.megatron_flags import config_of_run, parse_training_flags, training_flags
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.overlap import OverlapSettings
from qwen2_ascend.training.recompute_settings import RecomputeSettings


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and where its weights come from."""

    config: Annotated[str | None, tyro.conf.arg(aliases=["--hf-cfg-dir"], metavar="DIR|MODEL")] = (
        None
    )
    """Model config: a Hugging Face folder, a config.json, or a published model (72B,
    72B-Instruct, Coder-7B, Math-7B, Qwen2-7B ...; a size alone is Qwen2.5's base model). Not needed
    when --load has a config.json."""
    load: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where to start: a Hugging Face folder, converted shards, or a training checkpoint, which is
    resumed. Without it the weights are random."""
    pretrained_checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Weights to start from while --load holds no checkpoint yet, so that one command line both
    starts a run and resumes it."""
    finetune: Flag = False
    """Take only the weights from --load: iteration, optimizer and schedule start anew."""
    padded_vocab_size: int | None = None
    """Rows of the embedding after padding; by default the vocabulary keeps its size."""
    make_vocab_size_divisible_by: int | None = None
    """Pad the vocabulary to a multiple of this times the tensor parallel size (128 in Megatron)."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How the model and the batch are spread over ranks; what is left over is data parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt to."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved pipeline: layers in each of a stage's chunks."""
    num_layer_list: Annotated[str | None, tyro.conf.arg(metavar="N,N,...")] = None
    """Layers of each pipeline stage when they are not equal, as in 6,8,8,6."""
    sequence_parallel: Flag = False
    """Split norms and residuals over the tensor parallel ranks along the sequence."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, for sequences whose activations one rank cannot hold."""
    context_parallel_algo: ContextParallelAlgorithm = "megatron_cp_algo"
    """How attention sees what other ranks hold of a sequence. megatron_cp_algo: keys and values
    travel round a ring. ulysses_cp_algo: heads are exchanged for positions. kvallgather_cp_algo:
    keys and values are gathered."""
    use_distributed_optimizer: Flag = False
    """Split the optimizer's state over the data (and context) parallel ranks."""
    overlap_grad_reduce: Flag = False
    """Reduce gradients while backward is still running."""
    overlap_param_gather: Flag = False
    """Gather the updated weights while forward is already running; needs
    --use-distributed-optimizer and --overlap-grad-reduce."""
    distributed_timeout_minutes: float = 10.0
    """Minutes after which a collective that waits for a silent rank fails."""

    def faults(self) -> list[str]:
        """What contradicts itself, sizes aside."""
        faults = number_faults(self, above_zero=("distributed_timeout_minutes",))
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            faults.append(
                "--overlap-param-gather needs --use-distributed-optimizer and "
                "--overlap-grad-reduce."
            )
        return faults


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How much is trained on, and in which pieces."""

    micro_batch_size: int = 1
    """Sequences that go through a rank at once."""
    global_batch_size: int | None = None
    """Sequences per optimizer step; by default one micro-batch per data parallel rank."""
    seq_length: int
    """Tokens in a sequence."""
    train_iters: int | None = None
    """Optimizer steps of the whole run, those of earlier starts too."""
    train_samples: int | None = None
    """Sequences of the whole run, instead of --train-iters; what does not fill a batch is left."""
    exit_interval: int | None = None
    """Save and end the run after every so many steps; the next run goes on from there."""

    def faults(self) -> list[str]:
        """Numbers that cannot be."""
        sizes = ("micro_batch_size", "global_batch_size", "seq_length", "exit_interval")
        lengths = ("train_iters", "train_samples")
        return number_faults(self, at_least_one=sizes, not_negative=lengths)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained on: Megatron's .bin/.idx files."""

    data_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[WEIGHT] PREFIX ...")] = ()
    """One prefix of a .bin/.idx pair, or a blend: 0.3 A 0.7 B."""
    mock_data: Flag = False
    """Train on random tokens, to try a set-up or to measure its speed."""
    split: str = "969,30,1"
    """Shares of training, validation and test in --data-path."""
    train_data_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[WEIGHT] PREFIX ...")] = ()
    """Training data, instead of a share of --data-path."""
    valid_data_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[WEIGHT] PREFIX ...")] = ()
    """Validation data, instead of a share of --data-path."""
    data_cache_path: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the sample index is kept between runs."""
    eod_token: int | None = None
    """Id of the token that ends a document; by default the config's eos_token_id."""
    eod_mask_loss: Flag = False
    """Leave the loss at the token that ends a document out."""
    reset_attention_mask: Flag = False
    """Let a document see only itself, with positions from its start. A document ends where the data
    says so, and at --eod-token. The last token of one that does not end with that token has no
    loss: what follows is another document's."""
    reset_position_ids: Flag = False
    """The same as --reset-attention-mask, as in MindSpeed-LLM 2.2."""
    no_shared_storage: Flag = False
    """Each node has a disk of its own for --data-path and --data-cache-path: one rank of each
    builds the sample index there. --load and --save stay on storage that all nodes share."""
    num_workers: int | None = None
    """Processes per rank that read ahead; by default 0 on a cpu and 2 elsewhere."""
    eval_interval: int = 1000
    """Steps between two measurements of the validation loss, which is measured after the last step
    too."""
    eval_iters: int | None = None
    """Batches that the validation loss is measured on; without it, or at 0, it is not measured."""

    @property
    def keep_documents_apart(self) -> bool:
        """Whether a document sees only itself."""
        return self.reset_attention_mask or self.reset_position_ids

    def faults(self, config: Qwen2Config) -> list[str]:
        """What contradicts itself, or the model."""
        faults, token = self._eod_faults(), self.eod_token
        if (bool(self.data_path), bool(self.train_data_path), self.mock_data).count(True) != 1:
            faults.append(
                "give one of --data-path, --train-data-path and --mock-data (random tokens)."
            )
        if token is not None and not 0 <= token < config.vocab_size:
            faults.append(
                f"--eod-token {token} must be from 0 to {config.vocab_size - 1}: the model has "
                f"{config.vocab_size} tokens."
            )
        if self.data_path and self.valid_data_path:
            faults.append(
                "--data-path and --valid-data-path: --split takes the validation data from "
                "--data-path; give --train-data-path instead of it, or leave --valid-data-path out."
            )
        if self.mock_data and self.valid_data_path:
            faults.append(
                "--mock-data measures the validation loss on random tokens too; leave "
                "--valid-data-path out."
            )
        return faults

    def _eod_faults(self) -> list[str]:
        """Flags about the ends of documents where nothing asks for these."""
        given = given_flags(self, ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"))
        if self.mock_data:
            names = " and ".join(given + given_flags(self, ("eod_token",)))
            return [f"--mock-data has no documents; leave {names} out."] if names else []
        if self.eod_token is None or given:
            return []
        return [
            f"--eod-token {self.eod_token} needs --eod-mask-loss, --reset-attention-mask or "
            "--reset-position-ids: nothing else depends on where a document ends."
        ]


class LoopDataSettings(Protocol):
    """What the training loop asks of the settings of any kind of data."""

    @property
    def num_workers(self) -> int | None: ...
    @property
    def eval_interval(self) -> int: ...
    @property
    def eval_iters(self) -> int | None: ...
    @property
    def valid_data_path(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What is written, and what of a checkpoint is read."""

    save: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for checkpoints; one is always written at the end."""
    save_interval: int | None = None
    """Steps between two checkpoints."""
    ckpt_format: Literal["torch_dist", "torch"] = "torch_dist"
    """torch_dist, or torch, Megatron's mp_rank tree; both resume at any layout."""
    async_save: Flag = False
    """Train on while files are written; a save then costs the copy of the state to the host."""
    keep_last: int | None = None
    """Remove older checkpoints when one is complete, and keep so many; by default all are kept."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full): end the run, or train on without
    it."""
    no_save_optim: Flag = False
    """Leave the optimizer out: smaller, but the run cannot be resumed exactly."""
    no_save_rng: Flag = False
    """Leave the state of the random number generators out."""
    no_load_optim: Flag = False
    """Do not read the optimizer."""
    no_load_rng: Flag = False
    """Do not read the state of the random number generators."""

    def faults(self) -> list[str]:
        """What contradicts itself."""
        faults = number_faults(self, at_least_one=("save_interval", "keep_last"))
        return faults + ([] if self.save is not None else self._unsaved_faults())

    def _unsaved_faults(self) -> list[str]:
        """Flags by which a user expects checkpoints, where none is written."""
        names = ("save_interval", "async_save", "keep_last", "on_save_failure")
        return [f"{flag} needs --save." for flag in given_flags(self, names)]


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is said about the run, and where it is kept."""

    log_interval: int = 1
    """Steps between two lines of the log."""
    tensorboard_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write TensorBoard events there."""
    report_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write metrics.jsonl, run.json and loss.png there; by default into --save."""
    log_energy: Flag = False
    """Log joules per token and watts, above idle too, or fail. Without this and --no-log-energy
    they are logged where something measures them (npu-smi, NVML, nvidia-smi, RAPL)."""
    no_log_energy: Flag = False
    """Do not look for anything that measures energy."""
    plan: Annotated[int | None, tyro.conf.arg(metavar="DEVICES")] = None
    """Train nothing; print what qwen2-ascend plan says of this command on so many devices."""
    plan_device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "910B"
    """The device whose memory and speed --plan goes by; qwen2-ascend plan --help has the names."""

    def faults(self) -> list[str]:
        """What contradicts itself."""
        faults = number_faults(self, at_least_one=("log_interval",))
        if self.log_energy and self.no_log_energy:
            faults.append("--log-energy and --no-log-energy: give one of them.")
        return faults


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """The machine."""

    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """auto takes npu, else cuda, else cpu, and says which."""
    mindspeed: Flag = False
    """Activate MindSpeed before megatron-core is imported, or fail. Without this and
    --no-mindspeed it is taken on an npu where it is installed and fits, and the log says so."""
    no_mindspeed: Flag = False
    """Leave MindSpeed out even where it is installed and fits."""
    seed: int = 1234
    """Seed of weights, dropout and the order of the data."""
    deterministic: Flag = False
    """Choose deterministic operators and communication: slower, and the same bits every time."""
    manual_gc: Flag = False
    """Collect Python's garbage between steps only, on all ranks after the same steps, so that no
    rank stops for it in the middle of a step."""
    manual_gc_interval: int = 0
    """With --manual-gc: steps between two collections; 0 collects before the first step only."""
    no_manual_gc_eval: Flag = False
    """With --manual-gc: do not collect before and after the validation loss is measured."""
    exit_signal_handler: bool = True
    """Save on SIGTERM, then stop at the end of the step."""

    def wants_mindspeed(self) -> bool | None:
        """True: it has to be; False: it must not be; None: where it fits.

        Raises:
            UserError: both.
        """
        if self.mindspeed and self.no_mindspeed:
            raise UserError("--mindspeed and --no-mindspeed: give one of them.")
        return True if self.mindspeed else False if self.no_mindspeed else None

    def faults(self) -> list[str]:
        """What contradicts itself."""
        faults = number_faults(self, not_negative=("seed", "manual_gc_interval"))
        if not self.manual_gc and (self.manual_gc_interval or self.no_manual_gc_eval):
            faults.append("--manual-gc-interval and --no-manual-gc-eval need --manual-gc.")
        return faults


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Every flag that pretraining and fine-tuning share."""

    by_deepspeed: ClassVar[bool] = False
    """Whether DeepSpeed trains."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    overlap: OverlapSettings = field(default_factory=OverlapSettings)
    batch: BatchSettings
    optimizer: OptimizerSettings
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    recompute: RecomputeSettings = field(default_factory=RecomputeSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)
    data: LoopDataSettings
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    pasted: tyro.conf.Fixed[tyro.conf.Suppress[Pasted]] = ()
    """Others' flags that set nothing here; see megatron_flags.py."""

    @property
    def has_own_disks(self) -> bool:
        """--no-shared-storage: whether nodes have the data on disks of their own."""
        return "--no-shared-storage" in dict(self.pasted)

    @property
    def tokenizer_folder(self) -> str | None:
        """What --tokenizer-name-or-path names."""
        return dict(self.pasted).get("--tokenizer-name-or-path")

    @property
    def keeps_apart(self) -> bool:
        """Whether a document, or a chat, sees only itself in a sample."""
        return False

    @property
    def variable_seq_lengths(self) -> bool:
        """Whether a batch is as long as its longest sequence."""
        return False

    @property
    def lora_rank(self) -> int | None:
        """The rank of the adapters that are tuned; None tunes all weights."""
        return None

    @property
    def trains_pairs(self) -> bool:
        """Whether a sample is two sequences."""
        return False

    @property
    def data_notes(self) -> list[str]:
        """What a log says of the data that these flags leave unused."""
        return []

    @property
    def unplanned(self) -> list[str]:
        """What of these settings the planner does not know."""
        return []

    def planned_zero(self, world_size: int, device: str) -> Zero | None:
        """What the planner has to know of DeepSpeed; None trains without it."""
        return None

    def config_of_run(self, config: Qwen2Config) -> Qwen2Config:
        """The model's config, with what pasted flags add to it."""
        return config_of_run(config, self.pasted)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that compute one copy of the model: they share layers or sequences."""
        sizes = self.parallel
        model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
        return model * sizes.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model, each with sequences of its own."""
        return world_size // self.model_parallel_size

    def global_batch_size(self, world_size: int) -> int:
        """Sequences per optimizer step."""
        given = self.batch.global_batch_size
        return given or self.batch.micro_batch_size * self.data_parallel_size(world_size)

    def length(
        self, world_size: int, *, iteration: int = 0, consumed_samples: int = 0
    ) -> RunLength:
        """How long the run is; 0 steps where only epochs say it, and the data is not there yet.

        Args:
            world_size: number of ranks.
            iteration: steps that the checkpoint has which is resumed.
            consumed_samples: samples that those steps took.
        """
        size = self.global_batch_size(world_size)
        train_iters, samples = self.batch.train_iters or 0, self.batch.train_samples
        if samples is not None:
            train_iters = iteration + max(samples - consumed_samples, 0) // size
        return RunLength(
            train_iters=train_iters,
            global_batch_size=size,
            iteration=iteration,
            consumed_samples=consumed_samples,
        )

    def precision_name(self) -> str:
        """What the model is computed in: fp32, bf16 or fp16."""
        return "bf16" if self.precision.bf16 else "fp16" if self.precision.fp16 else "fp32"

    def layout(self) -> ParallelLayout:
        """How the model is cut.

        Raises:
            UserError: --num-layer-list is wrong.
        """
        return ParallelLayout(
            tensor_model_parallel_size=self.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.parallel.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=(
                self.parallel.num_layers_per_virtual_pipeline_stage
            ),
            num_layer_list=layer_list(self.parallel.num_layer_list),
            context_parallel_size=self.parallel.context_parallel_size,
            context_parallel_algo=self.parallel.context_parallel_algo,
        )

    def padded_vocab_size(self, config: Qwen2Config) -> int:
        """Rows of the embedding over all tensor parallel ranks.

        Raises:
            UserError: the sizes do not fit.
        """
        return padded_vocab_size(
            config,
            self.parallel.tensor_model_parallel_size,
            size=self.model.padded_vocab_size,
            divisible_by=self.model.make_vocab_size_divisible_by,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainingSettings):
    """Pretrain Qwen2 / Qwen2.5, from random weights or from a checkpoint, one process per device.

    torchrun --nproc-per-node 4 launch/pretrain_qwen2.py --load Qwen2.5-0.5B --data-path corpus
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --seq-length 1024
    --global-batch-size 16 --train-iters 100 --lr 1e-5 --bf16 --save out
    """

    data: DataSettings = field(default_factory=DataSettings)

    @property
    def has_own_disks(self) -> bool:
        return self.data.no_shared_storage

    @property
    def keeps_apart(self) -> bool:
        return self.data.keep_documents_apart


def parse(arguments: Sequence[str] | None = None) -> PretrainSettings:
    """The command line; on a fault it prints and exits with 2, printing on rank 0 only."""
    return parse_training_flags(PretrainSettings, "pretrain_qwen2.py", arguments)


def validate(
    settings: PretrainSettings, config: Qwen2Config, world_size: int, made: RunLength | None = None
) -> None:
    """Checks everything that can be checked before any process group exists.

    Args:
        settings: all flags.
        config: the model's shape.
        world_size: number of ranks.
        made: where a resumed run is; its flags say what is left.

    Raises:
        UserError: all faults at once.
    """
    faults = shared_faults(settings, config, world_size, made) + settings.data.faults(config)
    if (settings.batch.train_iters is None) == (settings.batch.train_samples is None):
        faults.append("give one of --train-iters and --train-samples.")
    raise_if(dict.fromkeys(faults))


def shared_faults(
    settings: TrainingSettings,
    config: Qwen2Config,
    world_size: int,
    made: RunLength | None = None,
) -> list[str]:
    """What is wrong with the settings that all kinds of training have."""
    if faults := expert_faults(settings.pasted):
        return faults
    batch, optimizer, device = settings.batch, settings.optimizer, settings.runtime.device
    faults, counts = _layout_faults(settings, config) + batch.faults(), set()
    train_iters = batch.train_iters
    if not faults:
        layout = settings.layout()
        counts = {len(chunk) for stage in layout.stages(config.num_layers) for chunk in stage}
        faults += _world_faults(settings, world_size)
        is_shared = settings.parallel.sequence_parallel
        faults += sequence_faults(layout, config, batch.seq_length, sequence_parallel=is_shared)
    if not faults:
        iteration, consumed = (made.iteration, made.consumed_samples) if made else (0, 0)
        length = settings.length(world_size, iteration=iteration, consumed_samples=consumed)
        train_iters = length.train_iters
    is_distributed = settings.parallel.use_distributed_optimizer
    of_optimizer = optimizer.faults(settings.precision, is_distributed)
    if not faults and not of_optimizer:
        of_optimizer = optimizer.schedule_faults(train_iters or 0)
    faults += of_optimizer + settings.parallel.faults() + settings.precision.faults()
    faults += settings.recompute.faults(config.num_layers, counts)
    for group in (settings.checkpoint, settings.report, settings.runtime):
        faults += group.faults()
    faults += number_faults(
        settings.data, at_least_one=("eval_interval",), not_negative=("eval_iters", "num_workers")
    )
    faults += _unasked_faults(settings)
    faults += settings.fusion.faults(device)
    faults += settings.overlap.faults(settings, config)
    if device in ("cpu", "cuda"):
        faults += settings.overlap.device_faults(settings, device)
    faults += settings.profile.faults(world_size, train_iters, settings.checkpoint.save)
    table = training_flags(type(settings))
    faults += pasted_faults(settings.pasted, table, settings, config)
    return faults + _length_faults(settings, config)


def megatron_arguments(settings: TrainingSettings) -> dict[str, int | bool]:
    """What MindSpeed is told of the run."""
    parallel, precision = settings.parallel, settings.precision
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
    }


def _layout_faults(settings: TrainingSettings, config: Qwen2Config) -> list[str]:
    faults = Faults(number_faults(settings.parallel, at_least_one=LAYOUT_SIZES))
    if not faults:
        faults.collect(lambda: settings.layout().check(config, settings.padded_vocab_size(config)))
    return faults


def _world_faults(settings: TrainingSettings, world_size: int) -> list[str]:
    """What the number of processes has to do with the layout and the batch."""
    layout = settings.layout()
    if world_size % layout.model_size:
        return [layout.world_fault(world_size)]
    dp = settings.data_parallel_size(world_size)
    unit = settings.batch.micro_batch_size * dp
    size = settings.global_batch_size(world_size)
    if size % unit:
        return [
            f"--global-batch-size {size} is not a multiple of --micro-batch-size "
            f"{settings.batch.micro_batch_size} times {dp} data parallel rank(s); "
            f"use a multiple of {unit}."
        ]
    if layout.num_layers_per_virtual_pipeline_stage is not None and size // unit % layout.pp:
        return [
            f"an interleaved pipeline needs a number of micro-batches that is a multiple of "
            f"pipeline_model_parallel_size={layout.pp}, not {size // unit}; "
            f"use a --global-batch-size that is a multiple of {unit * layout.pp}."
        ]
    return []


def _unasked_faults(settings: TrainingSettings) -> list[str]:
    """Flags that ask for what only another flag has done."""
    data, interval, faults = settings.data, settings.batch.exit_interval, []
    if interval is not None and settings.checkpoint.save is None:
        faults.append(
            f"--exit-interval {interval} saves and ends, and needs --save; to try {interval} steps "
            f"say --train-iters {interval}."
        )
    if data.valid_data_path and data.eval_iters is None:
        faults.append(
            "--valid-data-path needs --eval-iters, the batches that the validation loss is "
            "measured on; 0 does not measure it."
        )
    return faults


def _length_faults(settings: TrainingSettings, config: Qwen2Config) -> list[str]:
    """Why sequences cannot be as long as they are to be."""
    parallel, length, faults = settings.parallel, settings.batch.seq_length, []
    tp, most = parallel.tensor_model_parallel_size, config.max_position_embeddings
    is_whole = parallel.context_parallel_size == 1
    if parallel.sequence_parallel and tp > 0 and is_whole and length % tp:
        faults.append(
            f"--sequence-parallel needs --seq-length {length} to be a multiple of "
            f"tensor_model_parallel_size={tp}."
        )
    if length > most:
        faults.append(
            f"--seq-length {length} is above the model's max_position_embeddings={most}; raise "
            "that in the config, with YaRN rope scaling."
        )
    return faults
