"""What a person sees of a run while it trains, and the numbers the run leaves behind.

Every logging interval becomes a line of ``metrics.jsonl``, a point in TensorBoard, and an update of
the progress display on a terminal, or a plain line where stderr is none. Everything for people goes
to stderr; stdout belongs to ``--json``.

Left out on purpose: where metrics come from (plain floats are handed in), what is good or bad
(``verdict`` says it in words), and Weights & Biases.
"""

import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from kava_jax.journal.metrics_file import METRICS_NAME, Kind, cut, read_metrics
from kava_jax.journal.verdict import alarms, collapse_signs, collapsed_layers, verdict
from kava_jax.storage import Place, growing

TENSORBOARD_NAME = "tensorboard"

# Logged direction losses that are looked at for oscillation.
HISTORY = 8

# What an evaluation shows beyond a training line; the rest is only written down.
EVALUATED = {
    "kl": ("kl", "{:.4f}"),
    "cos_centered": ("centred", "{:.3f}"),
    "retrieval": ("retrieval", "{:.3f}"),
    "attention_cos": ("attention output", "{:.3f}"),
    "exact_match_strict": ("exact match", "{:.4f}"),
}

Metrics = Mapping[str, float | int | None]
# Figures by mapped layer, such as {"teacher/cka_k": [0.3, 0.5]}.
Layers = Mapping[str, Sequence[float]]


@dataclass(eq=False)
class Monitor:
    """Writes and shows the metrics of one run; a context manager.

    Args:
        run_dir: gets ``metrics.jsonl`` and ``tensorboard/``; made if missing.
        total_steps: the step at which the run is done.
        start_step: 0 starts over and drops the metrics of an earlier attempt; k > 0 continues after
            step k and drops what was written for later steps, so that no step appears twice.
        write: False on all processes but the first: nothing is written, nothing is shown.

    A value of None, NaN or infinity is written as ``null``, because JSON has no NaN; the last two
    are also said aloud. ``OSError`` (a full disk) passes through to the caller.
    """

    run_dir: Place
    total_steps: int
    start_step: int = 0
    write: bool = True

    def __post_init__(self) -> None:
        self._raised: set[str] = set()
        self._dir_losses: deque[float] = deque(maxlen=HISTORY)
        self._first_log: tuple[int, float] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> "Monitor":
        if not self.write:
            return self
        from tensorboardX import SummaryWriter

        # Where one of these cannot be opened, those before it are closed again.
        with ExitStack() as stack:
            self._files = stack.enter_context(growing(self.run_dir, METRICS_NAME))
            path = self._files.directory / METRICS_NAME
            # Cut before it is opened, or the lines of an earlier attempt would come twice.
            cut(path, self.start_step)
            self._file = stack.enter_context(path.open("a", encoding="utf-8"))
            self._tensorboard = stack.enter_context(
                # purge_step: TensorBoard itself hides what an earlier attempt wrote from there on.
                SummaryWriter(
                    str(self._files.directory / TENSORBOARD_NAME),
                    purge_step=self.start_step + 1 if self.start_step else 0,
                    flush_secs=10,
                )
            )
            self._display = stack.enter_context(_display(self.start_step, self.total_steps))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._exit.__exit__(*raised)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record and show one logging interval of training; alarms are said when they begin."""
        if not self.write:
            return
        self._record(step, "train", metrics)
        self._display.progress(step, shown(metrics), self._time_left(step))
        # The figure in an alarm changes every time; an alarm is the same if its words are.
        raised = {re.sub(r"\d[\w.+-]*", "", alarm): alarm for alarm in self._alarms(metrics)}
        for words, alarm in raised.items():
            if words not in self._raised:
                self._display.say(f"warning at step {step}: {alarm}")
        self._raised = set(raised)

    def diagnostics(self, step: int, values: Metrics, layers: Layers) -> None:
        """Record what a probe found on a training batch; it is not shown."""
        if self.write:
            self._record(step, "diagnostics", values, layers)

    def evaluation(self, step: int, metrics: Metrics, layers: Layers) -> None:
        """Record and show one evaluation on held-out data (``eval_`` is not shown twice).

        At step 0 nothing has been learnt, so nothing can have collapsed: there is no verdict yet.
        """
        if not self.write:
            return
        self._record(step, "eval", metrics, layers)
        names = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        fields = shown(names, EVALUATED, judged=step > 0)
        self._display.say(f"evaluation at step {step}  {_join(fields)}")
        if step > 0 and (collapse := _collapse(names, layers)):
            self._display.say(f"warning at step {step}: {collapse}")
        if bad := _not_finite(metrics):
            self._display.say(f"warning at step {step}: {', '.join(bad)}")

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation at ``step`` was recorded before; only the first process knows."""
        if not self.write:
            return False
        recorded = read_metrics(self._files.directory / METRICS_NAME, "eval")
        return any(line["step"] == step for line in recorded)

    def publish(self) -> None:
        """Make what was recorded so far outlast this machine, where the run is on a bucket."""
        if self.write:
            # The writer keeps events in memory for ``flush_secs``.
            self._tensorboard.flush()
            self._files.publish()

    def skipped(self, step: int, rows: Sequence[int]) -> None:
        """Record and say that a step was skipped, with the training rows of its batch."""
        if not self.write:
            return
        self._write_line({"step": step, "kind": "skipped", "rows": list(rows)})
        self._display.say(
            f"warning at step {step}: loss or gradient is not finite; the step was skipped (its "
            f"rows are in {METRICS_NAME})"
        )

    def note(self, text: str) -> None:
        """Say one line to the person; it is not part of the metrics."""
        if self.write:
            self._display.say(text)

    def _record(
        self, step: int, kind: Kind, metrics: Metrics, layers: Layers | None = None
    ) -> None:
        finite: dict[str, Any] = {key: _finite(value) for key, value in metrics.items()}
        by_layer = {key: [_finite(value) for value in row] for key, row in (layers or {}).items()}
        record = {"step": step, "kind": kind, **finite}
        record |= {"layers": by_layer} if by_layer else {}
        self._write_line(record)
        points = {key.removeprefix("eval_"): value for key, value in finite.items()}
        for key, row in by_layer.items():
            points |= {f"layers/{key}/{layer:02d}": value for layer, value in enumerate(row)}
        for key, value in points.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{kind}/{key}", value, global_step=step)

    def _write_line(self, record: Mapping[str, Any]) -> None:
        # Python would write NaN, which no other reader of JSON takes; ``_finite`` has made it null.
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        # A resumed run writes no line up to its checkpoint again, so a kill must not lose any.
        self._file.flush()

    def _alarms(self, metrics: Metrics) -> list[str]:
        finite = {key: _finite(value) for key, value in metrics.items()}
        mag_ratio = finite.get("mag_ratio")
        if (dir_loss := finite.get("dir_loss")) is not None:
            self._dir_losses.append(dir_loss)
        # A ratio that is unknown must raise no alarm, and a ratio of 1 raises none.
        found = alarms(
            mag_ratio=1.0 if mag_ratio is None else mag_ratio,
            mag_loss=finite["mag_loss"] or 0.0 if "mag_loss" in finite else None,
            dir_losses=tuple(self._dir_losses),
        )
        return [*_not_finite(metrics), *found]

    def _time_left(self, step: int) -> str:
        """At the mean pace since the first logged step, so that compiling does not count."""
        now = time.monotonic()
        if self._first_log is None:
            self._first_log = (step, now)
        first_step, first_time = self._first_log
        if step <= first_step:
            return ""
        return _duration((self.total_steps - step) * (now - first_time) / (step - first_step))


def shown(
    metrics: Metrics, more: Mapping[str, tuple[str, str]] | None = None, *, judged: bool = True
) -> list[tuple[str, str]]:
    """Names and values as people read them, most important first; what is absent is left out.

    The verdict word follows the cosine and is taken over the same steps: the running mean
    with its running gap where there is one, else this step's cosine and shuffled cosine;
    ``judged`` False leaves it out.
    ``more`` adds further metrics: their key, the name to show, and the number's format.
    """
    running = metrics.get("cos_running") is not None
    cosine, gap = ("cos_running", "gap_running") if running else ("cos_sim", "alignment_gap")
    over = metrics.get(gap)
    formats = {
        "loss": ("loss", "{:.4f}"),
        "ce": ("ce", "{:.4f}"),
        "ce_handed": ("handed over", "{:.4f}"),
        "loss_handed": ("handed over", "{:.4f}"),
        cosine: ("cos", "{:.3f}"),
        gap: ("gap", "{:.3f}"),
        "mag_ratio": ("magnitude", "{:.2f}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
    }
    fields = []
    for key, (name, form) in (formats | dict(more or {})).items():
        if (value := metrics.get(key)) is None:
            continue
        text = form.format(value)
        if judged and key == cosine and math.isfinite(value):
            # ``summarize`` keeps the running gap and drops the shuffled cosine behind it.
            text += f" ({verdict(value, None if over is None else value - over)})"
        fields.append((name, text))
    return fields


class _Lines:
    """For log files and pipes: one flushed line at a time and no control characters."""

    def __init__(self, total_steps: int):
        self._total_steps = total_steps

    def progress(self, step: int, fields: list[tuple[str, str]], left: str) -> None:
        width = len(str(self._total_steps))
        fields = [("step", f"{step:{width}}/{self._total_steps}"), *fields]
        self.say(_join([*fields, ("left", left)] if left else fields))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Terminal(Progress):
    """For eyes: a bar and a table that stay in place, with everything said scrolling above."""

    def __init__(self, start_step: int, total_steps: int):
        self._figures: list[Table] = []  # asked for while the bar is being made
        super().__init__(
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            # Messages hold paths and lists in brackets, which rich would take for its own markup.
            console=Console(stderr=True, force_terminal=True, highlight=False, markup=False),
            # stdout belongs to --json: rich must not draw it into the display.
            redirect_stdout=False,
        )
        self._run = self.add_task("", total=total_steps, completed=start_step, left="")

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar and, below it, the figures."""
        yield from super().get_renderables()
        yield from self._figures

    def progress(self, step: int, fields: list[tuple[str, str]], left: str) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name, _ in fields:
            table.add_column(name, no_wrap=True)
        table.add_row(*(Text(value, style="bold") for _, value in fields))
        self._figures = [table]
        self.update(self._run, completed=step, left=f"left {left}" if left else "")

    def say(self, text: str) -> None:
        style = "yellow" if text.startswith("warning") else ""
        self.console.print(Text(text, style=style))


def _display(start_step: int, total_steps: int) -> AbstractContextManager[_Lines | _Terminal]:
    # A dumb terminal (an editor's shell, some CI) is no place for a display that redraws itself.
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return _Terminal(start_step, total_steps)
    return nullcontext(_Lines(total_steps))


def _finite(value: float | int | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _not_finite(metrics: Metrics) -> list[str]:
    """One sentence per metric that is NaN or infinite."""
    return [
        f"{key} is {float(value)}, written as null"
        for key, value in metrics.items()
        if value is not None and not math.isfinite(value)
    ]


def _collapse(names: Metrics, layers: Layers) -> str:
    """Why an evaluation is called collapsed, as a whole or by layer; "" where it is not."""
    cosine = names.get("cos_sim")
    if cosine is not None and verdict(cosine, names.get("cos_shuffled")) == "collapsed":
        return f"collapsed: {'; '.join(collapse_signs(names))}"
    parts = [
        f"{what} of mapped layers {', '.join(map(str, rows))}"
        for what, rows in collapsed_layers(layers).items()
    ]
    return f"collapsed by layer: {'; '.join(parts)}" if parts else ""


def _join(fields: list[tuple[str, str]]) -> str:
    return "  ".join(f"{name} {value}" for name, value in fields)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
