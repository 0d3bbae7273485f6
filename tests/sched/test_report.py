"""Pictures and pages: what is drawn is what ran."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from hutch.sched import Capacity, create
from hutch.sched.report.axes import format_number, format_time, marks, ticks
from hutch.sched.report.curves import cdf_picture, cdf_text
from hutch.sched.report.drawing import COLOURS, Line, Rect, Text, ink_on, to_svg
from hutch.sched.report.gantt import Slice, SliceRecorder, gantt_picture, gantt_text
from hutch.sched.report.html import html_page
from hutch.sched.report.result import CSV_COLUMNS, Result, csv_cells, result_of
from hutch.sched.simulator import simulate
from tests.sched.traces import jobs

TRACE = jobs((0, 6), (0, 3), (1, 4), (2, 2), cores=(2, 1, 3, 1))


def played(policy: str) -> Result:
    recorder = SliceRecorder()
    summary = simulate(TRACE, create(policy, Capacity(cores=3)), observer=recorder)
    summary.policy = policy
    result = result_of(summary, curves=True)
    result.slices = recorder.slices
    return result


def test_bars_cover_what_ran_and_do_not_overlap() -> None:
    slices = played("rr:quantum=2").slices
    picture = gantt_picture(slices, 3)
    bars = [s for s in picture.shapes if isinstance(s, Rect) and s.label]
    plot = next(s for s in picture.shapes if isinstance(s, Rect) and not s.label)
    scale, row = plot.width / max(piece.ended for piece in slices), plot.height / 3
    work = sum(bar.width / scale * round(bar.height / row) for bar in bars)
    assert work == pytest.approx(6 * 2 + 3 + 4 * 3 + 2)
    for n, one in enumerate(bars):
        for other in bars[n + 1 :]:
            apart = (
                one.x + one.width <= other.x + 1e-6
                or other.x + other.width <= one.x + 1e-6
                or one.y + one.height <= other.y + 1e-6
                or other.y + other.height <= one.y + 1e-6
            )
            assert apart


def test_a_chart_of_many_slices_has_no_more_bars_than_can_be_seen() -> None:
    slices = [Slice(n, n, n + 1, 2, n) for n in range(20_000)]
    picture = gantt_picture(slices, 2)
    bars = [s for s in picture.shapes if isinstance(s, Rect)][1:]
    assert 1000 < len(bars) <= 2 * picture.width
    assert bars[-1].x > picture.width - 20
    assert not any(bar.label for bar in bars)


def test_svg_is_well_formed_whatever_a_job_is_called() -> None:
    recorder = SliceRecorder()
    trace = [j.__class__('<&">', j.submit, j.runtime) for j in TRACE[:1]]
    simulate(trace, create("fcfs", Capacity(cores=1)), observer=recorder)
    svg = to_svg(gantt_picture(recorder.slices, 1, title="a < b"))
    assert ET.fromstring(svg).tag.endswith("svg")


def test_png_has_two_pixels_for_each_unit() -> None:
    pytest.importorskip("PIL")
    from hutch.sched.report.png import to_png

    picture = gantt_picture(played("easy").slices, 3, title="easy")
    data = to_png(picture)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    size = struct.unpack(">II", data[16:24])
    assert size == (round(picture.width * 2), round(picture.height * 2))


def test_a_window_keeps_what_is_inside_it() -> None:
    recorder = SliceRecorder((2, 5), most=2)
    simulate(TRACE, create("fcfs", Capacity(cores=3)), observer=recorder)
    assert all(2 <= piece.began < piece.ended <= 5 for piece in recorder.slices)
    assert len(recorder.slices) == 2 and recorder.dropped == 0


def test_a_chart_in_the_terminal_has_a_row_for_each_job() -> None:
    lines = gantt_text(played("fcfs").slices, width=28)
    assert lines[0] == "1 │" + "█" * 12
    assert lines[1] == "2 │" + "█" * 6
    assert lines[2] == "3 │" + " " * 12 + "█" * 8
    assert lines[-1].split() == ["0", "12", "s"]
    short = gantt_text(played("fcfs").slices, width=28, rows=2)
    assert short[-1] == "2 more jobs are not shown"


def test_curves_are_stairs_from_the_lowest_value_to_the_highest() -> None:
    result = played("fcfs")  # of four jobs two do not wait, the others 5 and 8 seconds
    curve = result.curve("waiting")
    assert curve == [(0, 0.5), (5, 0.75), (8, 1)]
    picture = cdf_picture({"fcfs": curve}, "waiting")
    line = next(s for s in picture.shapes if isinstance(s, Line) and s.colour == COLOURS[0])
    shares = [round((260 - y) / 226, 6) for _, y in line.points]
    assert shares == [0.5, 0.5, 0.75, 0.75, 1, 1]
    assert all(a <= b for (a, _), (b, _) in pairwise(curve))
    ET.fromstring(to_svg(cdf_picture({"fcfs": curve}, "waiting")))
    assert "o fcfs" in cdf_text({"fcfs": curve}, "waiting")[-1]


def test_a_legend_has_room_for_every_name_and_says_which_curves_are_the_same() -> None:
    curve = played("fcfs").curve("waiting")
    long = "mlfq:levels=5,quantum=300,boost=86400"
    curves = {"fcfs": curve, long: curve, **{f"p{n}": [(n, 1.0)] for n in range(20)}}
    picture = cdf_picture(curves, "waiting")
    words = {s.words: s for s in picture.shapes if isinstance(s, Text)}
    name = words[f"{long} = fcfs"]
    assert name.x + 6 * len(name.words) < picture.width
    assert max(s.y for s in words.values()) < picture.height
    assert f"x {long} = fcfs," in cdf_text(curves, "waiting")[-1]


def test_a_page_says_which_schedules_it_does_not_draw() -> None:
    cut = played("rr:quantum=1")
    cut.dropped = 3
    page = html_page([played("fcfs"), cut], trace="log", cores=3, settings={})
    assert page.count("<svg") == 5 + 1
    assert "Not drawn, for they have too many slices: rr:quantum=1." in page


def test_large_numbers_are_written_out() -> None:
    assert [format_number(value) for value in (0.5, 18211.4, 1e7 + 0.5)] == [
        "0.5", "18211", "1.00e+07",
    ]  # fmt: skip


def test_the_page_is_whole_and_marks_the_best() -> None:
    page = html_page(
        [played("fcfs"), played("easy")], trace="<log>", cores=3, settings={"memory": "1"}
    )
    assert page.count("<svg") == 5 + 2
    assert 'class="best"' in page and "&lt;log&gt;" in page and "<log>" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_line_of_csv_has_every_column() -> None:
    assert len(csv_cells(played("fcfs"))) == len(CSV_COLUMNS)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0"), (0.25, "250 ms"), (59, "59 s"), (60, "1 min"), (90, "90 s"), (150, "2.5 min"),
     (3600, "1 h"), (7200, "2 h"), (86400, "1 d"), (1e7, "116 d"), (float("inf"), "–")],
)  # fmt: skip
def test_times_are_short(seconds: float, words: str) -> None:
    assert format_time(seconds) == words


def test_ticks_are_round() -> None:
    assert ticks(0, 30) == [0, 5, 10, 15, 20, 25, 30]
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 7200) == [0, 900, 1800, 2700, 3600, 4500, 5400, 6300, 7200]
    assert marks(1, 4000, times=True) == [1, 10, 60, 600, 3600]
    assert marks(1, 1500, times=False) == [1, 10, 100, 1000]
    assert marks(1, 18, times=True) == [1, 2, 5, 10]
    assert marks(1, 2.3, times=False) == [1, 2]
    assert marks(0.01, 0.2, times=True) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])


def test_what_is_written_on_a_colour_can_be_read_there() -> None:
    assert ink_on("#e69f00") == ink_on("#56b4e9") != ink_on("#0072b2") == ink_on("#7f3c8d")


def test_a_dark_page_has_dark_charts() -> None:
    page = html_page([played("fcfs")], trace="log", cores=3, settings={})
    rules = page.partition("@media (prefers-color-scheme: dark) {\nrect")[2].partition("</style>")[
        0
    ]
    for shape in ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6]).iter():
        for name in ("fill", "stroke"):
            colour = shape.get(name, "none")
            assert colour in COLOURS or colour == "none" or f'[{name}="{colour}"]' in rules
