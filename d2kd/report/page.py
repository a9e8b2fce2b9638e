"""The page of a report: its sections, and the template that they fill."""

import json
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import jinja2
import torch
from markupsafe import Markup

from ..complexity import Complexity, measure
from ..errors import D2kdError
from ..experiments.series import spread
from ..export import evaluation_size, load_detector
from .charts import bar_chart, line_chart
from .pictures import Picture, TestSet, comparison_rows, detection_rows, legend, load_student
from .runs import ReportRun, is_number

MISSING = "\u2013"  # an en dash
#: Columns of the table: metrics of the last evaluation.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
CLASS = "bbox/AP-"
PULL_HINT = "MODEL.DISTILL.GRADIENT_PERIOD 20 (LazyConfig: model.gradient_period=20) does"

Groups = Dict[str, List[ReportRun]]


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        title: its heading.
        text: a sentence about what it shows, or why there is nothing to show.
        charts: title and drawing of each chart.
        rows: pictures, in rows.
        legend: names and colors of classes.
    """

    title: str
    text: str = ""
    charts: Sequence[Tuple[str, Markup]] = ()
    rows: Sequence[Sequence[Picture]] = ()
    legend: Sequence[Tuple[str, str]] = ()


def write_report(
    runs: Sequence[Tuple[str, Path]],
    output: Path,
    title: str = "Distillation report",
    num_images: int = 4,
    latency_seconds: float = 1.0,
) -> Path:
    """Writes one HTML file that needs no other file and no network, about one run or several.

    Each section shows what the runs have: metrics of what was logged, pictures if there are detections and the test set
    is registered, features and scores if a run's student and teacher can be loaded. What is missing, it says.

    Args:
        runs: label and folder of each run, in order. Runs with the same label are repetitions with other seeds.
        output: the file to write.
        title: heading of the page.
        num_images: number of images of the test set to show; 0 for none.
        latency_seconds: how long to measure the latency of each detector, on the CPU; 0 does not measure it.

    Returns:
        The file.

    Raises:
        D2kdError: there are no runs, or a folder holds no metrics.
    """
    groups = _grouped([ReportRun(label, Path(folder)) for label, folder in runs])
    sections = [
        _curves("AP", groups),
        _curves("Losses", groups),
        _bars(groups),
        *_distillation(groups),
        *(_pictures(groups, num_images) if num_images else []),
    ]
    page = _template().render(
        title=title,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        torch=torch.__version__,
        table=_table(groups, latency_seconds),
        sections=sections,
        differences=_differences(groups),
        configs={label: (same[0], _config(same[0])) for label, same in groups.items()},
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def _grouped(runs: Sequence[ReportRun]) -> Groups:
    if not runs:
        raise D2kdError("a report needs a run; name its folder")
    groups: Groups = {}
    for run in runs:
        if not run.records:
            raise D2kdError(f"{run.folder} holds no metrics of a run (metrics.json)")
        groups.setdefault(run.label, []).append(run)
    return groups


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("template.html")


def _table(groups: Groups, latency_seconds: float) -> List[Dict[str, str]]:
    """A row for each label: size, speed, training and accuracy; mean and deviation over seeds."""
    rows = []
    for label, same in groups.items():
        row = {"": label, "seeds": str(len(same))}
        row.update({metric: _spread([_last(run, f"bbox/{metric}") for run in same]) for metric in METRICS})
        row.update(_cost(same[0], latency_seconds))
        steps = [step for run in same for _, step in run.curve("time")]
        row["iterations"] = str(same[0].records[-1]["iteration"])
        row["s/step"] = f"{median(steps):.3f}" if steps else MISSING
        rows.append(row)
    return [{name: row[name] for name in rows[0] if any(x[name] != MISSING for x in rows)} for row in rows]


def _spread(values: Sequence[Optional[float]]) -> str:
    found = [value for value in values if value is not None]
    return spread(found) if found else MISSING


def _last(run: ReportRun, metric: str) -> Optional[float]:
    """A metric of the run's last evaluation."""
    value = run.evaluations[-1].get(metric) if run.evaluations else None
    return value if is_number(value) else None


def _cost(run: ReportRun, seconds: float) -> Dict[str, str]:
    """Size and speed of the detector that a run has trained, if it can be built from the folder."""
    config, opts = run.config
    cost: Optional[Complexity] = None
    try:
        detector = load_detector(config, str(run.folder / "model_final.pth"), opts)
        cost = measure(detector, evaluation_size(config, opts), seconds)
    except D2kdError:
        pass
    return {
        "parameters": f"{cost.parameters / 1e6:.2f} M" if cost else MISSING,
        "MACs": f"{cost.macs / 1e9:.2f} G" if cost else MISSING,
        "latency": f"{cost.latency_ms:.1f} ms" if cost and cost.latency_ms else MISSING,
    }


def _curves(name: str, groups: Groups) -> Section:
    """AP or the detector's own losses, over iterations and over seconds."""
    is_ap = name == "AP"
    runs = [run for same in groups.values() for run in same]
    found = [(run, [(x + 1, y) for x, y in run.curve("bbox/AP")] if is_ap else run.own_loss()) for run in runs]
    y = "AP" if is_ap else "detection loss"
    over = {
        "iteration": [(run.label, points) for run, points in found],
        "seconds of training": [(run.label, run.seconds(points)) for run, points in found],
    }
    charts = [(f"{y} over {x}", line_chart(lines, x, y, log=not is_ap, markers=is_ap)) for x, lines in over.items()]
    text = (
        "On the test set, while training."
        if is_ap
        else "The detector's own losses together, without those of methods. Seconds do not include evaluation."
    )
    return Section(name, text, [chart for chart in charts if chart[1]])


def _bars(groups: Groups) -> Section:
    """AP by class and by size of the objects, of the last evaluation."""
    classes: Dict[str, Dict[str, float]] = {}
    sizes: Dict[str, Dict[str, float]] = {name: {} for name in SIZES.values()}
    for label, same in groups.items():
        last = [run.evaluations[-1] for run in same if run.evaluations]
        for key in dict.fromkeys(key for record in last for key in record):
            values = [record[key] for record in last if is_number(record.get(key))]
            if values and key.startswith(CLASS):
                classes.setdefault(key[len(CLASS) :], {})[label] = mean(values)
            elif values and key[len("bbox/") :] in SIZES:
                sizes[SIZES[key[len("bbox/") :]]][label] = mean(values)
    sizes = {name: values for name, values in sizes.items() if values}
    charts = [("AP of each class", bar_chart(classes, "AP")), ("AP by size of the object", bar_chart(sizes, "AP"))]
    text = "Of the last evaluation; the mean over seeds. COCO's sizes: small below 32² pixels, large above 96²."
    return Section("Classes and sizes", text, [chart for chart in charts if chart[1]])


def _distilled(groups: Groups) -> List[ReportRun]:
    """The first run of each label that has methods."""
    return [same[0] for same in groups.values() if same[0].methods]


def _distillation(groups: Groups) -> List[Section]:
    """Each loss of each student, and how strongly it pulls."""
    text = (
        "Each loss as logged, with its weight, and its pull: its gradient at the feature pyramid, relative to that of "
        "the detector's own losses together."
    )
    charts: List[Tuple[str, Markup]] = []
    for run in _distilled(groups):
        losses, pulls = list(run.losses().items()), list(run.gradients().items())
        charts.append((f"{run.label}: losses", line_chart(losses, "iteration", "loss", log=True)))
        charts.append((f"{run.label}: pull", line_chart(pulls, "iteration", "pull", log=True, markers=True)))
        if not pulls:
            text = f"{text} The pull of {run.label} was not logged: {PULL_HINT}."
    return [Section("Distillation", text, [chart for chart in charts if chart[1]])] if charts else []


def _pictures(groups: Groups, num_images: int) -> List[Section]:
    """Detections of all runs, then what each student and its teacher compare."""
    first = [same[0] for same in groups.values()]
    names = {name for run in first for name in run.detections}
    sections = []
    for name in sorted(names):
        files = {run.label: run.detections[name] for run in first if name in run.detections}
        title = f"Detections on {name}"
        try:
            test_set = TestSet(name)
            images = test_set.sample(num_images)
            rows, lowest = detection_rows(test_set, images, files)
        except (D2kdError, OSError) as error:
            sections.append(Section(title, f"No pictures: {error}."))
            continue
        sections.append(Section(title, f"With scores above {lowest:.2g}.", rows=rows, legend=legend(test_set)))
        sections += [_comparison(run, test_set, images[:2]) for run in _distilled(groups)]
    return sections


def _comparison(run: ReportRun, test_set: TestSet, images: Sequence[Mapping[str, Any]]) -> Section:
    title = f"Features and scores: {run.label}"
    text = (
        "At the finest level: the mean magnitude of the feature pyramid, each on its own scale, and the highest score "
        "of all levels and classes, from 0 (black) to 1 (white)."
    )
    try:
        return Section(title, text, rows=comparison_rows(load_student(run), run, test_set, images))
    except D2kdError as error:
        return Section(title, f"Not shown: {error}.")


def _differences(groups: Groups) -> List[Dict[str, str]]:
    """The settings in which the labels differ."""
    values = {label: same[0].values for label, same in groups.items()}
    keys = sorted({key for each in values.values() for key in each} - {"OUTPUT_DIR", "train.output_dir"})
    rows = []
    for key in keys if len(values) > 1 else []:
        texts = {label: _text(each.get(key)) for label, each in values.items()}
        if len(set(texts.values())) > 1:
            rows.append({"": key, **texts})
    return rows


def _text(value: Any) -> str:
    return MISSING if value is None else value if isinstance(value, str) else json.dumps(value)


def _config(run: ReportRun) -> str:
    return "\n".join(f"{key}: {_text(value)}" for key, value in sorted(run.values.items()))
