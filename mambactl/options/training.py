"""Options of the stages that follow gradients, and of what they read in a teacher's place."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import (
    Compile,
    DataSpecs,
    DistillPhases,
    Integers,
    Lengths,
    Losses,
    Rows,
    Schedule,
    Shares,
    Softness,
    StageConfig,
    Trackers,
    Weights,
    Windows,
)
from mambactl.options.launching import DeviceMapConfig, LaunchConfig, Processes
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.options.on_policy import OnPolicyConfig
from mambactl.options.row_options import MixedRowsConfig, RowsConfig, TextRowsConfig

# fp32 weight, gradient, its bucket, two Adam moments, and a bf16 teacher
WHOLE_BYTES = 22
# a bf16 teacher, whose frozen weights are the student's too, and what mixers of their own add
MIXER_BYTES = 5
# losses of dpo that label smoothing means something for
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
# the one loss that has no rejected answer
TEXT_LOSS = "sft"
# losses of the difference of rewards, in which what a divergence leaves open cancels
DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


class StepsConfig(RowsConfig):
    """Options that all stages which follow gradients share."""

    warmup: int = Field(default=10, ge=0, description="warm-up steps")
    grad_clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    log_every: int = Field(
        default=0, ge=0, description="steps between lines of loss, rate and gradient norm; 0: none"
    )
    save_every: int = Field(default=100, ge=1, description="steps between resumable states")


class TrainConfig(StepsConfig):
    """Options that the stages which train a student share."""

    later: ClassVar[Mapping[str, object]] = {"freeze_kept": False, "epochs": None}

    teacher: str | None = Field(default=None, description="default: where the lineage started")
    grad_checkpointing: bool = Field(default=False, description="recompute activations in backward")
    freeze_kept: bool = Field(
        default=False, description="leave queries and keys of kept attention as they are"
    )


class HeldOutConfig(TrainConfig):
    """Options of stages with a (live or cached) teacher and held-out evaluation."""

    teacher_cache: str | None = Field(
        default=None,
        description="what teacher-cache wrote, in place of the teacher when matching logits",
    )
    eval_data: DataSpecs = Field(default=[], description="held-out text, measured while training")
    eval_every: int = Field(
        default=100, ge=1, description="steps between measurements of --eval-data"
    )
    eval_tokens: int = Field(
        default=16384, ge=64, description="tokens of --eval-data that are measured"
    )


class TrackedConfig(TrainConfig):
    """Options for the trackers that a run reports to."""

    log_to: Trackers = Field(
        default=[], description="tensorboard, wandb, trackio: curves there too, files in OUT.logs"
    )

    @property
    def packages(self) -> list[str]:
        """Trackers that are packages of their own; tensorboard has two, and a message."""
        return [*super().packages, *(name for name in self.log_to if name != "tensorboard")]


class AdaptedConfig(TrainConfig):
    """Options of stages that may train low-rank adapters in place of the weights."""

    lora: int | None = Field(
        default=None, ge=1, description="rank of adapters to train, merged at the end"
    )
    lora_alpha: float | None = Field(
        default=None, gt=0, description="their scale; default: twice the rank"
    )

    @property
    def packages(self) -> list[str]:
        """The one that trains adapters, beside others."""
        return [*super().packages, *(["peft"] if self.lora else [])]


class SpreadConfig(LaunchConfig, TrainConfig):
    """Training that several processes share, each with rows of its own, and maybe the weights."""

    placement_options: ClassVar[frozenset[str]] = StageConfig.placement_options | {"shard"}
    launcher_options: ClassVar[frozenset[str]] = LaunchConfig.launcher_options | {"shard"}
    # any number of processes can go on from a state, whether their weights are split or not
    whole_state: ClassVar[bool] = False

    nproc: Processes = Field(
        default=None,
        ge=1,
        description="processes, one per GPU; each takes --batch-size rows a step",
    )

    shard: bool | None = Field(
        default=None,
        description="split weights over them (FSDP2); default: where a GPU cannot hold all",
    )

    @property
    def is_launched(self) -> bool:
        """True if processes are started for it: one alone where a split state is read by one."""
        return super().is_launched or (bool(self.shard) and not self.whole_state)

    @property
    def splits_weights(self) -> bool | None:
        """True if weights are split over the processes; None: where a GPU cannot hold all."""
        return self.shard

    def require_splittable(self) -> None:
        """Raise UsageError for what cannot be done with weights that are split."""

    def require_coherent(self) -> None:
        """Raise UsageError for options that do not go with --shard, too."""
        super().require_coherent()
        if self.shard and self.is_launched:
            self.require_splittable()

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a GPU per parameter of the model, whole; 0 for a run that cannot be split."""
        return WHOLE_BYTES


class DistillConfig(HeldOutConfig, TrackedConfig, SpreadConfig, MixedRowsConfig, OnPolicyConfig):
    """Align new mixers, then match the teacher's logits."""

    later: ClassVar[Mapping[str, object]] = {
        **TrainConfig.later,
        **OnPolicyConfig.later,
        "append_eos": False,
        "eval_recall": [],
        "eval_recall_rows": 16,
        "keep_best": False,
        "random_window": [],
        # equal shares for all stages
        "align_share": None,
    }

    whole_state: ClassVar[bool] = True

    compile: Compile = Field(
        default="auto", description="compile blocks; auto: on CUDA where it can be"
    )
    stages: DistillPhases = Field(
        default=["align", "logits"], description="what runs, in this order"
    )
    align_steps: int | None = Field(
        default=None, ge=0, description="of --max-steps; default: --align-share of them"
    )
    align_share: float | None = Field(
        default=0.2, ge=0, le=1, description="share of --max-steps for aligning, if others follow"
    )
    align_lr: float = Field(
        default=2e-3, gt=0, description="learning rate of mixers while aligning"
    )
    stepwise_steps: int | None = Field(
        default=None, ge=0, description="of --max-steps, for all groups"
    )
    stepwise_groups: Shares | None = Field(
        default=None,
        description="shares of all layers replaced after each group; default: 0.25,0.5,...",
    )
    stepwise_order: Integers | None = Field(
        default=None,
        description="replaced layers, easy ones first; default: as selected, else ascending",
    )
    stepwise_rest_lr: float = Field(
        default=0.0, ge=0, description="--rest-lr while stepwise (0 freezes)"
    )
    lr: float = Field(
        default=3e-4, gt=0, description="learning rate of mixers when matching logits"
    )
    rest_lr: float = Field(
        default=1e-4, ge=0, description="learning rate of everything else (0 freezes)"
    )
    freeze_kept: bool = Field(
        default=True, description="leave queries and keys of kept attention as they are"
    )
    schedule: Schedule = "cosine"
    kl_weight: float = Field(
        default=1.0, ge=0, description="weight of the KL to the teacher's logits"
    )
    ce_weight: float = Field(
        default=0.0, ge=0, description="weight of the cross entropy on the text"
    )
    temperature: Softness = Field(default=1.0, description="softens both distributions of the KL")
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        default="forward", description="forward is KL(teacher || student)"
    )
    jsd_beta: float = Field(
        default=0.5, gt=0, lt=1, description="weight of the teacher in the jsd mixture"
    )
    random_window: Windows = Field(
        default=[],
        description="sizes of which each training step draws one for windows, 16,64 say",
    )
    eval_recall: Lengths = Field(
        default=[], description="row lengths of recall probes measured with --eval-data, 1024 say"
    )
    eval_recall_rows: Rows = Field(default=16, description="rows per recall probe")
    keep_best: bool = Field(
        default=False,
        description="end with the weights of the smallest measured KL / share of recall kept",
    )
    capture: bool = Field(default=False, description="replay each training step as one CUDA graph")

    @property
    def recordings(self) -> int:
        """Graphs that a replayed step has: one for every size of windows that is drawn."""
        return max(1, len({*self.random_window}))

    @property
    def needs_answers(self) -> bool:
        """True unless the student writes every row, and prompts are all that data is for."""
        whole = self.rows_written(self.batch_size) == self.batch_size
        return self.stages != [ON_POLICY] or not whole or self.epochs is not None

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a GPU per parameter of the model; see `SpreadConfig`."""
        if self.capture or ON_POLICY in self.stages:
            return 0
        whole = bool("logits" in self.stages and self.rest_lr)
        return WHOLE_BYTES if whole or self.stepwise_rest_lr else MIXER_BYTES

    def require_splittable(self) -> None:
        """Raise UsageError for what cannot be done with weights that are split."""
        if self.capture:
            raise UsageError(
                "--shard gathers weights from other processes, which a CUDA graph cannot hold",
                "drop --capture or --shard",
            )
        if ON_POLICY in self.stages:
            raise UsageError(
                "a student whose weights are split writes no text",
                f"drop --shard, or {ON_POLICY} from --stages",
            )

    def require_coherent(self) -> None:
        """Raise UsageError for steps that no CUDA graph can hold, and for options without use."""
        super().require_coherent()
        self._require_stages()
        if ON_POLICY in self.stages:
            self.require_room(self.max_length)
        if self.keep_best and not (self.eval_data or self.eval_recall):
            raise UsageError(
                "--keep-best needs something that is measured while training",
                "add --eval-data FILE, --eval-recall 1024, or both",
            )
        if self.capture and self.grad_checkpointing:
            raise UsageError(
                "--grad-checkpointing reads the states of random number generators, which steps in "
                "a CUDA graph cannot",
                "drop --capture or --grad-checkpointing",
            )

    def _require_stages(self) -> None:
        """Raise UsageError for a stage that is named twice, and for options of none of them."""
        if twice := [name for name in self.stages if self.stages.count(name) > 1]:
            raise UsageError(f"--stages names {twice[0]} twice", "each stage runs once")
        usual = type(self).model_fields
        matching = ("kl_weight", "ce_weight", "temperature", "divergence")
        asked = [name for name in matching if getattr(self, name) != usual[name].default]
        unused = asked if not {"stepwise", "logits"} & {*self.stages} else []
        if self.teacher_cache and "logits" not in self.stages:
            unused.append("teacher_cache")
        if unused:
            flag = unused[0].replace("_", "-")
            raise UsageError(
                f"--{flag} is of no use to --stages {','.join(self.stages)}",
                f"drop it, or add the stage logits, which --{flag} is for",
            )


class TeacherCacheConfig(MixedRowsConfig, DeviceMapConfig):
    """Keep ids drawn by a teacher, for distill without it."""

    samples: int = Field(default=12, ge=1, le=1024, description="ids drawn per token")
    temperature: Softness = Field(default=1.0, description="softens the distribution to be matched")
    power: float = Field(
        default=1.0, gt=0, description="draw from its power; weights keep the estimate unbiased"
    )
    assistant_only_loss: bool = Field(
        default=False, description="for assistant turns only, as sft learns them"
    )

    @property
    def teacher(self) -> None:
        """Always None: no other model than MODEL is used."""
        return None


class SftConfig(HeldOutConfig, TrackedConfig, AdaptedConfig, SpreadConfig, TextRowsConfig):
    """Fine-tune on text or chats, with a teacher if wanted."""

    later: ClassVar[Mapping[str, object]] = {**TrainConfig.later, "append_eos": False}

    compile: bool = Field(
        default=False, description="compile blocks, for packed rows of one length"
    )
    lr: float = Field(default=2e-5, gt=0, description="learning rate")
    ce_weight: float = Field(
        default=1.0, ge=0, description="weight of the cross entropy on the text"
    )
    kl_weight: float = Field(
        default=0.0, ge=0, description="weight of the KL to the teacher's logits"
    )
    assistant_only_loss: bool = Field(default=True, description="train on assistant turns only")

    def require_splittable(self) -> None:
        """Raise UsageError for what cannot be done with weights that are split."""
        if self.compile or self.lora:
            option = "--compile" if self.compile else "--lora"
            raise UsageError(f"{option} needs whole weights on every GPU", "add --no-shard")

    def require_coherent(self) -> None:
        """Raise UsageError for a loss of nothing, and for options without what they apply to."""
        super().require_coherent()
        if not self.ce_weight and not self.kl_weight:
            raise UsageError("--ce-weight and --kl-weight are both 0", "give one of them a weight")
        if self.teacher_cache and not self.kl_weight:
            raise UsageError("--teacher-cache is of no use without a KL", "add --kl-weight 1")
        if self.compile and (not self.packing or self.lora):
            raise UsageError("--compile takes whole packed rows, without --lora", "drop --compile")
        if self.lora_alpha is not None and self.lora is None:
            raise UsageError("--lora-alpha scales adapters, and there are none", "add --lora RANK")


class DpoConfig(TrackedConfig, SpreadConfig):
    """Learn preferences (DPO and its relatives)."""

    lr: float = Field(default=5e-7, gt=0, description="learning rate")
    beta: float = Field(default=0.1, gt=0, description="pull towards the reference policy")
    reference: Literal["teacher", "self"] = Field(
        default="teacher", description="the paper's is teacher"
    )
    precompute_reference: bool = Field(
        default=True, description="ask the reference once, before training, and free it"
    )
    loss_type: Losses = Field(
        default=["sigmoid"], min_length=1, description="TRL's names, added up"
    )
    loss_weights: Weights = Field(default=[], description="one per loss type; default: 1 each")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of flipped labels (robust, exo_pair, aot)"
    )
    ld_alpha: float | None = Field(
        default=None, ge=0, le=1, description="weight of what the longer answer has more (LD-DPO)"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="pull towards the reference (f-DPO)"
    )
    sft_weight: float = Field(
        default=0.0, ge=0, description="weight of the cross entropy on chosen"
    )
    chat: bool = Field(default=True, description="wrap text in the chat template if there is one")
    eval_data: DataSpecs = Field(default=[], description="held-out preferences, measured by set")
    eval_share: float = Field(
        default=0.0, ge=0, le=0.5, description="share of the prompts of --data held out instead"
    )
    eval_every: int = Field(
        default=100, ge=1, description="steps between measurements of what is held out"
    )
    eval_pairs: int = Field(default=200, ge=1, description="held-out pairs measured, per set")
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="stop at this KL of a held-out set to the reference, per token",
    )

    def require_splittable(self) -> None:
        """Raise UsageError for what cannot be done with weights that are split."""
        if self.eval_data or self.eval_share:
            option = "--eval-data" if self.eval_data else "--eval-share"
            hint = "add --no-shard, or measure what was trained: mambactl eval --preferences"
            raise UsageError(f"{option} of dpo needs whole weights on every GPU", hint)

    def require_coherent(self) -> None:
        """Raise UsageError for settings that TRL would refuse, or take and ignore."""
        super().require_coherent()
        chosen = set(self.loss_type)
        if len(chosen) < len(self.loss_type):
            raise UsageError("a loss type is given twice", "give it once, with a weight")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            message = f"{len(self.loss_weights)} loss weights for {len(self.loss_type)} loss types"
            raise UsageError(message, "give one --loss-weights value per --loss-type")
        if self.sft_weight and TEXT_LOSS in chosen:
            raise UsageError("sft is a loss type and has --sft-weight", "give one of them")
        if chosen == {TEXT_LOSS}:
            raise UsageError("sft alone learns no preference", "use `mambactl sft`, or add sigmoid")
        if self.label_smoothing and not chosen & SMOOTHED:
            hint = f"use it with --loss-type {', '.join(sorted(SMOOTHED))}; robust is sigmoid's"
            raise UsageError(f"--label-smoothing does nothing for {', '.join(chosen)}", hint)
        if "exo_pair" in chosen and not self.label_smoothing:
            raise UsageError("exo_pair needs label smoothing", "add --label-smoothing 0.001")
        if self.max_kl is not None and not (self.eval_data or self.eval_share):
            hint = "add --eval-share 0.1, or --eval-data FILE"
            raise UsageError("--max-kl needs held-out preferences to be measured on", hint)
        if self.f_divergence != "reverse_kl" and not chosen <= DIFFERENCES:
            others = ", ".join(sorted(chosen - DIFFERENCES))
            raise UsageError(
                f"{others} has no --f-divergence", f"use {', '.join(sorted(DIFFERENCES))}"
            )
