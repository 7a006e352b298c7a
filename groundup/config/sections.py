"""The parts of a recipe that every stage has: data, length and batch, optimizer, what moves, evaluation, log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceConfig(Section):
    """One file (or `FOLDER:NAME` of a dataset_info.json) and its share in the mixture."""

    path: str
    weight: float = Field(1.0, gt=0, description="times (fractions allowed) its documents appear in an epoch")
    split: str | None = Field(None, description='disjoint share, as in "2,4,4:0": the first of shares 2:4:4')


class TrainConfig(Section):
    """Length, batch and precision of a run. One of steps and epochs decides the length; steps wins."""

    steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="rows in one forward pass on one rank")
    accumulate: int = Field(1, ge=1, description="forward passes in one optimizer step")
    seq_len: int = Field(512, ge=2, description="tokens in a packed row")
    tag_weight: float = Field(
        1.0, gt=0, description="loss weight of the tokens of <think> </think> <answer> </answer>; MiniMind-R1: 10"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, else fp32"
    )
    compile: Literal["auto", "off", "blocks"] = Field("auto", description="torch.compile of the repeated block")
    activation_checkpointing: bool = False
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights that are saved; 0 turns it off")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: physical cores")
    save_every: int | None = Field(None, ge=1, description="steps; default: a tenth of the run")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")
    eval_every: int | None = Field(None, ge=1, description="steps; default: a tenth of the run")
    eval_rows: int = Field(64, ge=1, description="validation rows read at each evaluation")
    early_stop: int = Field(0, ge=0, description="evaluations without improvement before stopping; 0 turns it off")

    @field_validator("compile", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads the bare word off as false


class OptimConfig(Section):
    """How weights move. Muon takes the 2-D weights inside the blocks, AdamW all others."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon's matrices")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    paged: bool = Field(False, description="CUDA: AdamW's moments leave the GPU when it is full (bitsandbytes)")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = Field(0.02, ge=0, description="steps if 1 or more, else a share of the run")
    decay: float = Field(0.2, ge=0, le=1, description="wsd: share of the run that decays")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate over the peak")


class AdaptConfig(Section):
    """What moves when not everything moves. Terms and defaults are PEFT's where it has them."""

    method: Literal[
        "full", "freeze", "lora", "ia3", "bottleneck", "prompt", "p_tuning", "prefix", "p_tuning_v2"
    ] = "full"  # fmt: skip
    target: list[str] = Field(
        default_factory=lambda: ["all"],
        description="names (q_proj) or patterns (layers.[01].*proj) of layers; all: as in the method's paper",
    )
    rank: int = Field(8, ge=1, description="lora: width of the thin matrices")
    alpha: float = Field(16.0, gt=0, description="lora: the product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="lora, bottleneck")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dora: bool = Field(False, description="a trained length for each row of the matrix (arXiv 2402.09353)")
    init: Literal["default", "pissa"] = Field("default", description="pissa: the principal part moves (2404.02948)")
    lr_ratio: float = Field(1.0, gt=0, description="LoRA+: rate of B over that of A (arXiv 2402.12354)")
    tokens: int = Field(20, ge=1, description="prompt, p_tuning, prefix, p_tuning_v2: virtual tokens")
    text: str | None = Field(None, description="prompt: words whose embeddings it starts from")
    width: int | None = Field(None, ge=1, description="inner width of p_tuning, prefix and bottleneck")
    first: int = Field(0, ge=0, description="freeze: layers from the start that move")
    last: int = Field(0, ge=0, description="freeze: layers from the end that move")
    train: list[str] = Field(default_factory=list, description="freeze: patterns of further parameters that move")
    save: list[str] = Field(
        default_factory=list, description="modules trained and saved whole beside the adapter: embed_tokens, lm_head"
    )
    base: Literal["full", "int8", "nf4"] = Field("full", description="how the frozen matrices are kept; nf4: QLoRA")
    double_quant: bool = Field(True, description="nf4: the blocks' scales in 8 bits, too")

    @field_validator("target", "train", "save", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value


class EvalConfig(Section):
    """What is held out."""

    fraction: float = Field(0.01, ge=0, lt=1, description="share of documents held out for validation")
    data: list[str] = Field(default_factory=list, description="files of their own instead of a share")


class LogConfig(Section):
    """Where figures go. metrics.jsonl is always written."""

    every: int = Field(10, ge=1, description="steps between two lines")
    to: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(default_factory=list)
    project: str = "groundup"
    online: bool = Field(False, description="let wandb and swanlab use the network")
    plots: bool = True
