"""Schedules against their definition: every pass once, no deadlock, the live activations that theory gives."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megabts.errors import UsageError
from megabts.parallel.schedules import (
    Action,
    Message,
    ScheduleKind,
    Span,
    Step,
    build_schedule,
    plan,
    received,
    sent,
    timeline,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"


def cases() -> Iterator[tuple[ScheduleKind, int, int, int]]:
    """(kind, ranks, chunks, micro-batches)."""
    for p in range(1, 9):
        for m in range(1, 17):
            yield "none", p, 1, m
            yield "1f1b", p, 1, m
        for chunks in range(1, 5):
            for m in range(p, 17, p):
                yield "interleaved", p, chunks, m


def flags(frozen: int, stages: int) -> list[bool]:
    return [stage >= frozen for stage in range(stages)]


def schedules(kind: ScheduleKind, p: int, m: int, chunks: int, needs: Sequence[bool]) -> list[list[Action]]:
    return [build_schedule(kind, p, rank, m, chunks, needs) for rank in range(p)]


def run_buffered(ranks: list[list[Action]], needs: Sequence[bool]) -> bool:
    """Walk all ranks with blocking receives and sends that never block; whether all come to the end."""
    p, mail, place = len(ranks), set[Message](), [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            while place[rank] < len(actions):
                action = actions[place[rank]]
                wanted = received(action, p, rank, needs)
                if wanted is not None and wanted not in mail:
                    break
                mail.discard(wanted)  # type: ignore[arg-type]
                message = sent(action, p, rank, needs)
                if message is not None:
                    assert message.source == rank
                    mail.add(message)
                place[rank], moved = place[rank] + 1, True
    return not mail and all(at == len(actions) for at, actions in zip(place, ranks))


def run_rendezvous(posted: list[list[list[Message]]]) -> bool:
    """Walk groups that end only when each of their messages is in the other side's present group too."""
    place, done = [0] * len(posted), [set[Message]() for _ in posted]
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(posted):
            if place[rank] == len(mine):
                continue
            for message in mine[place[rank]]:
                other = message.target if message.source == rank else message.source
                theirs = posted[other][place[other]] if place[other] < len(posted[other]) else []
                if message in theirs:
                    done[rank].add(message)
                    done[other].add(message)
            if done[rank].issuperset(mine[place[rank]]):
                place[rank], moved = place[rank] + 1, True
    return all(at == len(mine) for at, mine in zip(place, posted))


def peak_live(actions: list[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += 1 if action.kind == "forward" else -1
        peak = max(peak, live)
    return peak


def test_every_pass_once_and_backward_after_forward() -> None:
    for kind, p, chunks, m in cases():
        for frozen in range(p * chunks + 1):
            needs = flags(frozen, p * chunks)
            for rank, actions in enumerate(schedules(kind, p, m, chunks, needs)):
                mine = [chunk for chunk in range(chunks) if needs[chunk * p + rank]]
                wanted = {Action("forward", i, chunk) for i in range(m) for chunk in range(chunks)}
                wanted |= {Action("backward", i, chunk) for i in range(m) for chunk in mine}
                assert Counter(actions) == Counter(wanted)
                place = {action: at for at, action in enumerate(actions)}
                for action in wanted:
                    if action.kind == "backward":
                        assert place[Action("forward", action.microbatch, action.chunk)] < place[action]


def test_never_a_deadlock() -> None:
    """With buffered sends, and with sends that end with their receive; two ranks' messages stand in one order."""
    for kind, p, chunks, m in cases():
        for frozen in range(p * chunks + 1):
            needs = flags(frozen, p * chunks)
            ranks = schedules(kind, p, m, chunks, needs)
            case = (kind, p, chunks, m, frozen)
            assert run_buffered(ranks, needs), case
            if frozen % 3 and p * chunks > 12:
                continue  # the rest takes long, and every prefix has been seen in smaller pipelines
            plans = [plan(kind, p, rank, m, chunks, tuple(needs)) for rank in range(p)]
            assert_in_time(plans, needs)
            posted = [[list(step.messages) for step in steps if step.messages] for steps in plans]
            assert run_rendezvous(posted), case
            assert_one_order(posted, case)


def assert_one_order(posted: list[list[list[Message]]], case: object) -> None:
    ways: dict[tuple[int, int, int], list[Message]] = {}
    for rank, mine in enumerate(posted):
        for group in mine:
            for message in group:
                ways.setdefault((message.source, message.target, rank), []).append(message)
    for (source, target, rank), messages in ways.items():
        if rank == source:
            assert messages == ways[source, target, target], case


def assert_in_time(plans: list[tuple[Step, ...]], needs: Sequence[bool]) -> None:
    """Each message is posted once, after the action that ends with it and before the one that waits for it."""
    for rank, steps in enumerate(plans):
        posted, produced = set[Message](), set[Message]()
        for step in steps:
            for message in step.messages:
                assert message not in posted
                assert (message in produced) == (message.source == rank)
                posted.add(message)
            if step.action is not None:
                wanted = received(step.action, len(plans), rank, needs)
                assert wanted is None or wanted in posted
                message = sent(step.action, len(plans), rank, needs)
                produced |= {message} if message is not None else set()
        assert produced <= posted


def test_a_deadlock_is_seen() -> None:
    needs = flags(0, 2)
    first, second = schedules("1f1b", 2, 2, 1, needs)
    assert run_buffered([first, second], needs)
    assert not run_buffered([first[:1] + first[2:3] + first[1:2] + first[3:], second[2:] + second[:2]], needs)
    there, back = Message("forward", 0, 0, 0, 1), Message("backward", 0, 0, 1, 0)
    assert run_rendezvous([[[there, back]], [[back], [there]]])
    assert not run_rendezvous([[[there], [back]], [[back], [there]]])


def test_live_activations_are_those_of_the_theory() -> None:
    for kind, p, chunks, m in cases():
        for rank, actions in enumerate(schedules(kind, p, m, chunks, [True] * (p * chunks))):
            if kind == "none":
                wanted = 1
            elif chunks == 1:
                wanted = min(m, p - rank)
            else:  # Megatron-LM: the warm-up and the forward after it
                wanted = min(m * chunks, 2 * (p - rank - 1) + (chunks - 1) * p + 1)
            assert peak_live(actions) == wanted, (kind, p, chunks, m, rank)


def test_1f1b_by_hand() -> None:
    assert text("1f1b", 3, 0, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text("1f1b", 3, 2, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert text("none", 3, 0, 2) == "F0 B0 F1 B1"
    assert text("1f1b", 1, 0, 2) == "F0 B0 F1 B1"


def test_interleaved_by_hand() -> None:
    """Rank 1 of 2 with two chunks: the lower letters are the second chunk's."""
    assert text("interleaved", 2, 1, 4, 2) == "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3"
    assert text("interleaved", 2, 1, 4, 2, frozen=2) == "F0 F1 f0 b0 f1 b1 F2 F3 f2 b2 f3 b3"


def text(kind: ScheduleKind, p: int, rank: int, m: int, chunks: int = 1, frozen: int = 0) -> str:
    actions = build_schedule(kind, p, rank, m, chunks, flags(frozen, p * chunks))
    return " ".join(f"{'FBfb'[2 * a.chunk + (a.kind == 'backward')]}{a.microbatch}" for a in actions)


def test_interleaved_wants_multiples_only_where_it_has_backward() -> None:
    with pytest.raises(UsageError, match=r"parallel.pipeline 4, but train.global_batch / .* is 6; change"):
        build_schedule("interleaved", 4, 0, 6, 2, [True] * 8)
    for m in range(1, 10):
        assert run_buffered(schedules("interleaved", 4, m, 2, [False] * 8), [False] * 8)
        assert run_buffered(schedules("interleaved", 4, m, 1, [True] * 4), [True] * 4)


def picture(spans: Sequence[Sequence[Span]]) -> str:
    """A timeline as text, one row a rank and one cell a second.

    F and B are passes of the first chunk, f and b of the second and so on, with the micro-batch's number; a pass that
    takes several cells goes on as dashes, and dots are waiting.
    """
    end = max(span.end for row in spans for span in row)
    rows = []
    for rank, row in enumerate(spans):
        cells = [" ."] * round(end)
        for span in row:
            first, last = round(span.start), round(span.end)
            letter = ("FB", "fb")[span.action.chunk % 2][span.action.kind == "backward"]
            cells[first:last] = [f"{letter}{span.action.microbatch}", *["--"] * (last - first - 1)]
        rows.append(f"rank {rank}  {' '.join(cells)}")
    return "\n".join(rows)


def test_documented_pictures() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for kind, frozen in (("none", 0), ("1f1b", 0), ("1f1b", 1), ("interleaved", 0)):
        chunks = 2 if kind == "interleaved" else 1
        needs = flags(frozen, 3 * chunks)
        m = 2 if kind == "none" else 3 if chunks == 2 else 4
        ranks = schedules(kind, 3, m, chunks, needs)  # type: ignore[arg-type]
        assert picture(timeline(ranks, needs, [1] * 3 * chunks, [2] * 3 * chunks)) in text, (kind, frozen)
