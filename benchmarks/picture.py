"""The picture of speed in the README: `python benchmarks/picture.py bench-results/bench.json`.

`make bench` writes it next to its results. The SVG is written here rather than by matplotlib,
because one file must suit light and dark pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

# case: its description for people who have not read cases.py
TITLES = {
    "bert128": ("Sentence encoder", "128 tokens, 12 heads of 64"),
    "bert512": ("BERT", "512 tokens, 12 heads of 64"),
    "gpt1k": ("GPT, causal", "1024 tokens, 12 heads of 64"),
    "llama2k": ("Llama, causal", "2048 tokens, 32 heads of 128"),
    "enc4k": ("Long document", "4096 tokens, 8 heads of 64"),
    "decode32k": ("Generating a token", "after 32,768 tokens, 8 KV heads of 128"),
}
NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

WIDTH, MARGIN = 760, 16
BARS_LEFT, BARS_WIDTH = 290, 340  # room for a title on the left, for a name on the right
BAR, GAP, CASE_GAP, TOP = 14, 3, 18, 80

STYLE = """
  .page { fill: #ffffff }
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 15px }
  .small { font-size: 12px; fill: #59636e }
  .ours { fill: #0969da } .theirs { fill: #c4ccd6 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #f0f6fc } .small { fill: #9198a1 }
    .ours { fill: #4493f8 } .theirs { fill: #4b535d }
  }
"""


class Bar(NamedTuple):
    name: str
    speed: float  # as a share of numattn's


def bars_of(row: dict) -> list[Bar]:
    """Return the bars of a case: numattn, then its peers, the fastest first."""
    peers = sorted(row["speedup_over"].items(), key=lambda item: item[1])
    theirs = [Bar(NAMES[peer], 1 / ratio) for peer, ratio in peers if peer in NAMES]
    return [Bar("numattn", 1.0), *theirs]


def can_draw(rows: list[dict], threads: int) -> bool:
    """Whether any case of the picture has a peer."""
    return any(row["case"] in TITLES and row["speedup_over"] for row in rows_of(rows, threads))


def rows_of(rows: list[dict], threads: int) -> list[dict]:
    return [row for row in rows if row["threads"] == threads]


def picture(rows: list[dict], threads: int, machine: list[str]) -> str:
    """Draw the cases of `TITLES` as an SVG: the longer a bar, the faster the library."""
    chosen = {row["case"]: row for row in rows_of(rows, threads)}
    groups = [(title, bars_of(chosen[case])) for case, title in TITLES.items() if case in chosen]
    fastest = max(bar.speed for _, bars in groups for bar in bars)
    body, y = [], TOP
    for (title, what), bars in groups:
        body.append(_text(MARGIN, y + 11, title, "title"))
        body.append(_text(MARGIN, y + 28, what, "small"))
        for bar in bars:
            width = max(2.0, BARS_WIDTH * bar.speed / fastest)
            kind = "ours" if bar.name == "numattn" else "theirs"
            body.append(
                f'<rect class="{kind}" x="{BARS_LEFT}" y="{y}" width="{width:.0f}" '
                f'height="{BAR}" rx="2"/>'
            )
            label = f"{bar.name} {bar.speed:.2f}"
            body.append(_text(BARS_LEFT + width + 6, y + 11, label, "small"))
            y += BAR + GAP
        y += CASE_GAP
    caption = f"Speed of attention (float32, {threads} threads): numattn is 1.00, longer is faster"
    head = [_text(MARGIN, 24, caption, "title")]
    head += [_text(MARGIN, 43 + 16 * n, line, "small") for n, line in enumerate(machine)]
    told = "; ".join(
        f"{title}: " + ", ".join(f"{bar.name} {bar.speed:.2f}" for bar in bars)
        for (title, _), bars in groups
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">',
            f"<title>{escape(caption)}</title>",
            f"<desc>{escape(told)}</desc>",
            f"<style>{STYLE}</style>",
            # A page may be light on a dark system, so the picture has its own background.
            f'<rect class="page" width="{WIDTH}" height="{y}" rx="6"/>',
            *head,
            *body,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y}">{escape(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="bench.json, as `make bench` writes it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/speed.svg"))
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    arguments.output.write_text(picture(results["cases"], arguments.threads, results["machine"]))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
