"""The sections of a recipe: every field with its type, its default and what it means. Defaults stand nowhere else.

Every object is frozen and closed: an unknown key is refused with the nearest name that exists.
"""

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from burnish.errors import RecipeError, one_line


def _words(annotation: Any) -> set[str]:
    """The names in a type, for example {"bool", "Literal"}."""
    shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return set(re.findall(r"\w+", shown))


class Spec(BaseModel):
    """One section of a recipe; frozen, closed, and documented field by field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def no_switch_is_a_number(cls, tree: Any) -> Any:
        """Raises ValueError for true or false where a number stands, which they would pass for: 1 or 0."""
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and not {"bool", "Any"} & _words(field.annotation):
                found = str(value).lower()
                raise ValueError(
                    f"{name}: takes no true or false (found {found}); write its value, as docs/recipe.md has it"
                )
        return tree


class ModelSpec(Spec):
    """The base model."""

    path: str
    """Folder or Hub id of a Hugging Face causal language model with its tokenizer."""
    revision: str | None = None
    """Commit of a Hub model; null takes the newest when a run starts, and stays at it."""
    trust_remote_code: bool = False
    """Run the code that a Hub model brings; needs `revision`, a whole commit of 40 hex digits."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the weights in training."""
    quantize: Literal["int8", "nf4"] | None = None
    """Format in which the frozen linear layers are kept in training, the head apart; needs adapters and bitsandbytes. int8
    quantises activations too, token by token. An export stands on the base as its files have it, not quantised."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Kernel for packed rows: auto takes flash-attn on a GPU where it is installed, else torch's own varlen kernel there,
    and sdpa by document elsewhere."""
    kernels: Literal["auto", "plain", "compiled", "liger"] = "auto"
    """How norms and gated activations are computed: by torch's own operations, by torch.compile, or by Liger
    (pip install -e '.[liger]'). On a GPU auto times those that run at start and takes the fastest; on a CPU it is plain."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass, which takes up to half as much time again; auto means where they would not
    fit."""

    @model_validator(mode="after")
    def code_is_of_one_commit(self) -> "ModelSpec":
        """Raises ValueError for code that the owner of its repository could change between two runs."""
        if self.trust_remote_code and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"trust_remote_code: runs code of the model's repository, so revision must be one commit, all 40 hex digits "
                f"of it (found {self.revision!r}); write it, or trust_remote_code: false"
            )
        return self

    def recomputes(self) -> bool:
        """Whether activations are recomputed, of a recipe whose layout is decided (`train/layout.py`)."""
        assert self.activation_checkpointing != "auto", "a worker decides the layout before it builds anything"
        return self.activation_checkpointing

    def loading(self) -> dict[str, Any]:
        """What every `from_pretrained` of this model is told: its commit, and whether the code that it brings may run.

        Code that the model takes from another repository must be of this commit too, which no other repository has.
        Raises RecipeError for the code of a folder, whose content no revision pins.
        """
        if not self.trust_remote_code:
            return {"revision": self.revision, "trust_remote_code": False}
        if Path(self.path).expanduser().is_dir():
            raise RecipeError(
                f"model.trust_remote_code: {self.path} is a folder, and no revision says what code lies in it; name the Hub "
                "model that the code belongs to, or write trust_remote_code: false"
            )
        return {"revision": self.revision, "trust_remote_code": True, "code_revision": self.revision}

    def unloadable(self, error: Exception) -> str:
        """Why what transformers raised kept the model from being loaded, and what to write instead."""
        if "trust_remote_code" in str(error):
            return (
                f"model.path: {self.path} cannot be loaded without running code that it brings; name a model that "
                "transformers knows, or, for a Hub model whose code you have read, write model.trust_remote_code: true and "
                "its commit in model.revision"
            )
        return f"model.path: {self.path} cannot be loaded: {one_line(error)}"


class LoraSpec(Spec):
    """Low-rank adapters; `lora: null` trains every weight instead."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapter's output; the factor applied is alpha / rank, and alpha / sqrt(rank) for rslora."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: all of them, or a list of module names."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora keeps the size of an adapter's output as its rank grows; dora trains the lengths of the weights' rows apart
    from their directions, which takes more time and memory."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters and exported with them, for example embed_tokens and lm_head."""
    train_tokens: tuple[str, ...] = ()
    """Tokens of the vocabulary whose rows of embeddings and head are trained beside the adapters, for example those that a
    template adds to a base model."""

    @model_validator(mode="after")
    def a_row_is_trained_once(self) -> "LoraSpec":
        """Raises ValueError for tokens whose rows are trained already, with all others."""
        targets = () if isinstance(self.target_modules, str) else self.target_modules
        for key, names in (("modules_to_save", self.modules_to_save), ("target_modules", targets)):
            ends = {"embed_tokens", "wte", "lm_head"} & {name.split(".")[-1] for name in names}
            if self.train_tokens and ends:
                raise ValueError(f"train_tokens: {sorted(ends)[0]} is trained by {key}; take one of them out")
        return self


class TemplateSpec(Spec):
    """The chat template; by default the tokenizer's own."""

    path: str | None = None
    """Jinja file used instead of the tokenizer's own template; it is exported with the model."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables passed to the template at every render, as the server will pass them."""
    stop_tokens: tuple[str, ...] | None = None
    """Tokens that end an answer; null takes them from the generation config and the tokenizer."""
    date: datetime.date | None = None
    """Day that a template which reads the clock shows; null takes the day on which the run started."""


def _refuse_credentials(name: str, path: str) -> None:
    scheme, _, rest = path.partition("://")
    if rest and ("@" in rest.partition("/")[0] or re.search("(?i)(secret|token|password|access_key)[^/]*=", rest)):
        raise ValueError(f"{name}: holds credentials ({scheme}://...); give them in the environment, as AWS_ACCESS_KEY_ID")


class SourceSpec(Spec):
    """One source of conversations."""

    path: str = Field(min_length=1)
    """JSONL (also .gz, .zst), Parquet or Arrow file, folder or glob, here or on s3://, gs:// or any fsspec file system, or a
    Hugging Face data set; rows have `messages`, or are ShareGPT, Alpaca or prompt and completion."""
    split: str | None = None
    """Split of a Hugging Face data set, by Hub id or local folder."""
    subset: str | None = None
    """Configuration of a Hugging Face data set that has several."""
    revision: str | None = None
    """Commit of a Hub data set; null takes the newest."""
    weight: float = Field(1.0, gt=0)
    """How often each row is seen in an epoch: 2 is twice, 0.5 is a seeded half of the rows, another half in each epoch."""

    @model_validator(mode="after")
    def a_path_holds_no_secret(self) -> "SourceSpec":
        """Raises ValueError for credentials in a path, which would end in logs, MLflow and the run folder."""
        _refuse_credentials("path", self.path)
        return self

    @model_validator(mode="after")
    def a_data_set_has_a_split(self) -> "SourceSpec":
        """Raises ValueError for keys of a data set beside files, which would all be read whatever these keys say."""
        for name, value in (("subset", self.subset), ("revision", self.revision)):
            if value is not None and self.split is None:
                raise ValueError(
                    f"{name}: belongs to a Hugging Face data set (found {value!r}); name its split too: split: train"
                )
        return self


class FiltersSpec(Spec):
    """Rows that are left out although they could be trained; `burnish plan` counts them all, named here or not."""

    exact_duplicates: bool = False
    """Leave out rows that say exactly what an earlier row says."""
    near_duplicates: float | None = Field(None, ge=0.5, le=1)
    """Leave out rows that share this part or more of their runs of five words with an earlier row, for example 0.8 (Jaccard
    similarity, estimated by MinHash)."""
    min_trained_tokens: int | None = Field(None, ge=1)
    """Leave out rows with fewer trained tokens, stop tokens among them: empty and very short answers."""
    min_trained_share: float | None = Field(None, gt=0, lt=1)
    """Leave out rows of whose tokens a smaller share is trained."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files, folders or globs, here or remote; rows that share a run of words with them are left out."""
    decontaminate_words: int = Field(13, ge=5)
    """Words in such a run."""


class DataSpec(Spec):
    """Where conversations come from and what of them is trained."""

    train: tuple[SourceSpec, ...] = Field(min_length=1)
    """Sources to train on."""
    eval: tuple[SourceSpec, ...] = ()
    """Held-out sources; their loss is measured and never trained."""
    max_length: int = Field(4096, ge=8)
    """Tokens in a pack; a longer conversation is overlong."""
    train_on: Literal["assistant", "last_assistant"] = "assistant"
    """Which answers bear loss: every assistant turn, or only the last of each conversation. A message with `train: false` or
    `weight: 0` bears none, nor do answers within a list under `prompt`."""
    history: Literal["serve_exact", "last_turn"] = "serve_exact"
    """Where a template rewrites earlier turns: serve_exact gives each turn a sample with the context that serving shows it;
    last_turn trains only the turns that share the last one's context."""
    on_overlong: Literal["drop", "truncate_turns"] = "drop"
    """An overlong sample is dropped with its row and counted, or loses whole turns from its start; no answer is ever cut."""
    filters: FiltersSpec = Field(default_factory=FiltersSpec)
    max_refused: float = Field(0.01, ge=0, le=1)
    """Largest share of rows that may be refused, overlong and filtered rows apart; above it the run fails."""
    seed: int = Field(0, ge=0)
    """Seed of the order of rows."""
    window_rows: int = Field(4096, ge=1)
    """Rows, drawn from many places of the sources, that are packed together. The object stores of the nodes for data should
    hold five windows; 4,096 conversations of 1,360 tokens are 42 MB."""
    cache: str | None = "auto"
    """Folder, here or on another file system, of rendered rows that all runs share; auto is `.cache` in checkpoint.storage,
    null keeps none. It may be deleted at any time."""


class OptimSpec(Spec):
    """AdamW and its learning rate."""

    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on from its peak: cosine and linear fall to zero over the run, constant stays."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 turns clipping off."""


class TrainSpec(Spec):
    """How long to train and how much at once."""

    global_batch_size: int = Field(8, ge=1)
    """Packs in a step, over all workers."""
    epochs: int = Field(1, ge=1)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Steps after which training ends even inside an epoch."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations; null evaluates once, at the end."""
    early_stopping: int | None = Field(None, ge=1)
    """Evaluations in a row without a smaller held-out loss after which training ends; null trains to the end. Needs
    `checkpoint.best: eval/loss`, which keeps the weights that were better."""
    generations: int = Field(2, ge=0, le=64)
    """Held-out conversations to whose last question the model writes an answer before training and at each evaluation."""
    generation_tokens: int = Field(64, ge=1)
    """Tokens of such an answer at most; each takes a forward pass."""
    seed: int = Field(0, ge=0)
    """Seed of adapter weights and dropout."""
    self_test: bool = True
    """Prove on the first batch, before its step, that packed samples do not see each other; a failure ends the run."""


class EngineSpec(Spec):
    """DeepSpeed."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """What DeepSpeed shards over workers: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights; auto takes 2 where the
    weights fit on each worker, and else 3."""
    offload: Literal["none", "optimizer"] = "none"
    """What of training lives in the memory of the host: none, or the optimizer's state, which is stepped there; slower."""

    def stage(self) -> int:
        """The stage of a recipe whose layout is decided (`train/layout.py`)."""
        assert self.zero_stage != "auto", "a worker decides the layout before it builds anything"
        return self.zero_stage

    @model_validator(mode="after")
    def what_is_offloaded_is_sharded(self) -> "EngineSpec":
        """Raises ValueError for an optimizer in the host's memory that every worker would have whole."""
        if self.offload == "optimizer" and self.zero_stage in (0, 1):
            raise ValueError(
                f"offload: optimizer works with zero_stage 2 or 3 (found {self.zero_stage}); write zero_stage: auto"
            )
        return self


class ScaleSpec(Spec):
    """Workers."""

    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Training workers; with GPUs, one GPU each. [2, 8] goes on with any number from 2 to 8 that has places when workers
    start, for example after a node was lost, in the same steps."""
    use_gpu: Literal["auto"] | bool = "auto"
    """Train on GPUs; auto means where the cluster has any."""
    placement: Literal["auto", "by_role", "any"] = "auto"
    """by_role renders and packs on nodes labelled `node-role: data` and trains on those labelled `node-role: train`; any
    takes every node; auto means by_role where nodes of both labels are there at the start."""
    stall_seconds: float = Field(1800, gt=0)
    """Seconds without a batch until the run ends and says which stage of the data is starved; the same command goes on.
    Where no step ends for a quarter longer, the worker that hangs is named, and all are started again."""

    def bounds(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    def patience_seconds(self) -> int:
        """How long workers wait for each other in a collective: longer than the watchdog lets one of them hang."""
        return int(2 * self.stall_seconds) + 60

    @model_validator(mode="after")
    def fewest_workers_come_first(self) -> "ScaleSpec":
        """Raises ValueError where the bounds of num_workers descend."""
        fewest, most = self.bounds()
        if fewest > most:
            raise ValueError(f"num_workers: [{fewest}, {most}] descends; write [{most}, {fewest}]")
        return self


class CheckpointSpec(Spec):
    """Checkpoints and the run folder."""

    every_steps: int | None = Field(50, ge=1)
    """Steps between checkpoints; null writes only the last one."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    best: Literal["eval/loss", "train/loss"] | None = None
    """Metric whose smallest value marks a checkpoint that is kept besides the newest; with eval/loss, every evaluation that
    is better than all before writes one."""
    storage: str = "runs"
    """Folder that all nodes share, or a place on s3://, gs:// or any fsspec file system that all nodes reach; it holds a
    folder for each run. On an object store no disk need be shared."""

    @model_validator(mode="after")
    def storage_is_kept_and_holds_no_secret(self) -> "CheckpointSpec":
        """Raises ValueError for credentials in the storage's path, and for a storage that ends with its process."""
        _refuse_credentials("storage", self.storage)
        if self.storage.startswith("memory://"):
            raise ValueError(f"storage: {self.storage} is gone with its process; name a folder, or s3://bucket/runs")
        return self


class TrackingSpec(Spec):
    """MLflow."""

    uri: str | None = "sqlite:///mlflow.db"
    """Tracking server or database; null records nothing."""
    experiment: str = Field("burnish", min_length=1)
    """MLflow experiment."""


class AxisSpec(Spec):
    """One axis of a search space; exactly one of its fields is written."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """Evenly between two numbers."""
    log_uniform: tuple[float, float] | None = None
    """Evenly between the logarithms of two positive numbers."""

    @model_validator(mode="after")
    def an_axis_names_exactly_one_distribution(self) -> "AxisSpec":
        """Raises ValueError where none or several are written, or where bounds are not ascending."""
        written = [name for name in ("choice", "uniform", "log_uniform") if getattr(self, name) is not None]
        if len(written) != 1:
            raise ValueError(f"write exactly one of choice, uniform, log_uniform; found {written or 'none'}")
        if self.choice is not None and len({repr(value) for value in self.choice}) < len(self.choice):
            raise ValueError(f"choice names a value twice: {list(self.choice)}")
        for low, high in filter(None, (self.uniform, self.log_uniform)):
            if low >= high or (self.log_uniform is not None and low <= 0):
                raise ValueError(f"bounds must ascend, and be positive for log_uniform; found [{low}, {high}]")
        return self


class SweepSpec(Spec):
    """A search over recipe fields with Ray Tune and ASHA."""

    metric: str = "eval/loss"
    """Metric that ranks trials."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    space: dict[str, AxisSpec] = Field(default_factory=dict)
    """Axes: a dotted recipe path and how its values are drawn."""
    trials: int = Field(8, ge=1)
    """Recipes that are tried."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at the same time, no more than the cluster can place; null takes as many as that."""
