"""Gate values of every member along the tokens of a text (BTS, arXiv 2502.00075, figures 2 and 3).

A gate is a vector per member and token; its value here is the mean over the hidden dimensions. Experts-into-Hub: shares
of the hub's new state, which sum to 1. Hub-into-Experts: what each expert takes of the hub's state; the hub has none.
Output mixture: one number per member and token, shares of the next token's probabilities, which sum to 1.

A text may consist of several parts, say of different subjects. Parts are tokenized apart, so that every token belongs
to one, and joined by an empty line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from megabts.bts.gates import OUTPUT_TITLE, gate_places, record_gates
from megabts.bts.model import BTSModel
from megabts.errors import UsageError, UserError
from megabts.inference.generate import evaluating, score
from megabts.inference.text_stream import TextStream
from megabts.tokenizers.protocol import Tokenizer
from megabts.viz.figures import PALETTE
from megabts.viz.labels import name_ends
from megabts.viz.overlay import DASHES
from megabts.viz.records import Record

SEPARATOR = "\n\n"
OUTPUT, ALL = "output", "all"
"""What `choose_layers` calls the mixture of outputs, and all there is."""
MAX_LABELLED = 72
"""With more tokens than this their numbers stand at the axis, and not their texts."""
LABEL_LETTERS = 14
INCHES_A_TOKEN, NARROWEST, WIDEST, PANEL_HEIGHT = 0.17, 6.0, 14.0, 2.1
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
MARKS = {"\n": "↵", "\t": "⇥", " ": "·"}


@dataclass
class GateTrace(Record):
    """Gate values along one text.

    `tokens`: the text's pieces, "" for one that ends within a character, which the next one has; `layers`: titles of
    `bts.gates.gate_places`, an output mixture last; `values[layer][member][token]`, None where a member has no gate;
    `switches`: the first token of every part but the first.
    """

    members: list[str]
    layers: list[str]
    tokens: list[str]
    values: list[list[list[float | None]]]
    switches: list[int]

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.members), len(self.tokens))
        for layer in self.values:
            found = (len(self.values), len(layer), *{len(row) for row in layer})
            if found != shape:
                raise UserError(f"gate values of {found} layers, members and tokens; there are {shape}")


def trace_gates(model: BTSModel, tokenizer: Tokenizer, parts: Sequence[str]) -> GateTrace:
    """Run a text of these parts through the model once and keep its gates.

    Raises UserError when it has no tokens, more than the model takes, or some outside the model's vocabulary.
    """
    texts = [part + SEPARATOR for part in parts[:-1]] + [*parts[-1:]]
    encoded = [tokenizer.encode(text) for text in texts]
    ids = [token for part in encoded for token in part]
    _check(ids, model)
    with evaluating(model), torch.inference_mode(), record_gates(model) as record:
        score(model, ids, tokenizer.eod_id)
    values: list[list[list[float | None]]] = []
    places = gate_places(model)
    for index, place in enumerate(places):
        (gates,) = record.places[index]  # [members gated, s, 1]
        rows = [[round(value, 6) for value in row] for row in gates[:, :, 0].tolist()]
        hub: list[list[float | None]] = [] if place.gates_hub else [[None] * len(ids)]
        values.append([*hub, *rows])
    starts = [sum(map(len, encoded[:number])) for number in range(1, len(encoded))]
    stream = TextStream(tokenizer, [])
    tokens = [stream.add(token) for token in ids]
    tokens[-1] += stream.finish()
    return GateTrace(list(model.bts.members), [place.title for place in places], tokens, values, starts)


def _check(ids: Sequence[int], model: BTSModel) -> None:
    longest, vocabulary = model.config.max_seq_len, model.config.vocab_size
    if not ids:
        raise UserError("the prompt has no tokens; give a text")
    if len(ids) > longest:
        raise UserError(f"the prompt has {len(ids)} tokens, the model takes {longest} (model.max_seq_len); shorten it")
    if max(ids) >= vocabulary:
        raise UserError(
            f"the prompt has token {max(ids)}, the model's vocabulary ends at {vocabulary - 1}; is this the model's "
            "tokenizer?"
        )


def choose_layers(trace: GateTrace, wanted: Sequence[str]) -> GateTrace:
    """Only the stitch layers after these layers of the members, `output` (the mixture's), or `all`.

    None: where the output is a mixture it alone, for it decides; else all. Raises UsageError for one not there.
    """
    names = [OUTPUT if title == OUTPUT_TITLE else title.split(",")[0].removeprefix("layer ") for title in trace.layers]
    for name in wanted:
        if name not in (*names, ALL):
            raise UsageError(f"--layer {name}: there are no gates of that name; there are {', '.join([*names, ALL])}")
    wanted = wanted or ([OUTPUT] if OUTPUT in names else [ALL])
    kept = [place for place, name in enumerate(names) if name in wanted or ALL in wanted]
    layers, values = [trace.layers[place] for place in kept], [trace.values[place] for place in kept]
    return GateTrace(trace.members, layers, trace.tokens, values, trace.switches)


def write_trace(trace: GateTrace, path: Path) -> None:
    """Write the values as JSON, fields as in `GateTrace`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")


def draw_gates(trace: GateTrace, path: Path) -> None:
    """Write a picture (type by the name's ending): a panel per place, a line per member, switches dashed.

    Members differ in colour and in dashes, and are named at their lines' ends. The folder is made as needed.
    """
    num_tokens, num_panels = len(trace.tokens), len(trace.layers)
    labelled = num_tokens <= MAX_LABELLED
    width = min(max(1.2 + INCHES_A_TOKEN * num_tokens, NARROWEST), WIDEST)
    with matplotlib.rc_context(STYLE):
        size = (width, PANEL_HEIGHT * num_panels + (0.9 if labelled else 0.4))
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        panels = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
        panels[0].set_xlim(-0.5, num_tokens - 0.5)
        if labelled:
            panels[-1].set_xticks(range(num_tokens), [label_of(token) for token in trace.tokens], rotation=90)
            panels[-1].tick_params("x", labelsize=7.5)
        else:
            panels[-1].set_xlabel("token")
        for axes, name, rows in zip(panels, trace.layers, trace.values, strict=True):
            axes.set_title(name, loc="left", fontsize=9)
            axes.set_ylabel("gate" if name == OUTPUT_TITLE else "gate, mean")
            axes.set_ylim(0, 1.05 * max(value for row in rows for value in row if value is not None))
            axes.grid(True, axis="y", color="#dfe3e8", linewidth=0.6)
            for switch in trace.switches:
                axes.axvline(switch - 0.5, color="#5d6670", linewidth=1, linestyle=(0, (4, 3)))
        figure.canvas.draw()  # the sizes of panels, which line labels need, follow from ticks and titles
        for axes, rows in zip(panels, trace.values, strict=True):
            _draw_members(axes, trace.members, rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_members(axes: Axes, members: Sequence[str], rows: Sequence[Sequence[float | None]]) -> None:
    ends = []
    for number, (member, row) in enumerate(zip(members, rows, strict=True)):
        if row[-1] is None:
            continue
        colour = PALETTE[number % len(PALETTE)]
        few = len(row) <= MAX_LABELLED
        axes.plot(
            range(len(row)),
            row,  # type: ignore[arg-type]
            color=colour,
            linestyle=DASHES[number % len(DASHES)],
            linewidth=1.5 if few else 1.0,
            marker="o" if few else "",
            markersize=2.5,
        )
        ends.append((member, row[-1], colour))
    name_ends(axes, len(rows[0]) - 0.7, ends)


def label_of(token: str) -> str:
    """A token as a label: blanks as marks, what the picture's font lacks as its code, a long one cut."""
    font = get_font(findfont(FontProperties()))
    shown = token[:LABEL_LETTERS] + ("…" if len(token) > LABEL_LETTERS else "")
    letters = [MARKS.get(letter, letter) for letter in shown]
    return "".join(
        letter if letter.isprintable() and font.get_char_index(ord(letter)) else f"\\u{ord(letter):04x}"
        for letter in letters
    )
