"""The typed schema of every key, and where the shipped values are. Imports no torch.

Defaults are the paper's (RLoop, section 5.1) and DAPO's (section 4.1 and its released 7B script); what neither says
(fine-tuning, evaluation's schedule, everything about machines) is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

GENERATED_MODEL = "countdown"  # as model.path: the generated task's untrained model, which the run makes


def config_folder() -> Path:
    """The shipped `configs/`: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


@dataclass
class RunConfig:
    dir: str = MISSING  # everything the run writes; the same command on the same dir resumes it
    seed: int = 0
    deterministic: bool | None = None  # null: on where there is no GPU


@dataclass
class ArchitectureConfig:
    """The model's sizes, by their names in HF's config.json: enough to plan a run before its weights are there.

    null: not said. Where model.path has a config.json, that counts, and must not say otherwise.
    """

    model_type: str | None = None  # the family: qwen2, qwen3, qwen3_moe, llama or mistral
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None


@dataclass
class ModelConfig:
    path: str = MISSING  # HF folder: config.json, safetensors, tokenizer files
    family: str = "auto"  # auto: from config.json; otherwise qwen2, qwen3, qwen3_moe, llama or mistral
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)


@dataclass
class LayoutConfig:
    """How the policy is spread over tp * pp * cp * dp processes; experts over ep * etp of a pipeline stage's."""

    tp: int = 1  # tensor parallel: every matrix is split
    pp: int = 1  # pipeline stages
    vpp: int = 1  # virtual stages a stage (interleaved schedule)
    cp: int = 1  # context parallel: every sequence is split
    ep: int = 1  # expert parallel
    etp: int = 1  # tensor parallel of the experts
    dp: int = 1  # replicas
    sp: bool = False  # sequence parallel: between the matrices, activations are split over the tp ranks
    # layers of each of the pp * vpp stages, first to last; []: balanced
    stages: list[int] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """AdamW; the learning rate warms up linearly, then follows `schedule`."""

    lr: float = 1e-6
    schedule: str = "constant"  # constant, or cosine down to 0 over the phase
    warmup_updates: int = 0
    weight_decay: float = 0.1  # of matrices and the embedding; norms and biases have none
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    skip_grad: float | None = None  # an update is skipped when its norm before clipping is above this; null: never


@dataclass
class AlgorithmConfig:
    iterations: int = 3  # I
    rl_steps: int = 200  # N_RL: DAPO steps an exploration phase
    group_size: int = 16  # G: responses a problem
    prompts_per_step: int = 512  # informative groups an update batch gets
    sampled_per_step: int = 1024  # problems asked of the engines in one sampling round
    sampling_rounds: int = 3  # rounds at most to fill the batch; then on with what there is
    updates_per_step: int = 16  # mini-batches, one optimizer update each; 0: sample only (RFT without RL)
    dynamic_sampling: bool = True  # only groups with right and wrong answers enter the update
    advantage: str = "group_std"  # group_std (GRPO), group_mean (Dr. GRPO) or leave_one_out (RLOO)
    aggregation: str = "token_mean"  # token_mean (DAPO), sequence_mean (GRPO) or dr_grpo
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0  # 0 = none
    overlong_buffer: int = 512  # tokens before max_tokens over which the penalty grows to -1; 0 = none
    overlong_filter: bool = False  # responses cut at max_tokens don't enter the loss
    kl_coefficient: float = 0.0  # of the KL divergence from theta_i; 0 = none
    kl_estimator: str = "k3"  # k1, k2 or k3
    entropy_coefficient: float = 0.0  # of the entropy bonus; 0 = none
    old_logprobs: str = "engine"  # denominator of the ratio: engine's, or trainer's recomputed at the step's start
    importance: str = "none"  # trainer/engine weight of a token: none, truncate (TIS) or mask (IcePop); needs trainer
    importance_cap: float = 2.0  # C: the weight is truncated at C, or the token dropped outside [1/C, C]
    off_policy_mask: float = 0.0  # drop A < 0 sequences whose mean log(old/new) is above this (DeepSeek-V3.2); 0 = none
    hard_threshold: float | None = 0.1  # hard: success rate over the phase below this; null: every problem counts
    reset: bool = True  # exploit from theta_i; false: from the RL endpoint (ablation)


@dataclass
class FineTuneConfig:
    """One supervised phase over a fixed set of examples."""

    epochs: int = 1
    batch_size: int = 128
    loss: str = "token_mean"  # or reward_weighted: mean over trajectories of R(tau) log pi(tau) (paper, eq. 6)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="cosine"))


@dataclass
class RftConfig(FineTuneConfig):
    enabled: bool = True  # false: theta_{i+1} is the RL endpoint (vanilla DAPO)
    deduplicate: bool = True  # take equal responses to one problem once; false: all, as in the paper
    steps: list[int] = field(default_factory=list)  # draw from the RL steps [first, last] only, from 0; []: from all
    min_tokens: int = 0  # of a response
    max_per_problem: int = 0  # at most so many experts of a problem, drawn by run.seed; 0: all
    share: float = 1.0  # of the experts, drawn by run.seed
    earlier_iterations: int = 0  # draw from the phases of so many iterations before, too


@dataclass
class SftConfig(FineTuneConfig):
    demonstrations: str | None = None  # data file whose rows have meta.solution; null: no SFT before iteration 0
    limit: int | None = None  # first N demonstrations only


@dataclass
class ActorConfig:
    micro_batch_tokens: int = 16384  # tokens of a packed micro-batch a device (one sequence at least)
    recompute: str = "none"  # none, selective (core attention) or full
    distributed_optimizer: bool = True  # optimizer state split over the dp * cp ranks
    optimizer_offload: float = 0.0  # share of the optimizer state kept in CPU memory; CUDA only
    precision_aware_optimizer: bool = False  # Transformer Engine's Adam with bf16 moments; CUDA only
    routing_replay: str = "none"  # experts chosen as by the first_forward of the step, in every update; MoE only


@dataclass
class Fp8Config:
    """What precision=fp8_* or mxfp8 leaves open."""

    first_bf16_layers: int = 0  # that many layers at the beginning stay bf16
    last_bf16_layers: int = 0
    parameter_gather: bool = False  # the distributed optimizer gathers parameters in FP8
    simulate: bool = False  # quantise and dequantise in torch: no speed, only the numerics; for the CPU


@dataclass
class RolloutConfig:
    engine: str = "embedded"  # embedded (transformers, any machine) or sglang
    endpoints: list[str] = field(default_factory=list)  # servers already running; empty: started by the run
    engines: int = 1  # servers that the run starts
    nodes: int = 0  # nodes of a Slurm job that have engines only; 0: the engines share the trainer's nodes
    python: str | None = None  # the interpreter that has SGLang, e.g. .venv-sglang/bin/python
    tp: int = 1  # GPUs of an SGLang server: its matrices are split over them
    dp: int = 1  # of them, groups with their own attention and cache; the experts are shared (models with experts)
    ep: int = 1  # of them, groups with their own part of the experts
    quantization: str = "none"  # or fp8, for SGLang: the matrices of the layers, quantised as they are sent
    memory_fraction: float | None = None  # of a GPU's memory for SGLang's weights and cache; null: its own choice
    # devices of the SGLang servers, tp each, numbered as the trainer's are; []: from the trainer's first on
    gpus: list[int] = field(default_factory=list)
    server_args: list[str] = field(default_factory=list)  # further flags of SGLang's launch_server, as they stand
    sleep: bool = False  # engines give up their memory (weights and cache) while the policy trains
    max_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    max_running: int = 256  # responses an engine is asked for, and the embedded engine decodes, at once
    max_lag: int = 0  # steps by which samples may be older than the policy they update; 0: synchronous, 1: one step off
    partial: bool = False  # generation goes on over a sync: a trajectory may span weight versions
    overprovision: float = 0.0  # share of groups asked for beyond sampled_per_step; the slowest go on in the next step
    bucket_mib: int = 64  # weights broadcast at a time
    start_timeout_s: float = 300.0
    request_timeout_s: float = 3600.0
    # stop when max |trainer - engine logprob| passes this on the first update of a step; null: 1e-4 in fp32, else 5
    mismatch_gate: float | None = None
    mismatch_mean_gate: float = 0.1  # likewise for the mean; bf16 on both sides measures about 0.03, fp32 1e-6


@dataclass
class DataConfig:
    train: str = MISSING  # JSONL or Parquet file of the project's schema, or hf:NAME[:SPLIT]
    validation: str | None = None
    template: str = "r1_zero"  # a name in rloop_mcore/data/templates, e.g. chat, or a path to a .jinja file
    max_prompt_tokens: int = 1024  # longer prompts are counted and left out
    sampler: str | None = None  # challenging, or a dotted path package.module:function (docs/data.md); null: evenly
    limit: int | None = None  # first N problems only
    remove_overlap: bool = False  # leave out training problems that are in `validation` too (always reported)


@dataclass
class RewardConfig:
    verifier: str = "math"  # math, exact, choice, countdown, or a dotted path package.module:function
    answer_format: str = "boxed"  # boxed or answer_line
    correct: float = 1.0  # reward of a correct answer
    wrong: float = 0.0  # reward of any other; DAPO's paper has -1
    format_penalty: float = 0.0  # taken off where no answer can be read: no_answer, truncated, unparsable
    workers: int = 0  # 0: one a core, at most 16
    deadline_s: float = 10.0  # hard limit an answer
    memory_mib: int = 2048  # address space of a worker above what it starts with
    max_failure_share: float = 0.5  # stop when more answers of a sampling round than this time out or crash
    max_unparsable_share: float = 1.0  # of a step: likewise when an answer is there and can't be read; 1: never


@dataclass
class EvaluationConfig:
    every: int = 20  # RL steps between evaluations; 0: only at the ends of phases
    samples: int = 32  # responses a problem
    k: list[int] = field(default_factory=lambda: [1, 8, 16, 32])
    temperature: float = 1.0
    top_p: float = 0.7
    limit: int | None = None  # first N validation problems only


@dataclass
class CheckpointConfig:
    every: int = 1  # RL steps (or fine-tuning updates) between commits
    keep: int = 1  # resumable checkpoints kept
    # evaluated policies kept, the best by validation Avg@N, beside every theta and `policy_steps`; 0: all
    keep_best: int = 0
    policy_steps: list[int] = field(default_factory=list)  # RL steps of each exploration whose policies are kept too
    asynchronous: bool = False  # write while training goes on; the commit follows at the next one


@dataclass
class GuardConfig:
    """What to do when steps go wrong in a row: half of their updates skipped, or the entropy out of bounds."""

    patience: int = 3  # bad RL steps, or fine-tuning updates, in a row before anything is done
    policy: str = "stop"  # the run; or end_phase, with what it has come to; or skip: note it and go on
    entropy_low: float | None = None  # an RL step is bad when its mean token entropy (nats) is below this; null: never
    entropy_high: float | None = None  # likewise above
    # a run stalls when it gets no further for so many median steps of its phase, and stall_floor_s at least; 0: never
    stall_factor: float = 5.0
    stall_floor_s: float = 1800.0


@dataclass
class TrackingConfig:
    tensorboard: bool = True
    wandb_project: str | None = None
    progress: bool = True


@dataclass
class GpuConfig:
    """What planning knows of one GPU, from its data sheet; 0: not said. Rates are dense, one way, and peaks."""

    name: str | None = None
    memory_gib: float = 0.0
    memory_gb_s: float = 0.0
    bf16_tflops: float = 0.0
    node_gb_s: float = 0.0  # to the other GPUs of the node (NVLink)
    network_gb_s: float = 0.0  # to other nodes


@dataclass
class SlurmConfig:
    """The job that `rloop launch` submits, and what becomes of it when it ends (docs/slurm.md)."""

    job_name: str | None = None  # null: the name of run.dir
    partition: str | None = None
    account: str | None = None  # in YAML with quotes where it begins with 0, which is octal there
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # limit of one job of the chain, e.g. 04:00:00, in YAML with quotes; null: the partition's
    signal_s: int = 300  # seconds before the limit at which the run is told to stop
    flags: list[str] = field(default_factory=list)  # further options of sbatch, e.g. --exclude=n7
    cpus_per_node: int = 0  # 0: whole nodes, with all their memory; else --mem in `flags` says how much of it
    hetjob: bool = False  # the rollout.nodes are a second component of a heterogeneous job
    engine_flags: list[str] = field(default_factory=list)  # further options of that component
    setup: list[str] = field(default_factory=list)  # shell lines that come first, e.g. "module load cuda/12.8"
    venv: str | None = None  # a folder whose bin/rloop is used; null: the one that writes the script
    container: str = "none"  # pyxis or apptainer: every task runs in `image`, which has rloop
    image: str | None = None
    mounts: list[str] = field(default_factory=list)  # HOST, HOST:CONTAINER or HOST:CONTAINER:ro
    # variables that jobs get from where they are submitted; besides them PATH, HOME, USER, LANG and Slurm's
    environment: list[str] = field(default_factory=list)
    preflight: bool = True  # before each start (docs/preflight.md)
    exclude_bad: bool = True  # nodes that it names are left out of the next start
    retries: int = 3  # starts in a row that end before their time without a new commit; then the job is given up
    backoff_s: int = 60  # before the first of them, doubled for each further one
    resubmit: bool = False  # start again as a dependent job, where the cluster allows no requeueing


@dataclass
class ClusterConfig:
    device: str = "auto"  # auto, cpu or cuda
    nodes: int = 1  # of the job, rollout.nodes among them
    gpus_per_node: int = 0  # 0: as many as there are
    gpu: GpuConfig = field(default_factory=GpuConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    interface: str | None = None  # by which nodes reach each other, e.g. ib0; null: that of the route to the first
    start_timeout_s: float = 300.0  # the nodes of a job wait this long for each other at the start
    threads: int = 0  # CPU threads a process; 0: cores / processes
    collective_timeout_s: float = 3600.0  # a rank waits this long for the others
    job_end: str | None = None  # ISO time or Unix seconds: the run checkpoints before and exits 75; null: as Slurm says
    stop_margin_s: float = 120.0  # before job_end, for the last checkpoint and the way out


@dataclass
class PreflightConfig:
    """What `rloop preflight` asks of every node before a run (docs/preflight.md)."""

    timeout_s: float = 120.0  # for all nodes to come
    run_gib: float = 1.0  # free in run.dir
    tmp_gib: float = 1.0  # free in /tmp
    shm_gib: float = 0.25  # free in /dev/shm, through which weights go to the engines
    clock_skew_s: float = 2.0  # between a node's clock and the others'
    # a link is slow below this share of the usual bandwidth; 0: none is; null: 0.5 between GPUs, else 0
    slow_link: float | None = None


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    # bf16 (fp32 main weights), fp32, or the matrices in FP8: fp8_delayed, fp8_tensorwise, fp8_blockwise, mxfp8
    precision: str = "bf16"
    fp8: Fp8Config = field(default_factory=Fp8Config)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_updates=160))  # 10 rollout steps
    rft: RftConfig = field(default_factory=RftConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    experiment: str | None = None  # name of the experiment file the run was made from
