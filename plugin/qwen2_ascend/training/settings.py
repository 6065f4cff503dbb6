"""PretrainSettings: every flag of `launch/pretrain_qwen2.py`, grouped, and the rules between them.

The names are Megatron's. The attribute docstrings are the text of `--help`. There is no flag for
the model's shape: the config says it. Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import Faults, UserError, raise_if
from qwen2_ascend.parallel import (
    ContextParallelAlgorithm,
    ParallelLayout,
    padded_vocab_size,
    sequence_faults,
)
from qwen2_ascend.pasted_flags import Pasted, expert_faults, pasted_faults
from qwen2_ascend.telemetry.settings import ProfileSettings
from qwen2_ascend.training.fusion import FusionSettings
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.megatron_flags import (
    config_of_run,
    parse_training_flags,
    training_flags,
)
from qwen2_ascend.training.overlap import OverlapSettings

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


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


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate; norms and biases have no weight decay."""

    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """How the learning rate falls."""
    lr_decay_iters: int | None = None
    """Steps until it has fallen; by default all."""
    lr_warmup_iters: int = 0
    """Steps in which it rises linearly."""
    lr_warmup_fraction: float | None = None
    """The same as a part of the decay steps."""
    lr_warmup_init: float = 0.0
    """Where it rises from."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How WSD falls in its last phase."""
    lr_wsd_decay_iters: int | None = None
    """Steps of that last phase."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay rate of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Keeps the division by the second mean finite."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    optimizer_cpu_offload: Flag = False
    """Keep fp32 weights and moments in the host's memory and update them there; needs
    --use-distributed-optimizer and --bf16 or --fp16. On a CPU it changes nothing."""
    optimizer_offload_fraction: float = 1.0
    """How much of them; whole tensors are kept there until they are at least so much."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """Number formats, and what happens when numbers run out."""

    bf16: Flag = False
    """Compute in bf16 with fp32 main weights; neither flag means fp32 throughout."""
    fp16: Flag = False
    """Compute in fp16 with fp32 main weights and loss scaling."""
    reuse_fp32_param: Flag = False
    """With --bf16: between updates keep of the fp32 weights only what the bf16 ones lack, 2 bytes
    each instead of 4; nothing else changes."""
    o2_gradient: Flag = False
    """With --bf16: add up and reduce gradients in bf16, which takes 2 bytes each instead of 4 and
    costs precision."""
    o2_optimizer: Flag = False
    """With --bf16: keep Adam's two moments in bf16, which takes 2 bytes each instead of 4 and costs
    precision, most of it where --adam-beta2 is above 0.998."""
    loss_scale: float | None = None
    """A fixed loss scale; by default fp16 finds it."""
    initial_loss_scale: float = 2.0**32
    """First loss scale that is tried."""
    min_loss_scale: float = 1.0
    """Lowest loss scale."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows until the scale is halved."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """stop ends the run when the loss or the gradient norm is not finite; skip goes on without the
    update. The weights are not touched either way."""

    def notes(self, optimizer: OptimizerSettings) -> list[str]:
        """What a log says of the precision that these flags cost."""
        notes = []
        if self.o2_gradient:
            notes.append("--o2-gradient: gradients are added up and reduced in bf16")
        if self.o2_optimizer:
            notes.append("--o2-optimizer: Adam's moments are in bf16")
            if 1 - optimizer.adam_beta2 < 2**-9:
                notes.append(
                    f"--o2-optimizer: with --adam-beta2 {optimizer.adam_beta2:g} second moments "
                    "never fall, as a step lowers them by less than bf16 resolves; use 0.95, as "
                    "MindSpeed-LLM's scripts do"
                )
        return notes


ALL_LAYERS = 1 << 20
"""More than any model has."""


@dataclass(frozen=True, kw_only=True)
class RecomputeSettings:
    """Activations that are computed again in backward rather than kept."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """selective: only attention's core; full: whole layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How full recomputes: uniform keeps the input of every --recompute-num-layers layers; block
    recomputes the first --recompute-num-layers of each stage and keeps the others whole."""
    recompute_num_layers: int | None = None
    """See --recompute-method; by default every layer is computed again, each on its own."""
    recompute_activation_function: Flag = False
    """Compute SwiGLU's output again in backward; of layers that are not recomputed whole."""
    recompute_activation_function_num_layers: int | None = None
    """Only in so many layers of each pipeline chunk; by default in all."""
    recompute_norm: Flag = False
    """Compute the norms' outputs again in backward; of layers that are not recomputed whole."""
    recompute_norm_num_layers: int | None = None
    """Only in so many layers of each pipeline chunk; by default in all."""
    swap_attention: Flag = False
    """What attention keeps for backward waits in the host's memory, and comes back before it is
    needed, on a stream of its own; on a CPU, where both are one, it saves nothing."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; they are computed again in backward, and never all at
    once, which saves memory at a large vocabulary. By default the logits of all tokens are kept."""

    @property
    def method_and_layers(self) -> tuple[str | None, int | None]:
        """--recompute-method and --recompute-num-layers, with what they are by default."""
        if self.recompute_method is not None and self.recompute_num_layers is None:
            return "uniform", 1
        return self.recompute_method, self.recompute_num_layers

    def faults(self, num_layers: int) -> list[str]:
        """What of recomputing single outputs cannot be, one sentence each."""
        faults = []
        for what in ("activation_function", "norm"):
            flag, number = f"--recompute-{what.replace('_', '-')}", self._number_of(what)
            is_on = getattr(self, f"recompute_{what}")
            if number is not None and not is_on:
                faults.append(f"{flag}-num-layers {number} needs {flag}.")
            if number is not None and not 0 <= number <= num_layers:
                faults.append(f"{flag}-num-layers {number} must be from 0 to {num_layers}.")
            is_whole = self.recompute_granularity == "full"
            if is_on and is_whole and self.recompute_method == "uniform":
                faults.append(
                    f"{flag}: --recompute-method uniform computes all layers again, whole; leave "
                    "it out, or say --recompute-method block."
                )
        return faults

    def single_outputs(
        self, what: Literal["activation_function", "norm"]
    ) -> tuple[int, int] | None:
        """(how many layers of a chunk, after how many that are recomputed whole); None is none."""
        if not getattr(self, f"recompute_{what}"):
            return None
        number, method_and_layers = self._number_of(what), self.method_and_layers
        whole = self.recompute_granularity == "full"
        is_all = whole and method_and_layers[0] == "uniform"
        after = (method_and_layers[1] or 0) if whole else 0
        return 0 if is_all else ALL_LAYERS if number is None else number, after

    def _number_of(self, what: str) -> int | None:
        return getattr(self, f"recompute_{what}_num_layers")


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
    """Steps between two measurements of the validation loss."""
    eval_iters: int = 0
    """Batches that the validation loss is measured on; 0 does not measure it."""

    @property
    def keep_documents_apart(self) -> bool:
        """Whether a document sees only itself."""
        return self.reset_attention_mask or self.reset_position_ids


class LoopDataSettings(Protocol):
    """What the training loop asks of the settings of any kind of data."""

    @property
    def num_workers(self) -> int | None: ...
    @property
    def eval_interval(self) -> int: ...
    @property
    def eval_iters(self) -> int: ...


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


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Every flag that pretraining and fine-tuning share."""

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
            UserError: --num-layer-list is not a list of numbers.
        """
        numbers = self.parallel.num_layer_list
        try:
            layers = tuple(int(n) for n in numbers.split(",")) if numbers else None
        except ValueError:
            raise UserError(
                f"--num-layer-list {numbers} is not a list of whole numbers such as 6,8,8,6."
            ) from None
        return ParallelLayout(
            tensor_model_parallel_size=self.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.parallel.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=(
                self.parallel.num_layers_per_virtual_pipeline_stage
            ),
            num_layer_list=layers,
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
    batch, data, faults = settings.batch, settings.data, []
    if (batch.train_iters is None) == (batch.train_samples is None):
        faults.append("give one of --train-iters and --train-samples.")
    if (bool(data.data_path), bool(data.train_data_path), data.mock_data).count(True) != 1:
        faults.append("give one of --data-path, --train-data-path and --mock-data (random tokens).")
    token = data.eod_token
    if token is not None and not 0 <= token < config.vocab_size:
        faults.append(
            f"--eod-token {token} must be from 0 to {config.vocab_size - 1}: the model has "
            f"{config.vocab_size} tokens."
        )
    if data.mock_data and data.keep_documents_apart:
        faults.append(
            "--mock-data has no documents to keep apart; leave --reset-attention-mask and "
            "--reset-position-ids out."
        )
    raise_if(dict.fromkeys(shared_faults(settings, config, world_size, made) + faults))


def shared_faults(
    settings: TrainingSettings,
    config: Qwen2Config,
    world_size: int,
    made: RunLength | None = None,
) -> list[str]:
    """What is wrong with the settings that all kinds of training have."""
    if faults := expert_faults(settings.pasted):
        return faults
    faults = _value_faults(settings)
    faults += _layout_faults(settings, config)
    if not faults:
        faults += _world_faults(settings, world_size)
        faults += sequence_faults(
            settings.layout(),
            config,
            settings.batch.seq_length,
            sequence_parallel=settings.parallel.sequence_parallel,
        )
    train_iters = settings.batch.train_iters
    if not faults:
        iteration, consumed = (made.iteration, made.consumed_samples) if made else (0, 0)
        length = settings.length(world_size, iteration=iteration, consumed_samples=consumed)
        train_iters = length.train_iters
        faults += _schedule_faults(settings.optimizer, train_iters)
        faults += _recompute_faults(settings, config)
    faults += settings.fusion.faults(settings.runtime.device)
    faults += settings.overlap.faults(settings, config)
    if settings.runtime.device in ("cpu", "cuda"):
        device = settings.runtime.device
        faults += settings.overlap.device_faults(settings, device)
    faults += settings.profile.faults(world_size, train_iters, settings.checkpoint.save)
    table = training_flags(type(settings))
    faults += pasted_faults(settings.pasted, table, settings, config)
    return faults + _combination_faults(settings, config)


def _value_faults(settings: TrainingSettings) -> list[str]:
    """Values that are wrong whatever the others are."""
    batch, optimizer, precision = settings.batch, settings.optimizer, settings.precision
    at_least_one = {
        "--micro-batch-size": batch.micro_batch_size,
        "--global-batch-size": batch.global_batch_size,
        "--seq-length": batch.seq_length,
        "--exit-interval": batch.exit_interval,
        "--save-interval": settings.checkpoint.save_interval,
        "--log-interval": settings.report.log_interval,
        "--eval-interval": settings.data.eval_interval,
        "--recompute-num-layers": settings.recompute.recompute_num_layers,
        "--cross-entropy-chunk-size": settings.recompute.cross_entropy_chunk_size,
        "--lr-decay-iters": optimizer.lr_decay_iters,
        "--lr-wsd-decay-iters": optimizer.lr_wsd_decay_iters,
        "--loss-scale-window": precision.loss_scale_window,
        "--hysteresis": precision.hysteresis,
    }
    not_negative = {
        "--train-iters": batch.train_iters,
        "--train-samples": batch.train_samples,
        "--eval-iters": settings.data.eval_iters,
        "--num-workers": settings.data.num_workers,
        "--lr-warmup-iters": optimizer.lr_warmup_iters,
        "--lr-warmup-init": optimizer.lr_warmup_init,
        "--min-lr": optimizer.min_lr,
        "--weight-decay": optimizer.weight_decay,
        "--clip-grad": optimizer.clip_grad,
        "--seed": settings.runtime.seed,
        "--manual-gc-interval": settings.runtime.manual_gc_interval,
    }
    above_zero = {
        "--lr": optimizer.lr,
        "--adam-eps": optimizer.adam_eps,
        "--loss-scale": precision.loss_scale,
        "--initial-loss-scale": precision.initial_loss_scale,
        "--min-loss-scale": precision.min_loss_scale,
        "--distributed-timeout-minutes": settings.parallel.distributed_timeout_minutes,
    }
    betas = {"--adam-beta1": optimizer.adam_beta1, "--adam-beta2": optimizer.adam_beta2}
    faults = [
        f"{k} {v} must be at least 1." for k, v in at_least_one.items() if v is not None and v < 1
    ]
    faults += [
        f"{k} {v} must not be below zero."
        for k, v in not_negative.items()
        if v is not None and not v >= 0
    ]
    faults += [
        f"{k} {v} must be above zero." for k, v in above_zero.items() if v is not None and not v > 0
    ]
    faults += [f"{k} {v} must be from 0 to below 1." for k, v in betas.items() if not 0 <= v < 1]
    return faults


def _layout_faults(settings: TrainingSettings, config: Qwen2Config) -> list[str]:
    faults = Faults()
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


def _schedule_faults(optimizer: OptimizerSettings, train_iters: int) -> list[str]:
    faults = []
    if optimizer.min_lr > optimizer.lr:
        faults.append(f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}.")
    if optimizer.lr_warmup_init > optimizer.lr:
        faults.append(f"--lr-warmup-init {optimizer.lr_warmup_init} is above --lr {optimizer.lr}.")
    if (fraction := optimizer.lr_warmup_fraction) is not None:
        if not 0 <= fraction < 1:
            faults.append(f"--lr-warmup-fraction {fraction} must be from 0 to below 1.")
        if optimizer.lr_warmup_iters:
            faults.append("--lr-warmup-iters and --lr-warmup-fraction: give one of them.")
    if faults:
        return faults
    decay = optimizer.lr_decay_iters or train_iters
    if 0 < decay <= optimizer.lr_warmup_iters:
        faults.append(
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} must be below the {decay} steps in "
            "which the learning rate falls."
        )
    if optimizer.lr_decay_style == "WSD":
        last = optimizer.lr_wsd_decay_iters
        if last is None:
            faults.append("--lr-decay-style WSD needs --lr-wsd-decay-iters.")
        elif 0 < decay < last:
            faults.append(f"--lr-wsd-decay-iters {last} is above the {decay} steps of the decay.")
    return faults


def _recompute_faults(settings: TrainingSettings, config: Qwen2Config) -> list[str]:
    """What megatron-core's recomputation cannot do with the layers of some chunk."""
    method, n = settings.recompute.recompute_method, settings.recompute.recompute_num_layers
    if method is None or n is None:
        return []
    stages = settings.layout().stages(config.num_layers)
    counts = sorted({len(layers) for stage in stages for layers in stage})
    if method == "block" or not any(count % n for count in counts):
        return []
    fit = [m for m in range(1, counts[0] + 1) if not any(count % m for count in counts)]
    return [
        f"--recompute-method uniform: --recompute-num-layers {n} does not divide the "
        f"{' or '.join(map(str, counts))} layers of each pipeline chunk; use "
        f"{', '.join(map(str, fit))}."
    ]


def _combination_faults(settings: TrainingSettings, config: Qwen2Config) -> list[str]:
    """Flags that need or exclude each other."""
    batch, parallel, recompute = settings.batch, settings.parallel, settings.recompute
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    faults = []
    if settings.precision.bf16 and settings.precision.fp16:
        faults.append("--bf16 and --fp16: give one of them.")
    if settings.report.log_energy and settings.report.no_log_energy:
        faults.append("--log-energy and --no-log-energy: give one of them.")
    if parallel.sequence_parallel and tp > 0 and cp == 1 and batch.seq_length % tp:
        faults.append(
            f"--sequence-parallel needs --seq-length {batch.seq_length} to be a multiple of "
            f"tensor_model_parallel_size={tp}."
        )
    if batch.seq_length > config.max_position_embeddings:
        faults.append(
            f"--seq-length {batch.seq_length} is above the model's max_position_embeddings="
            f"{config.max_position_embeddings}; raise that in the config, with YaRN rope scaling."
        )
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        faults.append(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce."
        )
    faults += recompute.faults(config.num_layers)
    if settings.precision.reuse_fp32_param and not settings.precision.bf16:
        faults.append("--reuse-fp32-param needs --bf16: other weights are no halves of fp32 ones.")
    for flag, is_on in (
        ("--o2-gradient", settings.precision.o2_gradient),
        ("--o2-optimizer", settings.precision.o2_optimizer),
    ):
        if is_on and not settings.precision.bf16:
            faults.append(f"{flag} needs --bf16, as in MindSpeed-LLM.")
    faults += _offload_faults(settings)
    is_full = recompute.recompute_granularity == "full"
    if is_full and recompute.recompute_method is None:
        faults.append("--recompute-granularity full needs --recompute-method.")
    if not is_full and (recompute.recompute_method or recompute.recompute_num_layers):
        faults.append(
            "--recompute-method and --recompute-num-layers need --recompute-granularity full."
        )
    if settings.checkpoint.save is None and (settings.checkpoint.save_interval is not None):
        faults.append("--save-interval needs --save.")
    runtime = settings.runtime
    if not runtime.manual_gc and (runtime.manual_gc_interval or runtime.no_manual_gc_eval):
        faults.append("--manual-gc-interval and --no-manual-gc-eval need --manual-gc.")
    return faults


def _offload_faults(settings: TrainingSettings) -> list[str]:
    """What --optimizer-cpu-offload needs and excludes."""
    optimizer, precision = settings.optimizer, settings.precision
    flag, fraction = "--optimizer-cpu-offload", optimizer.optimizer_offload_fraction
    if not 0 <= fraction <= 1:
        return [f"--optimizer-offload-fraction {fraction:g} must be from 0 to 1."]
    if not optimizer.optimizer_cpu_offload:
        return [] if fraction == 1 else [f"--optimizer-offload-fraction needs {flag}."]
    faults = []
    if not settings.parallel.use_distributed_optimizer:
        faults.append(f"{flag} needs --use-distributed-optimizer, as in Megatron-LM.")
    if not (precision.bf16 or precision.fp16):
        faults.append(
            f"{flag} needs --bf16 or --fp16: megatron-core's hybrid optimizer cannot take slices "
            "of fp32 weights."
        )
    for other, is_on in (
        ("--reuse-fp32-param", precision.reuse_fp32_param),
        ("--o2-optimizer", precision.o2_optimizer),
    ):
        if is_on:
            faults.append(
                f"{flag} and {other}: give one of them; both change what the optimizer keeps."
            )
    return faults
