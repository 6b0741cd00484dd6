"""The plots of the pages: what each shows, and its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from report.chart import Axis, Bar, Series, bars, chart, number, tints
from report.terminal import mib
from validation.figure import TIE_MARGIN

if TYPE_CHECKING:
    from validation.evaluation import Score

PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "MLP",
    "output": "output layer",
    "norms": "norms",
    "rope": "RoPE's tables",
    "other": "graph, code and padding",
}


@dataclass(frozen=True)
class Plot:
    title: str
    picture: Markup
    text: str


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**10:,.1f} KiB" if n_bytes < 2**20 else mib(n_bytes)


def difference_plot(differences: dict[str, dict[str, Any]]) -> Plot:
    """One histogram for each name, in bins of the widest."""
    series, widest = [], max(found["limit"] for found in differences.values())
    for name, found in differences.items():
        counts, n = found["counts"], len(found["counts"])
        shares = [0.0] * (n + 1)  # the last ends the steps
        for i, count in enumerate(counts):
            middle = (2 * i + 1 - n) / n * found["limit"]
            shares[int((middle / widest + 1) / 2 * n)] += 100 * count / max(1, sum(counts))
        points = [((2 * i - n) / n * widest, share) for i, share in enumerate(shares)]
        series.append(Series(name, points, "steps"))
    title = "Difference of the logits from float32"
    picture = chart(title, Axis("difference of a logit"), Axis("share of logits, %"), series)
    texts = []
    for name, found in differences.items():
        text = "no logit is a number"
        if found["median"] is not None:
            median, p95, limit = (number(found[key]) for key in ("median", "p95", "limit"))
            text = f"half of the logits differ by less than {median}, 95% by less than {p95}, all by at most {limit}"
        if found["not_finite"]:
            text += f"; {found['not_finite']} are not finite"
        texts.append(f"{name}: {text}" if name else text[0].upper() + text[1:])
    (one, *_) = differences.values()
    texts.append(f"Float32's own logits have a standard deviation of {number(one['spread'])}")
    return Plot(title, picture, ". ".join(texts) + ".")


def agreement_plot(reports: dict[str, dict[str, Any]], by: str) -> Plot:
    """by: "masks", the steps of generation from the first to the last, or "position"."""
    title = {"masks": "Agreement over the steps of generation", "position": "Agreement over the length"}[by]
    label = {"masks": "masks already written", "position": "position of the predicted token"}[by]
    series, lowest = [], 100.0
    for name, report in reports.items():
        groups = report["agreement"][by]
        most = max(group["last"] for group in groups)
        points = []
        for group in groups:
            middle = (group["first"] + group["last"]) / 2
            points.append((most - middle if by == "masks" else middle, 100 * group["same"]))
        tips = tuple(
            f"{100 * group['same']:.1f}% of {group['rows']} rows, "
            f"{'masks left' if by == 'masks' else 'positions'} {group['first']} to {group['last']}"
            for group in groups
        )
        series.append(Series(name, points, "line", tips))
        lowest = min(lowest, *(y for _, y in points))
    limits = (min(95.0, 5 * (lowest // 5)), 100.0)
    picture = chart(title, Axis(label), Axis("same token as float32, %", limits), series)
    rows = [group["rows"] for report in reports.values() for group in report["agreement"][by]]
    text = {
        "masks": "Left the answer is all masks, as in the first step; right nearly all of it is written.",
        "position": "By where in the sequence the token stands.",
    }[by]
    return Plot(title, picture, f"{text} Each dot is {min(rows)} to {max(rows)} masked positions.")


def noise_plots(noise: dict[str, Any] | None) -> list[Plot]:
    """Error by layer, and by matrix. noise: as `report_json.noise_of` gives it."""
    title, matrices_title = "Error of each layer", "Error of each matrix"
    if noise is None:
        return [Plot(title, Markup(), "None: the recipe leaves all weights and activations in float32.")]
    layers = noise["layers"]
    series = []
    for name, key in (("the stream after it", "stream_db"), ("the layer alone", "alone_db")):
        points = [(float(i), layer[key]) for i, layer in enumerate(layers) if layer[key] is not None]
        tips = tuple(f"layer {x:.0f}, {name}: {y:.1f} dB" for x, y in points)
        if points:
            series.append(Series(name, points, "line", tips))
    rows = {kind.removesuffix("_proj"): [layer["matrices"][kind] for layer in layers] for kind in layers[0]["matrices"]}
    if not series or all(value is None for row in rows.values() for value in row):
        return [Plot(title, Markup(), "No layer gives finite numbers.")]
    by_layer = chart(title, Axis("layer", whole=True), Axis("signal to noise, dB"), series, legend="inside")
    by_matrix = tints(matrices_title, "layer", rows)
    text = "The residual stream against float32's; alone: where the layer is given float32's own."
    return [
        Plot(title, by_layer, f"{text} {costliest(noise)}."),
        Plot(
            matrices_title,
            by_matrix,
            "Signal to noise of what each gives for float32's input, dB. The stronger the tint, the noisier.",
        ),
    ]


def costliest(noise: dict[str, Any]) -> str:
    """Which layer costs most, and which of its matrices."""
    layers = noise["layers"]
    for i, layer in enumerate(layers):
        if None in (layer["alone_db"], *layer["matrices"].values()):
            return f"Layer {i} gives numbers that are not finite"
    most = max(range(len(layers)), key=lambda i: float(layers[i]["share"]))
    if layers[most]["share"] == 0:
        return "No layer adds noise"
    kind, least = min(layers[most]["matrices"].items(), key=lambda pair: float(pair[1]))
    return f"Layer {most} costs most: {100 * layers[most]['share']:.0f} % of the noise, {kind} alone {least:.1f} dB"


def speed_plot(calls: dict[str, list[dict[str, Any]]]) -> Plot:
    """One set of dots for each name."""
    title = "Time of one call"
    series = []
    for name, listed in calls.items():
        points = [(float(call["tokens"]), 1000 * call["seconds"]) for call in listed]
        tips = tuple(f"{call['where']}: {1000 * call['seconds']:.2f} ms" for call in listed)
        series.append(Series(name, points, "dots", tips))
    picture = chart(title, Axis("tokens of the call", log=True), Axis("ms", log=True), series)
    return Plot(title, picture, "Each recorded call, run once, as it comes. The command bench measures speed.")


def fidelity_plot(calls: list[dict[str, Any]], figures: dict[str, Any]) -> Plot:
    kinds: dict[str, list[dict[str, Any]]] = {"free of rounding ties": [], "with rounding ties": []}
    for call in calls:
        is_free = call["tie_margin"] is None or call["tie_margin"] > TIE_MARGIN
        if call["fidelity_db"] is not None:
            kinds["free of rounding ties" if is_free else "with rounding ties"].append(call)
    series = [
        Series(
            name,
            [(float(call["kv_len"]), call["fidelity_db"]) for call in mine],
            "dots",
            tuple(f"{call['where']}: {call['fidelity_db']:.1f} dB" for call in mine),
        )
        for name, mine in kinds.items()
        if mine
    ]
    names = {"fidelity_db": "bound", "fidelity_exact_db": "bound of calls without a tie"}
    by_bound = {figures[name]["bound"]: text for name, text in reversed(names.items()) if name in figures}
    bounds = {text: bound for bound, text in by_bound.items()}  # of two that are equal the first
    title = "Fidelity over the length"
    text = "Each recorded call against the same quantized model in eager."
    if not series:
        return Plot(title, Markup(), "No call gave finite logits.")
    return Plot(
        title,
        chart(title, Axis("positions that the call sees", log=True), Axis("signal to noise, dB"), series, bounds),
        text,
    )


def parts_plot(sizes: dict[str, Any]) -> Plot:
    title, total = "Size by part", sizes["program"]
    rows = [
        Bar(PARTS[part], n_bytes, f"{size(n_bytes)}, {100 * n_bytes / total:.1f}%")
        for part, n_bytes in sizes["parts"].items()
    ]
    ideal = total / sizes["ideal_program"]
    text = (
        f"Of model.pte, {size(total)}; weights with their scales and biases. It is {ideal:.3f} of the recipe's ideal."
    )
    return Plot(title, bars(title, rows), text)


def memory_plan_plot(manifest: dict[str, Any]) -> Plot:
    title, planned = "Memory plan", sum(manifest["memory_plan"])
    model, itemsize = manifest["model"], 2 if manifest["recipe"]["dtype"] == "float16" else 4
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    positions, layers = manifest["export"]["max_seq_len"], model["num_hidden_layers"]
    caches = 2 * layers * positions * model["num_key_value_heads"] * head_dim * itemsize
    rows = [
        Bar("caches of keys and values", caches, size(caches)),
        Bar("activations and logits between delegates", max(0, planned - caches), size(max(0, planned - caches))),
    ]
    text = (
        f"{size(planned)} that the runtime sets aside before the first call, for {layers} layers and {positions:,} "
        "positions. Weights and what a delegate needs inside come besides."
    )
    return Plot(title, bars(title, rows), text)


def seconds_plot(report: dict[str, Any]) -> Plot:
    title = "Time of the stages"
    rows = [Bar(stage["name"], stage["seconds"], f"{stage['seconds']:,.1f} s") for stage in report["stages"]]
    total = sum(bar.value for bar in rows)
    return Plot(title, bars(title, rows), f"{total:,.0f} s in all, on {report['machine']['cpus']} processors.")


def peak_plot(report: dict[str, Any]) -> Plot:
    title, needs = "Peak memory of the stages", report["estimate"]["memory"]
    peaks = {stage["name"]: stage["peak_rss"] for stage in report["stages"]}
    peaks["program"] = report["program"]["peak_rss"]
    names = {"program": "the program, in its own process"}
    rows = [Bar(names.get(name, name), peak, size(peak), needs.get(name)) for name, peak in peaks.items()]
    text = "Of the process, with Python and torch. The line across a bar is the estimate made before the run."
    return Plot(title, bars(title, rows), text)


def evaluation_plot(task: str, scores: list[Score]) -> Plot:
    """Of one task: what is right against the calls of an item, by rule."""
    mine = [score for score in scores if score.task == task]
    series = []
    for rule in dict.fromkeys(score.rule for score in mine):
        of_rule = [score for score in mine if score.rule == rule]
        points = [(score.forward_calls / score.n, 100 * score.solved) for score in of_rule]
        tips = tuple(
            f"cache {score.cache}: {100 * score.solved:.1f}% ({100 * score.low:.1f} to {100 * score.high:.1f})"
            for score in of_rule
        )
        series.append(Series(rule or "as it stands", points, "dots", tips))
    what = mine[0].what
    title = f"{task}: what is right, and the calls that it takes"
    return Plot(title, chart(title, Axis("calls of one"), Axis(f"{what} right, %"), series), "")
