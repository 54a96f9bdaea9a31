"""The GLUE tasks: columns, order of labels, metrics, and the names in GLUE's own files and on its submission server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from loralib.adapters.names import places_in


@dataclass(frozen=True)
class Task:
    """A classification or regression of one or two texts.

    `label_names[i]` is the name of label id i, in the order of the hub's nyu-mll/glue; None means regression.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label_range: tuple[float, float] | None = None  # of a regression: lowest and highest label
    train_rows: int | None = None  # size of the released training split
    # GLUE's own download: the name of its folder, and the column names that differ from the hub's.
    folder: str | None = None
    tsv_columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tsv_header: tuple[str, ...] | None = None  # for train and dev files that come without a header
    # The training file has rows cut in two, which are left out as on the hub, and empty texts, which are only warned
    # of.
    drops_cut_rows: bool = False
    # GLUE's server: file name and number of rows for each test split, and whether it wants label names or label ids.
    submission: Mapping[str, tuple[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    submits_names: bool = False

    @property
    def num_labels(self) -> int:
        """Outputs of the classification head: the number of classes, 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_MNLI_COLUMNS = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}
_MRPC_COLUMNS = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}

# Sizes, label order and column names: nyu-mll/glue on the hub. Submission names: the FAQ of gluebenchmark.com, whose
# sample submission has `0` and `1` for WNLI although its labels have names.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), train_rows=8551,
             folder="CoLA", tsv_header=("source", "label", "mark", "sentence"),
             submission={"cola": ("CoLA.tsv", 1063)}),
        Task("mnli", ("premise", "hypothesis"), _NLI, ("accuracy",), train_rows=392702,
             folder="MNLI", tsv_columns=_MNLI_COLUMNS, submits_names=True,
             submission={"mnli": ("MNLI-m.tsv", 9796), "mnli-mm": ("MNLI-mm.tsv", 9847)}),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), train_rows=3668,
             folder="MRPC", tsv_columns=_MRPC_COLUMNS,
             submission={"mrpc": ("MRPC.tsv", 1725)}),
        Task("qnli", ("question", "sentence"), _ENTAILS, ("accuracy",), train_rows=104743,
             folder="QNLI", submits_names=True,
             submission={"qnli": ("QNLI.tsv", 5463)}),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), train_rows=363846,
             folder="QQP", tsv_columns={"is_duplicate": "label"}, drops_cut_rows=True,
             submission={"qqp": ("QQP.tsv", 390965)}),
        Task("rte", _PAIR, _ENTAILS, ("accuracy",), train_rows=2490,
             folder="RTE", submits_names=True,
             submission={"rte": ("RTE.tsv", 3000)}),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), train_rows=67349,
             folder="SST-2",
             submission={"sst2": ("SST-2.tsv", 1821)}),
        Task("stsb", _PAIR, None, ("pearson", "spearmanr"), label_range=(0.0, 5.0), train_rows=5749,
             folder="STS-B", tsv_columns={"score": "label"},
             submission={"stsb": ("STS-B.tsv", 1379)}),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), train_rows=635,
             folder="WNLI",
             submission={"wnli": ("WNLI.tsv", 146)}),
        Task("ax", ("premise", "hypothesis"), _NLI, ("accuracy",),
             folder="diagnostic", tsv_columns=_MNLI_COLUMNS, submits_names=True,
             submission={"ax": ("AX.tsv", 1104)}),
    )
}  # fmt: skip


def glue_ids(task: Task) -> list[int]:
    """Map ids in the order of `task.label_names`, which may be a head's, to ids in GLUE's own order."""
    names, own = task.label_names or (), GLUE[task.name].label_names or ()
    places = places_in(names, own)
    if places is None:
        raise ValueError(f"{names} are not the labels of {task.name}, {own}")
    return places


def task_of_folder(name: str) -> Task | None:
    """The task with this name on the hub (mrpc) or of its download folder (MRPC, SST-2, diagnostic); None if none."""
    return next((task for task in GLUE.values() if name.lower() in (task.name, str(task.folder).lower())), None)
