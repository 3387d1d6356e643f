"""A student's card as Markdown: what it was taught, how well it says it, what it costs."""

from typing import Any


def markdown(card: dict[str, Any]) -> str:
    """The card as its README; no sentence of the text stands in it."""
    failed, cost = "; ".join(card["failed"]), card["int8 - fp32"]
    verdict = f"**failed its gate: {failed}**" if failed else "passed its gate"
    text, gold = f"{card['pieces of text']:,}", f"{card['gold sentences']:,}"
    lines = [
        f"# A distilled tagger: {card['student']}",
        "",
        f"Taught by {card['teacher']} ({card['method']}): {text} pieces of text, {gold} gold "
        f"sentences, {card['updates']:,} updates. It {verdict}.",
        "",
        f"Agreement with its teacher on held-out text: **F1 {card['agreement']:.1f}**. "
        f"int8 against fp32: {cost['difference']:+.2f} [{cost['low']:.2f}, {cost['high']:.2f}].",
        "",
        "| type | teacher's entities, held out | recall of them | threshold |",
        "|---|---|---|---|",
    ]
    for kind in card["types"]:
        row = f"| {kind} | {card['found'][kind]:,} | {card['recall'][kind]:.1f} "
        lines.append(row + f"| {card['thresholds'][kind]:.2f} |")
    if "gold" in card:
        lines += [
            "",
            f"| F1 on gold | {' | '.join(card['gold'])} |",
            "|---" * (1 + len(card["gold"])) + "|",
        ]
        for kind in ("all", *card["types"]):
            own = [f"{side[kind]['f1']:.1f}" for side in card["gold"].values() if kind in side]
            lines.append(f"| {kind} | {' | '.join(own)} |")
    if "student - teacher" in card:
        apart = card["student - teacher"]
        told = f"{apart['difference']:+.2f} [{apart['low']:.2f}, {apart['high']:.2f}]"
        lines += ["", f"Student minus teacher on gold, paired over sentences: {told}."]
    lines += ["", "| | ms a text, p50 | p95 | words a second |", "|---|---|---|---|"]
    for name, speed in card["speed"].items():
        row = f"| {name} | {speed['p50']:.2f} | {speed['p95']:.2f} "
        lines.append(row + f"| {speed['words a second']:,.0f} |")
    lines += [
        "",
        f"{card['parameters'] / 1e6:.1f} M parameters, {card['MB']:.1f} MB (int8 with tokenizer). "
        "Speed was measured side by side, one text at a time, on the machine that trained it.",
        "",
        "```python",
        "from kdlib.ship import runtime",
        'student = runtime.load(".")',
        'student.predict_entities("Any text.")',
        "```",
    ]
    if card["open"]:
        lines += ["", 'It can be asked for other labels too: `predict_entities(text, ["river"])`.']
    return "\n".join(lines) + "\n"
