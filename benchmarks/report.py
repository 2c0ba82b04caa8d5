"""Write docs/performance.md from benchmarks/results, so that no figure in it is typed by hand.

    python -m benchmarks.report            # the page
    python -m benchmarks.report --plots    # its pictures too, which takes `pip install matplotlib`

A result that is not there is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"

HEAD = """# Speed and memory, measured

This page is written by `python -m benchmarks.report` from the files in `benchmarks/results/`, each of which names the
machine, the versions and the commit that it was measured with. Ratios are of both sides in one run, in turns.
"""


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join([row(head), row("---" for _ in head), *map(row, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A figure as it is read: so many digits, thousands with commas."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1):
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    return f"{value:.{digits}g}"


def machine_of(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    where = f"{machine['threads']} threads of {machine['processor']}"
    where = where if machine["device"] == "cpu" else machine["device"]
    return f"*{where}, torch {machine['torch']}, diffusers {machine['diffusers']}, commit `{machine['commit'][:7]}`*"


def contest(result: Mapping[str, Any]) -> str:
    """One trainer beside another."""
    named = {"example": "diffusers' example", "ours": "this trainer", "ours in pure bf16": "this trainer, pure bf16"}
    rows = []
    for key, name in named.items():
        own = result.get(key)
        if own is None:
            continue
        rows.append([
            name,
            number(own["samples_a_second"]),
            number(own.get("times_its_speed")),
            number(own["peak_gb"]),
            number(own.get("times_its_peak")),
            number(own["seconds_to_first_step"]),
            number(own.get("seconds_to_first_step_later")),
            number(own.get("times_its_start_later")),
        ])
    head = ["", "samples/s", "times the example's", "peak, GB", "times its", "first step after, s", "... in later runs",
            "times its"]  # fmt: skip
    size = "the published architecture" if result["full_size"] else "a tiny pipeline"
    facts = f"{size}, {result['resolution']} px, batch {result['batch']}, rank {result['rank']}, {result['precision']}"
    return f"{facts}, {result['steps']} steps, {result['rounds']} rounds.\n\n{table(head, rows)}"


def training(result: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            number(case.get("peak_gb")),
            number(case.get("estimated_gb")),
            number(1000 * case["seconds_a_step"]) if "seconds_a_step" in case else "out of memory",
            number(case.get("samples_a_second")),
            number(case.get("seconds_of_the_first_step")),
        ]
        for name, case in result["cases"].items()
    ]
    return table(["case", "peak, GB", "as estimated", "ms a step", "samples/s", "first step, s"], rows)


def data(result: Mapping[str, Any]) -> str:
    photos = result["photos"] if isinstance(result["photos"], list) else [result["photos"]]
    rows = [
        [
            f"{own['size']} to {name}",
            number(rates["ours"]["images_per_core_second"]),
            number(rates["plain"]["images_per_core_second"]),
            number(rates["ratio_of_core_time"]),
            rates.get("target", "-"),
        ]
        for own in photos
        for name, rates in own.items()
        if isinstance(rates, Mapping)
    ]
    cached, on_all = result["cached"], result["all_cores"]
    int8, copied = cached["int8"], cached["copying_embeds_alone"]
    head = ["JPEGs", "images a core-second", "full decode and 25 % steps in Pillow", "times", "target"]
    return (
        f"{table(head, rows)}\n\nBy {on_all['cores']} cores, {on_all['size']} pixels: {number(on_all['ratio'])} times as"
        " fast by the clock as by one worker.\n\n"
        f"Cached samples with {cached['embeds']} embeds, in batches of {cached['batch']}:"
        f" {number(cached['samples_per_core_second'])} a core-second, {number(cached['mb_a_caption'])} MB a caption;"
        f" with `TEXT_EMBEDS_STORAGE=int8` {number(int8['samples_per_core_second'])}, {number(int8['mb_a_caption'])} MB;"
        f" the exact embeds copied, and nothing else: {number(copied['samples_per_core_second'])}. Cached embeds"
        f" beside one `torch.save` file for each caption: {number(result['embeds']['ratio_of_core_time'])} times the"
        " batches a second."
    )


def overhead(result: Mapping[str, Any]) -> str:
    return (
        f"The loop takes {100 * result['overhead']:.1f} % more time a step than a bare one over the same UNet, batch of"
        f" {result['batch']} and optimizer: {number(1000 * result['our_seconds_a_step'])} ms."
    )


def scaling(result: Mapping[str, Any]) -> str:
    parts = []
    if "datasets" in result:
        head = ["images", "first step of the first run, s", "of the second, s", "ms a step", "peak, GB"]
        rows = [
            [
                f"{own['images']:,}",
                number(own["first"]["seconds_to_first_step"]),
                number(own["second"]["seconds_to_first_step"]),
                number(1000 * own["second"]["seconds_a_step"]),
                number(own["second"]["peak_gb"]),
            ]
            for own in result["datasets"]
        ]
        parts.append(table(head, rows))
        if "bytes_an_image" in result:
            parts.append(f"Memory for each image more: {number(result['bytes_an_image'])} bytes.")
        parts.append("![start and step against the number of images](performance/datasets.png)")
    if "checkpoints" in result:
        rows = [[own["rank"], number(own["bytes"] / 1e6), number(own["seconds"])] for own in result["checkpoints"]]
        parts.append(table(["rank of a LoRA of IF-I-M", "checkpoint, MB", "written in, s"], rows))
        parts.append("![size and time of a checkpoint against the rank](performance/checkpoints.png)")
    return "\n\n".join(parts)


def scanning(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{own['images']:,}",
            number(own["first_scan_seconds"]),
            f"{own['opened_after_cut']['after']:,}",
            number(own["second_start_seconds"]["scan"]),
            number(own["second_start_seconds"]["all"]),
            number(own["bytes_an_image"]["scan"]),
            number(own["bytes_an_image"]["scan with captions"]),
            number(own["bytes_an_image"]["plan and epoch"]),
            number(own["bytes_an_image"]["cache"]),
            number(own["bytes_an_image"]["peak"]),
        ]
        for own in result["datasets"]
    ]
    head = ["images", "first scan, s", "opened again after a cut in its middle", "second scan, s", "second start, s",
            "bytes an image", "with its caption", "planned, besides", "in a cache's list", "at most while scanning"]
    minutes, seconds = result["first_scan_of_a_million_minutes"], result["second_start_of_a_million_seconds"]
    return (
        f"{table(head, rows)}\n\nA second start is its scan and all else that is done for each image before the weights"
        f" load. At the rates of the last row a million images take {number(minutes)} minutes to scan by"
        f" {result['workers']} threads, and {number(seconds)} seconds in a second start. There an image takes"
        f" {number(result['linear'])} times the first scan's seconds of the first row."
    )


def conditioning(result: Mapping[str, Any]) -> str:
    return (
        f"A tiny stage II after {result['steps']:,} steps on the same batches, on pictures that it never saw: shown its"
        f" low-resolution image as it will be when it samples, {result['noised_low_resolution_db']} dB (PSNR); shown"
        f" x_t in its place, {result['x_t_twice_db']} dB; bicubic upscaling {result['bicubic_db']} dB."
    )


def drift(result: Mapping[str, Any]) -> str:
    spread = [[name, *(percent(own.get(key)) for key in DRIFTS)] for name, own in result["embeds"].items()]
    own = result["demo"]
    changes = [[name, *map(percent, each.values())] for name, each in own["changes"].items()]
    names = ["changed", "embeds", "prediction", "mean loss", "loss of one picture"]
    return (
        f"What comes back other than it was, by the norm:\n\n{table(['', *DRIFTS.values()], spread)}\n\nThe demo's T5"
        f" and its trained stage I, {own['pictures']} pictures at {own['levels']} noise levels; its embeds are"
        f" {own['width']} wide, one group a token:\n\n{table(names, changes)}"
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{number(100 * value, 2)} %"


DRIFTS = {
    "bf16": "by rounding to bf16",
    "int8": "by int8 after that",
    "int8, the other channels": "... of the other channels",
    "int8, those beside a larger one": "... of those beside a larger one",
}
"""What is told of embeds in 8 bits, by its key in the result."""


def quantized(result: Mapping[str, Any]) -> str:
    """A LoRA beside weights of 8 and 4 bits."""
    parts = []
    if "memory" in result:
        head = ["estimated peak of a LoRA of rank 32, batch 4, pure bf16, GB", "`BASE_MODEL_PRECISION`", "plain",
                "with gradient checkpointing"]  # fmt: skip
        rows = [[own["model"], own["precision"], number(own["peak_gb"]), number(own["checkpointed_gb"])]
                for own in result["memory"]["estimates"]]  # fmt: skip
        parts.append(table(head, rows))
        counted = result["memory"]["counted"]
        head = [f"{counted['model']} on this machine, batch {counted['batch']}, bfloat16", "weights, GB",
                "tensors besides, at the most, GB", "times the time a step"]  # fmt: skip
        rows = [
            [name, number(own["weights_gb"]), number(own["activations_gb"]), number(own["times_the_time"])]
            for name, own in counted["precisions"].items()
        ]
        parts.append(table(head, rows))
    if "drift" in result:
        head = ["the demo's model", "its weights in", "predictions change by", "pictures of the same noise, PSNR, dB"]
        rows = [
            [model, name, f"{100 * own['relative_change']:.2g} %", number(own["psnr_of_pictures"])]
            for model, figures in result["drift"].items()
            for name, own in figures.items()
        ]
        parts.append(table(head, rows))
    if "learning" in result:
        learned = result["learning"]
        head = [f"the demo's LoRA after {learned['steps']} steps on a base in", "its loss in training",
                "its loss on the base in full", "distance from the first, in what that changed"]  # fmt: skip
        rows = [
            [name, number(own["training_loss"]), number(own["loss"]), f"{100 * own['distance']:.2g} %"]
            for name, own in learned.items()
            if isinstance(own, Mapping)
        ]
        parts.append(table(head, rows) + f"\n\nWithout a LoRA its loss is {number(learned['loss_of_the_base'])}.")
    return "\n\n".join(parts)




def released(result: Mapping[str, Any]) -> str:
    cases = [
        [name, *(number(case[figure]) for figure in ("peak_gb", "gradients_gb", "estimated_gb"))]
        for name, case in result["memory"].items()
    ]
    time = result["time"]
    return (
        "Tensors at the most, of a step of full tuning in pure bf16:\n\n"
        f"{table(['case', 'all, GB', 'gradients alone, GB', 'all, as estimated'], cases)}\n\nA step of a tiny model,"
        f" cut into as many buckets, takes {number(time['ratio'])} times as long with its gradients released."
    )


SECTIONS: Sequence[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = (
    ("DeepFloyd IF beside diffusers' example", "versus_diffusers", contest),
    ("Stable Diffusion beside diffusers' example", "versus_diffusers_sd", contest),
    ("Training on a GPU", "gpu_train", training),
    ("A frozen base of 8 and 4 bits", "quantized_base", quantized),
    ("Gradients that are released", "released_gradients", released),
    ("Images and captions", "data", data),
    ("Scanning a large dataset", "scan", scanning),
    ("Text embeds in 8 bits", "embeds_drift", drift),
    ("Large datasets, high ranks", "scaling", scaling),
    ("The loop itself", "step_overhead", overhead),
    ("How stage II is shown its image", "stage2_conditioning", conditioning),
)


def page(results: Path = RESULTS) -> str:
    """The page, from the results that are there."""
    parts, lacking = [HEAD], []
    for title, name, write in SECTIONS:
        path = results / f"{name}.json"
        if not path.exists():
            lacking.append(f"`python -m benchmarks.{name}`")
            continue
        result = json.loads(path.read_text("utf-8"))
        parts.append(f"## {title}\n\n`python -m benchmarks.{name}`; {machine_of(result)}\n\n{write(result)}\n")
    if lacking:
        parts.append(f"## Not measured yet\n\n{', '.join(lacking)}\n")
    return "\n".join(parts)


def plot(result: Mapping[str, Any], folder: Path) -> None:
    """The pictures of the scaling's result."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    if rows := result.get("datasets"):
        counts = [row["images"] for row in rows]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
        for name in ("first", "second"):
            left.plot(counts, [row[name]["seconds_to_first_step"] for row in rows], "o-", label=f"{name} run")
        left.set(xlabel="images", ylabel="seconds to the first step", ylim=(0, None))
        left.legend()
        right.plot(counts, [1000 * row["second"]["seconds_a_step"] for row in rows], "o-")
        right.set(xlabel="images", ylabel="ms a step", xscale="log", ylim=(0, None))
        figure.savefig(folder / "datasets.png", dpi=100)
    if rows := result.get("checkpoints"):
        ranks = [row["rank"] for row in rows]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
        left.plot(ranks, [row["bytes"] / 1e6 for row in rows], "o-")
        left.set(xlabel="rank", ylabel="checkpoint, MB", ylim=(0, None))
        right.plot(ranks, [row["seconds"] for row in rows], "o-")
        right.set(xlabel="rank", ylabel="seconds to write it", ylim=(0, None))
        figure.savefig(folder / "checkpoints.png", dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true", help="draw the pictures too")
    options = parser.parse_args(arguments)
    PAGE.write_text(page(), "utf-8")
    if options.plots:
        plot(json.loads((RESULTS / "scaling.json").read_text("utf-8")), PLOTS)


if __name__ == "__main__":
    main()
