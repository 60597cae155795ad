"""Every row of a forward lies in one segment, under the rule that its request and position give."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_diffusion.engine.attention.segments import Segment, Visibility, plan_segments

pytestmark = pytest.mark.vllm

CAUSAL, SPAN, CANVAS = Visibility.CAUSAL, Visibility.SPAN, Visibility.CANVAS


@dataclass(frozen=True)
class Rows:
    """The rows of one request in a forward."""

    computed: int
    length: int
    canvas: int = 0
    """How many of them, the last ones, are canvas rows."""
    spans: tuple[tuple[int, int], ...] = ()
    padding: int = 0
    """How many rows behind the canvas nobody reads."""


def plan(*requests: Rows) -> list[Segment]:
    query_start = [0]
    for request in requests:
        query_start.append(query_start[-1] + request.length)
    return plan_segments(
        query_start,
        [request.computed + request.length for request in requests],
        [request.canvas for request in requests],
        [request.spans for request in requests],
        [request.padding for request in requests],
    )


def test_text_is_one_causal_segment():
    assert plan(Rows(5, 7)) == [Segment(0, 0, 7, 12, CAUSAL)]


def test_a_canvas_is_one_segment_whatever_images_its_prompt_had():
    assert plan(Rows(40, 32, canvas=32, spans=((3, 20),))) == [Segment(0, 0, 32, 72, CANVAS)]


def test_an_image_between_texts():
    assert plan(Rows(0, 30, spans=((4, 14),))) == [
        Segment(0, 0, 4, 4, CAUSAL),
        Segment(0, 4, 10, 14, SPAN, 4),
        Segment(0, 14, 16, 30, CAUSAL),
    ]


def test_images_side_by_side_at_both_ends():
    assert plan(Rows(0, 10, spans=((0, 4), (4, 10)))) == [
        Segment(0, 0, 4, 4, SPAN, 0),
        Segment(0, 4, 6, 10, SPAN, 4),
    ]


def test_the_rest_of_an_image_whose_beginning_is_cached():
    assert plan(Rows(6, 10, spans=((0, 3), (4, 14), (20, 25)))) == [
        Segment(0, 0, 8, 14, SPAN, 4),
        Segment(0, 8, 2, 16, CAUSAL),
    ]


def test_an_image_that_ends_or_begins_at_the_border_of_a_step_is_not_in_it():
    assert plan(Rows(14, 6, spans=((4, 14), (20, 25)))) == [Segment(0, 0, 6, 20, CAUSAL)]


def test_a_canvas_does_not_see_the_padding_behind_it():
    assert plan(Rows(40, 64, canvas=32, padding=32), Rows(9, 32, canvas=32)) == [
        Segment(0, 0, 32, 72, CANVAS),
        Segment(0, 32, 32, 104, CAUSAL),
        Segment(1, 64, 32, 41, CANVAS),
    ]


def test_commit_rows_are_text_before_the_canvas():
    assert plan(Rows(40, 49, canvas=32)) == [
        Segment(0, 0, 17, 57, CAUSAL),
        Segment(0, 17, 32, 89, CANVAS),
    ]


def test_requests_follow_each_other():
    assert plan(Rows(9, 2), Rows(40, 32, canvas=32), Rows(0, 5, spans=((1, 3),))) == [
        Segment(0, 0, 2, 11, CAUSAL),
        Segment(1, 2, 32, 72, CANVAS),
        Segment(2, 34, 1, 1, CAUSAL),
        Segment(2, 35, 2, 3, SPAN, 1),
        Segment(2, 37, 2, 5, CAUSAL),
    ]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    borders = sorted(draw(st.sets(st.integers(0, 60), max_size=6)))
    spans = tuple(zip(borders[::2], borders[1::2], strict=False))
    length = draw(st.integers(1, 30))
    return Rows(draw(st.integers(0, 40)), length, draw(st.integers(0, length)), spans)


@settings(derandomize=True, database=None)
@given(st.lists(rows(), min_size=1, max_size=4))
def test_every_row_has_one_segment_and_the_right_rule(requests: list[Rows]):
    segments = plan(*requests)
    found = [
        (segment.request, segment.end - segment.length + offset, segment)
        for segment in segments
        for offset in range(segment.length)
    ]
    expected = [
        (number, request.computed + offset)
        for number, request in enumerate(requests)
        for offset in range(request.length)
    ]
    assert [(request, position) for request, position, _ in found] == expected
    starts = [sum(each.length for each in segments[:number]) for number in range(len(segments))]
    assert [segment.start for segment in segments] == starts
    for number, position, segment in found:
        request = requests[number]
        inside = [span for span in request.spans if span[0] <= position < span[1]]
        text_end = request.computed + request.length - request.canvas
        if position >= text_end:
            assert segment.visibility is CANVAS
        elif inside:
            assert segment.visibility is SPAN
            assert segment.span_start == inside[0][0]
            assert segment.end == min(inside[0][1], text_end)
        else:
            assert segment.visibility is CAUSAL
